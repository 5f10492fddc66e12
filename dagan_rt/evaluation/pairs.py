"""Image sets from and to the published CSV files of test pairs.

The published files have the columns `source,driving` with a path of a frame each, and sometimes a third one, of which
`best_frame` names the driving clip's frame that relative motion starts from:

    /anywhere/test/id10282#Zbz058o9j6s#004557#004656.mp4/0000013.png,/anywhere/test/id10292#…#….mp4/0000048.png

Others name whole clips, `id10291#…#….mp4,id10286#…#….mp4`: there the source's first frame is driven, and this module
draws one driving frame. A path is only ever compared with the names of the clips at hand, from its end: no file is
opened by it, so a file of pairs cannot reach outside the data folder.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.evaluation.sets import MOST_SETS, ImageSet, NamedClips, SetList
from dagan_rt.files import AtomicFile, open_input
from dagan_rt.tables import printable

LARGEST_FILE = 64 << 20  # bytes; the published ones have 0.6 MB
SOURCE, DRIVING, INITIAL = ("source", "source_frame"), ("driving", "driving_video"), ("best_frame",)
ENDINGS = (".mp4", ".gif", ".mov", ".mkv", ".webm", ".avi", ".zip")  # a clip's name may carry one, or another
NAMED = 8  # reasons told for rows left out


class _Unusable(Exception):
    """A row that names what is not there."""


def read_pairs(path: str | Path, clips: NamedClips, seed: int = 0) -> SetList:
    """Image sets of a CSV file of test pairs, in its order.

    A row that names a clip or frame that is not there is left out; the notes count these rows clip by clip. Rows of
    whole clips get a driving frame drawn from (`seed`, row). InputError where the file is no such table or no row is
    left.
    """
    header, *rows = _table(Path(path))
    columns = [_column(header, names) for names in (SOURCE, DRIVING, INITIAL)]
    if columns[0] is None or columns[1] is None:
        raise InputError(f"{path} must have the columns source and driving, got {', '.join(map(repr, header[:6]))}")
    names = _Names(clips)
    found: list[ImageSet] = []
    reasons: Counter[str] = Counter()
    drawn = 0
    for number, row in enumerate(rows):
        source, driving, initial = (
            row[place].strip() if place is not None and place < len(row) else "" for place in columns
        )
        try:
            image_set, was_drawn = _image_set(names, source, driving, initial, np.random.default_rng([seed, number]))
        except _Unusable as reason:
            reasons[str(reason)] += 1
        else:
            found.append(image_set)
            drawn += was_drawn
    if not found:
        first = f"; first, {next(iter(reasons))}" if reasons else ""
        raise InputError(f"{path} holds {len(rows)} rows and none names two frames of the data{first}")
    notes = [_left_out(str(path), len(rows), reasons)] if reasons else []
    if drawn:
        notes.append(f"{path}: {drawn} rows name a whole driving clip; one frame of it is drawn for each")
    return SetList(found, tuple(notes))


def write_pairs(path: str | Path, clips: NamedClips, sets: Sequence[ImageSet]) -> None:
    """Write the columns source, driving and best_frame; the file appears whole or not at all.

    A frame is the clip's name and the frame's file name, or its number: `id1#v#0-9.mp4/0000013.png`. What comes back
    from `read_pairs` is the same, as long as the clips' names are.
    """
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["source", "driving", "best_frame"])
    for it in sets:
        frames = ((it.source_clip, it.source_frame), (it.driving_clip, it.driving_frame),
                  (it.driving_clip, it.initial_frame))  # fmt: skip
        table.writerow([f"{clips.name(clip)}/{_frame_name(clips, clip, frame)}" for clip, frame in frames])
    file = AtomicFile(path)
    file.write(text.getvalue().encode())
    file.commit()


def _table(path: Path) -> list[list[str]]:
    with open_input(path, "file of test pairs") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise InputError(f"{path} must be at most {LARGEST_FILE:,} bytes")
    try:
        rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True) if row]
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8: {error}") from None
    if not 2 <= len(rows) <= MOST_SETS + 1:
        raise InputError(f"{path} must hold a header and 1 to {MOST_SETS:,} rows, got {len(rows)} lines")
    return rows


def _column(header: Sequence[str], names: Sequence[str]) -> int | None:
    known = [title.strip().lower() for title in header]
    return next((known.index(name) for name in names if name in known), None)


def _image_set(
    names: _Names, source: str, driving: str, initial: str, rng: np.random.Generator
) -> tuple[ImageSet, bool]:
    """The set of a row, and whether its driving frame was drawn."""
    if not source or not driving:
        raise _Unusable("a path is missing")
    source_clip, source_frame = names.place(source)
    driving_clip, driving_frame = names.place(driving)
    initial_frame = 0
    if initial:
        initial_clip, frame = names.place(initial)
        if initial_clip != driving_clip:
            raise _Unusable("best_frame is not of the driving clip")
        initial_frame = frame or 0
    drawn = driving_frame is None
    if driving_frame is None:
        count = names.clips.frame_count(driving_clip)
        driving_frame = int(rng.integers(min(1, count - 1), count))  # not the first, from which motion starts
    return ImageSet(source_clip, source_frame or 0, driving_clip, driving_frame, initial_frame), drawn


class _Names:
    """Finds clips and frames by the ends of paths."""

    def __init__(self, clips: NamedClips) -> None:
        self.clips = clips
        self._by_last: dict[str, list[tuple[tuple[str, ...], int]]] = {}
        for clip in range(len(clips)):
            parts = _parts(clips.name(clip))
            self._by_last.setdefault(parts[-1], []).append((parts, clip))
        self._frames: dict[int, dict[str, int]] = {}

    def place(self, path: str) -> tuple[int, int | None]:
        """(clip, frame), or (clip, None) for the path of a whole clip."""
        folder, _, file = path.replace("\\", "/").rpartition("/")
        whole, parent = self._clip(path), self._clip(folder) if folder else None
        if parent is not None:
            frame = self._frame(parent, file)
            if frame is not None:
                return parent, frame
        if whole is not None:
            return whole, None
        if parent is not None:
            raise _Unusable(f"clip {self.clips.name(parent)} has no frame {file[:80]}")
        named = (_parts(folder or path) or ("",))[-1]
        raise _Unusable(f"clip {named[:80]} is not in the data")

    def _clip(self, path: str) -> int | None:
        """The clip whose name shares the most parts with the end of the path; none where two share as many."""
        parts = _parts(path)
        if not parts:
            return None
        shared = [(_shared(parts, own), clip) for own, clip in self._by_last.get(parts[-1], ())]
        most = max((count for count, _ in shared), default=0)
        best = [clip for count, clip in shared if count == most]
        if len(best) > 1:
            raise _Unusable(f"clip {parts[-1][:80]} is in the data {len(best)} times")
        return best[0] if best else None

    def _frame(self, clip: int, file: str) -> int | None:
        if clip not in self._frames:
            count = self.clips.frame_count(clip)
            self._frames[clip] = {_stem(_frame_name(self.clips, clip, frame)): frame for frame in range(count)}
        return self._frames[clip].get(_stem(file))


def _parts(path: str) -> tuple[str, ...]:
    """The parts of a path without the last one's ending."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    if parts:
        base, dot, ending = parts[-1].rpartition(".")
        parts[-1] = base if base and f".{ending.lower()}" in ENDINGS else parts[-1]
    return tuple(parts)


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts agree from the end."""
    count = 0
    for left, right in zip(reversed(one), reversed(other), strict=False):
        if left != right:
            break
        count += 1
    return count


def _stem(file: str) -> str:
    """What identifies a frame's file: its name without ending, as a number where it is one."""
    stem = file.rpartition(".")[0] or file
    return str(int(stem)) if stem.isascii() and stem.isdigit() and len(stem) <= 18 else stem


def _frame_name(clips: NamedClips, clip: int, frame: int) -> str:
    """The file name of a frame where the data set knows one, else its number as the published files write it."""
    name = getattr(clips, "frame_name", None)
    return str(name(clip, frame)) if name is not None else f"{frame:07d}.png"


def _left_out(path: str, rows: int, reasons: Counter[str]) -> str:
    told = [f"{count} × {reason}" for reason, count in reasons.most_common(NAMED)]
    rest = len(reasons) - len(told)
    more = f"; and {rest} more" if rest > 0 else ""
    return printable(f"{path}: {sum(reasons.values())} of {rows} rows are left out: {'; '.join(told)}{more}")
