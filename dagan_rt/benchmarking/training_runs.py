"""`dagan-rt bench training`: which forms of which recipes are measured, each in processes of its own."""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dagan_rt._assets import asset
from dagan_rt.benchmarking.processes import ended
from dagan_rt.benchmarking.provenance import clocks, command, provenance
from dagan_rt.benchmarking.rows import OURS, Results, Row
from dagan_rt.errors import InputError, require

DECAY = 0.999  # of the moving average, where a recipe has none to leave out
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Form:
    """A way to train by the recipe: its name in a row, and what of [training] it changes."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)


def add_training(commands: Any) -> None:
    """Register `training`."""
    parser = commands.add_parser(
        "training",
        help="time the steps of a training: samples a second, memory, and what a step is made of",
        description="Time steps of a training by recipes: samples a second, memory, and what a step is made of. Loss "
        "terms are compared with a plain trainer's first. Exit code 1: they differed or were not finite, or --compare "
        "found a regression.",
    )
    parser.add_argument("--recipes", nargs="+", default=["demo", "vox-256"], metavar="RECIPE",
                        help="files, or names of train/recipes/ (default: %(default)s)")  # fmt: skip
    parser.add_argument("--stage", default="", metavar="NAME", help="of the recipe (default: its last)")
    parser.add_argument("--batch", type=int, metavar="N", help="over all processes (default: the stage's)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS,
                        help="default: the recipe's, and bf16 on a GPU that has it")  # fmt: skip
    parser.add_argument("--forms", nargs="+", metavar="NAME", help="only forms of this name, or whose name starts so")
    parser.add_argument("--data", default="", metavar="FOLDER", help="clips to read (default: batches in memory)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that share each batch (default 1)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed as wholes (default %(default)s)")
    parser.add_argument("--parts", type=int, default=5, metavar="N", help="timed in parts (default %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of PyTorch, of each process")
    parser.add_argument("--seconds", type=float, default=600.0, metavar="S", help="for all (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep the rows, with what they were measured on")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what changed since")
    parser.add_argument("--commit", default="", help="which commit this is, for the record")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)  # the only form, here and now
    parser.add_argument("--cache", default="", help=argparse.SUPPRESS)  # of drawn heads
    parser.set_defaults(run=run_training)


def run_training(args: argparse.Namespace) -> int:
    """Measure, print, keep and compare; returns the exit code."""
    from dagan_rt.benchmarking.command import finished, positive, prepared, suite_of

    require("torch", extra="train", why="training")
    for name in ("steps", "parts", "processes", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.data and not Path(args.data).is_dir():
        raise InputError(f"--data must be a folder of clips, got {args.data!r}, which is none")
    seconds = positive(args.seconds, 600.0, "--seconds")
    if args.in_process:
        return run_here(args, seconds)
    keep, before = prepared(args)
    with tempfile.TemporaryDirectory(prefix="dagan-rt-bench-") as folder:
        results = run(args, Path(args.cache or folder), keep, time.monotonic() + seconds)
    return finished(results, before, suite_of(results))


def run(args: argparse.Namespace, folder: Path, keep: Callable[[Results], None], deadline: float) -> Results:
    """A row for each form of each recipe, measured one after the other."""
    cuda, device = found(args.device)
    files = [recipe_file(name) for name in args.recipes]
    plans = [(file, *planned_form) for file in files for planned_form in planned(args, file, cuda)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    origin = provenance("cuda" if cuda else "cpu", digest, args.commit) | {"device": device}
    if args.threads:
        origin["threads"] = str(args.threads)
    origin["clocks at the start"] = clocks("cuda" if cuda else "cpu")
    rows: list[Row] = []
    for path, row, form in plans:
        rows.append(apart(args, path, form, row, folder, deadline))
        keep(Results("training", origin, {}, tuple(rows)))
    results = Results("training", origin | {"clocks at the end": clocks("cuda" if cuda else "cpu")}, {}, tuple(rows))
    keep(results)
    return results


def planned(args: argparse.Namespace, file: Path, cuda: bool) -> Iterator[tuple[Row, Form]]:
    """The forms of a recipe that are asked for, with their rows before anything is measured."""
    from dagan_rt.benchmarking.training import plan_for
    from dagan_rt.training.recipe import read_recipe

    recipe = read_recipe(file)
    stage = plan_for(recipe, stage=args.stage, batch=args.batch or 0).recipe.stages[0]
    if stage.batch % args.processes:
        raise InputError(f"--batch must be a multiple of the {args.processes} processes, got {stage.batch}")
    case = {"recipe": file.stem, "stage": stage.name, "size": str(stage.size), "batch": str(stage.batch)}
    case |= {"processes": str(args.processes)} if args.processes > 1 else {}
    forms = forms_of(args.precisions or default_precisions(recipe.training.precision, cuda), recipe.training.ema)
    names = [form.name for form in forms]
    for form in forms:
        if args.forms is None or any(
            form.name == start if start in names else form.name.startswith(start) for start in args.forms
        ):
            given = ["training", "--recipes", str(file), *repeated(args), "--forms", form.name]
            yield Row("training", case, form.name, "skipped", command=command(given)), form


def forms_of(precisions: Sequence[str], ema: float) -> list[Form]:
    """Each precision; beside the first one the same with or without averaged weights; each without quicker forms."""
    forms = [Form(f"{OURS} {it}", {"precision": it}) for it in precisions]
    other = ("without average", 0.0) if ema else ("with average", DECAY)
    forms.insert(1, Form(f"{OURS} {precisions[0]} {other[0]}", {"precision": precisions[0], "ema": other[1]}))
    return forms + [Form(f"eager {it}", {"precision": it, "kernels": False}) for it in precisions]


def default_precisions(own: str, cuda: bool) -> list[str]:
    """The recipe's own, and bf16 where a GPU computes in it."""
    import torch

    return list(dict.fromkeys([own, "bf16"] if cuda and torch.cuda.is_bf16_supported() else [own]))


