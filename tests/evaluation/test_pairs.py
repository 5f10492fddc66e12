"""Files of test pairs: what is published reads, what is written comes back, and nothing outside the data is reached."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from dagan_rt.errors import InputError
from dagan_rt.evaluation.pairs import read_pairs, write_pairs
from dagan_rt.evaluation.sets import ImageSet, sample_cross, sample_self
from dagan_rt.images import write_image
from dagan_rt.training.data import ClipFolder

ONE, OTHER = "id10282#Zbz058o9j6s#004557#004656", "id10292#ENIHEvg_VLM#011570#011689"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "pairs.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("ending", ["", ".mp4", ".zip"])
@pytest.mark.parametrize("inside", ["", "test/"])
def test_published_rows_of_frames(tmp_path: Path, fake_clips, ending: str, inside: str) -> None:
    """A header of three columns over rows of two, paths of another machine, folders named like videos."""
    clips = fake_clips({f"{inside}{ONE}{ending}": 120, f"{inside}{OTHER}{ending}": 120})
    path = write(
        tmp_path,
        "source,driving,frame\n"
        f"/data/else/vox1_frames/test/{ONE}.mp4/0000013.png,/data/else/vox1_frames/test/{ONE}.mp4/0000048.png\n"
        f"/data/else/vox1_frames/test/{OTHER}.mp4/0000082.png,/data/else/vox1_frames/test/{ONE}.mp4/0000000.png\n",
    )
    assert read_pairs(path, clips).sets == [ImageSet(0, 13, 0, 48), ImageSet(1, 82, 0, 0)]
    assert read_pairs(path, clips).notes == ()


def test_published_best_frame(tmp_path: Path, fake_clips) -> None:
    clips = fake_clips({ONE: 120, OTHER: 120})
    path = write(
        tmp_path,
        f"source,driving,best_frame\n/x/{ONE}.mp4/0000075.png,/x/{OTHER}.mp4/0000034.png,/x/{OTHER}.mp4/0000053.png\n"
        f"/x/{ONE}.mp4/0000075.png,/x/{OTHER}.mp4/0000034.png,/x/{ONE}.mp4/0000053.png\n",
    )
    found = read_pairs(path, clips)
    assert found.sets == [ImageSet(0, 75, 1, 34, 53)]
    assert "1 of 2 rows are left out: 1 × best_frame is not of the driving clip" in found.notes[0]


@pytest.mark.parametrize("header", ["distance,source,driving,frame", "source,driving,frame"])
def test_published_rows_of_clips(tmp_path: Path, fake_clips, header: str) -> None:
    """The source's first frame is driven, by one frame of the clip that is not its first."""
    clips = fake_clips({ONE: 120, OTHER: 90})
    lead = "0.5," if header.startswith("distance") else ""
    path = write(tmp_path, f"{header}\n" + f"{lead}{ONE}.mp4,{OTHER}.mp4,0.0\n" * 200)
    found = read_pairs(path, clips, seed=3)
    assert len(found.sets) == 200 and "200 rows name a whole driving clip" in found.notes[0]
    assert {(it.source_clip, it.source_frame, it.driving_clip, it.initial_frame) for it in found.sets} == {(0, 0, 1, 0)}
    frames = {it.driving_frame for it in found.sets}
    assert min(frames) >= 1 and max(frames) <= 89 and len(frames) > 60
    assert read_pairs(path, clips, seed=3) == found and read_pairs(path, clips, seed=4) != found


def test_frames_by_their_file_names(tmp_path: Path, fake_clips) -> None:
    """CelebV names frames otherwise; a data set that knows its files' names finds them."""

    class Named(fake_clips):
        def frame_name(self, clip: int, frame: int) -> str:
            return f"P_{self.names[clip][0]}_{frame * 3}.jpg_{frame:010d}.jpg"

    clips = Named({"Donald_Trump/Image": 9, "Jack_Ma/Image": 9})
    row = "/d/CelebV/{}/Image/P_{}_{}.jpg_{:010d}.jpg"
    path = write(
        tmp_path, "source,driving\n" + row.format("Jack_Ma", "J", 12, 4) + "," + row.format("Donald_Trump", "D", 3, 1)
    )
    assert read_pairs(path, clips).sets == [ImageSet(1, 4, 0, 1)]
    write_pairs(tmp_path / "again.csv", clips, [ImageSet(1, 4, 0, 1)])
    assert read_pairs(tmp_path / "again.csv", clips).sets == [ImageSet(1, 4, 0, 1)]


def test_what_is_written_comes_back(tmp_path: Path, fake_clips) -> None:
    names = ["plain", "a, b", 'quo"te', "new\nline", "tab\t", "=1+1", "ünï/cödé #2", "x.mp4", "0000013", "-", "🙂"]
    clips = fake_clips({f"who{i}#{name}": 30 for i, name in enumerate(names)})
    for found in (sample_self(clips, 300), sample_cross(clips, 300)):
        sets = [ImageSet(it.source_clip, it.source_frame, it.driving_clip, it.driving_frame, 7) for it in found.sets]
        write_pairs(tmp_path / "pairs.csv", clips, sets)
        read = read_pairs(tmp_path / "pairs.csv", clips)
        assert read.sets == sets and read.notes == ()


