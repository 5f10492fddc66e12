"""What is animated: a picture, the squares of its faces, and the picture again with the results in their places."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dagan_rt.cropping import Square, around, center, choose
from dagan_rt.faces import FaceDetector
from dagan_rt.images import at_most, read_image
from dagan_rt.pasting import Canvas

LONGEST_PICTURE = 1920  # pixels a side of a video with whole portraits; more is slow to encode and seldom plays


class Portrait(NamedTuple):
    """A picture, uint8 [H, W, 3] RGB, and the squares of it that the model animates, at whole pixels."""

    picture: np.ndarray
    squares: list[Square]

    def sources(self, size: int) -> list[np.ndarray]:
        """What the model sees of each square, uint8 [size, size, 3] RGB."""
        return [square.cut(self.picture, size) for square in self.squares]


def read_portrait(
    path: Path,
    detector: FaceDetector | None,
    face: str | int = "largest",
    *,
    whole: bool = False,
    option: str = "--face",
) -> Portrait:
    """A picture and the square around a face of it, or the largest centred one where there is no detector.

    face, option: as for `dagan_rt.cropping.choose`. whole: it is shown as a whole, and is shrunk to `LONGEST_PICTURE`.
    Raises InputError for a file that is no picture, or without such a face.
    """
    picture = read_image(path)
    if whole:
        picture = at_most(picture, LONGEST_PICTURE)
    height, width, _ = picture.shape
    if detector is None:
        return Portrait(picture, [center(width, height)])
    faces = choose(detector(picture), face, str(path), option)
    return Portrait(picture, [around(one.box, width, height).whole() for one in faces])


class Pasted:
    """The whole picture of a portrait, with results in the places of its squares; see `dagan_rt.pasting`.

    width, height: of what is shown, in pixels: even, as H.264 wants them.
    """

    def __init__(self, portrait: Portrait) -> None:
        self._picture = portrait.picture
        self._canvases = [Canvas(portrait.picture, square) for square in portrait.squares]
        self.height, self.width = (side // 2 * 2 for side in portrait.picture.shape[:2])

    def __call__(self, results: Iterable[np.ndarray]) -> np.ndarray:
        """uint8 [height, width, 3] RGB of one result a square, uint8 [size, size, 3] RGB."""
        whole = self._picture.copy()
        for canvas, result in zip(self._canvases, results, strict=True):
            canvas.paste(result, whole)
        return whole[: self.height, : self.width]
