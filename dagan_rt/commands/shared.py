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
    from collections.abc import Iterator, Sequence

    from dagan_rt.faces import FaceDetector
    from dagan_rt.reenactor import Reenactor
    from dagan_rt.video import VideoWriter


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command that animates takes; `check_options` and `open_reenactor` read it."""
    add_backend_options(parser)
    add_motion_options(parser)
    parser.add_argument(
        "--crf", type=int, default=18, metavar="N", help="H.264 quality from 0 (lossless) to 51, default 18"
    )


def add_motion_options(parser: argparse.ArgumentParser) -> None:
    """Add how motion is taken over, which `check_motion_options` reads."""
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


def add_crop_options(parser: argparse.ArgumentParser, of: str, portrait: bool = True) -> None:
    """Add what every command that crops takes; `check_crop` and `open_detector` read it.

    of: what is cropped. portrait: whether that includes a portrait, of which a face can be chosen.
    """
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
    if portrait:
        parser.add_argument(
            "--face",
            default="largest",
            metavar="WHICH",
            help="with --crop auto, which face of the portrait: largest (default), or a number from the left",
        )
    parser.add_argument(
        "--driving-face",
        default="largest",
        metavar="WHICH",
        help="with --crop auto, which face drives: largest (default), or a number from the left in the first frame "
        "that has as many",
    )


def add_watermark_option(parser: argparse.ArgumentParser) -> None:
    """Add how results are marked."""
    parser.add_argument(
        "--watermark",
        choices=("visible", "invisible"),
        help="mark the result as synthetic: visible is a word in its corner; invisible is found by dagan-rt info",
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
    check_motion_options(arguments)


def check_motion_options(arguments: argparse.Namespace) -> None:
    """Refuse a scale out of its range, and options about relative motion without it."""
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


def check_crop(arguments: argparse.Namespace, faces: Sequence[str] = ("largest",)) -> None:
    """Refuse faces that cannot be meant, and faces without a crop that finds any. faces: words that --face takes."""
    for option, words in (("--face", faces), ("--driving-face", ("largest",))):
        which = getattr(arguments, option[2:].replace("-", "_"), "largest")
        if which not in words and not (which.isdecimal() and int(which) > 0):
            raise InputError(f"{option} must be {', '.join(words)}, or a number from 1, got {which!r}")
        if which != "largest" and arguments.crop != "auto":
            raise InputError(f"{option} {which} needs --crop auto, which finds faces")


def check_watermark(arguments: argparse.Namespace) -> None:
    """Refuse a mark that the file would not hold."""
    if arguments.watermark == "invisible" and arguments.out is not None and arguments.out.suffix.lower() == ".gif":
        raise InputError(
            "--watermark invisible does not survive the few colours of a .gif: take visible, or another --out"
        )


def check_threads(arguments: argparse.Namespace) -> None:
    """Refuse fewer threads than one."""
    if arguments.threads is not None and arguments.threads < 1:
        raise InputError(f"--threads must be at least 1, got {arguments.threads}")


def open_reenactor(arguments: argparse.Namespace, by_points: bool = False) -> Reenactor:
    """The model that the options name; without options of motion, relative. by_points: as of `Reenactor`."""
    from dagan_rt.reenactor import Reenactor

    return Reenactor(
        arguments.bundle,
        backend=arguments.backend,
        motion="absolute" if getattr(arguments, "absolute", False) else "relative",
        adapt_scale=getattr(arguments, "adapt_scale", False),
        motion_scale=getattr(arguments, "motion_scale", 1.0),
        by_points=by_points,
        **_threads(arguments),
    )


def open_detector(arguments: argparse.Namespace) -> FaceDetector | None:
    """What finds faces, or None where the centre is cropped."""
    if arguments.crop != "auto":
        return None
    from dagan_rt.faces import load_detector

    return load_detector(arguments.detector, **_threads(arguments))


def _threads(arguments: argparse.Namespace) -> dict[str, int]:
    """The option --threads as an argument, where it is there and was given."""
    threads = getattr(arguments, "threads", None)
    return {} if threads is None else {"threads": threads}


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
