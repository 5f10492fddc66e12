"""The commands of `dagan-rt bench` and `python -m dagan_rt.benchmarking`: run a suite, show what one found."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt import backends
from dagan_rt._assets import asset
from dagan_rt.benchmarking.rows import Results, compare
from dagan_rt.benchmarking.suites import DTYPES, FLOWS, LAYOUTS, PEERS, FrameSuite, Suite
from dagan_rt.benchmarking.training_runs import add_training
from dagan_rt.errors import InputError
from dagan_rt.files import check_output

if TYPE_CHECKING:
    from dagan_rt.benchmarking.subjects import Subject

MODELS = ("full", "small")
QUICK_BATCHES = (1, 32)
QUICK_STREAMS = (1, 32, 100)


def add_commands(commands: Any) -> None:
    """Register them; each sets `run`, a function from the parsed arguments to the exit code."""
    add_frames(commands)
    add_subnetworks(commands)
    add_streams(commands)
    add_kernels(commands)
    add_training(commands)
    add_show(commands)
    add_report(commands)


def add_kernels(commands: Any) -> None:
    """Register `kernels`."""
    parser = commands.add_parser(
        "kernels",
        help="time the CUDA kernels against PyTorch's own",
        description="Time the CUDA kernels against PyTorch's own, results checked first. Exit code 1: a result of ours "
        "was wrong, or --compare found a regression.",
    )
    add_outcome(parser, "kernels.toml")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these operations")
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="only these batch sizes")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS)
    parser.add_argument("--flows", nargs="+", choices=FLOWS)
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only peers whose name starts so; none: ours alone")
    parser.add_argument("--quick", action="store_true", help="float16, channels-last, few repeats, no compiler")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: PyTorch references, to try out")
    parser.set_defaults(run=run_kernels)


def add_frames(commands: Any) -> None:
    """Register `frames`."""
    parser = commands.add_parser(
        "frames",
        help="time whole frames, uint8 to uint8, by batch, against PyTorch",
        description="Time whole frames, uint8 to uint8 in host memory, by every backend that runs and by PyTorch as "
        "published, in float16, and compiled; frames checked against PyTorch in float32 first. Exit code 1: frames of "
        "ours were wrong, or --compare found a regression.",
    )
    add_outcome(parser, "frames.toml")
    add_subject(parser)
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="these batch sizes, for every form")
    parser.add_argument("--quick", action="store_true", help="batches 1 and 32, fewer repeats, nothing compiled")
    parser.add_argument("--compile-limit", type=float, metavar="S", help="seconds that torch.compile may take in all")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)  # torch.compile too
    parser.set_defaults(run=run_frames)


def add_subnetworks(commands: Any) -> None:
    """Register `subnetworks`."""
    parser = commands.add_parser(
        "subnetworks",
        help="time each stage of a frame beside its floor, the largest gap first",
        description="Time each stage of a frame on the device, beside the time that its operations and bytes take at "
        "the measured ceilings; the largest gap comes first.",
    )
    add_outcome(parser, "frames.toml")
    add_subject(parser)
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="these batch sizes")
    parser.add_argument("--quick", action="store_true", help="batch 1 only")
    parser.set_defaults(run=run_subnetworks)


def add_streams(commands: Any) -> None:
    """Register `streams`."""
    parser = commands.add_parser(
        "streams",
        help="many sessions at a camera's pace, or one for very long",
        description="Latency, drops and memory of many sessions in one process that each bring frames at their own "
        "pace. Exit code 1: frames were wrong, or --compare found a regression.",
    )
    add_outcome(parser, "frames.toml")
    add_subject(parser)
    parser.add_argument("--streams", nargs="+", type=int, metavar="N", help="these numbers of streams")
    parser.add_argument("--fps", type=float, help="of each stream; 0: as fast as they are taken")
    parser.add_argument("--load-seconds", type=float, metavar="S", help="for each number of streams")
    parser.add_argument("--soak", type=int, default=0, metavar="FRAMES", help="drive so many, and watch the memory")
    parser.add_argument("--quick", action="store_true", help="1, 32 and 100 streams, 2 s each")
    parser.set_defaults(run=run_streams)


def add_show(commands: Any) -> None:
    """Register `show`."""
    parser = commands.add_parser("show", help="print what a suite found", description="Print what a suite found.")
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what changed since; exit code as kernels")
    parser.set_defaults(run=run_show)


def add_report(commands: Any) -> None:
    """Register `report`."""
    parser = commands.add_parser(
        "report",
        help="results as an HTML page with pictures",
        description="Write results as one HTML page with pictures, which are also kept as SVG and PNG beside it.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="of frames, subnetworks, streams …")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write index.html into")
    parser.set_defaults(run=run_report)


def add_outcome(parser: Any, suite: str) -> None:
    """Options that all suites share."""
    parser.add_argument("--suite", type=Path, metavar="FILE", help=f"default: benchmarks/suites/{suite}")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep the rows, with what they were measured on")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what changed since")
    parser.add_argument("--seconds", type=float, metavar="S", help="stop then; what is left is listed as skipped")
    parser.add_argument("--commit", default="", help="which commit this is, for the record")


def add_subject(parser: Any) -> None:
    """Options that say which networks are measured, where, and by what."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", choices=MODELS, default="full", help="random weights; full: the published sizes (default)"
    )
    which.add_argument("--bundle", type=Path, metavar="DIR", help="the networks of an exported bundle")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--forms", nargs="+", metavar="NAME", help="only forms or backends whose name starts so")


