"""`dagan-rt webcam` from end to end: real videos drive it; stand-ins play camera, window and virtual camera."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dagan_rt.cli import main
from dagan_rt.commands.webcam import PANEL, describe, draw
from dagan_rt.errors import DeviceLost
from dagan_rt.live import Status, View
from dagan_rt.video import VideoReader, VideoWriter

from ..clips import write_clip

SIZE = 32
LEVELS = [60, 80, 100, 120, 140, 160]  # gray levels of frames, which tell them apart


class StandIn:
    """Answers a frame of gray level g with one of level 255 - g, and remembers what it was asked."""

    made: list[StandIn] = []
    during: Callable[[int], None] | None = None  # called with the number of each frame to drive

    def __init__(
        self, bundle: Any, backend: str = "auto", motion: str = "relative", adapt_scale: bool = False, **more: Any
    ):
        self.options = {"bundle": bundle, "backend": backend, "motion": motion, "adapt_scale": adapt_scale, **more}
        self.motion, self.adapt_scale = motion, adapt_scale
        self.size, self.backend_name, self.backend_reason = SIZE, "stand-in", "the fastest; x: away"
        self.sources: list[int] = []
        self.driven: list[int] = []
        self.closed = False
        StandIn.made.append(self)

    def set_source(self, image: np.ndarray) -> None:
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        self.sources.append(level(image))

    def drive(self, frame: np.ndarray) -> np.ndarray:
        assert frame.shape == (SIZE, SIZE, 3) and frame.dtype == np.uint8
        if StandIn.during is not None:
            StandIn.during(len(self.driven))
        self.driven.append(level(frame))
        return 255 - frame

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True


def level(image: np.ndarray) -> int:
    return int(image.mean().round())


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "tiny_bundle" not in request.fixturenames:
        monkeypatch.setattr(StandIn, "made", [])
        monkeypatch.setattr(StandIn, "during", None)
        monkeypatch.setattr("dagan_rt.reenactor.Reenactor", StandIn)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Two portraits of levels 150 and 170, a clip, a place for the result, and a bundle that nobody opens."""
    for name, gray in (("first.png", 150), ("second.png", 170)):
        Image.new("RGB", (50, 70), (gray, gray, gray)).save(tmp_path / name)
    (tmp_path / "result").mkdir()
    return {
        "bundle": tmp_path / "bundle",
        "source": [tmp_path / "first.png", tmp_path / "second.png"],
        "driver": write_clip(tmp_path / "clip.mp4", [np.full((48, 64, 3), gray, np.uint8) for gray in LEVELS]),
        "out": tmp_path / "result" / "out.mp4",
    }


def command(files: dict[str, Any], *options: str, **other: Any) -> list[str]:
    named = {name: value for name, value in {**files, **other}.items() if value is not None}
    parts = [(f"--{name}", *(value if isinstance(value, list) else [value])) for name, value in named.items()]
    return ["webcam", *(str(part) for group in parts for part in group), *options]


def webcam(files: dict[str, Any], *options: str, window: bool = False, **other: Any) -> int:
    return main(command(files, *options, *([] if window else ["--no-window"]), **other))


def levels_of(path: Path) -> list[int]:
    with VideoReader(path) as reader:
        return [level(image) for image in reader]


