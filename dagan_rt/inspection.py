"""Everything that happens inside the networks for one source and one driving frame, for people who ask why.

`trace` runs the networks of a model and keeps what each hands to the next, as tensors; `inspect` does that for three
pictures and gives NumPy arrays.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dagan_rt.errors import InputError
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.attention import attention_weights
from dagan_rt.networks.generator import Generated
from dagan_rt.networks.model import Model
from dagan_rt.reenactor import check_image, check_motion
from dagan_rt.transfer import movement_scale, transfer


class Trace(NamedTuple):
    """What the networks hand to one another for a batch of faces; depths, query and key where the variant has them."""

    source_depth: Tensor | None  # [B, 1, H, W] in (0, 1)
    driving_depth: Tensor | None  # [B, 1, H, W] in (0, 1)
    source_points: KeyPoints
    driving_points: KeyPoints
    initial_points: KeyPoints | None  # None: absolute motion
    moved_points: KeyPoints  # where the source's key points go
    scale: float  # of the movement
    query: Tensor | None  # [B, D, h, w], of the attention
    key: Tensor | None  # [B, D, h, w]
    generated: Generated
    seconds: Mapping[str, float]  # by stage, see `Inspection`


@dataclass(frozen=True)
class Inspection:
    """What happened inside for one source, one driving frame and, with relative motion, the initial driving frame.

    Pictures are uint8 [H, W, 3] RGB of the model's size, H = W; maps are float32. Coordinates are (x, y) in [-1, 1] on
    the corner-aligned grid (pixel i of n lies at 2 i / (n - 1) - 1). Key points: value [K, 2], jacobian [K, 2, 2].

    variant: a name out of `dagan_rt.networks.variants.VARIANTS`.
    source, driving, initial: the pictures given; initial is None with absolute motion.
    source_points, driving_points, initial_points: their key points (paper, Section 3.2).
    moved_points: where the source's key points go: the driving ones, or the source's moved as the driving face moved
        since `initial` (Section 3.4).
    scale: factor of that movement, 1 unless it was to adapt to the faces' sizes or scaled besides.
    source_depth, driving_depth: [H, W] in (0, 1), 1 is near; None where the variant has no depth network.
    flow: [m, m, 2], the place in the source that each position of the result is taken from (Section 3.2).
    occlusion: [m, m] in (0, 1), 1 = the source shows it, 0 = the generator has to make it up.
    mask: [K + 1, m, m], shares of the background's and each key point's motion in the flow, summing to 1.
    warped_source: picture, the source taken apart and put together by the flow alone; black where it leaves the source.
    warped_feature, attended_feature: [C, h, w], the source's feature after warp and occlusion, and after the attention
        (Section 3.3); the same array in variants without attention.
    query, key: [D, h, w] each, of the attention; None in variants without.
    result: picture, the generated frame.
    seconds: wall time by stage, in order: source (its depth, key points, feature, query: once a portrait), initial
        (only with relative motion: once a session), driving, motion, generator (warp, attention, decoder).
    """

    variant: str
    source: np.ndarray
    driving: np.ndarray
    initial: np.ndarray | None
    source_points: KeyPoints
    driving_points: KeyPoints
    initial_points: KeyPoints | None
    moved_points: KeyPoints
    scale: float
    source_depth: np.ndarray | None
    driving_depth: np.ndarray | None
    flow: np.ndarray
    occlusion: np.ndarray
    mask: np.ndarray
    warped_source: np.ndarray
    warped_feature: np.ndarray
    attended_feature: np.ndarray
    query: np.ndarray | None
    key: np.ndarray | None
    result: np.ndarray
    seconds: Mapping[str, float]

    @property
    def motion(self) -> Literal["relative", "absolute"]:
        """Which of `dagan_rt.reenactor.MOTIONS` it was."""
        return "absolute" if self.initial is None else "relative"

    @property
    def size(self) -> int:
        """Side of the pictures, in pixels."""
        return self.source.shape[0]

    @property
    def middle(self) -> tuple[int, int]:
        """Pixel (x, y) in the middle of the generated face: the mean of its key points, kept inside the picture."""
        place = (self.moved_points.value.mean(axis=0) + 1) / 2 * (self.size - 1)
        x, y = np.rint(np.clip(place, 0, self.size - 1)).astype(int).tolist()
        return x, y

    def attention(self, x: int, y: int) -> np.ndarray:
        """Where the attention looks for pixel (x, y) of the result: [h, w] float32, summing to 1.

        Only this row of the [h · w, h · w] weights is computed. Raises InputError for a pixel outside the picture, and
        for a variant without attention.
        """
        if self.query is None or self.key is None:
            raise InputError(f"{self.variant} has no attention to look at")
        if not (0 <= x < self.size and 0 <= y < self.size):
            raise InputError(f"pixel must be (x, y) in 0..{self.size - 1}, got ({x}, {y})")
        height, width = self.query.shape[1:]
        asked = self.query[:, y * height // self.size, x * width // self.size]
        query, key = torch.from_numpy(asked)[None, :, None], torch.from_numpy(self.key).flatten(1)[None]
        return attention_weights(query, key).reshape(height, width).numpy()


def inspect(
    model: Model,
    source: np.ndarray,
    driving: np.ndarray,
    initial: np.ndarray | None = None,
    *,
    adapt_scale: bool = False,
    motion_scale: float = 1.0,
) -> Inspection:
    """Reenact one frame and keep all that happened; the model should be in evaluation mode, no gradient is kept.

    source, driving: uint8 [size, size, 3] RGB, as `Reenactor` takes them.
    initial: the driving frame to which the source's pose corresponds (relative motion); None: absolute motion.
    adapt_scale: scale relative motion by the size of the source's face over that in `initial`. motion_scale: by this.

    Raises InputError for other arrays or options, as `Reenactor`, and where the scale cannot be had.
    """
    check_motion("absolute" if initial is None else "relative", adapt_scale, motion_scale)
    pictures = {"source": source, "driving": driving} | ({} if initial is None else {"initial": initial})
    device = next(model.parameters()).device
    images = {name: planes(check_image(name, it, model.config.size)).to(device) for name, it in pictures.items()}
    found = trace(model, **images, adapt_scale=adapt_scale, motion_scale=motion_scale)
    generated = found.generated
    return Inspection(
        variant=model.config.variant,
        source=source,
        driving=driving,
        initial=initial,
        source_points=_first(found.source_points),
        driving_points=_first(found.driving_points),
        initial_points=None if found.initial_points is None else _first(found.initial_points),
        moved_points=_first(found.moved_points),
        scale=found.scale,
        source_depth=_depth(found.source_depth),
        driving_depth=_depth(found.driving_depth),
        flow=_array(generated.motion.flow),
        occlusion=_array(generated.motion.occlusion)[0],
        mask=_array(generated.motion.mask),
        warped_source=pixels(generated.deformed),
        warped_feature=_array(generated.warped_feature),
        attended_feature=_array(generated.attended_feature),
        query=None if found.query is None else _array(found.query),
        key=None if found.key is None else _array(found.key),
        result=pixels(generated.prediction),
        seconds=found.seconds,
    )


def trace(
    model: Model,
    source: Tensor,
    driving: Tensor,
    initial: Tensor | None = None,
    adapt_scale: bool = False,
    motion_scale: float = 1.0,
) -> Trace:
    """Reenact faces [B, 3, H, W] in [0, 1] and keep all that happened; arguments otherwise as of `inspect`.

    The model should be in evaluation mode; no gradient is kept. `adapt_scale` takes one face (B = 1), and raises
    InputError where a face's key points span no area.
    """
    generator, parts = model.generator, model.config.parts
    clock = _Clock(source.device)
    with torch.no_grad():
        source_depth, source_points = _depth_and_points(model, source)
        feature, thumbnail = generator.encode_image(source), generator.thumbnail(source)
        query = generator.query(source_depth) if parts.attention == "depth" and source_depth is not None else None
        clock.stage("source")
        initial_points = None
        if initial is not None:
            _, initial_points = _depth_and_points(model, initial)
            clock.stage("initial")
        driving_depth, driving_points = _depth_and_points(model, driving)
        clock.stage("driving")
        moved, scale = driving_points, 1.0
        if initial_points is not None:
            moved, scale = _transfer(source_points, driving_points, initial_points, adapt_scale, motion_scale)
        motion = generator.dense_motion_network(thumbnail, source_points, moved)
        clock.stage("motion")
        generated = generator.render(source, feature, query, motion)
        clock.stage("generator")
        key = None
        if parts.attention is not None:
            query = generator.AttnModule.query(generated.warped_feature) if query is None else query
            key = generator.AttnModule.key(generated.warped_feature)
    return Trace(
        source_depth, driving_depth, source_points, driving_points, initial_points, moved, scale, query, key, generated,
        clock.seconds,
    )  # fmt: skip


def planes(image: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].float() / 255


def pixels(images: Tensor) -> np.ndarray:
    """The first of [B, 3, H, W] in [0, 1] -> uint8 [H, W, 3]."""
    return (images[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()


class _Clock:
    """Wall time of stages that follow one another, the work of a GPU included."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = self._now()

    def stage(self, name: str) -> None:
        """All since the stage before was `name`."""
        now = self._now()
        self.seconds[name], self._last = now - self._last, now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _depth_and_points(model: Model, image: Tensor) -> tuple[Tensor | None, KeyPoints]:
    depth = model.depth(image) if model.depth is not None else None
    return depth, model.find_keypoints(image, depth)


def _transfer(
    source: KeyPoints, driving: KeyPoints, initial: KeyPoints, adapt_scale: bool, motion_scale: float
) -> tuple[KeyPoints, float]:
    """Relative motion, and the scale of the movement."""
    faces = (KeyPoints(*(tensor.cpu().numpy() for tensor in points)) for points in (source, driving, initial))
    on_source, on_driving, on_initial = faces
    scale = motion_scale * (movement_scale(on_source, on_initial) if adapt_scale else 1.0)
    moved = transfer(on_source, on_driving, on_initial, scale)
    return KeyPoints(*(torch.from_numpy(array).to(source.value) for array in moved)), scale


def _array(tensor: Tensor) -> np.ndarray:
    """The first of a batch."""
    array: np.ndarray = tensor[0].float().cpu().numpy()
    return array


def _depth(depth: Tensor | None) -> np.ndarray | None:
    return None if depth is None else _array(depth)[0]


def _first(points: KeyPoints) -> KeyPoints:
    return KeyPoints(*(_array(tensor) for tensor in points))
