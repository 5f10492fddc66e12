"""The three commands of `dagan_rt.serving.load`: measure, print, keep; each returns the exit code."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from dagan_rt.benchmarking.cpu import processor
from dagan_rt.benchmarking.printing import report
from dagan_rt.benchmarking.provenance import provenance
from dagan_rt.benchmarking.rows import OURS, Results, Row
from dagan_rt.bundle import MANIFEST, Bundle, digest
from dagan_rt.errors import InputError
from dagan_rt.images import decode_image, encode_image
from dagan_rt.serving import overhead, pacing, soak
from dagan_rt.serving.answers import Answers, drawn_ring, drawn_sources
from dagan_rt.serving.asynchronous import AsyncClient, Served
from dagan_rt.serving.client import Client, _loop
from dagan_rt.serving.counters import REFRESH, Counters
from dagan_rt.serving.load import PROGRAM, SHARED_MEMORY
from dagan_rt.serving.protocol import Settings
from dagan_rt.serving.target import Target, opened
from dagan_rt.serving.transport import Address

T = TypeVar("T")


def load(args: argparse.Namespace, given: Sequence[str]) -> int:
    """N sessions at their own pace. given: the arguments as typed."""
    for count in args.streams:
        _within("--streams", count, 1, 4096)
    _within("--fps", args.fps, 0.01, 1000)
    _within("--seconds", args.seconds, 0.1, 86400)
    _within("--churn", args.churn, 0, 86400)
    _within("--deadline", args.deadline, 0.001, 3600)
    with _opened(args) as target:
        url = target.urls[0]
        if args.http is not None:
            url = target.urls[1] if len(target.urls) > 1 else _over_http(url, args.http)
        served = _ask(url)
        rows = []
        for count in args.streams:
            rows.append(_load(args, target, url, served, count))
            if rows[-1].reason:
                print(f"note: {', '.join(rows[-1].case.values())}: {rows[-1].reason}", file=sys.stderr)
        return _finish(args, given, rows, served)


def compare(args: argparse.Namespace, given: Sequence[str]) -> int:
    """One session, in this process and through the server."""
    _within("--frames", args.frames, 1, 1_000_000)
    _within("--pause", args.pause, 0, 10_000)
    with _opened(args) as target:
        served = _ask(target.urls[0])
        bundle, backend, threads = _peer(args, target, served)
        sources, ring = drawn_sources(1, served.size), drawn_ring(served.size)
        answers = Answers.in_process(bundle, sources, ring, backend, threads, args.tolerance)
        with (
            overhead.opened(bundle, backend, threads, target.urls, sources[0]) as ways,
            tqdm(total=args.frames + overhead.WARM_UP, unit="frame", disable=None, leave=False) as bar,
        ):
            rows = overhead.measure(ways, answers, args.frames, args.pause / 1e3, bar.update).rows()
        stated = {"backend": backend, "threads": str(threads or "all")}
        return _finish(args, given, rows, served, stated, [overhead.verdict(rows)])


def endure(args: argparse.Namespace, given: Sequence[str]) -> int:
    """Sequences that come and go."""
    _within("--frames", args.frames, 1, 1_000_000_000)
    _within("--sequences", args.sequences, 1, 1024)
    _within("--sources", args.sources, 1, 10_000)
    with _opened(args, sequences=max(64, 4 * args.sequences), idle=args.idle) as target:
        url = target.urls[0]
        served = _ask(url)
        bundle, backend, threads = _peer(args, target, served)
        sources, ring = drawn_sources(args.sources, served.size), drawn_ring(served.size)
        answers = Answers.in_process(bundle, sources, ring, backend, threads, args.tolerance)
        settings = Settings.from_parameters(served.parameters)
        plan = soak.Plan(args.frames, args.sequences, room=settings.sequences, idle=settings.idle, seed=args.seed)
        before = Counters.read(url, target.metrics)
        with _bar(args.frames) as tick:
            found = _wait(soak.run(plan, answers, _connector(url, args), target.memory, tick))
        left = _freed(url, target.metrics, settings.idle)
        times, values = found.summary()
        values |= Counters.read(url, target.metrics).since(before)
        values |= {} if left is None else {"sequences still open": left}
        faults = soak.faults(found, left)
        if before.reason:
            print(f"note: whether sequences stay open is not known: {before.reason}", file=sys.stderr)
        status = "measured" if not faults else "wrong"
        case = {"by": _by(url, args), "streams": str(args.sequences), "frames": str(args.frames)}
        row = Row("soak", case, OURS, status, "; ".join(faults)[:1000], times=times, values=values,
                  method="from sending until the image is there")  # fmt: skip
        stated = {"backend": backend, "threads": str(threads or "all")}
        return _finish(args, given, [row], served, stated)


# ----------------------------------------------------------------------------------------------------------------------
# what they share


def _load(args: argparse.Namespace, target: Target, url: str, served: Served, count: int) -> Row:
    pace = pacing.Pace(count, args.fps, args.seconds, args.churn)
    answers = _answers(args, target, served, 2 * count if args.churn else count)
    readings: list[Counters] = []

    def read() -> None:
        time.sleep(REFRESH)  # the server refreshes its counters every second
        readings.append(Counters.read(url, target.metrics))

    with _bar(pace.frames * count) as tick:
        found = _wait(pacing.run(pace, answers, _connector(url, args), args.deadline, args.encoding, tick, around=read))
    times, values = found.summary(pace, args.late / 1e3)
    values |= readings[1].since(readings[0])
    reasons = [*found.wrong[:3], *found.errors[:3], readings[0].reason]
    if not found.wrong and not times.get(pacing.SENT):
        reasons.insert(0, "no frame was answered")
    status = "wrong" if found.wrong else "measured" if pacing.SENT in times else "refused"
    case = {"by": _by(url, args), "streams": str(count), "fps": f"{args.fps:g}"}
    case |= {"churn": f"a new source every {args.churn:g} s"} if args.churn else {}
    return Row("load", case, OURS, status, "; ".join(filter(None, reasons))[:1000], times=times, values=values,
               method="from when a frame was due until its image is there")  # fmt: skip


def _answers(args: argparse.Namespace, target: Target, served: Served, count: int) -> Answers:
    """Compared with this process if the bundle is known, else with the server's first answers."""
    sources, ring = drawn_sources(count, served.size), drawn_ring(served.size)
    lossy = args.encoding in ("JPEG", "WEBP")
    if target.bundle is None:
        return Answers(sources, ring, None, args.tolerance, lossy)
    bundle, backend, threads = _peer(args, target, served)

    def sent(image: np.ndarray) -> np.ndarray:
        return decode_image(encode_image(image, args.encoding), "image")

    return Answers.in_process(bundle, sources, ring, backend, threads, args.tolerance, sent if lossy else None)


