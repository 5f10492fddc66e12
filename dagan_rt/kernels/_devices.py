"""GPUs as the kernels see them: what is launched, where, and on whose memory.

Kernels are launched through the CUDA driver itself (libcuda, by ctypes), in the primary context that PyTorch, CuPy and
PyCUDA's `autoprimaryctx` share. So a launch needs none of them, takes any stream, and costs a few microseconds.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import addressof, byref, c_char, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from dagan_rt.cuda import driver as cuda
from dagan_rt.cuda.driver import CudaError as CudaError
from dagan_rt.cuda.driver import check
from dagan_rt.cuda.driver import missing as missing
from dagan_rt.errors import InputError

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4, "int64": 8}
# As __cuda_array_interface__ spells them; it knows no bfloat16.
TYPESTR = {"float32": "<f4", "float16": "<f2", "uint8": "|u1", "int32": "<i4", "int64": "<i8"}


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
    early: bool = False  # it may start before the kernel ahead of it has ended, for which it waits by itself


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
    dtype: str  # float32, float16, bfloat16, uint8, int32 or int64
    device: Device
    owner: Any  # keeps the memory alive
    stream: int | None = None  # work there may still be writing it; None where the caller sees to that

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What other libraries see it by; none knows bfloat16 this way."""
        if self.dtype not in TYPESTR:
            raise AttributeError(f"an array of {self.dtype} has no __cuda_array_interface__")
        size, stream = ITEM_BYTES[self.dtype], {} if self.stream is None else {"stream": self.stream}
        strides = tuple([size * stride for stride in self.strides])
        found = {"shape": self.shape, "typestr": TYPESTR[self.dtype], "data": (self.pointer, False)}
        return found | {"strides": strides, "version": 3} | stream

    def rows(self, start: int, count: int) -> Array:
        """A part of the first axis."""
        pointer = self.pointer + start * self.strides[0] * ITEM_BYTES[self.dtype]
        shape = (count, *self.shape[1:])
        return Array(pointer, shape, self.strides, self.dtype, self.device, self.owner, self.stream)

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


