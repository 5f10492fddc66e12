"""Sources of driving frames and the thread that keeps the newest; no camera is needed, no test waits for a clock."""

from __future__ import annotations

import io
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dagan_rt import camera
from dagan_rt.camera import Capture, Timed, open_source
from dagan_rt.errors import InputError, MissingPackage

from .clips import write_clip

LEVELS = [60, 80, 100, 120, 140, 160]  # gray levels of frames, which tell them apart
LONG = 60.0  # seconds that no test takes, but a broken one


class Scripted:
    """A source that gives a frame when it is told to, and knows when that was stored."""

    name, fps, mirrored, patience = "script", Fraction(25), False, None

    def __init__(self) -> None:
        self.closed = 0
        self._orders: queue.Queue[Any] = queue.Queue()
        self._asked = threading.Semaphore(0)

    def give(self, level: int, due: float | None = None) -> None:
        """Give a frame; returns once the capture asks for another one."""
        self._orders.put(Timed(picture(level), due))
        assert self._asked.acquire(timeout=LONG)

    def end(self, error: Exception | None = None) -> None:
        self._orders.put(error)

    def frames(self) -> Iterator[Timed]:
        while (order := self._orders.get(timeout=LONG)) is not None:
            if isinstance(order, Exception):
                raise order
            yield order
            self._asked.release()

    def close(self) -> None:
        self.closed += 1
        self._orders.put(None)


class Watch:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waited: list[float] = []

    def read(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.now += seconds


def picture(level: int) -> np.ndarray:
    return np.full((48, 64, 3), level, np.uint8)


def level(image: np.ndarray) -> int:
    return int(image.mean().round())


def make_clip(path: Path, levels: list[int] = LEVELS, **options: Any) -> Path:
    return write_clip(path, [picture(gray) for gray in levels], **options)


def test_only_the_newest_frame_is_kept() -> None:
    source, watch = Scripted(), Watch()
    with Capture(source, watch.read) as capture:
        capture.start()
        assert capture.take(0) is None and not capture.ended
        source.give(1)
        first = capture.take(0)
        assert first is not None and (level(first.image), first.time, capture.dropped) == (1, 1000.0, 0)
        for number in (2, 3, 4):
            watch.now += 1
            source.give(number)
        newest = capture.take(0)
        assert newest is not None and (level(newest.image), newest.time, capture.dropped) == (4, 1003.0, 2)
        assert capture.take(0) is None


def test_the_last_frame_comes_before_the_end() -> None:
    source = Scripted()
    with Capture(source) as capture:
        capture.start()
        source.give(7)
        source.end()
        capture._thread.join(LONG)
        assert not capture.ended
        last = capture.take(LONG)
        assert last is not None and level(last.image) == 7
        assert capture.ended and capture.take(LONG) is None


def test_what_breaks_a_source_off_is_raised_after_its_last_frame() -> None:
    source = Scripted()
    with Capture(source) as capture:
        capture.start()
        source.give(7)
        source.end(InputError("camera 0 gives no more pictures"))
        capture._thread.join(LONG)
        assert capture.take(0) is not None
        with pytest.raises(InputError, match="camera 0 gives no more pictures"):
            capture.take(LONG)


@pytest.mark.parametrize("started", [False, True])
def test_closing_ends_the_thread_and_closes_the_source(started: bool) -> None:
    source = Scripted()
    with Capture(source) as capture:
        if started:
            capture.start()
            source.give(1)
            source.end(InputError("over"))
    assert source.closed == 1 and not capture._thread.is_alive()


def test_a_thread_that_hangs_does_not_keep_closing_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera, "CLOSING", 0.01)
    source = Scripted()
    with Capture(source) as capture:
        capture.start()
    assert source.closed == 0 and capture._thread.daemon  # the thread still reads: nobody else may close
    source.end()
    capture._thread.join(LONG)
    assert source.closed == 1


def test_a_file_is_played_at_its_own_pace(tmp_path: Path) -> None:
    source, watch = open_source(str(make_clip(tmp_path / "clip.mp4"))), Watch()
    times: list[float] = []

    def wait(seconds: float) -> None:
        times.append(watch.now)  # when the frame before was there
        watch.wait(seconds)

    with Capture(source, watch.read, wait) as capture:
        capture.start()
        capture._thread.join(LONG)
        last = capture.take(0)
        assert last is not None and last.time == pytest.approx(1000 + 5 / 25)
    assert watch.waited == pytest.approx([1 / 25] * 5)
    assert times == pytest.approx([1000 + number / 25 for number in range(5)])
    assert capture.dropped == 5 and (source.name, source.fps, source.mirrored) == (
        f"video {tmp_path / 'clip.mp4'}", 25, False,
    )  # fmt: skip


