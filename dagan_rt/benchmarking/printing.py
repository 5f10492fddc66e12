"""Results as text: every row, one line a kernel, goals, changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dagan_rt.benchmarking.rows import (
    ALONE,
    CALL,
    DEVICE,
    DOWNLOAD,
    HOST,
    OURS,
    STEP_PARTS,
    UPLOAD,
    Change,
    Results,
    Row,
    Timing,
)  # fmt: skip
from dagan_rt.benchmarking.suites import Aim, Goal
from dagan_rt.tables import printable

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # in this order: one name holds another

NAMED = {"batch": "batch {}", "streams": "{} streams", "fps": "{} fps", "frames": "{} frames",
         "size": "{} pixels", "processes": "{} processes"}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """What a table says of each measured row, given our fastest row of the same case."""

    title: str
    width: int
    cell: Callable[[Row, Row | None], str]


def _millis(pick: Callable[[Timing], float], which: str = CALL) -> Callable[[Row, Row | None], str]:
    return lambda row, ours: f"{pick(row.times[which]) / 1e3:.3f}" if which in row.times else ""


def _value(name: str, form: str = ".0f", unit: float = 1.0) -> Callable[[Row, Row | None], str]:
    return lambda row, ours: f"{row.values[name] / unit:{form}}" if name in row.values else ""


def _micros(pick: Callable[[Timing], float], which: str = CALL, digits: int = 2) -> Callable[[Row, Row | None], str]:
    return lambda row, ours: f"{pick(row.times[which]):.{digits}f}" if which in row.times else ""


def _rate(name: str, digits: int) -> Callable[[Row, Row | None], str]:
    """GB/s or TFLOP/s."""
    divisor = 1e3 if name == "bytes" else 1e6
    return lambda row, ours: f"{getattr(row, name) / row.time.p50 / divisor:.{digits}f}" if row.time else ""


def _fraction(row: Row, ours: Row | None) -> str:
    return "" if row.fraction is None else f"{row.fraction:.0%} {_short(row.ceiling)}"


def _speedup(row: Row, ours: Row | None) -> str:
    if ours is None or row is ours or ours.time is None or row.time is None:
        return ""
    return f"{row.time.p50 / ours.time.p50:.2f}×"


def _error(row: Row, ours: Row | None) -> str:
    return "" if row.error is None else f"{row.error:.1e}"


def _part(name: str) -> Callable[[Row, Row | None], str]:
    """The share of a part of a step in all its parts."""

    def cell(row: Row, ours: Row | None) -> str:
        whole = sum(row.times[part].p50 for part in STEP_PARTS if part in row.times)
        return f"{row.times[name].p50 / whole:.1%}" if name in row.times else ""

    return cell


def _share_of_step(name: str) -> Callable[[Row, Row | None], str]:
    return lambda row, ours: f"{1e3 * row.values[name] / row.time.p50:.0%}" if name in row.values and row.time else ""


def _averaging(row: Row, ours: Row | None) -> str:
    """What averaging the gradients of several processes adds to a step; below 0 is noise."""
    if "without averaging ms" not in row.values or row.time is None:
        return ""
    return f"{1 - 1e3 * row.values['without averaging ms'] / row.time.p50:.1%}"


#: By suite. Whole frames and streams are told in milliseconds, their device memory in MB.
COLUMNS = {
    "kernels": (
        Column("µs", 9, _micros(lambda it: it.p50)),
        Column("p10", 9, _micros(lambda it: it.p10)),
        Column("p90", 9, _micros(lambda it: it.p90)),
        Column("alone", 8, _micros(lambda it: it.p50, ALONE)),
        Column("host", 8, _micros(lambda it: it.p50, HOST, 0)),
        Column("GB/s", 7, _rate("bytes", 0)),
        Column("TFLOP/s", 8, _rate("flops", 1)),
        Column("of ceiling", 18, _fraction),
        Column("error", 8, _error),
        Column("ours is", 8, _speedup),
    ),
    "frames": (
        Column("p50 ms", 9, _millis(lambda it: it.p50)),
        Column("p90", 8, _millis(lambda it: it.p90)),
        Column("p95", 8, _millis(lambda it: it.p95)),
        Column("p99", 8, _millis(lambda it: it.p99)),
        Column("device", 8, _millis(lambda it: it.p50, DEVICE)),
        Column("upload", 7, _millis(lambda it: it.p50, UPLOAD)),
        Column("download", 8, _millis(lambda it: it.p50, DOWNLOAD)),
        Column("frames/s", 9, _value("frames/s")),
        Column("MB", 7, _value("device bytes", unit=1e6)),
        Column("MB/slot", 8, _value("slot bytes", ".1f", 1e6)),
        Column("levels", 6, lambda row, ours: "" if row.error is None else f"{row.error:.0f}"),
        Column("dB", 6, _value("PSNR dB", ".1f")),
        Column("ours is", 8, _speedup),
    ),
    "subnetworks": (
        Column("µs", 9, _micros(lambda it: it.p50)),
        Column("p10", 9, _micros(lambda it: it.p10)),
        Column("p90", 9, _micros(lambda it: it.p90)),
        Column("GFLOP", 8, lambda row, ours: f"{row.flops / 1e9:.2f}"),
        Column("MB", 8, lambda row, ours: f"{row.bytes / 1e6:.1f}"),
        Column("floor µs", 9, lambda row, ours: "" if row.floor is None else f"{row.floor:.2f}"),
        Column("over it", 8, lambda row, ours: "" if not row.fraction else f"{1 / row.fraction:.1f}×"),
        Column("gap µs", 9, lambda row, ours: "" if row.gap is None else f"{row.gap:.1f}"),
        Column("binding", 18, lambda row, ours: _short(row.ceiling)),
    ),
    "streams": (
        Column("p50 ms", 9, _millis(lambda it: it.p50)),
        Column("p90", 8, _millis(lambda it: it.p90)),
        Column("p95", 8, _millis(lambda it: it.p95)),
        Column("p99", 8, _millis(lambda it: it.p99)),
        Column("frames/s", 9, _value("frames/s")),
        Column("drops", 7, _value("drops")),
        Column("errors", 7, _value("errors")),
        Column("behind", 7, _value("behind ms", ".1f")),
        Column("MB/slot", 8, _value("slot bytes", ".1f", 1e6)),
        Column("levels", 7, lambda row, ours: "" if row.error is None else f"{row.error:.0f}"),
        Column("B/frame device", 15, _value("device growth bytes/frame", ".2f")),
        Column("process", 8, _value("process growth bytes/frame", ".2f")),
    ),
    "training": (
        Column("samples/s", 10, _value("samples/s", ".2f")),
        Column("step ms", 9, _millis(lambda it: it.p50)),
        Column("p90", 9, _millis(lambda it: it.p90)),
        *(Column(part, 9, _part(part)) for part in STEP_PARTS),
        Column("perceptual", 10, _share_of_step("perceptual ms")),
        Column("averaging gradients", 19, _averaging),
        Column("waiting", 7, _value("waiting %", ".1f")),
        Column("loader/s", 8, _value("loader samples/s", ".1f")),
        Column("MB", 7, _value("peak bytes", unit=1e6)),
        Column("error", 8, _error),
        Column("ours is", 8, _speedup),
    ),
    "serving": (
        Column("p50 ms", 9, _millis(lambda it: it.p50)),
        Column("p95", 8, _millis(lambda it: it.p95)),
        Column("p99", 8, _millis(lambda it: it.p99)),
        Column("added ms", 9, _value("added ms", ".3f")),
        Column("sent p50", 9, _millis(lambda it: it.p50, "sent")),
        Column("queue", 8, _value("queue ms", ".3f")),
        Column("compute", 8, _value("compute ms", ".3f")),
        Column("start", 8, _millis(lambda it: it.p50, "start")),
        Column("frames/s", 9, _value("frames/s", ".1f")),
        Column("frames", 8, _value("frames answered")),
        Column("drops", 6, _value("drops")),
        Column("late", 6, _value("late")),
        Column("errors", 7, _value("errors")),
        Column("wrong", 6, _value("wrong images")),
        Column("reconnects", 10, _value("reconnects")),
        Column("behind", 7, _value("behind ms", ".1f")),
        Column("frames/batch", 12, _value("frames/batch", ".2f")),
        Column("req/exec", 8, _value("requests/execution", ".2f")),
        Column("sequences", 9, _value("sequences begun")),
        Column("left alone", 10, _value("sequences left alone")),
        Column("still open", 10, _value("sequences still open")),
        Column("MB", 8, _value("server bytes at last", ".1f", 1e6)),
        Column("growth %", 8, _value("server growth %", ".2f")),
    ),
}  # fmt: skip


def report(results: Results, costs: Mapping[str, str] | None = None, verdicts: Sequence[str] = ()) -> str:
    """Everything, the short tables last. `costs` says how bytes and flops of each group are counted."""
    lines = [f"{name:<26} {value}" for name, value in results.provenance.items()]
    lines += ["", *_ceilings(results.ceilings)]
    columns = COLUMNS.get(results.suite, COLUMNS["kernels"])
    for group in dict.fromkeys(row.group for row in results.rows):
        rows = [row for row in results.rows if row.group == group]
        said = f"{group}: {costs.get(group, 'cost not stated')}" if costs is not None else group
        lines += ["", said, *_rows(rows, columns)]
    if results.suite in ("kernels", "frames"):
        lines += ["", *summary(results)]
    lines += ["", *verdicts] if verdicts else []
    return "\n".join(map(printable, lines))


def _ceilings(ceilings: dict[str, float]) -> list[str]:
    units = {"copy": "GB/s, bytes read and written", "launch in a graph": "µs", "launch alone": "µs"}
    product = "TFLOP/s, matrix product"
    return [f"{name:<18}{value:>10.4g} {units.get(name, product)}" for name, value in ceilings.items()]


def _rows(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """The forms of each case below it; where there is one form only, a case a line. Empty columns are left out."""
    some = fastest(row for row in rows if row.ours)
    columns = [column for column in columns if any(column.cell(row, some) for row in rows if row.time)]
    cases = list(dict.fromkeys(circumstances(row.case) for row in rows))
    flat = len(cases) == len(rows) > 1 and len({row.form for row in rows}) == 1
    label = (lambda row: circumstances(row.case)) if flat else (lambda row: row.form)
    width = max(len(name) for name in (*map(label, rows), "form"))
    widths = (width, *(column.width for column in columns))
    lines = [_aligned(("form", *(column.title for column in columns)), widths)]
    lines += [rows[0].form] if flat else []
    for case in cases:
        lines += [] if flat else [case]
        forms = [row for row in rows if circumstances(row.case) == case]
        ours = fastest(row for row in forms if row.ours)
        for row in forms:
            if row.time is None:
                lines.append(_not_measured(row, label(row), width))
            else:
                lines.append(_aligned((label(row), *(column.cell(row, ours) for column in columns)), widths))
    return lines


def fastest(rows: Iterable[Row]) -> Row | None:
    """The measured row of the least time."""
    return min((row for row in rows if row.time), key=_p50, default=None)


def _p50(row: Row) -> float:
    return row.time.p50 if row.time else float("inf")


def _not_measured(row: Row, label: str, width: int) -> str:
    status = "WRONG" if row.status == "wrong" else row.status
    return f"  {label:<{width}} {status}: {row.reason[:200]}"


def _aligned(cells: Iterable[str], widths: Sequence[int]) -> str:
    first, *rest = (f"{cell:<{width}}" if at == 0 else f"{cell:>{width}}" for at, (cell, width)
                    in enumerate(zip(cells, widths, strict=True)))  # fmt: skip
    return "  " + " ".join((first, *rest)).rstrip()


def _short(name: str) -> str:
    for dtype, short in SHORT.items():
        name = name.replace(dtype, short)
    return name


def circumstances(case: Mapping[str, str]) -> str:
    """A case as people read it."""
    return _short(", ".join(NAMED.get(key, "{}").format(value) for key, value in case.items()))


def summary(results: Results) -> list[str]:
    """A line for each kernel, dtype and layout; by batch our time, what of the ceiling that is, and over whom."""
    ours = [row for row in results.rows if row.ours]
    batches = sorted({counted(row, "batch") for row in ours})
    lines = [f"{'ours: µs, of ceiling, × the best peer':<42}" + "".join(f"{f'batch {each}':>20}" for each in batches)]
    by_line: dict[tuple[str, ...], dict[int, str]] = {}
    for row in ours:
        circumstances = (value for key, value in row.case.items() if key != "batch")
        name = (row.group, *circumstances, row.form.removeprefix(OURS).strip())
        by_line.setdefault(name, {})[counted(row, "batch")] = _in_short(row, results)
    for name, cells in by_line.items():
        lines.append(
            f"{_short(' '.join(name).strip()):<42}" + "".join(f"{cells.get(each, ''):>20}" for each in batches)
        )
    return lines


def _in_short(row: Row, results: Results) -> str:
    if row.time is None:
        return row.status if row.status != "wrong" else "WRONG"
    best = best_peer(row, results.rows)
    over = f" {best.time.p50 / row.time.p50:.1f}×" if best is not None and best.time is not None else ""
    fraction = f" {row.fraction:.0%}" if row.fraction is not None else ""
    return f"{row.time.p50:.1f}{fraction}{over}"


def best_peer(ours: Row, rows: Iterable[Row], over: str = "") -> Row | None:
    """The fastest measured peer of a row, of those whose names start with `over`."""
    peers = [
        row for row in rows if row.time and not row.ours and row.key[:-1] == ours.key[:-1] and row.form.startswith(over)
    ]
    return fastest(peers)


def verdict(goal: Goal, results: Results) -> str:
    """What a goal asks for and what was measured."""
    wanted = {"batch": str(goal.batch), "dtype": goal.dtype, "layout": goal.layout}
    wanted |= {"flow": goal.flow} if goal.flow else {}
    rows = {row.group: row for row in results.rows if row.form == OURS and row.case == wanted and row.time}
    name = f"{' + '.join(goal.ops)}, {circumstances(wanted)}"
    chosen = [rows[op] for op in goal.ops if op in rows]
    if len(chosen) < len(goal.ops):
        return f"goal {name}: not measured"
    found = []
    total = sum(row.time.p50 for row in chosen if row.time)
    if goal.microseconds:
        found.append((f"{total:.2f} µs, at most {goal.microseconds:g}", total <= goal.microseconds))
    if goal.fraction:
        fraction = sum(row.floor or 0.0 for row in chosen) / total
        said = f"{fraction:.0%} of {_short(chosen[0].ceiling)}, at least {goal.fraction:.0%}"
        found.append((said, fraction >= goal.fraction))
    if goal.speedup:
        best = best_peer(chosen[0], results.rows, goal.over)
        if best is None or best.time is None:
            found.append((f"no peer {goal.over} was measured", False))
        else:
            speedup = best.time.p50 / total
            found.append((f"{speedup:.2f}× {best.form}, at least {goal.speedup:g}×", speedup >= goal.speedup))
    return f"goal {name}: " + "; ".join(f"{text}: {'met' if met else 'NOT met'}" for text, met in found)


def achieved(aim: Aim, results: Results) -> str:
    """What is asked of whole frames or streams, and what the best of ours did."""
    rows = [row for row in results.rows
            if row.group == aim.group and row.ours and row.time and aim.case.items() <= row.case.items()]  # fmt: skip
    name = f"goal {', '.join(filter(None, (aim.group, circumstances(aim.case))))}"
    if not rows:
        return f"{name}: not measured"
    found = []
    best = min(rows, key=_p50)
    assert best.time is not None
    if aim.microseconds:
        met = best.time.p50 <= aim.microseconds
        found.append((f"p50 {best.time.p50 / 1e3:.3f} ms, at most {aim.microseconds / 1e3:g}", met))
    if aim.spread:
        spread = best.time.p99 / best.time.p50
        found.append((f"p99 is {spread:.2f} times p50, at most {aim.spread:g}", spread <= aim.spread))
    if aim.speedup:
        peer = best_peer(best, results.rows, aim.over)
        ratio = peer.time.p50 / best.time.p50 if peer is not None and peer.time is not None else 0.0
        said = f"{ratio:.2f} times as fast as {aim.over}, at least {aim.speedup:g}"
        said = said if ratio else f"no {aim.over} was measured"
        found.append((said, ratio >= aim.speedup))
    if aim.rate:
        best = max(rows, key=lambda row: row.values.get("frames/s", 0.0))
        rate = best.values.get("frames/s", 0.0)
        found.append((f"{rate:.0f} frames/s at {circumstances(best.case)}, at least {aim.rate:g}", rate >= aim.rate))
    if aim.streams:
        kept = [row for row in rows if row.time and row.time.p99 <= aim.p99 and not row.values.get("drops")]
        best = max(kept, key=lambda row: counted(row, "streams"), default=best)
        most = max((counted(row, "streams") for row in kept), default=0)
        said = f"{most} streams without a drop and p99 at most {aim.p99 / 1e3:g} ms, at least {aim.streams}"
        found.append((said, most >= aim.streams))
    return f"{name}, {best.form}: " + "; ".join(f"{text}: {'met' if met else 'NOT met'}" for text, met in found)


def counted(row: Row, name: str) -> int:
    """A number among a row's circumstances; 0 where the file says something else."""
    count = row.case.get(name, "")
    return int(count) if count.isdecimal() and len(count) < 9 else 0


def changes(compared: Sequence[Change], before: Results, after: Results) -> str:
    """What differs between two results, regressions first."""
    lines = []
    old, new = before.provenance.get("device", "?"), after.provenance.get("device", "?")
    if old != new:
        lines.append(f"note: measured on different devices, {old} and {new}")
    differing = [change for change in compared if change.verdict != "same"]
    for change in sorted(differing, key=lambda change: not change.regression):
        ratio = f" {change.ratio:.2f} times the time" if change.ratio is not None else ""
        mark = "REGRESSION " if change.regression else ""
        times = " -> ".join(f"{row.time.p50:.2f} µs" for row in (change.before, change.after) if row and row.time)
        lines.append(f"{mark}{', '.join(change.key)}: {change.verdict}{ratio} {f'({times})' if times else ''}".rstrip())
    same = len(compared) - len(differing)
    lines.append(f"{same} rows as before, {sum(change.regression for change in compared)} regressions")
    return "\n".join(map(printable, lines))
