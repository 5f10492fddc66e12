"""`dagan-rt webcam`: a camera drives a portrait live, in a window, a recording or a virtual camera."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from functools import cache, partial
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
    stop_on_interrupt,
)
from dagan_rt.errors import InputError, require

if TYPE_CHECKING:
    import threading
    from fractions import Fraction

    import numpy as np

    from dagan_rt.camera import Capture
    from dagan_rt.faces import FaceDetector
    from dagan_rt.live import Status, Summary, View
    from dagan_rt.reenactor import Reenactor

TITLE = "dagan-rt"
PANEL = 256  # pixels that each picture in the window has at least
INK, PAPER = (235, 235, 235), (24, 24, 24)


def add_parser(subparsers: Any) -> None:
    """Add `webcam` to the subparsers of the command line."""
    parser = subparsers.add_parser(
        "webcam",
        allow_abbrev=False,
        help="drive a portrait live with a camera",
        description="Drive a portrait live with a camera. The window shows portrait, driver and result, and its keys "
        "with h.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--source",
        type=Path,
        nargs="+",
        required=True,
        metavar="IMAGE",
        help="the portrait, or several to switch between",
    )
    parser.add_argument(
        "--driver",
        default="0",
        metavar="CAMERA",
        help="a camera's number (default 0) or device (/dev/video0), a video file, which is played at its own pace, or "
        "a URL (http, https, rtsp, rtsps, rtmp, rtmps)",
    )
    add_crop_options(parser, "portraits and camera")
    add_watermark_option(parser)
    parser.add_argument("--out", type=Path, metavar="VIDEO", help="record the result: .mp4, .m4v, .mov, .mkv, .gif")
    parser.add_argument(
        "--virtual-camera",
        nargs="?",
        const="",
        metavar="DEVICE",
        help="show the result to other programs as a camera (DEVICE: which, where there are several)",
    )
    parser.add_argument("--no-window", action="store_true", help="show nothing here")
    parser.add_argument(
        "--no-mirror", action="store_true", help="show a camera in the window as it sees, not as a mirror would"
    )
    parser.add_argument("--seconds", type=float, metavar="N", help="end after N seconds")
    parser.add_argument("--frames", type=int, metavar="N", help="end after N frames were shown")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check every input, then run the session; returns 0, or 130 when Ctrl-C ended it."""
    _check_options(arguments)
    # OpenCV would tell each way it tried to open a camera that is not there, and Qt what fonts it misses, though all
    # text is drawn here. Both read this once, when they are imported.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("QT_LOGGING_RULES", "default.warning=false")
    if not arguments.no_window:
        # Before PyAV, which the imports below bring along: the other way round, each library has an X11 client of its
        # own, and the window takes those of both and hangs.
        check_windows()
    from dagan_rt.camera import Capture, open_source
    from dagan_rt.files import check_output
    from dagan_rt.portrait import read_portrait
    from dagan_rt.video import WRITABLE

    if arguments.out is not None:
        check_output(arguments.out, WRITABLE, inputs=[*arguments.source, arguments.driver])
    detector = open_detector(arguments)
    pictures = [read_portrait(path, detector, arguments.face) for path in arguments.source]
    with ExitStack() as opened:
        capture = opened.enter_context(Capture(open_source(arguments.driver)))
        window = None
        if not arguments.no_window:
            window = opened.enter_context(Window(mirror=capture.source.mirrored and not arguments.no_mirror))
        reenactor = opened.enter_context(open_reenactor(arguments))
        portraits = [source for picture in pictures for source in picture.sources(reenactor.size)]
        interrupted = opened.enter_context(stop_on_interrupt())
        summary, recorded = _session(arguments, capture, reenactor, portraits, detector, window, interrupted)
    _report(arguments, reenactor, summary, recorded)
    if not interrupted.is_set():
        return 0
    print("interrupted" + (": the recording ends here" if recorded else ""), file=sys.stderr)
    return 130


