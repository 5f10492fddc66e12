"""`dagan-rt bench`: measurements that people can repeat, see benchmarks/README.md."""

from __future__ import annotations

from typing import Any

from dagan_rt.benchmarking.command import add_commands


def add_parser(subparsers: Any) -> None:
    """Register the command, and its own."""
    parser = subparsers.add_parser(
        "bench",
        help="measure kernels, frames and streams, and compare with earlier results",
        description="Repeatable measurements: results are checked, then timed, and kept with what they were made on.",
    )
    add_commands(parser.add_subparsers(title="commands", metavar="COMMAND", required=True))
