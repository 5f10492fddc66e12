"""The imitated CUDA driver (driver.cpp), as tests steer it; the GPU's memory is the host's."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagan_rt.cuda import driver as cuda
from dagan_rt.kernels import _devices
from dagan_rt.kernels._devices import CudaDevice, Launch

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_ubyte), ctypes.c_int)
_WORK = ctypes.CFUNCTYPE(None, ctypes.c_int)


@cache
def build() -> Path:
    """Compile it, unless that was done before: it is kept, by its content, where temporary files are."""
    source = Path(__file__).with_name("driver.cpp")
    path = Path(tempfile.gettempdir()) / f"dagan-rt-driver-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
            made.replace(path)  # at once: another process may be at the same
    return path


class Driver:
    """The imitation; see driver.cpp for when it does what is enqueued."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(build()))
        self.library.test_take_journal.restype = ctypes.c_char_p
        self.library.test_place.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self.library.test_memory.argtypes = (ctypes.c_size_t,)
        self.library.test_used.restype = ctypes.c_size_t
        self.library.test_enqueue.argtypes = (ctypes.c_void_p, _WORK, ctypes.c_int)
        self.library.test_reset()
        self._errors: list[BaseException] = []
        self._work: list[Callable[[], None]] = []
        self._run = _WORK(self._run_work)

    def journal(self, *starts: str) -> list[str]:
        """What was asked of the driver since the last call; only the lines that start so, if any are named."""
        lines = self.library.test_take_journal().decode().splitlines()
        return [line for line in lines if not starts or line.startswith(starts)]

    def fail(self, function: str, status: int) -> None:
        """Let the next call of a function fail."""
        self.library.test_fail(function.encode(), status)

    def enqueue(self, stream: int, work: Callable[[], None]) -> int:
        """Put Python work on a stream, as a library would its kernels: it is captured and replayed like them."""
        self._work.append(work)
        return self.library.test_enqueue(stream, self._run, len(self._work) - 1)

    def captures(self, stream: int) -> bool:
        """Whether a CUDA graph is being captured on a stream."""
        return bool(self.library.test_captures(ctypes.c_void_p(stream)))

    def kernels(self, run: Callable[[str, bytes], None]) -> None:
        """Let `run(name, arguments)` do what kernels would, when their turn comes."""

        def call(name: bytes, arguments: Any, size: int) -> None:
            self._keep(lambda: run(name.decode(), bytes(arguments[:size])))

        self._kernel = _KERNEL(call)
        self.library.test_kernels(self._kernel)

    def _run_work(self, number: int) -> None:
        self._keep(self._work[number])

    def _keep(self, work: Callable[[], None]) -> None:
        """An error cannot pass through the driver: it is raised at the end of the test."""
        try:
            work()
        except BaseException as error:
            self._errors.append(error)

    def raise_errors(self) -> None:
        if self._errors:
            raise self._errors[0]


def install(patch: pytest.MonkeyPatch) -> Driver:
    """Let it stand in for libcuda, with no GPU opened yet."""
    patch.setattr(cuda, "LIBRARY", str(build()))
    patch.setattr(_devices, "_devices", {})
    cuda._load.cache_clear()
    return Driver()


@contextmanager
def installed(patch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """The same for one test, which fails if work on the GPU did, or if a context that was entered was not left."""
    imitation = install(patch)
    try:
        yield imitation
        imitation.raise_errors()
        assert imitation.library.test_contexts() == 0
    finally:
        imitation.library.test_kernels(None)
        imitation.journal()


def emulate(patch: pytest.MonkeyPatch, driver: Driver, emulated: Any) -> None:
    """Let kernels run on an emulated device when their turn comes, those that are captured, too."""

    def launch(self: CudaDevice, it: Launch, stream: int) -> None:
        if status := driver.enqueue(stream, lambda: emulated.launch(it)):
            cuda.check(status, f"launching {it.kernel}")

    patch.setattr(CudaDevice, "launch", launch)


def memory(pointer: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """The GPU's memory, to look at and write."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_ubyte * count).from_address(pointer)).view(dtype).reshape(shape)
