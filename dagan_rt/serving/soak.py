"""Very many frames over sequences that come and go; every image compared, memory watched.

A sequence is one session of a drawn source. It ends by its END, or its client vanishes, when all is answered or with
frames still under way, and the server has to free it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dagan_rt.benchmarking.rows import CALL, Timing
from dagan_rt.serving.answers import Answers
from dagan_rt.serving.pacing import START, Connect, status_of

SAMPLES = 40  # of memory
WARM_UP = 0.25  # of the frames, in which memory may grow
MOST_GROWTH = 0.02  # of the memory after the warm-up
LEAST_FRAMES = 5000  # of a soak that says something about growth: caches and heaps fill before
MOST_ERRORS = 10  # after which going on tells nothing new
ENDS = ("ended", "left", "dropped")  # by END; its client vanishes, with nothing under way, or with frames
WEIGHTS = (0.7, 0.15, 0.15)  # how often each


@dataclass(frozen=True)
class Plan:
    """What to send."""

    frames: int = 20_000  # answered, in all
    sequences: int = 16  # at once
    shortest: int = 10  # frames of a sequence
    longest: int = 120
    ahead: int = 2  # frames of a sequence under way
    room: int = 64  # sequences that the server holds
    idle: float = 60.0  # seconds after which it frees one that was left alone
    seed: int = 0


@dataclass
class Soak:
    """What came out so far."""

    plan: Plan
    answered: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=20_000))  # seconds
    starts: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    memory: list[tuple[int, float]] = field(default_factory=list)  # frames answered, bytes
    seconds: float = 0.0
    alone: deque[float] = field(default_factory=deque)  # when sequences were left alone, the last of them

    @property
    def over(self) -> bool:
        """Whether enough was answered, or going on would tell nothing new."""
        return self.answered >= self.plan.frames or bool(self.wrong) or len(self.errors) >= MOST_ERRORS

    def may_leave(self) -> bool:
        """Whether the server has room for one more sequence that nobody ends; if so, there is one more."""
        now = time.monotonic()
        while self.alone and now - self.alone[0] > self.plan.idle + 2:
            self.alone.popleft()
        if len(self.alone) >= (self.plan.room - self.plan.sequences) // 2:
            return False
        self.alone.append(now)
        return True

    def growth(self) -> float | None:
        """Of memory since the warm-up, as a fraction; None where the soak is too short to tell."""
        return growth(self.memory, self.plan.frames) if self.plan.frames >= LEAST_FRAMES else None

    def summary(self) -> tuple[dict[str, Timing], dict[str, float]]:
        """Times and values of a row; a latency is from sending, of the last frames."""
        times = {CALL: Timing.of([1e6 * it for it in self.latencies])} if self.latencies else {}
        if self.starts:
            times[START] = Timing.of([1e6 * it for it in self.starts])
        values = {
            "frames/s": self.answered / self.seconds if self.seconds else 0.0,
            "frames answered": float(self.answered), "sequences begun": float(sum(self.ends.values())),
            "sequences left alone": float(sum(self.ends[end] for end in ENDS[1:])),
            "errors": float(len(self.errors)), "wrong images": float(len(self.wrong)),
        }  # fmt: skip
        if self.memory:
            values |= {"server bytes at first": self.memory[0][1], "server bytes at last": self.memory[-1][1]}
        if (grown := self.growth()) is not None:
            values["server growth %"] = 100 * grown
        return times, values


def growth(memory: Sequence[tuple[int, float]], frames: int) -> float | None:
    """How much more is held in the last quarter than in the second, by their medians; None with too few samples."""
    second = [held for done, held in memory if WARM_UP <= done / frames < 2 * WARM_UP]
    last = [held for done, held in memory if done / frames >= 1 - WARM_UP]
    return float(np.median(last) / np.median(second)) - 1 if second and last else None


def faults(soak: Soak, left: float | None) -> list[str]:
    """What speaks against the server; `left`: sequences that it holds although nobody uses them, None if unknown."""
    found = [*soak.wrong[:3], *soak.errors[:3]]
    if soak.answered < soak.plan.frames:
        found.append(f"{soak.answered} frames were answered, not {soak.plan.frames}")
    if (grown := soak.growth()) is not None and grown >= MOST_GROWTH:
        found.append(f"memory grew by {100 * grown:.1f} %, at most {100 * MOST_GROWTH:g} % is allowed")
    if left:
        found.append(f"{left:.0f} sequences are still open")
    return found


async def run(
    plan: Plan, answers: Answers, connect: Connect, memory: Callable[[], int] | None = None,
    tick: Callable[[int], None] = lambda answered: None,
) -> Soak:  # fmt: skip
    """Drive until enough frames are answered, an image is wrong, or too much failed.

    memory: bytes that the server holds. tick: called with the frames answered so far.
    """
    soak = Soak(plan)
    begun = time.monotonic()
    users = [asyncio.ensure_future(_User(soak, answers, connect, number).run()) for number in range(plan.sequences)]
    sampled = -1
    while left := [user for user in users if not user.done()]:
        await asyncio.wait(left, timeout=0.05)
        answered = min(soak.answered, plan.frames)
        tick(answered)
        if memory is not None and (step := answered * SAMPLES // plan.frames) > sampled:
            soak.memory.append((answered, float(memory())))
            sampled = step
    soak.seconds = time.monotonic() - begun
    await asyncio.gather(*users)
    return soak


class _User:
    """Sequences one after the other, through a client that is dropped now and then."""

    def __init__(self, soak: Soak, answers: Answers, connect: Connect, number: int) -> None:
        self._soak, self._answers, self._connect, self._number = soak, answers, connect, number
        self._random = random.Random(1000 * soak.plan.seed + number)
        self._client: Any = None

    async def run(self) -> None:
        while not self._soak.over:
            try:
                if self._client is None:
                    self._client = await self._connect()
                await self._sequence()
            except Exception as error:
                self._soak.errors.append(f"user {self._number}: {status_of(error)}: {error}")
        if self._client is not None:
            await self._client.close()

    async def _sequence(self) -> None:
        plan, draw = self._soak.plan, self._random
        source = draw.randrange(len(self._answers.sources))
        frames, end = draw.randint(plan.shortest, plan.longest), draw.choices(ENDS, WEIGHTS)[0]
        if end != "ended" and not self._soak.may_leave():
            end = "ended"
        begun = time.monotonic()
        session = await self._client.open(self._answers.sources[source], ahead=plan.ahead)
        self._judge(source, 0, await session.drive(self._answers.frame(0)))
        self._soak.starts.append(time.monotonic() - begun)
        under_way: deque[asyncio.Task[None]] = deque()
        for at in range(1, frames):
            if self._soak.over:
                break
            under_way.append(asyncio.ensure_future(self._drive(session, source, at)))
            if len(under_way) == plan.ahead:
                await under_way.popleft()
        if end != "dropped":
            await asyncio.gather(*under_way)
        await (session.close() if end == "ended" else self._vanish(under_way))
        self._soak.ends[end] += 1

    async def _drive(self, session: Any, source: int, at: int) -> None:
        sent = time.monotonic()
        image = await session.drive(self._answers.frame(at))
        self._soak.latencies.append(time.monotonic() - sent)
        self._judge(source, at, image)

    def _judge(self, source: int, at: int, image: np.ndarray) -> None:
        self._soak.answered += 1
        if reason := self._answers.wrong(source, at, image):
            self._soak.wrong.append(f"source {source}, frame {at} of its sequence: {reason}")

    async def _vanish(self, under_way: Sequence[asyncio.Task[None]]) -> None:
        """Break the connection as a program does that is killed: nothing is ended."""
        client, self._client = self._client, None
        await client.abandon()
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
