"""N sessions that each bring frames at their own pace, and how late the answers were.

The pace is kept whatever the server does: frame k of a stream is due at its time, and its latency counts from then, not
from when it could be sent. A server that stalls is seen in every frame that fell due meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dagan_rt.benchmarking.rows import CALL, Timing
from dagan_rt.errors import InputError
from dagan_rt.serving import transport
from dagan_rt.serving.answers import Answers

OK = "OK"
#: What came instead of an image. A drop is a frame that was refused, or not answered before its deadline.
STATUSES: dict[type[Exception], str] = {
    transport.ServerBusy: "UNAVAILABLE",
    transport.DeadlineExceeded: "DEADLINE_EXCEEDED",
    transport.ServerUnavailable: "UNREACHABLE",
    transport.SessionLost: "NOT_FOUND",
    transport.ServerError: "INTERNAL",
    InputError: "INVALID_ARGUMENT",
}
DROPS = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
SENT, START = "sent", "start"  # besides since a frame was due: since it was sent; from START to the first image
LEAD = 0.1  # seconds before the first frame is due
TOLD = 10  # errors whose messages are kept

Connect = Callable[[], Awaitable[Any]]  # gives a connected AsyncClient


class Frame(NamedTuple):
    """One frame of the load; all times by time.monotonic()."""

    due: float
    sent: float
    done: float
    status: str  # OK, or of the error


@dataclass(frozen=True)
class Pace:
    """When frames are due."""

    streams: int
    fps: float  # of each
    seconds: float
    churn: float = 0.0  # seconds after which a stream ends its session and opens one with another source; 0: never

    @property
    def frames(self) -> int:
        """Of each stream."""
        return round(self.fps * self.seconds)

    def due(self, stream: int, frame: int) -> float:
        """Seconds after the start: streams are evenly spread over the time of a frame."""
        return (frame + stream / self.streams) / self.fps

    def generation(self, stream: int, frame: int) -> int:
        """How many sessions of the stream came before the one that this frame belongs to."""
        return int(self.due(stream, frame) / self.churn) if self.churn else 0


@dataclass
class Load:
    """What came out; every stream adds its own."""

    frames: list[Frame] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)  # seconds
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # the first few, with their messages
    reconnects: int = 0

    def summary(self, pace: Pace, late: float) -> tuple[dict[str, Timing], dict[str, float]]:
        """Times and values of a row. late: seconds after its time at which an answer counts as late."""
        answered = [frame for frame in self.frames if frame.status == OK]
        times: dict[str, Timing] = {}
        if answered:
            times[CALL] = Timing.of([1e6 * (frame.done - frame.due) for frame in answered])
            times[SENT] = Timing.of([1e6 * (frame.done - frame.sent) for frame in answered])
        if self.starts:
            times[START] = Timing.of([1e6 * seconds for seconds in self.starts])
        statuses = Counter(frame.status for frame in self.frames)
        first = min((frame.due for frame in self.frames), default=0.0)
        span = max((frame.done for frame in answered), default=first) - first
        values = {
            "frames/s asked": pace.streams * pace.fps,
            "frames/s": len(answered) / max(span, pace.seconds),
            "frames due": float(pace.streams * pace.frames),
            "frames answered": float(len(answered)),
            "drops": float(sum(statuses[status] for status in DROPS)),
            "late": float(sum(frame.done - frame.due > late for frame in answered)),
            "errors": float(sum(statuses.values()) - len(answered) - sum(statuses[status] for status in DROPS)),
            "behind ms": 1e3 * max((frame.sent - frame.due for frame in self.frames), default=0.0),
            "reconnects": float(self.reconnects),
            "wrong images": float(len(self.wrong)),
        }
        return times, values | {f"status {status}": float(count) for status, count in sorted(statuses.items())}


class Stream:
    """One user: a client of its own, one session at a time."""

    def __init__(
        self, number: int, pace: Pace, answers: Answers, load: Load, deadline: float, encoding: str | None = None
    ) -> None:
        """load: where results are added. deadline: seconds after its sending at which a frame is given up."""
        self._number, self._pace, self._answers, self._load = number, pace, answers, load
        self._deadline, self._encoding = deadline, encoding
        self._client: Any = None
        self._session: Any = None
        self._source = self._generation = self._at = 0  # `at`: frames of the session so far
        self._under_way: set[asyncio.Task[None]] = set()

    async def open(self, connect: Connect) -> None:
        """Connect, and begin the first session."""
        self._client = await connect()
        await self._begin(0)

    async def run(self, begin: float) -> None:
        """Send every frame at its time, from `begin` on by time.monotonic(), and wait for the answers."""
        for frame in range(self._pace.frames):
            due = begin + self._pace.due(self._number, frame)
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            sent = time.monotonic()
            generation = self._pace.generation(self._number, frame)
            if self._session is None or generation != self._generation:
                try:
                    await self._begin(generation)
                except Exception as error:
                    self._note(Frame(due, sent, time.monotonic(), self._complain(error)))
                    continue
            sent = time.monotonic()
            task = asyncio.ensure_future(self._drive(due, sent))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        await self._quiet()

    async def close(self) -> None:
        """End session and connection, whatever state they are in."""
        try:
            self._count_reconnects()
            if self._client is not None:
                await self._client.close()
        except Exception as error:  # the server may be gone
            self._complain(error)

    async def _begin(self, generation: int) -> None:
        """A session with a source of its own, and its first frame; those under way are waited for."""
        self._generation = generation
        await self._quiet()
        if self._session is not None:
            self._count_reconnects()
            session, self._session = self._session, None
            await session.close()
        self._source = (self._number + generation * self._pace.streams) % len(self._answers.sources)
        begun = time.monotonic()
        self._session = await self._client.open(self._answers.sources[self._source], encoding=self._encoding)
        self._judge(0, await self._session.drive(self._answers.frame(0)))
        self._load.starts.append(time.monotonic() - begun)
        self._at = 1

    async def _drive(self, due: float, sent: float) -> None:
        at, self._at = self._at, self._at + 1
        try:
            image = await self._session.drive(self._answers.frame(at), self._deadline)
        except Exception as error:
            self._note(Frame(due, sent, time.monotonic(), self._complain(error)))
            return
        self._note(Frame(due, sent, time.monotonic(), OK))
        self._judge(at, image)

    async def _quiet(self) -> None:
        await asyncio.gather(*self._under_way)

    def _note(self, frame: Frame) -> None:
        self._load.frames.append(frame)

    def _judge(self, at: int, image: np.ndarray) -> None:
        if reason := self._answers.wrong(self._source, at, image):
            self._load.wrong.append(f"source {self._source}, frame {at} of its session: {reason}")

    def _count_reconnects(self) -> None:
        if self._session is not None:
            self._load.reconnects += max(0, self._session.starts - 1)

    def _complain(self, error: Exception) -> str:
        status = status_of(error)
        if status not in DROPS and len(self._load.errors) < TOLD:
            self._load.errors.append(f"stream {self._number}: {status}: {error}")
        return status


async def run(
    pace: Pace, answers: Answers, connect: Connect, deadline: float, encoding: str | None = None,
    tick: Callable[[int], None] = lambda frames: None, around: Callable[[], None] = lambda: None,
) -> Load:  # fmt: skip
    """The load; sessions are opened before the first frame is due, one after the other.

    tick: called ten times a second with the frames that are through. around: called before the first, after the last.
    """
    load = Load()
    streams = [Stream(number, pace, answers, load, deadline, encoding) for number in range(pace.streams)]
    try:
        for stream in streams:
            await stream.open(connect)
        await asyncio.to_thread(around)
        begin = time.monotonic() + LEAD
        running = [asyncio.ensure_future(stream.run(begin)) for stream in streams]
        while left := [task for task in running if not task.done()]:
            tick(len(load.frames))
            await asyncio.wait(left, timeout=0.1)
        await asyncio.gather(*running)
        tick(len(load.frames))
        await asyncio.to_thread(around)
    finally:
        await asyncio.gather(*(stream.close() for stream in streams))
    return load


def status_of(error: Exception) -> str:
    """A name for what went wrong."""
    return next((name for kind, name in STATUSES.items() if isinstance(error, kind)), type(error).__name__)
