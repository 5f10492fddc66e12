"""Inputs, exact results and costs of the operations, each against something counted or computed apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from dagan_rt.benchmarking import peers  # noqa: E402
from dagan_rt.benchmarking.operations import OPERATIONS, SIZE, Draw, bind, exactly  # noqa: E402
from dagan_rt.benchmarking.suites import Case, Shapes  # noqa: E402

SHAPES = Shapes(image=24, feature=10, points=3, channels=8, queries=4)


def case_of(op: str, dtype: str = "float16", layout: str = "nhwc", flow: str = "smooth", batch: int = 2) -> Case:
    return Case(op, batch, dtype, layout, flow if OPERATIONS[op].warps else "")


def drawn(case: Case, shapes: Shapes = SHAPES) -> tuple[Any, ...]:
    return OPERATIONS[case.op].draw(Draw(case, shapes, "cpu"))


@pytest.mark.parametrize("dtype", SIZE)
@pytest.mark.parametrize("op", OPERATIONS)
def test_bytes_are_those_of_all_inputs_and_outputs(op: str, dtype: str) -> None:
    operation, case = OPERATIONS[op], case_of(op, dtype)
    inputs = list(drawn(case))
    outputs = list(exactly(operation, tuple(inputs)))
    if "attention" in op:
        inputs[4] = inputs[4][:0]  # gamma is four bytes of megabytes
    if op == "cross_attention_backward":
        inputs[3] = inputs[3][:0]  # the residual need not be read,
        del outputs[3:]  # its gradient is the output's, and gamma's is again one number
    width = {"planes_to_image": 1, "dense_flow": 4}.get(op, SIZE[dtype])  # of an output's number
    widths = [width] * len(outputs)
    if op == "flow_warp_backward":
        widths[1:] = [4, 4]  # gradients of flow and occlusion
    moved = sum(value.numel() * value.element_size() for value in inputs)
    moved += sum(output.numel() * size for output, size in zip(outputs, widths, strict=True))
    assert operation.bytes(case.batch, SHAPES, SIZE[dtype]) == moved


def test_flops_of_attention_are_those_of_its_matrix_products() -> None:
    forward, backward = case_of("cross_attention", "float32"), case_of("cross_attention_backward", "float32")
    call = bind(OPERATIONS[forward.op], peers.naive_attention, drawn(forward))
    with FlopCounterMode(display=False) as counted:
        call()
    assert OPERATIONS[forward.op].flops(2, SHAPES) == counted.get_total_flops()
    call = bind(OPERATIONS[backward.op], peers.naive_attention, drawn(backward))
    with FlopCounterMode(display=False) as counted:
        call()
    logits = 2 * 2 * SHAPES.feature**4 * SHAPES.queries  # kept by the naive form, computed anew by one that cannot
    assert OPERATIONS[backward.op].flops(2, SHAPES) == counted.get_total_flops() + logits


@pytest.mark.parametrize("op", OPERATIONS)
def test_draws_are_the_same_again_and_differ_by_case(op: str) -> None:
    first, again, other = drawn(case_of(op)), drawn(case_of(op)), drawn(case_of(op, layout="nchw"))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].float(), other[0].float())
    assert all(bool((value != 0).any()) for value in first)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_maps_lie_as_the_case_says(layout: str) -> None:
    feature, *_ = drawn(case_of("flow_warp", layout=layout))
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    assert feature.is_contiguous(memory_format=form) and feature.dtype == torch.float16


def test_a_smooth_flow_is_motion_and_a_scattered_one_is_not() -> None:
    from dagan_rt.networks.geometry import coordinate_grid

    shapes = Shapes(feature=64, channels=1)
    smooth, scattered = (drawn(case_of("flow_warp", flow=flow), shapes)[1] for flow in ("smooth", "scatter"))
    strayed = ((smooth - coordinate_grid(64, 64, smooth)) * 32).abs()
    assert 0.5 < float(strayed.mean()) < 5 and float(strayed.max()) < 20  # pixels
    steps = [float((flow[:, :, 1:] - flow[:, :, :-1]).norm(dim=-1).mean()) * 32 for flow in (smooth, scattered)]
    assert steps[0] < 2 and steps[1] > 10
    for flow in (smooth, scattered):
        pixel = ((flow.double() + 1) * 64 - 1) / 2
        assert float((pixel - pixel.round()).abs().min()) > 0.005
        assert float(flow.abs().max()) > 1  # some samples lie outside


def test_exact_attention_against_numpy() -> None:
    case = case_of("cross_attention", "float32", batch=3)
    query, key, value, residual, gamma = (given.double().numpy() for given in drawn(case))
    logits = np.einsum("bdn,bdm->bnm", query.reshape(3, 4, -1), key.reshape(3, 4, -1))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("bcm,bnm->bcn", value.reshape(3, 8, -1), weights).reshape(residual.shape)
    (found,) = exactly(OPERATIONS["cross_attention"], drawn(case))
    np.testing.assert_allclose(found.numpy(), gamma * attended + residual, rtol=1e-12)


def test_exact_gradients_against_differences() -> None:
    case, step = case_of("flow_warp_backward", "float32"), 1e-6
    *inputs, gradient = (value.double() for value in drawn(case))
    found = exactly(OPERATIONS[case.op], (*inputs, gradient))
    for at, slope in enumerate(found):
        direction = torch.randn(inputs[at].shape, generator=torch.Generator().manual_seed(at), dtype=torch.float64)
        moved = [[value + sign * step * direction if k == at else value for k, value in enumerate(inputs)]
                 for sign in (1, -1)]  # fmt: skip
        up, down = (float((peers.flow_warp(*each) * gradient).sum()) for each in moved)
        assert (up - down) / (2 * step) == pytest.approx(float((slope * direction).sum()), rel=1e-6)
