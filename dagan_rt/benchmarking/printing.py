"""Results as text: every row, one line a kernel, goals, changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dagan_rt.benchmarking.rows import ALONE, HOST, OURS, Change, Results, Row
from dagan_rt.benchmarking.suites import Goal
from dagan_rt.tables import printable

COLUMNS = ("form", "µs", "p10", "p90", "alone", "host", "GB/s", "TFLOP/s", "of ceiling", "error", "ours is")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # in this order: one name holds another


def report(results: Results, costs: dict[str, str], goals: Sequence[Goal] = ()) -> str:
    """Everything, the short tables last. `costs` says how bytes and flops of each operation are counted."""
    lines = [f"{name:<26} {value}" for name, value in results.provenance.items()]
    lines += ["", *_ceilings(results.ceilings)]
    for group in dict.fromkeys(row.group for row in results.rows):
        rows = [row for row in results.rows if row.group == group]
        lines += ["", f"{group}: {costs.get(group, 'cost not stated')}", *_rows(rows)]
    lines += ["", *summary(results)]
    lines += ["", *(verdict(goal, results) for goal in goals)] if goals else []
    return "\n".join(map(printable, lines))


def _ceilings(ceilings: dict[str, float]) -> list[str]:
    units = {"copy": "GB/s, bytes read and written", "launch in a graph": "µs", "launch alone": "µs"}
    product = "TFLOP/s, matrix product"
    return [f"{name:<18}{value:>10.4g} {units.get(name, product)}" for name, value in ceilings.items()]


def _rows(rows: Sequence[Row]) -> list[str]:
    """The forms of each case below it."""
    width = max(len(name) for name in (*(row.form for row in rows), "form"))
    widths = (width, 9, 9, 9, 8, 8, 7, 8, 18, 8, 8)
    lines = [_aligned(COLUMNS, widths)]
    for case in dict.fromkeys(_circumstances(row.case) for row in rows):
        lines.append(case)
        forms = [row for row in rows if _circumstances(row.case) == case]
        ours = next((row for row in forms if row.form == OURS and row.time), None)
        for row in forms:
            lines.append(_aligned(_cells(row, ours), widths) if row.time else _not_measured(row, width))
    return lines


def _cells(row: Row, ours: Row | None) -> tuple[str, ...]:
    timing = row.time
    assert timing is not None
    fraction = "" if row.fraction is None else f"{row.fraction:.0%} {_short(row.ceiling)}"
    times = "" if ours is None or ours.time is None or row is ours else f"{timing.p50 / ours.time.p50:.2f}×"
    return (
        row.form,
        f"{timing.p50:.2f}",
        f"{timing.p10:.2f}",
        f"{timing.p90:.2f}",
        f"{row.times[ALONE].p50:.2f}" if ALONE in row.times else "",
        f"{row.times[HOST].p50:.0f}" if HOST in row.times else "",
        f"{row.bytes / timing.p50 / 1e3:.0f}",
        f"{row.flops / timing.p50 / 1e6:.1f}",
        fraction,
        "" if row.error is None else f"{row.error:.1e}",
        times,
    )


def _not_measured(row: Row, width: int) -> str:
    status = "WRONG" if row.status == "wrong" else row.status
    return f"  {row.form:<{width}} {status}: {row.reason[:200]}"


def _aligned(cells: Iterable[str], widths: Sequence[int]) -> str:
    first, *rest = (f"{cell:<{width}}" if at == 0 else f"{cell:>{width}}" for at, (cell, width)
                    in enumerate(zip(cells, widths, strict=True)))  # fmt: skip
    return "  " + " ".join((first, *rest)).rstrip()


def _short(name: str) -> str:
    for dtype, short in SHORT.items():
        name = name.replace(dtype, short)
    return name


def _circumstances(case: dict[str, str]) -> str:
    return _short(", ".join(f"batch {value}" if key == "batch" else value for key, value in case.items()))


def summary(results: Results) -> list[str]:
    """A line for each kernel, dtype and layout; by batch our time, what of the ceiling that is, and over whom."""
    ours = [row for row in results.rows if row.form == OURS]
    batches = sorted({int(row.case.get("batch", 1)) for row in ours})
    lines = [f"{'ours: µs, of ceiling, × the best peer':<42}" + "".join(f"{f'batch {each}':>20}" for each in batches)]
    by_line: dict[tuple[str, ...], dict[int, str]] = {}
    for row in ours:
        name = (row.group, *(value for key, value in row.case.items() if key != "batch"))
        by_line.setdefault(name, {})[int(row.case.get("batch", 1))] = _in_short(row, results)
    for name, cells in by_line.items():
        lines.append(f"{_short(' '.join(name)):<42}" + "".join(f"{cells.get(each, ''):>20}" for each in batches))
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
        row
        for row in rows
        if row.time and row.form != OURS and row.key[:-1] == ours.key[:-1] and row.form.startswith(over)
    ]
    return min(peers, key=lambda row: row.time.p50 if row.time else 0.0, default=None)


def verdict(goal: Goal, results: Results) -> str:
    """What a goal asks for and what was measured."""
    wanted = {"batch": str(goal.batch), "dtype": goal.dtype, "layout": goal.layout}
    wanted |= {"flow": goal.flow} if goal.flow else {}
    rows = {row.group: row for row in results.rows if row.form == OURS and row.case == wanted and row.time}
    name = f"{' + '.join(goal.ops)}, {_circumstances(wanted)}"
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
