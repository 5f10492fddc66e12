"""The benchmark of kernels on the CPU: what is measured, refused, found wrong, and skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from dagan_rt import kernels  # noqa: E402
from dagan_rt.benchmarking import kernels as measuring  # noqa: E402
from dagan_rt.benchmarking import peers  # noqa: E402
from dagan_rt.benchmarking.devices import Measured, Processor  # noqa: E402
from dagan_rt.benchmarking.kernels import WrongResult, checked, limited, run  # noqa: E402
from dagan_rt.benchmarking.rows import OURS, Results, Row, Timing  # noqa: E402
from dagan_rt.benchmarking.suites import Case, Effort, Run, Shapes, Suite  # noqa: E402
from dagan_rt.errors import InputError  # noqa: E402

SHAPES = Shapes(image=16, feature=8, points=3, channels=16, queries=4)
EFFORT = Effort(row_seconds=0.001, repeats=5)
WARP = Suite((Run("flow_warp", ("eager",), flows=("smooth",)),), SHAPES, EFFORT)

PEERS = {
    "image_to_planes": ("eager",),
    "planes_to_image": ("eager",),
    "sparse_motion": ("eager",),
    "dense_flow": ("eager",),
    "flow_warp": ("eager",),
    "flow_warp_backward": ("eager",),
    "cross_attention": ("naive", "sdpa math", "sdpa flash 1x16", "sdpa flash 4x4"),
    "cross_attention_backward": ("naive", "sdpa math", "sdpa flash 1x16", "sdpa flash 4x4"),
}


def whole(op: str) -> Suite:
    flows = ("smooth", "scatter") if op.startswith("flow_warp") else ("",)
    dtypes, layouts = ("float16", "bfloat16", "float32"), ("nchw", "nhwc")
    return Suite((Run(op, PEERS[op], (1, 2), dtypes, layouts, flows),), SHAPES, EFFORT)


@pytest.mark.parametrize("op", PEERS)
def test_our_references_and_all_peers_are_right_and_timed(op: str) -> None:
    suite = whole(op)
    results = run(suite, Processor(), commit="abc")
    assert [f"{row.form}, {row.case}: {row.reason}" for row in results.rows if row.status != "measured"] == []
    assert len(results.rows) == sum(map(len, suite.cases().values()))
    for row in results.rows:
        assert row.time and row.time.p10 <= row.time.p50 <= row.time.p90 and row.method == "wall clock"
        assert row.error is not None and row.tolerance is not None and 0 <= row.error <= row.tolerance
        assert row.floor and row.bytes > 0 and row.flops > 0
    assert results.provenance["device"] == "cpu" and results.provenance["commit"] == "abc"
    assert {"copy", "float16", "bfloat16", "float32"} < set(results.ceilings)


def stand_in(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    def flow_warp(*given: Any, reference: bool) -> Any:
        return function(*given)

    monkeypatch.setattr(kernels, "flow_warp", flow_warp, raising=False)


def measured_warp(suite: Suite = WARP, device: Any = None) -> dict[str, Row]:
    return {row.form: row for row in run(suite, device or Processor()).rows}


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda *given: peers.flow_warp(*given) * 1.1)
    row = measured_warp()[OURS]
    assert (row.status, row.times) == ("wrong", {})
    assert row.error == pytest.approx(0.1, rel=0.1) and "output 0 is off by" in row.reason
    assert measured_warp()["eager"].status == "measured"


def test_what_gets_wrong_only_later_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def tiring(*given: Any) -> Any:
        calls.append(1)
        return peers.flow_warp(*given) * (1.0 if len(calls) == 1 else 1.5)

    stand_in(monkeypatch, tiring)
    assert measured_warp()[OURS].status == "wrong"


def test_what_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise InputError("the feature\n must be small")

    stand_in(monkeypatch, fail)
    row = measured_warp()[OURS]
    assert (row.status, row.reason, row.time) == ("refused", "InputError: the feature must be small", None)
    attention = Suite((Run("cross_attention", ("sdpa flash", "sdpa flash 3x5")),), SHAPES, EFFORT)
    rows = {row.form: row for row in run(attention, Processor()).rows}
    assert rows["sdpa flash"].status == "refused" and "same last dimension" in rows["sdpa flash"].reason
    assert "3 heads of 5 do not hold 16 channels" in rows["sdpa flash 3x5"].reason


def test_no_time_left_is_said_of_every_row() -> None:
    results = run(replace(WARP, effort=replace(EFFORT, seconds=0.0)), Processor())
    assert [(row.form, row.status) for row in results.rows] == [(OURS, "skipped"), ("eager", "skipped")]
    assert all("0 s of the suite were over" in row.reason for row in results.rows)


def test_time_may_be_over_within_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 20.0]).__next__
    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=now))
    (case, forms), *_ = WARP.cases().items()
    rows = list(measuring.measure_case(case, forms, WARP, Processor(), deadline=10.0))
    assert [row.status for row in rows] == ["measured", "skipped"]


def test_what_takes_a_compiler_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = peers.form

    def form(op: str, name: str, dtype: Any, layout: str) -> Callable[..., Any]:
        made.append(name)
        return real(op, name.removeprefix("compile "), dtype, layout)

    monkeypatch.setattr(peers, "form", form)
    suite = replace(WARP, runs=(replace(WARP.runs[0], peers=("compile eager", "eager"), batches=(1, 2)),))
    rows = run(suite, Processor()).rows
    assert made == ["eager", "eager", "compile eager", "compile eager"]
    assert [row.form for row in rows] == [OURS, "eager", OURS, "eager", "compile eager", "compile eager"]


def test_a_lost_device_ends_the_run_but_not_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fragile(Processor):
        broken = False

        def wait(self) -> None:
            if self.broken:
                raise RuntimeError("an illegal memory access was encountered")

    device = Fragile()

    def crash(*given: Any) -> Any:
        device.broken = True
        raise RuntimeError("launch failed")

    stand_in(monkeypatch, crash)
    suite = replace(WARP, runs=(replace(WARP.runs[0], batches=(1, 2)),))
    kept: list[Results] = []
    rows = run(suite, device, keep=kept.append).rows
    assert [(row.case["batch"], row.form, row.status) for row in rows] == [
        ("1", OURS, "refused"),
        ("1", "eager", "skipped"),
        ("2", OURS, "skipped"),
        ("2", "eager", "skipped"),
    ]
    assert rows[0].reason == "RuntimeError: launch failed"
    assert all("lost" in row.reason and "illegal memory access" in row.reason for row in rows[1:])
    assert kept[-1].rows == rows


def test_results_are_kept_between_operations() -> None:
    suite = Suite((Run("dense_flow", ("eager",)), Run("image_to_planes", ("eager",))), SHAPES, EFFORT)
    kept: list[Results] = []
    final = run(suite, Processor(), keep=kept.append)
    assert [len(results.rows) for results in kept] == [2, 4] and kept[-1] == final


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ([[1.0, 2.0]], ""),
        ([[1.0, 2.1]], "output 0 is off by 4.47e-02"),
        ([[1.0, float("nan")]], "output 0 is off by nan"),
        ([[1.0, float("inf")]], "output 0 is off by inf"),
        ([[1.0]], r"output 0 is \(1,\), expected \(2,\)"),
        ([[1.0, 2.0], [1.0, 2.0]], "2 outputs, expected 1"),
    ],
)
def test_checking(outputs: list[list[float]], reason: str) -> None:
    expected = (torch.tensor([1.0, 2.0], dtype=torch.float64),)
    found = tuple(torch.tensor(values) for values in outputs)
    if not reason:
        assert checked(found, expected, 1e-3) == 0
        return
    with pytest.raises(WrongResult, match=reason):
        checked(found, expected, 1e-3)


def test_the_ceiling_that_binds() -> None:
    ceilings = {"copy": 4000.0, "float16": 800.0, "float32": 50.0}
    row = Row("flow_warp", {}, OURS, "measured", times={"call": Timing(100.0, 99.0, 101.0, 5)})
    warp = limited(row, Case("flow_warp", 32, "float16", "nhwc", "smooth"), Shapes(), ceilings)
    assert warp.bytes == 32 * 4096 * (2 * 256 * 2 + 12) and warp.ceiling == "copy"
    assert warp.floor == pytest.approx(warp.bytes / 4e12 * 1e6) and warp.fraction == pytest.approx(warp.floor / 100)
    attention = limited(row, Case("cross_attention", 16, "float16", "nhwc"), Shapes(), ceilings)
    assert attention.ceiling == "float16 product" and attention.flops == 16 * 2 * 4096**2 * 288
    assert attention.floor == pytest.approx(attention.flops / 800e12 * 1e6)


def test_inputs_lie_in_as_many_places_as_the_device_asks() -> None:
    class Counting(Processor):
        taken: list[int] = []

        def sets(self, size: float) -> int:
            return 3

        def measure(self, calls: Any, effort: Effort) -> Measured:
            if len(calls) > 1:
                self.taken.append(len({call.__closure__[1].cell_contents[0].data_ptr() for call in calls}))
            return super().measure(calls, effort)

    device = Counting()
    run(WARP, device)
    assert device.taken == [3, 3]
