"""ONNX Runtime on the CPU: the backend that `pip install dagan-rt` brings."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dagan_rt.bundle import Bundle, Graph
from dagan_rt.errors import InputError

RANK = 10


def missing(bundle: Bundle | None = None) -> str | None:
    """None, or why this backend cannot run here."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "the package onnxruntime is not installed: run pip install dagan-rt"
    return None


def open(bundle: Bundle, threads: int | None = None) -> OnnxRuntimeBackend:
    """Load the four graphs of a bundle; raises InputError naming the file that ONNX Runtime cannot load."""
    return OnnxRuntimeBackend(bundle, threads)


class NumpyImages:
    """The conversions of a backend whose arrays are NumPy float32."""

    def from_image(self, image: np.ndarray) -> np.ndarray:
        """HWC uint8 RGB -> [1, 3, H, W] float32 in [0, 1]."""
        planes = np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32)
        planes /= 255
        return planes

    def to_image(self, prediction: np.ndarray) -> np.ndarray:
        """[1, 3, H, W] in [0, 1] -> HWC uint8 RGB."""
        levels = np.rint(np.clip(prediction[0], 0, 1) * 255).astype(np.uint8)
        return np.ascontiguousarray(levels.transpose(1, 2, 0))

    def from_numpy(self, values: np.ndarray) -> np.ndarray:
        """The array itself, as float32."""
        return np.asarray(values, np.float32)

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array


class OnnxRuntimeBackend(NumpyImages):
    """One session a graph; arrays are NumPy float32."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self.threads = threads or _cores()
        self._outputs = {name: [output.name for output in graph.outputs] for name, graph in bundle.graphs.items()}
        self._sessions = {name: self._load(graph) for name, graph in bundle.graphs.items()}

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name of one graph."""
        names = self._outputs[graph]
        return dict(zip(names, self._sessions[graph].run(names, dict(inputs)), strict=True))

    def _load(self, graph: Graph) -> Any:
        session = load_session(graph.file, self.threads)
        check_names(graph, *([node.name for node in side] for side in (session.get_inputs(), session.get_outputs())))
        return session


def check_names(graph: Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Raise InputError unless these, which the file of a graph has, are the inputs and outputs that it must have."""
    for kind, declared, found in (("input", graph.inputs, inputs), ("output", graph.outputs, outputs)):
        expected = sorted(tensor.name for tensor in declared)
        if expected != sorted(found):
            raise InputError(
                f"{graph.file}: the manifest declares the {kind}s {', '.join(expected)}, "
                f"the graph has {', '.join(sorted(found))}"
            )


def load_session(path: Path, threads: int | None = None, providers: Sequence[Any] = ("CPUExecutionProvider",)) -> Any:
    """An onnxruntime.InferenceSession; raises InputError if the file cannot be loaded.

    providers: as ONNX Runtime takes them, names or pairs of a name and a dictionary of options, the first choice first.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or _cores()
    options.log_severity_level = 3  # errors only: they come back as exceptions
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's own exceptions share no base class
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {reason}") from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
