"""The CUDA driver itself (libcuda, by ctypes): the one place that loads it and reads its errors.

All work is done in the primary context of a GPU, which PyTorch, CuPy, TensorRT and PyCUDA's `autoprimaryctx` share.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_void_p
from functools import cache
from typing import Any

from dagan_rt.errors import DeviceLost, InputError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
NEEDED = 12000  # CUDA 12.0: the oldest driver that has all functions below and knows every GPU there are kernels for

# But of cuCtxGetCurrent and cuLaunchKernel, which every launch calls: converting by prototype takes thrice the time.
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (c_void_p,),
    "cuGetErrorName": (c_int, c_void_p),
    "cuGetErrorString": (c_int, c_void_p),
    "cuDeviceGetCount": (c_void_p,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxGetDevice": (c_void_p,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (c_void_p,),
    "cuModuleLoadData": (c_void_p, c_char_p),
    "cuModuleGetFunction": (c_void_p, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuPointerGetAttribute": (c_void_p, c_int, c_void_p),
    "cuMemGetInfo_v2": (c_void_p, c_void_p),
    "cuMemAlloc_v2": (c_void_p, c_size_t),
    "cuMemFree_v2": (c_void_p,),
    "cuMemAllocAsync": (c_void_p, c_size_t, c_void_p),
    "cuMemFreeAsync": (c_void_p, c_void_p),
    "cuMemHostAlloc": (c_void_p, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_void_p, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_void_p, c_void_p, c_size_t, c_void_p),
    "cuMemsetD8Async": (c_void_p, c_ubyte, c_size_t, c_void_p),
    "cuStreamCreate": (c_void_p, c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, c_void_p),
    "cuEventCreate": (c_void_p, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (ctypes.POINTER(c_float), c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
    "cuGraphInstantiateWithFlags": (c_void_p, c_void_p, c_ulonglong),
    "cuGraphUpload": (c_void_p, c_void_p),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuThreadExchangeStreamCaptureMode": (c_void_p,),
}

# Statuses (CUresult in cuda.h).
OUT_OF_MEMORY, NOT_READY = 2, 600
_TOO_OLD = (222, 803, 804)  # unsupported PTX version, driver and library do not match, no forward compatibility
# After one of these nothing in the process's context works any more: the context was destroyed, the GPU fell off the
# bus, reported an uncorrectable memory error, or ran into an error of a kernel (illegal address, assertion …).
_LOST = frozenset((4, 46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999))
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…


class CudaError(RuntimeError):
    """The CUDA driver refused something that should have worked."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def driver() -> ctypes.CDLL:
    """The driver's library, initialised; raises InputError where there is none, or one too old."""
    return _load(LIBRARY)


@cache
def _load(library: str) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(library)
    except OSError:
        raise InputError("there is no NVIDIA driver on this machine (libcuda is not found)") from None
    if (present := _version(found)) < NEEDED:
        raise InputError(f"the NVIDIA driver is too old: {_needs(present)}")
    for name, types in _PROTOTYPES.items():
        getattr(found, name).argtypes = types
    if status := found.cuInit(0):
        if status in _TOO_OLD:
            raise InputError(
                f"the NVIDIA driver does not fit its libraries ({_error(found, status)}): {_needs(present)}"
            )
        raise InputError(f"the NVIDIA driver finds no usable GPU ({_error(found, status)})")
    return found


def version() -> int:
    """The newest CUDA the driver knows, as 13000 for 13.0; raises InputError where there is no driver."""
    return _version(driver())


def check(status: int, what: str) -> None:
    """Raise what a status means, unless it is success; `what` was being done.

    DeviceLost where the GPU or this process's work on it is gone, InputError if the driver is too old, else CudaError.
    """
    if not status:
        return
    message = f"{what} failed with {_error(driver(), status)}"
    if status in _LOST:
        raise DeviceLost(f"{message}: the GPU cannot be used by this process any more, start it again")
    if status in _TOO_OLD:
        raise InputError(f"{message}: {_needs(version())}")
    raise CudaError(message, status)


def missing() -> str | None:
    """None, or one sentence that says why there is no GPU to use here."""
    try:
        count = c_int()
        check(driver().cuDeviceGetCount(byref(count)), "counting GPUs")
        return None if count.value else "there is no NVIDIA GPU on this machine"
    except (InputError, RuntimeError) as error:
        return str(error)


def attribute(device: int, number: int) -> int:
    """A CUdevice_attribute of a CUdevice."""
    value = c_int()
    check(driver().cuDeviceGetAttribute(byref(value), number, device), "asking about a GPU")
    return value.value


def capability(device: int) -> tuple[int, int]:
    """The compute capability of a CUdevice, (8, 9) for sm_89."""
    return attribute(device, _MAJOR), attribute(device, _MINOR)


def current_device() -> int:
    """The number of the GPU whose context a library has made current, else 0, the first."""
    device = c_int()
    return 0 if driver().cuCtxGetDevice(byref(device)) else device.value


def compute_capability() -> str | None:
    """The compute capability of the current GPU, else of the first, as "8.9"; None without a driver or a GPU."""
    try:
        return "{}.{}".format(*capability(current_device()))
    except (InputError, RuntimeError):
        return None


def _version(found: ctypes.CDLL) -> int:
    value = c_int()
    found.cuDriverGetVersion(byref(value))
    return value.value


def _needs(found: int) -> str:
    return (
        f"dagan-rt needs a driver for CUDA {_dotted(NEEDED)} or newer, this one is for {_dotted(found)}: "
        "update the NVIDIA driver"
    )


def _dotted(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _error(found: ctypes.CDLL, status: int) -> str:
    name, text = c_char_p(), c_char_p()
    found.cuGetErrorName(status, byref(name))
    found.cuGetErrorString(status, byref(text))
    return f"{(name.value or b'error').decode()} {status}: {(text.value or b'unknown').decode()}"
