"""GPU arrays from whichever library is installed: CuPy, PyTorch or PyCUDA, in this order.

What a backend needs of it and no more: memory, and the way between HWC uint8 on the host and NCHW float32 on the GPU.
Only `download` and `image` wait for the GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import numpy as np

from dagan_rt.errors import InputError

NEEDED = "GPU arrays need CuPy, PyTorch with CUDA or PyCUDA: run pip install cupy-cuda13x"


class Arrays(Protocol):
    """One library; all its work goes to one CUDA stream, in order."""

    stream: int  # the handle

    def empty(self, shape: tuple[int, ...]) -> Any:
        """A float32 array of its own memory."""

    def upload(self, values: np.ndarray) -> Any:
        """A float32 copy on the GPU."""

    def download(self, array: Any) -> np.ndarray:
        """A float32 copy on the host of any array with `__cuda_array_interface__`."""

    def planes(self, image: np.ndarray) -> Any:
        """HWC uint8 -> [1, 3, H, W] float32 in [0, 1]."""

    def image(self, prediction: Any) -> np.ndarray:
        """[1, 3, H, W] float32 in [0, 1] -> HWC uint8."""


def missing() -> str | None:
    """None, or what to install. PyTorch is imported only where it is the last resort, to see whether it has CUDA."""
    if any(importlib.util.find_spec(package) for package in ("cupy", "pycuda")):
        return None
    if importlib.util.find_spec("torch") and importlib.import_module("torch").cuda.is_available():
        return None
    return NEEDED


def arrays(stream: Any = None) -> Arrays:
    """The best library here, on a stream of its own or on the user's; InputError if there is none."""
    if importlib.util.find_spec("cupy"):
        return CupyArrays(stream)
    if importlib.util.find_spec("torch") and importlib.import_module("torch").cuda.is_available():
        return TorchArrays(stream)
    if importlib.util.find_spec("pycuda"):
        return PycudaArrays(stream)
    raise InputError(NEEDED)


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


class _External:
    """A stream in the CUDA stream protocol, with the object that owns it."""

    def __init__(self, stream: Any) -> None:
        self.owner, self.handle = stream, handle(stream)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class CupyArrays:
    """CuPy, which is NumPy on the GPU."""

    def __init__(self, stream: Any = None) -> None:
        import cupy

        self._cupy, new = cupy, cupy.cuda.Stream
        if stream is None:
            self._stream = new(non_blocking=True)
        elif hasattr(new, "from_external"):
            self._stream = new.from_external(_External(stream))
        else:  # CuPy 13
            self._stream = cupy.cuda.ExternalStream(handle(stream))
        self.stream = int(self._stream.ptr)

    def empty(self, shape: tuple[int, ...]) -> Any:
        with self._stream:
            return self._cupy.empty(shape, np.float32)

    def upload(self, values: np.ndarray) -> Any:
        with self._stream:
            return self._cupy.array(values, np.float32, order="C")

    def download(self, array: Any) -> np.ndarray:
        with self._stream:
            return self._cupy.asnumpy(self._cupy.asarray(array))

    def planes(self, image: np.ndarray) -> Any:
        with self._stream:
            pixels = self._cupy.array(np.ascontiguousarray(image))
            return self._cupy.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32) / np.float32(255)

    def image(self, prediction: Any) -> np.ndarray:
        cupy = self._cupy
        with self._stream:
            levels = cupy.rint(cupy.clip(cupy.asarray(prediction)[0], 0, 1) * np.float32(255)).astype(np.uint8)
            return cupy.asnumpy(cupy.ascontiguousarray(levels.transpose(1, 2, 0)))


