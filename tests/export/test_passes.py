"""Rewritten graphs compute the same: against ONNX Runtime on the graph before, and against float64 PyTorch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dagan_rt.export.counts import multiply_accumulates
from dagan_rt.export.passes import LANES, block_narrow_convolutions, transpose_upsampling
from dagan_rt.networks.variants import VARIANTS

NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
ROUNDING = 1e-6  # float32, in units of the largest output


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def build(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], channels: int, sides: Any, outputs: Any) -> Any:
    """A checked model of `x` [batch, channels, *sides]; `outputs` maps names to ranks."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name, rank in outputs.items()]
    graph = helper.make_graph(
        nodes,
        "built",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", channels, *sides])],
        values,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def upsampled_convolution(
    inputs: int = 3,
    outputs: int = 2,
    sides: tuple[int, int] = (5, 7),
    seed: int = 0,
    kernel: int = 3,
    bias: bool = True,
    scale: float = 2.0,
    resize: dict[str, Any] | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """Resize, then Conv; each keyword but the sizes is a departure from what can be rewritten."""
    rng = np.random.default_rng(seed)
    attributes = {"pads": [kernel // 2] * 4, "kernel_shape": [kernel, kernel], "name": "/conv/Conv", **attributes}
    weights = {
        "scales": np.array([1, 1, scale, scale], np.float32),
        "w": rng.normal(size=(outputs, inputs // attributes.get("group", 1), kernel, kernel)).astype(np.float32),
        "b": rng.normal(size=outputs).astype(np.float32),
    }
    if not bias:
        del weights["b"]
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["up"], "/Resize", **(NEAREST | (resize or {}))),
        helper.make_node("Conv", ["up", *list(weights)[1:]], ["y"], **attributes),
    ]
    return build(nodes, weights, inputs, sides, {"y": 4})


def reference(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """interpolate + conv2d in float64."""
    weights = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float64)) for tensor in
               model.graph.initializer}  # fmt: skip
    up = F.interpolate(torch.from_numpy(x.astype(np.float64)), scale_factor=2, mode="nearest")
    return F.conv2d(up, weights["w"], weights.get("b"), padding=1).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# transpose_upsampling


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.integers(1, 9), outputs=st.integers(1, 9), height=st.integers(1, 9), width=st.integers(1, 9),
    batch=st.integers(1, 3), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_upsampling_is_transposed_exactly(
    inputs: int, outputs: int, height: int, width: int, batch: int, bias: bool, seed: int
) -> None:
    model = upsampled_convolution(inputs, outputs, (height, width), seed, bias=bias)
    rewritten = copied(model)
    assert transpose_upsampling(rewritten) == 1
    onnx.checker.check_model(rewritten, full_check=True)
    assert operators(rewritten) == {"ConvTranspose": 1}
    assert len(rewritten.graph.initializer) == 1 + bias  # neither scales nor the old weights are left
    x = np.random.default_rng(seed + 1).normal(size=(batch, inputs, height, width)).astype(np.float32)
    expected = reference(model, x)
    (before,), (after,) = run(model, {"x": x}), run(rewritten, {"x": x})
    assert after.shape == before.shape == expected.shape
    allowed = ROUNDING * np.abs(expected).max()
    assert np.abs(after - expected).max() <= allowed and np.abs(before - expected).max() <= allowed
    for border in (np.s_[:, :, 0], np.s_[:, :, -1], np.s_[:, :, :, 0], np.s_[:, :, :, -1]):
        assert np.abs(after[border] - expected[border]).max() <= allowed


def test_integers_are_transposed_without_any_rounding() -> None:
    model = upsampled_convolution(4, 3)
    for tensor in model.graph.initializer[1:]:
        tensor.CopyFrom(numpy_helper.from_array(np.rint(8 * numpy_helper.to_array(tensor)), tensor.name))
    rewritten = copied(model)
    transpose_upsampling(rewritten)
    x = np.random.default_rng(1).integers(-8, 9, (2, 4, 5, 7)).astype(np.float32)
    assert (run(rewritten, {"x": x})[0] == reference(model, x)).all()


def test_transposing_takes_16_products_instead_of_36() -> None:
    model = upsampled_convolution(6, 5, (8, 12))
    assert multiply_accumulates(model) == 36 * 8 * 12 * 6 * 5
    transpose_upsampling(model)
    assert multiply_accumulates(model) == 16 * 8 * 12 * 6 * 5


def test_names_stay_and_shared_weights_are_kept_for_the_others() -> None:
    """Two upsampled convolutions and one ordinary share their weights."""
    weights = {"scales": np.array([1, 1, 2, 2], np.float32), "w": np.ones((3, 3, 3, 3), np.float32)}
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["up"], **NEAREST),
        helper.make_node("Conv", ["up", "w"], ["y"], "/trunk/y/Conv", pads=[1] * 4),
        helper.make_node("Conv", ["y", "w"], ["z"], "/trunk/z/Conv", pads=[1] * 4),
        helper.make_node("Resize", ["z", "", "scales"], ["up2"], **NEAREST),
        helper.make_node("Conv", ["up2", "w"], ["v"], "/trunk/v/Conv", pads=[1] * 4),
    ]
    model = build(nodes, weights, 3, (4, 6), {"v": 4, "z": 4})
    rewritten = copied(model)
    assert transpose_upsampling(rewritten) == 2
    assert {tensor.name for tensor in rewritten.graph.initializer} == {"w", "w_transposed"}
    assert [node.name for node in rewritten.graph.node] == ["/trunk/y/Conv", "/trunk/z/Conv", "/trunk/v/Conv"]
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    for before, after in zip(run(model, {"x": x}), run(rewritten, {"x": x}), strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=ROUNDING * np.abs(before).max())


