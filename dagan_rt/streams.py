"""Many sessions in one process: frames of all of them share batches on one device.

Three threads work for all streams. One collects waiting frames into batches and submits them; one takes the results
and hands them out, if submitting has not brought them at once; one computes the initial key points of new sessions.
Sources are computed on the caller's thread, in a slot that nobody uses yet: no stream waits for another one's source.

Every queue is bounded, and its oldest entry gives way: who reads or computes too slowly sees fewer frames, never older
ones.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dagan_rt import backends
from dagan_rt.bundle import Bundle
from dagan_rt.errors import DeviceLost, InputError
from dagan_rt.frames import Frames, Pending, batch_sizes, open_frames
from dagan_rt.keypoints import KeyPoints
from dagan_rt.reenactor import check_image, check_motion, open_loaded

REMEMBERED = 1024  # latencies that the percentiles are taken of, a stream


class Result(NamedTuple):
    """One driven frame."""

    number: int  # what `push` returned
    image: np.ndarray  # HWC uint8 RGB, [size, size, 3]
    latency: float  # seconds from `push` until it was ready to be pulled


Deliver = Callable[["Result | Exception"], None]


class QueueFull(InputError):
    """As many frames of a stream wait as its queue holds."""


class Stats(NamedTuple):
    """Counts of frames since the start, and percentiles of the last latencies in seconds (NaN before the first)."""

    pushed: int
    driven: int
    dropped_in: int  # pushed, and never driven: newer ones came, or the stream was closed
    dropped_out: int  # driven, and never pulled, likewise
    errors: int
    p50: float
    p95: float
    p99: float
    queue: float  # seconds that driven frames waited before their batch was submitted, summed over all of them
    compute: float  # seconds from then until their results were there, likewise


@dataclass(eq=False)
class _Session:
    """A source in a slot, and where its motion starts."""

    slot: int
    begun: bool  # whether frames can be driven
    first: _Frame | None = None  # the initial frame, until it is begun
    uses: int = 0  # frames that wait or are under way, and a start under way
    current: bool = True  # whether new frames go to it


@dataclass(eq=False)
class _Frame:
    """One driving frame, from `push` until its result."""

    number: int
    image: np.ndarray
    pushed: float  # when, by time.monotonic()
    stream: Stream
    session: _Session
    deliver: Deliver | None = None  # where its result goes, instead of `pull`
    submitted: float = 0.0  # when its batch was, likewise


@dataclass(eq=False)
class _Schedule:
    """Whose turn it is: streams go round, each with one frame, until the batch is full or nothing is left."""

    batch: int
    deadline: float
    ready: int = 0  # frames that could be driven now
    turn: OrderedDict[Stream, int] = field(default_factory=OrderedDict)  # streams that have some, and how many

    def refresh(self, stream: Stream) -> None:
        """Count a stream's frames anew; order must be kept, so that one which cannot be driven yet stops the rest."""
        count = 0
        for frame in stream._waiting:
            if not frame.session.begun:
                break
            count += 1
        self.ready += count - self.turn.get(stream, 0)
        if count:
            self.turn[stream] = count  # a new stream comes last, a known one keeps its place
        else:
            self.turn.pop(stream, None)

    def full(self, streams: int) -> bool:
        """Whether waiting longer brings nothing: the batch is full, or each of the open streams has a frame in it."""
        return self.ready >= self.batch or len(self.turn) >= streams

    def due(self, now: float, streams: int) -> float | None:
        """Seconds until a batch should go; None if nothing is ready."""
        if not self.ready:
            return None
        if self.full(streams):
            return 0.0
        oldest = min(stream._waiting[0].pushed for stream in self.turn)
        return max(0.0, oldest + self.deadline - now)

    def take(self) -> list[_Frame]:
        """The next batch."""
        taken: list[_Frame] = []
        while self.turn and len(taken) < self.batch:
            stream = next(iter(self.turn))
            taken.append(stream._waiting.popleft())
            self.refresh(stream)
            if stream in self.turn:
                self.turn.move_to_end(stream)
        return taken


