"""One portrait on a server, in asyncio: `AsyncSession`, which `AsyncClient` opens.

A session is a sequence on the server, and all that it takes to start it there again: its source and its initial frame.
Whatever ends the sequence (a server that restarts, idle time, a broken connection), START brings it back and the frame
under way is sent again. That is safe, because an image depends on source, initial frame and driving frame alone: a
sequence's id stands for one source and one initial frame, and never for others.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.images import ENCODINGS, decode_image, encode_image
from dagan_rt.keypoints import KeyPoints
from dagan_rt.reenactor import check_image, check_motion
from dagan_rt.serving import protocol
from dagan_rt.serving.transport import (
    Call,
    CudaRegion,
    DeadlineExceeded,
    Failure,
    Region,
    ServerBusy,
    ServerError,
    ServerUnavailable,
    ServingError,
    SessionLost,
)

if TYPE_CHECKING:
    from dagan_rt.serving.asynchronous import AsyncClient

FIRST_WAIT, LONGEST_WAIT = 0.02, 1.0  # seconds between attempts
LOSSES = 5  # times that one frame's sequence may be lost before it is given up
FAREWELL = 2.0  # seconds that closing may take
Picture = np.ndarray | bytes  # an image, or a file of one in memory
T = TypeVar("T")


class Deadline:
    """When to stop waiting."""

    def __init__(self, seconds: float, what: str) -> None:
        if not seconds > 0:
            raise InputError(f"timeout must be more than 0 seconds, got {seconds}")
        self._seconds, self._what = seconds, what
        self._end = asyncio.get_running_loop().time() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - asyncio.get_running_loop().time())

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """The result, or DeadlineExceeded; then it is cancelled."""
        try:
            return await asyncio.wait_for(awaitable, self.left)
        except asyncio.TimeoutError:
            raise self.exceeded() from None

    def exceeded(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self._what} gave no answer within {self._seconds:g} seconds")


@dataclass(eq=False)
class _Course:
    """One source and, with relative motion, one initial frame: what a sequence's id stands for."""

    source: Picture
    model: str
    initial: Picture | None = None  # once a frame was the first
    started: bool = False  # as far as we know
    known: bool = False  # whether the server may know it: a START that is refused leaves traces there, too
    starts: int = 0
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    beginning: asyncio.Lock = field(default_factory=asyncio.Lock)  # while the first frame is under way
    id: int = 0

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Another id, where it is not known what the server took the former one for."""
        self.id, self.started, self.known, self.starts = 1 + secrets.randbelow(2**63 - 1), False, False, 0


class _Turn:
    """A place among the frames under way, and the request that holds it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.request: asyncio.Future[Any] | None = None


