"""Results as one HTML page with pictures in it, and the pictures beside it as SVG and PNG.

The files that results come from may come from anywhere: every text is escaped and cut, every picture has a limit on
what is drawn in it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt.benchmarking.printing import COLUMNS, circumstances, counted, fastest
from dagan_rt.benchmarking.rows import DEVICE, DOWNLOAD, OURS, UPLOAD, Results, Row
from dagan_rt.errors import InputError, require
from dagan_rt.files import AtomicFile
from dagan_rt.tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "index.html"
MOST_ROWS = 2000  # of a table
MOST_SERIES = 12  # of a picture
MOST_POINTS = 64  # of a series
LONGEST = 300  # letters of a text; 40 in a picture
FRAME_BUDGET = 33.0  # ms, of a stream of 30 frames/s
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2), .reason { text-align: left }
.reason { white-space: normal; color: #a33 } .ours td { font-weight: 600; background: #f3f8f3 }
.not { color: #a33 } .met { color: #286b2c } img { max-width: 100%; margin: .5rem 0 } .wide { overflow-x: auto }
"""


def write(results: Sequence[Results], verdicts: Mapping[int, Sequence[str]], folder: Path) -> list[Path]:
    """Write `index.html` and its pictures into `folder`; `verdicts` by the result's place. Returns what was written.

    Raises InputError where `folder` is a file.
    """
    require("matplotlib", extra="bench", why="the report's pictures")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} must be a folder, but it is a file")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for result in results for row in result.rows if row.time is not None]
    written, shown = [], []
    for name, (title, draw) in PICTURES.items():
        picture = drawn(draw, rows)
        if picture is None:
            continue
        for kind, content in picture.items():
            written.append(_write(folder / f"{name}.{kind}", content))
        source = base64.b64encode(picture["svg"]).decode()
        shown.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/svg+xml;base64,{source}">')
    sections = [section(result, verdicts.get(at, ())) for at, result in enumerate(results)]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>dagan-rt benchmarks</title>'
        f"<style>{STYLE}</style><h1>dagan-rt benchmarks</h1>{''.join(shown)}{''.join(sections)}</html>\n"
    )
    return [_write(folder / PAGE, page.encode()), *written]


def section(results: Results, verdicts: Sequence[str]) -> str:
    """One result: goals, rows by group, what it was measured on."""
    parts = [f"<h2>{escaped(results.suite)}</h2>"]
    if verdicts:
        goals = (f'<li class="{"not" if "NOT met" in it or "not measured" in it else "met"}">{escaped(it)}</li>'
                 for it in verdicts)  # fmt: skip
        parts.append(f"<ul>{''.join(goals)}</ul>")
    for group in dict.fromkeys(row.group for row in results.rows[:MOST_ROWS]):
        parts.append(f"<h3>{escaped(group)}</h3>{table(results, group)}")
    if len(results.rows) > MOST_ROWS:
        parts.append(f"<p>{len(results.rows) - MOST_ROWS} more rows are not shown.</p>")
    known = (
        f"<tr><td>{escaped(name)}</td><td>{escaped(value)}</td></tr>" for name, value in results.provenance.items()
    )
    return f"{''.join(parts)}<h3>Measured on</h3><table>{''.join(known)}</table>"


def table(results: Results, group: str) -> str:
    """The rows of a group."""
    columns = COLUMNS.get(results.suite, COLUMNS["kernels"])
    head = "".join(f"<th>{title}</th>" for title in ("case", "form", *(column.title for column in columns)))
    rows = [row for row in results.rows[:MOST_ROWS] if row.group == group]
    best: dict[str, Row | None] = {}  # ours, by case
    for row in rows:
        case = circumstances(row.case)
        best[case] = fastest(it for it in (best.get(case), row) if it is not None and it.ours)
    body = []
    for row in rows:
        case = circumstances(row.case)
        start = f"<td>{escaped(case)}</td><td>{escaped(row.form)}</td>"
        if row.time is None:
            cells = f'<td class="reason" colspan="{len(columns)}">{escaped(row.status)}: {escaped(row.reason)}</td>'
        else:
            cells = "".join(f"<td>{escaped(column.cell(row, best[case]))}</td>" for column in columns)
        body.append(f'<tr{" class=ours" if row.ours else ""} title="{escaped(row.command)}">{start}{cells}</tr>')
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def escaped(text: str) -> str:
    """Any text for HTML, cut where it is long."""
    return html.escape(printable(text[:LONGEST]))


def label(text: str) -> str:
    """Any text for a picture: short, and without what matplotlib would typeset."""
    return printable(text[:40]).replace("$", "")


