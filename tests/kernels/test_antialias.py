"""Blur and every n-th pixel of image and depth, against float64 and the networks' own block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.kernels.antialias import antialias

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (B, H, W, taps, step): the published networks' filter; sides that neither tile nor step divides; other filters, one
# wider than the image, one that is a single tap.
SHAPES = [(1, 64, 64, 13, 4), (2, 37, 50, 13, 4), (1, 1, 3, 5, 2), (3, 5, 9, 29, 8), (1, 11, 7, 1, 1), (2, 9, 30, 3, 5)]


def face(B: int, H: int, W: int, n: int, dtype: Any = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    """Features of 8 channels, a depth, and a filter that nothing separates."""
    random = torch.Generator().manual_seed(B + 10 * n + 100 * H + 1000 * W)
    image = torch.rand(B, 8, H, W, generator=random).to(device, dtype, memory_format=torch.channels_last)
    depth = torch.rand(B, 1, H, W, generator=random).to(device, dtype)
    return [image, depth, torch.rand(n, n, generator=random).to(device) / n**2]


def exact(image: torch.Tensor, depth: torch.Tensor | None, weight: torch.Tensor, step: int) -> np.ndarray:
    """By NumPy, tap by tap, in float64: [B, 8, h, w]."""
    colours, taps = image[:, :3].cpu().double().numpy(), weight.cpu().double().numpy()
    B, _, H, W = colours.shape
    channels = np.zeros((B, 8, H, W))
    channels[:, :3] = colours
    if depth is not None:
        channels[:, 3:4] = depth.cpu().double().numpy()
    n = len(taps)
    padded = np.pad(channels, ((0, 0), (0, 0), (n // 2, n // 2), (n // 2, n // 2)))
    result = sum(taps[i, j] * padded[:, :, i : i + H, j : j + W] for i in range(n) for j in range(n))
    return result[:, :, ::step, ::step]


def check(found: torch.Tensor, *inputs: Any) -> None:
    """Within half an ulp of the dtype, and float32's own rounding."""
    expected = exact(*inputs)
    error = np.abs(found.cpu().double().numpy() - expected)
    assert found.shape == expected.shape
    assert (error <= 0.5001 * torch.finfo(found.dtype).eps * np.abs(expected) + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_what_float64_gives(device: str, shape: Any, dtype: Any) -> None:
    *sizes, step = shape
    image, depth, weight = face(*sizes, dtype=dtype, device=device)
    for far in (depth, depth.float(), None):
        found = antialias(image, far, weight, step=step)
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        check(found, image, far, weight, step)
        check(antialias(image, far, weight, step=step, reference=True), image, far, weight, step)


@pytest.mark.parametrize("channels", [3, 4])
def test_is_the_networks_block(device: str, channels: int) -> None:
    from dagan_rt.networks.blocks import AntiAliasDownsample

    block = AntiAliasDownsample(channels, 0.25)
    x = face(2, 48, 40, 3)[0][:, :channels]
    weight = block.get_buffer("weight")[0, 0]
    assert weight.shape == (13, 13)
    depth = x[:, 3:].to(device) if channels == 4 else None
    found = antialias(x.to(device), depth, weight.to(device)).cpu()
    torch.testing.assert_close(found[:, :channels], block(x), atol=1e-6, rtol=1e-6)
    assert found[:, channels:].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_slices(device: str, dtype: Any) -> None:
    image, depth, weight = face(2, 21, 26, 5, dtype=dtype, device=device)
    inside = image[:, :3, 2:20, 1:25], depth[:, :, 2:20, 1:25], weight, 4
    wide = torch.full((2, 40, 5, 6), 7.0, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    part = wide[:, 32:]
    assert antialias(*inside[:3], out=part) is part
    check(part, *inside)
    assert wide[:, :32].eq(7).all()
    plain = inside[0].contiguous()  # NCHW, three channels
    assert torch.equal(antialias(plain, *inside[1:3]), part)
    assert torch.equal(antialias(plain.transpose(2, 3).contiguous().transpose(2, 3), *inside[1:3]), part)


def test_what_is_not_finite_stays_in_its_window(device: str) -> None:
    image, depth, weight = face(1, 32, 32, 5, device=device)
    clean = antialias(image, depth, weight)
    image[0, 1, 16, 16], depth[0, 0, 0, 0] = math.inf, math.nan
    found = antialias(image, depth, weight)
    assert found[0, 1, 4, 4].isinf() and found[0, 3, 0, 0].isnan()
    found[0, 1, 4, 4], found[0, 3, 0, 0] = clean[0, 1, 4, 4], clean[0, 3, 0, 0]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_sanitizers_find_nothing(sanitize: str) -> None:
    from emulated import EmulatedDevice, emulation

    with emulation(EmulatedDevice(sanitize=sanitize, seed=5)):
        for dtype in DTYPES:
            image, depth, weight = face(1, 13, 37, 5, dtype=dtype)
            check(antialias(image, depth, weight), image, depth, weight, 4)


def test_what_cannot_be_used_is_named(emulated: Any) -> None:
    image, depth, weight = face(2, 16, 24, 5)
    half = image.half()
    for message, call in {
        "image must have 3 channels or more": lambda: antialias(image[:, :2], depth, weight),
        "image must be float32 or float16 or bfloat16": lambda: antialias(image.to(torch.uint8), depth, weight),
        r"depth must be \[B, 1, H, W\] = \(2, 1, 16, 24\), got \(2, 1, 24, 24\)":
            lambda: antialias(image, torch.zeros(2, 1, 24, 24), weight),
        "depth must be float16 or float32, got bfloat16": lambda: antialias(half, depth.bfloat16(), weight),
        "weight must be float32, got float16": lambda: antialias(image, depth, weight.half()),
        r"weight must be \[n, n\], n odd, contiguous, got \(4, 4\)": lambda: antialias(image, depth, torch.ones(4, 4)),
        r"weight must be \[n, n\], n odd, contiguous, got \(3, 5\)": lambda: antialias(image, depth, torch.ones(3, 5)),
        "step must be 1 or more, got 0": lambda: antialias(image, depth, weight, step=0),
        "bytes of shared memory, emulated has": lambda: antialias(image, depth, torch.ones(121, 121)),
        r"out must be \[B, 8, h, w\] = \(2, 8, 4, 6\), got \(2, 4, 4, 6\)":
            lambda: antialias(image, depth, weight, out=torch.zeros(2, 4, 4, 6)),
        "out must be float16, got float32": lambda: antialias(half, depth, weight, out=torch.zeros(2, 8, 4, 6)),
        "out must be channels-last": lambda: antialias(image, depth, weight, out=torch.zeros(2, 8, 4, 6)),
        "depth requires a gradient": lambda: antialias(image, depth.clone().requires_grad_(), weight),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()
