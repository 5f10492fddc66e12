"""Answers in their pictures again."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dagan_rt.cropping import Square
from dagan_rt.pasting import FEATHER, STRONGEST_GAIN, Canvas

PICTURE = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((160, 120))
)
SQUARE = Square(40, 30, 64)
INSIDE = (slice(30, 94), slice(40, 104))


def test_a_square_pasted_where_it_was_cut_leaves_the_picture_as_it_is() -> None:
    for size, allowed in ((64, 0), (128, 1)):
        onto = PICTURE.copy()
        Canvas(PICTURE, SQUARE).paste(SQUARE.cut(PICTURE, size), onto)
        assert np.abs(onto.astype(int) - PICTURE).max() <= allowed


def test_only_the_square_changes_and_its_border_is_blended() -> None:
    black = np.zeros((120, 160, 3), np.uint8)
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))[:, :, None].repeat(3, 2)  # a mean and a contrast to match
    canvas = Canvas(np.full_like(black, 128), SQUARE)
    canvas._colour = (np.ones(3), np.zeros(3))
    onto = black.copy()
    canvas.paste(np.full((64, 64, 3), 255, np.uint8), onto)
    outside = np.ones((120, 160), bool)
    outside[INSIDE] = False
    assert not onto[outside].any() and stripes.any()
    row = onto[62, 40:104, 0].astype(int)
    wide = round(FEATHER * 64)
    assert row[0] < 10 and (np.diff(row[: 64 // 2]) >= 0).all() and (row[wide:-wide] == 255).all()
    np.testing.assert_array_equal(row, row[::-1])
    np.testing.assert_array_equal(onto[30:94, 72, 0], row)


@pytest.mark.parametrize(("left", "top"), [(0, 0), (96, 56), (0, 56)])
def test_the_pictures_own_border_is_not_blended(left: int, top: int) -> None:
    canvas = Canvas(PICTURE, Square(left, top, 64))
    canvas._colour = (np.ones(3), np.zeros(3))
    onto = np.zeros_like(PICTURE)
    canvas.paste(np.full((64, 64, 3), 255, np.uint8), onto)
    across = onto[top + 32, left : left + 64, 0]
    down = onto[top : top + 64, left + 32, 0]
    for line, at_start in ((across, left == 0), (down, top == 0)):
        assert (line[0] == 255) == at_start and (line[-1] == 255) == (not at_start)


def test_colours_are_matched_to_the_picture() -> None:
    inside = PICTURE[INSIDE].astype(float)
    answer = (inside * [0.9, 1.0, 0.85] + [20, 0, 5]).round().clip(0, 255).astype(np.uint8)
    onto = PICTURE.copy()
    Canvas(PICTURE, SQUARE).paste(answer, onto)
    assert np.abs(onto.astype(int) - PICTURE).max() <= 2


def test_contrast_is_changed_within_bounds() -> None:
    flat = (PICTURE[INSIDE].astype(float) * 0.1 + 100).round().astype(np.uint8)
    canvas = Canvas(PICTURE, SQUARE)
    canvas.paste(flat, PICTURE.copy())
    assert canvas._colour is not None
    np.testing.assert_allclose(canvas._colour[0], STRONGEST_GAIN)


def test_the_first_answer_decides_for_all() -> None:
    """A face that turns towards a lamp grows brighter, and is not to be darkened for it."""
    answer = PICTURE[INSIDE]
    brighter = np.minimum(answer.astype(int) + 15, 255).astype(np.uint8)
    canvas = Canvas(PICTURE, SQUARE)
    onto = PICTURE.copy()
    canvas.paste(answer, onto)
    canvas.paste(brighter, onto)
    middle = (slice(50, 74), slice(60, 84))
    expected = np.minimum(PICTURE[middle].astype(int) + 15, 255)
    np.testing.assert_allclose(onto[middle], expected, atol=1)
