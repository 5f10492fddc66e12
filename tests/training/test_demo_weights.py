"""The demo weights that ship are the ones their log speaks of, and beat repeating the source on faces never seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dagan_rt import checkpoints
from dagan_rt._assets import asset
from dagan_rt.training.held_out import HeldOutScore, evaluate
from dagan_rt.training.recipe import Recipe, read_recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return read_recipe(asset("train", "recipes", "demo.toml"))


def logged() -> HeldOutScore:
    rows = [json.loads(line) for line in asset("train", "demo", "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [row["held_out"] for row in rows if "held_out" in row][-1]
    return HeldOutScore(last["l1"], last["repeat_l1"], last["disparity_l1"])


def test_the_log_is_of_the_whole_recipe(recipe: Recipe) -> None:
    rows = [json.loads(line) for line in asset("train", "demo", "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1]["step"] == sum(stage.steps for stage in recipe.stages)
    assert asset("train", "demo", "curve.png").stat().st_size > 0


def test_they_fit_in_ten_megabytes() -> None:
    folder = asset("train", "demo")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 10_000_000


@pytest.mark.slow
def test_they_score_on_held_out_faces_what_the_log_says(recipe: Recipe, tmp_path: Path) -> None:
    from dataclasses import replace

    from dagan_rt.training.sets import data_sets

    # The training faces are not needed: one is drawn instead of all.
    data = replace(recipe.data, identities=1, cache=str(tmp_path), workers=1)
    _, held_out = data_sets(replace(recipe, data=data), progress=False)
    model = checkpoints.load(asset("train", "demo", "model.pth.tar"), asset("train", "demo", "depth"))
    assert model.config == recipe.network
    score = evaluate(model, held_out, recipe.data.held_out_pairs)
    assert score.repeat_l1 == pytest.approx(logged().repeat_l1, rel=1e-3)
    assert score.l1 == pytest.approx(logged().l1, rel=2e-3)
    assert score.disparity_l1 == pytest.approx(logged().disparity_l1, rel=2e-3)
    assert score.ratio < 1
