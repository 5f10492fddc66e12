"""Loads: when frames are due and how late they are, by arithmetic done anew; wrong images; what a server counts."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")

from dagan_rt import Reenactor
from dagan_rt.benchmarking.rows import CALL, OURS, Results, Row, Timing
from dagan_rt.bundle import Bundle
from dagan_rt.errors import InputError
from dagan_rt.serving import counters, load, measuring, overhead, pacing
from dagan_rt.serving.answers import Answers, drawn_ring, drawn_sources
from dagan_rt.serving.counters import Counters
from dagan_rt.serving.pacing import SENT, START, Frame, Load, Pace
from dagan_rt.serving.server import Server
from dagan_rt.serving.transport import DeadlineExceeded, ServerBusy, ServerError

SIDE = 4


def image(source: int, place: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), 16 * source + place, np.uint8)


def known(sources: int = 3, ring: int = 4, **how: Any) -> Answers:
    """What `FakeClient` answers."""
    expected = np.array([[image(source, place) for place in range(ring)] for source in range(sources)])
    return Answers([image(it, 0) for it in range(sources)], [image(0, it) for it in range(ring)], expected, **how)


class FakeClient:
    """Answers as `known` expects, after `seconds` of one thing at a time, but for what `disturb` does."""

    def __init__(self, seconds: float = 0.0, disturb: Any = None) -> None:
        self.seconds, self.disturb, self.count, self.opened = seconds, disturb, itertools.count(), 0
        self.ended = 0
        self.sources: list[int] = []
        self._one = asyncio.Lock()

    async def connect(self) -> FakeClient:
        return self

    async def open(self, source: np.ndarray, **_: Any) -> FakeSession:
        self.opened += 1
        self.sources.append(int(source[0, 0, 0]) // 16)
        return FakeSession(self, int(source[0, 0, 0]) // 16)

    async def close(self) -> None:
        pass


class FakeSession:
    def __init__(self, client: FakeClient, source: int) -> None:
        self.client, self.source, self.starts = client, source, 1

    async def drive(self, frame: np.ndarray, timeout: float | None = None) -> np.ndarray:
        async with self.client._one:
            number = next(self.client.count)
            await asyncio.sleep(self.client.seconds)
            answer = image(self.source, int(frame[0, 0, 0]))
            return answer if self.client.disturb is None else await self.client.disturb(number, answer)

    async def close(self) -> None:
        self.client.ended += 1


def run(pace: Pace, client: FakeClient, answers: Answers | None = None) -> Load:
    return asyncio.run(pacing.run(pace, answers or known(), client.connect, deadline=1.0))


def test_frames_are_due_at_even_distances() -> None:
    pace = Pace(streams=3, fps=10, seconds=0.5)
    due = sorted(pace.due(stream, frame) for stream in range(3) for frame in range(pace.frames))
    assert due == pytest.approx([number / 30 for number in range(15)])
    assert {pace.generation(stream, frame) for stream in range(3) for frame in range(5)} == {0}


def test_churn_begins_a_session_every_so_often() -> None:
    pace = Pace(streams=2, fps=10, seconds=1.0, churn=0.3)
    assert [pace.generation(0, frame) for frame in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [pace.generation(1, frame) for frame in range(4)] == [0, 0, 0, 1]  # due at 0.05, 0.15, 0.25, 0.35


def test_latency_counts_from_when_a_frame_was_due() -> None:
    """One answer takes 0.3 s: every frame that falls due meanwhile waits for it, and says so."""

    async def stall(number: int, answer: np.ndarray) -> np.ndarray:
        await asyncio.sleep(0.3 if number == 3 else 0)  # number 0 is the first frame, before the load
        return answer

    load = run(Pace(1, fps=20, seconds=0.5), FakeClient(disturb=stall))
    assert not load.wrong and not load.errors
    found = [frame.done - frame.due for frame in sorted(load.frames)]
    free, waits = 0.0, []  # the same queue, on paper
    for frame in range(10):
        free = max(free, frame / 20) + (0.3 if frame == 2 else 0.0)
        waits.append(free - frame / 20)
    due = sorted(frame.due for frame in load.frames)
    assert np.diff(due) == pytest.approx(np.full(9, 1 / 20), abs=1e-6)
    assert max(waits) == pytest.approx(0.3) and sum(wait > 0.04 for wait in waits) == 6
    assert found == pytest.approx(waits, abs=0.04)


def test_numbers_of_a_row() -> None:
    frames = [Frame(0.1 * k, 0.1 * k + 0.004, 0.1 * k + 0.01 * (k + 1), "OK") for k in range(20)]
    dropped = [Frame(2.0, 2.0, 2.1, "UNAVAILABLE"), Frame(2.1, 2.1, 3.1, "DEADLINE_EXCEEDED")]
    load = Load([*frames, *dropped, Frame(2.2, 2.45, 2.5, "INTERNAL")], starts=[0.5, 0.7], wrong=["x"], reconnects=3)
    times, values = load.summary(Pace(1, 10, 2.3), late=0.15)
    latencies = [10.0 * (k + 1) for k in range(20)]  # ms
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    got = times[CALL]
    assert [got.p50 / 1e3, got.p95 / 1e3, got.p99 / 1e3] == pytest.approx([cuts[49], cuts[94], cuts[98]])
    assert times[SENT].p50 / 1e3 == pytest.approx(cuts[49] - 4)
    assert times[START].p50 == pytest.approx(6e5)
    assert values == pytest.approx(
        {
            "frames/s asked": 10, "frames/s": 20 / 2.3, "frames due": 23, "frames answered": 20, "drops": 2, "late": 5,
            "errors": 1, "behind ms": 250, "reconnects": 3, "wrong images": 1, "status OK": 20,
            "status UNAVAILABLE": 1, "status DEADLINE_EXCEEDED": 1, "status INTERNAL": 1,
        }
    )  # fmt: skip


def test_errors_are_counted_by_status() -> None:
    errors = {2: ServerBusy("full"), 4: DeadlineExceeded("late"), 5: ServerError("broken")}

    async def refuse(number: int, answer: np.ndarray) -> np.ndarray:
        if number in errors:
            raise errors[number]
        return answer

    load = run(Pace(1, fps=100, seconds=0.1), FakeClient(disturb=refuse))
    values = load.summary(Pace(1, 100, 0.1), late=1.0)[1]
    assert (values["frames due"], values["frames answered"], values["drops"], values["errors"]) == (10, 7, 2, 1)
    assert values["status UNAVAILABLE"] == values["status DEADLINE_EXCEEDED"] == values["status INTERNAL"] == 1
    assert load.errors == ["stream 0: INTERNAL: broken"]


def test_churn_ends_sessions_and_takes_other_sources() -> None:
    client = FakeClient()
    load = run(Pace(2, fps=50, seconds=0.3, churn=0.1), client, known(sources=4))
    assert not load.wrong and not load.errors and len(load.frames) == 30
    assert client.opened == len(load.starts) == 6 and client.ended == 4
    assert sorted(client.sources) == [0, 0, 1, 1, 2, 3] and set(client.sources[2:4]) == {2, 3}


def test_an_image_of_another_source_is_wrong() -> None:
    async def mix_up(number: int, answer: np.ndarray) -> np.ndarray:
        return answer + 16 if number == 6 else answer

    load = run(Pace(2, fps=100, seconds=0.1), FakeClient(disturb=mix_up))
    (reason,) = load.wrong
    assert "off by up to 16 levels" in reason and "it is the image of source" in reason


def test_answers_in_this_process(tiny_bundle: Path) -> None:
    sources, ring = drawn_sources(2, 64), drawn_ring(64, 3)
    answers = Answers.in_process(Bundle.open(tiny_bundle), sources, ring, "onnxruntime", 1)
    with Reenactor(tiny_bundle, "onnxruntime", threads=1) as reenactor:
        reenactor.set_source(sources[1])
        images = [reenactor.drive(ring[at % 3]) for at in range(5)]
    assert [answers.wrong(1, at, image) for at, image in enumerate(images)] == [""] * 5
    assert "it is the image of source 1, frame 2" in answers.wrong(0, 2, images[2])
    off = images[0].copy()
    off[3, 3, 1] += 1 if off[3, 3, 1] < 255 else -1
    assert "off by up to 1 levels" in answers.wrong(1, 0, off)
    assert "float32" in answers.wrong(1, 0, images[0].astype(np.float32))


def test_tolerance_in_levels() -> None:
    off = image(1, 2) + np.uint8(1)
    assert known().wrong(1, 2, off) and not known(levels=1).wrong(1, 2, off)


def test_answers_that_are_learned() -> None:
    answers = Answers([image(0, 0), image(1, 0)], [image(0, 0), image(0, 1)])
    assert answers.wrong(0, 0, image(0, 0)) == ""
    assert answers.wrong(0, 2, image(0, 0)) == ""  # the same place of the ring
    assert "off by" in answers.wrong(0, 4, image(0, 1))
    assert answers.wrong(1, 0, image(0, 0)) == "it is an image of source 0"


METRICS = """# HELP dagan_frames_driven Frames driven
dagan_frames_driven{instance="reenact_0_0",model="reenact"} 30
dagan_frames_driven{instance="reenact_0_1",model="reenact"} 12
dagan_frames_driven{instance="reenact_stream_0_0",model="reenact_stream"} 1000
dagan_frame_queue_us{instance="reenact_0_0",model="reenact"} 2.1e+05
nv_inference_count{model="reenact",version="1"} 7
"""


def test_metrics_are_summed_over_instances() -> None:
    assert counters.parse_metrics(METRICS, "reenact") == {"dagan_frames_driven": 42, "dagan_frame_queue_us": 210000}
    assert counters.parse_metrics(METRICS, "other") == {}


def test_what_a_server_counted_since() -> None:
    def reading(driven: int, batches: int, queue: int, executions: int, sizes: dict[int, int]) -> Counters:
        metrics = {"dagan_frames_driven": driven, "dagan_batches": batches, "dagan_frame_queue_us": queue}
        statistics = {"executions": executions, "requests": driven, "sizes": sizes}
        return Counters(metrics, statistics)

    before, after = reading(10, 10, 5000, 8, {1: 6, 4: 1}), reading(110, 35, 255000, 58, {1: 20, 2: 15, 4: 1})
    values = after.since(before)
    assert values["queue ms"] == pytest.approx(2.5) and "compute ms" not in values
    assert (values["frames/batch"], values["requests/execution"], values["largest execution"]) == (4, 2, 2)
    assert "frames/batch" not in Counters({}, after.statistics, "no answer").since(before)


def test_what_a_server_adds_is_of_the_same_round() -> None:
    measured = overhead.Measured({overhead.IN_PROCESS: [0.010, 0.020, 0.010], "gRPC": [0.013, 0.021, 0.012]})
    here, there = measured.rows()
    assert (here.form, there.form) == ("in process", f"{OURS} gRPC")
    assert there.values["added ms"] == pytest.approx(2.0)  # of 3, 1 and 2; not 12 less 10
    assert overhead.verdict([here, there]).endswith("not measured")  # no way with shared memory
    there = replace(there, form=f"{OURS} gRPC, shared memory")
    assert overhead.verdict([here, there]).endswith("2.00 ms added with shared memory, p50, at most 3: met")


def test_a_wrong_way_has_no_time() -> None:
    def late(frame: np.ndarray) -> np.ndarray:
        return image(0, int(frame[0, 0, 0]))

    ways = {overhead.IN_PROCESS: late, "gRPC, shared memory": lambda frame: image(1, 0)}
    here, there = overhead.measure(ways, known(), 3).rows()
    assert (here.status, there.status, there.times) == ("measured", "wrong", {})
    assert len(overhead.measure(ways, known(), 3).seconds["in process"]) == 3


def test_results_are_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dagan_rt.cli import main

    row = Row("load", {"by": "gRPC", "streams": "8", "fps": "30"}, OURS, "measured",
              times={CALL: Timing.of([5000.0, 7000.0]), "start": Timing.of([9000.0])},
              values={"queue ms": 1.25, "drops": 3.0})  # fmt: skip
    Results("serving", {"server": "triton"}, {}, (row,)).write(tmp_path / "load.json")
    assert main(["bench", "show", str(tmp_path / "load.json")]) == 0
    shown = capsys.readouterr().out
    assert "gRPC, 8 streams, 30 fps" in shown and "6.000" in shown and "1.250" in shown
    assert "reconnects" not in shown  # nothing was counted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["grpc://127.0.0.1:1", "--streams", "0"], "--streams must be 1 to 4096, got 0"),
        (["grpc://127.0.0.1:1", "--fps", "0"], "--fps must be 0.01 to 1000, got 0"),
        (["grpc://127.0.0.1:1", "--json", "out.txt"], "out.txt"),
        (["nowhere"], "must be a server's URL like grpc://host:8001"),
        (["nowhere", "--metrics", "http://127.0.0.1:1/metrics"], "for a server that runs"),
        (["soak", "grpc://127.0.0.1:1"], "grpc://127.0.0.1:1"),
        (["soak", "nowhere", "--frames", "0"], "--frames must be 1 to"),
        (["overhead", "nowhere", "--pause", "-1"], "--pause must be 0 to"),
    ],
)
def test_bad_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/metrics", "metrics", "http://127.0.0.1:1/metrics"])
def test_metrics_come_over_http_alone(url: str) -> None:
    with pytest.raises(InputError, match="metrics"):
        counters.read_metrics(url)


@pytest.mark.parametrize(
    ("server", "metrics"),
    [
        ("grpc://host", "http://host:8002/metrics"),
        ("grpcs://host:9001", "http://host:9002/metrics"),
        ("http://127.0.0.1:9000", "http://127.0.0.1:9002/metrics"),
        ("grpc://[::1]:8001", "http://[::1]:8002/metrics"),
    ],
)
def test_metrics_are_looked_for_beside_the_server_s_own_ports(server: str, metrics: str) -> None:
    assert counters.metrics_url(server) == metrics


def test_http_is_looked_for_beside_grpc() -> None:
    given = [load.load_parser().parse_args(["grpcs://host:9001", "--http", *port]).http for port in ([], ["9100"])]
    found = [measuring._over_http("grpcs://host:9001", port) for port in given]
    assert found == ["https://host:9000", "https://host:9100"]


def test_metrics_that_are_not_to_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "read_statistics", lambda url: {"executions": 3})
    found = Counters.read("grpc://127.0.0.1:1")
    assert (found.metrics, found.statistics) == ({}, {"executions": 3})
    assert found.reason.startswith("metrics cannot be read from http://127.0.0.1:2/metrics: ")
    assert found.reason.endswith("; if they are elsewhere, name the URL with --metrics")
    with pytest.raises(InputError, match=r"cannot be read from http://127.0.0.1:3/metrics: "):
        Counters.read("grpc://127.0.0.1:1", "http://127.0.0.1:3/metrics")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, contextlib; from dagan_rt.serving.load import load_parser, overhead_parser, soak_parser\n"
        "for parser in (load_parser, overhead_parser, soak_parser): parser().format_help()\n"
        "print(sorted({'numpy', 'tritonclient', 'torch', 'tqdm'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_load_is_not_slowed_by_slow_answers() -> None:
    """Open loop: all frames are sent in their time, even where each answer takes ten times as long."""
    begun = time.monotonic()
    load = run(Pace(2, fps=50, seconds=0.2), FakeClient(seconds=0.02))
    assert len(load.frames) == 20 and time.monotonic() - begun > 0.4
    assert max(frame.sent - frame.due for frame in load.frames) < 0.05


@pytest.fixture(scope="module")
def served(make_repository: Callable[..., Path], server_python: str) -> Iterator[list[str]]:
    """Arguments that name a server and what it serves."""
    repository = make_repository(backend="onnxruntime", threads=1)
    with Server(repository, server_python) as server:
        bundle = repository / "reenact" / "1" / "bundle"
        yield [server.grpc_url, "--metrics", server.metrics_url, "--bundle", str(bundle)]


@pytest.mark.slow
def test_a_server_under_load(served: list[str], tmp_path: Path) -> None:
    pace = ["--streams", "4", "--fps", "8", "--seconds", "2", "--churn", "0.9", "--json", str(tmp_path / "load.json")]
    assert load.main([*served, *pace]) == 0
    (row,) = Results.read(tmp_path / "load.json").rows
    values = row.values
    assert values["frames due"] == values["frames answered"] + values["drops"] == 64
    assert values["errors"] == values["wrong images"] == values["server failures"] == 0
    assert values["server frames"] >= values["frames answered"] and values["queue ms"] > 0
    assert 0 < values["compute ms"] < row.times[SENT].p50 / 1e3
    assert values["triton requests"] >= values["server frames"]


@pytest.mark.slow
def test_images_that_belong_to_another_source_fail(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    known = Answers.in_process

    def rolled(bundle: Bundle, sources: Any, *rest: Any) -> Answers:
        answers = known(bundle, [*sources[1:], sources[0]], *rest)
        answers.sources = list(sources)
        return answers

    monkeypatch.setattr(Answers, "in_process", rolled)
    assert load.main([*served, "--streams", "2", "--fps", "5", "--seconds", "0.4"]) == 1


@pytest.mark.slow
def test_what_the_server_adds(served: list[str], tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    assert load.main(["overhead", *served, "--frames", "10", "--json", str(out)]) == 0
    rows = {row.form: row for row in Results.read(out).rows}
    assert list(rows) == ["in process", *(f"{OURS} {way}" for way in ("gRPC, shared memory", "gRPC", "gRPC stream"))]
    assert all(row.status == "measured" and row.values["frames"] == 10 for row in rows.values())


@pytest.mark.slow
def test_a_soak_says_what_it_cannot_see(served: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    url, _, _, *bundle = served
    assert load.main(["soak", url, *bundle, "--frames", "60", "--sequences", "2", "--sources", "2"]) == 0
    note = "note: whether sequences stay open is not known: metrics cannot be read from http://127.0.0.1:"
    assert note in capsys.readouterr().err
