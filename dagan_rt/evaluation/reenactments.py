"""What is evaluated: networks in PyTorch, an exported bundle, or nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.keypoints import KeyPoints
from dagan_rt.reenactor import Reenactor, check_motion
from dagan_rt.transfer import movement_scale, transfer

if TYPE_CHECKING:
    from torch import Tensor

    from dagan_rt.networks.model import Model


class Reenactment(Protocol):
    """Generated frames of a batch; a function will do for one that needs no initial frames."""

    def __call__(self, source: np.ndarray, driving: np.ndarray, initial: np.ndarray | None) -> np.ndarray:
        """source, driving and, if the attribute `relative` is there and true, initial: uint8 [B, S, S, 3] each.

        Returns uint8 [B, S, S, 3].
        """
        ...


class RepeatSource:
    """The source itself: what doing nothing scores."""

    relative = False
    name = "repeated source"

    def __call__(self, source: np.ndarray, driving: np.ndarray, initial: np.ndarray | None) -> np.ndarray:
        """As in `Reenactment`."""
        return source


class TorchReenactment:
    """A model in PyTorch, where its weights are. Puts it in evaluation mode."""

    def __init__(self, model: Model, motion: str = "absolute", adapt_scale: bool = False) -> None:
        """motion, adapt_scale: as in `Reenactor`. Sets whose faces span no area are driven at scale 1, and counted."""
        check_motion(motion, adapt_scale)
        self.model, self.relative, self.adapt_scale = model.eval(), motion == "relative", adapt_scale
        self.name, self.unscaled = f"{model.config.variant} in PyTorch", 0

    def __call__(self, source: np.ndarray, driving: np.ndarray, initial: np.ndarray | None) -> np.ndarray:
        """As in `Reenactment`."""
        import torch

        device = next(self.model.parameters()).device
        with torch.inference_mode():
            faces = _planes(source).to(device)
            depth = self.model.depth(faces) if self.model.depth is not None else None
            points = self.model.find_keypoints(faces, depth)
            moved = self.model.find_keypoints(_planes(driving).to(device))
            if self.relative:
                if initial is None:
                    raise InputError("relative motion needs the initial frames")
                first = _host(self.model.find_keypoints(_planes(initial).to(device)))
                arrays = transfer(_host(points), _host(moved), first, self._scales(_host(points), first))
                moved = KeyPoints(*(torch.from_numpy(array).to(faces) for array in arrays))
            generated = self.model.generator(faces, points, moved, depth).prediction.float()
            levels = (generated.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
        return levels.cpu().numpy()

    def _scales(self, source: KeyPoints, initial: KeyPoints) -> np.ndarray:
        """Movement scales [B, 1]."""
        scales = np.ones((len(source.value), 1), np.float32)
        if self.adapt_scale:
            for place in range(len(scales)):
                scales[place], fits = _scale(*(KeyPoints(*(array[place : place + 1] for array in points))
                                               for points in (source, initial)))  # fmt: skip
                self.unscaled += not fits
        return scales


class BundleReenactment:
    """An exported bundle in one of its backends, a frame at a time as `Reenactor` runs it."""

    def __init__(
        self, bundle: Reenactor | str | Path, motion: str = "absolute", adapt_scale: bool = False,
        backend: str = "auto", threads: int | None = None,
    ) -> None:  # fmt: skip
        """bundle: a folder, or a reenactor whose session this takes over; others as in `Reenactor`."""
        check_motion(motion, adapt_scale)
        opened = bundle if isinstance(bundle, Reenactor) else Reenactor(bundle, backend, threads=threads)
        self.reenactor, self.relative, self.adapt_scale = opened, motion == "relative", adapt_scale
        self.name, self.unscaled = f"bundle on {opened.backend_name}", 0

    def __call__(self, source: np.ndarray, driving: np.ndarray, initial: np.ndarray | None) -> np.ndarray:
        """As in `Reenactment`."""
        if self.relative and initial is None:
            raise InputError("relative motion needs the initial frames")
        frames, generated = self.reenactor.frames, []
        for place in range(len(source)):
            frames.set_source(0, source[place])
            first = initial[place] if self.relative and initial is not None else None
            try:
                frames.begin(0, first, self.adapt_scale)
            except InputError:  # a face that spans no area
                frames.begin(0, first)
                self.unscaled += 1
            generated.append(frames.submit([0], [driving[place]]).result()[0])
        return np.stack(generated)


def _scale(source: KeyPoints, initial: KeyPoints) -> tuple[float, bool]:
    try:
        return movement_scale(source, initial), True
    except InputError:
        return 1.0, False


def _planes(images: np.ndarray) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [0, 1]."""
    import torch

    return torch.from_numpy(np.require(images, requirements=("C", "W"))).permute(0, 3, 1, 2).float() / 255


def _host(points: KeyPoints) -> KeyPoints:
    return KeyPoints(*(array.float().cpu().numpy() for array in points))
