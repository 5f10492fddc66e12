"""The one-euro filter, compared with a twin written for one number at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dagan_rt.errors import InputError
from dagan_rt.smoothing import OneEuro


class LowPass:
    """Exponential smoothing as in the paper's listing: y = a x + (1 - a) y."""

    def __init__(self) -> None:
        self.last: float | None = None

    def __call__(self, x: float, alpha: float) -> float:
        self.last = x if self.last is None else alpha * x + (1 - alpha) * self.last
        return self.last


def twin(values: list[float], times: list[float], least: float, beta: float, speed_cutoff: float) -> list[float]:
    def alpha(cutoff: float, rate: float) -> float:
        tau = 1 / (2 * math.pi * cutoff)
        return 1 / (1 + tau * rate)

    place, speed, found = LowPass(), LowPass(), []
    for number, (x, time) in enumerate(zip(values, times, strict=True)):
        if number == 0:
            speed(0.0, 1.0)
            found.append(place(x, 1.0))
            continue
        rate = 1 / (time - times[number - 1])
        assert place.last is not None
        moving = speed((x - place.last) * rate, alpha(speed_cutoff, rate))
        found.append(place(x, alpha(least + beta * abs(moving), rate)))
    return found


def uneven(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (count, 2, 3)).cumsum(0), rng.uniform(0.01, 0.08, count).cumsum()


@pytest.mark.parametrize(("least", "beta", "speed_cutoff"), [(1.0, 0.0, 1.0), (0.3, 2.0, 1.0), (2.0, 0.5, 4.0)])
def test_each_number_is_filtered_as_its_twin_does(least: float, beta: float, speed_cutoff: float) -> None:
    values, times = uneven(60, seed=1)
    steady = OneEuro(least, beta, speed_cutoff)
    found = np.stack([steady(value, float(time)) for value, time in zip(values, times, strict=True)])
    for place in np.ndindex(2, 3):
        expected = twin(list(values[(slice(None), *place)]), list(times), least, beta, speed_cutoff)
        np.testing.assert_allclose(found[(slice(None), *place)], expected, rtol=1e-10, atol=1e-10)


def test_what_trembles_is_held_and_what_moves_is_followed() -> None:
    times = np.arange(200) / 25
    noise = np.random.default_rng(0).normal(0, 0.01, 200)
    steady = OneEuro(0.5, 4.0)
    still = np.array([float(steady(np.array(value), time)) for value, time in zip(noise, times, strict=True)])
    assert still[50:].std() < 0.5 * noise[50:].std()

    def lag(beta: float) -> float:
        steady = OneEuro(0.5, beta)
        return float(times[-1] - [steady(np.array(time), time) for time in times][-1])

    assert lag(4.0) < 0.05 < 0.2 < lag(0.0)


def test_it_begins_anew() -> None:
    steady = OneEuro(0.5, 1.0)
    for time in range(5):
        steady(np.array([float(time)]), time / 25)
    steady.reset()
    np.testing.assert_array_equal(steady(np.array([100.0]), 0.0), [100.0])


def test_a_time_that_does_not_go_on_changes_nothing() -> None:
    steady = OneEuro()
    steady(np.array([1.0]), 0.0)
    before = steady(np.array([2.0]), 0.1)
    np.testing.assert_array_equal(steady(np.array([50.0]), 0.1), before)
    assert 1 < float(steady(np.array([2.0]), 0.2)[0]) < 2


def test_results_are_the_callers_own() -> None:
    steady = OneEuro()
    steady(np.array([1.0]), 0.0)[:] = 99
    assert float(steady(np.array([1.0]), 0.1)[0]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"least_cutoff": 0.0}, "least_cutoff must be above 0 Hz, got 0.0"),
        ({"speed_cutoff": math.nan}, "speed_cutoff must be above 0 Hz, got nan"),
        ({"beta": -1.0}, "beta must be at least 0, got -1.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OneEuro(**settings)
