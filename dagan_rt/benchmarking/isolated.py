"""A form in a process of its own: torch.compile may take minutes, and nothing in Python stops it halfway."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from dagan_rt.benchmarking.frames import Bench, unmeasured, ways
from dagan_rt.benchmarking.processes import ended
from dagan_rt.benchmarking.rows import Results, Row
from dagan_rt.benchmarking.suites import Form
from dagan_rt.errors import InputError


def measure_apart(bench: Bench) -> Callable[[Form, float], list[Row]]:
    """What measures a form within some seconds; rows that are not there by then say so."""

    def measured(form: Form, seconds: float) -> list[Row]:
        (way,) = ways(form, bench)
        if seconds <= 0:
            return unmeasured(way, form.batches, bench, "skipped", "no time was left")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            given = ["--in-process", "--forms", form.name, "--batches", *map(str, form.batches), "--out", str(out)]
            command = [sys.executable, "-m", "dagan_rt.benchmarking", *bench.repeat, *given]
            reason = ended([*command, "--seconds", str(seconds)], seconds)
            rows = list(_read(out))
        known = {row.key for row in rows}
        missing = unmeasured(way, form.batches, bench, "refused", reason or "it gave no row")
        return rows + [row for row in missing if row.key not in known]

    return measured


def _read(out: Path) -> tuple[Row, ...]:
    try:
        return Results.read(out).rows
    except InputError:
        return ()