EARLY_CAPABILITY = (9, 0)  # of programmatic dependent launches


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of which one int of the value is used."""

    _fields_ = [("id", c_int), ("padding", c_int), ("value", c_int), ("rest", c_char * 60)]  # noqa: RUF012


class _How(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [  # noqa: RUF012
        ("sizes", c_uint * 7), ("stream", c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", c_uint)
    ]  # fmt: skip


_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_EARLY = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)


def _how(launch: Launch, stream: int) -> _How:
    """The configuration of an early launch."""
    sizes = (c_uint * 7)(*launch.grid, *launch.block, launch.shared)
    return _How(sizes, c_void_p(stream), ctypes.pointer(_EARLY), 1)


# ---------------------------------------------------------------------------------------------------------------------
# GPUs

# CUdevice_attribute, CUfunction_attribute, CUpointer_attribute, CUstreamCaptureMode and flags, as in cuda.h.
_MULTIPROCESSORS, _SHARED_PER_BLOCK = 16, 97
_MAX_DYNAMIC_SHARED = 8
_POINTER_CONTEXT, _POINTER_DEVICE = 1, 9
_CAPTURE_RELAXED = 2
_STREAM_NON_BLOCKING, _EVENT_DISABLE_TIMING = 1, 2
# Statuses of cuModuleLoadData that mean: compiled for something else.
_OTHER_GPU = (200, 209, 218, 222)


def pointer_device(pointer: int, name: str) -> CudaDevice:
    """The GPU that memory lies on; InputError for memory that is not a GPU's, or not of its primary context."""
    driver = cuda.driver()
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
        driver = self._driver = cuda.driver()
        self.index, number, context = index, c_int(), c_void_p()
        if driver.cuDeviceGet(byref(number), index):
            raise InputError(f"there is no GPU {index} in this process")
        self._number = number.value
        name = ctypes.create_string_buffer(100)
        check(driver.cuDeviceGetName(name, len(name), self._number), "asking the name of a GPU")
        self.name = name.value.decode()
        self.capability = cuda.capability(self._number)
        self.multiprocessors = cuda.attribute(self._number, _MULTIPROCESSORS)
        self.shared_per_block = cuda.attribute(self._number, _SHARED_PER_BLOCK)
        check(driver.cuDevicePrimaryCtxRetain(byref(context), self._number), "opening a GPU")
        self.context = context.value
        self._lock = threading.RLock()
        self._modules: dict[Unit, c_void_p] = {}
        self._functions: dict[tuple[Unit, str], _Function] = {}
        self._workspaces: dict[tuple[int, bool], list[Array]] = {}

    def __repr__(self) -> str:
        return f"CudaDevice({self.index})"

    @contextmanager
    def current(self) -> Iterator[None]:
        """In here this device's primary context is the thread's current one, whatever it was."""
        check(self._driver.cuCtxPushCurrent_v2(self.context), "entering a GPU's context")
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
        extra = pack(launch.args)
        if launch.early and self.capability >= EARLY_CAPABILITY:
            start: Any = self._driver.cuLaunchKernelEx
            how = _how(launch, stream)
            arguments: tuple[Any, ...] = (byref(how), function.handle, None, extra)
        else:
            start = self._driver.cuLaunchKernel
            arguments = (
                function.handle, *launch.grid, *launch.block, launch.shared, c_void_p(stream), None, extra
            )  # fmt: skip
        current = c_void_p()
        self._driver.cuCtxGetCurrent(byref(current))
        if current.value == self.context:
            status = start(*arguments)
        else:
            with self.current():
                status = start(*arguments)
        if status:
            check(status, f"launching {launch.kernel} with a grid of {launch.grid}, a block of {launch.block} and "
                           f"{launch.shared} bytes of shared memory on {self.name}")  # fmt: skip

    def _function(self, launch: Launch) -> _Function:
        """The kernel of a launch, loaded and allowed the dynamic shared memory it asks for."""
        what = f"loading {launch.kernel}"
        with self._lock, self.current(), relaxed_capture():
            function = self._functions.get((launch.unit, launch.kernel))
            if function is None:
                if launch.unit not in self._modules:
                    self._modules[launch.unit] = self._load(launch.unit)
                handle = c_void_p()
                check(
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
                check(self._driver.cuFuncSetAttribute(function.handle, _MAX_DYNAMIC_SHARED, launch.shared), what)
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
                check(status, f"loading the fat binary of {unit.source}")
        image = _build.compiled(unit, self.capability)
        check(self._driver.cuModuleLoadData(byref(module), image), f"loading {unit.source}")
        return module

    def _wait(self, stream: int, other: int) -> None:
        """What is enqueued on `stream` from here on runs after what is on `other` now."""
        with self.current():
            event = c_void_p()
            check(self._driver.cuEventCreate(byref(event), _EVENT_DISABLE_TIMING), "creating an event")
            try:
                check(self._driver.cuEventRecord(event, other), "recording an event")
                check(self._driver.cuStreamWaitEvent(stream, event, 0), "waiting for an event")
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
            check(self._driver.cuMemsetD8Async(pointer, 0, nbytes, stream), "zeroing memory")

    def _allocate(self, nbytes: int, zeroed: bool) -> Array:
        driver, stream = self._driver, c_void_p()
        with self.current(), relaxed_capture():
            pointer = self.reserve(nbytes, "the scratch memory of a kernel")
            if zeroed:  # on a stream of its own, so that a graph being captured does not hold it
                check(driver.cuStreamCreate(byref(stream), _STREAM_NON_BLOCKING), "creating a stream")
                check(driver.cuMemsetD8Async(pointer, 0, nbytes, stream), "zeroing memory")
                check(driver.cuStreamSynchronize(stream), "zeroing memory")
                driver.cuStreamDestroy_v2(stream)
        return Array(pointer, (nbytes,), (1,), "uint8", self, None)

    def reserve(self, nbytes: int, what: str, stream: int | None = None) -> int:
        """The address of new memory, in order with a stream's work if one is named; `what` it is for.

        Raises InputError if there is not enough.
        """
        driver, pointer = self._driver, c_void_p()
        with self.current():
            if stream is None:
                status = driver.cuMemAlloc_v2(byref(pointer), nbytes)
            else:
                status = driver.cuMemAllocAsync(byref(pointer), nbytes, stream)
            if status == cuda.OUT_OF_MEMORY:
                free, total = self.memory()
                raise InputError(
                    f"{what} needs {_megabytes(nbytes)} of GPU memory and {self.name} has {_megabytes(free)} of its "
                    f"{_megabytes(total)} free: take fewer slots or smaller batches, or end what else uses the GPU"
                )
            check(status, f"allocating {nbytes} bytes on {self.name}")
        assert pointer.value is not None
        return pointer.value

    def memory(self) -> tuple[int, int]:
        """Bytes of its memory that are free, and all."""
        free, total = c_size_t(), c_size_t()
        with self.current():
            check(self._driver.cuMemGetInfo_v2(byref(free), byref(total)), f"asking for the memory of {self.name}")
        return free.value, total.value


@dataclass
class _Function:
    handle: c_void_p
    shared: int = 48 * 1024  # what a launch may ask for; more needs permission


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Lets this thread allocate and load while a stream of it is capturing a CUDA graph."""
    driver, mode = cuda.driver(), c_int(_CAPTURE_RELAXED)
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


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
