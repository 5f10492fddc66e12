"""Squares of pictures as the model takes them: the centred one, or one around a face, followed through a clip."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import NamedTuple

import numpy as np
from PIL import Image

from dagan_rt.errors import InputError
from dagan_rt.faces import Face, FaceDetector, overlaps
from dagan_rt.images import center_square, check_picture
from dagan_rt.smoothing import OneEuro
from dagan_rt.video import Frame

MARGIN = 0.4  # on each side of a face's box, in sides of the box: as training clips are cropped
EVERY = 5  # frames of a clip from one detection to the next
PAUSE = 0.2  # seconds from one detection in a camera's pictures to the next
SAME_FACE = 0.1  # intersection over union of a face's boxes at two detections in a row, at least
MISSES = 2  # detections in a row without the face after which the largest face is followed instead
LEAST_CUTOFF, BETA = 0.4, 2.0
"""Of the filter of the squares, Hz, and Hz for one side of the face's box a second: a head that shakes moves in the
crop, as it does in training clips, and the crop follows one that walks away."""


class Square(NamedTuple):
    """A square of a picture in its pixels, where 0 and W are the edges; it need not begin at a whole one."""

    left: float
    top: float
    side: float

    def whole(self) -> Square:
        """The nearest one that begins and ends at whole pixels, inside a picture that holds this one."""
        side = int(self.side)
        spare = (self.side - side) / 2
        return Square(round(self.left + spare), round(self.top + spare), side)

    def cut(self, image: np.ndarray, size: int) -> np.ndarray:
        """What is inside, uint8 [H, W, 3] resampled (Lanczos) to [size, size, 3]."""
        check_picture(image, "image")
        left, top, side = self
        if all(float(number).is_integer() for number in self):
            return center_square(image[int(top) : int(top + side), int(left) : int(left + side)], size)
        box = (left, top, left + side, top + side)
        # reducing_gap averages whole pixels first where the square is much larger: several times faster, no aliasing.
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS, box, reducing_gap=2.0)
        return np.array(resized)


def center(width: int, height: int) -> Square:
    """The largest centred square of a picture, at whole pixels."""
    side = min(width, height)
    return Square((width - side) // 2, (height - side) // 2, side)


def around(box: np.ndarray, width: int, height: int, margin: float = MARGIN) -> Square:
    """The square around a box (left, top, right, bottom) with `margin` sides of the box more on each side.

    Where it would leave the picture it is moved inside; where the picture is smaller, it is the picture's shorter side.
    """
    left, top, right, bottom = (float(edge) for edge in box)
    side = max(right - left, bottom - top) * (1 + 2 * margin)
    return _inside((left + right) / 2, (top + bottom) / 2, side, width, height)


def choose(faces: Sequence[Face], which: str | int, what: str, option: str = "--face") -> list[Face]:
    """The faces asked for: "largest", "all" (from left to right), or the N-th from the left, counted from 1.

    what: names the picture in errors, option: what asked for the face. Raises InputError where there is no such face.
    """
    if not faces:
        raise no_face(what)
    ordered = sorted(faces, key=lambda face: float(face.box[0] + face.box[2]))
    if which == "all":
        return ordered
    if which == "largest":
        return [max(ordered, key=_area)]
    if not 1 <= int(which) <= len(ordered):
        raise InputError(f"{option} must be from 1 to {len(ordered)}, the faces found in {what}, got {which}")
    return [ordered[int(which) - 1]]


def no_face(what: str) -> InputError:
    """What to say where no face was found; `what` names the picture or the clip."""
    return InputError(
        f"no face was found in {what}: choose center as the crop, or give one with a face that is clearer"
    )


def follow(frames: Iterable[Frame], detector: FaceDetector, first: np.ndarray) -> Iterator[tuple[Frame, Square]]:
    """The frames of a clip, each with the square around the face that is followed through it.

    first: the face's box, float [4], at the clip's first frame. Every `EVERY`-th frame is searched and the boxes
    between are interpolated, so that as many frames are held back; then the squares are filtered. Where the face is
    gone for `MISSES` detections in a row, the largest one is followed from there on, without a transition.
    """
    track, camera = _Track(first), _Camera(first)
    held: list[Frame] = []
    for frame in frames:
        if held and len(held) < EVERY:
            held.append(frame)
            continue
        before = track.box
        if track.update(detector(frame.image)):  # somebody else
            yield from camera.shots(held, before, before)
            camera = _Camera(track.box)
        else:
            yield from camera.shots(held, before, track.box)
        held = [frame]
    yield from camera.shots(held, track.box, track.box)


def first_face(
    frames: Iterable[np.ndarray], detector: FaceDetector, what: str, which: str | int = "largest"
) -> np.ndarray:
    """The box of a face, as `choose` takes it, of the first frame that has it, of every `EVERY`-th.

    what: names the clip in errors. Raises InputError where none has.
    """
    most: list[Face] = []  # of a frame
    for number, image in enumerate(frames):
        if number % EVERY:
            continue
        faces = detector(image)
        most = max(most, faces, key=len)
        if _is_there(which, faces):
            break
    return choose(most, which, what, "--driving-face")[0].box


class Follower:
    """Squares around a face of a camera's pictures; none is held back, so they follow what was seen before.

        follower = Follower(detector)
        square = follower(image, seconds)    # None until a face was found

    Every `PAUSE` seconds a picture is searched, in another thread: that takes tens of milliseconds, for which none has
    to wait. In between, and where the face is gone, the square stays about where it was seen last. Whom it follows is
    decided as in `follow`.
    """

    def __init__(self, detector: FaceDetector, which: str | int = "largest") -> None:
        """which: "largest", or the N-th from the left, counted from 1: in the first picture that has as many faces."""
        self._detector, self._which = detector, which
        self._next = -math.inf
        self._looking: Future[list[Face]] | None = None
        self._track: _Track | None = None

    def __call__(self, image: np.ndarray, time: float) -> Square | None:
        """The square of a picture, uint8 [H, W, 3] and of one size, taken at `time` seconds, which only rises."""
        if self._looking is None and time >= self._next:
            self._next = time + PAUSE
            self._looking = aside(self._detector, image)
        if self._looking is not None and self._looking.done():
            self._take(self._looking.result())
            self._looking = None
        if self._track is None:
            return None
        height, width, _ = image.shape
        return self._camera.square(self._track.box, time, width, height)

    def _take(self, faces: Sequence[Face]) -> None:
        if self._track is None:
            if not _is_there(self._which, faces):
                return
            self._track = _Track(choose(faces, self._which, "the picture")[0].box)
        elif not self._track.update(faces):
            return
        self._camera = _Camera(self._track.box)


def aside(call: Callable[[np.ndarray], list[Face]], image: np.ndarray) -> Future[list[Face]]:
    """What a call gives, once it is through, in a thread of its own."""
    future: Future[list[Face]] = Future()

    def run() -> None:
        try:
            future.set_result(call(image))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="face", daemon=True).start()
    return future


class _Track:
    """One face from detection to detection."""

    def __init__(self, box: np.ndarray) -> None:
        self.box, self.missed = np.asarray(box, np.float64), 0

    def update(self, faces: Sequence[Face]) -> bool:
        """Take the box of the same face, if it is there; True where another face is followed from now on."""
        alike = overlaps(np.stack([face.box for face in faces]), self.box) if faces else np.zeros(1)
        if alike.max() >= SAME_FACE:
            self.box, self.missed = np.asarray(faces[int(alike.argmax())].box, np.float64), 0
            return False
        self.missed += 1
        if not faces or self.missed <= MISSES:
            return False
        self.box, self.missed = np.asarray(max(faces, key=_area).box, np.float64), 0
        return True


class _Camera:
    """Squares that follow a face steadily."""

    def __init__(self, box: np.ndarray) -> None:
        self._unit = float(max(box[2] - box[0], box[3] - box[1]))  # so that how large a face is makes no difference
        self._steady = OneEuro(LEAST_CUTOFF, BETA)

    def shots(self, frames: Sequence[Frame], before: np.ndarray, after: np.ndarray) -> Iterator[tuple[Frame, Square]]:
        """Frames from a detection (`before`, at the first) until the next (`after`, at the one that follows them)."""
        for number, frame in enumerate(frames):
            share = number / len(frames)
            height, width, _ = frame.image.shape
            yield frame, self.square((1 - share) * before + share * after, float(frame.time), width, height)

    def square(self, box: np.ndarray, time: float, width: int, height: int) -> Square:
        """The square about a face's box, in a picture taken at `time` seconds."""
        left, top, side = around(box, width, height)
        middle = np.array([left + side / 2, top + side / 2, side]) / self._unit
        x, y, side = (float(value) for value in self._steady(middle, time) * self._unit)
        return _inside(x, y, side, width, height)


def _inside(x: float, y: float, side: float, width: int, height: int) -> Square:
    """The square about (x, y), made smaller and moved as far as it has to be to lie in the picture."""
    side = min(side, width, height)
    return Square(min(max(x - side / 2, 0), width - side), min(max(y - side / 2, 0), height - side), side)


def _is_there(which: str | int, faces: Sequence[Face]) -> bool:
    """Whether `choose` finds "largest", or the N-th, among these."""
    return len(faces) >= (1 if which == "largest" else int(which))


def _area(face: Face) -> float:
    left, top, right, bottom = face.box
    return float((right - left) * (bottom - top))
