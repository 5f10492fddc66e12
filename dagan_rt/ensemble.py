"""Several portraits that answer to the same driving frames."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from dagan_rt.frames import Pending
from dagan_rt.reenactor import Reenactor


class Ensemble:
    """Drives every reenactor with each frame: what `pipeline.run` takes in place of one `Reenactor`.

    `submit` gives uint8 [1, N, size, size, 3]: the answers of all of them in their order.
    """

    def __init__(self, reenactors: Sequence[Reenactor]) -> None:
        """reenactors: at least one, of one bundle, each with its source set; they stay the caller's."""
        self._all = list(reenactors)
        self.frames = SimpleNamespace(ahead=min(one.frames.ahead for one in self._all))

    def submit(self, frame: np.ndarray) -> Pending:
        """As `Reenactor.submit`, of all of them."""
        return _Together([one.submit(frame) for one in self._all])


class _Together:
    def __init__(self, pending: Sequence[Pending]) -> None:
        self._pending = pending

    def done(self) -> bool:
        return all(one.done() for one in self._pending)

    def result(self) -> np.ndarray:
        return np.stack([one.result()[0] for one in self._pending])[None]
