"""GPUs as the kernels see them: what is launched, where, and on whose memory.

Kernels are launched through the CUDA driver itself (libcuda, by ctypes), in the primary context that PyTorch, CuPy and
PyCUDA's `autoprimaryctx` share. So a launch needs none of them, takes any stream, and costs a few microseconds.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import addressof, byref, c_char, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from dagan_rt.errors import InputError


@dataclass(frozen=True)
class Unit:
    """What is compiled together: the file kernels/<op>/<source>.cu."""

    op: str
    source: str  # without .cu
    defines: tuple[tuple[str, int], ...] = ()  # passed as -D<name>=<value>
    feature: str = ""  # "a": needs what only sm_90a has


@dataclass(slots=True)  # like Array not frozen, which would cost a microsecond at every call
class Launch:
    """One launch of a kernel of a unit."""

    unit: Unit
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: tuple[Any, ...]  # an Array or None (a null pointer), np.int32, np.int64 or np.float32
    shared: int = 0  # bytes of dynamic shared memory
    waiting: bool = False  # blocks wait for their neighbours: there must not be more of them than multiprocessors


class Device(Protocol):
    """A GPU, or what imitates one."""

    name: str
    capability: tuple[int, int]  # (8, 9) is sm_89
    multiprocessors: int
    shared_per_block: int  # the most dynamic shared memory a block can ask for, bytes

    def launch(self, launch: Launch, stream: int) -> None:
        """Enqueue a kernel on a stream (a handle, 0 is the default stream)."""

    def workspace(self, stream: int, nbytes: int, zeroed: bool = False) -> Array:
        """At least `nbytes` of scratch memory [n] uint8 for kernels on that stream, the same at every call.

        zeroed: memory of its own, all zeros; kernels leave it so.
        """


@dataclass(slots=True, eq=False)
class Array:
    """A borrowed view of somebody's memory."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str  # float32, float16, bfloat16 or uint8
    device: Device
    owner: Any  # keeps the memory alive
    stream: int | None = None  # work there may still be writing it; None where the caller sees to that

    @property
    def layout(self) -> str | None:
        """Of a 4-D array: "nchw" (contiguous), "nhwc" (channels last), or None; where both are true, "nchw"."""
        if len(self.shape) != 4:
            return None
        _, C, H, W = self.shape
        contiguous = (C * H * W, H * W, W, 1)
        if self.strides == contiguous or self._has_strides(contiguous):
            return "nchw"
        return "nhwc" if self._has_strides((C * H * W, 1, W * C, C)) else None

    def _has_strides(self, strides: tuple[int, ...]) -> bool:
        return all(n == 1 or a == b for n, a, b in zip(self.shape, self.strides, strides, strict=True))