def fake_opencv(monkeypatch: pytest.MonkeyPatch, images: int = 10**9, keys: dict[int, str] | None = None) -> Any:
    """OpenCV with a camera that gives some gray frames, brighter on their left, and a window whose keys are pressed
    after so many frames were shown; `closed_after` of them, the window is closed."""
    cv2 = SimpleNamespace(
        shown=[], gone=0, closed_after=10**9, error=KeyError, CAP_ANY=0, CAP_V4L2=200, CAP_PROP_FPS=5, WINDOW_NORMAL=0,
        WINDOW_KEEPRATIO=0, WINDOW_GUI_NORMAL=16, COLOR_RGB2BGR=4, WND_PROP_VISIBLE=4, framework="QT", told=set(),
    )  # fmt: skip
    left = dict(keys or {})

    class VideoCapture:
        def __init__(self, device: Any, kind: int) -> None:
            self.left = images

        def isOpened(self) -> bool:  # noqa: N802 (OpenCV's name)
            return True

        def get(self, what: int) -> float:
            return 30.0

        def read(self) -> tuple[bool, Any]:
            self.left -= 1
            time.sleep(0.001)  # lets the others work
            image = np.full((48, 64, 3), 90, np.uint8)
            image[:, :20] = 200
            return self.left >= 0, image

        def release(self) -> None:
            cv2.told.add("released")

    def poll() -> int:
        pressed = left.pop(len(cv2.shown), "")
        return ord(pressed) if pressed else -1

    cv2.VideoCapture, cv2.pollKey = VideoCapture, poll
    cv2.currentUIFramework = lambda: cv2.framework
    cv2.namedWindow = lambda name, kind: cv2.told.add(f"window {name}")
    cv2.resizeWindow = lambda name, width, height: cv2.told.add((width, height))
    cv2.cvtColor = lambda image, kind: image
    cv2.imshow = lambda name, image: cv2.shown.append(image)
    cv2.getWindowProperty = lambda name, what: float(len(cv2.shown) < cv2.closed_after)
    cv2.destroyAllWindows = lambda: cv2.told.add("destroyed")
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    monkeypatch.setenv("DISPLAY", ":0")
    return cv2


