"""manifest.jsonl: a row for every raw video that is done, appended as soon as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.files import AtomicFile
from dagan_rt.preparation.clips import writing
from dagan_rt.preparation.names import CLIP
from dagan_rt.preparation.video import PARTIAL

FILE = "manifest.jsonl"
SPLITS = ("train", "test")
LONGEST_ROW = 1 << 26  # bytes


class Manifest:
    """The rows by file; the last one of a file counts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FILE
        self.rows: dict[str, dict[str, Any]] = {}
        whole = 0
        for line in self._lines():
            row = _row(line)
            if row is None:
                if not line.endswith(b"\n"):  # the process died while it wrote this one
                    break
                raise InputError(f"{self.path} is damaged after byte {whole}: run again with --force")
            self.rows[row["file"]] = row
            whole += len(line)
        if self.path.exists() and whole < self.path.stat().st_size:
            with writing(self.path):
                os.truncate(self.path, whole)

    def _lines(self) -> Iterator[bytes]:
        if self.path.exists():
            with self.path.open("rb") as file:
                while line := file.readline(LONGEST_ROW):
                    yield line

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, on the disk when this returns; raises OutputError, and leaves the file as it was then."""
        before = self.path.stat().st_size if self.path.exists() else 0
        with writing(self.path):
            try:
                with self.path.open("ab") as file:
                    file.write(_line(row))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                if self.path.exists():
                    os.truncate(self.path, before)
                raise
        self.rows[row["file"]] = row

    def tidy(self) -> None:
        """Write the rows once more in the order of files, so that it does not tell who finished first."""
        self.rows = dict(sorted(self.rows.items()))
        with writing(self.path):
            file = AtomicFile(self.path)
            for row in self.rows.values():
                file.write(_line(row))
            file.commit()

    def clips(self, split: str | None = None) -> list[dict[str, Any]]:
        """Every clip of the rows, or of one split, in the order of names."""
        found = [clip for row in self.rows.values() for clip in row.get("clips", ())]
        return sorted((clip for clip in found if split in (None, clip["split"])), key=lambda clip: clip["name"])

    def sweep(self) -> None:
        """Delete what is half-made, and clips of no row: of a run that was ended before it wrote the row."""
        shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)
        for leftover in self.folder.glob(".*.partial.*"):  # of `AtomicFile`
            leftover.unlink()
        known = {(clip["split"], clip["name"]) for clip in self.clips()}
        for split in SPLITS:
            folder = self.folder / split
            if not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                orphans = [one for one in entries if CLIP.fullmatch(one.name) and (split, one.name) not in known]
            for orphan in orphans:
                if orphan.is_dir(follow_symlinks=False):
                    shutil.rmtree(orphan.path)
                else:
                    os.unlink(orphan.path)


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode("ascii")


def _row(line: bytes) -> dict[str, Any] | None:
    """A row whose clips' names are names of clips, and no paths elsewhere; None where it is none."""
    try:
        row = json.loads(line)
        names = [(clip["split"], clip["name"]) for clip in row.get("clips", ())]
        whole = isinstance(row["file"], str) and line.endswith(b"\n")
        whole = whole and all(isinstance(clip["frames"], int) and clip["identity"] for clip in row.get("clips", ()))
        return row if whole and all(split in SPLITS and CLIP.fullmatch(name) for split, name in names) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
