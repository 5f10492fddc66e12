"""ONNX Runtime on an NVIDIA GPU through its TensorRT provider, which builds engines when a bundle is first opened."""

from __future__ import annotations

from dagan_rt.backends import onnxruntime_cuda
from dagan_rt.bundle import Bundle
from dagan_rt.kernels._build import cache_folder

RANK = 4
PROVIDER = "TensorrtExecutionProvider"


def missing(bundle: Bundle | None = None) -> str | None:
    """None, or why this backend cannot run here."""
    return onnxruntime_cuda.missing(bundle, PROVIDER)


def open(bundle: Bundle, threads: int | None = None) -> onnxruntime_cuda.OnnxRuntimeGpuBackend:
    """Load the graphs of a bundle, as `onnxruntime_cuda.open`; the first time it builds engines, for minutes."""
    folder = cache_folder().parent / "onnxruntime-tensorrt"
    folder.mkdir(parents=True, exist_ok=True)
    options = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
    cuda = (onnxruntime_cuda.PROVIDER, onnxruntime_cuda.OPTIONS)  # for what TensorRT cannot
    return onnxruntime_cuda.OnnxRuntimeGpuBackend(bundle, threads, "onnxruntime-tensorrt", [(PROVIDER, options), cuda])