class TorchArrays:
    """PyTorch."""

    device = "cuda"

    def __init__(self, stream: Any = None) -> None:
        import torch

        self._torch, self._owner = torch, stream  # the user's stream must outlive its handle
        self._stream = torch.cuda.Stream() if stream is None else torch.cuda.ExternalStream(handle(stream))
        self.stream = int(self._stream.cuda_stream)

    def empty(self, shape: tuple[int, ...]) -> Any:
        with self._torch.cuda.stream(self._stream):
            return self._torch.empty(shape, dtype=self._torch.float32, device=self.device)

    def upload(self, values: np.ndarray) -> Any:
        with self._torch.cuda.stream(self._stream):
            return self._torch.from_numpy(np.array(values, np.float32, order="C")).to(self.device)

    def download(self, array: Any) -> np.ndarray:
        with self._torch.cuda.stream(self._stream):
            return self._torch.as_tensor(array, device=self.device).cpu().numpy()

    def planes(self, image: np.ndarray) -> Any:
        with self._torch.cuda.stream(self._stream):
            pixels = self._torch.from_numpy(np.array(image, order="C")).to(self.device)
            return pixels.permute(2, 0, 1)[None].to(self._torch.float32).contiguous() / 255

    def image(self, prediction: Any) -> np.ndarray:
        with self._torch.cuda.stream(self._stream):
            planes = self._torch.as_tensor(prediction, device=self.device)[0]
            levels = (planes.clamp(0, 1) * 255).round().to(self._torch.uint8)
            return levels.permute(1, 2, 0).contiguous().cpu().numpy()


class PycudaArrays:
    """PyCUDA, in the primary context that TensorRT uses too; its kernels are compiled by nvcc at the first call."""

    def __init__(self, stream: Any = None) -> None:
        import pycuda.autoprimaryctx  # noqa: F401 (importing it makes the context)
        from pycuda import driver, gpuarray
        from pycuda.elementwise import ElementwiseKernel

        if stream is not None and not isinstance(stream, driver.Stream):
            raise InputError(f"stream must be a pycuda.driver.Stream with PyCUDA, got {type(stream).__name__}")
        self._gpuarray = gpuarray
        self._stream = driver.Stream() if stream is None else stream
        self.stream = int(self._stream.handle)
        self._to_planes = ElementwiseKernel(
            "unsigned char *image, float *planes, int pixels",  # [H * W, 3] -> [3, H * W]
            "planes[i] = image[3 * (i % pixels) + i / pixels] / 255.f",
            "to_planes",
        )
        self._to_image = ElementwiseKernel(
            "float *planes, unsigned char *image, int pixels",  # [3, H * W] -> [H * W, 3]
            "image[i] = (unsigned char) rintf(fminf(fmaxf(planes[(i % 3) * pixels + i / 3], 0.f), 1.f) * 255.f)",
            "to_image",
        )

    def empty(self, shape: tuple[int, ...]) -> Any:
        return self._gpuarray.empty(shape, np.float32)

    def upload(self, values: np.ndarray) -> Any:
        return self._gpuarray.to_gpu(np.ascontiguousarray(values, np.float32))

    def download(self, array: Any) -> np.ndarray:
        self._stream.synchronize()
        interface = array.__cuda_array_interface__
        shape, pointer = tuple(interface["shape"]), interface["data"][0]
        return self._gpuarray.GPUArray(shape, np.float32, gpudata=pointer).get()

    def planes(self, image: np.ndarray) -> Any:
        height, width, _ = image.shape
        planes = self.empty((1, 3, height, width))
        pixels = self._gpuarray.to_gpu(np.ascontiguousarray(image))
        self._to_planes(pixels, planes, np.int32(height * width), stream=self._stream)
        self._stream.synchronize()  # PyCUDA frees memory at once: `pixels` must not go before it was read
        return planes

    def image(self, prediction: Any) -> np.ndarray:
        height, width = prediction.shape[2:]
        levels = self._gpuarray.empty((height, width, 3), np.uint8)
        self._to_image(prediction, levels, np.int32(height * width), stream=self._stream)
        self._stream.synchronize()
        return levels.get()
