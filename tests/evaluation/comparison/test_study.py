"""The whole comparison on tiny networks: what is finished is not repeated, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dagan_rt.errors import InputError
from dagan_rt.evaluation.comparison import runs, study
from dagan_rt.evaluation.comparison.__main__ import main
from dagan_rt.evaluation.comparison.plan import Plan
from dagan_rt.evaluation.comparison.runs import Measure, Stopped, once, train_once
from dagan_rt.evaluation.comparison.study import Study, first_of_clips
from dagan_rt.evaluation.sets import ImageSet

MEASURE = Measure(clips=2, frames=3, self_sets=4, cross_sets=4)


@pytest.mark.slow
def test_a_comparison_that_is_interrupted_goes_on(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan.read(recipes, ("baseline", "dagan"), 2)
    it = Study(plan, MEASURE, tmp_path, threads=1, progress=False)
    trained: list[str] = []
    train = runs.train

    def counting(recipe: Any, folder: Path, **options: Any) -> Any:
        trained.append(folder.name)
        if len(trained) == 4:  # as if killed within the third run of a variant
            train(recipe, folder, steps=1, **options)
            raise KeyboardInterrupt
        return train(recipe, folder, **options)

    monkeypatch.setattr(runs, "train", counting)
    with pytest.raises(KeyboardInterrupt):
        it.train()
    assert trained == ["depth", "baseline-seed0", "dagan-seed0", "baseline-seed1"]
    first = (tmp_path / "runs" / "dagan-seed0" / "model" / "model.pth.tar").stat().st_mtime_ns
    it.train()
    assert trained[4:] == ["baseline-seed1", "dagan-seed1"]
    assert (tmp_path / "runs" / "dagan-seed0" / "model" / "model.pth.tar").stat().st_mtime_ns == first
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/baseline-seed1/log.jsonl").read_text().splitlines()]
    assert steps[-1] == 2  # step 1 was not done twice: the run went on

    it.finish({"command": "test", "device": "cpu", "processor": "none"})
    table = json.loads((tmp_path / "table1.json").read_text())
    assert list(table["scores"]) == ["baseline", "dagan", "source repeated"]
    assert len(table["scores"]["dagan"]["l1"]["seeds"]) == 2
    assert table["scores"]["dagan"]["l1"]["sets"] == 8
    assert table["depth network"]["samples"] == 2
    assert set(table["attention on the face"]["shares"]) == {"dagan"}
    assert {run["samples"] for run in table["runs"]["dagan"] + table["runs"]["baseline"]} == {4}
    assert set(table["noise floors"]) == {"akd", "aed", "csim", "prmse", "aucon"}
    text = (tmp_path / "table1.md").read_text()
    assert "2 samples" in text
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"self.png", "cross.png", "attention.png"}

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(runs, "evaluate", refuse)
    it.finish({"command": "test", "device": "cpu", "processor": "none"})  # everything is kept
    with pytest.raises(AssertionError, match="measured again"):  # unless it was measured on something else
        Study(plan, Measure(2, 3, 3, 4), tmp_path, threads=1, progress=False).finish({})
    with pytest.raises(InputError, match="holds a run of another recipe"):
        Study(Plan.read(recipes, ("baseline", "dagan"), 2, budget_steps=1), MEASURE, tmp_path).train()


@pytest.mark.slow
def test_two_at_once_are_the_same_trainings(recipes: Path, tmp_path: Path) -> None:
    plan = Plan.read(recipes, ("fomm",), 2)
    one, two = (Study(plan, MEASURE, tmp_path / name, threads=1, progress=False) for name in ("one", "two"))
    one.train()
    two.train(jobs=2)
    for variant, seed in one.runs():
        terms = [json.loads((it.folder(variant, seed) / "log.jsonl").read_text().splitlines()[-1])["terms"]
                 for it in (one, two)]  # fmt: skip
        assert terms[0] == terms[1]


@pytest.mark.slow
def test_a_signal_ends_it_with_checkpoints(recipes: Path, tmp_path: Path) -> None:
    """A second of training, then SIGTERM to the one process that was started; the same command ends it."""
    text = (recipes / "table1.toml").read_text().replace("steps = 2", "steps = 100000")
    (tmp_path / "table1.toml").write_text(text)
    for name in ("baseline", "fomm"):
        (tmp_path / f"table1-{name}.toml").write_text((recipes / f"table1-{name}.toml").read_text())
    command = [
        sys.executable, "-m", "dagan_rt.evaluation.comparison", "--recipes", str(tmp_path),
        "--out", str(tmp_path / "out"), "--variants", "baseline", "fomm", "--seeds", "2", "--jobs", "2",
        "--threads", "1", "--quiet",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    logs = [tmp_path / "out" / "runs" / f"{name}-seed0" / "log.jsonl" for name in ("baseline", "fomm")]
    try:
        while not all(log.exists() for log in logs):
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from there" in errors
    assert all(list((log.parent / "checkpoints").glob("step-*")) for log in logs)


def test_a_folder_of_another_recipe_is_left_alone(recipes: Path, tmp_path: Path) -> None:
    plan = Plan.read(recipes, ("baseline",), 2)
    (tmp_path / "recipe.toml").write_text(plan.recipe("baseline", 1).text)
    with pytest.raises(InputError, match="holds a run of another recipe; choose another --out"):
        train_once(plan.recipe("baseline", 0), tmp_path, 1, False)


def test_results_are_kept_as_long_as_they_are_of_the_same(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute(settings: dict[str, Any]) -> Any:
        return lambda: calls.append(1) or {"settings": settings, "value": len(calls)}

    path = tmp_path / "new" / "result.json"
    assert [once(path, {"a": 1}, compute({"a": 1}))["value"] for _ in range(2)] == [1, 1]
    assert once(path, {"a": 2}, compute({"a": 2}))["value"] == 2
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_the_first_set_of_each_clip() -> None:
    sets = [ImageSet(0, 1, 5, 2), ImageSet(0, 2, 5, 3), ImageSet(1, 0, 3, 2), ImageSet(1, 0, 4, 2)]
    assert first_of_clips(sets, 2) == [sets[0], sets[2]]


def test_exits_of_processes() -> None:
    study._check_exit(0)
    with pytest.raises(Stopped, match="15"):
        study._check_exit(128 + 15)
    with pytest.raises(Stopped, match="9"):
        study._check_exit(-9)
    with pytest.raises(InputError, match="a training failed"):
        study._check_exit(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "--seeds must be at least 2, got 1"),
        (["--budget-steps", "0"], "--budget-steps must be at least 1, got 0"),
        (["--recipes", "absent"], "table1-baseline.toml cannot be read"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
