"""Faces that a stand-in for the detector finds, for the commands that crop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dagan_rt.faces import Face

DrawFaces = Callable[..., np.ndarray]


def blobs(image: np.ndarray) -> list[Face]:
    """Plays the detector: a face is a bright square on black, as bright as it is sure."""
    found = []
    for level in np.unique(image[::2, ::2, 1] // 32 * 32)[::-1]:
        rows, columns = np.nonzero((image[..., 1] // 32 * 32 == level) & (level >= 64))
        if len(rows) > 100:
            box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
            found.append(Face(box, float(level) / 256))
    return found


@pytest.fixture
def faces(monkeypatch: pytest.MonkeyPatch, searched_at_once: None) -> DrawFaces:
    """Draws pictures, and from now on the detector finds faces in such pictures alone.

    `faces(places, side=20, size=(120, 200))`: a black picture with faces of these levels at left upper corners (x, y).
    """
    monkeypatch.setattr("dagan_rt.faces.load_detector", lambda *_, **__: blobs)

    def draw(places: dict[int, tuple[int, int]], side: int = 20, size: tuple[int, int] = (120, 200)) -> np.ndarray:
        picture = np.zeros((*size, 3), np.uint8)
        for level, (x, y) in places.items():
            picture[y : y + side, x : x + side] = level
        return picture

    return draw
