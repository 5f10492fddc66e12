"""Streams and stages: pacing by a clock that is known, loads on the small networks, memory that grows or does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from dagan_rt.benchmarking import stages
from dagan_rt.benchmarking.devices import Processor
from dagan_rt.benchmarking.frames import Way, ways
from dagan_rt.benchmarking.rows import OURS
from dagan_rt.benchmarking.streams import measure, paced, slope
from dagan_rt.benchmarking.suites import Form, FrameSuite, Load


@pytest.fixture
def way(bench: Any) -> Way:
    (found,) = ways(Form(OURS, (1,)), replace(bench, only=("torch",)))
    return found


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_pushes_are_spread_over_the_period() -> None:
    clock, calls = Clock(), list[tuple[str, int, float]]()
    pushes = [lambda at, name=name: calls.append((name, at, round(clock.now - 5.0, 9))) for name in "ab"]
    assert paced(pushes, 10, 0.3, clock, clock.sleep) == pytest.approx(0.0, abs=1e-9)
    assert calls == [("a", 0, 0.0), ("b", 0, 0.05), ("a", 1, 0.1), ("b", 1, 0.15), ("a", 2, 0.2), ("b", 2, 0.25)]


def test_late_pushes_are_made_up_for() -> None:
    clock, calls = Clock(), list[float]()

    def push(at: int) -> None:
        calls.append(round(clock.now - 5.0, 9))
        clock.now += 0.25 if at == 1 else 0.0

    assert paced([push], 10, 0.6, clock, clock.sleep) == pytest.approx(0.15)
    assert calls == [0.0, 0.1, 0.35, 0.35, 0.4, 0.5]


def test_a_load(bench: Any, way: Way) -> None:
    rows = measure(way, Load((1, 2), fps=8, seconds=1.0), bench, soak=0)
    assert [(row.group, row.case["streams"], row.status) for row in rows] == [
        ("streams", "1", "measured"), ("streams", "2", "measured"),
    ]  # fmt: skip
    for row in rows:
        assert row.time is not None and row.time.p50 > 0 and row.error is not None and row.error <= 1
        assert row.values["errors"] == 0 and row.values["slot bytes"] > 0
        assert row.command.endswith(f"--streams {row.case['streams']} --fps 8")


def test_a_soak_counts_its_frames(bench: Any, way: Way) -> None:
    (row,) = measure(way, Load((2, 3)), bench, soak=40)
    assert row.group == "soak" and row.status == "measured" and row.case["frames"] == "40"
    assert row.values["frames driven"] >= 40 and row.values["process bytes at last"] > 0


def test_streams_that_show_something_else_are_not_timed(bench: Any, way: Way) -> None:
    class Mixed:
        def __init__(self, frames: Any) -> None:
            self._frames = frames

        def __getattr__(self, name: str) -> Any:
            return getattr(self._frames, name)

        def set_source(self, slot: int, image: np.ndarray) -> None:
            self._frames.set_source(slot, bench.faces.sources[0])

    spoilt = replace(way, open=lambda slots, batches: Mixed(way.open(slots, batches)))
    (row,) = measure(spoilt, Load((2,), fps=8, seconds=0.5), bench, soak=0)
    assert row.status == "wrong" and "needed" in row.reason


def test_growth_of_memory() -> None:
    frames = np.arange(0, 2000, 100.0)
    assert slope(frames, np.where(frames < 400, 0.0, 7e6)) == pytest.approx(0.0, abs=1e-3)  # caches fill first
    assert slope(frames, 1e6 + 12.0 * frames) == pytest.approx(12.0)


def test_stages_come_with_their_floors_the_largest_gap_first(bench: Any) -> None:
    suite = FrameSuite((Form(OURS, (1,)),), stages=(2,), effort=bench.effort)
    results = stages.run(suite, replace(bench, only=("torch",)), Processor())
    assert {row.case["stage"] for row in results.rows} == {"whole frame", "driving", "motion", "generator"}
    gaps = [row.gap for row in results.rows]
    assert None not in gaps and gaps == sorted(gaps, reverse=True)  # type: ignore[type-var]
    whole = next(row for row in results.rows if row.case["stage"] == "whole frame")
    assert whole.flops == sum(row.flops for row in results.rows) - whole.flops and results.ceilings["copy"] > 0


def test_a_backend_without_stages_is_refused(bench: Any, way: Way) -> None:
    class Silent:
        def __init__(self, frames: Any) -> None:
            self._frames = frames

        def __getattr__(self, name: str) -> Any:
            return (lambda batch: {}) if name == "stages" else getattr(self._frames, name)

    def opened(slots: int, batches: Sequence[int]) -> Any:
        return Silent(way.open(slots, batches))

    ceilings = {"copy": 10.0, "float32": 1.0}
    rows = list(stages.measure(replace(way, open=opened), 1, bench, Processor(), ceilings, bench.effort))
    assert [row.status for row in rows] == ["refused", "measured"] and "stages" in rows[0].reason
