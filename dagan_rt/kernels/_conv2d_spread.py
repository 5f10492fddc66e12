"""7 × 7 convolutions to few channels, kernels/conv2d/forward_spread.cu: tiles, what they serve, and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dagan_rt.kernels._devices import Unit

KERNEL = 7  # rows and columns of the taps
SPAN, SEGMENT = 64, 58  # positions of a line, and pixels of the result where the map is wider; as in the source
DEPTH = 32  # channels of a step


@dataclass(frozen=True)
class Tile:
    """What a block makes: lines of 64 positions × the channels of the result for each horizontal tap."""

    lines: int
    spread: int

    @property
    def unit(self) -> Unit:
        return Unit("conv2d", "forward_spread", (("LINES", self.lines), ("SPREAD", self.spread)))

    @property
    def threads(self) -> int:
        return self.lines * SPAN

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: the map and the weights, or the products, and a flag."""
        operands = 2 * ((self.lines + KERNEL - 1) * SPAN + KERNEL * self.spread) * DEPTH
        return -(-max(operands, 4 * self.threads * (self.spread + 1)) // 16) * 16 + 16

    @property
    def fields(self) -> int:
        """Sums that a thread adds to those of other parts."""
        return 8 * -(-(self.spread // KERNEL) // 8)


TILES = (Tile(4, 24), Tile(2, 24), Tile(4, 120), Tile(2, 120))
UNITS = tuple(tile.unit for tile in TILES)


def width(out_channels: int) -> int | None:
    """The `spread` of the tiles for a result of so many channels; None where there are too many."""
    return next((it for it in (24, 120) if KERNEL * out_channels <= it), None)


def spread(weight: Any, out_channels: int) -> Any:
    """Packed.weight, a PyTorch tensor [rows, 49 · Cin], as the kernel reads it: [spread, 7 · Cin].

    Row kx · Cout + co holds the taps of column kx, from the top, the channels of a tap together.
    """
    taps = weight[:out_channels].reshape(out_channels, KERNEL, KERNEL, -1)
    rows = taps.permute(2, 0, 1, 3).reshape(KERNEL * out_channels, -1)
    result = weight.new_zeros((width(out_channels), rows.shape[1]))
    result[: len(rows)] = rows
    return result


def serves(tile: Tile, *, out_channels: int, in_channels: int, k: int, stride: int, padding: int, split: int) -> bool:
    """Whether a tile computes such a convolution, if its result is neither pooled nor repeated."""
    fits = (k, stride, tile.spread) == (KERNEL, 1, width(out_channels)) and padding <= KERNEL // 2
    return fits and 1 <= split <= -(-in_channels // DEPTH)


def blocks(tile: Tile, B: int, Ho: int, Wo: int, whole: bool) -> int:
    """Of one part; whole: a line of the map is SPAN positions at most, continued by zeros."""
    return B * -(-Ho // tile.lines) * (1 if whole else -(-Wo // SEGMENT))


def candidates(
    *, B: int, Ho: int, Wo: int, in_channels: int, out_channels: int, padding: int, multiprocessors: int, shared: int
) -> Iterator[tuple[float, int, int]]:
    """A guess at the clocks, the index into TILES and the split of each that serves a 7 × 7 convolution of stride 1."""
    for index, tile in enumerate(TILES):
        for split in (1, 2, 4):
            shape = {"out_channels": out_channels, "in_channels": in_channels, "padding": padding, "split": split}
            if tile.shared > shared or not serves(tile, k=KERNEL, stride=1, **shape):
                continue
            count = blocks(tile, B, Ho, Wo, Wo <= SPAN) * split
            if split > 1 and count > 3 * multiprocessors:
                continue
            turns, steps = -(-count // multiprocessors), -(-in_channels // (DEPTH * split))
            copying = 2 * ((tile.lines + KERNEL - 1) * SPAN + KERNEL * tile.spread) * DEPTH / 40
            multiplying = tile.threads * KERNEL * tile.spread * DEPTH / 1000
            writing = tile.threads * tile.spread * 4 / 32
            joining = 1500 + split * 4 * tile.fields * tile.threads / 48 if split > 1 else 0
            busy = turns * (steps * max(copying, multiplying) + writing)
            yield max(busy, 2000 + steps * (1200 + multiplying)) + joining, index, split
