"""Marks of synthetic pictures: the one is seen, the other is found again after compression, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dagan_rt.cli import main
from dagan_rt.errors import InputError
from dagan_rt.video import VideoReader, VideoWriter
from dagan_rt.watermark import SURE, detect, mark


@pytest.fixture(scope="module")
def pictures(portrait: np.ndarray) -> list[np.ndarray]:
    """Without the mark: a photograph in all its places, gradients, noise, one colour."""
    rng = np.random.default_rng(0)
    shifted = [np.roll(portrait, tuple(rng.integers(0, 256, 2)), (0, 1)) for _ in range(60)]
    ramp = np.linspace(0, 255, 256).astype(np.uint8)[None, :, None].repeat(256, 0).repeat(3, 2)
    noise = [rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(60)]
    return [*shifted, *noise, ramp, np.full((256, 256, 3), 128, np.uint8)]


def test_pictures_without_the_mark_are_chance(pictures: list[np.ndarray]) -> None:
    found = np.array([detect([picture]) for picture in pictures])
    assert np.abs(found).max() < 0.75 * SURE and abs(found.mean()) < 0.3 and found.std() < 1.4


@pytest.mark.parametrize("crf", [18, 23, 28])
def test_the_invisible_mark_survives_compression(portrait: np.ndarray, tmp_path: Path, crf: int) -> None:
    frames = [np.roll(portrait, 2 * number, 1) for number in range(8)]
    for name, marked in (("marked", True), ("plain", False)):
        with VideoWriter(tmp_path / f"{name}.mp4", 25, 256, 256, crf=crf) as writer:
            for frame in frames:
                writer.write(mark(frame, "invisible") if marked else frame)
    with VideoReader(tmp_path / "marked.mp4") as marked_clip, VideoReader(tmp_path / "plain.mp4") as plain:
        assert detect(marked_clip) > SURE > 0.75 * SURE > abs(detect(plain))


def test_the_invisible_mark_is_one_level_where_the_picture_is_smooth(portrait: np.ndarray) -> None:
    before = portrait.copy()
    change = mark(portrait, "invisible").astype(int) - before
    np.testing.assert_array_equal(portrait, before)
    assert np.abs(change).max() <= 4 and 0.45 < (change > 0).mean() < 0.55
    smooth = np.full((64, 64, 3), 100, np.uint8)
    assert set(np.unique(mark(smooth, "invisible"))) == {99, 101}
    assert detect([mark(portrait, "invisible")]) > 3 * SURE
    extremes = np.concatenate([np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)])
    assert np.abs(mark(extremes, "invisible").astype(int) - extremes).max() <= 4  # nothing wraps around


def test_a_picture_cut_at_its_right_and_lower_side_keeps_it(portrait: np.ndarray) -> None:
    marked = mark(portrait, "invisible")
    assert detect([marked[:201, :150]]) > SURE
    assert abs(detect([marked[2:, 2:]])) < SURE  # as the module says: not from the other sides


def test_the_visible_mark_is_a_word_in_the_corner(portrait: np.ndarray) -> None:
    for picture in (portrait, np.zeros_like(portrait), np.full_like(portrait, 255)):
        marked = mark(picture, "visible")
        changed = np.abs(marked.astype(int) - picture).max(2) > 60
        rows, columns = np.nonzero(changed)
        assert changed.sum() > 100 and rows.min() > 220 and columns.min() > 150
    assert mark(np.zeros((16, 16, 3), np.uint8), "visible").shape == (16, 16, 3)


def test_wrong_arguments(portrait: np.ndarray) -> None:
    with pytest.raises(InputError, match="watermark must be visible or invisible, got 'loud'"):
        mark(portrait, "loud")
    with pytest.raises(InputError, match="at least one picture"):
        detect([])
    with pytest.raises(InputError, match="must be of one size"):
        detect([portrait, portrait[:100]])


def test_info_says_whether_it_is_there(
    portrait: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(mark(portrait, "invisible")).save(tmp_path / "marked.png")
    Image.fromarray(portrait).save(tmp_path / "plain.jpg", quality=90)
    with VideoWriter(tmp_path / "marked.mp4", 25, 256, 256) as writer:
        writer.write(mark(portrait, "invisible"))
    for name, words in (
        ("marked.png", "found: it is"),
        ("marked.mp4", "found: it is"),
        ("plain.jpg", "not found, which"),
    ):
        assert main(["info", str(tmp_path / name)]) == 0
        assert f"{name}: invisible mark of dagan-rt {words}" in capsys.readouterr().out
    (tmp_path / "bad.mp4").write_bytes(b"no")
    assert main(["info", str(tmp_path / "bad.mp4")]) == 2
    assert "bad.mp4 is not a video" in capsys.readouterr().err
