"""What is held out: clips that nobody trains on, of people that nobody trains on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dagan_rt.errors import InputError
from dagan_rt.training.data import ClipFolder
from dagan_rt.training.recipe import Recipe, parse_recipe
from dagan_rt.training.sets import _set_aside, data_sets


def write_frames(folder: Path, levels: list[int]) -> None:
    folder.mkdir(parents=True)
    for number, level in enumerate(levels):
        Image.fromarray(np.full((24, 32, 3), level, np.uint8)).save(folder / f"{number:04d}.png")


def recipe(folder: Path, held_out: int) -> Recipe:
    return parse_recipe(
        f'[data]\nkind = "clips"\npath = "{folder}"\nheld_out = {held_out}\n'
        '[[stage]]\nname = "a"\nsteps = 1\nsize = 32\nmotion_scale = 1.0'
    )


def names(clips: ClipFolder | None) -> set[str]:
    assert clips is not None
    return {clips.name(clip) for clip in range(len(clips))}


def test_held_out_clips_are_never_trained_on(tmp_path: Path) -> None:
    for number in range(6):
        write_frames(tmp_path / f"clip{number}", [number, number])
    training, held_out = data_sets(recipe(tmp_path, 2), progress=False)
    assert len(training) == 4 and len(held_out) == 2 and not names(training) & names(held_out)
    assert names(held_out) == {"clip1", "clip4"}
    with pytest.raises(InputError, match="nothing is left to train on"):
        data_sets(recipe(tmp_path, 6), progress=False)
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "clip0").rename(tmp_path / "train" / "x")
    (tmp_path / "clip1").rename(tmp_path / "test" / "y")
    training, held_out = data_sets(recipe(tmp_path, 2), progress=False)
    assert (training.name(0), held_out.name(0), len(training), len(held_out)) == ("x", "y", 1, 1)


def test_held_out_people_are_never_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for person in range(5):
        for clip in range(3):
            write_frames(tmp_path / f"id{person}#video{clip}#0-2", [person, clip])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training, held_out = data_sets(recipe(tmp_path, 4), progress=True)
    people = [{name.split("#")[0] for name in names(clips)} for clips in (training, held_out)]
    assert people == [{"id0", "id2", "id4"}, {"id1", "id3"}]
    assert len(training) == 9 and len(held_out) == 4
    said = capsys.readouterr().err
    assert "held out: 4 clips of 2 of 5 identities; 2 more clips of theirs are not used" in said


class People:
    """Clips whose identities are given; `_set_aside` asks for no more."""

    path = Path("people")

    def __init__(self, identities: list[int], chosen: list[int] | None = None) -> None:
        self.identities, self.chosen = identities, list(range(len(identities))) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def identity(self, clip: int) -> str:
        return str(self.identities[self.chosen[clip]])

    def subset(self, chosen: list[int]) -> People:
        return People(self.identities, [self.chosen[clip] for clip in chosen])


@settings(max_examples=120, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.integers(1, 12))
def test_whatever_the_clips_nobody_is_on_both_sides(identities: list[int], count: int) -> None:
    clips: Any = People(identities)
    people, total = set(identities), len(identities)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if total <= count:
            with pytest.raises(InputError, match="nothing is left to train on"):
                _set_aside(clips, count, False)
            return
        training, held_out = _set_aside(clips, count, False)
        again = _set_aside(clips, count, False)
    assert ([part.chosen for part in again]) == [training.chosen, held_out.chosen]
    told = " ".join(str(warning.message) for warning in caught)
    assert training.chosen and held_out.chosen and not set(training.chosen) & set(held_out.chosen)
    assert len(held_out) == count or (len(held_out) < count and f"{len(held_out)} clips are held out" in told)
    sides = [{identities[clip] for clip in part.chosen} for part in (training, held_out)]
    assert bool(sides[0] & sides[1]) == (len(people) == 1) == ("of one identity" in told)
    trained = [clip for clip in range(total) if identities[clip] in sides[0]]
    assert len(people) == 1 or training.chosen == trained  # all clips of whoever is trained on
    if len(people) in (1, total):  # clips are taken one by one: spread over the folder
        assert held_out.chosen == [(2 * i + 1) * total // (2 * count) for i in range(count)]


def test_people_with_too_few_clips_are_not_all_held_out(tmp_path: Path) -> None:
    clips: Any = People([0] * 10 + [1])
    with pytest.warns(UserWarning, match="1 clips are held out, 8 were asked for"):
        training, held_out = _set_aside(clips, 8, False)
    assert (training.chosen, held_out.chosen) == (list(range(10)), [10])


def test_clips_of_one_person_are_split_with_a_warning(tmp_path: Path) -> None:
    for clip in range(4):
        write_frames(tmp_path / f"id1#video{clip}#0-2", [1, clip])
    with pytest.warns(UserWarning, match="all clips in .* are of one identity, id1"):
        training, held_out = data_sets(recipe(tmp_path, 1), progress=False)
    assert len(training) == 3 and len(held_out) == 1 and not names(training) & names(held_out)


def test_people_in_both_train_and_test_are_told(tmp_path: Path) -> None:
    for name in ("train/id1#a#0-2", "train/id2#a#0-2", "train/same", "test/id2#b#0-2", "test/id3#a#0-2", "test/same"):
        write_frames(tmp_path / name, [1, 2])
    with pytest.warns(UserWarning) as told:
        data_sets(recipe(tmp_path, 2), progress=False)
    (warning,) = told
    assert "1 of 2 identities in" in str(warning.message) and "(first: id2)" in str(warning.message)


def test_clips_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    write_frames(tmp_path / "good", [10, 20])
    for name in ("noise.mp4", "noise.zip", "empty.gif"):
        (tmp_path / name).write_bytes(b"not a video" * (len(name) - 9))
    with pytest.warns(UserWarning, match=r"3 of 4 clips in .* are left out \(first: empty.gif"):
        data_sets(recipe(tmp_path, 0), progress=False)
