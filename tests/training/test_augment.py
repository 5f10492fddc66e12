"""Augmentation: a mirrored face is a face, and the jitter is what it says."""

from __future__ import annotations

import numpy as np
import pytest

from dagan_rt.training import augment
from dagan_rt.training.augment import LANDMARK_MIRROR, colour_matrix, jitter, mirror_landmarks


def test_the_mirror_permutation_on_a_symmetric_face() -> None:
    """Against the drawing code: a face seen from the front with a symmetric expression is its own mirror image."""
    from dagan_rt.training.heads.person import draw_person
    from dagan_rt.training.heads.shape import landmark_points, make_face

    assert np.array_equal(LANDMARK_MIRROR[LANDMARK_MIRROR], np.arange(68))
    neutral = [0.3, 0.5, 0.2, 0.2, 0.5, 0.5, 0.5]
    points = landmark_points(make_face(draw_person(4), np.array(neutral)[:, None, None]))[0][:, :2]
    assert np.abs(points[:, 0]).max() > 0.3
    assert mirror_landmarks(points) == pytest.approx(points, abs=0.02)  # the ears are traced from one side


def test_colour_jitter_is_what_it_says() -> None:
    image = np.random.default_rng(0).random((6, 5, 3)).astype(np.float32)
    same = np.eye(3)
    assert jitter(image, same, 1.0) == pytest.approx(image, abs=1e-6)
    flat = jitter(image, same, 0.0)  # no contrast: the mean luma everywhere
    assert flat == pytest.approx(np.full_like(flat, float((image @ [0.299, 0.587, 0.114]).mean())), abs=1e-5)
    matrix, contrast = colour_matrix(np.random.default_rng(1), 0.1)
    neutral = np.full((2, 2, 3), 0.5, np.float32)
    coloured = jitter(neutral, matrix, contrast)
    assert np.ptp(coloured) < 2e-3  # gray stays gray whatever the hue and saturation
    assert 0.9 <= float(coloured.mean()) / 0.5 <= 1.1
    assert 0.9 <= contrast <= 1.1


@pytest.mark.parametrize("shape", [(256, 256, 3), (181, 200, 3), (2, 3, 3)])
def test_pixels_multiplied_by_blocks_are_the_same(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).random(shape).astype(np.float32)
    drawn = colour_matrix(np.random.default_rng(1), 0.1)
    blocks = jitter(image, *drawn)
    monkeypatch.setattr(augment, "BLOCK", 10**9)
    assert np.array_equal(blocks, jitter(image, *drawn))
    expected = image.reshape(-1, 3).astype(float) @ drawn[0].T
    expected = expected * drawn[1] + (1 - drawn[1]) * (expected.mean(0) @ [0.299, 0.587, 0.114])
    assert np.abs(blocks.reshape(-1, 3) - np.clip(expected, 0, 1)).max() < 1e-5
