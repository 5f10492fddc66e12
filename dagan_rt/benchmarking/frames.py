"""The benchmark of whole frames: uint8 in host memory in, uint8 in host memory out, checked, then timed by batch.

Two rows a batch: `latency`, from handing a batch in until its images are there, one batch at a time; `throughput`, the
time from one batch's images to the next's with as many batches under way as the form allows.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dagan_rt import backends
from dagan_rt.benchmarking.provenance import clocks, command, provenance
from dagan_rt.benchmarking.rows import CALL, DEVICE, DOWNLOAD, OURS, UPLOAD, Results, Row, Timing
from dagan_rt.benchmarking.subjects import SOURCES, Faces, Subject, faces
from dagan_rt.benchmarking.suites import PEERS, Effort, Form, FrameSuite
from dagan_rt.errors import InputError
from dagan_rt.frames import Frames, GraphFrames, open_frames

Keep = Callable[[Results], None]

RING = 48  # different frames in host memory
CHECKED = 8  # of them; the reference is computed for these and every source
PARTS = 30  # batches whose parts are timed
LEAST = 5  # samples of a row
CHUNKS = 12  # of a run, whose mean times show the spread of the throughput
#: PSNR that frames must keep against float32, dB. A frame driven by its neighbour's key points has about 20.
LEAST_PSNR = {"float32": 50.0, "float16": 32.0, "bfloat16": 24.0, "int8": 20.0}
GPU = ("cuda", "tensorrt")  # in the name of a backend that runs on one


class OutOfTime(Exception):
    """The suite's seconds are over."""


class WrongFrames(Exception):
    """A form shows something else."""

    def __init__(self, levels: float, psnr: float, least: float) -> None:
        super().__init__(
            f"frames differ from float32 PyTorch by {levels:.0f} levels, {psnr:.1f} dB; needed: {least:.0f} dB"
        )
        self.levels, self.psnr = levels, psnr


@dataclass(frozen=True)
class Way:
    """One way to compute whole frames."""

    form: str
    precision: str  # float32, float16, bfloat16 or int8
    open: Callable[[int, Sequence[int]], Frames]  # from slots and batches; it raises what forbids it


@dataclass(frozen=True)
class Bench:
    """What all rows of a run share."""

    subject: Subject
    faces: Faces
    expected: np.ndarray  # [SOURCES, CHECKED, H, W, 3] uint8, by PyTorch in float32
    place: str  # as PyTorch calls it
    effort: Effort
    repeat: list[str]  # arguments of the command but for form and batch
    deadline: float  # by time.monotonic()
    only: tuple[str, ...] = ()  # forms that start so, and backends of ours that do; empty: all

    def row(self, group: str, way: Way, batch: int, **more: Any) -> Row:
        """A measured row, or with `status` and `reason` another."""
        given = [*self.repeat, "--forms", way.form.removeprefix(f"{OURS} "), "--batches", str(batch)]
        case = {"model": self.subject.name, "batch": str(batch)}
        row = Row(group, case, way.form, "measured", precision=way.precision, command=command(given))
        return replace(row, **more)


def run(suite: FrameSuite, bench: Bench, commit: str = "", keep: Keep = lambda results: None,
        elsewhere: Callable[[Form, float], list[Row]] | None = None) -> Results:  # fmt: skip
    """Measure the forms of a suite; `keep` is given what is known so far after each.

    elsewhere: measures a form in a process of its own, within some seconds; these come last.
    """
    from tqdm import tqdm

    device = device_name(bench.place)
    origin = provenance(device, suite.digest, commit) | {"clocks at the start": clocks(device)}
    origin |= {
        "networks": f"{bench.subject.name}, {bench.subject.model.config.size} × {bench.subject.model.config.size}"
    }
    rows: list[Row] = []
    apart = [form for form in suite.forms if form.seconds and elsewhere]
    here = [(way, form.batches) for form in suite.forms if form not in apart for way in ways(form, bench)]
    lost = ""
    for way, batches in (bar := tqdm(here, unit="form", disable=None)):
        bar.set_description(way.form)
        if lost:
            rows += unmeasured(way, batches, bench, "skipped", lost)
            continue
        for row in measure(way, batches, bench):
            rows.append(row)
            keep(Results("frames", origin, {}, tuple(rows)))
        try:
            tidy(bench.place)
        except Exception as error:
            lost = f"the device was lost after {way.form}: {said(error)}"
    for form in apart:
        assert elsewhere is not None
        rows += elsewhere(form, min(form.seconds, bench.deadline - time.monotonic()))
    results = Results("frames", origin | {"clocks at the end": clocks(device)}, {}, tuple(rows))
    keep(results)
    return results


