"""`dagan-rt animate` from end to end; the model is played by a stand-in except where the test says so."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dagan_rt.cli import main
from dagan_rt.errors import DeviceLost, InputError
from dagan_rt.files import AtomicFile
from dagan_rt.keypoints import KeyPoints
from dagan_rt.template import Moment, Template
from dagan_rt.transfer import hull_area

from ..clips import write_clip

SIZE = 32
LEVELS = [60, 80, 100, 120, 140, 160, 180, 200]  # gray levels of the frames of a clip, which tell them apart


class StandIn:
    """Answers a frame of gray level g with one of level 255 - g, and remembers what it was asked."""

    made: list[StandIn] = []
    ahead = 1
    during: Callable[[int], None] | None = None  # called with the number of each frame to drive

    def __init__(
        self, bundle: Any, backend: str = "auto", motion: str = "relative", adapt_scale: bool = False, **more: Any
    ):
        self.options = {"bundle": bundle, "backend": backend, "motion": motion, "adapt_scale": adapt_scale, **more}
        self.size, self.backend_name, self.backend_reason = SIZE, "stand-in", "the fastest; x: away"
        self.frames = SimpleNamespace(ahead=StandIn.ahead)
        self.closed = False
        self.driven: list[int] = []
        self.resets: list[int] = []
        StandIn.made.append(self)

    def set_source(self, image: np.ndarray) -> None:
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        self.source = image

    def reset(self) -> None:
        self.resets.append(len(self.driven))

    def drive(self, frame: np.ndarray) -> np.ndarray:
        return self.submit(frame).result()[0]

    def submit(self, frame: np.ndarray) -> Any:
        assert frame.shape == (SIZE, SIZE, 3) and frame.dtype == np.uint8
        if StandIn.during is not None:
            StandIn.during(len(self.driven))
        self.driven.append(level(frame))
        return SimpleNamespace(result=lambda: 255 - frame[None])

    def another(self) -> StandIn:
        return StandIn(**self.options)

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

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


def make_clip(path: Path, levels: list[int], audio: bool = False) -> Path:
    return write_clip(path, [np.full((48, 64, 3), gray, np.uint8) for gray in levels], audio)


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
    assert re.fullmatch(
        r"8 frames \(of 25 a second\) in [\d.]+ s: [\d.]+ a second; "
        r"the model took [\d.]+ ms a frame \(p50 [\d.]+, p95 [\d.]+\)\n"
        r"busy: reading \d+ %, model \d+ %, writing \d+ % of the time; the slowest part: (reading|model|writing)\n"
        r"backend stand-in: the fastest; dagan-rt info says why not another\n"
        f"wrote {files['out']}\n",
        said.out,
    )
    assert said.err == "" and StandIn.made[0].closed
    assert [entry.name for entry in files["out"].parent.iterdir()] == ["out.mp4"]


def test_options_reach_the_model(files: dict[str, Path]) -> None:
    assert animate(files, "--absolute", "--backend", "torch", "--threads", "3") == 0
    assert StandIn.made[0].options == {
        "bundle": str(files["bundle"]), "backend": "torch", "motion": "absolute", "adapt_scale": False,
        "motion_scale": 1.0, "by_points": False, "threads": 3,
    }  # fmt: skip
    assert animate(files, "--adapt-scale", "--motion-scale", "0.5") == 0
    assert StandIn.made[1].options == {
        "bundle": str(files["bundle"]), "backend": "auto", "motion": "relative", "adapt_scale": True,
        "motion_scale": 0.5, "by_points": False,
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


def test_ctrl_c_twice_while_the_file_is_put_in_place(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    def once_more(file: AtomicFile) -> None:
        signal.raise_signal(signal.SIGINT)
        original(file)

    original = AtomicFile.discard
    monkeypatch.setattr("os.fsync", interrupt)
    monkeypatch.setattr(AtomicFile, "discard", once_more)
    files["out"].write_text("what was there before")
    assert animate(files) == 130
    assert [entry.name for entry in files["out"].parent.iterdir()] == ["out.mp4"]
    assert files["out"].read_text() == "what was there before"


def test_ctrl_c_before_the_first_frame_leaves_nothing(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: StandIn, frame: np.ndarray) -> KeyPoints:
        signal.raise_signal(signal.SIGINT)
        return original(self, frame)

    original = StandIn.keypoints
    monkeypatch.setattr(StandIn, "keypoints", interrupt)
    assert animate(files, "--find-best-frame") == 130
    assert list(files["out"].parent.iterdir()) == []
    assert capsys.readouterr() == ("", "interrupted: nothing was written\n")


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


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DeviceLost("the GPU was reset: start the program again"), "the GPU was reset: start the program again"),
        (InputError("no memory for a frame: close other programs"), "no memory for a frame: close other programs"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_device_that_fails_keeps_what_was_done(
    files: dict[str, Path],
    error: Exception,
    sentence: str,
    ahead: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_at(3, error, monkeypatch)
    monkeypatch.setattr(StandIn, "ahead", ahead)
    assert animate(files) == 2
    said = capsys.readouterr()
    assert said.err == f"dagan-rt: error: {sentence}; the 3 frames before that are in {files['out']}\n"
    assert said.out == "" and StandIn.made[0].closed
    np.testing.assert_allclose(levels_of(files["out"]), 255 - np.array(LEVELS[:3]), atol=4)
    assert [entry.name for entry in files["out"].parent.iterdir()] == ["out.mp4"]


def test_a_device_that_fails_at_once_leaves_nothing(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(0, DeviceLost("the GPU was reset"), monkeypatch)
    assert animate(files) == 2
    assert capsys.readouterr().err == "dagan-rt: error: the GPU was reset\n"
    assert list(files["out"].parent.iterdir()) == []


def test_a_bug_is_not_hidden(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(3, TypeError("that should not have happened"), monkeypatch)
    with pytest.raises(TypeError, match="should not"):
        animate(files)
    assert capsys.readouterr().err == f"the 3 frames before that are in {files['out']}\n"
    assert len(levels_of(files["out"])) == 3


def fail_at(number: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(current: int) -> None:
        if current == number:
            raise error

    monkeypatch.setattr(StandIn, "during", fail)


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


# A program that runs animate with a model of noise; `held` may hold it up before each frame, by its number.
PROGRAM = """
import os, resource, sys, numpy as np, dagan_rt.reenactor
from types import SimpleNamespace
from dagan_rt.cli import main
noise = np.random.default_rng(0)
class Model:
    size, backend_name, backend_reason, frames = 64, 'noise', '', SimpleNamespace(ahead=1)
    number = -1
    def __init__(self, *a, **k): pass
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def set_source(self, image): pass
    def submit(self, frame):
        self.number += 1
        held(self.number)
        image = noise.integers(0, 256, (1, *frame.shape), dtype=np.uint8)
        return SimpleNamespace(result=lambda: image)
