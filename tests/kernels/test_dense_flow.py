"""Motions blended into one flow in one launch, against float64, the networks, and loops over pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.kernels.dense_flow import dense_flow

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["nchw", "nhwc"]
# (B, K, h, w): the published networks' own; others; pixels that blocks do not divide; the fewest and the most points.
SHAPES = [(1, 15, 16, 16), (3, 10, 7, 19), (1, 1, 2, 2), (2, 63, 5, 9), (1, 17, 13, 8), (2, 3, 33, 31)]


def face(
    B: int, K: int, h: int, w: int, device: str = "cpu", dtype: Any = torch.float32, layout: str = "nchw"
) -> list[torch.Tensor]:
    """Logits of mask and occlusion, slices of one array, and key points that move about."""
    random = torch.Generator().manual_seed(B + 10 * K + 100 * h + 1000 * w)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    logits = (3 * normal(B, K + 2, h, w)).to(dtype)
    if layout == "nhwc":
        logits = logits.contiguous(memory_format=torch.channels_last)
    logits = logits.to(device)
    source, driving = 0.5 * normal(B, K, 2), 0.5 * normal(B, K, 2)
    frames = [torch.eye(2) + 0.2 * normal(B, K, 2, 2) for _ in range(2)]
    return [logits[:, :-1], logits[:, -1:], *[it.to(device) for it in (source, frames[0], driving, frames[1])]]


def exact(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return dense_flow(*[it.cpu().double() for it in inputs], reference=True)


def check(results: Any, inputs: list[torch.Tensor]) -> None:
    """At most twice the error of PyTorch in the same dtype; and, as all arithmetic is float32, that of float32."""
    theirs = dense_flow(*inputs, reference=True)
    for result, their, expected in zip(results, theirs, exact(inputs), strict=True):
        assert result.dtype == torch.float32 and result.shape == expected.shape and result.is_contiguous()
        wrong = (result.cpu().double() - expected).abs()
        allowed = 2 * (their.cpu().double() - expected).abs().max()
        assert wrong.max() <= allowed + 1e-6  # the floor: where PyTorch happens to err by nothing
        # Motions of key points whose Jacobian is nearly singular are large.
        assert wrong.max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_at_most_twice_as_much_as_pytorch(device: str, shape: Any, dtype: Any, layout: str) -> None:
    inputs = face(*shape, device=device, dtype=dtype, layout=layout)
    check(dense_flow(*inputs), inputs)


@pytest.mark.parametrize("shape", [(1, 15, 64, 64), (1, 4, 113, 203)], ids=str)
def test_a_whole_face(device: str, shape: Any) -> None:
    for layout in LAYOUTS:
        inputs = face(*shape, device=device, layout=layout)
        check(dense_flow(*inputs), inputs)


def test_pixel_by_pixel(device: str) -> None:
    """Against the formulas, written out for one pixel in Python's floats."""
    B, K, h, w = 2, 3, 5, 7
    inputs = face(B, K, h, w, device=device)
    flow, visible = (it.cpu().numpy() for it in dense_flow(*inputs))
    mask, occlusion, s, js, d, jd = [it.cpu().numpy().astype(np.float64) for it in inputs]
    for b, row, column in np.ndindex(B, h, w):
        z = np.array([2 * column / (w - 1) - 1, 2 * row / (h - 1) - 1])
        motions = [z, *(js[b, k] @ np.linalg.inv(jd[b, k]) @ (z - d[b, k]) + s[b, k] for k in range(K))]
        weights = np.exp(mask[b, :, row, column])
        expected = sum(weight * motion for weight, motion in zip(weights, motions, strict=True)) / weights.sum()
        np.testing.assert_allclose(flow[b, row, column], expected, rtol=1e-5, atol=1e-5)
        visibility = 1 / (1 + math.exp(-occlusion[b, 0, row, column]))
        np.testing.assert_allclose(visible[b, 0, row, column], visibility, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_networks_flow_and_occlusion(device: str, layout: str) -> None:
    from dagan_rt.keypoints import KeyPoints
    from dagan_rt.networks.config import NetworkConfig
    from dagan_rt.networks.motion import MotionEstimator

    torch.manual_seed(0)
    config = NetworkConfig(variant="dagan", motion_width=4, motion_max=8, motion_blocks=2)
    estimator = MotionEstimator(config).eval()
    logits = {}
    for name in ("mask", "occlusion"):
        module = getattr(estimator, name)
        module.weight.data *= 20  # so that the softmax is not all but even
        module.register_forward_hook(lambda module, inputs, output, name=name: logits.update({name: output}))
    points = face(2, 15, 16, 20)[2:]
    with torch.no_grad():
        motion = estimator(torch.rand(2, 3, 16, 20), KeyPoints(*points[:2]), KeyPoints(*points[2:]))
    assert motion.mask.max() > 0.5
    memory_format = torch.contiguous_format if layout == "nchw" else torch.channels_last
    given = [logits[name].to(device).contiguous(memory_format=memory_format) for name in ("mask", "occlusion")]
    flow, visible = dense_flow(*given, *[it.to(device) for it in points])
    torch.testing.assert_close(flow.cpu(), motion.flow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(visible.cpu(), motion.occlusion, rtol=1e-5, atol=1e-6)


def test_any_strides_are_read(device: str) -> None:
    inputs = face(2, 9, 6, 11, device=device)
    flow, visible = dense_flow(*inputs)
    turned = [it.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for it in inputs[:2]]
    larger = torch.full((2, 14, 9, 13), math.nan, device=device)
    crops = [larger[:, 2:12, 1:7, 1:12], larger[:, 12:13, 1:7, 1:12]]
    for crop, logits in zip(crops, inputs, strict=False):
        crop.copy_(logits)
    for given in (turned, crops):
        again = dense_flow(*given, *inputs[2:])
        assert torch.equal(again[0], flow) and torch.equal(again[1], visible)


def test_out_is_written(device: str) -> None:
    inputs = face(2, 9, 6, 11, device=device)
    expected = dense_flow(*inputs)
    out = tuple(torch.full_like(it, math.nan) for it in expected)
    written = dense_flow(*inputs, out=out)
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(written, out, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(device: str, dtype: Any, layout: str) -> None:
    """One motion takes all, however far the logits are apart and from zero."""
    inputs = face(1, 15, 8, 8, device=device, dtype=dtype, layout=layout)
    inputs[0].mul_(4000)
    inputs[1].mul_(4000)
    check(dense_flow(*inputs), inputs)
    inputs[0].sub_(30000)
    check(dense_flow(*inputs), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinite_logits(device: str, layout: str) -> None:
    inputs = face(1, 9, 6, 8, device=device, layout=layout)
    mask, occlusion = inputs[:2]
    mask[0, :, 0, 0] = -math.inf  # nothing is left
    mask[0, 4:, 0, 1] = -math.inf  # some threads' motions have no weight
    mask[0, [0, 1, 8, 9], 0, 2] = -math.inf  # all motions of two threads
    mask[0, 3, 0, 3] = math.inf
    mask[0, 5, 0, 4] = math.nan
    occlusion[0, 0, 1, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    flow, visible = dense_flow(*inputs)
    expected = dense_flow(*inputs, reference=True)
    assert flow[0, 0, [0, 3, 4]].isnan().all() and flow.isnan().sum() == 6
    torch.testing.assert_close(flow, expected[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(visible, expected[1], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert visible[0, 0, 1, 0] == 1 and visible[0, 0, 1, 1] == 0 and visible.isnan().sum() == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_singular_jacobians_are_not_finite(device: str, layout: str) -> None:
    inputs = face(2, 4, 6, 8, device=device, layout=layout)
    clean, _ = dense_flow(*inputs)
    inputs[5][1, 2] = torch.tensor([[0.1, 0.2], [0.7, 1.4]])  # neither product is exact, both round to the same float
    assert inputs[5][1, 2, 0, 0] * inputs[5][1, 2, 1, 1] == inputs[5][1, 2, 0, 1] * inputs[5][1, 2, 1, 0]
    flow, _ = dense_flow(*inputs)
    assert not flow[1].isfinite().any() and torch.equal(flow[0], clean[0])
    assert torch.equal(flow.isfinite(), dense_flow(*inputs, reference=True)[0].isfinite())


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1)], ids=str)
def test_a_side_of_one_pixel_has_no_coordinates(device: str, size: Any) -> None:
    inputs = face(2, 3, *size, device=device)
    flow, visible = dense_flow(*inputs)
    expected = dense_flow(*inputs, reference=True)
    assert flow.isnan().all() and expected[0].isnan().all()
    torch.testing.assert_close(visible, expected[1])


@pytest.mark.parametrize("sanitize", ["address", "thread"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sanitizers_find_nothing(sanitize: str, layout: str) -> None:
    from emulated import EmulatedDevice, emulation

    with emulation(EmulatedDevice(sanitize=sanitize, seed=5)):
        for shape, dtype in (((2, 5, 5, 9), torch.float32), ((1, 63, 3, 4), torch.float16)):
            inputs = face(*shape, dtype=dtype, layout=layout)
            check(dense_flow(*inputs), inputs)


def test_what_cannot_be_used_is_named(emulated: Any) -> None:
    inputs = face(2, 4, 6, 8)

    def replaced(place: int, other: Any) -> list[Any]:
        return [*inputs[:place], other, *inputs[place + 1 :]]

    for message, arguments in {
        r"mask must be \[B, K\+1, h, w\] = \(\*, \*, \*, \*\), got \(2, 5, 48\)": replaced(0, inputs[0].flatten(2)),
        "mask must have K \\+ 1 = 5 channels, the background first, got 4": replaced(0, inputs[0][:, 1:]),
        r"occlusion must be \[B, 1, h, w\] = \(2, 1, 6, 8\), got \(2, 2, 6, 8\)": replaced(1, inputs[0][:, :2]),
        "occlusion must be float32, got float16": replaced(1, inputs[1].half()),
        "source_value must have the batch of mask, 2, got 1: nothing is broadcast": replaced(2, inputs[2][:1]),
        r"driving_jacobian must be \[B, K, 2, 2\] = \(2, 4, 2, 2\), got \(2, 3, 2, 2\)": replaced(5, inputs[5][:, :3]),
        "driving_value must be contiguous, got the strides": replaced(4, inputs[4].flip(2).mT.contiguous().mT),
        "source_value must hold at most 63 key points, got 64": face(2, 64, 3, 3),
        "mask requires a gradient": replaced(0, inputs[0].clone().requires_grad_()),
    }.items():
        with pytest.raises(InputError, match=message):
            dense_flow(*arguments)
    flow, visible = dense_flow(*inputs)
    for message, out in {
        r"out\[0\] must be \[B, h, w, 2\] = \(2, 6, 8, 2\), got \(2, 2, 6, 8\)": (flow.permute(0, 3, 1, 2), visible),
        r"out\[1\] must be float32, got float16": (flow, visible.half()),
        "out must be two contiguous arrays": (flow.transpose(1, 2).contiguous().transpose(1, 2), visible),
    }.items():
        with pytest.raises(InputError, match=message):
            dense_flow(*inputs, out=out)
