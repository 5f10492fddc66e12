"""A server from the client's side, in asyncio: what it has, and the sessions that are opened on it.

The blocking `Client` is built on this.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.serving import protocol
from dagan_rt.serving.graph_client import AsyncGraphSession, Layout
from dagan_rt.serving.sessions import AsyncSession, Deadline, Picture
from dagan_rt.serving.transport import Address, Failure, ServerUnavailable, Transport
from dagan_rt.tables import printable

TIMEOUT = 30.0  # seconds
AHEAD = 4  # frames of one session under way: enough to hide the way there and back


@dataclass(frozen=True)
class Served:
    """What a server has: its address and version, and the model behind it."""

    url: str
    server: str
    model: str
    size: int  # side of an image, pixels
    parameters: Mapping[str, str]  # of the model's configuration
    many: bool  # whether chunks of video can be sent

    @property
    def name(self) -> str:
        """Variant, precision and hash, as far as the server states them."""
        stated = [self.parameters.get(key, "") for key in ("variant", "precision")]
        if digest := self.parameters.get("bundle_sha256"):
            stated.append(f"bundle {digest[:12]}")
        return ", ".join(filter(None, stated)) or f"model {self.model}"

    @property
    def queue(self) -> int:
        """Frames of one session that the server takes before it refuses."""
        stated = self.parameters.get("queue", "")
        return int(stated) if stated.isdigit() else protocol.Settings.queue

    def describe(self) -> str:
        """A table for a person to read."""
        rows = {"server": f"{self.server} at {self.url}", "model": self.model, "image size": f"{self.size} pixels"}
        shown = ("variant", "precision", "bundle_sha256", "backend", "sequences", "queue", "batch", "idle")
        rows |= {key: self.parameters[key] for key in shown if key in self.parameters}
        rows["video"] = "in chunks, too" if self.many else "frame by frame"
        return "\n".join(f"{name:<14}{printable(value)}" for name, value in rows.items())


class AsyncClient:
    """A server that holds a model, to open sessions on.

    async with AsyncClient("grpc://host:8001") as client:
        session = await client.open(image)
        shown = await session.drive(frame)

    It belongs to the event loop in which it connects.
    """

    def __init__(
        self,
        url: str,
        model: str = protocol.MODEL,
        timeout: float | None = None,
        shared_memory: bool | str = "auto",
    ) -> None:
        """url: "grpc://host:8001" or "http://host:8000"; grpcs and https for TLS.

        timeout: seconds that anything may take unless it is said there; None: 30.
        shared_memory: whether raw images pass through memory that both processes map. "auto": if the server is on
            this host and can; True: or fail; "cuda": through memory of the GPU; False: never.

        Raises InputError for an address or a value that is none. Nothing is sent before `connect`.
        """
        if shared_memory not in (True, False, "auto", "cuda"):
            raise InputError(f"shared_memory must be True, False, 'auto' or 'cuda', got {shared_memory!r}")
        self.address, self.model, self.timeout = Address.parse(url), model, TIMEOUT if timeout is None else timeout
        if not self.timeout > 0:
            raise InputError(f"timeout must be more than 0 seconds, got {timeout}")
        self._sharing = shared_memory
        self._transport: Transport | None = None
        self._served: Served | None = None
        self._layout: Layout | None = None  # of a server that has the layout "graphs" alone, or where it was asked for
        self._sessions: set[AsyncSession] = set()

    @property
    def served(self) -> Served:
        """What the server has."""
        if self._served is None:
            raise InputError(f"the client of {self.address} is not connected")
        return self._served

    @property
    def transport(self) -> Transport:
        if self._transport is None:
            raise InputError(f"the client of {self.address} is not connected")
        return self._transport

    async def connect(self) -> AsyncClient:
        """Find out what the server has.

        Raises ServerUnavailable if nobody answers or the model is not ready, InputError if the server has no such
        model or one that is not of this program, MissingPackage without tritonclient.
        """
        if self._transport is None:
            self._transport = Transport(self.address)
            try:
                self._served = await self.deadline(None).wait(self._look())
            except BaseException:
                await self.close()
                raise
        return self

    async def open(
        self,
        source: Picture,
        motion: str = "relative",
        adapt_scale: bool = False,
        *,
        motion_scale: float = 1.0,
        encoding: str | None = None,
        quality: int = 95,
        ahead: int = AHEAD,
        timeout: float | None = None,
    ) -> AsyncSession:
        """Start a session; waits until the server has computed the source.

        source: uint8 [size, size, 3], or a JPEG, PNG or WebP file in memory, cropped and resampled there.
        motion, adapt_scale, motion_scale: as for `Reenactor`; an older server refuses a `motion_scale` that is not 1.
        encoding, quality: how frames and images travel, "JPEG", "PNG" or "WEBP", where the network is slow; None: raw.
        ahead: frames that may be under way at once; the server's queue bounds it.

        Raises InputError for a wrong argument, ServerBusy if all sequences stay taken, or as `AsyncSession.drive`.
        """
        arguments = (motion, adapt_scale, motion_scale, encoding, quality, ahead, self._sharing)
        layout = self._layout
        session = AsyncSession(self, *arguments) if layout is None else AsyncGraphSession(self, layout, *arguments)
        try:
            await session._open(source, self.deadline(timeout))
        except BaseException:
            await session.close()
            raise
        self._sessions.add(session)
        return session

    async def close(self) -> None:
        """End all sessions and the connection. May be called twice."""
        await asyncio.gather(*(session.close() for session in list(self._sessions)))
        if self._transport is not None:
            transport, self._transport = self._transport, None
            await transport.close()

    async def abandon(self) -> None:
        """Break the connection and say nothing to the server, as a program that is killed."""
        for session in self._sessions:
            session._abandon()
        self._sessions.clear()
        await self.close()

    async def __aenter__(self) -> AsyncClient:
        return await self.connect()

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self.timeout if timeout is None else timeout, f"the server at {self.address}")

    async def alive(self) -> bool:
        """Whether the server says so within a second."""
        try:
            return await asyncio.wait_for(self.transport.live(), 1.0)
        except (Failure, asyncio.TimeoutError):
            return False

    async def _look(self) -> Served:
        transport, model = self.transport, self.model
        try:
            live = await transport.live()
        except Failure as failure:
            raise ServerUnavailable(f"no server answers at {self.address}: {failure}") from None
        if not live:
            raise ServerUnavailable(
                f"what answers at {self.address} is no inference server, or it is starting or ending"
            )
        try:
            if model == protocol.MODEL and not await self._offers(model) and await self._offers(protocol.DRIVE_MODEL):
                model = protocol.DRIVE_MODEL
            config = await transport.config(model)
            ready = await transport.ready(model)
            self._layout = await Layout.read(transport) if model == protocol.DRIVE_MODEL else None
        except Failure as failure:
            raise await self._lacking(model, failure) from None
        if not ready:
            raise ServerUnavailable(f"the model {model} of the server at {self.address} is not ready")
        many = self._layout is None and transport.address.is_grpc and await transport.ready(protocol.STREAM_MODEL)
        parameters = {key: str(entry.get("string_value", "")) for key, entry in config.get("parameters", {}).items()}
        return Served(str(self.address), await transport.version(), model, self._size(config), parameters, many)

    async def _offers(self, model: str) -> bool:
        with contextlib.suppress(Failure):  # some protocols call an unknown model not ready, others an error
            return await self.transport.ready(model)
        return False

    async def _lacking(self, model: str, failure: Failure) -> InputError:
        try:
            models = await self.transport.models()
        except Failure:  # servers may keep this to themselves
            models = {}
        if model in models:
            return ServerUnavailable(f"the server at {self.address} could not load {model}: {models[model]}")
        found = f"it has {', '.join(sorted(models))}" if models else str(failure)
        return InputError(f"the server at {self.address} has no model {model!r}: {found}")

    def _size(self, config: Mapping[str, Any]) -> int:
        """The side of the images, out of a model that takes sources and frames and gives images."""
        inputs = {entry["name"]: [int(size) for size in entry["dims"]] for entry in config.get("input", [])}
        outputs = {entry["name"] for entry in config.get("output", [])}
        shape = inputs.get(protocol.FRAME, [])[-3:]
        square = len(shape) == 3 and shape[0] == shape[1] > 0 and shape[2] == 3
        from_source = self._layout is not None or protocol.SOURCE in inputs
        if not square or not from_source or protocol.IMAGE not in outputs:
            raise InputError(f"the model {self.model} of the server at {self.address} is none of dagan-rt")
        return shape[0]
