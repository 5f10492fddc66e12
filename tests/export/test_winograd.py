"""Winograd's filtering computes the same convolution: against float64, and on both CPU engines."""

from __future__ import annotations

import importlib.util
import io
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from dagan_rt.export import winograd
from dagan_rt.export.counts import multiply_accumulates
from dagan_rt.export.winograd import A, B, G, filter_minimally

ROUNDING = 2e-5  # float32, in units of the largest output
SAME: dict[str, Any] = {"pads": [1, 1, 1, 1]}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few channels and tiles will do in tests."""
    monkeypatch.setattr(winograd, "CHANNELS", 2)
    monkeypatch.setattr(winograd, "TILES", 1)


def onnxruntime_run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def openvino_run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    from dagan_rt.backends.openvino import core

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core().compile_model(core().read_model(io.BytesIO(model.SerializeToString())), "CPU", settings)
    return [np.array(value) for value in compiled.create_infer_request().infer(inputs).values()]


ENGINES = pytest.mark.parametrize("run", [onnxruntime_run, openvino_run], ids=["onnxruntime", "openvino"])


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def model_of(nodes: list[Any], weights: dict[str, np.ndarray], shape: list[Any], outputs: list[str]) -> Any:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "built", [value("x", TensorProto.FLOAT, shape)],
        [value(name, TensorProto.FLOAT, [None] * 4) for name in outputs],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def convolution(inputs: int = 3, outputs: int = 4, sides: tuple[Any, Any] = (8, 12), bias: bool = True, kernel: int = 3,
                batch: Any = "batch", **attributes: Any) -> onnx.ModelProto:  # fmt: skip
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(outputs, inputs // attributes.get("group", 1), kernel, kernel))}
    if bias:
        weights["b"] = rng.normal(size=outputs)
    attributes = {"pads": [kernel // 2] * 4, **attributes}
    node = helper.make_node("Conv", ["x", *weights], ["y"], "/conv", **attributes)
    return model_of([node], weights, [batch, inputs, *sides], ["y"])


def test_the_matrices_filter_any_signal() -> None:
    """outputs = A ((G kernel) * (B inputs)) for integers, by the definition of a convolution."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        kernel, signal = rng.integers(-9, 10, 3), rng.integers(-9, 10, 6)
        expected = [sum(kernel[tap] * signal[at + tap] for tap in range(3)) for at in range(4)]
        np.testing.assert_allclose(A @ ((G @ kernel) * (B @ signal)), expected, rtol=0, atol=1e-12)


@ENGINES
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("inputs", "outputs", "sides", "bias"), [(3, 4, (8, 12), True), (5, 2, (4, 4), False)])
def test_a_convolution_stays_the_same(
    run: Any, batch: int, inputs: int, outputs: int, sides: tuple[int, int], bias: bool
) -> None:
    model = convolution(inputs, outputs, sides, bias)
    rewritten = copied(model)
    assert filter_minimally(rewritten) == 1
    onnx.checker.check_model(rewritten, full_check=True)
    x = np.random.default_rng(1).normal(size=(batch, inputs, *sides)).astype(np.float32)
    weights = [torch.from_numpy(numpy_helper.to_array(it).astype(np.float64)) for it in model.graph.initializer]
    expected = F.conv2d(torch.from_numpy(x.astype(np.float64)), *weights, padding=1).numpy()
    (found,) = run(rewritten, {"x": x})
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


def residual_chain(blocks: int = 2) -> onnx.ModelProto:
    rng = np.random.default_rng(2)
    weights, nodes, at = {}, [], "x"
    for block in range(blocks):
        weights |= {f"{block}.w{i}": rng.normal(size=(3, 3, 3, 3)) / 4 for i in range(2)}
        weights |= {f"{block}.b": rng.normal(size=3), f"{block}.scale": rng.normal(size=3)}
        weights |= {f"{block}.mean": rng.normal(size=3), f"{block}.var": rng.uniform(0.5, 2, 3)}
        relu, first = [f"{block}.r"], [f"{block}.w0", f"{block}.b"]
        norm = [f"{block}.{it}" for it in ("scale", "b", "mean", "var")]
        nodes += [
            helper.make_node("BatchNormalization", [at, *norm], [f"{block}.n"], f"/{block}/norm", epsilon=1e-3),
            helper.make_node("Relu", [f"{block}.n"], relu, f"/{block}/relu"),
            helper.make_node("Conv", [*relu, *first], [f"{block}.c"], f"/{block}/1", **SAME),
            helper.make_node("Relu", [f"{block}.c"], [f"{block}.s"], f"/{block}/relu2"),
            helper.make_node("Conv", [f"{block}.s", f"{block}.w1"], [f"{block}.d"], f"/{block}/2", **SAME),
            helper.make_node("Add", [at, f"{block}.d"], [f"{block}.y"], f"/{block}/add"),
        ]  # fmt: skip
        at = f"{block}.y"
    nodes.append(helper.make_node("AveragePool", [at], ["y"], "/pool", kernel_shape=[2, 2], strides=[2, 2]))
    return model_of(nodes, weights, ["batch", 3, 8, 8], ["y", "0.c"])


