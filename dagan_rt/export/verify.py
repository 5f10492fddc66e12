"""Is the export the network? Each graph, and the whole reenactment, against PyTorch in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dagan_rt.backends import open_backend
from dagan_rt.backends.onnxruntime import load_session
from dagan_rt.bundle import Bundle
from dagan_rt.errors import InputError
from dagan_rt.export.subnetworks import Subnetwork, subnetworks
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.reenactor import Reenactor
from dagan_rt.transfer import movement_scale, transfer

if TYPE_CHECKING:
    from dagan_rt.networks.model import Model

FRAMES = 4  # a source and three driving frames
IMAGE_TOLERANCE = 1 / 255  # the runtime rounds to 8 bits, which alone is half of it


class ExportError(InputError):
    """The exported graphs do not compute what PyTorch computes."""


@dataclass(frozen=True)
class Measured:
    """How far one output is from PyTorch's; all but `psnr` (in dB) in the output's own units."""

    max_abs: float
    mean_abs: float
    psnr: float  # against the reference's largest magnitude; 200 where nothing differs
    tolerance: float  # what `max_abs` may reach

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.max_abs <= self.tolerance

    def to_dict(self) -> dict[str, float]:
        """Plain finite numbers, for the manifest."""
        return asdict(self)


def compare(result: np.ndarray, reference: np.ndarray, tolerance: float, unit: float | None = None) -> Measured:
    """Errors of `result` against `reference`; the tolerance is in units of the reference's largest magnitude.

    That magnitude counts only where it exceeds 1, and `unit` replaces it.
    """
    peak = float(np.abs(reference).max())
    difference = np.abs(result.astype(np.float64) - reference)
    mean_square = float((difference**2).mean())
    if not math.isfinite(peak + mean_square):
        return Measured(math.nan, math.nan, math.nan, tolerance)
    psnr = 10 * math.log10(max(peak, 1e-12) ** 2 / mean_square) if mean_square > 0 else 200.0
    allowed = tolerance * (max(1.0, peak) if unit is None else unit)
    return Measured(float(difference.max()), float(difference.mean()), min(psnr, 200.0), allowed)


def verification_frames(config: NetworkConfig, files: Sequence[Path] = ()) -> np.ndarray:
    """Faces to compare on, uint8 [4, size, size, 3]: those given (the last repeated), else a drawn talking head."""
    if not files:
        from dagan_rt.training.heads import HELD_OUT, draw_clip

        return draw_clip(HELD_OUT.start, 4 * FRAMES, config.size).frames[::4]
    from dagan_rt.images import center_square, read_image

    images = [center_square(read_image(file), config.size) for file in files[:FRAMES]]
    return np.stack(images + images[-1:] * (FRAMES - len(images)))


@dataclass(frozen=True)
class Recorded:
    """What one subnetwork took and gave in PyTorch during a session, NumPy arrays by name, a batch of two."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def record(model: Model, frames: np.ndarray) -> dict[str, Recorded]:
    """Run two sessions at once in PyTorch on `frames` uint8 [4, size, size, 3], and note every subnetwork's arrays."""
    import torch

    declared = {subnetwork.name: subnetwork for subnetwork in subnetworks(model.config)}
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    arrays: dict[str, Any] = {"source_image": images[:2], "scale": torch.tensor([[1.0], [1.2]])}
    recorded: dict[str, Recorded] = {}

    def run(name: str) -> dict[str, Any]:
        inputs = {tensor.name: arrays[tensor.name] for tensor in declared[name].inputs}
        outputs = declared[name].run(model, inputs)
        recorded[name] = Recorded(*({key: x.numpy() for key, x in side.items()} for side in (inputs, outputs)))
        return outputs

    with torch.inference_mode():
        for graph, role, faces in (
            ("source", "source", images[:2]),
            ("driving", "initial", images[1:3]),
            ("driving", "driving", images[2:4]),
        ):
            arrays["image"] = faces
            found = run(graph)
            arrays |= {f"{role}_{name}": found[name] for name in ("kp_value", "kp_jacobian")}
            if graph == "source":
                arrays |= found
        arrays |= run("motion")
        run("generator")
    return recorded


