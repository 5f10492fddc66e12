"""Requests to a server of KServe's v2 protocol, over gRPC or HTTP: addresses, errors, shared memory. All of it asyncio.

tritonclient does the talking; what goes wrong comes out as one exception that says whether coming back helps.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import shared_memory
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from dagan_rt.errors import InputError, require
from dagan_rt.serving.protocol import NEEDS_START, UNKNOWN_OPTION, Parameter

PORTS = {"grpc": 8001, "grpcs": 8001, "http": 8000, "https": 8000}
MOST_RECEIVED = 256 << 20  # bytes of one message; an image of 4096 pixels has 48 MiB
TYPES = {"uint8": "UINT8", "bool": "BOOL", "float32": "FP32", "float16": "FP16", "object": "BYTES"}
HTTP_STATUS = {
    "400": "INVALID_ARGUMENT", "404": "NOT_FOUND", "409": "ALREADY_EXISTS", "429": "UNAVAILABLE", "502": "UNAVAILABLE",
    "503": "UNAVAILABLE", "504": "UNAVAILABLE",
}  # fmt: skip
# What Triton says of a model that is being loaded and of one that died, and gRPC of a connection that broke.
PASSING = ("unknown model", "is not healthy", "RST_STREAM", "Stream removed")
# A server that restarts is found again within a second, not within gRPC's two minutes.
GRPC_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", MOST_RECEIVED),
]


class ServingError(InputError):
    """A server did not do what was asked; the message names it."""


class ServerUnavailable(ServingError):
    """No server answers there, or it cannot be reached any more."""


class ServerBusy(ServingError):
    """The server is there, and kept refusing for want of room until the deadline."""


class SessionLost(ServingError):
    """The server forgets the session again and again, however often it is started."""


class DeadlineExceeded(ServingError):
    """No answer came in the time that was given."""


class ServerError(ServingError):
    """Something broke in the server."""


class Failure(Exception):
    """A request that was not served."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def unplaced(self) -> bool:
        """The server does not know our shared memory (any more)."""
        return "shared memory region" in str(self)

    @property
    def lost(self) -> bool:
        """The server does not know the sequence (any more): START brings it back."""
        unknown = self.status == "NOT_FOUND" and "unknown model" not in str(self) and not self.unplaced
        return unknown or NEEDS_START in str(self)

    @property
    def older(self) -> bool:
        """The server does not know a parameter that this client sent."""
        return UNKNOWN_OPTION in str(self)

    @property
    def passing(self) -> bool:
        """Nobody is there, there is no room, or the model died or is being loaded: it may succeed later."""
        return self.status in ("UNAVAILABLE", "CANCELLED") or any(phrase in str(self) for phrase in PASSING)


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> Address:
        """ "grpc://host:8001", "http://host:8000", or either with an s; without a port, these."""
        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme, parts.hostname, parts.port
        except ValueError as error:
            raise InputError(f"server address {url[:200]!r} cannot be used: {error}") from None
        more = parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None
        if scheme not in PORTS or not host or more:
            raise InputError(f"a server's address must be like grpc://host:8001 or http://host:8000, got {url[:200]!r}")
        return cls(scheme, host, port or PORTS[scheme])

    @property
    def is_grpc(self) -> bool:
        return self.scheme.startswith("grpc")

    @property
    def is_local(self) -> bool:
        """Whether it is a loopback address, so that the server may share this host's memory."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}"


@dataclass(frozen=True)
class Place:
    """A stretch of a registered region."""

    region: str
    offset: int
    shape: tuple[int, ...]
    dtype: str = "uint8"

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Call:
    """One request."""

    model: str
    inputs: Mapping[str, np.ndarray | Place]
    outputs: Mapping[str, Place | None]  # where each goes; None: into the answer
    sequence: int = 0
    start: bool = False
    end: bool = False
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


class Transport:
    """The connection to one server; made, used and closed in one event loop."""

    def __init__(self, address: Address) -> None:
        """Nothing is sent yet. Raises MissingPackage without tritonclient."""
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # a connection that breaks is our business, and not news
        for package in ("tritonclient", "grpc" if address.is_grpc else "aiohttp"):
            require(package, extra="triton", why=f"talking to {address}")
        self.address = address
        secure = address.scheme.endswith("s")
        if address.is_grpc:
            import tritonclient.grpc as module
            import tritonclient.grpc.aio as asynchronous

            self._client = asynchronous.InferenceServerClient(address.netloc, ssl=secure, channel_args=GRPC_OPTIONS)
        else:
            import tritonclient.http as module
            import tritonclient.http.aio as asynchronous

            self._client = asynchronous.InferenceServerClient(
                address.netloc, ssl=secure, conn_limit=1024, conn_timeout=86400.0
            )
        self._module = module

    async def close(self) -> None:
        await self._client.close()

    async def live(self) -> bool:
        """Whether the server says that it lives; Failure if nobody says anything."""
        return bool(await self._asked(self._client.is_server_live()))

    async def ready(self, model: str) -> bool:
        return bool(await self._asked(self._client.is_model_ready(model)))

    async def version(self) -> str:
        """The server's name and version."""
        found = await self._json(self._client.get_server_metadata)
        return f"{found.get('name', 'a server')} {found.get('version', '')}".strip()

    async def config(self, model: str) -> dict[str, Any]:
        """The model's config.pbtxt as the server has it."""
        found = await self._json(self._client.get_model_config, model)
        return dict(found.get("config", found))

    async def models(self) -> dict[str, str]:
        """All models of the repository, and the state or the reason of each."""
        found = await self._json(self._client.get_model_repository_index)
        rows = found.get("models", []) if isinstance(found, dict) else found
        return {row["name"]: row.get("reason") or row.get("state", "UNAVAILABLE") for row in rows}

    async def infer(self, call: Call) -> dict[str, np.ndarray]:
        """The outputs that come in the answer; those with a place are there then."""
        request = self.request(call)
        result = await self._asked(self._client.infer(**request))
        return _arrays(result, call)

    async def infer_many(self, call: Call) -> AsyncIterator[dict[str, np.ndarray]]:
        """The answers of a decoupled model to one request, as they come; gRPC alone has them."""
        import grpc

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield self.request(call)

        answers = self._client.stream_infer(requests(), headers={"triton_grpc_error": "true"})
        try:
            async for result, error in answers:
                if error is not None:
                    raise failure_of(error)
                yield _arrays(result, call)
        except grpc.RpcError as error:
            raise failure_of(error) from None
        finally:
            answers.cancel()

    async def share(self, region: Region) -> None:
        await self._asked(region.register(self._client))

    async def unshare(self, region: Region) -> None:
        await self._asked(region.unregister(self._client))

    def request(self, call: Call) -> dict[str, Any]:
        """A request as the arguments of tritonclient's `infer`, of either kind."""
        inputs = []
        for name, value in call.inputs.items():
            tensor = self._module.InferInput(name, list(value.shape), TYPES[str(value.dtype)])
            if isinstance(value, Place):
                tensor.set_shared_memory(value.region, value.nbytes, value.offset)
            else:
                tensor.set_data_from_numpy(value)
            inputs.append(tensor)
        outputs = []
        for name, place in call.outputs.items():
            wanted = self._module.InferRequestedOutput(name)
            if place is not None:
                wanted.set_shared_memory(place.region, place.nbytes, place.offset)
            outputs.append(wanted)
        return {
            "model_name": call.model, "inputs": inputs, "outputs": outputs or None, "sequence_id": call.sequence,
            "sequence_start": call.start, "sequence_end": call.end, "parameters": dict(call.parameters) or None,
        }  # fmt: skip

    async def _json(self, ask: Any, *arguments: str) -> Any:
        return await self._asked(ask(*arguments, **({"as_json": True} if self.address.is_grpc else {})))

    async def _asked(self, answer: Any) -> Any:
        try:
            return await answer
        except Exception as error:
            raise failure_of(error) from None


