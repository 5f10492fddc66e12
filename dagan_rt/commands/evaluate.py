"""`dagan-rt evaluate`: the paper's metrics of a model, or several evaluations side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError, require

EXAMPLES = """
dagan-rt evaluate --bundle bundle/ --heads 24 --out scores/
dagan-rt evaluate --checkpoint model.pth.tar --depth depth/ --data prepared/ --extractors arcface.toml 2dfan.toml
dagan-rt evaluate --compare first/evaluation.json second/evaluation.json
"""


def add_parser(subparsers: Any) -> None:
    """Add `evaluate` to the subparsers of the command line."""
    parser = subparsers.add_parser(
        "evaluate", allow_abbrev=False, help="score a model with the paper's metrics",
        description="Score a model: L1, SSIM, PSNR, LPIPS, AKD and AED of self-reenactment, CSIM, PRMSE and AUCON of "
        "cross-identity reenactment, each with a 95 % interval over clips, beside what repeating the source scores.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    model = parser.add_argument_group("model").add_mutually_exclusive_group()
    model.add_argument("--bundle", metavar="DIR", help="exported model")
    model.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights, run in PyTorch")
    model.add_argument("--compare", type=Path, nargs="+", metavar="JSON", help="print evaluations side by side instead")
    parser.add_argument("--depth", type=Path, metavar="DIR", help="folder with encoder.pth and depth.pth")
    data = parser.add_argument_group("frames").add_mutually_exclusive_group()
    data.add_argument("--data", type=Path, metavar="DIR", help="folder of clips; its test/ where it has one")
    data.add_argument("--heads", type=int, metavar="N", help="N synthetic heads that training never draws")
    parser.add_argument("--frames", type=int, default=16, metavar="T", help="frames of a synthetic head (default 16)")
    parser.add_argument("--cache", metavar="DIR", default="", help="where drawn heads are kept")
    parser.add_argument("--mode", choices=("self", "cross", "both"), default="both", help="default: both")
    parser.add_argument("--pairs", type=Path, metavar="CSV", help="test pairs (source,driving); needs --mode")
    parser.add_argument("--sets", type=int, metavar="N", help="image sets to draw (default 2083 self, 2000 cross)")
    parser.add_argument("--videos", type=int, metavar="N", help="clips to draw them from (default 100 self, all cross)")
    parser.add_argument("--extractors", nargs="*", metavar="TOML",
                        help="descriptors of ONNX files, or heads (default with --heads)")  # fmt: skip
    parser.add_argument("--lpips-backbone", type=Path, metavar="FILE", help="torchvision's AlexNet or VGG-16 weights")
    parser.add_argument("--motion", choices=("absolute", "relative"), help="default: absolute self, relative cross")
    parser.add_argument("--adapt-scale", action="store_true", help="scale relative motion by the faces' sizes")
    parser.add_argument("--backend", metavar="NAME", help="of --bundle (default auto)")
    parser.add_argument("--device", metavar="NAME", help="of --checkpoint: cpu (default) or cuda")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="image sets at a time (default 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawn sets and of the intervals")
    parser.add_argument("--no-baseline", action="store_true", help="leave out what repeating the source scores")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write numbers, rows, pairs and pictures here")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the tables and write the folder; returns the exit code."""
    if arguments.compare:
        return _compare(arguments)
    _check(arguments)
    for package in ("torch", "torchmetrics"):
        require(package, extra="evaluate", why="evaluation")
    from dagan_rt.evaluation import report, subject

    if arguments.out is not None:
        report.check_folder(arguments.out)
    evaluated, clips, provenance, reenact = subject.evaluate_all(subject.Options(**_options(arguments)))
    print("\n\n".join(report.table(it) for it in evaluated))
    if arguments.out is not None:
        report.write_folder(arguments.out, evaluated, clips, provenance, reenact)
        print(f"\nwrote {arguments.out}")
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    from dagan_rt.evaluation.subject import Options

    given = {name: getattr(arguments, name) for name in Options.__dataclass_fields__ if hasattr(arguments, name)}
    given["modes"] = ("self", "cross") if arguments.mode == "both" else (arguments.mode,)
    given["baseline"], given["progress"] = not arguments.no_baseline, not arguments.quiet
    default = ["heads"] if arguments.heads is not None else []
    extractors = default if arguments.extractors is None else arguments.extractors
    return given | {"extractors": tuple(extractors)}


def _check(arguments: argparse.Namespace) -> None:
    """What costs nothing to check, first."""
    if arguments.bundle is None and arguments.checkpoint is None:
        raise InputError("a model is missing: give --bundle DIR, or --checkpoint FILE (or --compare JSON JSON)")
    if arguments.data is None and arguments.heads is None:
        raise InputError("frames are missing: give --data DIR, or --heads N")
    for name, least in (("heads", 2), ("frames", 2), ("sets", 1), ("videos", 1), ("threads", 1), ("batch", 1),
                        ("seed", 0)):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")
    if arguments.pairs is not None and (arguments.mode == "both" or arguments.sets or arguments.videos):
        raise InputError("--pairs needs --mode self or --mode cross, and takes neither --sets nor --videos")
    only = {"backend": "bundle", "device": "checkpoint", "depth": "checkpoint"}
    for name, wanted in only.items():
        if getattr(arguments, name) is not None and getattr(arguments, wanted) is None:
            raise InputError(f"--{name} goes with --{wanted}")
    absolute = arguments.motion == "absolute" or (arguments.motion is None and arguments.mode == "self")
    if arguments.adapt_scale and absolute:
        raise InputError("--adapt-scale scales relative motion: add --motion relative")


def _compare(arguments: argparse.Namespace) -> int:
    from dagan_rt.evaluation.compare import comparison
    from dagan_rt.evaluation.report import read_evaluations

    parents = [path.parent.name for path in arguments.compare]
    unique = len(set(parents)) == len(parents) and all(parents)
    names = parents if unique else [str(path) for path in arguments.compare]
    named = [(name, it) for name, path in zip(names, arguments.compare, strict=True) for it in read_evaluations(path)]
    if len(arguments.compare) < 2:
        raise InputError("--compare takes at least two evaluation.json")
    print(comparison(named, arguments.seed))
    return 0
