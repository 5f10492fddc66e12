"""The benchmark of training on tiny networks: what is checked, how time is divided, which forms there are."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from dagan_rt.benchmarking import training, training_runs
from dagan_rt.benchmarking.__main__ import main
from dagan_rt.benchmarking.clock import Clock
from dagan_rt.benchmarking.processes import ended
from dagan_rt.benchmarking.rows import CALL, STEP_PARTS, Results, Row
from dagan_rt.benchmarking.training import Plan, difference, measure, plan_for
from dagan_rt.benchmarking.training_runs import apart, forms_of, planned
from dagan_rt.errors import InputError
from dagan_rt.training.recipe import Recipe, parse_recipe

RECIPE = """
[network]
variant = "dagan"
{network}
[data]
kind = "clips"
path = "nowhere"
[training]
batch = 2
ema = 0.99
threads = 1
device = "cpu"
[start]
model = "nowhere.pth.tar"
[vgg]
file = "nowhere.pth"
width = 0.05
[losses]
scales = 1
[[stage]]
name = "first"
epochs = 4
[[stage]]
name = "last"
steps = 2
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def recipe(tiny_network: str) -> Recipe:
    return parse_recipe(RECIPE.format(network=tiny_network))


@pytest.fixture(scope="module")
def plan(recipe: Recipe, cache: Path) -> Plan:
    return plan_for(recipe, cache=str(cache), steps=3, parts=2, device="cpu")


@pytest.fixture
def row() -> Row:
    return Row("training", {"recipe": "tiny"}, "dagan-rt fp32", "measured")


def test_a_form_is_measured(plan: Plan, row: Row, monkeypatch: Any) -> None:
    begun = time.perf_counter()
    found = measure(plan, row)
    assert (found.status, found.error) == ("measured", 0.0)  # the same computation as a plain trainer's
    assert found.times.keys() == {CALL, *STEP_PARTS} and found.times[CALL].repeats == 3
    parts = sum(found.times[name].p50 for name in STEP_PARTS)
    assert 0 < parts < 1e6 * (time.perf_counter() - begun)
    assert all(found.times["forward"].p50 > found.times[name].p50 for name in ("data", "average", "rest"))
    values = found.values
    assert values["samples/s"] == pytest.approx(2e6 / found.times[CALL].p50, rel=0.9) and values["waiting %"] < 20
    assert values["perceptual ms"] > 0 and "loader samples/s" not in values
    assert values.get("peak bytes", 1e8) > 5e7
    assert found.method == "wall clock; parts: 2 more steps; in quicker forms: attention"


@pytest.mark.slow
def test_in_16_bits_without_average(plan: Plan, row: Row) -> None:
    found = measure(replace(plan, steps=1, parts=1), row, precision="bf16", ema=0.0)
    assert found.status == "measured" and found.precision == "bf16", found.reason
    assert found.error is not None and 0 < found.error <= 0.1 == found.tolerance
    assert "average" not in found.times


def test_what_differs_from_a_plain_trainer_is_wrong(plan: Plan, row: Row, monkeypatch: Any) -> None:
    genuine = training.plain_terms

    def otherwise(trainer: Any) -> dict[str, float]:
        terms = genuine(trainer)
        return terms | {"perceptual": 1.01 * terms["perceptual"]}

    monkeypatch.setattr(training, "plain_terms", otherwise)
    found = measure(plan, row)
    assert found.status == "wrong" and not found.times and found.reason.endswith("off by 9.9e-03")


def test_a_timed_step_that_is_not_finite_is_wrong(plan: Plan, row: Row, monkeypatch: Any) -> None:
    genuine = training.Trainer._optimise
    monkeypatch.setattr(
        training.Trainer, "_optimise", lambda self, batch: genuine(self, batch) if self.step < 2 else {}
    )
    found = measure(plan, row)
    assert (found.status, found.reason, found.times) == ("wrong", "step 2 was not finite", {})


def test_clips_are_read_by_the_loader(recipe: Recipe, tmp_path: Path, row: Row) -> None:
    from PIL import Image

    for clip in ("one", "two"):
        (tmp_path / clip).mkdir()
        for at in range(3):
            pixels = np.random.default_rng(at).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / clip / f"{at}.png")
    plan = plan_for(recipe, data=str(tmp_path), steps=1, parts=1, device="cpu")
    found = measure(plan, row)
    assert found.status == "measured" and found.error == 0.0
    assert found.values["loader samples/s"] > 0 and found.values["waiting %"] > 0


def test_what_a_plan_takes_of_a_recipe(recipe: Recipe) -> None:
    plan = plan_for(recipe, stage="first", batch=6)
    assert [stage.name for stage in plan.recipe.stages] == ["first"] and plan.recipe.stages[0].batch == 6
    assert plan.recipe.stages[0].length(5) == training.ENDLESS
    assert (plan.recipe.vgg.file, plan.recipe.start.model, plan.recipe.data.kind) == ("", "", "heads")
    with pytest.raises(InputError, match="--stage must be one of first, last, got 'other'"):
        plan_for(recipe, stage="other")


