"""The kinds of clip on disk: a folder of frames, a packed clip, a video. Each gives any of its frames as RGB."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from dagan_rt.files import open_input
from dagan_rt.images import READABLE, decode_image
from dagan_rt.training.data.protocol import BadClip

VIDEO_ENDINGS = (".mp4", ".gif", ".mov", ".mkv", ".webm", ".avi")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
PACKED_ENDING = ".zip"
LARGEST_SIDE = 8192  # of a frame, pixels: refused before anything is allocated
LARGEST_FILE = 1 << 28  # of an image, bytes: room for the largest frame in 24 bits


class Reader(Protocol):
    """One clip that has been indexed; reading opens its files anew each time, so threads and processes share it."""

    path: Path

    def __len__(self) -> int:
        """Frames."""
        ...

    def frame_name(self, frame: int) -> str:
        """Name of the frame's file, without folder."""
        ...

    def read(self, frames: Sequence[int]) -> list[np.ndarray]:
        """uint8 [H, W, 3] each; raises anything for a clip that cannot be read."""
        ...


class FrameFolder:
    """A folder whose images are the frames of one clip, in the order of their names."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path = path
        # One string a clip, split when needed: millions of names as objects would fill the memory.
        self._names = "/".join(sorted(names))
        self._count = len(names)

    def __len__(self) -> int:
        return self._count

    def frame_name(self, frame: int) -> str:
        return self._names.split("/")[frame]

    def read(self, frames: Sequence[int]) -> list[np.ndarray]:
        names = self._names.split("/")
        return [self._image(names[frame]) for frame in frames]

    def _image(self, name: str) -> np.ndarray:
        with open_input(self.path / name, "frame") as file:
            return decode_frame(read_bounded(file, os.fstat(file.fileno()).st_size, name), name)


def is_frame(name: str) -> bool:
    """Whether a file in a frame folder is one of its frames; files whose name begins with a dot are others' notes."""
    return name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")


def read_bounded(file: BinaryIO, size: int, name: str) -> bytes:
    """`size` bytes from where the file stands; fewer, if it ends. BadClip for more than an image takes."""
    if size > LARGEST_FILE:
        raise BadClip(f"{name} takes {size:,} bytes, {LARGEST_FILE:,} are allowed")
    return file.read(size)


def decode_frame(data: bytes, name: str) -> np.ndarray:
    """An image file as uint8 [H, W, 3] RGB: upright, gray and 16 bits converted, transparency over white."""
    return decode_image(data, name, READABLE, LARGEST_SIDE**2)