def run_kernels(args: argparse.Namespace) -> int:
    """Run the suite, print, keep and compare; returns the exit code."""
    from dagan_rt.benchmarking.devices import open_device
    from dagan_rt.benchmarking.kernels import run

    suite = selected(Suite.read(args.suite or asset("benchmarks", "suites", "kernels.toml")), args)
    keep, before = prepared(args)
    return finished(run(suite, open_device(args.device), args.commit, keep), before, suite)


def run_frames(args: argparse.Namespace) -> int:
    """As `run_kernels`."""
    from dagan_rt.benchmarking.frames import prepare, run
    from dagan_rt.benchmarking.isolated import measure_apart

    suite = chosen(in_seconds(read_frames(args), args), args)
    keep, before = prepared(args)
    subject, place = opened(args)
    bench = prepare(subject, place, suite.effort, repeated("frames", args), tuple(args.forms or ()))
    apart = None if args.in_process else measure_apart(bench)
    return finished(run(suite, bench, args.commit, keep, apart), before, suite)


def run_subnetworks(args: argparse.Namespace) -> int:
    """As `run_kernels`."""
    from dagan_rt.benchmarking.devices import open_device
    from dagan_rt.benchmarking.frames import prepare
    from dagan_rt.benchmarking.stages import run

    suite = in_seconds(read_frames(args), args)
    if args.batches is not None or args.quick:
        suite = replace(suite, stages=tuple(counts(args.batches or (1,), "--batches")))
    keep, before = prepared(args)
    subject, place = opened(args)
    bench = prepare(subject, place, suite.effort, repeated("subnetworks", args), tuple(args.forms or ()))
    return finished(run(suite, bench, open_device(args.device), args.commit, keep), before, suite)


def run_streams(args: argparse.Namespace) -> int:
    """As `run_kernels`."""
    from dagan_rt.benchmarking.frames import prepare
    from dagan_rt.benchmarking.streams import run

    suite = in_seconds(read_frames(args), args)
    load = replace(suite.load, streams=QUICK_STREAMS, seconds=2.0) if args.quick else suite.load
    if args.streams is not None:
        load = replace(load, streams=tuple(counts(args.streams, "--streams")))
    load = replace(load, fps=positive(args.fps, load.fps, "--fps", zero=True))
    load = replace(load, seconds=positive(args.load_seconds, load.seconds, "--load-seconds"))
    if args.soak < 0:
        raise InputError(f"--soak must be at least 1, got {args.soak}")
    keep, before = prepared(args)
    subject, place = opened(args)
    bench = prepare(subject, place, suite.effort, repeated("streams", args), tuple(args.forms or ()))
    return finished(run(replace(suite, load=load), bench, args.commit, keep, args.soak), before, suite)


def run_show(args: argparse.Namespace) -> int:
    """Print a result again; returns the exit code."""
    before = Results.read(args.compare) if args.compare is not None else None
    results = Results.read(args.file)
    return finished(results, before, suite_of(results))


def run_report(args: argparse.Namespace) -> int:
    """Write the page and its pictures; returns the exit code."""
    from dagan_rt.benchmarking.html import write

    results = [Results.read(file) for file in args.files]
    goals = {at: verdicts(result, suite_of(result)) for at, result in enumerate(results)}
    print("wrote", *write(results, goals, args.out), sep="\n  ")
    return 0


def selected(suite: Suite, args: argparse.Namespace) -> Suite:
    """What of the kernels' suite the arguments ask for."""
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


