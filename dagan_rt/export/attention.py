"""Attention block by block: a CPU's caches hold the logits of some queries, not those of all.

For a map of 64 × 64 the logits of every query are 64 MB in float32, written, read, normalised and read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dagan_rt.export.counts import shapes
from dagan_rt.export.passes import add_constant, remove_unused, replace_nodes

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

QUERIES = 256  # a block's logits for 4096 keys are 4 MB
LEVELS, SIGNED_LEVELS = 255.0, 127.0


def block_attention(model: ModelProto, int8: bool = False) -> int:
    """Compute attention for QUERIES queries at a time, in place; returns how many attentions were rewritten.

    What is rewritten is V softmax(QᵀK)ᵀ over maps of a known size, as `networks.attention` is traced. With `int8`
    the last product, which is nine tenths of it, is of 8-bit integers, with scales found in the data as it runs.
    """
    graph, known = model.graph, shapes(model)
    made = {output: node for node in graph.node for output in node.output}
    readers = [name for node in graph.node for name in node.input] + [output.name for output in graph.output]
    nodes: list[NodeProto] = []
    rewritten = 0
    for node in graph.node:
        chain = _chain(node, made)
        inner = [it.output[0] for it in chain]
        queries = known.get(chain[0].input[0], ()) if chain else ()
        if (
            len(queries) != 3
            or queries[1] <= (0 if int8 else QUERIES)
            or any(readers.count(name) > 1 for name in inner)
        ):
            nodes.append(node)
            continue
        nodes += _blocks(graph, node, chain[0], queries[1], int8)
        rewritten += 1
    if rewritten:
        replace_nodes(graph, nodes)
        remove_unused(graph)
    return rewritten


def _chain(node: NodeProto, made: dict[str, NodeProto]) -> list[NodeProto]:
    """The MatMul, Softmax and Transpose that give the second factor of an attention's last MatMul, or nothing."""
    found: list[NodeProto] = []
    if node.op_type != "MatMul":
        return found
    at = made.get(node.input[1])
    for kind in ("Transpose", "Softmax", "MatMul"):
        if at is None or at.op_type != kind:
            return []
        found.insert(0, at)
        at = made.get(at.input[0])
    softmax, transpose = ({it.name: it for it in node.attribute} for node in found[1:])
    if softmax["axis"].i not in (-1, 2) or list(transpose["perm"].ints) != [0, 2, 1]:
        return []
    return found


def _blocks(graph: GraphProto, last: NodeProto, first: NodeProto, count: int, int8: bool) -> Iterator[NodeProto]:
    """The nodes of an attention: queries [B, N, D], keys [B, D, M], values [B, C, M] -> [B, C, N]."""
    from onnx import helper

    name, (queries, keys), values = last.name, first.input, last.input[0]

    def node(kind: str, at: str, inputs: list[str], **attributes: Any) -> NodeProto:
        return helper.make_node(kind, inputs, [f"{name}/{at}"], f"{name}/{at}", **attributes)

    def constant(at: str, value: Any) -> str:
        return add_constant(graph, f"{name}/{at}", np.asarray(value))

    sizes = [min(QUERIES, count - begun) for begun in range(0, count, QUERIES)]
    blocks = [f"{name}/queries/{index}" for index in range(len(sizes))]
    yield helper.make_node("Split", [queries, constant("sizes", sizes)], blocks, f"{name}/Split", axis=1)
    if int8:
        # Values are not negative, and every channel has a scale of its own: its largest value.
        last_axis = constant("last", [-1])
        scales = [constant("step", 1 / LEVELS), constant("zero", np.uint8(0))]
        value_scales = [constant("value_step", 1 / SIGNED_LEVELS), constant("value_zero", np.int8(0))]
        yield node("ReduceMax", "peak", [values], axes=[-1])
        yield node("Max", "positive", [f"{name}/peak", constant("least", 1e-30)])
        yield node("Div", "scaled", [values, f"{name}/positive"])
        yield node("QuantizeLinear", "values/int8", [f"{name}/scaled", *value_scales])
        yield node("DequantizeLinear", "values/float", [f"{name}/values/int8", *value_scales])
        yield node("Transpose", "values", [f"{name}/values/float"], perm=[0, 2, 1])
    for index, block in enumerate(blocks):
        logits, weights, answer = (f"{index}/{part}" for part in ("logits", "weights", "answer"))
        yield node("MatMul", logits, [block, keys])
        if not int8:
            yield node("Softmax", weights, [f"{name}/{logits}"], axis=-1)
            yield node("Transpose", f"{weights}/turned", [f"{name}/{weights}"], perm=[0, 2, 1])
            yield node("MatMul", answer, [values, f"{name}/{weights}/turned"])
            continue
        # The largest weight of a query is 1, so that 8 bits serve flat and sharp attention alike; the sum of the
        # weights, by which the answer is divided, is of the rounded ones: constant values stay what they are.
        yield node("ReduceMax", f"{index}/largest", [f"{name}/{logits}"], axes=[-1])
        yield node("Sub", f"{index}/below", [f"{name}/{logits}", f"{name}/{index}/largest"])
        yield node("Exp", f"{index}/exact", [f"{name}/{index}/below"])
        yield node("QuantizeLinear", f"{weights}/int8", [f"{name}/{index}/exact", *scales])
        yield node("DequantizeLinear", weights, [f"{name}/{weights}/int8", *scales])
        yield node("ReduceSum", f"{index}/sum", [f"{name}/{weights}", last_axis])
        yield node("MatMul", f"{index}/product", [f"{name}/{weights}", f"{name}/values"])
        yield node("Div", answer, [f"{name}/{index}/product", f"{name}/{index}/sum"])
    answers = [f"{name}/{index}/answer" for index in range(len(sizes))]
    if not int8:
        yield helper.make_node("Concat", answers, last.output, name, axis=2)
        return
    yield node("Concat", "answers", answers, axis=1)
    yield node("Transpose", "turned", [f"{name}/answers"], perm=[0, 2, 1])
    yield helper.make_node("Mul", [f"{name}/turned", f"{name}/positive"], last.output, name)
