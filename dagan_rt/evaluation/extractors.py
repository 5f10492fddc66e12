"""Extractors of landmarks, identity, head pose and action units: ONNX files in ONNX Runtime, see `descriptors`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.evaluation.descriptors import ANGLES, KINDS, Descriptor, read_descriptor
from dagan_rt.tables import printable

__all__ = ["Descriptor", "Extractor", "OnnxExtractor", "load_extractors", "read_descriptor", "resized"]

LARGEST_MODEL = 2 << 30  # bytes; also the most that one ONNX file can hold
LARGEST_OUTPUT = 1 << 16  # numbers an image
REFERENCE_SIDE = 256  # landmarks are told in pixels of a picture of this side, as the published numbers are


class Extractor(Protocol):
    """What `dagan_rt.evaluation.evaluate` asks of one; `OnnxExtractor` is made from files."""

    kind: str
    name: str
    noise: dict[str, float]

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [B, S, S, 3] RGB -> values float64 [B, ...] and found bool [B]; values of an image not found are NaN.

        landmarks: [B, L, 2] in pixels at 256. identity: [B, E], of length 1. pose: [B, 3] yaw, pitch, roll in degrees.
        actions: [B, A], 1 where active, else 0.
        """
        ...


def load_extractors(given: Sequence[str | Path], threads: int | None = None) -> dict[str, OnnxExtractor]:
    """Extractors by kind: from descriptor files, or those of the synthetic heads for "heads".

    threads: of ONNX Runtime for each; None: all cores. InputError for two of one kind, and as `OnnxExtractor`.
    """
    from dagan_rt._assets import asset

    paths: list[Path] = []
    for it in given:
        if str(it) == "heads":
            paths += [asset("train", "extractors", f"{kind}.toml") for kind in KINDS]
        else:
            paths.append(Path(it))
    found: dict[str, OnnxExtractor] = {}
    origins: dict[str, Path] = {}
    for path in paths:
        kind = read_descriptor(path).kind
        if kind in found:
            raise InputError(f"{path} and {origins[kind]} both give {kind}: one extractor of a kind is used, name one")
        found[kind], origins[kind] = OnnxExtractor(path, threads), path
    return found


