"""Motion templates: what is written comes back, and no file is trusted."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagan_rt.errors import InputError
from dagan_rt.keypoints import KeyPoints
from dagan_rt.template import Moment, Template


def moments(frames: int = 5, points: int = 4) -> list[Moment]:
    rng = np.random.default_rng(0)
    return [
        Moment(
            KeyPoints(rng.random((1, points, 2), np.float32), rng.random((1, points, 2, 2), np.float32)),
            Fraction(number * 1001, 30000),
            Fraction(1001, 30000),
        )
        for number in range(frames)
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Template.of(moments(), Fraction(30000, 1001), "ab" * 32).write(tmp_path / "nod.motion")
    return tmp_path / "nod.motion"


def test_what_is_written_comes_back(path: Path) -> None:
    template = Template.read(path)
    assert (len(template), template.fps, template.model) == (5, Fraction(30000, 1001), "ab" * 32)
    for found, given in zip(template, moments(), strict=True):
        assert (found.time, found.duration) == (given.time, given.duration)
        for one, other in zip(found.points, given.points, strict=True):
            assert one.dtype == np.float32
            np.testing.assert_array_equal(one, other)
    assert path.stat().st_size < 4000 and [entry.name for entry in path.parent.iterdir()] == ["nod.motion"]


def test_other_weights_are_refused_and_unknown_ones_are_not(path: Path) -> None:
    template = Template.read(path)
    template.check_model("ab" * 32, path)
    template.check_model("", path)
    with pytest.raises(InputError, match=r"nod.motion was recorded with other weights \(abab.*record it again"):
        template.check_model("cd" * 32, path)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with np.load(path) as loaded:
        arrays = dict(loaded)
    change(arrays)
    with path.open("wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.update(version=np.int64(2)), "its version must be 1, got 2"),
        (lambda it: it.pop("jacobian"), "expected version, model"),
        (lambda it: it.update(more=np.zeros(3)), "expected version, model"),
        (lambda it: it.update(value=it["value"].astype(np.float64)), "value is float64"),
        (lambda it: it.update(value=it["value"][0]), r"value is float32 \[4, 2\]"),
        (lambda it: it.update(value=it["value"][:, :3]), "do not fit together"),
        (lambda it: it.update(value=it["value"][:0], jacobian=it["jacobian"][:0]), "do not fit together"),
        (lambda it: it["value"].fill(np.nan), "a key point is not a number"),
        (lambda it: it.update(times=it["times"][:3]), "5 frames have 3 times and 5 durations"),
        (lambda it: it.update(times=it["times"][::-1]), "times do not increase"),
        (lambda it: it.update(times=it["times"] - [[5, 0]]), "out of range"),
        (lambda it: it.update(durations=it["durations"] * [[-1, 1]]), "out of range"),
        (lambda it: it.update(durations=it["durations"] * [[1, 0]]), "Fraction"),
        (lambda it: it.update(fps=np.array([5000, 1])), "out of range"),
        (lambda it: it.update(fps=np.array([25, 1, 1])), "fractions must be pairs"),
        (lambda it: it.update(model=np.array([{"a": 1}], object)), "allow_pickle=False"),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(path: Path, change: Any, message: str) -> None:
    rewritten(path, change)
    with pytest.raises(InputError, match=message) as caught:
        Template.read(path)
    assert str(caught.value).startswith(f"motion template {path} is damaged") and "\n" not in str(caught.value)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (tmp_path / "ran").touch, ()

    (tmp_path / "text.motion").write_text("hello")
    (tmp_path / "empty.motion").touch()
    (tmp_path / "pickle.motion").write_bytes(pickle.dumps(Evil()))
    for name in ("absent", "text", "empty", "pickle"):
        with pytest.raises(InputError, match=f"motion template .*{name}.motion "):
            Template.read(tmp_path / f"{name}.motion")
    assert not (tmp_path / "ran").exists()


def test_a_file_that_unpacks_to_more_than_it_may_is_not_unpacked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(entry.file_size for entry in zipfile.ZipFile(path).infolist())
    monkeypatch.setattr("dagan_rt.template.LARGEST", size)
    Template.read(path)
    monkeypatch.setattr("dagan_rt.template.LARGEST", size - 1)
    with pytest.raises(InputError, match=rf"of at most {size - 1:,} bytes"):
        Template.read(path)


def test_an_array_that_claims_to_be_large_is_never_allocated(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    shape = b"(5, 4, 2)"
    assert entries["value.npy"].count(shape) == 1
    entries["value.npy"] = entries["value.npy"].replace(shape + b", }      ", b"(50000000, 4, 2), }")[:4000]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match=r"value claims to be float32 \[50000000, 4, 2\] in"):
        Template.read(path)


def test_every_cut_and_changed_byte_is_a_sentence_or_does_no_harm(path: Path) -> None:
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        spoiled = bytearray(whole[: int(rng.integers(1, len(whole) + 1))])
        for place in rng.integers(0, len(spoiled), 5):
            spoiled[place] = rng.integers(256)
        path.write_bytes(spoiled)
        try:
            Template.read(path)
        except InputError as error:
            assert "\n" not in str(error)


def test_the_name_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in .motion"):
        Template.of(moments(), Fraction(25)).write(tmp_path / "nod.npz")
    assert list(tmp_path.iterdir()) == []
