"""python -m dagan_rt.evaluation.comparison: train and compare the supplementary's four methods in miniature."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from dagan_rt._assets import asset
from dagan_rt.errors import InputError, require
from dagan_rt.evaluation.comparison.orderings import VARIANTS

PROGRAM = "python -m dagan_rt.evaluation.comparison"
LEAST = {"seeds": 2, "frames": 2}


def main(arguments: list[str] | None = None) -> int:
    """Run it; 2 for wrong arguments, 128 + signal number where a signal stopped a training (which can go on)."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    try:
        for name, value in vars(options).items():
            if isinstance(value, int) and value < LEAST.get(name, 1) and not isinstance(value, bool):
                raise InputError(f"--{name.replace('_', '-')} must be at least {LEAST.get(name, 1)}, got {value}")
        require("torch", extra="train", why="training")
        return _run(options, given)
    except InputError as error:
        print(f"comparison: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of runs and results; continued")
    parser.add_argument("--recipes", type=Path, metavar="FOLDER", help="with table1-NAME.toml; default: train/recipes")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all four")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each variant (3)")
    parser.add_argument("--budget-steps", type=int, metavar="N", help="about N steps a run, every stage cut alike")
    parser.add_argument("--depth", type=Path, metavar="FOLDER", help="a trained depth network (encoder.pth, depth.pth)")
    parser.add_argument("--extractors", nargs="+", default=["heads"], metavar="NAME", help="as in dagan-rt evaluate")
    parser.add_argument("--clips", type=int, default=100, metavar="N", help="held-out people to measure on (100)")
    parser.add_argument("--frames", type=int, default=24, metavar="N", help="frames of each (24)")
    parser.add_argument("--sets", type=int, default=500, metavar="N", help="image sets of each mode (500)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at once (1)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of PyTorch of each training")
    parser.add_argument("--commit", default="", metavar="TEXT", help="what the checkout is known as, for the record")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _run(options: argparse.Namespace, given: list[str]) -> int:
    from dagan_rt.evaluation.comparison.plan import Plan
    from dagan_rt.evaluation.comparison.runs import Measure, Stopped
    from dagan_rt.evaluation.comparison.study import Study

    recipes = options.recipes or asset("train", "recipes")
    study = Study(
        Plan.read(recipes, tuple(options.variants), options.seeds, options.budget_steps),
        Measure(options.clips, options.frames, options.sets, options.sets),
        options.out.resolve(), options.depth.resolve() if options.depth else None, tuple(options.extractors),
        options.threads, not options.quiet,
    )  # fmt: skip
    try:
        study.train(options.jobs)
    except Stopped as stopped:
        print("comparison: stopped, with checkpoints; the same command goes on from there", file=sys.stderr)
        return 128 + int(stopped.args[0])
    study.finish(_provenance(options, given, study.plan.digests()))
    print((study.out / "table1.md").read_text(encoding="utf-8"))
    return 0


def _provenance(options: argparse.Namespace, given: list[str], digests: dict[str, str]) -> dict[str, Any]:
    """On what, with what and by which recipes; files by their names: the folders of one machine tell nobody else."""
    import torch

    from dagan_rt.benchmarking.cpu import processor
    from dagan_rt.benchmarking.provenance import provenance

    typed = " ".join(shlex.quote(word.rsplit("/", 1)[-1]) for word in given)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    known = provenance(device, "", options.commit)
    known.pop("suite digest")
    threads = str(options.threads or "as PyTorch chose")
    return {**known, "command": f"{PROGRAM} {typed}", "processor": processor(), "threads": threads, "recipes": digests}


if __name__ == "__main__":
    sys.exit(main())
