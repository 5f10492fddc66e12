"""The whole of a preparation: which videos there are, which are done, and what is written when all of them are."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from dagan_rt.errors import InputError
from dagan_rt.faces import FaceDetector
from dagan_rt.preparation import closing
from dagan_rt.preparation.clips import writing
from dagan_rt.preparation.manifest import FILE, Manifest
from dagan_rt.preparation.names import VIDEO_ENDINGS, identity_rule
from dagan_rt.preparation.options import FILE as OPTIONS_FILE
from dagan_rt.preparation.options import Options, first_difference, write_options
from dagan_rt.preparation.video import LINK_OUT, LINKED_FOLDER, NO_IDENTITY, UNREADABLE, Job
from dagan_rt.preparation.workers import rows_of

LOCK = ".lock"
REFUSED = (NO_IDENTITY, LINK_OUT, LINKED_FOLDER)


@dataclass(frozen=True)
class Outcome:
    """What a preparation came to. videos: rows of the manifest; clips: their rows in it; skipped, dropped: how many
    videos gave nothing, and stretches of videos no clip, by reason; damaged: how many videos were used up to a fault;
    others: files of the raw folder that are no videos by their names; notes: sentences for the user."""

    videos: int
    clips: list[dict[str, Any]]
    skipped: Counter[str]
    dropped: Counter[str]
    damaged: int
    others: int
    notes: tuple[str, ...]


def prepare(
    raw: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    workers: int = 0,
    force: bool = False,
    progress: bool = False,
    detector: FaceDetector | None = None,
) -> Outcome:
    """Prepare every video below `raw` into `out`, or go on where an earlier run was stopped.

    workers: processes; 0: this one alone, with `detector` instead of the one that the options name, if it is given.
    force: begin anew where `out` was prepared with other options, or is damaged.

    A video is done once its row stands in manifest.jsonl; one that has changed its size since is done again. Raises
    InputError for folders and options that cannot be used and where no video is found; OSError, which names a file,
    where the result cannot be written. Everything else is a row of the manifest that says why a video was skipped.
    """
    raw, out, options = Path(raw), Path(out), options or Options()
    _check_folders(raw, out)
    rule = identity_rule(options.identities)
    described = options.described(with_detector=detector is None)
    jobs, refused, others = find_videos(raw, rule, progress)
    if not jobs and not refused:
        raise InputError(f"{raw} holds no video ({', '.join(VIDEO_ENDINGS)}); {others} other files lie there")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        manifest = _opened(out, described, force)
        _forget(manifest, {str(job.path): job for job in jobs} | {row["file"]: None for row in refused}, raw)
        try:
            manifest.sweep()
            for row in refused:
                manifest.append(row)
            waiting = [job for job in jobs if str(job.path) not in manifest.rows]
            _work(manifest, waiting, len(jobs), options, workers, progress, detector)
            manifest.tidy()
            notes = closing.write_closing(out, manifest, options)
        except BaseException:
            with contextlib.suppress(OSError, InputError):
                Manifest(out).sweep()  # read again: an interruption may have come between a row and its being noted
            raise
    return _outcome(manifest, others, notes)


def _work(
    manifest: Manifest,
    jobs: list[Job],
    total: int,
    options: Options,
    workers: int,
    progress: bool,
    detector: FaceDetector | None,
) -> None:
    clips = len(manifest.clips())
    skipped = sum("skipped" in row for row in manifest.rows.values())
    bar = tqdm(total=total, initial=total - len(jobs), desc="videos", unit="video", disable=None if progress else True)
    with bar, contextlib.closing(rows_of(jobs, options, manifest.folder, workers, detector)) as rows:
        for row in rows:
            manifest.append(row)
            clips += len(row.get("clips", ()))
            skipped += "skipped" in row
            bar.set_postfix_str(f"{clips} clips, {skipped} videos skipped")
            bar.update()


def find_videos(raw: Path, rule: Any, progress: bool = False) -> tuple[list[Job], list[dict[str, Any]], int]:
    """(videos in the order of their paths, rows of those refused unread, how many other files there are)."""
    jobs: list[Job] = []
    refused: list[dict[str, Any]] = []
    others, root = 0, raw.resolve()
    for path, problem in tqdm(_walk(raw), desc="looking for videos", unit="file", disable=None if progress else True):
        if problem is None and not path.name.lower().endswith(VIDEO_ENDINGS):
            others += 1
            continue
        file = raw / path
        if problem is None and file.is_symlink() and not _resolved(file).is_relative_to(root):
            problem = LINK_OUT
        identity = rule(path) if problem is None else None
        if problem is None and identity is None:
            problem = NO_IDENTITY
        if problem is not None:
            refused.append({"file": str(path), "skipped": problem})
        else:
            jobs.append(Job(raw, path, str(identity)))
    return sorted(jobs, key=lambda job: str(job.path)), sorted(refused, key=lambda row: row["file"]), others


def _walk(raw: Path) -> Iterator[tuple[PurePosixPath, str | None]]:
    """Paths inside a folder: files, and folders that cannot be gone into, with the reason."""
    closed: list[str] = []
    for parent, folders, files in os.walk(raw, onerror=lambda error: closed.append(error.filename)):
        here = Path(parent).relative_to(raw)
        for name in files:
            yield PurePosixPath(here / name), None
        for name in folders:
            if Path(parent, name).is_symlink():
                yield PurePosixPath(here / name), LINKED_FOLDER
    for name in closed:
        yield PurePosixPath(Path(name).relative_to(raw)), UNREADABLE


def _resolved(file: Path) -> Path:
    try:
        return file.resolve()
    except (OSError, RuntimeError):  # a link in a circle; it cannot be read, whatever it names
        return file.parent.resolve() / file.name


def _check_folders(raw: Path, out: Path) -> None:
    if not raw.is_dir():
        raise InputError(f"the raw folder {raw} does not exist; expected a folder of videos")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} must be a folder, but it is a file")
    one, other = raw.resolve(), out.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise InputError(f"--out {out} and the raw folder {raw} must not lie in one another")
    if out.is_dir() and not (out / OPTIONS_FILE).exists() and any(entry.name[0] != "." for entry in out.iterdir()):
        raise InputError(f"--out {out} is not empty and was not prepared by this program; name a new folder")


def _opened(out: Path, described: dict[str, Any], force: bool) -> Manifest:
    """The manifest of a folder that is new, or was prepared with the same options, or is to be prepared anew."""
    if not (out / OPTIONS_FILE).exists():
        with writing(out):
            write_options(out, described)
        return Manifest(out)
    if not force:
        difference = first_difference(out, described)
        if difference is not None:
            raise InputError(
                f"{difference}: give the same, name another --out, or begin anew with --force (which deletes its clips)"
            )
        return Manifest(out)
    try:
        unchanged = first_difference(out, described) is None
        manifest = Manifest(out)
    except InputError:
        unchanged = False
    if unchanged:
        return manifest
    with writing(out):
        (out / FILE).unlink(missing_ok=True)  # then every clip is one of no row, and is swept
        write_options(out, described)
    return Manifest(out)


def _forget(manifest: Manifest, files: dict[str, Job | None], raw: Path) -> None:
    """Leave out rows of videos that have changed since or could not be read, and those of files refused now."""
    for name, row in list(manifest.rows.items()):
        job = files.get(name)
        again = name in files and (job is None or row.get("skipped") in (UNREADABLE, *REFUSED))
        if job is not None and "size" in row:
            with contextlib.suppress(OSError):
                again = again or (raw / job.path).stat().st_size != row["size"]
        if again:
            del manifest.rows[name]


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the lock ends with the process."""
    if os.name != "posix":
        yield
        return
    import fcntl

    with writing(out / LOCK):
        handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is preparing {out}: wait for it, or stop it") from None
        except OSError:  # some network file systems know no locks
            pass
        yield
    finally:
        os.close(handle)


def _outcome(manifest: Manifest, others: int, notes: tuple[str, ...]) -> Outcome:
    rows = manifest.rows.values()
    dropped: Counter[str] = Counter()
    for row in rows:
        dropped.update(row.get("dropped", {}))
    return Outcome(
        videos=len(rows),
        clips=manifest.clips(),
        skipped=Counter(row["skipped"] for row in rows if "skipped" in row),
        dropped=dropped,
        damaged=sum("problem" in row for row in rows),
        others=others,
        notes=notes,
    )
