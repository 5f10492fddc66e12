"""A gRPC server of KServe's v2 protocol around the real `Sequences`, in this process, which can fail on purpose.

The model is arithmetic, so that an image tells the source, the initial frame and the driving frame it was made of.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from dagan_rt.frames import Computed, Pending
from dagan_rt.keypoints import KeyPoints
from dagan_rt.serving.protocol import MODEL, NEEDS_START, STREAM_MODEL, Settings
from dagan_rt.serving.sequences import Sequences
from dagan_rt.streams import Streams

SIZE = 32
TYPES = {"UINT8": np.uint8, "BOOL": bool}
UNABLE = "Unable to find shared memory region: '{}'"


def drive(source: np.ndarray, initial: np.ndarray | None, frame: np.ndarray, scale: float = 1) -> np.ndarray:
    """What the model makes of them."""
    since = 0 if initial is None else 2 * initial.astype(int)
    return ((source.astype(int) + scale * (3 * frame.astype(int) - since)) % 256).astype(np.uint8)


class Arithmetic:
    """`Frames` of `drive`; while `gate` is closed, nothing is driven."""

    size, ahead, slot_bytes, fixed_bytes, batches = SIZE, 1, 0, 0, (1, 2, 4)

    def __init__(self, slots: int) -> None:
        self.slots, self.gate = slots, threading.Event()
        self.gate.set()
        self._slots: list[Any] = [None] * slots

    def set_source(self, slot: int, image: np.ndarray) -> None:
        self._slots[slot] = (image.copy(), None, 1)

    def begin(self, slot: int, frame: np.ndarray | None, adapt_scale: bool = False, motion_scale: float = 1.0) -> None:
        initial = None if frame is None else frame.copy()
        self._slots[slot] = (self._slots[slot][0], initial, motion_scale * (2 if adapt_scale else 1))

    def submit(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Pending:
        self.gate.wait(20)
        made = [
            drive(*self._slots[slot][:2], frame, self._slots[slot][2])
            for slot, frame in zip(slots, frames, strict=True)
        ]
        return Computed(np.stack(made))

    def keypoints(self, image: np.ndarray) -> KeyPoints:
        return KeyPoints(np.full((1, 3, 2), image.mean(), np.float32), np.zeros((1, 3, 2, 2), np.float32))

    def close(self) -> None:
        pass


class Twin(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The server. What it was asked stands in `calls`: (model, sequence, start, end, restart)."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.calls: list[tuple[str, int, bool, bool, bool]] = []
        self.regions: dict[str, mmap.mmap] = {}
        self.faults: deque[Callable[[Any], None]] = deque()  # each is called with the context of a step, in its place
        self.lost: deque[bool] = deque()  # each loses the answer of a step that was served
        self.models = {MODEL, STREAM_MODEL}
        self.unloaded: dict[str, str] = {}  # models, and why they are not
        self.shares = True
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; on the former port, if there was one."""
        self.frames = Arithmetic(self.settings.sequences + 2)
        arguments = {"most": self.settings.sequences, "deadline": 0.0, "queue": self.settings.queue}
        self._streams = {model: Streams(self.frames, **arguments) for model in (MODEL,)}
        self._streams[STREAM_MODEL] = Streams(Arithmetic(self.settings.sequences + 2), **arguments)
        self.sequences = {model: Sequences(streams, self.settings) for model, streams in self._streams.items()}
        self._known: set[tuple[str, int]] = set()
        self.regions.clear()
        self._server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        """As a crash: connections break, and all is forgotten."""
        self._server.stop(None).wait()
        self.frames.gate.set()
        for sequences in self.sequences.values():
            sequences.close()

    @property
    def starts(self) -> list[tuple[str, int, bool, bool, bool]]:
        return [call for call in self.calls if call[2]]

    # what the protocol asks for

    def ServerLive(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name in self.models)

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(name="twin", version="1")

    def RepositoryIndex(self, request: Any, context: Any) -> Any:
        rows = [{"name": name, "state": "READY"} for name in (*self.models, "other")]
        rows += [{"name": name, "reason": reason} for name, reason in self.unloaded.items()]
        return service_pb2.RepositoryIndexResponse(models=rows)

    def ModelConfig(self, request: Any, context: Any) -> Any:
        if request.name not in (*self.models, "other"):
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        own = {"size": str(SIZE), "variant": "dagan", "precision": "fp32", "bundle_sha256": 64 * "a"}
        config = {
            "name": request.name,
            "input": [{"name": name, "dims": [SIZE, SIZE, 3]} for name in ("frame", "source")],
            "output": [{"name": "image", "dims": [SIZE, SIZE, 3]}],
            "parameters": {
                name: {"string_value": value} for name, value in (own | self.settings.to_parameters()).items()
            },
        }
        return service_pb2.ModelConfigResponse(config=config if request.name != "other" else {"name": "other"})

    def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        path = Path("/dev/shm") / request.key.lstrip("/")
        if not self.shares or not path.exists():
            context.abort(grpc.StatusCode.INTERNAL, f"Unable to open shared memory region: '{request.key}'")
        with path.open("r+b") as file:
            self.regions[request.name] = mmap.mmap(file.fileno(), request.byte_size)
        return service_pb2.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        self.regions.pop(request.name, None)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    def ModelInfer(self, request: Any, context: Any) -> Any:
        taken = self._take(request, context, many=False)
        if not taken.start and not taken.end and self.faults:
            self.faults.popleft()(context)
        self.sequences[request.model_name].accept(taken)
        response = next(taken.responses(context))
        if not taken.start and self.lost and self.lost.popleft():
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        return response

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            taken = self._take(request, context, many=request.model_name == STREAM_MODEL)
            if not (taken.many or taken.start or taken.end) and self.faults:
                self.faults.popleft()(context)
            self.sequences[request.model_name].accept(taken)
            for response in taken.responses(context):
                yield service_pb2.ModelStreamInferResponse(infer_response=response)

    def _take(self, request: Any, context: Any, many: bool) -> _Request:
        if request.model_name not in self.models:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.model_name}' is not found")
        taken = _Request(self, request, context, many)
        key = (request.model_name, taken.sequence)
        self.calls.append((*key, taken.start, taken.end, bool(taken.parameters.get("restart"))))
        if not taken.start and key not in self._known:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a request {NEEDS_START} on the first of a sequence")
        (self._known.discard if taken.end else self._known.add)(key)
        return taken


