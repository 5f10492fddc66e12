"""A clock that divides the time of a step between its parts, and the most memory that was taken."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch


class Clock:
    """Divides the seconds between its parts: what is inside a part within a part counts for the inner one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.running = device, False
        self._seconds: dict[str, float] = {}
        self._within: list[str] = []
        self._last = 0.0

    @contextlib.contextmanager
    def on(self) -> Iterator[dict[str, float]]:
        """Seconds of each part that is met in here."""
        self.running, self._seconds = True, defaultdict(float)
        try:
            yield self._seconds
        finally:
            self.running = False

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part, if the clock is on."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """A part begins."""
        if self.running:
            self._tick()
            self._within.append(name)

    def leave(self) -> None:
        """And ends."""
        if self.running:
            self._tick()
            self._within.pop()

    def _tick(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._within:
            self._seconds[self._within[-1]] += now - self._last
        self._last = now


def synchronize(device: torch.device) -> None:
    """Wait for all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget how much memory was taken before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> float:
    """The most bytes since: of PyTorch's allocator on a GPU, else of the process; 0 where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    return 0.0
