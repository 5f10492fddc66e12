"""OpenVINO on the CPU: the fastest way to run the graphs of a bundle on x86 without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from dagan_rt.backends.onnxruntime import NumpyImages, check_names
from dagan_rt.bundle import Bundle, Graph
from dagan_rt.errors import InputError

RANK = 8


def missing(bundle: Bundle | None = None) -> str | None:
    """None, or why this backend cannot run here."""
    if importlib.util.find_spec("openvino") is None:
        return "the package openvino is not installed: run pip install 'dagan-rt[openvino]'"
    return None


def open(bundle: Bundle, threads: int | None = None) -> OpenVinoBackend:
    """Compile the graphs of a bundle; raises InputError naming the file that OpenVINO cannot load."""
    return OpenVinoBackend(bundle, threads)


class OpenVinoBackend(NumpyImages):
    """One compiled model a graph and batch size; arrays are NumPy float32. Threads may call it at the same time."""

    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._core = core()
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads or 0,  # 0 is all cores
            # Left to itself it computes float32 graphs in bfloat16 where the processor has it: 8 bits for 24.
            "INFERENCE_PRECISION_HINT": "f32",
            # Pinned, the threads of two processes on one machine would share the first cores and leave the others idle.
            "ENABLE_CPU_PINNING": False,
        }
        self._graphs = bundle.graphs
        self._requests: dict[tuple[str, int], Any] = {}
        self._lock = threading.Lock()  # a request computes one thing at a time
        for name in bundle.graphs:
            self._request(name, bundle.batch.least)

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name of one graph; a batch size that was not seen before is compiled first."""
        batch = len(next(iter(inputs.values())))
        with self._lock:
            # Inputs are read where they lie, which is over when `infer` returns; outputs are copies.
            found = self._request(graph, batch).infer(dict(inputs), share_inputs=True, share_outputs=False)
        return {tensor.name: found[tensor.name] for tensor in self._graphs[graph].outputs}

    def _request(self, name: str, batch: int) -> Any:
        """Compiled for fixed shapes, which are faster: a CPU gains next to nothing from a batch."""
        if (name, batch) not in self._requests:
            self._requests[name, batch] = self._compile(self._graphs[name], batch)
        return self._requests[name, batch]

    def _compile(self, graph: Graph, batch: int) -> Any:
        try:
            model = self._core.read_model(graph.file)
            check_names(graph, *([port.any_name for port in side] for side in (model.inputs, model.outputs)))
            model.reshape({tensor.name: [batch, *tensor.shape[1:]] for tensor in graph.inputs})
            return self._core.compile_model(model, "CPU", self._settings).create_infer_request()
        except RuntimeError as error:  # all that OpenVINO raises
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{graph.file} cannot be loaded by OpenVINO {version()}: {reason}") from None


@functools.cache
def core() -> Any:
    """The one `openvino.Core` of the process, never given up before the process ends.

    Each that compiles for the CPU lends the thread a stack for signals and takes it back at its end. Of two that end
    in the order they began, the second gives back the first's, which is gone: the next Ctrl-C is then a segmentation
    fault.
    """
    return import_openvino().Core()


def import_openvino() -> Any:
    """The module, imported without a report to its makers.

    `import openvino` sends one over the network, and writes an identifier into the home directory, wherever the
    package openvino_telemetry is installed, which openvino asks for; without it a stub in openvino does nothing.
    """
    hidden = "openvino_telemetry"
    if "openvino" in sys.modules or hidden in sys.modules:
        return importlib.import_module("openvino")
    sys.modules[hidden] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[hidden]


def version() -> str:
    """As 2026.4.1, without the build."""
    return str(import_openvino().__version__).partition("-")[0]
