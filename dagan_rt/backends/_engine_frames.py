"""Whole frames of TensorRT engines: kernels and engines chained on one stream, a CUDA graph a batch size. No PyTorch.

    slots, frames ─▶ gather, image_to_planes ─▶ driving ─▶ motion ─▶ generator ─▶ planes_to_image ─▶ images

Sessions lie in pools, a row a slot, which the graph gathers from by the slots of its batch. Sources and beginnings are
computed meanwhile, by execution contexts and a stream of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from dagan_rt.bundle import Bundle, Tensor
from dagan_rt.cuda.ring import Ring, RingPending
from dagan_rt.cuda.streams import Memory, Pinned, Stream
from dagan_rt.errors import InputError
from dagan_rt.frames import Times
from dagan_rt.kernels._devices import Array, CudaDevice
from dagan_rt.kernels.gather import MOST, gather
from dagan_rt.kernels.image import image_to_planes, planes_to_image
from dagan_rt.keypoints import KeyPoints
from dagan_rt.transfer import movement_scale

if TYPE_CHECKING:
    from dagan_rt.backends.tensorrt import TensorRTBackend

POINTS = ("kp_value", "kp_jacobian")
EVERY_FRAME = ("driving", "motion", "generator")


class EngineFrames:
    """`dagan_rt.frames.Frames` on the engines of a bundle."""

    def __init__(self, backend: TensorRTBackend, bundle: Bundle, slots: int, batches: Sequence[int]) -> None:
        """Allocate all and capture the graphs. Raises InputError for too little memory, or a batch no engine takes."""
        backend.check_batches((1, *batches))
        self.size, self.slots, self.batches = bundle.config.size, slots, tuple(batches)
        self._device, most = backend.device, self.batches[-1]
        self._session = _session_tensors(bundle)
        self.slot_bytes = sum(map(_row_bytes, self._session.values()))
        self._sourced, self._begun = [False] * slots, [False] * slots
        with self._device.current(), ExitStack() as opened:  # what was opened is closed again if the rest fails
            self._pools = _arrays(self._device, self._session, slots, f"{slots} sessions", opened)
            within = self._session | _frame_tensors(bundle)
            self._batch = _arrays(self._device, within, most, f"a batch of up to {most} frames", opened)
            self._contexts = opened.enter_context(closing(backend.contexts(EVERY_FRAME, self.batches)))
            found = {it.name: self._batch[f"driving_{it.name}"] for it in bundle.graphs["driving"].outputs}
            for size in self.batches:
                self._contexts.bind("driving", size, self._batch | found)
                self._contexts.bind("motion", size, self._batch)
                self._contexts.bind("generator", size, self._batch)
            self._side = opened.enter_context(closing(_Side(backend, bundle)))
            self._ring = opened.enter_context(closing(Ring(self._device, self.size, self.batches)))
            self.ahead = self._ring.ahead
            self._ring.capture(self._enqueue)
            self._opened = opened.pop_all()
        self.fixed_bytes = sum(
            (backend.weights_bytes, self._ring.nbytes, _nbytes(self._batch), self._contexts.nbytes, self._side.nbytes)
        )

    def set_source(self, slot: int, image: np.ndarray) -> None:
        """As in `Frames`."""
        self._check((slot,))
        with self._side.work() as stream:
            self._begun[slot] = False
            found = self._side.run("source", image)
            arrays = found | {f"source_{name}": found[name] for name in POINTS} | {"source_image": self._side.planes}
            for name in self._session:
                if name in arrays:
                    _copy_row(stream, self._pools[name], slot, arrays[name])
            self._sourced[slot] = True

    def begin(self, slot: int, frame: np.ndarray | None, adapt_scale: bool = False, motion_scale: float = 1.0) -> None:
        """As in `Frames`; absolute motion is relative motion from the source's own points."""
        self._check((slot,))
        if not self._sourced[slot]:
            raise InputError(f"slot {slot} has no source: call set_source first")
        with self._side.work() as stream:
            source = {name: self._pools[f"source_{name}"].rows(slot, 1) for name in POINTS}
            initial, scale = source, 1.0
            if frame is not None:
                initial = self._side.run("driving", frame)
                if adapt_scale:
                    scale = movement_scale(_on_host(stream, source), _on_host(stream, initial))
            for name in POINTS:
                _copy_row(stream, self._pools[f"initial_{name}"], slot, initial[name])
            stream.upload(self._pools["scale"].rows(slot, 1).pointer, np.array([scale * motion_scale], np.float32))
            self._begun[slot] = True

    def submit(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> RingPending:
        """As in `Frames`."""
        self._check(slots, begun=True)
        return self._ring.submit(slots, frames)

    def keypoints(self, image: np.ndarray) -> KeyPoints:
        """As in `Frames`."""
        with self._side.work() as stream:
            return _on_host(stream, self._side.run("driving", image))

    def timed(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Times:
        """As in `Frames`."""
        self._check(slots, begun=True)
        return self._ring.timed(slots, frames)

    def stages(self, batch: int) -> Mapping[str, Callable[[], None]]:
        """As in `Frames`: each runs on the ring's stream and is waited for."""

        def waited(stage: Callable[[int, int], None]) -> Callable[[], None]:
            def run() -> None:
                with self._device.current():
                    stage(batch, self._ring.stream)
                self._ring.synchronize()

            return run

        return {name: waited(stage) for name, stage in self._stages().items()}

    def close(self) -> None:
        """As in `Frames`; the backend stays open."""
        self._opened.close()

    def _enqueue(self, batch: int, stream: int) -> None:
        """The whole frame, what a CUDA graph holds."""
        for stage in self._stages().values():
            stage(batch, stream)

    def _stages(self) -> dict[str, Callable[[int, int], None]]:
        """In their order; each takes the batch size and the stream."""

        def sessions(batch: int, stream: int) -> None:
            chosen, names = self._ring.slots.rows(0, batch), list(self._session)
            for start in range(0, len(names), MOST):
                some = names[start : start + MOST]
                outs = [self._batch[name].rows(0, batch) for name in some]
                gather([self._pools[name] for name in some], chosen, outs, stream=stream)

        def planes(batch: int, stream: int) -> None:
            out = self._batch["image"].rows(0, batch)
            image_to_planes(self._ring.frames.rows(0, batch), out=out, stream=stream)

        def engine(name: str) -> Callable[[int, int], None]:
            return lambda batch, stream: self._contexts.execute(name, batch, stream)

        def images(batch: int, stream: int) -> None:
            out = self._ring.images.rows(0, batch)
            planes_to_image(self._batch["prediction"].rows(0, batch), out=out, stream=stream)

        engines = {name: engine(name) for name in EVERY_FRAME}
        return {"sessions": sessions, "planes": planes, **engines, "images": images}

    def _check(self, slots: Sequence[int], begun: bool = False) -> None:
        for slot in slots:
            if not 0 <= slot < self.slots:
                raise InputError(f"slots must be 0 to {self.slots - 1}, got {slot}")
            if begun and not self._begun[slot]:
                raise InputError(f"slot {slot} has no session: call set_source and begin first")


class _Side:
    """One face at a time through the source or the driving engine, on a stream beside the batches."""

    def __init__(self, backend: TensorRTBackend, bundle: Bundle) -> None:
        graphs, size = bundle.graphs, bundle.config.size
        self._device, self._lock = backend.device, threading.Lock()
        self._outputs = {name: [tensor.name for tensor in graphs[name].outputs] for name in ("source", "driving")}
        named = {tensor.name: tensor for name in self._outputs for tensor in graphs[name].outputs}
        named["image"] = graphs["source"].inputs[0]
        with ExitStack() as opened:
            self._arrays = _arrays(self._device, named, 1, "a source", opened)
            self._contexts = opened.enter_context(closing(backend.contexts(tuple(self._outputs), (1,))))
            for name in self._outputs:
                self._contexts.bind(name, 1, self._arrays)
            pixels = opened.enter_context(closing(Memory(self._device, 3 * size**2, "a source")))
            self._pixels = pixels.array((1, size, size, 3), "uint8")
            self._pinned = opened.enter_context(closing(Pinned(3 * size**2)))
            self._stream = opened.enter_context(closing(Stream()))
            self._opened = opened.pop_all()
        self.nbytes = _nbytes(self._arrays) + self._contexts.nbytes + pixels.nbytes
        self.planes = self._arrays["image"]  # of the face that was run last

    @contextmanager
    def work(self) -> Iterator[Stream]:
        """By one thread at a time, and waited for at the end."""
        with self._lock, self._device.current():
            yield self._stream
            self._stream.synchronize()

    def run(self, graph: str, image: np.ndarray) -> dict[str, Array]:
        """Enqueue one face, uint8 [H, W, 3]; the outputs stay until the next one."""
        self._stream.synchronize()  # the pinned memory may still be read
        self._pinned.array[:] = np.ascontiguousarray(image).reshape(-1)
        self._stream.upload(self._pixels.pointer, self._pinned.array)
        image_to_planes(self._pixels, out=self.planes, stream=self._stream.handle)
        self._contexts.execute(graph, 1, self._stream.handle)
        return {name: self._arrays[name] for name in self._outputs[graph]}

    def close(self) -> None:
        """Free all; nothing is under way, for whoever began it waited for it."""
        with self._lock, suppress(RuntimeError), self._device.current():
            self._opened.close()


def _session_tensors(bundle: Bundle) -> dict[str, Tensor]:
    """What a frame takes that is a session's own: of the source, the initial key points and the movement scale."""
    graphs = bundle.graphs
    made = {tensor.name for tensor in graphs["motion"].outputs} | {f"driving_{name}" for name in POINTS}
    taken = {tensor.name: tensor for name in ("motion", "generator") for tensor in graphs[name].inputs}
    needed = {f"source_{tensor.name}": tensor for tensor in graphs["source"].outputs if tensor.name in POINTS}
    return needed | {name: tensor for name, tensor in sorted(taken.items()) if name not in made}


def _frame_tensors(bundle: Bundle) -> dict[str, Tensor]:
    """What the engines of a frame hand on; the outputs of `driving` under the names that `motion` takes them."""
    driving, motion, generator = (bundle.graphs[name] for name in EVERY_FRAME)
    found = {tensor.name: tensor for tensor in (driving.inputs[0], *motion.outputs, *generator.outputs)}
    return found | {f"driving_{tensor.name}": tensor for tensor in driving.outputs}


def _arrays(
    device: CudaDevice, tensors: Mapping[str, Tensor], rows: int, what: str, opened: ExitStack
) -> dict[str, Array]:
    """A float32 array of so many rows for each tensor, all in one piece of memory, freed with `opened`."""
    sizes = {name: -(-rows * _row_bytes(tensor) // 256) * 256 for name, tensor in tensors.items()}
    memory, start, found = Memory(device, sum(sizes.values()), what), 0, {}
    for name, tensor in tensors.items():
        found[name] = memory.array((rows, *_row(tensor)), "float32", start)
        start += sizes[name]
    opened.callback(memory.close)
    return found


def _row(tensor: Tensor) -> tuple[int, ...]:
    """Its shape for one face."""
    return tuple(size for size in tensor.shape[1:] if isinstance(size, int))


def _row_bytes(tensor: Tensor) -> int:
    return 4 * prod(_row(tensor))


def _nbytes(arrays: Mapping[str, Array]) -> int:
    return 4 * sum(prod(array.shape) for array in arrays.values())


def _copy_row(stream: Stream, pool: Array, slot: int, values: Array) -> None:
    """Enqueue the copy of one face's values to a slot."""
    row = pool.rows(slot, 1)
    stream.copy(row.pointer, values.pointer, 4 * prod(row.shape))


def _on_host(stream: Stream, points: Mapping[str, Array]) -> KeyPoints:
    """Key points of one face, once the stream has come so far."""
    found = [np.empty(points[name].shape, np.float32) for name in POINTS]
    for name, values in zip(POINTS, found, strict=True):
        stream.download(values, points[name].pointer)
    stream.synchronize()
    return KeyPoints(*found)
