"""Soaks: of a server that is none, whose mistakes must be seen; and the real ones, which endure."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")

from dagan_rt.serving import load, soak
from dagan_rt.serving.answers import Answers
from dagan_rt.serving.soak import Plan, Soak

SIDE, SOURCES, RING = 4, 3, 4
PLAN = Plan(frames=400, sequences=4, shortest=3, longest=9, room=12, idle=0.05)


def image(source: int, place: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), 16 * source + place, np.uint8)


def known() -> Answers:
    expected = np.array([[image(source, place) for place in range(RING)] for source in range(SOURCES)])
    return Answers([image(it, 0) for it in range(SOURCES)], [image(0, it) for it in range(RING)], expected)


class FakeServer:
    """Answers as `known` expects, but for what `disturb` does to the n-th frame; counts what clients leave behind."""

    def __init__(self, disturb: Any = lambda number, answer: answer) -> None:
        self.disturb, self.numbers = disturb, itertools.count()
        self.opened = self.ended = self.vanished = 0

    async def connect(self) -> FakeClient:
        return FakeClient(self)


class FakeClient:
    def __init__(self, server: FakeServer) -> None:
        self.server, self.broken = server, False

    async def open(self, source: np.ndarray, ahead: int = 4) -> FakeSession:
        self.server.opened += 1
        return FakeSession(self, int(source[0, 0, 0]) // 16)

    async def abandon(self) -> None:
        self.broken = True
        self.server.vanished += 1

    async def close(self) -> None:
        assert not self.broken


class FakeSession:
    def __init__(self, client: FakeClient, source: int) -> None:
        self.client, self.source = client, source

    async def drive(self, frame: np.ndarray) -> np.ndarray:
        await asyncio.sleep(0.0005)
        assert not self.client.broken
        server = self.client.server
        answer: np.ndarray = server.disturb(next(server.numbers), image(self.source, int(frame[0, 0, 0])))
        return answer

    async def close(self) -> None:
        self.client.server.ended += 1


def endure(server: FakeServer, plan: Plan = PLAN, memory: Any = None) -> Soak:
    return asyncio.run(soak.run(plan, known(), server.connect, memory))


def test_sequences_come_and_go() -> None:
    server = FakeServer()
    found = endure(server)
    assert not found.errors and not found.wrong and soak.faults(found, 0.0) == []
    assert 400 <= found.answered < 400 + 4 * (PLAN.longest + PLAN.ahead)
    assert found.ends["ended"] == server.ended > 0
    assert found.ends["left"] + found.ends["dropped"] == server.vanished > 0 and found.ends["left"]
    assert found.ends.total() == server.opened == len(found.starts)


def test_no_more_is_left_alone_than_the_server_has_room_for() -> None:
    server = FakeServer()
    found = endure(server, Plan(frames=400, sequences=4, shortest=3, longest=9, room=10, idle=60.0))
    assert server.vanished == 3 and found.ends["ended"] == server.opened - 3  # half of the room beyond 4 sequences


def test_a_mixed_up_image_ends_the_soak() -> None:
    found = endure(FakeServer(lambda number, answer: (answer + 16) % (16 * SOURCES) if number == 50 else answer))
    assert len(found.wrong) == 1 and found.answered < 100
    assert any("it is the image of source" in fault for fault in soak.faults(found, 0.0))


def test_an_error_is_a_fault() -> None:
    def fail(number: int, answer: np.ndarray) -> np.ndarray:
        if number == 50:
            raise RuntimeError("broken")
        return answer

    found = endure(FakeServer(fail))
    assert len(found.errors) == 1 and found.answered >= 400
    assert soak.faults(found, 0.0) == found.errors and found.errors[0].endswith("RuntimeError: broken")


def test_a_server_that_always_fails_is_given_up() -> None:
    def fail(number: int, answer: np.ndarray) -> np.ndarray:
        raise RuntimeError("broken")

    found = endure(FakeServer(fail))
    assert soak.MOST_ERRORS <= len(found.errors) <= soak.MOST_ERRORS + PLAN.sequences and not found.answered
    assert "0 frames were answered, not 400" in soak.faults(found, 0.0)


def test_memory_that_grows_is_a_fault() -> None:
    def held(frames: int, a_frame: float) -> Soak:
        samples = [(frames * step // 40, 1e8 + a_frame * frames * step / 40) for step in range(41)]
        return Soak(Plan(frames=frames), answered=frames, memory=samples)

    (fault,) = soak.faults(held(20_000, 1000.0), 0.0)  # 117.5 MB over 107.25, at the medians of the quarters
    assert "memory grew by 9.6 %" in fault
    assert soak.faults(held(20_000, 100.0), 0.0) == []
    assert soak.faults(held(1000, 1e5), 0.0) == [] and held(1000, 1e5).growth() is None  # too short to tell


def test_memory_is_sampled() -> None:
    found = endure(FakeServer(), memory=lambda: 12345)
    assert found.memory[-1] == (400, 12345.0) and found.summary()[1]["server bytes at last"] == 12345


def test_sequences_that_stay_open_are_a_fault() -> None:
    assert soak.faults(Soak(Plan(frames=0)), 2.0) == ["2 sequences are still open"]


def test_growth_is_of_the_last_quarter_over_the_second() -> None:
    draw = random.Random(0)
    held = [(25 * step, 1e8 * (2 if step < 10 else 1) + draw.uniform(0, 1e7) + 1e6 * step) for step in range(41)]
    second = statistics.median(value for done, value in held if 250 <= done < 500)
    last = statistics.median(value for done, value in held if done >= 750)
    assert soak.growth(held, 1000) == pytest.approx(last / second - 1)
    assert soak.growth(held[:20], 1000) is None


@pytest.fixture(scope="module")
def quick_bundle(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The least that animates, about a millisecond a frame: motion without depth, at 32 pixels."""
    pytest.importorskip("onnxscript")
    from dagan_rt import checkpoints
    from dagan_rt.export.__main__ import main as export

    root = tmp_path_factory.mktemp("quick")
    checkpoints.save(root / "model.pth.tar", small_model("fomm", size=32))
    assert export(["--checkpoint", str(root / "model.pth.tar"), "--out", str(root / "bundle")]) == 0
    return root / "bundle"


def soaked(bundle: Path, frames: int, python: str, folder: Path, sources: int = 24) -> dict[str, float]:
    """The command on a server of its own; the values of its row."""
    out = folder / "soak.json"
    given = ["--frames", str(frames), "--sources", str(sources), "--threads", "1", "--idle", "2"]
    assert load.main(["soak", str(bundle), *given, "--python", python, "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["status"] == "measured"
    return dict(row["values"])


@pytest.mark.slow
def test_twenty_thousand_frames(quick_bundle: Path, server_python: str, tmp_path: Path) -> None:
    values = soaked(quick_bundle, 20_000, server_python, tmp_path)
    assert values["frames answered"] >= 20_000 and values["errors"] == values["wrong images"] == 0
    assert values["server growth %"] < 2 and values["sequences still open"] == 0
    assert values["sequences left alone"] >= 20 and values["server failures"] == values["server refusals"] == 0
    # The server drove every frame that was answered, and those under way of clients that vanished.
    assert values["frames answered"] <= values["server frames"] <= values["frames answered"] + 1000


@pytest.mark.slow
def test_the_demo_endures(server_python: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from dagan_rt import demo

    assert demo.export(tmp_path) == 0
    values = soaked(tmp_path / "bundle", 120, server_python, tmp_path, sources=4)
    assert values["frames answered"] >= 120 and values["errors"] == values["wrong images"] == 0
