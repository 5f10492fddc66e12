"""Video in and out, checked against clips made and decoded with PyAV alone."""

from __future__ import annotations

import logging
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from dagan_rt import video
from dagan_rt.errors import InputError
from dagan_rt.video import VideoReader, VideoWriter

TONE = 440.0


def numbered(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame `index` of every test clip: its number as 8 gray bars (most significant on the left)."""
    bars = [235 if index >> bit & 1 else 20 for bit in range(7, -1, -1)]
    row = np.repeat(np.array(bars, np.uint8), width // 8)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def noisy(index: int, height: int, width: int) -> np.ndarray:
    """The same, hard to compress."""
    noise = np.random.default_rng(index).integers(-20, 20, (height, width, 3))
    return (numbered(index, height, width) + noise).clip(0, 255).astype(np.uint8)


def number_of(image: np.ndarray) -> int:
    """Read the number back."""
    height, width, _ = image.shape
    bars = image[height // 4 : -height // 4].mean(axis=(0, 2)).reshape(8, width // 8).mean(axis=1)
    return int(sum(1 << (7 - position) for position, level in enumerate(bars) if level > 127))


def make_clip(
    path: Path,
    frames: int = 30,
    *,
    rate: Fraction | int = 25,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (64, 48),
    audio: str | None = None,
    audio_rate: int = 48000,
    layout: str = "mono",
    times: list[Fraction] | None = None,
    rotation: int = 0,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    draw: Callable[[int, int, int], np.ndarray] = numbered,
) -> Path:
    """A clip of numbered frames; its sound is silence with a 50 ms tone at the start of each 10th frame."""
    width, height = size
    rate = Fraction(rate)
    with av.open(str(path), "w", options=muxer or {}) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if rotation:
            if not hasattr(av.VideoStream, "set_display_rotation"):
                pytest.skip("this release of PyAV cannot write a rotation")
            stream.set_display_rotation(rotation)
        sound: Any = output.add_stream(audio, rate=audio_rate) if audio else None
        if audio:
            sound.layout = layout
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(index, height, width), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[index] * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if audio:
            count = int(frames / rate * audio_rate)
            samples = beeps(count, audio_rate, float(10 / rate))
            for start in range(0, count, 1024):
                piece = np.repeat(samples[None, start : start + 1024], sound.codec_context.channels, axis=0)
                block = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format="fltp", layout=layout)
                block.sample_rate, block.pts, block.time_base = audio_rate, start, Fraction(1, audio_rate)
                output.mux(sound.encode(block))
            output.mux(sound.encode())
    return path


def beeps(count: int, rate: int, period: float) -> np.ndarray:
    time = np.arange(count) / rate
    return (0.6 * np.sin(2 * np.pi * TONE * time) * (time % period < 0.05)).astype(np.float32)


def decode_audio(path: Path, rate: int = 48000) -> np.ndarray | None:
    """The sound of a file as mono float samples from time 0, placed by the time stamps of its frames."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        samples = np.zeros(rate * 60, np.float32)
        end = 0
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
        for frame in container.decode(audio=0):
            for piece in resampler.resample(frame):
                start = max(0, round(piece.pts * piece.time_base * rate))
                block = piece.to_ndarray()[0]
                samples[start : start + len(block)] = block
                end = max(end, start + len(block))
    return samples[:end]


def decode_video(path: Path) -> list[tuple[Fraction, np.ndarray]]:
    with av.open(str(path)) as container:
        return [(frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def copy_clip(source: Path, target: Path, **options: Any) -> None:
    with (
        VideoReader(source) as reader,
        VideoWriter(
            target, reader.fps, reader.width, reader.height, source, time_base=reader.time_base, **options
        ) as writer,
    ):
        for frame in reader.timed():
            writer.write(*frame)


def error_of(action: Callable[[], Any], path: Path) -> str:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def read_all(path: Path) -> list[video.Frame]:
    with VideoReader(path) as reader:
        return list(reader.timed())


# Reading

CODECS = {
    "h264.mp4": {},
    "h264-444-10bit.mp4": {"pixels": "yuv444p10le"},
    "h265.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=error:pools=1"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg2.ts": {"codec": "mpeg2video"},
    "mpeg1.mpg": {"codec": "mpeg1video"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "mjpeg.mov": {"codec": "mjpeg", "pixels": "yuvj422p"},
    "ffv1.mkv": {"codec": "ffv1", "pixels": "bgr0"},
    "gray.mkv": {"codec": "ffv1", "pixels": "gray"},
    "moving.gif": {"codec": "gif", "pixels": "rgb8"},
    "raw.avi": {"codec": "rawvideo", "pixels": "bgr24"},
}


@pytest.mark.parametrize("name", CODECS)
def test_frames_of_any_codec_come_in_order_and_in_time(tmp_path: Path, name: str) -> None:
    path = make_clip(tmp_path / name, **CODECS[name])
    with VideoReader(path) as reader:
        assert (reader.width, reader.height) == (64, 48)
        assert reader.fps == 25
        assert not reader.has_audio
        assert reader.frame_count in (30, None)
        frames = list(reader.timed())
    assert [number_of(frame.image) for frame in frames] == list(range(30))
    for index, frame in enumerate(frames):
        assert frame.image.dtype == np.uint8 and frame.image.shape == (48, 64, 3) and frame.image.flags.c_contiguous
        assert abs(frame.time - Fraction(index, 25)) <= Fraction(1, 1000)
        assert abs(frame.duration - Fraction(1, 25)) <= Fraction(1, 1000)


@pytest.mark.parametrize(("width", "height"), [(2, 2), (16, 16), (34, 1280), (1920, 1080), (162, 90)])
def test_any_size(tmp_path: Path, width: int, height: int) -> None:
    path = make_clip(
        tmp_path / "clip.mp4", 3, size=(width, height), draw=lambda *a: np.full((a[1], a[2], 3), 99, np.uint8)
    )
    with VideoReader(path) as reader:
        images = list(reader)
    assert (reader.width, reader.height) == (width, height)
    assert len(images) == 3 and all(np.abs(image.astype(int) - 99).max() <= 2 for image in images)


def test_odd_sizes(tmp_path: Path) -> None:
    draw = lambda index, height, width: np.full((height, width, 3), 10 * index, np.uint8)  # noqa: E731
    path = make_clip(tmp_path / "odd.mkv", 3, size=(33, 17), codec="ffv1", pixels="bgr0", draw=draw)
    for index, frame in enumerate(read_all(path)):
        np.testing.assert_array_equal(frame.image, np.full((17, 33, 3), 10 * index))


@pytest.mark.parametrize("matrix", [1, 5])  # BT.709 and BT.601
def test_colours_follow_the_matrix_that_the_stream_names(tmp_path: Path, matrix: int) -> None:
    color = (200, 30, 60)
    path = tmp_path / "colour.mp4"
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("libx264", rate=25, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1
        # By hand, from the luma weights of the two standards.
        red, green, blue = (value / 255 for value in color)
        weight_red, weight_blue = (0.2126, 0.0722) if matrix == 1 else (0.299, 0.114)
        luma = weight_red * red + (1 - weight_red - weight_blue) * green + weight_blue * blue
        planes = (
            16 + 219 * luma,
            128 + 224 * (blue - luma) / (2 * (1 - weight_blue)),
            128 + 224 * (red - luma) / (2 * (1 - weight_red)),
        )
        yuv = np.concatenate([np.full((32, 32), planes[0]), np.full((8, 32), planes[1]), np.full((8, 32), planes[2])])
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.rint(yuv).astype(np.uint8), format="yuv420p")))
        output.mux(stream.encode())
    np.testing.assert_allclose(read_all(path)[0].image[16, 16].astype(int), color, atol=3)


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_the_display_rotation_is_applied(tmp_path: Path, angle: int) -> None:
    def corner(index: int, height: int, width: int) -> np.ndarray:
        image = np.full((height, width, 3), 20, np.uint8)
        image[: height // 2, : width // 2] = 235
        return image

    path = make_clip(tmp_path / "turned.mp4", 3, rotation=angle, draw=corner)
    expected = np.rot90(corner(0, 48, 64), angle // 90)  # the angle counts counter-clockwise, as rot90 does
    with VideoReader(path) as reader:
        assert (reader.height, reader.width) == expected.shape[:2]
        for image in reader:
            assert np.abs(image.astype(int) - expected).mean() < 4


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), lambda image: image),
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
        ((1, 0, 0, -1), lambda image: image[::-1]),
        ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    ],
)
def test_display_matrices_may_mirror(matrix: tuple[int, int, int, int], expected: Callable[..., np.ndarray]) -> None:
    """Each pixel goes where x' = a x + c y, y' = b x + d y sends it (the picture then moved back to the origin)."""
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    turned = video._turn(image, matrix)
    np.testing.assert_array_equal(turned, expected(image))
    a, b, c, d = matrix
    y, x = np.indices(image.shape[:2])
    new_x, new_y = a * x + c * y, b * x + d * y
    brute = np.zeros_like(turned)
    brute[new_y - new_y.min(), new_x - new_x.min()] = image
    np.testing.assert_array_equal(turned, brute)


