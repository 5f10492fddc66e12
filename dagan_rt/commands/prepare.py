"""`dagan-rt prepare`: a training set from a folder of raw videos."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt.errors import InputError

if TYPE_CHECKING:
    from dagan_rt.preparation import Outcome

# The defaults are those of dagan_rt.preparation.Options, which a test compares: importing it takes NumPy.
DEFAULTS: dict[str, Any] = {
    "size": 256, "fps": 25.0, "min_frames": 64, "max_frames": 1024, "margin": 0.4, "min_side": 0, "every": 5,
    "format": "frames", "image": "png", "quality": 95, "test_fraction": 0.1, "seed": 0, "identities": "folder",
    "detector": "centerface",
}  # fmt: skip
HELP = {
    "size": ("S", "side of the frames, pixels"),
    "fps": ("N", "frames a second; a video with fewer keeps its own"),
    "min_frames": ("N", "shortest clip"),
    "max_frames": ("N", "longest clip; a longer stretch becomes several"),
    "margin": ("M", "what the crop adds to the face's box on each side, in sides of the box"),
    "min_side": ("S", "smallest crop in the raw video, pixels (0: --size, so that nothing is enlarged)"),
    "every": ("K", "look for faces in every K-th frame"),
    "format": ("", "frames: a folder of images a clip; packed: one uncompressed zip of them"),
    "image": ("", "png: exact; jpg: smaller"),
    "quality": ("Q", "of jpg, 1 to 95"),
    "test_fraction": ("F", "expected share of the identities whose clips go to test/"),
    "seed": ("N", "another choice of those identities"),
    "identities": ("RULE", "whose a video is: folder (the first one below RAW), video (each its own), a .csv of "
                   "FILE,IDENTITY, or a regular expression with one group, searched for in the path"),
    "detector": ("NAME", "centerface, or an .onnx file of a detector (see dagan_rt.faces)"),
}  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "prepare",
        allow_abbrev=False,
        help="make a training set of a folder of raw videos",
        description="Find and track the faces in a folder of raw videos of people talking, and write a clip of each: "
        "one square crop, resized, in train/ or test/ by identity. Run the same command again to continue.",
    )
    parser.add_argument("raw", type=Path, metavar="RAW", help="folder of videos, at any depth: IDENTITY/.../VIDEO.mp4")
    parser.add_argument("--out", type=Path, required=True, metavar="DATA", help="folder to fill; continued if begun")
    for name, default in DEFAULTS.items():
        metavar, text = HELP[name]
        choices = {"format": ("frames", "packed"), "image": ("png", "jpg")}.get(name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            choices=choices,
            metavar=None if choices else metavar,
            help=f"{text} (default {default})".replace("%", "%%"),
        )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--force", action="store_true", help="begin anew where --out was prepared with other options")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prepare, and say what came of it; 0, or 130 when Ctrl-C stopped it."""
    from dagan_rt.preparation import Options, prepare

    workers = _cores() if arguments.workers is None else arguments.workers
    if workers < 1:
        raise InputError(f"--workers must be at least 1, got {workers}")
    options = Options(**{name: getattr(arguments, name) for name in DEFAULTS})
    try:
        outcome = prepare(
            arguments.raw, arguments.out, options, workers=workers, force=arguments.force, progress=not arguments.quiet
        )
    except KeyboardInterrupt:
        print(f"interrupted: what is done is in {arguments.out}; run the same command to continue", file=sys.stderr)
        return 130
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        raise InputError(
            f"stopped, for the result cannot be written: {reason}; what is done is kept, and the same command continues"
        ) from error
    _report(outcome, arguments)
    return 0


def _report(outcome: Outcome, arguments: argparse.Namespace) -> None:
    """Print the counts; InputError where no clip came of it at all."""
    out, skipped = arguments.out, _counted(outcome.skipped)
    remedies = _remedies(outcome, arguments)
    if not outcome.clips:
        raise InputError(
            f"no clip came of {outcome.videos} videos ({skipped}{_also(outcome.dropped)}): {out / 'manifest.jsonl'} "
            f"says of each why{''.join(f'; {remedy}' for remedy in remedies)}"
        )
    used = outcome.videos - outcome.skipped.total()
    print(f"{used} of {outcome.videos} videos gave {len(outcome.clips)} clips")
    for split in ("train", "test"):
        clips = [clip for clip in outcome.clips if clip["split"] == split]
        people, frames = len({clip["identity"] for clip in clips}), sum(clip["frames"] for clip in clips)
        print(f"  {split}/: {len(clips)} clips of {people} identities, {frames} frames")
    if skipped:
        print(f"skipped {outcome.skipped.total()} videos: {skipped}")
    if outcome.dropped:
        print(f"left out {outcome.dropped.total()} stretches with a face: {_counted(outcome.dropped)}")
    for remedy in remedies:
        print(f"note: {remedy}")
    if outcome.damaged:
        print(f"damaged, used up to the fault: {outcome.damaged} videos")
    if outcome.others:
        print(f"no videos by their names: {outcome.others} files")
    for note in outcome.notes:
        print(f"note: {note}")
    print(f"why, video by video: {out / 'manifest.jsonl'}; a look at the clips: {out / 'contact.png'}")
    print(f"next: dagan-rt train --recipe train/recipes/clips-256.toml --data {shlex.quote(str(out))} --out runs/mine")


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda one: (-one[1], one)))


def _remedies(outcome: Outcome, arguments: argparse.Namespace) -> list[str]:
    """Which option takes what was left out, and what it is now."""
    from dagan_rt.preparation.video import TOO_SHORT, TOO_SMALL

    reasons = outcome.skipped | outcome.dropped
    smallest = arguments.min_side or arguments.size
    remedies = {
        TOO_SHORT: f"--min-frames, now {arguments.min_frames}, takes shorter ones",
        TOO_SMALL: f"--min-side, now {smallest}, takes smaller faces, enlarged to {arguments.size} pixels",
    }
    return [remedy for reason, remedy in remedies.items() if reasons[reason]]


def _also(dropped: Counter[str]) -> str:
    return f"; of stretches with a face: {_counted(dropped)}" if dropped else ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