@ENGINES
def test_residual_blocks_stay_in_tiles(run: Any) -> None:
    model = residual_chain()
    rewritten = copied(model)
    assert filter_minimally(rewritten) == 4
    onnx.checker.check_model(rewritten, full_check=True)
    operators = Counter(node.op_type for node in rewritten.graph.node)
    # Taken apart once; put together for the pool, and for the output in between.
    assert operators["Transpose"] == 3 and operators["Conv"] == operators["BatchNormalization"] == 0
    x = np.random.default_rng(3).normal(size=(2, 3, 8, 8)).astype(np.float32)
    for before, after in zip(onnxruntime_run(model, {"x": x}), run(rewritten, {"x": x}), strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=ROUNDING * np.abs(before).max())


def test_it_takes_a_quarter_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolution(128, 128, (64, 64), batch=1)
    rewritten = copied(model)
    filter_minimally(rewritten)
    kernels = 36 * 9 * 128 * 128  # computed once, as the graph is loaded
    transforms = 64 * 64 * 128 * 36 * (36 + 16) // 16
    assert multiply_accumulates(rewritten) - kernels - transforms == multiply_accumulates(model) // 4


@pytest.mark.parametrize(
    "departure",
    [
        {"inputs": 1}, {"outputs": 1}, {"sides": (8, 6)}, {"sides": ("height", 8)}, {"kernel": 5}, {"kernel": 1},
        {"pads": [0, 0, 0, 0]}, {"strides": [2, 2]}, {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"inputs": 4, "group": 2},
    ],
    ids=str,
)  # fmt: skip
def test_other_convolutions_are_left_alone(departure: dict[str, Any]) -> None:
    model = convolution(**departure)
    before = model.SerializeToString(deterministic=True)
    assert filter_minimally(model) == 0
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("shape", [(), (1,), (1, 4, 1, 1), (4, 1, 1)])
def test_a_constant_is_added_to_the_whole_map(shape: tuple[int, ...]) -> None:
    """As the modulation of SPADE adds 1: no map, so that the sum is not one of tiles."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 3, 3, 3)), "one": rng.normal(size=shape)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["z"], "/conv", pads=[1] * 4),
        helper.make_node("Add", ["z", "one"], ["y"], "/add"),
    ]
    model = model_of(nodes, weights, [1, 3, 8, 8], ["y"])
    inputs = {"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)}
    (expected,) = onnxruntime_run(model, inputs)
    assert filter_minimally(model) == 1
    onnx.checker.check_model(model, full_check=True)
    (found,) = onnxruntime_run(model, inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


@ENGINES
@pytest.mark.parametrize("variant", ["dagan", "dagan_spade"])
def test_a_real_generator_changes_by_rounding_only(variant: str, run: Any, traced: Any) -> None:
    generator, graph = traced(variant, "generator")
    rng = np.random.default_rng(0)
    inputs = {
        it.name: rng.random([1 if isinstance(n, str) else n for n in it.shape], np.float32) for it in generator.inputs
    }
    (expected,) = onnxruntime_run(graph, inputs)
    rewritten = filter_minimally(graph)  # dagan: two of the residual block, two of the upsampling blocks
    assert rewritten == 4 if variant == "dagan" else rewritten > 4
    onnx.checker.check_model(graph, full_check=True)
    (found,) = run(graph, inputs)
    atol = 2e-5 if variant == "dagan" else 3e-4  # instance norms of maps that vary little multiply the rounding
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
