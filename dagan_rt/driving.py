"""What drives portraits: a clip, cut to the squares that the model takes, or a motion template in its place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dagan_rt.best_frame import find_best_frame, find_best_points
from dagan_rt.cropping import first_face, follow
from dagan_rt.errors import InputError
from dagan_rt.faces import FaceDetector
from dagan_rt.frames import Pending
from dagan_rt.images import center_square
from dagan_rt.keypoints import KeyPoints
from dagan_rt.pipeline import read_ahead
from dagan_rt.reenactor import Reenactor
from dagan_rt.smoothing import OneEuro
from dagan_rt.template import ENDING, Moment, Template
from dagan_rt.video import Frame, VideoReader

LEAST_CUTOFF, BETA = 1.0, 20.0
"""Of the filter of key points, Hz, and Hz for one unit of their coordinates a second: what trembles in noise is damped
to a sixth, and what moves lags by a third of a frame (`benchmarks/smoothing.py`)."""

MOST_RATE = 120  # frames a second of a clip whose length is bounded, up to which its length bounds the work

Watch = Callable[[int | None, str], AbstractContextManager[Any]]
"""(frames, what is done) -> a progress bar: a context whose value has `update()`."""

Item = TypeVar("Item")


class _NoBar:
    def update(self) -> None: ...


def unwatched(frames: int | None, what: str) -> AbstractContextManager[Any]:
    """A `Watch` that shows nothing."""
    return nullcontext(_NoBar())


class Clip:
    """A video that drives: its frames at the model's size.

    fps, time_base, frame_count, problem: as of `VideoReader`. audio: the file whose sound goes with the result, if any.
    """

    def __init__(self, path: Path, most_seconds: float | None = None) -> None:
        """Open the file. Close it, or use it as a context manager.

        most_seconds: how long it may be. Raises InputError as `VideoReader`, and where the file says that it is longer;
        one that lies is found out when its frames are read.
        """
        self._reader, self._most_seconds = VideoReader(path), most_seconds
        self.path, self.fps, self.time_base = path, self._reader.fps, self._reader.time_base
        self.frame_count, self.audio = self._reader.frame_count, path if self._reader.has_audio else None
        self._first: np.ndarray | None = None
        if most_seconds is not None and self.frame_count and self.frame_count / self.fps > most_seconds + 1:
            self.close()
            raise self._too_long()

    @property
    def problem(self) -> str | None:
        """What is wrong with the file after the last frame read, None so far."""
        return self._reader.problem

    def open(
        self,
        size: int,
        detector: FaceDetector | None = None,
        stop: threading.Event | None = None,
        watch: Watch = unwatched,
        *,
        smooth: bool = False,
        face: str | int = "largest",
    ) -> None:
        """Make ready to drive a model of this size.

        detector: follows the face, whose first place is looked for now; None: the centred square. stop: once set, no
        work goes on. smooth: damp what trembles in the key points. face: which is followed, as for
        `dagan_rt.cropping.first_face`. Raises InputError where it is not found.
        """
        self.size, self._detector, self._stop, self._watch = size, detector, stop or threading.Event(), watch
        self._steady = Steady() if smooth else None
        if detector is not None:
            with VideoReader(self.path) as reader, self._watch(reader.frame_count, "looking for a face") as bar:
                images = (frame.image for frame in self._watched(self._bounded(reader.timed(), refuse=False), bar))
                try:
                    self._first = first_face(images, detector, str(self.path), face)
                except InputError:
                    if not self._stop.is_set():
                        raise

    def items(self) -> Iterator[Frame]:
        """The frames, once."""
        return self._squares(self._reader)

    def begin_at_best(self, reenactor: Reenactor, source: np.ndarray) -> None:
        """Make the frame whose face is posed most like the source's the initial one; reads the clip once more."""
        with (
            VideoReader(self.path) as reader,
            self._watch(reader.frame_count, "finding the best frame") as bar,
            read_ahead(self._squares(reader)) as frames,
        ):
            initial = find_best_frame(reenactor, source, (frame.image for frame in self._watched(frames, bar)))
        if initial is not None:
            reenactor.reset()
            reenactor.drive(initial)

    def submit(self, reenactors: Sequence[Reenactor], frame: Frame) -> list[Pending]:
        """Submit a frame to each; smoothed, its key points are found once, by the first."""
        if self._steady is None:
            return [one.submit(frame.image) for one in reenactors]
        points = self._steady(reenactors[0].keypoints(frame.image), frame.time)
        return [one.submit_points(points) for one in reenactors]

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _squares(self, reader: VideoReader) -> Iterator[Frame]:
        frames = self._bounded(reader.timed())
        if self._detector is None or self._first is None:
            for frame in frames:
                yield frame._replace(image=center_square(frame.image, self.size))
            return
        for frame, square in follow(frames, self._detector, self._first):
            yield frame._replace(image=square.cut(frame.image, self.size))

    def _bounded(self, frames: Iterable[Frame], refuse: bool = True) -> Iterator[Frame]:
        """The frames as far as the clip may go; where there are more, InputError, unless not `refuse`."""
        most = self._most_seconds
        for number, frame in enumerate(frames):
            if most is not None and (frame.time >= most or number >= most * MOST_RATE):
                if refuse:
                    raise self._too_long()
                return
            yield frame

    def _too_long(self) -> InputError:
        return InputError(f"the clip {self.path} is longer than {self._most_seconds:g} seconds: cut it first")

    def _watched(self, frames: Iterable[Item], bar: Any) -> Iterator[Item]:
        for frame in frames:
            if self._stop.is_set():
                return
            yield frame
            bar.update()


