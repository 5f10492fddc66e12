"""3 × 3 max pooling, against PyTorch: every value exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dagan_rt.errors import InputError
from dagan_rt.kernels.pooling import max_pool

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (B, C, H, W): odd and even sides, one pixel, more rows or columns than a block has, more vectors than it has threads.
SHAPES = [(1, 64, 8, 8), (2, 8, 5, 7), (1, 40, 1, 1), (3, 16, 2, 9), (1, 24, 70, 3), (1, 8, 3, 90), (1, 2056, 2, 2)]


def values(*shape: int, dtype: Any = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Channels-last, all negative: what stands for the outside must never win."""
    random = torch.Generator().manual_seed(sum(shape))
    found = -0.1 - torch.rand(*shape, generator=random)
    return found.to(device, dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_exactly_pytorchs(device: str, shape: Any, dtype: Any) -> None:
    x = values(*shape, dtype=dtype, device=device)
    pooled = max_pool(x)
    assert pooled.is_contiguous(memory_format=torch.channels_last) and pooled.dtype == dtype
    assert torch.equal(pooled.float(), F.max_pool2d(x.float(), 3, 2, 1))
    assert torch.equal(pooled, max_pool(x, reference=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", [(9, 0), (7, 5)], ids=["sm_90", "sm_75"])
def test_what_is_not_finite(capability: tuple[int, int], dtype: Any) -> None:
    from emulated import EmulatedDevice, emulation

    x = values(2, 16, 12, 12, dtype=dtype)
    for n, special in enumerate((math.nan, math.inf, -math.inf, -0.0, 0.0)):
        x[0, n::5, n::4, ::3] = special
    with emulation(EmulatedDevice(capability=capability)):
        pooled = max_pool(x)
    torch.testing.assert_close(pooled.float(), F.max_pool2d(x.float(), 3, 2, 1), atol=0, rtol=0, equal_nan=True)
    assert pooled.isnan().any() and pooled.isinf().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_channels(device: str, dtype: Any) -> None:
    wide = values(2, 48, 6, 10, dtype=dtype, device=device)
    larger = torch.full((2, 40, 3, 5), 7.0, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    part = larger[:, 16:32]
    assert max_pool(wide[:, 8:24], out=part) is part
    assert torch.equal(part.float(), F.max_pool2d(wide[:, 8:24].float(), 3, 2, 1))
    assert larger[:, :16].eq(7).all() and larger[:, 32:].eq(7).all()


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_sanitizers_find_nothing(sanitize: str) -> None:
    from emulated import EmulatedDevice, emulation

    with emulation(EmulatedDevice(sanitize=sanitize, seed=3)):
        for dtype in DTYPES:
            x = values(2, 24, 5, 7, dtype=dtype)
            assert torch.equal(max_pool(x[:, 8:]), max_pool(x[:, 8:], reference=True))


def test_what_cannot_be_used_is_named(emulated: Any) -> None:
    x = values(2, 16, 4, 6)
    for message, call in {
        r"x must be \[B, C, H, W\] = \(\*, \*, \*, \*\), got \(16, 4, 6\)": lambda: max_pool(x[0]),
        "x must be float32 or float16 or bfloat16, got uint8": lambda: max_pool(x.to(torch.uint8)),
        "x must be channels-last, whole or a slice of channels": lambda: max_pool(x.contiguous()),
        "multiples of 8 and the start one of 16 bytes": lambda: max_pool(x[:, :12].half()),
        "x must be channels-last, whole or a slice of channels, .* multiples of 4": lambda: max_pool(x[:, 2:6]),
        r"out must be \[B, C, h, w\] = \(2, 16, 2, 3\), got \(2, 16, 4, 6\)": lambda: max_pool(x, out=x),
        "out must be float32, got float16": lambda: max_pool(x, out=values(2, 16, 2, 3, dtype=torch.float16)),
        "out must be channels-last": lambda: max_pool(x, out=torch.zeros(2, 16, 2, 3)),
        "x requires a gradient": lambda: max_pool(x.clone().requires_grad_()),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()
