"""How much a graph does: its operations, and the multiply-accumulates of its convolutions and matrix products."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from dagan_rt.errors import InputError
from dagan_rt.export.subnetworks import BATCH

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto


def operations(model: ModelProto) -> int:
    """Nodes of the graph, constants not counted."""
    return sum(node.op_type != "Constant" for node in model.graph.node)


def multiply_accumulates(model: ModelProto, batch: int = 1) -> int:
    """Products summed in Conv, ConvTranspose, MatMul and Gemm nodes, in any precision; `batch` is the dynamic axis.

    Taps that fall on padding count, as they do in `torch.utils.flop_counter` (which counts two operations each).
    Raises InputError if the shape of such a node cannot be inferred.
    """
    known = shapes(model, batch)
    total = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            continue
        for name in (*node.input[:2], node.output[0]):
            if name not in known or not all(known[name]):
                raise InputError(
                    f"graph {model.graph.name}: {node.op_type} {node.name!r} must have inferable shapes, "
                    f"got none for {name!r}: export with all axes but {BATCH!r} fixed"
                )
        x, weight, y = (known[name] for name in (*node.input[:2], node.output[0]))
        if node.op_type == "Conv":
            total += prod(y) * prod(weight[1:])  # [outputs, inputs / groups, ...]
        elif node.op_type == "ConvTranspose":
            total += prod(x) * prod(weight[1:])  # [inputs, outputs / groups, ...]
        else:
            transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            total += prod(y) * (x[0] if transposed else x[-1])
    return total


def shapes(model: ModelProto, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor with a fixed batch; 0 for an axis that stays unknown, no entry for an unknown rank."""
    from onnx import shape_inference

    fixed = type(model)()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]  # they were inferred with the dynamic axis
    for tensor in fixed.graph.initializer:
        if prod(tensor.dims) > 1000:  # weights: no shape depends on them, and inference copies all it is given
            tensor.ClearField("raw_data")
    for value in (*fixed.graph.input, *fixed.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == BATCH:
                axis.dim_value = batch
    graph = shape_inference.infer_shapes(fixed, data_prop=True).graph
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            found[value.name] = _sizes(value)
    return found


def _sizes(value: ValueInfoProto) -> tuple[int, ...]:
    return tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
