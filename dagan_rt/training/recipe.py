"""A whole training run in one TOML file: networks, data, losses, and the stages one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.tables import fill, parse, refuse_unknown, table
from dagan_rt.training.heads import TRAINING
from dagan_rt.training.inherit import resolved_text
from dagan_rt.training.losses import DEFAULT_LANDMARKS, DEPTH_TERMS, LossWeights

TRAINABLE = ("generator", "keypoints", "depth", "discriminator", "pose")


@dataclass(frozen=True)
class DataRecipe:
    """Where the pairs of frames come from."""

    kind: str = "heads"  # "heads": synthetic; "clips": a folder of videos or of frame folders
    path: str = ""  # clips only; relative to the working directory
    cache: str = ""  # heads only: where drawn clips are kept; empty: the user's cache folder
    identities: int = 400  # heads only
    frames: int = 16  # heads only: frames of each clip
    first_identity: int = 0
    held_out: int = 8  # identities (heads) or clips set aside for evaluation
    held_out_pairs: int = 8  # evaluated pairs of each of them
    seed: int = 0
    repeats: int = 1  # how often an epoch visits each clip
    flip: bool = True  # mirror half of the pairs
    time_flip: bool = True  # swap source and driving in half of the pairs
    jitter: float = 0.1  # brightness, contrast, saturation, hue
    workers: int = 2  # processes that draw heads; threads that decode clips


@dataclass(frozen=True)
class LearningRates:
    """One rate a network."""

    generator: float = 2e-4
    keypoints: float = 2e-4
    depth: float = 2e-4
    discriminator: float = 2e-4
    pose: float = 2e-4

    @classmethod
    def from_number(cls, rate: float) -> LearningRates:
        """One rate for all networks."""
        return cls(*(rate,) * len(TRAINABLE))


@dataclass(frozen=True)
class VggRecipe:
    """The network of the perceptual loss: a file of torchvision's VGG-19 weights, or fixed random ones."""

    file: str = ""
    width: float = 1.0  # factor on every channel count; 1.0 is VGG-19
    seed: int = 0


@dataclass(frozen=True)
class StartRecipe:
    """Weights to begin with, where they are not random; the size of the image may differ."""

    model: str = ""  # a checkpoint in the published layout; relative to the working directory
    depth: str = ""  # a folder with encoder.pth and depth.pth


@dataclass(frozen=True)
class TrainingRecipe:
    """What holds for every stage unless the stage says otherwise, and how often to report."""

    seed: int = 0
    batch: int = 12  # of a step, over all processes together
    learning_rate: LearningRates = field(default_factory=LearningRates)
    betas: tuple[float, float] = (0.5, 0.999)
    clip_gradient: float = 0.0  # largest norm of each network's gradient; 0: as it comes
    ema: float = 0.0  # decay of the weights' moving average, which is then what is measured and kept; 0: none
    precision: str = "fp32"  # or "bf16", "fp16": autocast; fp16 with a scaled loss
    tolerate: int = 3  # steps in a row that may be left out because something in them was not finite
    deterministic: bool = False  # only algorithms of PyTorch that repeat themselves exactly, also on a GPU; slower
    kernels: bool = True  # quicker warp and attention: dagan-rt's CUDA kernels where they run, fused on a CPU
    device: str = "auto"
    threads: int = 0  # of PyTorch; 0: its own choice
    log_every: int = 50  # steps
    tensorboard: bool = True  # curves and sheets for TensorBoard, where it is installed
    checkpoint_every: int = 1000
    checkpoint_minutes: float = 15.0  # and no longer than this without one; 0: by steps alone
    sheet_every: int = 1000
    evaluate_every: int = 1000
    keep: int = 2  # checkpoints kept


