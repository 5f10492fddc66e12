"""The graphs of a bundle: traced once, lowered to each precision in question, for "auto" chosen by measuring."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt.bundle import PRECISIONS
from dagan_rt.export.plan import Plan

if TYPE_CHECKING:
    from dagan_rt.backends import Backend
    from dagan_rt.bundle import Bundle
    from dagan_rt.export.subnetworks import Subnetwork
    from dagan_rt.export.verify import References
    from dagan_rt.networks.model import Model

TIMED_RUNS = 5
#: The graphs in which benchmarks/graph_passes.py saw the rewrites pay, on CPUs.
REWRITTEN = ("motion", "generator", "attention", "decoder")


def candidates(plan: Plan) -> tuple[str, ...]:
    """The precisions each graph is made in: the plan's, or all that "auto" chooses from."""
    if plan.precision != "auto":
        return (plan.precision,)
    return PRECISIONS if plan.calibrate else ("fp32", "fp16")


def write_graphs(
    model: Model, declared: Sequence[Subnetwork], plan: Plan, folder: Path, report: Callable[[str], None]
) -> None:
    """Write every graph in every candidate precision to `folder`, under the names of `file_name`."""
    from dagan_rt.export import attention, calibration, onnx, passes, precision, winograd

    samples: dict[str, list[calibration.Arrays]] = {}
    if plan.calibrate:
        report("calibration")
        samples = calibration.record(model, declared, plan.calibrate)
    for subnetwork in declared:
        report(subnetwork.name)
        traced = onnx.trace(model, subnetwork, plan.profile, plan.opset)
        for candidate in candidates(plan):
            graph = type(traced)()
            graph.CopyFrom(traced)
            rewritten = subnetwork.name in REWRITTEN and plan.rewritten_for_cpus
            if rewritten and (candidate == "fp32" or (candidate == "int8" and plan.rewrites == "openvino")):
                passes.transpose_upsampling(graph)  # ONNX Runtime has no int8 ConvTranspose
            if rewritten and candidate == "fp32":
                winograd.filter_minimally(graph)
            graph = precision.lower(graph, candidate, subnetwork.trunks, samples.get(subnetwork.name))
            if candidate != "fp16" and rewritten:
                passes.block_narrow_convolutions(graph)
                attention.block_attention(graph, int8=candidate == "int8")
            onnx.save(graph, folder / file_name(subnetwork.name, candidate))


def file_name(graph: str, precision: str) -> str:
    """A candidate's file in the unfinished bundle."""
    return f"{graph}.{precision}.onnx"


def keep(folder: Path, precisions: Mapping[str, str], plan: Plan) -> None:
    """Give the chosen candidate of each graph its final name, and delete the others."""
    for graph, chosen in precisions.items():
        (folder / file_name(graph, chosen)).rename(folder / f"{graph}.onnx")
        for other in candidates(plan):
            (folder / file_name(graph, other)).unlink(missing_ok=True)


def choose_precisions(
    plan: Plan,
    declared: Sequence[Subnetwork],
    references: References,
    bundle: Callable[[Mapping[str, str]], Bundle],
    report: Callable[[str], None],
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The precision of each graph, and for "auto" why: the fastest here that keeps the plan's budget.

    `bundle` gives the unfinished bundle with each graph in the precision it is told.
    """
    names = [subnetwork.name for subnetwork in declared]
    if plan.precision != "auto":
        return dict.fromkeys(names, plan.precision), ()
    from dagan_rt.backends import open_backend
    from dagan_rt.export.auto import choose

    report("precisions")
    assert references.sessions is not None  # a plan for "auto" has them
    sessions = references.sessions
    whole = bundle(dict.fromkeys(names, "fp32"))
    opened = {it: open_backend("onnxruntime", bundle(dict.fromkeys(names, it))) for it in candidates(plan)}
    seconds = {
        name: {it: _seconds(backend, name, references.recorded[name].batch(1).inputs) for it, backend in opened.items()}
        for name in names
    }

    def psnr(precisions: Mapping[str, str]) -> float:
        mixed = _Mixed({name: opened[it] for name, it in precisions.items()})
        return sessions.measure(whole, mixed, references.whole_tolerance(precisions.values())).psnr

    choice = choose(names, seconds, psnr, plan.least_psnr)
    return dict(choice.precisions), tuple(choice.reasons)


def _seconds(backend: Backend, graph: str, inputs: Mapping[str, Any]) -> float:
    """Median time of one run."""
    times = []
    for _ in range(TIMED_RUNS + 1):  # the first warms up
        begun = time.perf_counter()
        backend.run(graph, inputs)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


class _Mixed:
    """One backend made of several, each for its graphs; they share their kind of array."""

    name = "onnxruntime"

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return self._backends[graph].run(graph, inputs)

    def __getattr__(self, name: str) -> Any:  # the conversions, which are the same for all
        return getattr(next(iter(self._backends.values())), name)
