"""The benchmark of training: samples a second, memory, and where the time of a step goes.

Whole steps are timed by the wall clock with nothing else going on. Then some more are taken apart: a clock that waits
for the device stands at the borders of the parts, so that what was queued there is counted there. On a GPU the host
cannot run ahead in those, so they take longer than whole steps: their shares count, and not their sum. A profiler
would tell the same of a GPU, but slows a CPU by more than the parts that it tells apart.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dagan_rt.benchmarking.clock import Clock, peak, reset_peak, synchronize
from dagan_rt.benchmarking.rows import (
    AVERAGE,
    BACKWARD,
    CALL,
    DATA,
    DISCRIMINATOR,
    FORWARD,
    OPTIMISER,
    REST,
    Row,
    Timing,
)
from dagan_rt.errors import InputError
from dagan_rt.networks.attention import cross_attention
from dagan_rt.networks.generator import warp
from dagan_rt.training.distributed import World
from dagan_rt.training.loop import Trainer
from dagan_rt.training.losses import perceptual_loss
from dagan_rt.training.recipe import Recipe, StartRecipe

#: Largest difference of a loss term of the first step to that of a plain float32 one, as a share of the term.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.03}
SMALL = 0.01  # of all terms together: less than this share of them counts as this
KEPT = 4  # batches that take turns, where the data is in memory
HEADS, FRAMES = 4, 8  # drawn for them
WARM_UP = 2  # steps
ENDLESS = 10**9


@dataclass(frozen=True)
class Plan:
    """What is measured: a recipe of a single stage that never reports, and how often."""

    recipe: Recipe
    steps: int
    parts: int  # steps that are taken apart
    data_is_read: bool = False  # from files, as in a training; otherwise a few batches take turns
    device: str = "auto"
    seconds: float = math.inf  # whole steps end then


def plan_for(
    recipe: Recipe, *, stage: str = "", batch: int = 0, data: str = "", cache: str = "", steps: int = 10,
    parts: int = 5, device: str = "auto", threads: int = 0, seconds: float = math.inf,
) -> Plan:  # fmt: skip
    """A stage of the recipe (the last one, if none is named) on drawn heads, or on the clips in the folder `data`.

    Weights start at random and so do those of the VGG: they take as long. InputError for a stage that there is not.
    """
    names = [it.name for it in recipe.stages]
    if stage and stage not in names:
        raise InputError(f"--stage must be one of {', '.join(names)}, got {stage!r}")
    chosen = recipe.stages[names.index(stage) if stage else -1]
    if chosen.losses.trains_depth_alone:
        raise InputError(f"stage {chosen.name!r} trains depth alone, which this benchmark does not measure")
    chosen = replace(chosen, batch=batch or chosen.batch, steps=ENDLESS, epochs=0)
    where = replace(recipe.data, kind="heads", cache=cache, identities=HEADS, frames=FRAMES, workers=1)
    if data:
        where = replace(recipe.data, kind="clips", path=data)
    training = replace(
        recipe.training, tensorboard=False, checkpoint_minutes=0.0, log_every=ENDLESS, sheet_every=ENDLESS,
        checkpoint_every=ENDLESS, evaluate_every=ENDLESS, threads=threads or recipe.training.threads,
    )  # fmt: skip
    small = replace(
        recipe, data=replace(where, held_out=0), training=training, vgg=replace(recipe.vgg, file=""),
        start=StartRecipe(), stages=(chosen,),
    )  # fmt: skip
    return Plan(small, steps, parts, bool(data), device, seconds)


def measure(plan: Plan, row: Row, **changes: Any) -> Row:
    """`row` with what was found: times of steps and parts, rates, memory, and how far the first step's terms are off.

    changes: of the recipe's [training], such as precision="bf16". All processes of a `torchrun` call this.
    """
    torch.set_num_threads(plan.recipe.training.threads or torch.get_num_threads())
    world = World.join(plan.device)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(world.leave)
        plain = replace(plan.recipe, training=replace(plan.recipe.training, precision="fp32", kernels=False))
        expected = plain_terms(Trainer(plain, Path(folder), world, progress=False))
        gc.collect()
        reset_peak(world.device)
        recipe = replace(plan.recipe, training=replace(plan.recipe.training, **changes))
        run = Run(Trainer(recipe, Path(folder), world, progress=False), plan)
        error = difference(run.first(), expected)
        tolerance = TOLERANCE[recipe.training.precision]
        row = replace(row, error=error, tolerance=tolerance, precision=recipe.training.precision)
        if not error <= tolerance:
            return replace(row, status="wrong", reason=f"a loss term of the first step is off by {error:.1e}")
        try:
            times, values = run.timed()
            return replace(row, times=times, values=values, method=run.method())
        except NotFinite as reason:
            return replace(row, status="wrong", reason=str(reason))


class NotFinite(Exception):
    """A loss or gradient of a timed step."""


def plain_terms(trainer: Trainer) -> dict[str, float]:
    """The loss terms of a trainer's first step, which it takes by itself."""
    with contextlib.closing(trainer.loader.from_step(0)) as batches:
        trainer._one(batches, ENDLESS, tqdm(disable=True), [])
    return dict(trainer.tally.sums)


