"""What a benchmark found: rows with their provenance, as JSON, and two of them compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.files import AtomicFile
from dagan_rt.tables import fill, read_json

OURS = "dagan-rt"
CALL, ALONE, HOST = "call", "alone", "host"  # one of many; single, the caches flushed before; until it returns
REGRESSION = 1.05  # as many times the former time, and beyond the former spread


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    p50: float
    p10: float
    p90: float
    repeats: int
    calls: int = 1  # in a repeat, whose mean they are

    @classmethod
    def of(cls, repeats: Sequence[float], calls: int = 1) -> Timing:
        """From the microseconds of each repeat, which made `calls` calls."""
        p10, p50, p90 = (float(value) for value in np.percentile(np.asarray(repeats) / calls, (10, 50, 90)))
        return cls(p50, p10, p90, len(repeats), calls)


@dataclass(frozen=True)
class Row:
    """One form of one case: measured, or why not."""

    group: str  # what is measured: an operation
    case: dict[str, str]  # under which circumstances: batch, dtype …
    form: str  # by what: `OURS`, or the name of a peer
    status: str  # measured, refused (it does not run here), wrong (its result is), skipped (no time was left)
    reason: str = ""
    error: float | None = None  # ‖out - reference‖ / ‖reference‖, the largest of the outputs
    tolerance: float | None = None
    times: dict[str, Timing] = field(default_factory=dict)  # by what of it is timed: `CALL`, and what else is known
    method: str = ""  # how the call was timed
    bytes: int = 0  # that must move
    flops: int = 0  # that must be computed
    floor: float | None = None  # microseconds at the measured ceiling that binds
    ceiling: str = ""  # which that is

    @property
    def key(self) -> tuple[str, ...]:
        """What makes it the same row in another file."""
        return (self.group, *(f"{name} {value}" for name, value in self.case.items()), self.form)

    @property
    def time(self) -> Timing | None:
        """Of a call; None where it was not measured."""
        return self.times.get(CALL)

    @property
    def fraction(self) -> float | None:
        """Of the ceiling, where both are known."""
        return self.floor / self.time.p50 if self.floor is not None and self.time is not None else None


@dataclass(frozen=True)
class Results:
    """One run of a suite."""

    suite: str
    provenance: dict[str, str]
    ceilings: dict[str, float] = field(default_factory=dict)  # "copy" in GB/s, dtypes in TFLOP/s, "launch …" in µs
    rows: tuple[Row, ...] = ()

    def write(self, path: Path) -> None:
        """As JSON, a row a line."""
        head = json.dumps({"suite": self.suite, "provenance": self.provenance, "ceilings": self.ceilings}, indent=1)
        rows = ",\n".join(f"  {json.dumps(_stated(row))}" for row in self.rows)
        file = AtomicFile(path)
        file.write(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'.encode())
        file.commit()

    @classmethod
    def read(cls, path: Path) -> Results:
        """InputError names what is wrong with a file, which may come from anywhere."""
        values = read_json(path, "benchmark result")
        results: Results = fill(cls, values, str(path))
        return results


def _stated(row: Row) -> dict[str, Any]:
    """Without what is unknown or empty."""
    return {name: value for name, value in asdict(row).items() if value not in (None, "", {})}


@dataclass(frozen=True)
class Change:
    """One row in two results."""

    key: tuple[str, ...]
    before: Row | None
    after: Row | None

    @property
    def ratio(self) -> float | None:
        """Time after over time before."""
        if not (self.before and self.after and self.before.time and self.after.time):
            return None
        return self.after.time.p50 / self.before.time.p50

    @property
    def verdict(self) -> str:
        """slower or faster beyond `REGRESSION` and the spread; same; new; gone; or how its status changed."""
        if self.before is None or self.after is None:
            return "new" if self.before is None else "gone"
        if self.before.status != self.after.status:
            return f"{self.before.status}, now {self.after.status}"
        before, after, ratio = self.before.time, self.after.time, self.ratio
        if before is None or after is None or ratio is None:
            return "same"
        if ratio > REGRESSION and after.p10 > before.p90:
            return "slower"
        return "faster" if ratio < 1 / REGRESSION and after.p90 < before.p10 else "same"

    @property
    def regression(self) -> bool:
        """Whether our own row got slower, or was measured and is not any more."""
        if OURS not in self.key or self.before is None or self.after is None:
            return False
        lost = self.before.status == "measured" and self.after.status in ("wrong", "refused")
        return lost or self.verdict == "slower"


def compare(before: Results, after: Results) -> list[Change]:
    """Every row of either. Results of different suites cannot be compared: InputError."""
    if before.suite != after.suite:
        raise InputError(f"results of the suite {before.suite} cannot be compared with {after.suite}")
    old, new = _by_key(before.rows), _by_key(after.rows)
    return [Change(key, old.get(key), new.get(key)) for key in dict.fromkeys((*old, *new))]


def _by_key(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    return {row.key: row for row in rows}
