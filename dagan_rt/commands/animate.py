"""`dagan-rt animate`: a portrait, a driving clip, and the clip that comes of them."""

from __future__ import annotations

import argparse
import pkgutil
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from dagan_rt.pipeline import Summary
    from dagan_rt.reenactor import Reenactor
    from dagan_rt.video import Frame, VideoReader, VideoWriter


def add_parser(subparsers: Any) -> None:
    """Add `animate` to the subparsers of the command line."""
    parser = subparsers.add_parser(
        "animate",
        allow_abbrev=False,
        help="animate a portrait with the motion of a video",
        description="Animate a portrait with the motion of a video. Portrait and video are cropped to their centred "
        "square; the sound of the video is kept.",
    )
    parser.add_argument(
        "--bundle",
        required=True,
        metavar="DIR",
        help="exported model (a folder), or a server that serves one (grpc://host:8001, http://host:8000)",
    )
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
    parser.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help=f"auto (default: the fastest that runs here), {', '.join(_backends())}",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of the backend (default: its own choice)")
    parser.add_argument(
        "--crf", type=int, default=18, metavar="N", help="H.264 quality from 0 (lossless) to 51, default 18"
    )
    parser.set_defaults(run=run)


def _backends() -> list[str]:
    """The names of the backends, without importing them: the help of every command is put together here."""
    folder = Path(__file__).parents[1] / "backends"
    modules = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return [module.replace("_", "-") for module in modules if not module.startswith("_")]


def run(arguments: argparse.Namespace) -> int:
    """Check every input, then write the clip; returns 0, or 130 when Ctrl-C cut it short."""
    from dagan_rt.files import check_output
    from dagan_rt.images import center_square, read_image
    from dagan_rt.video import WRITABLE, VideoReader

    _check_options(arguments)
    check_output(arguments.out, WRITABLE, inputs=[arguments.source, arguments.driving])
    portrait = read_image(arguments.source)
    with VideoReader(arguments.driving) as reader, _reenactor(arguments) as reenactor:
        source = center_square(portrait, reenactor.size)
        reenactor.set_source(source)
        with stop_on_interrupt() as interrupted:
            if arguments.find_best_frame:
                initial = find_best_frame(reenactor, source, arguments.driving, interrupted)
                if initial is not None:
                    reenactor.reset()
                    reenactor.drive(initial)
            summary = None if interrupted.is_set() else _animate(arguments, reenactor, source, reader, interrupted)
        if summary is not None and summary.model:
            _report(arguments, reenactor, reader, summary)
    if not interrupted.is_set():
        return 0
    left = "the result ends here" if summary is not None and summary.model else "nothing was written"
    print(f"interrupted: {left}", file=sys.stderr)
    return 130


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


def _reenactor(arguments: argparse.Namespace) -> Reenactor:
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
    """Give an event that Ctrl-C sets, so that work stops between two frames; a second Ctrl-C interrupts at once.

    Any further one is ignored: it could only keep what was begun from being deleted.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def note(number: int, frame: Any) -> None:
        if interrupted.is_set():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def find_best_frame(
    reenactor: Reenactor, source: np.ndarray, driving: Path, interrupted: threading.Event
) -> np.ndarray | None:
    """The driving frame, cropped to the model's size, whose face is posed most like the source's.

    Distance is the squared distance of the key points once both faces are centred and scaled to hull area 1. The
    clip is read through once and one frame is kept. None if no frame has key points that span an area.
    """
    from dagan_rt.pipeline import read_ahead
    from dagan_rt.video import VideoReader

    wanted = _normalised(reenactor.keypoints(source).value)
    best, best_distance = None, float("inf")
    if wanted is None:
        return None
    with (
        VideoReader(driving) as reader,
        _progress(reader, "finding the best frame") as bar,
        read_ahead(_cropped(reader, reenactor.size)) as frames,
    ):
        for frame in frames:
            if interrupted.is_set():
                break
            shape = _normalised(reenactor.keypoints(frame.image).value)
            distance = float("inf") if shape is None else float(((shape - wanted) ** 2).sum())
            if distance < best_distance:
                best, best_distance = frame.image, distance
            bar.update()
    return best


def _cropped(reader: VideoReader, size: int) -> Iterator[Frame]:
    """The frames of a clip as the model takes them."""
    from dagan_rt.images import center_square

    for frame in reader.timed():
        yield frame._replace(image=center_square(frame.image, size))


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
    arguments: argparse.Namespace,
    reenactor: Reenactor,
    source: np.ndarray,
    reader: VideoReader,
    interrupted: threading.Event,
) -> Summary:
    """Write the result; what was done before an error is kept."""
    import numpy as np

    from dagan_rt import pipeline
    from dagan_rt.video import VideoWriter

    size = reenactor.size
    writer = VideoWriter(
        arguments.out,
        reader.fps,
        3 * size if arguments.side_by_side else size,
        size,
        audio_from=arguments.driving if reader.has_audio else None,
        crf=arguments.crf,
        time_base=reader.time_base,
    )
    with writer, _progress(reader, "animating") as bar:

        def write(frame: Frame, result: np.ndarray) -> None:
            shown = np.concatenate([source, frame.image, result], axis=1) if arguments.side_by_side else result
            writer.write(shown, frame.time, frame.duration)
            bar.update()

        try:
            return pipeline.run(_cropped(reader, size), reenactor, write, interrupted)
        except Exception as error:
            kept = _keep(writer)
            # Out of memory, a device lost, whatever an engine refuses: no bugs, and tracebacks would say no more.
            if isinstance(error, (InputError, MemoryError, RuntimeError)):
                raise InputError(f"{str(error) or 'out of memory'}{kept and '; '}{kept}") from error
            if kept:
                print(kept, file=sys.stderr)
            raise


def _keep(writer: VideoWriter) -> str:
    """Finish a clip that was cut short, and say what it holds; "" if nothing is left of it."""
    try:
        writer.close()
    except (InputError, OSError):  # a full disk, say, which then was the error in the first place
        return ""
    count = writer.frames_written
    return f"the {count} frames before that are in {writer.path}" if count else ""


def _progress(reader: VideoReader, what: str) -> Any:
    from tqdm import tqdm

    # disable=None: no bar where stderr is not a terminal.
    return tqdm(total=reader.frame_count, desc=what, unit="frame", disable=None, leave=False)


def _report(arguments: argparse.Namespace, reenactor: Reenactor, reader: VideoReader, summary: Summary) -> None:
    import numpy as np

    milliseconds = np.array(summary.model) * 1000
    p50, p95 = np.percentile(milliseconds, (50, 95))
    count, busy = len(milliseconds), summary.busy()
    shares = ", ".join(f"{part} {100 * share:.0f} %" for part, share in busy.items())
    print(
        f"{count} frames (of {float(reader.fps):.4g} a second) in {summary.wall:.2f} s: {count / summary.wall:.1f} a "
        f"second; the model took {milliseconds.mean():.1f} ms a frame (p50 {p50:.1f}, p95 {p95:.1f})"
    )
    print(f"busy: {shares} of the time; the slowest part: {max(busy, key=lambda part: busy[part])}")
    why, _, others = reenactor.backend_reason.partition("; ")
    print(f"backend {reenactor.backend_name}: {why}" + ("; dagan-rt info says why not another" if others else ""))
    print(f"wrote {arguments.out}")