class CudaError(RuntimeError):
    """The CUDA driver refused something that should have worked."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


# How arguments lie in a kernel's parameter buffer: as in a C struct, which is what struct packs.
_CODES = {Array: "P", type(None): "P", np.int32: "i", np.int64: "q", np.float32: "f"}


@cache
def _layout(types: tuple[type, ...]) -> tuple[struct.Struct, type[ctypes.Array[c_char]], c_size_t]:
    """What packs the `extra` of cuLaunchKernel for arguments of these types, its buffer, and the arguments' size.

    `extra` is five words, one the address of the arguments, which here follow it.
    """
    for kind in types:
        if kind not in _CODES:
            raise TypeError(f"a kernel takes an Array, None, np.int32, np.int64 or np.float32, got {kind.__name__}")
    layout = struct.Struct("@5P" + "".join(_CODES[kind] for kind in types))
    return layout, c_char * layout.size, c_size_t(layout.size - _WORDS)


_WORDS = 5 * struct.calcsize("@P")
_PARAMETERS_END, _PARAMETERS, _PARAMETERS_SIZE = 0, 1, 2  # CU_LAUNCH_PARAM_…


def pack(args: tuple[Any, ...]) -> ctypes.Array[c_char]:
    """The `extra` of cuLaunchKernel for these arguments."""
    layout, kind, size = _layout(tuple(map(type, args)))
    buffer = kind()
    words = (_PARAMETERS, addressof(buffer) + _WORDS, _PARAMETERS_SIZE, addressof(size), _PARAMETERS_END)
    layout.pack_into(buffer, 0, *words, *[arg.pointer if type(arg) is Array else arg or 0 for arg in args])
    return buffer


# ---------------------------------------------------------------------------------------------------------------------
# The CUDA driver

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# But of cuCtxGetCurrent and cuLaunchKernel, which every launch calls: converting by prototype takes thrice the time.
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, c_void_p),
    "cuGetErrorString": (c_int, c_void_p),
    "cuDeviceGetCount": (c_void_p,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (c_void_p,),
    "cuModuleLoadData": (c_void_p, c_char_p),
    "cuModuleGetFunction": (c_void_p, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuMemAlloc_v2": (c_void_p, c_size_t),
    "cuMemsetD8Async": (c_void_p, c_ubyte, c_size_t, c_void_p),
    "cuPointerGetAttribute": (c_void_p, c_int, c_void_p),
    "cuStreamCreate": (c_void_p, c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventCreate": (c_void_p, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
    "cuThreadExchangeStreamCaptureMode": (c_void_p,),
}

# CUdevice_attribute, CUfunction_attribute, CUpointer_attribute, CUstreamCaptureMode and flags, as in cuda.h.
_MULTIPROCESSORS, _MAJOR, _MINOR, _SHARED_PER_BLOCK = 16, 75, 76, 97
_MAX_DYNAMIC_SHARED = 8
_POINTER_CONTEXT, _POINTER_DEVICE = 1, 9
_CAPTURE_RELAXED = 2
_STREAM_NON_BLOCKING, _EVENT_DISABLE_TIMING = 1, 2
# Statuses of cuModuleLoadData that mean: compiled for something else.
_OTHER_GPU = (200, 209, 218, 222)


@cache
def _driver() -> ctypes.CDLL:
    """The driver's library, initialised; raises InputError where there is none."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        raise InputError("there is no NVIDIA driver on this machine (libcuda is not found)") from None
    for name, types in _PROTOTYPES.items():
        getattr(driver, name).argtypes = types
    if status := driver.cuInit(0):
        raise InputError(f"the NVIDIA driver finds no usable GPU ({_error(driver, status)})")
    return driver


def _error(driver: ctypes.CDLL, status: int) -> str:
    name, text = c_char_p(), c_char_p()
    driver.cuGetErrorName(status, byref(name))
    driver.cuGetErrorString(status, byref(text))
    return f"{(name.value or b'error').decode()} {status}: {(text.value or b'unknown').decode()}"


def _check(status: int, what: str) -> None:
    if status:
        raise CudaError(f"{what} failed with {_error(_driver(), status)}", status)


def missing() -> str | None:
    """None, or what keeps kernels from running here."""
    try:
        count = c_int()
        _check(_driver().cuDeviceGetCount(byref(count)), "counting GPUs")
        return None if count.value else "there is no NVIDIA GPU on this machine"
    except InputError as error:
        return str(error)


def pointer_device(pointer: int, name: str) -> CudaDevice:
    """The GPU that memory lies on; InputError for memory that is not a GPU's, or not of its primary context."""
    driver = _driver()
    index, context = c_int(), c_void_p()
    if driver.cuPointerGetAttribute(byref(index), _POINTER_DEVICE, pointer):
        raise InputError(f"{name} must lie in GPU memory, got the address {pointer:#x}, which the driver does not know")
    found = device(index.value)
    # Memory of a stream-ordered pool belongs to no context.
    status = driver.cuPointerGetAttribute(byref(context), _POINTER_CONTEXT, pointer)
    if status == 0 and context.value not in (None, found.context):
        raise InputError(
            f"{name} must lie in the primary CUDA context of its GPU, got one of another context: "
            "with PyCUDA import pycuda.autoprimaryctx instead of pycuda.autoinit"
        )
    return found


