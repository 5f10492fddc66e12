"""Packed clips: the same pixels as their folder, and nothing but a reason from any other zip."""

from __future__ import annotations

import struct
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dagan_rt.training.data import BadClip, ClipFolder, packed
from dagan_rt.training.data.packed import PackedClip

LEVELS = [10, 60, 110, 160, 210]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A frame folder of five frames, png and jpg."""
    path = tmp_path / "id1#v#0-5"
    path.mkdir()
    rng = np.random.default_rng(0)
    for number, level in enumerate(LEVELS):
        noise = rng.integers(level - 10, level + 10, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(noise).save(path / f"{number:07d}.{'jpg' if number % 2 else 'png'}")
    return path


def test_a_packed_clip_is_its_folder(folder: Path, pack: Any) -> None:
    pack(folder)
    clips = ClipFolder(folder.parent, 16, progress=False)
    assert [clips.name(clip) for clip in range(2)] == ["id1#v#0-5", "id1#v#0-5.zip"]
    assert clips.frame_count(0) == clips.frame_count(1) == 5
    assert clips.identity(0) == clips.identity(1) == "id1"
    order = [3, 0, 4, 4, 1, 2]
    for plain, stored in zip(clips.read(0, order), clips.read(1, order), strict=True):
        assert np.array_equal(plain.image, stored.image)
    assert [clips.frame_name(1, n) for n in range(5)] == [clips.frame_name(0, n) for n in range(5)]


def test_threads_read_one_packed_clip_at_the_same_time(
    folder: Path, pack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = PackedClip(pack(folder))
    expected, read, both = clip.read(range(5)), packed.read_bounded, threading.Barrier(2)

    def read_when_both_have_found_their_frame(*arguments: Any) -> bytes:
        both.wait(timeout=20)
        return read(*arguments)

    monkeypatch.setattr(packed, "read_bounded", read_when_both_have_found_their_frame)
    with ThreadPoolExecutor(2) as pool:
        for number, (image,) in zip((0, 4), pool.map(clip.read, ([0], [4])), strict=True):
            assert np.array_equal(image, expected[number])


def test_what_other_programs_add_to_entries_is_passed_over(folder: Path) -> None:
    """Extra fields of different lengths in the list and before the file, comments of entries, data descriptors."""
    path = folder.parent / "clip.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(file.name)
            entry.extra, entry.comment = struct.pack("<2H4x", 0x7075, 4), b"a note"
            with archive.open(entry, "w") as stored:
                stored.write(file.read_bytes())
    data = path.read_bytes()
    assert np.array_equal(PackedClip(path).read([2])[0], np.asarray(Image.open(folder / "0000002.png")))
    flags = data.find(b"PK\1\2") + 8
    path.write_bytes(data[:flags] + b"\x08\x00" + data[flags + 2 :])  # sizes follow the file: the list has them anyway
    assert len(PackedClip(path)) == 5


def zipped(names: dict[str, bytes], **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, data in names.items():
                archive.writestr(name, data)

    return write


def changed(change: Callable[[bytearray], object], count: int = 2) -> Callable[[Path], None]:
    """A good zip of `count` small entries whose bytes are then changed."""

    def write(path: Path) -> None:
        zipped({f"{number}.png": b"picture" for number in range(count)})(path)
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return write


def put(signature: bytes, offset: int, form: str, *values: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<" + form, data, data.find(signature) + offset, *values)


def twice_the_same(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", b"x")
        archive.writestr("0.png", b"y")


END, ENTRY = b"PK\5\6", b"PK\1\2"
HOSTILE = {
    "a folder": (zipped({"a.png": b"", "in/b.png": b""}), "holds 'in/b.png', expected png and jpg images only"),
    "a way out": (zipped({"../../b.png": b""}), "holds '../../b.png'"),
    "an absolute path": (zipped({"/etc/b.png": b""}), "holds '/etc/b.png'"),
    "a way out on Windows": (zipped({"..\\b.png": b""}), "holds"),
    "another file": (zipped({"a.png": b"", "run.sh": b""}), "holds 'run.sh'"),
    "a zip inside": (zipped({"a.png.zip": b""}), "holds 'a.png.zip'"),
    "a hidden file": (zipped({".a.png": b""}), "holds '.a.png'"),
    "a bomb": (zipped({"a.png": b"\0" * 10_000_000}, compression=zipfile.ZIP_DEFLATED), "a.png is compressed"),
    "one name twice": (twice_the_same, "several files of one name"),
    "encrypted": (changed(put(ENTRY, 8, "H", 1)), "0.png is encrypted"),
    "another method": (changed(put(ENTRY, 10, "H", 8)), "0.png is compressed"),
    "two sizes": (changed(put(ENTRY, 20, "I", 3)), "is compressed"),
    "a huge size": (changed(put(ENTRY, 20, "2I", 1 << 31, 1 << 31)), "0.png is said to take 2,147,483,648 bytes"),
    "beyond the end": (changed(put(ENTRY, 42, "I", 60)), "said to take 7 bytes at 60"),
    "a place that wraps": (changed(put(ENTRY, 42, "I", 0xFFFFFFFF)), "too many, or outside"),
    "more entries than there are": (changed(put(END, 8, "2H", 9, 9)), "list of files is damaged"),
    "fewer entries than there are": (changed(put(END, 8, "2H", 1, 1)), "list of files is damaged"),
    "a huge list": (changed(put(END, 12, "I", 1 << 31)), "damaged, or uses 64-bit sizes"),
    "a list elsewhere": (changed(put(END, 16, "I", 0)), "damaged, or uses 64-bit sizes"),
    "64-bit": (changed(put(END, 8, "2H2I", 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)), "64-bit"),
    "a name beyond the list": (changed(put(ENTRY, 28, "H", 60_000)), "list of files is damaged"),
    "no entry": (changed(put(ENTRY, 0, "I", 0)), "list of files is damaged"),
    "several disks": (changed(put(END, 4, "H", 1)), "one part of several"),
    "a comment": (changed(lambda data: data.extend(b"hello")), "no zip file, or cut off, or has a comment"),
    "cut off": (changed(lambda data: data.__delitem__(slice(-30, None))), "no zip file, or cut off"),
    "nothing": (lambda path: path.write_bytes(b""), "is empty"),
    "no zip": (lambda path: path.write_bytes(b"hello" * 99), "no zip file"),
    "without frames": (zipped({}), "0 frames, at least 2 needed"),
    "one frame": (zipped({"a.png": b"x"}), "1 frames, at least 2 needed"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_zips_are_left_out_with_the_reason(what: str, tmp_path: Path, folder: Path) -> None:
    write, reason = HOSTILE[what]
    write(tmp_path / "bad.zip")
    clips = ClipFolder(tmp_path, 16, progress=False)
    assert [clips.name(clip) for clip in range(len(clips))] == [folder.name]
    ((path, said),) = clips.bad
    assert path.name == "bad.zip" and reason in said


def test_lists_and_images_too_long_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped({f"{number}.png": b"picture" for number in range(50)})(tmp_path / "a.zip")
    assert len(PackedClip(tmp_path / "a.zip")) == 50
    with monkeypatch.context() as patch, pytest.raises(BadClip, match="0.png is said to take 7 bytes"):
        patch.setattr(packed, "LARGEST_FILE", 6)
        PackedClip(tmp_path / "a.zip")
    monkeypatch.setattr(packed, "LARGEST_DIRECTORY", 2000)
    with pytest.raises(BadClip, match="list of files is damaged"):
        PackedClip(tmp_path / "a.zip")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 400))
def test_damaged_bytes_give_frames_or_a_reason(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    """Whatever is changed: the very pixels that were packed, or BadClip."""
    good, bad = tmp_path / "good.zip", tmp_path / "bad.zip"
    if not good.exists():
        with zipfile.ZipFile(good, "w") as archive:
            for number in range(3):
                image = Image.fromarray(np.full((16, 16, 3), 40 * number, np.uint8))
                with archive.open(f"{number}.png", "w") as file:
                    image.save(file, "PNG")
    data = bytearray(good.read_bytes())
    for at, value in changes:
        data[at % len(data)] = value
    bad.write_bytes(data[: len(data) - cut] if cut < 40 else data)
    try:
        clip = PackedClip(bad)
        for number in range(len(clip)):
            (image,) = clip.read([number])
            assert np.unique(image).tolist() in ([0], [40], [80])
    except BadClip as error:
        assert str(error)


def test_a_packed_clip_that_is_rewritten_under_us_is_bad(folder: Path, pack: Any) -> None:
    path = pack(folder)
    clips = ClipFolder(folder.parent, 16, progress=False)
    data = path.read_bytes()
    at = data.find(b"\xff\xd8")  # a jpg's first bytes; most of what follows could be changed without notice
    path.write_bytes(data[: at + 300] + bytes([data[at + 300] ^ 1]) + data[at + 301 :])
    with pytest.raises(BadClip, match="frame [13] is damaged: its checksum differs"):
        clips.read(1, [1, 3])
    path.write_bytes(b"\0" + data)
    with pytest.raises(BadClip, match="frame 0 is not where the list of files says"):
        clips.read(1, [0])
