"""One raw video: a first pass finds and tracks the faces, a second writes their crops; one frame is held at a time."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.faces import FaceDetector
from dagan_rt.images import center_square
from dagan_rt.preparation.clips import ClipWriter, writing
from dagan_rt.preparation.names import safe_identity, split_of, video_name
from dagan_rt.preparation.options import Options
from dagan_rt.preparation.scenes import Cuts
from dagan_rt.preparation.tracks import Span, Track, Tracker, spans, square
from dagan_rt.video import VideoReader

HASHED = 1 << 20  # bytes at either end of a raw video: enough to tell files apart, and the same cost for any length
PARTIAL = ".partial"

UNREADABLE, EMPTY, NO_PICTURE, TOO_LARGE, NOTHING_DECODED, NO_VIDEO = (
    "cannot be read", "empty file", "no picture stream", "frames too large", "no frame can be decoded", "not a video",
)  # fmt: skip
NO_IDENTITY, LINK_OUT, LINKED_FOLDER = "no identity", "link out of the folder", "link to a folder"
NO_FACE, TOO_SHORT, TOO_SMALL, TOO_WIDE = "no face", "too short", "face too small", "face moves too far for a square"
CHANGED, CRASHED, FAILED = "changed while it was read", "its decoder crashed", "failed"
_REASONS = (  # words of the messages of `VideoReader`
    ("has no video stream", NO_PICTURE),
    ("more pixels a frame", TOO_LARGE),
    ("no frame that can be decoded", NOTHING_DECODED),
    ("is empty", EMPTY),
    ("cannot be read", UNREADABLE),
)


class Skipped(Exception):
    """Nothing comes of a video; `reason` is one of those above, and the message says more where there is more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Job:
    """A raw video: the raw folder, its path inside, and its identity as the rule gave it."""

    raw: Path
    path: PurePosixPath
    identity: str


@dataclass(frozen=True)
class Plan:
    """A clip to be: where it is in the video, in kept frames; the crop; what it is called."""

    span: Span
    crop: tuple[int, int, int, int]
    name: str


@dataclass
class Survey:
    """What the first pass has found. `raw_numbers`: of each kept frame, its number in the file."""

    tracks: list[Track]
    raw_numbers: list[int]
    frames: int
    fps: float
    width: int
    height: int
    problem: str | None


def prepare_video(job: Job, options: Options, detector: FaceDetector, out: Path) -> dict[str, Any]:
    """Write the clips of a video into `out` and return its row of the manifest; one that gives none says why.

    Raises OutputError where clips cannot be written; those already in place are then of no row.
    """
    file = job.raw / job.path
    row: dict[str, Any] = {"file": str(job.path)}
    try:
        row |= fingerprint(file)
        survey = survey_video(file, options, detector)
        row |= {"fps": survey.fps, "frames": survey.frames, "width": survey.width, "height": survey.height}
        if survey.problem:
            row["problem"] = survey.problem
        plans, dropped = plan_clips(survey, job, options)
        if dropped:
            row["dropped"] = dict(sorted(dropped.items()))
        if not plans:
            raise Skipped(min(dropped, key=lambda reason: (-dropped[reason], reason)) if dropped else NO_FACE)
        write_clips(file, plans, job, options, out)
    except Skipped as skipped:
        detail = {"detail": str(skipped)} if str(skipped) else {}
        return {**row, "skipped": skipped.reason, **detail}
    return {**row, "clips": [_described(plan, survey, job, options) for plan in plans]}


def fingerprint(file: Path) -> dict[str, Any]:
    """The size of a file, and the SHA-256 of its first and its last MiB."""
    try:
        if file.exists() and not file.is_file():  # opening a pipe would wait for somebody to write
            raise Skipped(UNREADABLE, "not a regular file")
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest = hashlib.sha256(stream.read(HASHED))
            stream.seek(max(HASHED, size - HASHED))
            digest.update(stream.read(HASHED))
    except OSError as error:
        raise Skipped(UNREADABLE, error.strerror or str(error)) from None
    return {"size": size, "sha256": digest.hexdigest()}


def survey_video(file: Path, options: Options, detector: FaceDetector) -> Survey:
    """Decode a video once and track the faces in it."""
    tracker, cuts, since_detection = Tracker(), Cuts(), 0
    numbers: list[int] = []
    with _opened(file) as reader:
        height, width = reader.height, reader.width
        for raw_number, image in kept_frames(reader, options.fps):
            frame = len(numbers)
            if image.shape[:2] != (height, width):
                reader.problem = f"its frames change their size to {image.shape[1]}x{image.shape[0]}"
                break
            if cuts(image, tracker.boxes()):
                tracker.cut(frame)
                since_detection = 0
            if since_detection == 0:
                tracker.update(frame, detector(image))
            since_detection = (since_detection + 1) % options.every
            numbers.append(raw_number)
        fps = min(float(reader.fps), options.fps) if resamples(reader, options.fps) else float(reader.fps)
        return Survey(
            tracker.finish(len(numbers)), numbers, reader.frames_read, round(fps, 6), width, height, reader.problem
        )