class AsyncSession:
    """A portrait on a server, driven frame by frame; `AsyncClient.open` makes it.

    Its coroutines may run side by side: `ahead` frames are under way at most, and further ones wait for their turn.
    """

    def __init__(
        self,
        client: AsyncClient,
        motion: str,
        adapt_scale: bool,
        motion_scale: float,
        encoding: str | None,
        quality: int,
        ahead: int,
        sharing: bool | str,
    ) -> None:
        check_motion(motion, adapt_scale, motion_scale)
        if encoding not in (None, *ENCODINGS):
            raise InputError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
        for name, value, most in (("quality", quality, 95), ("ahead", ahead, 1024)):
            if not 1 <= value <= most:
                raise InputError(f"{name} must be 1 to {most}, got {value}")
        served = client.served
        self.size, self.ahead = served.size, min(ahead, served.queue)
        self._client, self._served = client, served
        self._relative, self._encoding, self._quality = motion == "relative", encoding, quality
        self._options: dict[str, protocol.Parameter] = {"motion": motion, "adapt_scale": adapt_scale}
        if motion_scale != 1:  # which older servers do not know
            self._options["motion_scale"] = float(motion_scale)
        self.starts = 0  # START requests that were sent so far: one, and more for sources, resets and reconnects
        self._course: _Course | None = None
        self._turns: asyncio.Queue[_Turn] = asyncio.Queue()
        for number in range(self.ahead):
            self._turns.put_nowait(_Turn(number))
        self._changing = asyncio.Lock()
        self._sharing = sharing if encoding is None else False
        self._region: Region | None = None
        self._placing = asyncio.Lock()
        self._ends: set[asyncio.Future[None]] = set()
        self._closed = False

    @property
    def running(self) -> tuple[str, int] | None:
        """Its model and its id on the server, where it is there and has its initial frame, as far as we know."""
        course = self._course
        if self._closed or course is None or not course.started or (self._relative and course.initial is None):
            return None
        return course.model, course.id

    @property
    def spare(self) -> tuple[Region, int, int] | None:
        """The shared memory, and the numbers of a frame and an image in it that no turn uses; None if there is none."""
        region = self._region
        return None if region is None or self._sharing == "cuda" else (region, 2 * self.ahead, 2 * self.ahead + 1)

    async def drive(self, frame: Picture, timeout: float | None = None) -> np.ndarray:
        """Give the source the expression and pose of a driving frame; as `Reenactor.drive`, on the server.

        frame: uint8 [size, size, 3], or a JPEG, PNG or WebP file in memory. Returns uint8 [size, size, 3].
        timeout: seconds, in which the session may be started anew and the frame sent again.

        Raises InputError for another frame, DeadlineExceeded, ServerUnavailable if the connection stays broken,
        ServerBusy if the server stays full, SessionLost if it keeps forgetting the session, ServerError if it broke;
        the session can still be used.
        """
        checked = self._checked("frame", frame)
        deadline = self._client.deadline(timeout)
        async with self._turn(deadline) as turn:
            course = self._current()
            if self._relative and course.initial is None:
                async with self._first(course, deadline):
                    if course.initial is None:
                        return await self._begun(course, await self._packed(checked), turn, deadline)
            return await self._driven(course, await self._packed(checked), turn, deadline)

    async def stream(
        self, frames: Iterable[Picture] | AsyncIterable[Picture], timeout: float | None = None
    ) -> AsyncIterator[np.ndarray]:
        """The images of all frames, in order, with `ahead` frames under way."""
        under_way: list[asyncio.Task[np.ndarray]] = []
        try:
            async for frame in _each(frames):
                under_way.append(asyncio.ensure_future(self.drive(frame, timeout)))
                while len(under_way) >= self.ahead or under_way and under_way[0].done():
                    yield await under_way.pop(0)
            while under_way:
                yield await under_way.pop(0)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def drive_many(
        self, frames: Iterable[Picture] | AsyncIterable[Picture], timeout: float | None = None
    ) -> AsyncIterator[np.ndarray]:
        """The images of all frames, in order; several travel in one request, and each comes back when it is ready.

        It takes a sequence of its own on the server, with this session's source and initial frame; without one, the
        first of `frames`. timeout: seconds for each image. Raises as `drive`, and InputError over HTTP.
        """
        if not self._served.many:
            raise InputError(
                f"chunks of video take gRPC and the model {protocol.STREAM_MODEL}, and {self._served.url} offers none: "
                "use stream"
            )
        current = self._current()
        course = _Course(current.source, protocol.STREAM_MODEL, current.initial)
        try:
            async for chunk in _chunks(frames, max(1, self._served.queue - 1)):
                checked = [await self._packed(self._checked("frame", frame)) for frame in chunk]
                async for image in self._driven_chunk(course, checked, timeout):
                    yield image
        finally:
            await self._end(course)

    async def set_source(self, image: Picture, timeout: float | None = None) -> None:
        """Animate another portrait from a new initial frame on; waits for the frames under way.

        Raises as `AsyncClient.open`; the former source stays then.
        """
        await self._change(self._checked("source", image), self._client.deadline(timeout))

    async def reset(self, timeout: float | None = None) -> None:
        """Forget the initial frame: the next one becomes it. Waits for the frames under way."""
        if self._relative:  # absolute motion has none
            await self._change(self._current().source, self._client.deadline(timeout))

    async def keypoints(self, image: Picture, timeout: float | None = None) -> KeyPoints:
        """The key points of any face, NumPy [1, K, 2] and [1, K, 2, 2]; the session stays as it is."""
        checked = self._checked("image", image)
        deadline = self._client.deadline(timeout)
        async with self._turn(deadline) as turn:
            course = self._current()
            inputs, outputs = _inputs(protocol.FRAME, checked), dict.fromkeys(protocol.POINTS)

            async def attempt() -> dict[str, np.ndarray]:
                return await self._sent(Call(course.model, inputs, outputs, course.id), turn, deadline)

            found = await self._served_by(course, attempt, deadline)
        return KeyPoints(*(np.asarray(found[name]) for name in protocol.POINTS))

    async def close(self) -> None:
        """End the sequence; nothing can be driven afterwards. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._client._sessions.discard(self)
        quiet, end = True, asyncio.get_running_loop().time() + FAREWELL
        for _ in range(self.ahead):
            try:
                await asyncio.wait_for(self._turns.get(), max(0.0, end - asyncio.get_running_loop().time()))
            except asyncio.TimeoutError:
                quiet = False
                break
        if self._course is not None:
            await self._end(self._course)
        if self._region is not None:
            if quiet:  # otherwise the server still writes there: it keeps the mapping
                with contextlib.suppress(Failure, asyncio.TimeoutError):
                    await asyncio.wait_for(self._client.transport.unshare(self._region), FAREWELL)
            self._region.close()

    def _abandon(self) -> None:
        self._closed, self._region = True, None  # whose memory goes with its last reader

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    # ------------------------------------------------------------------------------------------------------------------
    # frames

    async def _driven(self, course: _Course, frame: Picture, turn: _Turn, deadline: Deadline) -> np.ndarray:
        """A frame of a course that has begun, or begins with it."""

        async def attempt() -> np.ndarray:
            region = self._region  # this one, should another take its place meanwhile
            if region is None or isinstance(frame, bytes):
                inputs, outputs = _inputs(protocol.FRAME, frame), {self._output: None}
                call = Call(course.model, inputs, outputs, course.id, parameters=self._encoded())
                return await self._image(await self._sent(call, turn, deadline))
            there, back = 2 * turn.number, 2 * turn.number + 1
            region.write(there, frame)
            places = {protocol.FRAME: region.place(there)}, {protocol.IMAGE: region.place(back)}
            await self._sent(Call(course.model, *places, course.id), turn, deadline)
            return region.read(back)[0]

        return await self._served_by(course, attempt, deadline)

    async def _begun(self, course: _Course, frame: Picture, turn: _Turn, deadline: Deadline) -> np.ndarray:
        """The first frame, alone: if it comes to nothing, the server may or may not have begun with it."""
        kept = _kept(frame)
        try:
            image = await self._driven(course, frame, turn, deadline)
        except BaseException as error:
            if isinstance(error, ServingError) or not isinstance(error, InputError):  # else the server refused it
                self._forget(course)
            raise
        course.initial = kept
        return image

    async def _driven_chunk(
        self, course: _Course, frames: list[Picture], timeout: float | None
    ) -> AsyncIterator[np.ndarray]:
        """Frames through the decoupled model, in one request; in one more for what is left after a failure."""
        output, deadline = self._output, self._client.deadline(timeout)
        patience = _Patience(self, deadline)
        left = list(frames)
        while left:
            if self._relative and course.initial is None:
                left[0] = course.initial = _kept(left[0])
            sent, surplus = left, 0
            inputs: dict[str, np.ndarray] = {}
            parameters = self._encoded()
            if start := not course.started:
                if course.initial is not None and course.initial is not left[0]:
                    sent, surplus = [course.initial, *left][: self._served.queue], 1
                inputs = {
                    name: array[0] if array.dtype == object else array
                    for name, array in _inputs(protocol.SOURCE, course.source).items()
                }
                parameters |= self._starting(course)
            inputs |= await _inputs_of_many(sent)
            call = Call(course.model, inputs, {output: None}, course.id, start=start, parameters=parameters)
            answers = self._client.transport.infer_many(call)
            try:
                for number in range(len(sent)):
                    outputs = await deadline.wait(anext(answers))
                    course.started = True
                    if number >= surplus:
                        image = await self._image(outputs)
                        left = left[1:]
                        yield image
                        deadline = self._client.deadline(timeout)
                        patience = _Patience(self, deadline)
            except Failure as failure:
                course.started = course.started and not failure.lost
                await patience.after(failure)
            except StopAsyncIteration:
                course.started = False
                await patience.after(Failure("UNAVAILABLE", "the stream of answers ended early"))
            finally:
                await answers.aclose()  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------------------------------
    # the sequence

    async def _open(self, source: Picture, deadline: Deadline) -> None:
        course = _Course(_kept(self._checked("source", source)), self._client.model)
        self._course = course
        await deadline.wait(self._share())
        await self._started(course, deadline)

    async def _change(self, source: Picture, deadline: Deadline) -> None:
        async with self._changing, contextlib.AsyncExitStack() as turns:
            for _ in range(self.ahead):
                await turns.enter_async_context(self._turn(deadline))
            former = self._current()
            await self._end(former)  # first, since there may be no room for both
            self._course = _Course(_kept(source), former.model)
            try:
                await self._started(self._course, deadline)
            except BaseException:
                self._course = former  # and its next frame starts it again
                raise

    async def _started(self, course: _Course, deadline: Deadline) -> None:
        """See that the server knows the sequence."""
        if course.started:
            return
        await deadline.wait(course.starting.acquire())
        try:
            if course.started:
                return
            patience = _Patience(self, deadline)
            inputs = _inputs(protocol.SOURCE, course.source)
            outputs: dict[str, None] = {}
            parameters = self._encoded()
            if course.initial is not None:
                inputs |= _inputs(protocol.FRAME, course.initial)
                outputs = {self._output: None}
            while not course.started:
                call = Call(
                    course.model, inputs, outputs, course.id, start=True, parameters=parameters | self._starting(course)
                )
                try:
                    await deadline.wait(self._client.transport.infer(call))
                    course.started = True
                except Failure as failure:
                    await patience.after(failure)
        finally:
            course.starting.release()

    def _starting(self, course: _Course) -> dict[str, protocol.Parameter]:
        """The options of one more START; from the second on, the sequence may be there already."""
        options = self._options | ({"restart": True} if course.starts else {})
        course.starts, course.known, self.starts = course.starts + 1, True, self.starts + 1
        return options

    def _forget(self, course: _Course) -> None:
        """Take another id for the same source, and end the former one meanwhile."""
        former = _Course(course.source, course.model)
        former.id, former.known = course.id, course.known
        course.renew()
        task = asyncio.ensure_future(self._end(former))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _end(self, course: _Course) -> None:
        """Free the sequence on the server, if that is possible; idle time does it otherwise."""
        if not course.known:
            return
        course.started = course.known = False
        many = course.model == protocol.STREAM_MODEL
        call = Call(course.model, {protocol.END: np.ones((1,) if many else (1, 1), bool)}, {}, course.id, end=True)
        with contextlib.suppress(Failure, asyncio.TimeoutError):
            await asyncio.wait_for(self._finished(call) if many else self._client.transport.infer(call), FAREWELL)

    async def _finished(self, call: Call) -> None:
        async for _ in self._client.transport.infer_many(call):
            pass

    # ------------------------------------------------------------------------------------------------------------------
    # requests

    async def _served_by(self, course: _Course, attempt: Callable[[], Awaitable[T]], deadline: Deadline) -> T:
        """Attempt it until the server serves it, and start the sequence where it is not known."""
        patience = _Patience(self, deadline)
        while True:
            await self._started(course, deadline)
            starts, region = course.starts, self._region
            try:
                return await attempt()
            except Failure as failure:
                if failure.lost and course.starts == starts:  # else it was started again meanwhile
                    course.started = False
                if failure.unplaced:
                    await deadline.wait(self._share(region))
                else:
                    await patience.after(failure)

    async def _sent(self, call: Call, turn: _Turn, deadline: Deadline) -> dict[str, np.ndarray]:
        """One request. It goes on after the deadline, and holds its turn: the server may yet write into its memory."""
        turn.request = asyncio.ensure_future(self._client.transport.infer(call))
        await asyncio.wait({turn.request}, timeout=deadline.left)
        if not turn.request.done():
            raise deadline.exceeded()
        return turn.request.result()

    @contextlib.asynccontextmanager
    async def _turn(self, deadline: Deadline) -> AsyncIterator[_Turn]:
        """Wait for a place among the frames under way."""
        self._current()
        turn = await deadline.wait(self._turns.get()) if self._turns.empty() else self._turns.get_nowait()
        turn.request = None
        try:
            yield turn
        finally:
            request = turn.request
            if request is None or request.done():
                self._turns.put_nowait(turn)
            else:  # nobody waits for it any more
                request.add_done_callback(lambda request: self._abandoned(turn, request))
                if self._region is None:
                    request.cancel()

    def _abandoned(self, turn: _Turn, request: asyncio.Future[Any]) -> None:
        if not request.cancelled():
            request.exception()  # which nobody wants to know
        self._turns.put_nowait(turn)

    @contextlib.asynccontextmanager
    async def _first(self, course: _Course, deadline: Deadline) -> AsyncIterator[None]:
        await deadline.wait(course.beginning.acquire())
        try:
            yield
        finally:
            course.beginning.release()

    async def _share(self, lost: Region | None = None) -> None:
        """Map memory together with the server, unless `lost` was replaced: for a frame and an image of each turn, and
        for one more that is nobody's turn."""
        if self._sharing is False or self._sharing == "auto" and not self._client.address.is_local:
            return
        async with self._placing:
            if self._region is not lost:
                return
            self._region, region = None, None  # whoever still reads from the former one keeps it
            try:
                kind = CudaRegion if self._sharing == "cuda" else Region
                region = kind(2 * self.ahead + 2, (1, self.size, self.size, 3))
                await self._client.transport.share(region)
                self._region = region
            except (Failure, OSError) as error:  # it runs in a container of its own, or /dev/shm is full
                if region is not None:
                    region.close()
                if self._sharing != "auto" and not (isinstance(error, Failure) and error.passing):
                    raise InputError(
                        f"the server at {self._served.url} and this program cannot share memory: {error}"
                    ) from None

    async def _image(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        if protocol.IMAGE in outputs:
            image = outputs[protocol.IMAGE].reshape(self.size, self.size, 3)
            return image if image.flags.writeable else image.copy()
        if protocol.IMAGE_ENCODED not in outputs:
            raise ServerError(f"the server at {self._served.url} answered without an image")
        data = outputs[protocol.IMAGE_ENCODED].reshape(-1)[0]
        most = 4 * self.size**2
        return check_image("image", await asyncio.to_thread(decode_image, data, "answer", ENCODINGS, most), self.size)

    @property
    def _output(self) -> str:
        return protocol.IMAGE if self._encoding is None else protocol.IMAGE_ENCODED

    async def _packed(self, frame: Picture) -> Picture:
        """As it travels."""
        if self._encoding is None or isinstance(frame, bytes):
            return frame
        return await asyncio.to_thread(encode_image, frame, self._encoding, self._quality)

    def _encoded(self) -> dict[str, protocol.Parameter]:
        return {} if self._encoding is None else {"encoding": self._encoding, "quality": self._quality}

    def _checked(self, name: str, picture: Any) -> Picture:
        if isinstance(picture, (bytes, bytearray)):
            if not 0 < len(picture) <= protocol.MOST_ENCODED:
                raise InputError(f"{name} must be 1 to {protocol.MOST_ENCODED} bytes, got {len(picture)}")
            return bytes(picture)
        return check_image(name, picture, self.size)

    def _current(self) -> _Course:
        if self._closed or self._course is None:
            raise InputError("this session is closed: open another one")
        return self._course


class _Patience:
    """How often and how long one thing is tried again."""

    def __init__(self, session: AsyncSession, deadline: Deadline) -> None:
        self._session, self._deadline, self._wait, self._losses = session, deadline, FIRST_WAIT, 0

    async def after(self, failure: Failure) -> None:
        """Wait as long as this failure takes, or raise what the caller is told."""
        url = self._session._served.url
        if failure.lost:
            self._losses += 1
            if self._losses > LOSSES:
                raise SessionLost(f"the server at {url} lost the session {self._losses} times in a row: {failure}")
        elif failure.passing:
            if self._deadline.left <= self._wait:
                await self._give_up(failure)
            await asyncio.sleep(self._wait)
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        elif failure.older:
            raise InputError(f"the server at {url} has an older dagan-rt and cannot do all that was asked: {failure}")
        elif failure.status in ("INVALID_ARGUMENT", "ALREADY_EXISTS", "NOT_FOUND"):
            raise InputError(f"the server at {url} refused this: {failure}")
        else:
            raise ServerError(f"the server at {url} failed: {failure} ({failure.status})")

    async def _give_up(self, failure: Failure) -> None:
        url = self._session._served.url
        if failure.status == "UNAVAILABLE" and await self._session._client.alive():
            raise ServerBusy(f"the server at {url} had no room until the deadline: {failure}")
        raise ServerUnavailable(f"the server at {url} does not serve any more: {failure}")


def _kept(picture: Picture) -> Picture:
    return picture if isinstance(picture, bytes) else picture.copy()


def _inputs(name: str, picture: Picture) -> dict[str, np.ndarray]:
    """One picture as the input of a model with batches."""
    if isinstance(picture, bytes):
        return {f"{name}_encoded": np.array([[picture]], object)}
    return {name: picture[None]}


async def _inputs_of_many(frames: list[Picture]) -> dict[str, np.ndarray]:
    """Frames as the input of the decoupled model; where files are among them, the others become files as well."""
    arrays = [frame for frame in frames if isinstance(frame, np.ndarray)]
    if len(arrays) == len(frames):
        return {protocol.FRAME: np.stack(arrays)}
    files = [
        frame if isinstance(frame, bytes) else await asyncio.to_thread(encode_image, frame, "PNG") for frame in frames
    ]
    return {protocol.FRAME_ENCODED: np.array(files, object)}


async def _each(frames: Iterable[Picture] | AsyncIterable[Picture]) -> AsyncIterator[Picture]:
    if isinstance(frames, AsyncIterable):
        async for frame in frames:
            yield frame
    else:
        for frame in frames:
            yield frame


async def _chunks(frames: Iterable[Picture] | AsyncIterable[Picture], most: int) -> AsyncIterator[list[Picture]]:
    chunk: list[Picture] = []
    async for frame in _each(frames):
        chunk.append(frame)
        if len(chunk) == most:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