def prepare(subject: Subject, place: str, effort: Effort, repeat: list[str], only: tuple[str, ...] = ()) -> Bench:
    """Faces, and what PyTorch in float32 makes of some of them."""
    deadline = time.monotonic() + effort.seconds
    drawn = faces(subject.model.config.size, RING)
    return Bench(subject, drawn, reference(subject, place, drawn), place, effort, repeat, deadline, only)


def reference(subject: Subject, place: str, drawn: Faces) -> np.ndarray:
    """The first `CHECKED` frames for every source by PyTorch in float32, [SOURCES, CHECKED, H, W, 3] uint8."""
    import torch

    from dagan_rt.backends.torch import TorchBackend

    # PyTorch rounds float32 convolutions to TF32 unless told.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        frames = GraphFrames(TorchBackend(copy.deepcopy(subject.model).to(place)), subject.bundle, SOURCES, (CHECKED,))
        begin(frames, drawn)
        found = [frames.submit([slot] * CHECKED, drawn.batch(0, CHECKED)).result() for slot in range(SOURCES)]
    return np.stack(found)


def begin(frames: Frames, drawn: Faces) -> None:
    """A session in every slot; the portraits take turns. The initial frame is one that is not checked."""
    for slot in range(frames.slots):
        frames.set_source(slot, drawn.sources[slot % SOURCES])
        frames.begin(slot, drawn.frames[-1])


def ways(form: Form, bench: Bench) -> list[Way]:
    """A peer, or every backend of ours for the kind of device, in each precision."""
    subject, place = bench.subject, bench.place
    if form.name in PEERS:

        def peer(slots: int, batches: Sequence[int]) -> Frames:
            from dagan_rt.benchmarking.frame_peers import open_peer

            return open_peer(form.name, subject.model, place, batches)

        return [Way(form.name, "float32" if form.name == "published" or place == "cpu" else "float16", peer)]
    on_gpu = place != "cpu"
    names = [name for name in backends.names() if any(kind in name for kind in GPU) == on_gpu]
    found = []
    for name in names:
        precisions = ("float16", "bfloat16") if name == "torch-cuda" else (_precision(subject, name),)
        for precision in precisions:
            shown = f"{OURS} {name} {precision}" if name == "torch-cuda" else f"{OURS} {name}"
            if not bench.only or any(shown.removeprefix(f"{OURS} ").startswith(start) for start in bench.only):
                found.append(Way(shown, precision, _opener(name, precision, subject)))
    return found


def _precision(subject: Subject, backend: str) -> str:
    """Of a bundle's least exact graph; the torch backend runs the weights."""
    held = {graph.precision for graph in subject.bundle.graphs.values()}
    if backend == "torch" or held == {"fp32"}:
        return "float32"
    return "int8" if "int8" in held else "float16"


def _opener(name: str, precision: str, subject: Subject) -> Callable[[int, Sequence[int]], Frames]:
    def open_ours(slots: int, batches: Sequence[int]) -> Frames:
        return open_frames(open_backend(name, precision, subject), subject.bundle, slots, batches)

    return open_ours


def open_backend(name: str, precision: str, subject: Subject) -> backends.Backend:
    """A backend on the subject's networks; InputError where it cannot run here, or cannot without a bundle."""
    if reason := backends.missing(name, subject.bundle if subject.exported else None):
        raise InputError(reason)
    model = copy.deepcopy(subject.model)
    if name == "torch-cuda":
        from dagan_rt.backends.torch_cuda import TorchCudaBackend

        return TorchCudaBackend(model.cuda(), precision)
    if name == "torch":
        from dagan_rt.backends.torch import TorchBackend

        return TorchBackend(model)
    if not subject.exported:
        raise InputError(f"backend {name} runs exported graphs: measure it with --bundle DIR")
    return backends.open_backend(name, subject.bundle)


