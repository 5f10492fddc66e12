"""Whole frames as others compute them, with the interface of `dagan_rt.frames.Frames`: one session, uint8 in and out.

| form              | what it is                                                                                        |
|-------------------|---------------------------------------------------------------------------------------------------|
| `published`       | the procedure of the published demo: eager float32 without TF32, batch norms as they are, attention stored, and the source's features computed again for every frame |
| `eager-fp16`   | channels-last, the source computed once, cuDNN free to choose its algorithms                       |
| `compile-fp16` | the same through torch.compile(mode="max-autotune"), as one graph, replayed as a CUDA graph         |

On a CPU the latter two are float32.
"""  # noqa: E501

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dagan_rt.errors import InputError
from dagan_rt.export.subnetworks import _transfer as transfer
from dagan_rt.frames import Pending, Times
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.geometry import resize_flow, resize_map, sample

if TYPE_CHECKING:
    from dagan_rt.networks.model import Model


def open_peer(form: str, model: Model, place: str, batches: Sequence[int] = (1,)) -> TorchFrames:
    """One of the above by name; `model` stays as it is."""
    precision = torch.float32 if form == "published" or place == "cpu" else torch.float16
    session = (Published if form == "published" else Cached)(copy.deepcopy(model).to(place), precision).eval()
    compiled = form.startswith("compile")
    return TorchFrames(session, place, batches, compiled, benchmark=form != "published")


class Published(nn.Module):
    """Nothing kept of the source but its depth and key points."""

    def __init__(self, model: Model, precision: torch.dtype) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def begin(self, source: Tensor, first: Tensor | None) -> None:
        """A session; both uint8 [1, H, W, 3]. Without `first` motion is absolute."""
        self._source = self.planes(source)
        self._depth = self.model.depth(self._source) if self.model.depth is not None else None
        self._points = self.model.find_keypoints(self._source, self._depth)
        self._initial = self._points if first is None else self.model.find_keypoints(self.planes(first))
        self._scale = torch.ones(1, 1, device=source.device)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> uint8 [B, H, W, 3]."""
        planes, B = self.planes(pixels), len(pixels)
        moved = transfer(self._points, self.model.find_keypoints(planes), self._initial, self._scale)
        source = self._source.expand(B, -1, -1, -1)
        depth = None if self._depth is None else self._depth.expand(B, -1, -1, -1)
        points = KeyPoints(*(value.expand(B, *value.shape[1:]) for value in self._points))
        return levels(self.model.generator(source, points, moved, depth).prediction)

    def planes(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> [B, 3, H, W] in [0, 1]."""
        return pixels.permute(0, 3, 1, 2).to(self.precision).contiguous() / 255


