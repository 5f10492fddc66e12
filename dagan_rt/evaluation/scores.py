"""What an evaluation found: a score a metric with its confidence interval, and the rows it came from.

A metric's values are not independent, since many image sets share a clip. The intervals therefore resample whole clips
(the cluster bootstrap; Field and Welsh, "Bootstrapping clustered data", 2007), with the percentile method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dagan_rt.errors import InputError

RESAMPLES, CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class Metric:
    """How a metric reads, and how the values of single image sets become one number."""

    title: str
    unit: str
    lower_is_better: bool
    kind: str | None  # of the extractor it needs
    root_mean_square: bool = False  # of the values, instead of their mean


METRICS = {
    "l1": Metric("L1", "of [0, 1]", True, None),
    "ssim": Metric("SSIM", "", False, None),
    "psnr": Metric("PSNR", "dB", False, None),
    "lpips": Metric("LPIPS", "", True, None),
    "akd": Metric("AKD", "pixels at 256", True, "landmarks"),
    "aed": Metric("AED", "", True, "identity"),
    "csim": Metric("CSIM", "", False, "identity"),
    "prmse": Metric("PRMSE", "degrees", True, "pose", root_mean_square=True),
    "aucon": Metric("AUCON", "", False, "actions"),
}
BY_MODE = {"self": ("l1", "ssim", "psnr", "lpips", "akd", "aed"), "cross": ("csim", "prmse", "aucon")}


@dataclass(frozen=True)
class Score:
    """One number of the table. NaN where no image set gave a value, and bounds are NaN with fewer than two clips."""

    mean: float  # of the values, see `Metric.root_mean_square`
    low: float  # of the 95 % confidence interval
    high: float
    count: int  # image sets that gave a value
    failed: int  # image sets where the extractor found nothing in one of the two images
    noise: float | None = None  # what the metric reads because of the extractor's own error, where that is known
    extractor: str = ""  # its name; empty for what comes from pixels alone


@dataclass(frozen=True)
class Evaluation:
    """Scores by metric, and what they came from.

    rows: one dict an image set with `source_clip`, `driving_clip` (names), `source_identity`, `driving_identity`,
    `source_frame`, `driving_frame`, `initial_frame` and, by metric, its value, or None where it failed.
    absent: metrics of the mode that were not computed, with the reason. unreadable: by clip name, image sets left out
    because a frame could not be read, and the reason. settings: what was evaluated, on what and with what.
    """

    mode: str
    scores: dict[str, Score]
    rows: list[dict[str, Any]]
    absent: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {"sets": count, "reason": text}
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: NaN becomes None."""
        scores = {name: {key: _plain(value) for key, value in asdict(it).items()} for name, it in self.scores.items()}
        return asdict(self) | {"scores": scores, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str) -> Evaluation:
        """The inverse; `name` is the file it came from. InputError names what is missing or wrong."""
        try:
            mode, rows, scores = values["mode"], values["rows"], values["scores"]
            if mode not in BY_MODE or not all(isinstance(row, dict) for row in rows):
                raise TypeError
            read = {str(metric): _score(it) for metric, it in scores.items() if metric in METRICS}
            for row in rows:
                for metric in read:
                    if row[metric] is not None:
                        row[metric] = float(row[metric])
            others = {key: values[key] for key in ("absent", "unreadable", "settings")}
            if not all(isinstance(value, dict) for value in others.values()):
                raise TypeError
            return cls(mode, read, list(rows), notes=tuple(map(str, values["notes"])), **others)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise InputError(f"{name} is not an evaluation that dagan-rt evaluate wrote") from None


def score(
    metric: str,
    rows: Sequence[Mapping[str, Any]],
    clusters: Sequence[str],
    seed: int = 0,
    noise: float | None = None,
    extractor: str = "",
) -> Score:
    """The score of one metric over rows (see `Evaluation.rows`), each of a cluster: the clip it shares with others."""
    values = values_of(metric, rows)
    known = np.isfinite(values)
    mean = aggregate(metric, values[known])
    low, high = interval(resampled(metric, [values], clusters, seed)[0])
    return Score(mean, low, high, int(known.sum()), int((~known).sum()), noise, extractor)


def cluster_of(mode: str) -> str:
    """The key of a row that says which rows depend on each other: one clip drives (self), or one source is driven."""
    return "driving_clip" if mode == "self" else "source_clip"


def values_of(metric: str, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The metric's value of each row, float64 [N]; NaN where it failed."""
    return np.array([math.nan if row[metric] is None else row[metric] for row in rows], np.float64)


def aggregate(metric: str, values: np.ndarray) -> float:
    """One number from values [N]: their mean, or root mean square; NaN where there is none."""
    if not values.size:
        return math.nan
    return float(np.sqrt(np.mean(values**2)) if METRICS[metric].root_mean_square else values.mean())


def resampled(
    metric: str, columns: Sequence[np.ndarray], clusters: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> np.ndarray:
    """What each column [N] of values would have scored with other clips: [columns, resamples].

    Clips are drawn with replacement, as many as there are; the same ones for every column. NaN values do not count.
    Two clips at least are needed, else all is NaN.
    """
    names, place = np.unique(np.asarray(clusters, str), return_inverse=True)
    if len(names) < 2:
        return np.full((len(columns), resamples), math.nan)
    square = METRICS[metric].root_mean_square
    sums = np.zeros((2 * len(columns), len(names)))  # by column: of the values, and of how many there are
    for number, values in enumerate(columns):
        known = np.isfinite(values)
        np.add.at(sums[2 * number], place[known], values[known] ** 2 if square else values[known])
        np.add.at(sums[2 * number + 1], place[known], 1.0)
    rng = np.random.default_rng(seed)
    even = np.full(len(names), 1 / len(names))
    totals = np.empty((2 * len(columns), resamples))
    step = max(1, 4_000_000 // len(names))  # bounds the table of how often each clip was drawn
    for first in range(0, resamples, step):
        last = min(first + step, resamples)
        totals[:, first:last] = sums @ rng.multinomial(len(names), even, size=last - first).T
    with np.errstate(invalid="ignore", divide="ignore"):
        means = totals[0::2] / totals[1::2]
    return np.sqrt(means) if square else means


def interval(statistics: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Percentiles that hold `confidence` of the resampled statistics [R]; NaN where none is finite."""
    finite = statistics[np.isfinite(statistics)]
    if not finite.size:
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _score(values: Mapping[str, Any]) -> Score:
    mean, low, high = (math.nan if values[key] is None else float(values[key]) for key in ("mean", "low", "high"))
    noise = None if values["noise"] is None else float(values["noise"])
    return Score(mean, low, high, int(values["count"]), int(values["failed"]), noise, str(values["extractor"]))
