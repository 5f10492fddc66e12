"""`dagan-rt motion`: what it records is what the model sees in the clip."""

from __future__ import annotations

import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from dagan_rt.cli import main
from dagan_rt.cropping import around
from dagan_rt.images import center_square
from dagan_rt.reenactor import Reenactor
from dagan_rt.template import Template
from dagan_rt.video import VideoReader

from ..clips import write_clip


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Eight frames of blocks, a third of a second between the fourth and the fifth."""
    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / "clip.mp4"), "w") as output:
        stream: Any = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 300)
        for number in range(8):
            image = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = 12 * number + (100 if number > 3 else 0), Fraction(1, 300)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return tmp_path / "clip.mp4"


def record(bundle: Path, clip: Path, *more: str) -> tuple[int, Path]:
    out = clip.parent / "out" / "clip.motion"
    out.parent.mkdir(exist_ok=True)
    options = ["--bundle", str(bundle), "--backend", "onnxruntime", "--threads", "1", *more]
    return main(["motion", *options, "--driving", str(clip), "--out", str(out)]), out


def test_the_key_points_of_every_frame_are_recorded(
    clip: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = record(tiny_bundle, clip)
    assert code == 0 and f"wrote {out}: 8 frames, 0.7 s, " in capsys.readouterr().out
    template, model = Template.read(out), Reenactor(tiny_bundle, "onnxruntime", threads=1)
    with VideoReader(clip) as reader:
        for frame, moment in zip(reader.timed(), template, strict=True):
            expected = model.keypoints(center_square(frame.image, model.size))
            for found, wanted in zip(moment.points, expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
            assert (moment.time, moment.duration) == (frame.time, frame.duration)
        assert template.fps == reader.fps and template.model == model.model and len(model.model) == 64


def test_an_interrupt_leaves_nothing(
    clip: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = Reenactor.keypoints

    def interrupted(model: Reenactor, frame: np.ndarray) -> Any:
        signal.raise_signal(signal.SIGINT)
        return find(model, frame)

    monkeypatch.setattr(Reenactor, "keypoints", interrupted)
    code, out = record(tiny_bundle, clip)
    assert code == 130 and list(out.parent.iterdir()) == []
    assert capsys.readouterr().err.endswith("interrupted: nothing was written\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--crop", "auto"), "no face was found in"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--driving", "absent.mp4"), "video absent.mp4 does not exist"),
        (("--out", "clip.npz"), "must end in .motion, got .npz"),
    ],
)
def test_bad_input_is_one_sentence(
    clip: Path, tiny_bundle: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = clip.parent / "out" / "clip.motion"
    out.parent.mkdir()
    given = ["motion", "--bundle", str(tiny_bundle), "--driving", str(clip), "--out", str(out), *options]
    assert main(given) == 2
    assert message in capsys.readouterr().err and list(out.parent.iterdir()) == []


def test_the_face_of_somebody_else(clip: Path, tiny_bundle: Path, faces: Any) -> None:
    image = faces({100: (20, 20), 200: (90, 60)}, 40)
    write_clip(clip, [image])
    model = Reenactor(tiny_bundle, "onnxruntime", threads=1)
    with VideoReader(clip) as reader:
        (shown,) = reader
    for which, box in (("largest", (20, 20, 60, 60)), ("2", (90, 60, 130, 100))):
        code, out = record(tiny_bundle, clip, "--crop", "auto", "--driving-face", which)
        (moment,) = Template.read(out)
        expected = model.keypoints(around(np.array(box), 200, 120).cut(shown, model.size))
        assert code == 0
        np.testing.assert_array_equal(moment.points.value, expected.value)
