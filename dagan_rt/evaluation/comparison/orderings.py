"""What the supplementary's Table 1 claims about its four methods, and whether it is seen here.

The table's second and third row are run together in the copy of the paper that this was written from, so an ordering
is listed only where it follows under every way of reading them, or where the text (B.3) says it in words:

- PRMSE 5.39 (baseline), {3.90, 5.18} (fomm and dagan_sa, in either order), 2.33 (dagan);
- AUCON 0.657 (baseline), {0.667, 0.832} (fomm and dagan_sa), 0.873 (dagan);
- AED 0.189 (baseline), {0.140, 0.242} (fomm and dagan_sa), 0.117 (dagan);
- AKD 1.537 (baseline), 1.279 (dagan); the others are not legible;
- "better than FOMM in CSIM, worse in PRMSE, and comparable on AUCON" of the baseline: the last is no ordering;
- L1 and CSIM of dagan are not legible.
"""

from __future__ import annotations

from dataclasses import dataclass

from dagan_rt.evaluation.comparison.statistics import Estimate
from dagan_rt.evaluation.scores import METRICS

VARIANTS = ("baseline", "fomm", "dagan_sa", "dagan")
"""The table's rows, in its order."""

PAPER = {
    "baseline": {"csim": "0.688", "prmse": "5.39", "aucon": "0.657", "l1": "0.040", "akd": "1.537", "aed": "0.189"},
    "fomm": {"prmse": "3.90 or 5.18", "aucon": "0.667 or 0.832", "aed": "0.140 or 0.242"},
    "dagan_sa": {"prmse": "3.90 or 5.18", "aucon": "0.667 or 0.832", "aed": "0.140 or 0.242"},
    "dagan": {"prmse": "2.33", "aucon": "0.873", "akd": "1.279", "aed": "0.117"},
}
"""Its entries as far as they are legible: of real faces at 256 × 256, so no numbers to compare with."""

HOLDS, REVERSED, UNDECIDED = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Ordering:
    """One variant is better than another by one metric."""

    metric: str
    better: str
    worse: str
    source: str = "Table 1"

    def __str__(self) -> str:
        sign = "<" if METRICS[self.metric].lower_is_better else ">"
        return f"{METRICS[self.metric].title}: {self.better} {sign} {self.worse}"


ORDERINGS = (
    Ordering("csim", "baseline", "fomm", "B.3 and Table 1"),
    Ordering("prmse", "fomm", "baseline", "B.3 and Table 1"),
    Ordering("prmse", "dagan_sa", "baseline"),
    *(Ordering("prmse", "dagan", other) for other in VARIANTS[:3]),
    Ordering("aucon", "dagan_sa", "baseline"),
    *(Ordering("aucon", "dagan", other) for other in VARIANTS[:3]),
    Ordering("akd", "dagan", "baseline"),
    *(Ordering("aed", "dagan", other) for other in VARIANTS[:3]),
)


def verdict(difference: Estimate, lower_is_better: bool) -> str:
    """Of an ordering, from the paired difference better - worse: "holds" where the 95 % interval lies on the claimed
    side of zero, "does not hold" where it lies on the other, "undecided" where it holds zero or too little is known.
    """
    if len(difference.seeds) < 2 or not difference.low <= difference.high:
        return UNDECIDED
    low, high = difference.low, difference.high
    if lower_is_better:
        low, high = -high, -low
    return HOLDS if low > 0 else REVERSED if high < 0 else UNDECIDED
