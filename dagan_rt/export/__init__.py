"""A checkpoint to a bundle: ONNX graphs that were compared with PyTorch before anybody could see them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagan_rt.bundle import Bundle
    from dagan_rt.export.verify import Measured
    from dagan_rt.networks.model import Model


def export(
    model: Model,
    out: str | Path,
    *,
    opset: int = 17,
    weights: bool = True,
    force: bool = False,
    images: Sequence[Path] = (),
    report: Callable[[str], None] = lambda step: None,
) -> tuple[Bundle, dict[str, dict[str, Measured]]]:
    """Export a model to the bundle `out`, and return it opened, with the errors measured against PyTorch.

    model: on the CPU; it is put in evaluation mode.
    opset: ONNX operator set, 17 to 20.
    weights: also store the checkpoint, which the torch backend needs.
    force: replace an older bundle. images: faces to compare on, instead of a drawn one.
    report: called with the name of each step as it begins.

    Raises InputError if `out` cannot be written, ExportError if a graph differs from PyTorch by more than its
    tolerance; then `out` is as it was before.
    """
    from dagan_rt.bundle import Bundle, staged, write_manifest
    from dagan_rt.export.onnx import check_tools, export_graph
    from dagan_rt.export.subnetworks import subnetworks
    from dagan_rt.export.verify import (
        record,
        require_passed,
        verification_frames,
        verify_graph,
        verify_reenactment,
    )

    check_tools(opset)
    frames = verification_frames(model.config, images)
    declared = subnetworks(model.eval().config)
    errors: dict[str, dict[str, Measured]] = {}
    with staged(out, force=force) as folder:
        recorded = record(model, frames)
        for subnetwork in declared:
            report(subnetwork.name)
            path = folder / f"{subnetwork.name}.onnx"
            export_graph(model, subnetwork, path, opset)
            errors[subnetwork.name] = verify_graph(subnetwork, path, recorded.pop(subnetwork.name))
            require_passed(errors)
        report("weights")
        if weights:
            _write_weights(model, folder)
        report("reenactment")
        manifest: dict[str, Any] = {
            "variant": model.config.variant,
            "config": model.config.to_dict(),
            "opset": opset,
            "tools": _tools(),
            "graphs": {
                subnetwork.name: {
                    "file": f"{subnetwork.name}.onnx",
                    "runs": subnetwork.runs,
                    "inputs": [tensor.to_dict() for tensor in subnetwork.inputs],
                    "outputs": [tensor.to_dict() for tensor in subnetwork.outputs],
                }
                for subnetwork in declared
            },
        }
        write_manifest(folder, manifest | {"errors": _plain(errors)})
        opened = Bundle.open(folder)
        backends = ["onnxruntime", "torch"] if weights else ["onnxruntime"]
        errors["reenactment"] = verify_reenactment(model, opened, frames, backends)
        require_passed(errors)
        write_manifest(folder, manifest | {"errors": _plain(errors)})
    return Bundle.open(out), errors


def _write_weights(model: Model, folder: Path) -> None:
    from dagan_rt import checkpoints
    from dagan_rt.bundle import DEPTH_WEIGHTS, WEIGHTS

    checkpoints.save(folder / WEIGHTS, model, depth_dir=folder / DEPTH_WEIGHTS if model.depth is not None else None)


def _plain(errors: dict[str, dict[str, Measured]]) -> dict[str, dict[str, dict[str, float]]]:
    return {graph: {name: it.to_dict() for name, it in outputs.items()} for graph, outputs in errors.items()}


def _tools() -> dict[str, str]:
    import dagan_rt

    packages = ("numpy", "torch", "onnx", "onnxsim", "onnxruntime")
    versions = {package: metadata.version(package) for package in packages}
    return {"dagan-rt": dagan_rt.__version__, "python": platform.python_version(), **versions}