def _peer(args: argparse.Namespace, target: Target, served: Served) -> tuple[Bundle, str, int | None]:
    """The bundle, and the backend and threads that the server has, unless others are asked for."""
    if target.bundle is None:
        raise InputError("comparing with this process needs what the server serves: give --bundle DIR")
    stated = served.parameters.get("bundle_sha256", "")
    if stated and stated != (own := digest(target.bundle.path / MANIFEST)["sha256"]):
        raise InputError(f"--bundle must be what the server serves, {stated[:12]}…, got another one, {own[:12]}…")
    backend = args.backend or served.parameters.get("backend", "auto")
    if backend == "auto":
        raise InputError("the server chose its backend itself: name it with --backend, as its log says it")
    threads = args.threads or int(served.parameters.get("threads", "0"))
    return target.bundle, backend, threads or None


def _opened(args: argparse.Namespace, **plan: Any) -> contextlib.AbstractContextManager[Target]:
    plan |= {"backend": args.backend or "onnxruntime", "threads": args.threads or 0}
    return opened(args.where, args.bundle, args.metrics, args.python, **plan)


def _ask(url: str) -> Served:
    """What the server serves."""
    with Client(url) as client:
        return client.served


def _connector(url: str, args: argparse.Namespace) -> pacing.Connect:
    return lambda: AsyncClient(url, shared_memory=SHARED_MEMORY[args.shared_memory]).connect()


def _wait(work: Coroutine[Any, Any, T]) -> T:
    """Run it in the event loop of all clients: gRPC wants one a process."""
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _over_http(url: str, port: int) -> str:
    """port: 0 is the one before gRPC's."""
    address = Address.parse(url)
    if not address.is_grpc:
        return url
    scheme = "https" if address.scheme == "grpcs" else "http"
    return str(Address(scheme, address.host, port or address.port - 1))


def _by(url: str, args: argparse.Namespace) -> str:
    protocol = "gRPC" if url.startswith("grpc") else "HTTP"
    encoding = getattr(args, "encoding", None)
    return ", ".join([protocol, encoding or f"shared memory {args.shared_memory}"])


def _freed(url: str, metrics: str, idle: float) -> float | None:
    """Sequences that are open although nobody uses them any more; None where the server does not tell."""
    late = time.monotonic() + 2 * idle + 5
    while (count := Counters.read(url, metrics).metrics.get("dagan_sequences_open")) and time.monotonic() < late:
        time.sleep(0.5)
    return count


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of frames, where stderr is a terminal; gives what sets it."""
    with tqdm(total=total, unit="frame", disable=None, leave=False) as bar:
        yield lambda frames: bar.update(frames - bar.n)


def _within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InputError(f"{name} must be {least:g} to {most:g}, got {value:g}")


def _named(argument: str) -> str:
    """As typed, files by their names: the folders of one machine tell nobody else anything."""
    return shlex.quote(argument if "://" in argument else argument.rsplit("/", 1)[-1])


def _finish(
    args: argparse.Namespace, given: Sequence[str], rows: Sequence[Row], served: Served,
    stated: Mapping[str, str] | None = None, verdicts: Sequence[str] = (),
) -> int:  # fmt: skip
    """Print and keep; 1 where a row is wrong."""
    known = provenance("cpu", "", args.commit) | {
        "command": " ".join([PROGRAM, *map(_named, given)]),
        "device": processor(), "server": served.server, "model": f"{served.model}: {served.name}",
    }  # fmt: skip
    del known["suite digest"]
    results = Results("serving", known | dict(stated or {}), {}, tuple(rows))
    if args.json is not None:
        results.write(args.json)
    print(report(results, verdicts=verdicts))
    return int(any(row.status == "wrong" for row in rows))
