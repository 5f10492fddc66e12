"""The run's log, one JSON object a line, what its rows are made of, and the curve drawn from it."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError, require

LOG_NAME = "log.jsonl"


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Add one row to the log, whole or not at all."""
    with open(folder / LOG_NAME, "ab") as file:
        end = file.tell()
        try:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
        except OSError:  # a full disk: half a row would make the rest unreadable
            file.truncate(end)
            raise


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run's log; a last line cut short by a crash is left out. InputError when there is no log."""
    path = Path(folder) / LOG_NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise InputError(f"{path} does not exist; expected the folder of a training run") from None
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise InputError(f"{path} line {number + 1} is not JSON; expected one object a line") from None
    return rows


def forget_after(folder: Path, step: int) -> None:
    """Drop rows of steps after `step`: a resumed run writes them again."""
    path = folder / LOG_NAME
    if not path.exists():
        return
    kept = [row for row in read_rows(folder) if row["step"] <= step]
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    temporary.replace(path)


def plot(folder: str | Path) -> Path:
    """Draw `curve.png` from a run's log: every loss term, and the held-out error over repeating the source."""
    folder = Path(folder)
    rows = read_rows(folder)
    if not rows:
        raise InputError(f"{folder / LOG_NAME} has no rows yet; nothing to plot")
    require("matplotlib", extra="train", why="plotting")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    losses, quality = figure.subplots(2, 1, sharex=True)
    for term in dict.fromkeys(term for row in rows for term in row["terms"]):
        points = [(row["step"], row["terms"][term]) for row in rows if row["terms"].get(term)]
        if points:
            losses.plot(*zip(*points, strict=True), label=term, linewidth=1.2)
    losses.set(yscale="log", ylabel="loss term (weighted)", title=folder.name)
    evaluated = [(row["step"], row["held_out"]["ratio"]) for row in rows if row.get("held_out")]
    if evaluated:
        steps, ratios = zip(*evaluated, strict=True)
        quality.plot(steps, ratios, marker="o", markersize=3, label="held-out error / doing nothing")
        quality.axhline(1.0, color="gray", linestyle=":", linewidth=1)
    quality.set(xlabel="step", ylabel="ratio, lower is better")
    changes = [b["step"] for a, b in zip(rows, rows[1:], strict=False) if a["stage"] != b["stage"]]
    for axis in (losses, quality):
        for step in changes:
            axis.axvline(step, color="black", alpha=0.2)
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    path = folder / "curve.png"
    temporary = folder / "curve.part.png"
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
    return path


class Tally:
    """Means of the terms since the last row of the log, a moving mean for the bar, and time spent training."""

    def __init__(self) -> None:
        self.moving: dict[str, float] = {}
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.steps, self.samples, self.left_out, self.seconds, self.waited = 0, 0, 0, 0.0, 0.0
        self._last: float | None = None

    def add(self, terms: dict[str, float], samples: int, begun: float, waited: float) -> None:
        """One step's terms; its time runs from the step before, so waiting for data (`waited`) counts."""
        for name, value in terms.items():
            self.sums[name] += value
            self.moving[name] = 0.98 * self.moving.get(name, value) + 0.02 * value
        now = time.perf_counter()
        self.seconds += now - (begun if self._last is None else self._last)
        self.waited += waited
        self._last = now
        self.steps += 1
        self.samples += samples

    def resume_clock(self) -> None:
        """Time since the last step went into reporting: leave it out."""
        self._last = time.perf_counter()

    def take(self) -> tuple[dict[str, Any], float]:
        """(a row of the log: samples a second, the share of time spent waiting for data, mean terms; seconds), anew."""
        counted = max(1, self.steps - self.left_out)
        row: dict[str, Any] = {
            "samples_per_second": round(self.samples / max(self.seconds, 1e-9), 3),
            "waiting": round(self.waited / max(self.seconds, 1e-9), 4),
            "terms": {name: value / counted for name, value in self.sums.items()},
        }
        if self.left_out:
            row["left_out"] = self.left_out
        seconds = self.seconds
        self._reset()
        return row, seconds
