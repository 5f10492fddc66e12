"""Maps in channels-last memory as the kernels take them: whole ones, and slices of the channels of wider ones."""

from __future__ import annotations

from dagan_rt.errors import InputError
from dagan_rt.kernels._arrays import ITEM_BYTES
from dagan_rt.kernels._devices import Array

THREADS = 256  # of a block, at most
MOST_BLOCKS = 65535  # along the second and third axis of a grid


def vectors(array: Array) -> int:
    """Vectors of 16 bytes in the channels of a pixel."""
    return array.shape[1] * ITEM_BYTES[array.dtype] // 16


def pixel_stride(name: str, array: Array) -> int:
    """Elements from one pixel to the next of a map [B, C, H, W] of the strides (H W P, 1, W P, P): P, C or more.

    Raises InputError unless these are its strides and vectors of 16 bytes fit: C and P multiples of as many values, and
    the start of 16 bytes.
    """
    B, C, H, W = array.shape
    values = 16 // ITEM_BYTES[array.dtype]
    stride = array.strides[3] if W > 1 else array.strides[2] if H > 1 else array.strides[0] if B > 1 else C
    wanted = (H * W * stride, 1, W * stride, stride)
    dense = all(n == 1 or a == b for n, a, b in zip(array.shape, array.strides, wanted, strict=True))
    if not dense or stride < C or C % values or stride % values or array.pointer % 16:
        raise InputError(
            f"{name} must be channels-last, whole or a slice of channels, with C and the pixel stride multiples of "
            f"{values} and the start one of 16 bytes, got {array.shape} of the strides {array.strides} at "
            f"{array.pointer:#x}"
        )
    return stride


def block_of(vectors: int) -> tuple[int, int, int]:
    """Threads along the vectors of a pixel, which are neighbours in memory, and along pixels."""
    across = min(THREADS, vectors)
    return across, THREADS // across, 1