dagan_rt.reenactor.Reenactor = Model
"""


def program(files: dict[str, Path], more: str, *options: str) -> list[str]:
    named = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    return [sys.executable, "-c", f"{PROGRAM}{more}sys.exit(main(sys.argv[1:]))\n", "animate", *named, *options]


def test_a_full_disk_is_one_sentence(files: dict[str, Path]) -> None:
    limited = "held = lambda number: None\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
    make_clip(files["driving"], LEVELS * 4)
    done = subprocess.run(program(files, limited, "--crf", "1"), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"dagan-rt: error: {files['out']}: File too large\n"
    assert list(files["out"].parent.iterdir()) == []


# At frame 20 it says so and waits for a line, as often as it is to be interrupted.
ASKING = """
def held(number):
    if number == 20:
        for _ in range({times}):
            print('here', flush=True)
            sys.stdin.readline()
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_from_a_terminal(files: dict[str, Path], times: int) -> None:
    make_clip(files["driving"], LEVELS * 10, audio=True)
    command = program(files, ASKING.format(times=times))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(times):
            assert process.stdout.readline() == "here\n"
            process.send_signal(signal.SIGINT)
            process.stdin.write("go on\n")
            process.stdin.flush()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    if times == 2:
        assert errors == "dagan-rt: interrupted\n" and list(files["out"].parent.iterdir()) == []
        return
    assert errors == "interrupted: the result ends here\n"
    with av.open(str(files["out"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 21
    with av.open(str(files["out"])) as container:
        sound = sum(frame.samples for frame in container.decode(audio=0)) / 48000
    assert abs(sound - 21 / 25) < 0.05  # a block of sound is 21 ms
    assert [entry.name for entry in files["out"].parent.iterdir()] == ["out.mp4"]


# ---------------------------------------------------------------------------------------------------------------------
# Faces


def walking(path: Path, faces: Any, count: int = 12) -> Path:
    return write_clip(path, [faces({200: (20 + 4 * number, 50)}, 40) for number in range(count)], sound=True)


def test_the_square_follows_the_face(files: dict[str, Path], faces: Any) -> None:
    Image.fromarray(faces({150: (150, 70)})).save(files["source"])
    walking(files["driving"], faces)
    assert animate(files, "--crop", "auto") == 0
    (model,) = StandIn.made
    # A face of side s in a square of side 1.8 s: its share of the square's pixels, whatever place it walked to.
    expected = np.zeros((SIZE, SIZE), bool)
    inner = slice(round(SIZE * 0.4 / 1.8), round(SIZE * 1.4 / 1.8))
    expected[inner, inner] = True
    assert ((model.source[..., 1] > 75) == expected).mean() > 0.95
    assert len(model.driven) == 12 and np.ptp(model.driven) < 12  # as much of the face in each


def test_a_result_is_put_back_where_it_came_from(files: dict[str, Path], faces: Any) -> None:
    picture = faces({150: (150, 70)}, size=(121, 201))  # odd sides
    Image.fromarray(picture).save(files["source"])
    walking(files["driving"], faces)
    assert animate(files, "--crop", "auto", "--paste-back", "--crf", "0") == 0
    with av.open(str(files["out"])) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.audio
    assert len(shown) == 12 and shown[0].shape == (120, 200, 3)
    changed = np.abs(shown[5].astype(int) - picture[:120, :200]).max(2) > 8
    rows, columns = np.nonzero(changed)
    assert changed.any() and rows.min() >= 61 and rows.max() <= 98 and columns.min() >= 141 and columns.max() <= 178


def test_one_of_several_faces_or_all_of_them(files: dict[str, Path], faces: Any) -> None:
    Image.fromarray(faces({100: (20, 20), 220: (90, 60), 160: (160, 30)})).save(files["source"])
    walking(files["driving"], faces)
    for which, levels in (("1", [100]), ("3", [160]), ("largest", [100])):
        StandIn.made.clear()
        assert animate(files, "--crop", "auto", "--face", which) == 0
        assert [int(np.median(model.source[12:20, 12:20])) for model in StandIn.made] == levels
    StandIn.made.clear()
    assert animate(files, "--crop", "auto", "--face", "all", "--paste-back") == 0
    assert [int(np.median(model.source[12:20, 12:20])) for model in StandIn.made] == [100, 220, 160]
    assert all(len(model.driven) == 12 and model.closed for model in StandIn.made)


def test_the_driving_face_is_chosen_too(files: dict[str, Path], faces: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The right one of two; it is there from the sixth frame on, and the crop waits for it where it will be."""
    Image.fromarray(faces({150: (150, 70)})).save(files["source"])
    both = {100: (30, 40), 200: (140, 40)}
    write_clip(files["driving"], [faces({100: (30, 40)} if number < 5 else both, 30) for number in range(10)])
    driven = {}
    for which in ("largest", "1", "2"):
        assert animate(files, "--crop", "auto", "--driving-face", which) == 0
        driven[which] = StandIn.made[-1].driven
    assert driven["1"] == driven["largest"] and max(driven["1"][5:]) < 70  # the left one, of level 100
    assert max(driven["2"][:5]) < 5 and min(driven["2"][5:]) > 90  # the right one, of level 200
    assert animate(files, "--crop", "auto", "--driving-face", "3") == 2
    assert (
        f"--driving-face must be from 1 to 2, the faces found in {files['driving']}, got 3" in capsys.readouterr().err
    )


def test_the_best_frame_is_found_in_the_followed_square(files: dict[str, Path], faces: Any) -> None:
    Image.fromarray(faces({150: (150, 70)})).save(files["source"])
    walking(files["driving"], faces)
    assert animate(files, "--crop", "auto", "--find-best-frame") == 0
    (model,) = StandIn.made
    assert len(model.driven) == 13 and model.driven[0] in model.driven[1:]


def test_a_large_portrait_is_shrunk_to_be_pasted_into(files: dict[str, Path]) -> None:
    Image.fromarray(np.full((1000, 2400, 3), 90, np.uint8)).save(files["source"])
    assert animate(files, "--paste-back") == 0
    with av.open(str(files["out"])) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (1920, 800)


def test_no_face_is_one_sentence(files: dict[str, Path], faces: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = Image.open(files["source"]).copy()
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(files["source"])
    assert animate(files, "--crop", "auto") == 2
    assert f"no face was found in {files['source']}" in capsys.readouterr().err
    source.save(files["source"])
    write_clip(files["driving"], [np.zeros((48, 64, 3), np.uint8)] * 8)
    assert animate(files, "--crop", "auto") == 2
    assert f"no face was found in {files['driving']}" in capsys.readouterr().err
    assert list(files["out"].parent.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_whoever_is_ended_leaves_nothing(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(StandIn, "during", lambda frame: signal.raise_signal(number) if frame == 3 else None)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        animate(files)
    assert ended.value.code == 128 + number and list(files["out"].parent.iterdir()) == []
    assert signal.getsignal(number) == before
    monkeypatch.setattr(StandIn, "during", None)
    signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        monkeypatch.setattr(StandIn, "during", lambda frame: signal.raise_signal(number))
        assert animate(files) == 0 and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--watermark", "invisible", "--out", "result.gif"), "--watermark invisible does not survive the few colours"),
        (("--motion-scale", "5"), "--motion-scale must be 0 to 4, got 5.0"),
        (("--motion-scale", "0.5", "--absolute"), "--motion-scale is about motion since a first frame"),
        (("--face", "2"), "--face 2 needs --crop auto"),
        (("--face", "0", "--crop", "auto"), "--face must be largest, all, or a number from 1, got '0'"),
        (("--face", "left", "--crop", "auto"), "--face must be largest, all, or a number from 1, got 'left'"),
        (("--face", "all", "--crop", "auto"), "--face all needs --paste-back"),
        (("--driving-face", "2"), "--driving-face 2 needs --crop auto"),
        (("--driving-face", "all", "--crop", "auto"), "--driving-face must be largest, or a number from 1, got 'all'"),
        (
            ("--driving-face", "1", "--crop", "auto", "--driving", "nod.motion"),
            "--driving-face needs pictures, and motion template nod.motion holds none",
        ),
        (("--paste-back", "--side-by-side"), "give one of the two"),
        (("--crop", "auto", "--detector", "no.onnx"), "no.onnx cannot be read"),
    ],
)
def test_options_about_faces_that_contradict(
    files: dict[str, Path], options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert animate(files, *options) == 2
    assert message in capsys.readouterr().err
    assert list(files["out"].parent.iterdir()) == [] and StandIn.made == []


def test_results_are_marked(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On what is shown, side by side as well."""
    from dagan_rt.watermark import detect, mark

    monkeypatch.setattr(f"{__name__}.SIZE", 128)
    for options, width in (((), 128), (("--side-by-side",), 384)):
        assert animate(files, "--watermark", "invisible", *options) == 0
        with av.open(str(files["out"])) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert frames[0].shape == (128, width, 3) and detect(frames) > 6
    assert animate(files, "--watermark", "visible", "--crf", "0") == 0
    with av.open(str(files["out"])) as container:
        shown = next(container.decode(video=0)).to_ndarray(format="rgb24")
    expected = mark(np.full_like(shown, 255 - LEVELS[0]), "visible")
    assert np.abs(shown.astype(int) - expected).mean() < 2 and np.abs(expected.astype(int) - expected[0, 0]).max() > 60


# ---------------------------------------------------------------------------------------------------------------------
# With a model


@pytest.mark.parametrize(
    "options", [(), ("--absolute",), ("--adapt-scale",), ("--find-best-frame",), ("--side-by-side",)]
)
def test_every_pixel_is_that_of_one_frame_after_the_other(
    files: dict[str, Path],
    tiny_bundle: Path,
    options: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dagan_rt.images import center_square, read_image
    from dagan_rt.reenactor import Reenactor
    from dagan_rt.video import VideoReader, VideoWriter

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(files["source"])
    faces = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    write_clip(files["driving"], faces)
    encoded: list[np.ndarray] = []
    original = VideoWriter.write

    def write(writer: VideoWriter, image: np.ndarray, *when: Any) -> None:
        encoded.append(image)
        original(writer, image, *when)

    monkeypatch.setattr(VideoWriter, "write", write)
    common = ("--backend", "onnxruntime", "--threads", "1")
    assert animate(files, *common, *options, bundle=tiny_bundle) == 0
    assert "backend onnxruntime: asked for by name\n" in capsys.readouterr().out

    motion = "absolute" if "--absolute" in options else "relative"
    model = Reenactor(tiny_bundle, "onnxruntime", motion, "--adapt-scale" in options, threads=1)
    source = center_square(read_image(files["source"]), model.size)
    model.set_source(source)
    with VideoReader(files["driving"]) as reader:
        frames = [center_square(image, model.size) for image in reader]
    if "--find-best-frame" in options:
        shapes = [shape_of(model.keypoints(face).value[0]) for face in [source, *frames]]
        model.drive(frames[int(np.argmin([((shape - shapes[0]) ** 2).sum() for shape in shapes[1:]]))])
    expected = [model.drive(frame) for frame in frames]
    if "--side-by-side" in options:
        expected = [np.concatenate([source, *pair], axis=1) for pair in zip(frames, expected, strict=True)]
    assert len(expected) == 12 and len({image.tobytes() for image in expected}) == 12
    np.testing.assert_array_equal(encoded, expected)
    assert len(levels_of(files["out"])) == 12


@pytest.mark.parametrize("options", [(), ("--absolute",), ("--adapt-scale",), ("--find-best-frame",), ("--smooth",)])
def test_a_motion_template_drives_as_its_video(
    files: dict[str, Path], tiny_bundle: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagan_rt.video import VideoWriter

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(files["source"])
    write_clip(files["driving"], rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2), True)
    written: list[tuple[np.ndarray, Any, Any]] = []
    original = VideoWriter.write

    def write(writer: VideoWriter, image: np.ndarray, time: Any, duration: Any) -> None:
        written.append((image.copy(), time, duration))
        original(writer, image, time, duration)

    monkeypatch.setattr(VideoWriter, "write", write)
    common = ("--bundle", str(tiny_bundle), "--backend", "onnxruntime", "--threads", "1")
    template = files["driving"].with_suffix(".motion")
    assert main(["motion", *common, "--driving", str(files["driving"]), "--out", str(template)]) == 0
    assert animate(files, *common[2:], *options, bundle=tiny_bundle) == 0
    by_video, written[:] = written.copy(), []
    files["driving"].unlink()
    assert animate(files, *common[2:], *options, bundle=tiny_bundle, driving=template) == 0
    assert len(written) == len(by_video) == 8
    for (image, *when), (expected, *then) in zip(written, by_video, strict=True):
        np.testing.assert_array_equal(image, expected)
        assert when == then
    with av.open(str(files["out"])) as container:
        assert not container.streams.audio and len(container.streams.video) == 1


def test_smoothed_key_points_drive(files: dict[str, Path], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dagan_rt.driving import Steady
    from dagan_rt.images import center_square, read_image
    from dagan_rt.reenactor import Reenactor
    from dagan_rt.video import VideoReader, VideoWriter

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(files["source"])
    write_clip(files["driving"], rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2))
    encoded: list[np.ndarray] = []
    monkeypatch.setattr(VideoWriter, "write", lambda writer, image, *when: encoded.append(image.copy()))
    common = ("--backend", "onnxruntime", "--threads", "1", "--smooth")
    animate(files, *common, bundle=tiny_bundle)
    model = Reenactor(tiny_bundle, "onnxruntime", threads=1)
    model.set_source(center_square(read_image(files["source"]), model.size))
    steady, expected, rough = Steady(), [], []
    with VideoReader(files["driving"]) as reader:
        for frame in reader.timed():
            points = model.keypoints(center_square(frame.image, model.size))
            rough.append(points.value)
            expected.append(model.submit_points(steady(points, frame.time)).result()[0])
    np.testing.assert_array_equal(encoded, expected)
    smooth = Steady()
    damped = [smooth(KeyPoints(value, np.zeros((1, 15, 2, 2))), Fraction(n, 25)).value for n, value in enumerate(rough)]
    assert np.abs(np.diff(damped, axis=0)).mean() < 0.9 * np.abs(np.diff(rough, axis=0)).mean()


def test_a_template_is_of_other_weights(
    files: dict[str, Path], tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = files["driving"].with_suffix(".motion")
    one = KeyPoints(np.zeros((1, 15, 2), np.float32), np.zeros((1, 15, 2, 2), np.float32))
    Template.of([Moment(one, Fraction(0), Fraction(1, 25))], Fraction(25), "ab" * 32).write(template)
    assert animate(files, bundle=tiny_bundle, driving=template) == 2
    assert "was recorded with other weights (abababababab…)" in capsys.readouterr().err
    assert animate(files, "--side-by-side", bundle=tiny_bundle, driving=template) == 2
    assert f"--side-by-side needs pictures, and motion template {template} holds none" in capsys.readouterr().err
    template.write_bytes(b"no")
    assert animate(files, bundle=tiny_bundle, driving=template) == 2
    assert f"motion template {template} is damaged or no template" in capsys.readouterr().err
    assert list(files["out"].parent.iterdir()) == []


def shape_of(points: np.ndarray) -> np.ndarray:
    """Key points around their mean, with hull area 1."""
    return (points - points.mean(axis=0)) / np.sqrt(hull_area(points.astype(np.float64)))


def test_the_help_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    from dagan_rt import backends

    with pytest.raises(SystemExit):
        main(["animate", "--help"])
    named = re.search(r"--backend NAME\s+auto \([^)]*\),\s+(.*?)\s+--threads", capsys.readouterr().out, re.DOTALL)
    assert named and sorted(re.sub(r"-\s+", "-", named[1]).replace(",", " ").split()) == sorted(backends.names())
