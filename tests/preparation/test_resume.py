"""Runs that are killed, interrupted, out of room, or shared among processes: the result is that of an unbroken one."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dagan_rt.errors import InputError
from dagan_rt.preparation import clips, manifest, prepare, video
from dagan_rt.preparation.options import write_options


def clip_files(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.split("/")[0] in ("train", "test", ".partial")}


@pytest.fixture(scope="session")
def unbroken(film: Any, originals: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What an unbroken run writes, by format."""
    found = {}
    for format in ("frames", "packed"):
        out = tmp_path_factory.mktemp("unbroken") / "out"
        film.run(originals, out, format=format)
        found[format] = film.tree(out)
    return found


def raiser(*_: object) -> None:
    raise KeyboardInterrupt


class Moments:
    """Ends the process, or raises, at the n-th of the events that change the folder."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, act: Any) -> None:
        self.left, self.act = at, act
        for owner, name in [
            (os, "replace"), (os, "truncate"), (os, "fsync"), (clips.ClipWriter, "write"),
            (clips.ClipWriter, "__init__"), (manifest.Manifest, "append"), (Path, "mkdir"),
        ]:  # fmt: skip
            patch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.act()
            return function(*arguments, **options)

        return counted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("format", "step"), [("packed", 61), pytest.param("frames", 7, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_is_continued(
    film: Any, originals: Path, tmp_path: Path, unbroken: Any, format: str, step: int
) -> None:
    """Each run is killed a little later than the one before it, and the next one goes on from there."""
    out = tmp_path / "out"
    for moment in itertools.count(3, step):
        child = os.fork()
        if child == 0:
            gc.freeze()  # of earlier tests there may be frames in cycles, which wait for threads that are not here
            patch = pytest.MonkeyPatch()
            Moments(patch, moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
            try:
                film.run(originals, out, format=format)
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if moment % 2:
            shutil.rmtree(out)  # every other one starts afresh, so that all the moments are met
    assert moment > 3 and film.tree(out) == unbroken[format]


@pytest.mark.parametrize("moment", [3, 42, 66])
def test_an_interrupted_run_leaves_whole_clips_of_whole_rows(
    film: Any, originals: Path, tmp_path: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Moments(patch, moment, interrupt)
        film.run(originals, out)
    left = clip_files(film.tree(out))
    rows = manifest.Manifest(out).clips()
    assert {name.split("/")[1] for name in left} == {row["name"] for row in rows}
    assert left.items() <= unbroken["frames"].items()
    film.run(originals, out)
    assert film.tree(out) == unbroken["frames"]


@pytest.mark.parametrize(
    ("owner", "name", "format", "nth"),
    [(Path, "write_bytes", "frames", 15), (os, "replace", "frames", 4), (os, "fsync", "packed", 5)],
)
def test_a_disk_that_fills_up_stops_the_run(
    film: Any, originals: Path, tmp_path: Path, unbroken: Any, owner: Any, name: str, format: str, nth: int
) -> None:
    there, left, out = getattr(owner, name), [nth], tmp_path / "out"

    def full(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return there(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left on device") as caught:
        patch.setattr(owner, name, full)
        film.run(originals, out, format=format)
    assert str(caught.value.filename).startswith(str(out))
    files = clip_files(film.tree(out))
    assert {name.split("/")[1] for name in files} == {row["name"] for row in manifest.Manifest(out).clips()}
    film.run(originals, out, format=format)
    assert film.tree(out) == unbroken[format]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mounted"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None or os.name != "posix" or os.geteuid() != 0, reason="only root mounts")
@pytest.mark.slow
@pytest.mark.parametrize("format", ["frames", "packed"])
def test_a_real_disk_that_fills_up(film: Any, originals: Path, small_disk: Path, unbroken: Any, format: str) -> None:
    """Ballast leaves room for less each time; in the end there is enough."""
    out, ballast = small_disk / "out", small_disk / "ballast"
    stopped = 0
    for room in (9_000, 40_000, 120_000, 200_000):
        ballast.unlink(missing_ok=True)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - room)
        try:
            film.run(originals, out, format=format)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            stopped += 1
        left = clip_files(film.tree(out))
        assert not [name for name in left if name.startswith(".partial")]
        if (out / "manifest.jsonl").exists():
            assert {name.split("/")[1] for name in left} == {row["name"] for row in manifest.Manifest(out).clips()}
    assert stopped >= 3
    ballast.unlink()
    film.run(originals, out, format=format)
    assert film.tree(out) == unbroken[format]


def test_what_is_done_is_not_done_again(film: Any, originals: Path, tmp_path: Path, unbroken: Any) -> None:
    class Never:
        def __call__(self, image: np.ndarray) -> Any:
            raise AssertionError("a video was read again")

    film.run(originals, tmp_path / "out")
    again = prepare(originals, tmp_path / "out", film.small(), detector=Never())
    assert again.skipped == {"not a video": 1} and len(again.clips) == 5
    assert film.tree(tmp_path / "out") == unbroken["frames"]


def test_a_video_that_was_replaced_is_done_again(film: Any, few: Path, tmp_path: Path) -> None:
    raw = few
    film.run(raw, tmp_path / "out")
    film.write(raw / "id1" / "talk.mp4", film.talk(9, wall=5))
    (raw / "id0" / "talk.mp4").write_text("gone")
    film.run(raw, tmp_path / "out")
    film.run(raw, tmp_path / "afresh")
    assert film.tree(tmp_path / "out") == film.tree(tmp_path / "afresh")


@pytest.mark.parametrize("tail", [b'{"file": "id1/ta', pytest.param(b"\xff\xff", marks=pytest.mark.slow)])
def test_a_row_cut_short_is_written_again(
    film: Any, originals: Path, tmp_path: Path, unbroken: Any, tail: bytes
) -> None:
    out = tmp_path / "out"
    film.run(originals, out)
    lines = (out / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (out / "manifest.jsonl").write_bytes(b"".join(lines[:-3]) + tail)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(manifest.Manifest, "tidy", raiser)  # ended again, once there are rows behind it
        film.run(originals, out)
    film.run(originals, out)
    assert film.tree(out) == unbroken["frames"]


@pytest.mark.parametrize(
    "row",
    [
        b"[]\n", b'{"file": 3}\n', b"x\n",
        b'{"file": "a", "clips": [{"name": "../../x", "split": "train", "frames": 2, "identity": "a"}]}\n',
        b'{"file": "a", "clips": [{"name": "a#b#000000-000001", "split": "..", "frames": 2, "identity": "a"}]}\n',
        b'{"file": "a", "clips": 3}\n', b"[" * 100_000 + b"\n",
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_refused(film: Any, originals: Path, tmp_path: Path, row: bytes) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_options(out, film.small().described(with_detector=False))
    (out / "manifest.jsonl").write_bytes(row)
    with pytest.raises(InputError, match="manifest.jsonl is damaged after byte 0: run again with --force"):
        film.run(originals, out)


def test_two_runs_at_once_are_refused(film: Any, originals: Path, tmp_path: Path) -> None:
    class Meddling(film.RedFaces):  # type: ignore[name-defined, misc]
        def __call__(self, image: np.ndarray) -> Any:
            with pytest.raises(InputError, match="another run is preparing"):
                film.run(originals, tmp_path / "out")
            return super().__call__(image)

    prepare(originals / "id1", tmp_path / "out", film.small(), detector=Meddling())


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.fixture(scope="session")
def red_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector in a file: the box around all that is red, which a new process can load."""

    def ints(name: str, *values: int) -> Any:
        return numpy_helper.from_array(np.array(values, np.int64), name)

    nodes = [
        helper.make_node("Split", ["image", "one"], ["r", "g", "b"], axis=1),
        helper.make_node("Greater", ["r", "bright"], ["very"]),
        helper.make_node("Less", ["g", "dark"], ["little"]),
        helper.make_node("And", ["very", "little"], ["both"]),
        helper.make_node("Cast", ["both"], ["red"], to=TensorProto.FLOAT),
    ]
    for axis, side in ((2, "x"), (3, "y")):
        nodes += [
            helper.make_node("ReduceMax", ["red"], [f"any{side}"], axes=[axis], keepdims=0),
            helper.make_node("ArgMax", [f"any{side}"], [f"first{side}"], axis=2, keepdims=0),
            helper.make_node("ArgMax", [f"any{side}"], [f"last{side}"], axis=2, keepdims=0, select_last_index=1),
            helper.make_node("Cast", [f"first{side}"], [f"low{side}"], to=TensorProto.FLOAT),
            helper.make_node("Cast", [f"last{side}"], [f"until{side}"], to=TensorProto.FLOAT),
            helper.make_node("Add", [f"until{side}", "unit"], [f"high{side}"]),
        ]
    nodes += [
        helper.make_node("ReduceMax", ["red"], ["seen"], axes=[2, 3], keepdims=0),
        helper.make_node("Concat", ["lowx", "lowy", "highx", "highy", "seen"], ["boxes"], axis=1),
    ]
    constants = [
        numpy_helper.from_array(np.array(value, np.float32), name)
        for name, value in (("bright", 150), ("dark", 100), ("unit", 1))
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "h", "w"])
    boxes = helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 5])
    graph = helper.make_graph(nodes, "red", [image], [boxes], [*constants, ints("one", 1, 1, 1)])
    path = tmp_path_factory.mktemp("detector") / "red.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.mark.slow
