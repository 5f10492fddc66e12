"""The motion estimator's input in one launch, against float64, the networks, and loops over pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.kernels.sparse_motion import sparse_motion

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["nchw", "nhwc"]
# (B, K, h, w): the published networks' own; others; sides that tiles do not divide; the fewest and the most points.
SHAPES = [(1, 15, 16, 16), (3, 10, 7, 19), (1, 1, 2, 2), (2, 63, 5, 9), (1, 17, 13, 8), (2, 3, 33, 31)]


def face(B: int, K: int, h: int, w: int, device: str = "cpu", dtype: Any = torch.float32) -> list[torch.Tensor]:
    """A thumbnail and key points that move about, some of them off the thumbnail."""
    random = torch.Generator().manual_seed(B + 10 * K + 100 * h + 1000 * w)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    thumbnail = torch.rand(B, 3, h, w, generator=random).to(dtype)
    source, driving = 0.5 * normal(B, K, 2), 0.5 * normal(B, K, 2)
    frames = [torch.eye(2) + 0.3 * normal(B, K, 2, 2) for _ in range(2)]
    return [it.to(device) for it in (thumbnail, source, frames[0], driving, frames[1])]


def exact(inputs: list[torch.Tensor]) -> torch.Tensor:
    return sparse_motion(*[it.cpu().double() for it in inputs], reference=True)


def check(result: torch.Tensor, inputs: list[torch.Tensor], **options: Any) -> None:
    """At most twice the error of PyTorch in the same dtype; and, as the geometry is float32, one rounding to it."""
    expected, found = exact(inputs), result.cpu().double()
    theirs = sparse_motion(*inputs, reference=True, **options).cpu().double()
    wrong, allowed = (found - expected).abs(), 2 * (theirs - expected).abs().max()
    assert wrong.max() <= allowed + 1e-6  # the floor: where PyTorch happens to err by nothing
    rounding = torch.finfo(result.dtype).eps / 2 if result.dtype != torch.float32 else 0.0
    # Some ulps of a coordinate times the slope between neighbouring pixels, which is at most 1.
    assert (wrong <= rounding * expected.abs() + 2e-6 * max(result.shape[2:]) + 1e-7).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errs_at_most_twice_as_much_as_pytorch(device: str, shape: Any, dtype: Any, layout: str) -> None:
    inputs = face(*shape, device=device, dtype=dtype)
    stacked = sparse_motion(*inputs, layout=layout)
    B, K, h, w = shape
    assert stacked.shape == (B, 4 * (K + 1), h, w) and stacked.dtype == dtype
    memory_format = torch.contiguous_format if layout == "nchw" else torch.channels_last
    assert stacked.is_contiguous(memory_format=memory_format)
    check(stacked, inputs)


@pytest.mark.parametrize("shape", [(1, 15, 64, 64), (1, 2, 113, 203)], ids=str)
def test_a_whole_face(device: str, shape: Any) -> None:
    inputs = face(*shape, device=device)
    for layout in LAYOUTS:
        check(sparse_motion(*inputs, layout=layout), inputs)


def test_pixel_by_pixel(device: str) -> None:
    """Against the formulas, written out for one pixel in Python's floats."""
    B, K, h, w = 2, 3, 5, 7
    inputs = face(B, K, h, w, device=device)
    stacked = sparse_motion(*inputs).cpu().numpy()
    thumbnail, s, js, d, jd = [it.cpu().numpy().astype(np.float64) for it in inputs]

    def pixel(b: int, row: int, column: int) -> np.ndarray:
        inside = 0 <= row < h and 0 <= column < w
        return thumbnail[b, :, row, column] if inside else np.zeros(3)

    for b, k, row, column in np.ndindex(B, K + 1, h, w):
        z = np.array([2 * column / (w - 1) - 1, 2 * row / (h - 1) - 1])
        heat, to = 0.0, z
        if k:
            heat = math.exp(-((z - d[b, k - 1]) ** 2).sum() / 0.02) - math.exp(-((z - s[b, k - 1]) ** 2).sum() / 0.02)
            to = js[b, k - 1] @ np.linalg.inv(jd[b, k - 1]) @ (z - d[b, k - 1]) + s[b, k - 1]
        x, y = ((to[0] + 1) * w - 1) / 2, ((to[1] + 1) * h - 1) / 2
        left, top = math.floor(x), math.floor(y)
        across, down = x - left, y - top
        colour = (1 - down) * ((1 - across) * pixel(b, top, left) + across * pixel(b, top, left + 1)) + down * (
            (1 - across) * pixel(b, top + 1, left) + across * pixel(b, top + 1, left + 1)
        )
        np.testing.assert_allclose(stacked[b, 4 * k : 4 * k + 4, row, column], [heat, *colour], atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_what_the_networks_hourglass_takes(device: str, layout: str) -> None:
    from dagan_rt.keypoints import KeyPoints
    from dagan_rt.networks.config import NetworkConfig
    from dagan_rt.networks.motion import MotionEstimator

    class Taken(Exception):
        pass

    class Recorder(torch.nn.Module):
        def forward(self, stacked: torch.Tensor) -> torch.Tensor:
            raise Taken(stacked)

    inputs = face(2, 15, 12, 10)
    estimator = MotionEstimator(NetworkConfig(variant="dagan"))
    estimator.hourglass = Recorder()
    with pytest.raises(Taken) as taken:
        estimator(inputs[0], KeyPoints(*inputs[1:3]), KeyPoints(*inputs[3:]))
    stacked = sparse_motion(*[it.to(device) for it in inputs], layout=layout).cpu()
    assert (stacked - taken.value.args[0]).abs().max() < 2e-5


def test_layout_follows_the_thumbnail_and_any_strides_are_read(device: str) -> None:
    inputs = face(2, 4, 6, 9, device=device)
    plain = sparse_motion(*inputs)
    assert plain.is_contiguous()
    last = inputs[0].contiguous(memory_format=torch.channels_last)
    stacked = sparse_motion(last, *inputs[1:])
    assert stacked.is_contiguous(memory_format=torch.channels_last) and torch.equal(stacked, plain)
    larger = torch.full((2, 5, 8, 12), 9.0, device=device)
    crop = larger[:, 1:4, 1:7, 2:11]
    crop.copy_(inputs[0])
    assert torch.equal(sparse_motion(crop, *inputs[1:]), plain)
    out = torch.empty_like(stacked)
    assert sparse_motion(*inputs, out=out) is out and torch.equal(out, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_point_that_stays_has_no_heat(device: str, layout: str) -> None:
    thumbnail, value, jacobian, _, _ = face(1, 15, 16, 16, device=device)
    stacked = sparse_motion(thumbnail, value, jacobian, value, jacobian, layout=layout)
    assert stacked[:, ::4].eq(0).all()
    # Up to rounding every motion is the identity, the background's exactly.
    copies = stacked.unflatten(1, (16, 4))[:, :, 1:]
    assert (copies - copies[:, :1]).abs().max() < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_samples_zero(device: str, dtype: Any, layout: str) -> None:
    inputs = face(1, 6, 8, 16, device=device, dtype=dtype)
    clean = sparse_motion(*inputs, layout=layout)
    _, s, js, d, jd = inputs
    jd[0, 0] = torch.tensor([[0.1, 0.2], [0.7, 1.4]])  # neither product is exact, both round to the same float
    s[0, 1, 0] = math.nan
    js[0, 2, 1, 0] = math.inf
    d[0, 3] = 1e30
    js[0, 4], jd[0, 4] = 1e20 * torch.eye(2), 1e-18 * torch.eye(2)
    assert jd[0, 0, 0, 0] * jd[0, 0, 1, 1] == jd[0, 0, 0, 1] * jd[0, 0, 1, 0]
    stacked = sparse_motion(*inputs, layout=layout)
    motions = stacked.unflatten(1, (7, 4))
    assert motions[:, 1:6, 1:].eq(0).all()
    # A NaN is the heat map's too; infinitely far away there is no heat; the others are as they were.
    assert motions[:, 2, 0].isnan().all()
    rest = motions.clone()
    rest[:, 2, 0] = 0
    assert rest.isfinite().all()
    assert torch.equal(motions[:, [0, 6]], clean.unflatten(1, (7, 4))[:, [0, 6]])
    expected = sparse_motion(*inputs, layout=layout, reference=True)
    torch.testing.assert_close(stacked.float(), expected.float(), atol=0.3, rtol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1)], ids=str)
