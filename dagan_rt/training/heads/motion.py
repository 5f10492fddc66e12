"""How a head moves: smooth pose and expression tracks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXPRESSIONS = (
    "mouth_open",
    "smile",
    "blink_left",
    "blink_right",
    "brow_raise",
    "gaze_x",
    "gaze_y",
)
"""Names of the expression parameters, all in [0, 1]; gaze 0.5 looks straight ahead, 0 to the image's left and top."""

MAX_YAW, MAX_PITCH, MAX_ROLL = 35.0, 18.0, 15.0


@dataclass(frozen=True)
class Motion:
    """pose [T, 3]: yaw, pitch, roll in degrees. shift [T, 3]: right, down, to the camera, in head radii.

    expression [T, E] in [0, 1], in the order of `EXPRESSIONS`.
    """

    pose: np.ndarray  # [T, 3]
    shift: np.ndarray  # [T, 3]
    expression: np.ndarray  # [T, E]


def draw_motion(identity: int, seed: int, frames: int) -> Motion:
    """Tracks of `frames` frames. A longer clip of the same identity and seed begins with the shorter one."""
    rng = np.random.default_rng([20_212, identity, seed])
    time = np.arange(frames, dtype=np.float64)
    yaw = MAX_YAW * _sway(rng, time, (24.0, 46.0), (0.45, 1.0))
    pitch = MAX_PITCH * _sway(rng, time, (18.0, 40.0), (0.3, 1.0))
    roll = MAX_ROLL * _sway(rng, time, (20.0, 44.0), (0.2, 1.0))
    shift = np.stack(
        [
            0.16 * _sway(rng, time, (24.0, 50.0)),
            0.10 * _sway(rng, time, (20.0, 44.0)),
            0.6 * _sway(rng, time, (30.0, 60.0)),
        ],
        axis=1,
    )
    mouth = _talk(rng, time)
    smile = _unit(_sway(rng, time, (22.0, 48.0), (0.4, 1.0)) + rng.uniform(-0.3, 0.3))
    left, right = _blinks(rng, time)
    brows = _unit(_sway(rng, time, (14.0, 40.0), (0.3, 1.0)))
    gaze_x = _unit(_sway(rng, time, (12.0, 36.0), (0.4, 1.0)))
    gaze_y = _unit(_sway(rng, time, (16.0, 40.0), (0.2, 0.8)))
    expression = np.stack([mouth, smile, left, right, brows, gaze_x, gaze_y], axis=1)
    return Motion(np.stack([yaw, pitch, roll], axis=1), shift, expression)


def _sway(
    rng: np.random.Generator, time: np.ndarray, periods: tuple[float, float], strength: tuple[float, float] = (0.4, 1.0)
) -> np.ndarray:
    """A slow swing with a smaller, quicker one on top; in [-1, 1]."""
    slow, quick = rng.uniform(*periods), rng.uniform(*periods) / 2.3
    phases = rng.uniform(0.0, 2.0 * np.pi, 2)
    share = rng.uniform(0.08, 0.25)
    swing = (1.0 - share) * np.sin(2.0 * np.pi * time / slow + phases[0])
    swing += share * np.sin(2.0 * np.pi * time / quick + phases[1])
    return rng.uniform(*strength) * swing


def _unit(track: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 0.5 * track, 0.0, 1.0)


def _talk(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """Syllables of varied length under a slow envelope."""
    period, drift = rng.uniform(6.0, 11.0), rng.uniform(0.5, 2.0)
    phases = rng.uniform(0.0, 2.0 * np.pi, 3)
    syllables = 0.5 + 0.5 * np.sin(2.0 * np.pi * time / period + phases[0] + drift * np.sin(time / 9.0 + phases[1]))
    envelope = 0.62 + 0.38 * np.sin(2.0 * np.pi * time / rng.uniform(20.0, 50.0) + phases[2])
    return np.clip(rng.uniform(0.55, 1.0) * syllables * envelope, 0.0, 1.0)


def _blinks(rng: np.random.Generator, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both lids fall together every second or so; now and then one eye alone."""
    spacing, first = rng.uniform(12.0, 30.0), rng.uniform(0.0, 16.0)
    width = rng.uniform(1.1, 1.8)
    nearest = (time - first + spacing / 2.0) % spacing - spacing / 2.0
    both = np.exp(-0.5 * (nearest / width) ** 2)
    rest = rng.uniform(0.0, 0.22)
    wink = rng.uniform(0.5, 0.9) * np.clip(_sway(rng, time, (20.0, 40.0)), 0.0, 1.0) * (rng.random() < 0.25)
    sides = (wink, 0.0 * wink) if rng.random() < 0.5 else (0.0 * wink, wink)
    left, right = (np.clip(np.maximum(np.maximum(both, side), rest), 0.0, 1.0) for side in sides)
    return left, right
