"""Is the export the network? Each graph, and the whole reenactment, against PyTorch in float32."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dagan_rt.backends import Backend, missing, open_backend
from dagan_rt.bundle import BatchProfile, Bundle
from dagan_rt.engines import EngineSet
from dagan_rt.errors import InputError
from dagan_rt.export.plan import Plan
from dagan_rt.export.recording import session
from dagan_rt.export.subnetworks import Subnetwork, Tolerance
from dagan_rt.export.tensorrt import Summary
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.reenactor import Reenactor
from dagan_rt.report import EngineReport, GraphReport, Measured, Report
from dagan_rt.transfer import movement_scale, transfer

if TYPE_CHECKING:
    from dagan_rt.networks.model import Model

Built = Sequence[tuple[EngineSet, Mapping[str, Summary]]]

ROUNDED = "fp16 rounding"  # a GPU's arithmetic on the CPU, in the report's column of backends
FRAMES = 4  # a source and three driving frames
#: Half a level is the runtime's rounding to 8 bits, which alone leaves 59 dB; nowhere may another whole one join.
EXACT_FRAMES = Tolerance(1.5 / 255, 55.0)


class ExportError(InputError):
    """The exported graphs do not compute what PyTorch computes."""


def compare(result: np.ndarray, reference: np.ndarray, allowed: Tolerance, unit: float | None = None) -> Measured:
    """Errors of `result` against `reference`; `allowed.max_abs` is in units of the reference's largest magnitude.

    That magnitude counts only where it exceeds 1, and `unit` replaces it, in the PSNR too: 1 for images in [0, 1].
    """
    peak = float(np.abs(reference).max())
    difference = np.abs(result.astype(np.float64) - reference)
    mean_square = float((difference**2).mean())
    tolerance = allowed.max_abs * (max(1.0, peak) if unit is None else unit)
    if not math.isfinite(peak + mean_square):
        return Measured(math.nan, math.nan, math.nan, allowed.max_abs, allowed.psnr)
    psnr = 10 * math.log10(max(unit or peak, 1e-12) ** 2 / mean_square) if mean_square > 0 else 200.0
    return Measured(float(difference.max()), float(difference.mean()), min(psnr, 200.0), tolerance, allowed.psnr)


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

    def batch(self, size: int) -> Recorded:
        """The same for another batch: the first faces, or the two over and over."""
        rows = np.arange(size) % 2
        return Recorded(*({name: x[rows] for name, x in side.items()} for side in (self.inputs, self.outputs)))


def record(model: Model, declared: Sequence[Subnetwork], frames: np.ndarray) -> dict[str, Recorded]:
    """What every declared subnetwork takes and gives in two sessions at once, on `frames` uint8 [4, size, size, 3]."""
    import torch

    *_, inputs = session(model, declared, frames[:2], [frames[1:3], frames[2:4]], scale=1.2)
    recorded = {}
    with torch.inference_mode():
        for subnetwork in declared:
            given = inputs[subnetwork.name]
            outputs = subnetwork.run(model, {name: torch.from_numpy(values) for name, values in given.items()})
            recorded[subnetwork.name] = Recorded(given, {name: values.numpy() for name, values in outputs.items()})
    return recorded


def verify_graph(
    subnetwork: Subnetwork, backend: Backend, recorded: Recorded, precision: str, batch: BatchProfile
) -> dict[str, Measured]:
    """Errors of one graph on one backend by output: the worse of its smallest batch and of one larger, where it may."""
    worst: dict[str, Measured] = {}
    for size in sorted({batch.least, min(batch.most, batch.least + 1)}):
        expected = recorded.batch(size)
        found = backend.run(
            subnetwork.name, {name: backend.from_numpy(value) for name, value in expected.inputs.items()}
        )
        for name, reference in expected.outputs.items():
            result = backend.to_numpy(found[name])
            if result.shape != reference.shape:
                raise ExportError(f"graph {subnetwork.name}: {name} must be {reference.shape}, got {result.shape}")
            _keep_worse(worst, name, compare(result, reference, subnetwork.tolerance(precision)))
    return worst


class References:
    """What an export is measured against, computed in PyTorch once."""

    def __init__(self, model: Model, declared: Sequence[Subnetwork], plan: Plan, images: Sequence[Path] = ()) -> None:
        """`images`: faces to compare on; a talking head is drawn where none are given."""
        import torch

        frames = verification_frames(model.config, images)
        self.what = f"PyTorch {torch.__version__} in float32"
        self.frames = ", ".join(file.name for file in images) or f"{FRAMES} frames of a drawn talking head"
        self.plan, self.declared = plan, declared
        self.recorded = record(model, declared, frames)
        # A bundle of single parts, or of graphs for several faces at once, has nothing that reenacts.
        self.sessions = Sessions(model, frames) if not plan.only and plan.profile.least == 1 else None

    def whole_tolerance(self, precisions: Iterable[str]) -> Tolerance:
        """What reenacted frames must keep: `EXACT_FRAMES` in fp32, the plan's budget below."""
        return EXACT_FRAMES if set(precisions) == {"fp32"} else Tolerance(1.0, self.plan.least_psnr)

    def measure(self, bundle: Bundle, built: Built = (), notes: tuple[str, ...] = ()) -> Report:
        """Errors of every graph and of whole sessions: on ONNX Runtime, PyTorch, and the engines that run here.

        `built`: engines. The bundle's manifest must hold the hashes of its files where there are any.
        """
        import onnx

        from dagan_rt.export.counts import multiply_accumulates, operations

        engines = {it.key: engine_report(it, its, missing(it.flavour, bundle) or "") for it, its in built}
        names = ["onnxruntime", *(engine.flavour for engine in engines.values() if not engine.not_run)]
        backends = [open_backend(name, bundle) for name in names]
        if any(graph.precision == "fp16" for graph in bundle.graphs.values()):
            backends.append(_as_rounded(bundle))
        graphs = {}
        for subnetwork in self.declared:
            graph, recorded = bundle.graphs[subnetwork.name], self.recorded[subnetwork.name]
            errors = {
                backend.name: verify_graph(subnetwork, backend, recorded, graph.precision, self.plan.profile)
                for backend in backends
            }
            proto, size = onnx.load(graph.file), graph.file.stat().st_size
            graphs[graph.name] = GraphReport(
                graph.precision, size, operations(proto), multiply_accumulates(proto), errors
            )
        reenactment = {}
        if self.sessions is not None:
            allowed = self.whole_tolerance(graph.precision for graph in bundle.graphs.values())
            reenactment = {backend.name: self.sessions.measure(bundle, backend, allowed) for backend in backends}
            if bundle.weights is not None:
                reenactment["torch"] = self.sessions.measure(bundle, open_backend("torch", bundle), EXACT_FRAMES)
        return Report(self.what, self.frames, graphs, reenactment, engines, notes)


