"""What a person reads of a result."""

from __future__ import annotations

from typing import Any

from dagan_rt.benchmarking.printing import achieved, best_peer, changes, report, summary, verdict
from dagan_rt.benchmarking.rows import OURS, Results, Row, Timing, compare
from dagan_rt.benchmarking.suites import Aim, Goal

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


def frame(form: str, batch: str, p50: float, p99: float, rate: float = 0.0, group: str = "latency") -> Row:
    times = {"call": Timing(p50, p50, p50, 300, p95=p99, p99=p99), "device": Timing(p50 / 2, 1, 1, 30)}
    values = {"frames/s": rate} if rate else {}
    return Row(group, {"model": "full", "batch": batch}, form, "measured", times=times, error=3.0, values=values)


FRAMES = Results(
    "frames",
    {},
    {},
    (
        frame(f"{OURS} torch-cuda float16", "1", 900.0, 990.0),
        frame(f"{OURS} tensorrt", "1", 800.0, 1000.0),
        frame("published", "1", 9600.0, 9900.0),
        frame("compile-fp16", "1", 1600.0, 1700.0),
        frame(f"{OURS} tensorrt", "1", 700.0, 700.0, 1428.0, "throughput"),
        frame(f"{OURS} tensorrt", "32", 8000.0, 8000.0, 4000.0, "throughput"),
        frame("compile-fp16", "32", 4000.0, 8000.0, 8000.0, "throughput"),
    ),
)


def test_frames_are_told_in_milliseconds_beside_our_fastest() -> None:
    text = report(FRAMES)
    latency = text.split("latency\n")[1].split("throughput\n")[0]
    published = ["published", "9.600", "9.600", "9.900", "9.900", "4.800", "3", "12.00×"]
    assert line_of(latency, "published").split() == published
    assert line_of(latency, f"{OURS} torch-cuda").split()[-1] == "1.12×"
    assert "upload" not in latency and "MB" not in text  # columns that nobody fills
    assert "cost not stated" not in text


def test_aims() -> None:
    def met(group: str, results: Results = FRAMES, **asked: Any) -> str:
        return achieved(Aim(group, {"model": "full"} | asked.pop("case", {}), **asked), results)

    one = {"case": {"batch": "1"}}
    assert met("latency", **one, microseconds=800, spread=1.2) == (
        f"goal latency, full, batch 1, {OURS} tensorrt: p50 0.800 ms, at most 0.8: met; "
        "p99 is 1.25 times p50, at most 1.2: NOT met"
    )
    assert met("latency", **one, microseconds=799).endswith("NOT met")
    assert met("latency", **one, speedup=12, over="published").endswith(
        "12.00 times as fast as published, at least 12: met"
    )
    assert met("latency", **one, speedup=2.1, over="compile").endswith("NOT met")
    assert met("latency", **one, speedup=1.5, over="eager").endswith("no eager was measured: NOT met")
    assert met("throughput", rate=3500).endswith("4000 frames/s at full, batch 32, at least 3500: met")
    assert met("throughput", rate=4001).endswith("NOT met")  # a peer's rate does not count
    assert met("streams", streams=100).endswith("not measured")


def test_streams_that_keep_their_latency_without_a_drop() -> None:
    def load(count: int, p99: float, drops: float = 0.0) -> Row:
        times = {"call": Timing(1e3, 1e3, 1e3, 300, p99=p99)}
        case = {"model": "full", "streams": str(count), "fps": "30"}
        return Row("streams", case, f"{OURS} x", "measured", times=times, values={"drops": drops})

    results = Results("streams", {}, {}, (load(64, 9e3), load(100, 33e3), load(112, 9e3, 1.0), load(128, 34e3)))
    assert "100 streams without a drop" in achieved(Aim("streams", streams=100, p99=33e3), results)
    assert achieved(Aim("streams", streams=100, p99=33e3), results).endswith("at least 100: met")
    assert achieved(Aim("streams", streams=101, p99=33e3), results).endswith("NOT met")
    lines = report(results).splitlines()
    assert any(line.split()[:5] == ["full,", "64", "streams,", "30", "fps"] for line in lines)
