"""What commands that animate share: options of the model and of the crop, Ctrl-C between frames, clips cut short."""

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

    from dagan_rt.faces import FaceDetector
    from dagan_rt.reenactor import Reenactor
    from dagan_rt.video import VideoWriter


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command that animates takes; `check_options` and `open_reenactor` read it."""
    add_backend_options(parser)
    parser.add_argument(
        "--absolute", action="store_true", help="take over the driving pose itself, not its change since frame 1"
    )
    parser.add_argument(
        "--adapt-scale", action="store_true", help="scale the motion by the ratio of the two faces' sizes"
    )
    parser.add_argument(
        "--motion-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="move X times as far as the driving face, 0 to 4 (default 1)",
    )
    parser.add_argument(
        "--crf", type=int, default=18, metavar="N", help="H.264 quality from 0 (lossless) to 51, default 18"
    )


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command that runs a model takes; `check_threads` and `open_reenactor` read it."""
    parser.add_argument(
        "--bundle",
        required=True,
        metavar="DIR",
        help="exported model (a folder), or a server that serves one (grpc://host:8001, http://host:8000)",
    )
    add_engine_options(parser)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the backend and its threads, which `check_threads` reads."""
    parser.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help=f"auto (default: the fastest that runs here), {', '.join(backend_names())}",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of the backend (default: its own choice)")


def add_crop_options(parser: argparse.ArgumentParser, of: str) -> None:
    """Add what every command that crops takes; `open_detector` reads it. of: what is cropped."""
    parser.add_argument(
        "--crop",
        choices=("center", "auto"),
        default="center",
        help=f"the square of {of} that the model sees: center (default) is the largest centred one; auto finds the "
        "face, with the margin that models are trained with, and follows it through the video",
    )
    parser.add_argument(
        "--detector",
        default="auto",
        metavar="NAME",
        help="what finds faces: centerface (of the extra faces), centerface-int8 (always there), auto (default: the "
        "first of them that is), or an .onnx file of a detector (see dagan_rt.faces)",
    )


def backend_names() -> list[str]:
    """The names of the backends, without importing them: the help of every command is put together here."""
    folder = Path(__file__).parents[1] / "backends"
    modules = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return [module.replace("_", "-") for module in modules if not module.startswith("_")]


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of their range, and options that exclude one another."""
    if not 0 <= arguments.crf <= 51:
        raise InputError(f"--crf must be between 0 and 51, got {arguments.crf}")
    check_threads(arguments)
    if not 0 <= arguments.motion_scale <= 4:
        raise InputError(f"--motion-scale must be 0 to 4, got {arguments.motion_scale}")
    if arguments.absolute and arguments.motion_scale != 1:
        raise InputError("--motion-scale is about motion since a first frame, which --absolute does without: give one")
    for option in ("adapt_scale", "find_best_frame"):
        if arguments.absolute and getattr(arguments, option, False):
            raise InputError(
                f"--{option.replace('_', '-')} is about motion since a first frame, which --absolute does without: "
                "give one of the two"
            )


def check_threads(arguments: argparse.Namespace) -> None:
    """Refuse fewer threads than one."""
    if arguments.threads is not None and arguments.threads < 1:
        raise InputError(f"--threads must be at least 1, got {arguments.threads}")


def open_reenactor(arguments: argparse.Namespace) -> Reenactor:
    """The model that the options name; without options of motion, relative."""
    from dagan_rt.reenactor import Reenactor

    options = {} if arguments.threads is None else {"threads": arguments.threads}
    return Reenactor(
        arguments.bundle,
        backend=arguments.backend,
        motion="absolute" if getattr(arguments, "absolute", False) else "relative",
        adapt_scale=getattr(arguments, "adapt_scale", False),
        motion_scale=getattr(arguments, "motion_scale", 1.0),
        **options,
    )


def open_detector(arguments: argparse.Namespace) -> FaceDetector | None:
    """What finds faces, or None where the centre is cropped."""
    if arguments.crop != "auto":
        return None
    from dagan_rt.faces import load_detector

    return load_detector(arguments.detector, **({} if arguments.threads is None else {"threads": arguments.threads}))


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


def _keep(writer: VideoWriter) -> str:
    """Finish a clip that was cut short, and say what it holds; "" if nothing is left of it."""
    try:
        writer.close()
    except (InputError, OSError):  # a full disk, say, which then was the error in the first place
        return ""
    count = writer.frames_written
    return f"the {count} frames before that are in {writer.path}" if count else ""


def progress(total: int | None, what: str) -> Any:
    """A bar over so many frames, if that is known."""
    from tqdm import tqdm

    # disable=None: no bar where stderr is not a terminal.
    return tqdm(total=total, desc=what, unit="frame", disable=None, leave=False)
