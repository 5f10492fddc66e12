"""Whatever ends an export, at whatever moment: the bundle is the older one or the new one, whole, or not there.

Most exports run in forked children of one process that has imported everything, and end themselves at a chosen moment:
before one of the calls that change a file or folder, which Python's audit events announce.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dagan_rt import checkpoints
from dagan_rt.bundle import Bundle
from dagan_rt.export.__main__ import main

if sys.platform == "win32":
    pytest.skip("needs fork and POSIX signals", allow_module_level=True)

SERVER = r"""
import json, os, resource, signal, sys, traceback
import onnx, onnxruntime, onnxsim, PIL.Image, torch, tqdm
import torch.utils.serialization.config
from dagan_rt import backends, checkpoints, images, kernels, staging
from dagan_rt.export import attention, calibration, counts, graphs, passes, precision, rebuild, triton, verify, winograd
from dagan_rt.export import onnx as tracing
from dagan_rt.export.__main__ import main

backends.names()  # imports every backend
PIL.Image.preinit()

torch.set_num_threads(1)
with open(os.devnull, "wb") as nowhere:  # for what PyTorch imports when it is first used
    torch.onnx.export(torch.nn.Identity(), (torch.zeros(1),), nowhere, dynamo=False)
torch.arange(1, device="meta")
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}
events = 0


def ends_at(root, moment, number):
    def hook(event, arguments):
        global events
        writes = event == "open" and root in str(arguments[0]) and set(arguments[1] or "w") & set("wxa+")
        if writes or event in CHANGES or (event == "ctypes.dlsym" and arguments[1] == "renameat2"):
            events += 1
            if events == moment:
                os.kill(os.getpid(), number)
    sys.addaudithook(hook)


for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            if not job["exchange"]:
                staging._exchange = lambda one, other: False
            if job["largest_file"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
            signal.setitimer(signal.ITIMER_REAL, job["seconds"])  # SIGALRM kills at once, in the middle of anything
            ends_at(job["root"], job["moment"], job["signal"])
            code = main(job["arguments"])
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Exports:
    """Exports of one checkpoint, each in a process of its own."""

    def __init__(self, folder: Path, arguments: list[str], heed_interrupts: Callable[[], None]) -> None:
        self._log, self._arguments = folder / "log", arguments
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=heed_interrupts,
        )  # fmt: skip

    def run(self, out: Path, *more: str, moment: int = 0, number: int = signal.SIGKILL, **job: Any) -> int:
        """Export, and return the exit code, negative for a signal; see SERVER for what it may be told."""
        assert self._server.stdin and self._server.stdout
        arguments = [*self._arguments, "--out", str(out), *more]
        told = {"exchange": True, "largest_file": 0, "seconds": 0} | job
        told |= {"arguments": arguments, "root": str(out.parent), "moment": moment, "signal": int(number)}
        self._server.stdin.write(json.dumps(told | {"log": str(self._log)}) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    @property
    def printed(self) -> str:
        return self._log.read_text()

    def close(self) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


@pytest.fixture(scope="module")
def exports(
    small_model: Any, tmp_path_factory: pytest.TempPathFactory, heed_interrupts: Callable[[], None]
) -> Iterator[Exports]:
    """Of one part of a small FOMM: a graph, the weights, the report and the manifest."""
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save(folder / "model.pth.tar", small_model("fomm"))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "face.png")
    quick = ["--only", "feature_encoder", "--verify-with", str(folder / "face.png")]
    server = Exports(folder, ["--checkpoint", str(folder / "model.pth.tar"), *quick], heed_interrupts)
    yield server
    server.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def opset(bundle: Path) -> int:
    """Which of two exports a bundle is, every hash in it checked."""
    return int(Bundle.open(bundle).manifest["plan"]["opset"])


def check_new(bundle: Path, code: int, number: int) -> None:
    """After an export to a free place was ended."""
    assert code in (-number, 128 + number)
    if bundle.exists():
        assert opset(bundle) == 18
    if code > 0:
        assert names(bundle.parent) in ([], ["bundle"])


def check_forced(bundle: Path, code: int, number: int) -> None:
    """After an export over an older bundle was ended."""
    assert code in (-number, 128 + number)
    assert opset(bundle) in (17, 18)
    if code > 0:
        assert names(bundle.parent) == ["bundle"]


SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_an_export_that_is_ended_leaves_no_half_bundle(
    exports: Exports, tmp_path: Path, number: int, every: int
) -> None:
    bundle = tmp_path / "bundle"
    for moment in itertools.count(1, every):
        shutil.rmtree(bundle, ignore_errors=True)
        code = exports.run(bundle, "--opset", "18", moment=moment, number=number)
        if code == 0:  # it had come to its end before
            break
        check_new(bundle, code, number)
        assert len(names(tmp_path)) <= 2  # what the run before left was cleared up
    assert moment > 10
    assert exports.run(bundle, "--opset", "18", "--force") == 0
    assert opset(bundle) == 18 and names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_an_export_that_is_ended_leaves_the_older_bundle_or_the_new(
    exports: Exports, tmp_path: Path, number: int, every: int
) -> None:
    bundle, older = tmp_path / "here" / "bundle", tmp_path / "older"
    bundle.parent.mkdir()
    assert exports.run(older, "--opset", "17") == 0
    shutil.copytree(older, bundle)
    found = set()
    for moment in itertools.count(1, every):
        shutil.rmtree(bundle)
        shutil.copytree(older, bundle)
        code = exports.run(bundle, "--opset", "18", "--force", moment=moment, number=number)
        if code == 0:
            break
        check_forced(bundle, code, number)
        found.add(opset(bundle))
    assert 17 in found and (every > 1 or 18 in found)
    assert exports.run(bundle, "--opset", "19", "--force") == 0
    assert opset(bundle) == 19 and names(bundle.parent) == ["bundle"]