def test_a_side_of_one_pixel_has_no_coordinates(device: str, size: Any, layout: str) -> None:
    inputs = face(2, 3, *size, device=device)
    stacked = sparse_motion(*inputs, layout=layout)
    expected = sparse_motion(*inputs, layout=layout, reference=True)
    torch.testing.assert_close(stacked, expected, atol=0, rtol=0, equal_nan=True)
    motions = stacked.unflatten(1, (4, 4))
    assert motions[:, :, 1:].eq(0).all() and motions[:, 0, 0].eq(0).all() and motions[:, 1:, 0].isnan().all()


def test_an_infinite_pixel_stays_with_its_neighbours(device: str) -> None:
    """Samples beside the edge must not take 0 · infinity from it."""
    inputs = face(1, 8, 12, 12, device=device)
    expected = sparse_motion(*inputs)
    inputs[0][0, :, 0, 0] = math.inf
    inputs[0][0, :, 7, 11] = math.nan
    stacked = sparse_motion(*inputs)
    theirs = sparse_motion(*inputs, reference=True)
    assert torch.equal(stacked.isfinite(), theirs.isfinite()) and not stacked.isfinite().all()
    assert torch.equal(stacked[stacked.isfinite()], expected[stacked.isfinite()])


@pytest.mark.parametrize("sanitize", ["address", "thread"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sanitizers_find_nothing(sanitize: str, layout: str) -> None:
    from emulated import EmulatedDevice, emulation

    with emulation(EmulatedDevice(sanitize=sanitize, seed=5)):
        for shape, dtype in (((2, 5, 5, 9), torch.float32), ((1, 63, 3, 4), torch.float16)):
            inputs = face(*shape, dtype=dtype)
            check(sparse_motion(*inputs, layout=layout), inputs)


def test_what_cannot_be_used_is_named(emulated: Any) -> None:
    inputs = face(2, 4, 6, 8)
    many = face(2, 64, 6, 8)

    def replaced(place: int, other: Any) -> list[Any]:
        return [*inputs[:place], other, *inputs[place + 1 :]]

    for message, arguments in {
        r"thumbnail must be \[B, 3, h, w\] = \(\*, 3, \*, \*\), got \(2, 4, 6, 8\)":
            replaced(0, torch.zeros(2, 4, 6, 8)),
        "thumbnail must be float32 or float16 or bfloat16, got uint8":
            replaced(0, torch.zeros(2, 3, 6, 8, dtype=torch.uint8)),
        "source_value must have the batch of thumbnail, 2, got 1: nothing is broadcast": replaced(1, inputs[1][:1]),
        "driving_jacobian must have the batch of thumbnail, 2, got 1: nothing is broadcast": replaced(4, inputs[4][:1]),
        r"driving_value must be \[B, K, 2\] = \(2, 4, 2\), got \(2, 3, 2\)": replaced(3, inputs[3][:, :3]),
        r"source_jacobian must be \[B, K, 2, 2\] = \(2, 4, 2, 2\), got \(2, 4, 4\)": replaced(2, inputs[2].flatten(2)),
        "driving_value must be float32, got float16": replaced(3, inputs[3].half()),
        "source_jacobian must be contiguous, got the strides": replaced(2, inputs[2].transpose(2, 3)),
        "source_value must hold at most 63 key points, got 64": [inputs[0], *many[1:]],
        "thumbnail requires a gradient": replaced(0, inputs[0].clone().requires_grad_()),
        "driving_jacobian requires a gradient": replaced(4, inputs[4].clone().requires_grad_()),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            sparse_motion(*arguments)
    for message, options in {
        "layout must be nchw, nhwc or None, got 'chwn'": {"layout": "chwn"},
        r"out must be \[B, 4\(K\+1\), h, w\] = \(2, 20, 6, 8\), got \(2, 20, 6, 9\)": {"out": torch.zeros(2, 20, 6, 9)},
        "out must be contiguous or channels-last": {"out": torch.zeros(2, 20, 8, 6).transpose(2, 3)},
        "start at a multiple of 16 bytes":
            {"out": torch.zeros(1921)[1:].view(2, 6, 8, 20).permute(0, 3, 1, 2)},
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            sparse_motion(*inputs, **options)
