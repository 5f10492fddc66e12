"""The benchmark of streams: many sessions that each bring frames at their own pace, or one for very long.

Latency is from `push` until the result can be pulled. Every stream's first frames are checked against PyTorch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dagan_rt.benchmarking.frames import (
    CHECKED,
    LEAST_PSNR,
    Bench,
    Keep,
    Way,
    WrongFrames,
    device_name,
    in_time,
    opened,
    psnr_of,
    resident,
    said,
    tidy,
    used,
    ways,
)
from dagan_rt.benchmarking.provenance import clocks, provenance
from dagan_rt.benchmarking.rows import CALL, OURS, Results, Row, Timing
from dagan_rt.benchmarking.subjects import SOURCES
from dagan_rt.benchmarking.suites import Form, FrameSuite, Load
from dagan_rt.streams import Stream, Streams

BATCHES = (1, 2, 4, 8, 16, 32)
WARM_UP = 0.5  # seconds of each load that are not counted
SAMPLES = 20  # of memory, of a soak
PATIENCE = 60.0  # seconds until a result that does not come is an error


def run(suite: FrameSuite, bench: Bench, commit: str = "", keep: Keep = lambda results: None, soak: int = 0) -> Results:
    """Measure every backend of ours under every load; or, with `soak`, that many frames of the first load."""
    device = device_name(bench.place)
    origin = provenance(device, suite.digest, commit) | {"clocks at the start": clocks(device)}
    rows: list[Row] = []
    for way in ways(Form(OURS, (1,)), bench):
        rows += measure(way, suite.load, bench, soak)
        keep(Results("streams", origin, {}, tuple(rows)))
        tidy(bench.place)
    results = Results("streams", origin | {"clocks at the end": clocks(device)}, {}, tuple(rows))
    keep(results)
    return results


def measure(way: Way, load: Load, bench: Bench, soak: int) -> list[Row]:
    """A row for each number of streams; all on the same frames, made for the most."""
    rows: list[Row] = []
    left = list(load.streams[:1] if soak else load.streams)

    def row(count: int, **more: Any) -> Row:
        made = bench.row("soak" if soak else "streams", way, 1, **more)
        pace = f"--soak {soak}" if soak else f"--fps {load.fps:g}"
        case = {"model": bench.subject.name, "streams": str(count), "fps": f"{load.fps:g}"}
        command = made.command.replace("--batches 1", f"--streams {count} {pace}")
        return replace(made, case=case | ({"frames": str(soak)} if soak else {}), command=command)

    try:
        in_time(bench)
        most = max(left)
        sizes = [size for size in BATCHES if size < 2 * most] if bench.place != "cpu" else [1]
        with opened(way, most + 1 + most // 16, sizes, bench) as (frames, memory):
            for count in tuple(left):
                in_time(bench)
                with Streams(frames, most=count, batch=sizes[-1]) as streams:
                    error = check(way, streams, count, bench)
                    if soak:
                        times, values = endure(streams, count, soak, bench)
                    else:
                        times, values = loaded(streams, count, load, bench)
                rows.append(row(count, times=times, values=memory | values, error=error, method="push to pull",
                                clocks=clocks(device_name(bench.place))))  # fmt: skip
                left.remove(count)
            del frames
    except Exception as error:
        status = "wrong" if isinstance(error, WrongFrames) else "refused"
        rows += [row(count, status=status, reason=said(error)) for count in left]
    return rows


@dataclass
class Client:
    """One stream and who reads it."""

    stream: Stream
    number: int
    frames: np.ndarray
    latencies: list[float] = field(default_factory=list)  # seconds, with when they were known
    known: list[float] = field(default_factory=list)
    refill: bool = False  # push another frame for each result
    errors: list[str] = field(default_factory=list)

    def push(self, at: int) -> None:
        """Hand in the `at`-th frame of this stream."""
        self.stream.push(self.frames[(at * 7 + self.number) % len(self.frames)])

    def read(self) -> None:
        """Pull until the stream is closed."""
        try:
            for at, result in enumerate(self.stream):
                self.latencies.append(result.latency)
                self.known.append(time.monotonic())
                if self.refill:
                    self.push(at)
        except Exception as error:
            self.errors.append(said(error))


def check(way: Way, streams: Streams, count: int, bench: Bench) -> float:
    """The largest difference in levels of one frame of each of `count` streams; WrongFrames where it is too large."""
    worst, least = 0.0, float("inf")
    for number in range(count):
        stream = streams.open(bench.faces.sources[number % SOURCES])
        index = number // SOURCES % CHECKED
        stream.push(bench.faces.frames[-1])
        stream.pull(PATIENCE)
        stream.push(bench.faces.frames[index])
        result = stream.pull(PATIENCE)
        assert result is not None
        difference = np.abs(result.image.astype(np.float64) - bench.expected[number % SOURCES, index])
        worst, least = max(worst, float(difference.max())), min(least, psnr_of(float((difference**2).mean())))
        stream.close()
    if least < LEAST_PSNR[way.precision]:
        raise WrongFrames(worst, least, LEAST_PSNR[way.precision])
    return worst


def loaded(streams: Streams, count: int, load: Load, bench: Bench) -> tuple[dict[str, Timing], dict[str, float]]:
    """Latencies and counts of `count` streams at the load's pace, or, at 0 fps, with two frames under way each."""
    clients, threads = started(streams, count, bench, refill=not load.fps)
    before, start = streams.stats, time.monotonic()
    behind = paced([client.push for client in clients], load.fps, load.seconds) if load.fps else 0.0
    if not load.fps:
        time.sleep(load.seconds)
    end, after = time.monotonic(), streams.stats
    ended(clients, threads)
    counted = [
        1e6 * latency
        for client in clients
        for latency, known in zip(client.latencies, client.known, strict=True)
        if start + min(WARM_UP, load.seconds / 2) < known <= end
    ]
    if not counted:
        raise RuntimeError("no result came in time")
    values = {
        "frames/s": (after.driven - before.driven) / (end - start),
        "drops": float(after.dropped_in + after.dropped_out - before.dropped_in - before.dropped_out),
        "errors": float(after.errors - before.errors),
        "behind ms": 1e3 * behind,
    }
    return {CALL: Timing.of(counted)}, values