def test_pixels_that_are_not_square_are_made_square(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "wide.mp4", 3, aspect=Fraction(2, 1))
    with VideoReader(path) as reader:
        assert (reader.width, reader.height) == (128, 48)
        assert [number_of(image) for image in reader] == [0, 1, 2]


def test_uneven_frame_times_are_kept(tmp_path: Path) -> None:
    times = [Fraction(n, 1000) for n in (0, 40, 80, 200, 233, 266, 700, 740)]
    path = make_clip(tmp_path / "uneven.mp4", len(times), times=times)
    assert [frame.time for frame in read_all(path)] == times


class Decoded:
    """What a clock reads of a decoded frame."""

    def __init__(self, pts: int | None, duration: int = 1) -> None:
        self.pts, self.duration, self.time_base = pts, duration, Fraction(1, 25)


@pytest.mark.parametrize("origin", [Fraction(4), None])
@pytest.mark.parametrize(
    ("pts", "expected"),
    [
        ([100, 101, 102], [0, 1, 2]),
        ([100, 101, 300, 301], [0, 1, 200, 201]),  # a picture that stands for eight seconds
        ([100, 101, 10_000_000, 10_000_001], [0, 1, 2, 3]),
        ([100, 101, 40, 41, 42], [0, 1, 2, 3, 4]),
        ([100, 101, 101, 103], [0, 1, 2, 3]),
        ([100, None, None, 103], [0, 1, 2, 3]),
    ],
)
def test_a_clock_goes_on_where_the_file_stands_still_or_jumps(
    pts: list[int | None], expected: list[int], origin: Fraction | None
) -> None:
    clock = video.Clock(Fraction(25), Fraction(1, 25), origin)
    read = [clock.read(Decoded(value)) for value in pts]  # type: ignore[arg-type]
    assert read == [(Fraction(value, 25), Fraction(1, 25)) for value in expected]


