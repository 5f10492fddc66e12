"""Raw videos in which the "faces" are plain red rectangles, and detectors that find them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from dagan_rt.faces import Face
from dagan_rt.preparation import Options, Outcome, prepare

WIDTH, HEIGHT = 240, 160
SMALL = {"size": 32, "min_frames": 8, "max_frames": 100, "min_side": 20, "every": 2, "test_fraction": 0.5}
RED = (230, 20, 20)


class RedFaces:
    """Finds red rectangles that no column shares."""

    def __call__(self, image: np.ndarray) -> list[Face]:
        red = (image[..., 0] > 150) & (image[..., 1] < 100)
        columns = np.flatnonzero(red.any(0))
        if not columns.size:
            return []
        groups = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
        return [self._face(group, red) for group in groups]

    def _face(self, columns: np.ndarray, red: np.ndarray) -> Face:
        rows = np.flatnonzero(red[:, columns[0] : columns[-1] + 1].any(1))
        return Face(np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32), 0.9)


@cache
def bare(wall: int) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    colours = np.random.default_rng(wall).integers(0, 120, 3)
    return (colours + np.stack([40 + 0 * x, x // 3, y // 2], axis=2)).clip(0, 255).astype(np.uint8)


def scene(*boxes: tuple[int, int, int, int], wall: int = 0, mark: int = 0) -> np.ndarray:
    """A frame: red rectangles (left, top, right, bottom) before a wall; `mark` tells frames apart."""
    image = bare(wall).copy()
    for left, top, right, bottom in boxes:
        image[top:bottom, left:right] = RED
        image[(top + bottom) // 2, (left + right) // 2] = (230, 20, mark % 64)
    return image


def write_video(path: Path, frames: Iterable[np.ndarray], rate: int = 25) -> Path:
    """H.264 without loss or halved colours: what is red stays red to the pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=rate, options={"crf": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv444p"
        stream.thread_count = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def talk(frames: int = 20, left: int = 60, wall: int = 0) -> list[np.ndarray]:
    """A face that sways."""
    sway = np.rint(6 * np.sin(np.arange(frames) / 3)).astype(int)
    return [scene((left + s, 50, left + 40 + s, 100), wall=wall, mark=m) for m, s in enumerate(sway)]


def small(**changes: Any) -> Options:
    return Options(**{**SMALL, **changes})


def run(raw: Path, out: Path, **changes: Any) -> Outcome:
    return prepare(raw, out, small(**changes), detector=RedFaces())


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def film() -> SimpleNamespace:
    """The functions of this file, for tests."""
    return SimpleNamespace(
        RedFaces=RedFaces,
        scene=scene,
        write=write_video,
        talk=talk,
        small=small,
        run=run,
        tree=tree,
        size=(WIDTH, HEIGHT),
    )


@pytest.fixture
def raw(originals: Path, tmp_path: Path) -> Path:
    """A copy of `originals`, to be changed."""
    return Path(shutil.copytree(originals, tmp_path / "raw"))


@pytest.fixture
def few(originals: Path, tmp_path: Path) -> Path:
    """Two of them, one to a side."""
    for name in ("id0/talk.mp4", "id1/talk.mp4"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True)
        shutil.copyfile(originals / name, tmp_path / "raw" / name)
    return tmp_path / "raw"


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four people, five videos, and two files that are none."""
    folder = tmp_path_factory.mktemp("originals")
    for person in range(4):
        write_video(folder / f"id{person}" / "talk.mp4", talk(9 + person, 40 + 10 * person, wall=person))
    write_video(folder / "id0" / "more" / "again.mkv", talk(8))
    (folder / "id3" / "text.mp4").write_text("this is no video")
    (folder / "id3" / "notes.txt").write_text("neither is this")
    return folder