@dataclass(frozen=True)
class Stage:
    """A part of the run with its own length, size and weights; `read_recipe` fills in what the file leaves out."""

    name: str
    steps: int = 0  # give this, or
    epochs: int = 0  # passes over clips × repeats
    size: int = 0
    motion_scale: float = 0.0
    batch: int = 0
    learning_rate: LearningRates = field(default_factory=LearningRates)
    schedule: str = "constant"  # "cosine" falls to `final`; "milestones" multiplies by `decay` at each
    final: float = 0.05
    milestones: tuple[int, ...] = ()  # steps, or epochs where the stage counts epochs
    decay: float = 0.1
    warmup: int = 0  # steps of linear rise from 0
    losses: LossWeights = field(default_factory=LossWeights)
    networks: tuple[str, ...] = TRAINABLE  # the ones that train
    still: float = 0.0  # share of pairs that do not move: the image's detail is learnt before it can be carried along
    freeze_norm: bool = False  # batch norm uses the statistics it has: no noise from the batch's other faces
    neighbours: int = 0  # self-supervised depth only: frames before and after are at most this far away

    @property
    def trained(self) -> tuple[str, ...]:
        """The networks that the stage's losses move."""
        if self.losses.trains_depth_alone:
            can: tuple[str, ...] = ("depth", "pose")
        else:
            can = ("generator", "keypoints", "depth") + ("discriminator",) * self.losses.uses_discriminator
        return tuple(name for name in self.networks if name in can)

    def length(self, clips: int) -> int:
        """Optimisation steps of the stage on a data set of `clips` × repeats items."""
        return self.steps or max(1, self.epochs * clips // self.batch)

    def rate_factor(self, step: int, clips: int) -> float:
        """What the learning rates are multiplied by at `step`, counted from the stage's start."""
        total = self.length(clips)
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
            return rise * (self.final + (1 - self.final) * fall)
        if self.schedule == "milestones":
            reached = step if self.steps else step * self.batch // clips
            return rise * self.decay ** sum(reached >= milestone for milestone in self.milestones)
        return rise


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; every stage is complete."""

    network: NetworkConfig
    data: DataRecipe
    training: TrainingRecipe
    vgg: VggRecipe
    start: StartRecipe
    stages: tuple[Stage, ...]
    text: str = ""  # the file as written, kept beside the run

    def __post_init__(self) -> None:
        for stage in self.stages:
            self._check_truth(stage)
            self._check_depth_stage(stage)
            self._check_grid(stage)
        if self.start.depth and not self.network.parts.uses_depth:
            raise InputError(f"start.depth must be left out for {self.network.variant}: it has no depth network")

    def _check_truth(self, stage: Stage) -> None:
        """Losses that need a known truth, or a part of the networks, must find it."""
        for loss in ("landmark", "disparity"):
            if getattr(stage.losses, loss) and self.data.kind != "heads":
                raise InputError(
                    f"stage {stage.name!r}: losses.{loss} needs data whose truth is known (data.kind heads), "
                    f"set it to 0 for {self.data.kind}"
                )
        points = self.network.num_keypoints
        if stage.losses.landmark and points not in DEFAULT_LANDMARKS:
            known = " or ".join(map(str, DEFAULT_LANDMARKS))
            raise InputError(f"stage {stage.name!r}: losses.landmark needs num_keypoints = {known}, got {points}")
        if stage.losses.disparity and not self.network.parts.uses_depth:
            raise InputError(
                f"stage {stage.name!r}: losses.disparity must be 0 for {self.network.variant}: it has no depth network"
            )

    def _check_depth_stage(self, stage: Stage) -> None:
        """Self-supervised depth is a stage of its own, on frames near to each other."""
        where = f"stage {stage.name!r}:"
        if not stage.losses.trains_depth_alone:
            given = [f"losses.{name}" for name in DEPTH_TERMS if getattr(stage.losses, name)]
            if only := ["neighbours"] * bool(stage.neighbours) + given:
                raise InputError(f"{where} {only[0]} belongs to losses.photometric, which is 0")
            return
        if not self.network.parts.uses_depth:
            raise InputError(
                f"{where} losses.photometric must be 0 for {self.network.variant}: it has no depth network"
            )
        if other := stage.losses.others_than_depth:
            raise InputError(f"{where} losses.photometric trains depth alone: set losses.{other[0]} to 0 there")
        if stage.neighbours < 1:
            raise InputError(f"{where} losses.photometric needs neighbours, 1 or more frames, got {stage.neighbours}")
        if self.data.kind == "heads" and self.data.frames < 3:
            raise InputError(f"{where} losses.photometric needs data.frames of at least 3, got {self.data.frames}")

    def _check_grid(self, stage: Stage) -> None:
        """The hourglasses of key points and motion halve the shrunk image as often as they have blocks."""
        if stage.losses.trains_depth_alone:
            return
        grid = stage.size * stage.motion_scale
        for name in ("keypoint_blocks", "motion_blocks"):
            blocks = getattr(self.network, name)
            if grid < 2**blocks or grid % 2**blocks:
                raise InputError(
                    f"stage {stage.name!r}: size × motion_scale must be a multiple of {2**blocks} for {name} = "
                    f"{blocks}, got {stage.size} × {stage.motion_scale:g} = {grid:g}"
                )

    def stage_config(self, stage: Stage) -> NetworkConfig:
        """The networks at the stage's size: the same weights, another resolution."""
        return replace(self.network, size=stage.size, motion_scale=stage.motion_scale)

    @property
    def largest_size(self) -> int:
        """Side in pixels of the largest image any stage needs."""
        return max(stage.size for stage in self.stages)


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file. InputError names the file and the key of what is wrong."""
    return parse_recipe(resolved_text(path), str(path))


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """Check a recipe given as TOML text; `name` is what error messages call it."""
    tables = parse(text, name)
    known = ("network", "data", "training", "vgg", "start", "losses", "stage")
    refuse_unknown(tables, known, name, "")
    try:
        network = NetworkConfig.from_dict(table(tables, "network", name))
    except InputError as error:
        raise InputError(f"{name}: [network] {error}") from None
    data = fill(DataRecipe, table(tables, "data", name), name, "data")
    training = fill(TrainingRecipe, table(tables, "training", name), name, "training")
    vgg = fill(VggRecipe, table(tables, "vgg", name), name, "vgg")
    start = fill(StartRecipe, table(tables, "start", name), name, "start")
    losses = _losses(table(tables, "losses", name), name)
    _check_data(data, name)
    _check_training(training, name)
    entries = tables.get("stage", [])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{name}: expected at least one [[stage]] table, got none")
    base = Stage(
        name="", size=network.size, motion_scale=network.motion_scale, batch=training.batch,
        learning_rate=training.learning_rate, losses=losses,
    )  # fmt: skip
    stages = tuple(_stage(entry, base, network, name, index) for index, entry in enumerate(entries))
    try:
        return Recipe(network, data, training, vgg, start, stages, text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _losses(given: dict[str, Any], name: str) -> LossWeights:
    base = LossWeights.nothing() if given.get("photometric") else None
    return fill(LossWeights, given, name, "losses", base)


def _stage(entry: dict[str, Any], base: Stage, network: NetworkConfig, name: str, index: int) -> Stage:
    where = f"stage[{index}]"
    losses = entry.get("losses")
    if isinstance(losses, dict) and losses.get("photometric"):  # a stage of depth alone need not name what it is not
        base = replace(base, losses=LossWeights.nothing())
    stage = fill(Stage, entry, name, where, base)
    if not stage.name:
        raise InputError(f'{name}: {where} has no name; give it one, such as name = "coarse"')
    if (stage.steps > 0) == (stage.epochs > 0):
        raise InputError(f"{name}: {where} must give either steps or epochs, a whole number above 0")
    if stage.schedule not in ("constant", "cosine", "milestones"):
        raise InputError(f"{name}: {where}.schedule must be constant, cosine or milestones, got {stage.schedule!r}")
    refuse_unknown(dict.fromkeys(stage.networks), TRAINABLE, name, f"{where}.networks")
    if not 1 <= stage.batch <= 4096:
        raise InputError(f"{name}: {where}.batch must be between 1 and 4096, got {stage.batch}")
    if stage.still > 1:
        raise InputError(f"{name}: {where}.still must be between 0 and 1, got {stage.still}")
    try:
        replace(network, size=stage.size, motion_scale=stage.motion_scale)
    except InputError as error:
        raise InputError(f"{name}: {where} {error}") from None
    return stage


def _check_data(data: DataRecipe, name: str) -> None:
    if data.kind not in ("heads", "clips"):
        raise InputError(f"{name}: data.kind must be heads or clips, got {data.kind!r}")
    for key, least in (("identities", 1), ("frames", 2), ("repeats", 1), ("held_out", 0), ("held_out_pairs", 1)):
        if getattr(data, key) < least:
            raise InputError(f"{name}: data.{key} must be at least {least}, got {getattr(data, key)}")
    if data.first_identity < 0 or data.first_identity + data.identities > TRAINING.stop:
        last = TRAINING.stop - 1
        raise InputError(f"{name}: data.first_identity and data.identities must stay within 0 to {last}")
    if not 0 <= data.jitter <= 0.5:
        raise InputError(f"{name}: data.jitter must be between 0 and 0.5, got {data.jitter}")


def _check_training(training: TrainingRecipe, name: str) -> None:
    if training.precision not in ("fp32", "bf16", "fp16"):
        raise InputError(f"{name}: training.precision must be fp32, bf16 or fp16, got {training.precision!r}")
    if not training.ema < 1:
        raise InputError(f"{name}: training.ema must be below 1, such as 0.999, got {training.ema}")
    for key in ("log_every", "checkpoint_every", "sheet_every", "evaluate_every", "keep"):
        if getattr(training, key) < 1:
            raise InputError(f"{name}: training.{key} must be at least 1, got {getattr(training, key)}")
