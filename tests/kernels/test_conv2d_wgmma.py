"""Hopper's convolution kernel against PyTorch in double precision, every tile of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dagan_rt.kernels import _conv2d_wgmma as wgmma
from dagan_rt.kernels._arrays import view
from dagan_rt.kernels._conv2d_wgmma import TILES, Tile

# Bits of `flags` in kernels/conv2d/conv2d.cuh.
REFLECT, RELU, ELU, POOL, REPEAT, UPSAMPLE, VECTORS = 1, 2, 4, 8, 16, 32, 512
HALF, BRAIN = torch.float16, torch.bfloat16
GATHERED = Tile(128, 64, halo=False)
PATCH, SMALL_PATCH = Tile(128, 64, halo=True), Tile(64, 64, halo=True, resident=2)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.to(memory_format=torch.channels_last) if len(shape) == 4 else values


def convolve(
    device: Any, tile: Tile, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor,
    *, flags: int = 0, stride: int = 1, split: int = 1, residual: torch.Tensor | None = None,
    second: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Launch the kernel. weight: [phases, Cout, Cin, k, k]; the pitches are those of the arrays."""
    B, channels, H, W = x.shape
    phases, rows, _, k, _ = weight.shape
    padding = 1 if flags & UPSAMPLE else k // 2
    Ho, Wo = (H, W) if flags & UPSAMPLE else ((it + 2 * padding - k) // stride + 1 for it in (H, W))
    matrix = weight.permute(0, 1, 3, 4, 2).reshape(phases * rows, -1).contiguous()
    size = (B, Ho, Wo, rows, phases, split)
    if tile.halo:
        matrix = wgmma.swizzled(matrix, phases)
    partials, counters = wgmma.partials_bytes(tile, *size), wgmma.counters_bytes(tile, *size)
    scale, shift, normalized = second or (None, None, None)

    def given(array: torch.Tensor | None) -> Any:
        return None if array is None else view(array, "array")

    def pitch(array: torch.Tensor | None) -> int:
        return 0 if array is None else array.stride(3)

    arrays = (given(it) for it in (x, matrix, bias, residual, out, normalized, scale, shift))
    numbers = (B, H, W, channels, pitch(x), Ho, Wo, rows, rows, pitch(out), pitch(normalized), pitch(residual),
               k, stride, padding, split, flags | VECTORS)  # fmt: skip
    arguments = (
        *arrays,
        device.workspace(0, partials) if partials else None,
        device.workspace(0, counters, zeroed=True) if counters else None,
        *map(np.int32, numbers),
    )
    assert wgmma.serves(tile, capability=(9, 0), in_channels=channels, rows=rows, k=k, stride=stride, split=split)
    device.launch(wgmma.launch(tile, str(x.dtype).removeprefix("torch."), arguments, B, Ho, Wo, rows, phases, split))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """To the rounding of the result."""
    tolerance = 1e-3 if got.dtype == HALF else 8e-3
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def problem(B: int, cin: int, H: int, W: int, cout: int, k: int, dtype: torch.dtype = HALF) -> tuple[torch.Tensor, ...]:
    weight = draw(cout, cin, k, k, seed=2) / (cin * k * k) ** 0.5
    return draw(B, cin, H, W, seed=1, dtype=dtype), weight.to(dtype), draw(cout, seed=3)


def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(emulated: Any, tile: Tile):
    """A map that no tile divides, more channels than the tile's."""
    dtype = BRAIN if tile.channels == 128 else HALF
    channels = 2 * tile.channels if tile.halo else tile.channels + 64
    x, weight, bias = problem(1, 64, 18, 7, channels, 3, dtype)
    out = empty(1, channels, 18, 7, dtype=dtype)
    convolve(emulated, tile, x, weight[None], bias, out, flags=RELU)
    close(out, F.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu())


@pytest.mark.parametrize("tile", [GATHERED, SMALL_PATCH], ids=str)
@pytest.mark.parametrize("split", [1, 2, 3])
def test_parts_of_k_and_an_odd_batch(emulated: Any, tile: Tile, split: int):
    x, weight, bias = problem(3, 192, 8, 8, 64, 3)
    out = empty(3, 64, 8, 8)
    convolve(emulated, tile, x, weight[None], bias, out, split=split)
    close(out, F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
    emulated.workspace(0, 1, zeroed=True)  # which checks that the counters are zero again


@pytest.mark.parametrize("tile", [GATHERED, PATCH], ids=str)
def test_a_slice_of_a_wider_map_with_residual_and_a_second_output(emulated: Any, tile: Tile):
    x, weight, bias = problem(2, 128, 9, 16, 64, 3)
    wide, both = draw(2, 192, 9, 16, seed=4, dtype=HALF), empty(2, 136, 9, 16)
    wide[:, 32:160] = x
    x, out, second = wide[:, 32:160], both[:, :64], both[:, 72:136]
    residual, scale, shift = draw(2, 64, 9, 16, seed=5, dtype=HALF), draw(64, seed=6), draw(64, seed=7)
    convolve(emulated, tile, x, weight[None], bias, out, residual=residual, second=(scale, shift, second))
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual
    close(out, expected)
    close(second, (expected * scale[:, None, None] + shift[:, None, None]).relu())
    assert both[:, 64:72].isnan().all()


@pytest.mark.parametrize("tile", [GATHERED, SMALL_PATCH, PATCH], ids=str)
@pytest.mark.parametrize("flags", [POOL | RELU, REPEAT | REFLECT | ELU])
def test_pooled_and_repeated(emulated: Any, tile: Tile, flags: int):
    x, weight, bias = problem(1, 64, 10, 14, 64, 3)
    out = empty(1, 64, 5, 7) if flags & POOL else empty(1, 64, 20, 28)
    convolve(emulated, tile, x, weight[None], bias, out, flags=flags)
    padded = F.pad(x.double(), (1, 1, 1, 1), "reflect" if flags & REFLECT else "constant")
    expected = F.conv2d(padded, weight.double(), bias.double())
    pooled = F.avg_pool2d(expected.relu(), 2)
    close(out, pooled if flags & POOL else F.interpolate(F.elu(expected), scale_factor=2))


def phases_of(weight: torch.Tensor) -> torch.Tensor:
    """The four 2 × 2 kernels that are a 3 × 3 kernel on the doubled map: [4, Cout, Cin, 2, 2]."""
    first = torch.tensor([[1.0, 0, 0], [0, 1, 1]], dtype=weight.dtype)
    second = torch.tensor([[1.0, 1, 0], [0, 0, 1]], dtype=weight.dtype)
    return torch.stack([
        torch.einsum("ocyx,py,qx->ocpq", weight, rows, columns)
        for rows in (first, second) for columns in (first, second)
    ])  # fmt: skip


@pytest.mark.parametrize("tile", [GATHERED, SMALL_PATCH, PATCH], ids=str)
@pytest.mark.parametrize("split", [1, 2])
def test_upsampling(emulated: Any, tile: Tile, split: int):
    """Three times around the ring of patches."""
    x, _, bias = problem(2, 384, 5, 9, 64, 3)
    weight = (draw(64, 384, 3, 3, seed=8) / 60).double()
    out = empty(2, 64, 10, 18)
    phases = phases_of(weight).to(HALF)
    convolve(emulated, tile, x, phases, bias, out, flags=UPSAMPLE | RELU, split=split)
    expected = F.conv2d(F.interpolate(x.double(), scale_factor=2), weight, bias.double(), padding=1).relu()
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=4e-3)  # the sums of weights are rounded


@pytest.mark.parametrize(("k", "stride"), [(1, 1), (1, 2), (3, 2), (7, 1)])
def test_gathered_pixels_serve_every_kernel_and_stride(emulated: Any, k: int, stride: int):
    x, weight, bias = problem(1, 64, 9, 12, 72, k)
    out = empty(1, 72, -(-9 // stride), 12 // stride)
    convolve(emulated, GATHERED, x, weight[None], bias, out, stride=stride, split=1 if k < 7 else 5)
    close(out, F.conv2d(x.double(), weight.double(), bias.double(), stride=stride, padding=k // 2))


def test_what_is_served():
    common: dict[str, Any] = {"capability": (9, 0), "in_channels": 128, "rows": 256, "k": 3, "stride": 1}
    for tile in TILES:
        assert wgmma.serves(tile, **common) and wgmma.serves(tile, **common, split=2)
        assert not wgmma.serves(tile, **{**common, "capability": (10, 0)})
        assert not wgmma.serves(tile, **{**common, "in_channels": 96})
        assert wgmma.serves(tile, **{**common, "stride": 2}) == (not tile.halo)
        assert wgmma.serves(tile, **{**common, "k": 1}) == (not tile.halo)
        assert wgmma.serves(tile, **common, split=3) == (not tile.halo)


def test_the_first_guess_fills_the_gpu():
    size: dict[str, Any] = {"in_channels": 256, "rows": 256, "k": 3, "stride": 1, "phases": 1, "multiprocessors": 132}
    for B, H in ((1, 64), (8, 64), (32, 64), (1, 16)):
        guesses = wgmma.candidates(B=B, Ho=H, Wo=H, **size)
        index, split = guesses[0]
        down, across = wgmma.tiles_of(TILES[index], B, H, H, 256)
        blocks = down * across * split
        assert len(set(guesses)) == len(guesses) > 1
        assert blocks / (132 * -(-blocks // 132)) > (0.4 if H == 16 else 0.9)
    assert wgmma.candidates(B=1, Ho=8, Wo=8, **{**size, "in_channels": 40}) == []


@pytest.mark.slow
@pytest.mark.parametrize("tile", [GATHERED, PATCH], ids=str)
@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_under_sanitizers(tile: Tile, sanitize: str):
    from emulated import EmulatedDevice, emulation

    with emulation(EmulatedDevice(sanitize=sanitize, seed=1)) as device:
        x, weight, bias = problem(1, 128, 8, 8, 64, 3)
        out = empty(1, 64, 8, 8)
        convolve(device, tile, x, weight[None], bias, out, split=2)
        close(out, F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
