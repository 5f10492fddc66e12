"""Attention in blocks of queries computes the same: against float64, on both CPU engines; in int8 nearly so."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from dagan_rt.export import attention
from dagan_rt.export.attention import block_attention

Inputs = dict[str, np.ndarray]


def onnxruntime_run(model: onnx.ModelProto, inputs: Inputs) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def openvino_run(model: onnx.ModelProto, inputs: Inputs) -> np.ndarray:
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    from dagan_rt.backends.openvino import core

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core().compile_model(core().read_model(io.BytesIO(model.SerializeToString())), "CPU", settings)
    return np.array(compiled.create_infer_request().infer(inputs)[0])


ENGINES = pytest.mark.parametrize("run", [onnxruntime_run, openvino_run], ids=["onnxruntime", "openvino"])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERIES", 16)


def model_of(queries: int = 40, keys: int = 24, read: str = "", axis: int = -1, perm: Any = (0, 2, 1)) -> Any:
    """V softmax(QᵀK)ᵀ for Q [B, 5, queries], K [B, 5, keys], V [B, 7, keys]; `read` is an output besides."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Transpose", ["q"], ["qt"], "/q", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["qt", "k"], ["logits"], "/logits"),
        helper.make_node("Softmax", ["logits"], ["weights"], "/softmax", axis=axis),
        helper.make_node("Transpose", ["weights"], ["turned"], "/turned", perm=list(perm)),
        helper.make_node("MatMul", ["v", "turned"], ["y"], "/y"),
    ]
    shapes = {"q": ["batch", 5, queries], "k": ["batch", 5, keys], "v": ["batch", 7, keys]}
    graph = helper.make_graph(
        nodes, "built", [value(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [value(name, TensorProto.FLOAT, [None] * 3) for name in ("y", *([read] if read else []))],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def inputs_of(queries: int, keys: int, batch: int = 2, sharpness: float = 1.0, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    q, k, v = (np.abs(rng.normal(size=(batch, *shape))) for shape in ((5, queries), (5, keys), (7, keys)))
    return {"q": (sharpness * q).astype(np.float32), "k": k.astype(np.float32), "v": v.astype(np.float32)}


def exact(inputs: Inputs) -> np.ndarray:
    q, k, v = (inputs[name].astype(np.float64) for name in "qkv")
    logits = np.einsum("bdn,bdm->bnm", q, k)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bcm,bnm->bcn", v, weights / weights.sum(-1, keepdims=True))


@ENGINES
@pytest.mark.parametrize("queries", [17, 32, 40])  # the last block is not always full
@pytest.mark.parametrize("batch", [1, 3])
def test_blocks_compute_the_same(run: Any, queries: int, batch: int) -> None:
    model = model_of(queries)
    assert block_attention(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.op_type == "Softmax" for node in model.graph.node) == -(-queries // 16)
    inputs = inputs_of(queries, 24, batch)
    np.testing.assert_allclose(run(model, inputs), exact(inputs), rtol=0, atol=2e-6)


@ENGINES
@pytest.mark.parametrize("sharpness", [0.0, 0.3, 3.0, 30.0])  # from a mean over all keys to the nearest key alone
def test_int8_keeps_flat_and_sharp_attention(run: Any, sharpness: float) -> None:
    model = model_of(40, 400)
    assert block_attention(model, int8=True) == 1
    onnx.checker.check_model(model, full_check=True)
    inputs = inputs_of(40, 400, sharpness=sharpness)
    inputs["v"] *= np.geomspace(1e-3, 1e3, 7, dtype=np.float32)[:, None]  # every channel has a scale of its own
    expected = exact(inputs)
    peaks = inputs["v"].max(axis=2, keepdims=True)
    assert (np.abs(run(model, inputs) - expected) / peaks).max() < 0.02


@ENGINES
def test_int8_keeps_constant_values(run: Any) -> None:
    """The weights sum to one, whatever rounding did to them; channels of nothing but zeros stay zero."""
    model = model_of(40, 400)
    block_attention(model, int8=True)
    inputs = inputs_of(40, 400, sharpness=0.5)
    inputs["v"][:] = np.array([0, 1, 2, 3, 1e-5, 1e5, 7], np.float32)[:, None]
    np.testing.assert_allclose(run(model, inputs), exact(inputs), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "departure", [{"queries": 16}, {"read": "weights"}, {"read": "logits"}, {"axis": 1}, {"perm": (1, 2, 0)}], ids=str
)
def test_anything_else_is_left_alone(departure: dict[str, Any]) -> None:
    model = model_of(**({"queries": 24, "keys": 24} | departure))
    before = model.SerializeToString(deterministic=True)
    assert block_attention(model) == 0
    assert model.SerializeToString(deterministic=True) == before


@ENGINES
@pytest.mark.parametrize(("graph", "batch"), [("generator", "1:1:4"), ("attention", "1")])
def test_real_graphs_change_by_rounding_only(run: Any, traced: Any, graph: str, batch: str) -> None:
    subnetwork, model = traced("dagan", graph, batch)
    rng = np.random.default_rng(0)
    shapes = {it.name: [1 if isinstance(size, str) else size for size in it.shape] for it in subnetwork.inputs}
    inputs = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    expected = onnxruntime_run(model, inputs)
    assert block_attention(model) == 1
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model, inputs), expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))
