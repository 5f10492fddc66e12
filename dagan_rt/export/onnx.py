"""One subnetwork to one ONNX graph: traced, simplified, checked."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dagan_rt.bundle import BatchProfile
from dagan_rt.errors import InputError, require
from dagan_rt.export.subnetworks import BATCH, Subnetwork

if TYPE_CHECKING:
    from onnx import ModelProto

    from dagan_rt.networks.model import Model


def check_tools() -> None:
    """Raise MissingPackage if a package of the export extra is not installed."""
    for package in ("torch", "onnx", "onnxsim", "onnxruntime"):
        require(package, extra="export", why="exporting a bundle")


def trace(model: Model, subnetwork: Subnetwork, batch: BatchProfile, opset: int = 17) -> ModelProto:
    """One subnetwork of a model in evaluation mode as an fp32 graph, simplified by onnxsim.

    Only the batch axis is dynamic, and not even that where the profile is fixed. Batch norms are folded into the
    convolutions before them, and constants (shapes, spectral norms) into numbers.
    """
    import onnx
    import onnxsim
    import torch

    # A dynamic batch is traced with two faces, so that no axis of length one is taken for one to broadcast.
    traced = batch.least if batch.fixed else 2
    inputs = tuple(torch.rand(traced, *map(int, tensor.shape[1:])) for tensor in subnetwork.inputs)
    tensors = (*subnetwork.inputs, *subnetwork.outputs)
    written = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            subnetwork.build(model),
            inputs,
            cast(Any, written),  # only the tracer takes a file object, the newer exporter does not
            dynamo=False,
            opset_version=opset,
            input_names=[tensor.name for tensor in subnetwork.inputs],
            output_names=[tensor.name for tensor in subnetwork.outputs],
            dynamic_axes=None if batch.fixed else {tensor.name: {0: BATCH} for tensor in tensors},
        )
    with _silent_stderr():
        graph, same = onnxsim.simplify(onnx.load_model_from_string(written.getvalue()))
    if not same:
        raise InputError(f"graph {subnetwork.name}: its simplified form does not compute the same")
    _check_names(graph, subnetwork)
    return graph


def save(graph: ModelProto, path: Path) -> None:
    """Check a finished graph and write it; raises InputError if its operator set lacks an operator, or shapes clash."""
    import onnx

    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        opset = graph.opset_import[0].version
        raise InputError(f"graph {path.name} is not valid ONNX of opset {opset}: {reason}") from None
    onnx.save_model(graph, str(path))


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
