"""`dagan-rt animate`: a portrait, a driving clip, and the clip that comes of them."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np


def add_parser(subparsers: Any) -> None:
    """Add `animate` to the subparsers of the command line."""
    parser = subparsers.add_parser(
        "animate",
        allow_abbrev=False,
        help="animate a portrait with the motion of a video",
        description="Animate a portrait with the motion of a video. Portrait and video are cropped to their centred "
        "square; the sound of the video is kept.",
    )
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="exported model (a folder)")
    parser.add_argument("--source", type=Path, required=True, metavar="IMAGE", help="the portrait")
    parser.add_argument("--driving", type=Path, required=True, metavar="VIDEO", help="the video whose motion is used")
    parser.add_argument("--out", type=Path, required=True, metavar="VIDEO", help="result: .mp4, .m4v, .mov, .mkv, .gif")
    parser.add_argument(
        "--absolute", action="store_true", help="take over the driving pose itself, not its change since frame 1"
    )
    parser.add_argument(
        "--adapt-scale", action="store_true", help="scale the motion by the ratio of the two faces' sizes"
    )
    parser.add_argument(
        "--find-best-frame",
        action="store_true",
        help="measure motion from the driving frame whose pose is nearest to the portrait's (reads the video twice)",
    )
    parser.add_argument("--side-by-side", action="store_true", help="show portrait, driving frame and result in a row")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="auto (default), onnxruntime or torch")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of the backend (default: its own choice)")
    parser.add_argument(
        "--crf", type=int, default=18, metavar="N", help="H.264 quality from 0 (lossless) to 51, default 18"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check every input, then write the clip; returns 0, or 130 when Ctrl-C cut it short."""
    from dagan_rt.files import check_output
    from dagan_rt.images import center_square, read_image
    from dagan_rt.video import WRITABLE, VideoReader

    _check_options(arguments)
    check_output(arguments.out, WRITABLE, inputs=[arguments.source, arguments.driving])
    portrait = read_image(arguments.source)
    with VideoReader(arguments.driving) as reader:
        reenactor = _reenactor(arguments)
        source = center_square(portrait, reenactor.size)
        reenactor.set_source(source)
        with stop_on_interrupt() as interrupted:
            if arguments.find_best_frame:
                initial = find_best_frame(reenactor, source, arguments.driving, interrupted)
                if initial is not None:
                    reenactor.reset()
                    reenactor.drive(initial)
            times = _animate(arguments, reenactor, source, reader, interrupted)
        if times:
            _report(arguments, reenactor, reader, times)
        return 130 if interrupted.is_set() else 0


def _check_options(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.crf <= 51:
        raise InputError(f"--crf must be between 0 and 51, got {arguments.crf}")
    if arguments.threads is not None and arguments.threads < 1:
        raise InputError(f"--threads must be at least 1, got {arguments.threads}")
    for option in ("adapt_scale", "find_best_frame"):
        if arguments.absolute and getattr(arguments, option):
            raise InputError(
                f"--{option.replace('_', '-')} is about motion since a first frame, which --absolute does without: "
                "give one of the two"
            )


def _reenactor(arguments: argparse.Namespace) -> Any:
    from dagan_rt.reenactor import Reenactor

    options = {} if arguments.threads is None else {"threads": arguments.threads}
    return Reenactor(
        arguments.bundle,
        backend=arguments.backend,
        motion="absolute" if arguments.absolute else "relative",
        adapt_scale=arguments.adapt_scale,
        **options,
    )


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C sets, so that work stops between two frames; a second Ctrl-C interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def note(number: int, frame: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def find_best_frame(
    reenactor: Any, source: np.ndarray, driving: Path, interrupted: threading.Event
) -> np.ndarray | None:
    """The driving frame, cropped to the model's size, whose face is posed most like the source's.

    Distance is the squared distance of the key points once both faces are centred and scaled to hull area 1. The
    clip is read through once and one frame is kept. None if no frame has key points that span an area.
    """
    from dagan_rt.images import center_square
    from dagan_rt.video import VideoReader

    wanted = _normalised(reenactor.keypoints(source).value)
    best, best_distance = None, float("inf")
    if wanted is None:
        return None
    with VideoReader(driving) as reader, _progress(reader, "finding the best frame") as bar:
        for image in reader:
            if interrupted.is_set():
                break
            frame = center_square(image, reenactor.size)
            shape = _normalised(reenactor.keypoints(frame).value)
            distance = float("inf") if shape is None else float(((shape - wanted) ** 2).sum())
            if distance < best_distance:
                best, best_distance = frame, distance
            bar.update()
    return best


def _normalised(points: np.ndarray) -> np.ndarray | None:
    """Key points [1, K, 2] as [K, 2] around their mean with hull area 1; None if they span no area."""
    import numpy as np

    from dagan_rt.transfer import hull_area

    face = np.asarray(points, np.float64).reshape(-1, 2)
    area = hull_area(face)
    if not area > 1e-12:
        return None
    return (face - face.mean(axis=0)) / np.sqrt(area)


def _animate(
    arguments: argparse.Namespace, reenactor: Any, source: np.ndarray, reader: Any, interrupted: threading.Event
) -> list[float]:
    """Write the result; returns the seconds that each frame took the model."""
    import numpy as np

    from dagan_rt.images import center_square
    from dagan_rt.video import VideoWriter

    times: list[float] = []
    if interrupted.is_set():
        return times
    size = reenactor.size
    width = 3 * size if arguments.side_by_side else size
    writer = VideoWriter(
        arguments.out,
        reader.fps,
        width,
        size,
        audio_from=arguments.driving if reader.has_audio else None,
        crf=arguments.crf,
        time_base=reader.time_base,
    )
    with writer, _progress(reader, "animating") as bar:
        for image, moment, duration in reader.timed():
            if interrupted.is_set():
                break
            frame = center_square(image, size)
            start = time.perf_counter()
            result = reenactor.drive(frame)
            times.append(time.perf_counter() - start)
            shown = np.concatenate([source, frame, result], axis=1) if arguments.side_by_side else result
            writer.write(shown, moment, duration)
            bar.update()
    return times


def _progress(reader: Any, what: str) -> Any:
    from tqdm import tqdm

    # disable=None: no bar where stderr is not a terminal.
    return tqdm(total=reader.frame_count, desc=what, unit="frame", disable=None, leave=False)


def _report(arguments: argparse.Namespace, reenactor: Any, reader: Any, times: list[float]) -> None:
    import numpy as np

    milliseconds = np.array(times) * 1000
    p50, p95 = np.percentile(milliseconds, (50, 95))
    print(
        f"{len(times)} frames at {float(reader.fps):.4g} a second; {milliseconds.mean():.1f} ms a frame "
        f"(p50 {p50:.1f}, p95 {p95:.1f}) with {reenactor.backend_name}"
    )
    if len(times) < reader.frames_read:
        print("interrupted: the result ends here", file=sys.stderr)
    print(f"wrote {arguments.out}")
