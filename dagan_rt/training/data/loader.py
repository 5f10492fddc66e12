"""Batches by step number, made ahead of time."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.training.data.protocol import BadClip, Clips
from dagan_rt.training.data.sampling import Augmentation, sample, sample_triple


@dataclass(frozen=True)
class Failures:
    """Of one clip: why it could not be read the first time, and how often it could not."""

    reason: str
    count: int


class Loader:
    """Batches by step number, made ahead of time by a few threads.

    `loader.batch(step)` is a pure function of (seed, step) and of the files. An epoch visits every clip `repeats`
    times in an order drawn from (seed, epoch). Threads suffice: decoding, resizing and arithmetic, most of a sample's
    time, release the interpreter's lock, and processes would have to send each other every batch.

    batch: items of the whole batch. part: (rank, world), the share of it this process makes: batch / world items, so
    that the ranks see together, in their order, what one process would. neighbours: above 0, batches are of
    `sample_triple` (three frames of a clip) instead of `sample` (two).

    A clip that cannot be read is warned of once, counted in `bad` (name → `Failures`) and replaced by another one that
    the same random stream draws. It is tried again whenever its turn comes, so a batch never depends on what failed
    before: a resumed run is exact as long as the files read as they did, and a file that has turned bad since (or
    has been repaired) changes the items that draw from it and no others.

    Raises InputError for a batch that `world` does not divide, or a part that does not exist.
    """

    def __init__(
        self,
        clips: Clips,
        batch: int,
        seed: int,
        augmentation: Augmentation,
        repeats: int = 1,
        threads: int = 1,
        *,
        neighbours: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        rank, world = part
        if not 0 <= rank < world:
            raise InputError(f"part must be (rank, world) with rank from 0 to world - 1, got {part}")
        if batch % world:
            raise InputError(f"batch must be a multiple of the number of processes, got {batch} for {world}")
        if neighbours < 0:
            raise InputError(f"neighbours must not be negative, got {neighbours}")
        self.clips, self.size, self.seed = clips, batch, seed
        self.augmentation, self.repeats, self.threads = augmentation, repeats, threads
        self.neighbours, self.part = neighbours, part
        self.bad: dict[str, Failures] = {}
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def items(self) -> int:
        """Items of an epoch, of all processes."""
        return len(self.clips) * self.repeats

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
                self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.items)
            return self._orders[epoch]

    def numbers(self, step: int) -> list[tuple[int, int]]:
        """(epoch, index) of each item that this process makes of batch number `step`."""
        rank, world = self.part
        share = self.size // world
        first = step * self.size + rank * share
        places = [divmod(first + offset, self.items) for offset in range(share)]
        return [(epoch, int(self._order(epoch)[place])) for epoch, place in places]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's part of the batch of a step: arrays with a leading batch axis, see `sample`."""
        items = [self._sample(*number) for number in self.numbers(step)]
        return {name: np.stack([item[name] for item in items]) for name in items[0]}

    def _sample(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        if self.neighbours:
            return sample_triple(
                self.clips, self.augmentation, self.seed, epoch, index, self.neighbours, self._remember
            )  # fmt: skip
        return sample(self.clips, self.augmentation, self.seed, epoch, index, self._remember)

    def _remember(self, name: str, error: BadClip) -> None:
        with self._lock:
            known = self.bad.get(name)
            self.bad[name] = Failures(known.reason, known.count + 1) if known else Failures(str(error), 1)
        if not known:
            warnings.warn(f"clip skipped: {name}: {error}", stacklevel=2)

    def from_step(self, step: int) -> Generator[dict[str, np.ndarray], None, None]:
        """Batches from `step` on, without end; close the iterator to stop the threads."""
        ahead: list[Future[dict[str, np.ndarray]]] = []
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="loader")
        try:
            while True:
                while len(ahead) <= self.threads:
                    ahead.append(pool.submit(self.batch, step + len(ahead)))
                yield ahead.pop(0).result()
                step += 1
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
