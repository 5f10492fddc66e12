"""The benchmark of a frame's stages: device time of each beside what it must do at least, the largest gap first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from dagan_rt.benchmarking.devices import Device
from dagan_rt.benchmarking.floors import Cost, cost_of, stage_costs
from dagan_rt.benchmarking.frames import PARTS, Bench, Keep, Way, check, in_time, opened, said, tidy, ways
from dagan_rt.benchmarking.kernels import measure_ceilings
from dagan_rt.benchmarking.provenance import clocks, provenance
from dagan_rt.benchmarking.rows import CALL, OURS, Results, Row, Timing
from dagan_rt.benchmarking.suites import Effort, Form, FrameSuite

SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # bytes of a number
WHOLE = "whole frame"


def run(
    suite: FrameSuite, bench: Bench, device: Device, commit: str = "", keep: Keep = lambda results: None
) -> Results:
    """Measure the stages of every backend of ours."""
    effort = Effort(suite.effort.seconds, row_seconds=0.05)
    origin = provenance(device.name, suite.digest, commit)
    with device.active():
        ceilings = measure_ceilings(device, effort)
    origin |= {"clocks after the ceilings": clocks(device.name)}
    rows: list[Row] = []
    for way in ways(Form(OURS, suite.stages), bench):
        for batch in suite.stages:
            rows += sorted(measure(way, batch, bench, device, ceilings, effort), key=lambda row: -(row.gap or 0.0))
            keep(Results("subnetworks", origin, ceilings, tuple(rows)))
            tidy(bench.place)
    results = Results("subnetworks", origin | {"clocks at the end": clocks(device.name)}, ceilings, tuple(rows))
    keep(results)
    return results


def measure(
    way: Way, batch: int, bench: Bench, device: Device, ceilings: Mapping[str, float], effort: Effort
) -> Iterator[Row]:
    """A row for each stage, and one for the whole frame, whose time is that of the device alone."""

    def row(stage: str, **more: Any) -> Row:
        made = bench.row("stages", way, batch, **more)
        return replace(made, case=made.case | {"stage": stage})

    try:
        in_time(bench)
        costs = stage_costs(bench.subject.model.config, batch, SIZE[way.precision])
        with opened(way, batch, (batch,), bench) as (frames, _):
            slots = list(range(batch))
            check(way, frames, slots, bench)
            parts = [frames.timed(slots, bench.faces.batch(at, batch)).device for at in range(PARTS)]
            whole = row(WHOLE, times={CALL: Timing.of([1e6 * part for part in parts])}, method="as submitted")
            stages = frames.stages(batch)
            if not stages:
                yield row(WHOLE, status="refused", reason="the backend does not tell its stages apart")
            yield limited(whole, cost_of("frame", without_gather(costs, batch)), way, ceilings)
            for name, stage in stages.items():
                with device.active():
                    measured = device.measure([partial(_nothing, stage)], effort)
                timed = row(name, times=measured.times, method=measured.method)
                yield limited(timed, cost_of(name, costs), way, ceilings)
            del frames, stages
    except Exception as error:
        yield row(WHOLE, status="refused", reason=said(error))


def limited(row: Row, cost: Cost | None, way: Way, ceilings: Mapping[str, float]) -> Row:
    """With what it must do and the time that takes at the measured ceilings, where both are known."""
    if cost is None:
        return row
    counted = replace(row, bytes=int(cost.bytes), flops=int(cost.flops))
    if way.precision not in ceilings:
        return counted
    floor, copied = cost.floor(ceilings["copy"], ceilings[way.precision])
    return replace(counted, floor=floor, ceiling="copy" if copied else f"{way.precision} product")


def without_gather(costs: Mapping[str, Cost], batch: int) -> dict[str, Cost]:
    """One source needs no gathering."""
    return {name: cost for name, cost in costs.items() if batch > 1 or name != "gather"}


def _nothing(stage: Callable[[], object]) -> tuple[Any, ...]:
    stage()
    return ()
