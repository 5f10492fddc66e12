"""Packed clips: the frames of a clip as image files in one .zip, stored without compression.

One file a clip instead of hundreds: a data set copies and opens quickly, and a frame is one read at a known place.
Only this plain form is read, by its few fixed fields (APPNOTE.TXT 4.3.7, 4.3.12, 4.3.16), because it is quick to index
and leaves a hostile file nothing to unpack: no compression, no encryption, no folders, no 64-bit sizes.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dagan_rt.files import open_input
from dagan_rt.training.data.protocol import BadClip
from dagan_rt.training.data.readers import LARGEST_FILE, decode_frame, read_bounded

LARGEST_DIRECTORY = 1 << 23  # bytes of the list of entries: enough for the 65,535 that a plain zip can hold

_END = struct.Struct("<4s4H2IH")  # signature, two disks, entries here and in all, size and place of the list, comment
_ENTRY = struct.Struct("<4s4x2H4x3I3H8xI")  # signature, flags, method, CRC-32, sizes packed and not, lengths, offset
_LOCAL = struct.Struct("<4s5H3I2H")  # before each file: ends with the lengths of its name and extra field
_SIGNATURES = {"end": b"PK\5\6", "entry": b"PK\1\2", "local": b"PK\3\4"}
_NAME = re.compile(rb"[^./\\\0][^/\\\0]*\.(png|jpe?g)", re.IGNORECASE)  # of a frame
_ENCRYPTED = 0x2041  # bits of the flags: encrypted, strongly encrypted, names hidden


class PackedClip:
    """A packed clip; its frames are in the order of their names. BadClip, with the reason, for any other zip."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_input(path, "packed clip") as file:
            count, directory, start = _directory(file)
        try:
            entries = sorted(_entries(count, directory, start))
        except struct.error:
            raise BadClip("its list of files is damaged") from None
        if len({name for name, *_ in entries}) != len(entries):
            raise BadClip("it holds several files of one name")
        self._names = b"/".join(name for name, *_ in entries)  # one object a clip, as `FrameFolder` does
        self._places = np.array([place for _, *place in entries], np.uint32).reshape(-1, 3)  # offset, size, CRC-32

    def __len__(self) -> int:
        return len(self._places)

    def frame_name(self, frame: int) -> str:
        return self._names.split(b"/")[frame].decode("utf-8", "replace")

    def read(self, frames: Sequence[int]) -> list[np.ndarray]:
        with open_input(self.path, "packed clip") as file:
            return [self._image(file, frame) for frame in frames]

    def _image(self, file: BinaryIO, frame: int) -> np.ndarray:
        name, (offset, size, checksum) = f"frame {frame}", self._places[frame].tolist()
        file.seek(offset)
        header = file.read(_LOCAL.size)
        if len(header) < _LOCAL.size or not header.startswith(_SIGNATURES["local"]):
            raise BadClip(f"{name} is not where the list of files says")
        file.seek(sum(_LOCAL.unpack(header)[-2:]), 1)
        data = read_bounded(file, size, name)
        if zlib.crc32(data) != checksum:
            raise BadClip(f"{name} is damaged: its checksum differs")
        return decode_frame(data, name)


def _directory(file: BinaryIO) -> tuple[int, bytes, int]:
    """(number of entries, the list of them, where it starts), sizes checked before anything is read."""
    length = file.seek(0, 2)
    file.seek(max(0, length - _END.size))
    end = file.read(_END.size)
    if len(end) < _END.size or not end.startswith(_SIGNATURES["end"]):
        raise BadClip("it is no zip file, or cut off, or has a comment")
    _, disk, first_disk, here, count, size, start, comment = _END.unpack(end)
    if disk or first_disk or here != count or comment:
        raise BadClip("it is one part of several")
    if size > LARGEST_DIRECTORY or start + size != length - _END.size:
        raise BadClip("its list of files is damaged, or uses 64-bit sizes")
    file.seek(start)
    return count, file.read(size), start


def _entries(count: int, directory: bytes, start: int) -> list[tuple[bytes, int, int, int]]:
    """(name, offset, size, CRC-32) of each file."""
    entries, at = [], 0
    for _ in range(count):
        signature, flags, method, checksum, packed, size, *lengths, offset = _ENTRY.unpack_from(directory, at)
        at += _ENTRY.size
        name = directory[at : at + lengths[0]]
        at += sum(lengths)
        if signature != _SIGNATURES["entry"] or at > len(directory):
            raise BadClip("its list of files is damaged")
        if flags & _ENCRYPTED or method or packed != size or not _NAME.fullmatch(name):
            raise BadClip(_unlike(name, flags))
        if size > LARGEST_FILE or offset + _LOCAL.size + len(name) + size > start:
            raise BadClip(f"{_shown(name)} is said to take {size:,} bytes at {offset:,}: too many, or outside")
        entries.append((name, offset, size, checksum))
    if at != len(directory):
        raise BadClip("its list of files is damaged")
    return entries


def _unlike(name: bytes, flags: int) -> str:
    """What is wrong with an entry that is not a stored image."""
    if not _NAME.fullmatch(name):
        return f"it holds {_shown(name)!r}, expected png and jpg images only, in no folder"
    if flags & _ENCRYPTED:
        return f"{_shown(name)} is encrypted"
    return f"{_shown(name)} is compressed, expected stored as it is (zip -0)"


def _shown(name: bytes) -> str:
    return name[:80].decode("utf-8", "replace")
