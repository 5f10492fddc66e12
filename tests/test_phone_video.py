"""A clip as a phone records it, upright 1080p stored lying down, of uneven frame times, with sound, from end to end."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dagan_rt.cli import main

TICK = Fraction(1, 600)  # of the clock
RATE = 48000
FLASH = 31  # the frame in which the wall lights up, when a beep begins


@pytest.fixture(scope="module")
def times() -> list[Fraction]:
    """About 30 a second, now early, now late, one frame missing."""
    steps = np.random.default_rng(0).integers(14, 28, 60)
    steps[20] += 20
    return [int(tick) * TICK for tick in np.concatenate([[0], steps.cumsum()])]


def face_at(number: int) -> tuple[int, int]:
    """The portrait's upper left corner in the upright picture of 1080 × 1920: it walks down and to the side."""
    return 120 + 5 * number, 300 + 8 * number


def record(path: Path, portrait: np.ndarray, times: list[Fraction]) -> Path:
    face = np.asarray(Image.fromarray(portrait).resize((512, 512)))
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("libx264", rate=30, options={"crf": "23", "preset": "ultrafast"})
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this release of PyAV cannot write a rotation")
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        stream.codec_context.time_base = stream.time_base = TICK
        stream.set_display_rotation(90)  # shown a quarter turn counter-clockwise
        sound: Any = output.add_stream("aac", rate=RATE, layout="mono")
        for number, time in enumerate(times):
            upright = np.full((1920, 1080, 3), 40, np.uint8)
            x, y = face_at(number)
            upright[y : y + 512, x : x + 512] = face
            upright[-60:, :60] = 255 if number == FLASH else 0
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(upright, -1)), format="rgb24")
            frame.pts, frame.time_base = round(time / TICK), TICK
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        seconds = np.arange(int(float(times[-1] + Fraction(1, 30)) * RATE)) / RATE
        beep = np.sin(2 * np.pi * 1000 * seconds) * 0.5 * (seconds >= float(times[FLASH]))
        block = av.AudioFrame.from_ndarray(beep.astype(np.float32)[None], format="fltp", layout="mono")
        block.sample_rate, block.pts = RATE, 0
        output.mux(sound.encode(block))
        output.mux(sound.encode())
    return path


def beginning_of_sound(path: Path) -> float:
    with av.open(str(path)) as container:
        origin = None
        for frame in container.decode(audio=0):
            samples = np.abs(frame.to_ndarray()).max(0)
            assert frame.time is not None
            origin = frame.time if origin is None else origin
            if (samples > 0.1).any():
                return frame.time + int(np.argmax(samples > 0.1)) / frame.sample_rate
    raise AssertionError("silence")


def test_it_goes_through_with_the_sound_in_time(
    portrait: np.ndarray, times: list[Fraction], tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagan_rt import driving
    from dagan_rt.cropping import Square

    squares: list[Square] = []
    follow = driving.follow

    def watched(*arguments: Any) -> Any:
        for frame, square in follow(*arguments):
            assert frame.image.shape == (1920, 1080, 3)
            squares.append(square)
            yield frame, square

    monkeypatch.setattr(driving, "follow", watched)
    clip, source, out = record(tmp_path / "phone.mov", portrait, times), tmp_path / "source.jpg", tmp_path / "out.mp4"
    canvas = np.full((700, 901, 3), 90, np.uint8)
    canvas[300:556, 500:756] = portrait
    Image.fromarray(canvas).save(source, quality=95)
    code = main(
        ["animate", "--bundle", str(tiny_bundle), "--backend", "onnxruntime", "--threads", "1", "--source", str(source)]
        + ["--driving", str(clip), "--out", str(out), "--crop", "auto", "--detector", "centerface-int8", "--paste-back"]
    )
    assert code == 0
    with av.open(str(out)) as container:
        shown = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    np.testing.assert_allclose([time for time, _ in shown], [float(time) for time in times], atol=1e-3)
    assert shown[0][1].shape == (700, 900, 3)
    assert abs(beginning_of_sound(out) - float(times[FLASH])) < 0.03  # a block of sound is 21 ms
    # The face's box, a third of the pasted portrait, was found and followed on the upright picture.
    middles = np.array([(square.left + square.side / 2, square.top + square.side / 2) for square in squares])
    true = np.array([face_at(number) for number in range(len(times))]) + np.array([125, 110]) * 2
    assert np.abs(middles - true).max() < 0.25 * np.mean([square.side for square in squares])
    assert 250 < squares[0].side < 600
    # Outside the square around the face, the portrait is as it was.
    before, after = canvas[:, :900].astype(int), shown[30][1].astype(int)
    changed = np.abs(before - after).max(2) > 24
    inside = np.zeros_like(changed)
    inside[310:511, 525:726] = True  # its box, 87 × 111, with the margin
    assert changed[inside].mean() > 0.3 and changed[~inside].mean() < 0.002
