"""PyTorch's memory and dagan-rt's kernels on an NVIDIA GPU: a frame is one CUDA graph, no TensorRT needed.

Sources are computed once each by the networks in float32; what every frame needs runs in 16 bit (`dagan_rt.fused`).
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from dagan_rt import plugins
from dagan_rt.backends import torch as torch_backend
from dagan_rt.bundle import Bundle
from dagan_rt.errors import DeviceLost, InputError
from dagan_rt.frames import Pending, Times, find_keypoints, on_host
from dagan_rt.keypoints import KeyPoints
from dagan_rt.transfer import movement_scale

RANK = 3
DTYPES = ("float16", "bfloat16")
LEAST_CAPABILITY = (8, 0)  # the convolutions' asynchronous copies


def missing(bundle: Bundle | None = None) -> str | None:
    """None, or why this backend cannot run here, or not this bundle."""
    if reason := torch_backend.missing(bundle):
        return reason
    if reason := plugins.missing():  # of the kernels: no GPU, or nothing that compiles them
        return reason
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return "the package torch was built without CUDA: run pip install torch from the index of its CUDA builds"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return f"the GPU must have compute capability 8.0 or later, got {capability[0]}.{capability[1]}"
    return None


def open(bundle: Bundle, threads: int | None = None, dtype: str = "float16") -> TorchCudaBackend:
    """Load the bundle's checkpoint onto the current GPU; raises InputError if it was exported without one.

    dtype: "float16" or "bfloat16", of what runs every frame.
    """
    if reason := missing(bundle):
        raise InputError(reason)
    return TorchCudaBackend(torch_backend.load(bundle).cuda(), dtype)


class TorchCudaBackend(torch_backend.TorchBackend):
    """Single graphs run as the `torch` backend runs them, in float32; whole frames run fused."""

    name = "torch-cuda"

    def __init__(self, model: Any, dtype: str = "float16") -> None:
        """`model`: a dagan_rt.networks.model.Model on a GPU."""
        if dtype not in DTYPES:
            raise InputError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
        super().__init__(model.requires_grad_(False))
        self.dtype = dtype

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name of one graph, in full float32: PyTorch rounds convolutions to TF32 unless told."""
        import torch

        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return super().run(graph, inputs)

    def frames(self, slots: int = 1, batches: Sequence[int] = (1,)) -> TorchCudaFrames:
        """Whole frames, as `dagan_rt.frames.Frames`.

        The first time on a kind of GPU the convolutions are timed, which takes some seconds.

        Raises InputError if the GPU's memory does not hold them.
        """
        return TorchCudaFrames(self, slots, batches)


