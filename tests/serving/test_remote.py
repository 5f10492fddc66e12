"""A server as a backend: `Reenactor`, `Streams`, `animate` and `info` on its address."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dagan_rt import InputError, Reenactor, Streams
from dagan_rt.cli import main
from dagan_rt.frames import Frames
from dagan_rt.images import center_square, write_image
from dagan_rt.serving import Client
from dagan_rt.serving.remote import RemoteFrames
from dagan_rt.video import VideoReader, VideoWriter


def _fake_server() -> ModuleType:
    path = Path(__file__).with_name("fake_server.py")
    spec = importlib.util.spec_from_file_location("dagan_rt_tests_fake_server", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = _fake_server()
SIZE, drive = fake.SIZE, fake.drive


def picture(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)


SOURCE, OTHER = picture(100), picture(101)
GRAY = np.full((SIZE, SIZE, 3), 40, np.uint8)  # which a video keeps as it is
FRAMES = [picture(seed) for seed in range(6)]


@pytest.fixture
def twin() -> Iterator[Any]:
    with fake.serving(queue=4, sequences=6) as started:
        yield started


def test_reenactor_on_a_server(twin: Any) -> None:
    with Reenactor(twin.url) as reenactor:
        assert (reenactor.size, reenactor.backend_name) == (SIZE, "triton")
        assert reenactor.backend_reason == f"twin 1 at {twin.url} serves dagan, fp32, bundle aaaaaaaaaaaa"
        with pytest.raises(InputError, match="drive needs a source"):
            reenactor.drive(FRAMES[0])
        reenactor.set_source(SOURCE)
        assert reenactor.keypoints(FRAMES[1]).value[0, 0, 0] == pytest.approx(FRAMES[1].mean())
        for first in (0, 2):
            reenactor.reset()
            for frame in FRAMES[first:]:
                assert np.array_equal(reenactor.drive(frame), drive(SOURCE, FRAMES[first], frame))
        assert reenactor.keypoints(FRAMES[1]).value[0, 0, 0] == pytest.approx(FRAMES[1].mean())
        pending = [reenactor.submit(frame) for frame in FRAMES[: reenactor.frames.ahead]]
        for each, frame in zip(pending, FRAMES, strict=False):
            assert np.array_equal(each.result(), drive(SOURCE, FRAMES[2], frame)[None])
        reenactor.set_source(OTHER)
        assert np.array_equal(reenactor.drive(FRAMES[3]), drive(OTHER, FRAMES[3], FRAMES[3]))
    assert fake.eventually(lambda: not twin.sequences["reenact"].open and not twin.regions)


@pytest.mark.parametrize(
    ("options", "scale"),
    [({"motion": "absolute"}, 1), ({"adapt_scale": True}, 2), ({"motion_scale": 0.5}, 0.5), ({"motion_scale": 2}, 2)],
    ids=["absolute motion", "scaled", "calmer", "exaggerated"],
)
def test_options_reach_the_server(twin: Any, options: dict[str, Any], scale: float) -> None:
    with Reenactor(twin.url, **options) as reenactor:
        reenactor.set_source(SOURCE)
        for frame in FRAMES:
            initial = None if "motion" in options else FRAMES[0]
            assert np.array_equal(reenactor.drive(frame), drive(SOURCE, initial, frame, scale))


def test_the_motion_can_change_between_frames_on_a_server(twin: Any) -> None:
    with Reenactor(twin.url, motion_scale=0.5) as reenactor:
        reenactor.set_source(SOURCE)
        reenactor.drive(FRAMES[0])
        for motion, scaled, initial, scale in (("absolute", False, None, 1), ("relative", True, FRAMES[1], 1)):
            reenactor.set_motion(motion, scaled)
            for frame in FRAMES[1:3]:
                assert np.array_equal(reenactor.drive(frame), drive(SOURCE, initial, frame, scale))
    assert fake.eventually(lambda: not twin.sequences["reenact"].open and not twin.regions)


def test_the_initial_frame_is_driven_once(twin: Any) -> None:
    with Reenactor(twin.url) as reenactor:
        reenactor.set_source(SOURCE)
        for frame in FRAMES:
            reenactor.drive(frame)
    frames = [call for call in twin.calls if not call[2] and not call[3]]
    assert len(frames) == len(FRAMES)


def test_what_belongs_to_the_server_alone(twin: Any) -> None:
    for options in ({"backend": "onnxruntime"}, {"threads": 2}):
        with pytest.raises(InputError, match="has a backend and threads of its own"):
            Reenactor(twin.url, **options)


def test_frames_by_their_contract(twin: Any) -> None:
    with Client(twin.url) as client:
        frames: Frames = RemoteFrames(client, slots=2)
        assert (frames.slots, frames.batches, frames.ahead) == (2, (1,), 8)
        for use in (lambda: frames.begin(0, None), lambda: frames.submit([0], [FRAMES[0]])):
            with pytest.raises(InputError, match="slot 0 has no"):
                use()
        frames.set_source(0, SOURCE)
        frames.set_source(1, OTHER)
        frames.begin(0, FRAMES[0])
        frames.begin(1, None)
        both = [(slot, frame) for frame in FRAMES[1:4] for slot in (0, 1)]
        pending = [frames.submit([slot], [frame]) for slot, frame in both]
        for (slot, frame), each in zip(both, pending, strict=True):
            right = drive(OTHER, None, frame) if slot else drive(SOURCE, FRAMES[0], frame)
            assert np.array_equal(each.result(), right[None])
        with pytest.raises(InputError, match="a batch must be 1 frame"):
            frames.submit([0, 1], FRAMES[:2])
        assert frames.timed([0], [FRAMES[0]]).wall > 0 and not frames.stages(1)
        frames.close()
        frames.close()
        client.open(SOURCE).close()  # the client is still open


def test_streams_on_a_server(twin: Any) -> None:
    with Client(twin.url) as client, Streams(RemoteFrames(client, slots=3), queue=len(FRAMES)) as streams:
        opened = [streams.open(source) for source in (SOURCE, OTHER)]
        for frame in FRAMES:
            for stream in opened:
                stream.push(frame)
        for stream, source in zip(opened, (SOURCE, OTHER), strict=True):
            for frame in FRAMES:
                result = stream.pull(timeout=5)
                assert result and np.array_equal(result.image, drive(source, FRAMES[0], frame))


# ----------------------------------------------------------------------------------------------------------------------
# commands


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_image(tmp_path / "portrait.png", GRAY)
    writer = VideoWriter(tmp_path / "clip.mkv", 25, SIZE, SIZE, crf=0)
    for level in range(30, 230, 10):
        writer.write(np.full((SIZE, SIZE, 3), level, np.uint8))
    writer.close()
    return tmp_path


def animate(files: Path, bundle: str, *more: str, out: str = "out.mkv") -> int:
    given = ["--bundle", bundle, "--source", str(files / "portrait.png"), "--driving", str(files / "clip.mkv")]
    return main(["animate", *given, "--out", str(files / out), "--crf", "0", *more])


def shown(path: Path) -> list[np.ndarray]:
    with VideoReader(path) as reader:
        return list(reader)


def test_animate_on_a_server(twin: Any, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert animate(files, twin.url, "--side-by-side") == 0
    frames, images = shown(files / "clip.mkv"), shown(files / "out.mkv")
    assert len(images) == len(frames)
    for frame, image in zip(frames, images, strict=True):
        assert image.shape == (SIZE, 3 * SIZE, 3)
        right = np.concatenate([GRAY, frame, drive(GRAY, frames[0], frame)], axis=1)
        assert np.abs(image.astype(int) - right).max() <= 3
    assert f"backend triton: twin 1 at {twin.url} serves dagan, fp32" in capsys.readouterr().out


def test_webcam_on_a_server(twin: Any, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--bundle", twin.url, "--source", str(files / "portrait.png"), "--driver", str(files / "clip.mkv")]
    assert main(["webcam", *given, "--out", str(files / "out.mkv"), "--crf", "0", "--no-window", "--absolute"]) == 0
    known = [drive(GRAY, None, frame) for frame in shown(files / "clip.mkv")]
    images = shown(files / "out.mkv")
    assert images and all(min(np.abs(image.astype(int) - it).max() for it in known) <= 3 for image in images)
    assert f"backend triton: twin 1 at {twin.url} serves dagan, fp32" in capsys.readouterr().out


def test_a_server_that_dies_midway(
    twin: Any, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagan_rt.serving import asynchronous

    monkeypatch.setattr(asynchronous, "TIMEOUT", 0.5)
    ending = threading.Thread(target=lambda: (fake.eventually(lambda: len(twin.calls) > 12), twin.stop()))
    slow = twin.frames.submit

    def submit(slots: Any, frames: Any) -> Any:
        time.sleep(0.02)
        return slow(slots, frames)

    twin.frames.submit = submit
    ending.start()
    assert animate(files, twin.url) == 2
    ending.join()
    twin.start()
    error = capsys.readouterr().err.strip()
    assert "does not serve any more" in error and "frames before that are in" in error and "Traceback" not in error
    assert 4 <= len(shown(files / "out.mkv")) < 20


def test_commands_without_a_server(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("grpc://127.0.0.1:1", "http://127.0.0.1:1"):
        assert animate(files, url) == 2
        assert main(["info", url]) == 2
        assert capsys.readouterr().err.count(f"no server answers at {url}") == 2
    assert main(["info", "ftp://somewhere"]) == 2
    assert "a server's address must be like grpc://" in capsys.readouterr().err
    assert main(["info", "grpc://127.0.0.1:1", "--depth", "x"]) == 2
    assert "is a server" in capsys.readouterr().err


def test_info_describes_a_server(twin: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", twin.url]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["server"] == f"twin 1 at {twin.url}" and rows["variant"] == "dagan" and rows["queue"] == "4"


@pytest.mark.slow
def test_animate_writes_the_same_frames_as_here(
    running: Callable[..., Any], make_repository: Callable[..., Path], tiny_bundle: Path, files: Path
) -> None:
    server = running(make_repository(backend="onnxruntime", threads=1))
    write_image(files / "portrait.png", center_square(picture(7, 80), 64))
    for options in ([], ["--find-best-frame", "--side-by-side"], ["--absolute"]):
        assert animate(files, server.grpc_url, *options, out="there.mkv") == 0
        assert animate(files, str(tiny_bundle), "--backend", "onnxruntime", *options, out="here.mkv") == 0
        there, here = shown(files / "there.mkv"), shown(files / "here.mkv")
        assert len(there) == len(here) > 0 and all(map(np.array_equal, there, here))