def resamples(reader: VideoReader, fps: float) -> bool:
    """Whether frames are left out; rates a hundredth apart (29.97 and 30) are the same."""
    return fps < 0.99 * reader.fps


def kept_frames(reader: VideoReader, fps: float) -> Iterator[tuple[int, np.ndarray]]:
    """(number in the file, image) of at most `fps` frames a second: the first at or after each of their times."""
    every, last = not resamples(reader, fps), -1
    for number, frame in enumerate(reader.timed()):
        slot = math.floor(float(frame.time) * fps + 0.5)
        if every or slot > last:
            last = slot
            yield number, frame.image


def plan_clips(survey: Survey, job: Job, options: Options) -> tuple[list[Plan], Counter[str]]:
    """The clips of a video in the order of their first frames, and how many stretches came to nothing, by reason."""
    identity = safe_identity(job.identity)
    prefix = f"{identity}#{video_name(job.path, options.identities == 'folder')}"
    dropped: Counter[str] = Counter()
    plans: list[Plan] = []
    taken: Counter[str] = Counter()
    found = [span for track in survey.tracks for span in spans(track, options.max_frames)]
    for span in sorted(found, key=lambda span: (span.first, span.last, *span.box)):
        crop = square(span.box, options.margin, survey.width, survey.height)
        if span.frames < options.min_frames:
            dropped[TOO_SHORT] += 1
        elif crop is None:
            dropped[TOO_WIDE] += 1
        elif crop[2] - crop[0] < options.least_side:
            dropped[TOO_SMALL] += 1
        else:
            name = f"{prefix}#{survey.raw_numbers[span.first]:06d}-{survey.raw_numbers[span.last]:06d}"
            taken[name] += 1  # two people side by side share their frames' numbers
            number = f"-{taken[name]}" if taken[name] > 1 else ""
            ending = ".zip" if options.format == "packed" else ""
            plans.append(Plan(span, crop, f"{name}{number}{ending}"))
    return plans, dropped


def write_clips(file: Path, plans: list[Plan], job: Job, options: Options, out: Path) -> None:
    """Decode a video again, up to the last clip's end, and put the clips in place once all of them are whole."""
    partial = out / PARTIAL / hashlib.sha256(os.fsencode(str(job.path))).hexdigest()[:32]
    split = split_of(safe_identity(job.identity), options.test_fraction, options.seed)
    try:
        with contextlib.ExitStack() as stack, _opened(file) as reader:
            _write_crops(reader, plans, options, partial, stack)
        for plan in plans:
            target = out / split / plan.name
            with writing(target):
                target.parent.mkdir(exist_ok=True)
                os.replace(partial / plan.name, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_crops(
    reader: VideoReader, plans: list[Plan], options: Options, folder: Path, stack: contextlib.ExitStack
) -> None:
    writers: dict[str, ClipWriter] = {}
    whole, last = 0, max(plan.span.last for plan in plans)
    for frame, (_, image) in enumerate(kept_frames(reader, options.fps)):
        for plan in plans:
            if frame == plan.span.first:
                writers[plan.name] = ClipWriter(folder / plan.name, options.image, options.quality)
                stack.callback(writers[plan.name].discard)
            if plan.span.first <= frame <= plan.span.last:
                left, top, right, bottom = plan.crop
                writers[plan.name].write(center_square(image[top:bottom, left:right], options.size))
            if frame == plan.span.last:
                writers[plan.name].close()
                whole += 1
        if frame == last:
            break
    if whole < len(plans):
        raise Skipped(CHANGED)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[VideoReader]:
    """A reader; what is wrong with the file is a reason to skip it."""
    try:
        reader = VideoReader(file)
    except InputError as error:
        detail = str(error).replace(str(file), file.name)
        raise Skipped(next((reason for words, reason in _REASONS if words in str(error)), NO_VIDEO), detail) from None
    with reader:
        yield reader


def _described(plan: Plan, survey: Survey, job: Job, options: Options) -> dict[str, Any]:
    identity = safe_identity(job.identity)
    return {
        "name": plan.name,
        "identity": identity,
        "split": split_of(identity, options.test_fraction, options.seed),
        "start": survey.raw_numbers[plan.span.first],
        "end": survey.raw_numbers[plan.span.last],
        "box": list(plan.crop),
        "frames": plan.span.frames,
        "scale": round(options.size / (plan.crop[2] - plan.crop[0]), 6),
    }