def measure(way: Way, batches: Sequence[int], bench: Bench) -> Iterator[Row]:
    """Both rows of every batch. A batch of one has frames of its own, as a `Reenactor` has."""
    for sizes in ([size for size in batches if size == 1], sorted(size for size in batches if size > 1)):
        left = list(sizes)
        try:
            in_time(bench)
            if sizes:
                with opened(way, max(sizes), sizes, bench) as (frames, memory):
                    for size in sizes:
                        in_time(bench)
                        yield from measure_batch(way, frames, size, bench, memory)
                        left.remove(size)
                    del frames  # so that its memory is free for the next
        except OutOfTime as over:
            yield from unmeasured(way, left, bench, "skipped", str(over))
        except WrongFrames as wrong:
            values = {"PSNR dB": max(0.0, wrong.psnr)}
            yield from unmeasured(way, left, bench, "wrong", str(wrong), error=wrong.levels, values=values)
        except Exception as error:
            yield from unmeasured(way, left, bench, "refused", said(error))


def unmeasured(way: Way, batches: Sequence[int], bench: Bench, status: str, reason: str, **more: Any) -> list[Row]:
    """Both rows of every batch, without times."""
    groups = ("latency", "throughput")
    return [bench.row(group, way, size, status=status, reason=reason, **more) for size in batches for group in groups]


def in_time(bench: Bench) -> None:
    """OutOfTime where the suite's seconds are over."""
    if time.monotonic() > bench.deadline:
        raise OutOfTime(f"the {bench.effort.seconds:.0f} s of the suite were over")


@contextmanager
def opened(way: Way, slots: int, batches: Sequence[int], bench: Bench) -> Iterator[tuple[Frames, dict[str, float]]]:
    """Frames with a session in every slot, and the memory they hold, without what PyTorch only keeps in its cache."""
    tidy(bench.place)
    before = used(bench.place)
    start = time.perf_counter()
    frames = way.open(slots, batches)
    try:
        begin(frames, bench.faces)
        ready = time.perf_counter() - start
        tidy(bench.place)
        memory = {"seconds to open": ready, "device bytes": max(0.0, used(bench.place) - before)}
        if frames.slot_bytes:
            memory |= {"slot bytes": float(frames.slot_bytes), "fixed bytes": float(frames.fixed_bytes)}
        yield frames, memory
    finally:
        frames.close()
        del frames
        tidy(bench.place)


def measure_batch(way: Way, frames: Frames, size: int, bench: Bench, memory: dict[str, float]) -> list[Row]:
    """Check, time, and check again."""
    slots = [index % frames.slots for index in range(size)]
    drive = Driver(frames, slots, bench.faces)
    check(way, frames, slots, bench)
    samples = latencies(drive, bench.effort)
    levels, psnr = check(way, frames, slots, bench)
    measured_at = clocks(device_name(bench.place))
    parts = [frames.timed(slots, drive.next()) for _ in range(min(PARTS, len(samples)))]
    times = {CALL: Timing.of(samples)}
    for name in (DEVICE, UPLOAD, DOWNLOAD):
        times[name] = Timing.of([1e6 * max(1e-9, getattr(part, name)) for part in parts])
    spans, calls = periods(drive, bench.effort, times[CALL].p50)
    period = Timing.of(spans, calls=calls)
    check(way, frames, slots, bench)
    exact = {"error": levels, "clocks": measured_at}
    values = {"PSNR dB": psnr, **memory, **peak(bench.place)}
    rate = {
        "PSNR dB": psnr,
        "frames/s": 1e6 * size * calls * len(spans) / sum(spans),
        "batches ahead": float(frames.ahead),
    }
    one, many = "one batch at a time", f"{frames.ahead} batches under way"
    return [
        bench.row("latency", way, size, times=times, values=values, method=f"wall clock, {one}", **exact),
        bench.row("throughput", way, size, times={CALL: period}, values=rate, method=f"wall clock, {many}", **exact),
    ]  # fmt: skip


