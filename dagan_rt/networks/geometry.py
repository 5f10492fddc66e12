"""Coordinate grids, heat maps, sampling and 2 × 2 inverses: the geometry that several networks share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEATMAP_VARIANCE = 0.01


def exact(like: Tensor) -> AbstractContextManager[Any]:
    """Where products are computed as they are given: positions need more digits than autocast's 16 bits have."""
    kind = like.device.type  # autocast does not know every kind, such as meta
    wanted = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if wanted else nullcontext()


def axis(size: int, like: Tensor) -> Tensor:
    """Coordinates of pixels along one axis, [size] in [-1, 1], corner-aligned: pixel i lies at 2 i / (size - 1) - 1."""
    return 2 * torch.arange(size, dtype=like.dtype, device=like.device) / (size - 1) - 1


def coordinate_grid(height: int, width: int, like: Tensor) -> Tensor:
    """(x, y) of every pixel, [H, W, 2] in [-1, 1], corner-aligned as in `axis`."""
    y, x = axis(height, like), axis(width, like)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)


def gaussian_heatmaps(points: Tensor, height: int, width: int) -> Tensor:
    """Unnormalised Gaussians around each of `points` [B, K, 2]: [B, K, H, W] in (0, 1]."""
    x, y = axis(width, points), axis(height, points)
    # A Gaussian is the product of one along each axis: H + W exponentials a point, not H · W.
    along_x, along_y = (
        torch.exp(-0.5 * (places - points[..., at : at + 1]) ** 2 / HEATMAP_VARIANCE) for at, places in ((0, x), (1, y))
    )  # [B, K, W], [B, K, H]
    return along_y[..., :, None] * along_x[..., None, :]


def invert_2x2(matrix: Tensor) -> Tensor:
    """Inverse of [..., 2, 2] matrices in closed form, which every export target has operators for."""
    a, b, c, d = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 0], matrix[..., 1, 1]
    adjugate = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2)
    return adjugate / (a * d - b * c)[..., None, None]


def sample(image: Tensor, flow: Tensor) -> Tensor:
    """Bilinear samples of `image` [B, C, H, W] at `flow` [B, h, w, 2] ((x, y) in [-1, 1]), zeros outside.

    The flow lives on the corner-aligned grid, yet sampling reads it with align_corners=False: the published
    weights were trained with this mismatch of up to half a pixel, so it is part of the network.
    """
    return F.grid_sample(image, flow, mode="bilinear", padding_mode="zeros", align_corners=False)


def resize_flow(flow: Tensor, height: int, width: int) -> Tensor:
    """`flow` [B, h, w, 2] resampled bilinearly to [B, height, width, 2]; untouched if it has that size."""
    if flow.shape[1:3] == (height, width):
        return flow
    return resize_map(flow.permute(0, 3, 1, 2), height, width).permute(0, 2, 3, 1)


def resize_map(values: Tensor, height: int, width: int) -> Tensor:
    """`values` [B, C, h, w] resampled bilinearly to [B, C, height, width]; untouched if it has that size."""
    if values.shape[2:] == (height, width):
        return values
    return F.interpolate(values, size=(height, width), mode="bilinear", align_corners=False)
