"""A bundle appears whole or not at all, whatever ends the process that makes it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dagan_rt import staging
from dagan_rt.bundle import Bundle, write_manifest
from dagan_rt.errors import InputError
from dagan_rt.export.subnetworks import subnetworks
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.staging import check_target, staged

CONFIG = NetworkConfig(variant="fomm", num_keypoints=10, size=64)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is a call of Linux")


def fill(folder: Path, content: bytes = b"old") -> None:
    """A bundle whose graphs are no ONNX at all: opening it looks at hashes only."""
    declared = subnetworks(CONFIG)
    for subnetwork in declared:
        (folder / f"{subnetwork.name}.onnx").write_bytes(content)
    graphs = {it.name: it.to_dict() | {"precision": "fp32"} for it in declared}
    about = {"variant": CONFIG.variant, "config": CONFIG.to_dict(), "batch": "1", "tools": {}, "graphs": graphs}
    write_manifest(folder, about)


def content(target: Path) -> bytes:
    """What `fill` wrote, every hash checked."""
    return Bundle.open(target).graph("motion").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    fill(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture(params=["one step", "two renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the exchange of two folders, and without, as on most file systems over a network."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)


def test_a_new_bundle_appears_at_the_end(tmp_path: Path) -> None:
    with staged(str(tmp_path / "bundle")) as partial:
        assert names(partial) == [] and partial.parent == tmp_path
        fill(partial)
        assert not (tmp_path / "bundle").exists()
    assert content(tmp_path / "bundle") == b"old"
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged(tmp_path / "bundle") as partial:
        fill(partial)
        raise error("halfway")
    assert names(tmp_path) == []


@pytest.mark.usefixtures("either_way")
def test_a_bundle_is_replaced_only_by_force(bundle: Path) -> None:
    with pytest.raises(InputError, match="--force"), staged(bundle):
        raise AssertionError("must not run")
    with pytest.raises(KeyboardInterrupt), staged(bundle, force=True) as partial:
        fill(partial, b"new")
        raise KeyboardInterrupt
    assert content(bundle) == b"old"
    with staged(bundle, force=True) as partial:
        fill(partial, b"new")
        assert content(bundle) == b"old"
    assert content(bundle) == b"new"
    assert names(bundle.parent) == ["bundle"]


def test_the_older_bundle_comes_back_if_the_swap_fails(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(OSError, match="disk gone"), staged(bundle, force=True) as partial:
        fill(partial, b"new")
    assert content(bundle) == b"old"
    assert names(bundle.parent) == ["bundle"]


@linux
def test_the_older_bundle_stays_if_the_exchange_is_interrupted(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(one: Path, other: Path) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(staging, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(bundle, force=True) as partial:
        fill(partial, b"new")
    assert content(bundle) == b"old"
    assert names(bundle.parent) == ["bundle"]


def test_what_is_no_bundle_is_never_touched(bundle: Path) -> None:
    root = bundle.parent
    (root / "holiday").mkdir()
    (root / "holiday" / "photo.jpg").write_bytes(b"precious")
    (root / "link").symlink_to(bundle)
    (root / "nowhere").symlink_to("missing")
    before = names(root)
    for target in ("holiday", "holiday/photo.jpg", "link", "nowhere"):
        with pytest.raises(InputError, match="not a bundle"), staged(root / target, force=True):
            raise AssertionError("must not run")
    assert (root / "holiday" / "photo.jpg").read_bytes() == b"precious" and (root / "link").is_symlink()
    assert names(root) == before


def test_what_comes_while_the_export_runs_is_not_touched_either(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a bundle"), staged(tmp_path / "bundle", force=True) as partial:
        fill(partial)
        (tmp_path / "bundle").write_bytes(b"precious")
    assert (tmp_path / "bundle").read_bytes() == b"precious"
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("target", "words"),
    [("no/bundle", "does not exist"), ("file/bundle", "does not exist"), (".", "own name"), ("", "own name"),
     ("..", "own name"), ("/", "own name"), ("a\0b", "own name")],
)  # fmt: skip
def test_places_where_no_bundle_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").touch()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(InputError, match=words):
        check_target(Path(target), force=True)
    (tmp_path / "empty" / "file").unlink()  # an empty folder may be filled, but not the one we are in
    with pytest.raises(InputError), staged(target, force=True):
        raise AssertionError("must not run")
    assert names(tmp_path / "empty") == []


@pytest.mark.usefixtures("either_way")
def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with staged(tmp_path / "empty") as partial:
        fill(partial)
    assert content(tmp_path / "empty") == b"old"
    assert names(tmp_path) == ["empty"]


def test_a_bundle_of_an_older_version_may_be_replaced(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    with pytest.raises(InputError, match="is a bundle already"), staged(bundle):
        raise AssertionError("must not run")
    with staged(bundle, force=True) as partial:
        fill(partial, b"new")
    assert content(bundle) == b"new"


ABANDON = """
import os, signal, sys
from dagan_rt.staging import staged
with staged(sys.argv[1], force=True) as partial:
    (partial / "half.onnx").write_bytes(b"half")
    print(partial.name, flush=True)
    sys.stdin.read() if sys.argv[2] == "wait" else os.kill(os.getpid(), signal.SIGKILL)
