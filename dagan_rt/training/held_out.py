"""How well faces are re-enacted that training has never seen: fixed pairs, absolute motion, and a sheet to look at."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dagan_rt.errors import InputError
from dagan_rt.networks.model import Model
from dagan_rt.training.data import BadClip, Clips, Frame
from dagan_rt.training.sheets import contact_sheet, depth_image, difference_image, draw_points


@dataclass(frozen=True)
class HeldOutScore:
    """Mean absolute errors in [0, 1] over the fixed pairs."""

    l1: float  # prediction against the driving frame
    repeat_l1: float  # the source itself against the driving frame: what doing nothing scores
    disparity_l1: float | None  # depth network against the truth, where both exist

    @property
    def ratio(self) -> float:
        """Below 1: better than repeating the source."""
        return self.l1 / max(self.repeat_l1, 1e-12)

    def to_dict(self) -> dict[str, float]:
        values = {"l1": self.l1, "repeat_l1": self.repeat_l1, "ratio": self.ratio}
        return values if self.disparity_l1 is None else values | {"disparity_l1": self.disparity_l1}


def fixed_pairs(clips: Clips, pairs: int) -> list[tuple[int, int, int]]:
    """(clip, source frame, driving frame): the first frame drives to `pairs` frames spread over the rest of it."""
    chosen = []
    for clip in range(len(clips)):
        last = clips.frame_count(clip) - 1
        driving = sorted(set(np.linspace(1, last, min(pairs, last)).round().astype(int).tolist()))
        chosen += [(clip, 0, frame) for frame in driving]
    return chosen


def evaluate(model: Model, clips: Clips, pairs: int, batch: int = 8) -> HeldOutScore:
    """Self-reenactment of every fixed pair in evaluation mode; the model's mode is restored.

    Pairs that can no longer be read are left out with a warning; InputError where none is left.
    """
    chosen = fixed_pairs(clips, pairs)
    sums, count = np.zeros(3), 0
    disparity_known = model.depth is not None
    with _evaluating(model) as device:
        for start in range(0, len(chosen), batch):
            frames = _readable(clips, chosen[start : start + batch])
            if not frames:
                continue
            count += len(frames)
            source, driving = (_images([pair[i] for pair in frames], device) for i in (0, 1))
            prediction = model(source, driving).prediction.float()
            sums[0] += float((prediction - driving).abs().mean((1, 2, 3)).sum())
            sums[1] += float((source - driving).abs().mean((1, 2, 3)).sum())
            if disparity_known and frames[0][1].disparity is not None:
                assert model.depth is not None
                known = [pair[1].disparity for pair in frames if pair[1].disparity is not None]
                truth = torch.from_numpy(np.stack(known)).to(device)
                sums[2] += float((model.depth(driving)[:, 0] - truth).abs().mean((1, 2)).sum())
            else:
                disparity_known = False
    if not count:
        raise InputError("no held-out clip can be read; check the data folder")
    l1, repeat, disparity = (sums / count).tolist()
    return HeldOutScore(l1, repeat, disparity if disparity_known else None)


@dataclass(frozen=True)
class ReliefScore:
    """How much of a face's relief a depth network has found, whatever its unit and offset of disparity."""

    correlation: float  # of its disparity with the true one inside the face, a mean over faces

    @property
    def ratio(self) -> float:
        """Error of the disparity fitted to the truth over that of a flat face: below 1 is better than flat."""
        return math.sqrt(1 - max(0.0, self.correlation) ** 2)

    def to_dict(self) -> dict[str, float]:
        return {"correlation": self.correlation, "ratio": self.ratio}


def evaluate_depth(model: Model, clips: Clips, pairs: int) -> ReliefScore | None:
    """The depth network on the driving frames of the fixed pairs; None where the truth is not known."""
    from dagan_rt.training.geometry.score import hull

    correlations = []
    assert model.depth is not None
    with _evaluating(model) as device:
        for _, frame in _readable(clips, fixed_pairs(clips, pairs)):
            if frame.disparity is None or frame.landmarks is None:
                return None
            face = hull(frame.landmarks, clips.size)
            found = model.depth(_images([frame], device))[0, 0].float().cpu().numpy()[face].astype(np.float64)
            flat = found.std() < 1e-9
            correlations.append(0.0 if flat else float(np.corrcoef(found, frame.disparity[face])[0, 1]))
    return ReliefScore(float(np.mean(correlations))) if correlations else None


def sample_sheet(model: Model, clips: Clips, rows: int = 4) -> np.ndarray:
    """One row a clip: source | driving | prediction | difference | source depth | driving depth; uint8 [H, W, 3]."""
    wanted = [(clip, 0, clips.frame_count(clip) * 2 // 3) for clip in range(min(rows, len(clips)))]
    pairs = _readable(clips, wanted)
    if not pairs:
        raise InputError("none of the first clips can be read; check the data folder")
    names = ["source", "driving", "prediction", "difference x 3"]
    lines: list[list[np.ndarray]] = []
    with _evaluating(model) as device:
        source, driving = (_images([pair[i] for pair in pairs], device) for i in (0, 1))
        depths = [model.depth(image) if model.depth is not None else None for image in (source, driving)]
        points = [model.find_keypoints(image, depth) for image, depth in zip((source, driving), depths, strict=True)]
        prediction = model.generator(source, points[0], points[1], depths[0]).prediction.float()
        if depths[0] is not None:
            names += ["source depth", "driving depth"]
        scale = max(1, 192 // clips.size)
        for row in range(len(pairs)):
            predicted = _pixels(prediction[row])
            line = [
                draw_points(pairs[row][0].image, points[0].value[row].cpu().numpy(), scale),
                draw_points(pairs[row][1].image, points[1].value[row].cpu().numpy(), scale),
                predicted,
                difference_image(predicted, pairs[row][1].image),
            ]
            line += [depth_image(depth[row, 0].cpu().numpy()) for depth in depths if depth is not None]
            lines.append(line)
    return contact_sheet(lines, column_labels=names)


def _readable(clips: Clips, chosen: Sequence[tuple[int, int, int]]) -> list[list[Frame]]:
    """The pairs (clip, frame, frame) of frames, but for clips that can no longer be read."""
    pairs = []
    for clip, first, second in chosen:
        try:
            pairs.append(clips.read(clip, (first, second)))
        except BadClip as error:
            warnings.warn(f"clip skipped: {clips.name(clip)}: {error}", stacklevel=3)
    return pairs


class _evaluating:
    """Evaluation mode without gradient; gives the device, and restores each network's own mode on leaving."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __enter__(self) -> torch.device:
        self.modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        self.gradient = torch.no_grad()
        self.gradient.__enter__()
        return next(self.model.parameters()).device

    def __exit__(self, *error: object) -> None:
        self.gradient.__exit__(*error)
        for module, mode in self.modes.items():
            module.training = mode


def _images(frames: list[Frame], device: torch.device) -> Tensor:
    """[B, 3, S, S] float32 in [0, 1]."""
    stacked = torch.from_numpy(np.stack([frame.image for frame in frames])).to(device)
    return stacked.permute(0, 3, 1, 2).float() / 255


def _pixels(image: Tensor) -> np.ndarray:
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
