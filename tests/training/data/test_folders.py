"""Folders of clips: which frames are read of which files, whose faces they are, and what bad files do."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dagan_rt.errors import InputError
from dagan_rt.images import center_square
from dagan_rt.training.data import BadClip, ClipFolder, readers
from dagan_rt.video import VideoReader


def test_every_frame_of_every_kind_of_clip_is_the_right_one(clips: ClipFolder) -> None:
    assert [clips.name(i) for i in range(len(clips))] == ["a.mp4", "b.gif", "people/c", "people/d"]
    expected = [list(range(10, 250, 20)), [0, 109, 182, 255], [15, 95, 175], [40, 200]]
    for clip, levels in enumerate(expected):
        assert clips.frame_count(clip) == len(levels)
        backwards = list(range(len(levels)))[::-1]
        means = [frame.image.mean() for frame in clips.read(clip, backwards)]
        assert means == pytest.approx(levels[::-1], abs=20 if clip == 1 else 3)


def test_frames_of_a_video_are_found_from_wherever_the_last_one_was(tmp_path: Path, write_video: Any) -> None:
    """Before and after the next key frame, alone and in company: the pictures that reading in order gives."""
    for name in ("a.mp4", "b.gif"):
        write_video(tmp_path / name, list(range(5, 250, 12)))
    clips = ClipFolder(tmp_path, 16, progress=False)
    for clip in range(len(clips)):
        count = clips.frame_count(clip)
        with VideoReader(tmp_path / clips.name(clip)) as reader:
            expected = [center_square(image, 16) for image in reader]
        assert count == len(expected) == 21
        for frames in ([20, 0], [3, 4, 5], [0, 1, 2, 3, 19, 20], [7, 7], [12, 5, 13], list(range(21))):
            for frame, number in zip(clips.read(clip, frames), frames, strict=True):
                assert np.array_equal(frame.image, expected[number])


def test_frames_are_the_central_square(tmp_path: Path, gray: Any) -> None:
    picture = gray(0, 20, 60)
    picture[:, 20:40] = 200
    (tmp_path / "clip").mkdir()
    for name in "ab":
        Image.fromarray(picture).save(tmp_path / "clip" / f"{name}.png")
    (frame,) = ClipFolder(tmp_path, 10, progress=False).read(0, [0])
    assert frame.image.shape == (10, 10, 3) and (frame.image == 200).all()


def test_bad_clips_are_left_out_and_counted(tmp_path: Path, write_frames: Any) -> None:
    write_frames(tmp_path / "good", [10, 20])
    write_frames(tmp_path / "lonely", [10])
    (tmp_path / "noise.mp4").write_bytes(b"not a video" * 100)
    (tmp_path / "empty.gif").write_bytes(b"")
    clips = ClipFolder(tmp_path, 8, progress=False)
    assert len(clips) == 1
    assert sorted(path.name for path, _ in clips.bad) == ["empty.gif", "lonely", "noise.mp4"]
    assert dict((path.name, reason) for path, reason in clips.bad)["lonely"] == "1 frames, at least 2 needed"


def test_a_picture_of_the_clips_is_no_clip(tmp_path: Path, write_frames: Any) -> None:
    """`dagan-rt prepare` lays a contact sheet beside the clips."""
    write_frames(tmp_path / "train" / "a", [10, 20, 30])
    Image.new("RGB", (32, 32)).save(tmp_path / "contact.png")
    clips = ClipFolder(tmp_path, 16)
    assert len(clips) == 1 and clips.bad == []
    Image.new("RGB", (32, 32)).save(tmp_path / "train" / "one.png")
    assert [path.name for path, _ in ClipFolder(tmp_path, 16).bad] == ["train"]  # deeper, it is a clip cut short


def test_folders_that_hold_nothing_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        ClipFolder(tmp_path / "nowhere", 8)
    with pytest.raises(InputError, match="holds no clips; expected videos"):
        ClipFolder(tmp_path, 8)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(InputError, match=r"1 clips, none of them readable \(first: a.mp4"):
        ClipFolder(tmp_path, 8)


def test_frames_are_upright(tmp_path: Path) -> None:
    """A camera's turn, kept in the EXIF data, is undone."""
    stored = np.zeros((20, 20, 3), np.uint8)
    stored[:10, :10] = 255  # bright at the top left of what the file holds
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    (tmp_path / "clip").mkdir()
    for number in range(2):
        Image.fromarray(stored).save(tmp_path / "clip" / f"{number}.png", exif=exif)
    (frame,) = ClipFolder(tmp_path, 20, progress=False).read(0, [0])
    assert frame.image[:10, 10:].min() == 255 and frame.image[:, :10].max() == 0


