"""Several evaluations side by side, with paired differences where they saw the same image sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.evaluation.scores import (
    BY_MODE,
    METRICS,
    Evaluation,
    Score,
    aggregate,
    cluster_of,
    interval,
    resampled,
    values_of,
)
from dagan_rt.tables import printable

DIGITS = {"l1": 4, "psnr": 2, "prmse": 2}  # after the point; others 3
_PLACE = ("source_clip", "source_frame", "driving_clip", "driving_frame", "initial_frame")


@dataclass(frozen=True)
class Difference:
    """`other` minus `one` over the image sets that have a value in both, with its 95 % interval (paired, by clips)."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def distinct(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_difference(metric: str, one: Evaluation, other: Evaluation, seed: int = 0) -> Difference | None:
    """How a metric differs between two evaluations of the same image sets; None where the sets are not the same.

    Both are resampled with the same clips, so that what makes a clip hard for both cancels.
    """
    rows, others = ({tuple(row[key] for key in _PLACE): row for row in it.rows} for it in (one, other))
    if one.mode != other.mode or rows.keys() != others.keys() or not all(metric in it.scores for it in (one, other)):
        return None
    places = list(rows)
    first, second = values_of(metric, [rows[it] for it in places]), values_of(metric, [others[it] for it in places])
    both = np.isfinite(first) & np.isfinite(second)
    columns = [np.where(both, values, math.nan) for values in (first, second)]
    means = [aggregate(metric, values[both]) for values in (first, second)]
    clusters = [rows[place][cluster_of(one.mode)] for place in places]
    before, after = resampled(metric, columns, clusters, seed)
    return Difference(means[1] - means[0], *interval(after - before), int(both.sum()))


def comparison(named: Sequence[tuple[str, Evaluation]], seed: int = 0) -> str:
    """Markdown: a table a mode with one column an evaluation, differences of all others from the first."""
    if len(named) < 2:
        raise InputError(f"a comparison needs at least two evaluations, got {len(named)}")
    modes = [mode for mode in BY_MODE if sum(it.mode == mode for _, it in named) >= 2]
    if not modes:
        raise InputError("none of these evaluations can be compared: no two are of one mode")
    return "\n\n".join(_of_mode([(name, it) for name, it in named if it.mode == mode], seed) for mode in modes)


def _of_mode(named: Sequence[tuple[str, Evaluation]], seed: int) -> str:
    first_name, first = named[0]
    metrics = [name for name in BY_MODE[first.mode] if all(name in it.scores for _, it in named)]
    lines = [table_line(["metric", *(name for name, _ in named)]), table_line(["---"] * (len(named) + 1))]
    lines += [table_line([heading(it), *(_cell(it, other.scores[it]) for _, other in named)]) for it in metrics]
    for name, other in named[1:]:
        lines += ["", f"{printable(name)} minus {printable(first_name)}:", ""]
        differences = {metric: paired_difference(metric, first, other, seed) for metric in metrics}
        if any(it is None for it in differences.values()):
            lines.append("the image sets are not the same: compare the intervals above")
            continue
        lines += [table_line(["metric", "difference", "sets", "reads"]), table_line(["---"] * 4)]
        lines += [_difference_line(it, found) for it, found in differences.items() if found is not None]
    unlike = _unlike(named, metrics)
    return "\n".join([f"{first.mode}-reenactment" if first.mode == "self" else "cross-identity", "", *lines, *unlike])


def _cell(metric: str, score: Score) -> str:
    return number(metric, score) + (f", {score.failed} failed" if score.failed else "")


def _difference_line(metric: str, found: Difference) -> str:
    better = (found.mean < 0) == METRICS[metric].lower_is_better
    verdict = ("better" if better else "worse") if found.distinct else "not distinguishable"
    text = f"{found.mean:+.4g} [{found.low:+.4g}, {found.high:+.4g}]"
    return table_line([METRICS[metric].title, text, str(found.count), verdict])


def _unlike(named: Sequence[tuple[str, Evaluation]], metrics: Sequence[str]) -> list[str]:
    """A warning for each metric whose extractors are not the same one."""
    lines = []
    for metric in metrics:
        names = dict.fromkeys(_measured_with(it, metric) for _, it in named)
        if len(names) > 1:
            lines.append(f"{METRICS[metric].title} was measured with different extractors and cannot be compared: "
                         + printable(", ".join(name for name, _ in names)))  # fmt: skip
    return ["", *lines] if lines else []


def _measured_with(it: Evaluation, metric: str) -> tuple[str, str]:
    """Name and hash of what a metric was measured with."""
    known: Any = it.settings.get("extractors")
    entry = known.get(METRICS[metric].kind) if isinstance(known, dict) else None
    digest = entry.get("model sha256") if isinstance(entry, dict) else ""
    return it.scores[metric].extractor, str(digest)


def heading(metric: str) -> str:
    """A metric's title with its unit and an arrow to what is better."""
    it = METRICS[metric]
    return f"{it.title} {'↓' if it.lower_is_better else '↑'}" + (f" ({it.unit})" if it.unit else "")


def number(metric: str, score: Score) -> str:
    """A score with its interval where it has one."""
    if not math.isfinite(score.mean):
        return "none"
    digits = DIGITS.get(metric, 3)
    bounds = f" [{score.low:.{digits}f}, {score.high:.{digits}f}]" if math.isfinite(score.low) else ""
    return f"{score.mean:.{digits}f}{bounds}"


def table_line(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(printable(cell).replace("|", "/") for cell in cells) + " |"
