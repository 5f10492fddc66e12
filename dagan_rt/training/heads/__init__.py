"""Clips of synthetic talking heads, drawn with NumPy alone, with depth, landmarks and pose known for every frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.training.heads.motion import EXPRESSIONS, draw_motion
from dagan_rt.training.heads.person import draw_person, draw_scene
from dagan_rt.training.heads.render import draw_background, place, project, render
from dagan_rt.training.heads.shape import landmark_points, make_face

__all__ = ["Clip", "EXPRESSIONS", "HELD_OUT", "TRAINING", "draw_clip"]

TRAINING = range(0, 1_000_000)
"""Identities a model may be trained on."""

HELD_OUT = range(1_000_000, 2_000_000)
"""Identities kept for measuring."""

MAX_SIZE = 1024
MAX_FRAMES = 4096


@dataclass(frozen=True)
class Clip:
    """T frames of one head and what is true of them.

    frames: uint8 [T, H, W, 3] RGB. depth: float32 [T, H, W], distance to the camera along its axis in head radii,
    finite everywhere. landmarks: float32 [T, 68, 2], (x, y) in iBUG order, -1 and 1 at the centres of the first and
    last pixel (hidden points too; a point may leave the picture). pose: float32 [T, 3], yaw (nose to the image's
    right), pitch (nose up) and roll (clockwise) in degrees. expression: float32 [T, E] in [0, 1], see `EXPRESSIONS`
    (left and right are the image's). identity: the number asked for.
    """

    frames: np.ndarray
    depth: np.ndarray
    landmarks: np.ndarray
    pose: np.ndarray
    expression: np.ndarray
    identity: int


def draw_clip(identity: int, frames: int, size: int, seed: int = 0) -> Clip:
    """Draw a clip: the same numbers give the same arrays, and sizes show the same scene.

    identity: who, in `TRAINING` or `HELD_OUT`; face, hair and skin depend on nothing else. seed: which clip of that
    person (motion, light, clothes, background). A longer clip begins with the shorter one.
    Raises InputError for numbers out of range.
    """
    if not 0 <= identity < HELD_OUT.stop:
        raise InputError(f"identity must be in 0..{HELD_OUT.stop - 1}, got {identity}")
    if not 1 <= frames <= MAX_FRAMES:
        raise InputError(f"frames must be in 1..{MAX_FRAMES}, got {frames}")
    if not 16 <= size <= MAX_SIZE:
        raise InputError(f"size must be in 16..{MAX_SIZE}, got {size}")
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")
    person, scene = draw_person(identity), draw_scene(identity, seed)
    motion = draw_motion(identity, seed, frames)
    background = draw_background(scene, size)
    pictures = np.empty((frames, size, size, 3), np.uint8)
    depth = np.empty((frames, size, size), np.float32)
    landmarks = np.empty((frames, 68, 2), np.float32)
    points = landmark_points(make_face(person, motion.expression.T[:, :, None]))
    for number in range(frames):
        face = make_face(person, [float(value) for value in motion.expression[number]])
        pose, shift = motion.pose[number], motion.shift[number]
        pictures[number], depth[number] = render(person, scene, face, pose, shift, size, background)
        landmarks[number] = project(points[number], place(pose, shift), scene)[0]
    return Clip(
        pictures, depth, landmarks, motion.pose.astype(np.float32), motion.expression.astype(np.float32), identity
    )
