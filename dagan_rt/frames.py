"""Whole frames on one device: what backends offer, and what `Reenactor`, `Streams` and the benchmarks are built on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np

from dagan_rt.backends import Backend
from dagan_rt.bundle import Bundle, Tensor
from dagan_rt.errors import InputError
from dagan_rt.keypoints import KeyPoints
from dagan_rt.transfer import movement_scale

POINTS = ("kp_value", "kp_jacobian")  # what graphs call the parts of `KeyPoints`


class Pending(Protocol):
    """A batch under way."""

    def done(self) -> bool:
        """Whether the device is through with it, and `result` need not wait; true after `result`, too."""

    def result(self) -> np.ndarray:
        """Wait for the images, uint8 [B, H, W, 3] in an array of the caller's own, or raise what went wrong.

        May be called once.
        """


class Times(NamedTuple):
    """Seconds that one batch took, and its parts; a CPU engine has no transfers, and `device` is `wall`."""

    wall: float
    upload: float
    device: float
    download: float


class Frames(Protocol):
    """Whole frames on one device: sources and sessions in numbered slots, driving frames of any of them in one batch.

    `set_source` and `begin` may be called from another thread than `submit`: they neither change a batch under way nor
    wait for one longer than its staging. Results may be taken in a third thread. `submit` has copied the frames, or is
    through with them, when it returns. The caller checks the images, and leaves a slot alone while frames of it are
    pending. Those of a GPU have a `device: str`, too: its name. Those that can be driven by key points alone have
    `submit_points`, as `GraphFrames` does, and take key points in `begin`.
    """

    size: int  # side of an image, pixels
    slots: int  # how many sessions it can hold
    batches: tuple[int, ...]  # sizes it was made ready for, ascending; `submit` takes up to the last, pads to the next
    ahead: int  # batches that may be pending at once; `submit` beyond it waits for the oldest
    slot_bytes: int  # device memory that a session takes
    fixed_bytes: int  # device memory that all the rest takes (weights, graphs, staging); 0 if unknown

    def set_source(self, slot: int, image: np.ndarray) -> None:
        """Compute a slot's source from an image, uint8 [H, W, 3], and wait for it; its session must begin anew."""

    def begin(self, slot: int, frame: np.ndarray | None, adapt_scale: bool = False, motion_scale: float = 1.0) -> None:
        """Set a session's initial key points: those of `frame` (relative motion), or the source's own (absolute).

        frame: uint8 [H, W, 3] or None. adapt_scale: scale the movement by the size of the source's face over that of
        the face in `frame`; InputError if either spans no area. motion_scale: scale it by this, too; 1 where `frame` is
        None.
        """

    def submit(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Pending:
        """Enqueue driving frames, uint8 [H, W, 3], each for its slot; slots may repeat."""

    def keypoints(self, image: np.ndarray) -> KeyPoints:
        """The key points of any face, NumPy [1, K, 2] and [1, K, 2, 2]; no slot changes."""

    def timed(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Times:
        """Run one batch, wait for it, and give the time of its parts."""

    def stages(self, batch: int) -> Mapping[str, Callable[[], object]]:
        """For benchmarks: what runs, or enqueues on the device's current stream, each stage alone; {} if unknown."""

    def close(self) -> None:
        """Wait for what is under way and free the memory. May be called twice."""


def open_frames(
    backend: Backend, bundle: Bundle, slots: int = 1, batches: Sequence[int] = (1,), *, by_points: bool = False
) -> Frames:
    """The whole frames of a backend that has them, `GraphFrames` for any other.

    by_points: they have `submit_points`; where a backend's own have not, its graphs are run one after the other, which
    is slower. Raises InputError if a number is wrong or the device has too little memory.
    """
    if slots < 1:
        raise InputError(f"slots must be at least 1, got {slots}")
    if not batches or min(batches) < 1 or list(batches) != sorted(set(batches)):
        raise InputError(f"batches must be ascending numbers of at least 1, got {tuple(batches)}")
    own: Callable[[int, Sequence[int]], Frames] | None = getattr(backend, "frames", None)
    return GraphFrames(backend, bundle, slots, batches) if own is None or by_points else own(slots, batches)


def batch_sizes(backend: Backend, most: int) -> tuple[int, ...]:
    """Powers of two up to `most`, and `most`, as far as the backend goes: its `largest_batch`, if it has one.

    1 alone for a backend without whole frames of its own: a batch would only make its first frame late.
    """
    if not hasattr(backend, "frames"):
        return (1,)
    most = min(most, getattr(backend, "largest_batch", most))
    return (*(2**power for power in range(most.bit_length()) if 2**power < most), most)


class GraphFrames:
    """Runs the graphs of a bundle in any backend, one face after the other; `submit` returns when all are through.

    CPU engines gain nothing from a batch: their cores are busy with one face.
    """

    ahead = 1
    fixed_bytes = 0  # the backend's, which does not tell

    def __init__(self, backend: Backend, bundle: Bundle, slots: int = 1, batches: Sequence[int] = (1,)) -> None:
        """backend: with the graphs of `bundle` loaded; slots, batches: as in `Frames`."""
        self.size, self.slots, self.batches = bundle.config.size, slots, tuple(batches)
        self.num_keypoints = bundle.config.num_keypoints
        self._backend = backend
        self._inputs = {name: [tensor.name for tensor in graph.inputs] for name, graph in bundle.graphs.items()}
        kept = _session(bundle)
        self._kept = {"kp_value", "kp_jacobian", *(tensor.name for tensor in kept)}
        self.slot_bytes = _bytes(kept)
        self._running = threading.Lock()  # for one graph, not for one batch: `set_source` need not wait for a batch
        # A session is replaced as a whole, never changed: a frame under way keeps the one it started with.
        self._sources: list[dict[str, Any] | None] = [None] * slots  # arrays, by the names other graphs take them under
        self._initial: list[dict[str, Any] | None] = [None] * slots  # initial key points and movement scale, likewise
        self._first: list[tuple[np.ndarray, dict[str, Any]] | None] = [None] * slots  # the initial frame and its points

    def set_source(self, slot: int, image: np.ndarray) -> None:
        """As in `Frames`."""
        planes = self._backend.from_image(image)
        found = self._run("source", {"image": planes})
        arrays = found | _named("source", found) | {"source_image": planes}
        self._sources[slot] = {name: array for name, array in arrays.items() if name in self._kept}
        self._initial[slot] = self._first[slot] = None

    def begin(
        self, slot: int, frame: np.ndarray | KeyPoints | None, adapt_scale: bool = False, motion_scale: float = 1.0
    ) -> None:
        """As in `Frames`, or from key points; absolute motion is relative motion from the source's own points."""
        source = self._sources[slot]
        if source is None:
            raise InputError(f"slot {slot} has no source: call set_source first")
        initial, scale = source, 1.0
        if frame is not None:
            initial = self._given(frame) if isinstance(frame, KeyPoints) else self._find(frame)
            if adapt_scale:
                scale = movement_scale(on_host(self._backend, source), on_host(self._backend, initial))
        movement = {"scale": self._backend.from_numpy(np.array([[scale * motion_scale]], np.float32))}
        self._first[slot] = (frame.copy(), initial) if isinstance(frame, np.ndarray) else None
        self._initial[slot] = _named("initial", initial) | movement

    def submit(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Pending:
        """As in `Frames`."""
        if not 0 < len(slots) == len(frames) <= self.batches[-1]:
            raise InputError(
                f"a batch must be 1 to {self.batches[-1]} frames and as many slots, got {len(frames)} and {len(slots)}"
            )
        try:
            return Computed(np.stack([self._drive(*pair) for pair in zip(slots, frames, strict=True)]))
        except Exception as error:
            return Computed(error)

    def submit_points(self, slot: int, points: KeyPoints) -> Pending:
        """As `submit` with one slot, by a driving face's key points: NumPy [1, K, 2] and [1, K, 2, 2]."""
        try:
            return Computed(self._render(self._session(slot), self._given(points))[None])
        except Exception as error:
            return Computed(error)

    def keypoints(self, image: np.ndarray) -> KeyPoints:
        """As in `Frames`."""
        return on_host(self._backend, self._find(image))

    def timed(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Times:
        """As in `Frames`."""
        start = time.perf_counter()
        self.submit(slots, frames).result()
        wall = time.perf_counter() - start
        return Times(wall=wall, upload=0.0, device=wall, download=0.0)

    def stages(self, batch: int) -> dict[str, Callable[[], None]]:
        """`driving`, `motion` and `generator`, on noise."""
        noise = np.random.default_rng(0).integers(0, 256, (self.size, self.size, 3)).astype(np.uint8)
        image = self._backend.from_image(noise)
        source, driving = self._run("source", {"image": image}), self._run("driving", {"image": image})
        arrays = source | {"image": image, "source_image": image, "scale": self._backend.from_numpy(np.ones((1, 1)))}
        for role, found in (("source", source), ("initial", driving), ("driving", driving)):
            arrays |= _named(role, found)
        arrays |= self._run("motion", arrays)

        def stage(graph: str) -> Callable[[], None]:
            def run() -> None:
                for _ in range(batch):
                    self._run(graph, arrays)

            return run

        return {graph: stage(graph) for graph in ("driving", "motion", "generator")}

    def close(self) -> None:
        """As in `Frames`; the backend, which others may share, stays open."""
        for kept in (self._sources, self._initial, self._first):
            kept[:] = [None] * self.slots

    def _drive(self, slot: int, frame: np.ndarray) -> np.ndarray:
        session = self._session(slot)
        first, self._first[slot] = self._first[slot], None
        # The initial frame is usually the first one driven, and its points are known.
        driving = first[1] if first is not None and np.array_equal(first[0], frame) else self._find(frame)
        return self._render(session, driving)

    def _session(self, slot: int) -> dict[str, Any]:
        """What is known of a slot's source and initial face, by the names that graphs take it under."""
        source, initial = self._sources[slot], self._initial[slot]
        if source is None or initial is None:
            raise InputError(f"slot {slot} has no session: call set_source and begin first")
        return source | initial

    def _render(self, session: dict[str, Any], driving: dict[str, Any]) -> np.ndarray:
        """The image of a session's source, moved as the driving key points say."""
        arrays = session | _named("driving", driving)
        return self._backend.to_image(self._run("generator", arrays | self._run("motion", arrays))["prediction"])

    def _given(self, points: KeyPoints) -> dict[str, Any]:
        """Key points under the names that graphs give them."""
        arrays = (np.ascontiguousarray(part, np.float32) for part in points)
        return {name: self._backend.from_numpy(array) for name, array in zip(POINTS, arrays, strict=True)}

    def _find(self, frame: np.ndarray) -> dict[str, Any]:
        """Depth and key points of one face."""
        return self._run("driving", {"image": self._backend.from_image(frame)})

    def _run(self, graph: str, arrays: dict[str, Any]) -> dict[str, Any]:
        """Run one graph on those of `arrays` that it takes, bound by name."""
        with self._running:
            return self._backend.run(graph, {name: arrays[name] for name in self._inputs[graph]})


class Computed:
    """A batch that is through: its images, or what went wrong."""

    def __init__(self, outcome: np.ndarray | Exception) -> None:
        self._outcome = outcome

    def done(self) -> bool:
        return True

    def result(self) -> np.ndarray:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class Together:
    """Batches of one frame under way in several sessions: `result` is [1, N, H, W, 3], their images in order."""

    def __init__(self, pending: Sequence[Pending]) -> None:
        self._pending = pending

    def done(self) -> bool:
        return all(one.done() for one in self._pending)

    def result(self) -> np.ndarray:
        return np.stack([one.result()[0] for one in self._pending])[None]


def find_keypoints(backend: Backend, image: np.ndarray) -> KeyPoints:
    """What `Frames.keypoints` gives, by the backend's graph."""
    return on_host(backend, backend.run("driving", {"image": backend.from_image(image)}))


def on_host(backend: Backend, found: Mapping[str, Any]) -> KeyPoints:
    """The key points among the outputs of `source` or `driving`, NumPy [1, K, 2] and [1, K, 2, 2]."""
    return KeyPoints(*(backend.to_numpy(found[name]) for name in POINTS))


def _named(role: str, found: dict[str, Any]) -> dict[str, Any]:
    """The key points of the source, driving or initial face under the names the `motion` graph takes them."""
    return {f"{role}_{name}": found[name] for name in POINTS}


def _session(bundle: Bundle) -> list[Tensor]:
    """What a frame needs besides its own points: inputs of `motion` and `generator`, not made by them or `driving`."""
    made = {tensor.name for tensor in bundle.graphs["motion"].outputs}
    inputs = [tensor for graph in ("motion", "generator") for tensor in bundle.graphs[graph].inputs]
    return [tensor for tensor in inputs if tensor.name not in made and not tensor.name.startswith("driving_")]


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Memory of float32 tensors for one face."""
    return 4 * sum(prod(size for size in tensor.shape if isinstance(size, int)) for tensor in tensors)
