"""The one-euro filter: what trembles is held still, what moves is followed."""

from __future__ import annotations

import math

import numpy as np

from dagan_rt.errors import InputError


class OneEuro:
    """A low-pass filter whose cutoff rises with speed (Casiez, Roussel and Vogel, 1 € Filter, CHI 2012).

        steady = OneEuro(least_cutoff=1.0, beta=0.5)
        for value, time in samples:
            shown = steady(value, time)

    At rest everything above `least_cutoff` Hz is damped; each unit of speed (in units of the values a second) raises
    the cutoff by `beta` Hz, so that little lag is left where something moves. The speed itself is filtered at
    `speed_cutoff` Hz. Values are arrays of any shape, each element filtered by itself.
    """

    def __init__(self, least_cutoff: float = 1.0, beta: float = 0.0, speed_cutoff: float = 1.0) -> None:
        """Raises InputError for a cutoff that is not above 0, or a negative beta."""
        for name, value in (("least_cutoff", least_cutoff), ("speed_cutoff", speed_cutoff)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be above 0 Hz, got {value}")
        if not (math.isfinite(beta) and beta >= 0):
            raise InputError(f"beta must be at least 0, got {beta}")
        self.least_cutoff, self.beta, self.speed_cutoff = least_cutoff, beta, speed_cutoff
        self.reset()

    def reset(self) -> None:
        """Forget what was seen: the next value passes as it is."""
        self._time: float | None = None

    def __call__(self, value: np.ndarray, time: float) -> np.ndarray:
        """The filtered value at `time`, seconds, float64; a time that does not go on changes nothing."""
        value = np.asarray(value, np.float64)
        if self._time is None:
            self._time, self._value, self._speed = time, value, np.zeros_like(value)
            return value.copy()
        step = time - self._time
        if step <= 0:
            return self._value.copy()
        speed = (value - self._value) / step
        self._speed = self._speed + _share(self.speed_cutoff, step) * (speed - self._speed)
        cutoff = self.least_cutoff + self.beta * np.abs(self._speed)
        self._value = self._value + _share(cutoff, step) * (value - self._value)
        self._time = time
        return self._value.copy()


def _share(cutoff: float | np.ndarray, step: float) -> float | np.ndarray:
    """Of a new value in the mean of a first-order low-pass: Casiez et al. 2012, equations 4 and 5 of the appendix."""
    turn = 2 * np.pi * np.asarray(cutoff) * step
    return turn / (turn + 1)
