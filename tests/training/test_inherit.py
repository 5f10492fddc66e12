"""Recipes with a base: merged as documented, complete as text, and nothing read outside the folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dagan_rt.errors import InputError
from dagan_rt.tables import parse
from dagan_rt.training.inherit import MOST_BASES, merge, resolved_text, to_toml
from dagan_rt.training.recipe import parse_recipe

BASE = """
[network]
size = 128
depth_decoder_widths = [1, 2, 3, 4, 5]
[training]
batch = 4
learning_rate = 1e-3
[[stage]]
name = "first"
steps = 3
learning_rate = { generator = 1e-3, keypoints = 1e-4 }
[stage.losses]
pixel = 1.0
[[stage]]
name = "second"
steps = 4
"""


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def tables_of(path: Path) -> dict[str, Any]:
    return parse(resolved_text(path), "resolved")


def test_without_a_base_the_text_is_the_file(tmp_path: Path) -> None:
    write(tmp_path, alone="# a comment\n" + BASE)
    assert resolved_text(tmp_path / "alone.toml") == "# a comment\n" + BASE


def test_tables_merge_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, base=BASE, mine='base = "base.toml"\n[network]\nvariant = "fomm"\n[data]\nframes = 9\n')
    expected = parse(BASE, "base")
    expected["network"]["variant"] = "fomm"
    expected["data"] = {"frames": 9}
    assert tables_of(tmp_path / "mine.toml") == expected
    recipe = parse_recipe(resolved_text(tmp_path / "mine.toml"))  # complete: nothing left to look up
    assert (recipe.network.variant, recipe.network.size, len(recipe.stages)) == ("fomm", 128, 2)


def test_stages_are_patched_by_name(tmp_path: Path) -> None:
    change = "[stage.first]\nsteps = 30\nlearning_rate = 5e-4\n[stage.first.losses]\ngradient = 2.0\n"
    write(tmp_path, base=BASE, mine=f'base = "base.toml"\n{change}')
    first, second = tables_of(tmp_path / "mine.toml")["stage"]
    assert first == {
        "name": "first", "steps": 30, "learning_rate": 5e-4, "losses": {"pixel": 1.0, "gradient": 2.0},
    }  # fmt: skip
    assert second == {"name": "second", "steps": 4}


def test_stages_are_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path, base=BASE, mine='base = "base.toml"\n[[stage]]\nname = "first"\nsteps = 1\n')
    assert tables_of(tmp_path / "mine.toml")["stage"] == [{"name": "first", "steps": 1}]


def test_a_base_may_have_a_base(tmp_path: Path) -> None:
    write(tmp_path, base=BASE, middle='base = "base.toml"\n[network]\nsize = 96\nquery_width = 3\n')
    write(tmp_path, mine='base = "middle.toml"\n[network]\nsize = 32\n')
    network = tables_of(tmp_path / "mine.toml")["network"]
    assert (network["size"], network["query_width"], network["depth_decoder_widths"]) == (32, 3, [1, 2, 3, 4, 5])
    assert resolved_text(tmp_path / "mine.toml").startswith("# mine.toml on middle.toml on base.toml, merged\n")


def test_merging_alters_neither() -> None:
    base: dict[str, Any] = {"a": {"b": 1}, "stage": [{"name": "x", "steps": 1}]}
    merged = merge(base, {"a": {"b": 2}, "stage": {"x": {"steps": 2}}}, "file")
    assert merged == {"a": {"b": 2}, "stage": [{"name": "x", "steps": 2}]}
    assert base == {"a": {"b": 1}, "stage": [{"name": "x", "steps": 1}]}


@pytest.mark.parametrize("base", ["../base.toml", "/base.toml", "sub/base.toml", "sub\\\\base.toml", "base", "..", ""])
def test_a_base_is_a_plain_file_name(tmp_path: Path, base: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    write(tmp_path, base=BASE)
    write(folder, mine=f'base = "{base}"\n')
    with pytest.raises(InputError, match="plain name of a recipe in the same folder"):
        resolved_text(folder / "mine.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base = 3\n", "plain name of a recipe"),
        ('base = "absent.toml"\n', "absent.toml cannot be read"),
        ('base = "mine.toml"\n', "in a circle"),
        ('base = "base.toml"\nnetwork = "small"\n', "network must be a table, as in its base, got str"),
        ('base = "base.toml"\n[stage.third]\nsteps = 1\n', r"\[stage.third\] must be a table for one of the base's"),
        ('base = "base.toml"\nstage = {first = 3}\n', r"\[stage.first\] must be a table for one of the base's"),
        ('base = "base.toml"\n[data]\nframes = 2026-01-01\n', "cannot hold a date"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, base=BASE, mine=text)
    with pytest.raises(InputError, match=message):
        resolved_text(tmp_path / "mine.toml")


def test_a_chain_of_bases_ends(tmp_path: Path) -> None:
    write(tmp_path, last=BASE, **{f"r{i}": f'base = "r{i + 1}.toml"\n' for i in range(MOST_BASES + 2)})
    with pytest.raises(InputError, match=f"more than {MOST_BASES} files"):
        resolved_text(tmp_path / "r0.toml")


def test_text_written_anew_says_the_same() -> None:
    values = {
        "text": 'quotes " \\ \n \x7f \t é \u2028 and \U0001f600', "whole": -(2**63),
        "yes": True, "small": 1e-300, "big": 1e16, "list": [1, 2], "nested": [[1.5], ["a"]],
        "empty": [], "odd key": 1, "": 2, "a.b": 3, "inf": math.inf,
    }  # fmt: skip
    tables = values | {"table": values | {"inner": values}, "void": {}, "stage": [values, {"name": "é"}]}
    assert parse(to_toml(tables), "written") == tables
