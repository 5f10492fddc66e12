"""Lower precision written into the graph: float16 arithmetic, or int8 convolutions between quantisation nodes.

A strongly typed graph means the same everywhere: no runtime chooses types of its own. Graph inputs and outputs stay
float32, and nothing outside the convolutional trunks changes.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dagan_rt.bundle import PRECISIONS
from dagan_rt.errors import InputError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

#: Operations that stay in float32 even inside a trunk, and why.
KEPT_OPERATIONS = {
    "Softmax": "its exponents turn the logits' absolute error into a relative one, and its sums run over whole maps",
    "Sigmoid": "the result is a picture, a depth map or an occlusion map, which leave the graph in float32 anyway",
    "GridSample": "float16 holds positions in [-1, 1] to 2⁻¹², which is 1/32 of a pixel on a picture of 256",
    "InstanceNormalization": "sums of squares over a whole map pass 65504, and small variances vanish",
    "ReduceSum": "sums over whole maps pass 65504",
    "Exp": "a Gaussian heat map is the exponential of squared distances divided by 0.01",
    "Div": "2 × 2 inverses divide by determinants that may be small",
}
#: Nodes, by a part of their name, that stay in float32 inside a trunk, and why.
KEPT_NAMES = {
    "query_conv/": "the attention's logits are unscaled products of queries and keys: an error in either is multiplied",
    "key_conv/": "as the queries",
}
# Left outside by what a trunk is: the heads of key points (temperature 0.1 multiplies the logits' error by 10), local
# frames, masks and occlusion, coordinate grids, flow, inverses, anti-alias filters, the depth network's normalisation.

FOLLOWING = {"Relu", "LeakyRelu", "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Pad"}
"""Operations that move or clip values: exact in either type, so they take that of their input instead of a cast."""

ALWAYS_FLOAT32 = {"Resize": (2,), "BatchNormalization": (1, 2, 3, 4)}
"""Inputs of an operation on float16 that stay float32: scales by definition, statistics because ONNX lets them."""

LARGEST_HALF = 65504.0
CONVOLUTIONS = ("Conv", "ConvTranspose")
BORDER_CHANNELS = 8  # a picture, a depth map, both, or SPADE's map of the deformed source: not what a layer learned


def lower(
    model: ModelProto,
    precision: str,
    trunks: Sequence[str],
    calibration: Iterable[Mapping[str, np.ndarray]] | None = None,
) -> ModelProto:
    """The float32 `model` in `precision`: a new model for "fp16" and "int8", itself for "fp32".

    trunks: prefixes of the names of the nodes that may be lowered. calibration: for int8, the graph's inputs by name,
    sample after sample (see `dagan_rt.export.calibration`). Raises InputError for an unknown precision, for int8
    without calibration data, and for weights beyond float16.
    """
    if precision == "fp32":
        return model
    if precision == "fp16":
        return to_fp16(model, trunks)
    if precision != "int8":
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if calibration is None:
        raise InputError(
            "int8 needs calibration data to find the range of every activation: give a folder of videos or images of "
            "faces, or heads for synthetic ones"
        )
    return to_int8(model, trunks, calibration)


# ---------------------------------------------------------------------------------------------------------------------
# float16


def to_fp16(model: ModelProto, trunks: Sequence[str]) -> ModelProto:
    """A copy of `model` that computes its trunks in float16, with one Cast wherever a tensor changes type.

    Weights are rounded to nearest; below 6e-8 they become zero, beyond 65504 they raise InputError. An activation
    beyond 65504 becomes infinite, which comparing the outputs shows where the hardware computes in float16. ONNX
    Runtime on an x86 CPU does not: it computes such a graph in float32, with rounded weights (see `rounding_twin`).
    """
    # onnxruntime.transformers.float16 is not used: where neighbours stay in float32 it rounds what passes between
    # them, and writes the same Cast once a consumer, which is no valid graph.
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
    lowered = onnx.shape_inference.infer_shapes(model)
    graph = lowered.graph
    _name_constants(graph)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {info.name: info.type.tensor_type.elem_type for info in (*graph.value_info, *graph.output, *graph.input)}
    floats = {name for name, kind in types.items() if kind == FLOAT}
    outputs = {output.name for output in graph.output}
    logits = {node.input[0] for node in graph.node if node.op_type == "Softmax"}
    nodes: list[NodeProto] = []
    twins: dict[tuple[str, int], str] = {}  # (tensor, the type it was not computed in) -> its copy in that type

    def in_type(name: str, kind: int) -> str:
        """The tensor's name in a type; the first to ask gets a Cast written before it."""
        if name not in floats or types[name] == kind:
            return name
        if (name, kind) not in twins:
            twins[name, kind] = twin = f"{name}_{'half' if kind == HALF else 'float'}"
            if name in weights:
                half = _rounded(numpy_helper.to_array(weights[name]), name)
                graph.initializer.append(numpy_helper.from_array(half, twin))
            else:
                nodes.append(helper.make_node("Cast", [name], [twin], name=f"{twin}/Cast", to=kind))
        return twins[name, kind]

    for node in list(graph.node):
        follows = node.op_type in FOLLOWING and types.get(node.input[0]) != HALF
        half = _may_be_lowered(node, trunks) and not follows and not logits.intersection(node.output)
        kind, fixed = (HALF, ALWAYS_FLOAT32.get(node.op_type, ())) if half else (FLOAT, ())
        if node.op_type == "Shape":
            fixed = (0,)  # of either type
        node.input[:] = [name if at in fixed else in_type(name, kind) for at, name in enumerate(node.input)]
        nodes.append(node)
        for at, name in enumerate(node.output):
            if half and name in outputs & floats:  # computed under another name, cast to the declared one
                node.output[at] = twins[name, HALF] = f"{name}_half"
                nodes.append(helper.make_node("Cast", [node.output[at]], [name], name=f"{name}/Cast", to=FLOAT))
            elif name in floats:
                types[name] = kind
    _replace(graph.node, nodes)
    del graph.value_info[:]
    _drop_unused_weights(graph)
    return onnx.shape_inference.infer_shapes(lowered)


