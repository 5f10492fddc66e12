"""The client people use: a server's address in, sessions out, each driven like a `Reenactor`. gRPC or HTTP.

    with Client("grpc://host:8001") as client, client.open(image) as session:
        for frame in frames:
            show(session.drive(frame))

It is `AsyncClient` with an event loop in a thread, one for all clients of the process.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from dagan_rt.keypoints import KeyPoints
from dagan_rt.serving import protocol
from dagan_rt.serving.asynchronous import AHEAD, AsyncClient, Served
from dagan_rt.serving.direct import Direct
from dagan_rt.serving.sessions import AsyncSession, Picture
from dagan_rt.serving.transport import DeadlineExceeded

T = TypeVar("T")


class Client:
    """A server that holds a model, to open sessions on; from any thread."""

    def __init__(
        self,
        url: str,
        model: str = protocol.MODEL,
        timeout: float | None = None,
        shared_memory: bool | str = "auto",
    ) -> None:
        """Connect, and find out what the server has. Arguments and errors: as for `AsyncClient`, and its `connect`."""
        self._loop = _loop()
        self._client = AsyncClient(url, model, timeout, shared_memory)
        self._run(self._client.connect())

    @property
    def served(self) -> Served:
        """What the server has: address, version, model, size of images, parameters."""
        return self._client.served

    @property
    def size(self) -> int:
        """Side of an image, pixels."""
        return self.served.size

    def open(
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
    ) -> Session:
        """Start a session; arguments and errors as for `AsyncClient.open`."""
        opened = self._client.open(
            source, motion, adapt_scale, motion_scale=motion_scale, encoding=encoding, quality=quality, ahead=ahead,
            timeout=timeout,
        )  # fmt: skip
        return Session(self, self._run(opened))

    def close(self) -> None:
        """End all sessions and the connection. May be called twice."""
        self._run(self._client.close())

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:  # KeyboardInterrupt, above all: nobody waits for it any more
            future.cancel()
            raise


class Session:
    """A portrait on a server, driven frame by frame; `Client.open` makes it."""

    def __init__(self, client: Client, session: AsyncSession) -> None:
        self._client, self._session = client, session
        self.size, self.ahead = session.size, session.ahead
        self._room = threading.BoundedSemaphore(session.ahead)
        transport = client._client.transport
        self._direct = Direct(transport, session) if Direct.possible(transport, session) else None

    def drive(self, frame: Picture, timeout: float | None = None) -> np.ndarray:
        """Drive one frame, uint8 [size, size, 3] or a file in memory, and wait for its image, uint8 [size, size, 3].

        Errors: as for `AsyncSession.drive`.
        """
        if self._direct is not None and isinstance(frame, np.ndarray):
            image = self._direct.drive(frame, self._client._client.timeout if timeout is None else timeout)
            if image is not None:
                return image
        return self._client._run(self._session.drive(frame, timeout))

    def submit(self, frame: Picture, timeout: float | None = None) -> Submitted:
        """As `drive`, without waiting for the image: the `result()` of what comes back is uint8 [1, size, size, 3].

        Up to `ahead` frames may be under way; beyond that, this waits until one of them is through.
        """
        seconds = self._client._client.timeout if timeout is None else timeout
        if not self._room.acquire(timeout=max(0.0, seconds)):
            raise DeadlineExceeded(f"{self.ahead} frames under way were not through within {seconds:g} seconds")
        kept = frame.copy() if isinstance(frame, np.ndarray) else frame
        future = self._client._submit(self._session.drive(kept, timeout))
        future.add_done_callback(lambda _: self._room.release())
        return Submitted(future)

    def stream(self, frames: Iterable[Picture], timeout: float | None = None) -> Iterator[np.ndarray]:
        """The images of all frames, in order, with up to `ahead` frames under way."""
        under_way: deque[Submitted] = deque()
        for frame in frames:
            while len(under_way) >= self.ahead or under_way and under_way[0].done():
                yield under_way.popleft().result()[0]
            under_way.append(self.submit(frame, timeout))
        while under_way:
            yield under_way.popleft().result()[0]

    def drive_many(self, frames: Iterable[Picture], timeout: float | None = None) -> Iterator[np.ndarray]:
        """The images of all frames, in order; several travel in one request. As `AsyncSession.drive_many`."""
        images: AsyncIterator[np.ndarray] = self._session.drive_many(frames, timeout)
        try:
            while (image := self._client._run(_next(images))) is not None:
                yield image
        finally:
            self._client._run(images.aclose())  # type: ignore[attr-defined]

    def set_source(self, image: Picture, timeout: float | None = None) -> None:
        """Animate another portrait from a new initial frame on; waits for the frames under way."""
        self._client._run(self._session.set_source(image, timeout))

    def reset(self, timeout: float | None = None) -> None:
        """Forget the initial frame: the next one becomes it. Waits for the frames under way."""
        self._client._run(self._session.reset(timeout))

    def keypoints(self, image: Picture, timeout: float | None = None) -> KeyPoints:
        """The key points of any face, NumPy [1, K, 2] and [1, K, 2, 2]; the session stays as it is."""
        return self._client._run(self._session.keypoints(image, timeout))

    def close(self) -> None:
        """End the session; nothing can be driven afterwards. May be called twice."""
        if self._direct is not None:
            direct, self._direct = self._direct, None
            direct.close()
        self._client._run(self._session.close())

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Submitted:
    """A frame under way: a `frames.Pending`."""

    def __init__(self, future: Future[np.ndarray]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether `result` need not wait."""
        return self._future.done()

    def result(self) -> np.ndarray:
        """Wait for the image, uint8 [1, size, size, 3], or raise what went wrong."""
        return self._future.result()[None]


async def _next(images: AsyncIterator[np.ndarray]) -> np.ndarray | None:
    return await anext(images, None)


class _Loop:
    """The event loop of all clients, in a thread of its own. gRPC wants one loop a process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="dagan-rt client", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def _stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=5)


_made: _Loop | None = None
_making = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    global _made
    with _making:
        if _made is None:
            _made = _Loop()
        return _made.loop
