"""The choice of precisions, on made-up numbers and against every combination there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest

from dagan_rt.errors import InputError
from dagan_rt.export.auto import choose

GRAPHS = ("source", "driving", "motion", "generator")
PRECISIONS = ("fp32", "fp16", "int8")


class Numbers:
    """Seconds and noise of every graph and precision; noise powers add up, as independent errors do."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.seconds = {graph: dict(zip(PRECISIONS, rng.uniform(0.01, 1, 3).tolist(), strict=True)) for graph in GRAPHS}
        levels = {"fp32": (-13, -12), "fp16": (-8, -5), "int8": (-5, -3)}
        self.noise = {
            graph: {precision: 10 ** rng.uniform(*levels[precision]) for precision in PRECISIONS} for graph in GRAPHS
        }
        self.asked: list[dict[str, str]] = []

    def psnr(self, precisions: Mapping[str, str]) -> float:
        self.asked.append(dict(precisions))
        return -10 * math.log10(sum(self.noise[graph][precisions[graph]] for graph in GRAPHS))

    def total(self, precisions: Mapping[str, str]) -> float:
        return sum(self.seconds[graph][precisions[graph]] for graph in GRAPHS)


@pytest.mark.parametrize("budget", [30.0, 40.0, 60.0, 100.0])
def test_against_every_combination(budget: float) -> None:
    optimal = 0
    for seed in range(100):
        numbers = Numbers(seed)
        choice = choose(GRAPHS, numbers.seconds, numbers.psnr, budget)
        assert len(numbers.asked) <= 1 + 2 * len(GRAPHS)  # fp32, then each lower precision at most once
        assert numbers.psnr(choice.precisions) >= budget
        every = [dict(zip(GRAPHS, each, strict=True)) for each in itertools.product(PRECISIONS, repeat=len(GRAPHS))]
        best = min(numbers.total(each) for each in every if numbers.psnr(each) >= budget)
        found = numbers.total(choice.precisions)
        for graph, precision in choice.precisions.items():
            seconds = numbers.seconds[graph]
            assert precision == "fp32" or seconds[precision] <= 0.95 * seconds["fp32"]
            for other in PRECISIONS:  # nothing faster for this graph alone would have kept the budget
                if seconds[other] < min(seconds[precision], 0.95 * seconds["fp32"]):
                    assert numbers.psnr({**choice.precisions, graph: other}) < budget
        optimal += found == pytest.approx(best)
        assert best <= found <= numbers.total(dict.fromkeys(GRAPHS, "fp32"))
    assert optimal >= 60  # greedy: near the best, and mostly the best


def test_a_saving_within_the_noise_is_none() -> None:
    for saved, expected in ((0.04, "fp32"), (0.06, "int8")):
        choice = choose(("a",), {"a": {"fp32": 1.0, "int8": 1.0 - saved}}, lambda it: 60.0, 40)
        assert choice.precisions == {"a": expected}


def test_reasons_name_what_was_measured() -> None:
    seconds = {
        "source": {"fp32": 0.1, "fp16": 0.2},
        "driving": {"fp32": 0.1, "fp16": 0.09, "int8": 0.05},
        "generator": {"fp32": 1.0, "fp16": 1.0, "int8": 0.5},
    }
    reached = {"fp32": 90.0, "fp16": 64.03, "int8": 41.0}

    def psnr(precisions: Mapping[str, str]) -> float:
        driving = 20.0 if precisions["driving"] == "int8" else 90.0
        return min(driving, *(reached[it] for graph, it in precisions.items() if graph != "driving"), 90.0)

    choice = choose(tuple(seconds), seconds, psnr, 40)
    assert choice.precisions == {"source": "fp32", "driving": "fp16", "generator": "int8"}
    assert choice.reasons == [
        "source: fp32 (fp32 100.0 ms, fp16 200.0 ms); nothing is clearly faster",
        "driving: fp16 (fp32 100.0 ms, fp16 90.0 ms, int8 50.0 ms); 41.0 dB end to end with it; "
        "int8 would leave 20.0 dB of the 40 asked for",
        "generator: int8 (fp32 1000.0 ms, fp16 1000.0 ms, int8 500.0 ms); 41.0 dB end to end with it",
    ]


def test_refused_is_said_where_fp32_stays() -> None:
    choice = choose(("a",), {"a": {"fp32": 2.0, "int8": 1.0}}, lambda it: 90.0 if it["a"] == "fp32" else 12.34, 40)
    assert choice.reasons == [
        "a: fp32 (fp32 2000.0 ms, int8 1000.0 ms); nothing faster keeps the budget; "
        "int8 would leave 12.3 dB of the 40 asked for"
    ]


@pytest.mark.parametrize("broken", [math.nan, 12.0])
def test_a_result_that_is_not_a_number_never_keeps_a_budget(broken: float) -> None:
    seconds = {"a": {"fp32": 2.0, "fp16": 1.0}}
    assert choose(("a",), seconds, lambda it: 90.0 if it["a"] == "fp32" else broken, 40).precisions == {"a": "fp32"}
    with pytest.raises(InputError, match="^no precision keeps the budget: fp32 everywhere .* 40 dB; lower the budget$"):
        choose(("a",), seconds, lambda it: broken, 40)
