"""`dagan-rt animate` from end to end; the model is played by a stand-in except where the test says so."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dagan_rt.cli import main
from dagan_rt.keypoints import KeyPoints

SIZE = 32
LEVELS = [60, 80, 100, 120, 140, 160, 180, 200]  # gray levels of the frames of a clip, which tell them apart


class StandIn:
    """Answers a frame of gray level g with one of level 255 - g, and remembers what it was asked."""

    made: list[StandIn] = []
    during: Callable[[int], None] | None = None  # called with the number of each frame to drive

    def __init__(
        self, bundle: Any, backend: str = "auto", motion: str = "relative", adapt_scale: bool = False, **more: Any
    ):
        self.options = {"bundle": bundle, "backend": backend, "motion": motion, "adapt_scale": adapt_scale, **more}
        self.size, self.backend_name = SIZE, "stand-in"
        self.driven: list[int] = []
        self.resets: list[int] = []
        StandIn.made.append(self)

    def set_source(self, image: np.ndarray) -> None:
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        self.source = image

    def reset(self) -> None:
        self.resets.append(len(self.driven))

    def drive(self, frame: np.ndarray) -> np.ndarray:
        assert frame.shape == (SIZE, SIZE, 3) and frame.dtype == np.uint8
        if StandIn.during is not None:
            StandIn.during(len(self.driven))
        self.driven.append(level(frame))
        return 255 - frame

    def keypoints(self, frame: np.ndarray) -> KeyPoints:
        """Four points whose aspect follows the gray level; where they are and how large says nothing."""
        g = level(frame)
        aspect = g / 100
        points = np.array([[-aspect, -1], [aspect, -1], [aspect, 1], [-aspect, 1]]) * (0.05 + g % 7 / 20) + g % 5 / 10
        return KeyPoints(points[None].astype(np.float32), np.zeros((1, 4, 2, 2), np.float32))


def level(frame: np.ndarray) -> int:
    return int(frame[4:-4, 4:-4].mean().round())


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "tiny_bundle" not in request.fixturenames:
        monkeypatch.setattr(StandIn, "made", [])
        monkeypatch.setattr(StandIn, "during", None)
        monkeypatch.setattr("dagan_rt.reenactor.Reenactor", StandIn)


def make_clip(path: Path, levels: list[int], audio: bool = False, size: tuple[int, int] = (64, 48)) -> Path:
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("libx264", rate=Fraction(25), options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        sound: Any = output.add_stream("aac", rate=48000, layout="mono") if audio else None
        for gray in levels:
            image = np.full((size[1], size[0], 3), gray, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode())
        if audio:
            tone = np.sin(np.arange(len(levels) * 1920) * 0.05).astype(np.float32)[None] * 0.5
            block = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            block.sample_rate, block.pts = 48000, 0
            output.mux(sound.encode(block))
            output.mux(sound.encode())
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A portrait of level 150, a clip, a place for the result, and a bundle that nobody opens."""
    Image.new("RGB", (50, 70), (150, 150, 150)).save(tmp_path / "portrait.png")
    clip = make_clip(tmp_path / "clip.mp4", LEVELS, audio=True)
    (tmp_path / "result").mkdir()
    return {
        "bundle": tmp_path / "bundle",
        "source": tmp_path / "portrait.png",
        "driving": clip,
        "out": tmp_path / "result" / "out.mp4",
    }


def animate(files: dict[str, Path], *options: str, **other: Path | str) -> int:
    named = [part for name, path in {**files, **other}.items() for part in (f"--{name}", str(path))]
    return main(["animate", *named, *options])