def test_time_inside_a_part_within_a_part_counts_once(monkeypatch: Any) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0, 7.5, 15.5])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    with clock.part("not counted"), clock.on() as seconds, clock.part("outer"), clock.part("inner"):
        clock.enter("inmost")
        clock.leave()
    assert seconds == {"outer": 1.0 + 8.0, "inner": 2.0 + 0.5, "inmost": 4.0}


def test_terms_are_compared_one_by_one() -> None:
    terms = {"large": 100.0, "small": 0.001}
    assert difference(terms, terms) == 0
    assert difference(terms | {"large": 101.0}, terms) == pytest.approx(0.01)
    assert difference(terms | {"small": 0.002}, terms) == pytest.approx(0.001, rel=0.01)  # of a hundredth of all
    assert difference({"large": 100.0}, terms) == difference(terms | {"small": math.nan}, terms) == math.inf


def test_the_forms_of_a_recipe() -> None:
    names = [form.name for form in forms_of(["fp32", "bf16"], 0.0)]
    assert names == ["dagan-rt fp32", "dagan-rt fp32 with average", "dagan-rt bf16", "eager fp32", "eager bf16"]
    assert [form.changes for form in forms_of(["bf16"], 0.9)] == [
        {"precision": "bf16"}, {"precision": "bf16", "ema": 0.0}, {"precision": "bf16", "kernels": False}
    ]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path, tiny_network: str) -> Path:
    (tmp_path / "tiny.toml").write_text(RECIPE.format(network=tiny_network))
    return tmp_path / "tiny.toml"


def arguments(*given: str) -> argparse.Namespace:
    from dagan_rt.benchmarking.__main__ import build_parser

    return build_parser().parse_args(["training", *given])


def test_rows_before_anything_is_measured(file: Path) -> None:
    args = arguments("--recipes", str(file), "--batch", "6", "--processes", "3", "--forms", "dagan-rt fp32 wi")
    ((row, form),) = planned(args, file, cuda=False)
    assert row.case == {"recipe": "tiny", "stage": "last", "size": "32", "batch": "6", "processes": "3"}
    assert row.form == form.name == "dagan-rt fp32 without average" and row.status == "skipped"
    assert row.command == (
        "dagan-rt bench training --recipes tiny.toml --batch 6 --processes 3 --steps 10 --parts 5 --device auto "
        "--forms 'dagan-rt fp32 without average'"
    )
    for given, count in (["dagan-rt fp32"], 1), (["dagan-rt"], 2), (["eager"], 1), (None, 3):
        args.forms = given
        assert len(list(planned(args, file, cuda=False))) == count
    args.processes = 4
    with pytest.raises(InputError, match="--batch must be a multiple of the 4 processes, got 6"):
        list(planned(args, file, cuda=False))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--data", "nowhere"], "--data must be a folder of clips, got 'nowhere'"),
        (["--recipes", "nothing"], "train/recipes/nothing.toml"),
        (["--recipes", "nothing.toml"], "nothing.toml"),
        (["--stage", "nothing"], "--stage must be one of"),
    ],
)
def test_wrong_arguments(given: list[str], said: str, capsys: Any) -> None:
    assert main(["training", "--device", "cpu", *given]) == 2
    assert said in capsys.readouterr().err


def test_a_process_that_fails_gives_its_reason(file: Path, tmp_path: Path, row: Row, monkeypatch: Any) -> None:
    assert ended([sys.executable, "-c", "pass"], 60.0) == ""
    assert ended([sys.executable, "-c", "print('first'); raise SystemExit('error: no memory')"], 60.0) == (
        "the process ended with code 1: error: no memory"
    )
    assert ended([sys.executable, "-c", "import time; time.sleep(60)"], 0.5).startswith("not done after")
    args = arguments("--recipes", str(file))
    form = training_runs.Form("dagan-rt fp32", {})
    assert apart(args, file, form, row, tmp_path, time.monotonic() - 1).reason == "no time was left"
    monkeypatch.setattr(training_runs, "ended", lambda arguments, seconds: "it broke")
    refused = apart(args, file, form, row, tmp_path, time.monotonic() + 9)
    assert (refused.status, refused.reason) == ("refused", "it broke")


@pytest.fixture
def kept(tmp_path: Path, file: Path) -> Iterator[Path]:
    yield tmp_path / "out.json"


@pytest.mark.slow
def test_forms_in_processes_of_their_own(file: Path, kept: Path, capsys: Any) -> None:
    given = ["training", "--recipes", str(file), "--steps", "3", "--parts", "2", "--device", "cpu", "--threads", "1"]
    assert main([*given, "--processes", "2", "--forms", "dagan-rt fp32 wi", "--out", str(kept)]) == 0
    printed = capsys.readouterr().out
    (row,) = Results.read(kept).rows
    assert row.status == "measured" and row.values["without averaging ms"] > 0, row.reason
    assert row.error is not None and row.error < 1e-6
    assert "tiny, last, 32 pixels, batch 2, 2 processes" in printed and "averaging gradients" in printed
    assert main(["show", str(kept), "--compare", str(kept)]) == 0
    assert "1 rows as before" in capsys.readouterr().out