def verify_graph(subnetwork: Subnetwork, path: Path, recorded: Recorded) -> dict[str, Measured]:
    """Errors of one ONNX file in ONNX Runtime by output: the larger of a batch of one and of two."""
    import torch

    session = load_session(path, torch.get_num_threads())
    worst: dict[str, Measured] = {}
    names = [output.name for output in subnetwork.outputs]
    for batch in (1, 2):
        found = session.run(names, {name: value[:batch] for name, value in recorded.inputs.items()})
        for name, result in zip(names, found, strict=True):
            reference = recorded.outputs[name][:batch]
            if result.shape != reference.shape:
                raise ExportError(f"graph {subnetwork.name}: {name} must be {reference.shape}, got {result.shape}")
            measured = compare(result, reference, subnetwork.tolerance)
            if name not in worst or not measured.max_abs <= worst[name].max_abs:
                worst[name] = measured
    return worst


def verify_reenactment(
    model: Model, bundle: Bundle, frames: np.ndarray, backends: Sequence[str]
) -> dict[str, Measured]:
    """Error of whole sessions through the runtime, in [0, 1], by backend: the worse of absolute and adapted motion.

    The reference is the undivided network on key points transferred in NumPy: nothing in it knows of the graphs.
    """
    import torch

    source, initial, driving = frames[0], frames[1], frames[-1]
    opened = {name: open_backend(name, bundle, torch.get_num_threads()) for name in backends}
    worst: dict[str, Measured] = {}
    for motion, adapt_scale in (("absolute", False), ("relative", True)):
        reference = _reference(model, source, initial, driving, motion, adapt_scale)
        for name, backend in opened.items():
            reenactor = Reenactor(bundle, backend, motion, adapt_scale)
            reenactor.set_source(source)
            if motion == "relative":
                reenactor.drive(initial)
            result = reenactor.drive(driving).astype(np.float32) / 255
            measured = compare(result, reference, IMAGE_TOLERANCE, unit=1.0)
            if name not in worst or not measured.max_abs <= worst[name].max_abs:
                worst[name] = measured
    return worst


def _reference(
    model: Model, source: np.ndarray, initial: np.ndarray, driving: np.ndarray, motion: str, adapt_scale: bool
) -> np.ndarray:
    """The published procedure, HWC in [0, 1]."""
    import torch

    with torch.inference_mode():
        images = torch.from_numpy(np.stack([source, initial, driving])).permute(0, 3, 1, 2).float() / 255
        found = model.find_keypoints(images)
        faces = [KeyPoints(*(x[i : i + 1].numpy() for x in found)) for i in range(3)]
        moved = faces[2]
        if motion == "relative":
            moved = transfer(faces[0], faces[2], faces[1], movement_scale(faces[0], faces[1]) if adapt_scale else 1.0)
        depth = model.depth(images[:1]) if model.depth is not None else None
        at, to = (KeyPoints(*map(torch.from_numpy, face)) for face in (faces[0], moved))
        return model.generator(images[:1], at, to, depth).prediction[0].permute(1, 2, 0).numpy()


def require_passed(errors: dict[str, dict[str, Measured]]) -> None:
    """Raise ExportError naming the first output that is not within its tolerance."""
    for graph, outputs in errors.items():
        for name, measured in outputs.items():
            if not measured.passed:
                raise ExportError(
                    f"the exported {graph} is not the network: {name} differs from PyTorch by {measured.max_abs:.3g}, "
                    f"allowed is {measured.tolerance:.3g}; nothing was written"
                )


def table(errors: dict[str, dict[str, Measured]]) -> str:
    """The errors for a person to read."""
    lines = [f"{'graph':<12} {'output':<14} {'max abs':>9} {'mean abs':>9} {'allowed':>9} {'PSNR dB':>8}"]
    for graph, outputs in errors.items():
        for name, it in outputs.items():
            lines.append(
                f"{graph:<12} {name:<14} {it.max_abs:>9.1e} {it.mean_abs:>9.1e} {it.tolerance:>9.1e} {it.psnr:>8.1f}"
                + ("" if it.passed else "  FAILED")
            )
    return "\n".join(lines)