def test_images_of_every_mode_are_frames(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    level = np.full((16, 16), 100, np.uint8)
    Image.fromarray(level).save(folder / "0.png")
    Image.fromarray(level.astype(np.uint16) * 257).save(folder / "1.png")
    clear = np.dstack([level, level, level, np.where(np.arange(16) < 8, 255, 0)[None].repeat(16, 0)]).astype(np.uint8)
    Image.fromarray(clear).save(folder / "2.png")
    Image.fromarray(level).convert("CMYK").save(folder / "3.jpg", quality=100)
    Image.fromarray(level).convert("P").save(folder / "4.png")
    images = [frame.image for frame in ClipFolder(tmp_path, 16, progress=False).read(0, range(5))]
    for number in (0, 1, 4):
        assert (images[number] == 100).all()
    assert (images[2][:, :8] == 100).all() and (images[2][:, 8:] == 255).all()  # over white
    assert np.abs(images[3].astype(int) - 100).max() <= 2


def test_several_sizes_in_one_clip_are_fine_and_said_once(tmp_path: Path, gray: Any) -> None:
    for clip in "ab":
        (tmp_path / clip).mkdir()
        for number, side in enumerate((20, 40, 60)):
            Image.fromarray(gray(50 * number + 50, side, side + 10)).save(tmp_path / clip / f"{number}.png")
    clips = ClipFolder(tmp_path, 16, progress=False)
    with pytest.warns(UserWarning, match="clip a holds frames of 30 × 20 and of 50 × 40") as told:
        assert [frame.image.mean() for frame in clips.read(0, range(3))] == [50, 100, 150]
        clips.at_size(20).read(0, range(3))
        clips.read(1, range(3))
    assert len(told) == 1


def test_a_file_that_goes_bad_makes_a_bad_clip_of_every_kind(
    tmp_path: Path, write_frames: Any, write_video: Any, pack: Any
) -> None:
    """Gone, emptied, cut off, overwritten, or in a folder that has become a file: one kind of error."""
    for clip in "abcde":
        write_frames(tmp_path / "made" / clip, [10, 20, 30])
        pack(tmp_path / "made" / clip)
        write_video(tmp_path / "made" / f"{clip}.mp4", [10, 20, 30])
    clips = ClipFolder(tmp_path / "made", 16, progress=False)
    assert len(clips) == 15
    for clip in range(15):
        path = tmp_path / "made" / clips.name(clip)
        for file in list(path.iterdir()) if path.is_dir() else [path]:
            kept = file.read_bytes()
            if path.stem == "a":
                file.unlink()
            else:
                damaged = {"b": b"", "c": kept[: len(kept) // 3], "d": b"\xff" * len(kept), "e": kept[::-1]}
                file.write_bytes(damaged[path.stem])
        with pytest.raises(BadClip) as error:
            clips.read(clip, [0, 2])
        assert str(error.value)


def test_a_picture_too_large_is_refused_before_it_is_decoded(
    tmp_path: Path, write_frames: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_frames(tmp_path / "clip", [10, 20])
    data = bytearray((tmp_path / "clip" / "0000.png").read_bytes())
    data[16:24] = struct.pack(">2I", 9000, 9000)  # what the header says of width and height
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "clip" / "0000.png").write_bytes(data)
    clips = ClipFolder(tmp_path, 16, progress=False)
    with pytest.raises(BadClip, match="too many pixels: 9000x9000"):
        clips.read(0, [0])
    monkeypatch.setattr(readers, "LARGEST_FILE", 20)
    with pytest.raises(BadClip, match="0001.png takes .* bytes, 20 are allowed"):
        clips.read(0, [1])


def test_pipes_and_notes_of_other_programs_are_no_frames(tmp_path: Path, write_frames: Any) -> None:
    write_frames(tmp_path / "clip", [10, 20])
    (tmp_path / "clip" / "._0000.png").write_bytes(b"a finder's note")
    (tmp_path / ".hidden.mp4").write_bytes(b"")
    write_frames(tmp_path / ".half-written", [10, 20])
    os.mkfifo(tmp_path / "clip" / "pipe.png")
    os.mkfifo(tmp_path / "pipe.mp4")
    clips = ClipFolder(tmp_path, 16, progress=False)  # without waiting for somebody to write into the pipe
    assert (len(clips), clips.frame_count(0), [path.name for path, _ in clips.bad]) == (1, 3, ["pipe.mp4"])
    with pytest.raises(BadClip, match="not a regular file"):
        clips.read(0, [2])


def test_whose_face_a_clip_shows(tmp_path: Path, write_frames: Any) -> None:
    names = ["id1#a#0-9", "id1#b#3-5", "id2#a#1-2", "x/deep/id2#c", "anna/one", "anna/more/two", "bert", "x/three"]
    for name in names:
        write_frames(tmp_path / name, [1, 2])
    clips = ClipFolder(tmp_path, 16, progress=False)
    found = {clips.name(clip): clips.identity(clip) for clip in range(len(clips))}
    assert found == dict(zip(names, ["id1", "id1", "id2", "id2", "anna", "anna", "bert", "x"], strict=True))
    part = clips.subset([0]).at_size(8)
    assert part.identity(0) == clips.identity(0) == "anna"
    alone = ClipFolder(tmp_path / "anna", 16, progress=False)  # "more" is the only folder there
    assert [alone.identity(clip) for clip in range(len(alone))] == ["more/two", "one"]


def test_a_folder_may_itself_be_a_clip(tmp_path: Path, write_frames: Any) -> None:
    write_frames(tmp_path / "clip", [10, 20])
    clips = ClipFolder(tmp_path / "clip", 16, progress=False)
    assert (len(clips), clips.name(0), clips.identity(0)) == (1, ".", ".")
    assert [frame.image.mean() for frame in clips.read(0, [1, 0])] == [20, 10]


def test_frames_have_names(clips: ClipFolder) -> None:
    assert [clips.frame_name(clip, 1) for clip in range(4)] == ["0000001.png", "0000001.png", "0001.png", "0001.jpg"]


def test_clips_travel_to_other_processes(clips: ClipFolder) -> None:
    copy = pickle.loads(pickle.dumps(clips))
    assert np.array_equal(copy.read(2, [1])[0].image, clips.read(2, [1])[0].image)


def test_reading_in_threads_keeps_everybodys_warnings(tmp_path: Path, write_frames: Any) -> None:
    write_frames(tmp_path / "clip", [10, 20])
    clips = ClipFolder(tmp_path, 16, progress=False)
    clips.read(0, [0])
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: clips.read(0, [0, 1]), range(300)))
    assert list(warnings.filters) == before
