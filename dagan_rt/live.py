"""A live session: the newest frame drives a portrait, whoever looks on is shown it, and keys change how it goes on."""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from dagan_rt.camera import Captured, Source
from dagan_rt.cropping import Square, center
from dagan_rt.errors import InputError
from dagan_rt.reenactor import Reenactor
from dagan_rt.video import VideoWriter

TURN = 0.05  # seconds until keys are read again, where no frame comes
KEYS = (
    ("q, Esc", "quit"),
    ("space, c", "recalibrate: the next frame becomes the initial one"),
    ("n, p", "next, previous portrait"),
    ("a", "absolute or relative motion"),
    ("s", "adapt the scale of relative motion"),
    ("r", "pause the recording, go on with it"),
    ("h", "this help"),
)


class Status(NamedTuple):
    """What there is to say beside the pictures."""

    fps: float  # frames shown a second, of the last second; 0 before the second frame
    latency: float  # seconds from captured to shown, the median of the last second; 0 before the first frame
    dropped: int  # frames captured and never driven, since the start
    motion: str  # "relative" or "absolute"
    adapt_scale: bool
    portrait: int  # its number, from 1
    portraits: int  # how many there are
    recording: str  # "recording", "paused" or "", where nothing is recorded
    seen: bool  # False while the face that is to drive was not seen yet: then the portrait stands in for the result
    help: bool  # whether the keys are to be shown


class View(NamedTuple):
    """One driven frame; images are uint8 [size, size, 3], RGB."""

    portrait: np.ndarray
    driving: np.ndarray  # as the model took it
    result: np.ndarray
    time: float  # when the driving frame was captured, seconds by the session's clock
    status: Status


class Sink(Protocol):
    """Whoever is shown the frames."""

    def show(self, view: View) -> None:
        """Show one frame; InputError if that cannot be done any more, which ends the session."""


Squares = Callable[[np.ndarray, float], "Square | None"]
"""(picture, seconds when it was captured) -> what of it the model sees, or None while there is nothing to see; as
`dagan_rt.cropping.Follower`."""


def centered(image: np.ndarray, time: float) -> Square:
    """The largest centred square, whatever is there."""
    height, width, _ = image.shape
    return center(width, height)


class Frames(Protocol):
    """What frames are taken from; see `dagan_rt.camera.Capture`."""

    source: Source
    dropped: int

    @property
    def ended(self) -> bool:
        """Whether there is no frame left to take."""

    def start(self) -> None:
        """Begin to read."""

    def take(self, timeout: float) -> Captured | None:
        """The newest frame, or None if none comes within `timeout` seconds."""


class Recorder:
    """Writes results at the times at which their driving frames were captured; what is no result is cut out."""

    def __init__(self, writer: VideoWriter) -> None:
        self.paused = False
        self._writer = writer
        self._start: float | None = None  # the clock's time at which the clip begins, its pauses cut out
        self._next = 0.0  # seconds of the clip until the next frame, should it follow at once

    def show(self, view: View) -> None:
        """As in `Sink`; OSError names a file that cannot be written."""
        if self.paused or not view.status.seen:
            self._start = None
            return
        if self._start is None:
            self._start = view.time - self._next
        shown = view.time - self._start
        self._writer.write(view.result, Fraction(shown))
        self._next = shown + float(1 / self._writer.fps)


class Summary(NamedTuple):
    """How a session went."""

    seconds: float  # from the first frame captured until the last one shown
    latencies: array[float]  # seconds from captured to shown, of each driven frame
    dropped: int


