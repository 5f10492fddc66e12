from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from dagan_rt.training.heads.motion import draw_motion
from dagan_rt.training.heads.render import Placement, place

Turn = Callable[[list[Placement]], tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="session")
def relative_motion() -> Turn:
    """(axis-angle, translation) from the first placement of a head to the second, about the camera's (0, 0, distance).

    Heads have their z out of the picture, cameras into it.
    """

    def turn_of(placements: list[Placement]) -> tuple[np.ndarray, np.ndarray]:
        flip = np.diag([1.0, 1.0, -1.0])
        turn = placements[1].rotation @ placements[0].rotation.T
        shift = flip @ (placements[1].offset - turn @ placements[0].offset)
        turn = flip @ turn @ flip
        angle = math.acos((np.trace(turn) - 1) / 2)
        axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
        return angle * axis / (2 * math.sin(angle)), shift

    return turn_of


@pytest.fixture(scope="session")
def placements() -> Callable[[int, list[int]], list[Placement]]:
    """Where a head of seed 0 is in the given frames."""

    def of(identity: int, frames: list[int]) -> list[Placement]:
        motion = draw_motion(identity, 0, max(frames) + 1)
        return [place(motion.pose[frame], motion.shift[frame]) for frame in frames]

    return of
