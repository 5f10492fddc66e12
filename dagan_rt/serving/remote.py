"""A server as a backend: sessions on it behind `Frames`, so that whatever drives frames here can drive them there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.frames import Computed, Pending, Times
from dagan_rt.keypoints import KeyPoints
from dagan_rt.serving.asynchronous import AHEAD
from dagan_rt.serving.client import Client, Session


class RemoteFrames:
    """Whole frames on a server: each slot is a session there, `dagan_rt.frames.Frames` here.

    A session begins with `begin`: START carries all its options. What the network or the server does meanwhile is the
    client's business.
    """

    name = "triton"
    slot_bytes = fixed_bytes = 0  # the server's
    batches: tuple[int, ...] = (1,)  # the server makes batches of many sessions

    def __init__(self, server: str | Client, slots: int = 1) -> None:
        """server: an address, as for `Client`; or one, which stays the caller's. slots: sessions, if there is room."""
        self._owned = isinstance(server, str)
        self._client = client = Client(server) if isinstance(server, str) else server
        served = client.served
        self.size, self.slots, self.ahead = client.size, slots, slots * min(AHEAD, served.queue)
        self.device = f"{served.server} at {served.url}"
        self.reason = f"{self.device} serves {served.name}"
        self._sources: list[np.ndarray | None] = [None] * slots
        self._sessions: list[Session | None] = [None] * slots
        self._first: list[tuple[np.ndarray, np.ndarray] | None] = [None] * slots  # the initial frame and its image
        self._points: Session | None = None  # to find key points before anything has begun

    def set_source(self, slot: int, image: np.ndarray) -> None:
        """As in `Frames`; it is sent with `begin`."""
        self._end(slot)
        self._sources[slot] = image.copy()

    def begin(self, slot: int, frame: np.ndarray | None, adapt_scale: bool = False, motion_scale: float = 1.0) -> None:
        """As in `Frames`."""
        source = self._sources[slot]
        if source is None:
            raise InputError(f"slot {slot} has no source: call set_source first")
        self._end(slot)
        self._end_points()
        motion = "absolute" if frame is None else "relative"
        session = self._sessions[slot] = self._client.open(source, motion, adapt_scale, motion_scale=motion_scale)
        if frame is not None:
            try:
                self._first[slot] = frame.copy(), session.drive(frame)
            except BaseException:
                self._end(slot)
                raise

    def submit(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Pending:
        """As in `Frames`."""
        if not len(slots) == len(frames) == 1:
            raise InputError(f"a batch must be 1 frame and its slot, got {len(frames)} and {len(slots)}")
        slot, frame = slots[0], frames[0]
        session = self._sessions[slot]
        if session is None:
            raise InputError(f"slot {slot} has no session: call set_source and begin first")
        first, self._first[slot] = self._first[slot], None
        # The initial frame is usually the first one driven, and its image is there.
        if first is not None and np.array_equal(first[0], frame):
            return Computed(first[1][None])
        return session.submit(frame)

    def keypoints(self, image: np.ndarray) -> KeyPoints:
        """As in `Frames`."""
        session = next(filter(None, self._sessions), None) or self._points
        if session is None:  # it takes one
            session = self._points = self._client.open(image, "absolute")
        return session.keypoints(image)

    def timed(self, slots: Sequence[int], frames: Sequence[np.ndarray]) -> Times:
        """As in `Frames`; what of it the network took is unknown."""
        start = time.perf_counter()
        self.submit(slots, frames).result()
        wall = time.perf_counter() - start
        return Times(wall=wall, upload=0.0, device=wall, download=0.0)

    def stages(self, batch: int) -> Mapping[str, Callable[[], object]]:
        """None that could be run alone."""
        return {}

    def close(self) -> None:
        """As in `Frames`."""
        for slot in range(self.slots):
            self._end(slot)
        self._sources = [None] * self.slots
        self._end_points()
        if self._owned:
            self._client.close()

    def _end(self, slot: int) -> None:
        session, self._sessions[slot], self._first[slot] = self._sessions[slot], None, None
        if session is not None:
            session.close()

    def _end_points(self) -> None:
        session, self._points = self._points, None
        if session is not None:
            session.close()