def test_folders_on_disk_round_trip(tmp_path: Path) -> None:
    """Folders of frames, a packed clip, and frames whose files are not numbered from 0."""
    for name in (ONE, OTHER):
        (tmp_path / "test" / name).mkdir(parents=True)
        for frame in range(3):
            image = np.full((32, 32, 3), frame * 40, np.uint8)
            write_image(tmp_path / "test" / name / f"{frame:07d}.png", image)
    with zipfile.ZipFile(tmp_path / "test" / "id3#packed#0-9.zip", "w") as packed:
        for frame in range(3):
            packed.write(tmp_path / "test" / ONE / f"{frame:07d}.png", f"{frame:07d}.png")
    (tmp_path / "test" / OTHER / "0000000.png").rename(tmp_path / "test" / OTHER / "P_9.jpg_0000000012.png")
    clips = ClipFolder(tmp_path, 32, progress=False)
    sets = sample_cross(clips, 60).sets
    assert len(clips) == 3 and len(sets) == 54
    write_pairs(tmp_path / "pairs-cross.csv", clips, sets)
    assert read_pairs(tmp_path / "pairs-cross.csv", clips).sets == sets
    text = (tmp_path / "pairs-cross.csv").read_text()
    for name in (
        f"test/{ONE}/0000001.png",
        f"test/{OTHER}/P_9.jpg_0000000012.png",
        "test/id3#packed#0-9.zip/0000002.png",
    ):
        assert name in text


def test_rows_that_name_nothing_are_counted_by_reason(tmp_path: Path, fake_clips) -> None:
    clips = fake_clips({ONE: 10, "a/twin": 10, "b/twin": 10})
    good = f"/x/{ONE}.mp4/3.png"
    rows = [
        f"{good},/x/{ONE}.mp4/0000004.png",
        f"{good},/x/{ONE}.mp4/0000010.png",
        f"{good},/x/{ONE}.mp4/0000010.png",
        f"{good},/x/id9#gone#0.mp4/0000001.png",
        f"{good},/x/../../../etc/passwd",
        f"/x/{ONE}.mp4/../{ONE}.mp4/\u202e\x1b[31m.png,{good}",
        f"{good},",
        f"{good}",
        f"/y/twin/1.png,{good}",
        f"/y/a/twin/1.png,{good}",
        f"{good},/x/{ONE}.mp4/-1.png",
        f"{good},/x/{ONE}.mp4/" + "9" * 5000 + ".png",
        "\x00,\x00",
        f"\\\\host\\{ONE}\\0000005.png,{good}",
    ]
    found = read_pairs(write(tmp_path, "source,driving\n" + "\n".join(rows)), clips)
    assert found.sets == [ImageSet(0, 3, 0, 4), ImageSet(1, 1, 0, 3), ImageSet(0, 5, 0, 3)]
    (note,) = found.notes
    assert "11 of 14 rows are left out" in note and note.isprintable() and len(note) < 1500
    for reason in (
        f"2 × clip {ONE} has no frame 0000010.png", "1 × clip id9#gone#0 is not in the data",
        "2 × a path is missing", "1 × clip twin is in the data 2 times", "; and 1 more",
    ):  # fmt: skip
        assert reason in note


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"source,driving\n", "a header and 1 to"),
        (b"a,b\n1,2\n", "must have the columns source and driving, got 'a', 'b'"),
        (b"source,driving\n\xff\xfe,x\n", "not a CSV file in UTF-8"),
        (b'source,driving\n"unclosed,x\n', "not a CSV file in UTF-8"),
        (b"source,driving\n" + b"x" * 200_000 + b",y\n", "not a CSV file in UTF-8"),
        (b"source,driving\n/x/else/1.png,/x/else/2.png\n", "none names two frames of the data; first, clip else"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not a CSV file in UTF-8"),
    ],
)
def test_files_that_are_no_pairs(tmp_path: Path, fake_clips, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_pairs(write(tmp_path, content), fake_clips({ONE: 5}))
    assert "pairs.csv" in str(error.value)


def test_sizes_are_bounded(tmp_path: Path, fake_clips, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagan_rt.evaluation.pairs.LARGEST_FILE", 1000)
    with pytest.raises(InputError, match="at most 1,000 bytes"):
        read_pairs(write(tmp_path, "source,driving\n" + "a,b\n" * 1000), fake_clips({ONE: 5}))
    monkeypatch.setattr("dagan_rt.evaluation.pairs.LARGEST_FILE", 10_000)
    monkeypatch.setattr("dagan_rt.evaluation.pairs.MOST_SETS", 10)
    with pytest.raises(InputError, match="1 to 10 rows, got 12 lines"):
        read_pairs(write(tmp_path, "source,driving\n" + "a,b\n" * 11), fake_clips({ONE: 5}))