class CudaDevice:
    """One NVIDIA GPU, by its number in this process."""

    def __init__(self, index: int) -> None:
        driver = self._driver = _driver()
        self.index, number, context = index, c_int(), c_void_p()
        if driver.cuDeviceGet(byref(number), index):
            raise InputError(f"there is no GPU {index} in this process")
        self._number = number.value
        name = ctypes.create_string_buffer(100)
        _check(driver.cuDeviceGetName(name, len(name), self._number), "asking the name of a GPU")
        self.name = name.value.decode()
        self.capability = (self._attribute(_MAJOR), self._attribute(_MINOR))
        self.multiprocessors = self._attribute(_MULTIPROCESSORS)
        self.shared_per_block = self._attribute(_SHARED_PER_BLOCK)
        _check(driver.cuDevicePrimaryCtxRetain(byref(context), self._number), "opening a GPU")
        self.context = context.value
        self._lock = threading.RLock()
        self._modules: dict[Unit, c_void_p] = {}
        self._functions: dict[tuple[Unit, str], _Function] = {}
        self._workspaces: dict[tuple[int, bool], list[Array]] = {}

    def __repr__(self) -> str:
        return f"CudaDevice({self.index})"

    def _attribute(self, attribute: int) -> int:
        value = c_int()
        _check(self._driver.cuDeviceGetAttribute(byref(value), attribute, self._number), "asking about a GPU")
        return value.value

    @contextmanager
    def current(self) -> Iterator[None]:
        """In here this device's primary context is the thread's current one, whatever it was."""
        _check(self._driver.cuCtxPushCurrent_v2(self.context), "entering a GPU's context")
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent_v2(byref(c_void_p()))

    # ---- kernels ----

    def launch(self, launch: Launch, stream: int) -> None:
        """Enqueue a kernel on a stream; it may be capturing a CUDA graph. Loads the kernel at its first launch."""
        function = self._functions.get((launch.unit, launch.kernel))
        if function is None or function.shared < launch.shared:
            function = self._function(launch)
        for arg in launch.args:
            if type(arg) is Array and arg.stream is not None and arg.stream != stream:
                self._wait(stream, arg.stream)
        arguments = (
            function.handle, *launch.grid, *launch.block, launch.shared, c_void_p(stream), None, pack(launch.args)
        )  # fmt: skip
        current = c_void_p()
        self._driver.cuCtxGetCurrent(byref(current))
        if current.value == self.context:
            status = self._driver.cuLaunchKernel(*arguments)
        else:
            with self.current():
                status = self._driver.cuLaunchKernel(*arguments)
        if status:
            _check(status, f"launching {launch.kernel} with a grid of {launch.grid}, a block of {launch.block} and "
                           f"{launch.shared} bytes of shared memory on {self.name}")  # fmt: skip

    def _function(self, launch: Launch) -> _Function:
        """The kernel of a launch, loaded and allowed the dynamic shared memory it asks for."""
        what = f"loading {launch.kernel}"
        with self._lock, self.current(), _relaxed_capture(self._driver):
            function = self._functions.get((launch.unit, launch.kernel))
            if function is None:
                if launch.unit not in self._modules:
                    self._modules[launch.unit] = self._load(launch.unit)
                handle = c_void_p()
                _check(
                    self._driver.cuModuleGetFunction(byref(handle), self._modules[launch.unit], launch.kernel.encode()),
                    what,
                )
                function = self._functions[launch.unit, launch.kernel] = _Function(handle)
            if launch.shared > function.shared:
                if launch.shared > self.shared_per_block:
                    raise InputError(
                        f"{launch.kernel} needs {launch.shared} bytes of shared memory a block, "
                        f"{self.name} has {self.shared_per_block}"
                    )
                _check(self._driver.cuFuncSetAttribute(function.handle, _MAX_DYNAMIC_SHARED, launch.shared), what)
                function.shared = launch.shared
            return function

    def _load(self, unit: Unit) -> c_void_p:
        """A unit's module: of its fat binary where one is there and fits, else compiled for this device."""
        from dagan_rt.kernels import _build

        module = c_void_p()
        packed = _build.fat_binary(unit)
        if packed is not None:
            status = self._driver.cuModuleLoadData(byref(module), packed)
            if status == 0:
                return module
            if status not in _OTHER_GPU:
                _check(status, f"loading the fat binary of {unit.source}")
        image = _build.compiled(unit, self.capability)
        _check(self._driver.cuModuleLoadData(byref(module), image), f"loading {unit.source}")
        return module

    def _wait(self, stream: int, other: int) -> None:
        """What is enqueued on `stream` from here on runs after what is on `other` now."""
        with self.current():
            event = c_void_p()
            _check(self._driver.cuEventCreate(byref(event), _EVENT_DISABLE_TIMING), "creating an event")
            try:
                _check(self._driver.cuEventRecord(event, other), "recording an event")
                _check(self._driver.cuStreamWaitEvent(stream, event, 0), "waiting for an event")
            finally:
                self._driver.cuEventDestroy_v2(event)  # the driver keeps it until it has happened

    # ---- scratch memory ----

    def workspace(self, stream: int, nbytes: int, zeroed: bool = False) -> Array:
        """Scratch memory of a stream, grown by doubling and never freed: captured graphs may hold its address.

        A graph uses the memory of the stream it was captured on: two graphs captured on one stream must not be
        replayed at the same time.
        """
        kept = self._workspaces.get((stream, zeroed))
        if kept and kept[-1].shape[0] >= nbytes:
            return kept[-1]
        with self._lock:
            kept = self._workspaces.setdefault((stream, zeroed), [])
            if not kept or kept[-1].shape[0] < nbytes:
                kept.append(self._allocate(max(1 << 20, 1 << (nbytes - 1).bit_length()), zeroed))
            return kept[-1]

    def clear(self, pointer: int, nbytes: int, stream: int) -> None:
        """Enqueue the zeroing of memory on a stream."""
        with self.current():
            _check(self._driver.cuMemsetD8Async(pointer, 0, nbytes, stream), "zeroing memory")

    def _allocate(self, nbytes: int, zeroed: bool) -> Array:
        driver, pointer, stream = self._driver, c_void_p(), c_void_p()
        with self.current(), _relaxed_capture(driver):
            _check(driver.cuMemAlloc_v2(byref(pointer), nbytes), f"allocating {nbytes} bytes on {self.name}")
            if zeroed:  # on a stream of its own, so that a graph being captured does not hold it
                _check(driver.cuStreamCreate(byref(stream), _STREAM_NON_BLOCKING), "creating a stream")
                _check(driver.cuMemsetD8Async(pointer, 0, nbytes, stream), "zeroing memory")
                _check(driver.cuStreamSynchronize(stream), "zeroing memory")
                driver.cuStreamDestroy_v2(stream)
        assert pointer.value is not None
        return Array(pointer.value, (nbytes,), (1,), "uint8", self, None)


@dataclass
class _Function:
    handle: c_void_p
    shared: int = 48 * 1024  # what a launch may ask for; more needs permission


@contextmanager
def _relaxed_capture(driver: ctypes.CDLL) -> Iterator[None]:
    """Lets this thread allocate and load while a stream of it is capturing a CUDA graph."""
    mode = c_int(_CAPTURE_RELAXED)
    driver.cuThreadExchangeStreamCaptureMode(byref(mode))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(byref(mode))


_devices: dict[int, CudaDevice] = {}


def device(index: int) -> CudaDevice:
    """The GPU of that number; raises InputError where there is none."""
    if index not in _devices:
        _devices.setdefault(index, CudaDevice(index))
    return _devices[index]
