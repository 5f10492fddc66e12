"""dagan-rt train: train networks by a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt.errors import InputError, require

if TYPE_CHECKING:
    from dagan_rt.training.recipe import Recipe


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "train",
        help="train networks by a recipe",
        description="Train networks by a recipe. On several GPUs: torchrun --nproc-per-node N -m dagan_rt train …",
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="TOML file, see train/recipes/")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the run; continued where it stopped")
    parser.add_argument("--data", metavar="FOLDER", help="folder of clips, instead of the recipe's data.path")
    parser.add_argument("--start", metavar="FILE", help="a checkpoint to begin with, instead of random weights")
    parser.add_argument("--depth", metavar="DIR", help="a depth network to begin with: encoder.pth and depth.pth")
    parser.add_argument("--batch", type=int, metavar="N", help="of each step, over all processes, in every stage")
    parser.add_argument("--seed", type=int, metavar="N", help="of the weights, batches and draws")
    parser.add_argument("--steps", type=int, metavar="N", help="stop, with a checkpoint, after N steps in all")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of PyTorch, of each process")
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
    for name, least in (("steps", 1), ("threads", 1), ("batch", 1), ("seed", 0)):
        if getattr(arguments, name) is not None and getattr(arguments, name) < least:
            raise InputError(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    require("torch", extra="train", why="training")
    from dagan_rt.training.distributed import first_process
    from dagan_rt.training.loop import train
    from dagan_rt.training.recipe import read_recipe
    from dagan_rt.training.saving import latest_checkpoint

    recipe = _overridden(read_recipe(arguments.recipe), arguments)
    if arguments.resume and latest_checkpoint(arguments.out) is None:
        raise InputError(f"--resume was given, but {arguments.out} holds no checkpoint to continue from")
    outcome = train(
        recipe, arguments.out, resume=not arguments.fresh, steps=arguments.steps, threads=arguments.threads,
        device=arguments.device, progress=not arguments.quiet,
    )  # fmt: skip
    if first_process():
        _tell(outcome, arguments)
    return 128 + outcome.signal if outcome.signal else 0


def _overridden(recipe: Recipe, arguments: argparse.Namespace) -> Recipe:
    """The recipe with what the command line says instead."""
    replace = dataclasses.replace
    if arguments.data:
        recipe = replace(recipe, data=replace(recipe.data, kind="clips", path=arguments.data))
    if arguments.start or arguments.depth:
        given = {"model": arguments.start, "depth": arguments.depth}
        start = replace(recipe.start, **{name: value for name, value in given.items() if value})
        recipe = replace(recipe, start=start)
    if arguments.batch:
        stages = tuple(replace(stage, batch=arguments.batch) for stage in recipe.stages)
        recipe = replace(recipe, stages=stages)
    if arguments.seed is not None:
        recipe = replace(recipe, training=replace(recipe.training, seed=arguments.seed))
    return recipe


def _tell(outcome: Any, arguments: argparse.Namespace) -> None:
    """How the run ended, and the command that goes on from there."""
    again = ["dagan-rt", "train"]
    for name in ("recipe", "out", "data", "start", "depth", "batch", "seed", "threads", "device"):
        if getattr(arguments, name) is not None:
            again += [f"--{name}", str(getattr(arguments, name))]
    model, depth = arguments.out / "model" / "model.pth.tar", arguments.out / "model" / "depth"
    if outcome.bad_clips:
        name, reason = next(iter(outcome.bad_clips.items()))
        count = len(outcome.bad_clips)
        print(f"{count} clips could not be read and were replaced by others (first: {name}: {reason})", file=sys.stderr)
    if outcome.signal:
        stopped = f"stopped by {signal.Signals(outcome.signal).name} at step {outcome.step} of {outcome.total}"
        print(f"dagan-rt: {stopped}, saved; continue with: {shlex.join(again)}", file=sys.stderr)
    elif outcome.step < outcome.total:
        print(f"stopped at step {outcome.step} of {outcome.total}, saved; continue with: {shlex.join(again)}")
    elif model.exists():
        print(f"trained {outcome.total} steps; the weights are in {model.parent}")
        files = ["--checkpoint", str(model), *(["--depth", str(depth)] if depth.is_dir() else [])]
        print("next: " + shlex.join(["python", "-m", "dagan_rt.export", *files, "--out", "bundle"]))
    else:
        print(f"trained {outcome.total} steps; the depth network is in {depth}")
        print("next: " + shlex.join(["dagan-rt", "train", "--recipe", "RECIPE", "--depth", str(depth), "--out", "RUN"]))
