"""The sound of one clip, carried over into another container in step with its pictures."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.container

from dagan_rt.files import open_input

log = logging.getLogger(__name__)

# What a container takes and common players play; anything else is encoded as AAC (so is Opus in MP4, which few play).
COPIED = {
    "mp4": {"aac", "mp3", "ac3", "eac3", "alac"},
    "mov": {"aac", "mp3", "ac3", "eac3", "alac", "pcm_s16le", "pcm_s24le"},
    "matroska": {"aac", "mp3", "ac3", "eac3", "alac", "opus", "vorbis", "flac", "pcm_s16le", "pcm_s24le"},
}
LONGEST_STEP = 3600  # seconds
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)


def open_media(file: Any) -> Any:
    """An open file as a PyAV container, whatever its tags hold; raises what PyAV raises."""
    # A playlist inside the file may not make the reader open the network.
    network_off = {"protocol_whitelist": "file"}
    return av.open(file, "r", metadata_errors="ignore", container_options=network_off, buffer_size=1 << 17)


def kept_audio(container: Any) -> Any | None:
    """The audio stream of an open container that is carried over: the first one that can be decoded, or None."""
    for stream in container.streams.audio:
        if stream.codec_context is not None and stream.codec_context.sample_rate > 0:
            return stream
    return None


def start_time(container: Any) -> Fraction | None:
    """Second at which the clip starts on its own clock: the earlier start of its picture and its sound, if known."""
    streams = [*container.streams.video[:1], kept_audio(container)]
    known = [s for s in streams if s is not None and s.start_time is not None and s.time_base]
    return min((stream.start_time * stream.time_base for stream in known), default=None)


class Joined:
    """A clock without jumps: recordings that were joined start over, or leap ahead, in the middle.

    Picture and sound leap together, so both are read through one of these. Steps back by up to a second (frames out
    of order) and ahead by up to `LONGEST_STEP` (a slide that stands) are believed.
    """

    def __init__(self) -> None:
        self.shift = Fraction(0)
        self._last: Fraction | None = None

    def read(self, time: Fraction, period: Fraction) -> Fraction:
        """The steady time of `time`; at a jump it goes on `period` seconds after the last one."""
        time -= self.shift
        if self._last is not None and not -1 <= time - self._last <= LONGEST_STEP:
            self.shift += time - (self._last + period)
            time = self._last + period
        self._last = time
        return time


class AudioTrack:
    """Reads the sound of a clip just as far as the pictures have come, and writes it beside them."""

    def __init__(self, path: Path, file: Any, container: Any, stream: Any, output: Any) -> None:
        self.path, self._file, self._container, self._stream, self._output = path, file, container, stream, output
        self._origin = start_time(container)
        if stream.codec_context.codec.canonical_name in COPIED[output.format.name]:
            self._target = output.add_stream_from_template(stream)
            self._packets = self._checked(self._copied())
        else:
            rate = stream.codec_context.sample_rate
            self._target = output.add_stream("aac", rate=rate if rate in AAC_RATES else 48000)
            self._target.codec_context.layout = "mono" if stream.codec_context.channels == 1 else "stereo"
            self._packets = self._checked(self._encoded())
        self._waiting: Any | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], output: Any) -> AudioTrack | None:
        """Add the sound of the clip at `path` to an output container; None, with nothing added, if it has none."""
        path = Path(path)
        file = open_input(path, "video")
        container = None
        try:
            container = open_media(file)
            stream = kept_audio(container)
            if stream is not None:
                return cls(path, file, container, stream, output)
            if container.streams.audio:
                log.warning("the sound of %s is in a form that cannot be read: the result has no sound", path)
        except (av.error.FFmpegError, ValueError) as error:
            log.warning("the sound of %s cannot be kept (%s): the result has no sound", path, error)
        if container is not None:
            container.close()
        file.close()
        return None

    def write_until(self, end: Fraction) -> None:
        """Write every packet that starts before `end` seconds."""
        while True:
            packet = self._waiting or next(self._packets, None)
            self._waiting = packet
            if packet is None or packet.dts * packet.time_base >= end:
                return
            self._waiting = None
            try:
                self._output.mux(packet)
            except av.error.FFmpegError as error:  # the container's own parser refuses what was copied into it
                self._warn(packet.dts * packet.time_base, error)
                self._packets = iter(())

    def _checked(self, packets: Iterator[Any]) -> Iterator[Any]:
        """End the sound, not the video, where its file is damaged; a muxer takes only rising times."""
        last: Fraction | None = None
        try:
            for packet in packets:
                time = packet.dts * packet.time_base
                if last is None or time > last:
                    last = time
                    yield packet
        except (av.error.FFmpegError, ValueError) as error:
            self._warn(last or Fraction(0), error)

    def _warn(self, time: Fraction, error: Exception) -> None:
        log.warning("the sound of %s is damaged and ends at %.2f s: %s", self.path, float(time), error)

    def _copied(self) -> Iterator[Any]:
        joined = Joined()
        for packet in self._container.demux(self._stream):
            if packet.size == 0:
                continue  # the demuxer's end mark
            pts = packet.pts if packet.pts is not None else packet.dts
            if pts is None or not _decodable(packet):
                continue
            shift = self._shift(joined, pts, packet)
            packet.dts = (packet.dts if packet.dts is not None else pts) - shift
            packet.pts = pts - shift
            if packet.duration and packet.duration * packet.time_base > LONGEST_STEP:
                packet.duration = 0  # damage; the container works it out
            packet.stream = self._target
            yield packet

    def _encoded(self) -> Iterator[Any]:
        joined = Joined()
        context = self._target.codec_context
        resampler = av.AudioResampler(format="fltp", layout=context.layout.name, rate=context.sample_rate)
        for frame in self._container.decode(self._stream):
            if frame.pts is not None:
                frame.pts -= self._shift(joined, frame.pts, frame)
            for converted in resampler.resample(frame):
                yield from self._target.encode(converted)
        for converted in resampler.resample(None):
            yield from self._target.encode(converted)
        yield from self._target.encode(None)

    def _shift(self, joined: Joined, pts: int, piece: Any) -> int:
        """Ticks by which the times of a packet or frame are too large."""
        if self._origin is None:
            self._origin = pts * piece.time_base
        joined.read(pts * piece.time_base - self._origin, (piece.duration or 0) * piece.time_base)
        return round((self._origin + joined.shift) / piece.time_base)

    def close(self) -> None:
        self._packets = iter(())
        self._container.close()
        self._file.close()


def _decodable(packet: Any) -> bool:
    """Whether the packet's own decoder takes it; one that it refuses could spoil the whole container it is put in."""
    try:
        packet.decode()
    except av.error.FFmpegError:
        return False
    return True
