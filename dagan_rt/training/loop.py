"""The training loop: stages one after the other, and everything a long run needs to be trusted.

Each step is a pure function of the weights, the optimisers' state and (seed, step): batches and random draws come from
the step's number. So a run that was interrupted continues exactly as if it had not been.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dagan_rt.errors import InputError
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.model import Model
from dagan_rt.training import journal
from dagan_rt.training.data import Augmentation, Clips, Loader
from dagan_rt.training.held_out import HeldOutScore, evaluate, sample_sheet
from dagan_rt.training.losses import discriminator_loss, generator_losses
from dagan_rt.training.recipe import TRAINABLE, Recipe
from dagan_rt.training.saving import latest_checkpoint, restore, save_checkpoint, save_model
from dagan_rt.training.sets import data_sets
from dagan_rt.training.sheets import write_sheet
from dagan_rt.training.vgg import Vgg19, load_vgg


class Diverged(InputError):
    """A loss stopped being a number; the message names the term and what to try."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the step it reached of all steps, and the signal that stopped it, if one did."""

    step: int
    total: int
    signal: int = 0
    held_out: HeldOutScore | None = None


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
    """Train by `recipe` into the folder `out`: checkpoints/, sheets/, log.jsonl, curve.png, recipe.toml and, at the
    end, model/ with the weights alone.

    resume: continue from the newest checkpoint in `out`; otherwise `out` must not hold a run.
    steps: stop (with a checkpoint) once this many steps are done in all; the schedules do not change.
    SIGINT and SIGTERM stop after the current step with a checkpoint; the outcome says so.
    Raises InputError for data that does not fit the recipe and `Diverged` when a loss stops being a number.
    """
    torch.set_num_threads(threads or recipe.training.threads or torch.get_num_threads())
    trainer = Trainer(recipe, Path(out), device or recipe.training.device, progress)
    trainer.open_folder(resume)
    last = trainer.total if steps is None else min(steps, trainer.total)
    with _signals() as received:
        trainer.run(last, received)
    journal.plot(trainer.out)
    return Outcome(trainer.step, trainer.total, received[0] if received else 0, trainer.score)


