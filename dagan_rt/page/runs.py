"""Runs as a page shows them: a portrait and a clip in, states to look at while it goes on, a video in the end.

    studio = Studio("bundle/")
    for state in studio.run(Request(portrait, clip, folder)):
        show(state)                          # state.video is there in the last one, or state.failed

Who asked for a run is a stranger: what goes wrong becomes one sentence without a path of this machine, in a state.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dagan_rt.bundle import Bundle
from dagan_rt.cropping import Follower
from dagan_rt.driving import Clip
from dagan_rt.errors import InputError, MissingPackage, require
from dagan_rt.faces import AUTO, FaceDetector, load_detector
from dagan_rt.images import check_picture
from dagan_rt.live import Squares, centered
from dagan_rt.page.line import Line
from dagan_rt.pipeline import read_ahead
from dagan_rt.portrait import Pasted, Portrait, read_portrait
from dagan_rt.reenactor import Reenactor, check_motion, open_loaded
from dagan_rt.video import VideoWriter
from dagan_rt.watermark import KINDS, mark

if TYPE_CHECKING:
    from dagan_rt.explanation import Panel
    from dagan_rt.inspection import Inspection

log = logging.getLogger(__name__)

CROPS = ("center", "auto")
SHOWN_EVERY = 0.2  # seconds from one state to the next
LOOKING = 0.25  # share of the time that looking inside may take
LATEST = 100  # frames of which the latency is told while a run goes on


class Request(NamedTuple):
    """What somebody wants: two files that exist, and how."""

    portrait: Path
    clip: Path
    folder: Path  # in which a folder for the result is made, with a name that cannot be guessed
    motion: str = "relative"  # or "absolute"
    adapt_scale: bool = False
    motion_scale: float = 1.0  # 0 to 4
    crop: str = "center"  # or "auto": around the face, which is followed
    paste_back: bool = False  # the result shows the whole portrait
    watermark: str = ""  # or one of `dagan_rt.watermark.KINDS`


class Row(NamedTuple):
    """A line of the table of latencies."""

    what: str
    seconds: float
    note: str


@dataclass(frozen=True)
class State:
    """How far a run is, all that can be shown of it.

    words: a sentence. done, total: frames; total is None where the file does not say.
    source, driving, result: uint8 [size, size, 3] RGB, of the latest frame, as the model sees and gives it; None before
    there is one.
    panels: what was seen inside the networks at frame number `looked_at`, the same tuple until the next look.
    latency: whole frames first, then stages. video: the result, once it is whole. failed: `words` says why.
    """

    words: str
    done: int = 0
    total: int | None = None
    source: np.ndarray | None = None
    driving: np.ndarray | None = None
    result: np.ndarray | None = None
    panels: tuple[Panel, ...] = ()
    looked_at: int | None = None
    latency: tuple[Row, ...] = ()
    video: Path | None = None
    failed: bool = False


class Studio:
    """A bundle in a backend, and its weights to look into; one run at a time."""

    def __init__(
        self,
        bundle: str | Path,
        backend: str = "auto",
        threads: int | None = None,
        *,
        most_seconds: float = 30,
        most_people: int = 8,
    ) -> None:
        """Open and load everything. Raises InputError if the bundle is damaged or the backend cannot run here.

        most_seconds: of a clip. most_people: whose runs wait or go on, beyond which others are refused.
        """
        if not most_seconds > 0:
            raise InputError(f"most_seconds must be over 0, got {most_seconds}")
        self.bundle = Bundle.open(bundle)
        self.most_seconds, self.line = most_seconds, Line(most_people)
        self._backend, _ = open_loaded(self.bundle, backend, threads)
        self._threads = threads or 1
        self._detector: FaceDetector | None = None
        self.blind = ""  # why nothing inside can be shown, where that is so
        try:
            self._model = _load_model(self.bundle)
        except MissingPackage:
            self.blind = (
                "What happens inside is not shown: PyTorch is not installed here (pip install 'dagan-rt[torch]')."
            )
        except InputError as error:
            self.blind = f"What happens inside is not shown. {sentence(error)}."

    @property
    def size(self) -> int:
        """Side of the model's pictures, in pixels."""
        return self.bundle.config.size

    @property
    def backend_name(self) -> str:
        """What computes the result."""
        return self._backend.name

    def run(self, request: Request) -> Iterator[State]:
        """Wait for one's turn, animate, and give states on the way; nothing is raised, the last state is the outcome.

        Closing the iterator ends the run: no result is left, and the next one in the line begins.
        """
        try:
            ticket = self.line.join()
        except InputError as error:
            yield State(sentence(error), failed=True)
            return
        try:
            while ahead := self.line.wait(ticket, 1.0):
                yield State(f"Waiting: {_runs(ahead)} before yours.")
            yield from self._animate(request)
        except Exception as error:
            yield State(self.told(error), failed=True)
        finally:
            self.line.leave(ticket)

    def live(
        self,
        portrait: Path,
        motion: str = "relative",
        adapt_scale: bool = False,
        motion_scale: float = 1.0,
        crop: str = "center",
    ) -> Live:
        """A session for frames as they come; arguments as of `Request`. Raises InputError for a bad portrait."""
        detector = self._finds(crop)
        (source,) = read_portrait(portrait, detector).sources(self.size)
        squares = centered if detector is None else Follower(detector)
        return Live(self, source, motion, adapt_scale, motion_scale, squares)

    def told(self, error: Exception) -> str:
        """One sentence for a person about what went wrong; what only a programmer understands goes to the log."""
        if isinstance(error, InputError):
            return sentence(error)
        if isinstance(error, MemoryError):
            return "This machine has not enough memory for that: give a smaller picture or clip."
        log.error("a run of the page failed", exc_info=error)
        return "Something went wrong in the program, not with your files; its log on the server says what."

    @property
    def detector(self) -> FaceDetector:
        """What finds faces, loaded when it is first asked for."""
        if self._detector is None:
            self._detector = load_detector(AUTO, threads=self._threads)
        return self._detector

    def session(
        self, source: np.ndarray, motion: str, adapt_scale: bool, motion_scale: float
    ) -> tuple[Reenactor, Looks]:
        """A reenactor with its source set, and what looks inside beside it."""
        reenactor = Reenactor(self.bundle, self._backend, motion, adapt_scale, motion_scale=motion_scale)
        reenactor.set_source(source)
        model = None if self.blind else self._model
        return reenactor, Looks(model, source, motion == "relative", adapt_scale, motion_scale)

    def _finds(self, crop: str) -> FaceDetector | None:
        """What finds the faces of a crop, None for the centred one."""
        return self.detector if crop == "auto" else None

    def _animate(self, request: Request) -> Iterator[State]:
        _check(request)
        yield State("Reading the portrait and the clip.")
        detector = self._finds(request.crop)
        portrait = read_portrait(request.portrait, detector, whole=request.paste_back)
        (source,) = portrait.sources(self.size)
        with Clip(request.clip, self.most_seconds) as clip:
            clip.open(self.size, detector)
            shown, width, height = self._shown(request, portrait)
            reenactor, looks = self.session(source, request.motion, request.adapt_scale, request.motion_scale)
            # Of this run alone: nobody else learns its name.
            folder = Path(tempfile.mkdtemp(prefix="result-", dir=request.folder))
            timer = Timer(self.backend_name)
            state = State("", total=clip.frame_count, source=source)
            try:
                writer = VideoWriter(
                    folder / "result.mp4", clip.fps, width, height, audio_from=clip.audio, time_base=clip.time_base
                )
                with reenactor, writer, read_ahead(clip.items()) as frames:
                    for frame in frames:
                        with timer:
                            result = reenactor.drive(frame.image)
                        writer.write(shown(result), frame.time, frame.duration)
                        looks.look(frame.image, timer.frames)
                        state = _at(state, frame.image, result, timer, looks)
                        if timer.shown_again():
                            yield state
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        problem = f"; the clip is damaged after that ({clip.problem})" if clip.problem else ""
        words = f"Done: {timer.frames} frames in {timer.elapsed:.1f} s{problem}."
        yield replace(state, words=words, total=timer.frames, video=writer.path)

    def _shown(self, request: Request, portrait: Portrait) -> tuple[Callable[[np.ndarray], np.ndarray], int, int]:
        """What the video shows of a result, and its width and height."""
        pasted = Pasted(portrait) if request.paste_back else None

        def shown(result: np.ndarray) -> np.ndarray:
            image = result if pasted is None else pasted([result])
            return mark(image, request.watermark) if request.watermark else image

        return shown, *((self.size, self.size) if pasted is None else (pasted.width, pasted.height))


