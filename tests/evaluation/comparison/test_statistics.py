"""Intervals over seeds and clips: against every possible draw, against closed forms, and by their coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dagan_rt.evaluation.comparison.statistics import difference, estimate, students_t


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (30, 2.04227), (10_000, 1.96020)]
)
def test_students_t_is_the_printed_table(degrees: float, expected: float) -> None:
    assert students_t(degrees) == pytest.approx(expected, rel=2e-4)


def every_draw(values: np.ndarray, clips: list[str], square: bool = False) -> float:
    """The standard deviation of a score over all draws of S - 1 of S seeds and C - 1 of C clips, one by one."""
    names = sorted(set(clips))
    found = []
    for seeds in itertools.product(range(len(values)), repeat=len(values) - 1):
        for chosen in itertools.product(names, repeat=len(names) - 1):
            columns = [n for name in chosen for n, clip in enumerate(clips) if clip == name]
            picked = values[list(seeds)][:, columns]
            found.append((np.sqrt((picked**2).mean(1)) if square else picked.mean(1)).mean())
    return float(np.std(found))


@pytest.mark.parametrize("square", [False, True])
def test_the_error_is_that_of_every_possible_draw(square: bool) -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, (3, 7))
    clips = list("aabbbcd")
    found = estimate(values, clips, square, resamples=100_000)
    assert found.error == pytest.approx(every_draw(values, clips, square), rel=0.02)
    each = np.sqrt((values**2).mean(1)) if square else values.mean(1)
    assert found.seeds == pytest.approx(tuple(each))
    assert found.value == pytest.approx(each.mean())
    assert (found.sets, found.failed) == (21, 0)


def test_a_paired_difference_is_the_estimate_of_the_differences() -> None:
    rng = np.random.default_rng(4)
    left, right = rng.normal(size=(3, 40)), rng.normal(size=(3, 40))
    clips = [str(n // 4) for n in range(40)]
    paired, plain = difference(left, right, clips), estimate(left - right, clips)
    assert (paired.value, paired.error, paired.degrees) == pytest.approx((plain.value, plain.error, plain.degrees))


def test_the_closed_form_of_a_balanced_design() -> None:
    """Without interaction the variance is the seeds' plus the clips', and the degrees Satterthwaite's of the two."""
    rng = np.random.default_rng(5)
    by_seed, by_clip = rng.normal(0, 1.0, 4), rng.normal(0, 2.0, 30)
    values = by_seed[:, None] + by_clip[None]
    found = estimate(values, [str(n) for n in range(30)], resamples=50_000)
    a, b = by_seed.var(ddof=1) / 4, by_clip.var(ddof=1) / 30
    assert found.error == pytest.approx(math.sqrt(a + b), rel=0.02)
    assert found.degrees == pytest.approx((a + b) ** 2 / (a**2 / 3 + b**2 / 29), rel=0.05)
    assert found.high - found.low == pytest.approx(2 * found.error * students_t(found.degrees))


def test_the_clips_share_of_the_variance_is_that_of_the_mean_over_seeds() -> None:
    values = np.random.default_rng(8).normal(size=(3, 30))
    found = estimate(values, [str(n) for n in range(30)], resamples=50_000)
    a, b = values.mean(1).var(ddof=1) / 3, values.mean(0).var(ddof=1) / 30
    assert found.degrees == pytest.approx((a + b) ** 2 / (a**2 / 2 + b**2 / 29), rel=0.05)


def test_clips_that_are_hard_for_every_model_do_not_average_out() -> None:
    by_clip = np.random.default_rng(6).normal(0, 1.0, 25)
    few, many = (estimate(np.tile(by_clip, (seeds, 1)), [str(n) for n in range(25)]) for seeds in (2, 8))
    assert few.error == pytest.approx(many.error, rel=1e-6)
    assert few.error == pytest.approx(by_clip.std(ddof=1) / 5, rel=0.05)


def coverage(seeds: int, seed_spread: float, clip_spread: float, trials: int = 400) -> float:
    rng = np.random.default_rng(7)
    clips = [str(n // 2) for n in range(40)]
    inside = 0
    for _ in range(trials):
        values = seed_spread * rng.normal(size=(seeds, 1)) + clip_spread * np.repeat(rng.normal(size=(1, 20)), 2, 1)
        found = estimate(values + 0.3 * rng.normal(size=(seeds, 40)), clips, resamples=300)
        inside += found.low <= 0 <= found.high
    return inside / trials


@pytest.mark.slow
@pytest.mark.parametrize(("seed_spread", "clip_spread"), [(1.0, 0.0), (0.0, 1.0), (0.5, 1.0)])
def test_95_percent_is_95_percent_with_three_seeds(seed_spread: float, clip_spread: float) -> None:
    """400 trials: a share of 0.95 is measured within 0.033, three standard errors; more than that is only cautious."""
    assert 0.917 <= coverage(3, seed_spread, clip_spread) <= 0.995


def test_failures_are_counted_and_left_out() -> None:
    values = np.arange(12.0).reshape(2, 6)
    holed = values.copy()
    holed[1, 2] = math.nan
    found = estimate(holed, list("aabbcc"))
    assert (found.sets, found.failed) == (11, 1)
    assert found.seeds == pytest.approx((2.5, np.delete(values[1], 2).mean()))
    other = values - 1.0
    other[0, 5] = math.nan
    paired = difference(holed, other, list("aabbcc"))
    assert (paired.value, paired.error, paired.failed) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12), 2)


def test_too_little_to_tell() -> None:
    one_clip = estimate(np.ones((3, 4)), list("aaaa"))
    assert one_clip.value == 1.0
    assert math.isnan(one_clip.low)
    nothing = estimate(np.full((2, 4), math.nan), list("abcd"))
    assert math.isnan(nothing.value)
    assert math.isnan(nothing.low)
    assert (nothing.sets, nothing.failed) == (0, 8)
    one_seed = estimate(np.random.default_rng(0).normal(size=(1, 50)), [str(n) for n in range(50)])
    assert one_seed.low < one_seed.value < one_seed.high


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        difference(np.ones((2, 3)), np.ones((3, 3)), list("abc"))
