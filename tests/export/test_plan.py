"""One deployment, from a recipe or from options: read, checked, hashed."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dagan_rt._assets import asset
from dagan_rt.bundle import PRECISIONS, BatchProfile
from dagan_rt.errors import InputError
from dagan_rt.export.plan import BUDGETS, OPSETS, TARGETS, Plan, read_plan
from dagan_rt.tables import fill

RECIPES = sorted(asset("export", "recipes").glob("*.toml"))
#: A value other than the default for every field, that together with the others makes a plan.
CHANGED: dict[str, Any] = {
    "precision": "int8", "targets": ["tensorrt-rtx"], "batch": "1:2:4", "budget": 33.0, "calibrate": "heads",
    "opset": 19, "only": ["attention"], "torch_weights": False, "compute_capabilities": ["8.9"],
    "strip_weights": True, "plugins": "python", "rewrites": "none",
}  # fmt: skip


def write(path: Path, values: dict[str, Any]) -> str:
    """A recipe; what JSON writes of strings, numbers and lists is TOML too."""
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return str(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_ship(path: Path) -> None:
    plan = read_plan(path.stem)
    assert plan == read_plan(str(path))
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and not any(line.startswith("#") for line in lines[1:])
    assert plan.precision in path.stem or plan.precision in ("fp16", "fp32")


def test_there_is_a_recipe_for_each_kind_of_machine() -> None:
    plans = [read_plan(path.stem) for path in RECIPES]
    assert {target for plan in plans for target in plan.targets} == set(TARGETS)
    assert {plan.precision for plan in plans} == set(BUDGETS)


def test_without_anything_it_is_the_default() -> None:
    assert read_plan(None) == Plan()
    assert Plan().profile == BatchProfile(1, 1, 8) and Plan().flavours == () and Plan().precision == "fp32"


def test_a_recipe_has_every_field(tmp_path: Path) -> None:
    assert list(CHANGED) == [entry.name for entry in fields(Plan)]
    plan = read_plan(write(tmp_path / "all.toml", CHANGED))
    assert plan.to_dict() == CHANGED
    assert plan == read_plan(None, CHANGED)
    assert fill(Plan, json.loads(json.dumps(plan.to_dict())), "manifest") == plan


def test_options_replace_the_recipe_key_by_key(tmp_path: Path) -> None:
    recipe = write(tmp_path / "all.toml", CHANGED)
    assert read_plan(recipe, {"batch": "3", "only": []}) == replace(read_plan(recipe), batch="3", only=())
    shipped = read_plan("cpu-int8", {"calibrate": "clips", "torch_weights": True})
    assert shipped.calibrate == "clips" and shipped.torch_weights and shipped.precision == "int8"


def test_the_digest_is_of_every_field() -> None:
    base = Plan(precision="auto", calibrate="clips", targets=("tensorrt",))
    digests = {base.digest}
    for name, value in CHANGED.items():
        digests.add(replace(base, **{name: tuple(value) if isinstance(value, list) else value}).digest)
    assert len(digests) == 1 + len(CHANGED)
    assert base.digest == replace(base).digest and re.fullmatch("[0-9a-f]{12}", base.digest)


def test_the_budget_is_the_precisions_own_unless_given() -> None:
    assert Plan(precision="fp16").least_psnr == BUDGETS["fp16"] > BUDGETS["int8"] > BUDGETS["fp32"] == 0.0
    assert Plan(precision="fp16", budget=41.5).least_psnr == 41.5
    assert set(BUDGETS) == {*PRECISIONS, "auto"}


def test_flavours_are_the_targets_with_engines_once_each() -> None:
    assert Plan(targets=("tensorrt-rtx", "onnx", "tensorrt-rtx")).flavours == ("tensorrt-rtx",)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"precision": "fp8"}, "precision must be one of fp32, fp16, int8, auto, got 'fp8'"),
    ({"targets": ["cuda"]}, "target must be one of onnx, tensorrt, tensorrt-rtx, triton, got 'cuda'"),
    ({"batch": "8:1:32"}, "batch must be N"),
    ({"opset": OPSETS.start - 1}, "opset must be in 17..20, got 16"),
    ({"opset": OPSETS.stop}, "opset must be in 17..20, got 21"),
    ({"precision": "int8"}, "--calibrate"),
    ({"calibrate": "heads"}, "calibrate is for int8 and auto, got it with the precision fp32"),
    ({"compute_capabilities": ["8.9"]}, "compute_capabilities is for engines"),
    ({"compute_capabilities": ["sm_89"], "targets": ["tensorrt-rtx"]}, "number such as 8.9, got 'sm_89'"),
    ({"budget": float("nan")}, "budget must be finite"),
    ({"budget": -3.0}, "budget must be finite and not negative"),
    ({"batch": 4}, "batch must be str, got int 4"),
    ({"targets": "onnx"}, "targets must be a list of str"),
    ({"torch_weights": 1}, "torch_weights must be bool"),
    ({"opset": "17"}, "opset must be int"),
    ({"wings": 2}, "wings is not a known key; expected one of precision, targets"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_wrong_values_are_named_and_so_is_the_recipe(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        read_plan(None, change)
    text = "".join(f"{key} = {'nan' if value != value else json.dumps(value)}\n" for key, value in change.items())
    (tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        read_plan(str(tmp_path / "wrong.toml"))
    assert str(caught.value).startswith(f"{tmp_path / 'wrong.toml'}: ") and "\n" not in str(caught.value)


def test_an_option_is_not_blamed_on_the_recipe_alone() -> None:
    with pytest.raises(InputError, match="^cpu-int8, changed by options: batch must be N.*got 'x'"):
        read_plan("cpu-int8", {"batch": "x"})


def test_recipes_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ", ".join(path.stem for path in RECIPES)
    for name in ("gpu", "", "../cpu-fp32"[3:] + "x"):
        with pytest.raises(InputError, match=f"^recipe must be a TOML file or one of {names}, got '{name}'"):
            read_plan(name)
    for name in ("missing.toml", "no/cpu-fp32"):
        with pytest.raises(InputError, match=f"^recipe {name} cannot be read: No such file"):
            read_plan(name)
    (tmp_path / "triton-graphs").mkdir()  # a folder of that name does not hide the recipe, a file does
    write(tmp_path / "cpu-fp32", {"opset": 20})
    monkeypatch.chdir(tmp_path)
    assert read_plan("triton-graphs").batch == "1:8:32" and read_plan("cpu-fp32").opset == 20
