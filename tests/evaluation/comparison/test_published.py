"""The published comparison is of the recipes that ship, and its table says what its numbers say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dagan_rt._assets import asset
from dagan_rt.evaluation.comparison.orderings import VARIANTS
from dagan_rt.evaluation.comparison.plan import Plan


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    values = json.loads(asset("benchmarks", "results", "table1.json").read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def test_its_recipes_are_those_that_ship(published: dict[str, Any]) -> None:
    plan = Plan.read(asset("train", "recipes"), VARIANTS, published["seeds"])
    assert published["provenance"]["recipes"] == plan.digests()
    assert published["seeds"] >= 3 and set(published["variants"]) == set(VARIANTS)


def test_all_had_the_same_budget(published: dict[str, Any]) -> None:
    runs = [run for variant in VARIANTS for run in published["runs"][variant]]
    assert len(runs) == len(VARIANTS) * published["seeds"] and len({run["samples"] for run in runs}) == 1


def test_the_table_holds_its_numbers(published: dict[str, Any]) -> None:
    table = asset("train", "table1", "table1.md").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    metrics = [cell.split()[0].lower() for cell in header[1:]]
    rows = {name: dict(zip(metrics, cells, strict=True)) for name, *cells in lines}
    for variant in VARIANTS:
        assert set(metrics) == set(published["scores"][variant])
        for metric, found in published["scores"][variant].items():
            shown, half = rows[variant][metric].split(" ± ")
            for text, value in ((shown, found["value"]), (half, (found["high"] - found["low"]) / 2)):
                last_place = 10.0 ** -len(text.partition(".")[2])
                assert abs(float(text) - value) <= 0.501 * last_place, (variant, metric)
