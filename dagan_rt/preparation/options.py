"""What a preparation is asked for, and that a run which continues is asked for the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.faces import CENTERFACE, detector_file
from dagan_rt.files import AtomicFile
from dagan_rt.tables import read_json

FORMATS, IMAGES = ("frames", "packed"), ("png", "jpg")
LARGEST_SIZE = 4096  # pixels of a side
FILE = "prepare.json"
VERSION = 1


@dataclass(frozen=True)
class Options:
    """All that decides which bytes are written; the defaults are those of the published training set where it has any.

    size: side of the frames, pixels. fps: frames a second; a video with fewer keeps its own. min_frames, max_frames: of
    a clip; longer ones are cut into several. margin: what is added to the face's box on each side, in sides of the box.
    min_side: the least side of the square crop in the raw video, pixels; 0: `size`, so that nothing is enlarged.
    every: frames from one detection to the next. format: "frames" (a folder of images) or "packed" (one uncompressed
    zip of them). image: "png" or "jpg", of `quality` 1 to 95. test_fraction: expected share of the identities whose
    clips go to test/. seed: other identities there. identities: see `names.identity_rule`. detector: see
    `faces.load_detector`.
    """

    size: int = 256
    fps: float = 25.0
    min_frames: int = 64
    max_frames: int = 1024
    margin: float = 0.4
    min_side: int = 0
    every: int = 5
    format: str = "frames"
    image: str = "png"
    quality: int = 95
    test_fraction: float = 0.1
    seed: int = 0
    identities: str = "folder"
    detector: str = CENTERFACE

    def __post_init__(self) -> None:
        _between("size", self.size, 16, LARGEST_SIZE)
        _between("fps", self.fps, 1, 1000)
        _between("min_frames", self.min_frames, 2, 1_000_000)
        _between("max_frames", self.max_frames, self.min_frames, 1_000_000)
        _between("margin", self.margin, 0, 4)
        _between("min_side", self.min_side, 0, LARGEST_SIZE)
        _between("every", self.every, 1, 1000)
        _between("quality", self.quality, 1, 95)
        _between("test_fraction", self.test_fraction, 0, 1)
        _between("seed", self.seed, 0, (1 << 63) - 1)
        for name, allowed in (("format", FORMATS), ("image", IMAGES)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{flag(name)} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")

    @property
    def least_side(self) -> int:
        """The least side of a crop in the raw video, pixels."""
        return self.min_side or self.size

    def described(self, with_detector: bool = True) -> dict[str, Any]:
        """The options and, where one of them names a file, a digest of its content."""
        digests = {"detector_sha256": _digest(detector_file(self.detector))} if with_detector else {}
        if self.identities.lower().endswith(".csv"):
            digests["identities_sha256"] = _digest(Path(self.identities))
        return {**dataclasses.asdict(self), **digests}


def flag(name: str) -> str:
    """How the command line calls an option."""
    return "--" + name.removesuffix("_sha256").replace("_", "-")


def first_difference(folder: Path, wanted: dict[str, Any]) -> str | None:
    """None where `folder` was prepared with the wanted options, or a sentence about the first that is another."""
    path = folder / FILE
    found = read_json(path, "the options of a prepared folder")
    if not isinstance(found, dict) or found.get("version") != VERSION or not isinstance(found.get("options"), dict):
        return f"{path} is not of this version of dagan-rt"
    before = found["options"]
    for name in wanted:
        if before.get(name) != wanted[name]:
            if name.endswith("_sha256"):
                return f"the file of {flag(name)} is not the one {folder} was prepared with"
            return f"{folder} was prepared with {flag(name)} {before.get(name)}, not {wanted[name]}"
    return None


def write_options(folder: Path, described: dict[str, Any]) -> None:
    """Keep the options beside the data."""
    file = AtomicFile(folder / FILE)
    file.write((json.dumps({"version": VERSION, "options": described}, indent=2) + "\n").encode())
    file.commit()


def _between(name: str, value: float, least: float, most: float) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise InputError(f"{flag(name)} must be from {least} to {most}, got {value}")


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
