"""The comparison in numbers: scores with intervals, paired differences, and what became of the paper's orderings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.evaluation import METRICS, Evaluation
from dagan_rt.evaluation.comparison.orderings import ORDERINGS, Ordering, verdict
from dagan_rt.evaluation.comparison.runs import Trained
from dagan_rt.evaluation.comparison.statistics import Estimate, difference, estimate
from dagan_rt.evaluation.scores import BY_MODE, cluster_of, values_of

REPEAT = "source repeated"
COLUMNS = ("csim", "prmse", "aucon", "l1", "akd", "aed", "ssim", "psnr")
"""The supplementary's columns in its order, and two more."""
AGAINST_NOTHING = ("l1", "akd", "prmse", "aucon")
"""By what a variant must be better than showing the source unchanged, to be of any use."""


@dataclass(frozen=True)
class Judged:
    """An ordering, the paired difference better - worse, and the verdict."""

    ordering: Ordering
    difference: Estimate
    verdict: str
    claimed: bool  # by the paper; otherwise only asked here

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.ordering), "claimed": self.claimed, "verdict": self.verdict,
            "difference": plain(asdict(self.difference)),
        }  # fmt: skip


@dataclass(frozen=True)
class Looks:
    """How much of the attention lies on the face, by variant; and dagan - dagan_sa where both are there."""

    shares: dict[str, Estimate]
    area: float  # the face's share of the positions: what looking everywhere alike gives
    difference: Estimate | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All that table1.json holds. scores: by row (variant or `REPEAT`), then metric."""

    scores: dict[str, dict[str, Estimate]]
    judged: list[Judged]
    useful: list[Judged]  # each variant against showing the source
    looks: Looks | None
    noise: dict[str, float]  # what each metric reads of a perfect result, for its extractor errs
    extractors: dict[str, str]  # metric -> the extractor's name
    trained: dict[str, list[Trained]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: NaN becomes None."""
        looks = None
        if self.looks is not None:
            looks = asdict(self.looks)
        scores = {row: {name: asdict(it) for name, it in by.items()} for row, by in self.scores.items()}
        return {
            "scores": plain(scores),
            "orderings": [it.to_dict() for it in self.judged],
            "against the source repeated": [it.to_dict() for it in self.useful],
            "attention on the face": plain(looks),
            "noise floors": self.noise,
            "extractors": self.extractors,
            "runs": {variant: [asdict(it) for it in runs] for variant, runs in self.trained.items()},
        }


Evaluations = Mapping[str, Evaluation]  # by mode


def compare(
    runs: Mapping[str, Sequence[Evaluations]],
    repeat: Evaluations,
    looks: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    trained: Mapping[str, Sequence[Trained]],
) -> Comparison:
    """runs: by variant the evaluations of each seed; repeat: those of showing the source; looks: by variant with
    attention, of each seed the rows of `runs.attention_once`; trained: by variant what each seed took.

    InputError where they were not measured on the same image sets.
    """
    everything = {**{variant: list(seeds) for variant, seeds in runs.items()}, REPEAT: [repeat]}
    values = {row: _values(row, seeds, repeat) for row, seeds in everything.items()}
    clips = {mode: [entry[cluster_of(mode)] for entry in found.rows] for mode, found in repeat.items()}
    scores = {
        row: {
            metric: estimate(by[metric], clips[mode_of(metric)], METRICS[metric].root_mean_square)
            for metric in COLUMNS if metric in by
        }
        for row, by in values.items()
    }  # fmt: skip
    judged = [_judge(it, values, clips, it in ORDERINGS) for it in _asked(values)]
    useful = [
        _judge(Ordering(metric, row, REPEAT, "doing nothing"), values, clips, False)
        for metric in AGAINST_NOTHING for row in runs if metric in values[REPEAT]
    ]  # fmt: skip
    known = {name: score for found in repeat.values() for name, score in found.scores.items()}
    noise = {name: score.noise for name, score in known.items() if score.noise is not None}
    extractors = {name: score.extractor for name, score in known.items() if score.extractor}
    took = {variant: list(seeds) for variant, seeds in trained.items()}
    return Comparison(scores, judged, useful, _looks(looks), noise, extractors, took)


def mode_of(metric: str) -> str:
    """The mode in which a metric is measured."""
    return next(mode for mode, metrics in BY_MODE.items() if metric in metrics)


def plain(value: Any) -> Any:
    """Tables and lists of numbers with None for what is no finite number, which JSON does not know."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _values(row: str, seeds: Sequence[Evaluations], repeat: Evaluations) -> dict[str, np.ndarray]:
    """By metric [S, N], in the order of the rows of `repeat`."""
    found = {}
    for mode, wanted in repeat.items():
        for evaluations in seeds:
            if [_place(entry) for entry in evaluations[mode].rows] != [_place(entry) for entry in wanted.rows]:
                raise InputError(f"{row} was not measured on the same image sets ({mode}) as the others")
        for metric in wanted.scores:
            found[metric] = np.stack([values_of(metric, evaluations[mode].rows) for evaluations in seeds])
    return found


def _place(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[key] for key in ("source_clip", "source_frame", "driving_clip", "driving_frame"))


def _asked(values: Mapping[str, Any]) -> list[Ordering]:
    """The paper's orderings, then whether dagan is better by the metrics of which its table says nothing legible."""
    others = [variant for variant in values if variant not in ("dagan", REPEAT)]
    rest = [Ordering(metric, "dagan", other, "not legible") for metric in COLUMNS for other in others]
    claimed = {(it.metric, it.better, it.worse) for it in ORDERINGS}
    asked = [*ORDERINGS, *(it for it in rest if (it.metric, it.better, it.worse) not in claimed)]
    return [it for it in asked if all(side in values and it.metric in values[side] for side in (it.better, it.worse))]


def _judge(
    it: Ordering, values: Mapping[str, Mapping[str, np.ndarray]], clips: Mapping[str, Sequence[str]], claimed: bool
) -> Judged:
    metric = METRICS[it.metric]
    better, worse = values[it.better][it.metric], values[it.worse][it.metric]
    worse = np.broadcast_to(worse, better.shape)  # the source repeated has no seeds
    found = difference(better, worse, clips[mode_of(it.metric)], metric.root_mean_square)
    return Judged(it, found, verdict(found, metric.lower_is_better), claimed)


def _looks(looks: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Looks | None:
    if not looks:
        return None
    clips = [str(row["clip"]) for row in next(iter(looks.values()))[0]]
    area = float(np.mean([row["area"] for row in next(iter(looks.values()))[0]]))
    values = {variant: np.array([[row["face"] for row in rows] for rows in seeds]) for variant, seeds in looks.items()}
    shares = {variant: estimate(by, clips) for variant, by in values.items()}
    both = difference(values["dagan"], values["dagan_sa"], clips) if {"dagan", "dagan_sa"} <= values.keys() else None
    return Looks(shares, area, both, verdict(both, lower_is_better=False) if both is not None else "undecided")
