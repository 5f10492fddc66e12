"""Graphs cut at the kernels compute what the whole ones do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from dagan_rt.bundle import BatchProfile
from dagan_rt.errors import InputError
from dagan_rt.export import passes, plugin_nodes, precision
from dagan_rt.export.subnetworks import Subnetwork
from dagan_rt.plugins.ops import DOMAIN, OPS

from .plugin_twins import EVALUATED

ATTENTION = {"FlowWarp": 1, "CrossAttention": 1}
EXPECTED = {
    "dagan": {"motion": {"SparseMotion": 1, "DenseFlow": 1}, "generator": ATTENTION},
    "dagan_spade": {"generator": {"FlowWarp": 2, "CrossAttention": 1}},
    "dagan_sa": {"generator": ATTENTION, "attention": {"CrossAttention": 1}},
    "fomm": {"motion": {"SparseMotion": 1, "DenseFlow": 1}, "generator": {"FlowWarp": 1}},
    "baseline": {"generator": {"FlowWarp": 1}},
}
GRAPHS = [(variant, graph) for variant, graphs in EXPECTED.items() for graph in graphs]


def _inputs(subnetwork: Subnetwork, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Values such as the networks pass on: local frames near the identity, flows that also leave the picture."""
    rng = np.random.default_rng(seed)
    made = {}
    for tensor in subnetwork.inputs:
        shape = (batch, *(int(size) for size in tensor.shape[1:]))
        values = rng.uniform(0, 1, shape)
        if tensor.name.endswith("jacobian"):
            values = np.eye(2) + 0.2 * rng.standard_normal(shape)
        elif tensor.name.endswith("kp_value") or tensor.name == "flow":
            values = rng.uniform(-1.2, 1.2, shape)
        elif tensor.name in ("query", "feature", "warped_feature"):
            values = rng.standard_normal(shape)
        made[tensor.name] = values.astype(np.float32)
    return made


