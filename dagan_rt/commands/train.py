"""dagan-rt train: train networks by a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError, require


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("train", help="train networks by a recipe", description=__doc__)
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="TOML file, see train/recipes/")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the run; continued where it stopped")
    parser.add_argument("--data", metavar="FOLDER", help="folder of clips, instead of the recipe's data.path")
    parser.add_argument("--steps", type=int, metavar="N", help="stop, with a checkpoint, after N steps in all")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of PyTorch")
    parser.add_argument("--device", metavar="NAME", help="auto (default), cpu or cuda")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue: refuse to begin anew")
    start.add_argument("--fresh", action="store_true", help="begin anew: refuse to continue")
    parser.add_argument("--plot", type=Path, metavar="RUN", help="only draw RUN/curve.png from its log")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 0 when done, 128 + signal number when a signal stopped it (with a checkpoint)."""
    if arguments.plot is not None:
        from dagan_rt.training import journal

        print(f"wrote {journal.plot(arguments.plot)}")
        return 0
    for name in ("recipe", "out"):
        if getattr(arguments, name) is None:
            raise InputError(f"--{name} is missing; expected --recipe FILE --out FOLDER (or --plot RUN)")
    for name in ("steps", "threads"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    require("torch", extra="train", why="training")
    from dagan_rt.training.loop import train
    from dagan_rt.training.recipe import read_recipe
    from dagan_rt.training.saving import latest_checkpoint

    recipe = read_recipe(arguments.recipe)
    if arguments.data:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, kind="clips", path=arguments.data))
    if arguments.resume and latest_checkpoint(arguments.out) is None:
        raise InputError(f"--resume was given, but {arguments.out} holds no checkpoint to continue from")
    outcome = train(
        recipe, arguments.out, resume=not arguments.fresh, steps=arguments.steps, threads=arguments.threads,
        device=arguments.device, progress=not arguments.quiet,
    )  # fmt: skip
    again = f"dagan-rt train --recipe {arguments.recipe} --out {arguments.out}"
    if outcome.signal:
        stopped = f"stopped by {signal.Signals(outcome.signal).name} at step {outcome.step} of {outcome.total}"
        print(f"dagan-rt: {stopped}, saved; continue with: {again}", file=sys.stderr)
        return 128 + outcome.signal
    if outcome.step < outcome.total:
        print(f"stopped at step {outcome.step} of {outcome.total}, saved; continue with: {again}")
    else:
        print(f"trained {outcome.total} steps; the weights are in {arguments.out / 'model'}")
    return 0
