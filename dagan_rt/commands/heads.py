"""`dagan-rt heads`: write clips of synthetic talking heads with their truth."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt.errors import InputError

if TYPE_CHECKING:
    from dagan_rt.training.heads import Clip

FORMATS = ("png", "mp4")
FRAME_RATE = 25


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "heads",
        help="write clips of synthetic talking heads, with depth, landmarks and pose",
        description="Write clips of synthetic talking heads. Each clip is a folder of PNG frames (or one .mp4), "
        "with a truth.npz: depth, landmarks, pose, expression, identity.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to fill: new, or empty")
    parser.add_argument("--clips", type=int, default=8, metavar="N", help="how many, one identity each (default 8)")
    parser.add_argument("--frames", type=int, default=16, metavar="T", help="frames of a clip (default 16)")
    parser.add_argument("--size", type=int, default=128, metavar="S", help="side in pixels (default 128)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="other motion and scenes (default 0)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="the first identity's number (default 0)")
    parser.add_argument("--held-out", action="store_true", help="identities that training never draws")
    parser.add_argument("--format", choices=FORMATS, default="png", help="png: folders of frames (default)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the clips; returns the exit code."""
    from tqdm import tqdm

    from dagan_rt.training.heads import HELD_OUT, TRAINING, draw_clip

    identities = HELD_OUT if args.held_out else TRAINING
    if args.clips < 1 or args.first < 0 or args.first + args.clips > len(identities):
        last = len(identities) - 1
        raise InputError(f"--clips must be at least 1 and stay within 0..{last}, got {args.clips} from {args.first}")
    if args.format == "mp4" and args.size % 2:
        raise InputError(f"--size must be even for mp4, got {args.size}; or write --format png")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} must be a folder, but it is a file")
    if args.out.is_dir() and any(args.out.iterdir()):
        raise InputError(f"--out {args.out} is not empty; name a new folder, or empty it first")
    chosen = identities[args.first : args.first + args.clips]
    for identity in tqdm(chosen, desc="drawing heads", unit="clip", disable=None):
        # Drawn before any folder is made, so that a number out of range leaves nothing behind.
        clip = draw_clip(identity, args.frames, args.size, args.seed)
        write_clip(args.out, clip, args.format)
    print(f"wrote {args.clips} clips of {args.frames} frames to {args.out}")
    return 0


def write_clip(out: Path, clip: Clip, format: str) -> None:
    """Write one clip as out/IDENTITY/NNNNN.png and truth.npz, or as out/IDENTITY.mp4 and out/IDENTITY.truth.npz."""
    import numpy as np

    truth: dict[str, Any] = {
        "depth": clip.depth,
        "landmarks": clip.landmarks,
        "pose": clip.pose,
        "expression": clip.expression,
        "identity": np.int64(clip.identity),
    }
    name = f"{clip.identity:07d}"
    if format == "mp4":
        from dagan_rt.video import VideoWriter

        out.mkdir(parents=True, exist_ok=True)
        side = clip.frames.shape[1]
        with VideoWriter(out / f"{name}.mp4", fps=FRAME_RATE, width=side, height=side) as writer:
            for frame in clip.frames:
                writer.write(frame)
        np.savez_compressed(out / f"{name}.truth.npz", **truth)
        return
    from dagan_rt.images import write_image

    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(clip.frames):
        write_image(folder / f"{number:05d}.png", frame)
    np.savez_compressed(folder / "truth.npz", **truth)
