"""Batches of frames on their way through a GPU: pinned staging, three streams, and one CUDA graph a batch size.

    pinned ──▶ a lap's memory ──copy──▶ fixed arrays ──graph──▶ fixed arrays ──copy──▶ a lap's memory ──▶ pinned
       upload stream         └──────────────── compute stream ────────────────┘                download stream

A graph holds addresses, so it always works on the same fixed arrays. Each batch under way has staging of its own, a
lap: while one batch is computed the next is uploaded and the one before downloaded. Nothing is allocated on the way but
the array that a caller gets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress

import numpy as np

from dagan_rt.cuda.streams import Event, Graph, Memory, Pinned, Stream
from dagan_rt.errors import DeviceLost, InputError
from dagan_rt.frames import Times
from dagan_rt.kernels._devices import CudaDevice

_ALIGNED = 256  # bytes, what the driver aligns allocations to


class Ring:
    """Takes frames of numbered slots, has a captured graph work on them, and gives images back, in order."""

    def __init__(self, device: CudaDevice, size: int, batches: Sequence[int], ahead: int = 3) -> None:
        """Allocate everything once. size: side of an image. batches: sizes, ascending. ahead: laps.

        Raises InputError if the GPU has too little memory.
        """
        self.size, self.batches, self.ahead = size, tuple(batches), ahead
        self._device, most, image = device, self.batches[-1], 3 * size**2
        # The slots lie before the frames, so that both go up in one copy.
        self._head = -(-4 * most // _ALIGNED) * _ALIGNED
        self._into, self._out = self._head + most * image, -(-most * image // _ALIGNED) * _ALIGNED
        lap = -(-self._into // _ALIGNED) * _ALIGNED + self._out
        shape = (most, size, size, 3)
        self._graphs: dict[int, Graph] = {}
        self._next, self._closed = 0, False
        self._submitting = threading.RLock()
        with device.current(), ExitStack() as opened:  # what was opened is closed again if the rest fails
            what = f"the staging of {ahead} batches of up to {most} frames"
            memory = opened.enter_context(closing(Memory(device, (1 + ahead) * lap, what)))
            self.nbytes = memory.nbytes
            self.slots = memory.array((most,), "int32")
            self.frames = memory.array(shape, "uint8", self._head)
            self.images = memory.array(shape, "uint8", lap - self._out)
            self._up, self._compute, self._down = (opened.enter_context(closing(Stream())) for _ in range(3))
            self._clock = opened.enter_context(closing(_Clock()))
            starts = [memory.pointer + number * lap for number in range(1, ahead + 1)]
            places = [(start, start + lap - self._out) for start in starts]
            self._laps = [opened.enter_context(closing(_Lap(*it, self._into, most * image))) for it in places]
            self._opened = opened.pop_all()

    @property
    def stream(self) -> int:
        """The handle of the stream that graphs are captured and launched on."""
        return self._compute.handle

    def capture(self, enqueue: Callable[[int, int], None]) -> None:
        """Make the graph of every batch size from `enqueue(batch, stream)`.

        It enqueues the way from `frames[:batch]` and `slots[:batch]` to `images[:batch]`, and is called twice a size:
        to warm up (all slots are 0), waited for, and to be captured. The largest size comes first, for memory that
        grows with it.
        """
        with self._device.current():
            self._compute.fill(self.slots.pointer, 0, self._into)
            for batch in reversed(self.batches):
                enqueue(batch, self.stream)
                self._compute.synchronize()
                self._graphs[batch] = Graph(self._compute, lambda batch=batch: enqueue(batch, self.stream))  # type: ignore[misc]
            self._compute.synchronize()

    def submit(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> RingPending:
        """Enqueue frames, uint8 [size, size, 3], each for its slot, as one batch padded to the next size.

        With `ahead` batches under way it waits for the oldest, whose images are kept for who asks for them. Raises
        InputError for a wrong number of frames, DeviceLost if the GPU is gone.
        """
        with self._submitting:
            lap = self._take(slots, frames)
            with self._device.current():
                self._enqueue(lap, len(frames))
            lap.pending = RingPending(self._device, lap, (len(frames), self.size, self.size, 3))
            return lap.pending

    def timed(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Times:
        """Run one batch with nothing else under way, wait for it, and give the time of its parts."""
        with self._submitting:
            self.synchronize()
            began = time.perf_counter()
            lap = self._take(slots, frames)
            with self._device.current():
                self._enqueue(lap, len(frames), self._clock)
                lap.downloaded.synchronize()
                lap.images[: len(frames) * 3 * self.size**2].copy()  # as `result` does
                wall = time.perf_counter() - began
                return Times(wall, *(end.since(start) for start, end in self._clock.parts))

    def launch(self, batch: int) -> None:
        """Enqueue the graph of a batch size on whatever lies in the fixed arrays."""
        with self._device.current():
            self._graphs[batch].launch(self._compute)

    def synchronize(self) -> None:
        """Wait until all that was submitted is done; the images are kept for who asks for them."""
        with self._submitting:
            for lap in self._laps:
                lap.settle()
            with self._device.current():
                self._compute.synchronize()

    def close(self) -> None:
        """Wait for what is under way and free the memory. May be called twice."""
        with self._submitting:
            if self._closed:
                return
            self._closed = True
            with suppress(DeviceLost):
                self.synchronize()
            with suppress(RuntimeError), self._device.current():
                for graph in self._graphs.values():
                    graph.close()
                self._opened.close()

    def _take(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> _Lap:
        """The next lap, free and filled."""
        count, most = len(frames), self.batches[-1]
        if not 1 <= count <= most or len(slots) != count:
            raise InputError(f"a batch must be 1 to {most} frames with a slot each, got {count} and {len(slots)} slots")
        if self._closed:
            raise InputError("these frames were closed: open them again")
        lap = self._laps[self._next]
        lap.settle()
        self._next = (self._next + 1) % self.ahead
        numbers = lap.inputs[: 4 * most].view(np.int32)
        numbers[:count], numbers[count:] = slots, slots[0]  # a graph reads a slot for the padding, too
        pixels = lap.inputs[self._head :].reshape(most, self.size, self.size, 3)
        for row, frame in zip(pixels, frames, strict=False):
            row[...] = frame
        return lap

    def _enqueue(self, lap: _Lap, count: int, clock: _Clock | None = None) -> None:
        """All that a batch goes through. Padding is not transferred."""
        image = 3 * self.size**2
        batch = next(size for size in self.batches if size >= count)
        sent, made = self._head + count * image, count * image
        if clock:
            clock.start(0, self._up)
        self._up.upload(lap.device_inputs, lap.inputs[:sent])
        if clock:
            clock.end(0, self._up)
        lap.uploaded.record(self._up)

        self._compute.wait(lap.uploaded)
        if clock:
            clock.start(1, self._compute)
        self._compute.copy(self.slots.pointer, lap.device_inputs, sent)
        self._graphs[batch].launch(self._compute)
        self._compute.copy(lap.device_images, self.images.pointer, made)
        if clock:
            clock.end(1, self._compute)
        lap.computed.record(self._compute)

        self._down.wait(lap.computed)
        if clock:
            clock.start(2, self._down)
        self._down.download(lap.images[:made], lap.device_images)
        if clock:
            clock.end(2, self._down)
        lap.downloaded.record(self._down)


class RingPending:
    """A batch under way in a ring; see `dagan_rt.frames.Pending`. Any thread may ask it."""

    def __init__(self, device: CudaDevice, lap: _Lap, shape: tuple[int, ...]) -> None:
        self._device, self._lap, self._shape = device, lap, shape
        self._fetching = threading.Lock()
        self._images: np.ndarray | None = None
        self._error: Exception | None = None

    def done(self) -> bool:
        """Whether `result` would return, or raise, without waiting."""
        if not self._fetching.acquire(blocking=False):
            return False  # another thread is waiting for it
        try:
            if self._images is not None or self._error is not None:
                return True
            with self._device.current():
                return self._lap.downloaded.done()
        except RuntimeError:
            return True
        finally:
            self._fetching.release()

    def result(self) -> np.ndarray:
        """Wait for the images, uint8 [B, H, W, 3] in an array of the caller's own, or raise what went wrong."""
        self.fetch()
        if self._error is not None:
            raise self._error
        assert self._images is not None
        return self._images

    def fetch(self) -> None:
        """Wait, and take the images or the error out of the lap, which is free then."""
        with self._fetching:
            if self._images is not None or self._error is not None:
                return
            try:
                with self._device.current():
                    self._lap.downloaded.synchronize()
                self._images = self._lap.images[: int(np.prod(self._shape))].reshape(self._shape).copy()
            except RuntimeError as error:
                self._error = error
            if self._lap.pending is self:
                self._lap.pending = None


class _Lap:
    """The staging of one batch under way."""

    def __init__(self, device_inputs: int, device_images: int, inputs: int, images: int) -> None:
        self.device_inputs, self.device_images = device_inputs, device_images
        self._pinned = Pinned(inputs + images)
        self.inputs, self.images = self._pinned.array[:inputs], self._pinned.array[inputs:]
        self.uploaded, self.computed, self.downloaded = Event(), Event(), Event()
        self.pending: RingPending | None = None

    def settle(self) -> None:
        """Wait for its batch, if there is one; the images, or the error, are kept by whoever has it."""
        if (pending := self.pending) is not None:
            pending.fetch()

    def close(self) -> None:
        for it in (self._pinned, self.uploaded, self.computed, self.downloaded):
            it.close()


class _Clock:
    """Events around the upload, the work and the download of a batch."""

    def __init__(self) -> None:
        self.parts = [(Event(timing=True), Event(timing=True)) for _ in range(3)]

    def start(self, part: int, stream: Stream) -> None:
        self.parts[part][0].record(stream)

    def end(self, part: int, stream: Stream) -> None:
        self.parts[part][1].record(stream)

    def close(self) -> None:
        for pair in self.parts:
            for event in pair:
                event.close()
