"""Marks that say a picture is synthetic: one to see, and one that only `detect` sees.

    marked = mark(image, "visible")          # or "invisible"
    detect([image, ...])                     # how sure, in standard deviations: `SURE` and more is a mark

The invisible mark is a fixed pattern of slightly lighter and darker squares (spread spectrum, Cox et al., Secure Spread
Spectrum Watermarking for Multimedia, IEEE Transactions on Image Processing 1997). It survives video compression, not
scaling, cropping or somebody who means to remove it: it is an honest person's label, not a lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dagan_rt.errors import InputError
from dagan_rt.images import check_picture

KINDS = ("visible", "invisible")
TEXT = "synthetic"
SQUARE = 4  # pixels of a side of the pattern's squares
LEAST, MOST = 1.0, 4.0  # levels of 255 by which a square is lighter or darker: most where the picture is rough
BOUND = 6.0  # levels of a difference between neighbouring squares beyond which more says nothing
SEED = 0x0DA6A4  # of the pattern, which is everybody's: the mark is no secret
SURE = 6.0  # standard deviations: hardly ever reached without the mark


def mark(image: np.ndarray, kind: str) -> np.ndarray:
    """A marked copy of uint8 [H, W, 3] RGB. Raises InputError for a kind that is not one of `KINDS`."""
    check_picture(image, "image")
    if kind not in KINDS:
        raise InputError(f"watermark must be {' or '.join(KINDS)}, got {kind!r}")
    height, width, _ = image.shape
    if kind == "invisible":
        squares = _squares(image)
        change = _signs(*squares.shape) * _smooth(np.abs(_rough(squares))).clip(LEAST, MOST)
        marked = image.astype(np.float32)
        whole = marked[: squares.shape[0] * SQUARE, : squares.shape[1] * SQUARE]
        whole += change.repeat(SQUARE, 0).repeat(SQUARE, 1)[..., None]
        return (marked.clip(0, 255) + 0.5).astype(np.uint8)
    label, cover = _label(height, width)
    marked = image.copy()
    corner = marked[height - label.shape[0] :, width - label.shape[1] :]
    corner[:] = (corner + cover * (label - corner.astype(np.float32)) + 0.5).astype(np.uint8)
    return marked


def detect(images: Iterable[np.ndarray]) -> float:
    """How sure it is that pictures of one size, uint8 [H, W, 3], carry the invisible mark, in standard deviations.

    About normally distributed with standard deviation 1 where they do not. `SURE` and more is a mark. Raises InputError
    where there is no picture, or pictures differ in size.
    """
    total: np.ndarray | None = None
    count = 0
    for image in images:
        check_picture(image, "image")
        squares = _squares(image)
        if total is not None and total.shape != squares.shape:
            raise InputError(f"pictures of one clip must be of one size, got {squares.shape} and {total.shape} squares")
        total = squares if total is None else total + squares
        count += 1
    if total is None or not total.size:
        raise InputError(f"a mark can be looked for in at least one picture of {SQUARE} x {SQUARE} pixels, got none")
    rough = _rough(total / count)
    pattern = _rough(_signs(*total.shape))
    spread = np.sqrt((rough**2).sum() * (pattern**2).mean())  # of the sum below where the signs are chance
    return float((rough * pattern).sum() / max(spread, 1e-9))


def _squares(image: np.ndarray) -> np.ndarray:
    """The mean brightness of each square of the pattern that is whole: float64 [h, w]."""
    height, width = (side // SQUARE for side in image.shape[:2])
    gray = image[: height * SQUARE, : width * SQUARE].astype(np.float64) @ [0.299, 0.587, 0.114]
    return gray.reshape(height, SQUARE, width, SQUARE).mean((1, 3))


def _rough(squares: np.ndarray) -> np.ndarray:
    """What distinguishes each square from those around it, large differences bounded: edges would drown the pattern."""
    padded = np.pad(squares, 1, mode="edge")
    around = (padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]) / 4
    return (squares - around).clip(-BOUND, BOUND)


def _smooth(squares: np.ndarray) -> np.ndarray:
    """The mean of every 3 x 3 squares."""
    padded = np.pad(squares, 1, mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).mean((2, 3))


@lru_cache(maxsize=8)
def _signs(height: int, width: int) -> np.ndarray:
    """-1 or 1 of each square; the same in the upper left corner of every size: [h, w]."""
    rows = [np.random.default_rng((SEED, row)).integers(0, 2, width) for row in range(height)]
    return np.stack(rows) * 2.0 - 1


@lru_cache(maxsize=8)
def _label(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The lower right corner's words, white in a dark shadow: levels and cover, float32 [h, w, 1]."""
    font = ImageFont.load_default(max(10, min(height, width) // 18))
    left, top, right, bottom = font.getbbox(TEXT)
    margin = int(bottom - top) // 2
    size = int(right - left) + 2 * margin, int(bottom - top) + 2 * margin
    drawn = []
    for offset in (1, 0):  # the shadow, then the words
        picture = Image.new("L", size)
        ImageDraw.Draw(picture).text((margin - left + offset, margin - top + offset), TEXT, fill=255, font=font)
        drawn.append(np.asarray(picture, np.float32)[-height:, -width:, None] / 255)
    shadow, words = drawn
    return 255 * words, 0.75 * np.maximum(words, shadow)
