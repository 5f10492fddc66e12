"""Results put back into the picture that their square was cut out of."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dagan_rt.cropping import Square
from dagan_rt.images import check_picture

FEATHER = 0.12  # width of the blended border, in sides of the square
STRONGEST_GAIN = 1.25  # a channel's contrast is changed by at most this factor, either way


class Canvas:
    """A picture into which the model's answers for one square of it are pasted.

        canvas = Canvas(portrait, square)
        canvas.paste(result, onto)           # onto: a copy of the portrait, changed in place

    The border of the square is blended over `FEATHER`, except where it is the picture's own. The colours of every
    answer are moved as the first one's have to be to have the mean and the contrast of the square in the picture.
    """

    def __init__(self, picture: np.ndarray, square: Square) -> None:
        """picture: uint8 [H, W, 3] RGB; square: inside it, at whole pixels."""
        check_picture(picture, "picture")
        self._side, left, top = int(square.side), int(square.left), int(square.top)
        self._region = slice(top, top + self._side), slice(left, left + self._side)
        height, width, _ = picture.shape
        across = _cover(self._side, left > 0, left + self._side < width)
        down = _cover(self._side, top > 0, top + self._side < height)
        self._cover = (down[:, None] * across)[..., None]  # [side, side, 1]
        self._wanted = _moments(picture[self._region].astype(np.float32), self._cover)
        self._colour: tuple[np.ndarray, np.ndarray] | None = None  # gain and offset of each channel

    def paste(self, result: np.ndarray, onto: np.ndarray) -> None:
        """Lay an answer, uint8 [S, S, 3] RGB, over `onto`, uint8 [H, W, 3], which is changed in place."""
        check_picture(result, "result")
        size = (self._side, self._side)
        answer = np.asarray(Image.fromarray(result).resize(size, Image.Resampling.LANCZOS), np.float32)
        if self._colour is None:
            self._colour = _matching(_moments(answer, self._cover), self._wanted)
        gain, offset = self._colour
        region = onto[self._region]
        blended = region + self._cover * (answer * gain + offset - region)
        region[:] = (blended.clip(0, 255) + 0.5).astype(np.uint8)


def _cover(side: int, first: bool, last: bool) -> np.ndarray:
    """How much of the answer is seen along one axis, float32 [side]: rising from 0 at the ends that are blended."""
    wide = max(FEATHER * side, 1)
    places = np.arange(side) + 0.5
    cover = np.ones(side)
    for blended, away in ((first, places), (last, side - places)):
        if blended:
            share = (away / wide).clip(0, 1)
            cover *= share * share * (3 - 2 * share)
    return cover.astype(np.float32)


def _moments(image: np.ndarray, cover: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, [3] each, where `cover` counts."""
    mean = (image * cover).sum((0, 1)) / cover.sum()
    variance = ((image - mean) ** 2 * cover).sum((0, 1)) / cover.sum()
    return mean, np.sqrt(variance)


def _matching(
    found: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset, [3] each, that give channels of these moments the wanted ones (Reinhard et al. 2001)."""
    (mean, spread), (wanted_mean, wanted_spread) = found, wanted
    gain = (wanted_spread / np.maximum(spread, 1e-3)).clip(1 / STRONGEST_GAIN, STRONGEST_GAIN)
    return gain, wanted_mean - gain * mean