def levels_of(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [level(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def test_each_frame_is_driven_and_written_in_step(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert animate(files) == 0
    np.testing.assert_allclose(StandIn.made[0].driven, LEVELS, atol=2)
    np.testing.assert_allclose(levels_of(files["out"]), 255 - np.array(LEVELS), atol=4)
    with av.open(str(files["out"])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.width, stream.codec_context.height) == (SIZE, SIZE)
        assert stream.average_rate == 25 and container.streams.audio
    said = capsys.readouterr()
    assert re.search(r"8 frames .* ms a frame \(p50 .*, p95 .*\) with stand-in", said.out)
    assert str(files["out"]) in said.out and said.err == ""
    assert [entry.name for entry in files["out"].parent.iterdir()] == ["out.mp4"]


def test_options_reach_the_model(files: dict[str, Path]) -> None:
    assert animate(files, "--absolute", "--backend", "torch", "--threads", "3") == 0
    assert StandIn.made[0].options == {
        "bundle": files["bundle"], "backend": "torch", "motion": "absolute", "adapt_scale": False, "threads": 3,
    }  # fmt: skip
    assert animate(files, "--adapt-scale") == 0
    assert StandIn.made[1].options == {
        "bundle": files["bundle"], "backend": "auto", "motion": "relative", "adapt_scale": True,
    }  # fmt: skip


def test_side_by_side(files: dict[str, Path]) -> None:
    assert animate(files, "--side-by-side") == 0
    with av.open(str(files["out"])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == len(LEVELS) and frames[0].shape == (SIZE, 3 * SIZE, 3)
    for gray, frame in zip(LEVELS, frames, strict=True):
        shown = [level(frame[:, start : start + SIZE]) for start in (0, SIZE, 2 * SIZE)]
        np.testing.assert_allclose(shown, [150, gray, 255 - gray], atol=4)


def test_the_best_frame_comes_first(files: dict[str, Path], tmp_path: Path) -> None:
    levels = [60, 100, 152, 200, 140]
    make_clip(files["driving"], levels)
    assert animate(files, "--find-best-frame") == 0
    model = StandIn.made[0]
    np.testing.assert_allclose(model.driven, [152, *levels], atol=2)  # the portrait's level is 150
    assert model.resets == [0]
    np.testing.assert_allclose(levels_of(files["out"]), 255 - np.array(levels), atol=4)


def test_key_points_that_span_nothing_leave_the_first_frame(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = KeyPoints(np.zeros((1, 4, 2), np.float32), np.zeros((1, 4, 2, 2), np.float32))
    monkeypatch.setattr(StandIn, "keypoints", lambda self, frame: empty)
    assert animate(files, "--find-best-frame") == 0
    np.testing.assert_allclose(StandIn.made[0].driven, LEVELS, atol=2)


def test_crf(files: dict[str, Path]) -> None:
    sizes = []
    for crf in ("0", "40"):
        assert animate(files, "--crf", crf, "--side-by-side") == 0
        with av.open(str(files["out"])) as container:
            sizes.append(sum(packet.size for packet in container.demux(video=0)))
    assert sizes[0] > sizes[1]


def test_a_gif(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "result" / "out.gif"
    assert animate(files, out=out) == 0
    np.testing.assert_allclose(levels_of(out), 255 - np.array(LEVELS), atol=4)


@pytest.mark.parametrize("options", [(), ("--find-best-frame",)])
def test_ctrl_c_keeps_what_was_written(
    files: dict[str, Path],
    options: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(number: int) -> None:
        if number == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StandIn, "during", interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert animate(files, *options) == 130
    assert signal.getsignal(signal.SIGINT) is before
    kept = 5 - len(options)  # the best frame is driven once more, in front
    np.testing.assert_allclose(levels_of(files["out"]), 255 - np.array(LEVELS[:kept]), atol=4)
    said = capsys.readouterr()
    assert f"{kept} frames" in said.out and "interrupted" in said.err


def test_ctrl_c_twice_leaves_nothing(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(number: int) -> None:
        if number == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StandIn, "during", interrupt)
    assert animate(files) == 130
    assert list(files["out"].parent.iterdir()) == []
    assert "interrupted" in capsys.readouterr().err


def test_ctrl_c_before_the_first_frame_leaves_nothing(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: StandIn, frame: np.ndarray) -> KeyPoints:
        signal.raise_signal(signal.SIGINT)
        return original(self, frame)

    original = StandIn.keypoints
    monkeypatch.setattr(StandIn, "keypoints", interrupt)
    assert animate(files, "--find-best-frame") == 130
    assert list(files["out"].parent.iterdir()) == []


def test_bad_input_is_one_sentence_and_no_output(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("neither image nor video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "folder.mp4").mkdir()
    for changed, options, expected in [
        ({"source": tmp_path / "none.png"}, (), "none.png does not exist"),
        ({"source": tmp_path / "text.txt"}, (), "text.txt is not an image"),
        ({"source": tmp_path}, (), "is a folder"),
        ({"source": tmp_path / "dot.png"}, (), "too small"),
        ({"driving": tmp_path / "none.mp4"}, (), "none.mp4 does not exist"),
        ({"driving": tmp_path / "text.txt"}, (), "text.txt is not a video"),
        ({"driving": tmp_path / "empty.mp4"}, (), "empty.mp4 is empty"),
        ({"driving": tmp_path / "folder.mp4"}, (), "is a folder"),
        ({"out": tmp_path / "result" / "out.xyz"}, (), "must end in"),
        ({"out": tmp_path / "missing" / "out.mp4"}, (), "does not exist"),
        ({"out": tmp_path / "folder.mp4"}, (), "is a folder"),
        ({"out": files["driving"]}, (), "also an input"),
        ({}, ("--crf", "52"), "--crf must be between 0 and 51, got 52"),
        ({}, ("--threads", "0"), "--threads must be at least 1, got 0"),
        ({}, ("--absolute", "--adapt-scale"), "--adapt-scale"),
        ({}, ("--absolute", "--find-best-frame"), "--find-best-frame"),
    ]:
        content = files["driving"].read_bytes()
        assert animate(files, *options, **changed) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("dagan-rt: error: ") and said.err.count("\n") == 1
        assert expected in said.err
        assert list((tmp_path / "result").iterdir()) == [] and files["driving"].read_bytes() == content
    assert not StandIn.made  # the model is opened last


def test_a_bundle_that_cannot_be_used_leaves_no_output(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert animate(files) == 2
    assert str(files["bundle"]) in capsys.readouterr().err
    assert list(files["out"].parent.iterdir()) == []


def test_a_model_that_fails_leaves_no_output(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        if number == 3:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(StandIn, "during", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        animate(files)
    assert list(files["out"].parent.iterdir()) == []


def test_a_damaged_clip_gives_what_is_there(files: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), dtype=np.uint8)
    with av.open(str(files["driving"]), "w", options={"movflags": "faststart"}) as output:
        stream: Any = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for image in noise:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode())
    content = files["driving"].read_bytes()
    files["driving"].write_bytes(content[: len(content) // 2])
    assert animate(files) == 0
    count = len(levels_of(files["out"]))
    assert 5 < count < 60 and f"only its first {count} frames" in caplog.text


def test_a_full_disk_is_one_sentence(files: dict[str, Path]) -> None:
    script = (
        "import resource, sys, numpy as np, dagan_rt.reenactor\n"
        "from dagan_rt.cli import main\n"
        "noise = np.random.default_rng(0)\n"
        "class Model:\n"
        "    size, backend_name = 64, 'noise'\n"
        "    def __init__(self, *a, **k): pass\n"
        "    def set_source(self, image): pass\n"
        "    def drive(self, frame): return noise.integers(0, 256, frame.shape, dtype=np.uint8)\n"
        "dagan_rt.reenactor.Reenactor = Model\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    make_clip(files["driving"], LEVELS * 4)
    named = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    done = subprocess.run(
        [sys.executable, "-c", script, "animate", *named, "--crf", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"dagan-rt: error: {files['out']}: File too large\n"
    assert list(files["out"].parent.iterdir()) == []


@pytest.mark.parametrize("options", [(), ("--absolute",), ("--find-best-frame", "--side-by-side")])
def test_with_a_real_bundle(
    files: dict[str, Path], tiny_bundle: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    from dagan_rt.images import center_square, read_image
    from dagan_rt.reenactor import Reenactor
    from dagan_rt.video import VideoReader

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(files["source"])
    assert animate(files, *options, "--threads", "1", "--crf", "1", bundle=tiny_bundle) == 0
    assert re.search("with (onnxruntime|torch)", capsys.readouterr().out)

    model = Reenactor(tiny_bundle, motion="absolute" if "--absolute" in options else "relative", threads=1)
    model.set_source(center_square(read_image(files["source"]), model.size))
    with VideoReader(files["out"]) as reader:
        written = list(reader)
    assert len(written) == len(LEVELS) and written[0].shape[0] == model.size
    if "--find-best-frame" not in options:
        with VideoReader(files["driving"]) as reader:
            for frame, shown in zip(reader, written, strict=True):
                expected = model.drive(center_square(frame, model.size))
                # H.264 keeps colour at half the resolution, so brightness is what can be compared.
                assert np.abs(expected.mean(axis=2) - shown.mean(axis=2)).mean() < 12
