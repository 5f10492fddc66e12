"""Where a video cuts from one scene to another."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 36  # of the miniature in which frames are compared
CHANGED, FACE_CHANGED = 0.10, 0.15  # mean change of colour, in [0, 1], of the whole picture or inside a face's box
SUDDEN, TIMES_USUAL, REMEMBERED = 0.02, 5.0, 12  # less is a cut too where it is so many times what frames before had


class Cuts:
    """Tells the first frame of every scene, from the difference of each frame to the one before.

    A face whose box changes much is a cut too, where another person appears in the same place before the same wall.
    Two people of like looks who replace each other in place, and slow fades, go unnoticed.
    """

    def __init__(self) -> None:
        self._before: np.ndarray | None = None
        self._changes: deque[float] = deque(maxlen=REMEMBERED)

    def __call__(self, image: np.ndarray, boxes: Sequence[np.ndarray]) -> bool:
        """Whether uint8 [H, W, 3] begins a new scene; `boxes`: faces of the scene so far. The first frame does not."""
        before, self._before = self._before, miniature(image)
        if before is None:
            return False
        change = np.abs(self._before - before).mean(2)
        if any(_inside(change, box, image.shape) > FACE_CHANGED for box in boxes) or self._is_cut(float(change.mean())):
            return True
        self._changes.append(float(change.mean()))
        return False

    def _is_cut(self, change: float) -> bool:
        if not self._changes:
            return change > CHANGED
        return change > min(CHANGED, max(SUDDEN, TIMES_USUAL * float(np.mean(self._changes))))


def miniature(image: np.ndarray) -> np.ndarray:
    """A picture averaged to float32 [36, 64, 3] in [0, 1]."""
    picture = Image.fromarray(image)
    small = picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX, reducing_gap=1.0)
    return np.asarray(small, np.float32) / np.float32(255)


def _inside(change: np.ndarray, box: np.ndarray, shape: Sequence[int]) -> float:
    scale = np.array([WIDTH / shape[1], HEIGHT / shape[0]] * 2)
    left, top, right, bottom = np.rint(np.asarray(box) * scale).astype(int)
    part = change[top : max(bottom, top + 1), left : max(right, left + 1)]
    return float(part.mean()) if part.size else 0.0
