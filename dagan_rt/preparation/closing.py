"""What is written once every video is done: pairs of the test clips, and a picture to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.preparation.clips import frame_name, read_frame, writing
from dagan_rt.preparation.manifest import SPLITS, Manifest
from dagan_rt.preparation.options import Options

CONTACT = "contact.png"
PICTURES, COLUMNS, CELL = 40, 8, 128
PAIRS = {"self": "pairs-self.csv", "cross": "pairs-cross.csv"}


class TestClips:
    """The rows of a split's clips, as the sampling of pairs wants them."""

    __test__ = False  # no test, whatever pytest makes of the name

    def __init__(self, rows: Sequence[dict[str, Any]], image: str) -> None:
        self.rows, self.image = rows, image

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, clip: int) -> str:
        return str(self.rows[clip]["name"])

    def identity(self, clip: int) -> str:
        return str(self.rows[clip]["identity"])

    def frame_count(self, clip: int) -> int:
        return int(self.rows[clip]["frames"])

    def frame_name(self, clip: int, frame: int) -> str:
        return frame_name(frame, self.image)


def write_closing(out: Path, manifest: Manifest, options: Options) -> tuple[str, ...]:
    """Write contact.png and the pairs of test/ where there are clips for them; returns sentences for the user."""
    clips = manifest.clips()
    if not clips:
        return ()
    with writing(out):
        notes = _write_contact(out, clips, options)
        for split in SPLITS:
            if not any(clip["split"] == split for clip in clips):
                notes.append(
                    f"no identity fell to {split}/: with few of them, try another --seed or --test-fraction "
                    f"(now {options.test_fraction})"
                )
        return (*notes, *_write_pairs(out, manifest.clips("test"), options))


def _write_pairs(out: Path, rows: Sequence[dict[str, Any]], options: Options) -> list[str]:
    from dagan_rt.evaluation.pairs import write_pairs
    from dagan_rt.evaluation.sets import sample_sets

    notes = []
    clips = TestClips(rows, options.image)
    for mode, name in PAIRS.items():
        (out / name).unlink(missing_ok=True)
        if not rows:
            continue
        try:
            sets = sample_sets(clips, mode, seed=options.seed)
        except InputError as error:
            notes.append(f"no {name}: {error}")
            continue
        write_pairs(out / name, clips, sets.sets)
        notes += [f"{name}: {note}" for note in sets.notes]
    return notes


def _write_contact(out: Path, clips: Sequence[dict[str, Any]], options: Options) -> list[str]:
    """The middle frame of clips spread evenly over all of them."""
    from dagan_rt.training.sheets import contact_sheet, write_sheet

    count = min(PICTURES, len(clips))
    chosen = [clips[(2 * place + 1) * len(clips) // (2 * count)] for place in range(count)]
    pictures, notes = [], []
    for clip in chosen:
        path = out / clip["split"] / clip["name"]
        try:
            pictures.append(read_frame(path, clip["frames"] // 2, options.image))
        except (InputError, OSError) as error:
            notes.append(f"{path} stands in the manifest and cannot be read: {error}")
    if pictures:
        rows = [pictures[first : first + COLUMNS] for first in range(0, len(pictures), COLUMNS)]
        write_sheet(out / CONTACT, contact_sheet(rows, cell=CELL))
    return notes
