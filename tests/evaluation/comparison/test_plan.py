"""Recipes of the comparison: equal but for the variant, complete, and shortened alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dagan_rt.errors import InputError
from dagan_rt.evaluation.comparison.orderings import VARIANTS
from dagan_rt.evaluation.comparison.plan import Plan
from dagan_rt.training.recipe import TRAINABLE, parse_recipe, read_recipe

RECIPES = Path(__file__).parents[3] / "train" / "recipes"


@pytest.fixture
def changed(recipes: Path, tmp_path: Path) -> Path:
    """A copy of the recipes that a test may spoil."""
    return Path(shutil.copytree(recipes, tmp_path / "recipes", ignore=shutil.ignore_patterns("cache")))


def test_the_recipes_that_ship_are_a_plan() -> None:
    plan = Plan.read(RECIPES, VARIANTS, 3)
    found = {variant: plan.recipe(variant, 2, Path("depth")) for variant in VARIANTS}
    lengths = {tuple((stage.steps, stage.batch) for stage in it.stages) for it in found.values()}
    assert len(lengths) == 1  # equal budgets
    assert {it.training.seed for it in found.values()} == {2}
    assert {variant: it.start.depth for variant, it in found.items()} == {
        "baseline": "", "fomm": "", "dagan_sa": "depth", "dagan": "depth",
    }  # fmt: skip
    for it in found.values():  # the depth network stays as it comes, and truth guides the first stage only
        assert all("depth" not in stage.trained for stage in it.stages)
        assert [stage.losses.landmark > 0 for stage in it.stages] == [True] + [False] * (len(it.stages) - 1)
        assert all(stage.losses.disparity == 0 for stage in it.stages)


def test_the_shared_depth_is_learnt_from_frames_alone() -> None:
    for stage in Plan.read(RECIPES, VARIANTS, 2).depth_recipe().stages:
        assert stage.trained == ("depth", "pose")
        assert stage.losses.disparity == 0


def test_a_user_s_recipe_has_the_published_losses() -> None:
    recipe, published = read_recipe(RECIPES / "synthetic-128.toml"), read_recipe(RECIPES / "vox-256.toml")
    assert recipe.largest_size == recipe.network.size == 128
    last = recipe.stages[-1]
    for name in ("perceptual", "generator_gan", "feature_matching", "equivariance_value", "keypoint_distance"):
        assert getattr(last.losses, name) == getattr(published.stages[-1].losses, name)
    assert last.losses.landmark == last.losses.disparity == 0
    assert set(recipe.stages[0].trained) == {"depth", "pose"}
    assert set(last.trained) == set(TRAINABLE) - {"depth", "pose"}


def test_the_text_of_a_run_is_all_it_takes(recipes: Path) -> None:
    recipe = Plan.read(recipes, ("dagan",), 2).recipe("dagan", 1, Path("some/where"))
    assert parse_recipe(recipe.text) == recipe


def test_a_budget_shortens_every_stage_alike() -> None:
    whole, short = Plan.read(RECIPES, VARIANTS, 2), Plan.read(RECIPES, VARIANTS, 2, budget_steps=40)
    for variant in VARIANTS:
        steps = [[stage.steps for stage in it.recipe(variant, 0, Path("d")).stages] for it in (whole, short)]
        factor = 40 / sum(steps[0])
        assert steps[1] == [max(1, round(count * factor)) for count in steps[0]]
    before, after = (sum(stage.steps for stage in it.depth_recipe().stages) for it in (whole, short))
    assert after == pytest.approx(before * factor, abs=len(short.depth_recipe().stages))


def test_digests_see_content_and_not_comments(recipes: Path, changed: Path) -> None:
    before = Plan.read(recipes, ("baseline", "fomm"), 2).digests()
    path = changed / "table1-fomm.toml"
    path.write_text("# only a comment\n" + path.read_text())
    assert Plan.read(changed, ("baseline", "fomm"), 2).digests() == before
    path = changed / "table1.toml"
    path.write_text(path.read_text().replace("steps = 2", "steps = 3"))
    after = Plan.read(changed, ("baseline", "fomm"), 2).digests()
    assert all(after[variant] != before[variant] for variant in before)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("table1-dagan", "15\n", "15\nquery_width = 3\n", "must be equal but for variant and num_keypoints.*'network'"),
        ("table1-dagan", "15\n", "15\n[data]\nflip = false\n", "differ in 'data'"),
        ("table1-dagan", "15\n", "15\n[stage.all]\nsteps = 3\n", "differ in 'stage'"),
        ("table1-dagan", '"dagan"', '"dagan_sa"', "network.variant must be 'dagan'"),
        ("table1-dagan", "15\n", '15\n[start]\ndepth = "x"\n', r"\[start\] must be left out"),
        ("table1", 'kind = "heads"', 'kind = "clips"', "data.kind must be"),
        ("table1-depth", "photometric = 1.0, smoothness = 1e-3 ", "pixel = 1.0", "must train depth alone|neighbours"),
        ("table1-depth", "[losses]", "[network]\ndepth_width = 8\n[losses]", "network.depth_width must be 4"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_compared(changed: Path, file: str, old: str, new: str, message: str) -> None:
    path = changed / f"{file}.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        Plan.read(changed, VARIANTS, 2)


def test_what_is_not_there(recipes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="table1-dagan.toml cannot be read"):
        Plan.read(tmp_path, ("dagan",), 2)
    with pytest.raises(InputError, match="one or more different names"):
        Plan.read(recipes, ("dagan", "dagan"), 2)
    with pytest.raises(InputError, match="needs the folder of a trained depth network"):
        Plan.read(recipes, ("dagan",), 2).recipe("dagan", 0)
