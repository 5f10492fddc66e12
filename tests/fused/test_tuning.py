"""Which configuration a convolution is run in: measured once, kept, and never trusted when damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dagan_rt import kernels
from dagan_rt.fused import tuning
from dagan_rt.fused.tuning import Tuning


@pytest.fixture
def layer() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """An upsampling layer on maps, its weights in both forms, and the call."""
    x = torch.zeros(2, 16, 16, 64, dtype=torch.half).permute(0, 3, 1, 2)
    weight = torch.zeros(32, 64, 3, 3)
    packs = tuple(kernels.pack(weight, None, "float16", upsample=True, phases=phases) for phases in (4, 1))
    out = torch.zeros(2, 32, 32, 32, dtype=torch.half).permute(0, 3, 1, 2)
    return x, packs, {"stride": 1, "padding": 1, "activation": "relu", "out": out}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is timed; the direct form is the faster one."""
    calls: list[Any] = []

    def seconds(x: Any, packs: list[Any], call: dict[str, Any], launches: int) -> float:
        calls.append((packs[0].phases, call["config"], launches, len(packs)))
        return 1e-6 if packs[0].phases == 1 else 2e-6

    monkeypatch.setattr(tuning, "_seconds", seconds)
    return calls


def test_the_fastest_is_measured_once_and_kept(layer: Any, timed: list[Any], tmp_path: Path, emulated: Any) -> None:
    x, packs, call = layer
    file = tmp_path / "deep" / "tuning.json"
    first = Tuning(file)
    assert first.choose("up", x, packs, call) == (packs[0], None), "outside of measuring the heuristic decides"
    assert not timed
    with first.measuring():
        packed, config = first.choose("up", x, packs, call)
        assert packed is packs[1] and config is not None
        count = len(timed)
        assert count >= 4 and {phases for phases, *_ in timed} == {1, 4}
        assert first.choose("up", x, packs, call) == (packed, config)
        assert len(timed) == count
    assert Tuning(file).choose("another layer alike", x, packs, call) == (packed, config)


def test_another_shape_or_option_is_another_layer(layer: Any, timed: list[Any], emulated: Any) -> None:
    x, packs, call = layer
    known = Tuning()
    with known.measuring():
        known.choose("up", x, packs, call)
        before = len(timed)
        known.choose("up", x[:1], packs, call)
        assert len(timed) > before
        before = len(timed)
        known.choose("up", x, packs, call | {"out": torch.zeros(2, 32, 32, 32)})  # float32
        assert len(timed) > before
        before = len(timed)
        known.choose("up", x.to(torch.bfloat16), packs, call | {"out": call["out"].to(torch.bfloat16)})
        assert len(timed) == before, "bfloat16 takes what float16 takes"


def test_large_batches_are_timed_with_fewer_launches(layer: Any, timed: list[Any], emulated: Any) -> None:
    _, packs, call = layer
    x = torch.zeros(8, 16, 16, 64, dtype=torch.half).permute(0, 3, 1, 2)
    with (known := Tuning()).measuring():
        known.choose("up", x, packs, call)
    assert {launches for *_, launches, _ in timed} == {tuning.LAUNCHES // 4}
    assert all(copies <= launches for *_, launches, copies in timed)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": [1, "mma", 0]}', '{"a": [1, "mma", "x", 1]}'])
def test_a_damaged_file_is_measured_anew(
    content: str, layer: Any, timed: list[Any], tmp_path: Path, emulated: Any
) -> None:
    x, packs, call = layer
    (file := tmp_path / "tuning.json").write_text(content)
    known = Tuning(file)
    with known.measuring():
        assert known.choose("up", x, packs, call)[1] is not None
    assert timed and all(len(entry) == 4 for entry in json.loads(file.read_text()).values())


def test_a_folder_that_cannot_be_written_is_no_error(
    layer: Any, timed: list[Any], tmp_path: Path, emulated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    x, packs, call = layer
    (tmp_path / "file").write_text("")
    with (known := Tuning(tmp_path / "file" / "tuning.json")).measuring():
        known.choose("up", x, packs, call)
    assert "cannot be kept" in caplog.text