def rounding_twin(model: ModelProto) -> ModelProto:
    """A float16 graph as a GPU computes it, for a CPU that does not: float32 arithmetic, every float16 tensor rounded.

    Products are summed in float32, as tensor cores do; a result beyond 65504 becomes infinite.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    twin = type(model)()
    twin.CopyFrom(model)
    graph = twin.graph
    halves = {it.name for it in graph.value_info if it.type.tensor_type.elem_type == TensorProto.FLOAT16}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    nodes: list[NodeProto] = []
    for node in list(graph.node):
        nodes.append(node)
        for at, name in enumerate(node.output):
            if name in halves:
                exact = node.output[at] = f"{name}_exact"
                for attribute in node.attribute:
                    if node.op_type == "Cast" and attribute.name == "to":
                        attribute.i = TensorProto.FLOAT
                nodes.append(helper.make_node("Cast", [exact], [f"{name}_rounded"], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name}_rounded"], [name], to=TensorProto.FLOAT))
    _replace(graph.node, nodes)
    del graph.value_info[:]
    return onnx.shape_inference.infer_shapes(twin)


def _may_be_lowered(node: NodeProto, trunks: Sequence[str]) -> bool:
    return (
        node.name.startswith(tuple(trunks))
        and node.op_type not in KEPT_OPERATIONS
        and not any(part in node.name for part in KEPT_NAMES)
    )


def _rounded(values: np.ndarray, name: str) -> np.ndarray:
    largest = float(np.abs(values).max(initial=0))
    if not largest <= LARGEST_HALF:
        raise InputError(
            f"weight {name} reaches {largest:.3g}, float16 ends at {LARGEST_HALF:.0f}: export this checkpoint in fp32"
        )
    return values.astype(np.float16)


def _name_constants(graph: GraphProto) -> None:
    """Constant nodes become initializers, which have a type of their own wherever they are used."""
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        for attribute in node.attribute:
            if attribute.name == "value":
                graph.initializer.add().CopyFrom(attribute.t)
                graph.initializer[-1].name = node.output[0]
                graph.node.remove(node)


def _drop_unused_weights(graph: GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])


def _replace(repeated: Any, messages: Sequence[Any]) -> None:
    """Assign to a repeated protobuf field, which has no slice assignment."""
    copies = [type(message).FromString(message.SerializeToString()) for message in messages]
    del repeated[:]
    repeated.extend(copies)


# ---------------------------------------------------------------------------------------------------------------------
# int8


def to_int8(model: ModelProto, trunks: Sequence[str], calibration: Iterable[Mapping[str, np.ndarray]]) -> ModelProto:
    """A copy of `model` whose trunks' convolutions are int8, between QuantizeLinear and DequantizeLinear nodes.

    Symmetric: every zero point is 0, which TensorRT asks for. Weights have a scale per output channel, activations one
    a tensor, from the largest magnitude over `calibration` (the graph's inputs by name, sample after sample, held one
    at a time). Biases and all else stay float32, the first and last convolutions too: see `_inner_convolutions`.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    source = onnx.shape_inference.infer_shapes(model)
    convolutions = _inner_convolutions(source.graph, trunks)
    if not convolutions:
        return source
    reader = _Reader(calibration, source)
    # quantize_static writes what it makes and how far it got to files: all inside one folder that goes away.
    with tempfile.TemporaryDirectory() as folder, _without_advice():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            source,
            path,
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*CONVOLUTIONS, "Relu"],
            nodes_to_quantize=[*convolutions, *_rectified(source.graph, convolutions)],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        return onnx.load_model(str(path))


