"""What benchmarks found: rows with their provenance, as JSON, and two of them compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.files import AtomicFile
from dagan_rt.tables import fill, read_json

OURS = "dagan-rt"  # and, with more behind it, one of several forms of ours
# What of a row is timed: one call of many; a single one, the caches flushed before; until it returns; the parts of a
# frame on the device and on the way there and back.
CALL, ALONE, HOST = "call", "alone", "host"
DEVICE, UPLOAD, DOWNLOAD = "device", "upload", "download"
# Of a step of a training; the last one is what is in none of the others.
STEP_PARTS = ("data", "forward", "backward", "optimiser", "discriminator", "average", "rest")
DATA, FORWARD, BACKWARD, OPTIMISER, DISCRIMINATOR, AVERAGE, REST = STEP_PARTS
REGRESSION = 1.05  # as many times the former time, and beyond the former spread


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    p50: float
    p10: float
    p90: float
    repeats: int
    calls: int = 1  # in a repeat, whose mean they are
    p95: float = 0.0  # 0 in files from before it was kept
    p99: float = 0.0

    @classmethod
    def of(cls, repeats: Sequence[float], calls: int = 1) -> Timing:
        """From the microseconds of each repeat, which made `calls` calls."""
        import numpy as np

        found = np.percentile(np.asarray(repeats) / calls, (50, 10, 90, 95, 99))
        p50, p10, p90, p95, p99 = (float(value) for value in found)
        return cls(p50, p10, p90, len(repeats), calls, p95, p99)


@dataclass(frozen=True)
class Row:
    """One form of one case: measured, or why not."""

    group: str  # what is measured: an operation
    case: dict[str, str]  # under which circumstances: batch, dtype …
    form: str  # by what: `OURS`, or the name of a peer
    status: str  # measured, refused (it does not run here), wrong (its result is), skipped (no time was left)
    reason: str = ""
    error: float | None = None  # kernels: ‖out - reference‖ / ‖reference‖, the largest of the outputs; images: levels
    tolerance: float | None = None
    times: dict[str, Timing] = field(default_factory=dict)  # by what of it is timed: `CALL`, and what else is known
    method: str = ""  # how the call was timed
    bytes: int = 0  # that must move
    flops: int = 0  # that must be computed
    floor: float | None = None  # microseconds at the measured ceiling that binds
    ceiling: str = ""  # which that is
    precision: str = ""  # where the form has one of its own
    values: dict[str, float] = field(default_factory=dict)  # what else was measured; the name ends with the unit
    clocks: str = ""  # of the device, right after
    command: str = ""  # that measures this row again

    @property
    def key(self) -> tuple[str, ...]:
        """What makes it the same row in another file."""
        return (self.group, *(f"{name} {value}" for name, value in self.case.items()), self.form)

    @property
    def ours(self) -> bool:
        """Whether the form is one of dagan-rt's."""
        return is_ours(self.form)

    @property
    def time(self) -> Timing | None:
        """Of a call; None where it was not measured."""
        return self.times.get(CALL)

    @property
    def gap(self) -> float | None:
        """Microseconds over the floor, where both are known."""
        return self.time.p50 - self.floor if self.floor is not None and self.time is not None else None

    @property
    def fraction(self) -> float | None:
        """Of the ceiling, where both are known."""
        return self.floor / self.time.p50 if self.floor is not None and self.time is not None else None


def is_ours(form: str) -> bool:
    """Whether a form is dagan-rt's, and not a peer."""
    return form == OURS or form.startswith(f"{OURS} ")


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
        for at, row in enumerate(results.rows):
            if any(timing.p50 <= 0 for timing in row.times.values()):
                raise InputError(f"{path}: rows[{at}].times must be of more than 0 microseconds")
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
        if not is_ours(self.key[-1]) or self.before is None or self.after is None:
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
