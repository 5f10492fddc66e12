"""Streams, events, graphs and memory on the imitated driver."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from imitated_driver import Driver, memory

from dagan_rt import kernels
from dagan_rt.cuda.driver import CudaError
from dagan_rt.cuda.streams import Event, Graph, Memory, Pinned, Stream
from dagan_rt.errors import InputError
from dagan_rt.kernels import _build, _devices
from dagan_rt.kernels._arrays import new, view


@pytest.fixture
def here(driver: Driver) -> Any:
    """The first GPU, current."""
    device = _devices.device(0)
    with device.current():
        yield device


def test_an_event_orders_two_streams(driver: Driver, here: Any):
    first, second, event, done = Stream(), Stream(), Event(), []
    driver.enqueue(first.handle, lambda: done.append(1))
    event.record(first)
    second.wait(event)
    driver.enqueue(second.handle, lambda: done.append(2))
    assert not event.done()
    second.synchronize()
    assert done == [1, 2] and event.done()


def test_the_time_between_events(driver: Driver, here: Any):
    stream, start, end = Stream(), Event(timing=True), Event(timing=True)
    start.record(stream)
    for _ in range(3):
        driver.enqueue(stream.handle, lambda: None)
    end.record(stream)
    end.synchronize()
    assert end.since(start) == pytest.approx(0.004)
    with pytest.raises(CudaError):
        end.since(Event())


def test_a_graph_does_its_work_at_every_launch_and_not_before(driver: Driver, here: Any):
    stream, done = Stream(), []
    graph = Graph(stream, lambda: driver.enqueue(stream.handle, lambda: done.append(1)) and None)
    stream.synchronize()
    assert done == []
    for _ in range(3):
        graph.launch(stream)
    stream.synchronize()
    assert done == [1, 1, 1]


def test_what_must_not_happen_in_a_capture_does_not_pass(driver: Driver, here: Any):
    stream = Stream()
    for wrong in (lambda: Memory(here, 10, "x"), stream.synchronize, lambda: Pinned(10)):
        with pytest.raises((CudaError, InputError), match="900"):
            Graph(stream, wrong)
    here.workspace(stream.handle, 10)  # kernels may: it is relaxed
    Graph(stream, lambda: here.workspace(stream.handle, 10 << 20) and None)


def test_memory_is_given_back_with_its_last_array(driver: Driver, here: Any):
    array = Memory(here, 1000, "something").array((10, 5), "float32", 256).rows(2, 3)
    assert (array.shape, array.strides) == ((3, 5), (5, 1)) and driver.library.test_used() == 1000
    del array
    gc.collect()
    assert driver.library.test_used() == 0
    with pytest.raises(ValueError, match=r"float32 \(10, 5\) at 812 does not fit into 1000 bytes"):
        Memory(here, 1000, "something").array((10, 5), "float32", 812)


def test_memory_of_a_stream_is_given_back_in_order(driver: Driver, here: Any):
    stream = Stream()
    found = Memory(here, 16, "something", stream.handle)
    values = np.arange(4, dtype=np.float32)
    stream.upload(found.pointer, values)
    back, pointer = np.zeros(4, np.float32), found.pointer
    found.close()
    assert driver.library.test_used() == 16  # there is work to do with it
    stream.synchronize()
    assert driver.library.test_used() == 0
    with pytest.raises(CudaError):
        stream.download(back, pointer)


def test_copies(driver: Driver, here: Any):
    stream, pinned, found = Stream(), Pinned(12), Memory(here, 24, "something")
    pinned.array[:] = range(12)
    stream.upload(found.pointer, pinned.array)
    stream.copy(found.pointer + 12, found.pointer, 12)
    stream.fill(found.pointer, 7, 2)
    back = np.zeros(24, np.uint8)
    stream.download(back, found.pointer)
    stream.synchronize()
    assert back.tolist() == [7, 7, *range(2, 12), *range(12)]
    pinned.close()


def test_arrays_are_seen_by_kernels_and_by_other_libraries(driver: Driver, here: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_build, "fat_binary", lambda unit: b"image")
    array = Memory(here, 1000, "something").array((2, 3, 4, 5), "float16")
    assert view(array, "x") is array
    seen = array.__cuda_array_interface__
    assert (seen["shape"], seen["typestr"], seen["data"]) == ((2, 3, 4, 5), "<f2", (array.pointer, False))
    assert seen["strides"] == (120, 40, 10, 2)
    assert view(type("Other", (), {"__cuda_array_interface__": seen}), "x").strides == array.strides
    assert not hasattr(Memory(here, 1000, "something").array((5,), "bfloat16"), "__cuda_array_interface__")
    made = new(array, (1, 2), "float32")
    assert (made.shape, made.dtype, made.device) == ((1, 2), "float32", here)
    pixels = Memory(here, 3000, "something").array((1, 8, 8, 3), "uint8")
    out = kernels.image_to_planes(pixels, stream=5)
    assert out.shape == (1, 3, 8, 8) and memory(out.pointer, out.shape).shape == out.shape
