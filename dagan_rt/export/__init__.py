"""A checkpoint to a bundle: graphs that were compared with PyTorch before anybody could see them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt.errors import InputError
from dagan_rt.export.plan import Plan

if TYPE_CHECKING:
    from dagan_rt.bundle import Bundle
    from dagan_rt.networks.config import NetworkConfig
    from dagan_rt.networks.model import Model
    from dagan_rt.report import Report


def export(
    model: Model,
    out: str | Path,
    plan: Plan | None = None,
    *,
    force: bool = False,
    images: Sequence[Path] = (),
    report: Callable[[str], None] = lambda step: None,
) -> tuple[Bundle, Report]:
    """Export a model to the bundle `out`, and return it opened, with what was measured against PyTorch.

    model: on the CPU; it is put in evaluation mode.
    plan: precision, batch, targets and so on; the default is fp32 for ONNX Runtime.
    force: replace an older bundle. images: faces to compare on, instead of a drawn one.
    report: called with the name of each step as it begins.

    Raises InputError if `out` cannot be written or a target cannot be built here, ExportError if a graph differs from
    PyTorch by more than its tolerance; then `out` is as it was before.
    """
    from dagan_rt.bundle import Bundle, file_names, write_manifest
    from dagan_rt.export import calibration
    from dagan_rt.export.graphs import choose_precisions, file_name, keep, write_graphs
    from dagan_rt.export.rebuild import build_engines
    from dagan_rt.export.subnetworks import choose
    from dagan_rt.export.verify import References, require_passed
    from dagan_rt.staging import staged

    plan = plan or Plan()
    check(plan)
    declared = choose(model.eval().config, plan.only)
    with staged(out, force=force) as folder:
        report("references")
        references = References(model, declared, plan, images)
        write_graphs(model, declared, plan, folder, report)
        if plan.torch_weights:
            report("weights")
            _write_weights(model, folder)

        def manifest(precisions: Mapping[str, str]) -> dict[str, Any]:
            return {
                "variant": model.config.variant,
                "config": model.config.to_dict(),
                "batch": plan.batch,
                "plan": plan.to_dict(),
                "tools": _tools(),
                "graphs": {it.name: it.to_dict() | {"precision": precisions[it.name]} for it in declared},
            }

        def candidate(precisions: Mapping[str, str]) -> Bundle:
            described = manifest(precisions)
            for graph, precision in precisions.items():
                described["graphs"][graph]["file"] = file_name(graph, precision)
            return Bundle.described(folder, described | {"files": dict.fromkeys(file_names(folder))})

        precisions, notes = choose_precisions(plan, declared, references, candidate, report)
        keep(folder, precisions, plan)
        built = build_engines(folder, plan, manifest(precisions), report)
        report("errors")
        unmeasured = write_manifest(folder, manifest(precisions))
        if plan.calibrate == calibration.HEADS:
            notes = (*notes, calibration.ON_HEADS)
        measured = references.measure(Bundle.described(folder, unmeasured), built, notes)
        require_passed(measured)
        measured.write(folder)
        whole = write_manifest(folder, manifest(precisions), unchanged=unmeasured["files"])
    return Bundle.described(Path(out), whole), measured


def check(plan: Plan) -> None:
    """Raise InputError if this machine, or any, cannot export by `plan`: asked before long work begins."""
    from dagan_rt.export import calibration, tensorrt
    from dagan_rt.export.onnx import check_tools

    check_tools()
    if plan.precision == "auto" and (plan.only or plan.profile.least > 1 or plan.flavours):
        target = f"the target {plan.flavours[0]}" if plan.flavours else f"a batch of {plan.batch}"
        what = "--only" if plan.only else target
        raise InputError(f"auto measures whole reenactments in ONNX Runtime: name a precision for {what}")
    for flavour in plan.flavours:
        tensorrt.check(flavour, plan.compute_capabilities, plan.strip_weights, plan.plugins)
    if plan.calibrate and plan.calibrate != calibration.HEADS:
        calibration.find_clips(Path(plan.calibrate))


def steps(config: NetworkConfig, plan: Plan) -> int:
    """How often `export` reports, for a progress bar."""
    from dagan_rt.export.subnetworks import choose

    graphs = len(choose(config, plan.only)) * (1 + len(plan.flavours))
    return 2 + graphs + bool(plan.calibrate) + plan.torch_weights + (plan.precision == "auto")


def _write_weights(model: Model, folder: Path) -> None:
    from dagan_rt import checkpoints
    from dagan_rt.bundle import DEPTH_WEIGHTS, WEIGHTS

    checkpoints.save(folder / WEIGHTS, model, depth_dir=folder / DEPTH_WEIGHTS if model.depth is not None else None)


def _tools() -> dict[str, str]:
    import dagan_rt

    packages = ("numpy", "torch", "onnx", "onnxsim", "onnxruntime")
    versions = {package: metadata.version(package) for package in packages}
    return {"dagan-rt": dagan_rt.__version__, "python": platform.python_version(), **versions}
