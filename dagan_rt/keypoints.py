"""Key points as every room of the library passes them around."""

from __future__ import annotations

from typing import Any, NamedTuple


class KeyPoints(NamedTuple):
    """K key points of a batch of faces, as torch tensors or NumPy arrays alike (float32).

    Coordinates are (x, y) in [-1, 1] on the corner-aligned grid: pixel i of n lies at 2 i / (n - 1) - 1.
    """

    value: Any  # [B, K, 2]
    jacobian: Any  # [B, K, 2, 2], the local affine frame of each point
