"""Graphs cut at the kernels: what one kernel computes becomes one node of the ONNX domain `dagan_rt`.

| region of a traced graph                                                       | node             |
|--------------------------------------------------------------------------------|------------------|
| the flow resized, GridSample, times the occlusion resized                      | `FlowWarp`       |
| Softmax of a product, MatMul with the values, times γ, plus the residual       | `CrossAttention` |
| key points and thumbnail to the motion estimator's input                       | `SparseMotion`   |
| softmax of the mask, Σ mask · motion, sigmoid of the occlusion                 | `DenseFlow`      |

It works on any graph the exporter writes, float32, float16 or int8, so that engines with plugins are built from the
ONNX files of a bundle, which stay plain ONNX. Each region is found by one operator in its middle, and is replaced only
if it is computed from the node's inputs and constants alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dagan_rt.errors import InputError
from dagan_rt.export.passes import _attributes, remove_unused
from dagan_rt.plugins.ops import ANY, DOMAIN, OPS, VERSION

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

CARRIED = ("Cast", "Transpose", "Resize")  # what may lie between a flow or an occlusion map and its use
HALF_PIXEL = (b"half_pixel", b"pytorch_half_pixel")  # differ only where a side has one pixel


@dataclass(frozen=True)
class Region:
    """A part of a graph by the names of the tensors that go in and come out, as the operator `op` has them."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, int], ...] = ()


def insert(model: ModelProto) -> Counter[str]:
    """Replace every region in place, and return how many nodes of each operator the graph now has.

    Inputs of one operator that differ in type get a Cast. Raises InputError where a GridSample or an attention is left
    over, or where a region is not closed: the graph is then not one that this version exports.
    """
    from onnx import helper

    types, found = _types(model), Counter[str]()
    for find in (_sparse_motion, _dense_flow, _flow_warps, _attentions):
        regions = list(find(_View(model)))
        for region in regions:
            _replace(model, region, types)
        found.update(region.op for region in regions)
    view = _View(model)
    left = [*view.of("GridSample"), *(node for node in view.of("Softmax") if view.mixed(node))]
    if left:
        raise InputError(f"no plugin takes the place of {left[0].op_type} {left[0].name!r}: export without plugins")
    if found:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return found


class _View:
    """A graph to walk in: who computes a tensor, who reads it, what is constant."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.inputs = {value.name for value in model.graph.input}
        self.constants = {tensor.name for tensor in model.graph.initializer}
        self.constants |= {node.output[0] for node in self.of("Constant")}

    def of(self, op: str) -> Iterator[NodeProto]:
        """The nodes of one operator, in order."""
        return (node for node in self.nodes if node.op_type == op)

    def back(self, name: str, *ops: str) -> str:
        """The tensor that `name` was made of by a chain of these operators, each of its first input."""
        while (node := self.producer.get(name)) is not None and node.op_type in ops:
            name = node.input[0]
        return name

    def next(self, name: str, op: str) -> NodeProto | None:
        """The one node that reads a tensor, or what was cast of it, if it is of that operator."""
        readers = self.consumers.get(name, [])
        if len(readers) != 1:
            return None
        if readers[0].op_type == "Cast" and op != "Cast":
            return self.next(readers[0].output[0], op)
        return readers[0] if readers[0].op_type == op else None

    def step(self, node: NodeProto | None, op: str) -> NodeProto | None:
        """The one reader of a node's output, as `next`."""
        return None if node is None else self.next(node.output[0], op)

    def mixed(self, softmax: NodeProto) -> NodeProto | None:
        """The product of an attention's values and a Softmax; None for the softmax of a map."""
        return self.step(self.step(softmax, "Transpose"), "MatMul")

    def leaves(self, region: Region) -> set[str]:
        """The tensors that a region is computed of, constants aside."""
        found, seen, waiting = set(), set(), list(region.outputs)
        while waiting:
            name = waiting.pop()
            if not name or name in seen or name in self.constants:
                continue
            seen.add(name)
            if name in region.inputs or name not in self.producer:
                found.add(name)
            else:
                waiting.extend(self.producer[name].input)
        return found


def _flow_warps(view: _View) -> Iterator[Region]:
    for node in view.of("GridSample"):
        attributes = _attributes(node)
        product = view.step(node, "Mul")
        plain = attributes.get("mode", b"linear") in (b"linear", b"bilinear")
        if product is None or not plain or attributes.get("padding_mode", b"zeros") != b"zeros":
            continue
        other = next(name for name in product.input if view.back(name, "Cast") != node.output[0])
        flow, occlusion = view.back(node.input[1], *CARRIED), view.back(other, *CARRIED)
        if not (_bilinear(view, node.input[1]) and _bilinear(view, other)):
            continue
        align = int(attributes.get("align_corners", 0))
        yield Region("FlowWarp", (node.input[0], flow, occlusion), (product.output[0],), (("align_corners", align),))


