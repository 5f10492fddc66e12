"""Rewrites of a float32 graph into the same function, up to rounding, in operations that cost less.

Each pass changes the model in place and returns how many places it changed; a rewritten convolution keeps its node's
name and its output's. Where a pass pays depends on what runs the graph: `benchmarks/graph_passes.py` measures it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dagan_rt.export.counts import shapes

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Constants = dict[str, np.ndarray]

# One axis of a 3-tap kernel on pixels that come in pairs, as the 4 taps of a transposed convolution of stride 2.
PAIRED = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float64)
LANES = 16  # output channels that a CPU's convolution computes at once: fewer take as long


def transpose_upsampling(model: ModelProto) -> int:
    """Nearest ×2 `Resize`, then a 3 × 3 `Conv` of stride 1 and padding 1: one 4 × 4 `ConvTranspose` of stride 2.

    It takes 16 multiply-accumulates per input pixel and pair of channels instead of 36. Left alone are a Resize with
    other consumers, and convolutions with groups, dilation, or weights that are no float32 constants.
    """
    # With u the upsampled row, u[j] = x[j // 2], the convolution is y[i] = Σ_t w[t] u[i + t - 1]. Pixel x[m] stands in
    # u[2m] and u[2m + 1], so its weight in y[i] is w[2 - s] + w[3 - s], s = i - 2m + 1 (w is 0 outside 0..2): a
    # transposed convolution, 4 taps, stride 2, padding 1. Zeros around u are zeros around x: borders agree.
    graph = model.graph
    constants, uses = constants_of(graph), _uses(graph)
    upsampled = {node.output[0]: node.input[0] for node in graph.node if _doubles(node, constants)}
    rewritten = 0
    for node in graph.node:
        if not is_plain_convolution(node, constants) or node.input[0] not in upsampled or uses[node.input[0]] > 1:
            continue
        weight = constants[node.input[1]]
        if weight.shape[2:] != (3, 3):
            continue
        spread = np.einsum("ay,bx,oiyx->ioab", PAIRED, PAIRED, weight.astype(np.float64))
        node.op_type = "ConvTranspose"
        node.input[0] = upsampled[node.input[0]]
        node.input[1] = add_constant(graph, f"{node.input[1]}_transposed", spread)
        _set(node, kernel_shape=[4, 4], strides=[2, 2], pads=[1, 1, 1, 1])
        rewritten += 1
    remove_unused(graph)
    return rewritten


def block_narrow_convolutions(model: ModelProto) -> int:
    """A `Conv` with few outputs: one of stride r that computes r × r pixels at once as channels, then rearranged.

    For kernels of 5 × 5 and more that keep the map's size, where r² times the outputs fit into LANES and r divides the
    map's sides. The kernel grows by r - 1 zero taps, and is computed once instead of r² times.
    """
    from onnx import helper

    graph = model.graph
    constants, sizes = constants_of(graph), shapes(model)
    rewritten = 0
    for index in reversed(range(len(graph.node))):  # nodes are inserted behind
        node = graph.node[index]
        if not is_plain_convolution(node, constants):
            continue
        weight, sides = constants[node.input[1]], sizes.get(node.output[0], ())[2:]
        outputs, inputs, kernel, _ = weight.shape
        fitting = [r for r in (4, 2) if outputs * r * r <= LANES and all(side and side % r == 0 for side in sides)]
        if kernel < 5 or not sides or not fitting:
            continue
        r = fitting[0]
        wide = kernel + r - 1
        blocks = np.zeros((r, r, outputs, inputs, wide, wide))
        for y in range(r):
            for x in range(r):  # pixel (y, x) of a block sees the same taps, shifted
                blocks[y, x, :, :, y : y + kernel, x : x + kernel] = weight
        node.input[1] = add_constant(graph, f"{node.input[1]}_blocked", blocks.reshape(-1, inputs, wide, wide))
        if len(node.input) > 2:
            node.input[2] = add_constant(graph, f"{node.input[2]}_blocked", np.tile(constants[node.input[2]], r * r))
        _set(node, kernel_shape=[wide, wide], strides=[r, r])
        output, node.output[0] = node.output[0], f"{node.output[0]}_blocked"
        rearrange = helper.make_node("DepthToSpace", [node.output[0]], [output], f"{node.name}/DepthToSpace")
        _set(rearrange, blocksize=r, mode="DCR")
        graph.node.insert(index + 1, rearrange)
        rewritten += 1
    remove_unused(graph)
    return rewritten


def _doubles(node: NodeProto, constants: Constants) -> bool:
    """A Resize that repeats every pixel in a square of 2 × 2."""
    if node.op_type != "Resize" or len(node.input) != 3 or node.input[2] not in constants:
        return False
    attributes = _attributes(node)
    kind = [attributes.get(key) for key in ("mode", "coordinate_transformation_mode", "nearest_mode", "axes")]
    return kind == [b"nearest", b"asymmetric", b"floor", None] and constants[node.input[2]].tolist() == [1, 1, 2, 2]


def is_plain_convolution(node: NodeProto, constants: Constants) -> bool:
    """A 2-D convolution of constant float32 weights: square odd kernel, stride 1, no groups, keeps the map's size."""
    if node.op_type != "Conv" or not all(name in constants for name in node.input[1:]):
        return False
    weight, attributes = constants[node.input[1]], _attributes(node)
    height, width = weight.shape[2:] if weight.ndim == 4 else (0, 0)
    return (
        weight.dtype == np.float32
        and height == width
        and height % 2 == 1
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
        and attributes.get("pads") == [height // 2] * 4
        and attributes.get("group", 1) == 1
        and {*attributes.get("strides", [1]), *attributes.get("dilations", [1])} == {1}
    )


def _attributes(node: NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _set(node: NodeProto, **values: Any) -> None:
    from onnx import helper

    kept = [attribute for attribute in node.attribute if attribute.name not in values]
    changed = [helper.make_attribute(name, value) for name, value in values.items()]
    del node.attribute[:]
    node.attribute.extend([*kept, *changed])


def constants_of(graph: GraphProto) -> Constants:
    """Initializers and the values of Constant nodes."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    return {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}


def add_constant(graph: GraphProto, name: str, values: np.ndarray) -> str:
    """Add an initializer, once where several nodes share it: float32, or integers as they are."""
    from onnx import numpy_helper

    if all(tensor.name != name for tensor in graph.initializer):
        stored = values if np.issubdtype(values.dtype, np.integer) else values.astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(stored, name))
    return name


def replace_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """These nodes instead of those the graph has, some of which may be among them."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _uses(graph: GraphProto) -> Counter[str]:
    return Counter([name for node in graph.node for name in node.input] + [value.name for value in graph.output])


def remove_unused(graph: GraphProto) -> None:
    """Delete nodes and initializers that nothing reads any more, and the shapes noted of tensors that are gone."""
    uses = _uses(graph)
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if not any(uses[name] for name in node.output):
            uses.subtract(node.input)
            del graph.node[index]
    computed = {name for node in graph.node for name in node.output}
    for entries, kept in ((graph.initializer, +uses), (graph.value_info, computed)):
        for index in reversed(range(len(entries))):
            if entries[index].name not in kept:
                del entries[index]