class Streams:
    """Animates many portraits at once on one device.

        with Streams("bundle/") as streams:
            stream = streams.open(image)
            stream.push(frame)                  # a producer's thread; never waits
            for result in stream:               # a consumer's thread
                show(result.image)

    All methods, here and of `Stream`, may be called from any thread. Once the device is lost, `push` and `pull` of
    every stream raise `DeviceLost`.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle | Frames,
        backend: str | backends.Backend = "auto",
        most: int = 128,
        batch: int = 32,
        deadline: float = 0.005,
        queue: int = 2,
        *,
        threads: int | None = None,
    ) -> None:
        """Make everything ready for `most` streams.

        bundle, backend, threads: as for `Reenactor`; or whole frames that are open already and stay the caller's, of
            which all slots but one carry streams (that one is where a stream's next source is made ready).
        batch: frames that are driven at once, at most; fewer if the backend's engines take fewer, and single ones if
            it gains nothing from batches.
        deadline: seconds that a frame may wait for others to share its batch. It waits for none if every stream has
            one ready.
        queue: frames of one stream that wait to be driven, and results that wait to be pulled, at most.

        Raises InputError for a wrong argument, for what `Reenactor` refuses, or if the device has too little memory.
        """
        for name, value in (("most", most), ("batch", batch), ("queue", queue)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 <= deadline <= 1e6:
            raise InputError(f"deadline must be 0 to 1e6 seconds, got {deadline}")
        self._owned = isinstance(bundle, (str, Path, Bundle))
        if isinstance(bundle, (str, Path, Bundle)):
            self._open(bundle if isinstance(bundle, Bundle) else Bundle.open(bundle), backend, most, batch, threads)
        else:
            self._frames, self._backend = bundle, "frames given by the caller"
        if self._frames.slots < 2:
            raise InputError(f"streams need frames of at least 2 slots, got {self._frames.slots}")
        self.most = min(most, self._frames.slots - 1)
        self._queue = queue
        self._schedule = _Schedule(min(batch, self._frames.batches[-1]), deadline)
        self._free = list(range(self._frames.slots))
        self._streams: set[Stream] = set()
        self._taken = 0  # places: of these, and of those whose source is being computed
        self._past = _Counts(8 * REMEMBERED)  # of all streams that ever were
        self._batches = 0
        self._under_way: deque[tuple[list[_Frame], Pending | Exception] | None] = deque()  # None: that was the last
        self._in_flight = 0  # batches that were taken and have not come back
        self._starts: deque[_Session] = deque()  # whose first frame is there
        self._ended: Exception | None = None  # why no more work is taken

        self._lock = threading.Lock()  # over everything above, and over the streams
        self._preparing = threading.Lock()  # sources and initial frames are computed one at a time
        self._batchable, self._landing, self._startable, self._freed = (threading.Condition(self._lock) for _ in "bsfl")
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"dagan-rt {work.__name__[1:]}", daemon=True)
            for work in (self._submit_batches, self._hand_out_results, self._start_sessions)
        ]
        for thread in self._threads:
            thread.start()

    def _open(
        self, bundle: Bundle, backend: str | backends.Backend, most: int, batch: int, threads: int | None
    ) -> None:
        opened, reason = open_loaded(bundle, backend, threads)
        spare = 1 + most // 16  # several streams may change their source at the same moment
        self._frames = open_frames(opened, bundle, most + spare, batch_sizes(opened, batch))
        self._backend = f"{opened.name} ({reason})"

    @property
    def size(self) -> int:
        """Side in pixels of the square images."""
        return self._frames.size

    def open(
        self, source: np.ndarray, motion: str = "relative", adapt_scale: bool = False, *, motion_scale: float = 1.0
    ) -> Stream:
        """A new stream; waits until its source is computed, while the others go on.

        source: HWC uint8 RGB, [size, size, 3]. motion, adapt_scale, motion_scale: as for `Reenactor`.
        Raises InputError for a wrong argument, if all streams are taken or if there is not enough memory.
        """
        check_motion(motion, adapt_scale, motion_scale)
        image = check_image("source", source, self.size)
        with self._lock:
            self._check_open()
            if self._taken >= self.most:
                raise InputError(
                    f"all {self.most} streams are open: close one, or make room for more with Streams(most=…)"
                )
            self._taken += 1
        try:
            stream = Stream(self, motion == "relative", adapt_scale, motion_scale)
            stream.set_source(image)
        except BaseException:
            with self._lock:
                self._taken -= 1
            raise
        return stream

    def keypoints(self, image: np.ndarray) -> KeyPoints:
        """The key points of any face, NumPy [1, K, 2] and [1, K, 2, 2]; `image` as in `open`. No stream changes."""
        checked = check_image("image", image, self.size)
        with self._lock:
            self._check_open()
        with self._preparing:
            return self._frames.keypoints(checked)

    @property
    def stats(self) -> Stats:
        """Of all streams together, closed ones included."""
        with self._lock:
            return self._past.stats()

    @property
    def batches(self) -> int:
        """How many were given to the device so far."""
        with self._lock:
            return self._batches

    def report(self) -> str:
        """Backend, device, streams, memory, batches and frames so far: a table for a person to read."""
        frames, stats, batches = self._frames, self.stats, self.batches
        with self._lock:
            streams = len(self._streams)
        host = (3 * self._queue + 3) * 3 * self.size**2  # frames that wait, or are submitted; results; the source
        mean = stats.driven / batches if batches else float("nan")
        rest = _mb(frames.fixed_bytes) if frames.fixed_bytes else "an unknown amount"
        rows = {
            "backend": self._backend,
            "device": str(getattr(frames, "device", "not stated")),
            "streams": f"{streams} open of at most {self.most}",
            "memory": f"{_mb(frames.slot_bytes)} a stream; {_mb(frames.slots * frames.slot_bytes)} for all "
            f"{frames.slots} slots, {rest} for everything else",
            "host memory": f"at most {_mb(host)} a stream",
            "batches": f"of {', '.join(map(str, frames.batches))}; {frames.ahead} at once; "
            f"deadline {1e3 * self._schedule.deadline:g} ms; {mean:.1f} frames on average",
            "frames": f"{stats.pushed} pushed, {stats.driven} driven, {stats.dropped_in} dropped before and "
            f"{stats.dropped_out} after, {stats.errors} errors",
            "latency": f"p50 {1e3 * stats.p50:.2f} ms, p95 {1e3 * stats.p95:.2f} ms, p99 {1e3 * stats.p99:.2f} ms",
        }
        return "\n".join(f"{name:<13}{value}" for name, value in rows.items())

    def close(self) -> None:
        """End all streams, wait for the batches under way and free the memory. May be called twice."""
        with self._lock:
            self._end(InputError("the streams are closed"))
            for stream in list(self._streams):
                stream._finish()
        for thread in self._threads:
            thread.join()
        if self._owned:
            with self._preparing:  # a source that is being computed
                self._frames.close()

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _prepare(self, image: np.ndarray, relative: bool) -> _Session:
        """A session on a slot that nobody uses, on the caller's thread."""
        with self._lock:
            while not self._free and self._ended is None:
                self._freed.wait()
            self._check_open()
            slot = self._free.pop()
        try:
            with self._preparing:
                self._check_open()
                self._frames.set_source(slot, image)
                if not relative:
                    self._frames.begin(slot, None)
        except BaseException as error:
            with self._lock:
                self._free.append(slot)
                self._freed.notify()
                if isinstance(error, DeviceLost):
                    self._end(error)
            if isinstance(error, MemoryError):
                raise InputError("there is too little memory for another source: close a stream") from error
            raise
        return _Session(slot, begun=not relative)

    # ------------------------------------------------------------------------------------------------------------------
    # the three threads

    def _guarded(self, work: Callable[[], None]) -> None:
        """An error that nobody foresaw ends the streams, and is told by them: never silence."""
        try:
            work()
        except Exception as error:
            with self._lock:
                self._end(error)

    def _submit_batches(self) -> None:
        try:
            while batch := self._next_batch():
                submitted = time.monotonic()
                for frame in batch:
                    frame.submitted = submitted
                try:
                    pending: Pending | Exception = self._frames.submit(
                        [frame.session.slot for frame in batch], [frame.image for frame in batch]
                    )
                except Exception as error:
                    pending = error  # handed out in its turn, as a result would be
                with self._lock:
                    for frame in batch:
                        frame.stream._buffers.append(frame.image)
                    # A CPU is through with it by now, and another thread's waking up would only make it late.
                    here = self._in_flight == 1 and (isinstance(pending, Exception) or pending.done())
                    if not here:
                        self._under_way.append((batch, pending))
                        self._landing.notify()
                if here:
                    self._hand_out(batch, pending)
        finally:
            with self._lock:
                self._under_way.append(None)
                self._landing.notify()

    def _next_batch(self) -> list[_Frame]:
        """Wait until a batch should go, and take it; empty at the end."""
        with self._lock:
            while self._ended is None:
                wait = None
                if self._in_flight < self._frames.ahead:
                    wait = self._schedule.due(time.monotonic(), len(self._streams))
                if wait == 0:
                    self._in_flight += 1
                    self._batches += 1
                    return self._schedule.take()
                self._batchable.wait(wait)
            return []

    def _hand_out_results(self) -> None:
        while True:
            with self._lock:
                while not self._under_way:
                    self._landing.wait()
                batch_or_end = self._under_way.popleft()
            if batch_or_end is None:
                return
            self._hand_out(*batch_or_end)

    def _hand_out(self, batch: list[_Frame], pending: Pending | Exception) -> None:
        """Wait for the results of a batch, and give each to its stream."""
        outcomes: list[np.ndarray | Exception]
        try:
            if isinstance(pending, Exception):
                raise pending
            images = pending.result()
            # A view would keep the whole batch in memory for as long as one of its images is kept.
            outcomes = [images[0]] if len(batch) == 1 else [image.copy() for image in images]
        except Exception as error:
            outcomes = [error] * len(batch)
        with self._lock:
            self._in_flight -= 1
            for frame, outcome in zip(batch, outcomes, strict=True):
                self._drop_use(frame.session)
                frame.stream._deliver(frame, outcome)
            if isinstance(outcomes[0], DeviceLost):
                self._end(outcomes[0])
            self._batchable.notify()

    def _start_sessions(self) -> None:
        """Compute the initial key points of sessions whose first frame is there."""
        while True:
            with self._lock:
                while not self._starts and self._ended is None:
                    self._startable.wait()
                if self._ended is not None:
                    return
                session = self._starts.popleft()
                first = session.first
                assert first is not None
            failure: Exception | None = None
            try:
                with self._preparing:
                    stream = first.stream
                    self._frames.begin(session.slot, first.image, stream._adapt_scale, stream._motion_scale)
            except Exception as error:
                failure = error
            with self._lock:
                if isinstance(failure, DeviceLost):
                    self._end(failure)
                    return
                session.first = None
                session.begun = failure is None
                if failure is not None:
                    first.stream._refuse(first, failure)
                self._drop_use(session)
                self._refresh(first.stream)

    # ------------------------------------------------------------------------------------------------------------------
    # all of these with the lock held

    def _start(self, session: _Session, first: _Frame) -> None:
        """Have a session begin with a frame, of which it keeps a copy: the frame itself may be dropped meanwhile."""
        session.first = _Frame(first.number, first.image.copy(), first.pushed, first.stream, session)
        session.uses += 1
        self._starts.append(session)
        self._startable.notify()

    def _refresh(self, stream: Stream) -> None:
        """See to a stream whose waiting frames changed; wake the batching thread if that may matter to it."""
        idle = not self._schedule.ready  # then it waits without a limit, else until the deadline of a former frame
        self._schedule.refresh(stream)
        if idle or self._schedule.full(len(self._streams)):
            self._batchable.notify()

    def _drop_use(self, session: _Session) -> None:
        """One thing less that the session's slot is needed for."""
        session.uses -= 1
        self._release(session)

    def _release(self, session: _Session) -> None:
        """Give back the slot of a session that has ended, once nothing of it is left."""
        if not session.current and not session.uses:
            self._free.append(session.slot)
            self._freed.notify()

    def _check_open(self) -> None:
        if self._ended is not None:
            kind = type(self._ended) if isinstance(self._ended, (DeviceLost, InputError)) else RuntimeError
            raise kind(str(self._ended)) from self._ended  # each caller's own: tracebacks would pile up on one

    def _end(self, reason: Exception) -> None:
        """Take no more work; the first reason stays."""
        if self._ended is None:
            self._ended = reason
        for condition in (self._batchable, self._landing, self._startable, self._freed):
            condition.notify_all()
        for stream in self._streams:
            stream._arrived.notify_all()
            for frame in stream._waiting:  # nobody will drive them, and nobody asks for them
                deliver, frame.deliver = frame.deliver, None
                if deliver is not None:
                    deliver(reason)


class Stream:
    """One session of `Streams`, which opens it. One thread may push while another pulls."""

    def __init__(self, streams: Streams, relative: bool, adapt_scale: bool, motion_scale: float) -> None:
        self._streams, self._relative = streams, relative
        self._adapt_scale, self._motion_scale = adapt_scale, motion_scale
        self._lock, self._arrived = streams._lock, threading.Condition(streams._lock)
        self._session: _Session | None = None
        self._source: np.ndarray | None = None
        self._waiting: deque[_Frame] = deque()
        self._results: deque[Result | Exception] = deque()
        self._buffers: list[np.ndarray] = []  # for frames, used again and again; at most twice the queue
        self._counts = _Counts(REMEMBERED)
        self._closed = False

    def push(self, frame: np.ndarray, deliver: Deliver | None = None) -> int:
        """Hand in a copy of the next driving frame, HWC uint8 RGB, [size, size, 3], and go on; returns its number.

        Numbers start at 0. If as many frames wait already as the queue holds, the oldest of them is dropped. With
        relative motion, the first frame after `open`, `set_source` or `reset` is the initial one, even if it is
        dropped. Raises InputError for another frame, or if the stream is closed; the stream goes on.

        deliver: takes the frame's `Result`, or what went wrong, once, instead of `pull`; then a full queue drops
            nothing and raises QueueFull. It is called with a lock held: it must return at once, and must not call
            anything of the streams.
        """
        pushed = time.monotonic()
        checked = check_image("frame", frame, self._streams.size)
        with self._lock:
            self._check_open()
            buffer = self._buffers.pop() if self._buffers else np.empty(checked.shape, np.uint8)
        np.copyto(buffer, checked)
        with self._lock:
            session = self._check_open()
            if len(self._waiting) >= self._streams._queue:
                if deliver is not None:
                    self._buffers.append(buffer)
                    raise QueueFull(f"{len(self._waiting)} frames of this stream wait already, as many as may")
                self._discard(self._waiting.popleft())
            number = self._counts.of["pushed"]
            self._count("pushed")
            session.uses += 1
            self._waiting.append(_Frame(number, buffer, pushed, self, session, deliver))
            if not session.begun and session.first is None:
                self._streams._start(session, self._waiting[-1])
            self._streams._refresh(self)
        return number

    def pull(self, timeout: float | None = None) -> Result | None:
        """The oldest result that is there, or the next that comes; None once the stream is closed and all are pulled.

        Numbers ascend; those of dropped frames are missing. Raises TimeoutError after `timeout` seconds without a
        result, InputError or RuntimeError for a frame that could not be driven; the stream goes on.
        """
        with self._lock:
            streams = self._streams
            if not self._arrived.wait_for(lambda: self._results or self._closed or streams._ended, timeout):
                raise TimeoutError(f"no result came within {timeout} seconds")
            if not self._results:
                if self._closed:
                    return None
                streams._check_open()
            result = self._results.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    def __iter__(self) -> Iterator[Result]:
        """Results as they come, until the stream is closed."""
        while (result := self.pull()) is not None:
            yield result

    def set_source(self, image: np.ndarray) -> None:
        """Animate another portrait, HWC uint8 RGB, [size, size, 3], in a new session; waits until it is computed.

        Frames that were pushed before this returns still show the former source, later ones this one.
        Raises InputError for another image, if the stream is closed or if there is not enough memory; the former
        source stays.
        """
        self._renew(check_image("image", image, self._streams.size).copy())

    def reset(self) -> None:
        """Begin a new session with the same source, as `set_source` would: the next frame is the initial one."""
        assert self._source is not None
        if self._relative:  # absolute motion has no initial frame
            self._renew(self._source)

    def close(self) -> None:
        """Drop what waits and give the place to another stream; what can be pulled stays. May be called twice."""
        with self._lock:
            self._finish()

    @property
    def room(self) -> int:
        """How many frames can be pushed before the queue is full."""
        with self._lock:
            return self._streams._queue - len(self._waiting)

    @property
    def stats(self) -> Stats:
        """Of this stream."""
        with self._lock:
            return self._counts.stats()

    def _renew(self, source: np.ndarray) -> None:
        session = self._streams._prepare(source, self._relative)
        with self._lock:
            if self._closed or self._streams._ended is not None:
                retired: _Session | None = session
            else:
                retired, self._session, self._source = self._session, session, source
                self._streams._streams.add(self)
            if retired is not None:
                retired.current = False
                self._streams._release(retired)
            self._check_open()

    # all of these with the lock held

    def _check_open(self) -> _Session:
        self._streams._check_open()
        if self._closed:
            raise InputError("this stream is closed: open another one")
        assert self._session is not None
        return self._session

    def _finish(self) -> None:
        if self._closed:
            return
        self._closed = True
        while self._waiting:
            self._discard(self._waiting.popleft())
        assert self._session is not None
        self._session.current = False
        self._streams._release(self._session)
        self._streams._streams.discard(self)
        self._streams._taken -= 1
        self._streams._refresh(self)
        self._arrived.notify_all()

    def _discard(self, frame: _Frame) -> None:
        """Drop a frame that waited."""
        self._count("dropped_in")
        if frame.deliver is not None:
            frame.deliver(
                InputError(f"frame {frame.number} was not driven: a newer one took its place, or its stream was closed")
            )
        self._buffers.append(frame.image)
        self._streams._drop_use(frame.session)

    def _refuse(self, first: _Frame, error: Exception) -> None:
        """Motion cannot begin with this frame: it fails, and the session tries its next one."""
        session = first.session
        for frame in self._waiting:
            if frame.number == first.number:
                self._waiting.remove(frame)
                self._buffers.append(frame.image)
                self._streams._drop_use(session)
                self._deliver(frame, error)
                break
        if (following := next((frame for frame in self._waiting if frame.session is session), None)) is not None:
            self._streams._start(session, following)

    def _deliver(self, frame: _Frame, outcome: np.ndarray | Exception) -> None:
        """Put a result, or what went wrong, where `pull` finds it."""
        result: Result | Exception
        if isinstance(outcome, Exception):
            self._count("errors")
            if isinstance(outcome, DeviceLost):
                if frame.deliver is not None:
                    frame.deliver(outcome)
                return  # ends all streams, and every `pull` tells it
            kind = InputError if isinstance(outcome, InputError) else RuntimeError
            result = kind(f"frame {frame.number} was not driven: {outcome}")
            result.__cause__ = outcome
        else:
            ready = time.monotonic()
            result = Result(frame.number, outcome, ready - frame.pushed)
            self._count("driven")
            for counts in (self._counts, self._streams._past):
                counts.latencies.append(result.latency)
                counts.queue += frame.submitted - frame.pushed
                counts.compute += ready - frame.submitted
        if frame.deliver is not None:
            frame.deliver(result)
            return
        if self._closed:
            self._drop_result(result)
            return
        if len(self._results) == self._streams._queue:
            self._drop_result(self._results.popleft())
        self._results.append(result)
        self._arrived.notify()

    def _drop_result(self, result: Result | Exception) -> None:
        if isinstance(result, Result):
            self._count("dropped_out")

    def _count(self, what: str) -> None:
        self._counts.of[what] += 1
        self._streams._past.of[what] += 1


class _Counts:
    """What `Stats` is made of."""

    def __init__(self, remembered: int) -> None:
        self.of = dict.fromkeys(("pushed", "driven", "dropped_in", "dropped_out", "errors"), 0)
        self.latencies: deque[float] = deque(maxlen=remembered)
        self.queue = self.compute = 0.0  # seconds, of driven frames

    def stats(self) -> Stats:
        p50, p95, p99 = np.percentile(self.latencies, (50, 95, 99)) if self.latencies else [float("nan")] * 3
        return Stats(**self.of, p50=float(p50), p95=float(p95), p99=float(p99), queue=self.queue, compute=self.compute)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
