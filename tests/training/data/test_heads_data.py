"""Synthetic heads as a data set: what is true of a frame, and the cache that keeps them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dagan_rt.errors import InputError
from dagan_rt.training import heads
from dagan_rt.training.data import HeadsData, disparity_of, shrink


def test_heads_are_what_the_drawing_code_drew(drawn: HeadsData) -> None:
    clip = heads.draw_clip(2, 4, 64)
    (frame,) = drawn.read(2, [3])
    assert np.array_equal(frame.image, clip.frames[3])
    assert np.array_equal(frame.landmarks, clip.landmarks[3])
    nearest, farthest = clip.depth.min(), clip.depth.max()
    expected = (1 / clip.depth[3].astype(np.float64) - 1 / farthest) / (1 / nearest - 1 / farthest)
    assert frame.disparity == pytest.approx(expected, abs=2e-5)
    assert frame.disparity[2, 2] == 0 and frame.disparity[24:40, 24:40].mean() > 0.5  # background far, face near


def test_smaller_heads_are_area_averages_with_landmarks_on_the_same_spot(drawn: HeadsData) -> None:
    (small,), (large,) = drawn.at_size(32).read(1, [2]), drawn.read(1, [2])
    assert small.image.shape == (32, 32, 3)
    average = large.image.astype(float).reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(small.image - average).max() <= 0.5
    assert small.disparity == pytest.approx(large.disparity.reshape(32, 2, 32, 2).mean((1, 3)), abs=1e-5)
    # In pixel edges (0 to size) instead of pixel centres a landmark's place only scales.
    edges = [(points + 1) / 2 * (size - 1) + 0.5 for points, size in ((small.landmarks, 32), (large.landmarks, 64))]
    assert edges[0] * 2 == pytest.approx(edges[1], abs=1e-4)
    with pytest.raises(InputError, match="drawn at 64 cannot be averaged to 48"):
        drawn.at_size(48)


def test_drawn_heads_are_found_again_and_other_parameters_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    HeadsData(range(1), 2, 32, cache=tmp_path, workers=1, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(heads, "draw_clip", lambda *_: pytest.fail("drawn twice"))
        HeadsData(range(1), 2, 32, cache=tmp_path, workers=1, progress=False)
    HeadsData(range(1), 2, 32, seed=1, cache=tmp_path, workers=1, progress=False)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(heads, "draw_clip", fail)
    with pytest.raises(OSError, match="disk full"):
        HeadsData(range(1), 2, 32, cache=tmp_path, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_worker_processes_draw_the_same_heads(tmp_path: Path) -> None:
    parallel = HeadsData(range(8), 2, 32, cache=tmp_path / "two", workers=2, progress=False)
    alone = HeadsData(range(8), 2, 32, cache=tmp_path / "one", workers=1, progress=False)
    for clip in range(8):
        assert np.array_equal(parallel.read(clip, [1])[0].image, alone.read(clip, [1])[0].image)


def test_disparity() -> None:
    depth = np.array([[2.0, 4.0], [3.0, 8.0]])
    assert disparity_of(depth, 2.0, 4.0) == pytest.approx(np.array([[1.0, 0.0], [1 / 3, 0.0]]))


@pytest.mark.parametrize(("side", "size"), [(12, 4), (12, 12), (8, 2)])
def test_shrink_is_the_mean_of_blocks(side: int, size: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    f = side // size
    expected = [[image[y * f : y * f + f, x * f : x * f + f].mean((0, 1)) for x in range(size)] for y in range(size)]
    assert shrink(image, size) == pytest.approx(np.array(expected), abs=1e-4)
    with pytest.raises(InputError, match="by whole blocks"):
        shrink(image, 5)


def test_pose_and_expression_are_what_the_drawing_code_drew(drawn: HeadsData) -> None:
    clip = heads.draw_clip(1, 4, 16)
    for data in (drawn, drawn.at_size(32)):
        for number, frame in enumerate(data.read(1, range(4))):
            assert np.array_equal(frame.pose, clip.pose[number]) and frame.pose.dtype == np.float32
            assert np.array_equal(frame.expression, clip.expression[number]) and frame.expression.shape == (7,)
    assert [drawn.identity(clip) for clip in range(3)] == ["0", "1", "2"]


def test_two_processes_that_draw_at_the_same_time_end_with_one_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, inside = heads.draw_clip, []

    def draw_while_another_finishes(*arguments: int) -> heads.Clip:
        if not inside:
            inside.append(True)
            HeadsData(range(1), 2, 32, cache=tmp_path, workers=1, progress=False)
        return draw(*arguments)

    monkeypatch.setattr(heads, "draw_clip", draw_while_another_finishes)
    data = HeadsData(range(1), 2, 32, cache=tmp_path, workers=1, progress=False)
    assert inside and [folder.name for folder in tmp_path.iterdir()] == [data.folder.name]
    assert np.array_equal(data.read(0, [1])[0].image, draw(0, 2, 32).frames[1])


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    folder = HeadsData(range(1), 2, 32, cache=tmp_path, workers=1, progress=False).folder
    (folder / "disparity.npy").write_bytes((folder / "disparity.npy").read_bytes()[:500])
    with pytest.raises(InputError, match=r"cannot be read \(disparity.npy: .*delete the folder"):
        HeadsData(range(1), 2, 32, cache=tmp_path, workers=1, progress=False)
    (folder / "done.json").unlink()
    with pytest.raises(InputError, match="is not complete; delete the folder"):
        HeadsData(range(1), 2, 32, cache=tmp_path, workers=1, progress=False)
    shutil.rmtree(folder)
    again = HeadsData(range(1), 2, 32, cache=tmp_path, workers=1, progress=False)
    assert json.loads((again.folder / "done.json").read_text()) == {"clips": 1, "frames": 2, "size": 32}
