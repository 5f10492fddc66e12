"""The driving frame to measure motion from: the one whose face is posed most like the portrait's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from dagan_rt.keypoints import KeyPoints
from dagan_rt.reenactor import Reenactor
from dagan_rt.transfer import hull_area

Item = TypeVar("Item")


def find_best_frame(reenactor: Reenactor, source: np.ndarray, frames: Iterable[np.ndarray]) -> np.ndarray | None:
    """The frame whose face is posed most like the source's; None if no frame has key points that span an area.

    source, frames: uint8 [size, size, 3]. Distance is the squared distance of the key points once both faces are
    centred and scaled to hull area 1. The frames are gone through once and one is kept.
    """
    return _best(reenactor.keypoints(source), ((reenactor.keypoints(frame), frame) for frame in frames))


def find_best_points(source: KeyPoints, faces: Iterable[KeyPoints]) -> KeyPoints | None:
    """As `find_best_frame`, of key points."""
    return _best(source, ((points, points) for points in faces))


def _best(source: KeyPoints, faces: Iterable[tuple[KeyPoints, Item]]) -> Item | None:
    """What belongs to the face that is posed most like the source's."""
    best, best_distance = None, float("inf")
    wanted = _normalised(source.value)
    if wanted is None:
        return None
    for points, item in faces:
        shape = _normalised(points.value)
        distance = float("inf") if shape is None else float(((shape - wanted) ** 2).sum())
        if distance < best_distance:
            best, best_distance = item, distance
    return best


def _normalised(points: np.ndarray) -> np.ndarray | None:
    """Key points [1, K, 2] as [K, 2] around their mean with hull area 1; None if they span no area."""
    face = np.asarray(points, np.float64).reshape(-1, 2)
    area = hull_area(face)
    if not area > 1e-12:
        return None
    return (face - face.mean(axis=0)) / np.sqrt(area)
