"""What an export measured: written, read back from anywhere, and shown without gaps."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dagan_rt.errors import InputError
from dagan_rt.export import export, verify
from dagan_rt.export.verify import ExportError, require_passed
from dagan_rt.report import EngineReport, GraphReport, Measured, Report

GOOD = Measured(1e-6, 1e-7, 120.0, 1e-3, 60.0)
REPORT = Report(
    "PyTorch in float32",
    "4 frames",
    {
        "source": GraphReport("fp32", 1_000_000, 130, 30_000_000, {"onnxruntime": {"depth": GOOD, "kp_value": GOOD}}),
        "motion": GraphReport("int8", 2_000_000, 110, 20_000_000,
                              {"onnxruntime": {"flow": GOOD}, "tensorrt-rtx": {"flow": replace(GOOD, max_abs=2e-6)}}),
    },
    {"onnxruntime": replace(GOOD, psnr=54.0, least_psnr=0.0), "torch": GOOD},
    {"tensorrt-rtx-1": EngineReport("tensorrt-rtx", 2.5, {"motion": 3_000_000, "source": 10},
                                    {"motion": 99, "source": 1}, {"motion": ("conv + relu", "resize")}, "no GPU")},
    ("motion: int8 was fastest",),
)  # fmt: skip


def test_it_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    REPORT.write(tmp_path)
    assert Report.read(tmp_path / "verify.json") == REPORT
    assert json.loads((tmp_path / "verify.json").read_text())["verdict"] == "passed"


def test_the_table_has_every_graph_backend_and_output() -> None:
    lines = [line.split() for line in REPORT.table().splitlines()]
    measured = [(line[0], line[2], line[1]) for line in lines if line and line[-1] in ("passed", "FAILED")]
    assert measured == [
        ("source", "onnxruntime", "depth"),
        ("source", "onnxruntime", "kp_value"),
        ("motion", "onnxruntime", "flow"),
        ("motion", "tensorrt-rtx", "flow"),
        ("reenactment", "onnxruntime", "frames"),
        ("reenactment", "torch", "frames"),
    ]
    assert ["motion", "int8", "2.0", "110", "0.02"] in lines
    for words in (
        "PyTorch in float32", "4 frames", "tensorrt-rtx-1", "2.5 s", "3.0 MB (99 layers, fused to 2)", "(1 layers)",
        "no GPU", "int8 was fastest",
    ):  # fmt: skip
        assert words in REPORT.table(), words


@pytest.mark.parametrize(
    "broken",
    [
        replace(GOOD, max_abs=1.1e-3), replace(GOOD, psnr=59.0), replace(GOOD, max_abs=math.nan),
        replace(GOOD, psnr=math.nan), replace(GOOD, tolerance=math.nan), replace(GOOD, least_psnr=math.nan),
        replace(GOOD, max_abs=math.inf), Measured(*[math.nan] * 5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["graph", "engine", "reenactment"])
def test_one_number_out_of_bounds_fails_the_report(broken: Measured, where: str, tmp_path: Path) -> None:
    report = copy.deepcopy(REPORT)
    if where == "reenactment":
        report.reenactment["torch"] = broken
        name, backend = "reenactment: frames", "torch"
    else:
        backend = "onnxruntime" if where == "graph" else "tensorrt-rtx"
        report.graphs["motion"].errors[backend]["flow"] = broken
        name = "motion: flow"
    assert not broken.passed
    assert len(report.failures()) == 1 and report.failures()[0].startswith(f"{name} on {backend} differs")
    assert [line.split()[2] for line in report.table().splitlines() if line.endswith("FAILED")] == [backend]
    with pytest.raises(ExportError, match=f"{name} on {backend}.*nothing was written"):
        require_passed(report)
    report.write(tmp_path)
    assert json.loads((tmp_path / "verify.json").read_text())["verdict"] == "failed"


def test_at_the_bound_it_passes() -> None:
    assert Measured(1e-3, 0.0, 60.0, 1e-3, 60.0).passed
    require_passed(REPORT)


@pytest.mark.parametrize("value", [math.nan, 0.9])
def test_a_failed_measurement_stops_the_export(
    small_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """The reenacted frames are wrong, every graph is right."""
    original = verify.Sessions.measure

    def spoiled(*arguments: Any) -> Measured:
        return replace(original(*arguments), max_abs=value)

    monkeypatch.setattr(verify.Sessions, "measure", spoiled)
    with pytest.raises(ExportError, match="reenactment: frames on onnxruntime differs from PyTorch by (nan|0.9)"):
        export(small_model("fomm"), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(pairs):
        yield value, key
        yield from spots(child)


def numbers(value: Any) -> Iterator[float]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for child in children:
        yield from numbers(child)
    if isinstance(value, (int, float)):
        yield value


def test_no_file_brings_more_than_an_input_error(tmp_path: Path) -> None:
    path, rng = tmp_path / "verify.json", random.Random(0)
    nested: list[Any] = []
    for _ in range(300):
        nested = [nested]
    strange = [None, True, 0, -1, -0.5, 1e308, math.nan, math.inf, -math.inf, 10**400, 2**70, "", "x" * 10_000, [], {},
               nested, {"a": {"b": {}}}, {"onnxruntime": {"flow": {}}}, {"onnxruntime": 3}, "\x1b[2J"]  # fmt: skip
    refused = 0
    for _ in range(1000):
        values = json.loads(json.dumps(REPORT.to_dict()))
        container, key = rng.choice(list(spots(values)))
        if isinstance(container, dict) and rng.random() < 0.2:
            container[rng.choice(["wings", "", "x" * 10_000, "é\n"])] = container.pop(key)
        else:
            container[key] = rng.choice(strange)
        path.write_text(json.dumps(values))
        try:
            report = Report.read(path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500 and str(path) in str(error)
            continue
        assert all(0 <= number < math.inf for number in numbers(report.to_dict()))
        assert all(letter.isprintable() or letter == "\n" for letter in report.table())
    assert 500 < refused < 1000


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "3", "null", '"text"', "NaN", "{", "{}", "[" * 300_000, '{"a":' * 200_000, "9" * 5000,
     " " * (1 << 21), '{"reference": "\\ud800", "frames": "", "graphs": {}, "reenactment": {}, "engines": []}'],
)  # fmt: skip
def test_what_is_no_report_at_all(tmp_path: Path, text: str) -> None:
    path = tmp_path / "verify.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        Report.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_report_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="verify.json cannot be read: No such file"):
        Report.read(tmp_path / "verify.json")


def test_a_foreign_report_cannot_steer_the_terminal() -> None:
    evil = replace(REPORT, notes=("red \x1b[31m", "two\nlines"), graphs={"a\x1b[2J\r": REPORT.graphs["source"]})
    table = evil.table()
    assert "red ?[31m" in table and "two?lines" in table and "a?[2J?" in table
    assert all(letter.isprintable() or letter == "\n" for letter in table)
