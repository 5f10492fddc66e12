"""Many streams over a device of plain arithmetic that stops, fails and gets lost when a test says so.

An image here is one level: what comes out holds the source's level, the initial frame's and the driving frame's in its
first three pixels, so that every result tells what it was made of. Nothing waits for a clock: tests open gates.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagan_rt import DeviceLost, InputError, Reenactor, Streams
from dagan_rt.frames import Times
from dagan_rt.keypoints import KeyPoints
from dagan_rt.streams import QueueFull, Result, _Schedule

SIZE = 8
PATIENCE = 20  # seconds before a test that hangs fails


class Device:
    """`Frames` that check how they are used."""

    size = SIZE
    slot_bytes, fixed_bytes = 1_000_000, 5_000_000
    device = "imagined"

    def __init__(self, slots: int = 8, batches: Sequence[int] = (1, 2, 4), ahead: int = 2) -> None:
        self.slots, self.batches, self.ahead = slots, tuple(batches), ahead
        self.sources: list[int | None] = [None] * slots
        self.initial: list[int | None] = [None] * slots
        self.batched: list[list[tuple[int, int]]] = []  # (source, frame) of every batch, as submitted
        self.busy = [0] * slots  # frames pending
        self.pending = 0
        self.gate = open_gate()  # results wait here
        self.preparing = open_gate()  # sources wait here
        self.beginning = open_gate()  # initial frames wait here
        self.fails: Callable[[str, int], Exception | None] = lambda what, level: None
        self.misused: list[str] = []
        self.closed = False
        self._preparing = threading.Lock()
        self._counting = threading.Lock()

    def set_source(self, slot: int, image: np.ndarray) -> None:
        with self._alone(slot, "set_source"):
            assert self.preparing.wait(PATIENCE)
            self._fail("source", image[0, 0, 0])
            self.sources[slot], self.initial[slot] = int(image[0, 0, 0]), None

    def begin(self, slot: int, frame: np.ndarray | None, adapt_scale: bool = False, motion_scale: float = 1.0) -> None:
        with self._alone(slot, "begin"):
            if frame is not None:
                assert self.beginning.wait(PATIENCE)
                self._fail("begin", frame[0, 0, 0])
            self.initial[slot] = self.sources[slot] if frame is None else int(frame[0, 0, 0])

    def submit(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Answer:
        levels = [int(frame[0, 0, 0]) for frame in frames]
        self.batched.append([(self.sources[slot] or 0, level) for slot, level in zip(slots, levels, strict=True)])
        if len(slots) > self.batches[-1]:
            self.misused.append(f"{len(slots)} frames at once")
        for level in levels:
            self._fail("submit", level)
        with self._counting:
            self.pending += 1
            if self.pending > self.ahead:
                self.misused.append("too many batches ahead")
            for slot in slots:
                self.busy[slot] += 1
        return Answer(self, list(slots), levels)

    def keypoints(self, image: np.ndarray) -> KeyPoints:
        with self._alone(0, "keypoints"):
            return KeyPoints(np.full((1, 2, 2), image[0, 0, 0], np.float32), np.zeros((1, 2, 2, 2), np.float32))

    def timed(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Times:
        raise NotImplementedError

    def stages(self, batch: int) -> Mapping[str, Callable[[], None]]:
        return {}

    def close(self) -> None:
        if self.pending:
            self.misused.append("closed with batches under way")
        self.closed = True

    def _fail(self, what: str, level: Any) -> None:
        if (error := self.fails(what, int(level))) is not None:
            raise error

    def _alone(self, slot: int, what: str) -> Any:
        if self.busy[slot] or self.closed:
            self.misused.append(f"{what} on slot {slot}, of which frames are under way")
        if self._preparing.locked():
            self.misused.append(f"{what} during another")
        return self._preparing


class Answer:
    def __init__(self, device: Device, slots: list[int], levels: list[int]) -> None:
        self.device, self.slots, self.levels = device, slots, levels

    def done(self) -> bool:
        return self.device.gate.is_set()

    def result(self) -> np.ndarray:
        device = self.device
        assert device.gate.wait(PATIENCE)
        images = np.zeros((len(self.slots), SIZE, SIZE, 3), np.uint8)
        for image, slot, level in zip(images, self.slots, self.levels, strict=True):
            image[0, :3] = np.array([device.sources[slot], device.initial[slot], level])[:, None]
        with device._counting:
            device.pending -= 1
            for slot in self.slots:
                device.busy[slot] -= 1
        for level in self.levels:
            device._fail("result", level)
        return images


def open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


def picture(level: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), level, np.uint8)


def shown(result: Any) -> tuple[int, int, int]:
    """Source, initial frame and driving frame of a result."""
    source, initial, driving = result.image[0, :3, 0]
    return int(source), int(initial), int(driving)


def pull(stream: Any) -> Any:
    return stream.pull(timeout=PATIENCE)


def until(condition: Callable[[], Any]) -> None:
    """Wait for what other threads bring about."""
    waited = threading.Event()
    for _ in range(PATIENCE * 500):
        if condition():
            return
        waited.wait(0.002)
    raise AssertionError("it never came about")


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    assert not device.misused


@pytest.fixture
def make(device: Device) -> Iterator[Callable[..., Streams]]:
    """`make(**options)`: streams on the device, without a deadline unless the test has one."""
    opened: list[Streams] = []

    def make(frames: Any = device, **options: Any) -> Streams:
        opened.append(Streams(frames, **{"deadline": 0, "queue": 8, **options}))
        return opened[-1]

    yield make
    for gate in (device.gate, device.preparing, device.beginning):
        gate.set()
    for streams in opened:
        streams.close()
        assert not any(thread.is_alive() for thread in streams._threads)


# ---------------------------------------------------------------------------------------------------------------------
# order and contents


def test_frames_come_back_in_order_from_their_own_session(make: Any) -> None:
    streams = make()
    opened = [streams.open(picture(level)) for level in (10, 20, 30)]
    for number in range(5):
        for place, stream in enumerate(opened):
            assert stream.push(picture(100 + 10 * place + number)) == number
    for place, stream in enumerate(opened):
        for number in range(5):
            result = pull(stream)
            assert result.number == number and result.latency >= 0
            assert shown(result) == (10 * (place + 1), 100 + 10 * place, 100 + 10 * place + number)
    assert streams.stats[:5] == (15, 15, 0, 0, 0)
    assert opened[0].stats[:5] == (5, 5, 0, 0, 0) and opened[0].stats.p50 <= opened[0].stats.p99


def test_absolute_motion_begins_with_the_source(make: Any) -> None:
    stream = make().open(picture(10), motion="absolute")
    stream.push(picture(100))
    assert shown(pull(stream)) == (10, 10, 100)
    stream.reset()
    stream.push(picture(101))
    assert shown(pull(stream)) == (10, 10, 101)


def test_a_pushed_frame_may_be_changed_at_once_and_a_result_is_ones_own(make: Any) -> None:
    stream = make().open(picture(10))
    frame = picture(100)
    stream.push(frame)
    frame[:] = 7
    result = pull(stream)
    assert shown(result) == (10, 100, 100)
    for level in range(20):
        stream.push(picture(level))
        pull(stream)
    assert shown(result) == (10, 100, 100)


def test_reset_begins_anew(make: Any) -> None:
    stream = make().open(picture(10))
    stream.push(picture(100))
    stream.push(picture(101))
    stream.reset()
    assert stream.push(picture(102)) == 2
    assert [shown(pull(stream)) for _ in range(3)] == [(10, 100, 100), (10, 100, 101), (10, 102, 102)]


def test_results_can_be_iterated_until_the_stream_is_closed(make: Any) -> None:
    stream = make().open(picture(10))
    numbers: list[int] = []
    reader = threading.Thread(target=lambda: numbers.extend(result.number for result in stream))
    reader.start()
    for number in range(4):
        stream.push(picture(number))
    until(lambda: len(numbers) == 4)
    stream.close()
    reader.join(PATIENCE)
    assert numbers == [0, 1, 2, 3] and not reader.is_alive()


# ---------------------------------------------------------------------------------------------------------------------
# batches


def waiting(pushed: float, begun: bool = True) -> Any:
    return SimpleNamespace(pushed=pushed, session=SimpleNamespace(begun=begun))


def queue_of(*frames: Any) -> Any:
    class Queue:  # what the schedule knows of a stream
        _waiting = deque(frames)

    return Queue()


def test_a_batch_waits_for_its_deadline_only() -> None:
    schedule = _Schedule(batch=3, deadline=5.0)
    assert schedule.due(now=0, streams=9) is None
    schedule.refresh(queue_of(waiting(100)))
    schedule.refresh(queue_of(waiting(98)))
    assert schedule.due(now=101, streams=9) == 2
    assert schedule.due(now=103, streams=9) == 0 and schedule.due(now=200, streams=9) == 0
    assert schedule.due(now=101, streams=2) == 0  # nobody else can come
    schedule.refresh(queue_of(waiting(101)))
    assert schedule.due(now=101, streams=9) == 0  # full


def test_streams_go_round_and_none_is_passed_over() -> None:
    schedule = _Schedule(batch=2, deadline=0)
    busy, calm, third = queue_of(*map(waiting, range(5))), queue_of(waiting(7)), queue_of(waiting(8), waiting(9))
    for queue in (busy, calm, third):
        schedule.refresh(queue)
    assert [[frame.pushed for frame in schedule.take()] for _ in range(4)] == [[0, 7], [8, 1], [9, 2], [3, 4]]
    assert schedule.ready == 0 and not schedule.take()


def test_a_frame_that_cannot_be_driven_yet_stops_those_behind_it() -> None:
    schedule = _Schedule(batch=9, deadline=0)
    queue = queue_of(waiting(0), waiting(1, begun=False), waiting(2))
    schedule.refresh(queue)
    assert schedule.ready == 1 and [frame.pushed for frame in schedule.take()] == [0]
    queue._waiting[0].session.begun = True
    schedule.refresh(queue)
    assert [frame.pushed for frame in schedule.take()] == [1, 2]


def test_frames_of_all_streams_share_a_batch_while_the_device_is_busy(device: Device, make: Any) -> None:
    streams = make()
    opened = [streams.open(picture(level), motion="absolute") for level in (1, 2, 3)]
    device.gate.clear()
    for level in (50, 51):  # two batches under way, which is all that may be
        opened[0].push(picture(level))
        until(lambda level=level: len(device.batched) == level - 49)
    for level in (60, 61):
        for stream in opened:
            stream.push(picture(level))
    device.gate.set()
    for stream, count in zip(opened, (4, 2, 2), strict=True):
        results = [pull(stream) for _ in range(count)]
        assert [result.number for result in results] == list(range(count))
        assert all(result.image.base is None for result in results[-2:])  # no view that keeps a whole batch
    assert device.batched[2:] == [[(1, 60), (2, 60), (3, 60), (1, 61)], [(2, 61), (3, 61)]]


def test_without_a_partner_a_frame_waits_until_others_are_there(device: Device, make: Any) -> None:
    streams = make(deadline=1e6)
    first, second = (streams.open(picture(level), motion="absolute") for level in (1, 2))
    first.push(picture(50))
    assert device.batched == []
    second.push(picture(60))
    assert (shown(pull(first)), shown(pull(second))) == ((1, 1, 50), (2, 2, 60))
    assert device.batched == [[(1, 50), (2, 60)]]
    first.push(picture(51))
    second.close()  # now nobody else can come
    assert shown(pull(first)) == (1, 1, 51)


# ---------------------------------------------------------------------------------------------------------------------
# who is slow loses the oldest


def test_the_oldest_waiting_frame_gives_way(device: Device, make: Any) -> None:
    streams = make(queue=2)
    stream, other = (streams.open(picture(level), motion="absolute") for level in (1, 2))
    device.gate.clear()
    for level in (50, 51):
        stream.push(picture(level))
        until(lambda level=level: len(device.batched) == level - 49)
    for level in range(52, 60):
        stream.push(picture(level))
    other.push(picture(70))
    device.gate.set()
    until(lambda: stream.stats.driven == 4)
    assert [(pull(stream).number) for _ in range(2)] == [8, 9]  # of 0, 1, 8 and 9, the last two that were driven
    assert shown(pull(other)) == (2, 2, 70)
    assert stream.stats[:5] == (10, 4, 6, 2, 0) and other.stats[:5] == (1, 1, 0, 0, 0)


def test_a_consumer_that_stops_reading_grows_nothing(device: Device, make: Any) -> None:
    streams = make(queue=2)
    idle, other = streams.open(picture(1)), streams.open(picture(2))
    for number in range(60):
        idle.push(picture(number))
        other.push(picture(number))
        assert pull(other).number == number
    until(lambda: idle.stats.driven + idle.stats.dropped_in == 60)
    assert len(idle._results) == 2 and len(idle._waiting) == 0
    assert len(idle._buffers) <= 4 and len(other._buffers) <= 4
    stats = idle.stats
    assert stats.dropped_out == stats.driven - 2 and other.stats[:5] == (60, 60, 0, 0, 0)
    assert [pull(idle).number for _ in range(2)][1] == 59


def test_the_initial_frame_counts_even_if_it_is_dropped(device: Device, make: Any) -> None:
    stream = make(queue=2).open(picture(1))
    device.beginning.clear()
    for level in range(50, 55):
        stream.push(picture(level))
    device.beginning.set()
    assert [shown(pull(stream)) for _ in range(2)] == [(1, 50, 53), (1, 50, 54)]


# ---------------------------------------------------------------------------------------------------------------------
# opening, closing and new sources stall nobody


def test_others_go_on_while_sources_and_initial_frames_are_computed(device: Device, make: Any) -> None:
    streams = make()
    running, renewed = streams.open(picture(1)), streams.open(picture(2))
    running.push(picture(50))
    pull(running)
    device.preparing.clear()
    callers = [
        threading.Thread(target=renewed.set_source, args=(picture(3),)),
        threading.Thread(target=streams.open, args=(picture(4),)),
    ]
    for caller in callers:
        caller.start()
    until(device._preparing.locked)
    for level in range(60, 70):
        running.push(picture(level))
        assert shown(pull(running)) == (1, 50, level)
    device.preparing.set()
    for caller in callers:
        caller.join(PATIENCE)
    device.beginning.clear()
    renewed.push(picture(90))
    until(device._preparing.locked)
    running.push(picture(70))
    assert shown(pull(running)) == (1, 50, 70)
    free = len(streams._free)
    another = threading.Thread(target=running.reset)  # waits for the initial frame that is being computed
    another.start()
    until(lambda: len(streams._free) < free)
    device.beginning.set()
    another.join(PATIENCE)
    assert shown(pull(renewed)) == (3, 90, 90)


def test_a_new_source_waits_for_no_frame_and_changes_none(device: Device, make: Any) -> None:
    stream = make().open(picture(1))
    stream.push(picture(50))
    assert shown(pull(stream)) == (1, 50, 50)
    device.gate.clear()
    for level in range(51, 55):
        stream.push(picture(level))
    stream.set_source(picture(2))
    for level in range(60, 63):
        stream.push(picture(level))
    device.gate.set()
    found = [shown(pull(stream)) for _ in range(7)]
    assert found == [(1, 50, level) for level in range(51, 55)] + [(2, 60, level) for level in range(60, 63)]


def test_slots_come_back(device: Device, make: Any) -> None:
    streams = make(most=3)
    for round_ in range(10):
        opened = [streams.open(picture(level)) for level in (1, 2, 3)]
        for stream in opened:
            stream.push(picture(round_))
            stream.set_source(picture(9))
            stream.push(picture(100 + round_))
            stream.reset()
        opened[0].close()
        opened[0].close()
        for stream in opened[1:]:
            assert shown(pull(stream))[1:] == (round_, round_)
            stream.close()
    until(lambda: len(streams._free) == device.slots)
    assert sorted(streams._free) == list(range(device.slots))


def test_a_closed_stream_leaves_what_is_there_and_takes_nothing(device: Device, make: Any) -> None:
    streams = make()
    stream = streams.open(picture(1))
    stream.push(picture(50))
    until(lambda: stream.stats.driven == 1)
    device.gate.clear()
    stream.push(picture(51))
    until(lambda: len(device.batched) == 2)
    stream.push(picture(52))
    stream.close()
    device.gate.set()
    assert pull(stream).number == 0 and pull(stream) is None and list(stream) == []
    for call in (stream.push, stream.set_source):
        with pytest.raises(InputError, match="this stream is closed: open another one"):
            call(picture(1))
    with pytest.raises(InputError, match="closed"):
        stream.reset()
    until(lambda: len(streams._free) == device.slots)
    assert streams.stats.pushed == streams.stats.driven + streams.stats.dropped_in == 3


def test_all_can_be_closed_while_everything_runs(device: Device, make: Any) -> None:
    streams = make()
    opened = [streams.open(picture(level)) for level in (1, 2, 3)]
    device.gate.clear()
    for level in range(50, 60):
        for stream in opened:
            stream.push(picture(level))
    reader = threading.Thread(target=list, args=(opened[0],))
    opener = threading.Thread(target=_quietly, args=(streams.open, picture(4)))
    device.preparing.clear()
    opener.start()
    reader.start()
    closer = threading.Thread(target=streams.close)
    closer.start()
    until(lambda: streams._ended is not None)
    device.gate.set()
    device.preparing.set()
    for thread in (closer, reader, opener):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert not device.closed  # it is the caller's
    with pytest.raises(InputError, match="the streams are closed"):
        streams.open(picture(1))
    with pytest.raises(InputError, match="closed"):
        opened[0].push(picture(1))


def _quietly(call: Callable[..., Any], *arguments: Any) -> None:
    with contextlib.suppress(InputError):
        call(*arguments)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_an_interrupt_ends_a_waiting_pull_and_the_threads(device: Device) -> None:
    main = threading.main_thread()
    if threading.current_thread() is not main:
        pytest.skip("signals come to the main thread")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        until(lambda: stream._arrived._waiters)  # type: ignore[attr-defined]
        signal.pthread_kill(main.ident or 0, signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt), Streams(device) as streams:
            stream = streams.open(picture(1))
            threading.Thread(target=interrupt, daemon=True).start()
            pull(stream)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(thread.is_alive() for thread in streams._threads)
    assert pull(stream) is None


# ---------------------------------------------------------------------------------------------------------------------
# errors


def test_a_full_house_says_how_to_get_more(device: Device, make: Any) -> None:
    streams = make(most=2)
    first = streams.open(picture(1))
    streams.open(picture(2))
    with pytest.raises(InputError, match=r"all 2 streams are open: close one, or make room for more with Streams"):
        streams.open(picture(3))
    first.close()
    streams.open(picture(3))
    assert streams._taken == 2


def test_a_wrong_frame_is_refused_in_its_push_alone(make: Any) -> None:
    streams = make()
    stream, other = streams.open(picture(1)), streams.open(picture(2))
    stream.push(picture(50))
    with pytest.raises(InputError, match=r"frame must be uint8 \[H, W, 3\] = \(8, 8, 3\), got uint8 \(9, 8, 3\)"):
        stream.push(np.zeros((9, 8, 3), np.uint8))
    with pytest.raises(InputError, match="image must be .* got NoneType"):
        stream.set_source(None)
    with pytest.raises(InputError, match="source must be"):
        streams.open(picture(1)[:, :, 0])
    other.push(picture(60))
    assert stream.push(picture(51)) == 1
    assert [shown(pull(stream)) for _ in range(2)] == [(1, 50, 50), (1, 50, 51)]
    assert shown(pull(other)) == (2, 60, 60)


@pytest.mark.parametrize("where", ["submit", "result"])
@pytest.mark.parametrize("kind", [InputError, RuntimeError])
def test_a_failed_batch_is_told_to_its_streams_alone(device: Device, make: Any, where: str, kind: Any) -> None:
    streams = make(deadline=1e6)
    one, two = (streams.open(picture(level), motion="absolute") for level in (1, 2))
    device.fails = lambda what, level: kind("a bad day") if (what, level) == (where, 66) else None
    for level in (65, 66, 67):
        one.push(picture(level))
        two.push(picture(level + 100))
        if level == 66:
            for stream in (one, two):
                with pytest.raises(kind, match="frame 1 was not driven: a bad day"):
                    pull(stream)
        else:
            assert (shown(pull(one))[2], shown(pull(two))[2]) == (level, level + 100)
    assert one.stats.errors == two.stats.errors == 1 and streams.stats.errors == 2
    assert where != "submit" or not device.pending


def test_a_frame_that_motion_cannot_begin_with_gives_way_to_the_next(device: Device, make: Any) -> None:
    stream = make().open(picture(1), adapt_scale=True)
    device.fails = lambda what, level: InputError("spans no area") if what == "begin" and level < 52 else None
    device.beginning.clear()
    for level in (50, 51, 52, 53):
        stream.push(picture(level))
    device.beginning.set()
    for number in (0, 1):
        with pytest.raises(InputError, match=f"frame {number} was not driven: spans no area"):
            pull(stream)
    assert [shown(pull(stream)) for _ in range(2)] == [(1, 52, 52), (1, 52, 53)]
    stream.reset()
    stream.push(picture(50))
    with pytest.raises(InputError, match="frame 4"):
        pull(stream)
    stream.push(picture(60))
    assert shown(pull(stream)) == (1, 60, 60)


@pytest.mark.parametrize("where", ["source", "begin", "submit", "result"])
def test_a_lost_device_ends_every_stream_and_can_be_closed(device: Device, make: Any, where: str) -> None:
    streams = make()
    one, two = streams.open(picture(1)), streams.open(picture(2))
    two.push(picture(50))
    assert pull(two).number == 0
    device.fails = lambda what, level: DeviceLost("the GPU fell off the bus") if what == where else None
    if where == "source":
        with pytest.raises(DeviceLost, match="fell off"):
            one.set_source(picture(3))
    one_or_other = one if where == "begin" else two
    try:
        one_or_other.push(picture(51))
    except DeviceLost:
        assert where == "source"
    for call in (lambda: pull(one), lambda: pull(two), lambda: streams.open(picture(1)), lambda: one.push(picture(1))):
        with pytest.raises(DeviceLost, match="the GPU fell off the bus"):
            call()
    streams.close()


@pytest.mark.parametrize("error", [InputError("too little memory: close a stream"), MemoryError()])
def test_a_stream_without_memory_harms_no_other(device: Device, make: Any, error: Exception) -> None:
    streams = make(most=2)
    stream = streams.open(picture(1))
    device.fails = lambda what, level: error if (what, level) == ("source", 9) else None
    for _ in range(20):  # more often than there are slots
        with pytest.raises(InputError, match="too little memory .*close a stream|too little memory: close a stream"):
            streams.open(picture(9))
        with pytest.raises(InputError, match="too little memory"):
            stream.set_source(picture(9))
    stream.push(picture(50))
    assert shown(pull(stream)) == (1, 50, 50)
    streams.open(picture(2))


def test_an_error_that_nobody_foresaw_is_told(device: Device, make: Any) -> None:
    streams = make()
    stream = streams.open(picture(1), motion="absolute")
    device.submit = lambda slots, frames: SimpleNamespace(done=lambda: False, result=lambda: 7)  # type: ignore[method-assign,return-value,assignment]
    stream._deliver = None  # type: ignore[method-assign,assignment]
    stream.push(picture(2))
    with pytest.raises(RuntimeError, match="not callable"):
        pull(stream)


def test_pull_waits_no_longer_than_it_is_told(make: Any) -> None:
    stream = make().open(picture(1))
    with pytest.raises(TimeoutError, match="no result came within 0 seconds"):
        stream.pull(timeout=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"most": 0}, "most must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"queue": 0}, "queue must be at least 1, got 0"),
        ({"deadline": -1}, "deadline must be 0 to 1e6 seconds, got -1"),
        ({"frames": Device(slots=1)}, "at least 2 slots, got 1"),
    ],
)
def test_wrong_options_are_refused(make: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"motion": "sideways"},
        {"motion": "absolute", "adapt_scale": True},
        {"motion": "absolute", "motion_scale": 0.5},
        {"motion_scale": 4.1},
    ],
)
def test_wrong_motion_is_refused(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="motion"):
        make().open(picture(1), **options)


def test_the_report_says_what_it_costs(make: Any) -> None:
    streams = make(most=5)
    stream = streams.open(picture(1))
    stream.push(picture(2))
    pull(stream)
    report = streams.report()
    for words in ("imagined", "1 open of at most 5", "1.0 MB a stream; 8.0 MB for all 8 slots, 5.0 MB for everything",
                  "1 pushed, 1 driven", "of 1, 2, 4; 2 at once", "1.0 frames on average", "p99"):  # fmt: skip
        assert words in report


# ---------------------------------------------------------------------------------------------------------------------
# anything goes


def _through(stats: Any) -> bool:
    return bool(stats.pushed == stats.driven + stats.dropped_in)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "push", "pull", "source", "reset", "close", "open", "hold", "go"]),
        st.integers(0, 3),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, batch=st.integers(1, 4), ahead=st.integers(1, 3), queue=st.integers(1, 3))
def test_whatever_happens_results_ascend_and_show_what_they_should(
    actions: list[tuple[str, int]], batch: int, ahead: int, queue: int
) -> None:
    device = Device(slots=12, ahead=ahead)
    levels = iter(range(10**6))
    with Streams(device, most=4, batch=batch, deadline=0, queue=queue) as streams:
        opened: list[Any] = [streams.open(picture(200))]
        expected: dict[Any, list[tuple[int, int, int]]] = {opened[0]: []}  # of every frame pushed: what it shows
        state: dict[Any, list[Any]] = {opened[0]: [200, None]}  # its source and initial frame
        last = dict.fromkeys(opened, -1)
        for action, which in actions:
            stream = opened[which % len(opened)]
            if action == "open" and len(opened) < 4:
                stream = streams.open(picture(200 + len(opened)))
                opened.append(stream)
                expected[stream], state[stream], last[stream] = [], [200 + len(opened) - 1, None], -1
            elif action == "hold":
                device.gate.clear()
            elif action == "go":
                device.gate.set()
            elif action == "push" and not stream._closed:
                level = next(levels) % 200
                state[stream][1] = level if state[stream][1] is None else state[stream][1]
                assert stream.push(picture(level)) == len(expected[stream])
                expected[stream].append((*state[stream], level))
            elif action in ("source", "reset") and not stream._closed:
                device.gate.set()  # it waits for a free slot if many are under way
                if action == "source":
                    state[stream][0] = 201 + which
                    stream.set_source(picture(201 + which))
                else:
                    stream.reset()
                state[stream][1] = None
            elif action == "close":
                stream.close()
            elif action == "pull":
                try:
                    result = stream.pull(timeout=0)
                except TimeoutError:
                    continue
                if result is not None:
                    assert result.number > last[stream] and shown(result) == expected[stream][result.number]
                    last[stream] = result.number
        device.gate.set()
        for stream in opened:
            until(lambda stream=stream: _through(stream.stats))
            newest = -1 if stream._closed else len(expected[stream]) - 1  # which nothing may drop
            stream.close()
            for result in stream:
                assert result.number > last[stream] and shown(result) == expected[stream][result.number]
                last[stream] = result.number
            assert last[stream] >= newest
        until(lambda: len(streams._free) == device.slots)
    stats = streams.stats
    assert stats.errors == 0 and stats.pushed == stats.driven + stats.dropped_in
    assert sorted(streams._free) == list(range(device.slots)) and not device.misused


# ---------------------------------------------------------------------------------------------------------------------
# a real network


def test_what_a_backend_has_of_its_own_is_used_and_closed(tiny_bundle: Path) -> None:
    opened: list[Device] = []

    def frames(slots: int, batches: Sequence[int]) -> Device:
        opened.append(Device(slots, batches, ahead=3))
        return opened[-1]

    backend: Any = SimpleNamespace(name="own", frames=frames, largest_batch=6)
    with Streams(tiny_bundle, backend, most=20, batch=32) as streams:
        (device,) = opened
        assert (device.slots, device.batches, streams.most) == (20 + 2, (1, 2, 4, 6), 20)
        assert "own (given by the caller)" in streams.report()
        streams.open(picture(1)).push(picture(2))
    assert device.closed and not device.misused


def test_streams_show_what_as_many_reenactors_show(tiny_bundle: Path) -> None:
    rng = np.random.default_rng(0)
    sources = rng.integers(0, 256, (5, 64, 64, 3)).astype(np.uint8)
    clips = rng.integers(0, 256, (5, 4, 64, 64, 3)).astype(np.uint8)
    options: list[dict[str, Any]] = [
        {}, {"motion": "absolute"}, {"adapt_scale": True}, {"motion_scale": 0.5},
        {"motion_scale": 2.0, "adapt_scale": True},
    ]  # fmt: skip
    with Streams(tiny_bundle, backend="onnxruntime", most=5, queue=4, threads=1) as streams:
        assert streams._schedule.batch == 1 and "onnxruntime (asked for by name)" in streams.report()
        opened = [streams.open(source, **option) for source, option in zip(sources, options, strict=True)]
        for number in range(4):
            for stream, clip in zip(opened, clips, strict=True):
                stream.push(clip[number])
        found = [[pull(stream).image for _ in range(4)] for stream in opened]
    for source, clip, option, images in zip(sources, clips, options, found, strict=True):
        reenactor = Reenactor(tiny_bundle, "onnxruntime", threads=1, **option)
        reenactor.set_source(source)
        for frame, image in zip(clip, images, strict=True):
            np.testing.assert_array_equal(image, reenactor.drive(frame))


# ----------------------------------------------------------------------------------------------------------------------
# results that are delivered


def test_each_frame_is_delivered_once_and_in_order(device: Device, make: Any) -> None:
    stream = make(queue=4).open(picture(7))
    delivered: list[Any] = []
    for level in range(20):
        until(lambda: stream.room)
        stream.push(picture(level), delivered.append)
    until(lambda: len(delivered) == 20)
    assert [it.number for it in delivered] == list(range(20))
    assert [shown(it) for it in delivered] == [(7, 0, level) for level in range(20)]
    with pytest.raises(TimeoutError):
        stream.pull(timeout=0.01)  # nothing is left where nobody looks


def test_a_full_queue_refuses_what_would_be_delivered_and_drops_nothing(device: Device, make: Any) -> None:
    streams = make(queue=3, batch=1)
    stream = streams.open(picture(7))
    delivered: list[Any] = []
    device.gate.clear()
    for level in range(device.ahead):  # under way
        stream.push(picture(level), delivered.append)
        until(lambda: len(device.batched) == level + 1)  # noqa: B023
    for level in range(device.ahead, device.ahead + 3):
        assert stream.room == 3 + device.ahead - level
        stream.push(picture(level), delivered.append)
    assert stream.room == 0
    with pytest.raises(QueueFull, match="3 frames of this stream wait already"):
        stream.push(picture(99), delivered.append)
    device.gate.set()
    until(lambda: len(delivered) == device.ahead + 3)
    assert [shown(it)[2] for it in delivered] == list(range(device.ahead + 3))
    assert stream.stats.dropped_in == 0


@pytest.mark.parametrize("end", ["the stream", "all streams"])
def test_what_waits_is_told_when_it_ends(device: Device, make: Any, end: str) -> None:
    streams = make(queue=3, batch=1)
    stream = streams.open(picture(7))
    delivered: list[Any] = []
    device.gate.clear()
    for level in range(device.ahead + 3):
        stream.push(picture(level), delivered.append)
        until(lambda: len(device.batched) == min(level + 1, device.ahead))  # noqa: B023
    closing = threading.Thread(target=stream.close if end == "the stream" else streams.close)
    closing.start()
    until(lambda: len(delivered) == 3)
    assert all(isinstance(it, InputError) for it in delivered)
    device.gate.set()
    closing.join(PATIENCE)
    until(lambda: len(delivered) == device.ahead + 3)  # the others were under way, and come
    assert [shown(it)[2] for it in delivered[3:]] == list(range(device.ahead))


@pytest.mark.parametrize("where", ["submit", "result", "begin"])
@pytest.mark.parametrize("error", [RuntimeError("broke"), DeviceLost("it is gone")])
def test_what_goes_wrong_is_delivered(device: Device, make: Any, where: str, error: Exception) -> None:
    stream = make().open(picture(7))
    delivered: list[Any] = []
    device.fails = lambda what, level: error if (what, level) == (where, 5) else None
    stream.push(picture(5), delivered.append)
    until(lambda: delivered)
    assert isinstance(delivered[0], Exception) and str(error) in str(delivered[0])
    if isinstance(error, DeviceLost):
        with pytest.raises(DeviceLost):
            stream.push(picture(6), delivered.append)
    else:
        stream.push(picture(6), delivered.append)
        until(lambda: len(delivered) == 2)
        assert isinstance(delivered[1], Result)
    assert len(delivered) == (1 if isinstance(error, DeviceLost) else 2)


def test_key_points_are_found_beside_the_streams(device: Device, make: Any) -> None:
    streams = make()
    stream = streams.open(picture(7))
    assert streams.keypoints(picture(9)).value.tolist() == [[[9, 9], [9, 9]]]
    stream.push(picture(5))
    assert shown(pull(stream)) == (7, 5, 5)
    with pytest.raises(InputError, match="uint8"):
        streams.keypoints(picture(9)[:4])


def test_time_is_split_into_waiting_and_computing(device: Device, make: Any) -> None:
    streams = make(batch=1)
    stream = streams.open(picture(7))
    latencies = []
    for level in range(3):
        stream.push(picture(level))
        latencies.append(pull(stream).latency)
    for stats in (stream.stats, streams.stats):
        assert stats.queue > 0 and stats.compute > 0
        assert stats.queue + stats.compute == pytest.approx(sum(latencies))
    assert streams.batches == 3


def test_what_is_ready_at_once_does_not_overtake(device: Device, make: Any) -> None:
    stream = make(batch=1).open(picture(7), motion="absolute")
    device.gate.clear()
    stream.push(picture(1))
    until(lambda: len(device.batched) == 1)
    submit = device.submit

    def ready(slots: Sequence[int], frames: Sequence[np.ndarray]) -> Any:
        answer = submit(slots, frames)

        def result() -> np.ndarray:
            closed, device.gate = device.gate, open_gate()
            try:
                return answer.result()
            finally:
                device.gate = closed

        return SimpleNamespace(done=lambda: True, result=result)

    device.submit = ready  # type: ignore[method-assign,assignment]
    stream.push(picture(2))
    until(lambda: len(device.batched) == 2)
    with pytest.raises(TimeoutError):
        stream.pull(timeout=0.05)
    device.gate.set()
    assert [shown(pull(stream))[2] for _ in range(2)] == [1, 2]
