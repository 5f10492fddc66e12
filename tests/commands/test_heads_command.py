from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dagan_rt.cli import main
from dagan_rt.training.heads import HELD_OUT, draw_clip


def test_frame_folders_hold_the_clip_and_its_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "heads"
    options = ["--clips", "2", "--frames", "2", "--size", "32", "--seed", "3", "--held-out"]
    assert main(["heads", "--out", str(out), *options]) == 0
    assert "2 clips" in capsys.readouterr().out
    assert sorted(folder.name for folder in out.iterdir()) == ["1000000", "1000001"]
    clip = draw_clip(HELD_OUT.start + 1, 2, 32, 3)
    folder = out / "1000001"
    for number in range(2):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"{number:05d}.png")), clip.frames[number])
    with np.load(folder / "truth.npz", allow_pickle=False) as truth:
        assert truth["identity"] == clip.identity
        for name in ("depth", "landmarks", "pose", "expression"):
            np.testing.assert_array_equal(truth[name], getattr(clip, name))


def test_films_look_like_the_clip(tmp_path: Path) -> None:
    from dagan_rt.video import VideoReader

    options = ["--clips", "1", "--frames", "3", "--size", "64", "--format", "mp4"]
    assert main(["heads", "--out", str(tmp_path), *options]) == 0
    with VideoReader(tmp_path / "0000000.mp4") as reader:
        frames = np.stack(list(reader))
    clip = draw_clip(0, 3, 64)
    assert frames.shape == clip.frames.shape
    assert np.abs(frames.astype(int) - clip.frames).mean() < 6.0
    assert (tmp_path / "0000000.truth.npz").is_file()


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--clips", "0"], "--clips"), (["--size", "7"], "size"), (["--frames", "0"], "frames"),
     (["--size", "33", "--format", "mp4"], "even")],
)  # fmt: skip
def test_bad_numbers_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], word: str
) -> None:
    out = tmp_path / "heads"
    assert main(["heads", "--out", str(out), *options]) == 2
    assert word in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["heads", "--out", str(tmp_path), "--clips", "1"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["heads", "--out", str(tmp_path / "mine.txt"), "--clips", "1"]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