def difference(got: Mapping[str, float], expected: Mapping[str, float]) -> float:
    """The largest difference of a term, as a share of it; infinite where other terms came out."""
    if got.keys() != expected.keys() or not all(map(math.isfinite, (*got.values(), *expected.values()))):
        return math.inf
    least = SMALL * sum(map(abs, expected.values()))
    return max(abs(got[name] - value) / max(abs(value), least) for name, value in expected.items())


class Run:
    """A trainer whose steps are taken here, timed as wholes or in parts."""

    def __init__(self, trainer: Trainer, plan: Plan) -> None:
        self.trainer, self.plan, self.device = trainer, plan, trainer.device
        self.clock = Clock(self.device)
        self.alone = False  # gradients are not averaged over the processes
        self._watch()
        loader = trainer.loader
        self.batches: Iterator[dict[str, np.ndarray]] = (
            loader.from_step(0) if plan.data_is_read else itertools.cycle([loader.batch(at) for at in range(KEPT)])
        )

    def _watch(self) -> None:
        """Put the clock at the borders of a step's parts."""
        trainer, clock = self.trainer, self.clock
        move = trainer.mover.move

        def watched_move(terms: Any, names: Sequence[str]) -> str | None:
            with clock.part(DISCRIMINATOR if list(names) == ["discriminator"] else BACKWARD):
                return move(terms, names)

        trainer.mover.move = watched_move  # type: ignore[method-assign]
        trainer.generator_step = self._step(FORWARD, trainer.generator_step)
        trainer.discriminator_step = self._step(DISCRIMINATOR, trainer.discriminator_step)
        for name, optimizer in trainer.optimizers.items():
            if name != "discriminator":
                optimizer.register_step_pre_hook(lambda *_: clock.enter(OPTIMISER))
                optimizer.register_step_post_hook(lambda *_: clock.leave())
        if trainer.average is not None:
            update = trainer.average.update

            def watched_update(model: Any) -> None:
                with clock.part(AVERAGE):
                    update(model)

            trainer.average.update = watched_update  # type: ignore[method-assign]

    def _step(self, name: str, step: Any) -> Any:
        def watched(*arguments: Any) -> Any:
            quiet = self.alone and isinstance(step, DistributedDataParallel)
            with self.clock.part(name), step.no_sync() if quiet else contextlib.nullcontext():
                return step(*arguments)

        return watched

    def once(self) -> tuple[dict[str, float], float]:
        """A step: (its terms, seconds spent waiting for its batch). NotFinite if it was left out."""
        trainer, begun = self.trainer, time.perf_counter()
        with self.clock.part(REST):
            with self.clock.part(DATA):
                arrays = next(self.batches)
                waited = time.perf_counter() - begun
                batch = {name: trainer._to_device(array) for name, array in arrays.items()}
            terms = trainer._optimise(batch)
        trainer.step += 1
        if not terms or not all(map(math.isfinite, terms.values())):
            raise NotFinite(f"step {trainer.step - 1} was not finite")
        return terms, waited

    def first(self) -> dict[str, float]:
        """The terms of the first step, taken with the clock on."""
        with self.clock.on():
            try:
                return self.once()[0]
            except NotFinite:
                return {}

    def timed(self) -> tuple[dict[str, Timing], dict[str, float]]:
        """Times of a step and of its parts; what else there is to know."""
        for _ in range(WARM_UP - 1):
            self.once()
        steps, waited = self._steps(self.plan.steps)
        share = self.plan.recipe.stages[0].batch
        values = {"samples/s": share * len(steps) / sum(steps), "waiting %": 100 * waited / sum(steps)}
        if most := peak(self.device):
            values["peak bytes"] = most
        times = {CALL: Timing.of([1e6 * step for step in steps])} | self._parts()
        if (seconds := self._perceptual()) is not None:
            values["perceptual ms"] = 1e3 * seconds
        if self.plan.data_is_read:
            values["loader samples/s"] = self._loader()
        if self.trainer.world.size > 1:
            self.alone = True
            self.once()
            values["without averaging ms"] = 1e3 * float(np.median(self._steps(max(3, self.plan.parts))[0]))
        return times, values

    def _steps(self, count: int) -> tuple[list[float], float]:
        """Seconds of whole steps, and of all their waiting for data. All processes take as many."""
        found, waited, end = list[float](), 0.0, time.monotonic() + self.plan.seconds
        synchronize(self.device)
        while len(found) < count:
            begun = time.perf_counter()
            waited += self.once()[1]
            synchronize(self.device)
            found.append(time.perf_counter() - begun)
            if self.trainer.world.greatest(int(time.monotonic() > end))[0]:
                break
        return found, waited

    def _parts(self) -> dict[str, Timing]:
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(self.plan.parts):
            with self.clock.on() as seconds:
                self.once()
            for name, value in seconds.items():
                found[name].append(1e6 * value)
        return {name: Timing.of(values) for name, values in found.items()}

    def _perceptual(self) -> float | None:
        """Seconds of the perceptual loss alone, forward and backward to the image; part of both in a step."""
        trainer, losses = self.trainer, self.trainer.stage.losses
        if trainer.vgg is None or not losses.perceptual:
            return None
        batch = {name: trainer._to_device(array) for name, array in next(self.batches).items()}
        found = []
        for _ in range(3):
            image = batch["source"].detach().requires_grad_()
            synchronize(self.device)
            begun = time.perf_counter()
            with trainer.mover.autocast():
                loss = perceptual_loss(image, batch["driving"], trainer.vgg, losses.scales)
            loss.backward()
            synchronize(self.device)
            found.append(time.perf_counter() - begun)
        return float(np.median(found))

    def _loader(self) -> float:
        """Samples a second that the loaders of all processes make while nobody trains."""
        loader, done, begun = self.trainer.loader, 0, time.perf_counter()
        with contextlib.closing(loader.from_step(self.trainer.step)) as batches:
            while done < self.plan.parts or (time.perf_counter() - begun < 2 and done < 10 * self.plan.parts):
                next(batches)
                done += 1
        return loader.size * done / (time.perf_counter() - begun)

    def method(self) -> str:
        """How it was timed, and whose functions ran."""
        generator = self.trainer.model.generator
        used = ["warp"] * (generator.warp is not warp)
        if self.trainer.model.config.parts.attention:
            used += ["attention"] * (generator.AttnModule.attend is not cross_attention)
        return f"wall clock; parts: {self.plan.parts} more steps; in quicker forms: {', '.join(used) or 'none'}"
