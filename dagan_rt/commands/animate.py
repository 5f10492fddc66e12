"""`dagan-rt animate`: a portrait, a driving clip, and the clip that comes of them."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt.commands.shared import (
    add_crop_options,
    add_model_options,
    add_watermark_option,
    check_crop,
    check_options,
    check_watermark,
    keeping,
    open_detector,
    open_reenactor,
    progress,
    stop_on_interrupt,
)
from dagan_rt.errors import InputError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    import numpy as np

    from dagan_rt.driving import Clip, Recorded
    from dagan_rt.frames import Pending
    from dagan_rt.pipeline import Summary
    from dagan_rt.portrait import Portrait
    from dagan_rt.reenactor import Reenactor


def add_parser(subparsers: Any) -> None:
    """Add `animate` to the subparsers of the command line."""
    parser = subparsers.add_parser(
        "animate",
        allow_abbrev=False,
        help="animate a portrait with the motion of a video",
        description="Animate a portrait with the motion of a video. The sound of the video is kept.",
    )
    add_model_options(parser)
    parser.add_argument("--source", type=Path, required=True, metavar="IMAGE", help="the portrait")
    parser.add_argument(
        "--driving", type=Path, required=True, metavar="VIDEO", help="whose motion is used: a video, or a .motion file"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="VIDEO", help="result: .mp4, .m4v, .mov, .mkv, .gif")
    parser.add_argument(
        "--find-best-frame",
        action="store_true",
        help="measure motion from the driving frame whose pose is nearest to the portrait's (reads the video twice)",
    )
    add_crop_options(parser, "portrait and video")
    parser.add_argument(
        "--paste-back",
        action="store_true",
        help="put the result back into the whole portrait (at most 1920 pixels a side), its border blended and its "
        "colours matched; --face all then moves all of its faces",
    )
    parser.add_argument(
        "--smooth", action="store_true", help="damp what trembles in the driving key points (one-euro filter)"
    )
    add_watermark_option(parser)
    parser.add_argument("--side-by-side", action="store_true", help="show portrait, driving frame and result in a row")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check every input, then write the clip; returns 0, or 130 when Ctrl-C cut it short."""
    from dagan_rt.driving import Recorded, open_driver
    from dagan_rt.files import check_output
    from dagan_rt.portrait import read_portrait
    from dagan_rt.video import WRITABLE

    check_options(arguments)
    _check_options(arguments)
    check_output(arguments.out, WRITABLE, inputs=[arguments.source, arguments.driving])
    detector = open_detector(arguments)
    portrait = read_portrait(arguments.source, detector, arguments.face, whole=arguments.paste_back)
    with open_driver(arguments.driving) as driver, ExitStack() as stack:
        by_points = arguments.smooth or isinstance(driver, Recorded)
        first = stack.enter_context(open_reenactor(arguments, by_points))
        if isinstance(driver, Recorded):
            driver.template.check_model(first.model, driver.path)
        reenactors = [first, *(stack.enter_context(first.another()) for _ in portrait.squares[1:])]
        sources = portrait.sources(first.size)
        for reenactor, source in zip(reenactors, sources, strict=True):
            reenactor.set_source(source)
        with stop_on_interrupt() as interrupted:
            driver.open(
                first.size, detector, interrupted, progress, smooth=arguments.smooth, face=arguments.driving_face
            )
            if arguments.find_best_frame:
                for reenactor, source in zip(reenactors, sources, strict=True):
                    driver.begin_at_best(reenactor, source)
            summary = None
            if not interrupted.is_set():
                summary = _animate(arguments, reenactors, portrait, driver, interrupted)
        if summary is not None and summary.model:
            _report(arguments, first, driver, summary)
    if not interrupted.is_set():
        return 0
    left = "the result ends here" if summary is not None and summary.model else "nothing was written"
    print(f"interrupted: {left}", file=sys.stderr)
    return 130


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options about faces and pictures that exclude one another."""
    from dagan_rt.template import ENDING

    check_crop(arguments, ("largest", "all"))
    check_watermark(arguments)
    if arguments.driving.suffix.lower() == ENDING:
        for option, given in (("side-by-side", arguments.side_by_side), ("driving-face", arguments.driving_face)):
            if given not in (False, "largest"):
                raise InputError(f"--{option} needs pictures, and motion template {arguments.driving} holds none")
    if arguments.face == "all" and not arguments.paste_back:
        raise InputError("--face all needs --paste-back, which shows all of them in one picture")
    if arguments.paste_back and arguments.side_by_side:
        raise InputError("--paste-back shows the whole portrait, --side-by-side squares: give one of the two")


def _animate(
    arguments: argparse.Namespace,
    reenactors: Sequence[Reenactor],
    portrait: Portrait,
    driver: Clip | Recorded,
    interrupted: threading.Event,
) -> Summary:
    """Write the result; what was done before an error is kept."""
    from dagan_rt import pipeline
    from dagan_rt.frames import Together
    from dagan_rt.video import VideoWriter
    from dagan_rt.watermark import mark

    shown, width, height = _shown(arguments, portrait, driver.size)
    writer = VideoWriter(
        arguments.out, driver.fps, width, height, audio_from=driver.audio, crf=arguments.crf, time_base=driver.time_base
    )
    with writer, progress(driver.frame_count, "animating") as bar:

        def write(item: Any, results: np.ndarray) -> None:
            image = shown(item, results)
            marked = mark(image, arguments.watermark) if arguments.watermark else image
            writer.write(marked, item.time, item.duration)
            bar.update()

        def submit(item: Any) -> Pending:
            return Together(driver.submit(reenactors, item))

        with keeping(writer):
            return pipeline.run(driver.items(), reenactors[0], write, interrupted, submit)


def _shown(
    arguments: argparse.Namespace, portrait: Portrait, size: int
) -> tuple[Callable[[Any, np.ndarray], np.ndarray], int, int]:
    """What is shown of a driving frame and its results [N, size, size, 3], one a face; and its width and height."""
    import numpy as np

    from dagan_rt.portrait import Pasted

    if arguments.side_by_side:
        (source,) = portrait.sources(size)
        return lambda frame, results: np.concatenate([source, frame.image, results[0]], axis=1), 3 * size, size
    if not arguments.paste_back:
        return lambda frame, results: results[0], size, size
    pasted = Pasted(portrait)
    return lambda frame, results: pasted(results), pasted.width, pasted.height


def _report(arguments: argparse.Namespace, reenactor: Reenactor, driver: Clip | Recorded, summary: Summary) -> None:
    import numpy as np

    milliseconds = np.array(summary.model) * 1000
    p50, p95 = np.percentile(milliseconds, (50, 95))
    count, busy = len(milliseconds), summary.busy()
    shares = ", ".join(f"{part} {100 * share:.0f} %" for part, share in busy.items())
    print(
        f"{count} frames (of {float(driver.fps):.4g} a second) in {summary.wall:.2f} s: {count / summary.wall:.1f} a "
        f"second; the model took {milliseconds.mean():.1f} ms a frame (p50 {p50:.1f}, p95 {p95:.1f})"
    )
    print(f"busy: {shares} of the time; the slowest part: {max(busy, key=lambda part: busy[part])}")
    why, _, others = reenactor.backend_reason.partition("; ")
    print(f"backend {reenactor.backend_name}: {why}" + ("; dagan-rt info says why not another" if others else ""))
    print(f"wrote {arguments.out}")