def _inner_convolutions(graph: GraphProto, trunks: Sequence[str]) -> list[str]:
    """Names of the trunks' convolutions that become int8: all but the first and last of every network, and some more.

    First is one that no convolution comes before, last one that none comes after; and one that reads or writes a few
    channels is at the border of a network inside the graph. They hold little of the work, and the picture shows what
    they round. Float stays also what an instance norm is taken of: it divides each channel by its own deviation, which
    would blow up the rounding steps of a range that all channels share.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    after: set[str] = set()  # tensors with a convolution before them
    for node in graph.node:
        if node.op_type in CONVOLUTIONS or after.intersection(node.input):
            after.update(node.output)
    before: set[str] = set()  # tensors with a convolution after them
    normalised: set[str] = set()  # tensors with an instance norm after them and no convolution between
    for node in reversed(graph.node):
        if node.op_type in CONVOLUTIONS or before.intersection(node.output):
            before.update(node.input)
        if node.op_type == "InstanceNormalization":
            normalised.add(node.input[0])
        elif node.op_type not in CONVOLUTIONS and normalised.intersection(node.output):
            normalised.update(node.input)
    return [
        node.name
        for node in graph.node
        if node.op_type in CONVOLUTIONS
        and _may_be_lowered(node, trunks)
        and node.input[0] in after
        and node.output[0] in before - normalised
        and min(shapes.get(node.input[1], (0,))[:2]) > BORDER_CHANNELS
    ]


def _rectified(graph: GraphProto, convolutions: Sequence[str]) -> list[str]:
    """Names of the Relu nodes that follow these convolutions: in int8 they stay between two int8 convolutions."""
    made = {node.output[0] for node in graph.node if node.name in set(convolutions)}
    return [node.name for node in graph.node if node.op_type == "Relu" and node.input[0] in made]


class _Reader:
    """Samples as `quantize_static` asks for them, repeated to the batch that the graph is fixed to."""

    def __init__(self, samples: Iterable[Mapping[str, np.ndarray]], model: ModelProto) -> None:
        self._samples = iter(samples)
        self._read = 0
        self._batches = {
            tensor.name: max(1, tensor.type.tensor_type.shape.dim[0].dim_value) for tensor in model.graph.input
        }

    def get_next(self) -> dict[str, np.ndarray] | None:
        sample = next(self._samples, None)
        if sample is None:
            if not self._read:
                raise InputError("int8 was given no calibration samples, it needs at least one: inputs by name")
            return None
        self._read += 1
        return {name: np.repeat(sample[name], batch, axis=0) for name, batch in self._batches.items()}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter(self.get_next, None)  # type: ignore[arg-type]


@contextmanager
def _without_advice() -> Iterator[None]:
    """The quantizer logs the advice to preprocess the model, which it cannot know was done."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
