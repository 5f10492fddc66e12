"""The benchmark of kernels: every operation by us and by its peers, checked, then timed, beside measured ceilings."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

from dagan_rt.benchmarking import peers
from dagan_rt.benchmarking.devices import Call, Device
from dagan_rt.benchmarking.operations import OPERATIONS, SIZE, Draw, bind, exactly, ours
from dagan_rt.benchmarking.provenance import clocks, provenance
from dagan_rt.benchmarking.rows import ALONE, CALL, OURS, Results, Row
from dagan_rt.benchmarking.suites import Case, Effort, Shapes, Suite

Keep = Callable[[Results], None]

TWIN = 20.0  # times the tolerance: the PyTorch twins compute in the dtype of their inputs, coordinates too
TRIGGERED = re.compile(r"\(Triggered internally at .*?\)")  # where in PyTorch a warning comes from


class DeviceLost(Exception):
    """The device does not answer any more: no later row of this process can be measured."""


class WrongResult(Exception):
    """A form computed something else."""

    def __init__(self, error: float, reason: str) -> None:
        super().__init__(reason)
        self.error = error


def run(suite: Suite, device: Device, commit: str = "", keep: Keep = lambda results: None) -> Results:
    """Measure a suite; `keep` is given what is known so far, now and then.

    What takes a compiler comes last: it takes most of the time, and is what is left out where time is short.
    """
    from tqdm import tqdm

    deadline = time.monotonic() + suite.effort.seconds
    origin = provenance(device.name, suite.digest, commit)
    with device.active():
        ceilings = measure_ceilings(device, suite.effort)
    origin |= {"clocks after the ceilings": clocks(device.name)}
    plan = [
        (case, kept)
        for compiling in (False, True)
        for case, forms in suite.cases().items()
        if (kept := tuple(form for form in forms if peers.needs_compiler(form) == compiling))
    ]
    rows: list[Row] = []
    lost = ""
    for at, (case, forms) in enumerate(bar := tqdm(plan, unit="case", disable=None)):
        bar.set_description(str(case))
        if lost or time.monotonic() > deadline:
            rows += [_unmeasured(case, form, "skipped", lost or _no_time(suite.effort)) for form in forms]
            continue
        try:
            with device.active():
                for row in measure_case(case, forms, suite, device, deadline):
                    rows.append(limited(row, case, suite.shapes, ceilings))
            device.tidy()
        except DeviceLost as error:
            lost = f"the device was lost: {error}"
            rows += [_unmeasured(case, form, "skipped", lost) for form in forms if rows[-1].form != form]
        if at + 1 < len(plan) and plan[at + 1][0].op != case.op:
            keep(Results("kernels", origin, ceilings, tuple(rows)))
    results = Results("kernels", origin | {"clocks at the end": clocks(device.name)}, ceilings, tuple(rows))
    keep(results)
    return results


def measure_case(case: Case, forms: Sequence[str], suite: Suite, device: Device, deadline: float) -> Iterator[Row]:
    """A row for each form. The inputs are the same for all, and lie in as many places as it takes to miss the cache."""
    operation = OPERATIONS[case.op]
    try:
        inputs = operation.draw(Draw(case, suite.shapes, device.place))
        expected = exactly(operation, inputs)
        sets = [inputs]
        for _ in range(1, device.sets(operation.bytes(case.batch, suite.shapes, SIZE[case.dtype]))):
            sets.append(tuple(value.clone() for value in inputs))
        device.wait()
    except Exception as error:
        reason = f"inputs and reference: {_said(error)}"
        yield from (_unmeasured(case, form, "refused", reason) for form in forms)
        return
    for form in forms:
        if time.monotonic() > deadline:
            yield _unmeasured(case, form, "skipped", _no_time(suite.effort))
            continue
        yield measure_form(case, form, sets, expected, suite.effort, device)
        try:
            device.wait()
        except Exception as error:
            raise DeviceLost(f"{case}, {form}: {_said(error)}"[:400]) from error


def measure_form(
    case: Case,
    form: str,
    sets: Sequence[tuple[Any, ...]],
    expected: tuple[Any, ...],
    effort: Effort,
    device: Device,
) -> Row:
    """Check, then time one form of a case on sets of the same inputs."""
    import torch

    operation, dtype = OPERATIONS[case.op], getattr(torch, case.dtype)
    looser = TWIN if form == OURS and device.reference else peers.LOOSER.get(form, 1.0)
    tolerance = operation.tolerance[case.dtype] * looser
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")  # PyTorch says in warnings why a backend does not run
        try:
            if form == OURS:
                function = ours(operation, case, device.reference)
            else:
                function = peers.form(operation.forward, form, dtype, case.layout)
            calls = [bind(operation, function, inputs) for inputs in sets]
            poison(expected, dtype)
            error = checked(calls[0](), expected, tolerance)
            measured = device.measure(calls, effort)
            error = max(error, checked(measured.outputs, expected, tolerance))
        except WrongResult as wrong:
            stated = wrong.error if isfinite(wrong.error) else None
            return replace(_unmeasured(case, form, "wrong", str(wrong)), error=stated, tolerance=tolerance)
        except Exception as error:
            return _unmeasured(case, form, "refused", _said(error, [str(entry.message) for entry in warned]))
    return Row(
        case.op, case.circumstances(), form, "measured", error=error, tolerance=tolerance, times=measured.times,
        method=measured.method,
    )  # fmt: skip


def checked(outputs: tuple[Any, ...], expected: tuple[Any, ...], tolerance: float) -> float:
    """The largest ‖output - expected‖ / ‖expected‖; WrongResult where it is beyond the tolerance or not a number."""
    if len(outputs) != len(expected):
        raise WrongResult(float("inf"), f"{len(outputs)} outputs, expected {len(expected)}")
    worst = 0.0
    for at, (output, right) in enumerate(zip(outputs, expected, strict=True)):
        if tuple(output.shape) != tuple(right.shape):
            raise WrongResult(float("inf"), f"output {at} is {tuple(output.shape)}, expected {tuple(right.shape)}")
        error = float((output.detach().double() - right).norm() / right.norm())
        if not error <= tolerance:  # NaN is not
            stated = error if error == error else float("inf")
            raise WrongResult(stated, f"output {at} is off by {error:.2e} of its norm, allowed is {tolerance:.0e}")
        worst = max(worst, error)
    return worst


def poison(expected: tuple[Any, ...], dtype: Any) -> None:
    """Fill memory with NaN and free it, for the next outputs to lie in: what they leave unwritten is then seen."""
    import torch

    blocks = [torch.full(right.shape, float("nan"), dtype=kind, device=right.device)
              for right in expected for kind in (dtype, torch.float32)]  # fmt: skip
    blocks += [torch.full(right.shape, 0xA5, dtype=torch.uint8, device=right.device) for right in expected]
    del blocks


def measure_ceilings(device: Device, effort: Effort, copied: int = 1 << 30, side: int = 8192) -> dict[str, float]:
    """What the device can do at best: GB/s of a copy, read and written; TFLOP/s of matrix products; µs of a launch."""
    import torch

    if device.reference:
        copied, side = 1 << 22, 256
    ceilings = {}
    source = torch.randint(0, 1 << 30, (copied // 4,), dtype=torch.int32, device=device.place)
    target = torch.empty_like(source)
    # A copy inside a CUDA graph is slower than a kernel that reads and writes as much: the faster is the ceiling.
    ways: tuple[Call, ...] = (lambda: (target.copy_(source),), lambda: (torch.neg(source, out=target),))
    ceilings["copy"] = 2 * copied / min(device.measure([way], effort).p50 for way in ways) / 1e3
    for name in SIZE:
        a, b = (torch.randn(side, side, device=device.place).to(getattr(torch, name)) for _ in range(2))
        product = torch.empty_like(a)
        ceilings[name] = 2 * side**3 / device.measure([partial(_product, a, b, product)], effort).p50 / 1e6
    one = torch.ones(1, device=device.place)
    launch = device.measure([lambda: (one.add_(1),)], effort).times
    ceilings["launch in a graph"] = launch[CALL].p50
    ceilings["launch alone"] = launch.get(ALONE, launch[CALL]).p50
    return ceilings


def _product(a: Any, b: Any, out: Any) -> tuple[Any, ...]:
    import torch

    return (torch.mm(a, b, out=out),)


def limited(row: Row, case: Case, shapes: Shapes, ceilings: dict[str, float]) -> Row:
    """With what it must do, and the time that the ceiling allows which binds: the copy, or the matrix product.

    What is no matrix product is arithmetic of float32, whatever it reads and writes.
    """
    operation = OPERATIONS[case.op]
    size = operation.bytes(case.batch, shapes, SIZE[case.dtype])
    flops = operation.flops(case.batch, shapes)
    rate = case.dtype if operation.matrix else "float32"
    moving, computing = size / ceilings["copy"] / 1e3, flops / ceilings[rate] / 1e6
    ceiling = "copy" if moving >= computing else f"{rate} product"
    return replace(row, bytes=int(size), flops=int(flops), floor=max(moving, computing), ceiling=ceiling)


def _unmeasured(case: Case, form: str, status: str, reason: str) -> Row:
    return Row(case.op, case.circumstances(), form, status, reason)


def _no_time(effort: Effort) -> str:
    return f"the {effort.seconds:.0f} s of the suite were over"


def _said(error: Exception, warned: Sequence[str] = ()) -> str:
    """An exception and the warnings before it as one short line."""
    lines = [f"{type(error).__name__}: {error}", *dict.fromkeys(warned)]
    return " | ".join(" ".join(TRIGGERED.sub("", line).split())[:300] for line in lines)[:800]
