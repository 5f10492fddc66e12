"""What a server adds to a frame: one session in this process and through every way to the server, frames in turn.

All ways run the same backend with the same threads. Every image is compared with the one of this process before
anything is timed, and each one that is timed afterwards.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dagan_rt.benchmarking.rows import CALL, OURS, Row, Timing
from dagan_rt.bundle import Bundle
from dagan_rt.errors import InputError
from dagan_rt.reenactor import Reenactor
from dagan_rt.serving import protocol
from dagan_rt.serving.answers import Answers

IN_PROCESS = "in process"
ADDED = "added"  # of a way: its time of a frame less that of this process in the same round
GOAL = 3000.0  # microseconds that the server may add, p50, with shared memory
WARM_UP = 5  # rounds that are not counted

Drive = Callable[[np.ndarray], np.ndarray]


@dataclass
class Measured:
    """What came out."""

    seconds: dict[str, list[float]] = field(default_factory=dict)  # by way, of each round
    wrong: dict[str, str] = field(default_factory=dict)  # by way, the first thing

    def rows(self) -> list[Row]:
        """This process first."""
        rows = []
        for way, seconds in self.seconds.items():
            form = way if way == IN_PROCESS else f"{OURS} {way}"
            if way in self.wrong:
                rows.append(Row("overhead", {"streams": "1"}, form, "wrong", self.wrong[way]))
                continue
            times = {CALL: Timing.of([1e6 * it for it in seconds])}
            values = {"frames": float(len(seconds))}
            if way != IN_PROCESS:
                added = 1e6 * (np.array(seconds) - np.array(self.seconds[IN_PROCESS]))
                p50, p95, p99 = np.percentile(added, (50, 95, 99))
                values |= {"added ms": p50 / 1e3, "added p95 ms": p95 / 1e3, "added p99 ms": p99 / 1e3}
            rows.append(Row("overhead", {"streams": "1"}, form, "measured", times=times, values=values,
                            method="one frame after the other, ways in turn, in another order each time"))  # fmt: skip
        return rows


def measure(
    ways: Mapping[str, Drive],
    answers: Answers,
    rounds: int,
    pause: float = 0.0,
    tick: Callable[[], None] = lambda: None,
) -> Measured:
    """Time each way, whose session of source 0 has not begun; the first way is this process.

    pause: seconds before each frame. Threads of another engine may spin on for a while after their work.
    """
    found = Measured({way: [] for way in ways})
    turns = list(ways)
    chance = random.Random(0)
    for at in range(rounds + WARM_UP):
        chance.shuffle(turns)  # who comes after the engine of this process finds its caches emptied
        for way in turns:
            time.sleep(pause)
            begun = time.perf_counter()
            image = ways[way](answers.frame(at))
            seconds = time.perf_counter() - begun
            if reason := answers.wrong(0, at, image):
                found.wrong.setdefault(way, f"frame {at}: {reason}")
            if at >= WARM_UP:
                found.seconds[way].append(seconds)
        tick()
    return found


@contextlib.contextmanager
def opened(
    bundle: Bundle, backend: str, threads: int | None, urls: Sequence[str], source: np.ndarray
) -> Iterator[dict[str, Drive]]:
    """Every way, its session open: this process; each URL with shared memory and raw; gRPC as one stream."""
    from dagan_rt.serving.client import Client

    with contextlib.ExitStack() as stack:
        reenactor = stack.enter_context(Reenactor(bundle, backend, threads=threads))
        reenactor.set_source(source)
        ways: dict[str, Drive] = {IN_PROCESS: reenactor.drive}
        for url in urls:
            name = "gRPC" if url.startswith("grpc") else "HTTP"
            for shared in (True, False):
                client = stack.enter_context(Client(url, shared_memory=shared))
                session = stack.enter_context(client.open(source))
                ways[f"{name}, shared memory" if shared else name] = session.drive
            if name == "gRPC":
                ways["gRPC stream"] = stack.enter_context(_streamed(url, source))
        yield ways


@contextlib.contextmanager
def _streamed(url: str, source: np.ndarray) -> Iterator[Drive]:
    """A session whose requests share one gRPC stream, by tritonclient alone."""
    import queue

    import tritonclient.grpc as triton

    from dagan_rt.serving.transport import Address

    address = Address.parse(url)
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    sequence = 1 + secrets.randbelow(2**63 - 1)

    def send(name: str, array: np.ndarray, **flags: bool) -> Any:
        tensor = triton.InferInput(name, list(array.shape), "BOOL" if array.dtype == bool else "UINT8")
        tensor.set_data_from_numpy(array)
        wanted = [triton.InferRequestedOutput(protocol.IMAGE)] if name == protocol.FRAME else None
        client.async_stream_infer(protocol.MODEL, [tensor], outputs=wanted, sequence_id=sequence, **flags)
        result, error = answers.get(timeout=60)
        if error is not None:
            raise InputError(f"the server at {url} refused a request of a stream: {error}")
        return result

    with triton.InferenceServerClient(address.netloc, ssl=address.scheme == "grpcs") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        send(protocol.SOURCE, source[None], sequence_start=True)
        yield lambda frame: send(protocol.FRAME, frame[None]).as_numpy(protocol.IMAGE)[0]
        send(protocol.END, np.ones((1, 1), bool), sequence_end=True)


def verdict(rows: Sequence[Row]) -> str:
    """The goal and what was measured."""
    added = [row.values["added ms"] for row in rows if row.form.endswith("shared memory") and "added ms" in row.values]
    if not added:
        return f"goal overhead: at most {GOAL / 1e3:g} ms added with shared memory: not measured"
    met = min(added) <= GOAL / 1e3
    said = f"{min(added):.2f} ms added with shared memory, p50, at most {GOAL / 1e3:g}"
    return f"goal overhead: {said}: {'met' if met else 'NOT met'}"
