"""`python -m dagan_rt.benchmarking`: run a suite, or show and compare what one found."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dagan_rt._assets import asset
from dagan_rt.benchmarking.rows import OURS, Results, compare
from dagan_rt.benchmarking.suites import DTYPES, FLOWS, LAYOUTS, Goal, Suite
from dagan_rt.cli import guarded
from dagan_rt.files import check_output

PROGRAM = "python -m dagan_rt.benchmarking"


def build_parser() -> argparse.ArgumentParser:
    """The parser; each command sets `run`, a function from the parsed arguments to the exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Repeatable measurements.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_kernels(commands)
    add_show(commands)
    return parser


def add_kernels(commands: Any) -> None:
    """Register `kernels`."""
    parser = commands.add_parser(
        "kernels",
        help="time the CUDA kernels against PyTorch's own",
        description="Time the CUDA kernels against PyTorch's own, results checked first. Exit code 1: a result of ours "
        "was wrong, or --compare found a regression.",
    )
    parser.add_argument("--suite", type=Path, metavar="FILE", help="default: benchmarks/suites/kernels.toml")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep the rows, with what they were measured on")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what changed since")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these operations")
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="only these batch sizes")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS)
    parser.add_argument("--flows", nargs="+", choices=FLOWS)
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only peers whose name starts so; none: ours alone")
    parser.add_argument("--quick", action="store_true", help="float16, channels-last, few repeats, no compiler")
    parser.add_argument("--seconds", type=float, metavar="S", help="stop then; what is left is listed as skipped")
    parser.add_argument("--commit", default="", help="which commit this is, for the record")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: PyTorch references, to try out")
    parser.set_defaults(run=run_kernels)


def add_show(commands: Any) -> None:
    """Register `show`."""
    parser = commands.add_parser("show", help="print what a suite found", description="Print what a suite found.")
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what changed since; exit code as kernels")
    parser.set_defaults(run=run_show)


def run_kernels(args: argparse.Namespace) -> int:
    """Run the suite, print, keep and compare; returns the exit code."""
    from dagan_rt.benchmarking.devices import open_device
    from dagan_rt.benchmarking.kernels import run

    suite = selected(Suite.read(args.suite or asset("benchmarks", "suites", "kernels.toml")), args)
    if args.out is not None:
        check_output(args.out, (".json",))
    before = Results.read(args.compare) if args.compare is not None else None
    device = open_device(args.device)

    def keep(results: Results) -> None:
        if args.out is not None:
            results.write(args.out)

    results = run(suite, device, args.commit, keep)
    return _print(results, before, suite.goals)


def selected(suite: Suite, args: argparse.Namespace) -> Suite:
    """What of a suite the arguments ask for."""
    wanted: dict[str, tuple[str, ...]] = {
        name: tuple(map(str, given))
        for name in ("ops", "batches", "dtypes", "layouts", "flows")
        if (given := getattr(args, name)) is not None
    }
    if args.peers is not None:
        wanted["peers"] = tuple(args.peers)
    effort = suite.effort
    if args.quick:
        wanted = {"dtypes": ("float16",), "layouts": ("nhwc",), "peers": ("eager", "naive", "sdpa"), **wanted}
        effort = replace(effort, repeats=10, row_seconds=effort.row_seconds / 4)
    if args.seconds is not None:
        effort = replace(effort, seconds=args.seconds)
    return replace(suite.select(**wanted), effort=effort)


def run_show(args: argparse.Namespace) -> int:
    """Print a result again; returns the exit code."""
    before = Results.read(args.compare) if args.compare is not None else None
    return _print(Results.read(args.file), before, Suite.read(asset("benchmarks", "suites", "kernels.toml")).goals)


def _print(results: Results, before: Results | None, goals: Sequence[Goal]) -> int:
    from dagan_rt.benchmarking.operations import OPERATIONS
    from dagan_rt.benchmarking.printing import changes, report

    print(report(results, {name: operation.cost for name, operation in OPERATIONS.items()}, goals))
    failed = any(row.status == "wrong" and row.form == OURS for row in results.rows)
    if before is not None:
        compared = compare(before, results)
        print("", changes(compared, before, results), sep="\n")
        failed = failed or any(change.regression for change in compared)
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""

    def run() -> int:
        arguments = build_parser().parse_args(argv)
        return int(arguments.run(arguments))

    return guarded(PROGRAM, run)


if __name__ == "__main__":
    sys.exit(main())
