"""Batches through the ring, on a driver in imitation that does what is enqueued as late, or as shuffled, as it may."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from imitated_driver import Driver, memory

from dagan_rt.cuda.driver import CudaError
from dagan_rt.cuda.ring import Ring
from dagan_rt.errors import DeviceLost, InputError
from dagan_rt.kernels import _devices

SIZE = 4


def frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)


def expected(slots: list[int], frames: list[np.ndarray]) -> np.ndarray:
    """What the work of these tests paints."""
    return np.stack([255 - frame + np.uint8(slot) for slot, frame in zip(slots, frames, strict=True)])


def worker(driver: Driver, ring: Ring, seen: list[Any] | None = None) -> Callable[[int, int], None]:
    """Work for a ring: an image is its frame inverted, plus its slot."""

    def enqueue(batch: int, stream: int) -> None:
        def work() -> None:
            slots = memory(ring.slots.pointer, (batch,), np.int32)
            frames = memory(ring.frames.pointer, (batch, SIZE, SIZE, 3), np.uint8)
            images = memory(ring.images.pointer, (batch, SIZE, SIZE, 3), np.uint8)
            images[...] = 255 - frames + slots.astype(np.uint8)[:, None, None, None]
            if seen is not None:
                seen.append((batch, slots.tolist()))

        if status := driver.enqueue(stream, work):
            raise CudaError("enqueueing", status)

    return enqueue


@pytest.fixture
def ring(driver: Driver) -> Ring:
    ring = Ring(_devices.device(0), SIZE, (1, 2, 4), ahead=3)
    ring.capture(worker(driver, ring))
    return ring


@pytest.mark.parametrize("seed", [None, *range(8)])
def test_batches_of_every_size_come_out_right_in_any_order_of_work(driver: Driver, ring: Ring, seed: int | None):
    if seed is not None:
        driver.library.test_seed(seed)
    rng = np.random.default_rng(seed or 0)
    asked = []
    for number in range(12):
        count = int(rng.integers(1, 5))
        slots = rng.integers(0, 9, count).tolist()
        frames = [frame(100 * number + i) for i in range(count)]
        asked.append((ring.submit(slots, frames), expected(slots, frames)))
        if number % 5 == 4:  # now and then all are asked for, the last first
            for pending, wanted in reversed(asked):
                np.testing.assert_array_equal(pending.result(), wanted)
    for pending, wanted in asked:
        np.testing.assert_array_equal(pending.result(), wanted)
        assert pending.done()


def test_one_graph_a_size_is_captured_once_the_work_is_warm(driver: Driver):
    ring, called = Ring(_devices.device(0), SIZE, (1, 2, 4)), []
    work = worker(driver, ring)
    driver.journal()
    ring.capture(lambda batch, stream: (called.append((batch, stream)), work(batch, stream))[1])
    assert called == [(batch, ring.stream) for batch in (4, 4, 2, 2, 1, 1)]
    assert driver.journal("capture", "captured", "instantiate", "synchronize") == [
        f"synchronize {ring.stream:#x}", f"capture {ring.stream:#x} mode 1", f"captured 1 on {ring.stream:#x}",
        "instantiate 1",
    ] * 3 + [f"synchronize {ring.stream:#x}"]  # fmt: skip


def test_a_batch_is_padded_to_the_next_size_with_its_first_slot(driver: Driver):
    ring, seen = Ring(_devices.device(0), SIZE, (1, 2, 4)), []
    ring.capture(worker(driver, ring, seen))
    seen.clear()
    driver.journal()
    for slots in ([7], [7, 3], [7, 3, 5], [1, 2, 3, 4]):
        assert len(ring.submit(slots, [frame(0)] * len(slots)).result()) == len(slots)
    assert seen == [(1, [7]), (2, [7, 3]), (4, [7, 3, 5, 7]), (4, [1, 2, 3, 4])]
    image = 3 * SIZE**2
    assert [line.split()[1] for line in driver.journal("upload")] == [str(256 + n * image) for n in (1, 2, 3, 4)]
    assert [line.split()[1] for line in driver.journal("download")] == []  # taken by the line before
    ring.submit([1, 1, 1], [frame(0)] * 3).result()
    assert [line.split()[1] for line in driver.journal("download")] == [str(3 * image)]  # padding stays there


def test_nothing_waits_until_the_laps_are_used_up(driver: Driver, ring: Ring):
    driver.journal()
    pending = [ring.submit([i], [frame(i)]) for i in range(3)]
    assert not any(it.done() for it in pending)
    assert driver.journal("synchronize") == []
    frames = [frame(i) for i in range(4)]
    last = ring.submit([3], [frames[3]])
    assert [it.done() for it in (*pending, last)] == [True, False, False, False]
    for slot, it in enumerate((*pending, last)):
        np.testing.assert_array_equal(it.result(), expected([slot], [frames[slot]]))


def test_steady_batches_allocate_nothing(driver: Driver, ring: Ring):
    before = driver.library.test_used(), driver.library.test_blocks(), driver.library.test_objects()
    driver.journal()
    for i in range(20):
        ring.submit([i], [frame(i)])
    ring.synchronize()
    assert (driver.library.test_used(), driver.library.test_blocks(), driver.library.test_objects()) == before
    assert driver.journal("allocate", "pin", "capture", "instantiate") == []


def test_results_are_the_callers_own(ring: Ring):
    first = ring.submit([0], [frame(1)]).result()
    kept = first.copy()
    for i in range(6):
        ring.submit([0], [frame(10 + i)])
    ring.synchronize()
    np.testing.assert_array_equal(first, kept)


def test_frames_may_change_once_submitted(ring: Ring):
    mine = frame(5)
    pending, wanted = ring.submit([2], [mine]), expected([2], [mine.copy()])
    mine[...] = 0
    np.testing.assert_array_equal(pending.result(), wanted)


def test_the_time_of_the_parts(driver: Driver, ring: Ring):
    waiting = ring.submit([1], [frame(0)])
    times = ring.timed([0, 1], [frame(1), frame(2)])
    assert waiting.done()
    # The imitation takes a millisecond for all it does, its second event included: copy in, graph, copy out.
    assert times.upload == pytest.approx(0.002) and times.download == pytest.approx(0.002)
    assert times.device == pytest.approx(0.004)
    assert times.wall > 0


@pytest.mark.parametrize(("slots", "count"), [([], 0), ([0] * 5, 5), ([0], 2), ([0, 1], 1)])
def test_wrong_numbers_of_frames_are_refused(ring: Ring, slots: list[int], count: int):
    with pytest.raises(InputError, match=f"a batch must be 1 to 4 frames with a slot each, got {count} and"):
        ring.submit(slots, [frame(0)] * count)


def test_results_are_fetched_by_other_threads(ring: Ring):
    waiting: list[Any] = []
    wrong: list[int] = []

    def fetch() -> None:
        while waiting:
            number, pending = waiting.pop()
            if not np.array_equal(pending.result(), expected([number % 7], [frame(number)])):
                wrong.append(number)

    for number in range(60):
        waiting.append((number, ring.submit([number % 7], [frame(number)])))
        if number % 10 == 9:
            threads = [threading.Thread(target=fetch) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert wrong == []


def test_too_little_memory_is_told_in_one_sentence(driver: Driver):
    driver.library.test_memory(1000)
    with pytest.raises(InputError) as caught:
        Ring(_devices.device(0), SIZE, (1, 4))
    assert str(caught.value) == (
        "the staging of 3 batches of up to 4 frames needs 0.0 MB of GPU memory and GPU 0 has 0.0 MB of its 0.0 MB "
        "free: take fewer slots or smaller batches, or end what else uses the GPU"
    )
    assert driver.library.test_blocks() == driver.library.test_objects() == 0


@pytest.mark.parametrize("status", [46, 214, 700, 719])
def test_a_lost_gpu_is_told_by_every_call(driver: Driver, ring: Ring, status: int):
    done = ring.submit([0], [frame(0)])
    wanted = done.result()
    pending = [ring.submit([i], [frame(i)]) for i in range(3)]
    driver.library.test_break(status)
    for it in pending:
        assert it.done()
        with pytest.raises(DeviceLost, match=rf"failed with CUDA_ERROR {status}: .*: the GPU cannot be used"):
            it.result()
    for act in (lambda: ring.submit([0], [frame(0)]), lambda: ring.timed([0], [frame(0)]), ring.synchronize):
        with pytest.raises(DeviceLost):
            act()
    np.testing.assert_array_equal(done.result(), wanted)
    ring.close()
    ring.close()


def test_work_that_breaks_the_gpu_is_told_by_its_result(driver: Driver):
    ring = Ring(_devices.device(0), SIZE, (1,))
    armed: list[int] = []
    ring.capture(
        lambda batch, stream: driver.enqueue(stream, lambda: armed and driver.library.test_break(700)) and None
    )
    armed.append(1)
    pending = ring.submit([0], [frame(0)])
    with pytest.raises(DeviceLost):
        pending.result()


def test_all_is_given_back(driver: Driver, ring: Ring):
    pending = ring.submit([4], [frame(4)])
    ring.close()
    assert driver.library.test_used() == driver.library.test_blocks() == driver.library.test_objects() == 0
    np.testing.assert_array_equal(pending.result(), expected([4], [frame(4)]))
    with pytest.raises(InputError, match="were closed"):
        ring.submit([0], [frame(0)])
    ring.close()


def test_work_that_cannot_be_captured(driver: Driver):
    ring = Ring(_devices.device(0), SIZE, (1,))

    def enqueue(batch: int, stream: int) -> None:
        if driver.journal("capture"):
            raise ValueError("not now")

    driver.journal()
    with pytest.raises(ValueError, match="not now"):
        ring.capture(enqueue)
    ring.capture(worker(driver, ring))  # the stream is as it was
    np.testing.assert_array_equal(ring.submit([0], [frame(0)]).result(), expected([0], [frame(0)]))
    with pytest.raises(CudaError):  # waiting breaks a capture
        ring.capture(lambda batch, stream: ring.synchronize() if driver.journal("capture") else None)
