"""The flow-field warp against NumPy in float64, and its gradients against PyTorch's in float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from emulated import EmulatedDevice, emulation

from dagan_rt.errors import InputError
from dagan_rt.kernels.flow_warp import flow_warp
from dagan_rt.networks.generator import warp

module = importlib.import_module("dagan_rt.kernels.flow_warp")

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
# Shape of the feature, of the flow, layout, and the kernel's version that an emulated GPU of one multiprocessor gets
# with 16-bit and with 32-bit features.
CASES = [
    ((1, 1, 1, 1), (1, 1), "nchw", "nchw", "nchw"),
    ((3, 5, 5, 7), (5, 7), "nchw", "nchw", "nchw"),
    ((2, 3, 3, 5), (3, 9), "nchw", "nchw", "nchw"),
    ((1, 3, 6, 5), (6, 5), "nchw", "nchw_pairs", "planes_4"),
    ((1, 37, 14, 20), (7, 5), "nchw", "nchw_pairs", "planes_4"),
    ((2, 6, 4, 5), (3, 4), "nchw", "planes_4", "planes_4"),
    ((1, 40, 6, 12), (6, 12), "nchw", "planes_16", "planes_16"),
    ((3, 16, 5, 4), (9, 2), "nchw", "planes_16", "planes_16"),
    ((1, 3, 5, 7), (5, 7), "nhwc", "nhwc", "nhwc"),
    ((3, 1030, 2, 3), (2, 3), "nhwc", "nhwc", "nhwc"),
    ((2, 8, 17, 9), (4, 9), "nhwc", "nhwc_vector", "nhwc_vector"),
    ((1, 24, 7, 5), (7, 5), "nhwc", "nhwc_vector", "nhwc_vector"),
    ((2, 264, 3, 3), (3, 3), "nhwc", "nhwc_vector", "nhwc_vector"),
    ((1, 2, 113, 203), (113, 203), "nchw", "nchw", "nchw"),
    ((1, 2, 113, 203), (29, 51), "nhwc", "nhwc", "nhwc"),
]


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A function that puts tensors on the device, in this layout; its `version` is the last kernel's, if known."""
    if request.param == "cuda":
        yield Placed("cuda")
    else:
        with emulation(EmulatedDevice(multiprocessors=1)) as gpu:
            yield Placed("cpu", gpu)


class Placed:
    def __init__(self, where: str, gpu: EmulatedDevice | None = None) -> None:
        self.where, self.gpu = where, gpu

    def __call__(self, tensor: torch.Tensor, layout: str = "nchw") -> torch.Tensor:
        order = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        return tensor.to(self.where).contiguous(memory_format=order)

    @property
    def version(self) -> str | None:
        return self.gpu and self.gpu.launches[-1].split("_", 4)[4]


