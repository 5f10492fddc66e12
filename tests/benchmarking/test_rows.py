"""Rows: statistics, files, and what counts as a change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dagan_rt.benchmarking.rows import OURS, Results, Row, Timing, compare
from dagan_rt.errors import InputError

CASE = {"batch": "1", "dtype": "float16", "layout": "nhwc"}


def row(p50: float = 10.0, form: str = OURS, spread: float = 0.01, **more: Any) -> Row:
    timing = Timing(p50, p50 * (1 - spread), p50 * (1 + spread), 20, 4)
    return Row("flow_warp", CASE, form, "measured", times={"call": timing}, error=1e-4, **more)


def results(*rows: Row, suite: str = "kernels") -> Results:
    return Results(suite, {"device": "a GPU"}, {"copy": 4000.0}, rows)


def test_a_timing_is_of_calls_not_of_repeats() -> None:
    repeats = [float(value) for value in range(101)]  # percentiles of 0 … 100 are their own numbers
    assert Timing.of(repeats) == Timing(50.0, 10.0, 90.0, 101, 1, 95.0, 99.0)
    assert Timing.of(repeats, calls=10) == Timing(5.0, 1.0, 9.0, 101, 10, 9.5, 9.9)


def test_a_file_brings_back_what_was_written(tmp_path: Path) -> None:
    refused = Row("flow_warp", CASE, "sdpa flash", "refused", reason='RuntimeError: "no"\nkernel')
    measured = replace(row(10, bytes=7, flops=9, floor=5.0, ceiling="copy"), method="a CUDA graph")
    measured.times["alone"] = Timing(12, 11, 13, 20)
    written = results(measured, refused)
    written.write(tmp_path / "out.json")
    assert Results.read(tmp_path / "out.json") == written
    assert written.rows[0].fraction == 0.5 and written.rows[1].fraction is None
    empty = results()
    empty.write(tmp_path / "out.json")
    assert Results.read(tmp_path / "out.json") == empty


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("must be JSON",)),
        ("[]", ("must be a table", "list")),
        ('{"suite": "kernels"}', ("lacks provenance",)),
        ('{"suite": "kernels", "provenance": {}, "rows": [{"group": 3}]}', ("rows[0].group", "must be str")),
        ('{"suite": "kernels", "provenance": {}, "rows": [{"speed": 3}]}', ("rows[0].speed", "not a known key")),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        Results.read(path)
    assert "old.json" in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_times_of_nothing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    results(row(0.0)).write(path)
    with pytest.raises(InputError, match=r"rows\[0\].times must be of more than 0"):
        Results.read(path)


@pytest.mark.parametrize(
    ("before", "after", "verdict", "regression"),
    [
        (row(10), row(11), "slower", True),
        (row(10), row(10.4), "same", False),  # within 5 %
        (row(10, spread=0.2), row(11, spread=0.2), "same", False),  # within the spread
        (row(10), row(9), "faster", False),
        (row(10, "eager"), row(11, "eager"), "slower", False),  # not ours
        (row(10, f"{OURS} torch"), row(11, f"{OURS} torch"), "slower", True),
        (row(10, f"{OURS}2"), row(11, f"{OURS}2"), "slower", False),
        (row(10), Row("flow_warp", CASE, OURS, "wrong"), "measured, now wrong", True),
        (row(10), Row("flow_warp", CASE, OURS, "refused"), "measured, now refused", True),
        (row(10), Row("flow_warp", CASE, OURS, "skipped"), "measured, now skipped", False),
        (Row("flow_warp", CASE, OURS, "refused"), row(10), "refused, now measured", False),
        (None, row(10), "new", False),
        (row(10), None, "gone", False),
    ],
)
def test_verdicts(before: Row | None, after: Row | None, verdict: str, regression: bool) -> None:
    (change,) = compare(results(*[before] if before else []), results(*[after] if after else []))
    assert (change.verdict, change.regression) == (verdict, regression)


def test_rows_are_matched_by_case_and_form() -> None:
    other = replace(row(10), case=CASE | {"batch": "8"})
    compared = compare(results(row(10), other, row(20, "eager")), results(row(20, "eager"), row(10)))
    assert {(change.key[1], change.key[-1]): change.verdict for change in compared} == {
        ("batch 1", OURS): "same",
        ("batch 8", OURS): "gone",
        ("batch 1", "eager"): "same",
    }
    with pytest.raises(InputError, match="kernels cannot be compared with streams"):
        compare(results(), results(suite="streams"))
