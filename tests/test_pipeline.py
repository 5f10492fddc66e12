"""The pipeline with a model, a reader and a writer of plain Python, which events hold up where a test wants them."""

from __future__ import annotations

import gc
import signal
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dagan_rt import pipeline
from dagan_rt.errors import InputError
from dagan_rt.pipeline import ROOM, read_ahead, run
from dagan_rt.video import Frame

LONG = 30  # seconds: whoever waits that long waits for something that will never come


def held(ahead: int) -> int:
    """Frames held at most: those that wait for the model, one in its hand, those behind it, one being written."""
    return ROOM + 1 + (ROOM + ahead) + 1


def image(number: int) -> np.ndarray:
    return np.full((2, 2, 3), number % 256, np.uint8)


def clip(count: int, made: Callable[[int], Any] = lambda number: None) -> Iterator[Frame]:
    """Numbered frames; `made` is called before each one."""
    for number in range(count):
        made(number)
        yield Frame(image(number), Fraction(number, 25), Fraction(1, 25))


class Model:
    """Answers 255 - image, and keeps account of what is under way."""

    def __init__(
        self, ahead: int = 1, submitted: Callable[[int], Any] = int, taken: Callable[[int], Any] = int
    ) -> None:
        self.frames = SimpleNamespace(ahead=ahead)
        self._submitted, self._taken = submitted, taken
        self.submissions = self.results = self.most = 0

    def submit(self, frame: np.ndarray) -> Any:
        self._submitted(self.submissions)
        self.submissions += 1
        self.most = max(self.most, self.submissions - self.results)
        return SimpleNamespace(result=lambda: self._result(frame))

    def _result(self, frame: np.ndarray) -> np.ndarray:
        self._taken(self.results)
        self.results += 1
        return 255 - frame[None]


class Events:
    """An event a number: `at(n)` is called by who comes to n, `wait(n)` by who waits for that."""

    def __init__(self, count: int) -> None:
        self._events = [threading.Event() for _ in range(count)]

    def at(self, number: int) -> None:
        self._events[number].set()

    def wait(self, number: int) -> None:
        assert self._events[number].wait(LONG), f"nobody came to {number}"


class Output:
    """A writer that keeps everything, and calls `written` before."""

    def __init__(self, written: Callable[[int], Any] = int) -> None:
        self._written = written
        self.pairs: list[tuple[Frame, np.ndarray]] = []

    def __call__(self, frame: Frame, result: np.ndarray) -> None:
        self._written(len(self.pairs))
        self.pairs.append((frame, result))

    @property
    def numbers(self) -> list[int]:
        """The numbers of the frames, each of which must have come with its own result."""
        for frame, result in self.pairs:
            np.testing.assert_array_equal(result, 255 - frame.image)
        return [int(frame.time * 25) for frame, _ in self.pairs]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before  # threads of other tests may have ended meanwhile


def fail_at(number: int, error: BaseException) -> Callable[[int], None]:
    def fail(current: int) -> None:
        if current == number:
            raise error

    return fail


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_every_frame_comes_out_once_and_in_order(count: int, ahead: int) -> None:
    model, output = Model(ahead), Output()
    summary = run(clip(count), model, output)
    assert output.numbers == list(range(count))
    assert len(summary.model) == count and model.most <= ahead


def test_the_next_frame_is_read_while_the_model_runs() -> None:
    read = Events(6)

    def submitted(number: int) -> None:
        if number < 5:
            read.wait(number + 1)

    output = Output()
    run(clip(6, read.at), Model(submitted=submitted), output)
    assert output.numbers == list(range(6))


def test_a_frame_is_written_while_the_model_runs_the_next() -> None:
    submissions, writes = Events(6), Events(6)

    def submitted(number: int) -> None:
        submissions.at(number)
        if number:
            writes.wait(number - 1)

    def written(number: int) -> None:
        writes.at(number)
        if number < 5:
            submissions.wait(number + 1)

    output = Output(written)
    run(clip(6), Model(submitted=submitted), output)
    assert output.numbers == list(range(6))