class Trainer:
    """One run: its model, optimisers and place in the recipe. `train` is the way to use it."""

    def __init__(self, recipe: Recipe, out: Path, device: str = "auto", progress: bool = True) -> None:
        self.recipe, self.out, self.progress = recipe, out, progress
        self.device = _device(device)
        self.training_data, self.held_out_data = data_sets(recipe, progress)
        self.items = len(self.training_data) * recipe.data.repeats
        self.lengths = [stage.length(self.items) for stage in recipe.stages]
        self.total = sum(self.lengths)
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.score: HeldOutScore | None = None
        self.tally = Tally()
        self.vgg = self._load_vgg()
        torch.manual_seed(recipe.training.seed)
        self._enter_stage(0, Model(recipe.stage_config(recipe.stages[0])))

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
        self.model = _placed(resized(model, self.recipe.stage_config(self.stage)), self.device)
        self.parts = trained_parts(self.model)
        for name, part in self.parts.items():
            part.requires_grad_(name in self.stage.networks)
        self.optimizers = {name: self._optimizer(name, part) for name, part in self.parts.items()}
        data = self.recipe.data
        self.clips = at_size(self.training_data, self.stage.size)
        self.held_out = at_size(self.held_out_data, self.stage.size)
        threads = data.workers if data.kind == "clips" else 1
        self.loader = Loader(
            self.clips, self.stage.batch, _mix(self.recipe.training.seed, number),
            Augmentation(data.flip, data.time_flip, data.jitter, self.stage.still), data.repeats, threads,
        )  # fmt: skip

    def _optimizer(self, name: str, part: nn.Module) -> torch.optim.Adam:
        rate = getattr(self.stage.learning_rate, name)
        return torch.optim.Adam(part.parameters(), lr=rate, betas=self.recipe.training.betas, fused=True)

    def _next_stage(self, number: int) -> None:
        """Change stage, keeping Adam's moments: the parameters are the same ones at another resolution."""
        before = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        self._enter_stage(number, self.model)
        for name, optimizer in self.optimizers.items():
            load_moments(optimizer, before[name])

    # -- starting ----------------------------------------------------------------------------------------------------

    def open_folder(self, resume: bool) -> None:
        """Make the run's folder, or continue from the newest checkpoint in it."""
        self.out.mkdir(parents=True, exist_ok=True)
        newest = latest_checkpoint(self.out)
        if newest is not None and not resume:
            raise InputError(f"{self.out} already holds a run; choose another --out, or continue it without --fresh")
        if newest is None:
            (self.out / journal.LOG_NAME).unlink(missing_ok=True)
        else:
            self._continue_from(newest)
        (self.out / "recipe.toml").write_text(self.recipe.text, encoding="utf-8")

    def _continue_from(self, folder: Path) -> None:
        place = restore(folder, self.recipe.network, self._model_for_step)
        self.step, self.samples, self.seconds = place.step, place.samples, place.seconds
        for name, optimizer in self.optimizers.items():
            load_moments(optimizer, place.optimizers[name])
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

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self, last: int, received: list[int]) -> None:
        """Train until step `last`, or until a signal number appears in `received`."""
        bar = tqdm(total=last, initial=self.step, unit="step", disable=not self.progress, smoothing=0.05, mininterval=1)
        with bar:
            while self.step < last and not received:
                number, done = self._place(self.step)
                if number != self.stage_number:
                    self._next_stage(number)
                until = min(last, self.step + self.lengths[number] - done)
                with contextlib.closing(self.loader.from_step(done)) as batches:
                    while self.step < until and not received:
                        self._one(next(batches), last, bar)
        if received:
            self._checkpoint()
        elif self.step == self.total:
            save_model(self.out / "model", self.model)

    def _one(self, arrays: dict[str, np.ndarray], last: int, bar: Any) -> None:
        begun = time.perf_counter()
        terms = self._optimise({name: self._to_device(array) for name, array in arrays.items()})
        self.step += 1
        self.samples += self.stage.batch
        self.tally.add(terms, self.stage.batch, begun)
        bar.set_postfix(self.tally.moving | {"stage": self.stage.name}, refresh=False)
        bar.update()
        self._report(last)

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array).to(self.device, non_blocking=True)
        return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    def _optimise(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step of every network that trains; returns the weighted terms."""
        stage, done = self.stage, self._place(self.step)[1]
        torch.manual_seed(_mix(self.recipe.training.seed, self.stage_number, done))
        factor = stage.rate_factor(done, self.items)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = getattr(stage.learning_rate, name) * factor
        for name, part in self.parts.items():
            part.train(name in stage.networks)
        if stage.freeze_norm:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        with self._autocast():
            terms, generated, driving_points = generator_losses(self.model, batch, stage.losses, self.vgg)
            total = torch.stack([term.float() for term in terms.values()]).sum()
        values = self._values(terms)
        self._update(total, [name for name in TRAINABLE if name != "discriminator"])
        if generated is not None and stage.losses.uses_discriminator and "discriminator" in stage.networks:
            with self._autocast():
                loss = discriminator_loss(
                    self.model.discriminator, batch["driving"], generated.prediction, driving_points,
                    stage.losses.discriminator_gan,
                )  # fmt: skip
            values |= self._values({"discriminator": loss})
            self._update(loss, ["discriminator"])
        return values

    def _update(self, loss: Tensor, names: list[str]) -> None:
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        for name in names:
            if name not in self.optimizers or name not in self.stage.networks:
                continue
            if self.recipe.training.clip_gradient:
                norm = nn.utils.clip_grad_norm_(self.parts[name].parameters(), self.recipe.training.clip_gradient)
                if not math.isfinite(float(norm)):
                    raise self._diverged(f"gradient of the {name} network")
            self.optimizers[name].step()

    def _values(self, terms: dict[str, Tensor]) -> dict[str, float]:
        stacked = torch.stack([term.detach().float() for term in terms.values()]).tolist()
        for name, value in zip(terms, stacked, strict=True):
            if not math.isfinite(value):
                raise self._diverged(f"loss term {name}")
        return dict(zip(terms, stacked, strict=True))

    def _diverged(self, what: str) -> Diverged:
        newest = latest_checkpoint(self.out)
        kept = f"the checkpoint {newest} is unharmed" if newest else "no checkpoint was written yet"
        return Diverged(
            f"training stopped at step {self.step}: the {what} is no longer a finite number; {kept}; "
            "lower the learning rate or set training.clip_gradient"
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.training.precision == "bf16" and self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    # -- reporting ---------------------------------------------------------------------------------------------------

    def _report(self, last: int) -> None:
        """Whatever is due after this step: the held-out error, a row of the log, a sheet, a checkpoint."""
        every = self.recipe.training
        ends = self.step == last or self._place(self.step)[0] != self.stage_number

        def due(interval: int) -> bool:
            return ends or self.step % interval == 0

        if due(every.evaluate_every) and self.held_out is not None:
            self.score = evaluate(self.model, self.held_out, self.recipe.data.held_out_pairs, min(self.stage.batch, 8))
            held_out = self.score.to_dict()
        else:
            held_out = None
        if due(every.log_every) or held_out:
            self._log(held_out)
        if due(every.sheet_every):
            shown = self.held_out if self.held_out is not None else self.clips
            write_sheet(self.out / "sheets" / f"{self.step:07d}.png", sample_sheet(self.model, shown))
        if due(every.checkpoint_every):
            self._checkpoint()
        self.tally.resume_clock()

    def _log(self, held_out: dict[str, float] | None) -> None:
        terms, speed, seconds = self.tally.take()
        self.seconds += seconds
        row: dict[str, Any] = {
            "step": self.step, "stage": self.stage.name, "samples": self.samples,
            "seconds": round(self.seconds, 3), "samples_per_second": round(speed, 3),
            "learning_rate": self.optimizers["generator"].param_groups[0]["lr"], "terms": terms,
        }  # fmt: skip
        if held_out:
            row["held_out"] = held_out
            if self.progress:
                ratio, l1 = held_out["ratio"], held_out["l1"]
                tqdm.write(f"step {self.step}: held-out L1 {l1:.4f}, {ratio:.3f} of repeating the source")
        journal.append_row(self.out, row)

    def _checkpoint(self) -> None:
        extra = {"step": self.step, "samples": self.samples, "seconds": self.seconds + self.tally.seconds}
        epoch = self.samples // self.items
        save_checkpoint(self.out, self.model, self.optimizers, epoch, extra, self.recipe.training.keep)

    def _say(self, text: str) -> None:
        if self.progress:
            tqdm.write(text)


class Tally:
    """Means of the terms since the last row of the log, a moving mean for the bar, and time spent training."""

    def __init__(self) -> None:
        self.moving: dict[str, float] = {}
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.steps, self.samples, self.seconds = 0, 0, 0.0
        self._last: float | None = None

    def add(self, terms: dict[str, float], samples: int, begun: float) -> None:
        """One step's terms; its time runs from the step before, so waiting for data counts."""
        for name, value in terms.items():
            self.sums[name] += value
            self.moving[name] = 0.98 * self.moving.get(name, value) + 0.02 * value
        now = time.perf_counter()
        self.seconds += now - (begun if self._last is None else self._last)
        self._last = now
        self.steps += 1
        self.samples += samples

    def resume_clock(self) -> None:
        """Time since the last step went into reporting: leave it out."""
        self._last = time.perf_counter()

    def take(self) -> tuple[dict[str, float], float, float]:
        """(mean terms, samples a second, seconds), and begin anew."""
        terms = {name: value / max(1, self.steps) for name, value in self.sums.items()}
        speed, seconds = self.samples / max(self.seconds, 1e-9), self.seconds
        self._reset()
        return terms, speed, seconds


def trained_parts(model: Model) -> dict[str, nn.Module]:
    """The networks under the names recipes use; depth only where the variant has it."""
    parts: dict[str, nn.Module] = {"generator": model.generator, "keypoints": model.keypoints}
    if model.depth is not None:
        parts["depth"] = model.depth
    return parts | {"discriminator": model.discriminator}


def resized(model: Model, config: NetworkConfig) -> Model:
    """The same weights in a model of another size or motion scale.

    No parameter depends on the size; only the fixed anti-alias Gaussians (`down.weight`) do, and keep their own value.
    """
    if model.config == config:
        return model
    other = Model(config)
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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be auto, cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} was asked for, but PyTorch finds no CUDA device; use cpu or auto")
    return device


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
