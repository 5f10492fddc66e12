"""A clip through the model with its parts side by side: one thread reads, one drives the model, one writes."""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np

    from dagan_rt.frames import Pending
    from dagan_rt.reenactor import Reenactor

ROOM = 3  # items that wait between two parts: enough to even out a slow key frame, few enough to hold
Item = TypeVar("Item")


class Summary(NamedTuple):
    """How a clip went, in seconds of the wall clock."""

    wall: float  # from the start until the last frame was written
    model: array[float]  # of each frame: from when the model could begin with it until its result was there
    reading: float  # in which the reading thread worked, all frames together
    writing: float  # in which the writing thread worked

    def busy(self) -> dict[str, float]:
        """The share of the time in which each part had work, 0 to 1; the largest sets the pace."""
        parts = {"reading": self.reading, "model": sum(self.model), "writing": self.writing}
        return {name: seconds / self.wall for name, seconds in parts.items()}


def run(
    frames: Iterable[Item],
    reenactor: Reenactor,
    write: Callable[[Item, np.ndarray], Any],
    stop: threading.Event | None = None,
    submit: Callable[[Item], Pending] | None = None,
) -> Summary:
    """Drive `reenactor` with every frame and write every result, in order, all three parts at the same time.

    frames: `Frame`s whose images `reenactor` takes; read in a second thread.
    reenactor: with its source set. The calling thread submits to it, up to `frames.ahead` before it takes the first
        result; a CPU engine computes within `submit`, so there the calling thread is the worker.
    write: called in a third thread with a frame and its result, uint8 [H, W, 3].
    stop: once set, no more frames are submitted.
    submit: what submits an item instead of `reenactor.submit(frame.image)`; items may then be anything, and results the
        first of whatever comes of them.

    At most `ROOM` frames wait in front of the model, and `ROOM` results behind it besides those under way.
    What goes wrong in any part ends all of them and is raised here, once, as it came; frames before one that cannot be
    read or driven are still written, as they are after `stop`. KeyboardInterrupt drops them. No thread is left.
    """
    start = time.perf_counter()
    submit = submit or (lambda frame: reenactor.submit(frame.image))  # type: ignore[attr-defined]
    decoded: Channel[Item] = Channel()
    driven: Channel[tuple[Item, np.ndarray]] = Channel(ROOM + reenactor.frames.ahead)
    failure = None
    with ThreadPoolExecutor(2, "pipeline") as threads:
        try:
            reading = threads.submit(_read, frames, decoded)
            writing = threads.submit(_write, driven, write)
            try:
                seconds = _drive(submit, reenactor.frames.ahead, decoded, driven, stop or threading.Event())
            except Exception as error:  # raised once the results before it are written
                failure = error
            decoded.leave()
            driven.end()
            wait([reading, writing])
        except BaseException:  # KeyboardInterrupt, above all
            decoded.leave()
            driven.leave()
            raise
    wall = time.perf_counter() - start
    if failure is not None:
        raise failure
    return Summary(wall, seconds, writing=writing.result(), reading=reading.result())


@contextmanager
def read_ahead(items: Iterable[Item]) -> Iterator[Iterator[Item]]:
    """Iterate over `items` while another thread makes the next ones, at most `ROOM` ahead.

    What goes wrong there is raised after the last good item. Leaving the block ends the thread.
    """
    channel: Channel[Item] = Channel()
    with ThreadPoolExecutor(1, "read-ahead") as threads:
        try:
            yield _all_of(channel, threads.submit(_read, items, channel))
        finally:
            channel.leave()


def _all_of(channel: Channel[Item], reading: Future[float]) -> Iterator[Item]:
    yield from channel
    reading.result()


def _read(items: Iterable[Item], channel: Channel[Item]) -> float:
    """Make the items as there is room for them; the seconds that took."""
    seconds, source = 0.0, iter(items)
    try:
        while channel.wait_for_room():
            start = time.perf_counter()
            try:
                item = next(source)
            except StopIteration:
                break
            seconds += time.perf_counter() - start
            channel.put(item)
        return seconds
    finally:
        channel.end()


def _drive(
    submit: Callable[[Item], Pending],
    ahead: int,
    decoded: Channel[Item],
    driven: Channel[tuple[Item, np.ndarray]],
    stop: threading.Event,
) -> array[float]:
    """Submit the frames and hand on their results; the seconds that each took."""
    seconds, finished = array("d"), 0.0
    under_way: deque[tuple[Item, Pending, float]] = deque()

    def finish_oldest() -> None:
        nonlocal finished
        frame, pending, submitted = under_way.popleft()
        result = pending.result()[0]
        begun, finished = max(submitted, finished), time.perf_counter()
        seconds.append(finished - begun)
        driven.put((frame, result))

    failure = None
    for frame in decoded:
        if not driven.wait_for_room() or stop.is_set():
            break
        try:
            start = time.perf_counter()
            under_way.append((frame, submit(frame), start))
        except Exception as error:  # what is under way may still be good
            failure = error
            break
        # Nothing stays under way while this thread waits for another: no result is late, and the times are true.
        while under_way and (len(under_way) >= ahead or not decoded or len(driven) + len(under_way) >= driven.room):
            finish_oldest()
    while under_way:
        finish_oldest()
    if failure is not None:
        raise failure
    return seconds


def _write(channel: Channel[tuple[Item, np.ndarray]], write: Callable[[Item, np.ndarray], Any]) -> float:
    """Write the results as they come; the seconds that took."""
    seconds = 0.0
    try:
        for frame, result in channel:
            start = time.perf_counter()
            write(frame, result)
            seconds += time.perf_counter() - start
        return seconds
    finally:
        channel.leave()


class Channel(Generic[Item]):
    """A bounded queue from one thread to another that either of them can end.

    The giver waits for room before it makes an item, so there are never more than `room`.
    """

    def __init__(self, room: int = ROOM) -> None:
        self.room = room
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._ended = self._left = False

    def __len__(self) -> int:
        return len(self._items)

    def wait_for_room(self) -> bool:
        """Wait until one more item fits; False if nobody takes any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._left or len(self._items) < self.room)
            return not self._left

    def put(self, item: Item) -> None:
        """Give an item, without waiting."""
        with self._changed:
            if not self._left:
                self._items.append(item)
                self._changed.notify_all()

    def end(self) -> None:
        """For the giver: nothing follows what is there."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def leave(self) -> None:
        """For the taker: nothing more is wanted, nor what is there."""
        with self._changed:
            self._ended = self._left = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._ended)
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
            del item  # not kept alive while the next one is waited for
