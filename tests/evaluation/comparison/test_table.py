"""The comparison in numbers and on paper: verdicts, pairing, and what the report says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dagan_rt.errors import InputError
from dagan_rt.evaluation import METRICS, Evaluation, Score
from dagan_rt.evaluation.comparison import report
from dagan_rt.evaluation.comparison.orderings import HOLDS, ORDERINGS, PAPER, REVERSED, UNDECIDED, VARIANTS, verdict
from dagan_rt.evaluation.comparison.runs import Trained
from dagan_rt.evaluation.comparison.statistics import Estimate
from dagan_rt.evaluation.comparison.table import REPEAT, compare, mode_of
from dagan_rt.evaluation.scores import BY_MODE

CLIPS, SETS, SEEDS = 12, 36, 3


def between(low: float, high: float, seeds: int = 3) -> Estimate:
    return Estimate((low + high) / 2, low, high, 1.0, 2.0, (0.0,) * seeds, 10, 0)


@pytest.mark.parametrize(
    ("low", "high", "lower_is_better", "expected"),
    [
        (0.1, 0.3, False, HOLDS), (-0.3, -0.1, False, REVERSED), (-0.1, 0.3, False, UNDECIDED),
        (0.1, 0.3, True, REVERSED), (-0.3, -0.1, True, HOLDS), (-0.3, 0.0, True, UNDECIDED),
        (0.0, 0.0, False, UNDECIDED), (math.nan, math.nan, False, UNDECIDED),
    ],
)  # fmt: skip
def test_verdicts(low: float, high: float, lower_is_better: bool, expected: str) -> None:
    assert verdict(between(low, high), lower_is_better) == expected


def test_one_seed_decides_nothing() -> None:
    assert verdict(between(0.1, 0.3, seeds=1), False) == UNDECIDED


def test_orderings_agree_with_what_is_legible_of_the_paper() -> None:
    """Under every reading of an entry that may be one of two."""
    for it in ORDERINGS:
        entries = [PAPER[side].get(it.metric) for side in (it.better, it.worse)]
        if it.metric == "csim":
            continue  # of fomm's only the text speaks
        better, worse = ([float(part) for part in str(entry).split(" or ")] for entry in entries)
        lower = METRICS[it.metric].lower_is_better
        assert max(better) < min(worse) if lower else min(better) > max(worse)


def evaluation(mode: str, offset: float, rng: np.random.Generator, broken: bool = False) -> Evaluation:
    """Made-up rows: each metric is better the smaller the offset; every clip has three sets."""
    rows: list[dict[str, Any]] = []
    for number in range(SETS):
        row: dict[str, Any] = {"source_clip": f"c{number // 3}", "driving_clip": f"c{number // 3}",
                               "source_frame": number, "driving_frame": number + 1}  # fmt: skip
        for metric in BY_MODE[mode]:
            sign = 1 if METRICS[metric].lower_is_better else -1
            row[metric] = 1.0 + sign * offset + 0.01 * rng.normal()
        rows.append(row)
    if broken:
        rows[0][BY_MODE[mode][-1]] = None
    extractor = {metric: "made up" for metric in BY_MODE[mode] if METRICS[metric].kind}
    scores = {
        metric: Score(1.0, 1.0, 1.0, SETS, 0, 0.25 if metric in extractor else None, extractor.get(metric, ""))
        for metric in BY_MODE[mode]
    }
    return Evaluation(mode, scores, rows)


def evaluations(offset: float, seed: int, broken: bool = False) -> dict[str, Evaluation]:
    rng = np.random.default_rng(seed)
    return {mode: evaluation(mode, offset, rng, broken) for mode in BY_MODE}


@pytest.fixture(scope="module")
def comparison() -> Any:
    """dagan is best, then baseline; dagan_sa and fomm are alike and worst."""
    offsets = {"baseline": 0.2, "fomm": 0.3, "dagan_sa": 0.3, "dagan": 0.1}
    runs = {
        variant: [evaluations(offsets[variant], 10 * place + seed, broken=variant == "fomm") for seed in range(SEEDS)]
        for place, variant in enumerate(VARIANTS)
    }
    looks = {
        variant: [[{"clip": f"c{n // 3}", "face": share + 0.001 * (n % 5), "area": 0.2} for n in range(SETS)]] * SEEDS
        for variant, share in (("dagan_sa", 0.3), ("dagan", 0.6))
    }
    took = {variant: [Trained(1000, 60.0 + seed, 5000) for seed in range(SEEDS)] for variant in VARIANTS}
    return compare(runs, evaluations(0.5, 99), looks, took)


def test_every_claim_gets_its_verdict(comparison: Any) -> None:
    found = {(it.ordering.metric, it.ordering.better, it.ordering.worse): it for it in comparison.judged}
    assert len([it for it in comparison.judged if it.claimed]) == len(ORDERINGS)
    for it in ORDERINGS:
        judged = found[it.metric, it.better, it.worse]
        expected = HOLDS if it.better == "dagan" or it.worse == "fomm" else REVERSED
        assert judged.verdict == expected, str(it)
    assert found["prmse", "dagan", "fomm"].difference.value == pytest.approx(-0.2, abs=0.01)
    assert found["l1", "dagan", "baseline"].claimed is False
    assert found["l1", "dagan", "baseline"].verdict == HOLDS


def test_scores_and_failures(comparison: Any) -> None:
    assert list(comparison.scores) == [*VARIANTS, REPEAT]
    assert comparison.scores["baseline"]["l1"].value == pytest.approx(1.2, abs=0.01)
    assert comparison.scores["fomm"]["aed"].failed == SEEDS
    assert comparison.scores[REPEAT]["l1"].seeds == (pytest.approx(1.5, abs=0.01),)
    assert {it.verdict for it in comparison.useful} == {HOLDS}
    assert {it.ordering.metric for it in comparison.useful} == {"l1", "akd", "prmse", "aucon"}
    assert comparison.noise["akd"] == 0.25
    assert comparison.looks.verdict == HOLDS
    assert comparison.looks.area == pytest.approx(0.2)
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_the_report_says_it(comparison: Any, tmp_path: Path) -> None:
    text = report.markdown(comparison, ["a note"])
    holds = [it for it in comparison.judged if it.claimed and it.verdict == HOLDS]
    assert f"Of the {len(ORDERINGS)} orderings" in text
    assert f"{len(holds)} hold here ({'; '.join(str(it.ordering) for it in holds)})" in text
    assert "0 are undecided" in text
    assert "L1: baseline, fomm, dagan_sa, dagan better" in text
    assert "| baseline | " in text
    assert "| *paper, dagan* |  | 2.33 | 0.873 |  | 1.279 | 0.117 |  |  |" in text
    assert "AED in up to 3 sets" in text
    assert "a note" in text
    assert "nan" not in text
    report.intervals(comparison, tmp_path / "intervals.png")
    assert Image.open(tmp_path / "intervals.png").size[0] > 1000


def test_rows_must_be_those_of_the_same_image_sets() -> None:
    other = evaluations(0.1, 1)
    other["self"].rows.reverse()
    took = {"baseline": [Trained(1, 1.0, 1)] * 2}
    with pytest.raises(InputError, match="baseline was not measured on the same image sets"):
        compare({"baseline": [evaluations(0.1, 0), other]}, evaluations(0.5, 2), {}, took)


def test_modes_of_metrics() -> None:
    assert {mode_of(metric) for metric in ("l1", "akd", "aed")} == {"self"}
    assert {mode_of(metric) for metric in ("csim", "prmse", "aucon")} == {"cross"}
