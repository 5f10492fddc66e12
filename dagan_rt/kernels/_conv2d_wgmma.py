"""The convolution kernel of Hopper, kernels/conv2d/forward_wgmma.cu: its tiles, what they serve, and its launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dagan_rt.kernels._arrays import short
from dagan_rt.kernels._devices import Launch, Unit

DEPTH = 64  # channels of a step, as in the kernel
PRODUCERS = 128  # threads that fetch


@dataclass(frozen=True)
class Tile:
    """What a block makes: `pixels` × `channels`."""

    pixels: int
    channels: int
    halo: bool  # the pixels are a patch, 8 wide, fetched once for all taps of the kernel; weights as by `swizzled`
    resident: int = 1  # blocks that share a multiprocessor

    @property
    def unit(self) -> Unit:
        defines = (("PIXELS", self.pixels), ("CHANNELS", self.channels), ("HALO", int(self.halo)))
        return Unit("conv2d", "forward_wgmma", (*defines, ("RESIDENT", self.resident)), feature="a")

    @property
    def consumers(self) -> int:
        """Threads that multiply."""
        return 128 if self.pixels == 64 else 256

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory, reckoned as in the kernel."""
        weights, budget = self.channels * 128, (112 if self.resident == 2 else 224) * 1024
        if self.halo:
            image, images = -(-10 * (self.pixels // 8 + 2) * 128 // 1024) * 1024, 2
            stages = min(8, (budget - 2 * image) // weights)
        else:
            image = self.pixels * 128
            stages = images = min(8, budget // (image + weights))
        return images * image + stages * weights + 16 * (stages + images) + 8


TILES = (
    Tile(128, 64, halo=False),
    Tile(128, 128, halo=False),
    Tile(128, 256, halo=False),
    Tile(64, 64, halo=True, resident=2),
    Tile(64, 128, halo=True),
    Tile(64, 128, halo=True, resident=2),
    Tile(128, 64, halo=True),
    Tile(128, 64, halo=True, resident=2),
    Tile(128, 128, halo=True),
    Tile(256, 64, halo=True),
    Tile(256, 128, halo=True),
    Tile(128, 256, halo=True),
)
UNITS = tuple(tile.unit for tile in TILES)


def swizzled(weight: Any, phases: int) -> Any:
    """Packed.weight, a PyTorch tensor [phases · rows, K], as tiles with a halo read it: [phases, K / 64, rows, 64].

    Of a row's eight pieces of eight values, piece p lies at place p ^ (row % 8). rows and K are multiples of 8 and 64.
    """
    import torch

    rows = weight.shape[0] // phases
    pieces = weight.reshape(phases, rows, -1, 8, 8).transpose(1, 2)
    place = torch.arange(8, device=weight.device) ^ torch.arange(rows, device=weight.device)[:, None] % 8
    return pieces.take_along_dim(place[None, None, :, :, None].expand(pieces.shape), 3).reshape(weight.shape)


def serves(
    tile: Tile, *, capability: tuple[int, int], in_channels: int, rows: int, k: int, stride: int, split: int = 1
) -> bool:
    """Whether a tile computes such a convolution; k: taps along an axis, 2 in a phase of an upsampling one."""
    if capability != (9, 0) or in_channels % DEPTH:
        return False
    if tile.halo:
        whole = rows % tile.channels == 0
        return whole and k in (2, 3) and stride == 1 and 1 <= split <= in_channels // DEPTH
    return 1 <= split <= in_channels // DEPTH * k * k


def tiles_of(tile: Tile, B: int, Ho: int, Wo: int, rows: int) -> tuple[int, int]:
    """Tiles of pixels and of channels, of one phase."""
    pixels = B * -(-Wo // 8) * -(-Ho // (tile.pixels // 8)) if tile.halo else -(-B * Ho * Wo // tile.pixels)
    return pixels, -(-rows // tile.channels)


def partials_bytes(tile: Tile, B: int, Ho: int, Wo: int, rows: int, phases: int, split: int) -> int:
    """Scratch memory for the parts of K; none if there is one part."""
    down, across = tiles_of(tile, B, Ho, Wo, rows)
    return 4 * down * across * phases * split * tile.pixels * tile.channels if split > 1 else 0


def counters_bytes(tile: Tile, B: int, Ho: int, Wo: int, rows: int, phases: int, split: int) -> int:
    """Zeroed scratch memory, likewise."""
    down, across = tiles_of(tile, B, Ho, Wo, rows)
    return 4 * down * across * phases if split > 1 else 0


def launch(
    tile: Tile, dtype: str, args: tuple[Any, ...], B: int, Ho: int, Wo: int, rows: int, phases: int, split: int
) -> Launch:
    """args: all of the kernel's, CONV_PARAMETERS in kernels/conv2d/conv2d.cuh."""
    down, across = tiles_of(tile, B, Ho, Wo, rows)
    return Launch(
        tile.unit,
        f"conv2d_wgmma_{short(dtype)}",
        (down * across, phases * split, 1),
        (PRODUCERS + tile.consumers, 1, 1),
        args,
        tile.shared,
    )


def candidates(
    *, B: int, Ho: int, Wo: int, in_channels: int, rows: int, k: int, stride: int, phases: int, multiprocessors: int
) -> list[tuple[int, int]]:
    """Pairs (index into TILES, split) that may serve best, the best guess first; none where no tile serves."""
    found = []
    steps = in_channels // DEPTH * k * k
    for index, tile in enumerate(TILES):
        down, across = tiles_of(tile, B, Ho, Wo, rows)
        for split in (1, 2, 3, 4, 6, 8, 12, 16):
            blocks = down * across * phases * split
            if split > 1 and (blocks > 2 * multiprocessors or steps < 4 * split):
                break
            if serves(tile, capability=(9, 0), in_channels=in_channels, rows=rows, k=k, stride=stride, split=split):
                found.append((_clocks(tile, blocks, -(-steps // split), split, k, multiprocessors), index, split))
    return [(index, split) for _, index, split in sorted(found)[:6]]


def _clocks(tile: Tile, blocks: int, steps: int, split: int, k: int, multiprocessors: int) -> float:
    """About how long all blocks take, in clocks; the constants are fitted to an H200 (kernels/conv2d/WGMMA.md)."""
    turns = -(-blocks // multiprocessors)
    products = tile.pixels * tile.channels * DEPTH / 2048
    pixels = (7 + k) * (tile.pixels // 8 + k - 1) / k**2 if tile.halo else tile.pixels  # fetched for a step
    fetched = 128 * (tile.channels + pixels) * min(blocks, multiprocessors) / multiprocessors
    step = max(0.88 * products + 150, fetched / 63) * (1.0 if tile.halo else 3.6)
    around = 7400 + 0.16 * tile.pixels * tile.channels  # before the first step and after the last
    if tile.resident == 2 and turns > 1:
        around *= 0.45
    joining = 2400 + split * tile.pixels * tile.channels * 4 / 41 if split > 1 else 0
    return turns * (steps * step + around) + joining
