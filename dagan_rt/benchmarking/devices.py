"""How calls are timed: on a GPU by events around replays of a CUDA graph, elsewhere by the wall clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

from dagan_rt.benchmarking.rows import ALONE, CALL, HOST, Timing
from dagan_rt.benchmarking.suites import Effort
from dagan_rt.errors import InputError, require

Call = Callable[[], tuple[Any, ...]]

LEAST_REPEATS = 5
MOST_SETS = 1024  # of inputs
GRAPH_MICROSECONDS = 400.0  # a replay lasts at least about this long, so that starting it does not count
TINY = 100.0  # microseconds; shorter calls are also timed alone


@dataclass(frozen=True)
class Measured:
    """What timing calls gave."""

    times: dict[str, Timing]  # of a CALL in a row of them; HOST, until an eager call returns; ALONE, if that was timed
    method: str  # of CALL
    outputs: tuple[Any, ...]  # of the last call that was timed

    @property
    def p50(self) -> float:
        """Microseconds of a call."""
        return self.times[CALL].p50


class Device(Protocol):
    """Where calls run."""

    name: str
    place: str  # as PyTorch calls it
    reference: bool  # our operations run as their PyTorch twins

    def sets(self, size: float) -> int:
        """How many sets of inputs and outputs of `size` bytes to take in turn, so that none is in a cache."""

    def active(self) -> Any:
        """A context in which calls and their inputs are made."""

    def wait(self) -> None:
        """Until all work is done; raises what went wrong in it."""

    def tidy(self) -> None:
        """Between cases: give memory back where it gets short."""

    def measure(self, calls: Sequence[Call], effort: Effort) -> Measured:
        """Time calls, which are the same work on different sets."""


class Processor:
    """The CPU and a wall clock: for trying a suite out, and for tests."""

    name = "cpu"
    place = "cpu"
    reference = True

    def sets(self, size: float) -> int:
        return 2

    def active(self) -> Any:
        return nullcontext()

    def wait(self) -> None:
        pass

    def tidy(self) -> None:
        pass

    def measure(self, calls: Sequence[Call], effort: Effort) -> Measured:
        outputs = calls[0]()
        samples: list[float] = []
        end = time.perf_counter() + effort.row_seconds
        while len(samples) < LEAST_REPEATS or (len(samples) < effort.repeats and time.perf_counter() < end):
            start = time.perf_counter()
            outputs = calls[len(samples) % len(calls)]()
            samples.append(1e6 * (time.perf_counter() - start))
        return Measured({CALL: Timing.of(samples)}, "wall clock", outputs)


class Gpu:
    """An NVIDIA GPU through PyTorch, on a stream of its own."""

    reference = False

    def __init__(self) -> None:
        torch = require("torch", extra="torch", why="benchmarking")
        if not torch.cuda.is_available():
            raise InputError(
                "benchmarking needs an NVIDIA GPU that PyTorch can use and found none: "
                "--device cpu times the PyTorch references by the wall clock instead"
            )
        torch.set_float32_matmul_precision("highest")  # float32 rows and ceilings are float32, not TF32
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name, self.place = properties.name, f"cuda:{torch.cuda.current_device()}"
        self._cache, self._memory = properties.L2_cache_size, properties.total_memory
        self._stream = torch.cuda.Stream()
        self._flush = torch.empty(2 * self._cache, dtype=torch.uint8, device=self.place)

    def sets(self, size: float) -> int:
        """Twice the L2 cache's worth: with a cache that drops what was used longest ago, none of it is met again."""
        return min(MOST_SETS, max(1, ceil(2 * self._cache / size)))

    @contextmanager
    def active(self) -> Iterator[None]:
        import torch

        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def wait(self) -> None:
        import torch

        torch.cuda.synchronize()

    def tidy(self) -> None:
        import torch

        if 2 * torch.cuda.memory_reserved() > self._memory:
            torch.cuda.empty_cache()  # takes long, and taking the memory again does too

    def measure(self, calls: Sequence[Call], effort: Effort) -> Measured:
        for at in range(3):
            calls[at % len(calls)]()
        (eager,) = self._spans(lambda: [call() for call in calls], 1)
        # Whole turns through the sets; an eager call takes longer than the same call in a graph, so this is enough.
        turns = max(1, min(64, ceil(GRAPH_MICROSECONDS * len(calls) / eager)) // len(calls))
        in_turn = list(calls) * turns
        try:
            graph, outputs = self._captured(in_turn, keep=len(calls))
            replay, method = graph.replay, f"CUDA graph of {len(in_turn)} calls, {len(calls)} sets of arrays in turn"
        except Exception as error:  # whatever forbids capture; what the call itself has to say came in the warm-up
            self.wait()
            graph, outputs = None, calls[-1]()
            method = f"stream of {len(in_turn)} calls, {len(calls)} sets of arrays in turn; not captured: {error}"[:300]

            def replay() -> None:
                for call in in_turn:
                    call()

        timing = Timing.of(self._repeat(replay, effort), calls=len(in_turn))
        times = {CALL: timing, HOST: self._host(calls, 5 if timing.p50 > 1000 else 20)}
        if graph is not None and timing.p50 < TINY:
            times[ALONE] = self._alone(calls[0], effort)
        return Measured(times, method, outputs)

    def _spans(self, work: Callable[[], Any], repeats: int) -> list[float]:
        """Microseconds of the device from an event before the work to one after, the L2 cache overwritten before."""
        import torch

        spans = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in spans:
            self._flush.zero_()  # keeps the device busy until the work is queued, so that starting it is not timed
            start.record()
            work()
            end.record()
        self.wait()
        return [1e3 * start.elapsed_time(end) for start, end in spans]

    def _captured(self, calls: Sequence[Call], keep: int) -> tuple[Any, tuple[Any, ...]]:
        """A graph of the calls, and the outputs of the last; the last `keep` calls have outputs of their own."""
        import torch

        graph, outputs = torch.cuda.CUDAGraph(), deque[tuple[Any, ...]](maxlen=keep)
        self.wait()
        # Not by torch.cuda.graph, which hands all cached memory back to the driver each time. Threads of the autograd
        # engine and of compilers may allocate meanwhile, hence thread_local.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in calls:
                outputs.append(call())
        finally:
            graph.capture_end()
        graph.replay()
        self.wait()
        return graph, outputs[-1]

    def _repeat(self, replay: Callable[[], None], effort: Effort) -> list[float]:
        (once,) = self._spans(replay, 1)
        repeats = max(LEAST_REPEATS, min(effort.repeats, int(1e6 * effort.row_seconds / max(once, 1.0))))
        return self._spans(replay, repeats)

    def _alone(self, call: Call, effort: Effort) -> Timing:
        """One call a replay; includes what starting a graph takes the device."""
        graph, _ = self._captured([call], keep=1)
        return Timing.of(self._spans(graph.replay, effort.repeats))

    def _host(self, calls: Sequence[Call], repeats: int) -> Timing:
        samples = []
        for at in range(repeats):
            start = time.perf_counter()
            calls[at % len(calls)]()
            samples.append(1e6 * (time.perf_counter() - start))
        self.wait()
        return Timing.of(samples)


def open_device(name: str) -> Device:
    """By name: cuda or cpu. InputError where there is no GPU."""
    return Processor() if name == "cpu" else Gpu()