class OnnxExtractor:
    """An ONNX file with its descriptor, in ONNX Runtime on the CPU."""

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        """path: of the descriptor. InputError names the file that cannot be used and why."""
        from dagan_rt.backends.onnxruntime import load_session

        self.path, self.descriptor = Path(path), read_descriptor(path)
        self.kind, self.name, self.noise = self.descriptor.kind, self.descriptor.name, self.descriptor.noise
        self.model = self.path.parent / self.descriptor.model
        self.sha256 = _digest(self.model)
        self._session = load_session(self.model, threads)
        self._input, self._one_by_one = self._check_signature()

    def describe(self) -> dict[str, Any]:
        """Name and hashes, for the record of an evaluation."""
        descriptor = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return {"name": self.name, "model sha256": self.sha256, "descriptor sha256": descriptor,
                "noise": dict(self.noise), "noise from": self.descriptor.noise_from}  # fmt: skip

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As in `Extractor`."""
        planes = self.prepare(images)
        steps = [planes[i : i + 1] for i in range(len(planes))] if self._one_by_one else [planes]
        names = [self.descriptor.output] + ([self.descriptor.score] if self.descriptor.score else [])
        try:
            answers = [self._session.run(names, {self._input: step}) for step in steps]
        except Exception as error:  # onnxruntime's own exceptions share no base class
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.model} cannot be run on [{len(images)}, …] images: {reason}") from None
        output, *scores = (np.concatenate(parts) for parts in zip(*answers, strict=True))
        values = self._read(self._checked(output, len(images)))
        found = np.isfinite(values).reshape(len(values), -1).all(1)
        if scores:
            found &= scores[0].reshape(len(images), -1)[:, 0] >= self.descriptor.least_score
        values[~found] = math.nan
        return values, found

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] RGB -> what the ONNX file takes, float32."""
        it = self.descriptor
        pixels = np.stack([resized(image, it.size) for image in images]).astype(np.float32)
        planes = (pixels * np.float32(it.scale) - np.asarray(it.mean, np.float32)) / np.asarray(it.std, np.float32)
        planes = planes[..., ::-1] if it.channels == "BGR" else planes
        return np.ascontiguousarray(planes.transpose(0, 3, 1, 2) if it.layout == "NCHW" else planes)

    def _read(self, output: np.ndarray) -> np.ndarray:
        it = self.descriptor
        if it.kind == "landmarks":
            return _pixels(output[:, list(it.indices)] if it.indices else output, it.units, it.size)
        if it.kind == "identity":
            with np.errstate(invalid="ignore", divide="ignore"):
                return output / np.linalg.norm(output, axis=1, keepdims=True)
        if it.kind == "pose":
            angles = output[:, [it.order.index(angle) for angle in ANGLES]]
            return np.degrees(angles) if it.units == "radians" else angles
        return np.where(np.isfinite(output), output >= it.threshold, math.nan)

    def _checked(self, output: np.ndarray, count: int) -> np.ndarray:
        it, shape = self.descriptor, output.shape
        expected = {"landmarks": "[B, L, 2]", "identity": "[B, E]", "pose": "[B, 3]", "actions": "[B, A]"}[it.kind]
        fits = len(shape) == (3 if it.kind == "landmarks" else 2) and shape[0] == count and output[0].size > 0
        fits &= it.kind not in ("landmarks", "pose") or shape[-1] == (2 if it.kind == "landmarks" else 3)
        if not fits or output[0].size > LARGEST_OUTPUT or output.dtype.kind != "f":
            raise InputError(
                f"{self.model}: output {it.output!r} must be {expected} of floats, got {output.dtype} {list(shape)}"
            )
        if it.indices and max(it.indices) >= shape[1]:
            raise InputError(f"{self.path}: indices go up to {max(it.indices)}, the output has {shape[1]} points")
        if it.names and len(it.names) != shape[1]:
            raise InputError(f"{self.path}: {len(it.names)} names, the output has {shape[1]} action units")
        return output.astype(np.float64)

    def _check_signature(self) -> tuple[str, bool]:
        """The input's name, and whether it takes one image at a time."""
        it, inputs = self.descriptor, self._session.get_inputs()
        outputs = [output.name for output in self._session.get_outputs()]
        for name in [it.output] + ([it.score] if it.score else []):
            if name not in outputs:
                raise InputError(f"{self.path}: {self.model.name} has no output {name!r}, it has {', '.join(outputs)}")
        height, width = it.size
        expected = [3, height, width] if it.layout == "NCHW" else [height, width, 3]
        shapes = ", ".join(f"{node.name} {node.shape} {node.type}" for node in inputs)
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
            raise InputError(f"{self.model} must have one input, 4-dimensional and float32, it has {printable(shapes)}")
        batch, *rest = inputs[0].shape
        if any(isinstance(found, int) and found != size for found, size in zip(rest, expected, strict=True)):
            raise InputError(f"{self.path}: size and layout give {expected}, {self.model.name} takes {rest}")
        if isinstance(batch, int) and batch != 1:
            raise InputError(f"{self.model} must take any number of images or one, it takes {batch}")
        return inputs[0].name, batch == 1


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] to [*size, 3]: bilinear, each new pixel averaging all it covers (Pillow's, antialiased)."""
    from PIL import Image

    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _pixels(points: np.ndarray, units: str, size: tuple[int, int]) -> np.ndarray:
    """Landmarks [B, L, 2] in their units to pixels at 256; a pixel's centre is a whole number."""
    sides = np.array([size[1], size[0]], np.float64)  # of x and of y
    if units == "pixels":
        edges = (points + 0.5) / sides
    elif units == "centred":
        edges = ((points + 1) / 2 * (sides - 1) + 0.5) / sides
    else:
        edges = points
    return edges * REFERENCE_SIDE - 0.5


def _digest(model: Path) -> str:
    from dagan_rt.files import open_input

    digest = hashlib.sha256()
    with open_input(model, "extractor's model") as file:
        if model.stat().st_size > LARGEST_MODEL:
            raise InputError(f"{model} has {model.stat().st_size:,} bytes, at most {LARGEST_MODEL:,} are allowed")
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