class Driver:
    """Batches of frames, each of other pixels than the one before."""

    def __init__(self, frames: Frames, slots: Sequence[int], drawn: Faces) -> None:
        self.frames, self.slots, self._faces, self._at = frames, slots, drawn, 0

    def next(self) -> list[np.ndarray]:
        """The next batch."""
        self._at += 1
        return self._faces.batch(self._at, len(self.slots))

    def submit(self) -> Any:
        """Hand the next batch in."""
        return self.frames.submit(self.slots, self.next())


def latencies(drive: Driver, effort: Effort, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Microseconds from handing in a batch until its images are there, one at a time."""
    for _ in range(LEAST):
        drive.submit().result()
    samples: list[float] = []
    end = clock() + effort.row_seconds
    while len(samples) < LEAST or (len(samples) < effort.repeats and clock() < end):
        batch = drive.next()
        start = clock()
        drive.frames.submit(drive.slots, batch).result()
        samples.append(1e6 * (clock() - start))
    return samples


def periods(
    drive: Driver, effort: Effort, each: float, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], int]:
    """Microseconds of chunks of batches, as many under way as the frames take, and how many batches a chunk has.

    each: microseconds of a batch, about.
    """
    calls = max(1, min(effort.repeats, int(1e6 * effort.row_seconds / max(each, 1.0))) // CHUNKS)
    pending = deque(drive.submit() for _ in range(drive.frames.ahead))
    spans: list[float] = []
    start = clock()
    for _ in range(CHUNKS):
        for _ in range(calls):
            pending.popleft().result()
            pending.append(drive.submit())
        now = clock()
        spans.append(1e6 * (now - start))
        start = now
    for batch in pending:
        batch.result()
    return spans, calls


def check(way: Way, frames: Frames, slots: Sequence[int], bench: Bench) -> tuple[float, float]:
    """The largest difference from float32 PyTorch in levels, and PSNR in dB; `WrongFrames` where that is too low.

    Every image counts, in its own batch and slot: the worst one's PSNR is given.
    """
    # The slots' portraits take turns, so frames advance at every second one: each pair of both occurs.
    chosen = [index // SOURCES % CHECKED for index in range(len(slots))]
    levels, least = 0.0, math.inf
    for shift in range(2 if len(slots) == 1 else 1):  # one image alone may be right by a stale buffer
        picked = [(index + shift) % CHECKED for index in chosen]
        found = frames.submit(slots, [bench.faces.frames[index] for index in picked]).result()
        if found.dtype != np.uint8 or found.shape != (len(slots), *bench.expected.shape[2:]):
            raise InputError(
                f"frames must be uint8 {(len(slots), *bench.expected.shape[2:])}, got {found.dtype} {found.shape}"
            )
        for image, slot, index in zip(found, slots, picked, strict=True):
            difference = np.abs(image.astype(np.float64) - bench.expected[slot % SOURCES, index])
            levels = max(levels, float(difference.max()))
            least = min(least, psnr_of(float((difference**2).mean())))
    if least < LEAST_PSNR[way.precision]:
        raise WrongFrames(levels, least, LEAST_PSNR[way.precision])
    return levels, least


def psnr_of(mean_square: float) -> float:
    """dB of images of 255 levels; 200 where nothing differs."""
    return 10 * math.log10(255**2 / mean_square) if mean_square > 0 else 200.0


def used(place: str) -> float:
    """Bytes in use on the device by everybody; of the process on a CPU."""
    if place == "cpu":
        return resident()
    import torch

    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return float(total - free)


def resident() -> float:
    """Bytes of memory the process holds now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return float(file.read().split()[1]) * 4096
    except OSError:
        return 0.0


def peak(place: str) -> dict[str, float]:
    """The most bytes that PyTorch's allocator handed out since the frames were opened."""
    if place == "cpu":
        return {}
    import torch

    return {"torch peak bytes": float(torch.cuda.max_memory_allocated())}


def tidy(place: str) -> None:
    """Give back the memory that nobody uses any more."""
    import gc

    gc.collect()
    if place != "cpu":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def device_name(place: str) -> str:
    """As people call it."""
    if place == "cpu":
        return "cpu"
    import torch

    return str(torch.cuda.get_device_name(place))


def said(error: BaseException) -> str:
    """An exception as one short line."""
    text = " ".join(str(error).split())
    return (text if isinstance(error, InputError) else f"{type(error).__name__}: {text}")[:600]
