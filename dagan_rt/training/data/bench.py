"""How many samples a second the loader makes of each form of the same clips, and whether a training step is fed."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dagan_rt.errors import InputError
from dagan_rt.training.data.folders import ClipFolder
from dagan_rt.training.data.heads import HeadsData
from dagan_rt.training.data.loader import Loader
from dagan_rt.training.data.protocol import BadClip, Clips
from dagan_rt.training.data.sampling import Augmentation

FED = 0.02  # of a step's time may be spent waiting for its batch


@dataclass(frozen=True)
class Plan:
    """What to measure; see `python -m dagan_rt.training.data bench --help`."""

    data: str
    size: int = 256
    batch: int = 32
    threads: Sequence[int] = (1, 2, 4)
    step_ms: float = 0.0
    clips: int = 8
    frames: int = 32
    neighbours: int = 0
    seconds: float = 5.0

    def __post_init__(self) -> None:
        for name, least in (("size", 16), ("batch", 1), ("clips", 1), ("frames", 3)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if min(self.threads) < 1:
            raise InputError(f"--threads must be at least 1, got {min(self.threads)}")
        if self.seconds <= 0 or self.step_ms < 0:
            raise InputError(f"--seconds and --step-ms must be above 0, got {self.seconds} and {self.step_ms}")


def bench(plan: Plan) -> int:
    """Print a row for each form and number of threads; 1 if a frame was wrong."""
    with tempfile.TemporaryDirectory(prefix="dagan-rt-bench-") as folder:
        clips = _frames(plan, Path(folder))
        frames = sum(map(len, clips))
        print(f"{len(clips)} clips, {frames} frames at {plan.size} pixels, batches of {plan.batch}, full augmentation")
        step = [f"step of {plan.step_ms:g} ms"] if plan.step_ms else []
        print(_line("form", "threads", "samples/s", "ms/batch", *step))
        wrong = 0
        for form, (write, decode) in FORMS.items():
            place = Path(folder, form)
            for number, images in enumerate(clips):
                write(place / f"{number:04d}", images)
            data = ClipFolder(place, plan.size, progress=False)
            if not _same(data, decode):
                wrong += 1
                print(_line(form, "", "WRONG: frames differ from what a plain decoder reads"))
                continue
            for threads in plan.threads:
                print(_line(form, str(threads), *_measure(data, plan, threads)), flush=True)
    return 1 if wrong else 0


def _line(*cells: str) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, (12, 7, 9, 8, 40), strict=False)).rstrip()


def _frames(plan: Plan, folder: Path) -> list[list[np.ndarray]]:
    """The first frames of the first clips, uint8 [S, S, 3] each."""
    clips: Clips
    if plan.data == "heads":
        clips = HeadsData(range(plan.clips), plan.frames, plan.size, cache=folder / "heads")
    else:
        clips = ClipFolder(plan.data, plan.size)
    found = []
    for clip in range(len(clips)):
        try:
            frames = clips.read(clip, range(min(plan.frames, clips.frame_count(clip))))
        except BadClip as error:
            print(f"clip skipped: {clips.name(clip)}: {error}", file=sys.stderr)
            continue
        found.append([frame.image for frame in frames])
        if len(found) == plan.clips:
            break
    if not found:
        raise InputError(f"no clip in {plan.data} can be read")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Forms: how each is written, and read without this library


def _image_file(image: np.ndarray, ending: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG") if ending == "png" else Image.fromarray(image).save(
        file, "JPEG", quality=95
    )
    return file.getvalue()


def _write_folder(path: Path, frames: Iterable[np.ndarray], ending: str) -> None:
    path.mkdir(parents=True)
    for number, image in enumerate(frames):
        (path / f"{number:07d}.{ending}").write_bytes(_image_file(image, ending))


def _write_packed(path: Path, frames: Iterable[np.ndarray], ending: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as packed:
        for number, image in enumerate(frames):
            packed.writestr(f"{number:07d}.{ending}", _image_file(image, ending))


def _write_video(path: Path, frames: Sequence[np.ndarray]) -> None:
    from dagan_rt.video import VideoWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = frames[0].shape
    with VideoWriter(path.with_suffix(".mp4"), fps=25, width=width, height=height) as writer:
        for image in frames:
            writer.write(image)


def _decode_folder(path: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file).convert("RGB")) for file in sorted(path.iterdir())]


def _decode_packed(path: Path) -> list[np.ndarray]:
    with zipfile.ZipFile(path) as packed:
        return [np.asarray(Image.open(packed.open(name)).convert("RGB")) for name in sorted(packed.namelist())]


def _decode_video(path: Path) -> list[np.ndarray]:
    from dagan_rt.video import VideoReader

    with VideoReader(path) as reader:
        return list(reader)


Write = Callable[[Path, list[np.ndarray]], None]
FORMS: dict[str, tuple[Write, Callable[[Path], list[np.ndarray]]]] = {
    "png folder": (lambda path, frames: _write_folder(path, frames, "png"), _decode_folder),
    "jpg folder": (lambda path, frames: _write_folder(path, frames, "jpg"), _decode_folder),
    "png packed": (lambda path, frames: _write_packed(path, frames, "png"), _decode_packed),
    "jpg packed": (lambda path, frames: _write_packed(path, frames, "jpg"), _decode_packed),
    "mp4": (_write_video, _decode_video),
}


def _same(data: ClipFolder, decode: Callable[[Path], list[np.ndarray]]) -> bool:
    """Whether every frame read at random, last first, is the one a plain decoder reads in order."""
    for clip in range(len(data)):
        expected = decode(data.path / data.name(clip))
        count = data.frame_count(clip)
        if count != len(expected):
            return False
        read = data.read(clip, range(count)[::-1])[::-1]
        if not all(np.array_equal(frame.image, image) for frame, image in zip(read, expected, strict=True)):
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------


def _measure(data: Clips, plan: Plan, threads: int) -> list[str]:
    """Samples a second, milliseconds a batch and, where a step's time is given, whether a training of it is fed."""
    loader = Loader(data, plan.batch, 0, Augmentation(), 1000, threads, neighbours=plan.neighbours)
    count, took, _ = _consume(loader, plan.seconds, 0.0)
    cells = [f"{count * plan.batch / took:.0f}", f"{1000 * took / count:.1f}"]
    if plan.step_ms:
        steps, _, waited = _consume(loader, plan.seconds, plan.step_ms / 1000)
        wait = 1000 * waited / steps
        fed = wait <= FED * plan.step_ms
        cells.append(f"fed, waits {wait:.2f} ms" if fed else f"NOT fed, waits {wait:.1f} ms")
    return cells


def _consume(loader: Loader, seconds: float, step: float) -> tuple[int, float, float]:
    """(batches, seconds taken, seconds of them waiting for a batch) of a training whose step takes `step` seconds."""
    with contextlib.closing(loader.from_step(0)) as batches:
        for _ in range(loader.threads + 1):  # what is made ahead at the start is not counted
            next(batches)
            time.sleep(step)
        count, waited, begun = 0, 0.0, time.perf_counter()
        while count < 3 or time.perf_counter() - begun < seconds:
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
            time.sleep(step)
            count += 1
        return count, time.perf_counter() - begun, waited
