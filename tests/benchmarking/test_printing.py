"""What a person reads of a result."""

from __future__ import annotations

from typing import Any

from dagan_rt.benchmarking.printing import best_peer, changes, report, summary, verdict
from dagan_rt.benchmarking.rows import OURS, Results, Row, Timing, compare
from dagan_rt.benchmarking.suites import Goal

HOST = {"host": Timing(31, 30, 32, 20)}


def row(op: str, batch: int, form: str, p50: float | None, **more: Any) -> Row:
    case = {"batch": str(batch), "dtype": "bfloat16", "layout": "nhwc"}
    if p50 is None:
        return Row(op, case, form, "refused", "RuntimeError: only head dimensions up to 3")
    timing = Timing(p50, p50 - 0.5, p50 + 0.5, 20)
    return Row(op, case, form, "measured", times={"call": timing, **more.pop("others", {})}, error=2e-3, **more)


ROWS = (
    row("warp", 1, OURS, 10.0, bytes=20_000_000, flops=10**9, floor=5.0, ceiling="copy", others=HOST),
    row("warp", 1, "eager", 40.0, bytes=20_000_000, flops=10**9, floor=5.0, ceiling="copy"),
    row("warp", 32, OURS, 100.0, floor=75.0, ceiling="copy"),
    row("warp", 32, "eager", 250.0),
    row("attend", 1, OURS, 30.0, floor=12.0, ceiling="bfloat16 product"),
    row("attend", 1, "naive", 300.0),
    row("attend", 1, "sdpa flash", None),
    row("attend", 1, "sdpa cudnn", 96.0),
    row("attend", 1, "sdpa math", 500.0),
)
RESULTS = Results("kernels", {"device": "a GPU"}, {"copy": 4000.0, "bfloat16": 800.0}, ROWS)


def line_of(text: str, start: str) -> str:
    (line,) = (line for line in text.splitlines() if line.strip().startswith(start))
    return line


def test_every_row_is_in_the_report() -> None:
    text = report(RESULTS, {"warp": "B·7 bytes"})
    assert "warp: B·7 bytes" in text and "batch 1, bf16, nhwc" in text and line_of(text, "device").endswith("a GPU")
    ours = next(line.split() for line in text.splitlines() if line.split()[:2] == [OURS, "10.00"])
    # form, µs, p10, p90, host, GB/s, TFLOP/s, of ceiling, error
    assert ours == [OURS, "10.00", "9.50", "10.50", "31", "2000", "100.0", "50%", "copy", "2.0e-03"]
    assert "4.00×" in next(line for line in text.splitlines() if line.split()[:2] == ["eager", "40.00"])
    assert "refused: RuntimeError: only head dimensions up to 3" in line_of(text, "sdpa flash")
    assert "bfp16" not in text


def test_the_summary_names_our_time_its_share_and_the_best_peer() -> None:
    lines = summary(RESULTS)
    assert lines[0].split()[-4:] == ["batch", "1", "batch", "32"]
    assert lines[1].split() == ["warp", "bf16", "nhwc", "10.0", "50%", "4.0×", "100.0", "75%", "2.5×"]
    assert lines[2].split() == ["attend", "bf16", "nhwc", "30.0", "40%", "3.2×"]


def test_the_best_peer_is_the_fastest_that_was_measured() -> None:
    attend = ROWS[4]
    assert (best := best_peer(attend, ROWS)) and best.form == "sdpa cudnn"
    assert (best := best_peer(attend, ROWS, "naive")) and best.form == "naive"
    assert best_peer(attend, ROWS, "flex") is None


def test_goals() -> None:
    def goal(*ops: str, batch: int = 1, **asked: Any) -> str:
        return verdict(Goal(ops, batch, "bfloat16", "nhwc", **asked), RESULTS)

    assert goal("warp", batch=32, fraction=0.7).endswith("75% of copy, at least 70%: met")
    assert goal("warp", batch=32, fraction=0.8).endswith("at least 80%: NOT met")
    assert goal("attend", microseconds=35, speedup=3, over="sdpa") == (
        "goal attend, batch 1, bf16, nhwc: 30.00 µs, at most 35: met; 3.20× sdpa cudnn, at least 3×: met"
    )
    assert goal("attend", speedup=4, over="sdpa").endswith("NOT met")
    assert goal("attend", speedup=4, over="flex").endswith("no peer flex was measured: NOT met")
    assert goal("warp", "attend", microseconds=40).endswith("40.00 µs, at most 40: met")
    assert goal("warp", "attend", microseconds=39).endswith("NOT met")
    assert goal("warp", "missing", microseconds=40).endswith("not measured")


def test_regressions_come_first() -> None:
    slower = (row("warp", 1, OURS, 20.0), row("warp", 1, "eager", 20.0), *ROWS[2:])
    other = Results("kernels", {"device": "another"}, {}, slower)
    lines = changes(compare(RESULTS, other), RESULTS, other).splitlines()
    assert lines[0] == "note: measured on different devices, a GPU and another"
    assert lines[1].startswith(f"REGRESSION warp, batch 1, dtype bfloat16, layout nhwc, {OURS}: slower 2.00 times")
    assert lines[1].endswith("(10.00 µs -> 20.00 µs)")
    assert "eager: faster 0.50" in lines[2]
    assert lines[-1] == "7 rows as before, 1 regressions"
