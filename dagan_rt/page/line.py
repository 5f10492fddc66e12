"""A line of people, of whom one at a time has the model."""

from __future__ import annotations

import threading
from collections import deque

from dagan_rt.errors import InputError


class Line:
    """Whoever stands first may use the model; the others wait in the order in which they came."""

    def __init__(self, most: int) -> None:
        """most: how many may stand in it, the first included."""
        self.most = most
        self._tickets: deque[object] = deque()
        self._moved = threading.Condition()

    def join(self) -> object:
        """Stand at the end; what comes back is to be given to `wait` and `leave`. InputError where the line is full."""
        with self._moved:
            if len(self._tickets) >= self.most:
                raise InputError(f"{len(self._tickets)} runs wait already, which is the most: try again in a minute")
            ticket = object()
            self._tickets.append(ticket)
            return ticket

    def wait(self, ticket: object, seconds: float) -> int:
        """How many stand in front, after waiting for none to, at most that long."""
        with self._moved:
            self._moved.wait_for(lambda: self._tickets[0] is ticket, seconds)
            return self._tickets.index(ticket)

    def leave(self, ticket: object) -> None:
        """Go, from wherever in the line."""
        with self._moved:
            self._tickets.remove(ticket)
            self._moved.notify_all()