def test_two_processes_write_what_one_does(film: Any, originals: Path, tmp_path: Path, red_network: Path) -> None:
    options = film.small(detector=str(red_network), format="packed")
    prepare(originals, tmp_path / "one", options)
    prepare(originals, tmp_path / "two", options, workers=2)
    assert film.tree(tmp_path / "two") == film.tree(tmp_path / "one")
    assert len(clip_files(film.tree(tmp_path / "one"))) == 5


def command(film: Any, raw: Path, out: Path, network: Path) -> list[str]:
    sizes = {name: getattr(film.small(), name) for name in ("size", "min_frames", "min_side", "every", "test_fraction")}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    return [
        sys.executable, "-m", "dagan_rt", "prepare", str(raw), "--out", str(out), "--detector", str(network),
        "--workers", "2", *options,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_itself_ended_and_continued(
    film: Any, raw: Path, tmp_path: Path, red_network: Path, number: int, heed_interrupts: Any
) -> None:
    for person in range(4, 12):
        film.write(raw / f"id{person}" / "talk.mp4", film.talk(40, wall=person))
    prepare(raw, tmp_path / "whole", film.small(detector=str(red_network), max_frames=1024))
    out = tmp_path / "out"
    line = command(film, raw, out, red_network)
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    while process.poll() is None:
        if (out / "manifest.jsonl").exists() and (out / "manifest.jsonl").read_bytes().count(b"\n") >= 2:
            process.send_signal(number)
            break
        time.sleep(0.002)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), complaint
    assert "run the same command to continue" in complaint or number != signal.SIGINT
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and group_of(process.pid):
        time.sleep(0.05)
    assert not group_of(process.pid)  # no process of it is left
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert film.tree(out) == film.tree(tmp_path / "whole")
    assert done.stdout.splitlines()[-1].startswith("next: dagan-rt train --recipe ")


def group_of(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_process_that_dies_costs_one_video(film: Any, raw: Path, tmp_path: Path, red_network: Path) -> None:
    """Whatever takes a worker down (a decoder's fault, the system out of memory), the others go on."""
    film.write(raw / "id1" / "long.mkv", film.talk(40) * 25)  # so long that the worker is there to be killed
    out = tmp_path / "out"
    process = subprocess.Popen(command(film, raw, out, red_network), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        rows = (out / "manifest.jsonl").read_bytes().count(b"\n") if (out / "manifest.jsonl").exists() else 0
        if rows == 6:
            for pid in children(process.pid):
                os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "1 its decoder crashed" in printed
    assert {row["file"] for row in manifest.Manifest(out).rows.values() if row.get("skipped") == video.CRASHED} == {
        "id1/long.mkv"
    }


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [int(one) for one in found]
