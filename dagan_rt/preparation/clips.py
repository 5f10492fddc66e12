"""Clips on the disk: folders of images, or the same images in one uncompressed zip."""

from __future__ import annotations

import contextlib
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.files import AtomicFile
from dagan_rt.images import decode_image, encode_image

ENCODINGS = {"png": "PNG", "jpg": "JPEG"}
LARGEST_FRAME = 1 << 27  # bytes of an image file
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in a zip: the same frames make the same bytes


class OutputError(OSError):
    """The result cannot be written: the disk is full, say, and every other video would meet the same."""


class ClipWriter:
    """Frames of one clip, written to `path`: a folder, or a zip where the name ends in .zip.

    Raises OutputError, which names the file.
    """

    def __init__(self, path: Path, image: str, quality: int) -> None:
        self.path, self.image, self.quality, self.frames = path, image, quality, 0
        self._file: AtomicFile | None = None
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".zip":
                self._file = AtomicFile(path)
                self._zip = zipfile.ZipFile(cast(IO[bytes], self._file), "w", zipfile.ZIP_STORED)
            else:
                path.mkdir()

    def write(self, picture: np.ndarray) -> None:
        """The next frame, uint8 [S, S, 3] RGB."""
        name = frame_name(self.frames, self.image)
        data = encode_image(picture, ENCODINGS[self.image], self.quality)
        with writing(self.path):
            if self._file is None:
                (self.path / name).write_bytes(data)
            else:
                entry = zipfile.ZipInfo(name, _EPOCH)
                entry.external_attr = 0o644 << 16
                self._zip.writestr(entry, data)
                self._file.check()
        self.frames += 1

    def close(self) -> None:
        """Finish the clip: it is whole then."""
        if self._file is not None:
            with writing(self.path):
                self._zip.close()
                self._file.commit()
            self._file = None

    def discard(self) -> None:
        """Give up a zip that is not closed, and the file it keeps open; does nothing after `close`."""
        if self._file is not None:
            with contextlib.suppress(OSError, ValueError, struct.error):
                self._zip.close()
            self._file.discard()
            self._file = None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(error.errno, error.strerror or str(error), str(error.filename or path)) from error


def frame_name(number: int, image: str) -> str:
    """The file of a clip's frame."""
    return f"{number:07d}.{image}"


def read_frame(path: Path, number: int, image: str) -> np.ndarray:
    """One frame of a clip, uint8 [S, S, 3]; InputError, or OSError, where it cannot be read."""
    name = frame_name(number, image)
    if path.suffix != ".zip":
        return decode_image((path / name).read_bytes(), str(path / name))
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(name)
            if entry.file_size > LARGEST_FRAME or entry.compress_type != zipfile.ZIP_STORED:
                raise InputError(f"{path}: {name} is not a stored image of at most {LARGEST_FRAME} bytes")
            return decode_image(archive.read(entry), f"{path}, {name}")
    except (KeyError, zipfile.BadZipFile, ValueError) as error:
        raise InputError(f"{path} is not a clip that was prepared: {error}") from None