def test_frames_that_are_late_are_not_waited_for() -> None:
    source, watch = Scripted(), Watch()
    with Capture(source, watch.read, watch.wait) as capture:
        capture.start()
        source.give(1, due=5.0)  # the first one is due at once
        source.give(2, due=5.5)
        watch.now += 2
        source.give(3, due=6.0)
        source.give(4, due=8.0)
        source.end()
    assert watch.waited == pytest.approx([0.5, 0.5])


def fake_opencv(monkeypatch: pytest.MonkeyPatch, images: list[Any], rate: float = 30.0, opens: bool = True) -> Any:
    """OpenCV with one camera, which gives `images` and is then unplugged; an exception among them is raised."""
    cv2 = SimpleNamespace(opened=[], released=[], CAP_ANY=0, CAP_V4L2=200, CAP_PROP_FPS=5, error=KeyError)

    class VideoCapture:
        def __init__(self, device: Any, kind: int) -> None:
            cv2.opened.append((device, kind))
            self.left = list(images)

        def isOpened(self) -> bool:  # noqa: N802 (OpenCV's name)
            return opens

        def get(self, what: int) -> float:
            return rate if what == cv2.CAP_PROP_FPS else -1

        def read(self) -> tuple[bool, Any]:
            image = self.left.pop(0) if self.left else None
            if isinstance(image, Exception):
                raise image
            return image is not None, image

        def release(self) -> None:
            cv2.released.append(True)

    cv2.VideoCapture = VideoCapture
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    return cv2


