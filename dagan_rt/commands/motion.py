"""`dagan-rt motion`: the key points of a driving clip in a small file, to drive from later without the video."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dagan_rt.commands.shared import (
    add_backend_options,
    add_crop_options,
    check_crop,
    check_threads,
    open_detector,
    open_reenactor,
    progress,
    stop_on_interrupt,
)


def add_parser(subparsers: Any) -> None:
    """Add `motion` to the subparsers of the command line."""
    parser = subparsers.add_parser(
        "motion",
        allow_abbrev=False,
        help="record the motion of a video in a small file",
        description="Record the key points of a driving video, frame by frame, in a .motion file: dagan-rt animate "
        "--driving takes it in place of the video, for any portrait and the same weights. It holds no picture.",
    )
    add_backend_options(parser)
    parser.add_argument("--driving", type=Path, required=True, metavar="VIDEO", help="the video")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .motion file")
    add_crop_options(parser, "the video", portrait=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check every input, then write the file; returns 0, or 130 when Ctrl-C ended it, and nothing is written."""
    from dagan_rt.driving import Clip
    from dagan_rt.files import check_output
    from dagan_rt.pipeline import read_ahead
    from dagan_rt.template import ENDING, Moment, Template

    check_threads(arguments)
    check_crop(arguments)
    check_output(arguments.out, (ENDING,), inputs=[arguments.driving])
    detector = open_detector(arguments)
    moments: list[Moment] = []
    with Clip(arguments.driving) as clip, open_reenactor(arguments) as reenactor, stop_on_interrupt() as interrupted:
        clip.open(reenactor.size, detector, interrupted, progress, face=arguments.driving_face)
        with progress(clip.frame_count, "recording") as bar, read_ahead(clip.items()) as frames:
            for frame in frames:
                if interrupted.is_set():
                    break
                moments.append(Moment(reenactor.keypoints(frame.image), frame.time, frame.duration))
                bar.update()
        if interrupted.is_set():
            print("interrupted: nothing was written", file=sys.stderr)
            return 130
        template = Template.of(moments, clip.fps, reenactor.model)
    template.write(arguments.out)
    seconds = float(template.times[-1] + template.durations[-1])
    print(f"wrote {arguments.out}: {len(template)} frames, {seconds:.1f} s, {arguments.out.stat().st_size:,} bytes")
    return 0
