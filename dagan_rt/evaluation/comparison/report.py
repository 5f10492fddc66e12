"""table1.md and intervals.png: the comparison for a reader, in the order of the supplementary's Table 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dagan_rt.errors import require
from dagan_rt.evaluation import METRICS
from dagan_rt.evaluation.comparison.orderings import HOLDS, PAPER, REVERSED, UNDECIDED
from dagan_rt.evaluation.comparison.statistics import Estimate
from dagan_rt.evaluation.comparison.table import COLUMNS, REPEAT, Comparison, Judged, Looks, mode_of

COLOURS = {"baseline": "#7f7f7f", "fomm": "#1f77b4", "dagan_sa": "#ff7f0e", "dagan": "#2ca02c", REPEAT: "#000000"}


def markdown(it: Comparison, notes: Sequence[str] = ()) -> str:
    """The table, the orderings with their verdicts, what they amount to in one sentence, and what it cost."""
    seeds = len(next(iter(it.trained.values())))
    parts = [
        _table(it),
        f"Mean of {seeds} trainings ± half of the 95 % interval over seeds and clips. {_measured_by(it)}".strip(),
        usefulness(it),
        "## The paper's orderings",
        sentence(it),
        _orderings([judged for judged in it.judged if judged.claimed]),
        "## Where the paper's table is not legible",
        _orderings([judged for judged in it.judged if not judged.claimed]),
    ]
    if it.looks is not None:
        parts += ["## Attention", _looks(it.looks)]
    parts += ["## Cost", _cost(it), *notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def sentence(it: Comparison) -> str:
    """Which of the paper's orderings hold here, which are reversed, and which stay open."""
    claimed = [judged for judged in it.judged if judged.claimed]
    if not claimed:
        return "None of the paper's orderings can be asked of these variants."
    groups = []
    for verdict, words in ((HOLDS, "hold here"), (REVERSED, "come out the other way"), (UNDECIDED, "are undecided")):
        found = [str(judged.ordering) for judged in claimed if judged.verdict == verdict]
        groups.append(f"{len(found)} {words}" + (f" ({'; '.join(found)})" if found else ""))
    return (
        f"Of the {len(claimed)} orderings that can be read in the paper's table, {', '.join(groups[:2])} and "
        f"{groups[2]}. Each is judged at 95 % by itself, so that about one verdict in twenty may be chance."
    )


def usefulness(it: Comparison) -> str:
    """By which metrics which variants are better than showing the source unchanged."""
    lines = []
    for metric in dict.fromkeys(judged.ordering.metric for judged in it.useful):
        found = {judged.ordering.better: judged.verdict for judged in it.useful if judged.ordering.metric == metric}
        groups = [
            f"{', '.join(row for row, verdict in found.items() if verdict == wanted)} {words}"
            for wanted, words in ((HOLDS, "better"), (REVERSED, "worse"), (UNDECIDED, "undecided"))
            if wanted in found.values()
        ]
        lines.append(f"{METRICS[metric].title}: {', '.join(groups)}")
    return f"Against showing the source unchanged, at 95 %: {'; '.join(lines)}." if lines else ""


def intervals(it: Comparison, path: Path) -> None:
    """Draw one panel a metric: each training as a dot, each variant's mean with its interval, and doing nothing."""
    require("matplotlib", extra="train", why="plotting")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [metric for metric in COLUMNS if metric in it.scores[REPEAT]]
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, metric in zip(axes, shown, strict=False):
        _panel(axis, it, metric)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    words = "line: mean; bar: 95 % interval over seeds and clips; dots: single trainings; dotted: source repeated"
    figure.supxlabel(words + ("; dashed: the best an extractor could read" if it.noise else ""), fontsize=8)
    partial = path.with_name("." + path.name)
    figure.savefig(partial, dpi=130, format="png")
    partial.replace(path)


def _panel(axis: Any, it: Comparison, metric: str) -> None:
    variants = [row for row in it.scores if row != REPEAT]
    for place, variant in enumerate(variants):
        found, colour = it.scores[variant][metric], COLOURS.get(variant, "#9467bd")
        half = found.high - found.value
        if math.isfinite(half):
            axis.errorbar(place, found.value, yerr=half, fmt="_", color=colour, capsize=4, markersize=12)
        axis.plot([place + 0.22] * len(found.seeds), found.seeds, ".", color=colour, alpha=0.6, markersize=5)
    axis.axhline(it.scores[REPEAT][metric].value, color="black", linestyle=":", linewidth=1)
    if metric in it.noise:
        axis.axhline(it.noise[metric], color="black", linestyle="--", linewidth=0.8, alpha=0.5)
    axis.set_xticks(range(len(variants)), variants, fontsize=8)
    axis.set_xlim(-0.5, len(variants) - 0.4)
    axis.set_title(f"{heading(metric)}, {mode_of(metric)}", fontsize=9)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="y", alpha=0.25)