def test_a_camera_gives_rgb_until_it_is_unplugged(monkeypatch: pytest.MonkeyPatch) -> None:
    blue = np.zeros((48, 64, 3), np.uint8)
    blue[..., 0] = 255  # OpenCV's order
    cv2 = fake_opencv(monkeypatch, [blue, blue], rate=15.0)
    source = open_source("3")
    assert cv2.opened == [(3, cv2.CAP_ANY)]
    assert (source.name, source.fps, source.mirrored, source.patience) == ("camera 3", 15, True, camera.PATIENCE)
    taken = source.frames()
    for _ in range(2):
        image, due = next(taken)
        assert due is None and image.flags.c_contiguous and (image == [0, 0, 255]).all()
    with pytest.raises(InputError, match="camera 3 gives no more pictures: it was unplugged"):
        next(taken)
    source.close()
    assert cv2.released


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_a_camera_that_does_not_know_its_rate(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    fake_opencv(monkeypatch, [], rate=rate)
    assert open_source("0").fps == 30


def test_a_camera_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = fake_opencv(monkeypatch, [])
    assert open_source("/dev/video2").name == "camera /dev/video2"
    assert cv2.opened == [("/dev/video2", cv2.CAP_V4L2)]


def test_cameras_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = fake_opencv(monkeypatch, [], opens=False)
    with pytest.raises(InputError, match="camera 0 cannot be opened: there is none, another program has it"):
        open_source("0")
    assert cv2.released
    with pytest.raises(InputError, match="cameras have numbers from 0 to 99, got 100"):
        open_source("100")
    fake_opencv(monkeypatch, [KeyError("bad colours")])
    with pytest.raises(InputError, match="camera 0 gives pictures that cannot be read: .*bad colours"):
        next(open_source("0").frames())
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(MissingPackage, match=r"driving with camera 0 needs the package cv2, .*'dagan-rt\[webcam\]'"):
        open_source("0")


def test_opencv_itself_finds_no_camera_there() -> None:
    pytest.importorskip("cv2")
    with pytest.raises(InputError, match="camera /dev/null cannot be opened: there is none"):
        open_source("/dev/null")


def missing(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def jpeg(gray: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (gray, gray, gray)).save(file, "JPEG", quality=95)
    return file.getvalue()


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server on this machine that answers every request so; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 (the library's name)
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, content: bytes, kind: str, length: int | None = None) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)


def send_mjpeg(handler: BaseHTTPRequestHandler, levels: list[int]) -> None:
    """What cameras in a network send: JPEG after JPEG."""
    handler.send_response(200)
    handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
    handler.end_headers()
    for gray in levels:
        image = jpeg(gray)
        head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(image)
        handler.wfile.write(head + image + b"\r\n")
        handler.wfile.flush()


def levels_until_broken(source: Any) -> tuple[list[int], str]:
    """The gray levels of a source's frames, and the sentence it breaks off with."""
    found: list[int] = []
    with pytest.raises(InputError) as caught:
        for image, _ in source.frames():
            found.append(level(image))
    return found, str(caught.value)


def test_a_network_camera_is_live_and_has_no_end() -> None:
    with serving(lambda handler: send_mjpeg(handler, LEVELS * 5)) as address:
        url = address.replace("//", "//someone:secret@") + "/camera"
        source = open_source(url)
        assert source.name == f"stream {address}/camera"
        dues = []
        found: list[int] = []
        with pytest.raises(InputError) as caught:
            for image, due in source.frames():
                dues.append(due)
                found.append(level(image))
        source.close()
    np.testing.assert_allclose(found, LEVELS * 5, atol=2)
    assert set(dues) == {None}  # each is given as it comes
    assert str(caught.value).startswith(f"stream {address}/camera broke off: ")


def test_a_broadcast_that_ends_breaks_off(tmp_path: Path) -> None:
    piece = make_clip(tmp_path / "piece.ts").read_bytes()
    with serving(lambda handler: send(handler, piece, "video/mp2t")) as address:
        source = open_source(address)
        found, sentence = levels_until_broken(source)
        source.close()
    np.testing.assert_allclose(found, LEVELS, atol=2)
    assert sentence == f"stream {address} broke off: the other side ended it"


def test_a_film_of_the_network_keeps_its_pace_and_ends(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", options={"movflags": "faststart"}).read_bytes()
    with serving(lambda handler: send(handler, clip, "video/mp4")) as address:
        source = open_source(address + "/clip.mp4")
        timed = list(source.frames())
        source.close()
    np.testing.assert_allclose([level(image) for image, _ in timed], LEVELS, atol=2)
    assert [due for _, due in timed] == pytest.approx([number / 25 for number in range(len(LEVELS))])


def test_a_film_cut_short_breaks_off(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 300).tolist()
    clip = make_clip(tmp_path / "clip.mp4", noise, options={"movflags": "faststart"}).read_bytes()
    with serving(lambda handler: send(handler, clip[: len(clip) // 2], "video/mp4", len(clip))) as address:
        source = open_source(address)
        found, sentence = levels_until_broken(source)
        source.close()
    assert 0 < len(found) < len(noise) and sentence.startswith(f"stream {address} broke off: ")


def test_streams_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = make_clip(tmp_path / "secret.ts")
    monkeypatch.setattr(camera, "PATIENCE", 0.3)
    released = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/silent":
            released.wait(LONG)
        elif handler.path == "/moved":
            handler.send_response(302)
            handler.send_header("Location", secret.as_uri())
            handler.end_headers()
        elif handler.path == "/list.m3u8":
            segment = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret.as_uri()}\n#EXT-X-ENDLIST\n"
            send(handler, segment.encode(), "application/vnd.apple.mpegurl")
        elif handler.path == "/text":
            send(handler, b"neither image nor video", "video/mp4")
        else:
            handler.send_error(404)

    with serving(answer) as address:
        for path, reason in [
            ("/silent", "no answer in 0 s"),
            ("/none", "Server returned 404 Not Found"),
            ("/text", "Invalid data found"),
            ("/moved", ""),
            ("/list.m3u8", ""),
        ]:
            with pytest.raises(InputError) as caught:
                open_source(address.replace("//", "//someone:secret@") + path)
            said = str(caught.value)
            assert said.startswith(f"stream {address}{path} cannot be opened: {reason}") and "secret" not in said
        released.set()
    for url in ("ftp://host/clip.mp4", "file:///clip.mp4", "concat://x"):
        with pytest.raises(InputError, match=f"stream {url} must start with http://, https://, rtsp://"):
            open_source(url)


def test_frames_of_a_stream_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda handler: send_mjpeg(handler, LEVELS * 5)) as address:
        source = open_source(address)
        monkeypatch.setattr("dagan_rt.video.MAX_PIXELS", 64 * 48 - 1)
        with pytest.raises(InputError, match="broke off: a frame of 64x48 is too large"):
            next(source.frames())
        source.close()
        with pytest.raises(InputError, match="is 64x48, more pixels a frame"):
            open_source(address)


def test_damaged_pictures_of_a_stream_are_left_out() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        handler.end_headers()
        for number, gray in enumerate(LEVELS * 5):
            image = jpeg(gray) if number != 20 else b"\xff\xd8 no picture at all"
            handler.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(image))
            handler.wfile.write(image + b"\r\n")

    with serving(answer) as address:
        source = open_source(address)
        found, _ = levels_until_broken(source)
        source.close()
    np.testing.assert_allclose(found, [gray for number, gray in enumerate(LEVELS * 5) if number != 20], atol=2)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="video none.mp4 does not exist"):
        open_source("none.mp4")
    (tmp_path / "text.mp4").write_text("neither image nor video")
    with pytest.raises(InputError, match="text.mp4 is not a video"):
        open_source(str(tmp_path / "text.mp4"))
