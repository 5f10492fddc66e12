"""The shortest way of a frame to a server on this machine: one gRPC stream and shared memory, without an event loop.

A call of its own for every frame, and a loop in another thread, take longer than all the rest of the way. What this
way cannot do, or fails to do, goes through the loop: starting a session, its first frame, whatever must be tried again.
"""

from __future__ import annotations

import queue
import threading
import weakref
from typing import Any

import numpy as np

from dagan_rt.reenactor import check_image
from dagan_rt.serving import protocol
from dagan_rt.serving.sessions import AsyncSession
from dagan_rt.serving.transport import GRPC_OPTIONS, Call, DeadlineExceeded, Transport


class Direct:
    """One session's frames, one at a time."""

    def __init__(self, transport: Transport, session: AsyncSession) -> None:
        """session: raw images in system shared memory, as `possible` says."""
        import tritonclient.grpc

        self._transport, self._session = transport, session
        # A connection of its own: that of the loop belongs to the loop. On this machine it ends at the same server.
        self._client = tritonclient.grpc.InferenceServerClient(transport.address.netloc, channel_args=GRPC_OPTIONS)
        self._hang_up = weakref.finalize(self, _hang_up, self._client)  # at the latest when the program ends
        self._free = threading.Lock()  # over the place in the memory that no turn of the session has, and the stream
        self._answers: queue.SimpleQueue[Exception | None] | None = None  # of the stream; None: there is none

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
            try:
                failed = self._ask(self._transport.request(Call(running[0], *places, running[1])), timeout)
            except queue.Empty:
                late = True
                raise DeadlineExceeded(
                    f"the server at {self._transport.address} gave no answer within {timeout:g} seconds"
                ) from None
            return None if failed else region.read(back)[0]
        finally:
            if not late:  # else the server may yet write there
                self._free.release()

    def close(self) -> None:
        """Wait for the frame under way, and take no more."""
        self._free.acquire(timeout=1.0)
        self._hang_up()

    def _ask(self, request: dict[str, Any], timeout: float) -> bool:
        """Send a request, and wait for its answer; whether it failed. Raises queue.Empty when the time is up."""
        try:
            if self._answers is None:
                self._answers = self._open()
            self._client.async_stream_infer(**request)
            failed = self._answers.get(timeout=timeout) is not None
        except queue.Empty:
            raise
        except Exception:  # the stream is broken
            failed = True
        if failed and self._answers is not None:  # whatever may yet come of it belongs to nothing
            self._answers = None
            self._client.stop_stream(cancel_requests=True)
        return failed

    def _open(self) -> queue.SimpleQueue[Exception | None]:
        answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

        def start() -> None:
            self._client.start_stream(lambda result, error: answers.put(error))

        # tritonclient's thread is a daemon if the one that starts it is: a program may end with its sessions open.
        starter = threading.Thread(target=start, daemon=True)
        starter.start()
        starter.join()
        return answers


def _hang_up(client: Any) -> None:
    client.stop_stream(cancel_requests=True)
    client.close()
