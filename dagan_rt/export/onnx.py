"""One subnetwork to one ONNX file: traced, simplified, checked."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt.errors import InputError, require
from dagan_rt.export.subnetworks import Subnetwork

if TYPE_CHECKING:
    from dagan_rt.networks.model import Model

OPSETS = range(17, 21)  # GridSample came with 16; the exporter's limit is 20


def check_tools(opset: int) -> None:
    """Raise InputError if a package of the export extra is missing or the opset is none this exporter writes."""
    if opset not in OPSETS:
        raise InputError(f"--opset must be in {OPSETS.start}..{OPSETS.stop - 1}, got {opset}")
    for package in ("torch", "onnx", "onnxsim", "onnxruntime"):
        require(package, extra="export", why="exporting a bundle")


def export_graph(model: Model, subnetwork: Subnetwork, path: Path, opset: int = 17) -> None:
    """Write one subnetwork of a model in evaluation mode; the batch axis stays dynamic, all others are fixed.

    Batch norms are folded into the convolutions before them, and constants (shapes, spectral norms) into numbers.
    """
    import onnx
    import onnxsim
    import torch

    # A batch of two, so that no axis of length one is taken for one to broadcast.
    inputs = tuple(torch.rand([2 if isinstance(size, str) else size for size in x.shape]) for x in subnetwork.inputs)
    with _quiet():
        torch.onnx.export(
            subnetwork.build(model),
            inputs,
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=[tensor.name for tensor in subnetwork.inputs],
            output_names=[tensor.name for tensor in subnetwork.outputs],
            dynamic_axes={tensor.name: _dynamic(tensor.shape) for tensor in (*subnetwork.inputs, *subnetwork.outputs)},
        )
    with _silent_stderr():
        graph, same = onnxsim.simplify(onnx.load_model(str(path)))
    if not same:
        raise InputError(f"graph {subnetwork.name}: its simplified form does not compute the same")
    onnx.checker.check_model(graph, full_check=True)
    _check_names(graph, subnetwork)
    onnx.save_model(graph, str(path))


def _dynamic(shape: tuple[int | str, ...]) -> dict[int, str]:
    return {axis: size for axis, size in enumerate(shape) if isinstance(size, str)}


def _check_names(graph: Any, subnetwork: Subnetwork) -> None:
    """An input the trace found no use for would vanish from the graph without a word."""
    for kind, declared, found in (
        ("inputs", subnetwork.inputs, graph.graph.input),
        ("outputs", subnetwork.outputs, graph.graph.output),
    ):
        expected, got = [tensor.name for tensor in declared], [node.name for node in found]
        if sorted(expected) != sorted(got):
            raise InputError(
                f"graph {subnetwork.name} must have the {kind} {', '.join(expected)}, got {', '.join(got)}"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tracer warns of every shape it takes for a constant; here all but the batch are, and the checks follow."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """onnxsim's C++ prints a warning for every shape it cannot turn into a number: those of the dynamic batch."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
