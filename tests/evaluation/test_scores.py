"""Means and their intervals against every possible resampling, and evaluations through JSON."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from dagan_rt.errors import InputError
from dagan_rt.evaluation.compare import comparison, paired_difference
from dagan_rt.evaluation.scores import Evaluation, Score, aggregate, interval, resampled, score

VALUES = {"a": [1.0, 2.0, 4.0], "b": [10.0, None], "c": [3.0], "d": [None, 7.0, 8.0, 9.0]}


def rows_of(values: dict[str, list[float | None]], metric: str) -> tuple[list[dict], list[str]]:
    flat = [(clip, value) for clip, those in values.items() for value in those]
    return [{metric: value} for _, value in flat], [clip for clip, _ in flat]


def every_resampling(values: dict[str, list[float | None]], square: bool) -> np.ndarray:
    """The statistic of each of the n^n equally likely draws of n clips."""
    statistics = []
    for drawn in itertools.product(values, repeat=len(values)):
        those = [value for clip in drawn for value in values[clip] if value is not None]
        mean = math.fsum(value**2 if square else value for value in those) / len(those)
        statistics.append(math.sqrt(mean) if square else mean)
    return np.sort(statistics)


@pytest.mark.parametrize("metric", ["akd", "prmse"])
def test_cluster_bootstrap_has_the_distribution_of_all_resamplings(metric: str) -> None:
    rows, clusters = rows_of(VALUES, metric)
    values = np.array([math.nan if row[metric] is None else row[metric] for row in rows])
    exact = every_resampling(VALUES, metric == "prmse")
    drawn = np.sort(resampled(metric, [values], clusters, seed=1, resamples=40_000)[0])
    assert np.unique(np.round(drawn, 9)).tolist() == np.unique(np.round(exact, 9)).tolist()
    # The largest distance of the two distribution functions (Kolmogorov, Smirnov): 1.95 / √n is passed once in 1,000.
    below = np.searchsorted(drawn, exact, side="right") / len(drawn)
    gap = np.abs(below - np.searchsorted(exact, exact, side="right") / len(exact)).max()
    assert gap < 1.95 / math.sqrt(40_000)
    found = score(metric, rows, clusters, seed=2)
    assert (found.count, found.failed) == (8, 2)
    low, high = np.quantile(exact, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.4) and found.high == pytest.approx(high, abs=0.4)
    known = [value for those in VALUES.values() for value in those if value is not None]
    expected = math.sqrt(sum(v * v for v in known) / 8) if metric == "prmse" else sum(known) / 8
    assert found.mean == pytest.approx(expected)
    assert score(metric, rows, clusters, seed=2) == found


def test_columns_are_resampled_with_the_same_clips() -> None:
    rng = np.random.default_rng(0)
    values, clusters = rng.normal(size=400), [str(i % 37) for i in range(400)]
    whole = resampled("l1", [values], clusters, 0)
    assert (whole != resampled("l1", [values], clusters, 1)).any()
    assert whole.shape == (1, 2000) and whole.std() == pytest.approx(1 / 20, rel=0.35)
    assert resampled("l1", [values, values * 2], clusters, 0) == pytest.approx(np.stack([whole[0], whole[0] * 2]))


def test_one_clip_has_no_interval_and_no_value_no_mean() -> None:
    one = score("l1", [{"l1": 0.5}, {"l1": 0.7}], ["a", "a"])
    assert one.mean == pytest.approx(0.6) and math.isnan(one.low) and math.isnan(one.high)
    none = score("akd", [{"akd": None}] * 3, ["a", "b", "c"])
    assert math.isnan(none.mean) and math.isnan(none.low) and (none.count, none.failed) == (0, 3)
    assert math.isnan(aggregate("prmse", np.array([]))) and all(map(math.isnan, interval(np.array([math.nan]))))


def evaluation(seed: int, shift: float = 0.0, noise: float = 0.0) -> Evaluation:
    rng = np.random.default_rng(0)
    other = np.random.default_rng(seed)
    rows = []
    for clip in range(12):
        level = rng.normal(scale=5)
        for frame in range(4):
            value = 10 + level + rng.normal() + shift + other.normal() * noise
            rows.append({
                "source_clip": f"c{clip}", "driving_clip": f"c{clip}", "source_identity": "i", "driving_identity": "i",
                "source_frame": 0, "driving_frame": frame, "initial_frame": 0, "l1": value,
                "akd": None if frame else value,
            })  # fmt: skip
    scores = {name: score(name, rows, [row["driving_clip"] for row in rows], 0) for name in ("l1", "akd")}
    return Evaluation("self", scores, rows, {"lpips": "no weights"}, settings={"motion": "absolute"})


def test_paired_differences_see_what_intervals_hide() -> None:
    """Clips differ by much more than the two models do, and in the same way for both."""
    one, other = evaluation(1), evaluation(2, shift=0.5, noise=0.2)
    apart = one.scores["l1"].low < other.scores["l1"].mean < one.scores["l1"].high
    found = paired_difference("l1", one, other)
    assert apart and found is not None and found.distinct and found.count == 48
    differences = [b["l1"] - a["l1"] for a, b in zip(one.rows, other.rows, strict=True)]
    assert found.mean == pytest.approx(sum(differences) / 48)
    by_clip = [differences[i : i + 4] for i in range(0, 48, 4)]
    rng = np.random.default_rng(9)
    brute = [np.mean([by_clip[k] for k in rng.integers(12, size=12)]) for _ in range(4000)]
    assert (found.low, found.high) == pytest.approx(np.quantile(brute, [0.025, 0.975]), abs=0.015)
    shuffled = Evaluation("self", other.scores, other.rows[::-1])
    assert paired_difference("l1", one, shuffled).mean == pytest.approx(found.mean)
    assert paired_difference("akd", one, other).count == 12
    other.rows[4]["akd"] = None  # failed in one of the two: it counts for neither
    fewer = paired_difference("akd", one, other)
    known = [i for i in range(0, 48, 4) if i != 4]
    assert fewer.count == 11 and fewer.mean == pytest.approx(sum(differences[i] for i in known) / 11)
    assert paired_difference("l1", one, Evaluation("self", other.scores, other.rows[:-1])) is None


def test_comparison_reads_better_or_worse() -> None:
    text = comparison([("old", evaluation(1)), ("new", evaluation(2, -0.5, 0.1)), ("same", evaluation(3, 0, 0.3))])
    lines = [line for line in text.splitlines() if line.startswith("| L1")]
    assert len(lines) == 3 and lines[0].count("[") == 4
    assert lines[1].endswith("| 48 | better |") and lines[2].endswith("| 48 | not distinguishable |")
    assert "36 failed" in text
    with pytest.raises(InputError, match="at least two"):
        comparison([("one", evaluation(1))])


def test_json_round_trip() -> None:
    once = evaluation(1)
    values = json.loads(json.dumps(once.to_dict(), allow_nan=False))
    again = Evaluation.from_dict(values, "file.json")
    assert again.rows == once.rows and again.scores == once.scores and again.to_dict() == once.to_dict()
    empty = Evaluation("cross", {"csim": Score(math.nan, math.nan, math.nan, 0, 3)}, [{"csim": None}])
    read = Evaluation.from_dict(json.loads(json.dumps(empty.to_dict(), allow_nan=False)), "file.json")
    assert math.isnan(read.scores["csim"].mean) and read.scores["csim"].failed == 3


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "neither"}, {"rows": 3}, {"rows": [3]}, {"rows": [{}]}, {"scores": []}, {"scores": {"l1": {}}},
        {"scores": {"l1": {"mean": "x"}}}, {"absent": []}, {"notes": None}, {"rows": [{"l1": "x", "akd": 1}]},
        {"rows": [{"l1": [], "akd": 1}]},
    ],
)  # fmt: skip
def test_hostile_json(change: dict) -> None:
    with pytest.raises(InputError, match=r"file\.json is not an evaluation"):
        Evaluation.from_dict(evaluation(1).to_dict() | change, "file.json")
