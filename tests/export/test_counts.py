"""Counts of a graph's work: against PyTorch's own counter, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.parser import parse_model
from torch.utils.flop_counter import FlopCounterMode

from dagan_rt.bundle import BatchProfile
from dagan_rt.errors import InputError
from dagan_rt.export.counts import multiply_accumulates, operations
from dagan_rt.export.onnx import trace
from dagan_rt.export.precision import lower
from dagan_rt.export.subnetworks import parts, subnetworks

FIXED = BatchProfile.parse("2")


def counted_by_torch(model: Any, subnetwork: Any, batch: int) -> float:
    inputs = [torch.rand([size if isinstance(size, int) else batch for size in x.shape]) for x in subnetwork.inputs]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        subnetwork.build(model)(*inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("variant", ["dagan", "dagan_spade", "dagan_sa", "fomm"])
def test_runtime_graphs_do_what_pytorch_counts(small_model: Any, traced: Any, variant: str) -> None:
    model = small_model(variant)
    for subnetwork in subnetworks(model.config):
        _, graph = traced(variant, subnetwork.name)
        expected = counted_by_torch(model, subnetwork, 1)
        if variant == "fomm" and subnetwork.name == "source":
            # Key points and thumbnail shrink the same image by the same 13 × 13 filter: the graph does it once.
            expected -= 3 * 16 * 16 * 13 * 13
        assert multiply_accumulates(graph) == expected
        assert multiply_accumulates(graph, batch=3) == 3 * expected


def test_parts_do_what_pytorch_counts(small_model: Any) -> None:
    model = small_model("dagan")
    for subnetwork in parts(model.config):
        graph = trace(model, subnetwork, FIXED)
        assert multiply_accumulates(graph, batch=9) == counted_by_torch(model, subnetwork, 2), subnetwork.name


def test_half_precision_and_quantized_graphs_do_as_much(traced: Any) -> None:
    subnetwork, graph = traced("dagan", "generator")
    shapes = {x.name: [size if isinstance(size, int) else 1 for size in x.shape] for x in subnetwork.inputs}
    frames = [{name: np.ones(shape, np.float32) for name, shape in shapes.items()}]
    for precision, kind in (("fp16", "Cast"), ("int8", "QuantizeLinear")):
        lowered = lower(graph, precision, subnetwork.trunks, frames)
        assert any(node.op_type == kind for node in lowered.graph.node)
        assert multiply_accumulates(lowered) == multiply_accumulates(graph)
        assert operations(lowered) > operations(graph)


HEADER = '<ir_version: 9, opset_import: ["": 17]>\n'
BY_HAND = {  # text, multiply-accumulates at a batch of one, operations
    "g (float[batch, 4, 5, 7] x, float[6, 2, 3, 3] w) => (float[batch, 6, 3, 4] y) {"
    "y = Conv<group = 2, strides = [2, 2], pads = [1, 1, 1, 1]>(x, w) }": ((3 * 4) * 6 * (2 * 9), 1),
    "g (float[batch, 3, 5, 7] x, float[3, 8, 4, 4] w) => (float[batch, 8, 10, 14] y) {"
    "y = ConvTranspose<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w) }": ((5 * 7) * 3 * 8 * 16, 1),
    "g (float[batch, 5, 2, 3] x, float[3, 7] w) => (float[batch, 5, 2, 7] y) {"
    "y = MatMul(x, w) }": (5 * 2 * 7 * 3, 1),
    "g (float[4, 3] x, float[4, 7] w) => (float[3, 7] y) {"
    "y = Gemm<transA = 1>(x, w) }": (3 * 7 * 4, 1),
    "g (float[batch, 6] x) => (float[batch, 6] y) {"
    "c = Constant<value = float {2.0}>() z = Mul(x, c) y = Relu(z) }": (0, 2),
}  # fmt: skip


@pytest.mark.parametrize("text", BY_HAND)
def test_by_hand(text: str) -> None:
    model = parse_model(HEADER + text)
    onnx.checker.check_model(model, full_check=True)
    assert (multiply_accumulates(model), operations(model)) == BY_HAND[text]
    if "batch" in text:
        assert multiply_accumulates(model, batch=5) == 5 * BY_HAND[text][0]


def test_an_unknown_shape_is_named() -> None:
    text = "g (float[batch, 3, n, 8] x, float[4, 3, 3, 3] w) => (float[batch, 4, m, 6] y) { [only] y = Conv(x, w) }"
    with pytest.raises(InputError, match="'only'.*'x'.*all axes but 'batch'"):
        multiply_accumulates(parse_model(HEADER + text))
