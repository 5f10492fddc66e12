from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from dagan_rt.training.heads.motion import draw_motion
from dagan_rt.training.heads.person import draw_person, draw_scene
from dagan_rt.training.heads.render import Placement, draw_background, place, render
from dagan_rt.training.heads.shape import make_face

Turn = Callable[[list[Placement]], tuple[np.ndarray, np.ndarray]]
EXPRESSION = [0.2, 0.4, 0.1, 0.1, 0.5, 0.5, 0.5]


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


@pytest.fixture(scope="session")
def head_pair(
    relative_motion: Turn, placements: Callable[[int, list[int]], list[Placement]]
) -> Callable[..., dict[str, np.ndarray]]:
    """Two pictures of one head with one expression, in the poses of two frames, and what is true of them."""

    def draw(identity: int, frames: tuple[int, int], size: int) -> dict[str, np.ndarray]:
        person, motion = draw_person(identity), draw_motion(identity, 0, max(frames) + 1)
        # Light from everywhere: shading stays where it is when a head turns, and is no part of the geometry.
        scene = dataclasses.replace(draw_scene(identity, 0), light_colour=np.zeros(3, np.float32), ambient=1.2)
        face, background = make_face(person, EXPRESSION), draw_background(scene, size)
        drawn = [
            render(person, scene, face, motion.pose[frame], motion.shift[frame], size, background) for frame in frames
        ]
        rotation, translation = relative_motion(placements(identity, list(frames)))
        return {
            "images": np.stack([image for image, _ in drawn]).transpose(0, 3, 1, 2) / 255,
            "depth": np.stack([depth for _, depth in drawn]),
            "rotation": rotation,
            "translation": translation,
            "pivot": np.array([0, 0, scene.distance]),
            # Its image plane is corner-aligned: ±half_view at the centres of the outer pixels.
            "focal": np.full(2, (size - 1) / size / (2 * scene.half_view)),
        }

    return draw
