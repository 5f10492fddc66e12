"""Driving frames as they happen: of a camera, a file at its own pace or a stream of the network; the newest alone."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import av
import numpy as np

from dagan_rt.errors import InputError, require
from dagan_rt.video import Clock, VideoReader, picture_stream, sane_rate, upright_rgb

SCHEMES = ("http", "https", "rtsp", "rtsps", "rtmp", "rtmps")
# What a stream may lead on to, by a redirection or a playlist: the network, never a file of this machine.
PROTOCOLS = "http,https,httpproxy,tcp,tls,crypto,rtsp,rtsps,rtp,srtp,udp,rtmp,rtmps"
SEGMENTED = {"hls", "dash"}  # formats that come in pieces of seconds, which are not all to be shown at once
CAMERAS = 100  # OpenCV takes larger numbers for kinds of cameras
PATIENCE = 10.0  # seconds that a camera or the network may give nothing
CLOSING = 2.0  # seconds that closing waits for a read under way; after that the thread ends by itself, later


class Timed(NamedTuple):
    """One frame of a source."""

    image: np.ndarray  # uint8 [H, W, 3], RGB
    due: float | None  # seconds since the source's start when it is to be given; None: as soon as it is there


class Source(Protocol):
    """Where driving frames come from."""

    name: str  # as errors name it: "camera 0"
    fps: Fraction  # frames a second, as far as it knows
    mirrored: bool  # whether who is filmed looks at the picture, and expects a mirror
    patience: float | None  # seconds without a frame after which it is given up; None: however long it takes

    def frames(self) -> Iterator[Timed]:
        """The frames, in order; InputError for a source that breaks off."""

    def close(self) -> None:
        """Let go of the device, file or connection. May be called twice."""


def open_source(driver: str) -> Source:
    """Open what `--driver` names: a camera's number or device, a URL of `SCHEMES`, or a video file.

    Raises InputError if it names nothing that can be opened, or holds no video.
    """
    if driver.isdecimal():
        if int(driver) >= CAMERAS:
            raise InputError(f"cameras have numbers from 0 to {CAMERAS - 1}, got {driver}")
        return Camera(int(driver))
    if driver.startswith("/dev/"):
        return Camera(driver)
    if "://" in driver:
        return Stream(driver)
    return File(driver)


class Camera:
    """A camera of this machine, through OpenCV."""

    mirrored = True
    patience: float | None = PATIENCE

    def __init__(self, device: int | str) -> None:
        """device: its number, or its path on Linux. Raises InputError if there is none or it gives no picture."""
        self.name = f"camera {device}"
        self._cv2 = cv2 = require("cv2", extra="webcam", why=f"driving with {self.name}")
        # A path is taken for a film's unless the kind is named.
        self._device = cv2.VideoCapture(device, cv2.CAP_ANY if isinstance(device, int) else cv2.CAP_V4L2)
        if not self._device.isOpened():
            self.close()
            raise InputError(
                f"{self.name} cannot be opened: there is none, another program has it, or this one may not use cameras"
            )
        told = self._device.get(cv2.CAP_PROP_FPS)
        self.fps = sane_rate(Fraction(told).limit_denominator(1000) if 1 <= told <= 1000 else Fraction(30))

    def frames(self) -> Iterator[Timed]:
        """As in `Source`; a camera has no end, so each ending is one to tell."""
        while True:
            try:
                good, image = self._device.read()
            except self._cv2.error as error:
                raise InputError(f"{self.name} gives pictures that cannot be read: {error}") from error
            if not good:
                raise InputError(f"{self.name} gives no more pictures: it was unplugged, or another program took it")
            yield Timed(np.ascontiguousarray(image[:, :, ::-1]), None)

    def close(self) -> None:
        """As in `Source`."""
        self._device.release()


class File:
    """A video file, at its own pace."""

    mirrored = False
    patience: float | None = None

    def __init__(self, path: str) -> None:
        """Raises InputError as `VideoReader` does."""
        self.name = f"video {path}"
        self._reader = VideoReader(path)
        self.fps = self._reader.fps

    def frames(self) -> Iterator[Timed]:
        """As in `Source`."""
        return (Timed(frame.image, float(frame.time)) for frame in self._reader.timed())

    def close(self) -> None:
        """As in `Source`."""
        self._reader.close()


class Stream:
    """A stream of the network: what is live as it comes, a film or pieces of a broadcast at their own pace.

    What the other side sends is not trusted: frames are bounded as those of files, and neither opening nor reading
    waits longer than `PATIENCE` for an answer.
    """

    mirrored = False
    patience: float | None = PATIENCE

    def __init__(self, url: str) -> None:
        """Raises InputError for a URL of another scheme, one that does not answer, and one that gives no video."""
        self.name = f"stream {without_password(url)}"
        if url.partition("://")[0].lower() not in SCHEMES:
            raise InputError(f"{self.name} must start with {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
        # TCP: pictures with holes drive badly.
        options = {"protocol_whitelist": PROTOCOLS, "rtsp_transport": "tcp"}
        try:
            self._container = av.open(
                url, timeout=(PATIENCE, PATIENCE), metadata_errors="ignore", container_options=options
            )
        except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
            raise InputError(f"{self.name} cannot be opened: {_reason(error)}") from None
        try:
            self._stream = picture_stream(self._container, self.name)
        except InputError:
            self.close()
            raise
        self.fps = sane_rate(self._stream.average_rate, self._stream.guessed_rate)
        self._ends = bool(self._container.duration)
        self._paced = self._ends or not SEGMENTED.isdisjoint(self._container.format.name.split(","))

    def frames(self) -> Iterator[Timed]:
        """As in `Source`; what is live has no end, so each ending is one to tell."""
        clock = Clock(self.fps, self._stream.time_base or 1 / self.fps, None)
        try:
            for packet in self._container.demux(self._stream):
                for decoded in _decode(packet):
                    image = upright_rgb(decoded, self._stream.sample_aspect_ratio)
                    yield Timed(image, float(clock.read(decoded)[0]) if self._paced else None)
        except (av.error.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
            raise InputError(f"{self.name} broke off: {_reason(error)}") from None
        if not self._ends:
            raise InputError(f"{self.name} broke off: the other side ended it")

    def close(self) -> None:
        """As in `Source`."""
        self._container.close()


def _decode(packet: Any) -> list[Any]:
    """The frames of a packet; none of a damaged one, as networks lose some."""
    try:
        return packet.decode()
    except av.error.InvalidDataError:
        return []


def _reason(error: Exception) -> str:
    """Why a stream failed; without the URL, which may hold a password."""
    if isinstance(error, av.error.ExitError):  # how PyAV ends what takes longer than its timeout
        return f"no answer in {PATIENCE:.0f} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def without_password(url: str) -> str:
    """A URL as it may be shown: what stands before @ in its address is left out."""
    return re.sub(r"(?<=://)[^/?#]*@", "", url)


class Captured(NamedTuple):
    """A frame and when it was there."""

    image: np.ndarray  # uint8 [H, W, 3], RGB
    time: float  # seconds by the capture's clock


class Capture:
    """Reads a source in a thread of its own and keeps the newest frame: who is slow sees fewer frames, not older ones.

        with Capture(open_source("0")) as capture:
            capture.start()
            while not capture.ended:
                captured = capture.take(0.1)

    Attributes: `source`, which it closes; `dropped`, how many frames were replaced before anybody took them.
    """

    def __init__(
        self,
        source: Source,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        """clock: gives seconds. wait: lets the thread wait so many seconds for a frame that is due later."""
        self.source, self.dropped = source, 0
        self._clock = clock
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._newest: Captured | None = None
        self._failure: Exception | None = None
        self._over = False
        # A daemon: a camera or network that answers nobody must not keep the program from ending.
        self._thread = threading.Thread(target=self._read, name="capture", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the source is at its end and its last frame was taken."""
        with self._changed:
            return self._over and self._newest is None

    def take(self, timeout: float) -> Captured | None:
        """The newest frame that was not taken yet; None if none comes within `timeout` seconds, or none ever will.

        Raises what broke the source off, once the last frame before that was taken.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None or self._over, timeout)
            captured, self._newest = self._newest, None
            if captured is None and self._failure is not None:
                raise self._failure
            return captured

    def close(self) -> None:
        """End the thread and close the source."""
        self._stopped.set()
        if self._thread.ident is None:
            self.source.close()
        else:
            self._thread.join(CLOSING)

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self) -> None:
        try:
            self._read_frames()
        except Exception as error:
            self._failure = error
        finally:
            self.source.close()  # here alone: another thread may not, while this one reads
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _read_frames(self) -> None:
        start: float | None = None
        for image, due in self.source.frames():
            if due is not None:
                start = self._clock() - due if start is None else start
                if (early := start + due - self._clock()) > 0:
                    self._wait(early)
            if self._stopped.is_set():
                return
            with self._changed:
                self.dropped += self._newest is not None
                self._newest = Captured(image, self._clock())
                self._changed.notify_all()
