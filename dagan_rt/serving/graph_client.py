"""Sessions on a server of the layout "graphs", which keeps nothing between requests: `AsyncGraphSession`.

What a session keeps are the tensors that `dagan_open` makes of the source, and the key points of the initial frame. The
server writes them into memory that this process shares with it, and reads them there for every frame: of all that, only
names travel. Where nothing can be shared they come here and go back with every frame; that works, and takes as much
longer as their megabytes take. A server that restarts has nothing to remember; the tensors are made anew, as it maps
the memory anew.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.images import ENCODINGS, center_square, decode_image
from dagan_rt.keypoints import KeyPoints
from dagan_rt.serving.protocol import (
    DRIVE_MODEL,
    FRAME,
    IMAGE,
    KEYPOINTS_MODEL,
    OPEN_MODEL,
    POINTS,
    Settings,
)
from dagan_rt.serving.sessions import FAREWELL, AsyncSession, Deadline, Picture, _Course, _Patience, _Turn
from dagan_rt.serving.transport import Call, CudaRegion, Failure, Place, Region, Transport
from dagan_rt.transfer import movement_scale

if TYPE_CHECKING:
    from dagan_rt.serving.asynchronous import AsyncClient

TYPES = {"TYPE_FP32": "float32", "TYPE_FP16": "float16", "TYPE_UINT8": "uint8"}
ALIGNED = 64  # bytes, of tensors in shared memory
MOST_VALUES = 1 << 28  # of one tensor
INITIAL, SCALE = "initial_", "scale"


@dataclass(frozen=True)
class Shape:
    """One tensor of a request for one face."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """The tensors of a session, as the server's ensembles name them; they differ from variant to variant."""

    kept: Mapping[str, Shape]  # what `dagan_open` gives
    points: Mapping[str, Shape]  # what `dagan_keypoints` gives; `dagan_drive` takes them as initial_*

    @classmethod
    async def read(cls, transport: Transport) -> Layout:
        """From the server's configs; Failure if a model is missing, InputError if they do not fit one another."""
        opens, finds, drives = [
            await transport.config(name) for name in (OPEN_MODEL, KEYPOINTS_MODEL, DRIVE_MODEL)
        ]  # fmt: skip
        kept, points, taken = _shapes(opens, "output"), _shapes(finds, "output"), _shapes(drives, "input")
        given = {**kept, **{f"{INITIAL}{name}": shape for name, shape in points.items()}}
        rest = {name for name, shape in taken.items() if given.get(name) != shape}
        if rest != {FRAME, SCALE} or set(points) != set(POINTS):
            raise InputError(f"the models {OPEN_MODEL} and {DRIVE_MODEL} of {transport.address} do not belong together")
        return cls(kept, points)

    @property
    def tensors(self) -> dict[str, Shape]:
        """All that is kept in memory, under the names that `dagan_drive` has for it."""
        return {**self.kept, **{f"{INITIAL}{name}": shape for name, shape in self.points.items()}}


@dataclass(eq=False)
class _State(_Course):
    """A source, with its tensors: in a region or in arrays."""

    region: Region | None = None
    places: dict[str, Place] = field(default_factory=dict)  # of tensors in the region, all of them
    tensors: dict[str, Place | np.ndarray] = field(default_factory=dict)  # what every frame is sent with
    scale: float = 1.0

    def keep(self, names: Iterable[str], found: Mapping[str, np.ndarray], role: str = "") -> None:
        """Have frames take these from now on: from where the server has put them, or from its answer."""
        for name in names:
            self.tensors[role + name] = self.places[role + name] if self.region else found[name]

    def points(self, role: str) -> KeyPoints:
        """The key points of the source ("source_") or the initial face ("initial_"), copied out of the region."""
        arrays = []
        for tensor in (self.tensors[f"{role}{name}"] for name in POINTS):
            if isinstance(tensor, Place):
                assert self.region is not None
                data = self.region.read(0).data[tensor.offset : tensor.offset + tensor.nbytes]
                tensor = np.frombuffer(data, tensor.dtype).reshape(tensor.shape)
            arrays.append(tensor)
        return KeyPoints(*arrays)


