"""`dagan-rt prepare`: its options are those of the library, and what it prints tells what to do next."""

from __future__ import annotations

import argparse
import dataclasses
import errno
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import dagan_rt.preparation
from dagan_rt.cli import guarded
from dagan_rt.commands import prepare as command
from dagan_rt.preparation import Options, Outcome


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["prepare", *words])


def clip(name: str, split: str) -> dict[str, Any]:
    return {"name": name, "identity": name.split("#")[0], "split": split, "frames": 70}


OUTCOME = Outcome(
    videos=9, clips=[clip("a#x#0-1", "train"), clip("a#y#0-1", "train"), clip("b#x#0-1", "test")],
    skipped=Counter({"no face": 4, "not a video": 2}), dropped=Counter({"too short": 3}), damaged=1, others=5,
    notes=("be careful",),
)  # fmt: skip


def instead(monkeypatch: pytest.MonkeyPatch, act: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def prepare(raw: Path, out: Path, options: Options, **others: Any) -> Any:
        calls.append((raw, out, options, others))
        return act()

    monkeypatch.setattr(dagan_rt.preparation, "prepare", prepare)
    return calls


def run(*words: str) -> int:
    return guarded("dagan-rt", lambda: command.run(parsed(*words)))


def test_every_option_of_the_library_is_one_of_the_command() -> None:
    assert {field.name: field.default for field in dataclasses.fields(Options)} == command.DEFAULTS
    assert set(command.HELP) == set(command.DEFAULTS)


def test_options_arrive_and_the_outcome_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = instead(monkeypatch, lambda: OUTCOME)
    words = ["--size", "128", "--fps", "12.5", "--format", "packed", "--image", "jpg", "--identities", "video"]
    assert run("raw", "--out", "my data", *words, "--workers", "3", "--quiet", "--force") == 0
    options = Options(size=128, fps=12.5, format="packed", image="jpg", identities="video")
    others = {"workers": 3, "force": True, "progress": False}
    assert calls == [(Path("raw"), Path("my data"), options, others)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "3 of 9 videos gave 3 clips",
        "  train/: 2 clips of 1 identities, 140 frames",
        "  test/: 1 clips of 1 identities, 70 frames",
    ]
    assert "skipped 6 videos: 4 no face, 2 not a video" in lines and "note: be careful" in lines
    assert "left out 3 stretches with a face: 3 too short" in lines
    assert "note: --min-frames, now 64, takes shorter ones" in lines and not any("--min-side" in line for line in lines)
    assert lines[-1] == "next: dagan-rt train --recipe train/recipes/clips-256.toml --data 'my data' --out runs/mine"


def test_no_clip_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    instead(monkeypatch, lambda: dataclasses.replace(OUTCOME, clips=[]))
    assert run("raw", "--out", "data") == 2
    complaint = capsys.readouterr().err
    assert "no clip came of 9 videos (4 no face, 2 not a video; of stretches with a face: 3 too short)" in complaint
    assert "says of each why; --min-frames, now 64, takes shorter ones" in complaint


def raiser(error: BaseException) -> Any:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "what is done is in data; run the same command to continue"),
        (
            OSError(errno.ENOSPC, "No space left on device", "data/x"),
            2,
            "data/x: No space left on device; what is done",
        ),
    ],
)
def test_what_stops_it_is_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str
) -> None:
    instead(monkeypatch, raiser(error))
    assert run("raw", "--out", "data") == code
    complaint = capsys.readouterr().err
    assert words in complaint and complaint.count("\n") == 1


def test_bad_numbers_are_refused_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("absent", "--out", "data", "--workers", "0") == 2
    assert run("absent", "--out", "data", "--size", "1") == 2
    assert run("absent", "--out", "data") == 2
    said = capsys.readouterr().err.splitlines()
    assert "--workers must be at least 1" in said[0] and "--size must be from 16" in said[1]
    assert "the raw folder absent does not exist" in said[2]
