"""Whose a video is, which side of the split that falls on, and what its clips are called.

All of it is a function of the video's path inside the raw folder: files that are added change no name and no side.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from dagan_rt.errors import InputError

LONGEST_IDENTITY, LONGEST_VIDEO = 64, 120  # bytes; a clip's name has to stay under the 255 of file systems
LARGEST_CSV = 1 << 26  # bytes
ENDING = ".mp4"  # left out of names
VIDEO_ENDINGS = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".gif",
    ".mpg",
    ".mpeg",
    ".ts",
    ".wmv",
    ".flv",
    ".3gp",
)
CLIP = re.compile(r"[^#/]+#[^#/]+#\d{6,}-\d{6,}(-\d+)?(\.zip)?")
_RESERVED = frozenset('#~/\\:*?"<>|')

Rule = Callable[[PurePosixPath], "str | None"]
"""From a video's path inside the raw folder to its identity; None where there is none."""


def identity_rule(text: str) -> Rule:
    """How identities are read from paths inside the raw folder.

    "folder": the first folder, as in VoxCeleb's id10283/VIDEO/00001.mp4; of a file outside any folder, its own name.
    "video": every file is a person of its own. A name that ends in .csv: a file of rows FILE,IDENTITY, where FILE is a
    path inside the raw folder, or a folder there that stands for all below it. Anything else: a regular expression
    with one group, which is searched for in the path.
    """
    if text == "folder":
        return lambda path: path.parts[0] if len(path.parts) > 1 else _without_ending(path.name)
    if text == "video":
        return lambda path: _without_ending("~".join(path.parts))
    if text.lower().endswith(".csv"):
        table = _read_csv(Path(text))
        return lambda path: next((table[str(p)] for p in (path, *path.parents) if str(p) in table), None)
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise InputError(f"--identities {text!r} is not a regular expression: {error}") from None
    if pattern.groups != 1:
        raise InputError(
            f"--identities must be folder, video, a .csv file or a regular expression with one group, got {text!r} "
            f"with {pattern.groups} groups"
        )
    return lambda path: (match.group(1) or None) if (match := pattern.search(str(path))) else None


def split_of(identity: str, test_fraction: float, seed: int) -> str:
    """ "test" or "train": a function of the identity's name and the seed, uniform over names."""
    digest = hashlib.sha256(f"{seed}:{identity}".encode("utf-8", "surrogatepass")).digest()
    return "test" if int.from_bytes(digest[:8], "big") < test_fraction * 2**64 else "train"


def safe_identity(identity: str) -> str:
    """An identity as it stands in names; where that takes other characters or fewer, a digest tells it from others."""
    normal = unicodedata.normalize("NFC", identity)
    clean = _clean(normal, LONGEST_IDENTITY)
    return clean if clean == normal else f"{clean}~{_short_digest(normal)}"


def video_name(path: PurePosixPath, in_folder: bool) -> str:
    """A name for a video that no other path gives; `in_folder` where the first folder is the identity.

    The path's parts joined by "~", without .mp4. Where that does not tell it from all others, a digest follows.
    """
    parts = path.parts[1:] if in_folder and len(path.parts) > 1 else path.parts
    plain = _without_ending("~".join(parts))
    clean = _without_ending("~".join(_clean(part, LONGEST_VIDEO) for part in parts))
    told_apart = (
        all(_clean(part, LONGEST_VIDEO) == part for part in path.parts)
        and len(os.fsencode(plain)) <= LONGEST_VIDEO
        and not (path.name.endswith(ENDING) and plain.lower().endswith(VIDEO_ENDINGS))  # a.mkv.mp4 beside a.mkv
        and not (len(path.parts) > len(parts) and plain == path.parts[0])  # a/a.mp4 beside a.mp4
    )
    return plain if told_apart else f"{_clean(clean, LONGEST_VIDEO, keep='~')}~{_short_digest(str(path))}"


def _without_ending(name: str) -> str:
    return name.removesuffix(ENDING) or name


def _clean(text: str, longest: int, keep: str = "") -> str:
    """Printable, of no character that names or file systems use otherwise, not hidden, at most `longest` bytes."""
    text = unicodedata.normalize("NFC", text)
    text = "".join(one if one.isprintable() and (one in keep or one not in _RESERVED) else "_" for one in text)
    text = "_" + text[1:] if text[:1] in (".", " ", "-") else text
    text = text[:-1] + "_" if text[-1:] in (".", " ") else text
    return text.encode("utf-8", "replace")[:longest].decode("utf-8", "ignore") or "_"


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def _read_csv(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_CSV + 1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"--identities {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > LARGEST_CSV:
        raise InputError(f"--identities {path} must be at most {LARGEST_CSV} bytes")
    table: dict[str, str] = {}
    try:
        for number, row in enumerate(
            csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True), start=1
        ):
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if len(cells) != 2 or not all(cells):
                raise InputError(f"--identities {path}, row {number}: expected FILE,IDENTITY, got {len(cells)} cells")
            key = str(PurePosixPath(cells[0]))
            if table.setdefault(key, cells[1]) != cells[1]:
                raise InputError(f"--identities {path}, row {number}: {key[:80]} has two identities")
    except csv.Error as error:
        raise InputError(f"--identities {path} is not a CSV file: {error}") from None
    return table