class Live:
    """One session: frames of a capture drive one of several portraits, every result goes to every sink.

        live = Live(capture, reenactor, portraits, sinks=[window], keys=window.keys)
        summary = live.run()

    Frames are driven one after the other, the newest each time; what came meanwhile is dropped by the capture. Until
    the face that is to drive was seen, the portrait is shown as it is, and neither counted nor recorded.
    """

    def __init__(
        self,
        capture: Frames,
        reenactor: Reenactor,
        portraits: Sequence[np.ndarray],
        sinks: Sequence[Sink] = (),
        keys: Callable[[], str] = str,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        squares: Squares = centered,
        finish: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """Prepare a session; the caller closes what it gives.

        capture: not started yet. portraits: uint8 [size, size, 3] RGB, at least one. keys: called between frames,
        gives the characters of the keys pressed since, see `KEYS`; Esc is "\\x1b". recorder: the last of the sinks.
        clock: that of the capture, in seconds. squares: what of a picture drives. finish: what is done to a result,
        uint8 [size, size, 3], before it is shown: a mark, say.
        """
        self.capture, self.reenactor, self.portraits = capture, reenactor, portraits
        self.sinks = [*sinks, *([recorder] if recorder is not None else [])]
        self.keys, self.recorder, self.clock = keys, recorder, clock
        self._squares, self._finish = squares, finish
        self._portrait, self._help, self._quit = 0, False, False
        self._adapt_scale = reenactor.adapt_scale  # as wanted; absolute motion has none
        self._initial: np.ndarray | None = None
        self._latencies = array("d")
        self._last_second: deque[tuple[float, float]] = deque()  # when frames were shown, and their latencies

    def run(
        self, stop: threading.Event | None = None, seconds: float | None = None, frames: int | None = None
    ) -> Summary:
        """Show frames until `stop` is set, a key quits, the source ends, or enough was shown.

        seconds: of frames that are shown, by the times at which they were captured; frames: how many are shown.
        Raises InputError for a source that breaks off or gives nothing for longer than its patience, and what the
        model and the sinks raise.
        """
        stop = stop or threading.Event()
        self.reenactor.set_source(self.portraits[0])
        self.capture.start()
        first: float | None = None
        heard = self.clock()
        while not stop.is_set() and len(self._latencies) != frames:
            for key in self.keys():
                self.press(key)
            if self._quit:
                break
            captured = self.capture.take(TURN)
            if captured is None:
                if self.capture.ended:
                    break
                self._check_patience(self.clock() - heard)
                continue
            first = captured.time if first is None else first
            if seconds is not None and captured.time - first >= seconds:
                break
            self._drive(captured)
            heard = self.clock()
        return Summary(0.0 if first is None else heard - first, self._latencies, self.capture.dropped)

    def press(self, key: str) -> None:
        """Do what a key asks for; keys that `KEYS` does not name do nothing."""
        if key in ("q", "\x1b"):
            self._quit = True
        elif key in (" ", "c"):
            self._initial = None
            self.reenactor.reset()
        elif key in ("n", "p"):
            self._portrait = (self._portrait + (1 if key == "n" else -1)) % len(self.portraits)
            self.reenactor.set_source(self.portraits[self._portrait])
            self._begin_again()
        elif key == "a":
            self._move("relative" if self.reenactor.motion == "absolute" else "absolute")
        elif key == "s" and self.reenactor.motion == "relative":
            self._adapt_scale = not self._adapt_scale
            self._move("relative")
        elif key == "r" and self.recorder is not None:
            self.recorder.paused = not self.recorder.paused
        elif key == "h":
            self._help = not self._help

    def _move(self, motion: str) -> None:
        self.reenactor.set_motion(motion, self._adapt_scale and motion == "relative")
        self._begin_again()

    def _begin_again(self) -> None:
        """Keep the initial frame in a new session: another portrait or motion is no reason to sit upright again."""
        if self._initial is not None and self.reenactor.motion == "relative":
            self.reenactor.drive(self._initial)

    def _check_patience(self, silent: float) -> None:
        source = self.capture.source
        if source.patience is not None and silent > source.patience:
            raise InputError(f"{source.name} gave no picture for {source.patience:.0f} s")

    def _drive(self, captured: Captured) -> None:
        portrait = self.portraits[self._portrait]
        square = self._squares(captured.image, captured.time)
        frame = (square or centered(captured.image, captured.time)).cut(captured.image, self.reenactor.size)
        result = portrait if square is None else self.reenactor.drive(frame)
        if self._finish is not None:
            result = self._finish(result)
        if square is not None and self._initial is None:
            self._initial = frame
        view = View(portrait, frame, result, captured.time, self._status(seen=square is not None))
        for sink in self.sinks:
            sink.show(view)
        if square is not None:
            self._note(captured.time, self.clock())

    def _note(self, captured: float, shown: float) -> None:
        """Count a frame that was driven."""
        self._latencies.append(shown - captured)
        self._last_second.append((shown, shown - captured))
        while len(self._last_second) > 2 and self._last_second[0][0] < shown - 1:
            self._last_second.popleft()

    def _status(self, seen: bool) -> Status:
        shown, latencies = zip(*self._last_second, strict=True) if self._last_second else ((0.0,), (0.0,))
        recording = "" if self.recorder is None else "paused" if self.recorder.paused else "recording"
        return Status(
            fps=(len(shown) - 1) / (shown[-1] - shown[0]) if shown[-1] > shown[0] else 0.0,
            latency=float(np.median(latencies)),
            dropped=self.capture.dropped,
            motion=self.reenactor.motion,
            adapt_scale=self.reenactor.adapt_scale,
            portrait=self._portrait + 1,
            portraits=len(self.portraits),
            recording=recording,
            seen=seen,
            help=self._help,
        )