@pytest.mark.parametrize("ahead", [2, 3])
def test_as_many_frames_are_under_way_as_the_device_takes(ahead: int) -> None:
    submissions, read, writes = Events(12), Events(12), Events(12)

    def submitted(number: int) -> None:
        submissions.at(number)
        if number >= ahead:
            writes.wait(number - ahead)
        if number + 2 < 12:  # the next frame is there once the one after it is asked for
            read.wait(number + 2)

    def taken(number: int) -> None:
        if number + ahead < 12:
            submissions.wait(number + ahead - 1)

    model, pairs = Model(ahead, submitted, taken), Output()

    def write(frame: Frame, result: np.ndarray) -> None:
        pairs(frame, result)
        writes.at(len(pairs.pairs) - 1)

    run(clip(12, read.at), model, write)
    assert pairs.numbers == list(range(12)) and model.most == ahead


def test_a_result_is_not_held_back_until_the_next_frame() -> None:
    """A reader that waits for the result of its last frame, as a conversation does, is not a deadlock."""
    writes = Events(4)
    output = Output(writes.at)
    run(clip(4, lambda number: number and writes.wait(number - 1)), Model(ahead=3), output)
    assert output.numbers == list(range(4))


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_slow_writer_holds_up_the_reader(ahead: int) -> None:
    """Each write waits until the reader can go no further, and counts what is held then."""
    count, read, output = 60, Events(60), Output()

    def made(number: int) -> None:
        # A frame is made while the ones before it are held: with itself, one more than `held` would be too many.
        assert number - len(output.pairs) < held(ahead)
        read.at(number)

    output._written = lambda number: read.wait(min(number + held(ahead) - 1, count - 1))
    run(clip(count, made), Model(ahead), output)
    assert output.numbers == list(range(count))


@pytest.mark.parametrize("ahead", [1, 4])
def test_memory_stays_flat(ahead: int) -> None:
    alive = most = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def frames() -> Iterator[Frame]:
        nonlocal alive, most
        for frame in clip(1000):
            alive += 1
            most = max(most, alive)
            weakref.finalize(frame.image, gone)
            yield frame
            del frame

    sizes = []

    def write(frame: Frame, result: np.ndarray) -> None:
        if frame.time in (20, 39):  # frames 500 and 975
            sizes.append(tracemalloc.get_traced_memory()[0])

    gc.collect()
    tracemalloc.start()
    try:
        run(frames(), Model(ahead), write)
    finally:
        tracemalloc.stop()
    # A frame more, where a thread's loop variable still has the last one; a time is 8 bytes a frame.
    assert most <= held(ahead) + 3
    assert sizes[1] - sizes[0] < 16_000


@pytest.mark.parametrize("error", [InputError("clip.mp4 is gone"), RuntimeError("reader")])
def test_what_was_read_before_an_error_is_written(error: Exception) -> None:
    output = Output()
    with pytest.raises(type(error)) as raised:
        run(clip(9, fail_at(5, error)), Model(2), output)
    assert raised.value is error and output.numbers == list(range(5))


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("part", ["submitted", "taken"])
def test_what_was_driven_before_an_error_is_written(ahead: int, part: str) -> None:
    error, output = RuntimeError("the device is gone"), Output()
    read: list[int] = []
    with pytest.raises(RuntimeError) as raised:
        run(clip(100, read.append), Model(ahead, **{part: fail_at(5, error)}), output)
    assert raised.value is error and output.numbers == list(range(5))
    assert len(read) <= 6 + held(ahead)


def test_an_error_of_the_writer_stops_everything() -> None:
    error = OSError(28, "No space left on device", "out.mp4")
    read: list[int] = []
    model, output = Model(2), Output(fail_at(5, error))
    with pytest.raises(OSError) as raised:
        run(clip(100, read.append), model, output)
    assert raised.value is error and output.numbers == list(range(5))
    assert model.submissions <= len(read) <= 6 + held(2)


def test_an_error_in_the_last_frame_written_is_not_lost() -> None:
    with pytest.raises(OSError, match="full"):
        run(clip(3), Model(), Output(fail_at(2, OSError("full"))))


def test_a_writer_that_fails_frees_a_model_that_waits_for_it() -> None:
    read = Events(held(1))

    def written(number: int) -> None:
        read.wait(held(1) - 1)  # by now everybody waits for this write
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        run(clip(held(1), read.at), Model(), Output(written))


