"""Motion templates: the key points of a driving clip in a small file, to drive portraits without the video."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.files import AtomicFile, check_output, open_input
from dagan_rt.keypoints import KeyPoints

ENDING = ".motion"
VERSION = 1
LARGEST = 1 << 28  # bytes: an hour at 60 frames a second takes 80 MB
MOST_SECONDS = 10_000_000
ARRAYS = {"version": 0, "model": 0, "fps": 1, "times": 2, "durations": 2, "value": 3, "jacobian": 4}  # and dimensions


class Moment(NamedTuple):
    """The key points of one frame, and when it is shown."""

    points: KeyPoints  # NumPy, [1, K, 2] and [1, K, 2, 2]
    time: Fraction  # seconds since the start of the clip, strictly increasing
    duration: Fraction  # seconds


@dataclass(frozen=True)
class Template:
    """A clip's key points, frame by frame.

    value: float32 [T, K, 2]; jacobian: float32 [T, K, 2, 2], see `dagan_rt.keypoints`. times, durations: of each frame,
    in seconds. fps: frames a second, on average. model: digest of the weights that found them, "" where it is unknown:
    other weights mean other places by the same numbers.
    """

    value: np.ndarray
    jacobian: np.ndarray
    times: list[Fraction]
    durations: list[Fraction]
    fps: Fraction
    model: str = ""

    def __len__(self) -> int:
        return len(self.times)

    def __iter__(self) -> Iterator[Moment]:
        for number, (time, duration) in enumerate(zip(self.times, self.durations, strict=True)):
            one = slice(number, number + 1)
            yield Moment(KeyPoints(self.value[one], self.jacobian[one]), time, duration)

    @classmethod
    def of(cls, moments: list[Moment], fps: Fraction, model: str = "") -> Template:
        """A template of at least one moment."""
        value, jacobian = (np.concatenate([one.points[part] for one in moments]) for part in (0, 1))
        return cls(
            value.astype(np.float32), jacobian.astype(np.float32), [one.time for one in moments],
            [one.duration for one in moments], fps, model,
        )  # fmt: skip

    def check_model(self, model: str, path: Path) -> None:
        """Raise InputError if other weights than `model` (a digest, or "") found the key points."""
        if self.model and model and self.model != model:
            raise InputError(
                f"motion template {path} was recorded with other weights ({self.model[:12]}…) than the bundle's "
                f"({model[:12]}…): record it again with dagan-rt motion"
            )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; InputError for a name that does not end in .motion."""
        out = check_output(path, (ENDING,))
        content = io.BytesIO()
        np.savez_compressed(
            content, version=np.int64(VERSION), model=np.str_(self.model), fps=_pairs([self.fps])[0],
            times=_pairs(self.times), durations=_pairs(self.durations), value=self.value, jacobian=self.jacobian,
        )  # fmt: skip
        file = AtomicFile(out)
        file.write(content.getvalue())
        file.commit()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Template:
        """Read a file, which nothing is trusted of: no pickle, sizes known before they are allocated.

        Raises InputError for a file that is missing, no template, of another version, damaged or larger than 256 MB.
        """
        with open_input(path, "motion template") as file:
            try:
                arrays = _arrays(file)
            except InputError:
                raise
            except Exception as error:  # zipfile, zlib and NumPy raise about everything on damaged files
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise InputError(f"motion template {path} is damaged or no template: {reason}") from None
        try:
            return cls(
                arrays["value"], arrays["jacobian"], _fractions(arrays["times"]), _fractions(arrays["durations"]),
                _fractions(arrays["fps"][None])[0], str(arrays["model"]),
            )._checked()  # fmt: skip
        except (ValueError, ZeroDivisionError) as error:
            raise InputError(f"motion template {path} is damaged: {error}") from None

    def _checked(self) -> Template:
        frames, points = self.value.shape[:2]
        if not frames or not points or self.jacobian.shape != (frames, points, 2, 2) or self.value.shape[2] != 2:
            raise ValueError(f"key points {list(self.value.shape)} and {list(self.jacobian.shape)} do not fit together")
        if not (np.isfinite(self.value).all() and np.isfinite(self.jacobian).all()):
            raise ValueError("a key point is not a number")
        if len(self.times) != frames or len(self.durations) != frames:
            raise ValueError(f"{frames} frames have {len(self.times)} times and {len(self.durations)} durations")
        if any(later <= earlier for earlier, later in zip(self.times, self.times[1:], strict=False)):
            raise ValueError("times do not increase")
        if self.times[0] < 0 or self.times[-1] > MOST_SECONDS or min(self.durations) <= 0 or not 0 < self.fps <= 1000:
            raise ValueError("times or rate are out of range")
        return self


def _arrays(file: Any) -> dict[str, np.ndarray]:
    """The arrays of a template's file, of the kinds and dimensions they have to be."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry.file_size for entry in archive.infolist()}
        if set(entries) != set(ARRAYS) or sum(entries.values()) > LARGEST:
            raise ValueError(f"expected {', '.join(ARRAYS)} of at most {LARGEST:,} bytes")
        for name, size in entries.items():  # NumPy allocates what an array's own header says
            with archive.open(f"{name}.npy") as entry:
                np.lib.format.read_magic(entry)
                shape, _, dtype = np.lib.format.read_array_header_1_0(entry)
            if prod(shape) * dtype.itemsize > size:
                raise ValueError(f"{name} claims to be {dtype} {list(shape)} in {size} bytes")
    file.seek(0)
    with np.load(file, allow_pickle=False) as loaded:
        version = int(loaded["version"])
        if version != VERSION:
            raise ValueError(f"its version must be {VERSION}, got {version}")
        arrays = {name: loaded[name] for name in ARRAYS}
    kinds = {"value": np.float32, "jacobian": np.float32, "fps": np.int64, "times": np.int64, "durations": np.int64}
    for name, dimensions in ARRAYS.items():
        if arrays[name].ndim != dimensions or (name in kinds and arrays[name].dtype != kinds[name]):
            raise ValueError(f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}")
    return arrays


def _pairs(numbers: list[Fraction]) -> np.ndarray:
    """Fractions as int64 [N, 2], numerator and denominator."""
    return np.array([[number.numerator, number.denominator] for number in numbers], np.int64)


def _fractions(pairs: np.ndarray) -> list[Fraction]:
    if pairs.shape[-1] != 2:
        raise ValueError(f"fractions must be pairs, got {list(pairs.shape)}")
    return [Fraction(int(above), int(below)) for above, below in pairs]
