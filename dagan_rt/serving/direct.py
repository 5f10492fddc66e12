"""The shortest way of a frame to a server on this machine: gRPC and shared memory, on the caller's own thread.

An event loop in another thread wakes three threads a frame, which takes longer than all that gRPC does. What this way
cannot do, or fails to do, goes through the loop: starting a session, its first frame, whatever has to be tried again.
"""

from __future__ import annotations

import threading

import numpy as np

from dagan_rt.reenactor import check_image
from dagan_rt.serving import protocol
from dagan_rt.serving.sessions import AsyncSession
from dagan_rt.serving.transport import GRPC_OPTIONS, Call, DeadlineExceeded, Transport, failure_of


class Direct:
    """One session's frames, one at a time."""

    def __init__(self, transport: Transport, session: AsyncSession) -> None:
        """session: raw images in system shared memory, as `possible` says."""
        import tritonclient.grpc

        self._transport, self._session = transport, session
        # A connection of its own: that of the loop belongs to the loop. On this machine it ends at the same server.
        self._client = tritonclient.grpc.InferenceServerClient(transport.address.netloc, channel_args=GRPC_OPTIONS)
        self._free = threading.Lock()  # over the place in the memory that no turn of the session has

    @staticmethod
    def possible(transport: Transport, session: AsyncSession) -> bool:
        """Whether the server is on this machine and shares memory for the session's images."""
        return transport.address.scheme == "grpc" and transport.address.is_local and session.spare is not None

    def drive(self, frame: np.ndarray, timeout: float) -> np.ndarray | None:
        """The image of a frame, or None where it has to go through the loop.

        Raises InputError for another frame, DeadlineExceeded after `timeout` seconds.
        """
        running, spare = self._session.running, self._session.spare
        if running is None or spare is None or not self._free.acquire(blocking=False):
            return None
        region, there, back = spare
        late = False
        try:
            region.write(there, check_image("frame", frame, self._session.size))
            places = {protocol.FRAME: region.place(there)}, {protocol.IMAGE: region.place(back)}
            request = self._transport.request(Call(running[0], *places, running[1]))
            try:
                self._client.infer(**request, client_timeout=timeout)
            except Exception as error:
                late = failure_of(error).status == "DEADLINE_EXCEEDED"
                if not late:
                    return None
                raise DeadlineExceeded(
                    f"the server at {self._transport.address} gave no answer within {timeout:g} seconds"
                ) from None
            return region.read(back)[0]
        finally:
            if not late:  # else the server may yet write there
                self._free.release()

    def close(self) -> None:
        """Wait for the frame under way, and take no more."""
        self._free.acquire(timeout=1.0)
        self._client.close()