class Recorded:
    """A motion template that drives, without a picture or a sound; the rest is as `Clip`."""

    audio = problem = None

    def __init__(self, path: Path) -> None:
        """Read the file; raises InputError as `Template.read`."""
        self.path, self.template = path, Template.read(path)
        self.fps, self.time_base, self.frame_count = self.template.fps, None, len(self.template)

    def open(
        self,
        size: int,
        detector: FaceDetector | None = None,
        stop: threading.Event | None = None,
        watch: Watch = unwatched,
        *,
        smooth: bool = False,
        face: str | int = "largest",
    ) -> None:
        """As `Clip.open`; there is nothing to crop."""
        self.size, self._steady = size, Steady() if smooth else None

    def items(self) -> Iterator[Moment]:
        """The key points, frame by frame."""
        return iter(self.template)

    def begin_at_best(self, reenactor: Reenactor, source: np.ndarray) -> None:
        """As `Clip.begin_at_best`."""
        initial = find_best_points(reenactor.keypoints(source), (moment.points for moment in self.template))
        if initial is not None:
            reenactor.reset()
            reenactor.submit_points(initial).result()

    def submit(self, reenactors: Sequence[Reenactor], moment: Moment) -> list[Pending]:
        """Submit key points to each."""
        points = moment.points if self._steady is None else self._steady(moment.points, moment.time)
        return [one.submit_points(points) for one in reenactors]

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *error: object) -> None: ...


class Steady:
    """Key points without what trembles in them, by the one-euro filter; each coordinate for itself."""

    def __init__(self) -> None:
        self._filters = OneEuro(LEAST_CUTOFF, BETA), OneEuro(LEAST_CUTOFF, BETA)

    def __call__(self, points: KeyPoints, time: Fraction) -> KeyPoints:
        """The key points of the next frame, shown at `time` seconds."""
        value, jacobian = (
            steady(np.asarray(part), float(time)).astype(np.float32)
            for steady, part in zip(self._filters, points, strict=True)
        )
        return KeyPoints(value, jacobian)


def open_driver(path: Path) -> Clip | Recorded:
    """A template where the name ends in .motion, else a clip."""
    return Recorded(path) if path.suffix.lower() == ENDING else Clip(path)