class Cached(nn.Module):
    """All that depends on the source computed once, channels-last."""

    def __init__(self, model: Model, precision: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(precision)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs lack it
        self.precision = precision

    def begin(self, source: Tensor, first: Tensor | None) -> None:
        """As `Published.begin`. Kept in buffers, whose addresses a CUDA graph may rely on."""
        generator, config, planes = self.model.generator, self.model.config, self.planes(source)
        depth = self.model.depth(planes) if self.model.depth is not None else None
        points = self.model.find_keypoints(planes, depth)
        initial = points if first is None else self.model.find_keypoints(self.planes(first))
        kept = {"feature": generator.encode_image(planes), "thumbnail": generator.thumbnail(planes)}
        if config.parts.attention == "depth":
            assert depth is not None
            kept["query"] = generator.query(depth)
        if config.parts.decoder == "spade":
            kept["image"] = planes
        kept |= {"source_value": points.value, "source_jacobian": points.jacobian}
        kept |= {"initial_value": initial.value, "initial_jacobian": initial.jacobian}
        kept["scale"] = torch.ones(1, 1, device=source.device)
        for name, value in kept.items():
            self.register_buffer(f"kept_{name}", value.clone(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> uint8 [B, H, W, 3]. Key points move in float32."""
        model, generator, B = self.model, self.model.generator, len(pixels)
        source, initial = (
            KeyPoints(self.get_buffer(f"kept_{role}_value"), self.get_buffer(f"kept_{role}_jacobian"))
            for role in ("source", "initial")
        )
        driving = model.find_keypoints(self.planes(pixels))
        moved = transfer(source, driving, initial, self.get_buffer("kept_scale"))
        source, moved = (
            KeyPoints(*(self._wide(value, B).to(self.precision) for value in it)) for it in (source, moved)
        )
        motion = generator.dense_motion_network(self._wide(self.get_buffer("kept_thumbnail"), B), source, moved)
        warped = generator.warp(self._wide(self.get_buffer("kept_feature"), B), motion.flow, motion.occlusion)
        query = self._wide(self.get_buffer("kept_query"), B) if model.config.parts.attention == "depth" else None
        deformed = None
        if model.config.parts.decoder == "spade":
            image, side = self._wide(self.get_buffer("kept_image"), B), model.config.size
            deformed = sample(image, resize_flow(motion.flow, side, side)) * resize_map(motion.occlusion, side, side)
        return levels(generator.decode(generator.attend(warped, query), deformed))

    def planes(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> channels-last [B, 3, H, W] in [0, 1]; the frame's own layout already is."""
        return pixels.permute(0, 3, 1, 2).to(self.precision) / 255

    @staticmethod
    def _wide(value: Tensor, batch: int) -> Tensor:
        return value.expand(batch, *value.shape[1:])


def levels(prediction: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3]."""
    return (prediction.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class TorchFrames:
    """A session of PyTorch as `dagan_rt.frames.Frames`: pinned staging, all on one stream, two batches at once."""

    slots = 1
    slot_bytes = fixed_bytes = 0  # PyTorch's allocator knows them together only

    def __init__(
        self, session: Any, place: str, batches: Sequence[int], compiled: bool = False, benchmark: bool = True
    ) -> None:
        """`session`: a `Published` or `Cached`. benchmark: cuDNN tries its algorithms out."""
        self.size, self.batches = session.model.config.size, tuple(sorted(batches))
        self._session, self._place, self._benchmark = session, torch.device(place), benchmark
        self._gpu = self._place.type == "cuda"
        self.ahead = 2 if self._gpu else 1
        self._run: Callable[[Tensor], Tensor] = session
        if compiled:
            self._run = torch.compile(session, mode="max-autotune", fullgraph=True, dynamic=False)
        self._staging: dict[
            int, list[tuple[Tensor, Tensor]]
        ] = {}  # by batch: pinned frames and images, `ahead` of them
        self._turn = 0
        self._pending: deque[_Enqueued] = deque()
        self._source: Tensor | None = None

    def set_source(self, slot: int, image: np.ndarray) -> None:
        """As in `Frames`."""
        self._source = torch.from_numpy(image[None].copy()).to(self._place)

    def begin(self, slot: int, frame: np.ndarray | None, adapt_scale: bool = False, motion_scale: float = 1.0) -> None:
        """As in `Frames`, without `adapt_scale` and `motion_scale`."""
        if self._source is None or adapt_scale or motion_scale != 1:
            raise InputError("a peer's session needs a source, and has no adapted scale")
        first = None if frame is None else torch.from_numpy(frame[None].copy()).to(self._place)
        with self._settings():
            self._session.begin(self._source, first)

    def submit(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Pending:
        """As in `Frames`; the batch is exactly as large as asked for."""
        while len(self._pending) >= self.ahead:
            self._pending.popleft().wait()
        into, out = self._staged(len(frames))
        for row, frame in zip(into.numpy(), frames, strict=True):
            row[:] = frame
        with self._settings():
            out.copy_(self._run(into.to(self._place, non_blocking=True)), non_blocking=True)
        pending = _Enqueued(out, self._event() if self._gpu else None)
        self._pending.append(pending)
        return pending

    def keypoints(self, image: np.ndarray) -> KeyPoints:
        """Peers are measured, not asked."""
        raise InputError("a peer of the benchmark drives frames only")

    def timed(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Times:
        """As in `Frames`."""
        if not self._gpu:
            start = time.perf_counter()
            self.submit(slots, frames).result()
            wall = time.perf_counter() - start
            return Times(wall, 0.0, wall, 0.0)
        start = time.perf_counter()
        into, out = self._staged(len(frames))
        for row, frame in zip(into.numpy(), frames, strict=True):
            row[:] = frame
        with self._settings():
            events = [self._event(timing=True)]
            pixels = into.to(self._place, non_blocking=True)
            events.append(self._event(timing=True))
            images = self._run(pixels)
            events.append(self._event(timing=True))
            out.copy_(images, non_blocking=True)
            events.append(self._event(timing=True))
        events[-1].synchronize()
        out.clone()
        wall = time.perf_counter() - start
        upload, device, download = (1e-3 * a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))
        return Times(wall, upload, device, download)

    def stages(self, batch: int) -> Mapping[str, Callable[[], None]]:
        """None are known."""
        return {}

    def close(self) -> None:
        """As in `Frames`."""
        while self._pending:
            self._pending.popleft().wait()
        self._staging.clear()

    def _staged(self, batch: int) -> tuple[Tensor, Tensor]:
        if batch not in self._staging:
            shape = (batch, self.size, self.size, 3)
            self._staging[batch] = [
                tuple(torch.empty(shape, dtype=torch.uint8, pin_memory=self._gpu) for _ in range(2))  # type: ignore[misc]
                for _ in range(self.ahead)
            ]
        self._turn += 1
        return self._staging[batch][self._turn % self.ahead]

    def _event(self, timing: bool = False) -> Any:
        event = torch.cuda.Event(enable_timing=timing)
        event.record()
        return event

    @contextmanager
    def _settings(self) -> Iterator[None]:
        cudnn = torch.backends.cudnn
        with torch.no_grad(), cudnn.flags(enabled=True, benchmark=self._benchmark, allow_tf32=False):
            yield


class _Enqueued:
    """A batch under way."""

    def __init__(self, out: Tensor, event: Any) -> None:
        self._out, self._event = out, event
        self._kept: np.ndarray | None = None

    def wait(self) -> None:
        """Keep the images before their staging is used again."""
        if self._kept is None:
            if self._event is not None:
                self._event.synchronize()
            self._kept = self._out.numpy().copy()

    def done(self) -> bool:
        return self._kept is not None or self._event is None or self._event.query()

    def result(self) -> np.ndarray:
        self.wait()
        assert self._kept is not None
        return self._kept
