"""`dagan-rt animate`: a portrait, a driving clip, and the clip that comes of them."""

from __future__ import annotations

import argparse
import pkgutil
import signal
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dagan_rt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np

    from dagan_rt.cropping import Square
    from dagan_rt.faces import FaceDetector
    from dagan_rt.pipeline import Summary
    from dagan_rt.reenactor import Reenactor
    from dagan_rt.video import Frame, VideoReader, VideoWriter


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
    parser.add_argument("--driving", type=Path, required=True, metavar="VIDEO", help="the video whose motion is used")
    parser.add_argument("--out", type=Path, required=True, metavar="VIDEO", help="result: .mp4, .m4v, .mov, .mkv, .gif")
    parser.add_argument(
        "--find-best-frame",
        action="store_true",
        help="measure motion from the driving frame whose pose is nearest to the portrait's (reads the video twice)",
    )
    parser.add_argument(
        "--crop",
        choices=("center", "auto"),
        default="center",
        help="the square of portrait and video that the model sees: center (default) is the largest centred one; auto "
        "finds the face, with the margin that models are trained with, and follows it through the video",
    )
    parser.add_argument(
        "--face",
        default="largest",
        metavar="WHICH",
        help="with --crop auto, which face of the portrait: largest (default), a number from the left, or all (with "
        "--paste-back)",
    )
    parser.add_argument(
        "--detector",
        default="auto",
        metavar="NAME",
        help="what finds faces: centerface (of the extra faces), centerface-int8 (always there), auto (default: the "
        "first of them that is), or an .onnx file of a detector (see dagan_rt.faces)",
    )
    parser.add_argument(
        "--paste-back",
        action="store_true",
        help=f"put the result back into the whole portrait (at most {LONGEST_PICTURE} pixels a side), its border "
        "blended and its colours matched",
    )
    parser.add_argument("--side-by-side", action="store_true", help="show portrait, driving frame and result in a row")
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command that animates takes; `check_options` and `open_reenactor` read it."""
    parser.add_argument(
        "--bundle",
        required=True,
        metavar="DIR",
        help="exported model (a folder), or a server that serves one (grpc://host:8001, http://host:8000)",
    )
    parser.add_argument(
        "--absolute", action="store_true", help="take over the driving pose itself, not its change since frame 1"
    )
    parser.add_argument(
        "--adapt-scale", action="store_true", help="scale the motion by the ratio of the two faces' sizes"
    )
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


def _backends() -> list[str]:
    """The names of the backends, without importing them: the help of every command is put together here."""
    folder = Path(__file__).parents[1] / "backends"
    modules = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return [module.replace("_", "-") for module in modules if not module.startswith("_")]


def run(arguments: argparse.Namespace) -> int:
    """Check every input, then write the clip; returns 0, or 130 when Ctrl-C cut it short."""
    from dagan_rt.files import check_output
    from dagan_rt.video import WRITABLE, VideoReader

    check_options(arguments)
    _check_faces(arguments)
    check_output(arguments.out, WRITABLE, inputs=[arguments.source, arguments.driving])
    detector = _detector(arguments)
    portrait = _portrait(arguments, detector)
    with VideoReader(arguments.driving) as reader, open_reenactor(arguments) as first, ExitStack() as stack:
        reenactors = [first, *(stack.enter_context(first.another()) for _ in portrait.squares[1:])]
        sources = [square.cut(portrait.picture, first.size) for square in portrait.squares]
        for reenactor, source in zip(reenactors, sources, strict=True):
            reenactor.set_source(source)
        with stop_on_interrupt() as interrupted:
            clip = _Clip(arguments.driving, first.size, detector, interrupted)
            if arguments.find_best_frame:
                for reenactor, source in zip(reenactors, sources, strict=True):
                    clip.begin_at_best(reenactor, source)
            summary = None
            if not interrupted.is_set():
                summary = _animate(arguments, reenactors, portrait, clip, reader)
        if summary is not None and summary.model:
            _report(arguments, first, reader, summary)
    if not interrupted.is_set():
        return 0
    left = "the result ends here" if summary is not None and summary.model else "nothing was written"
    print(f"interrupted: {left}", file=sys.stderr)
    return 130


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of their range, and options that exclude one another."""
    if not 0 <= arguments.crf <= 51:
        raise InputError(f"--crf must be between 0 and 51, got {arguments.crf}")
    if arguments.threads is not None and arguments.threads < 1:
        raise InputError(f"--threads must be at least 1, got {arguments.threads}")
    for option in ("adapt_scale", "find_best_frame"):
        if arguments.absolute and getattr(arguments, option, False):
            raise InputError(
                f"--{option.replace('_', '-')} is about motion since a first frame, which --absolute does without: "
                "give one of the two"
            )


def _check_faces(arguments: argparse.Namespace) -> None:
    if arguments.face not in ("largest", "all") and not (arguments.face.isdecimal() and int(arguments.face) > 0):
        raise InputError(f"--face must be largest, all, or a number from 1, got {arguments.face!r}")
    if arguments.face != "largest" and arguments.crop != "auto":
        raise InputError(f"--face {arguments.face} needs --crop auto, which finds faces")
    if arguments.face == "all" and not arguments.paste_back:
        raise InputError("--face all needs --paste-back, which shows all of them in one picture")
    if arguments.paste_back and arguments.side_by_side:
        raise InputError("--paste-back shows the whole portrait, --side-by-side squares: give one of the two")


