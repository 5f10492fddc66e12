"""How sure a comparison of trainings can be: intervals over training seeds and over clips at once.

The design is crossed: every seed's model is measured on the same image sets. A draw of the bootstrap therefore takes
seeds, then clips, and the drawn clips are the same for all its seeds (Owen, "The pigeonhole bootstrap", 2007): what is
hard about a clip is hard for every model and does not average out over seeds. With few seeds two things matter more
than usual. Drawing n of n makes the spread too small by (n - 1) / n, so a draw takes n - 1 of n (McCarthy and Snowden,
"The bootstrap and finite population sampling", 1985). And percentiles of three values know no tails, so the interval is
the bootstrap's standard error times Student's t, its degrees of freedom by Satterthwaite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dagan_rt.evaluation.scores import CONFIDENCE, RESAMPLES


@dataclass(frozen=True)
class Estimate:
    """A metric of one variant, or a difference of two. NaN where nothing was measured."""

    value: float  # mean over the seeds of each one's score
    low: float  # of the 95 % interval
    high: float
    error: float  # standard error, by the bootstrap
    degrees: float  # of freedom
    seeds: tuple[float, ...]  # each one's score
    sets: int  # image sets that gave a value, all seeds together
    failed: int  # and those that gave none


@dataclass(frozen=True)
class _Sums:
    """Of the values and of how many there are, by seed and clip: all that scores and their draws need."""

    total: np.ndarray  # [S, C]
    count: np.ndarray  # [S, C]
    square: bool

    def scores(self, clips: np.ndarray) -> np.ndarray:
        """Each seed's score, clips [C, R] saying how often a draw holds each clip: [S, R], NaN where it holds none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            means = (self.total @ clips) / (self.count @ clips)
        return np.sqrt(means) if self.square else means


def estimate(values: np.ndarray, clips: Sequence[str], square: bool = False, resamples: int = RESAMPLES) -> Estimate:
    """A variant's score. values: float [S, N] of S trainings on the same N image sets, NaN where one failed; clips: the
    clip [N] of each set; square: a score is the root mean square of its values, not their mean.

    With one row there is no telling how seeds differ, and the interval is over clips alone.
    """
    return _estimated(values, None, clips, square, resamples)


def difference(
    left: np.ndarray, right: np.ndarray, clips: Sequence[str], square: bool = False, resamples: int = RESAMPLES
) -> Estimate:
    """left - right, paired: on the sets where both gave a value, and with the same clips in every draw.

    left, right: [S, N] as in `estimate`; seed number s of the one is set against number s of the other.
    """
    if left.shape != right.shape:
        raise ValueError(f"paired values must be of one shape, got {left.shape} and {right.shape}")
    return _estimated(left, right, clips, square, resamples)


def students_t(degrees: float, confidence: float = CONFIDENCE) -> float:
    """The t that Student's distribution of `degrees` >= 1 of freedom stays within, either side, with `confidence`.

    With t = sqrt(degrees) tan(angle), the density of the angle is cos(angle) ** (degrees - 1).
    """
    edges = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos((edges[1:] + edges[:-1]) / 2) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum(density)])
    return math.sqrt(degrees) * math.tan(float(np.interp(confidence * mass[-1], mass, edges)))


def _estimated(
    left: np.ndarray, right: np.ndarray | None, clips: Sequence[str], square: bool, resamples: int
) -> Estimate:
    known = np.isfinite(left) if right is None else np.isfinite(left) & np.isfinite(right)
    sides = [_sums(side, known, clips, square) for side in (left, right) if side is not None]
    seeds, number = sides[0].count.shape

    def scores(chosen: np.ndarray) -> np.ndarray:
        first, *second = (side.scores(chosen) for side in sides)
        return first - second[0] if second else first

    own = scores(np.ones((number, 1)))[:, 0]
    drawn, same_seeds = _draws(scores, seeds, number, resamples)
    error, degrees = _spread(drawn), _degrees(own, _spread(same_seeds), number)
    half = error * students_t(degrees)
    value, sets = float(own.mean()), int(known.sum())
    return Estimate(value, value - half, value + half, error, degrees, tuple(own.tolist()), sets, known.size - sets)


def _sums(values: np.ndarray, known: np.ndarray, clips: Sequence[str], square: bool) -> _Sums:
    names, place = np.unique(np.asarray(clips, str), return_inverse=True)
    total, count = np.zeros((len(values), len(names))), np.zeros((len(values), len(names)))
    for row, (numbers, mask) in enumerate(zip(values, known, strict=True)):
        np.add.at(total[row], place[mask], numbers[mask] ** 2 if square else numbers[mask])
        np.add.at(count[row], place[mask], 1.0)
    return _Sums(total, count, square)


def _draws(
    scores: Callable[[np.ndarray], np.ndarray], seeds: int, clips: int, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """What other seeds and clips would have given, and what the same seeds on other clips would have: [R] each."""
    if clips < 2:
        return np.full(resamples, math.nan), np.full(resamples, math.nan)
    rng = np.random.default_rng(0)
    each = scores(rng.multinomial(clips - 1, np.full(clips, 1 / clips), resamples).T.astype(float))  # [S, R]
    if seeds == 1:
        return each[0], each[0]
    weights = rng.multinomial(seeds - 1, np.full(seeds, 1 / seeds), resamples).T / (seeds - 1)
    return (each * weights).sum(0), each.mean(0)


def _spread(draws: np.ndarray) -> float:
    finite = draws[np.isfinite(draws)]
    return float(finite.std()) if finite.size else math.nan


def _degrees(own: np.ndarray, clip_error: float, clips: int) -> float:
    """Satterthwaite's degrees of freedom of a variance that is the seeds' share plus the clips'."""
    if len(own) == 1:
        return float(max(1, clips - 1))
    by_seed, by_clip = float(own.var(ddof=1)) / len(own), clip_error**2
    if not by_seed > 0:
        return float(max(1, clips - 1))
    return (by_seed + by_clip) ** 2 / (by_seed**2 / (len(own) - 1) + by_clip**2 / max(1, clips - 1))
