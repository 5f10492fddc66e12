"""Video clips in and out, one frame at a time: whatever the file holds, the library sees HWC uint8 RGB."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import av
import av.container
import av.filter
import numpy as np
from av.sidedata.sidedata import Type as SideDataType

from dagan_rt.audio import LONGEST_STEP, AudioTrack, Joined, kept_audio, open_media, start_time
from dagan_rt.errors import InputError
from dagan_rt.files import AtomicFile, check_output, open_input
from dagan_rt.images import check_picture

log = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
LONGEST = 10_000_000  # seconds; times beyond are damage, and would overflow the clocks of containers
BT601 = 5  # colour matrix, as the scaler numbers it
WRITABLE = (".mp4", ".m4v", ".mov", ".mkv", ".gif")
FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".gif": "gif"}


class Frame(NamedTuple):
    """One picture of a clip and when it is shown."""

    image: np.ndarray  # uint8 [H, W, 3], RGB
    time: Fraction  # seconds since the start of the clip, strictly increasing
    duration: Fraction  # seconds


class VideoReader:
    """Decode a clip frame by frame, at constant memory.

        with VideoReader("clip.mp4") as reader:
            for image in reader: ...            # HWC uint8 RGB, upright, square pixels
            for image, time, duration in reader.timed(): ...

    Iterating goes on where the last iteration stopped; for a second pass open a second reader. A clip that turns out
    damaged after at least one good frame ends there, with a logged warning and `problem` set.

    Attributes: `path`; `fps` (average, a Fraction); `frame_count` (what the file's header says, or None);
    `width` and `height` of the first frame as it is shown; `has_audio`; `time_base` (seconds a clock tick);
    `frames_read`; `problem` (why the clip ended early, or None).

    Raises `InputError` for a file that is missing, not a video, without a picture stream, without any frame that can
    be decoded, or over `MAX_PIXELS` a frame.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.frames_read = 0
        self.problem: str | None = None
        self._file = open_input(path, "video")
        try:
            self._container = open_container(self._file, self.path)
            self._stream = picture_stream(self._container, f"video {self.path}")
            self._origin = start_time(self._container)
            self.fps = sane_rate(self._stream.average_rate, self._stream.guessed_rate)
            self.time_base = self._stream.time_base or 1 / self.fps
            self.frame_count = self._stream.frames or None
            self.has_audio = kept_audio(self._container) is not None
            self._frames = self._decode()
            self._first = next(self._frames, None)
            if self._first is None:
                reason = f": {self.problem}" if self.problem else ""
                raise InputError(f"video {self.path} holds no frame that can be decoded{reason}")
            self.height, self.width, _ = self._first.image.shape
        except BaseException:
            self.close()
            raise

    def _decode(self) -> Iterator[Frame]:
        clock = Clock(self.fps, self.time_base, self._origin)
        try:
            for packet in self._container.demux(self._stream):
                for decoded in self._decode_packet(packet, may_fail=clock.last is None):
                    image = upright_rgb(decoded, self._stream.sample_aspect_ratio)
                    time, duration = clock.read(decoded)
                    yield Frame(image, time, duration)
        except (av.error.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
            self.problem = getattr(error, "strerror", None) or str(error) or type(error).__name__

    def _decode_packet(self, packet: Any, may_fail: bool) -> list[Any]:
        try:
            return packet.decode()
        except av.error.FFmpegError:
            if may_fail:  # a recording may begin between two key frames; what comes before the first is no loss
                return []
            raise

    def timed(self) -> Iterator[Frame]:
        """The remaining frames with their times; see `Frame`."""
        while True:
            frame, self._first = self._first, None
            frame = frame or next(self._frames, None)
            if frame is None:
                break
            self.frames_read += 1
            yield frame
        if self.problem:
            log.warning(
                "video %s is damaged (%s): only its first %d frames are used", self.path, self.problem, self.frames_read
            )

    def __iter__(self) -> Iterator[np.ndarray]:
        return (frame.image for frame in self.timed())

    def close(self) -> None:
        container = getattr(self, "_container", None)
        if container is not None:
            container.close()
        self._file.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Clock:
    """Times of decoded frames, also where the file gives none, lets them stand still, or jumps."""

    def __init__(self, fps: Fraction, tick: Fraction, origin: Fraction | None) -> None:
        self.period, self.tick, self.origin = 1 / fps, tick, origin
        self.last: Fraction | None = None
        self._joined = Joined()

    def read(self, frame: Any) -> tuple[Fraction, Fraction]:
        """When the next frame is shown and for how long, in seconds."""
        tick = frame.time_base or self.tick
        if frame.pts is not None:
            if self.origin is None:
                self.origin = frame.pts * tick
            time = max(self._joined.read(frame.pts * tick - self.origin, self.period), Fraction(0))
        else:
            time = Fraction(0) if self.last is None else self.last + self.period
        if self.last is not None and time <= self.last:
            time = self.last + self.tick
        if time > LONGEST:
            raise ValueError(f"a frame is to be shown after {float(time):.3g} seconds")
        self.last = time
        duration = (frame.duration or 0) * tick
        return time, duration if 0 < duration <= LONGEST_STEP else self.period


def open_container(file: Any, path: Path) -> Any:
    """Open a media file for reading, or raise `InputError`."""
    try:
        return open_media(file)
    except (av.error.FFmpegError, ValueError, OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"video {path} is not a video this program reads, or is cut off: {reason}") from None


def picture_stream(container: Any, name: str) -> Any:
    """The video stream of an open container, its frames bounded by `MAX_PIXELS`; `name` stands in errors.

    Raises `InputError` if there is none, it cannot be decoded, or its frames are larger.
    """
    # A song's cover picture is a video stream of one frame too.
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise InputError(f"{name} has no video stream")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise InputError(f"{name} has a video stream of a codec that cannot be decoded")
    if context.width * context.height > MAX_PIXELS:
        raise InputError(
            f"{name} is {context.width}x{context.height}, more pixels a frame than the "
            f"{MAX_PIXELS // 1_000_000} million allowed"
        )
    # The size may change within a stream; the decoder itself refuses to allocate more.
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def sane_rate(*rates: Fraction | None) -> Fraction:
    """The first rate that a video can have, in frames a second; 25 if none can."""
    for rate in rates:
        if rate is not None and Fraction(1, 60) <= rate <= 1000:
            return Fraction(rate)
    return Fraction(25)


def upright_rgb(frame: Any, aspect: Fraction | None = None) -> np.ndarray:
    """A decoded frame as uint8 [H, W, 3] RGB, turned as its display matrix says, its pixels made square.

    `aspect` is the width of a pixel over its height.
    """
    if frame.width * frame.height > MAX_PIXELS:
        raise ValueError(f"a frame of {frame.width}x{frame.height} is too large")
    width, height = frame.width, frame.height
    if aspect and aspect != 1 and Fraction(1, 4) <= aspect <= 4:
        width = max(1, round(width * aspect))
    # RGB has no colour matrix to convert to, but PyAV 16 heeds the frame's own one only if a target is named.
    image = frame.to_ndarray(format="rgb24", width=width, height=height, dst_colorspace=BT601)
    return np.ascontiguousarray(_turn(image, _display_matrix(frame)))


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the 16.16 fixed-point map x' = a x + c y, y' = b x + d y; identity when there is none."""
    for data in frame.side_data:
        if data.type == SideDataType.DISPLAYMATRIX and len(bytes(data)) >= 36:
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
            return a, b, c, d
    return 1, 0, 0, 1


def _turn(image: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Apply the multiple of 90 degrees, and the mirroring, nearest to the display matrix."""
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, flip_x, flip_y = image.transpose(1, 0, 2), c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    return image[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


class VideoWriter:
    """Encode a clip frame by frame, at constant memory: H.264 (yuv420p) in MP4, MOV or MKV, or an animated GIF.

        with VideoWriter("out.mp4", fps=25, width=256, height=256, audio_from="clip.mp4") as writer:
            writer.write(image)                      # the next frame, 1 / fps after the last one
            writer.write(image, time, duration)      # or at a time in seconds, as `VideoReader.timed` gives it

    Arguments: `fps` (frames a second); `width`, `height` (even, except for GIF); `audio_from` (a clip whose sound is
    kept up to the end of the last frame: copied where the container takes its codec, else encoded as AAC; a clip
    without sound, and GIF, give none); `crf` (0 lossless .. 51 worst); `time_base` (seconds a clock tick; pass the
    reader's to keep uneven frame times exact).

    The file is written under a temporary name beside `path` and renamed by `close`; `discard`, or leaving the `with`
    block by an exception, deletes it, and so does closing without a frame.

    Raises `InputError` for bad arguments, and `OSError` naming the file when it cannot be written (disk full).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: Fraction | float,
        width: int,
        height: int,
        audio_from: str | os.PathLike[str] | None = None,
        *,
        crf: int = 18,
        time_base: Fraction | None = None,
    ) -> None:
        self.path = check_output(path, WRITABLE, inputs=[audio_from] if audio_from is not None else [])
        self.fps = Fraction(fps).limit_denominator(1_000_000)
        self.frames_written = 0
        self._is_gif = self.path.suffix.lower() == ".gif"
        self._check_arguments(width, height, crf)
        self._shape = (height, width, 3)
        self._tick = Fraction(1, 100) if self._is_gif else _fine_enough(time_base, self.fps)
        self._last_tick = -1
        self._end = Fraction(0)
        self._closed = False
        self._audio: AudioTrack | None = None
        self._file = AtomicFile(self.path)
        try:
            with self._explained():
                self._open(crf, audio_from)
        except BaseException:
            self.discard()
            raise

    def _check_arguments(self, width: int, height: int, crf: int) -> None:
        if self.fps <= 0 or self.fps > 1000:
            raise InputError(f"fps must be over 0 and at most 1000, got {self.fps}")
        if width < 1 or height < 1 or width * height > MAX_PIXELS:
            raise InputError(f"a video of {width}x{height} cannot be written to {self.path}")
        if not self._is_gif and (width % 2 or height % 2):
            raise InputError(f"H.264 needs an even width and height, got {width}x{height} for {self.path}")
        if not 0 <= crf <= 51:
            raise InputError(f"crf must be between 0 and 51, got {crf}")

    def _open(self, crf: int, audio_from: str | os.PathLike[str] | None) -> None:
        height, width, _ = self._shape
        self._container = av.open(self._file, "w", format=FORMATS[self.path.suffix.lower()], buffer_size=1 << 17)
        self._palette = _palette_graph(width, height, self._tick) if self._is_gif else None
        options = {} if self._is_gif else {"crf": str(crf)}
        self._stream: Any = self._container.add_stream(
            "gif" if self._is_gif else "libx264", rate=self.fps, options=options
        )
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "pal8" if self._is_gif else "yuv420p"
        self._stream.codec_context.time_base = self._stream.time_base = self._tick
        if not self._is_gif:
            # Said aloud, for players guess from the size when a file says nothing: BT.601, limited range.
            context = self._stream.codec_context
            context.colorspace, context.color_primaries, context.color_trc, context.color_range = 6, 6, 6, 1
            if audio_from is not None:
                self._audio = AudioTrack.open(audio_from, self._container)

    def write(self, image: np.ndarray, time: Fraction | float | None = None, duration: Fraction | None = None) -> None:
        """Encode uint8 [H, W, 3] RGB of the writer's size, shown at `time` seconds for `duration` seconds."""
        check_picture(image, "frame")
        if image.shape != self._shape:
            raise InputError(f"frame must be [H, W, 3] = {self._shape}, got {image.shape}")
        if time is None:
            time = self._end if self.frames_written else Fraction(0)
        tick = max(round(Fraction(time) / self._tick), self._last_tick + 1)
        duration = Fraction(duration) if duration else 1 / self.fps
        with self._explained():
            if self._audio is not None:
                self._audio.write_until(tick * self._tick)
            self._encode(image, tick, duration)
        self._last_tick = tick
        self._end = Fraction(time) + duration
        self.frames_written += 1

    def _encode(self, image: np.ndarray, tick: int, duration: Fraction) -> None:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        if self._palette is not None:
            frame.pts, frame.time_base = tick, self._tick
            self._palette.push(frame)
            frame = self._palette.pull()
        frame.pts, frame.time_base = tick, self._tick
        frame.duration = max(1, round(duration / self._tick))
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file and put it in place; deletes it if no frame was written. Calling it again does nothing."""
        if self._closed:
            return
        if not self.frames_written:
            self.discard()
            return
        try:
            with self._explained():
                if self._audio is not None:
                    self._audio.write_until(self._end)
                    self._audio.close()
                self._container.mux(self._stream.encode())
                self._container.close()
            self._file.commit()
        except BaseException:
            self.discard()
            raise
        self._closed = True

    def discard(self) -> None:
        """Give the file up: nothing new is left on the disk."""
        if self._closed:
            return
        self._closed = True
        if self._audio is not None:
            self._audio.close()
        # Unfinished or never opened, closing may fail; the file goes anyway.
        with contextlib.suppress(AttributeError, av.error.FFmpegError, OSError, ValueError):
            self._container.close()
        self._file.discard()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise the disk's own error where there is one, and a sentence where the encoder gave up."""
        try:
            yield
        except av.error.FFmpegError as error:
            self._file.check()
            raise InputError(f"video {self.path} cannot be encoded: {error.strerror or error}") from error
        self._file.check()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def _fine_enough(time_base: Fraction | None, fps: Fraction) -> Fraction:
    """The given clock tick, or one that frames at `fps` hit exactly and other times to a ten-thousandth of a second."""
    if time_base is not None and 0 < time_base < 1 / fps:
        return Fraction(time_base)
    return Fraction(1, fps.numerator * -(-10_000 // fps.numerator))


def _palette_graph(width: int, height: int, tick: Fraction) -> Any:
    """Reduce each frame to a palette of its own 256 colours."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=tick)
    split, sink = graph.add("split"), graph.add("buffersink")
    make, use = graph.add("palettegen", "stats_mode=single"), graph.add("paletteuse", "new=1")
    source.link_to(split)
    split.link_to(make, output_idx=0)
    split.link_to(use, output_idx=1)
    make.link_to(use, input_idx=1)
    use.link_to(sink)
    graph.configure()
    return graph
