"""`dagan-rt animate`: a portrait, a driving clip, and the clip that comes of them."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dagan_rt.commands.shared import (
    add_crop_options,
    add_model_options,
    check_options,
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

    from dagan_rt.cropping import Square
    from dagan_rt.driving import Clip, Recorded
    from dagan_rt.faces import FaceDetector
    from dagan_rt.frames import Pending
    from dagan_rt.pipeline import Summary
    from dagan_rt.reenactor import Reenactor


LONGEST_PICTURE = 1920  # pixels a side of a video with whole portraits; more is slow to encode and seldom plays


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
        "--face",
        default="largest",
        metavar="WHICH",
        help="with --crop auto, which face of the portrait: largest (default), a number from the left, or all (with "
        "--paste-back)",
    )
    parser.add_argument(
        "--paste-back",
        action="store_true",
        help=f"put the result back into the whole portrait (at most {LONGEST_PICTURE} pixels a side), its border "
        "blended and its colours matched",
    )
    parser.add_argument(
        "--smooth", action="store_true", help="damp what trembles in the driving key points (one-euro filter)"
    )
    parser.add_argument(
        "--watermark",
        choices=("visible", "invisible"),
        help="mark the result as synthetic: visible is a word in its corner; invisible is found by dagan-rt info",
    )
    parser.add_argument("--side-by-side", action="store_true", help="show portrait, driving frame and result in a row")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check every input, then write the clip; returns 0, or 130 when Ctrl-C cut it short."""
    from dagan_rt.driving import open_driver
    from dagan_rt.files import check_output
    from dagan_rt.video import WRITABLE

    check_options(arguments)
    _check_options(arguments)
    check_output(arguments.out, WRITABLE, inputs=[arguments.source, arguments.driving])
    detector = open_detector(arguments)
    portrait = _portrait(arguments, detector)
    with open_driver(arguments.driving) as driver, open_reenactor(arguments) as first, ExitStack() as stack:
        _check_template(driver, first)
        reenactors = [first, *(stack.enter_context(first.another()) for _ in portrait.squares[1:])]
        sources = [square.cut(portrait.picture, first.size) for square in portrait.squares]
        for reenactor, source in zip(reenactors, sources, strict=True):
            reenactor.set_source(source)
        with stop_on_interrupt() as interrupted:
            driver.open(first.size, detector, interrupted, progress, arguments.smooth)
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

    if arguments.watermark == "invisible" and arguments.out.suffix.lower() == ".gif":
        raise InputError(
            "--watermark invisible does not survive the few colours of a .gif: take visible, or another --out"
        )
    if arguments.side_by_side and arguments.driving.suffix.lower() == ENDING:
        raise InputError(f"--side-by-side shows driving frames, and motion template {arguments.driving} holds none")
    if arguments.face not in ("largest", "all") and not (arguments.face.isdecimal() and int(arguments.face) > 0):
        raise InputError(f"--face must be largest, all, or a number from 1, got {arguments.face!r}")
    if arguments.face != "largest" and arguments.crop != "auto":
        raise InputError(f"--face {arguments.face} needs --crop auto, which finds faces")
    if arguments.face == "all" and not arguments.paste_back:
        raise InputError("--face all needs --paste-back, which shows all of them in one picture")
    if arguments.paste_back and arguments.side_by_side:
        raise InputError("--paste-back shows the whole portrait, --side-by-side squares: give one of the two")


class _Portrait(NamedTuple):
    picture: np.ndarray  # uint8 [H, W, 3]
    squares: list[Square]  # of the faces to animate


def _portrait(arguments: argparse.Namespace, detector: FaceDetector | None) -> _Portrait:
    """The source picture, as large as it is shown, and the squares of it that are animated."""
    from dagan_rt.cropping import around, center, choose
    from dagan_rt.images import at_most, read_image

    picture = read_image(arguments.source)
    if arguments.paste_back:
        picture = at_most(picture, LONGEST_PICTURE)
    height, width, _ = picture.shape
    if detector is None:
        return _Portrait(picture, [center(width, height)])
    faces = choose(detector(picture), arguments.face, str(arguments.source))
    return _Portrait(picture, [around(face.box, width, height).whole() for face in faces])


def _check_template(driver: Clip | Recorded, reenactor: Reenactor) -> None:
    from dagan_rt.driving import Recorded

    if isinstance(driver, Recorded):
        driver.template.check_model(reenactor.model, driver.path)


def _animate(
    arguments: argparse.Namespace,
    reenactors: Sequence[Reenactor],
    portrait: _Portrait,
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
    arguments: argparse.Namespace, portrait: _Portrait, size: int
) -> tuple[Callable[[Any, np.ndarray], np.ndarray], int, int]:
    """What is shown of a driving frame and its results [N, size, size, 3], one a face; and its width and height."""
    import numpy as np

    from dagan_rt.pasting import Canvas

    if arguments.side_by_side:
        source = portrait.squares[0].cut(portrait.picture, size)
        return lambda frame, results: np.concatenate([source, frame.image, results[0]], axis=1), 3 * size, size
    if not arguments.paste_back:
        return lambda frame, results: results[0], size, size
    height, width = (side // 2 * 2 for side in portrait.picture.shape[:2])  # H.264 takes even ones
    canvases = [Canvas(portrait.picture, square) for square in portrait.squares]

    def pasted(frame: Any, results: np.ndarray) -> np.ndarray:
        whole = portrait.picture.copy()
        for canvas, result in zip(canvases, results, strict=True):
            canvas.paste(result, whole)
        return whole[:height, :width]

    return pasted, width, height


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