def found(device: str) -> tuple[bool, str]:
    """(whether it is a GPU, its name). InputError for a GPU that is not there."""
    import torch

    from dagan_rt.benchmarking.cpu import processor

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return False, processor()
    if not torch.cuda.is_available():
        raise InputError("--device cuda was asked for, but PyTorch finds no CUDA device; use cpu or auto")
    return True, torch.cuda.get_device_name()


def recipe_file(name: str) -> Path:
    """A file as given, or the recipe of that name that comes with dagan-rt."""
    path = Path(name)
    return path if path.suffix == ".toml" else asset("train", "recipes", f"{name}.toml")


def repeated(args: argparse.Namespace) -> list[str]:
    """The options that say what is measured."""
    options = [("--stage", args.stage), ("--batch", args.batch), ("--data", args.data), ("--threads", args.threads)]
    given = [text for name, value in options if value for text in (name, str(value))]
    given += ["--precisions", *args.precisions] if args.precisions else []
    given += ["--processes", str(args.processes)] if args.processes > 1 else []
    return [*given, "--steps", str(args.steps), "--parts", str(args.parts), "--device", args.device]


# ---------------------------------------------------------------------------------------------------------------------
# One form


def run_here(args: argparse.Namespace, seconds: float) -> int:
    """The one form that is asked for, by this process or its share of it; the first process writes the row."""
    from dagan_rt.benchmarking.training import measure, plan_for
    from dagan_rt.training.distributed import first_process
    from dagan_rt.training.recipe import read_recipe

    file = recipe_file(args.recipes[0])
    (row, form), *_ = [it for it in planned(args, file, found(args.device)[0]) if it[1].name == args.forms[0]]
    plan = plan_for(
        read_recipe(file), stage=args.stage, batch=args.batch or 0, data=args.data, cache=args.cache, steps=args.steps,
        parts=args.parts, device=args.device, threads=args.threads, seconds=seconds / 2,
    )  # fmt: skip
    row = measure(plan, replace(row, status="measured"), **form.changes)
    if first_process():
        Results("training", {}, {}, (row,)).write(args.out)
    return 0


def apart(args: argparse.Namespace, file: Path, form: Form, row: Row, folder: Path, deadline: float) -> Row:
    """The row of a form by processes of its own, whose memory is theirs alone; or why there is none."""
    left = deadline - time.monotonic()
    if left <= 0:
        return replace(row, reason="no time was left")
    out = folder / "row.json"
    out.unlink(missing_ok=True)
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes), "-m"]
    reason = ended(
        [
            sys.executable, "-m", *(several if args.processes > 1 else []), "dagan_rt.benchmarking", "training",
            "--in-process", "--recipes", str(file), "--forms", form.name, *repeated(args), "--cache", str(folder),
            "--seconds", f"{left:.0f}" if left > 1 else "1", "--out", str(out),
        ],
        left,
    )  # fmt: skip
    try:
        (measured,) = Results.read(out).rows
        return replace(measured, command=row.command, clocks=clocks("cpu" if args.device == "cpu" else "cuda"))
    except (InputError, ValueError):
        return replace(row, status="refused", reason=reason or "it gave no row")
