"""The live session, driven by a script: the clock moves when a test says so."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dagan_rt.camera import Captured
from dagan_rt.cropping import Square
from dagan_rt.errors import InputError
from dagan_rt.live import KEYS, Live, Recorder, View
from dagan_rt.video import VideoReader, VideoWriter

SIZE = 32


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Script:
    """A capture that has given frames at given times, numbered by their gray level; the newest is taken, as always."""

    def __init__(self, clock: Clock, times: list[float], patience: float | None = None) -> None:
        self.source = SimpleNamespace(name="script", fps=Fraction(30), mirrored=False, patience=patience)
        self.dropped, self._clock, self._times, self._taken = 0, clock, times, 0
        self.started = False

    def start(self) -> None:
        self.started = True

    @property
    def ended(self) -> bool:
        return self._taken == len(self._times)

    def take(self, timeout: float) -> Captured | None:
        assert self.started
        if self.ended:
            return None
        if self._times[self._taken] > self._clock.now + timeout:
            self._clock.now += timeout
            return None
        self._clock.now = max(self._clock.now, self._times[self._taken])
        there = [number for number, time in enumerate(self._times) if time <= self._clock.now]
        self.dropped += there[-1] - self._taken
        self._taken = there[-1] + 1
        return Captured(np.full((40, 60, 3), there[-1], np.uint8), self._times[there[-1]])


class Model:
    """Notes what it is asked for, and answers a frame with its level plus 100."""

    size = SIZE

    def __init__(self, clock: Clock, seconds: float = 0.0, motion: str = "relative", adapt_scale: bool = False) -> None:
        self.asked: list[Any] = []
        self.motion, self.adapt_scale, self._clock, self._seconds = motion, adapt_scale, clock, seconds

    def set_source(self, image: np.ndarray) -> None:
        self.asked.append(f"source {image[0, 0, 0]}")

    def reset(self) -> None:
        self.asked.append("reset")

    def set_motion(self, motion: str, adapt_scale: bool = False) -> None:
        assert not (adapt_scale and motion == "absolute")
        self.motion, self.adapt_scale = motion, adapt_scale
        self.asked.append(f"{motion}{' scaled' if adapt_scale else ''}")

    def drive(self, frame: np.ndarray) -> np.ndarray:
        assert frame.shape == (SIZE, SIZE, 3) and frame.dtype == np.uint8
        self._clock.now += self._seconds
        self.asked.append(int(frame[0, 0, 0]))
        return frame + np.uint8(100)


class Shown:
    def __init__(self) -> None:
        self.views: list[View] = []

    def show(self, view: View) -> None:
        self.views.append(view)


class Session:
    """A session over `times`, whose keys are pressed before the frames of given numbers."""

    def __init__(
        self, times: list[float], keys: dict[int, str] | None = None, patience: float | None = None, **model: Any
    ) -> None:
        self.clock, self.shown = Clock(), Shown()
        self.capture = Script(self.clock, times, patience)
        self.model = Model(self.clock, **model)
        self._keys = dict(keys or {})
        self.live = Live(
            self.capture,
            self.model,
            portraits(),
            [self.shown],
            self.pressed,
            clock=self.clock,  # type: ignore[arg-type]
        )

    def pressed(self) -> str:
        return self._keys.pop(self.capture._taken, "")


def portraits() -> list[np.ndarray]:
    return [np.full((SIZE, SIZE, 3), 200 + number, np.uint8) for number in range(3)]


def regular(count: int, rate: float = 10.0) -> list[float]:
    return [number / rate for number in range(count)]


def test_every_frame_of_a_fast_model_is_shown() -> None:
    session = Session(regular(5), seconds=0.02)
    summary = session.live.run()
    assert session.model.asked == ["source 200", 0, 1, 2, 3, 4]
    assert list(summary.latencies) == pytest.approx([0.02] * 5) and summary.dropped == 0
    assert summary.seconds == pytest.approx(0.42)
    for number, view in enumerate(session.shown.views):
        assert (view.portrait == 200).all() and (view.driving == number).all() and (view.result == number + 100).all()
        assert view.time == pytest.approx(number / 10)


def test_a_slow_model_drops_frames_and_does_not_lag() -> None:
    session = Session(regular(250, 25.0), seconds=0.11)
    summary = session.live.run(frames=80)
    assert max(summary.latencies) <= 0.11 + 1 / 25 + 1e-9  # a frame waits for one in front of it, never for two
    numbers = session.model.asked[1:]
    assert numbers == sorted(set(numbers)) and numbers[-1] == pytest.approx(25 * 0.11 * 79, abs=2)
    assert summary.dropped == numbers[-1] + 1 - 80


def test_what_is_said_beside_the_pictures() -> None:
    session = Session([*regular(20, 10.0), *(2 + number / 5 for number in range(10))], seconds=0.03)
    drive = session.model.drive

    def uneven(frame: np.ndarray) -> np.ndarray:
        session.clock.now += 0.05 * (int(frame[0, 0, 0]) % 5 == 4)  # one frame in five is later
        return drive(frame)

    session.model.drive = uneven  # type: ignore[method-assign]
    session.live.run()
    views = [view.status for view in session.shown.views]
    assert (views[0].fps, views[0].latency) == (0, 0)
    assert views[0][2:] == (0, "relative", False, 1, 3, "", True, False)
    assert views[15].fps == pytest.approx(10, abs=1) and views[15].latency == pytest.approx(0.03)
    assert views[-1].fps == pytest.approx(5, abs=0.5)  # the last second only


KEYED = [
    (" ", ["source 200", 0, 1, "reset", 2, 3]),
    ("c", ["source 200", 0, 1, "reset", 2, 3]),
    ("n", ["source 200", 0, 1, "source 201", 0, 2, 3]),
    ("p", ["source 200", 0, 1, "source 202", 0, 2, 3]),
    ("nnn", ["source 200", 0, 1, "source 201", 0, "source 202", 0, "source 200", 0, 2, 3]),
    ("cn", ["source 200", 0, 1, "reset", "source 201", 2, 3]),
    ("a", ["source 200", 0, 1, "absolute", 2, 3]),
    ("an", ["source 200", 0, 1, "absolute", "source 201", 2, 3]),
    ("aa", ["source 200", 0, 1, "absolute", "relative", 0, 2, 3]),
    ("s", ["source 200", 0, 1, "relative scaled", 0, 2, 3]),
    ("ss", ["source 200", 0, 1, "relative scaled", 0, "relative", 0, 2, 3]),
    ("sa", ["source 200", 0, 1, "relative scaled", 0, "absolute", 2, 3]),
    ("saa", ["source 200", 0, 1, "relative scaled", 0, "absolute", "relative scaled", 0, 2, 3]),
    ("as", ["source 200", 0, 1, "absolute", 2, 3]),
    ("q", ["source 200", 0, 1]),
    ("\x1b", ["source 200", 0, 1]),
    ("rxz1", ["source 200", 0, 1, 2, 3]),
]


@pytest.mark.parametrize(("keys", "asked"), KEYED, ids=[repr(keys) for keys, _ in KEYED])
def test_keys(keys: str, asked: list[Any]) -> None:
    """A new portrait or motion keeps the initial frame, 0, unless space or c asked for another one."""
    session = Session(regular(4), {2: keys})
    session.live.run()
    assert session.model.asked == asked


def test_a_new_initial_frame_stays_for_the_next_portrait() -> None:
    session = Session(regular(4), {1: "c", 3: "n"})
    session.live.run()
    assert session.model.asked == ["source 200", 0, "reset", 1, 2, "source 201", 1, 3]


def test_scale_asked_for_at_the_start_is_kept_through_absolute_motion() -> None:
    session = Session(regular(3), {1: "a", 2: "a"}, adapt_scale=True)
    session.live.run()
    assert session.model.asked == ["source 200", 0, "absolute", 1, "relative scaled", 0, 2]


def test_the_status_follows_the_keys() -> None:
    session = Session(regular(4), {1: "ns", 2: "a", 3: "hp"})
    session.live.run()
    assert [view.status[3:] for view in session.shown.views] == [
        ("relative", False, 1, 3, "", True, False),
        ("relative", True, 2, 3, "", True, False),
        ("absolute", False, 2, 3, "", True, False),
        ("absolute", False, 1, 3, "", True, True),
    ]
    assert [int(view.portrait[0, 0, 0]) for view in session.shown.views] == [200, 201, 201, 200]


def test_the_help_names_every_key_that_does_something() -> None:
    named = {key.strip().lower() for keys, _ in KEYS for key in keys.split(",")}
    assert named == {"q", "esc", "space", "c", "n", "p", "a", "s", "r", "h"}


@pytest.mark.parametrize(
    ("limits", "shown"), [({"frames": 3}, 3), ({"seconds": 0.4}, 4), ({"seconds": 0.375}, 3), ({}, 10)]
)
def test_it_ends_by_itself(limits: dict[str, Any], shown: int) -> None:
    session = Session([5 + time for time in regular(10, 8.0)])  # seconds count from the first frame
    assert len(session.live.run(**limits).latencies) == shown


def test_it_ends_when_told_to() -> None:
    session, stop = Session(regular(10)), threading.Event()
    session.shown.show = lambda view: stop.set() if view.time > 0.35 else None  # type: ignore[method-assign]
    assert len(session.live.run(stop).latencies) == 5


def test_nothing_shown_is_no_error() -> None:
    assert Session([]).live.run()[0::2] == (0.0, 0)


def test_a_source_that_gives_nothing_is_given_up() -> None:
    session = Session([0, 0.1, 8.0, 19.0], patience=10.0)
    with pytest.raises(InputError, match="script gave no picture for 10 s"):
        session.live.run()
    assert session.model.asked == ["source 200", 0, 1, 2] and session.clock.now == pytest.approx(18, abs=0.2)
    session = Session([0, 0.1, 8.0, 19.0])
    assert len(session.live.run().latencies) == 4


def test_a_slow_model_is_not_taken_for_a_silent_source() -> None:
    session = Session([0, 12.1, 24.3], patience=10.0, seconds=12.0)
    assert len(session.live.run().latencies) == 3


def test_keys_are_heeded_while_no_frame_comes() -> None:
    session = Session([0, 1000.0], {1: "q"})
    assert len(session.live.run().latencies) == 1 and session.clock.now < 1


def test_a_recording_has_the_times_of_capture_and_no_pauses(tmp_path: Path) -> None:
    times = [3.0, 3.04, 3.11, 3.5, 4.0, 4.25, 7.0]
    session = Session(times)
    writer = VideoWriter(tmp_path / "out.mp4", 25, SIZE, SIZE, time_base=Fraction(1, 90_000))
    recorder, paused = Recorder(writer), {3: "r", 5: "r"}
    session.live = Live(
        session.capture, session.model, portraits(), [session.shown],  # type: ignore[arg-type]
        lambda: paused.pop(session.capture._taken, ""), recorder, session.clock,
    )  # fmt: skip
    with writer:
        session.live.run()
    with VideoReader(tmp_path / "out.mp4") as reader:
        found = list(reader.timed())
    np.testing.assert_allclose([frame.image.mean() for frame in found], [100, 101, 102, 105, 106], atol=2)
    expected = [0, 0.04, 0.11, 0.15, 2.9]  # after the pause it goes on one frame, 1 / 25 s, later
    assert [float(frame.time) for frame in found] == pytest.approx(expected, abs=2e-4)
    assert [view.status.recording for view in session.shown.views] == [
        *["recording"] * 3, "paused", "paused", "recording", "recording",
    ]  # fmt: skip


def test_until_a_face_is_seen_the_portrait_is_shown_and_nothing_counts(tmp_path: Path) -> None:
    """Then the square of the picture drives, not its middle; and every result is finished before it is shown."""
    session = Session(regular(6))
    writer = VideoWriter(tmp_path / "out.mp4", 10, SIZE, SIZE)

    def squares(image: np.ndarray, time: float) -> Square | None:
        image[:, :20] = 77  # what the middle does not see
        return Square(0, 5, 20) if time > 0.25 else None

    session.live = Live(
        session.capture, session.model, portraits(), [session.shown],  # type: ignore[arg-type]
        recorder=Recorder(writer), clock=session.clock, squares=squares, finish=lambda image: image // 2,
    )  # fmt: skip
    with writer:
        summary = session.live.run()
    assert session.model.asked == ["source 200", 77, 77, 77] and len(summary.latencies) == 3
    views = session.shown.views
    assert [view.status.seen for view in views] == [False] * 3 + [True] * 3
    assert [int(view.result[0, 0, 0]) for view in views] == [100] * 3 + [88] * 3
    assert [int(view.driving[0, SIZE // 2, 0]) for view in views] == [0, 1, 2, 77, 77, 77]
    assert views[2].status.fps == 0 and views[2].status.latency == 0
    with VideoReader(tmp_path / "out.mp4") as reader:
        assert [frame.image.mean().round() for frame in reader.timed()] == pytest.approx([88] * 3, abs=1)