"""


def process(target: Path, what: str) -> subprocess.Popen[str]:
    """Another process in the middle of an export."""
    command = [sys.executable, "-c", ABANDON, str(target), what]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


STRANGE = ["bundle", "[ab]*?", "a b", "ü", ".hidden", "-x", "x.partial"]


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_the_next_export_clears_up_after_a_killed_one(tmp_path: Path, name: str) -> None:
    killed = process(tmp_path / name, "die")
    leftover = killed.communicate()[0].strip()
    assert killed.returncode == -9 and names(tmp_path) == [leftover]
    others = [".a.01234567.partial", f".{name}x.01234567.partial", f".{name}.0123.partial", f"{name}.01234567.partial"]
    for other in others:  # of other bundles, or not ours at all
        (tmp_path / other).mkdir()
    with staged(tmp_path / name) as partial:
        assert not (tmp_path / leftover).exists()
        fill(partial)
    assert content(tmp_path / name) == b"old"
    assert names(tmp_path) == sorted([name, *others])


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX only")
def test_the_work_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    living = process(tmp_path / "bundle", "wait")
    assert living.stdin and living.stdout
    leftover = living.stdout.readline().strip()
    with staged(tmp_path / "bundle") as partial:
        assert (tmp_path / leftover / "half.onnx").read_bytes() == b"half"
        fill(partial)
    assert names(tmp_path) == [leftover, "bundle"]
    living.stdin.close()  # let it end: it takes the place of our bundle, as it was forced to
    assert living.wait() == 0
    living.stdout.close()
    assert names(tmp_path) == ["bundle"] and names(tmp_path / "bundle") == ["half.onnx"]


def test_a_bundle_put_aside_by_a_killed_process_comes_back(bundle: Path) -> None:
    """Without the exchange there is a moment between two renames."""
    aside = bundle.parent / ".bundle.01234567.replaced"
    bundle.rename(aside)
    with pytest.raises(InputError, match="is a bundle already"), staged(bundle):
        raise AssertionError("must not run")
    assert content(bundle) == b"old"
    aside.mkdir()  # killed after the second rename, while it deleted
    with staged(bundle, force=True) as partial:
        fill(partial, b"new")
    assert content(bundle) == b"new"
    assert names(bundle.parent) == ["bundle"]


@linux
def test_the_bundle_is_there_at_every_moment(bundle: Path) -> None:
    """Seen by a thread that does nothing but look, while the bundle is replaced over and over."""
    seen, gone, done = 0, 0, threading.Event()

    def look() -> None:
        nonlocal seen, gone
        while not done.is_set():
            try:
                os.stat(bundle)
                seen += 1
            except FileNotFoundError:
                gone += 1

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(300):
            with staged(bundle, force=True) as partial:
                (partial / "manifest.json").write_text('{"format": "dagan-rt bundle"}')
    finally:
        done.set()
        watcher.join()
    assert gone == 0 and seen > 300


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_a_write_that_fails_names_the_bundle(bundle: Path, code: int) -> None:
    with pytest.raises(InputError) as caught, staged(bundle, force=True):
        raise OSError(code, os.strerror(code))
    assert str(caught.value) == f"{bundle} cannot be written: {os.strerror(code)}"
    with pytest.raises(InputError, match="bundle cannot be written: Is a directory"):  # noqa: SIM117
        with staged(bundle, force=True) as partial:
            partial.write_bytes(b"")
    assert content(bundle) == b"old" and names(bundle.parent) == ["bundle"]


def test_errors_about_other_files_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="clip.mp4"), staged(tmp_path / "bundle"):
        (tmp_path / "clip.mp4").read_bytes()
    with pytest.raises(BrokenPipeError), staged(tmp_path / "bundle"):
        raise BrokenPipeError(errno.EPIPE, "nobody reads what we print")
    assert names(tmp_path) == []
