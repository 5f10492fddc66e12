"""`dagan-rt info`: what a checkpoint, a bundle or a server holds, which backend would run it, and who made a video."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt.errors import InputError, require
from dagan_rt.tables import printable

if TYPE_CHECKING:
    from dagan_rt.bundle import Bundle
    from dagan_rt.checkpoints import Checkpoint

MEDIA = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff",
)  # fmt: skip
MARKED_FRAMES = 50  # of a video that are looked at


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "info", help="say what a checkpoint, a bundle or a server holds, and which backends run here"
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="checkpoint (.pth.tar), bundle folder, a server's address (grpc://host:8001), or a picture or video, of "
        "which is said whether it carries the invisible mark; none: the backends",
    )
    parser.add_argument("--depth", type=Path, metavar="DIR", help="folder with the checkpoint's encoder.pth, depth.pth")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit code."""
    if args.file is None:
        if args.depth is not None:
            raise InputError("--depth goes with a checkpoint: give its file, too")
        print(describe_backends())
        return 0
    path = Path(args.file)
    if "://" in args.file:
        from dagan_rt.serving import Client

        if args.depth is not None:
            raise InputError(f"--depth goes with a checkpoint, but {args.file} is a server")
        with Client(args.file) as client:
            print(client.served.describe())
        return 0
    if (path / "manifest.json").is_file():
        from dagan_rt import bundle

        if args.depth is not None:
            raise InputError(f"--depth goes with a checkpoint, but {path} is a bundle, which brings its own")
        opened = bundle.Bundle.open(path)
        print(bundle.describe(opened), describe_backends(opened), sep="\n\n")
        return 0
    if path.suffix.lower() in MEDIA:
        if args.depth is not None:
            raise InputError(f"--depth goes with a checkpoint, but {path} is a picture or a video")
        print(describe_mark(path))
        return 0
    require("torch", extra="export", why="reading a checkpoint")
    from dagan_rt.checkpoints import inspect

    print(describe(inspect(path, args.depth)))
    return 0


def describe_mark(path: Path) -> str:
    """Whether a picture or the first frames of a video carry the mark of `animate --watermark invisible`."""
    from itertools import islice

    from dagan_rt.images import is_still, read_image
    from dagan_rt.video import VideoReader
    from dagan_rt.watermark import SURE, detect

    if is_still(path):
        sure = detect([read_image(path)])
    else:
        with VideoReader(path) as reader:
            sure = detect(islice(reader, MARKED_FRAMES))
    verdict = "found: it is synthetic" if sure >= SURE else "not found, which says nothing where it was scaled or cut"
    return f"{path}: invisible mark of dagan-rt {verdict} ({sure:.1f} standard deviations, {SURE:.0f} are needed)"


def describe_backends(bundle: Bundle | None = None) -> str:
    """Each backend, best first, and whether it could run here, or run `bundle`; * marks what "auto" tries first."""
    from dagan_rt import backends

    choice = backends.choose(bundle)
    rows = [f"{'*' if name == choice.name else ' '} {name:<22}{reason}" for name, reason in choice.reasons.items()]
    return "\n".join(["  backend               why, or why not", *map(printable, rows)])


def describe(checkpoint: Checkpoint) -> str:
    """A table of what the checkpoint holds, for a person to read. Reads every weight once, to find NaN and infinity."""
    config = checkpoint.config
    rows = [
        ("checkpoint", str(checkpoint.path)),
        ("variant", f"{config.variant} ({_parts(checkpoint)})"),
        ("image size", f"{config.size} × {config.size} pixels"),
        ("key points", str(config.num_keypoints)),
        ("motion scale", f"{config.motion_scale:g}"),
        *_widths(checkpoint),
        ("epoch", "not stated" if checkpoint.epoch is None else str(checkpoint.epoch)),
        ("optimizers", ", ".join(checkpoint.optimizers) or "none"),
    ]
    lines = [f"{name:<14}{value}" for name, value in rows]
    lines += ["", f"{'network':<14}{'parameters':>13}"]
    for network, count in checkpoint.parameters.items():
        absent = "" if network in checkpoint.state_dicts else "  (not in the file)"
        lines.append(f"{network:<14}{count:>13,}{absent}")
    lines.append(f"{'total':<14}{sum(checkpoint.parameters.values()):>13,}")
    notes = list(checkpoint.notes)
    broken = checkpoint.not_finite()
    if broken:
        notes.append(f"{len(broken)} entries hold NaN or infinite values, the first is {broken[0]}: it cannot be used")
    return "\n".join(lines + [""] * bool(notes) + [f"note: {note}" for note in notes])


def _parts(checkpoint: Checkpoint) -> str:
    parts = checkpoint.config.parts
    attention = {"depth": "depth-guided attention", "self": "self-attention", None: "no attention"}[parts.attention]
    return f"{parts.decoder} decoder, {attention}, {'RGB-D' if parts.rgbd_keypoints else 'RGB'} key points"


def _widths(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    config = checkpoint.config
    rows = [
        ("kp_detector", _ladder(config.keypoint_width, config.keypoint_max, config.keypoint_blocks)),
        ("motion", _ladder(config.motion_width, config.motion_max, config.motion_blocks)),
        ("generator", _ladder(config.generator_width, config.generator_max, config.down_blocks)),
    ]
    if config.parts.decoder == "spade":
        rows.append(("decoder", f"SPADE, {config.spade_width} channels at the end, {config.spade_hidden} hidden"))
    else:
        rows.append(("decoder", f"{config.residual_blocks} residual blocks"))
    if config.parts.attention:
        rows.append(("attention", f"{config.query_width} channels of queries and keys"))
    if "discriminator" in checkpoint.state_dicts:
        ladder = _ladder(config.discriminator_width, config.discriminator_max, config.discriminator_blocks)
        rows.append(("discriminator", ladder))
    if "depth_encoder" in checkpoint.state_dicts:
        widths = ", ".join(map(str, config.depth_decoder_widths))
        rows.append(("depth", f"ResNet-{config.depth_layers}, {config.depth_width} channels; decoder {widths}"))
    elif config.parts.uses_depth:
        rows.append(("depth", "not given (--depth DIR)"))
    return rows


def _ladder(width: int, cap: int, blocks: int) -> str:
    """The channels of each level."""
    return " → ".join(str(min(cap, width * 2**level)) for level in range(blocks + 1)) + " channels"