@pytest.mark.parametrize(
    "departure",
    [
        {"resize": {"mode": "linear"}},
        {"resize": {"nearest_mode": "ceil"}},
        {"resize": {"coordinate_transformation_mode": "align_corners"}},
        {"scale": 3.0},
        {"kernel": 5},
        {"kernel": 1},
        {"pads": [0, 0, 0, 0]},
        {"pads": [2, 2, 0, 0]},
        {"strides": [2, 2]},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"inputs": 4, "group": 2},
    ],
    ids=str,
)
def test_other_upsampling_is_left_alone(departure: dict[str, Any]) -> None:
    assert_left_alone(upsampled_convolution(**departure))


def test_an_upsampled_map_that_others_read_is_left_alone() -> None:
    model = upsampled_convolution()
    model.graph.node.append(helper.make_node("Relu", ["up"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [None] * 4))
    assert_left_alone(model)
    model = upsampled_convolution()
    model.graph.output.append(helper.make_tensor_value_info("up", TensorProto.FLOAT, [None] * 4))
    assert_left_alone(model)


@pytest.mark.parametrize(
    "between",
    [
        helper.make_node("Relu", ["up"], ["mid"]),
        helper.make_node("Pad", ["up", "pads"], ["mid"], mode="reflect"),
        helper.make_node("Concat", ["up", "up"], ["mid"], axis=1),
    ],
    ids=lambda node: node.op_type,
)
def test_anything_between_is_left_alone(between: onnx.NodeProto) -> None:
    weights = {
        "scales": np.array([1, 1, 2, 2], np.float32),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "w": np.ones((2, 6 if between.op_type == "Concat" else 3, 3, 3), np.float32),
    }
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["up"], **NEAREST),
        between,
        helper.make_node("Conv", ["mid", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    model = build(nodes, weights, 3, (4, 5), {"y": 4})
    if "pads" not in between.input:
        del model.graph.initializer[1]
    assert_left_alone(model)


def test_weights_that_are_computed_are_left_alone() -> None:
    model = upsampled_convolution()
    model.graph.initializer[1].name = "stored"
    model.graph.node.insert(0, helper.make_node("Relu", ["stored"], ["w"]))
    assert_left_alone(model)


def assert_left_alone(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString(deterministic=True)
    assert transpose_upsampling(model) == 0
    assert model.SerializeToString(deterministic=True) == before


# ---------------------------------------------------------------------------------------------------------------------
# block_narrow_convolutions


def narrow_convolution(
    inputs: int, outputs: int, sides: Any, seed: int = 0, kernel: int = 7, bias: bool = True, **attributes: Any
) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    attributes = {"pads": [kernel // 2] * 4, "name": "/final/Conv", **attributes}
    shape = (outputs, inputs // attributes.get("group", 1), kernel, kernel)
    weights = {"w": rng.normal(size=shape).astype(np.float32)}
    if bias:
        weights["b"] = rng.normal(size=outputs).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", *weights], ["c"], **attributes), helper.make_node("Relu", ["c"], ["y"])]
    return build(nodes, weights, inputs, sides, {"y": 4})


@settings(max_examples=30, deadline=None)
@given(
    inputs=st.integers(1, 7), outputs=st.integers(1, LANES // 4), height=st.integers(1, 6), width=st.integers(1, 6),
    batch=st.integers(1, 2), kernel=st.sampled_from([5, 7, 9]), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_narrow_convolutions_are_blocked_exactly(
    inputs: int, outputs: int, height: int, width: int, batch: int, kernel: int, bias: bool, seed: int
) -> None:
    sides = (2 * height, 2 * width)
    model = narrow_convolution(inputs, outputs, sides, seed, kernel, bias)
    rewritten = copied(model)
    assert block_narrow_convolutions(rewritten) == 1
    onnx.checker.check_model(rewritten, full_check=True)
    assert operators(rewritten) == {"Conv": 1, "DepthToSpace": 1, "Relu": 1}
    assert len(rewritten.graph.initializer) == 1 + bias
    x = np.random.default_rng(seed + 1).normal(size=(batch, inputs, *sides)).astype(np.float32)
    weights = [torch.from_numpy(numpy_helper.to_array(it).astype(np.float64)) for it in model.graph.initializer]
    whole = F.conv2d(torch.from_numpy(x.astype(np.float64)), *weights, padding=kernel // 2).numpy()
    (before,), (after,) = run(model, {"x": x}), run(rewritten, {"x": x})
    allowed = ROUNDING * np.abs(whole).max()
    assert after.shape == before.shape == whole.shape
    assert np.abs(after - whole.clip(0)).max() <= allowed and np.abs(before - whole.clip(0)).max() <= allowed
    for border in (np.s_[:, :, 0], np.s_[:, :, -1], np.s_[:, :, :, 0], np.s_[:, :, :, -1]):
        assert np.abs(after[border] - whole[border].clip(0)).max() <= allowed


@pytest.mark.parametrize(("outputs", "sides", "block"), [(1, (8, 12), 4), (1, (8, 6), 2), (3, (8, 12), 2)])
def test_the_block_fits_lanes_and_sides(outputs: int, sides: tuple[int, int], block: int) -> None:
    model = narrow_convolution(2, outputs, sides)
    block_narrow_convolutions(model)
    conv, rearrange = model.graph.node[:2]
    assert conv.name == "/final/Conv" and rearrange.name == "/final/Conv/DepthToSpace"
    assert [it.i for it in rearrange.attribute if it.name == "blocksize"] == [block]
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "w_blocked")
    assert list(weight.dims) == [outputs * block**2, 2, 6 + block, 6 + block]


@pytest.mark.parametrize(
    ("sizes", "departure"),
    [
        ((2, 5, (8, 8)), {}),  # 20 lanes
        ((2, 1, (8, 7)), {}),  # an odd side
        ((2, 1, ("height", 8)), {}),  # an unknown one
        ((2, 1, (8, 8)), {"kernel": 3}),
        ((2, 1, (8, 8)), {"strides": [2, 2]}),
        ((2, 1, (8, 8)), {"pads": [0, 0, 0, 0]}),
        ((2, 2, (8, 8)), {"group": 2}),
        ((2, 1, (8, 8)), {"dilations": [2, 2], "pads": [6, 6, 6, 6]}),
    ],
    ids=str,
)
def test_other_convolutions_are_not_blocked(sizes: Any, departure: dict[str, Any]) -> None:
    model = narrow_convolution(*sizes, **departure)
    before = model.SerializeToString(deterministic=True)
    assert block_narrow_convolutions(model) == 0
    assert model.SerializeToString(deterministic=True) == before


# ---------------------------------------------------------------------------------------------------------------------
# The real graphs: up-sampling blocks of hourglasses (two levels in the small model) and decoder; image and occlusion


TRANSPOSED = {"source": 2, "driving": 2, "motion": 2, "generator": 2}
BLOCKED = {"source": 0, "driving": 0, "motion": 1, "generator": 1}
SPADE = {"generator": 0}  # it normalises between upsampling and convolution, and ends in a 3 × 3 kernel
CASES = [*((variant, 17, "1:1:4") for variant in VARIANTS), ("dagan", 20, "1:1:4"), ("dagan", 17, "2")]


@pytest.mark.parametrize(("variant", "opset", "batch"), CASES)
def test_real_graphs_change_by_rounding_only(traced: Any, variant: str, opset: int, batch: str) -> None:
    other = SPADE if variant == "dagan_spade" else {}
    for name in TRANSPOSED:
        subnetwork, graph = traced(variant, name, batch, opset)
        inputs = random_inputs(subnetwork)
        expected, products = run(graph, inputs), multiply_accumulates(graph)
        transposed = transpose_upsampling(graph)
        assert transposed == (TRANSPOSED | other)[subnetwork.name] == operators(graph)["ConvTranspose"]
        assert (multiply_accumulates(graph) < products) == (transposed > 0)
        assert block_narrow_convolutions(graph) == (BLOCKED | other)[subnetwork.name]
        onnx.checker.check_model(graph, full_check=True)
        for before, after in zip(expected, run(graph, inputs), strict=True):
            np.testing.assert_allclose(after, before, rtol=0, atol=2e-5 * max(1, np.abs(before).max()))
        assert transpose_upsampling(graph) == 0  # nothing is left to do


def random_inputs(subnetwork: Any) -> dict[str, np.ndarray]:
    """In each input's usual range: local frames near the identity, everything else in [0, 1)."""
    rng = np.random.default_rng(0)
    inputs = {}
    for tensor in subnetwork.inputs:
        shape = [size if isinstance(size, int) else 2 for size in tensor.shape]
        inputs[tensor.name] = rng.random(shape, dtype=np.float32)
        if tensor.name.endswith("jacobian"):
            inputs[tensor.name] = np.eye(2, dtype=np.float32) + 0.2 * inputs[tensor.name]
    return inputs
