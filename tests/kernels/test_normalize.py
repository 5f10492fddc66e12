"""Frozen batch norm and ReLU, against float64 and PyTorch's own layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.kernels.normalize import normalize_relu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (B, C, H, W): pixels that blocks do not divide, one pixel, more vectors than a block has threads.
SHAPES = [(1, 256, 8, 8), (3, 8, 5, 7), (1, 40, 1, 1), (2, 24, 9, 17), (1, 2056, 2, 3), (1, 8, 1, 300)]


def values(*shape: int, dtype: Any = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """x, channels-last, scale and shift."""
    random = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=random).to(device, dtype, memory_format=torch.channels_last)
    scale, shift = (torch.randn(shape[1], generator=random).to(device) for _ in range(2))
    return x, scale, shift


def check(y: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Within half an ulp of the dtype, and float32's own rounding."""
    exact = torch.relu(x.double() * scale.double()[:, None, None] + shift.double()[:, None, None])
    largest = x.double().abs() * scale.double().abs()[:, None, None] + shift.double().abs()[:, None, None]
    error = (y.double() - exact).abs()
    assert (error <= 0.5001 * torch.finfo(y.dtype).eps * exact + 1e-7 * largest + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_within_a_rounding_of_float64(device: str, shape: Any, dtype: Any) -> None:
    inputs = values(*shape, dtype=dtype, device=device)
    y = normalize_relu(*inputs)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    check(y, *inputs)
    check(normalize_relu(*inputs, reference=True), *inputs)
    assert y.eq(0).any() and y.gt(0).any()


def test_is_pytorchs_batch_norm(device: str) -> None:
    norm = torch.nn.BatchNorm2d(16).eval()
    x, *affine = values(2, 16, 6, 5)
    norm.running_mean, norm.running_var = affine[0].clone(), affine[1].abs() + 0.1
    norm.weight.data, norm.bias.data = affine[1].clone(), affine[0] + 1
    scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias.detach() - norm.running_mean * scale
    y = normalize_relu(x.to(device), scale.to(device), shift.to(device)).cpu()
    torch.testing.assert_close(y, torch.relu(norm(x)).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_channels_and_in_place(device: str, dtype: Any) -> None:
    wide, scale, shift = values(2, 48, 6, 10, dtype=dtype, device=device)
    x, scale, shift = wide[:, 8:24], scale[8:24], shift[8:24]
    larger = torch.full((2, 40, 6, 10), -7.0, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    part, before = larger[:, 16:32], x.clone()
    assert normalize_relu(x, scale, shift, out=part) is part
    check(part, x, scale, shift)
    assert larger[:, :16].eq(-7).all() and larger[:, 32:].eq(-7).all()
    assert normalize_relu(x, scale, shift, out=x) is x
    assert torch.equal(x, part) and not torch.equal(x, before)


def test_what_is_not_finite(device: str) -> None:
    x, scale, shift = values(1, 8, 2, 4, device=device)
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 0, 2] = math.nan, math.inf, -math.inf
    y = normalize_relu(x, scale, shift)
    torch.testing.assert_close(y, normalize_relu(x, scale, shift, reference=True), equal_nan=True)
    assert y[0, :, 0, 0].isnan().all()


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_sanitizers_find_nothing(sanitize: str) -> None:
    from emulated import EmulatedDevice, emulation

    with emulation(EmulatedDevice(sanitize=sanitize, seed=3)):
        for dtype in DTYPES:
            inputs = values(2, 24, 5, 7, dtype=dtype)
            check(normalize_relu(*inputs), *inputs)


def test_what_cannot_be_used_is_named(emulated: Any) -> None:
    x, scale, shift = values(2, 16, 4, 6)
    for message, call in {
        "x must be channels-last": lambda: normalize_relu(x.contiguous(), scale, shift),
        r"scale must be \[C\] = \(16,\), got \(8,\)": lambda: normalize_relu(x, scale[:8], shift),
        "shift must be float32, got float16": lambda: normalize_relu(x, scale, shift.half()),
        "shift must be contiguous": lambda: normalize_relu(x, scale, torch.zeros(32)[::2]),
        "scale must be contiguous and start at a multiple of 16 bytes":
            lambda: normalize_relu(x, torch.zeros(17)[1:], shift),
        "out must be float32, got bfloat16": lambda: normalize_relu(x, scale, shift, out=x.bfloat16()),
        "out must be channels-last": lambda: normalize_relu(x, scale, shift, out=x.contiguous()),
        "scale requires a gradient": lambda: normalize_relu(x, scale.clone().requires_grad_(), shift),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()
