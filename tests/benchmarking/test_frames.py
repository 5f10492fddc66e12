"""Whole frames: peers agree with PyTorch, what is wrong is found, and times are those of a clock that is known."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from dagan_rt.benchmarking import isolated
from dagan_rt.benchmarking.frame_peers import Cached, TorchFrames
from dagan_rt.benchmarking.frames import (
    CHUNKS,
    LEAST,
    Driver,
    Way,
    WrongFrames,
    begin,
    check,
    latencies,
    measure,
    periods,
    psnr_of,
    run,
    ways,
)  # fmt: skip
from dagan_rt.benchmarking.processes import ended
from dagan_rt.benchmarking.rows import OURS
from dagan_rt.benchmarking.subjects import Faces, random_model
from dagan_rt.benchmarking.suites import PEERS, Effort, Form, FrameSuite
from dagan_rt.frames import Times

TORCH = f"{OURS} torch"


def way_of(form: str, bench: Any) -> Way:
    (way,) = (way for name in (OURS, *PEERS) for way in ways(Form(name, (1,)), bench) if way.form == form)
    return way


def opened(form: str, bench: Any, slots: int = 1, batches: Sequence[int] = (1, 2)) -> tuple[Way, Any]:
    way = way_of(form, bench)
    frames = way.open(slots, batches)
    begin(frames, bench.faces)
    return way, frames


@pytest.mark.parametrize(("form", "slots"), [(TORCH, 4), ("published", 1), ("eager-fp16", 1)])
def test_every_form_shows_what_pytorch_shows(bench: Any, form: str, slots: int) -> None:
    way, frames = opened(form, bench, slots, (4,))
    levels, psnr = check(way, frames, [index % slots for index in range(4)], bench)
    assert levels <= 1 and psnr > 60


def test_the_peer_in_half_precision_keeps_its_budget(bench: Any) -> None:
    session = Cached(copy.deepcopy(bench.subject.model), torch.float16).eval()
    frames = TorchFrames(session, "cpu", (2,))
    begin(frames, bench.faces)
    levels, psnr = check(Way("eager-fp16", "float16", lambda *_: frames), frames, [0, 0], bench)
    assert levels > 0 and psnr > 40


@pytest.mark.slow
def test_the_peers_can_be_compiled_as_one_graph(bench: Any) -> None:
    _, frames = opened("eager-fp16", bench)
    pixels = torch.from_numpy(bench.faces.frames[:2].copy())
    compiled = torch.compile(frames._session, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert torch.equal(compiled(pixels), frames._session(pixels))


class Saboteur:
    """A backend that does one thing wrong."""

    def __init__(self, frames: Any, wrong: str) -> None:
        self._frames, self._wrong = frames, wrong
        self._former: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._frames, name)

    def submit(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Any:
        if self._wrong == "slots":
            slots = [0] * len(slots)
        if self._wrong == "order":
            frames = frames[::-1]
        if self._wrong == "stale":
            frames, self._former = self._former or frames, frames
        images = self._frames.submit(slots, frames).result()
        if self._wrong == "one image":
            images[-1] = images[-1][:, ::-1]
        if self._wrong == "channels":
            images = images[..., ::-1]
        if self._wrong == "shape":
            images = images[:, 1:]
        return type("Done", (), {"result": lambda self: images})()


@pytest.mark.parametrize("wrong", ["slots", "order", "stale", "one image", "channels"])
def test_a_backend_that_is_wrong_is_not_timed(bench: Any, wrong: str) -> None:
    way = way_of(TORCH, bench)
    spoilt = replace(way, open=lambda slots, batches: Saboteur(way.open(slots, batches), wrong))
    rows = list(measure(spoilt, (4,), bench))
    assert [row.group for row in rows] == ["latency", "throughput"]
    for row in rows:
        assert row.status == "wrong" and "needed: 50 dB" in row.reason and not row.times
        assert row.values["PSNR dB"] < 45 and row.error is not None and row.error > 10


def test_a_single_stale_frame_is_seen_too(bench: Any) -> None:
    way, frames = opened(TORCH, bench)
    with pytest.raises(WrongFrames):
        check(way, Saboteur(frames, "stale"), [0], bench)  # type: ignore[arg-type]


def test_what_does_not_run_says_why(bench: Any) -> None:
    def broken(slots: int, batches: Sequence[int]) -> Any:
        raise RuntimeError("no\nkernel image")

    for row in measure(Way(f"{OURS} broken", "float16", broken), (1, 2), bench):
        assert row.status == "refused" and row.reason == "RuntimeError: no kernel image"
    late = replace(bench, deadline=time.monotonic() - 1)
    rows = list(measure(way_of(TORCH, bench), (1, 2), late))
    assert [row.status for row in rows] == ["skipped"] * 4 and "600 s" in rows[0].reason
    way = way_of(TORCH, bench)
    spoilt = replace(way, open=lambda slots, batches: Saboteur(way.open(slots, batches), "shape"))
    assert all("must be uint8" in row.reason for row in measure(spoilt, (2,), bench))


def test_a_run_keeps_every_row_with_its_command(bench: Any) -> None:
    suite = FrameSuite((Form(OURS, (1, 2)), Form("published", (1,)), Form("compile-fp16", (1,), seconds=9.0)))
    asked: list[tuple[str, float]] = []

    def elsewhere(form: Form, seconds: float) -> list[Any]:
        asked.append((form.name, seconds))
        return []

    kept: list[int] = []
    only = replace(bench, only=("torch",))
    results = run(suite, only, "abc", lambda it: kept.append(len(it.rows)), elsewhere)
    assert asked and asked[0][0] == "compile-fp16" and 0 < asked[0][1] <= 9.0
    assert kept == sorted(kept) and kept[-1] == len(results.rows) == 6
    for row in results.rows:
        assert row.status == "measured" and row.time is not None
        assert row.time.p50 <= row.time.p90 <= row.time.p95 <= row.time.p99
        assert row.command.startswith("dagan-rt bench frames --model small --device cpu --forms ")
    assert results.rows[0].command.endswith("--forms torch --batches 1")
    assert {"device", "upload", "download"} <= set(results.rows[0].times)
    assert results.rows[1].values["frames/s"] > 0 and results.provenance["networks"] == "small, 64 × 64"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Ticking:
    """Frames whose batches take known times."""

    slots, ahead = 1, 3

    def __init__(self, clock: Clock, spans: Sequence[float]) -> None:
        self._clock, self._spans, self._at = clock, spans, -1
        self.under_way = self.most = 0
        self.seen: list[bytes] = []

    def submit(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Any:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.seen.append(b"".join(frame.tobytes() for frame in frames))
        return self

    def result(self) -> None:
        self.under_way -= 1
        self._at += 1
        self._clock.now += self._spans[self._at % len(self._spans)]

    def timed(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Times:
        return Times(4e-3, 1e-3, 2e-3, 1e-3)


def ring(count: int = 7) -> Faces:
    return Faces(np.zeros((2, 1, 1, 3), np.uint8), np.arange(3 * count, dtype=np.uint8).reshape(count, 1, 1, 3))


def test_latencies_are_those_of_the_clock() -> None:
    clock = Clock()
    frames = Ticking(clock, [0.001, 0.003])
    samples = latencies(Driver(frames, [0, 0], ring()), Effort(1.0, 1e9, 40), clock)  # type: ignore[arg-type]
    assert len(samples) == 40 and frames.most == 1
    assert sorted(set(np.round(samples))) == [1000, 3000]
    assert all(a != b for a, b in zip(frames.seen, frames.seen[1:], strict=False))  # fresh pixels each time
    few = latencies(Driver(frames, [0], ring()), Effort(1.0, 0.0, 40), clock)  # type: ignore[arg-type]
    assert len(few) == LEAST


def test_throughput_keeps_as_many_batches_under_way_as_allowed() -> None:
    clock = Clock()
    frames = Ticking(clock, [0.002])
    effort = Effort(1.0, 0.48, 1000)
    spans, calls = periods(Driver(frames, [0], ring()), effort, 2000.0, clock)  # type: ignore[arg-type]
    assert frames.most == 3 and frames.under_way == 0
    assert (len(spans), calls) == (CHUNKS, 20) and spans == pytest.approx([40_000.0] * CHUNKS)


def test_psnr() -> None:
    assert psnr_of(0.0) == 200.0 and psnr_of(255.0**2) == 0.0 and psnr_of(6.5025) == pytest.approx(40.0)


def test_random_networks_are_the_same_each_time_and_follow_the_driving_frame(bench: Any) -> None:
    again = random_model(bench.subject.model.config)
    for name, value in bench.subject.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for source in bench.expected:
        assert source.std() > 20  # a picture, not one grey
        assert psnr_of(float(((source[0].astype(float) - source[4]) ** 2).mean())) < 35
    assert not np.array_equal(bench.expected[0], bench.expected[1])


def test_a_process_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    started = tmp_path / "child"
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport subprocess, sys, time\n"
        f"child = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(started)!r}, 'w').write(str(child.pid))\nprint('compiling', flush=True)\ntime.sleep(60)\n"
    )
    program.chmod(0o755)
    assert ended([str(program)], 2.0) == "not done after 2 s: compiling"
    child = int(started.read_text())
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            break
        time.sleep(0.05)
    assert not state or state.startswith("Z"), state


def test_rows_of_another_process(bench: Any, monkeypatch: Any) -> None:
    def pretend(arguments: list[str], seconds: float) -> str:
        out = Path(arguments[arguments.index("--out") + 1])
        (first, *_) = measure(way_of("published", bench), (1,), bench)
        row = json.loads(
            json.dumps({"group": "latency", "case": first.case, "form": "compile-fp16", "status": "measured"})
        )
        out.write_text(json.dumps({"suite": "frames", "provenance": {}, "rows": [row]}))
        return "not done after 5 s"

    monkeypatch.setattr(isolated, "ended", pretend)
    form = Form("compile-fp16", (1, 2), seconds=5.0)
    rows = isolated.measure_apart(bench)(form, 5.0)
    assert [(row.group, row.case["batch"], row.status) for row in rows] == [
        ("latency", "1", "measured"), ("throughput", "1", "refused"), ("latency", "2", "refused"),
        ("throughput", "2", "refused"),
    ]  # fmt: skip
    assert rows[1].reason == "not done after 5 s"
    assert {row.status for row in isolated.measure_apart(bench)(form, -1.0)} == {"skipped"}