class Live:
    """One portrait that follows a camera; of one person, who calls it from one thread at a time."""

    def __init__(
        self, studio: Studio, source: np.ndarray, motion: str, adapt_scale: bool, motion_scale: float, squares: Squares
    ) -> None:
        """source: uint8 [size, size, 3]; squares: what of a camera's picture drives; see `Studio.live`."""
        self._studio, self._squares = studio, squares
        self._reenactor, self._looks = studio.session(source, motion, adapt_scale, motion_scale)
        self._timer = Timer(studio.backend_name)
        self._state = State("", source=source)

    def drive(self, image: np.ndarray) -> State:
        """What comes of a camera's picture, uint8 [H, W, 3]; nothing is raised.

        While somebody else's run goes on, or there is no face yet, the state says so and the result stays as it was.
        """
        try:
            ticket = self._studio.line.join()
        except InputError as error:
            return replace(self._state, words=sentence(error))
        try:
            if ahead := self._studio.line.wait(ticket, 0.5):
                return replace(self._state, words=f"Waiting: {_runs(ahead)} before yours.")
            check_picture(image, "image")
            square = self._squares(image, time.monotonic())
            if square is None:
                return replace(self._state, words="No face is in sight yet.")
            frame = square.cut(image, self._studio.size)
            with self._timer:
                result = self._reenactor.drive(frame)
            self._looks.look(frame, self._timer.frames)
            self._state = replace(_at(self._state, frame, result, self._timer, self._looks), words="Live.")
            return self._state
        except Exception as error:
            return replace(self._state, words=self._studio.told(error), failed=True)
        finally:
            self._studio.line.leave(ticket)

    def reset(self) -> None:
        """The next picture is the one that the portrait's own pose corresponds to."""
        self._reenactor.reset()
        self._looks.reset()

    def close(self) -> None:
        """Free the session's memory."""
        self._reenactor.close()