def _as_rounded(bundle: Bundle) -> Backend:
    """ONNX Runtime on graphs that round as float16 does, which it would compute in float32 on a CPU."""
    import onnx

    from dagan_rt.export.precision import rounding_twin

    with tempfile.TemporaryDirectory() as folder:
        graphs = {}
        for name, graph in bundle.graphs.items():
            graphs[name] = replace(graph, file=Path(folder) / graph.file.name)
            onnx.save_model(rounding_twin(onnx.load(graph.file)), graphs[name].file)
        backend = open_backend("onnxruntime", replace(bundle, graphs=graphs))
    backend.name = ROUNDED
    return backend


def engine_report(engines: EngineSet, summaries: Mapping[str, Summary], not_run: str = "") -> EngineReport:
    """What verify.json says of engines; `not_run` is why nothing was measured on them."""
    return EngineReport(
        engines.flavour,
        engines.seconds,
        {name: it.bytes for name, it in engines.graphs.items()},
        {name: it.layers for name, it in engines.graphs.items()},
        {name: tuple(layer[:200] for layer in it.fused) for name, it in summaries.items() if it.fused is not None},
        not_run,
    )


def require_passed(report: Report) -> None:
    """Raise ExportError naming the first output that is not within its tolerance."""
    for failure in report.failures():
        raise ExportError(f"the export is not the network: {failure}; nothing was written")


class Sessions:
    """Whole sessions on some frames, once in PyTorch: what the runtime's frames are measured against.

    The reference is the undivided network on key points transferred in NumPy: nothing in it knows of the graphs.
    """

    def __init__(self, model: Model, frames: np.ndarray) -> None:
        """`frames` uint8 [N, size, size, 3]: a source, then what drives it, the initial frame first."""
        self._frames = frames
        self._expected = {
            (motion, adapt_scale): np.stack(_reference(model, frames, motion, adapt_scale))
            for motion, adapt_scale in (("absolute", False), ("relative", True))
        }

    def measure(self, bundle: Bundle, backend: Backend, allowed: Tolerance) -> Measured:
        """Errors of the runtime's frames, in [0, 1]: the worse of absolute and adapted relative motion."""
        worst: dict[str, Measured] = {}
        for (motion, adapt_scale), expected in self._expected.items():
            reenactor = Reenactor(bundle, backend, motion, adapt_scale)
            reenactor.set_source(self._frames[0])
            driven = np.stack([reenactor.drive(frame) for frame in self._frames[1:]]).astype(np.float32) / 255
            _keep_worse(worst, "frames", compare(driven, expected, allowed, unit=1.0))
        return worst["frames"]


def _keep_worse(worst: dict[str, Measured], name: str, measured: Measured) -> None:
    """The worse of each number; NumPy's maximum and minimum keep NaN."""
    before = worst.setdefault(name, measured)
    worst[name] = replace(
        before,
        max_abs=float(np.maximum(before.max_abs, measured.max_abs)),
        mean_abs=float(np.maximum(before.mean_abs, measured.mean_abs)),
        psnr=float(np.minimum(before.psnr, measured.psnr)),
        tolerance=min(before.tolerance, measured.tolerance),
    )


def _reference(model: Model, frames: np.ndarray, motion: str, adapt_scale: bool) -> list[np.ndarray]:
    """The published procedure, frame by frame, HWC in [0, 1]."""
    import torch

    expected = []
    with torch.inference_mode():
        images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        found = [model.find_keypoints(images[i : i + 1]) for i in range(len(images))]
        source, initial, *_ = faces = [KeyPoints(*(x.numpy() for x in face)) for face in found]
        depth = model.depth(images[:1]) if model.depth is not None else None
        for driving in faces[1:]:
            moved = driving
            if motion == "relative":
                moved = transfer(source, driving, initial, movement_scale(source, initial) if adapt_scale else 1.0)
            at, to = (KeyPoints(*map(torch.from_numpy, face)) for face in (source, moved))
            generated = model.generator(images[:1], at, to, depth)
            expected.append(generated.prediction[0].permute(1, 2, 0).numpy())
    return expected