def _check_options(arguments: argparse.Namespace) -> None:
    check_options(arguments)
    check_crop(arguments)
    check_watermark(arguments)
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise InputError(f"--seconds must be over 0, got {arguments.seconds}")
    if arguments.frames is not None and arguments.frames < 1:
        raise InputError(f"--frames must be at least 1, got {arguments.frames}")


def _session(
    arguments: argparse.Namespace,
    capture: Capture,
    reenactor: Reenactor,
    portraits: list[np.ndarray],
    detector: FaceDetector | None,
    window: Window | None,
    interrupted: threading.Event,
) -> tuple[Summary, int]:
    """Run until something ends it; how it went, and how many frames were recorded."""
    from dagan_rt.cropping import Follower
    from dagan_rt.live import Live, Recorder, Sink, centered
    from dagan_rt.video import VideoWriter
    from dagan_rt.watermark import mark

    size, fps = reenactor.size, capture.source.fps
    squares = centered if detector is None else Follower(detector, arguments.driving_face)
    finish = partial(mark, kind=arguments.watermark) if arguments.watermark else None
    writer: VideoWriter | None = None
    with ExitStack() as opened:
        sinks: list[Sink] = [] if window is None else [window]
        if arguments.virtual_camera is not None:
            sinks.append(opened.enter_context(VirtualCamera(size, fps, arguments.virtual_camera)))
        if arguments.out is not None:
            writer = VideoWriter(arguments.out, fps, size, size, crf=arguments.crf)
            opened.enter_context(writer)
        recorder = None if writer is None else Recorder(writer)
        keys = str if window is None else window.keys
        live = Live(capture, reenactor, portraits, sinks, keys, recorder, squares=squares, finish=finish)
        with keeping(writer):
            summary = live.run(interrupted, arguments.seconds, arguments.frames)
    return summary, 0 if writer is None else writer.frames_written


def check_windows() -> Any:
    """OpenCV, with which a window can be opened here; InputError if none can."""
    cv2 = require("cv2", extra="webcam", why="the window (or give --no-window)")
    framework = cv2.currentUIFramework()
    if not framework:
        raise InputError(
            "the installed OpenCV has no windows (opencv-python-headless): uninstall it and run pip install "
            "--force-reinstall opencv-python, or give --no-window"
        )
    if framework.startswith(("QT", "GTK")) and not os.environ.get("DISPLAY"):
        raise InputError("there is no display for a window (DISPLAY is not set): give --no-window, or log in at one")
    return cv2


class Window:
    """Pictures in a row with a line below them, and the keys pressed there; to be closed by `with`."""

    def __init__(self, mirror: bool) -> None:
        """mirror: show driver and result as a mirror would. Raises InputError where no window can be opened."""
        self._cv2, self._mirror, self._shown, self._pressed = check_windows(), mirror, False, ""
        kind = self._cv2.WINDOW_NORMAL | self._cv2.WINDOW_KEEPRATIO | self._cv2.WINDOW_GUI_NORMAL
        self._cv2.namedWindow(TITLE, kind)

    def show(self, view: View) -> None:
        """Show one frame, see `draw`."""
        image = draw(view, self._mirror)
        if not self._shown:
            try:
                self._cv2.resizeWindow(TITLE, image.shape[1], image.shape[0])
            except self._cv2.error:  # closed while the model was loaded
                self._pressed += "q"
                return
        self._cv2.imshow(TITLE, self._cv2.cvtColor(image, self._cv2.COLOR_RGB2BGR))
        self._shown = True
        self._poll()

    def keys(self) -> str:
        """The characters of the keys pressed since the last call; q once the window was closed."""
        self._poll()
        pressed, self._pressed = self._pressed, ""
        return pressed

    def _poll(self) -> None:
        """Let the window be drawn, and note what was pressed."""
        code = self._cv2.pollKey()
        if code >= 0:
            self._pressed += chr(code & 0xFF).lower()
        if self._shown and not self._is_open():
            self._pressed += "q"

    def _is_open(self) -> bool:
        try:
            return bool(self._cv2.getWindowProperty(TITLE, self._cv2.WND_PROP_VISIBLE) > 0)
        except self._cv2.error:  # some systems have no properties of a window that is gone
            return False

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *error: object) -> None:
        self._cv2.destroyAllWindows()


