"""The report: a page that holds everything, whatever the results say."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from dagan_rt.benchmarking.html import MOST_ROWS, PICTURES, label, write
from dagan_rt.benchmarking.rows import OURS, Results, Row, Timing
from dagan_rt.errors import InputError

EVIL = "<script>alert(1)</script>\x1b[31m \"' & $\\frac{1}{0}$ " + "x" * 1000


def timing(p50: float) -> Timing:
    return Timing(p50, p50 * 0.9, p50 * 1.1, 30, 1, p50 * 1.2, p50 * 1.3)


def frames(form: str, batch: str, p50: float, model: str = "full") -> list[Row]:
    case, exact = {"model": model, "batch": batch}, {"PSNR dB": 48.0, "frames/s": 1e6 / p50}
    times = {"call": timing(p50), "device": timing(p50 / 2), "upload": timing(10), "download": timing(9)}
    return [
        Row(group, case, form, "measured", error=3.0, times=times, values=exact) for group in ("latency", "throughput")
    ]


def everything(form: str, model: str = "full") -> list[Results]:
    refused = Row("latency", {"model": model, "batch": "1"}, "published", "refused", reason=model)
    stage = [
        Row(
            "stages",
            {"model": model, "batch": "1", "stage": name},
            form,
            "measured",
            times={"call": timing(50)},
            floor=9.0,
        )
        for name in ("depth", "motion", model)
    ]
    load = [
        Row("streams", {"model": model, "streams": count, "fps": "30"}, form, "measured", times={"call": timing(9e3)})
        for count in ("1", "64", "128")
    ]
    rows = [row for batch in ("1", "8", "64") for row in frames(form, batch, 700.0, model)]
    return [
        Results("frames", {"device": model}, {}, (*rows, refused)),
        Results("subnetworks", {}, {"copy": 4000.0}, tuple(stage)),
        Results("streams", {}, {}, tuple(load)),
        Results(model, {model: model}, {model: 3.0}, tuple(rows)),
    ]


class Tags(HTMLParser):
    """The tags and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or (value or "").startswith("javascript") for name, value in attrs)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_with_every_picture(tmp_path: Path) -> None:
    written = write(everything(f"{OURS} torch-cuda float16"), {0: ["goal latency: 0.7 ms: met"]}, tmp_path / "report")
    assert {path.name for path in written} == {
        "index.html",
        *(f"{it}.{kind}" for it in PICTURES for kind in ("svg", "png")),
    }
    page = (tmp_path / "report" / "index.html").read_text()
    found = Tags(page)
    assert found.tags.count("img") == len(PICTURES) and "goal latency: 0.7 ms: met" in found.texts
    assert "0.700" in found.texts and "refused: full" in found.texts
    assert "http" not in page.split("base64,")[0]  # nothing is fetched
    for name in PICTURES:
        ElementTree.fromstring((tmp_path / "report" / f"{name}.svg").read_text())
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_hostile_results_stay_text(tmp_path: Path) -> None:
    results = everything(EVIL, EVIL)
    strange = {"model": EVIL, "batch": "9" * 500, "streams": "-1", "stage": EVIL}
    odd = Row(EVIL, strange, EVIL, "measured", times={EVIL: timing(1), "call": timing(1)})
    results.append(Results("frames", {}, {}, (odd, Row("latency", {EVIL: EVIL}, EVIL, EVIL, reason=EVIL))))
    for at, result in enumerate(results):  # as they would come: from files
        result.write(tmp_path / f"{at}.json")
        results[at] = Results.read(tmp_path / f"{at}.json")
    write(results, {0: [EVIL]}, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "script" not in Tags(page).tags and "<script" not in page and "\x1b" not in page
    assert "&lt;script&gt;" in page and "x" * 301 not in page
    for name in ("stages", "throughput"):
        ElementTree.fromstring((tmp_path / "report" / f"{name}.svg").read_text())
    assert "$" not in label(EVIL) and len(label(EVIL)) <= 40


def test_pages_are_bounded(tmp_path: Path) -> None:
    rows = [row for at in range(MOST_ROWS) for row in frames(f"form {at}", str(at + 1), 5.0)]
    write([Results("frames", {}, {}, tuple(rows))], {}, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<tr") < MOST_ROWS + 10 and f"{MOST_ROWS} more rows are not shown" in page


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="must be a folder"):
        write([], {}, tmp_path / "file")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"dagan-rt\[bench\]"):
        write([], {}, tmp_path / "other")
    assert not (tmp_path / "other").exists()