def test_stop_writes_what_was_submitted() -> None:
    stop, model, output = threading.Event(), Model(3), Output()
    model._submitted = lambda number: number == 7 and stop.set()
    run(clip(100), model, output, stop)
    assert output.numbers == list(range(8)) and model.results == 8


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once the results that wait for the writer are dropped."""
    event, original = threading.Event(), pipeline.Channel.leave

    def leave(channel: Any) -> None:
        original(channel)
        if channel.room != ROOM:  # the one behind the model, which is larger
            event.set()

    monkeypatch.setattr(pipeline.Channel, "leave", leave)
    return event


def test_an_interrupt_drops_what_waits(dropped: threading.Event) -> None:
    """The writer is at its first frame when the model is interrupted: the others are not begun."""
    output = Output(lambda number: dropped.wait(LONG))
    with pytest.raises(KeyboardInterrupt):
        run(clip(100), Model(submitted=fail_at(4, KeyboardInterrupt())), output)
    assert output.numbers in ([], [0])


def test_an_interrupt_while_the_rest_is_written(dropped: threading.Event, interrupt: Callable[[], None]) -> None:
    """Ctrl-C in a main thread that has nothing more to do than to wait for the writer."""
    ended = threading.Event()

    def frames() -> Iterator[Frame]:
        yield from clip(3)
        ended.set()

    def written(number: int) -> None:
        assert ended.wait(LONG)
        while not dropped.wait(0.1):
            interrupt()

    output = Output(written)
    with pytest.raises(KeyboardInterrupt):
        run(frames(), Model(), output)
    assert output.numbers == [0]


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Sends Ctrl-C to the main thread, which may miss one on its way to sleep, but heeds no more than one."""

    def once(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    main, before = threading.main_thread().ident or 0, signal.signal(signal.SIGINT, once)
    yield lambda: signal.pthread_kill(main, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


class Clock:
    """A clock that stands still but for `advance`."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("part", ["reading", "model", "writing"])
@pytest.mark.parametrize("ahead", [1, 2])
def test_each_part_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch, part: str, ahead: int) -> None:
    """Only one part takes time: the others must see none of it, although they wait for it."""
    clock = Clock()
    monkeypatch.setattr(pipeline, "time", clock)
    # One lets the others do what they have to do, which takes no time, before time goes on.
    parts: dict[str, Callable[[int], Any]] = dict.fromkeys(("reading", "model", "writing"), lambda number: None)
    written = Events(8)

    def takes_time(number: int) -> None:
        if part == "reading" and number:
            written.wait(number - 1)
        clock.advance(2)

    parts[part] = takes_time
    count = 8 if part == "reading" else 1
    output = Output(parts["writing"])

    def write(frame: Frame, result: np.ndarray) -> None:
        output(frame, result)
        written.at(len(output.pairs) - 1)

    summary = run(clip(count, parts["reading"]), Model(ahead, taken=parts["model"]), write)
    busy = {"reading": 0.0, "model": 0.0, "writing": 0.0} | {part: 1.0}
    assert summary.busy() == pytest.approx(busy) and summary.wall == pytest.approx(2.0 * count)


def test_the_time_of_a_frame_begins_when_the_one_before_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two frames under way, each result 3 s after the one before: 3 s a frame, not 6."""
    clock, read = Clock(), Events(12)
    monkeypatch.setattr(pipeline, "time", clock)
    model = Model(2, lambda number: number + 2 < 12 and read.wait(number + 2), lambda number: clock.advance(3))
    summary = run(clip(12, read.at), model, Output())
    assert model.most == 2 and list(summary.model) == [3.0] * 12


def test_reading_ahead() -> None:
    made = Events(10)
    with read_ahead(clip(10, made.at)) as frames:
        assert int(next(frames).time * 25) == 0
        made.wait(ROOM)  # without being asked for
        assert [int(frame.time * 25) for frame in frames] == list(range(1, 10))


def test_reading_ahead_may_be_left_at_any_time() -> None:
    made: list[int] = []
    with read_ahead(clip(1000, made.append)) as frames:
        next(frames)
    assert len(made) <= ROOM + 2
    with pytest.raises(RuntimeError, match="mine"), read_ahead(clip(1000)) as frames:
        raise RuntimeError("mine")


def test_an_error_while_reading_ahead_comes_after_the_good_items() -> None:
    error, seen = InputError("damaged"), []
    with pytest.raises(InputError) as raised, read_ahead(clip(9, fail_at(4, error))) as frames:
        seen.extend(frame.time * 25 for frame in frames)
    assert raised.value is error and seen == [0, 1, 2, 3]