def _arrays(result: Any, call: Call) -> dict[str, np.ndarray]:
    found = {name: result.as_numpy(name) for name, place in call.outputs.items() if place is None}
    return {name: array for name, array in found.items() if array is not None}


def failure_of(error: BaseException) -> Failure:
    """What tritonclient and those below it raise, in one form."""
    from tritonclient.utils import InferenceServerException

    if isinstance(error, InferenceServerException):
        status = str(error.status() or "UNKNOWN").removeprefix("StatusCode.")
        return Failure(HTTP_STATUS.get(status, status), str(error.message() or error))
    if (code := getattr(error, "code", None)) is not None and callable(code):  # gRPC's own
        return Failure(code().name, error.details() or "no details")  # type: ignore[attr-defined]
    if isinstance(error, (OSError, asyncio.TimeoutError)) or type(error).__module__.startswith("aiohttp"):
        return Failure("UNAVAILABLE", (str(error) or type(error).__name__).splitlines()[0][:300])
    return Failure("INTERNAL", f"{type(error).__name__}: {error}")


class Region:
    """Memory of this host that the server maps too, for a number of images, under a name that nobody can guess.

    The name is gone as soon as the server has mapped it: nothing stays behind, however this process ends.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self._name, self._shape, self._stride = f"dagan_rt_{secrets.token_hex(16)}", shape, int(np.prod(shape))
        self._memory = shared_memory.SharedMemory(self._name, create=True, size=count * self._stride)
        self._named = True

    def place(self, number: int) -> Place:
        return Place(self._name, number * self._stride, self._shape)

    async def register(self, client: Any) -> None:
        try:
            await client.register_system_shared_memory(self._name, f"/{self._name}", self._memory.size)
        finally:
            self._forget_name()

    async def unregister(self, client: Any) -> None:
        """Only when no request that uses it is under way: the server would write into memory it does not have."""
        await client.unregister_system_shared_memory(self._name)

    def write(self, number: int, image: np.ndarray) -> None:
        np.copyto(self._view(number), image)

    def read(self, number: int) -> np.ndarray:
        """A copy."""
        return self._view(number).copy()

    def close(self) -> None:
        self._forget_name()
        self._memory.close()

    def _view(self, number: int) -> np.ndarray:
        return np.ndarray(self._shape, np.uint8, buffer=self._memory.buf, offset=number * self._stride)

    def _forget_name(self) -> None:
        if self._named:
            self._named = False
            self._memory.unlink()


class CudaRegion(Region):
    """As `Region`, in the memory of this host's first GPU, one allocation an image, for a model that runs there."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        try:
            from tritonclient.utils import cuda_shared_memory
        except (ImportError, RuntimeError) as error:
            raise InputError(f"shared_memory='cuda' needs the package cuda-python: {error}") from None
        self._cuda, self._shape, self._stride = cuda_shared_memory, shape, int(np.prod(shape))
        self._names = [f"dagan_rt_{secrets.token_hex(16)}" for _ in range(count)]
        try:
            self._parts = {name: self._cuda.create_shared_memory_region(name, self._stride, 0) for name in self._names}
        except cuda_shared_memory.CudaSharedMemoryException as error:
            raise InputError(f"memory of the GPU cannot be shared: {error}") from None

    def place(self, number: int) -> Place:
        return Place(self._names[number], 0, self._shape)

    async def register(self, client: Any) -> None:
        for name, part in self._parts.items():
            await client.register_cuda_shared_memory(name, self._cuda.get_raw_handle(part), 0, self._stride)

    async def unregister(self, client: Any) -> None:
        for name in self._names:
            await client.unregister_cuda_shared_memory(name)

    def write(self, number: int, image: np.ndarray) -> None:
        self._cuda.set_shared_memory_region(self._parts[self._names[number]], [np.ascontiguousarray(image)])

    def read(self, number: int) -> np.ndarray:
        part = self._parts[self._names[number]]
        return np.array(self._cuda.get_contents_as_numpy(part, np.uint8, list(self._shape)))

    def close(self) -> None:
        for part in self._parts.values():
            self._cuda.destroy_shared_memory_region(part)
