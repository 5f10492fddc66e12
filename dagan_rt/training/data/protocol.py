"""What a data set is: clips, each with frames that can be read at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Frame:
    """One frame: image uint8 [S, S, 3], and what is known of it.

    disparity: float32 [S, S] in [0, 1]. landmarks: float32 [68, 2] in [-1, 1], corner-aligned, iBUG order.
    pose: float32 [3], yaw, pitch, roll in degrees. expression: float32 [7] in [0, 1], see `heads.EXPRESSIONS`.
    """

    image: np.ndarray
    disparity: np.ndarray | None = None
    landmarks: np.ndarray | None = None
    pose: np.ndarray | None = None
    expression: np.ndarray | None = None


class Clips(Protocol):
    """A data set."""

    size: int

    def __len__(self) -> int: ...

    def name(self, clip: int) -> str:
        """What reports call the clip: unique in the data set."""
        ...

    def identity(self, clip: int) -> str:
        """Whose face it is: clips of one person share it."""
        ...

    def frame_count(self, clip: int) -> int: ...

    def read(self, clip: int, frames: Sequence[int]) -> list[Frame]:
        """The frames asked for; raises `BadClip` when the clip turns out to be unreadable."""
        ...


class BadClip(Exception):
    """A clip that cannot be used, with the reason."""
