"""The whole comparison in one folder: depth first, then every training, then measurements, tables and pictures."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.evaluation import Evaluation, load_extractors
from dagan_rt.evaluation.comparison import figures, report
from dagan_rt.evaluation.comparison.plan import DEPTH, Plan
from dagan_rt.evaluation.comparison.runs import (
    Measure,
    Stopped,
    Trained,
    attention_once,
    measure_once,
    model_of,
    train_once,
    trained,
)
from dagan_rt.evaluation.comparison.table import Comparison, compare
from dagan_rt.evaluation.sets import ImageSet
from dagan_rt.networks.variants import VARIANTS
from dagan_rt.training import journal
from dagan_rt.training.recipe import Recipe, parse_recipe

SHOWN, ATTENDED = 4, 2  # image sets on a sheet


@dataclass(frozen=True)
class Study:
    """A plan carried out in `out`: depth/, runs/VARIANT-seedN/, repeat/, table1.{json,md}, intervals.png, figures/.

    depth: the folder of a depth network to use instead of training one.
    """

    plan: Plan
    measure: Measure
    out: Path
    depth: Path | None = None
    extractors: tuple[str, ...] = ("heads",)
    threads: int | None = None
    progress: bool = True

    def runs(self) -> list[tuple[str, int]]:
        """(variant, seed) of every training; a seed of all variants before the next seed."""
        return [(variant, seed) for seed in range(self.plan.seeds) for variant in self.plan.variants]

    def folder(self, variant: str, seed: int) -> Path:
        return self.out / "runs" / f"{variant}-seed{seed}"

    def recipe(self, variant: str, seed: int) -> Recipe:
        depth = self.depth or self.out / DEPTH / "model" / "depth"
        return self.plan.recipe(variant, seed, depth if VARIANTS[variant].uses_depth else None)

    def train(self, jobs: int = 1) -> None:
        """Train what is not trained yet, `jobs` at once. Raises `Stopped` where a signal came; call again to go on."""
        if self.plan.depth is not None and self.depth is None:
            self._say("depth network")
            train_once(self.plan.depth_recipe(), self.out / DEPTH, self.threads, self.progress)
        if jobs > 1:
            _in_processes([self._task(variant, seed) for variant, seed in self.runs()], jobs)
            return
        for number, (variant, seed) in enumerate(self.runs(), 1):
            self._say(f"training {number} of {len(self.runs())}: {variant}, seed {seed}")
            train_once(self.recipe(variant, seed), self.folder(variant, seed), self.threads, self.progress)

    def finish(self, provenance: dict[str, Any]) -> Comparison:
        """Measure everything that is trained and write tables and pictures."""
        loaded = load_extractors(list(self.extractors), self.threads)
        evaluations: dict[str, list[dict[str, Evaluation]]] = {}
        looks: dict[str, list[list[dict[str, Any]]]] = {}
        took: dict[str, list[Trained]] = {}
        for variant, seed in self.runs():
            self._say(f"measuring {variant}, seed {seed}")
            folder, recipe = self.folder(variant, seed), self.recipe(variant, seed)
            found = measure_once(folder, recipe, self.measure, loaded, False, self.progress)
            evaluations.setdefault(variant, []).append(found)
            took.setdefault(variant, []).append(trained(folder))
            if VARIANTS[variant].attention:
                looks.setdefault(variant, []).append(attention_once(folder, recipe, self.measure))
        any_recipe = self.recipe(*self.runs()[0])
        repeat = measure_once(self.out / "repeat", any_recipe, self.measure, loaded, True, self.progress)
        comparison = compare(evaluations, repeat, looks, took)
        self._write(comparison, provenance)
        self._draw(any_recipe)
        return comparison

    def _write(self, comparison: Comparison, provenance: dict[str, Any]) -> None:
        depth = self._depth_cost()
        values = {
            "provenance": provenance, "measured on": asdict(self.measure), "depth network": depth,
            "variants": list(self.plan.variants), "seeds": self.plan.seeds, **comparison.to_dict(),
        }  # fmt: skip
        written(self.out / "table1.json", json.dumps(values, indent=1) + "\n")
        notes = [self._measured_on(), _depth_note(depth), f"`{provenance['command']}`, on {_machine(provenance)}"]
        written(self.out / "table1.md", report.markdown(comparison, [note for note in notes if note]))
        report.intervals(comparison, self.out / "intervals.png")

    def _draw(self, recipe: Recipe) -> None:
        """Pictures of seed 0 and the first image sets."""
        models = {variant: model_of(self.folder(variant, 0)) for variant in self.plan.variants}
        clips = self.measure.data(recipe)
        for mode in ("self", "cross"):
            sets = first_of_clips(self.measure.sets(clips, mode), SHOWN)
            figures.write_reenactments(self.out / "figures" / f"{mode}.png", models, clips, sets)
        if any(VARIANTS[variant].attention for variant in models):
            sets = first_of_clips(self.measure.sets(clips, "self"), ATTENDED)
            figures.write_attention(self.out / "figures" / "attention.png", models, clips, sets)

    def _depth_cost(self) -> dict[str, Any] | None:
        if self.plan.depth is None:
            return None
        if self.depth is not None:
            return {"given": self.depth.name}
        last = journal.read_rows(self.out / DEPTH)[-1]
        return {"samples": last["samples"], "seconds": last["seconds"], "held_out": last.get("held_out")}

    def _measured_on(self) -> str:
        it = self.measure
        return (
            f"Measured on {it.clips} held-out people, {it.frames} frames each: {it.self_sets} image sets of one clip "
            f"(L1, AKD, AED, SSIM, PSNR) and {it.cross_sets} across people (CSIM, PRMSE, AUCON), {it.motion} motion."
        )

    def _task(self, variant: str, seed: int) -> tuple[Any, ...]:
        return f"{variant}, seed {seed}", self.recipe(variant, seed).text, self.folder(variant, seed), self.threads

    def _say(self, text: str) -> None:
        if self.progress:
            print(text, file=sys.stderr, flush=True)


def first_of_clips(sets: Sequence[ImageSet], count: int) -> list[ImageSet]:
    """The first image set of each of the first `count` driving clips."""
    by_clip: dict[int, ImageSet] = {}
    for it in sets:
        by_clip.setdefault(it.driving_clip, it)
    return list(by_clip.values())[:count]


def written(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("." + path.name)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _machine(provenance: dict[str, Any]) -> str:
    return provenance["processor"] if provenance["device"] == "cpu" else provenance["device"]


def _depth_note(depth: dict[str, Any] | None) -> str:
    if depth is None:
        return ""
    if "given" in depth:
        return "The depth network of dagan and dagan_sa was given."
    return (
        f"Dagan and dagan_sa share one depth network, trained first from frames alone: {depth['samples']:,} samples, "
        f"{depth['seconds']:.0f} seconds, which the other two did not have."
    )


def _in_processes(tasks: Sequence[tuple[Any, ...]], jobs: int) -> None:
    """Train each task in a process of its own; when one fails or a signal comes, the others stop with a checkpoint."""
    context, waiting = get_context("spawn"), list(tasks)
    running: list[Any] = []
    with _raising():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(context.Process(target=_train_alone, args=waiting.pop(0)))
                    running[-1].start()
                connection.wait([process.sentinel for process in running])
                for process in [process for process in running if process.exitcode is not None]:
                    running.remove(process)
                    _check_exit(process.exitcode)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()


def _train_alone(name: str, text: str, folder: Path, threads: int | None) -> None:
    try:
        train_once(parse_recipe(text, name), folder, threads, progress=False)
        print(f"trained {name}", file=sys.stderr, flush=True)
    except Stopped as stopped:
        sys.exit(128 + int(stopped.args[0]))
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _check_exit(code: int) -> None:
    if code > 128 or code < 0:
        raise Stopped(code - 128 if code > 128 else -code)
    if code:
        raise InputError("a training failed, see above; what is finished is kept")


@contextmanager
def _raising() -> Iterator[None]:
    """SIGTERM ends the wait for other processes, as SIGINT does."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