def open_reenactor(arguments: argparse.Namespace) -> Reenactor:
    """The model that the options name."""
    from dagan_rt.reenactor import Reenactor

    options = {} if arguments.threads is None else {"threads": arguments.threads}
    return Reenactor(
        arguments.bundle,
        backend=arguments.backend,
        motion="absolute" if arguments.absolute else "relative",
        adapt_scale=arguments.adapt_scale,
        **options,
    )


class _Portrait(NamedTuple):
    picture: np.ndarray  # uint8 [H, W, 3]
    squares: list[Square]  # of the faces to animate


def _detector(arguments: argparse.Namespace) -> FaceDetector | None:
    if arguments.crop != "auto":
        return None
    from dagan_rt.faces import load_detector

    return load_detector(arguments.detector, **({} if arguments.threads is None else {"threads": arguments.threads}))


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


class _Clip:
    """The driving clip as the model takes it: squares of the model's size."""

    def __init__(self, path: Path, size: int, detector: FaceDetector | None, interrupted: threading.Event) -> None:
        self.path, self.size, self.interrupted = path, size, interrupted
        self._detector, self._first = detector, None
        if detector is not None:
            self._first = self._first_face(detector)

    def squares(self, reader: VideoReader) -> Iterator[Frame]:
        """The frames of a reader of this clip."""
        from dagan_rt.cropping import follow
        from dagan_rt.images import center_square

        if self._detector is None or self._first is None:
            for frame in reader.timed():
                yield frame._replace(image=center_square(frame.image, self.size))
            return
        for frame, square in follow(reader.timed(), self._detector, self._first):
            yield frame._replace(image=square.cut(frame.image, self.size))

    def begin_at_best(self, reenactor: Reenactor, source: np.ndarray) -> None:
        """Make the frame whose face is posed most like the source's the initial one."""
        from dagan_rt.best_frame import find_best_frame
        from dagan_rt.pipeline import read_ahead

        with self._reading("finding the best frame") as (reader, watched), read_ahead(self.squares(reader)) as frames:
            initial = find_best_frame(reenactor, source, (frame.image for frame in watched(frames)))
        if initial is not None:
            reenactor.reset()
            reenactor.drive(initial)

    def _first_face(self, detector: FaceDetector) -> np.ndarray | None:
        from dagan_rt.cropping import first_face

        with self._reading("looking for a face") as (reader, watched):
            try:
                return first_face(watched(reader), detector, str(self.path))
            except InputError:
                if self.interrupted.is_set():
                    return None
                raise

    @contextmanager
    def _reading(self, what: str) -> Iterator[tuple[VideoReader, Callable[[Iterable[Any]], Iterator[Any]]]]:
        """Another pass: a reader, and what lets its frames through, with a progress bar, until an interrupt."""
        from dagan_rt.video import VideoReader

        with VideoReader(self.path) as reader, _progress(reader, what) as bar:

            def watched(frames: Iterable[Any]) -> Iterator[Any]:
                for frame in frames:
                    if self.interrupted.is_set():
                        return
                    yield frame
                    bar.update()

            yield reader, watched


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


def _animate(
    arguments: argparse.Namespace,
    reenactors: Sequence[Reenactor],
    portrait: _Portrait,
    clip: _Clip,
    reader: VideoReader,
) -> Summary:
    """Write the result; what was done before an error is kept."""
    from dagan_rt import pipeline
    from dagan_rt.ensemble import Ensemble
    from dagan_rt.video import VideoWriter

    shown, width, height = _shown(arguments, portrait, clip.size)
    writer = VideoWriter(
        arguments.out,
        reader.fps,
        width,
        height,
        audio_from=arguments.driving if reader.has_audio else None,
        crf=arguments.crf,
        time_base=reader.time_base,
    )
    driven = reenactors[0] if len(reenactors) == 1 else Ensemble(reenactors)
    with writer, _progress(reader, "animating") as bar:

        def write(frame: Frame, result: np.ndarray) -> None:
            writer.write(shown(frame.image, result), frame.time, frame.duration)
            bar.update()

        with keeping(writer):
            return pipeline.run(clip.squares(reader), driven, write, clip.interrupted)


@contextmanager
def keeping(writer: VideoWriter | None) -> Iterator[None]:
    """Finish a clip that an error cuts short, and say in the error's sentence what it holds; None: there is no clip."""
    try:
        yield
    except Exception as error:
        kept = _keep(writer) if writer is not None else ""
        # Out of memory, a device lost, whatever an engine refuses: no bugs, and tracebacks would say no more.
        if isinstance(error, (InputError, MemoryError, RuntimeError)):
            raise InputError(f"{str(error) or 'out of memory'}{kept and '; '}{kept}") from error
        if kept:
            print(kept, file=sys.stderr)
        raise


def _shown(
    arguments: argparse.Namespace, portrait: _Portrait, size: int
) -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], int, int]:
    """What is shown of a driving frame and its result, or results [N, size, size, 3]; and its width and height."""
    import numpy as np

    from dagan_rt.pasting import Canvas

    if arguments.side_by_side:
        source = portrait.squares[0].cut(portrait.picture, size)
        return lambda frame, result: np.concatenate([source, frame, result], axis=1), 3 * size, size
    if not arguments.paste_back:
        return lambda frame, result: result, size, size
    height, width = (side // 2 * 2 for side in portrait.picture.shape[:2])  # H.264 takes even ones
    canvases = [Canvas(portrait.picture, square) for square in portrait.squares]

    def pasted(frame: np.ndarray, results: np.ndarray) -> np.ndarray:
        whole = portrait.picture.copy()
        for canvas, result in zip(canvases, results if results.ndim == 4 else results[None], strict=True):
            canvas.paste(result, whole)
        return whole[:height, :width]

    return pasted, width, height


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