def _whole(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def _cut(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ReferenceEvaluator(model, new_ops=EVALUATED).run(None, inputs)


@pytest.mark.parametrize("batch", ["1", "3", "1:1:8"])
@pytest.mark.parametrize(("variant", "graph"), GRAPHS)
def test_a_graph_with_nodes_computes_what_it_did(variant: str, graph: str, batch: str, traced: Any) -> None:
    subnetwork, model = traced(variant, graph, batch)
    inputs = _inputs(subnetwork, BatchProfile.parse(batch).least if ":" not in batch else 2)
    expected = _whole(model, inputs)
    before = len(model.graph.node)
    assert plugin_nodes.insert(model) == EXPECTED[variant][graph]
    assert len(model.graph.node) < before
    onnx.checker.check_model(model, full_check=True)
    for found, wanted in zip(_cut(model, inputs), expected, strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, atol=2e-4 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize(("variant", "graph"), GRAPHS)
def test_a_half_precision_graph_too(variant: str, graph: str, traced: Any) -> None:
    subnetwork, model = traced(variant, graph)
    inputs = _inputs(subnetwork, 2)
    (exact, *_) = _whole(model, inputs)
    half = precision.lower(model, "fp16", subnetwork.trunks)
    (expected, *_) = _whole(precision.rounding_twin(half), inputs)
    assert plugin_nodes.insert(half) == EXPECTED[variant][graph]
    onnx.checker.check_model(half, full_check=True)
    (found, *_) = _cut(half, inputs)
    assert found.dtype == np.float32
    rounding = np.sqrt(np.mean((expected - exact) ** 2))
    assert np.sqrt(np.mean((found - exact) ** 2)) <= 2 * rounding + 1e-6


def test_tensors_have_the_types_that_the_kernels_take(traced: Any) -> None:
    subnetwork, model = traced("dagan", "generator")
    half = precision.lower(model, "fp16", subnetwork.trunks)
    plugin_nodes.insert(half)
    types = plugin_nodes._types(half) | {it.name: it.data_type for it in half.graph.initializer}
    for node in half.graph.node:
        if node.domain == DOMAIN:
            op = OPS[node.op_type]
            leading = types[node.input[list(op.inputs.values()).index("T")]]
            wanted = [leading if kind == "T" else TensorProto.FLOAT for kind in op.inputs.values()]
            assert [types[name] for name in node.input] == wanted, node.op_type
    attention = next(node for node in half.graph.node if node.op_type == "CrossAttention")
    assert types[attention.input[0]] == TensorProto.FLOAT16  # tensor cores, although the graph keeps logits in float32


def test_int8_and_rewritten_graphs_too(traced: Any) -> None:
    subnetwork, model = traced("dagan", "generator", opset=20)  # the evaluator knows no older QuantizeLinear
    passes.transpose_upsampling(model)
    samples = [_inputs(subnetwork, 1, seed) for seed in range(2)]
    quantized = precision.lower(model, "int8", subnetwork.trunks, samples)
    inputs = _inputs(subnetwork, 1)
    (expected,) = _whole(quantized, inputs)
    assert plugin_nodes.insert(quantized) == ATTENTION
    (found,) = _cut(quantized, inputs)
    assert np.sqrt(np.mean((found - expected) ** 2)) < 5e-3  # a value on the border of two levels falls either way


def test_nodes_say_how_tensorrt_finds_their_plugin(traced: Any) -> None:
    _, model = traced("dagan_spade", "generator")
    plugin_nodes.insert(model)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert len({node.name for node in nodes}) == len(nodes) == 3
    for node in nodes:
        attributes = {it.name: helper.get_attribute_value(it) for it in node.attribute}
        assert (attributes.pop("plugin_namespace"), attributes.pop("plugin_version")) == (b"dagan_rt", b"1")
        assert set(attributes) == set(OPS[node.op_type].attributes)
    assert [it.version for it in model.opset_import if it.domain == DOMAIN] == [1]


def test_other_graphs_stay_as_they_are(traced: Any) -> None:
    for graph in ("driving", "keypoints", "discriminator"):
        _, model = traced("fomm", graph)
        before = model.SerializeToString()
        assert not plugin_nodes.insert(model)
        assert model.SerializeToString() == before


def test_align_corners_is_kept(traced: Any) -> None:
    subnetwork, model = traced("fomm", "generator")
    sampler = next(node for node in model.graph.node if node.op_type == "GridSample")
    next(it for it in sampler.attribute if it.name == "align_corners").i = 1
    inputs = _inputs(subnetwork, 1)
    (expected,) = _whole(model, inputs)
    plugin_nodes.insert(model)
    np.testing.assert_allclose(_cut(model, inputs)[0], expected, atol=2e-4)


@pytest.mark.parametrize(("attribute", "value"), [("mode", "nearest"), ("padding_mode", "border")])
def test_another_way_of_sampling_is_refused(attribute: str, value: str, traced: Any) -> None:
    _, model = traced("fomm", "generator")
    sampler = next(node for node in model.graph.node if node.op_type == "GridSample")
    next(it for it in sampler.attribute if it.name == attribute).s = value.encode()
    with pytest.raises(InputError, match="no plugin takes the place of GridSample '/GridSample': export without"):
        plugin_nodes.insert(model)


def test_another_way_of_resizing_is_refused(traced: Any) -> None:
    _, model = traced("dagan_spade", "generator")
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    next(it for it in resize.attribute if it.name == "mode").s = b"nearest"
    with pytest.raises(InputError, match="no plugin takes the place of GridSample '/GridSample_1'"):
        plugin_nodes.insert(model)


def test_a_region_with_another_input_is_refused(traced: Any) -> None:
    _, model = traced("dagan", "motion")
    *_, stacked = (node for node in model.graph.node if node.op_type == "Concat" and "Unsqueeze" in node.input[0])
    scaled = helper.make_node("Mul", [stacked.input[0], "scale"], ["scaled"], "extra")
    index = list(model.graph.node).index(stacked)
    stacked.input[0] = "scaled"
    model.graph.node.insert(index, scaled)
    with pytest.raises(InputError, match="region of SparseMotion .* also depends on 'scale'"):
        plugin_nodes.insert(model)


def test_an_attention_of_another_kind_is_refused(traced: Any) -> None:
    _, model = traced("dagan", "generator")
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    scaled = helper.make_node("Mul", [softmax.input[0], "model.generator.AttnModule.gamma"], ["scaled"], "extra")
    index = list(model.graph.node).index(softmax)
    softmax.input[0] = "scaled"
    model.graph.node.insert(index, scaled)
    with pytest.raises(InputError, match="no plugin takes the place of Softmax '/AttnModule/Softmax'"):
        plugin_nodes.insert(model)