def heading(metric: str) -> str:
    """A metric's name with the direction of better and its unit."""
    it = METRICS[metric]
    return f"{it.title} {'↓' if it.lower_is_better else '↑'}" + (f" ({it.unit})" if it.unit else "")


def _table(it: Comparison) -> str:
    shown = [metric for metric in COLUMNS if any(metric in by for by in it.scores.values())]
    lines = [_line(["", *map(heading, shown)]), _line(["---"] * (len(shown) + 1))]
    lines += [
        _line([row, *(_score(by[metric]) if metric in by else "" for metric in shown)]) for row, by in it.scores.items()
    ]
    if it.noise:
        floors = [f"{it.noise[metric]:.3g}" if metric in it.noise else "" for metric in shown]
        lines.append(_line(["*best an extractor could read*", *floors]))
    for row, entries in PAPER.items():
        if row in it.scores and any(metric in entries for metric in shown):
            lines.append(_line([f"*paper, {row}*", *(entries.get(metric, "") for metric in shown)]))
    return "\n".join(lines)


def _orderings(judged: Sequence[Judged]) -> str:
    if not judged:
        return ""
    lines = [_line(["ordering", "where claimed", "difference [95 %]", "verdict"]), _line(["---"] * 4)]
    lines += [_line([str(it.ordering), it.ordering.source, _difference(it.difference), _verdict(it)]) for it in judged]
    return "\n".join(lines)


def _verdict(it: Judged) -> str:
    return it.verdict if it.claimed else {HOLDS: "yes", REVERSED: "no, the reverse"}.get(it.verdict, it.verdict)


def _looks(looks: Looks) -> str:
    each = ", ".join(f"{variant} {_score(found)}" for variant, found in looks.shares.items())
    text = f"Share of the attention on the face (what jaw and brows enclose): {each}; its area is {looks.area:.3f}"
    if looks.difference is None:
        return text + " of the picture."
    return (
        f"{text} of the picture. That dagan attends to the face more than dagan_sa does (Figure 3): "
        f"{looks.verdict}, the difference is {_difference(looks.difference)}."
    )


def _cost(it: Comparison) -> str:
    lines = [_line(["", "samples a run", "seconds a run", "weights that make an image"]), _line(["---"] * 4)]
    for variant, runs in it.trained.items():
        seconds = ", ".join(f"{run.seconds:.0f}" for run in runs)
        lines.append(_line([variant, f"{runs[0].samples:,}", seconds, f"{runs[0].parameters:,}"]))
    return "\n".join(lines)


def _measured_by(it: Comparison) -> str:
    by: dict[str, list[str]] = {}
    for metric, extractor in it.extractors.items():
        by.setdefault(extractor, []).append(METRICS[metric].title)
    failed: dict[str, int] = {}
    for metric, found in (entry for scores in it.scores.values() for entry in scores.items()):
        if found.failed:
            failed[metric] = max(found.failed, failed.get(metric, 0))
    text = "; ".join(f"{', '.join(metrics)} by {extractor}" for extractor, metrics in by.items())
    lost = ", ".join(f"{METRICS[metric].title} in up to {count} sets of a row" for metric, count in failed.items())
    return (f"{text}. " if text else "") + (f"The extractor found nothing for {lost}." if lost else "")


def _score(it: Estimate) -> str:
    if not math.isfinite(it.value):
        return "unknown"
    half = it.high - it.value
    digits = _digits(half if math.isfinite(half) else it.value)
    return f"{it.value:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def _difference(it: Estimate) -> str:
    if not math.isfinite(it.low):
        return "unknown"
    digits = _digits((it.high - it.low) / 2)
    return f"{it.value:+.{digits}f} [{it.low:+.{digits}f}, {it.high:+.{digits}f}]"


def _digits(spread: float) -> int:
    """Decimals that show two digits of a spread."""
    return max(0, min(6, 1 - math.floor(math.log10(abs(spread))))) if spread else 3


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