def test_a_clip_whose_header_names_no_start_starts_at_zero(tmp_path: Path) -> None:
    path = tmp_path / "clip.nut"
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(5):
            frame = av.VideoFrame.from_ndarray(numbered(index), format="rgb24")
            frame.pts, frame.time_base = 2500 + index, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    assert [frame.time for frame in read_all(path)] == [Fraction(index, 25) for index in range(5)]


def test_a_clip_that_starts_late_on_its_own_clock_starts_at_zero(tmp_path: Path) -> None:
    frames = read_all(make_clip(tmp_path / "clip.ts", codec="mpeg2video"))  # MPEG-TS starts at about 1.4 s
    assert frames[0].time == 0


def test_what_comes_before_the_first_key_frame_is_skipped(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "whole.ts", 60, options={"g": "20", "x264-params": "repeat-headers=1:scenecut=0"})
    content = whole.read_bytes()
    cut = tmp_path / "cut.ts"
    cut.write_bytes(content[len(content) // 8 // 188 * 188 :])
    numbers = [number_of(frame.image) for frame in read_all(cut)]
    assert 20 <= len(numbers) < 60 and numbers == list(range(60 - len(numbers), 60))


def test_packets_that_cannot_be_decoded_at_the_start_are_skipped(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mkv", 10, codec="mjpeg", pixels="yuvj420p")
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    content = path.read_bytes()
    for packet in packets[:3]:
        assert content.count(packet) == 1
        content = content.replace(packet, bytes(len(packet)))
    path.write_bytes(content)
    assert [number_of(frame.image) for frame in read_all(path)] == [3, 4, 5, 6, 7, 8, 9]


def test_iterating_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with VideoReader(make_clip(tmp_path / "clip.mp4", 10)) as reader:
        first = [number_of(image) for image, _ in zip(reader, range(4), strict=False)]
        rest = [number_of(image) for image in reader]
        assert first == [0, 1, 2, 3] and rest[-1] == 9
        assert list(reader) == []


def test_bad_files_give_one_sentence_each(tmp_path: Path) -> None:
    def reading(path: Path) -> str:
        return error_of(lambda: VideoReader(path), path)

    assert "does not exist" in reading(tmp_path / "missing.mp4")
    assert "is a folder" in reading(tmp_path)
    good = make_clip(tmp_path / "good.mp4").read_bytes()
    for name, content, expected in [
        ("empty.mp4", b"", "empty"),
        ("text.mp4", b"this is no video at all\n" * 50, "not a video"),
        ("cut.mp4", good[: len(good) // 2], "cut off"),
        ("playlist.m3u8", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n", "video"),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        assert expected in reading(path)
    with av.open(str(tmp_path / "sound.mp4"), "w") as output:
        sound: Any = output.add_stream("aac", rate=48000)
        sound.layout = "mono"
        block = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        block.sample_rate, block.pts = 48000, 0
        output.mux(sound.encode(block))
        output.mux(sound.encode())
    assert "no video stream" in reading(tmp_path / "sound.mp4")
    with av.open(str(tmp_path / "none.mkv"), "w") as output:
        stream: Any = output.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        output.start_encoding()
    assert "video" in reading(tmp_path / "none.mkv")


def test_a_frame_too_large_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_clip(tmp_path / "clip.mp4", 3)
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
    assert "64x48" in error_of(lambda: VideoReader(path), path)


def test_a_cut_clip_gives_what_is_there_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_clip(tmp_path / "clip.mp4", 100, muxer={"movflags": "faststart"}, draw=noisy)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING), VideoReader(path) as reader:
        numbers = [number_of(image) for image in reader]
    assert 10 < len(numbers) < 100 and numbers == list(range(len(numbers)))
    assert reader.problem
    assert f"only its first {len(numbers)} frames are used" in caplog.text and str(path) in caplog.text


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.gif", "clip.webm"])
def test_damaged_files_give_frames_or_an_input_error(tmp_path: Path, name: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "clip.mp4": {"audio": "aac"},
        "clip.mkv": {"audio": "flac"},
        "clip.avi": {"codec": "mpeg4", "audio": "pcm_s16le"},
        "clip.gif": {"codec": "gif", "pixels": "rgb8"},
        "clip.webm": {"codec": "libvpx", "audio": "libopus", "options": {"deadline": "realtime", "cpu-used": "8"}},
    }
    good = make_clip(tmp_path / name, 8, **settings[name]).read_bytes()
    bad_path, out = tmp_path / f"bad-{name}", tmp_path / "out.mp4"
    chance = random.Random(11)
    outcomes = {True: 0, False: 0}
    for _ in range(30):
        bad = bytearray(good)
        for _ in range(chance.choice((1, 8, 64))):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        bad_path.write_bytes(bytes(bad[: chance.randrange(1, len(bad))] if chance.random() < 0.3 else bad))
        try:
            with VideoReader(bad_path) as reader, VideoWriter(out, 25, 64, 48, bad_path) as writer:
                for frame in reader.timed():
                    if frame.image.shape == (48, 64, 3):
                        writer.write(*frame)
                fine = writer.frames_written > 0
        except InputError:
            fine = False
        outcomes[fine] += 1
        assert out.exists() == fine
        out.unlink(missing_ok=True)
    assert min(outcomes.values()) > 0


# Writing


def test_written_clips_play_back(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with VideoWriter(path, Fraction(30000, 1001), 64, 48) as writer:
        for index in range(40):
            writer.write(numbered(index))
        assert not path.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == Fraction(30000, 1001) and stream.frames == 40
        assert stream.duration is not None and stream.time_base is not None
        assert stream.duration * stream.time_base == 40 * Fraction(1001, 30000)
        assert not container.streams.audio
    decoded = decode_video(path)
    assert [number_of(image) for _, image in decoded] == list(range(40))
    assert [time for time, _ in decoded] == [Fraction(1001, 30000) * index for index in range(40)]
    current = os.umask(0)
    os.umask(current)
    assert path.stat().st_mode & 0o777 == 0o666 & ~current


@pytest.mark.parametrize("fps", [1, 12.5, 23.976, 29.97, 59.94, 240, Fraction(7, 3)])
def test_frame_rates(tmp_path: Path, fps: Any) -> None:
    with VideoWriter(tmp_path / "out.mp4", fps, 64, 48) as writer:
        for index in range(7):
            writer.write(numbered(index))
    with VideoReader(tmp_path / "out.mp4") as reader:
        assert reader.fps == pytest.approx(float(fps), rel=1e-4) and len(list(reader)) == 7


def test_colours_survive(tmp_path: Path) -> None:
    colors = [(200, 30, 60), (20, 180, 90), (255, 255, 255), (0, 0, 0), (40, 60, 220)]
    with VideoWriter(tmp_path / "out.mp4", 25, 64, 48, crf=1) as writer:
        for color in colors:
            writer.write(np.broadcast_to(np.array(color, np.uint8), (48, 64, 3)))
    for frame, color in zip(read_all(tmp_path / "out.mp4"), colors, strict=True):
        np.testing.assert_allclose(frame.image[24, 32].astype(int), color, atol=4)


def test_crf_trades_size_for_quality(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)
    sizes = []
    for crf in (5, 20, 45):
        with VideoWriter(tmp_path / "out.mp4", 25, 64, 48, crf=crf) as writer:
            for image in noise:
                writer.write(image)
        sizes.append((tmp_path / "out.mp4").stat().st_size)
    assert sizes[0] > 1.5 * sizes[1] > 2 * sizes[2]


def test_uneven_frame_times_are_written(tmp_path: Path) -> None:
    times = [Fraction(n, 1000) for n in (0, 40, 80, 200, 233, 266, 700, 740)]
    source = make_clip(tmp_path / "uneven.mp4", len(times), times=times)
    copy_clip(source, tmp_path / "out.mp4")
    assert [time for time, _ in decode_video(tmp_path / "out.mp4")] == times


def test_gif(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "clip.mp4", 20, audio="aac", rate=20)
    copy_clip(source, tmp_path / "out.gif")
    decoded = decode_video(tmp_path / "out.gif")
    assert [number_of(image) for _, image in decoded] == list(range(20))
    assert [time for time, _ in decoded] == [Fraction(index, 20) for index in range(20)]


SOUNDS = [
    # the driving clip, the result, and the codec expected in it
    ("clip.mp4", {"audio": "aac"}, "out.mp4", "aac"),
    ("clip.mp4", {"audio": "aac", "layout": "stereo", "audio_rate": 44100}, "out.mov", "aac"),
    ("clip.mp4", {"audio": "libmp3lame"}, "out.mp4", "mp3"),
    ("clip.ts", {"audio": "aac"}, "out.mp4", "aac"),
    ("clip.mkv", {"audio": "flac"}, "out.mp4", "aac"),
    ("clip.mkv", {"audio": "flac", "audio_rate": 44100, "layout": "stereo"}, "out.mkv", "flac"),
    ("clip.avi", {"codec": "mpeg4", "audio": "pcm_s16le", "audio_rate": 22050}, "out.mp4", "aac"),
    ("clip.avi", {"codec": "mpeg4", "audio": "pcm_s16le"}, "out.mov", "pcm_s16le"),
    ("clip.mkv", {"audio": "libopus"}, "out.mkv", "opus"),
    ("clip.mkv", {"audio": "libopus"}, "out.mp4", "aac"),
    ("clip.mkv", {"audio": "pcm_s16le", "layout": "5.1", "audio_rate": 37000}, "out.mp4", "aac"),
]


@pytest.mark.parametrize(("name", "settings", "target", "codec"), SOUNDS)
def test_the_sound_is_kept_in_step(
    tmp_path: Path, name: str, settings: dict[str, Any], target: str, codec: str
) -> None:
    source = make_clip(tmp_path / name, 75, **settings)
    copy_clip(source, tmp_path / target)
    with av.open(str(tmp_path / target)) as container:
        assert container.streams.audio[0].codec_context.codec.canonical_name == codec
    before, after = decode_audio(source), decode_audio(tmp_path / target)
    assert before is not None and after is not None
    # Both clocks are read against their own first picture; the beeps must lie where they lay, to a few milliseconds.
    before = before[round(decode_video(source)[0][0] * 48000) :]
    after = after[round(decode_video(tmp_path / target)[0][0] * 48000) :]
    length = min(len(before), len(after))
    assert abs(length / 48000 - 3) < 0.06
    assert abs(lag(before[:length], after[:length])) <= 0.008
    assert np.corrcoef(np.abs(before[:length]), np.abs(after[:length]))[0, 1] > 0.7


def lag(before: np.ndarray, after: np.ndarray, rate: int = 48000) -> float:
    """Seconds by which `after` comes late: the peak of the correlation of the two loudness curves (1 ms steps)."""
    step = rate // 1000
    curves = []
    for samples in (before, after):
        loud = np.abs(samples[: len(samples) // step * step]).reshape(-1, step).mean(axis=1)
        curves.append(loud - loud.mean())
    correlation = np.correlate(curves[1], curves[0], mode="full")
    return float(correlation.argmax() - (len(curves[0]) - 1)) / 1000


def test_copied_sound_is_the_same_bytes(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "clip.mp4", 50, audio="aac")
    copy_clip(source, tmp_path / "out.mp4")
    packets = []
    for path in (source, tmp_path / "out.mp4"):
        with av.open(str(path)) as container:
            packets.append([(packet.pts, bytes(packet)) for packet in container.demux(audio=0) if packet.size])
    assert len(packets[1]) >= len(packets[0]) - 1
    assert packets[1] == packets[0][: len(packets[1])]


def test_damaged_sound_does_not_cost_the_picture(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "clip.ts", 50, audio="aac")
    with av.open(str(source)) as container:
        sound = container.streams.audio[0].index
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        places = [packet.pos for packet in container.demux() if packet.stream.index == sound and packet.pos]
    for place in places[3:]:  # each a transport packet of 188 bytes
        content[place + 60 : place + 188] = b"\xff" * 128
    source.write_bytes(bytes(content))
    copy_clip(source, tmp_path / "out.mp4")
    assert [number_of(image) for _, image in decode_video(tmp_path / "out.mp4")] == list(range(50))


def test_the_sound_ends_with_the_picture(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "clip.mp4", 75, audio="aac")
    with VideoReader(source) as reader, VideoWriter(tmp_path / "out.mp4", 25, 64, 48, source) as writer:
        for frame, _ in zip(reader.timed(), range(25), strict=False):
            writer.write(*frame)
    sound = decode_audio(tmp_path / "out.mp4")
    assert sound is not None and abs(len(sound) / 48000 - 1) < 0.05


def test_sound_that_starts_late_stays_late(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "clip.mkv", 50, audio="flac", options={"bf": "0"})
    late = tmp_path / "late.mkv"
    with av.open(str(source)) as input_, av.open(str(late), "w") as output:
        streams = {stream.index: output.add_stream_from_template(stream) for stream in input_.streams}
        for packet in input_.demux():
            if not packet.size:
                continue
            if packet.stream.type == "audio":
                packet.pts += 300
                packet.dts += 300
            packet.stream = streams[packet.stream.index]
            output.mux(packet)
    for target in ("out.mkv", "out.mp4"):
        copy_clip(late, tmp_path / target)
        before, after = decode_audio(late), decode_audio(tmp_path / target)
        assert before is not None and after is not None
        assert np.abs(after[: round(0.29 * 48000)]).max() < 0.01 < np.abs(after[round(0.3 * 48000) :][:2400]).max()
        assert abs(lag(before[:90000], after[:90000])) <= 0.004


def test_a_clip_without_sound_gives_none(tmp_path: Path) -> None:
    copy_clip(make_clip(tmp_path / "clip.mp4"), tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert not container.streams.audio


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "clip.mp4", 2)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to(source)
    for name, expected in [
        ("out.xyz", "must end in"),
        ("out", "no extension"),
        ("missing/out.mp4", "does not exist"),
        ("folder.mp4", "is a folder"),
        ("clip.mp4", "also an input"),
        ("link.mp4", "also an input"),
        ("folder.mp4/../clip.mp4", "also an input"),
    ]:
        path = tmp_path / name
        assert expected in error_of(lambda path=path: VideoWriter(path, 25, 64, 48, source), path.parent)
    out = tmp_path / "out.mp4"
    assert "even" in error_of(lambda: VideoWriter(out, 25, 63, 48), out)
    for arguments, options in [((0, 64, 48), {}), ((25, 0, 48), {}), ((25, 64, 48), {"crf": 52})]:
        with pytest.raises(InputError):
            VideoWriter(out, *arguments, **options)
    missing = tmp_path / "none.mp4"
    assert "does not exist" in error_of(lambda: VideoWriter(out, 25, 64, 48, missing), missing)
    with VideoWriter(out, 25, 64, 48) as writer:
        for image in (np.zeros((48, 64, 3)), np.zeros((64, 48, 3), np.uint8), np.zeros((48, 64), np.uint8)):
            with pytest.raises(InputError, match="frame must be"):
                writer.write(image)
    assert not out.exists() and not [entry for entry in tmp_path.iterdir() if "partial" in entry.name]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    out.write_bytes(b"what was there before")
    with pytest.raises(RuntimeError), VideoWriter(out, 25, 64, 48) as writer:
        writer.write(numbered(0))
        raise RuntimeError
    assert out.read_bytes() == b"what was there before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("extension", ["mp4", "mkv", "gif"])
@pytest.mark.parametrize("limit", [0, 100, 50_000])
def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path, extension: str, limit: int) -> None:
    source = make_clip(tmp_path / "clip.mkv", 30, audio="flac")
    out = tmp_path / "result" / f"out.{extension}"
    out.parent.mkdir()
    script = (
        "import resource, sys, numpy as np\n"
        "from dagan_rt.video import VideoWriter\n"
        "noise = np.random.default_rng(0).integers(0, 256, (200, 48, 64, 3), dtype=np.uint8)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        "    with VideoWriter(sys.argv[1], 25, 64, 48, sys.argv[2], crf=1) as writer:\n"
        "        for image in noise:\n"
        "            writer.write(image)\n"
        f"        if {extension != 'mkv'}:\n"  # which writes seconds at a time
        "            sys.exit('noticed only at the end')\n"
        "except OSError as error:\n    print(type(error).__name__, error.filename, error.strerror)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(out), str(source)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == f"OSError {out} File too large" and done.stderr == ""
    assert list(out.parent.iterdir()) == []


def test_memory_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from dagan_rt.video import VideoReader, VideoWriter\n"
        "for source in sys.argv[2:]:\n"
        "    with VideoReader(source) as reader, VideoWriter(sys.argv[1], 25, 128, 96, source) as writer:\n"
        "        for frame in reader.timed():\n"
        "            writer.write(*frame)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    settings: dict[str, Any] = {"codec": "mpeg4", "audio": "flac", "layout": "stereo", "size": (128, 96)}
    short = make_clip(tmp_path / "short.mkv", 100, **settings)
    long = make_clip(tmp_path / "long.mkv", 400, **settings)  # decoded: 15 MB of pictures, 6 MB of sound
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out.mp4"), str(short), str(long)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    after_short, after_long = map(int, done.stdout.split())
    assert after_long - after_short < 5_000, "kilobytes"


def test_display_matrix_bytes_are_read_as_the_format_lays_them_out() -> None:
    class Data:
        type = video.SideDataType.DISPLAYMATRIX

        def __bytes__(self) -> bytes:
            return struct.pack("=9i", 0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30)

    class Decoded:
        side_data = [Data()]

    assert video._display_matrix(Decoded()) == (0, -65536, 65536, 0)
