"""Engines into a bundle: while it is exported, or later, on the machine that will run them, from its graphs alone."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dagan_rt.bundle import MANIFEST, Bundle, file_names, write_manifest
from dagan_rt.engines import FOLDER, engine_sets
from dagan_rt.errors import InputError
from dagan_rt.export import tensorrt
from dagan_rt.export.plan import Plan
from dagan_rt.export.verify import Built, References, engine_report, require_passed
from dagan_rt.report import REPORT, Report
from dagan_rt.staging import share, staged
from dagan_rt.tables import fill

Step = Callable[[str], None]


REWRITTEN = (
    "the engines were built from graphs that were rewritten for CPUs and may be slower than need be: "
    "export with --rewrites none, or name the engines' --target at export"
)


def build_engines(folder: Path, plan: Plan, manifest: Mapping[str, Any], report: Step) -> Built:
    """The engines of every flavour in the plan, built into an unfinished bundle; raises InputError if one cannot be."""
    bundle = Bundle.described(folder, {**manifest, "files": dict.fromkeys(file_names(folder))})
    built = []
    for flavour in plan.flavours:

        def building(graph: str, flavour: str = flavour) -> None:
            report(f"{flavour} {graph}")

        engines, summaries = tensorrt.build_engines(
            folder,
            flavour,
            tensorrt.graphs_of(bundle),
            batch=bundle.batch,
            precisions={name: graph.precision for name, graph in bundle.graphs.items()},
            recipe_hash=plan.digest,
            compute_capabilities=plan.compute_capabilities,
            stripped=plan.strip_weights,
            plugins=plan.plugins,
            report=building,
        )
        built.append((engines, summaries))
    return built


def rebuild(
    path: str | Path,
    targets: tuple[str, ...] = (),
    compute_capabilities: tuple[str, ...] = (),
    plugins: str = "",
    report: Step = lambda step: None,
) -> tuple[Bundle, Report]:
    """Build engines afresh into the bundle at `path`, from its graphs; it stays as it is until all are there.

    targets: kinds of engines; empty takes those it has. compute_capabilities: as "8.9"; empty takes the flavour's
    choice. plugins: a kind of `dagan_rt.plugins`; empty takes that of the engines it has, or of its plan. Engines of
    the same flavour for the same GPUs are replaced, others kept. Where the bundle holds its weights and PyTorch is
    installed, everything is measured again. Raises InputError if an engine cannot be built.
    """
    bundle = Bundle.open(path)
    exported = plan = exported_plan(bundle)
    targets = targets or tuple(dict.fromkeys(engines.flavour for engines in engine_sets(bundle)))
    plugins = plugins or next((engines.plugins for engines in engine_sets(bundle) if engines.plugins), plan.plugins)
    plan = replace(plan, targets=targets, compute_capabilities=compute_capabilities, plugins=plugins)
    if not plan.flavours:
        raise InputError(f"bundle {bundle.path} holds no engines to rebuild: name a kind with --target")
    with staged(bundle.path, force=True) as folder:
        for name in bundle.manifest["files"]:
            share(bundle.path / name, folder / name)
        built = build_engines(folder, plan, bundle.manifest, report)
        replaced = {(new.flavour, new.compute_capabilities) for new, _ in built}
        keys = {new.key for new, _ in built}
        for older in engine_sets(bundle):
            if older.key not in keys and (older.flavour, older.compute_capabilities) in replaced:
                shutil.rmtree(folder / FOLDER / older.key)
        report("errors")
        same = {name: entry for name, entry in bundle.manifest["files"].items() if not name.startswith(f"{FOLDER}/")}
        unmeasured = write_manifest(folder, bundle.manifest, unchanged=same)
        measured = _measured(Bundle.described(folder, unmeasured), plan, built, exported.rewritten_for_cpus)
        (folder / REPORT).unlink(missing_ok=True)  # it is still the older bundle's file
        measured.write(folder)
        same = {name: entry for name, entry in unmeasured["files"].items() if name != REPORT}
        manifest = write_manifest(folder, bundle.manifest, unchanged=same)
    return Bundle.described(bundle.path, manifest), measured


def exported_plan(bundle: Bundle) -> Plan:
    """The plan a bundle was exported by."""
    plan: Plan = fill(Plan, bundle.manifest.get("plan") or {}, str(bundle.path / MANIFEST))
    return plan


def _measured(bundle: Bundle, plan: Plan, built: Built, rewritten: bool) -> Report:
    """The report with the new engines: measured against PyTorch where that can be, else the older one beside them."""
    kept = {it.key: bundle.report.engines[it.key] for it in engine_sets(bundle) if it.key in bundle.report.engines}
    if bundle.weights is None or importlib.util.find_spec("torch") is None:
        why = "there are no weights to compare with" if bundle.weights is None else "PyTorch is not installed"
        return replace(bundle.report, engines=kept | {it.key: engine_report(it, its, why) for it, its in built})
    from dagan_rt import checkpoints
    from dagan_rt.export.subnetworks import choose

    model = checkpoints.load(bundle.weights, bundle.depth_weights)
    references = References(model.eval(), choose(model.config, plan.only), plan)
    notes = bundle.report.notes
    if rewritten and REWRITTEN not in notes:
        notes = (*notes, REWRITTEN)
    measured = references.measure(bundle, built, notes)
    require_passed(measured)
    return replace(measured, engines=kept | measured.engines)
