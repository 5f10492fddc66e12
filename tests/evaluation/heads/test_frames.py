"""What the regressors learn from: the right frames, the right truth, and nobody else's heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dagan_rt._assets import asset
from dagan_rt.errors import InputError
from dagan_rt.evaluation.heads.frames import (
    FIRST,
    FIRST_MEASURED,
    cached_set,
    draw_frames,
    draw_set,
    measured_identities,
    pick_times,
    regrid,
    shrink,
    training_identities,
)
from dagan_rt.training.heads import HELD_OUT, TRAINING, draw_clip
from dagan_rt.training.recipe import read_recipe


def test_frames_are_those_of_the_clip() -> None:
    times = [2, 5, 9]
    clip, frames = draw_clip(500_003, 10, 32, 1), draw_frames(500_003, 1, times, 32)
    np.testing.assert_array_equal(frames.images, clip.frames[times])
    for name in ("landmarks", "pose", "expression"):
        np.testing.assert_array_equal(getattr(frames, name), getattr(clip, name)[times], name)


def test_a_driver_lends_motion_and_nothing_else() -> None:
    own, driven = draw_frames(1_500_000, 0, [4], 32), draw_frames(1_500_000, 0, [4], 32, driver=1_500_001)
    driver = draw_frames(1_500_001, 0, [4], 32)
    np.testing.assert_array_equal(driven.pose, driver.pose)
    np.testing.assert_array_equal(driven.expression, driver.expression)
    assert driven.identity == own.identity
    # The corner of the picture shows the scene's background, which stays.
    np.testing.assert_array_equal(driven.images[0, 0, 0], own.images[0, 0, 0])
    assert np.abs(driven.images.astype(int) - own.images).mean() > 2
    assert np.abs(driven.images.astype(int) - driver.images).mean() > 2


def test_shrinking_keeps_places() -> None:
    """A dot's landmark is still on the dot, which the eye would not see of half a pixel, nor a loose test."""
    frames = draw_frames(500_000, 0, [0], 128)
    images = np.zeros_like(frames.images)
    images[0, 40:42, 76:78] = 255  # its middle is at pixel (76.5, 40.5), in a single pixel of the smaller picture
    landmarks = np.full((1, 68, 2), [76.5, 40.5], np.float32) / 127 * 2 - 1
    small = shrink(type(frames)(images, landmarks, frames.pose, frames.expression, frames.identity, frames.scene), 64)
    rows, columns = np.nonzero(small.images[0, :, :, 0])
    np.testing.assert_allclose((small.landmarks[0, 0] + 1) / 2 * 63, [columns.mean(), rows.mean()], atol=1e-4)
    np.testing.assert_allclose(regrid(regrid(landmarks, 128, 64), 64, 128), landmarks, atol=1e-6)
    with pytest.raises(InputError, match="not a whole fraction"):
        shrink(frames, 48)


def test_nobody_is_seen_twice() -> None:
    """Regressors learn from other heads than models do, and both are measured on heads that neither saw."""
    learnt, measured = training_identities(3000), measured_identities(200)
    assert learnt.start == FIRST and learnt.stop <= TRAINING.stop
    assert measured.start == HELD_OUT[FIRST_MEASURED] and measured.stop <= HELD_OUT.stop
    recipes = [read_recipe(path) for path in sorted(Path(asset("train", "recipes")).glob("*.toml"))]
    heads = [recipe.data for recipe in recipes if recipe.data.kind == "heads"]
    assert heads
    for data in heads:
        models = range(data.first_identity, data.first_identity + data.identities)
        assert models.stop <= learnt.start or models.start >= learnt.stop
        assert HELD_OUT[: max(data.held_out, 1)].stop <= measured.start


@pytest.mark.parametrize("count", [1, 500_001])
def test_identities_out_of_range_are_refused(count: int) -> None:
    for choose in (training_identities, measured_identities):
        with pytest.raises(InputError, match="identities must be between 2 and 500000"):
            choose(count)


def test_a_set_holds_two_scenes_of_each_and_is_drawn_once(tmp_path: Path) -> None:
    identities = training_identities(2)
    drawn = cached_set(identities, 2, tmp_path, workers=1)
    assert drawn.identity.tolist() == [FIRST] * 4 + [FIRST + 1] * 4 and drawn.scene.tolist() == [0, 0, 1, 1] * 2
    first = draw_frames(FIRST, 0, pick_times(FIRST, 0, 2), 64)
    np.testing.assert_array_equal(drawn.images[:2], first.images)
    fresh = draw_set(identities, 2)
    (folder,) = tmp_path.iterdir()
    np.save(folder / "pose.npy", drawn.pose + 1)  # so that a second drawing would show
    again = cached_set(identities, 2, tmp_path, workers=1)
    np.testing.assert_array_equal(again.pose, drawn.pose + 1)
    np.testing.assert_array_equal(again.images, fresh.images)


def test_frames_of_a_clip_lie_apart() -> None:
    times = [pick_times(identity, 0, 3) for identity in range(200)]
    assert all(len(set(chosen)) == 3 for chosen in times)
    assert np.diff(times).mean() > 20
