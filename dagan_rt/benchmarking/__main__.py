"""`python -m dagan_rt.benchmarking`: `dagan-rt bench` from a checkout, with nothing installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dagan_rt.benchmarking.command import add_commands
from dagan_rt.cli import guarded

PROGRAM = "python -m dagan_rt.benchmarking"


def build_parser() -> argparse.ArgumentParser:
    """The parser; each command sets `run`, a function from the parsed arguments to the exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Repeatable measurements.", allow_abbrev=False)
    add_commands(parser.add_subparsers(title="commands", metavar="COMMAND", required=True))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""

    def run() -> int:
        arguments = build_parser().parse_args(argv)
        return int(arguments.run(arguments))

    return guarded(PROGRAM, run)


if __name__ == "__main__":
    sys.exit(main())
