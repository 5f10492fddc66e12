"""`dagan-rt explain`: one sheet of what happens inside the networks for a portrait and a driving picture."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt.commands.shared import (
    add_crop_options,
    add_motion_options,
    check_crop,
    check_motion_options,
    open_detector,
)
from dagan_rt.errors import InputError, require

if TYPE_CHECKING:
    import numpy as np

    from dagan_rt.faces import FaceDetector
    from dagan_rt.networks.config import NetworkConfig


def add_parser(subparsers: Any) -> None:
    """Add `explain` to the subparsers of the command line."""
    parser = subparsers.add_parser(
        "explain",
        allow_abbrev=False,
        help="draw what happens inside: key points, depth, flow, occlusion, attention",
        description="Write one sheet that shows why a result looks as it does, for a portrait and one driving picture: "
        "key points, depth maps, flow, occlusion, warped source and feature, attention and result, each with what to "
        "look for; and print the facts.",
    )
    parser.add_argument(
        "--bundle", type=Path, required=True, metavar="DIR", help="exported model, with its weights for PyTorch"
    )
    parser.add_argument("--source", type=Path, required=True, metavar="IMAGE", help="the portrait")
    parser.add_argument(
        "--driving",
        type=Path,
        required=True,
        metavar="FILE",
        help="a video, or an image, whose motion is absolute for want of an initial frame",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="the sheet")
    parser.add_argument("--frame", type=int, metavar="N", help="frame of the video, counted from 0 (default: 0)")
    add_motion_options(parser)
    add_crop_options(parser, "portrait and driving picture")
    parser.add_argument(
        "--pixel",
        type=int,
        nargs=2,
        metavar=("X", "Y"),
        help="where attention is asked from, in pixels of the model's picture (default: the middle of the face)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check every input, then write the sheet and print the facts; returns the exit code."""
    require("torch", extra="torch", why="dagan-rt explain")
    from dagan_rt.backends import torch as backend
    from dagan_rt.bundle import Bundle
    from dagan_rt.explanation import explanation_sheet, facts, notes
    from dagan_rt.files import check_output
    from dagan_rt.images import is_still
    from dagan_rt.inspection import inspect
    from dagan_rt.portrait import read_portrait
    from dagan_rt.training.sheets import write_sheet

    still = is_still(arguments.driving)
    _check_options(arguments, still)
    check_output(arguments.out, [".png"], inputs=[arguments.source, arguments.driving])
    detector = open_detector(arguments)
    portrait = read_portrait(arguments.source, detector, arguments.face)
    bundle = Bundle.open(arguments.bundle)
    if bundle.weights is None:
        raise InputError(f"bundle {bundle.path} holds no weights to look into: export it without --no-torch-weights")
    pixel = _pixel(arguments, bundle.config)
    (source,) = portrait.sources(bundle.config.size)
    first, shown = _driving(arguments, still, detector, bundle.config.size)
    found = inspect(
        backend.load(bundle).eval(), source, shown, None if arguments.absolute else first,
        adapt_scale=arguments.adapt_scale, motion_scale=arguments.motion_scale,
    )  # fmt: skip
    write_sheet(arguments.out, explanation_sheet(found, pixel))
    what = "an image, which has no initial frame" if still else f"frame {arguments.frame or 0}"
    said = [f"{subject:<12}{fact}" for subject, fact in facts(found, pixel).items()]
    said += [f"{'note':<12}{note}" for note in notes(found)]
    print(*(textwrap.fill(line, 100, subsequent_indent=" " * 12) for line in said), sep="\n")
    print(f"wrote {arguments.out}: {arguments.driving}, {what}")
    return 0


def _check_options(arguments: argparse.Namespace, still: bool) -> None:
    check_crop(arguments)
    check_motion_options(arguments)
    if arguments.frame is not None and still:
        raise InputError(f"--frame chooses a frame of a video, and {arguments.driving} is an image: leave it out")
    if arguments.frame is not None and arguments.frame < 0:
        raise InputError(f"--frame must be at least 0, got {arguments.frame}")
    for option, given in (("adapt", arguments.adapt_scale), ("motion", arguments.motion_scale != 1)):
        if given and still:
            raise InputError(
                f"--{option}-scale is about motion since an initial frame, which the image {arguments.driving} does "
                "not have: leave it out"
            )


def _driving(
    arguments: argparse.Namespace, still: bool, detector: FaceDetector | None, size: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """What drives, as the model sees it: the first frame of a video, None for an image; and the frame to explain."""
    from dagan_rt.driving import Clip
    from dagan_rt.portrait import read_portrait

    if still:
        picture = read_portrait(arguments.driving, detector, arguments.driving_face, option="--driving-face")
        return None, picture.sources(size)[0]
    number = arguments.frame or 0
    try:
        opened = Clip(arguments.driving)
    except InputError as error:
        raise InputError(f"{error}; nor is it an image") from None
    with opened as clip:
        clip.open(size, detector, face=arguments.driving_face)
        for place, frame in enumerate(clip.items()):
            if place == 0:
                initial = frame.image
            if place == number:
                return initial, frame.image
        raise InputError(f"--frame must be 0 to {place} in {arguments.driving}, got {number}")


def _pixel(arguments: argparse.Namespace, config: NetworkConfig) -> tuple[int, int] | None:
    """Where attention is asked from, if that was given and there is any."""
    if arguments.pixel is None:
        return None
    if config.parts.attention is None:
        raise InputError(f"--pixel asks where attention looks, and {config.variant} has none: leave it out")
    x, y = arguments.pixel
    if not (0 <= x < config.size and 0 <= y < config.size):
        raise InputError(
            f"--pixel must be X Y in 0..{config.size - 1} of the model's {config.size} x {config.size} pixels, "
            f"got {x} {y}"
        )
    return x, y
