"""From boxes of faces, frame by frame, to the stretches of a video that show one face well enough to be a clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dagan_rt.faces import Face, overlaps

SAME_FACE = 0.3  # intersection over union of a face's boxes at two detections in a row, at least
STAYS = 0.25  # intersection over union with a clip's first box, at least: beyond, one crop no longer holds the face
MISSES = 2  # detections in a row that may miss a face whose clip goes on: a hand before it, a turn of the head


@dataclass
class Track:
    """One face from its first to its last detection; `held`, the last frame it is believed to be seen in."""

    frames: list[int]
    boxes: list[np.ndarray]
    held: int = -1
    missed: int = 0

    def dense(self) -> np.ndarray:
        """Smoothed boxes of every frame from the first to `held`: float64 [N, 4]."""
        boxes = smooth(np.asarray(self.boxes, np.float64))
        wanted = np.arange(self.frames[0], self.held + 1)
        return np.stack([np.interp(wanted, self.frames, side) for side in boxes.T], axis=1)


@dataclass
class Tracker:
    """Faces joined from detection to detection by the overlap of their boxes.

    A face keeps its track while boxes of two detections in a row overlap; who jumps further is somebody else. Feed
    `update` in order of frames, `cut` where the picture changes from one frame to the next, `finish` at the end.
    """

    tracks: list[Track] = field(default_factory=list)
    _open: list[Track] = field(default_factory=list)

    def update(self, frame: int, faces: Sequence[Face]) -> None:
        """The faces detected in a frame."""
        pairs = sorted(
            (
                (-overlap, which, face)
                for which, track in enumerate(self._open)
                for face, overlap in enumerate(overlaps(_boxes(faces), track.boxes[-1]))
                if overlap >= SAME_FACE
            ),
        )
        continued: dict[int, int] = {}
        for _, which, face in pairs:
            if which not in continued and face not in continued.values():
                continued[which] = face
        for which, track in enumerate(self._open):
            track.missed += 1
            if which in continued:
                track.frames.append(frame)
                track.boxes.append(faces[continued[which]].box)
                track.held, track.missed = frame, 0
        self._open = [track for track in self._open if track.missed <= MISSES]
        new = [Track([frame], [one.box], frame) for place, one in enumerate(faces) if place not in continued.values()]
        self._open += new
        self.tracks += new

    def cut(self, frame: int) -> None:
        """`frame` is the first of another scene: whoever was seen at the last detection was seen until then."""
        for track in self._open:
            if not track.missed:
                track.held = frame - 1
        self._open = []

    def finish(self, frames: int) -> list[Track]:
        """The tracks, once all frames of the video are through."""
        self.cut(frames)
        return self.tracks

    def boxes(self) -> list[np.ndarray]:
        """Where the faces that go on were last seen."""
        return [track.boxes[-1] for track in self._open]


@dataclass(frozen=True)
class Span:
    """A stretch of one face: frames `first` to `last`, and the box around all its boxes, float64 [4]."""

    first: int
    last: int
    box: np.ndarray

    @property
    def frames(self) -> int:
        return self.last - self.first + 1


def spans(track: Track, max_frames: int) -> list[Span]:
    """A track cut where the face has left its first box, or where `max_frames` are full."""
    boxes, found, start = track.dense(), [], 0
    while start < len(boxes):
        ahead = boxes[start : start + max_frames]
        gone = np.flatnonzero(overlaps(ahead, boxes[start]) < STAYS)
        stop = start + (int(gone[0]) if gone.size else len(ahead))
        part = boxes[start:stop]
        box = np.concatenate([part[:, :2].min(0), part[:, 2:].max(0)])
        found.append(Span(track.frames[0] + start, track.frames[0] + stop - 1, box))
        start = stop
    return found


def square(box: np.ndarray, margin: float, width: int, height: int) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) of the square around a box with `margin` box sides more on each side, in whole pixels.

    Where that leaves the picture it is moved inside; where the picture is smaller, it is the picture's shorter side.
    None where the picture holds no square around the box at all.
    """
    needed = float((box[2:] - box[:2]).max())
    shorter = min(width, height)
    if needed > shorter:
        return None
    side = min(round(needed * (1 + 2 * margin)), shorter)
    left, top = (
        int(np.clip(round(float(low + high - side) / 2), 0, whole - side))
        for low, high, whole in ((box[0], box[2], width), (box[1], box[3], height))
    )
    return left, top, left + side, top + side


def smooth(boxes: np.ndarray) -> np.ndarray:
    """Boxes [N, 4] without single outliers (a median of three), then averaged over three."""
    if len(boxes) < 3:
        return boxes
    middle = np.median(_threes(boxes), axis=0)
    return _threes(middle).mean(0)


def _threes(rows: np.ndarray) -> np.ndarray:
    """Each row between its neighbours: [3, N, 4]; the ends are their own neighbours."""
    padded = np.concatenate([rows[:1], rows, rows[-1:]])
    return np.stack([padded[:-2], padded[1:-1], padded[2:]])


def _boxes(faces: Sequence[Face]) -> np.ndarray:
    return np.stack([face.box for face in faces]) if faces else np.empty((0, 4))
