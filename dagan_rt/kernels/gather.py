"""Rows of several arrays, chosen by slots on the device, in one launch (kernels/gather)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.kernels._arrays import ITEM_BYTES, expect, new, stream_for, together, view
from dagan_rt.kernels._devices import Array, Launch, Unit
from dagan_rt.kernels._pixels import MOST_BLOCKS
from dagan_rt.kernels.sparse_motion import contiguous

GATHER = Unit("gather", "gather")
UNITS = (GATHER,)
# As in the source: the most arrays, threads of a block, and what a block copies.
MOST, THREADS, CHUNK = 8, 256, 16384


def gather(
    pools: Sequence[Any], slots: Any, outs: Sequence[Any] | None = None, *, stream: Any = None, reference: bool = False
) -> tuple[Any, ...]:
    """out[b] = pool[slots[b]] of up to eight pools at once. A captured graph so serves whatever the slots then say.

    pools: arrays [S, ...] of any shape and dtype that kernels know, S the same for all, each without gaps in memory
    (contiguous or channels-last), a row a multiple of 4 bytes.
    slots: [B] int32, contiguous, 0 … S - 1; one out of this range counts as S - 1, so that nothing outside is read.
    outs: the arrays to write to, [B, ...], each of its pool's dtype and order in memory; None: new ones.
    stream: where to run, else the current one. reference: run the PyTorch twin, on tensors of any device.

    Raises InputError if an array is not as said here, or if there is no GPU.
    """
    if not 1 <= len(pools) <= MOST:
        raise InputError(f"pools must be 1 to {MOST} arrays, got {len(pools)}")
    if outs is not None and len(outs) != len(pools):
        raise InputError(f"outs must be as many arrays as pools, {len(pools)}, got {len(outs)}")
    if reference:
        return _reference(pools, slots, outs)
    chosen = view(slots, "slots")
    expect("slots", chosen, (None,), "int32", axes="B")
    (B,) = chosen.shape
    if not contiguous(chosen) or B > MOST_BLOCKS:
        raise InputError(f"slots must be contiguous and at most {MOST_BLOCKS}, got {B} of strides {chosen.strides}")
    from_ = [view(pool, f"pools[{i}]") for i, pool in enumerate(pools)]
    rows = from_[0].shape[0]
    for i, pool in enumerate(from_):
        expect(f"pools[{i}]", pool, (rows, *pool.shape[1:]))
    if outs is None:
        outs = [_new(array, pool, B, stream) for array, pool in zip(pools, from_, strict=True)]
    to = [view(out, f"outs[{i}]") for i, out in enumerate(outs)]
    sizes = [_row_bytes(i, *pair, B) for i, pair in enumerate(zip(from_, to, strict=True))]

    missing = MOST - len(from_)
    args = (
        chosen, *from_, *[None] * missing, *to, *[None] * missing,
        *map(np.int64, sizes), *[np.int64(0)] * missing, np.int32(rows),
    )  # fmt: skip
    chunks = sum(-(-size // CHUNK) for size in sizes)
    named = {f"pools[{i}]": it for i, it in enumerate(from_)} | {f"outs[{i}]": it for i, it in enumerate(to)}
    device = together(slots=chosen, **named)
    device.launch(
        Launch(GATHER, "gather", (chunks, B, 1), (THREADS, 1, 1), args, early=True), stream_for(slots, stream)
    )
    return tuple(outs)


def _new(array: Any, pool: Array, B: int, stream: Any) -> Any:
    return new(array, (B, *pool.shape[1:]), pool.dtype, pool.layout or "nchw", stream)


def _row_bytes(i: int, pool: Array, out: Array, B: int) -> int:
    """Bytes of a row, once pool and out agree and have no gaps."""
    expect(f"outs[{i}]", out, (B, *pool.shape[1:]), pool.dtype)
    row = math.prod(pool.shape[1:])
    for name, array in ((f"pools[{i}]", pool), (f"outs[{i}]", out)):
        inside = sum((n - 1) * stride for n, stride in zip(array.shape[1:], array.strides[1:], strict=True)) + 1
        if min(array.strides) < 0 or inside != row or (array.shape[0] > 1 and array.strides[0] != row):
            raise InputError(f"{name} must have no gaps in memory, got {array.shape} of strides {array.strides}")
    order = [[stride for n, stride in zip(it.shape[1:], it.strides[1:], strict=True) if n > 1] for it in (pool, out)]
    size = row * ITEM_BYTES[pool.dtype]
    if order[0] != order[1] or size % 4 or pool.pointer % 4 or out.pointer % 4:
        raise InputError(
            f"outs[{i}] must lie in memory as pools[{i}] does, rows multiples of 4 bytes, got {size} bytes of the "
            f"strides {pool.strides[1:]} and {out.strides[1:]}"
        )
    return size


def _reference(pools: Sequence[Any], slots: Any, outs: Sequence[Any] | None) -> tuple[Any, ...]:
    import torch

    def rows(pool: Any) -> Any:
        last = pool.shape[0] - 1
        return pool[torch.where((slots < 0) | (slots > last), last, slots).long()]

    if outs is None:
        return tuple(rows(pool) for pool in pools)
    return tuple(out.copy_(rows(pool)) for pool, out in zip(pools, outs, strict=True))