@pytest.mark.slow
def test_where_folders_cannot_be_exchanged_the_next_export_brings_the_older_bundle_back(
    exports: Exports, tmp_path: Path
) -> None:
    bundle, older = tmp_path / "here" / "bundle", tmp_path / "older"
    bundle.parent.mkdir()
    assert exports.run(older, "--opset", "17") == 0
    shutil.copytree(older, bundle)
    absent = 0
    for moment in itertools.count(1):
        shutil.rmtree(bundle)
        shutil.copytree(older, bundle)
        code = exports.run(bundle, "--opset", "18", "--force", moment=moment, exchange=False)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if not bundle.exists():
            absent += 1
            assert exports.run(bundle, "--opset", "18") == 2 and "--force" in exports.printed
        assert opset(bundle) in (17, 18)
    assert absent == 1  # the moment between the two renames
    assert opset(bundle) == 18 and names(bundle.parent) == ["bundle"]


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_an_export_killed_at_any_time(exports: Exports, tmp_path: Path, count: int) -> None:
    """In the middle of writing a file, too, which no event announces."""
    bundle, rng = tmp_path / "bundle", random.Random(count)
    begun = time.monotonic()
    assert exports.run(bundle, "--opset", "17") == 0
    whole = time.monotonic() - begun
    for _ in range(count):
        code = exports.run(bundle, "--opset", "18", "--force", seconds=rng.uniform(0.01, whole))
        assert code in (0, -signal.SIGALRM) and opset(bundle) in (17, 18)
    assert exports.run(bundle, "--opset", "19", "--force") == 0
    assert opset(bundle) == 19 and names(tmp_path) == ["bundle"]


@pytest.fixture(scope="module")
def checkpoint(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("dagan")
    checkpoints.save(folder / "model.pth.tar", small_model("dagan"), depth_dir=folder / "depth")
    return ["--checkpoint", str(folder / "model.pth.tar"), "--depth", str(folder / "depth")]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("files", [0, 3])
def test_the_command_itself(
    tmp_path: Path, checkpoint: list[str], number: int, code: int, files: int, heed_interrupts: Callable[[], None]
) -> None:
    """A whole export as a shell starts it, ended as soon as its folder holds so many files."""
    command = [sys.executable, "-m", "dagan_rt.export", *checkpoint, "--out", str(tmp_path / "bundle")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    while process.poll() is None:
        partial = next(tmp_path.glob(".bundle.*.partial"), None)
        if partial and sum(path.is_file() for path in partial.rglob("*")) >= files:
            process.send_signal(number)
            break
        time.sleep(0.001)
    _, complaint = process.communicate()
    assert process.returncode == code, complaint
    if code > 0:
        assert names(tmp_path) == []
        assert complaint == ("python -m dagan_rt.export: interrupted\n" if number == signal.SIGINT else "")
    assert not (tmp_path / "bundle").exists()
    assert main(command[3:]) == 0
    assert Bundle.open(tmp_path / "bundle").weights and names(tmp_path) == ["bundle"]


def refused_in_one_line(exports: Exports, words: str) -> None:
    lines = exports.printed.splitlines()
    assert len(lines) == 1 and lines[0].startswith("python -m dagan_rt.export: error: "), lines
    assert words in lines[0], lines[0]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Any]:
    """`mount(options) -> folder`: a file system in memory of its own."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mounted(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        return folder

    yield mounted
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None or os.name != "posix" or os.geteuid() != 0, reason="only root mounts")
def test_a_full_disk(exports: Exports, mount: Any) -> None:
    folder = mount("size=8m")
    bundle = folder / "bundle"
    assert exports.run(bundle, "--opset", "17") == 0, exports.printed
    sizes = [entry["bytes"] for entry in Bundle.open(bundle).manifest["files"].values()]
    ballast = folder / "ballast"
    for free in (0, sizes[0] // 2, sum(sizes) // 2, sum(sizes) - 3000):  # of graph, report and weights
        room = shutil.disk_usage(folder).free - free
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room)
        assert exports.run(bundle, "--opset", "18", "--force") == 2
        refused_in_one_line(exports, "No space left on device")
        assert "bundle" in exports.printed
        assert opset(bundle) == 17 and names(folder) == ["ballast", "bundle"]
        ballast.unlink()
    assert exports.run(bundle, "--opset", "18", "--force") == 0
    assert opset(bundle) == 18 and names(folder) == ["bundle"]


def test_a_limit_on_file_sizes(exports: Exports, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    assert exports.run(bundle, "--opset", "17") == 0, exports.printed
    sizes = sorted(entry["bytes"] for entry in Bundle.open(bundle).manifest["files"].values())
    for limit in (sizes[0] // 2, *(size - 1 for size in sizes)):
        assert exports.run(bundle, "--opset", "18", "--force", largest_file=limit) == 2, exports.printed
        refused_in_one_line(exports, "File too large")
        assert "bundle" in exports.printed
        assert opset(bundle) == 17 and names(tmp_path) == ["bundle"]


@pytest.mark.skipif(shutil.which("mount") is None or os.name != "posix" or os.geteuid() != 0, reason="only root mounts")
def test_a_disk_that_cannot_be_written(exports: Exports, mount: Any) -> None:
    folder = mount("ro")
    assert exports.run(folder / "bundle") == 2
    refused_in_one_line(exports, f"{folder / 'bundle'} cannot be written: the folder {folder} is read-only")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_that_may_not_be_written(exports: Exports, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert exports.run(tmp_path / "bundle") == 2
    refused_in_one_line(exports, f"the folder {tmp_path} is read-only")
    tmp_path.chmod(0o755)
    assert names(tmp_path) == []
