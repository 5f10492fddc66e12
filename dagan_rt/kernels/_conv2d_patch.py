"""Convolutions of few channels, kernels/conv2d/forward_patch.cu: tiles, what they serve, channels of a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from dagan_rt.kernels._devices import Unit

WARPS, WIDTH = 8, 16  # as in the source: a warp makes lines of 16 pixels
COMFORTABLE = 112 << 10  # bytes of shared memory of which a multiprocessor of a large GPU holds two blocks
MOST_WORK = 49 * 48  # taps · channels beyond which other kernels are better


@dataclass(frozen=True)
class Tile:
    """What a block makes: 16 columns × `lines` of each warp, × `n` channels."""

    n: int
    lines: int

    @property
    def unit(self) -> Unit:
        return Unit("conv2d", "forward_patch", (("TILE_N", self.n), ("LINES", self.lines)))

    @property
    def threads(self) -> int:
        return 32 * WARPS

    @property
    def fields(self) -> int:
        """Sums that a thread adds to those of other parts."""
        return self.lines * self.n // 2

    def shared_for(self, chunk: int, k: int, stride: int) -> int:
        """Bytes of dynamic shared memory: the patch, the weights and the table, or the sums, and a flag."""
        height, width = (WARPS * self.lines - 1) * stride + k, (WIDTH - 1) * stride + k
        row = (k * k * (chunk // 8) + 1) // 2 * 2 + 1
        used = 16 * (height * width * (chunk // 8 | 1) + 1 + self.n * row) + 4 * (row - 1)
        return -(-max(used, 4 * WARPS * 16 * (self.n + 4)) // 16) * 16 + 16


TILES = (Tile(8, 2), Tile(16, 2), Tile(24, 1), Tile(32, 2), Tile(64, 2), Tile(64, 1), Tile(80, 1))
UNITS = tuple(tile.unit for tile in TILES)


@cache
def chunk_of(tile: Tile, in_channels: int, k: int, stride: int, split: int, shared: int) -> int | None:
    """Channels that are done at a time, so that there are `split` chunks at least: as many as fit, two blocks if so.

    shared: bytes that a block may have. None: not even eight fit.
    """
    whole = in_channels // 8
    chunks = [8 * count for count in range(whole, 0, -1) if whole % count == 0 and whole // count >= split]
    for limit in (min(COMFORTABLE, shared), shared):
        for chunk in chunks:
            if tile.shared_for(chunk, k, stride) <= limit:
                return chunk
    return None


def serves(tile: Tile, *, rows: int, in_channels: int, k: int, stride: int, split: int, shared: int) -> bool:
    """Whether a tile computes such a convolution, if the result is not pooled and the map not enlarged."""
    return rows <= tile.n and split >= 1 and chunk_of(tile, in_channels, k, stride, split, shared) is not None


def blocks(tile: Tile, B: int, Ho: int, Wo: int) -> int:
    """Of one part."""
    return B * -(-Ho // (WARPS * tile.lines)) * -(-Wo // WIDTH)


def candidates(
    *, B: int, Ho: int, Wo: int, rows: int, in_channels: int, k: int, stride: int, multiprocessors: int, shared: int
) -> Iterator[tuple[float, int, int]]:
    """A guess at the clocks, the index into TILES and the split of each that may serve well."""
    for index, tile in enumerate(TILES):
        if rows > tile.n or tile.n >= 2 * max(rows, 8) or k == 1 or k * k * in_channels > 2 * MOST_WORK:
            continue
        for split in (1, 2, 3, 4, 5, 8):
            chunk = chunk_of(tile, in_channels, k, stride, split, shared)
            count = blocks(tile, B, Ho, Wo) * split
            if chunk is None or (split > 1 and count > 2 * multiprocessors):
                continue
            chunks, turns = -(-in_channels // chunk // split), -(-count // multiprocessors)
            copying = tile.shared_for(chunk, k, stride) / 32
            multiplying = WARPS * tile.lines * 16 * tile.n * k * k * chunk / 900
            writing = WARPS * tile.lines * 16 * tile.n / 8
            joining = 1500 + split * 4 * tile.fields * tile.threads / 48 if split > 1 else 0
            waiting = 2500 + chunks * (1500 + multiplying)
            yield max(turns * (chunks * max(copying, multiplying) + writing), waiting) + joining, index, split
