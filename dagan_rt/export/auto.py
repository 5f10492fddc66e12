"""Which precision each graph gets when the user leaves it open: the fastest that the pictures allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dagan_rt.errors import InputError

EXACT = "fp32"
WORTH = 0.05  # the share of a graph's fp32 time that a precision must save: less is noise, and costs digits


@dataclass(frozen=True)
class Choice:
    """A precision for each graph, and one sentence a graph that says why."""

    precisions: dict[str, str]
    reasons: list[str]


def choose(
    graphs: Sequence[str],
    seconds: Mapping[str, Mapping[str, float]],
    psnr: Callable[[Mapping[str, str]], float],
    budget_db: float,
) -> Choice:
    """Lower one graph after another, the largest saving first, as long as the end result stays inside the budget.

    seconds: by graph and precision, "fp32" among them, what one run takes. psnr: end to end in dB, for a precision of
    every graph. A precision that saves less than `WORTH` is never tried, so at most one measurement is made for
    each entry of `seconds`. Raises InputError if fp32 everywhere misses `budget_db`.
    """
    chosen = dict.fromkeys(graphs, EXACT)
    reached = psnr(chosen)
    if not reached >= budget_db:
        raise InputError(
            f"no precision keeps the budget: fp32 everywhere reaches {reached:.1f} dB, asked for are {budget_db:g} dB; "
            "lower the budget"
        )
    found = dict.fromkeys(graphs, reached)  # graph -> PSNR of the combination that it was accepted in
    refused: dict[str, list[str]] = {graph: [] for graph in graphs}
    savings = [(times[EXACT] - times[it], graph, it) for graph, times in _of(graphs, seconds) for it in times]
    for saving, graph, precision in sorted(savings, reverse=True):
        # One that was accepted came first, so it is the fastest of its graph.
        if saving < WORTH * seconds[graph][EXACT] or chosen[graph] != EXACT:
            continue
        measured = psnr({**chosen, graph: precision})
        if measured >= budget_db:
            chosen[graph], found[graph] = precision, measured
        else:
            refused[graph].append(f"{precision} would leave {measured:.1f} dB of the {budget_db:g} asked for")
    return Choice(
        chosen,
        [_reason(graph, times, chosen[graph], found[graph], refused[graph]) for graph, times in _of(graphs, seconds)],
    )


def _of(graphs: Sequence[str], seconds: Mapping[str, Mapping[str, float]]) -> list[tuple[str, Mapping[str, float]]]:
    return [(graph, seconds[graph]) for graph in graphs]


def _reason(graph: str, times: Mapping[str, float], chosen: str, psnr: float, refused: Sequence[str]) -> str:
    measured = ", ".join(f"{precision} {1000 * time:.1f} ms" for precision, time in times.items())
    if chosen != EXACT:
        why = f"{psnr:.1f} dB end to end with it"
    elif refused:
        why = "nothing faster keeps the budget"
    else:
        why = "nothing is clearly faster"
    return f"{graph}: {chosen} ({measured}); {'; '.join([why, *refused])}"
