"""From raw videos to clips: what is cropped, what is skipped and why, and what the folder then holds."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dagan_rt.errors import InputError, MissingPackage
from dagan_rt.evaluation.pairs import read_pairs
from dagan_rt.faces import detector_file
from dagan_rt.preparation import Options, prepare
from dagan_rt.preparation import video as video_module
from dagan_rt.training.data import ClipFolder


def rows(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len({row["file"] for row in found}) == len(found)
    return {row["file"]: row for row in found}


def frames(out: Path, clip: dict[str, Any]) -> np.ndarray:
    folder = out / clip["split"] / clip["name"]
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{number:07d}.png" for number in range(clip["frames"])]
    return np.stack([np.asarray(Image.open(file)) for file in files])


def red_box(image: np.ndarray) -> np.ndarray:
    """Sub-pixel edges of the one red rectangle: where the share of red falls to half."""
    red = np.clip((image[..., 0].astype(float) - image[..., 1]) / (230 - 20), 0, 1)
    rows_, columns = red.max(1), red.max(0)
    ends = []
    for profile in (columns, rows_):
        inside = np.flatnonzero(profile > 0.5)
        ends.append((inside[0], inside[-1] + 1))
    return np.array([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], float)


def test_the_crop_holds_the_whole_way_of_the_face(film: Any, tmp_path: Path) -> None:
    """A face that walks: one fixed square around all of its way, and the face where it has to be in each frame."""
    way = [(60 + step, 50 + step // 2, 100 + step, 100 + step // 2) for step in range(20)]
    film.write(tmp_path / "raw/anna/walk.mp4", [film.scene(box) for box in way])
    outcome = film.run(tmp_path / "raw", tmp_path / "out", size=64)
    (clip,) = outcome.clips
    assert (clip["start"], clip["end"], clip["frames"], clip["identity"]) == (0, 19, 20, "anna")
    assert clip["name"] == "anna#walk#000000-000019"
    left, top, right, bottom = clip["box"]
    around = np.array([60, 50, 119, 109])
    side = 1.8 * 59  # margin 0.4 on either side
    np.testing.assert_allclose([right - left, bottom - top], side, atol=3)
    np.testing.assert_allclose([(left + right) / 2, (top + bottom) / 2], (around[:2] + around[2:]) / 2, atol=2)
    assert clip["scale"] == pytest.approx(64 / (right - left), abs=1e-6)
    shown = frames(tmp_path / "out", clip)
    assert shown.shape == (20, 64, 64, 3)
    for image, box in zip(shown, way, strict=True):
        np.testing.assert_allclose(red_box(image), (np.array(box) - [left, top] * 2) * clip["scale"], atol=1.6)
    assert rows(tmp_path / "out")["anna/walk.mp4"]["fps"] == 25


def test_a_cut_between_two_people_gives_two_clips(film: Any, tmp_path: Path) -> None:
    one = [film.scene((30, 40, 70, 90), wall=1)] * 13
    other = [film.scene((150, 60, 190, 110), wall=2)] * 12
    film.write(tmp_path / "raw/tv/cut.mp4", [*one, *other])
    clips = film.run(tmp_path / "raw", tmp_path / "out").clips
    assert [(clip["start"], clip["end"]) for clip in clips] == [(0, 12), (13, 24)]
    for clip, centre in zip(clips, ((50, 65), (170, 85)), strict=True):
        left, top, right, bottom = clip["box"]
        np.testing.assert_allclose([(left + right) / 2, (top + bottom) / 2], centre, atol=2)
        middle = frames(tmp_path / "out", clip)[:, 16, 16].astype(int)
        assert (middle[:, 0] > 150).all() and (middle[:, 1] < 90).all()


def test_two_people_side_by_side_give_two_clips(film: Any, tmp_path: Path) -> None:
    film.write(tmp_path / "raw/duo/talk.mp4", [film.scene((30, 40, 70, 90), (150, 60, 190, 110))] * 10)
    clips = film.run(tmp_path / "raw", tmp_path / "out").clips
    assert [clip["name"] for clip in clips] == ["duo#talk#000000-000009", "duo#talk#000000-000009-2"]
    assert clips[0]["box"][2] <= 115 < clips[1]["box"][0] + 10
    assert len({clip["identity"] for clip in clips}) == 1


def test_a_face_that_goes_and_comes_back(film: Any, tmp_path: Path) -> None:
    seen, empty = [film.scene((60, 50, 100, 100))] * 12, [film.scene()] * 12
    film.write(tmp_path / "raw/a/x.mp4", [*seen, *empty, *seen])
    clips = film.run(tmp_path / "raw", tmp_path / "out").clips
    assert len(clips) == 2 and clips[0]["start"] == 0 and 10 <= clips[0]["end"] <= 11
    assert 24 <= clips[1]["start"] <= 25 and clips[1]["end"] == 35


@pytest.mark.parametrize(("rate", "fps", "expected"), [(50, 25, 20), (20, 25, 40), (30, 10, 13), (30, 29.9, 40)])
def test_frames_are_left_out_down_to_the_rate_asked_for(
    film: Any, tmp_path: Path, rate: int, fps: float, expected: int
) -> None:
    film.write(tmp_path / "raw/a/x.mp4", film.talk(40), rate=rate)
    (clip,) = film.run(tmp_path / "raw", tmp_path / "out", fps=fps).clips
    assert abs(clip["frames"] - expected) <= 1 and clip["end"] >= 37
    row = rows(tmp_path / "out")["a/x.mp4"]
    assert row["frames"] == 40 and row["fps"] == (fps if fps < 0.99 * rate else rate)


def test_long_takes_become_several_clips_and_the_rest_is_counted(film: Any, tmp_path: Path) -> None:
    film.write(tmp_path / "raw/a/x.mp4", film.talk(35))
    outcome = film.run(tmp_path / "raw", tmp_path / "out", max_frames=15, min_frames=10)
    assert [(clip["start"], clip["end"]) for clip in outcome.clips] == [(0, 14), (15, 29)]
    assert outcome.dropped == {"too short": 1}


def test_packed_clips_hold_the_very_frames(film: Any, few: Path, tmp_path: Path) -> None:
    film.run(few, tmp_path / "folders", image="jpg", quality=80)
    film.run(few, tmp_path / "packed", image="jpg", quality=80, format="packed")
    unpacked = {}
    for file in (tmp_path / "packed").glob("*/*.zip"):
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                assert entry.compress_type == zipfile.ZIP_STORED
                name = f"{file.parent.name}/{file.name.removesuffix('.zip')}/{entry.filename}"
                unpacked[name] = archive.read(entry)
    folders = {
        name: data for name, data in film.tree(tmp_path / "folders").items() if name.startswith(("train", "test"))
    }
    assert unpacked == folders and len(folders) == 9 + 10
    assert (tmp_path / "packed/contact.png").read_bytes() == (tmp_path / "folders/contact.png").read_bytes()


def test_the_whole_folder(film: Any, raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = film.run(raw, out, seed=1)
    assert (outcome.videos, len(outcome.clips), outcome.others) == (6, 5, 1)
    assert outcome.skipped == {"not a video": 1} and outcome.damaged == 0 and not outcome.dropped
    sides: dict[str, set[str]] = {}
    for clip in outcome.clips:
        sides.setdefault(clip["identity"], set()).add(clip["split"])
    assert all(len(where) == 1 for where in sides.values()) and set().union(*sides.values()) == {"train", "test"}
    sheet = np.asarray(Image.open(out / "contact.png"))
    assert sheet.shape[1] > 5 * 128
    for split in ("train", "test"):
        clips = ClipFolder(out / split, 32, progress=False)
        wanted = [clip for clip in outcome.clips if clip["split"] == split]
        assert sorted(clips.name(place) for place in range(len(clips))) == [clip["name"] for clip in wanted]
        assert all(clips.identity(place) == clips.name(place).split("#")[0] for place in range(len(clips)))
    for mode in ("self", "cross"):
        sets = read_pairs(out / f"pairs-{mode}.csv", ClipFolder(out / "test", 32, progress=False))
        same = {one.source_clip == one.driving_clip for one in sets.sets}
        assert same == {mode == "self"}
    assert list(rows(out)) == sorted(rows(out))


def test_videos_that_are_added_change_nothing_that_is_there(film: Any, few: Path, tmp_path: Path) -> None:
    film.run(few, tmp_path / "out")
    before = film.tree(tmp_path / "out")
    for person in range(4, 7):
        film.write(few / f"id{person}" / "talk.mp4", film.talk(8, wall=person))
    outcome = film.run(few, tmp_path / "out")
    after = film.tree(tmp_path / "out")
    clips = {name: data for name, data in before.items() if name.startswith(("train", "test"))}
    assert clips.items() <= after.items() and len(outcome.clips) == 5
    film.run(few, tmp_path / "afresh")
    assert film.tree(tmp_path / "afresh") == after


# ---------------------------------------------------------------------------------------------------------------------
# Bad data


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def gigantic(path: Path) -> None:
    """A film whose header declares 30000 x 30000 pixels; a GIF says it in two 16-bit numbers."""
    film = [Image.new("RGB", (64, 48), (level, 0, 0)) for level in (0, 99)]
    film[0].save(path, "GIF", save_all=True, append_images=film[1:])
    path.write_bytes(path.read_bytes()[:6] + 2 * (30000).to_bytes(2, "little") + path.read_bytes()[10:])


def bad_files(film: Any) -> dict[str, tuple[Callable[[Path], object], str]]:
    """Ways to make a bad video, and what is said of it."""

    def cut_off(path: Path) -> None:
        whole = film.write(path, film.talk(20)).read_bytes()
        path.write_bytes(whole[: len(whole) // 3])  # the index is at the end

    return {
        "text": (lambda path: path.write_text("hello"), "not a video"),
        "zero": (lambda path: path.touch(), "empty file"),
        "cut off": (cut_off, "not a video"),
        "sound": (audio_only, "no picture stream"),
        "gigantic": (gigantic, "no frame can be decoded"),
        "one frame": (lambda path: film.write(path, film.talk(1)), "too short"),
        "nobody": (lambda path: film.write(path, [film.scene()] * 20), "no face"),
        "small face": (lambda path: film.write(path, [film.scene((60, 60, 66, 66))] * 20), "face too small"),
        "wide": (
            lambda path: film.write(path, [film.scene((10 + 5 * t, 20, 160 + 5 * t, 140)) for t in range(10)]),
            "face moves too far for a square",
        ),
        "nowhere": (lambda path: path.symlink_to(path.parent / "absent"), "cannot be read"),
        "pipe": (os.mkfifo, "cannot be read"),
        "circle": (lambda path: path.symlink_to(path), "cannot be read"),
    }


def test_bad_data_is_reported_file_by_file(film: Any, tmp_path: Path) -> None:
    bad = bad_files(film)
    raw = tmp_path / "raw"
    film.write(raw / "good" / "talk.mp4", film.talk(10))
    for name, (make, _) in bad.items():
        (raw / name).mkdir()
        make(raw / name / "x.mp4")
    outcome = film.run(raw, tmp_path / "out")
    found = {file.split("/")[0]: row.get("skipped") for file, row in rows(tmp_path / "out").items()}
    assert found == {"good": None, **{name: reason for name, (_, reason) in bad.items()}}
    assert outcome.skipped.total() == len(bad) and len(outcome.clips) == 1
    assert outcome.skipped["cannot be read"] == 3


def test_frames_over_the_limit_are_not_decoded(film: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film.write(tmp_path / "raw/a/x.mp4", film.talk(8))
    monkeypatch.setattr("dagan_rt.video.MAX_PIXELS", film.size[0] * film.size[1] - 1)
    assert film.run(tmp_path / "raw", tmp_path / "out").skipped == {"frames too large": 1}


def test_a_video_damaged_in_the_middle_is_used_up_to_there(film: Any, tmp_path: Path) -> None:
    file = film.write(tmp_path / "raw/a/x.mkv", film.talk(60))
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    outcome = film.run(tmp_path / "raw", tmp_path / "out")
    (clip,) = outcome.clips
    row = rows(tmp_path / "out")["a/x.mkv"]
    assert 15 < clip["frames"] <= row["frames"] < 60


def test_links_out_of_the_folder_are_not_followed(film: Any, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    inside = film.write(raw / "a" / "x.mp4", film.talk(10))
    outside = film.write(tmp_path / "other" / "y.mp4", film.talk(10))
    (raw / "a" / "out.mp4").symlink_to(outside)
    (raw / "b").symlink_to(outside.parent)
    (raw / "a" / "same.mp4").symlink_to(inside)
    outcome = film.run(raw, tmp_path / "out")
    reasons = {file: row.get("skipped") for file, row in rows(tmp_path / "out").items()}
    assert reasons == {
        "a/x.mp4": None, "a/same.mp4": None, "a/out.mp4": "link out of the folder", "b": "link to a folder",
    }  # fmt: skip
    assert len(outcome.clips) == 2 and list(reasons) == sorted(reasons)


def test_files_that_may_not_be_read(film: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a one is tried again by the next run. (Permissions do not bind root, so the failure is put in.)"""
    film.write(tmp_path / "raw/a/x.mp4", film.talk(10))
    film.write(tmp_path / "raw/b/y.mp4", film.talk(10))
    there = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "y.mp4":
            raise PermissionError(13, "Permission denied", str(path))
        return there(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert film.run(tmp_path / "raw", tmp_path / "out").skipped == {"cannot be read": 1}
    assert rows(tmp_path / "out")["b/y.mp4"]["detail"] == "Permission denied"
    assert len(film.run(tmp_path / "raw", tmp_path / "out").clips) == 2


def test_strange_names(film: Any, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    video = film.write(tmp_path / "x.mp4", film.talk(8)).read_bytes()
    names = [
        "Zoë 漢字/talk one.mp4", "a#b/x.mp4", "a/" + "long" * 60 + ".mp4", "a/x.mp4", "a/x.mov", "a.mp4", "a/a.mp4",
        os.fsdecode(b"bytes\xff/x.mp4"), "-rf/--out.mp4", "new\nline/tab\t.mp4", ".hidden/.x.mp4",
    ]  # fmt: skip
    for name in names:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes(video)
    outcome = film.run(raw, tmp_path / "out")
    assert len(outcome.clips) == len(names) and len({clip["name"] for clip in outcome.clips}) == len(names)
    assert {os.fsencode(file) for file in rows(tmp_path / "out")} == {os.fsencode(name) for name in names}
    assert "Zoë 漢字#talk one#000000-000007" in {clip["name"] for clip in outcome.clips}
    for clip in outcome.clips:
        assert len(frames(tmp_path / "out", clip)) == 8


def test_a_video_whose_frames_change_their_size(film: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film.write(tmp_path / "raw/a/x.mp4", film.talk(30))
    kept = video_module.kept_frames

    def growing(reader: Any, fps: float) -> Any:
        for number, image in kept(reader, fps):
            yield number, image if number < 15 else image.repeat(2, 0)

    monkeypatch.setattr(video_module, "kept_frames", growing)
    outcome = film.run(tmp_path / "raw", tmp_path / "out")
    assert [(clip["start"], clip["end"]) for clip in outcome.clips] == [(0, 14)] and outcome.damaged == 1


def test_a_video_that_changes_while_it_is_read(film: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film.write(tmp_path / "raw/a/x.mp4", film.talk(30))
    kept, passes = video_module.kept_frames, []

    def shorter(reader: Any, fps: float) -> Any:
        passes.append(1)
        for number, image in kept(reader, fps):
            if len(passes) < 2 or number < 10:
                yield number, image

    monkeypatch.setattr(video_module, "kept_frames", shorter)
    outcome = film.run(tmp_path / "raw", tmp_path / "out")
    assert outcome.skipped == {"changed while it was read": 1}
    assert [path for path in film.tree(tmp_path / "out") if path.startswith(("train", "test", ".partial"))] == []


def test_what_nobody_thought_of_skips_one_video(film: Any, raw: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    class Third(film.RedFaces):  # type: ignore[name-defined, misc]
        def __call__(self, image: np.ndarray) -> Any:
            seen.append(1)
            if len(seen) == 1:
                raise ZeroDivisionError("oh")
            return super().__call__(image)

    outcome = prepare(raw, tmp_path / "out", film.small(), detector=Third())
    assert outcome.skipped == {"failed": 1, "not a video": 1} and len(outcome.clips) == 4
    assert rows(tmp_path / "out")["id0/more/again.mkv"]["detail"] == "ZeroDivisionError: oh"


def test_a_csv_that_names_some(film: Any, raw: Path, tmp_path: Path) -> None:
    table = tmp_path / "people.csv"
    table.write_text("id0,Anna\nid1/talk.mp4,Bob\nid2,Anna\n")
    outcome = film.run(raw, tmp_path / "out", identities=str(table))
    assert [(clip["identity"], clip["name"]) for clip in outcome.clips] == [
        ("Anna", "Anna#id0~more~again.mkv#000000-000007"), ("Anna", "Anna#id0~talk#000000-000008"),
        ("Anna", "Anna#id2~talk#000000-000010"), ("Bob", "Bob#id1~talk#000000-000009"),
    ]  # fmt: skip
    assert outcome.skipped == {"no identity": 2}
    table.write_text("id0,Anna\nid1,Bob\n")
    with pytest.raises(InputError, match="the file of --identities is not the one"):
        film.run(raw, tmp_path / "out", identities=str(table))


# ---------------------------------------------------------------------------------------------------------------------
# Folders and options


def test_folders_that_cannot_be_used(film: Any, raw: Path, tmp_path: Path) -> None:
    empty, file, full = tmp_path / "empty", tmp_path / "file", tmp_path / "full"
    empty.mkdir()
    file.touch()
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    for source, target, words in [
        (tmp_path / "absent", tmp_path / "out", "does not exist"),
        (empty, tmp_path / "out", "holds no video"),
        (raw, file, "must be a folder, but it is a file"),
        (raw, full, "is not empty and was not prepared by this program"),
        (raw, raw / "out", "must not lie in one another"),
        (raw, raw.parent, "must not lie in one another"),
        (raw, raw, "must not lie in one another"),
    ]:
        with pytest.raises(InputError, match=words):
            film.run(source, target)
    assert not (tmp_path / "out").exists() and list(full.iterdir()) == [full / "thesis.txt"]


def test_other_options_are_refused_by_name(film: Any, tmp_path: Path) -> None:
    film.write(tmp_path / "raw" / "a.mp4", film.talk(10))
    film.run(tmp_path / "raw", tmp_path / "out")
    before = film.tree(tmp_path / "out")
    others: dict[str, Any] = {"format": "packed", "image": "jpg", "identities": "video"}
    others |= {"test_fraction": 0.9, "quality": 90, "margin": 0.5}
    for field in dataclasses.fields(Options):
        if field.name == "detector":  # of which the file's content counts
            continue
        value = others.get(field.name) or getattr(film.small(), field.name) + 1
        flag = f"--{field.name.replace('_', '-')}"
        with pytest.raises(InputError, match=f"was prepared with {flag} .* begin anew with --force"):
            film.run(tmp_path / "raw", tmp_path / "out", **{field.name: value})
    assert film.tree(tmp_path / "out") == before


def test_force_begins_anew(film: Any, few: Path, tmp_path: Path) -> None:
    film.run(few, tmp_path / "out", size=16)
    mine = tmp_path / "out" / "train" / "notes.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    prepare(few, tmp_path / "out", film.small(), force=True, detector=film.RedFaces())
    assert mine.read_text() == "mine"
    mine.unlink()
    film.run(few, tmp_path / "afresh")
    assert film.tree(tmp_path / "out") == film.tree(tmp_path / "afresh")
    first = next((tmp_path / "out").glob("t*/*#*"))
    stamp = first.stat().st_mtime_ns
    # With the same options it just goes on.
    prepare(few, tmp_path / "out", film.small(), force=True, detector=film.RedFaces())
    assert first.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "wrong",
    [{"size": 8}, {"fps": 0.5}, {"fps": float("nan")}, {"min_frames": 1}, {"max_frames": 3}, {"margin": -1.0},
     {"quality": 96}, {"test_fraction": 1.1}, {"format": "tar"}, {"image": "webp"}, {"every": 0}, {"seed": -1},
     {"min_side": 5000}],
)  # fmt: skip
def test_options_out_of_range_are_named(film: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(wrong)).replace('_', '-')} must be "):
        film.small(**wrong)


@pytest.mark.slow
def test_synthetic_heads_by_centerface(film: Any, tmp_path: Path) -> None:
    """The detector that users get: a head that drifts over a wall ends up in the middle of one crop."""
    try:
        detector_file()
    except MissingPackage:
        pytest.skip("the extra faces is not installed")
    from dagan_rt.training.heads import draw_clip

    clip, frames_, truth = draw_clip(3, 12, 128), [], []
    for number in range(12):
        frame = film.scene()
        left, top = 40 + 2 * number, 10 + number
        frame[top : top + 128, left : left + 128] = clip.frames[number]
        frames_.append(frame)
        points = (clip.landmarks[number] + 1) / 2 * 127 + [left, top]
        truth.append(np.concatenate([points.min(0), points.max(0)]))
    film.write(tmp_path / "raw/id3/drift.mp4", frames_)
    (found,) = prepare(tmp_path / "raw", tmp_path / "out", film.small(size=64, every=3)).clips
    around = np.concatenate([np.min(truth, 0)[:2], np.max(truth, 0)[2:]])
    left, top, right, bottom = found["box"]
    assert found["frames"] == 12 and left <= around[0] and top <= around[1]
    assert right >= around[2] and bottom >= around[3]
    middle = np.array([left + right, top + bottom]) / 2
    np.testing.assert_allclose(middle, (around[:2] + around[2:]) / 2, atol=0.1 * (right - left))