@pytest.mark.parametrize("options", [(), ("--absolute",), ("--adapt-scale",)])
def test_a_recording_holds_what_the_reenactor_makes_of_the_frames_taken(
    files: dict[str, Any], tiny_bundle: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagan_rt.images import center_square, read_image
    from dagan_rt.live import Live
    from dagan_rt.reenactor import Reenactor

    rng = np.random.default_rng(0)
    faces = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    write_clip(files["driver"], list(faces))
    taken: list[Any] = []
    encoded: list[np.ndarray] = []
    times: list[float] = []
    take, write = Live._drive, VideoWriter.write

    def note(live: Live, captured: Any) -> None:
        taken.append(captured)
        take(live, captured)

    def note_written(writer: VideoWriter, image: np.ndarray, time: Any) -> None:
        encoded.append(image)
        times.append(float(time))
        write(writer, image, time)

    monkeypatch.setattr(Live, "_drive", note)
    monkeypatch.setattr(VideoWriter, "write", note_written)
    common = ("--backend", "onnxruntime", "--threads", "1")
    assert webcam(files, *common, *options, bundle=tiny_bundle) == 0

    motion = "absolute" if "--absolute" in options else "relative"
    with Reenactor(tiny_bundle, "onnxruntime", motion, "--adapt-scale" in options, threads=1) as model:
        model.set_source(center_square(read_image(files["source"][0]), model.size))
        expected = [model.drive(center_square(captured.image, model.size)) for captured in taken]
    np.testing.assert_array_equal(encoded, expected)
    assert times == pytest.approx([captured.time - taken[0].time for captured in taken])
    with VideoReader(files["driver"]) as reader:
        frames = [image.tobytes() for image in reader]
    numbers = [frames.index(captured.image.tobytes()) for captured in taken]
    assert numbers == sorted(set(numbers)) and numbers[-1] == 11
    with VideoReader(files["out"]) as reader:
        assert [float(frame.time) for frame in reader.timed()] == pytest.approx(times, abs=1e-3)


def test_a_file_drives_a_portrait_and_the_result_is_recorded(
    files: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert webcam(files) == 0
    model = StandIn.made[0]
    assert model.sources == [150] and model.closed
    np.testing.assert_allclose(levels_of(files["out"]), 255 - np.array(model.driven), atol=4)
    said = capsys.readouterr()
    count = len(model.driven)
    assert re.fullmatch(
        rf"{count} frames in [\d.]+ s: [\d.]+ a second, {6 - count} dropped; "
        r"from captured to shown p50 [\d.]+ ms, p95 [\d.]+ ms\n"
        r"backend stand-in: the fastest; dagan-rt info says why not another\n"
        f"wrote {re.escape(str(files['out']))}: {count} frames\n",
        said.out,
    )
    assert said.err == ""
    assert [entry.name for entry in files["out"].parent.iterdir()] == ["out.mp4"]


def test_options_reach_the_model(files: dict[str, Any]) -> None:
    assert webcam(files, "--absolute", "--backend", "torch", "--threads", "3", out=None) == 0
    assert StandIn.made[0].options == {
        "bundle": str(files["bundle"]), "backend": "torch", "motion": "absolute", "adapt_scale": False,
        "motion_scale": 1.0, "by_points": False, "threads": 3,
    }  # fmt: skip
    assert webcam(files, "--adapt-scale", "--frames", "1", bundle="grpc://host:8001", out=None) == 0
    assert StandIn.made[1].options == {
        "bundle": "grpc://host:8001", "backend": "auto", "motion": "relative", "adapt_scale": True, "motion_scale": 1.0,
        "by_points": False,
    }  # fmt: skip
    assert len(StandIn.made[1].driven) == 1
    assert list(files["out"].parent.iterdir()) == []


def test_an_unplugged_camera_is_one_sentence_and_the_recording_is_kept(
    files: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cv2 = fake_opencv(monkeypatch, images=8)
    assert webcam(files, driver=None) == 2
    count = len(StandIn.made[0].driven)
    sentence = "camera 0 gives no more pictures: it was unplugged, or another program took it"
    assert capsys.readouterr().err == (
        f"dagan-rt: error: {sentence}; the {count} frames before that are in {files['out']}\n"
    )
    assert len(levels_of(files["out"])) == count > 0 and "released" in cv2.told
    assert [entry.name for entry in files["out"].parent.iterdir()] == ["out.mp4"]


def test_a_network_camera_that_breaks_off_is_one_sentence_and_the_recording_is_kept(
    files: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (90, 90, 90)).save(file, "JPEG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 (the library's name)
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(file.getvalue())
            self.wfile.write((head + file.getvalue() + b"\r\n") * 40)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"127.0.0.1:{server.server_port}"
        assert webcam(files, driver=f"http://me:secret@{address}/camera") == 2
    finally:
        server.shutdown()
        server.server_close()
    said = capsys.readouterr().err
    assert said.startswith(f"dagan-rt: error: stream http://{address}/camera broke off: ") and said.count("\n") == 1
    assert f"frames before that are in {files['out']}" in said and "secret" not in said
    np.testing.assert_allclose(levels_of(files["out"]), 165, atol=4)


def test_a_device_that_fails_keeps_the_recording(
    files: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        if number == 2:
            raise DeviceLost("the GPU was reset")

    fake_opencv(monkeypatch)
    monkeypatch.setattr(StandIn, "during", fail)
    assert webcam(files, driver="0") == 2
    assert capsys.readouterr().err == (
        f"dagan-rt: error: the GPU was reset; the 2 frames before that are in {files['out']}\n"
    )
    assert len(levels_of(files["out"])) == 2


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(
    files: dict[str, Any], times: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(number: int) -> None:
        if number == 3:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    cv2 = fake_opencv(monkeypatch)
    monkeypatch.setattr(StandIn, "during", interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert webcam(files, driver="0") == 130
    assert signal.getsignal(signal.SIGINT) is before and StandIn.made[0].closed and "released" in cv2.told
    said = capsys.readouterr()
    if times == 2:  # at once, and nothing is kept
        assert said.err == "dagan-rt: interrupted\n" and list(files["out"].parent.iterdir()) == []
        return
    assert said.err == "interrupted: the recording ends here\n" and "4 frames" in said.out
    assert len(levels_of(files["out"])) == 4


class VirtualCamera:
    """A virtual camera that notes what it is sent."""

    made: list[VirtualCamera] = []
    problem: Exception | None = None

    def __init__(self, width: int, height: int, fps: float, device: str | None) -> None:
        if VirtualCamera.problem is not None:
            raise VirtualCamera.problem
        self.options, self.closed = (width, height, fps, device), False
        self.sent: list[int] = []
        VirtualCamera.made.append(self)

    def send(self, image: np.ndarray) -> None:
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
        self.sent.append(level(image))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(VirtualCamera, "made", [])
    monkeypatch.setitem(sys.modules, "pyvirtualcam", SimpleNamespace(Camera=VirtualCamera))
    return VirtualCamera


def walking(files: dict[str, Any], faces: Any, count: int = 12) -> None:
    """A driver whose face comes after four frames and walks on; and portraits with a face at the edge."""
    for path, level in zip(files["source"], (100, 160), strict=True):
        Image.fromarray(faces({level: (150, 70)})).save(path)
    frames = [faces({200: (20 + 4 * number, 50)} if number > 3 else {}, 40) for number in range(count)]
    write_clip(files["driver"], frames)


def test_the_square_follows_the_face_once_it_is_there(
    files: dict[str, Any], faces: Any, virtual: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dagan_rt.cropping.PAUSE", 0.0)
    walking(files, faces)
    assert webcam(files, "--crop", "auto", "--virtual-camera") == 0
    (model,) = StandIn.made
    of_face = 200 / 1.8**2  # of a face of side s in a square of side 1.8 s
    assert model.sources == pytest.approx([of_face / 2], abs=3)
    assert len(model.driven) >= 3 and model.driven == pytest.approx([of_face] * len(model.driven), abs=6)
    (made,) = virtual.made
    waited = len(made.sent) - len(model.driven)
    assert waited >= 1 and made.sent[:waited] == [model.sources[0]] * waited  # the portrait as it is
    assert levels_of(files["out"]) == pytest.approx([255 - of_face] * len(model.driven), abs=6)
    assert f"{len(model.driven)} frames in " in capsys.readouterr().out


def test_nobody_comes(files: dict[str, Any], faces: Any, capsys: pytest.CaptureFixture[str]) -> None:
    walking(files, faces, count=4)
    assert webcam(files, "--crop", "auto") == 0
    assert capsys.readouterr().out == "no frame was shown: no face was found\n"
    assert list(files["out"].parent.iterdir()) == [] and StandIn.made[0].driven == []


def test_results_are_marked(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from dagan_rt.watermark import SURE, detect

    monkeypatch.setattr(f"{__name__}.SIZE", 128)
    for options, marked in (((), False), (("--watermark", "invisible"), True)):
        assert webcam(files, *options) == 0
        with VideoReader(files["out"]) as reader:
            assert (detect(reader) > SURE) == marked


@pytest.mark.parametrize(("options", "device"), [((), None), (("/dev/video9",), "/dev/video9")])
def test_a_virtual_camera_is_sent_every_result(
    files: dict[str, Any], virtual: Any, options: tuple[str, ...], device: str | None
) -> None:
    assert webcam(files, "--virtual-camera", *options, out=None) == 0
    (made,) = virtual.made
    assert made.options == (SIZE, SIZE, 25.0, device) and made.closed
    assert made.sent == [255 - gray for gray in StandIn.made[0].driven]


def test_a_virtual_camera_that_cannot_be_used(
    files: dict[str, Any], virtual: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtual, "problem", RuntimeError("no v4l2 loopback device found"))
    assert webcam(files, "--virtual-camera") == 2
    assert capsys.readouterr().err == (
        "dagan-rt: error: --virtual-camera (any) cannot be used: no v4l2 loopback device found\n"
    )
    hide(monkeypatch, "pyvirtualcam")
    assert webcam(files, "--virtual-camera") == 2
    assert capsys.readouterr().err == (
        "dagan-rt: error: --virtual-camera needs the package pyvirtualcam, which is not installed: "
        "run pip install 'dagan-rt[virtual-camera]'\n"
    )
    assert list(files["out"].parent.iterdir()) == []


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if a package were not installed."""
    found = __import__("importlib").import_module

    def import_module(name: str, *more: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, *more)

    monkeypatch.setattr("importlib.import_module", import_module)


def test_the_window_shows_the_row_and_gives_the_keys(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = fake_opencv(monkeypatch, keys={2: "N", 4: "\x1b"})
    assert webcam(files, "--frames", "9", window=True, driver="0") == 0
    assert StandIn.made[0].sources == [150, 170] and len(cv2.shown) == 4
    assert cv2.told >= {"window dagan-rt", (3 * PANEL, cv2.shown[0].shape[0]), "destroyed", "released"}
    for image, portrait in zip(cv2.shown, (150, 150, 170, 170), strict=True):
        assert level(image[:PANEL, :PANEL]) == portrait
        left, right = image[:PANEL, PANEL : PANEL + 10], image[:PANEL, 2 * PANEL - 10 : 2 * PANEL]
        assert level(left) < level(right)  # the camera's left is brighter, and a mirror shows it on the right
    assert len(levels_of(files["out"])) == 4


def test_nothing_but_a_cameras_window_is_mirrored(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = fake_opencv(monkeypatch)
    assert webcam(files, "--no-mirror", "--frames", "1", window=True, driver="0") == 0
    image = cv2.shown[0][:PANEL]
    assert level(image[:, PANEL : PANEL + 10]) > level(image[:, 2 * PANEL - 10 : 2 * PANEL])
    assert webcam(files, "--frames", "1", window=True, driver="0") == 0
    with VideoReader(files["out"]) as reader:
        (recorded,) = reader
    assert level(recorded[:, :4]) < level(recorded[:, -4:])  # the result inverts the camera's picture as it was
    write_clip(files["driver"], [np.repeat([[[200] * 3] * 32 + [[90] * 3] * 32], 48, 0).astype(np.uint8)] * 3)
    assert webcam(files, "--frames", "1", window=True) == 0
    image = cv2.shown[-1][:PANEL]
    assert level(image[:, PANEL : PANEL + 10]) > level(image[:, 2 * PANEL - 10 : 2 * PANEL])


def test_closing_the_window_ends_the_session(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = fake_opencv(monkeypatch)
    cv2.closed_after = 3
    assert webcam(files, "--frames", "9", window=True, driver="0") == 0
    assert len(cv2.shown) == 3


def test_closing_the_window_while_the_model_is_loaded(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def resize(*_: Any) -> None:
        raise KeyError("NULL guiReceiver (please create a window)")

    cv2 = fake_opencv(monkeypatch)
    cv2.resizeWindow = resize
    assert webcam(files, "--frames", "9", window=True, driver="0") == 0
    assert cv2.shown == [] and len(levels_of(files["out"])) == 1


def test_where_no_window_can_be_opened(
    files: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cv2 = fake_opencv(monkeypatch)
    monkeypatch.delenv("DISPLAY")
    assert webcam(files, window=True) == 2
    assert "there is no display for a window (DISPLAY is not set): give --no-window" in capsys.readouterr().err
    cv2.framework = "COCOA"
    assert webcam(files, "--frames", "1", window=True) == 0
    capsys.readouterr()
    cv2.framework = ""
    assert webcam(files, window=True) == 2
    assert "has no windows (opencv-python-headless): uninstall it and run pip install" in capsys.readouterr().err
    hide(monkeypatch, "cv2")
    assert webcam(files, window=True) == 2
    assert capsys.readouterr().err == (
        "dagan-rt: error: the window (or give --no-window) needs the package cv2, which is not installed: "
        "run pip install 'dagan-rt[webcam]'\n"
    )


def test_opencv_is_imported_before_pyav(files: dict[str, Any], tmp_path: Path) -> None:
    """The other way round, OpenCV's window hangs on Linux."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "cv2.py").write_text(
        "import sys\n"
        "def currentUIFramework():\n"
        "    print('av' in sys.modules)\n"
        "    return ''\n"
    )  # fmt: skip
    paths = os.pathsep.join([str(tmp_path / "modules"), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "dagan_rt", *command(files)],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "False\n") and "has no windows" in done.stderr


def test_bad_input_is_one_sentence_and_no_output(
    files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("neither image nor video")
    content = files["driver"].read_bytes()
    for changed, options, expected in [
        ({"source": [files["source"][0], tmp_path / "none.png"]}, (), "none.png does not exist"),
        ({"source": tmp_path / "text.txt"}, (), "text.txt is not an image"),
        ({"driver": tmp_path / "none.mp4"}, (), "none.mp4 does not exist"),
        ({"driver": tmp_path / "text.txt"}, (), "text.txt is not a video"),
        ({"driver": "ftp://host/x"}, (), "stream ftp://host/x must start with http://"),
        ({"driver": "100"}, (), "cameras have numbers from 0 to 99, got 100"),
        ({"out": tmp_path / "result" / "out.xyz"}, (), "must end in"),
        ({"out": tmp_path / "missing" / "out.mp4"}, (), "does not exist"),
        ({"out": files["driver"]}, (), "also an input"),
        ({}, ("--crf", "52"), "--crf must be between 0 and 51, got 52"),
        ({}, ("--threads", "0"), "--threads must be at least 1, got 0"),
        ({}, ("--seconds", "0"), "--seconds must be over 0, got 0.0"),
        ({}, ("--seconds", "nan"), "--seconds must be over 0, got nan"),
        ({}, ("--frames", "0"), "--frames must be at least 1, got 0"),
        ({}, ("--driving-face", "2"), "--driving-face 2 needs --crop auto"),
        ({}, ("--face", "all", "--crop", "auto"), "--face must be largest, or a number from 1, got 'all'"),
        ({"out": tmp_path / "result" / "out.gif"}, ("--watermark", "invisible"), "does not survive the few colours"),
        ({}, ("--absolute", "--adapt-scale"), "--adapt-scale"),
    ]:
        assert webcam(files, *options, **changed) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("dagan-rt: error: ") and said.err.count("\n") == 1
        assert expected in said.err
        assert list((tmp_path / "result").iterdir()) == [] and files["driver"].read_bytes() == content
    assert not StandIn.made  # the model is opened last


def test_a_bundle_that_cannot_be_used_leaves_no_output(
    files: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert webcam(files) == 2
    assert str(files["bundle"]) in capsys.readouterr().err
    assert list(files["out"].parent.iterdir()) == []


STATUS = Status(29.96, 0.0342, 12, "relative", True, 1, 3, "recording", True, False)


def test_the_line_below_the_pictures() -> None:
    assert describe(STATUS) == (
        "30.0 fps | 34 ms | 12 dropped | relative, adapted scale | portrait 1 of 3 | recording | h: help"
    )
    alone = STATUS._replace(motion="absolute", adapt_scale=False, portraits=1, recording="")
    assert describe(alone) == "30.0 fps | 34 ms | 12 dropped | absolute | h: help"
    assert describe(alone._replace(seen=False)) == "30.0 fps | 34 ms | 12 dropped | absolute | no face yet | h: help"


@pytest.mark.parametrize("size", [64, 256, 512])
def test_the_pictures_of_the_window(size: int) -> None:
    driving = np.full((size, size, 3), 100, np.uint8)
    driving[:, : size // 2] = 50
    pictures = (np.full((size, size, 3), 10, np.uint8), driving, 255 - driving)
    view = View(*pictures, 0.0, STATUS)
    side = max(size, PANEL)
    image = draw(view, mirror=True)
    assert image.dtype == np.uint8 and image.shape[1] == 3 * side and side < image.shape[0] < side + 40
    shown = [image[:side, column * side : (column + 1) * side] for column in range(3)]
    halves = [(level(panel[:, : side // 2]), level(panel[:, side // 2 :])) for panel in shown]
    assert halves == [(10, 10), (100, 50), (155, 205)]
    assert image[side:].max() > 150 > 60 > image[side:].min()  # something is written there
    plain = draw(view)
    np.testing.assert_array_equal(plain[:side, side : 2 * side : side // size], driving.repeat(side // size, 0))
    helping = draw(view._replace(status=STATUS._replace(help=True)))
    assert helping.shape == plain.shape and not np.array_equal(helping[:side], plain[:side])
