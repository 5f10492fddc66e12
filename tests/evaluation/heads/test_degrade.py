"""Worse pictures of the same thing: nothing moves."""

from __future__ import annotations

import numpy as np
import pytest

from dagan_rt.evaluation.heads import degrade as module
from dagan_rt.evaluation.heads.degrade import add_noise, blur, degrade, degrade_slightly, jpeg, lose_resolution
from dagan_rt.evaluation.heads.frames import draw_frames


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return draw_frames(500_001, 0, [3], 64).images[0]


def offset(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How far `other` is shifted against `one`, in pixels, from the peak of their correlation (to a fraction)."""
    window = np.outer(np.hanning(64), np.hanning(64))
    first, second = (np.fft.fft2((image.mean(-1) - image.mean()) * window) for image in (one, other))
    surface = np.fft.fftshift(np.fft.ifft2(first.conj() * second).real)
    row, column = np.unravel_index(surface.argmax(), surface.shape)
    parts = []
    for line, place in ((surface[:, column], row), (surface[row], column)):
        left, middle, right = line[place - 1], line[place], line[place + 1]
        parts.append(place - 32 + (left - right) / (2 * (left - 2 * middle + right)))
    return np.array(parts)


def test_the_offset_is_found_where_there_is_one(face: np.ndarray) -> None:
    np.testing.assert_allclose(offset(face, np.roll(face, (1, 0), (0, 1))), [1, 0], atol=0.1)


def test_degradations_move_nothing(face: np.ndarray) -> None:
    for number in range(40):
        worse = degrade(face, np.random.default_rng(number))
        assert worse.shape == face.shape and worse.dtype == np.uint8
        assert np.abs(offset(face, worse)).max() < 0.15, number


@pytest.mark.parametrize(
    "change",
    [lambda it: lose_resolution(it, 24), lambda it: blur(it, 1.3), lambda it: jpeg(it, 30)],
    ids=["resolution", "blur", "jpeg"],
)
def test_each_keeps_place_and_colour_and_loses_detail(change, face: np.ndarray) -> None:
    worse = change(face)
    assert np.abs(offset(face, worse)).max() < 0.1
    np.testing.assert_allclose(worse.mean((0, 1)), face.mean((0, 1)), atol=2)
    assert 1 < np.abs(worse.astype(int) - face).mean() < 15


def test_noise_has_the_deviation_asked_for() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    noisy = add_noise(grey, np.random.default_rng(0), 5.0)
    np.testing.assert_allclose(noisy.std(), 5.0, rtol=0.05)
    np.testing.assert_allclose(noisy.mean(), 128, atol=0.2)


def test_blurs_grow_with_the_picture(face: np.ndarray) -> None:
    large = np.kron(face, np.ones((2, 2, 1), np.uint8))
    small_again = blur(large, 1.0)[::2, ::2].astype(int)
    assert np.abs(small_again - blur(face, 1.0)).mean() < 2.5


def test_the_same_random_numbers_give_the_same_picture_and_leave_the_original_alone(face: np.ndarray) -> None:
    before = face.copy()
    for change in (degrade, degrade_slightly):
        one, other = (change(face, np.random.default_rng(5)) for _ in range(2))
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(face, before)


def test_slightly_is_slight(face: np.ndarray) -> None:
    differences = [np.abs(degrade_slightly(face, np.random.default_rng(n)).astype(int) - face).mean() for n in range(8)]
    assert min(differences) > 0.5 and max(differences) < 8
    assert module.REFERENCE == 64