def drawn(draw: Callable[[Any, Sequence[Row]], bool], rows: Sequence[Row]) -> dict[str, bytes] | None:
    """A picture as SVG and PNG, or None where `draw` finds nothing to show."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(
        {"svg.hashsalt": "dagan-rt", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        if not draw(figure.add_subplot(), rows):
            return None
        made = {}
        for kind in ("svg", "png"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
            made[kind] = buffer.getvalue()
    return made


def draw_stages(axes: Axes, rows: Sequence[Row]) -> bool:
    """Stacked bars: device time by stage, per frame, for each form and batch."""
    bars = _series(
        [row for row in rows if row.group == "stages" and row.case.get("stage") != "whole frame"], _stage_bar
    )
    if not bars:
        return False
    stages = list(dict.fromkeys(row.case.get("stage", "") for inside in bars.values() for row in inside))[:MOST_POINTS]
    left = dict.fromkeys(bars, 0.0)
    for at, stage in enumerate(stages):
        widths = [sum(_per_frame(row) for row in inside if row.case.get("stage") == stage) for inside in bars.values()]
        axes.barh([label(bar) for bar in bars], widths, left=list(left.values()), label=label(stage), color=_color(at))
        left = {bar: start + width for (bar, start), width in zip(left.items(), widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel("device time per frame, µs")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def draw_parts(axes: Axes, rows: Sequence[Row]) -> bool:
    """Stacked bars: where a single frame's latency goes."""
    single = [row for row in rows if row.group == "latency" and row.case.get("batch") == "1" and DEVICE in row.times]
    if not single:
        return False
    single = single[: 2 * MOST_SERIES]
    names, left = [label(f"{row.form}, {row.case.get('model', '')}") for row in single], [0.0] * len(single)
    for at, part in enumerate((UPLOAD, DEVICE, DOWNLOAD, "host and waiting")):
        widths = []
        for row in single:
            assert row.time is not None
            known = sum(row.times[name].p50 for name in (UPLOAD, DEVICE, DOWNLOAD) if name in row.times)
            micros = row.times[part].p50 if part in row.times else max(0.0, row.time.p50 - known)
            widths.append((micros if part in row.times or part == "host and waiting" else 0.0) / 1e3)
        axes.barh(names, widths, left=left, label=part, color=_color(at))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("latency of one frame (medians), ms")
    axes.legend(fontsize=8)
    return True


def draw_throughput(axes: Axes, rows: Sequence[Row]) -> bool:
    """Lines: frames/s over batch, a form each."""
    series = _series([row for row in rows if row.group == "throughput" and row.values.get("frames/s")], _form)
    for at, (name, inside) in enumerate(series.items()):
        points = sorted((counted(row, "batch"), row.values["frames/s"]) for row in inside if counted(row, "batch"))
        style = "-" if name.startswith(OURS) else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=label(name), color=_color(at))
    if not series:
        return False
    batches = sorted({counted(row, "batch") for inside in series.values() for row in inside})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("batch")
    axes.set_ylabel("frames/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def draw_errors(axes: Axes, rows: Sequence[Row]) -> bool:
    """Points: PSNR against float32 over latency, batch 1."""
    single = [
        row for row in rows if row.group == "latency" and row.case.get("batch") == "1" and "PSNR dB" in row.values
    ]
    for at, row in enumerate(single[:MOST_SERIES]):
        assert row.time is not None
        exact = min(row.values["PSNR dB"], 100.0)  # 200 is no difference at all
        axes.scatter(row.time.p50 / 1e3, exact, s=60, marker="o" if row.ours else "s", color=_color(at), zorder=3)
        axes.annotate(
            label(row.form), (row.time.p50 / 1e3, exact), xytext=(6, 4), textcoords="offset points", fontsize=8
        )
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.15)
    axes.set_xlabel("latency of one frame (p50), ms")
    axes.set_ylabel("PSNR against float32 PyTorch, dB (100: equal)")
    axes.grid(alpha=0.3)
    return bool(single)


def draw_streams(axes: Axes, rows: Sequence[Row]) -> bool:
    """Lines: p50 and p99 of latency over the number of streams."""
    series = _series([row for row in rows if row.group == "streams" and counted(row, "streams")], _form)
    for at, (name, inside) in enumerate(series.items()):
        ordered = sorted(inside, key=lambda row: counted(row, "streams"))
        count = [counted(row, "streams") for row in ordered]
        for which, style in (("p99", "-"), ("p50", ":")):
            values = [getattr(row.time, which) / 1e3 for row in ordered]
            axes.plot(count, values, style, marker="o", color=_color(at), label=f"{label(name)} {which}")
    if not series:
        return False
    axes.axhline(FRAME_BUDGET, color="#888", linewidth=1)
    axes.annotate("33 ms", (1, FRAME_BUDGET), xytext=(0, 3), textcoords="offset points", fontsize=8, color="#666")
    axes.set_xlabel("streams")
    axes.set_ylabel("latency, ms")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return True


PICTURES: dict[str, tuple[str, Callable[[Any, Sequence[Row]], bool]]] = {
    "parts": ("Where the latency of one frame goes", draw_parts),
    "stages": ("Device time by stage", draw_stages),
    "throughput": ("Throughput over batch", draw_throughput),
    "errors": ("Error against speed", draw_errors),
    "streams": ("Latency over streams", draw_streams),
}


def _series(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows by name, no more than a picture can show."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if name(row) in found or len(found) < MOST_SERIES:
            found.setdefault(name(row), []).append(row)
    return {key: inside[:MOST_POINTS] for key, inside in found.items()}


def _form(row: Row) -> str:
    return f"{row.form}, {row.case.get('model', '')}"


def _stage_bar(row: Row) -> str:
    return f"{row.form}, batch {row.case.get('batch', '')}"


def _per_frame(row: Row) -> float:
    assert row.time is not None
    return row.time.p50 / max(1, counted(row, "batch"))


def _color(at: int) -> str:
    return f"C{at % 10}"  # of matplotlib's ten


def _write(path: Path, content: bytes) -> Path:
    file = AtomicFile(path)
    file.write(content)
    file.commit()
    return path