class VirtualCamera:
    """Shows results to other programs as a camera; to be closed by `with`."""

    def __init__(self, size: int, fps: Fraction, device: str) -> None:
        """size: side of the pictures, pixels. device: "" for the first. Raises InputError where there is none."""
        library = require("pyvirtualcam", extra="virtual-camera", why="--virtual-camera")
        try:
            self._camera = library.Camera(width=size, height=size, fps=float(fps), device=device or None)
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"--virtual-camera {device or '(any)'} cannot be used: {error}") from error

    def show(self, view: View) -> None:
        """Send one result; RuntimeError once the camera is gone."""
        self._camera.send(view.result)

    def __enter__(self) -> VirtualCamera:
        return self

    def __exit__(self, *error: object) -> None:
        self._camera.close()


def draw(view: View, mirror: bool = False) -> np.ndarray:
    """Portrait, driver and result in a row and the status below, uint8 [H, W, 3] RGB; driver and result mirrored."""
    import numpy as np

    turn = slice(None, None, -1 if mirror else 1)
    row = np.concatenate([view.portrait, view.driving[:, turn], view.result[:, turn]], axis=1)
    times = -(-PANEL // row.shape[0])
    row = row.repeat(times, axis=0).repeat(times, axis=1)
    if view.status.help:
        from dagan_rt.live import KEYS

        lines = [f"{key}: {meaning}" for key, meaning in KEYS]
        row = row // 3 + _written(lines, row.shape[1], row.shape[0]) // 3 * 2
    return np.concatenate([row, _written([describe(view.status)], row.shape[1])])


def describe(status: Status) -> str:
    """The line below the pictures."""
    motion = status.motion + (", adapted scale" if status.adapt_scale else "")
    parts = [f"{status.fps:.1f} fps", f"{1000 * status.latency:.0f} ms", f"{status.dropped} dropped", motion]
    parts += [f"portrait {status.portrait} of {status.portraits}"] if status.portraits > 1 else []
    parts += [] if status.seen else ["no face yet"]
    return " | ".join([*parts, *filter(None, [status.recording]), "h: help"])


def _written(lines: list[str], width: int, height: int = 0) -> np.ndarray:
    """Lines of text as uint8 [H, W, 3], at least `height` high."""
    import numpy as np
    from PIL import Image, ImageDraw

    font = _font()
    step = round(1.6 * font.size)
    sheet = Image.new("RGB", (width, max(height, step * len(lines))), PAPER)
    for number, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((8, number * step + step // 6), line, fill=INK, font=font)
    return np.asarray(sheet)


@cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(15)


def _report(arguments: argparse.Namespace, reenactor: Reenactor, summary: Summary, recorded: int) -> None:
    import numpy as np

    count = len(summary.latencies)
    if not count:
        print("no frame was shown" if arguments.crop == "center" else "no frame was shown: no face was found")
        return
    p50, p95 = np.percentile(np.array(summary.latencies) * 1000, (50, 95))
    print(
        f"{count} frames in {summary.seconds:.1f} s: {count / summary.seconds:.1f} a second, "
        f"{summary.dropped} dropped; from captured to shown p50 {p50:.1f} ms, p95 {p95:.1f} ms"
    )
    why, _, others = reenactor.backend_reason.partition("; ")
    print(f"backend {reenactor.backend_name}: {why}" + ("; dagan-rt info says why not another" if others else ""))
    if recorded:
        print(f"wrote {arguments.out}: {recorded} frames")