def endure(streams: Streams, count: int, soak: int, bench: Bench) -> tuple[dict[str, Timing], dict[str, float]]:
    """`soak` frames with two under way in each stream; memory on the way there."""
    clients, threads = started(streams, count, bench, refill=True)
    first, start = streams.stats.driven, time.monotonic()
    samples: list[tuple[int, float, float]] = []  # frames so far, bytes on the device, of the process
    for step in range(1, SAMPLES + 1):
        target = first + soak * step // SAMPLES
        while (done := streams.stats.driven) < target:
            if any(client.errors for client in clients):
                break
            time.sleep(0.005)
        samples.append((done - first, used(bench.place), resident()))
        for client in clients:  # or they would be what grows
            del client.latencies[:-1000], client.known[:-1000]
    seconds = time.monotonic() - start
    latencies = [1e6 * latency for client in clients for latency in client.latencies]
    ended(clients, threads)
    frames, device, process = (np.array(column, float) for column in zip(*samples, strict=True))
    values = {"frames/s": float(frames[-1]) / seconds, "frames driven": float(frames[-1])}
    for name, held in (("device", device), ("process", process)):
        values[f"{name} bytes at first"], values[f"{name} bytes at last"] = float(held[0]), float(held[-1])
        values[f"{name} growth bytes/frame"] = max(0.0, slope(frames, held))
    return {CALL: Timing.of(latencies)}, values


def slope(frames: np.ndarray, held: np.ndarray) -> float:
    """Bytes a frame, over all samples but the first quarter, in which caches fill."""
    late = len(frames) // 4
    return float(np.polyfit(frames[late:], held[late:], 1)[0])


def started(streams: Streams, count: int, bench: Bench, refill: bool) -> tuple[list[Client], list[threading.Thread]]:
    """Streams whose sessions have begun, and a reader for each."""
    clients = []
    for number in range(count):
        stream = streams.open(bench.faces.sources[number % SOURCES])
        stream.push(bench.faces.frames[-1])
        stream.pull(PATIENCE)
        clients.append(Client(stream, number, bench.faces.frames, refill=refill))
    threads = [threading.Thread(target=client.read, daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    for client in clients if refill else ():
        client.push(0)
        client.push(1)
    return clients, threads


def ended(clients: Sequence[Client], threads: Sequence[threading.Thread]) -> None:
    """Close the streams and wait for their readers; RuntimeError with the first thing that went wrong."""
    for client in clients:
        client.refill = False
        client.stream.close()
    for thread in threads:
        thread.join(PATIENCE)
    for client in clients:
        if client.errors:
            raise RuntimeError(f"stream {client.number}: {client.errors[0]}")


def paced(
    pushes: Sequence[Callable[[int], None]],
    fps: float,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Call each of `pushes` `fps` times a second with its count, evenly spread; gives the greatest delay in seconds.

    Pushes that are late are made up for, as a camera's frames are.
    """
    start, behind = clock(), 0.0
    for at in range(round(fps * seconds)):
        for index, push in enumerate(pushes):
            due = start + (at + index / len(pushes)) / fps
            if (early := due - clock()) > 0:
                sleep(early)
            behind = max(behind, clock() - due)
            push(at)
    return behind
