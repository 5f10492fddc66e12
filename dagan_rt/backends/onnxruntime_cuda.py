"""ONNX Runtime on an NVIDIA GPU through its CUDA provider; `onnxruntime_tensorrt.py` is the same through TensorRT.

ONNX Runtime by itself takes the CPU, with a line in its log, where a provider cannot be loaded. Here that is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np

from dagan_rt.backends.onnxruntime import OnnxRuntimeBackend, check_names, load_session
from dagan_rt.bundle import Bundle, Graph
from dagan_rt.cuda.driver import compute_capability
from dagan_rt.cuda.driver import missing as missing_gpu
from dagan_rt.errors import InputError

RANK = 5
PROVIDER = "CUDAExecutionProvider"
INSTALL = "run pip uninstall -y onnxruntime; pip install onnxruntime-gpu"
# TF32 keeps ten bits of a float32's 23, and a graph that is float32 is so for a reason.
OPTIONS = {"use_tf32": "0"}


def missing(bundle: Bundle | None = None, provider: str = PROVIDER) -> str | None:
    """None, or why this backend cannot run here: the package, the provider, the GPU."""
    if importlib.util.find_spec("onnxruntime") is None:
        return f"the package onnxruntime-gpu is not installed: {INSTALL}"
    if provider not in importlib.import_module("onnxruntime").get_available_providers():
        return f"the package onnxruntime that is installed has no {provider}: {INSTALL}"
    if compute_capability() is None:
        return f"{provider} needs an NVIDIA GPU: {missing_gpu()}"
    return None


def open(bundle: Bundle, threads: int | None = None) -> OnnxRuntimeGpuBackend:
    """Load the graphs of a bundle; InputError if a file cannot be loaded, or if ONNX Runtime falls back to the CPU."""
    return OnnxRuntimeGpuBackend(bundle, threads, "onnxruntime-cuda", [(PROVIDER, OPTIONS)])


class OnnxRuntimeGpuBackend(OnnxRuntimeBackend):
    """One session a graph; arrays are onnxruntime.OrtValue float32 on the GPU, and stay there between graphs."""

    device = "cuda"

    def __init__(self, bundle: Bundle, threads: int | None, name: str, providers: list[tuple[str, Any]]) -> None:
        """providers: of ONNX Runtime with their options; graphs must run on the first, what it cannot on the others."""
        self.name, self._providers = name, providers
        self._library = importlib.import_module("onnxruntime")
        if hasattr(self._library, "preload_dlls"):  # of CUDA and cuDNN, where pip has installed them
            self._library.preload_dlls()
        super().__init__(bundle, threads)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name of one graph."""
        session, names = self._sessions[graph], self._outputs[graph]
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, self.device)
        session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))

    def from_image(self, image: np.ndarray) -> Any:
        """HWC uint8 RGB -> [1, 3, H, W] float32 in [0, 1], converted on the CPU."""
        return self.from_numpy(super().from_image(image))

    def to_image(self, prediction: Any) -> np.ndarray:
        """[1, 3, H, W] in [0, 1] -> HWC uint8 RGB, converted on the CPU."""
        return super().to_image(self.to_numpy(prediction))

    def from_numpy(self, values: np.ndarray) -> Any:
        """A float32 copy on the GPU."""
        return self._library.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values, np.float32), self.device)

    def to_numpy(self, array: Any) -> np.ndarray:
        """A float32 copy on the host."""
        return np.array(array.numpy())

    def _load(self, graph: Graph) -> Any:
        session = load_session(graph.file, self.threads, [*self._providers, "CPUExecutionProvider"])
        wanted, got = self._providers[0][0], session.get_providers()
        if wanted not in got:
            raise InputError(
                f"{wanted} of ONNX Runtime {self._library.__version__} cannot be loaded, and {graph.file} would run on "
                f"{got[0]}: install the CUDA and cuDNN that this version needs (onnxruntime.ai, Execution Providers), "
                "or choose another backend"
            )
        session.disable_fallback()  # which would go on with the CPU after an error of the GPU
        check_names(graph, *([node.name for node in side] for side in (session.get_inputs(), session.get_outputs())))
        return session
