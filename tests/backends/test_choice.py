"""Which backend "auto" takes, and how it tells why; the backends are stand-ins, as many as a test needs."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dagan_rt import InputError, Reenactor, backends
from dagan_rt.commands import info

FAST, SLOW, LAST = "fast", "slow", "last"


class Stage:
    """Three backends in place of the real ones; `lacks` and `fails` say what is wrong with which."""

    def __init__(self) -> None:
        self.lacks: dict[str, str] = {}
        self.fails: dict[str, Exception] = {}
        self.opened: list[str] = []

    def module(self, name: str) -> Any:
        return SimpleNamespace(missing=lambda bundle: self.lacks.get(name), open=lambda *_: self._open(name))

    def _open(self, name: str) -> Any:
        self.opened.append(name)
        if name in self.fails:
            raise self.fails[name]
        return SimpleNamespace(name=name)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(backends, "names", lambda: [FAST, SLOW, LAST])
    monkeypatch.setattr(backends, "_module", stage.module)
    return stage


BUNDLE: Any = SimpleNamespace(path="bundle", cannot_reenact=None, config=SimpleNamespace(size=64))


def test_real_backends_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = backends.names()
    assert [name for name in found if name in ("tensorrt", "tensorrt-rtx", "torch-cuda", "onnxruntime", "torch")] == [
        "tensorrt", "tensorrt-rtx", "torch-cuda", "onnxruntime", "torch"
    ]  # fmt: skip


def test_the_first_that_can_run_is_taken_and_nothing_is_said(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.lacks = {FAST: "there is no GPU"}
    backend, choice = backends.open_chosen("auto", BUNDLE)
    assert backend.name == choice.name == SLOW and stage.opened == [SLOW]
    assert choice.reasons == {FAST: "there is no GPU", SLOW: "the fastest that runs here"}
    assert choice.reason == "the fastest that runs here; fast: there is no GPU"
    assert not caplog.records
    assert backends.choose(BUNDLE).reasons == choice.reasons | {LAST: "could run, and comes after slow"}
    assert backends.choose(BUNDLE).name == SLOW


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("engines were built for 8.9, this GPU has 9.0"), "engines were built for 8.9, this GPU has 9.0"),
        (OSError("libcuda.so:\n  driver too old"), "OSError: libcuda.so: driver too old"),
    ],
)
def test_one_that_should_run_and_fails_is_named_aloud(
    stage: Stage, caplog: pytest.LogCaptureFixture, error: Exception, words: str
) -> None:
    stage.fails = {FAST: error}
    backend, choice = backends.open_chosen("auto", BUNDLE)
    assert backend.name == SLOW and stage.opened == [FAST, SLOW]
    assert choice.reason == f"the fastest that runs here; fast: failed to load: {words}"
    message = f"warning: backend fast failed to load: {words}; slow is used instead"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", message)]


def test_one_asked_for_by_name_is_never_replaced(stage: Stage) -> None:
    stage.fails, stage.lacks = {FAST: OSError("driver too old")}, {SLOW: "it is away"}
    with pytest.raises(OSError, match="driver too old"):
        backends.open_backend(FAST, BUNDLE)
    with pytest.raises(InputError, match="backend slow cannot run here: it is away"):
        backends.open_backend(SLOW, BUNDLE)
    assert stage.opened == [FAST]
    assert backends.open_chosen(LAST, BUNDLE)[1].reason == "asked for by name"


def test_when_none_can_run_all_reasons_are_given(stage: Stage) -> None:
    stage.lacks, stage.fails = {FAST: "there is no GPU", LAST: "it is away"}, {SLOW: InputError("it is broken")}
    with pytest.raises(
        InputError, match="no backend can run here: there is no GPU; failed to load: it is broken; it is away"
    ):
        backends.open_backend("auto", BUNDLE)
    stage.lacks[SLOW] = "gone"
    choice = backends.choose(BUNDLE)
    assert choice.name is None and choice.reason == "fast: there is no GPU; slow: gone; last: it is away"


def test_a_session_says_its_backend_and_why(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagan_rt.reenactor.open_frames", lambda backend, bundle, **_: None)
    monkeypatch.setattr("dagan_rt.reenactor.Bundle", SimpleNamespace)
    stage.lacks = {FAST: "there is no GPU"}
    reenactor = Reenactor(SimpleNamespace(**vars(BUNDLE), weights_digest="ab"))  # type: ignore[arg-type]
    assert reenactor.backend_name == SLOW
    assert reenactor.backend_reason == "the fastest that runs here; fast: there is no GPU"


def run_info(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    info.add_parser(parser.add_subparsers())
    args = parser.parse_args(["info", *arguments])
    return int(args.run(args))


def test_info_lists_what_runs_here(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.lacks = {FAST: "there is no\x1b[2J GPU"}
    assert run_info() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["backend", "fast", "*", "last"]
    assert "\x1b" not in lines[1] and lines[2].split(maxsplit=2)[1:] == [SLOW, "the fastest that runs here"]


def test_info_says_it_for_a_bundle_too(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_info(str(tiny_bundle)) == 0
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in backends.names()) and printed.count("\n* ") == 1


def test_info_without_a_file_has_no_use_for_its_depth(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--depth goes with a checkpoint: give its file, too"):
        run_info("--depth", str(tmp_path))


def test_an_unknown_backend_is_answered_with_the_known(stage: Stage) -> None:
    with pytest.raises(InputError, match="backend must be auto or one of fast, slow, last, got 'fats'"):
        backends.open_backend("fats", BUNDLE)