def chosen(suite: FrameSuite, args: argparse.Namespace) -> FrameSuite:
    """What of the frames' suite the arguments ask for."""
    effort, forms = suite.effort, suite.forms
    if args.quick:
        effort = replace(effort, row_seconds=effort.row_seconds / 2)
        forms = tuple(
            replace(it, batches=tuple(b for b in it.batches if b in QUICK_BATCHES)) for it in forms if not it.seconds
        )
        forms = tuple(form for form in forms if form.batches)
    if args.forms is not None:
        known = (*PEERS, *backends.names())
        for start in args.forms:
            if not any(name.startswith(start.split(" ")[0]) for name in known):
                raise InputError(f"--forms must be the start of one of {', '.join(known)}, got {start!r}")
        forms = tuple(form for form in forms if form.wanted(args.forms))
    if args.batches is not None:
        forms = tuple(replace(form, batches=tuple(counts(args.batches, "--batches"))) for form in forms)
    if (limit := args.compile_limit) is not None:
        forms = tuple(replace(form, seconds=limit if form.seconds else 0.0) for form in forms)
        forms = tuple(form for form in forms if limit > 0 or not form.name.startswith("compile"))
    if not forms:
        raise InputError(f"the suite holds no form that starts with {' or '.join(args.forms or ['this'])}")
    return replace(suite, forms=forms, effort=effort)


def read_frames(args: argparse.Namespace) -> FrameSuite:
    """The suite of whole frames that is asked for."""
    return FrameSuite.read(args.suite or asset("benchmarks", "suites", "frames.toml"))


def in_seconds(suite: FrameSuite, args: argparse.Namespace) -> FrameSuite:
    """With the time that is asked for."""
    seconds = positive(args.seconds, suite.effort.seconds, "--seconds")
    return replace(suite, effort=replace(suite.effort, seconds=seconds))


def positive(given: float | None, default: float, name: str, zero: bool = False) -> float:
    """A number of an option, or its default; InputError for one that is not positive."""
    if given is None:
        return default
    if not (0 < given < 1e6 or (zero and given == 0)):
        raise InputError(f"{name} must be {'0 or ' if zero else ''}a positive number below a million, got {given:g}")
    return given


def counts(given: Sequence[int], name: str) -> Sequence[int]:
    """Whole numbers of an option, ascending; InputError for one below 1."""
    if min(given) < 1:
        raise InputError(f"{name} must each be at least 1, got {min(given)}")
    return sorted(set(given))


def opened(args: argparse.Namespace) -> tuple[Subject, str]:
    """The networks, and the place as PyTorch calls it; a GPU is looked for before anything is computed."""
    from dagan_rt.benchmarking.devices import open_device
    from dagan_rt.benchmarking.subjects import open_subject

    place = open_device(args.device).place
    return open_subject(args.model, args.bundle), place


def repeated(command: str, args: argparse.Namespace) -> list[str]:
    """The arguments that a row's command starts with."""
    which = ["--bundle", str(args.bundle)] if args.bundle is not None else ["--model", args.model]
    suite = ["--suite", str(args.suite)] if args.suite is not None else []
    return [command, *which, "--device", args.device, *suite]


def prepared(args: argparse.Namespace) -> tuple[Any, Results | None]:
    """What keeps the rows, and those to compare with; a wrong path is found before anything is measured."""
    if args.out is not None:
        check_output(args.out, (".json",))

    def keep(results: Results) -> None:
        if args.out is not None:
            results.write(args.out)

    return keep, Results.read(args.compare) if args.compare is not None else None


def suite_of(results: Results) -> Suite | FrameSuite:
    """The suite that holds the goals for a result."""
    if results.suite == "kernels":
        return Suite.read(asset("benchmarks", "suites", "kernels.toml"))
    return FrameSuite.read(asset("benchmarks", "suites", "frames.toml"))


def verdicts(results: Results, suite: Suite | FrameSuite) -> list[str]:
    """What the suite's goals came to."""
    from dagan_rt.benchmarking.printing import achieved, verdict

    if isinstance(suite, Suite):
        return [verdict(goal, results) for goal in suite.goals]
    groups = {row.group for row in results.rows}
    return [achieved(aim, results) for aim in suite.goals if aim.group in groups]


def finished(results: Results, before: Results | None, suite: Suite | FrameSuite) -> int:
    """Print rows, goals and changes; 1 where a row of ours is wrong or slower than before."""
    from dagan_rt.benchmarking.operations import OPERATIONS
    from dagan_rt.benchmarking.printing import changes, report

    costs = {name: operation.cost for name, operation in OPERATIONS.items()} if results.suite == "kernels" else None
    print(report(results, costs, verdicts(results, suite)))
    failed = any(row.status == "wrong" and row.ours for row in results.rows)
    if before is not None:
        compared = compare(before, results)
        print("", changes(compared, before, results), sep="\n")
        failed = failed or any(change.regression for change in compared)
    return int(failed)