def inputs(
    shape: tuple[int, int, int, int], size: tuple[int, int], seed: int = 0, *, reach: float = 1.4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A feature, a flow over and beyond it, and an occlusion map."""
    random = torch.Generator().manual_seed(seed)
    feature = torch.randn(shape, generator=random)
    flow = (torch.rand(shape[0], *size, 2, generator=random) * 2 - 1) * reach
    return feature, flow, torch.rand(shape[0], 1, *size, generator=random)


def resized(field: np.ndarray, H: int, W: int) -> np.ndarray:
    """`field` [B, h, w, n] to [B, H, W, n], bilinear, half-pixel centres, the border repeated."""
    for axis, size in ((1, H), (2, W)):
        length = field.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, None)
        low = place.astype(int)
        share = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])
        high = np.minimum(low + 1, length - 1)
        field = np.take(field, low, axis) * (1 - share) + np.take(field, high, axis) * share
    return field


def truth(feature: torch.Tensor, flow: torch.Tensor, occlusion: torch.Tensor | None, align_corners: bool) -> np.ndarray:
    """The warp in float64, corner by corner."""
    image, places = (tensor.double().cpu().numpy() for tensor in (feature, flow))
    B, _, H, W = image.shape
    extent = np.array([W - 1, H - 1]) if align_corners else np.array([W, H])
    with np.errstate(all="ignore"):
        if places.shape[1:3] != (H, W):
            places = resized(places, H, W)
        x, y = np.moveaxis(places * extent / 2 + (np.array([W, H]) - 1) / 2, -1, 0)
        result = np.zeros(image.shape)
        for b, i, j in np.ndindex(B, H, W):
            u, v = x[b, i, j], y[b, i, j]
            if not (-1 <= u < W and -1 <= v < H):  # nor NaN
                continue
            left, top = int(np.floor(u)), int(np.floor(v))
            for row in (top, top + 1):
                for column in (left, left + 1):
                    if 0 <= row < H and 0 <= column < W:
                        weight = (1 - abs(u - column)) * (1 - abs(v - row))
                        result[b, :, i, j] += weight * image[b, :, row, column]
    if occlusion is not None:
        mask = occlusion.double().cpu().numpy().transpose(0, 2, 3, 1)
        mask = mask if mask.shape[1:3] == (H, W) else resized(mask, H, W)
        result *= mask.transpose(0, 3, 1, 2)
    return result


def error(result: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(result.detach().double().cpu().numpy() - expected).max())


def check(result: torch.Tensor, arrays: Any, align_corners: bool = False) -> None:
    """At most twice the error of PyTorch's operators in this dtype, and one rounding of the result and of the places.

    Few pixels may all happen to suit PyTorch, so that its error alone would be no budget.
    """
    expected = truth(*arrays, align_corners)
    budget = error(flow_warp(*arrays, align_corners=align_corners, reference=True), expected)
    rounding = torch.finfo(result.dtype).eps * max(1, np.abs(expected).max())
    places = torch.finfo(torch.float32).eps * max(expected.shape[2:])
    assert error(result, expected) <= 2 * budget + rounding + places


@pytest.mark.parametrize(("dtype", "flow_dtype"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "size", "layout", "version_16", "version_32"), CASES)
def test_equals_float64(
    device: Any, shape: Any, size: Any, layout: str, version_16: str, version_32: str, dtype: Any, flow_dtype: Any
) -> None:
    feature, flow, occlusion = inputs(shape, size)
    arrays = device(feature.to(dtype), layout), device(flow.to(flow_dtype)), device(occlusion.to(flow_dtype))
    result = flow_warp(*arrays)
    assert device.version in (None, version_32 if dtype == torch.float32 else version_16)
    assert (result.shape, result.dtype, result.device) == (arrays[0].shape, dtype, arrays[0].device)
    assert result.is_contiguous(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)
    check(result, arrays)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(6, 8), (3, 5)])
@pytest.mark.parametrize("planes", [True, False])
def test_align_corners_and_no_occlusion(
    device: Any, layout: str, size: Any, planes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not planes:
        monkeypatch.setattr(module, "PLANE_BYTES", 0)
    feature, flow, _ = inputs((2, 4, 6, 8), size)
    arrays = device(feature, layout), device(flow), None
    for align_corners in (False, True):
        check(flow_warp(*arrays, align_corners=align_corners), arrays, align_corners)
    one = device(torch.ones(1, 4, 1, 1), layout), device(torch.full((1, 1, 1, 2), 7.0)), None
    assert (flow_warp(*one) == 0).all() and (flow_warp(*one, align_corners=True) == 1).all()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_places_on_the_border(
    device: Any, layout: str, planes: bool, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On, beside and far beyond the border, exactly; nothing outside is multiplied, whatever the feature holds."""
    if not planes:
        monkeypatch.setattr(module, "PLANE_BYTES", 0)
    H, W = 4, 8
    feature = torch.arange(8 * H * W).reshape(1, 8, H, W).to(dtype)
    at = torch.tensor([-1e30, -2.0, -1.25, -1.0, -0.5, 0.0, 0.5, 1.0, 2.5, 3.0, 6.75, 7.0, 7.5, 8.0, 9.0, 3e38])
    x = torch.cat([at, torch.full((16,), 2.25)]).reshape(1, H, W)
    y = torch.cat([torch.full((16,), 1.5), at / 2]).reshape(1, H, W)
    flow = torch.stack([(2 * x + 1) / W - 1, (2 * y + 1) / H - 1], -1)
    arrays = device(feature, layout), device(flow), None
    result = flow_warp(*arrays)
    expected = truth(*arrays, False)
    assert error(result, expected) <= (1e-4 if dtype == torch.float32 else 0.0625)

    outside = flow_warp(device(torch.full_like(feature, torch.inf), layout), arrays[1])
    apart = (x < -1) | (x >= W) | (y < -1) | (y >= H)
    assert torch.equal(outside.isfinite().cpu(), apart[:, None].expand_as(outside))
    assert (outside.cpu()[outside.isfinite().cpu()] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(4, 6), (2, 3)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_places_that_are_not_finite_give_zeros(
    device: Any, value: float, layout: str, size: Any, align_corners: bool
) -> None:
    feature, flow, occlusion = inputs((1, 8, 4, 6), size, reach=0.9)
    flow[0, 0, 0, 0] = flow[0, 1, 2, 1] = value
    arrays = device(feature, layout), device(flow), device(occlusion)
    result = flow_warp(*arrays, align_corners=align_corners)
    assert (result[:, :, 0, 0] == 0).all() and (result != 0).any()
    check(result, arrays, align_corners)


def test_flow_and_occlusion_of_any_strides(device: Any) -> None:
    """As convolutions leave them: channels first, a slice of channels, one for all images."""
    feature, flow, occlusion = inputs((3, 4, 5, 6), (5, 6))
    expected = flow_warp(device(feature), device(flow), device(occlusion))
    planar = device(flow.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    channel = device(torch.cat([torch.rand(3, 2, 5, 6), occlusion], 1))[:, 2:]
    last = device(torch.cat([torch.rand(3, 2, 5, 6), occlusion], 1), "nhwc")[:, 2:]
    assert torch.equal(flow_warp(device(feature), planar, channel), expected)
    assert torch.equal(flow_warp(device(feature), planar, last), expected)
    shared = device(flow[:1]).expand(3, 5, 6, 2)
    assert torch.equal(flow_warp(device(feature), shared), flow_warp(device(feature), shared.contiguous()))


@pytest.mark.parametrize(
    ("layout", "dtype", "version"),
    [
        ("nchw", torch.float16, "nchw"),
        ("nchw", torch.float32, "nchw"),
        ("nhwc", torch.float16, "nhwc"),
        ("nhwc", torch.float32, "nhwc"),
    ],
)
def test_addresses_that_are_not_aligned(device: Any, layout: str, dtype: Any, version: str) -> None:
    feature, flow, _ = inputs((1, 8, 4, 6), (4, 6))
    shape = (1, 8, 4, 6) if layout == "nchw" else (1, 4, 6, 8)
    places = [torch.empty(8 * 4 * 6 + 1, dtype=dtype, device=device.where)[1:].reshape(shape) for _ in range(2)]
    source, out = places if layout == "nchw" else [place.permute(0, 3, 1, 2) for place in places]
    source.copy_(feature)
    expected = flow_warp(device(feature.to(dtype), layout), device(flow))
    assert flow_warp(source, device(flow), out=out) is out
    assert device.version in (None, version)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("size", [(6, 4), (3, 5)])
def test_is_the_generators_warp(device: Any, size: Any) -> None:
    arrays = tuple(map(device, inputs((2, 8, 6, 4), size)))
    expected = warp(*arrays)
    assert torch.equal(flow_warp(*arrays, reference=True), expected)
    assert error(flow_warp(*arrays), expected.double().cpu().numpy()) < 2e-6


def test_reference_is_the_warp_in_float64() -> None:
    feature, flow, occlusion = (array.double() for array in inputs((2, 3, 5, 7), (3, 4)))
    flow[0, 0, 0, 0], flow[1, 2, 1, 1] = torch.nan, torch.inf
    for align_corners in (False, True):
        result = flow_warp(feature, flow, occlusion, align_corners=align_corners, reference=True)
        assert error(result, truth(feature, flow, occlusion, align_corners)) < 1e-13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature": torch.rand(8, 4, 6)}, r"feature must be \[B, C, H, W\]"),
        ({"feature": torch.rand(1, 8, 4, 6, dtype=torch.float64)}, "feature"),
        ({"feature": torch.rand(1, 8, 6, 4).mT}, "feature must be contiguous or channels-last"),
        ({"flow": torch.rand(1, 2, 4, 6)}, r"flow must be \[B, h, w, 2\]"),
        ({"flow": torch.rand(2, 4, 6, 2)}, r"flow must be \[B, h, w, 2\]"),
        ({"flow": torch.rand(1, 4, 6, 2).half()}, "flow must be float32, got float16"),
        ({"flow": torch.rand(1, 6, 4, 2).transpose(1, 2)}, "flow must have its rows one after the other"),
        ({"occlusion": torch.rand(1, 1, 4, 5)}, r"occlusion must be \[B, 1, h, w\]"),
        ({"occlusion": torch.rand(1, 1, 4, 6).half()}, "occlusion must be float32"),
        ({"occlusion": torch.rand(1, 1, 6, 4).mT}, "occlusion must have its rows one after the other"),
        ({"out": torch.rand(1, 8, 4, 5)}, r"out must be \[B, C, H, W\]"),
        ({"out": torch.rand(1, 8, 4, 6).half()}, "out must be float32"),
        ({"out": torch.rand(1, 4, 6, 8).permute(0, 3, 1, 2)}, "out must be laid out as feature"),
        ({"out": torch.rand(1, 8, 4, 6), "feature": torch.rand(1, 8, 4, 6).requires_grad_()}, "out cannot be given"),
    ],
)
def test_refuses_what_it_cannot_use(emulated: Any, change: dict[str, Any], message: str) -> None:
    feature, flow, occlusion = inputs((1, 8, 4, 6), (4, 6))
    with pytest.raises(InputError, match=message):
        flow_warp(**{"feature": feature, "flow": flow, "occlusion": occlusion, **change})


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def gradients(function: Any, arrays: Any, weights: torch.Tensor, wanted: Any = (True, True, True)) -> list[Any]:
    leaves = [array.detach().clone().requires_grad_(want) for array, want in zip(arrays, wanted, strict=True)]
    (function(*leaves) * weights.to(leaves[0].dtype)).sum().backward()
    return [leaf.grad for leaf in leaves]


GRADIENT_CASES = [
    ((1, 1, 1, 1), (1, 1), "nchw"),
    ((2, 5, 5, 7), (5, 7), "nchw"),
    ((1, 37, 6, 5), (3, 5), "nchw"),
    ((2, 3, 5, 4), (3, 9), "nchw"),
    ((2, 3, 5, 7), (2, 3), "nhwc"),
    ((1, 70, 3, 5), (3, 5), "nhwc"),
    ((2, 8, 6, 5), (6, 5), "nhwc"),
    ((1, 40, 9, 5), (9, 3), "nhwc"),
    ((1, 512, 2, 3), (2, 3), "nhwc"),
]


@pytest.mark.parametrize(("dtype", "flow_dtype"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "size", "layout"), GRADIENT_CASES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_gradients_equal_float64(
    device: Any, shape: Any, size: Any, layout: str, align_corners: bool, dtype: Any, flow_dtype: Any
) -> None:
    feature, flow, occlusion = inputs(shape, size)
    arrays = device(feature.to(dtype), layout), device(flow.to(flow_dtype)), device(occlusion.to(flow_dtype))
    weights = device(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))

    mine = gradients(lambda *leaves: flow_warp(*leaves, align_corners=align_corners), arrays, weights)
    wide = tuple(array.double() for array in arrays)
    expected = gradients(lambda *leaves: flow_warp(*leaves, align_corners=align_corners, reference=True), wide, weights)
    for name, got, true, array in zip(("feature", "flow", "occlusion"), mine, expected, arrays, strict=True):
        assert (got.shape, got.dtype) == (array.shape, array.dtype)
        # Summed in float32 and rounded once to the dtype; some of the sums cancel.
        tolerance = (1e-5 + torch.finfo(got.dtype).eps) * max(1, float(true.abs().max()))
        assert error(got, true.cpu().numpy()) <= tolerance, name


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(3, 4), (2, 3)])
def test_gradcheck(device: Any, layout: str, size: Any) -> None:
    """Central differences, exact but for rounding: the output is bilinear while no place crosses a pixel's centre."""
    shape = (1, 4, 3, 4)
    feature, _, occlusion = inputs(shape, size)
    places = [[(2 * i + 1 + 0.45) / length - 1 for i in range(length)] for length in size]
    y, x = torch.meshgrid(*map(torch.tensor, places), indexing="ij")
    flow = torch.stack([x, y], -1)[None] * (1 if size == (3, 4) else 0.9)
    arrays = [device(array.double()).requires_grad_() for array in (feature, flow, occlusion)]

    def warp(feature: torch.Tensor, flow: torch.Tensor, occlusion: torch.Tensor) -> torch.Tensor:
        return flow_warp(device(feature.float(), layout), flow.float(), occlusion.float()).double()

    assert torch.autograd.gradcheck(warp, arrays, eps=1e-2, atol=1e-3, rtol=1e-3, nondet_tol=1e-5)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_only_gradients_asked_for(device: Any, layout: str, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    feature, flow, occlusion = inputs((2, 8, 3, 4), (3, 4))
    arrays = device(feature, layout), device(flow), device(occlusion)
    weights, wanted = device(torch.ones(2, 8, 3, 4)), tuple(map(bool, wanted))
    every = gradients(flow_warp, arrays, weights)
    asked: list[tuple[bool, ...]] = []
    backward = module._backward
    monkeypatch.setattr(module, "_backward", lambda *args: asked.append(tuple(args[-1])) or backward(*args))
    some = gradients(flow_warp, arrays, weights, wanted)
    assert asked == [wanted]
    for want, one, other in zip(wanted, some, every, strict=True):
        assert (one is not None) == want
        if want:
            assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_gradients_without_an_occlusion_and_of_a_sum(device: Any, layout: str) -> None:
    feature, flow, _ = inputs((1, 8, 3, 4), (3, 4))
    leaves = [device(feature, layout).requires_grad_(), device(flow).requires_grad_()]
    flow_warp(*leaves).sum().backward()  # its gradient is one number, expanded
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    flow_warp(*wide, reference=True).sum().backward()
    for mine, true in zip(leaves, wide, strict=True):
        assert error(mine.grad, true.grad.cpu().numpy()) < 1e-5
    with torch.no_grad():
        assert not flow_warp(*leaves).requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("kernel", [True, False])
def test_places_that_are_not_finite_give_no_gradient(device: Any, value: float, layout: str, kernel: bool) -> None:
    feature, flow, occlusion = inputs((1, 8, 3, 4), (3, 4), reach=0.7)
    flow[0, 1, 2, 0] = value
    arrays = device(feature, layout), device(flow), device(occlusion)
    weights = device(torch.ones(1, 8, 3, 4))
    mine = gradients(lambda *leaves: flow_warp(*leaves, reference=not kernel), arrays, weights)
    assert (mine[1][0, 1, 2] == 0).all() and (mine[2][0, 0, 1, 2] == 0).all()
    assert all(gradient.isfinite().all() for gradient in mine)
    weights[:, :, 1, 2] = 0  # as if that pixel were not there
    without = gradients(lambda *leaves: flow_warp(*leaves, reference=not kernel), arrays, weights)
    assert torch.allclose(mine[0], without[0], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What a GPU would let pass


@pytest.mark.parametrize("sanitize", ["address", "thread"])
@pytest.mark.parametrize(("shape", "size", "layout", "version_16", "version_32"), CASES[1:-2])
def test_touches_only_its_own(
    sanitize: Any, shape: Any, size: Any, layout: str, version_16: str, version_32: str
) -> None:
    feature, flow, occlusion = inputs(shape, size)
    gpu = EmulatedDevice(sanitize=sanitize, multiprocessors=1)
    place = Placed("cpu", gpu)
    with emulation(gpu):
        for dtype, version in ((torch.float32, version_32), (torch.float16, version_16)):
            arrays = place(feature.to(dtype), layout), flow, occlusion
            check(flow_warp(*arrays), arrays)
            assert place.version == version
            gradients(flow_warp, arrays, torch.ones(shape))


@pytest.mark.parametrize(("shape", "size", "layout", "version_16", "version_32"), CASES[:-2:3])
def test_order_of_threads_does_not_matter(shape: Any, size: Any, layout: str, version_16: str, version_32: str) -> None:
    feature, flow, occlusion = inputs(shape, size)
    results = []
    for seed in (0, 1, 2):
        gpu = EmulatedDevice(seed=seed, multiprocessors=1)
        with emulation(gpu):
            results.append(flow_warp(Placed("cpu", gpu)(feature, layout), flow, occlusion))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