class _Request:
    """A `sequences.Request` of gRPC's."""

    def __init__(self, twin: Twin, request: Any, context: Any, many: bool) -> None:
        self._twin, self._request, self.many = twin, request, many
        given = {name: getattr(each, each.WhichOneof("parameter_choice")) for name, each in request.parameters.items()}
        self.sequence = given.pop("sequence_id", 0)
        self.start, self.end = given.pop("sequence_start", False), given.pop("sequence_end", False)
        self.parameters: Mapping[str, Any] = given
        self.wanted = [output.name for output in request.outputs] or ["image", "image_encoded", "kp_value"]
        self._places = {output.name: self._place(output, context) for output in request.outputs}
        raw = iter(request.raw_input_contents)
        self.inputs = {each.name: self._read(each, raw, context) for each in request.inputs}
        self._responses: SimpleQueue[Any] = SimpleQueue()

    def cancelled(self) -> bool:
        return False

    def answer(self, outputs: Mapping[str, np.ndarray], last: bool = True) -> None:
        response = service_pb2.ModelInferResponse(model_name=self._request.model_name)
        for name, array in outputs.items():
            array = array if array.dtype == np.float32 else array[None]
            kind = {"uint8": "UINT8", "float32": "FP32"}.get(str(array.dtype), "BYTES")
            response.outputs.add(name=name, datatype=kind, shape=array.shape)
            place = self._places.get(name)
            data = serialize_byte_tensor(array).item() if kind == "BYTES" else array.tobytes()
            if place is not None:
                region, offset = place
                region[offset : offset + len(data)] = data
            response.raw_output_contents.append(b"" if place is not None else data)
        self._responses.put((response, last))

    def refuse(self, status: str, message: str) -> None:
        self._responses.put(((status, message), True))

    def responses(self, context: Any) -> Iterator[Any]:
        last = False
        while not last:
            response, last = self._responses.get(timeout=30)
            if isinstance(response, tuple):
                context.abort(getattr(grpc.StatusCode, response[0]), response[1])
            yield response

    def _read(self, tensor: Any, raw: Iterator[bytes], context: Any) -> np.ndarray:
        place = self._place(tensor, context)
        if tensor.datatype == "BYTES":
            return deserialize_bytes_tensor(next(raw)).reshape(tensor.shape)
        if place is None:
            data = next(raw)
        else:
            region, offset = place
            data = region[offset : offset + int(np.prod(tensor.shape))]
        return np.frombuffer(data, TYPES[tensor.datatype]).reshape(tensor.shape).copy()

    def _place(self, tensor: Any, context: Any) -> tuple[mmap.mmap, int] | None:
        if "shared_memory_region" not in tensor.parameters:
            return None
        name = tensor.parameters["shared_memory_region"].string_param
        if name not in self._twin.regions:
            context.abort(grpc.StatusCode.NOT_FOUND, UNABLE.format(name))
        return self._twin.regions[name], tensor.parameters["shared_memory_offset"].int64_param


def eventually(check: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it comes true in that time."""
    end = time.monotonic() + seconds
    while not check() and time.monotonic() < end:
        time.sleep(0.005)
    return check()


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[Twin]:
    """A twin that is stopped afterwards."""
    twin = Twin(**settings)
    try:
        yield twin
    finally:
        twin.stop()
