"""Arrays of any library as the kernels see them, and new ones in the caller's library.

PyTorch and CuPy are asked directly, everything else through `__cuda_array_interface__` (which knows no bfloat16) or
DLPack. No library is imported that the caller has not imported, but to take DLPack or to make an array for a caller
who has none.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np

from dagan_rt.errors import InputError, MissingPackage, require
from dagan_rt.kernels import _devices
from dagan_rt.kernels._devices import ITEM_BYTES, TYPESTR, Array, CudaDevice, Device

Shape = tuple[int, ...]
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "u8", "int32": "i32", "int64": "i64"}
FLOATS = ("float32", "float16", "bfloat16")
_OF_TYPESTR = {typestr: dtype for dtype, typestr in TYPESTR.items()}
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged

_emulated: Device | None = None


def emulate(device: Device | None) -> None:
    """Take PyTorch tensors on the CPU to lie on this device, or no longer: a hook for tests."""
    global _emulated
    _emulated = device


def short(dtype: str) -> str:
    """The dtype as the names of kernels spell it: f32, f16, bf16, u8."""
    return SHORT[dtype]


# ---------------------------------------------------------------------------------------------------------------------
# What the caller gave


def view(array: Any, name: str) -> Array:
    """A caller's array as pointer, shape and strides. Nothing is copied.

    array: a tensor of PyTorch, an array of CuPy or PyCUDA, or any with `__cuda_array_interface__` or DLPack, on a GPU.
    name: what errors call it. Raises InputError for anything else, an unknown dtype and an empty array.
    """
    if _is(array, "torch", "Tensor"):
        found = _view_torch(array, name)
    elif type(array) is Array:
        found = array
    elif _is(array, "cupy", "ndarray"):
        size, device = array.itemsize, _devices.device(array.device.id)
        strides = tuple([stride // size for stride in array.strides])
        found = Array(array.data.ptr, array.shape, strides, _known(array.dtype.name, name), device, array)
    elif hasattr(array, "__cuda_array_interface__"):
        found = _view_interface(array, name)
    elif hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        if array.__dlpack_device__()[0] not in _DLPACK_CUDA:
            raise _not_on_gpu(array, name)
        return view(_from_dlpack(array), name)
    else:
        raise InputError(
            f"{name} must be a GPU array of PyTorch, CuPy or PyCUDA, or one with __cuda_array_interface__ or DLPack, "
            f"got {_kind(array)}"
        )
    if 0 in found.shape:
        raise InputError(f"{name} must not be empty, got the shape {found.shape}")
    return found


def _view_torch(tensor: Any, name: str) -> Array:
    dtype = _torch_dtypes().get(tensor.dtype)
    if dtype is None:
        raise _unknown_dtype(name, str(tensor.dtype).removeprefix("torch."))
    if tensor.is_cuda:
        device: Device = _devices.device(tensor.get_device())
    elif _emulated is not None and tensor.device.type == "cpu":
        device = _emulated
    else:
        raise _not_on_gpu(tensor, name)
    return Array(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype, device, tensor)


def _view_interface(array: Any, name: str) -> Array:
    interface = array.__cuda_array_interface__
    dtype = _OF_TYPESTR.get(interface["typestr"])
    if dtype is None:
        raise _unknown_dtype(name, interface["typestr"])
    shape, pointer = tuple(interface["shape"]), interface["data"][0]
    size = ITEM_BYTES[dtype]
    strides = interface.get("strides")
    strides = _strides(shape) if strides is None else tuple(stride // size for stride in strides)
    if 0 in shape:
        raise InputError(f"{name} must not be empty, got the shape {shape}")
    device = _devices.pointer_device(pointer, name)
    return Array(pointer, shape, strides, dtype, device, array, interface.get("stream"))


def _from_dlpack(array: Any) -> Any:
    """The same memory as a tensor or array of a library that is here."""
    for library in ("torch", "cupy"):
        if library in sys.modules or importlib.util.find_spec(library):
            return importlib.import_module(library).from_dlpack(array)
    raise MissingPackage("DLPack arrays are taken by CuPy or PyTorch: run pip install 'dagan-rt[cuda]'")


def current_stream(array: Any) -> int:
    """The handle of the stream that work on this array is to go to: its library's current one, else the one it names.

    0, the default stream, where a library has no current stream (PyCUDA).
    """
    if _is(array, "torch", "Tensor"):
        if not array.is_cuda:
            return 0
        current = getattr(sys.modules["torch"]._C, "_cuda_getCurrentRawStream", None)
        if current is not None:  # what torch.cuda.current_stream asks, without an object made for the answer
            return current(array.get_device())
        return sys.modules["torch"].cuda.current_stream(array.device).cuda_stream
    if _is(array, "cupy", "ndarray"):
        return sys.modules["cupy"].cuda.get_current_stream(array.device.id).ptr
    interface = getattr(array, "__cuda_array_interface__", None) or {}
    return interface.get("stream") or 0


def handle(stream: Any) -> int:
    """The CUDA handle of a stream: an int, or what CuPy, PyTorch, PyCUDA or cuda-python call a stream."""
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for attribute in ("ptr", "cuda_stream", "handle"):
        if isinstance(found := getattr(stream, attribute, None), int):
            return found
    raise InputError(f"stream must be a CUDA stream or its handle, got {type(stream).__name__}")


def stream_for(array: Any, stream: Any = None) -> int:
    """The handle of the stream a caller named (an int or any library's stream), or of the array's current one."""
    return current_stream(array) if stream is None else handle(stream)


# ---------------------------------------------------------------------------------------------------------------------
# What is expected of it


def expect(
    name: str,
    array: Array,
    shape: Sequence[int | None] | None = None,
    dtypes: str | Sequence[str] | None = None,
    axes: str = "",
) -> None:
    """Raise InputError unless the array has that shape (None: any length of an axis) and one of these dtypes.

    axes: names of the axes for the error, "B H W 2".
    """
    if shape is not None and array.shape != shape and not _fits(array.shape, shape):
        lengths = ", ".join("*" if length is None else str(length) for length in shape)
        wanted = f"({lengths},)" if len(shape) == 1 else f"({lengths})"
        if axes:
            wanted = f"[{', '.join(axes.split())}] = {wanted}"
        raise InputError(f"{name} must be {wanted}, got {array.shape}")
    if dtypes is not None:
        dtypes = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
        if array.dtype not in dtypes:
            raise InputError(f"{name} must be {' or '.join(dtypes)}, got {array.dtype}")


def together(**arrays: Array | None) -> Device:
    """The device that all arrays lie on (None is passed over); raises InputError if they lie on two."""
    (first, array), *others = [(name, array) for name, array in arrays.items() if array is not None]
    for name, other in others:
        if other.device is not array.device:
            raise InputError(
                f"{name} must lie on the same GPU as {first} ({array.device!r}), got one on {other.device!r}: move it"
            )
    return array.device


# ---------------------------------------------------------------------------------------------------------------------
# New arrays in the caller's library


def new(like: Any, shape: Sequence[int], dtype: str | None = None, layout: str = "nchw", stream: Any = None) -> Any:
    """An uninitialised array of the library of `like`, on its device.

    shape: [B, C, ...] for both layouts; "nhwc" keeps the channels of a pixel together in memory.
    stream: where it is used first, if that is not the library's current stream: its memory is then that stream's, and
    not handed on too early. A caller with an array of no known library gets one of PyTorch, CuPy or PyCUDA,
    one with an `Array` another of these.
    """
    shape = tuple(shape)
    strides = _strides(shape, layout)
    if _is(like, "torch", "Tensor"):
        kind = like.dtype if dtype is None else _torch_dtype(dtype)
        if stream is None:
            return like.new_empty_strided(shape, strides, dtype=kind)
        with _torch_stream(like.device, stream):
            return like.new_empty_strided(shape, strides, dtype=kind)
    array = view(like, "array")
    assert isinstance(array.device, CudaDevice)
    if type(like) is Array:
        return _new_own(array.device, shape, strides, dtype or array.dtype, stream)
    return _MAKERS[_library(like)](array.device, shape, strides, dtype or array.dtype, stream)


def zeros(like: Any, shape: Sequence[int], dtype: str, stream: Any = None) -> Any:
    """An array of zeros of the library of `like`, on its device."""
    array = new(like, shape, dtype, stream=stream)
    if _is(array, "torch", "Tensor"):
        with _torch_stream(array.device, stream):
            return array.zero_()
    found = view(array, "array")
    assert isinstance(found.device, CudaDevice)
    found.device.clear(found.pointer, math.prod(shape) * ITEM_BYTES[dtype], stream_for(like, stream))
    return array


def _library(like: Any) -> str:
    """Who makes new arrays for a caller who gave this one, which is none of PyTorch's."""
    if _is(like, "cupy", "ndarray"):
        return "cupy"
    if _is(like, "pycuda.gpuarray", "GPUArray"):
        return "pycuda"
    for library in sorted(_MAKERS, key=lambda it: it not in sys.modules):
        if library in sys.modules or importlib.util.find_spec(library):
            return library
    raise MissingPackage("new GPU arrays need PyTorch, CuPy or PyCUDA: run pip install 'dagan-rt[cuda]'")


def _new_own(device: CudaDevice, shape: Shape, strides: Shape, dtype: str, stream: Any) -> Array:
    from dagan_rt.cuda.streams import Memory

    memory = Memory(device, math.prod(shape) * ITEM_BYTES[dtype], f"an array {shape}", handle(stream or 0))
    return Array(memory.pointer, shape, strides, dtype, device, memory)


def _new_torch(device: CudaDevice, shape: Shape, strides: Shape, dtype: str, stream: Any) -> Any:
    import torch

    place = torch.device("cuda", device.index)
    with _torch_stream(place, stream):
        return torch.empty_strided(shape, strides, dtype=_torch_dtype(dtype), device=place)


def _new_cupy(device: CudaDevice, shape: Shape, strides: Shape, dtype: str, stream: Any) -> Any:
    import cupy

    size = ITEM_BYTES[dtype]
    with cupy.cuda.Device(device.index), nullcontext() if stream is None else cupy.cuda.ExternalStream(handle(stream)):
        memory = cupy.cuda.alloc(math.prod(shape) * size)
        return cupy.ndarray(shape, _numpy_dtype(dtype), memory, tuple([size * stride for stride in strides]))


def _new_pycuda(device: CudaDevice, shape: Shape, strides: Shape, dtype: str, stream: Any) -> Any:
    from pycuda import gpuarray

    size = ITEM_BYTES[dtype]
    with device.current():
        return gpuarray.GPUArray(shape, _numpy_dtype(dtype), strides=tuple([size * stride for stride in strides]))


_MAKERS = {"torch": _new_torch, "cupy": _new_cupy, "pycuda": _new_pycuda}


# ---------------------------------------------------------------------------------------------------------------------


def _is(array: Any, library: str, kind: str) -> bool:
    """Whether it is an array of that library, which is not imported for the question."""
    module = sys.modules.get(library)
    return module is not None and isinstance(array, getattr(module, kind))


def _fits(shape: tuple[int, ...], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(b is None or a == b for a, b in zip(shape, wanted, strict=True))


@cache
def _torch_dtypes() -> dict[Any, str]:
    return {_torch_dtype(name): name for name in SHORT}


@cache
def _torch_dtype(dtype: str) -> Any:
    import torch

    return getattr(torch, dtype)


def _torch_stream(device: Any, stream: Any) -> AbstractContextManager[Any]:
    """Makes a stream the current one of PyTorch."""
    import torch

    if stream is None or device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(handle(stream), device))


def _numpy_dtype(dtype: str) -> np.dtype[Any]:
    if dtype != "bfloat16":
        return np.dtype(dtype)
    return np.dtype(require("ml_dtypes", extra="cuda", why="a bfloat16 array of CuPy").bfloat16)


def _strides(shape: Shape, layout: str = "nchw") -> Shape:
    """Of an array without gaps, in elements; "nhwc": the second axis varies fastest."""
    strides, step = [1] * len(shape), 1
    axes = range(len(shape) - 1, -1, -1) if layout == "nchw" else (1, *range(len(shape) - 1, 1, -1), 0)
    for axis in axes:
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def _known(dtype: str, name: str) -> str:
    if dtype not in SHORT:
        raise _unknown_dtype(name, dtype)
    return dtype


def _unknown_dtype(name: str, dtype: str) -> InputError:
    return InputError(f"{name} must be float32, float16, bfloat16 or uint8, got {dtype}")  # integers are slots only


def _not_on_gpu(array: Any, name: str) -> InputError:
    reason = _devices.missing() or "move it to one"
    return InputError(
        f"{name} must lie on a GPU, got {_kind(array)} on the CPU: {reason}, or pass PyTorch tensors and reference=True"
    )


def _kind(array: Any) -> str:
    return f"{type(array).__module__.split('.')[0]}.{type(array).__qualname__}".removeprefix("builtins.")
