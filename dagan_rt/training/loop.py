"""The training loop: stages one after the other, and everything a long run needs to be trusted.

Each step is a pure function of the weights, the optimisers' state and (seed, step): batches and random draws come from
the step's number. So a run that was interrupted continues exactly as if it had not been, and several processes see
together what one would.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dagan_rt.errors import InputError
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.model import Model
from dagan_rt.training import journal
from dagan_rt.training.accelerate import accelerate
from dagan_rt.training.average import Average
from dagan_rt.training.board import Board
from dagan_rt.training.data import Augmentation, Clips, Loader
from dagan_rt.training.distributed import World, batch_norms
from dagan_rt.training.held_out import HeldOutScore, evaluate, evaluate_depth, sample_sheet
from dagan_rt.training.recipe import Recipe
from dagan_rt.training.saving import latest_checkpoint, restore, save_checkpoint, save_model, start_from
from dagan_rt.training.sets import data_sets
from dagan_rt.training.sheets import write_sheet
from dagan_rt.training.steps import DepthStep, DiscriminatorStep, GeneratorStep, Mover, Statistics, Terms
from dagan_rt.training.transform import Transform
from dagan_rt.training.vgg import Vgg19, load_vgg

if TYPE_CHECKING:
    from dagan_rt.training.geometry import PoseNetwork


class Diverged(InputError):
    """A loss stopped being a number; the message names the term and what to try."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the step it reached of all steps, and the signal that stopped it, if one did.

    bad_clips: names of the clips that could not be read on the way (of this process), with the first reason.
    """

    step: int
    total: int
    signal: int = 0
    held_out: HeldOutScore | None = None
    bad_clips: Mapping[str, str] = field(default_factory=dict)


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = True,
    steps: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Outcome:
    """Train by `recipe` into the folder `out`: checkpoints/, sheets/, tensorboard/, log.jsonl, curve.png, recipe.toml
    and, at the end, model/ with the weights alone.

    Under `torchrun` the processes share each batch; the first of them writes and speaks.
    resume: continue from the newest checkpoint in `out`; otherwise `out` must not hold a run.
    steps: stop (with a checkpoint) once this many steps are done in all; the schedules do not change.
    SIGINT and SIGTERM stop after the current step with a checkpoint; the outcome says so.
    Raises InputError for data that does not fit the recipe and `Diverged` when a loss stops being a number.
    """
    torch.set_num_threads(threads or recipe.training.threads or torch.get_num_threads())
    if recipe.training.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    world = World.join(device or recipe.training.device)
    try:
        trainer = Trainer(recipe, Path(out), world, progress)
        trainer.open_folder(resume)
        last = trainer.total if steps is None else min(steps, trainer.total)
        with _signals() as received:
            stopped = trainer.run(last, received)
        if world.first:
            journal.plot(trainer.out)
        return Outcome(trainer.step, trainer.total, stopped, trainer.score, trainer.bad_clips)
    finally:
        world.leave()


class Trainer:
    """One run: its model, optimisers and place in the recipe. `train` is the way to use it."""

    def __init__(self, recipe: Recipe, out: Path, world: World | None = None, progress: bool = True) -> None:
        self.recipe, self.out = recipe, out
        self.world = world or World.join(recipe.training.device)
        self.device, self.progress = self.world.device, progress and self.world.first
        self.training_data, self.held_out_data = self._data()
        self.items = len(self.training_data) * recipe.data.repeats
        self.lengths = [stage.length(self.items) for stage in recipe.stages]
        self.total = sum(self.lengths)
        self.step, self.samples, self.seconds, self.saved_at = 0, 0, 0.0, time.monotonic()
        self.bad = 0  # steps in a row that were left out
        self.bad_clips: dict[str, str] = {}  # by name, the reason
        self.score: HeldOutScore | None = None
        self.tally = journal.Tally()
        self.board = Board(out / "tensorboard", recipe.training.tensorboard and self.world.first)
        self.vgg = self._load_vgg()
        torch.manual_seed(recipe.training.seed)
        model = Model(recipe.stage_config(recipe.stages[0]))
        start_from(recipe.start, model)
        self.pose = self._pose_network()
        self.average = Average(_placed(model, self.device), recipe.training.ema) if recipe.training.ema else None
        self._enter_stage(0, model)

    def _data(self) -> tuple[Any, Any]:
        """The data sets: the first process draws or lists them, the others find that done."""
        if self.world.first:
            sets = data_sets(self.recipe, self.progress)
        self.world.wait()
        return sets if self.world.first else data_sets(self.recipe, False)

    # -- where the run is --------------------------------------------------------------------------------------------

    def _place(self, step: int) -> tuple[int, int]:
        """(stage, steps done in it) before doing step number `step`."""
        for number, length in enumerate(self.lengths):
            if step < length or number + 1 == len(self.lengths):
                return number, step
            step -= length
        raise AssertionError("a recipe has at least one stage")

    def _enter_stage(self, number: int, model: Model) -> None:
        """Take over the weights at the stage's size, with fresh optimisers and batches."""
        self.stage_number, self.stage = number, self.recipe.stages[number]
        stage, world = self.stage, self.world
        training, data = self.recipe.training, self.recipe.data
        self.model = world.synchronized(_placed(resized(model, self.recipe.stage_config(stage)), self.device))
        if training.kernels:
            for note in accelerate(self.model, training.precision, world.share(stage.batch)):
                self._say(note)
        self.parts = trained_parts(self.model, self.pose)
        for name, part in self.parts.items():
            part.requires_grad_(name in stage.trained)
        self.optimizers = {name: self._optimizer(name, part) for name, part in self.parts.items()}
        self.mover = Mover(self.parts, self.optimizers, training.precision, training.clip_gradient, self.device)
        self.statistics = Statistics(self.parts)
        self.generator_step = world.together(GeneratorStep(self.model, self.vgg))
        self.discriminator_step = world.together(DiscriminatorStep(self.model))
        if self.pose is not None and stage.losses.trains_depth_alone:
            self.depth_step = world.together(DepthStep(self.model, self.pose))
        self.clips = at_size(self.training_data, stage.size)
        self.held_out = at_size(self.held_out_data, stage.size)
        world.share(stage.batch)
        self.loader = Loader(
            self.clips, stage.batch, _mix(training.seed, number),
            Augmentation(data.flip, data.time_flip, data.jitter, stage.still), data.repeats,
            data.workers if data.kind == "clips" else 1, neighbours=stage.neighbours, part=(world.rank, world.size),
        )  # fmt: skip

    def _optimizer(self, name: str, part: nn.Module) -> torch.optim.Adam:
        rate = getattr(self.stage.learning_rate, name)
        return torch.optim.Adam(part.parameters(), lr=rate, betas=self.recipe.training.betas, fused=True)

    def _next_stage(self, number: int) -> None:
        """Change stage, keeping Adam's moments: the parameters are the same ones at another resolution."""
        before = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        scale = self.mover.scaler.state_dict()
        self._enter_stage(number, self.model)
        for name, optimizer in self.optimizers.items():
            load_moments(optimizer, before[name])
        self.mover.scaler.load_state_dict(scale)

    # -- starting ----------------------------------------------------------------------------------------------------

    def open_folder(self, resume: bool) -> None:
        """Make the run's folder, or continue from the newest checkpoint in it."""
        newest = latest_checkpoint(self.out)
        if newest is not None and not resume:
            raise InputError(f"{self.out} already holds a run; choose another --out, or continue it without --fresh")
        self.world.wait()  # until all have looked: the first one writes next
        if self.world.first:
            self.out.mkdir(parents=True, exist_ok=True)
        if newest is not None:
            self._continue_from(newest)
        elif self.world.first:
            (self.out / journal.LOG_NAME).unlink(missing_ok=True)
        self.board.continue_from(self.step)
        if self.world.first:
            (self.out / "recipe.toml").write_text(self.recipe.text, encoding="utf-8")

    def _continue_from(self, folder: Path) -> None:
        place = restore(folder, self._model_for_step, self.pose, self.average)
        self.step, self.samples, self.seconds = place.step, place.samples, place.seconds
        for name, optimizer in self.optimizers.items():
            load_moments(optimizer, place.optimizers[name])
        if place.scaler:
            self.mover.scaler.load_state_dict(dict(place.scaler))
        if self.world.first:
            journal.forget_after(self.out, self.step)
        self._say(f"continuing {self.out} from step {self.step} of {self.total}")

    def _model_for_step(self, step: int) -> Model:
        number = self._place(max(step - 1, 0))[0]  # a checkpoint at a stage's end was written at that stage's size
        if number != self.stage_number:
            self._enter_stage(number, self.model)
        return self.model

    def _load_vgg(self) -> Vgg19 | None:
        if not any(stage.losses.perceptual for stage in self.recipe.stages):
            return None
        vgg = self.recipe.vgg
        return _placed(load_vgg(vgg.file or None, vgg.width, vgg.seed), self.device)

    def _pose_network(self) -> PoseNetwork | None:
        sizes = [stage.size for stage in self.recipe.stages if stage.losses.trains_depth_alone]
        if not sizes:
            return None
        from dagan_rt.training.geometry import PoseNetwork

        network = PoseNetwork(replace(self.recipe.network, size=max(sizes)))
        return self.world.synchronized(_placed(network, self.device))

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self, last: int, received: list[int]) -> int:
        """Train until step `last`, or until a signal number appears in `received` of any process; returns it, or 0."""
        bar = tqdm(total=last, initial=self.step, unit="step", disable=not self.progress, smoothing=0.05, mininterval=1)
        stopped = 0
        with bar, contextlib.closing(self.board):
            while self.step < last and not stopped:
                number, done = self._place(self.step)
                if number != self.stage_number:
                    self._next_stage(number)
                until = min(last, self.step + self.lengths[number] - done)
                with contextlib.closing(self.loader.from_step(done)) as batches:
                    while self.step < until and not stopped:
                        stopped = self._one(batches, last, bar, received)
            if stopped:
                self._checkpoint()
            elif self.step == self.total and self.world.first:
                with self._measured_weights():
                    save_model(self.out / "model", self.model, depth_alone=self._trains_depth_alone())
        self.world.wait()
        return stopped

    def _one(self, batches: Iterator[dict[str, np.ndarray]], last: int, bar: Any, received: list[int]) -> int:
        """One step and what is due after it; returns the signal that any process received, or 0."""
        begun = time.perf_counter()
        arrays = next(batches)
        waited = time.perf_counter() - begun
        terms = self._optimise({name: self._to_device(array) for name, array in arrays.items()})
        self.step += 1
        self.samples += self.stage.batch
        self.tally.add(terms, self.stage.batch, begun, waited)
        bar.set_postfix(self.tally.moving | {"stage": self.stage.name}, refresh=False)
        bar.update()
        overdue = self._minutes_since_checkpoint() >= (self.recipe.training.checkpoint_minutes or math.inf)
        stopped, overdue_anywhere = self.world.greatest(received[0] if received else 0, int(overdue))
        self._report(last, bool(overdue_anywhere))
        return stopped

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array).to(self.device, non_blocking=True)
        return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    def _optimise(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step of every network that trains; returns the weighted terms, means over all processes."""
        stage, done = self.stage, self._place(self.step)[1]
        torch.manual_seed(_mix(self.recipe.training.seed, self.stage_number, done))
        self._set_rates(stage.rate_factor(done, self.items))
        self._set_modes()
        self.statistics.keep()
        with self.mover.autocast():
            terms, shown = self._generator_terms(batch)
        values, bad = self._values(terms)
        names = [name for name in stage.trained if name in self.parts]
        bad = bad or self.mover.move(terms, [name for name in names if name != "discriminator"])
        if not bad and shown is not None and "discriminator" in names:
            with self.mover.autocast():
                terms = self.discriminator_step(batch["driving"], shown, stage.losses.discriminator_gan)
            more, bad = self._values(terms)
            values |= more
            bad = bad or self.mover.move(terms, ["discriminator"])
        self._guard(bad)
        if self.average is not None and not bad:
            self.average.update(self.model)
        return {} if bad else values

    def _generator_terms(self, batch: dict[str, Tensor]) -> tuple[Terms, tuple[Tensor, Tensor, Tensor] | None]:
        stage = self.stage
        if stage.losses.trains_depth_alone:
            return self.depth_step(batch, stage.losses), None
        warp = None
        if stage.losses.uses_transform:  # drawn for the whole batch, of which this process has its share
            share = self.world.share(stage.batch)
            whole = Transform.random(stage.batch, stage.losses.sigma_affine, stage.losses.sigma_tps, device=self.device)
            mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
            warp = Transform(whole.theta[mine], whole.control_params[mine])
        return self.generator_step(batch, stage.losses, warp)

    def _set_rates(self, factor: float) -> None:
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = getattr(self.stage.learning_rate, name) * factor

    def _set_modes(self) -> None:
        for name, part in self.parts.items():
            part.train(name in self.stage.trained)
            if self.stage.freeze_norm:
                for norm in batch_norms(part):
                    norm.eval()

    def _values(self, terms: Terms) -> tuple[dict[str, float], str | None]:
        """(the terms' means over all processes, which of them is not finite or None)."""
        values = self.world.mean(torch.stack([term.detach().float() for term in terms.values()])).tolist()
        broken = [name for name, value in zip(terms, values, strict=True) if not math.isfinite(value)]
        return dict(zip(terms, values, strict=True)), f"loss term {broken[0]}" if broken else None

    def _guard(self, bad: str | None) -> None:
        """Leave a step that is not finite out, as if it had not been; too many in a row end the run."""
        if bad is None:
            self.bad = 0
            return
        self.statistics.restore()
        self.bad += 1
        self.tally.left_out += 1
        if self.bad <= self.recipe.training.tolerate:
            self._say(f"step {self.step} left out: the {bad} is not a finite number")
            return
        newest = latest_checkpoint(self.out)
        kept = f"the checkpoint {newest} is unharmed" if newest else "no checkpoint was written yet"
        raise Diverged(
            f"training stopped at step {self.step}: the {bad} is no longer a finite number, {self.bad} steps in a row; "
            f"{kept}; lower the learning rate or set training.clip_gradient"
        )

    # -- reporting ---------------------------------------------------------------------------------------------------

    def _report(self, last: int, overdue: bool) -> None:
        """Whatever is due after this step: the held-out error, a row of the log, a sheet, a checkpoint."""
        every = self.recipe.training
        ends = self.step == last or self._place(self.step)[0] != self.stage_number

        def due(interval: int) -> bool:
            return ends or self.step % interval == 0

        if self.world.first:
            held_out = None
            if due(every.evaluate_every) and self.held_out is not None:
                with self._surviving("the held-out error could not be measured"):
                    held_out = self._evaluate()
            if due(every.log_every) or held_out:
                with self._surviving("a row of the log could not be written"):
                    self._log(held_out)
            if due(every.sheet_every):
                with self._surviving("a sheet could not be made"):
                    self._sheet()
        if due(every.checkpoint_every) or overdue:
            with (
                contextlib.nullcontext() if self.step == last else self._surviving("a checkpoint could not be written")
            ):
                self._checkpoint()
        self.tally.resume_clock()

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """A disk that is full now may not be later: say so and go on. What a run ends with must be written.

        A held-out folder that can no longer be read at all is no reason to lose a training either.
        """
        try:
            yield
        except (OSError, InputError) as error:
            warnings.warn(f"step {self.step}: {what}, training goes on: {error}", stacklevel=2)

    def _evaluate(self) -> dict[str, float] | None:
        """The held-out error; of the depth network alone in a stage of its own, where the truth is known."""
        pairs = self.recipe.data.held_out_pairs
        with self._measured_weights():
            if self.stage.losses.trains_depth_alone:
                score = evaluate_depth(self.model, self.held_out, pairs)
                return score.to_dict() if score is not None else None
            self.score = evaluate(self.model, self.held_out, pairs, min(self.stage.batch, 8))
        return self.score.to_dict()

    def _sheet(self) -> None:
        with self._measured_weights():
            sheet = sample_sheet(self.model, self.held_out if self.held_out is not None else self.clips)
        self.board.image("held out", sheet, self.step)
        write_sheet(self.out / "sheets" / f"{self.step:07d}.png", sheet)

    def _measured_weights(self) -> contextlib.AbstractContextManager[None]:
        """The averaged weights, where the recipe averages them."""
        return self.average.applied(self.model) if self.average is not None else contextlib.nullcontext()

    def _trains_depth_alone(self) -> bool:
        return all(stage.losses.trains_depth_alone for stage in self.recipe.stages)

    def _log(self, held_out: dict[str, float] | None) -> None:
        row, seconds = self.tally.take()
        self.seconds += seconds
        optimizers = self.optimizers
        rates = {name: optimizers[name].param_groups[0]["lr"] for name in self.stage.trained if name in optimizers}
        row = {
            "step": self.step, "stage": self.stage.name, "samples": self.samples, "seconds": round(self.seconds, 3),
            "learning_rate": rates.get("generator", max(rates.values(), default=0.0)),
        } | row  # fmt: skip
        self.bad_clips |= {name: failure.reason for name, failure in self.loader.bad.items()}
        if self.bad_clips:
            row["bad_clips"] = len(self.bad_clips)
        if held_out:
            row["held_out"] = held_out
            if "l1" in held_out:
                l1, ratio = held_out["l1"], held_out["ratio"]
                self._say(f"step {self.step}: held-out L1 {l1:.4f}, {ratio:.3f} of repeating the source")
            else:
                self._say(f"step {self.step}: held-out depth, correlation {held_out['correlation']:.3f} with the truth")
        journal.append_row(self.out, row)
        self.board.row(row)

    def _minutes_since_checkpoint(self) -> float:
        return (time.monotonic() - self.saved_at) / 60

    def _checkpoint(self) -> None:
        """Save, by the first process."""
        self.saved_at = time.monotonic()
        if not self.world.first:
            return
        place = {"step": self.step, "samples": self.samples, "seconds": self.seconds + self.tally.seconds}
        extra: dict[str, Any] = {"run": place}
        if self.average is not None:
            extra["average"] = self.average.state()
        if self.pose is not None:
            extra["pose"] = self.pose.state_dict()
        if self.mover.scaler.is_enabled():
            extra["scaler"] = self.mover.scaler.state_dict()
        epoch = self.samples // self.items
        save_checkpoint(self.out, self.model, self.optimizers, epoch, extra, self.recipe.training.keep)

    def _say(self, text: str) -> None:
        if self.progress:
            tqdm.write(text)


def trained_parts(model: Model, pose: nn.Module | None = None) -> dict[str, nn.Module]:
    """The networks under the names recipes use; depth and pose only where there are such."""
    parts: dict[str, nn.Module] = {"generator": model.generator, "keypoints": model.keypoints}
    if model.depth is not None:
        parts["depth"] = model.depth
    parts["discriminator"] = model.discriminator
    return parts if pose is None else parts | {"pose": pose}


def resized(model: Model, config: NetworkConfig) -> Model:
    """The same weights in a model of another size or motion scale.

    No parameter depends on the size; only the fixed anti-alias Gaussians (`down.weight`) do, and keep their own value.
    """
    if model.config == config:
        return model
    device = next(model.parameters()).device
    other = Model(config).to(device)
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith("down.weight")}
    missing, unexpected = other.load_state_dict(weights, strict=False)
    left_out = [name for name in missing if not name.endswith("down.weight")]
    if left_out or unexpected:
        raise InputError(f"a stage may change size and motion_scale only; {[*left_out, *unexpected][0]} does not fit")
    return other.train(model.training)


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over Adam's moments, keeping this optimiser's own rates."""
    groups = [{**group, "params": []} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"})


def at_size(clips: Any, size: int) -> Clips:
    """The data set read at a stage's size; None stays None."""
    return clips if clips is None or clips.size == size else clips.at_size(size)


def _placed(network: Any, device: torch.device) -> Any:
    return network.to(device, memory_format=torch.channels_last)


def _mix(*numbers: int) -> int:
    """One seed from several, well apart for neighbours."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second SIGINT interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def remember(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