class Looks:
    """Looks inside the networks, at so few frames that they take at most `LOOKING` of the time."""

    def __init__(
        self, model: object | None, source: np.ndarray, relative: bool, adapt_scale: bool, motion_scale: float
    ) -> None:
        """model: a `Model` in evaluation mode, None where there is nothing to look into; the rest as of `Reenactor`."""
        self._model, self._source, self._relative = model, source, relative
        self._scales: dict[str, Any] = {"adapt_scale": adapt_scale, "motion_scale": motion_scale}
        self._initial: np.ndarray | None = None
        self._next = 0.0
        self.panels: tuple[Panel, ...] = ()
        self.at: int | None = None  # number of the frame that was looked at, from 1
        self.seconds: dict[str, float] = {}

    def reset(self) -> None:
        """The next frame is the initial one."""
        self._initial = None

    def look(self, frame: np.ndarray, number: int) -> None:
        """Look at a frame, if it is time to; the first one becomes the initial one."""
        if self._initial is None:
            self._initial = frame
        if self._model is None or time.perf_counter() < self._next:
            return
        begun = time.perf_counter()
        found = self._inspect(frame)
        self.panels, self.at, self.seconds = _panels(found), number, dict(found.seconds)
        now = time.perf_counter()
        self._next = now + (now - begun) * (1 / LOOKING - 1)

    def _inspect(self, frame: np.ndarray) -> Inspection:
        from dagan_rt.inspection import inspect

        initial = self._initial if self._relative else None
        return inspect(self._model, self._source, frame, initial, **self._scales)  # type: ignore[arg-type]


@dataclass
class Timer:
    """The latency of whole frames; a frame is timed by `with timer:`."""

    backend: str
    frames: int = 0
    seconds: list[float] = field(default_factory=list)  # of the latest frames

    def __post_init__(self) -> None:
        self._start = self._shown = time.perf_counter()

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.frames += 1
        self.seconds = [*self.seconds[-LATEST + 1 :], time.perf_counter() - self._begun]

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._start

    def shown_again(self) -> bool:
        """Whether it is time for another state, which then counts as shown; true at the first frame."""
        if self.frames > 1 and time.perf_counter() - self._shown < SHOWN_EVERY:
            return False
        self._shown = time.perf_counter()
        return True

    def row(self) -> Row:
        """The median, with the rest in words."""
        p50, p95 = np.percentile(self.seconds, (50, 95))
        rate = self.frames / max(self.elapsed, 1e-9)
        return Row("whole frame", float(p50), f"{self.backend}; p95 {1000 * p95:.1f} ms, {rate:.1f} frames/s in all")


STAGES = {
    "source": "once a portrait",
    "initial": "once a run",
    "driving": "every frame",
    "motion": "every frame",
    "generator": "every frame, with attention",
}


def sentence(error: Exception) -> str:
    """An error as one sentence, of whose paths the last names are left."""
    words = re.sub(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+(?=[^\s/'\"])", "", " ".join(str(error).split()))
    return words[:1].upper() + words[1:]


def _load_model(bundle: Bundle) -> object:
    require("torch", extra="torch", why="looking inside")
    from dagan_rt.backends.torch import load

    if bundle.weights is None:
        raise InputError("the bundle holds no weights to look into, export it without --no-torch-weights")
    return load(bundle).eval()


def _panels(found: Inspection) -> tuple[Panel, ...]:
    """What is drawn of an inspection, without the result, which is shown of every frame."""
    from dagan_rt.explanation import panels

    return tuple(panel for panel in panels(found) if panel.title != "Result")


def _check(request: Request) -> None:
    if request.crop not in CROPS:
        raise InputError(f"crop must be {' or '.join(CROPS)}, got {request.crop!r}")
    if request.watermark not in ("", *KINDS):
        raise InputError(f"watermark must be {', '.join(KINDS)} or nothing, got {request.watermark!r}")
    if request.adapt_scale and request.motion == "absolute":
        raise InputError("adapt scale is about relative motion: switch it off, or choose relative")
    check_motion(request.motion, request.adapt_scale, request.motion_scale)


def _at(state: State, frame: np.ndarray, result: np.ndarray, timer: Timer, looks: Looks) -> State:
    """The state after another frame."""
    stages = [Row(stage, seconds, f"PyTorch; {STAGES[stage]}") for stage, seconds in looks.seconds.items()]
    of = "" if state.total is None else f" of {state.total}"
    return replace(
        state,
        words=f"Frame {timer.frames}{of}.",
        done=timer.frames,
        driving=frame,
        result=result,
        panels=looks.panels,
        looked_at=looks.at,
        latency=(timer.row(), *stages),
    )


def _runs(count: int) -> str:
    return "one run is" if count == 1 else f"{count} runs are"