class TorchCudaFrames:
    """`dagan_rt.frames.Frames` on fixed memory: submitting a batch launches the CUDA graph of its size."""

    def __init__(self, backend: TorchCudaBackend, slots: int, batches: Sequence[int]) -> None:
        import torch

        from dagan_rt.cuda.ring import Ring
        from dagan_rt.fused.frame import Driving, Frame
        from dagan_rt.fused.tools import Tools
        from dagan_rt.fused.tuning import Tuning
        from dagan_rt.kernels._devices import device

        self._backend, self._torch = backend, torch
        model = backend.model
        self.size, self.slots, self.batches = model.config.size, slots, tuple(batches)
        most, index = self.batches[-1], backend.device.index or 0
        self.device = torch.cuda.get_device_name(index)
        with self._explained(f"{slots} slots and batches of up to {most}"), torch.inference_mode():
            self._ring = Ring(device(index), self.size, self.batches)
            self.ahead = self._ring.ahead
            fixed = {
                name: torch.as_tensor(array, device=backend.device)
                for name, array in (
                    ("pixels", self._ring.frames), ("chosen", self._ring.slots), ("result", self._ring.images)
                )
            }  # fmt: skip
            self._tools = Tools(backend.device, backend.dtype, tuning=Tuning.of(index))
            self._frame = Frame(self._tools, model, slots, most, **fixed)
            self._beginning = Driving(self._tools, model, most=1)
            self._stream = torch.cuda.ExternalStream(self._ring.stream, device=backend.device)
            self._side = torch.cuda.Stream(backend.device)  # of sources and beginnings: work that no batch waits for
            self._changing = threading.Lock()
            self._pool = torch.cuda.MemPool()  # of what the captured PyTorch operations leave behind
            torch.cuda.current_stream().synchronize()  # weights and maps are there
            self._tune()
            self._ring.capture(self._enqueue)
        self.slot_bytes = self._frame.slot_bytes
        self.fixed_bytes = self._tools.bytes - slots * self.slot_bytes + self._ring.nbytes

    def set_source(self, slot: int, image: np.ndarray) -> None:
        """As in `Frames`."""
        with self._aside("a source"):
            planes = self._backend.from_image(image)
            found = self._backend.run("source", {"image": planes})
            found |= {"source_image": planes, "source_value": found["kp_value"]}
            found["source_jacobian"] = found["kp_jacobian"]
            for name, pool in self._frame.pools.items():
                if name in found:
                    pool[slot].copy_(found[name][0])

    def begin(self, slot: int, frame: np.ndarray | None, adapt_scale: bool = False, motion_scale: float = 1.0) -> None:
        """As in `Frames`."""
        torch = self._torch
        with self._aside("the beginning of a session"):
            pools = self._frame.pools
            source = pools["source_value"][slot], pools["source_jacobian"][slot]
            initial: Sequence[Any] = source
            scale = 1.0
            if frame is not None:
                self._beginning.pixels.copy_(torch.from_numpy(np.array(frame))[None])
                # By the very arithmetic of every frame, whose rounding then cancels.
                initial = tuple(found[0] for found in self._beginning(1))
                if adapt_scale:
                    scale = movement_scale(self._on_host(source), self._on_host(initial))
            for name, values in zip(("initial_value", "initial_jacobian"), initial, strict=True):
                pools[name][slot].copy_(values)
            pools["scale"][slot].fill_(scale * motion_scale)

    def submit(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Pending:
        """As in `Frames`."""
        if slots and not 0 <= min(slots) <= max(slots) < self.slots:
            raise InputError(f"slots must be from 0 to {self.slots - 1}, got {list(slots)[:8]}")
        return self._ring.submit(slots, frames)

    def keypoints(self, image: np.ndarray) -> KeyPoints:
        """As in `Frames`."""
        return find_keypoints(self._backend, image)

    def timed(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Times:
        """As in `Frames`."""
        return self._ring.timed(slots, frames)

    def stages(self, batch: int) -> dict[str, Callable[[], object]]:
        """As in `Frames`, on PyTorch's current stream; call nothing else meanwhile."""

        def quietly(step: Callable[[], object]) -> Callable[[], object]:
            def run() -> object:
                with self._torch.inference_mode():
                    return step()

            return run

        return {name: quietly(step) for name, step in self._frame.steps(batch).items()}

    def close(self) -> None:
        """As in `Frames`."""
        self._ring.close()  # the graphs first: they hold the addresses of what goes now
        for name in ("_frame", "_beginning", "_tools", "_pool"):
            self.__dict__.pop(name, None)
        with suppress(RuntimeError):  # with the GPU gone there is nothing to give back
            self._torch.cuda.empty_cache()

    def _enqueue(self, batch: int, stream: int) -> None:
        """The whole frame on the ring's stream: what a CUDA graph holds."""
        torch = self._torch
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool), torch.inference_mode():
            self._frame(batch)

    def _tune(self) -> None:
        """Run each batch size once with measuring on; what has been measured before takes no time."""
        tuning = self._tools.tuning
        assert tuning is not None
        with tuning.measuring(), self._torch.cuda.stream(self._stream):
            for batch in (1, *self.batches):
                self._frame(batch)
            self._stream.synchronize()

    def _on_host(self, points: Sequence[Any]) -> Any:
        named = dict(zip(("kp_value", "kp_jacobian"), (it[None] for it in points), strict=True))
        return on_host(self._backend, named)

    @contextmanager
    def _aside(self, what: str) -> Iterator[None]:
        """Work on the side stream, by one thread at a time, waited for at the end."""
        torch = self._torch
        if not hasattr(self, "_frame"):
            raise InputError("these frames were closed: open them again")
        with self._changing, self._explained(what), torch.inference_mode(), torch.cuda.stream(self._side):
            yield
            self._side.synchronize()

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """PyTorch's errors as ours."""
        torch = self._torch
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            free, total = torch.cuda.mem_get_info(self._backend.device)
            torch.cuda.empty_cache()
            raise InputError(
                f"the GPU has too little memory for {what}: {free / 2**20:.0f} of {total / 2**20:.0f} MiB are free; "
                "ask for fewer slots or smaller batches, or close what else uses it"
            ) from None
        except getattr(torch, "AcceleratorError", ()) as error:
            raise DeviceLost(f"the GPU failed at {what}: {str(error).splitlines()[0]}") from error
