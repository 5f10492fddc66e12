"""Streams, events, graphs and memory of a GPU: what whole frames are made of, each a handle of the driver's.

But for `Memory`, which can be let go of anywhere, all of it is used where the GPU is the current one, in
`with device.current():`. Everything raises as `dagan_rt.cuda.driver.check` does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from ctypes import byref, c_float, c_ubyte, c_void_p
from math import prod

import numpy as np

from dagan_rt.cuda.driver import CudaError, check, driver
from dagan_rt.errors import InputError
from dagan_rt.kernels._devices import ITEM_BYTES, Array, CudaDevice, relaxed_capture

_NON_BLOCKING, _NO_TIMING = 1, 2  # CU_STREAM_NON_BLOCKING, CU_EVENT_DISABLE_TIMING
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_…: what other threads do meanwhile is their business
_NOT_READY = 600


class Stream:
    """Work in order, which does not wait for the legacy default stream."""

    def __init__(self, handle: int | None = None) -> None:
        """handle: of somebody else's stream, to use that."""
        stream, self._own = c_void_p(handle), handle is None
        if self._own:
            check(driver().cuStreamCreate(byref(stream), _NON_BLOCKING), "creating a stream")
        self.handle: int = stream.value or 0

    def wait(self, event: Event) -> None:
        """What is enqueued from here on runs after the event was last recorded."""
        check(driver().cuStreamWaitEvent(self.handle, event.handle, 0), "waiting for an event")

    def synchronize(self) -> None:
        """Wait for all of its work; raises what went wrong in it."""
        check(driver().cuStreamSynchronize(self.handle), "waiting for the GPU")

    def upload(self, to: int, array: np.ndarray) -> None:
        """Enqueue a copy of a contiguous array to the GPU; if its memory is pinned, it must stay until then."""
        check(driver().cuMemcpyHtoDAsync_v2(to, array.ctypes.data, array.nbytes, self.handle), "copying to the GPU")

    def download(self, array: np.ndarray, start: int) -> None:
        """Enqueue a copy from the GPU into a contiguous array."""
        check(
            driver().cuMemcpyDtoHAsync_v2(array.ctypes.data, start, array.nbytes, self.handle), "copying from the GPU"
        )

    def copy(self, to: int, start: int, nbytes: int) -> None:
        """Enqueue a copy on the GPU."""
        check(driver().cuMemcpyDtoDAsync_v2(to, start, nbytes, self.handle), "copying on the GPU")

    def fill(self, to: int, byte: int, nbytes: int) -> None:
        """Enqueue the writing of one byte everywhere."""
        check(driver().cuMemsetD8Async(to, byte, nbytes, self.handle), "filling memory")

    def close(self) -> None:
        """Give it back, if it is one's own; its work is still done."""
        if self._own:
            driver().cuStreamDestroy_v2(self.handle)


class Event:
    """A moment in a stream."""

    def __init__(self, timing: bool = False) -> None:
        event = c_void_p()
        check(driver().cuEventCreate(byref(event), 0 if timing else _NO_TIMING), "creating an event")
        self.handle: int = event.value or 0

    def record(self, stream: Stream) -> None:
        """Let it be when all that is in the stream now is done."""
        check(driver().cuEventRecord(self.handle, stream.handle), "recording an event")

    def done(self) -> bool:
        """Whether it has happened, without waiting."""
        status = driver().cuEventQuery(self.handle)
        if status not in (0, _NOT_READY):
            check(status, "asking for an event")
        return status == 0

    def synchronize(self) -> None:
        """Wait for it."""
        check(driver().cuEventSynchronize(self.handle), "waiting for the GPU")

    def since(self, earlier: Event) -> float:
        """Seconds between two events with timing that have happened."""
        milliseconds = c_float()
        check(driver().cuEventElapsedTime(byref(milliseconds), earlier.handle, self.handle), "taking the time")
        return milliseconds.value / 1000

    def close(self) -> None:
        """Give it back."""
        driver().cuEventDestroy_v2(self.handle)


class Graph:
    """Work that was enqueued once and can be launched at once, with the addresses it had."""

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        """Capture what `enqueue` puts on the stream; it may neither wait for the GPU nor allocate."""
        graph, executable = c_void_p(), c_void_p()
        check(driver().cuStreamBeginCapture_v2(stream.handle, _THREAD_LOCAL), "beginning a CUDA graph")
        try:
            enqueue()
        except BaseException:
            if driver().cuStreamEndCapture(stream.handle, byref(graph)) == 0 and graph.value:
                driver().cuGraphDestroy(graph)
            raise
        check(driver().cuStreamEndCapture(stream.handle, byref(graph)), "capturing a CUDA graph")
        try:
            check(driver().cuGraphInstantiateWithFlags(byref(executable), graph, 0), "making a CUDA graph ready")
        finally:
            driver().cuGraphDestroy(graph)
        self.handle: int = executable.value or 0
        check(driver().cuGraphUpload(self.handle, stream.handle), "making a CUDA graph ready")

    def launch(self, stream: Stream) -> None:
        """Enqueue all of it."""
        check(driver().cuGraphLaunch(self.handle, stream.handle), "launching a CUDA graph")

    def close(self) -> None:
        """Give it back; it must not be running."""
        driver().cuGraphExecDestroy(self.handle)


class Memory:
    """Memory of a GPU, uninitialised. Freed by `close`, or with the last array in it."""

    def __init__(self, device: CudaDevice, nbytes: int, what: str, stream: int | None = None) -> None:
        """what: it is for, as an error names it. stream: in order with whose work it is taken and freed, if any.

        Raises InputError, which says what to do, if the GPU has not enough.
        """
        self.device, self.nbytes, self._stream = device, nbytes, stream
        self.pointer = 0  # first of all: __del__ looks at it
        self.pointer = device.reserve(nbytes, what, stream)

    def array(self, shape: tuple[int, ...], dtype: str, offset: int = 0) -> Array:
        """A contiguous array that starts `offset` bytes in."""
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        if offset + prod(shape) * ITEM_BYTES[dtype] > self.nbytes:
            raise ValueError(f"an array of {dtype} {shape} at {offset} does not fit into {self.nbytes} bytes")
        return Array(self.pointer + offset, shape, strides, dtype, self.device, self)

    def close(self) -> None:
        """Give it back; what is enqueued on its stream, or on any if it has none, is waited for. Never raises."""
        pointer, self.pointer = self.pointer, 0
        if not pointer:
            return
        with suppress(RuntimeError), self.device.current(), relaxed_capture():  # it may have been the GPU that was lost
            if self._stream is None:
                driver().cuMemFree_v2(pointer)
            else:
                driver().cuMemFreeAsync(pointer, self._stream)

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the process nothing need be left
            self.close()


class Pinned:
    """Memory of the host that the GPU copies from and to by itself."""

    def __init__(self, nbytes: int) -> None:
        pointer = c_void_p()
        try:
            check(driver().cuMemHostAlloc(byref(pointer), nbytes, 0), f"pinning {nbytes} bytes of the host's memory")
        except CudaError as error:
            raise InputError(f"{error}: take smaller batches") from None
        self._pointer = pointer.value or 0
        self.array = np.ctypeslib.as_array((c_ubyte * nbytes).from_address(self._pointer))  # [nbytes] uint8

    def close(self) -> None:
        """Give it back; `array` must not be used any more."""
        self.array = np.empty(0, np.uint8)
        driver().cuMemFreeHost(self._pointer)
