"""Names of clips, and the split: functions of a path alone, and different for different paths."""

from __future__ import annotations

import itertools
import os
import unicodedata
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dagan_rt.errors import InputError
from dagan_rt.preparation.names import CLIP, identity_rule, safe_identity, split_of, video_name

paths = st.lists(
    st.text(st.sampled_from("ab.é#~ :-漢\x07\udc80") | st.characters(), min_size=1, max_size=6)
    .map(lambda text: text.replace("/", "").replace("\0", ""))
    .filter(lambda text: text not in ("", ".", "..")),
    min_size=1,
    max_size=3,
).map(lambda parts: PurePosixPath(*parts))


def test_identities_by_folder_video_csv_and_expression(tmp_path: Path) -> None:
    path, alone = PurePosixPath("id10283/XMuH/00001.mp4"), PurePosixPath("anna.mp4")
    assert [identity_rule("folder")(one) for one in (path, alone)] == ["id10283", "anna"]
    assert [identity_rule("video")(one) for one in (path, alone)] == ["id10283~XMuH~00001", "anna"]
    assert [identity_rule(r"/(\w+)/")(one) for one in (path, alone)] == ["XMuH", None]
    table = tmp_path / "people.CSV"
    table.write_text('﻿anna.mp4,Anna\n\n"id10283", "Bob, B."\nid10283/other.mp4,Eve\n', encoding="utf-8")
    rule = identity_rule(str(table))
    wanted = [path, alone, PurePosixPath("id10283/other.mp4"), PurePosixPath("new/x.mp4")]
    assert [rule(one) for one in wanted] == ["Bob, B.", "Anna", "Eve", None]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a.mp4\n", "row 1: expected FILE,IDENTITY, got 1 cells"),
        (b"a.mp4,A\na.mp4,B\n", "row 2: a.mp4 has two identities"),
        (b"\xff\xfe", "cannot be read"),
        (b'"a', "is not a CSV file"),
    ],
)
def test_tables_of_identities_are_checked(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "people.csv").write_bytes(content)
    with pytest.raises(InputError, match=words):
        identity_rule(str(tmp_path / "people.csv"))


@pytest.mark.parametrize(("text", "words"), [("(", "is not a regular"), ("x", "with 0 groups"), ("(a)(b)", "2 groups")])
def test_expressions_are_checked(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        identity_rule(text)
    with pytest.raises(InputError, match="No such file"):
        identity_rule("absent.csv")


def test_plain_names_stay_readable() -> None:
    assert video_name(PurePosixPath("id10283/XMuH/00001.mp4"), True) == "XMuH~00001"
    assert video_name(PurePosixPath("id10283/XMuH/00001.mkv"), True) == "XMuH~00001.mkv"
    assert video_name(PurePosixPath("anna.mp4"), True) == "anna"
    assert video_name(PurePosixPath("漢字/é ö.mp4"), False) == "漢字~é ö"
    assert safe_identity("Zoë 漢") == safe_identity(unicodedata.normalize("NFD", "Zoë 漢")) == "Zoë 漢"


TRAPS = [
    "a/x.mp4", "a/x.mkv", "a/x.mkv.mp4", "a/x.MP4", "a/x.mp4.mp4", "a.mp4", "a/a.mp4", "a/a/a.mp4", "a~a.mp4",
    "a/b-c.mp4", "a/b/c.mp4", "a/b~c.mp4", "a/b_c.mp4", "a/b#c.mp4", "a/b:c.mp4", "a/é.mp4", "a/e\u0301.mp4",
    "e\u0301/x.mp4", "é/x.mp4", "a/\udc80.mp4", "a/\udc81.mp4", "a/ x.mp4", "a/.x.mp4", "a/_x.mp4", "a/-x.mp4",
    "a/" + "x" * 240 + ".mp4", "a/" + "x" * 240 + "y.mp4",
    "漢" * 60 + "/x.mp4", "漢" * 61 + "/x.mp4", "a/x.mp4~1.mp4",
]  # fmt: skip


@pytest.mark.parametrize("rule", ["folder", "video"])
def test_names_tell_videos_apart(rule: str) -> None:
    names = []
    for text in TRAPS:
        path = PurePosixPath(text)
        identity = identity_rule(rule)(path)
        assert identity is not None
        names.append(f"{safe_identity(identity)}#{video_name(path, rule == 'folder')}#000000-000001")
    assert all(CLIP.fullmatch(name) and len(os.fsencode(name)) <= 240 for name in names)
    assert len(set(names)) == len(TRAPS), [
        (a, b) for (a, x), (b, y) in itertools.combinations(zip(TRAPS, names, strict=True), 2) if x == y
    ]


@settings(max_examples=60, deadline=None)
@given(paths, paths, st.sampled_from(["folder", "video"]))
@example(PurePosixPath("0"), PurePosixPath("\ud800"), "folder")  # half a character, as Windows allows in names
def test_any_name_is_a_file_name(one: PurePosixPath, other: PurePosixPath, rule: str) -> None:
    names = []
    for path in (one, other):
        identity = identity_rule(rule)(path)
        assert identity is not None
        name = f"{safe_identity(identity)}#{video_name(path, rule == 'folder')}#123456789-123456799-12.zip"
        assert CLIP.fullmatch(name) and name.count("#") == 2 and name.isprintable()
        assert len(os.fsencode(name)) <= 255 and name[0] not in "-. "
        names.append(name)
    assert (names[0] == names[1]) == (one == other)


def test_the_split_depends_on_name_and_seed_alone() -> None:
    people = [f"id{number}" for number in range(4000)]
    sides = {person: split_of(person, 0.25, 7) for person in people}
    assert sides["id17"] == split_of("id17", 0.25, 7)
    share = sum(side == "test" for side in sides.values()) / len(people)
    assert abs(share - 0.25) < 0.03  # four standard deviations
    wider = {person: split_of(person, 0.4, 7) for person in people}
    assert all(wider[person] == "test" for person in people if sides[person] == "test")  # a larger share only adds
    assert sides != {person: split_of(person, 0.25, 8) for person in people}
    assert {split_of(person, 0.0, 0) for person in people} == {"train"}
    assert {split_of(person, 1.0, 0) for person in people} == {"test"}