def _bilinear(view: _View, name: str) -> bool:
    """Whether every Resize on the way back from `name` is the one that the kernel does itself."""
    while (node := view.producer.get(name)) is not None and node.op_type in CARRIED:
        attributes = _attributes(node)
        kind = attributes.get("mode"), attributes.get("coordinate_transformation_mode", b"half_pixel") in HALF_PIXEL
        if node.op_type == "Resize" and kind != (b"linear", True):
            return False
        name = node.input[0]
    return True


def _attentions(view: _View) -> Iterator[Region]:
    for softmax in view.of("Softmax"):
        logits, mixed = view.producer.get(view.back(softmax.input[0], "Cast")), view.mixed(softmax)
        scaled = view.step(view.step(mixed, "Reshape"), "Mul")
        total = view.step(scaled, "Add")
        if logits is None or logits.op_type != "MatMul" or mixed is None or scaled is None or total is None:
            continue
        query, key = (view.back(name, "Cast", "Transpose", "Reshape") for name in logits.input)
        value = view.back(mixed.input[0], "Cast", "Reshape")
        gamma = next((name for name in scaled.input if view.back(name, "Cast") in view.constants), "")
        residual = next(name for name in total.input if view.back(name, "Cast") != scaled.output[0])
        yield Region("CrossAttention", (query, key, value, residual, gamma), (total.output[0],))


def _sparse_motion(view: _View) -> Iterator[Region]:
    points, first = _key_points(view), next(view.of("Conv"), None)
    if points and first is not None:
        yield Region("SparseMotion", ("thumbnail", *points), (view.back(first.input[0], "Cast"),))


def _dense_flow(view: _View) -> Iterator[Region]:
    points = _key_points(view)
    if not points:
        return
    softmax, sigmoid = next(view.of("Softmax")), view.producer[view.back("occlusion", "Cast")]
    yield Region("DenseFlow", (softmax.input[0], sigmoid.input[0], *points), ("flow", "occlusion"))


def _key_points(view: _View) -> tuple[str, ...]:
    """The motion graph's source key points, and the driving ones after the movement was transferred; else nothing."""
    if not {"source_kp_value", "source_kp_jacobian", "driving_kp_value", "thumbnail"} <= view.inputs:
        return ()
    value = next(node.output[0] for node in view.of("Add") if "source_kp_value" in node.input)
    jacobian = next(node.output[0] for node in view.of("MatMul") if node.input[1] == "source_kp_jacobian")
    return ("source_kp_value", "source_kp_jacobian", value, jacobian)


def _replace(model: ModelProto, region: Region, types: Mapping[str, int]) -> None:
    """Put one node in the place of a region, and delete what nothing reads any more."""
    from onnx import helper

    graph, op = model.graph, OPS[region.op]
    if foreign := _View(model).leaves(region) - set(region.inputs):
        raise InputError(
            f"the region of {op.name} that ends in {region.outputs[0]!r} also depends on {min(foreign)!r}: "
            "export without plugins"
        )
    ends = [index for index, node in enumerate(graph.node) if set(node.output) & set(region.outputs)]
    inputs, casts = _in_one_type(model, region, types)
    name = f"{graph.node[ends[-1]].name}/{op.name}"
    inserted = helper.make_node(op.name, inputs, region.outputs, name, domain=DOMAIN)
    # How TensorRT's parser finds a plugin's creator.
    fields: dict[str, Any] = {"plugin_namespace": DOMAIN, "plugin_version": VERSION, **dict(region.attributes)}
    inserted.attribute.extend(helper.make_attribute(key, value) for key, value in fields.items())
    # The last of the old ends comes after everything that the node reads, and before everything that reads the node.
    for offset, node in enumerate([*casts, inserted]):
        graph.node.insert(ends[-1] + offset, node)
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if node.domain != DOMAIN and set(node.output) & set(region.outputs):
            del graph.node[index]
    remove_unused(graph)


def _in_one_type(model: ModelProto, region: Region, types: Mapping[str, int]) -> tuple[list[str], list[NodeProto]]:
    """The names of a node's inputs in the types that its operator takes, and the casts which that needs.

    The type of those that may have any is that of the output, or of the first input where the output is float32 in
    any case.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    op = OPS[region.op]
    leads = region.outputs[0] if ANY in op.outputs.values() else region.inputs[0]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs: list[str] = []
    casts: list[NodeProto] = []
    for name, kind in zip(region.inputs, op.inputs.values(), strict=True):
        wanted = types[leads] if kind == ANY else TensorProto.FLOAT
        if name in weights:  # γ
            values = numpy_helper.to_array(weights[name]).astype(np.float32)
            if weights[name].data_type != TensorProto.FLOAT:
                name = f"{name}_float32"
                model.graph.initializer.append(numpy_helper.from_array(values, name))
        elif types[name] != wanted:
            cast = f"{region.outputs[0]}/{op.name}/{len(inputs)}"
            casts.append(helper.make_node("Cast", [name], [cast], f"{cast}/Cast", to=wanted))
            name = cast
        inputs.append(name)
    return inputs, casts


def _types(model: ModelProto) -> dict[str, int]:
    """The element type of every tensor that is computed or given."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}