class AsyncGraphSession(AsyncSession):
    """As `AsyncSession`, on the ensembles."""

    def __init__(
        self, client: AsyncClient, layout: Layout, motion: str, adapt_scale: bool, motion_scale: float,
        encoding: str | None, quality: int, ahead: int, sharing: bool | str,
    ) -> None:  # fmt: skip
        if encoding is not None:
            raise InputError(f"the layout graphs takes raw images alone, got encoding={encoding!r}: leave it out")
        super().__init__(client, motion, adapt_scale, motion_scale, encoding, quality, ahead, sharing)
        self._layout, self._motion_scale = layout, motion_scale
        self._every_turn = [self._turns.get_nowait() for _ in range(self.ahead)]
        for turn in self._every_turn:
            self._turns.put_nowait(turn)
        self._late: set[asyncio.Future[Any]] = set()  # requests for tensors that nobody waits for any more

    @property
    def spare(self) -> None:
        """None: its memory holds more than images, and is laid out by itself."""
        return None

    async def drive_many(
        self, frames: Iterable[Picture] | AsyncIterable[Picture], timeout: float | None = None
    ) -> AsyncIterator[np.ndarray]:
        """As `stream`: there are no sequences, and requests of one session share batches."""
        async for image in self.stream(frames, timeout):
            yield image

    async def reset(self, timeout: float | None = None) -> None:
        """Forget the initial frame: the next one becomes it. Waits for the frames under way."""
        if self._relative:
            async with self._alone(self._client.deadline(timeout)):
                self._current().initial = None

    async def keypoints(self, image: Picture, timeout: float | None = None) -> KeyPoints:
        """The key points of any face, NumPy [1, K, 2] and [1, K, 2, 2]; the session stays as it is."""
        checked = await self._packed(self._checked("image", image))
        deadline = self._client.deadline(timeout)
        async with self._turn(deadline) as turn:
            course = self._current()
            call = Call(KEYPOINTS_MODEL, {FRAME: checked[None]}, dict.fromkeys(POINTS))
            found = await self._served_by(course, lambda: self._sent(call, turn, deadline), deadline)
        return KeyPoints(*(np.asarray(found[name]) for name in POINTS))

    # ------------------------------------------------------------------------------------------------------------------
    # frames

    async def _packed(self, frame: Picture, name: str = "frame") -> np.ndarray:
        """As it travels: raw. A file is decoded here, as the other layout's server does it there."""
        return await asyncio.to_thread(self._decoded, frame, name) if isinstance(frame, bytes) else frame

    def _decoded(self, data: bytes, name: str) -> np.ndarray:
        return center_square(decode_image(data, name, ENCODINGS, Settings.most_pixels), self.size)

    async def _begun(self, course: _Course, frame: Picture, turn: _Turn, deadline: Deadline) -> np.ndarray:
        assert isinstance(course, _State) and isinstance(frame, np.ndarray)
        kept = frame.copy()
        await self._served_by(course, lambda: self._begin(course, kept, deadline), deadline)
        course.initial = kept
        return await self._driven(course, frame, turn, deadline)

    async def _driven(self, course: _Course, frame: Picture, turn: _Turn, deadline: Deadline) -> np.ndarray:
        assert isinstance(course, _State) and isinstance(frame, np.ndarray)

        async def attempt() -> np.ndarray:
            region, state = self._region, course.region
            tensors = {**course.tensors, SCALE: np.full((1, 1), course.scale, np.float32)}
            try:
                if region is None:
                    call = Call(DRIVE_MODEL, {FRAME: frame[None], **tensors}, {IMAGE: None})
                    return await self._image(await self._sent(call, turn, deadline))
                there, back = 2 * turn.number, 2 * turn.number + 1
                region.write(there, frame)
                call = Call(DRIVE_MODEL, {FRAME: region.place(there), **tensors}, {IMAGE: region.place(back)})
                await self._sent(call, turn, deadline)
                return region.read(back)[0]
            except Failure as failure:
                if failure.unplaced:
                    self._lose(course, state)
                raise

        return await self._served_by(course, attempt, deadline)

    # ------------------------------------------------------------------------------------------------------------------
    # state

    async def _open(self, source: Picture, deadline: Deadline) -> None:
        taken = (await self._packed(self._checked("source", source), "source")).copy()
        course = self._course = _State(taken, DRIVE_MODEL)
        await deadline.wait(self._share())
        await self._started(course, deadline)

    async def _change(self, source: Picture, deadline: Deadline) -> None:
        taken = (await self._packed(source, "source")).copy()
        async with self._alone(deadline):
            former, course = self._current(), _State(taken, DRIVE_MODEL)
            try:
                await self._started(course, deadline)
            except BaseException:
                self._lose(course, course.region)
                raise
            self._course = course
            await self._end(former)

    async def _started(self, course: _Course, deadline: Deadline) -> None:
        """See that the tensors are there."""
        assert isinstance(course, _State)
        if course.started:
            return
        await deadline.wait(course.starting.acquire())
        try:
            patience = _Patience(self, deadline)
            while not course.started:
                shared = self._region
                try:
                    await self._compute(course, deadline)
                    course.started = True
                except Failure as failure:
                    if failure.unplaced:
                        await deadline.wait(self._share(shared))
                    else:
                        await patience.after(failure)
        finally:
            course.starting.release()

    async def _compute(self, course: _State, deadline: Deadline) -> None:
        """The source's tensors; the initial key points, too, if the session has begun or has none of its own."""
        if self._region is not None and course.region is None:
            await deadline.wait(self._place(course))
        names = self._layout.kept
        call = Call(
            OPEN_MODEL, {IMAGE: np.asarray(course.source)[None]}, {name: course.places.get(name) for name in names}
        )
        course.keep(names, await self._ask(course, call, deadline))
        if not self._relative:
            course.tensors |= {f"{INITIAL}{name}": course.tensors[f"source_{name}"] for name in self._layout.points}
        elif course.initial is not None:
            await self._begin(course, np.asarray(course.initial), deadline)

    async def _begin(self, course: _State, frame: np.ndarray, deadline: Deadline) -> None:
        """Take the initial key points from a frame."""
        names = self._layout.points
        outputs = {name: course.places.get(f"{INITIAL}{name}") for name in names}
        course.keep(
            names, await self._ask(course, Call(KEYPOINTS_MODEL, {FRAME: frame[None]}, outputs), deadline), INITIAL
        )
        adapted = self._options["adapt_scale"]
        scale = movement_scale(course.points("source_"), course.points(INITIAL)) if adapted else 1.0
        course.scale = scale * self._motion_scale

    async def _ask(self, course: _State, call: Call, deadline: Deadline) -> dict[str, np.ndarray]:
        """A request whose outputs the course keeps. One that is late may yet write: its memory is given up."""
        request = asyncio.ensure_future(self._client.transport.infer(call))
        region = course.region
        try:
            await asyncio.wait({request}, timeout=deadline.left)
            if not request.done():
                raise deadline.exceeded()
            found = request.result()
            if course.region is not region:
                raise Failure("UNAVAILABLE", "the memory for the session was given up meanwhile")
            return found
        except Failure as failure:
            if failure.unplaced:
                self._lose(course, region)
            raise
        finally:
            if not request.done():
                self._late.add(request)
                request.add_done_callback(self._forgotten)
                self._lose(course, region)

    def _forgotten(self, request: asyncio.Future[Any]) -> None:
        self._late.discard(request)
        if not request.cancelled():
            request.exception()  # which nobody wants to know

    async def _place(self, course: _State) -> None:
        """Map memory for the tensors together with the server; where that fails they travel."""
        places, end = {}, 0
        for name, tensor in self._layout.tensors.items():
            places[name] = end
            end += -(-tensor.nbytes // ALIGNED) * ALIGNED
        region: Region | None = None
        try:
            region = (CudaRegion if self._sharing == "cuda" else Region)(1, (end,))
            await self._client.transport.share(region)
        except (Failure, OSError) as error:
            if region is not None:
                region.close()
            if isinstance(error, Failure) and error.passing:
                raise
            if self._sharing != "auto":
                raise InputError(
                    f"the server at {self._served.url} and this program share no memory: {error}"
                ) from None
            return
        whole = region.place(0)
        course.places = {
            name: Place(whole.region, whole.offset + places[name], tensor.shape, tensor.dtype)
            for name, tensor in self._layout.tensors.items()
        }
        course.region = region

    def _lose(self, course: _State, region: Region | None) -> asyncio.Future[None] | None:
        """Compute the tensors anew for the next frame, unless that has happened since they were in `region`."""
        if course.region is not region:
            return None
        course.started, course.region, course.places, course.tensors = False, None, {}, {}
        if region is None:
            return None
        task = asyncio.ensure_future(self._free(region))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)
        return task

    async def _free(self, region: Region) -> None:
        """Unmap it there and here, once no request can use it any more."""
        requests = {turn.request for turn in self._every_turn if turn.request is not None} | self._late
        if pending := {request for request in requests if not request.done()}:
            await asyncio.wait(pending)
        with contextlib.suppress(Failure, InputError, asyncio.TimeoutError):  # the server, or the client, is gone
            await asyncio.wait_for(self._client.transport.unshare(region), FAREWELL)
        region.close()

    async def _end(self, course: _Course) -> None:
        """The server keeps nothing but the mapping."""
        assert isinstance(course, _State)
        if (freed := self._lose(course, course.region)) is not None:
            await asyncio.wait({freed}, timeout=FAREWELL)

    @contextlib.asynccontextmanager
    async def _alone(self, deadline: Deadline) -> AsyncIterator[None]:
        """Wait for the frames under way, and let no other one begin."""
        async with self._changing, contextlib.AsyncExitStack() as turns:
            for _ in range(self.ahead):
                await turns.enter_async_context(self._turn(deadline))
            yield


def _shapes(config: Mapping[str, Any], side: str) -> dict[str, Shape]:
    """The inputs or outputs of a model, for one face. A server is not to be trusted with their sizes."""
    batch = (1,) if int(config.get("max_batch_size", 0)) else ()
    shapes = {}
    for entry in config.get(side, []):
        shape = (*batch, *(int(size) for size in entry["dims"]))
        if entry["data_type"] not in TYPES or min(shape) < 1 or np.prod(shape, dtype=float) > MOST_VALUES:
            raise InputError(f"tensor {entry['name'][:80]!r} of {config['name']} is none of dagan-rt: {shape}")
        shapes[entry["name"]] = Shape(shape, TYPES[entry["data_type"]])
    return shapes
