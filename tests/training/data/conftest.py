"""Clips to read: written to disk in every form, and in memory."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dagan_rt.training.data import BadClip, ClipFolder, Frame, HeadsData


def gray_image(level: int, height: int = 24, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def video_file(path: Path, levels: Sequence[int], height: int = 48, width: int = 64) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if path.suffix == ".mp4" else "gif", rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p" if path.suffix == ".mp4" else "rgb8"
        if path.suffix == ".mp4":
            stream.options = {"crf": "1", "g": "4", "bf": "2"}  # several key frames, and frames out of order
        for number, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(gray_image(level, height, width), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def frame_folder(folder: Path, levels: Sequence[int], ending: str = "png") -> None:
    folder.mkdir(parents=True)
    for number, level in enumerate(levels):
        Image.fromarray(gray_image(level)).save(folder / f"{number:04d}.{ending}")


def packed_clip(folder: Path) -> Path:
    """The files of a frame folder as a packed clip beside it, by the standard library; the last file goes in first."""
    path = folder.with_name(folder.name + ".zip")
    with zipfile.ZipFile(path, "w") as packed:
        for file in sorted(folder.iterdir(), reverse=True):
            packed.write(file, file.name)
    return path


class Pictures:
    """Clips in memory: random pixels, of which the first tells the clip and frame; some may be bad."""

    def __init__(self, counts: Sequence[int], size: int = 6) -> None:
        self.size, self.counts = size, list(counts)
        self.bad: set[int] = set()
        self.bad_frames: set[tuple[int, int]] = set()
        rng = np.random.default_rng(0)
        self.frames = [[self._frame(rng) for _ in range(count)] for count in counts]
        for clip, frames in enumerate(self.frames):
            for number, frame in enumerate(frames):
                frame.image[:, :, 2] = 16 * clip + number  # so does the mirrored one

    def _frame(self, rng: np.random.Generator) -> Frame:
        side = self.size
        image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        return Frame(image, rng.random((side, side), dtype=np.float32), rng.random((68, 2), dtype=np.float32))

    def __len__(self) -> int:
        return len(self.counts)

    def name(self, clip: int) -> str:
        return f"clip {clip}"

    def identity(self, clip: int) -> str:
        return str(clip)

    def frame_count(self, clip: int) -> int:
        return self.counts[clip]

    def read(self, clip: int, frames: Sequence[int]) -> list[Frame]:
        if clip in self.bad or any((clip, frame) in self.bad_frames for frame in frames):
            raise BadClip(f"clip {clip} is bad")
        return [self.frames[clip][frame] for frame in frames]


@pytest.fixture(scope="session")
def gray() -> Any:
    """`gray(level, height=24, width=32)`: uint8 RGB."""
    return gray_image


@pytest.fixture(scope="session")
def write_video() -> Any:
    """`write_video(path, levels)`: a frame of each gray level, mp4 or gif."""
    return video_file


@pytest.fixture(scope="session")
def write_frames() -> Any:
    """`write_frames(folder, levels, ending="png")`."""
    return frame_folder


@pytest.fixture(scope="session")
def pack() -> Any:
    """`pack(folder) -> Path` of the packed clip."""
    return packed_clip


@pytest.fixture(scope="session")
def pictures() -> Any:
    """`pictures(frames of each clip)`: clips in memory."""
    return Pictures


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipFolder:
    folder = tmp_path_factory.mktemp("clips")
    video_file(folder / "a.mp4", list(range(10, 250, 20)))
    video_file(folder / "b.gif", [0, 109, 182, 255])
    frame_folder(folder / "people" / "c", [15, 95, 175])
    frame_folder(folder / "people" / "d", [40, 200], "jpg")
    return ClipFolder(folder, 16, progress=False)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> HeadsData:
    return HeadsData(range(3), 4, 64, cache=tmp_path_factory.mktemp("cache"), workers=1, progress=False)
