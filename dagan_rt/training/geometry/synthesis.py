"""View synthesis: one frame of a clip drawn with the pixels of another, through depth, motion and camera.

Coordinates. A picture spans [0, 1] × [0, 1] from edge to edge, so the centre of pixel i of W is (i + 0.5) / W, and a
camera's focal lengths and centre are in picture widths and heights: one camera serves every resolution of a clip.
Sampling therefore uses align_corners = False, whose [-1, 1] also runs from edge to edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEAREST, FARTHEST = 1.0, 10.0
"""Depths that disparity 1 and 0 stand for.

Photographs tell depth up to a factor, so only the ratio says anything. A nose 0.4 m before a laptop's camera in a
room 4 m deep is 1 : 10. A wider range would squeeze a face, whose depth varies by an eighth of its distance, into less
of the sigmoid; a narrower one could not tell a room from a wall.
"""

LEAST_DEPTH = 1e-3  # of a projected point: what a wild motion puts behind the camera stays in front of it


@dataclass(frozen=True)
class Camera:
    """A pinhole without skew or distortion: focal lengths and centre [B, 2] (x, y), in picture widths and heights."""

    focal: Tensor
    centre: Tensor


def depth_of(disparity: Tensor, nearest: float = NEAREST, farthest: float = FARTHEST) -> Tensor:
    """Network output in [0, 1] (near is 1) -> distance along the optical axis in [nearest, farthest]; any shape."""
    return 1 / (1 / farthest + (1 / nearest - 1 / farthest) * disparity)


def disparity_of(depth: Tensor, nearest: float = NEAREST, farthest: float = FARTHEST) -> Tensor:
    """The inverse of `depth_of`."""
    return (1 / depth - 1 / farthest) / (1 / nearest - 1 / farthest)


def rotation_matrix(axis_angle: Tensor) -> Tensor:
    """Axis times angle in radians [B, 3] -> rotation matrices [B, 3, 3], exact and smooth at zero."""
    x, y, z = axis_angle.unbind(-1)  # each [B]
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))  # [B, 3, 3]
    return torch.matrix_exp(skew)


def pixel_centres(height: int, width: int, like: Tensor) -> Tensor:
    """Positions (x, y) of all pixels, row by row: [2, H*W] in [0, 1], with `like`'s dtype and device."""
    x = (torch.arange(width, dtype=like.dtype, device=like.device) + 0.5) / width
    y = (torch.arange(height, dtype=like.dtype, device=like.device) + 0.5) / height
    grid = torch.meshgrid(y, x, indexing="ij")  # [H, W] each
    return torch.stack([grid[1].flatten(), grid[0].flatten()])


def back_project(depth: Tensor, camera: Camera) -> Tensor:
    """Depth along the axis [B, 1, H, W] -> points in the camera's frame [B, 3, H*W]: x right, y down, z ahead."""
    centres = pixel_centres(depth.shape[-2], depth.shape[-1], depth)  # [2, H*W]
    ray = (centres - camera.centre.unsqueeze(-1)) / camera.focal.unsqueeze(-1)  # [B, 2, H*W]
    return torch.cat([ray, torch.ones_like(ray[:, :1])], dim=1) * depth.flatten(2)  # [B, 3, H*W] * [B, 1, H*W]


def project(points: Tensor, camera: Camera) -> Tensor:
    """Points [B, 3, N] in the camera's frame -> where they are seen [B, 2, N], [0, 1] inside the picture."""
    depth = points[:, 2:].clamp_min(LEAST_DEPTH)  # [B, 1, N]
    return points[:, :2] / depth * camera.focal.unsqueeze(-1) + camera.centre.unsqueeze(-1)


def move(points: Tensor, rotation: Tensor, translation: Tensor, pivot: Tensor) -> Tensor:
    """Turn points [B, 3, N] by axis-angle [B, 3] about `pivot` [B, 3], then shift them by [B, 3]."""
    about = pivot.unsqueeze(-1)  # [B, 3, 1]
    return rotation_matrix(rotation) @ (points - about) + about + translation.unsqueeze(-1)


def sample(image: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """`image` [B, C, h, w] read bilinearly at places [B, 2, H*W] in [0, 1] -> [B, C, H, W].

    Outside, the border repeats: a point that left the other picture is compared with the nearest thing known about
    it, where black would punish every motion that moves a bright face outwards.
    """
    grid = (places * 2 - 1).transpose(1, 2).unflatten(1, (height, width))  # [B, H, W, 2]
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class View:
    """A frame drawn with another one's pixels: the image [B, C, H, W], where in the other frame its pixels were read
    [B, 2, H*W], and how far from the other frame's camera each of the points is [B, 1, H, W]."""

    image: Tensor
    places: Tensor
    depth: Tensor


def synthesise(
    other: Tensor, depth: Tensor, camera: Camera, rotation: Tensor, translation: Tensor, pivot: Tensor
) -> View:
    """The target frame, drawn with the other frame's pixels.

    other [B, C, H, W]; depth [B, 1, H, W] of the target; the motion (see `move`) takes the target's points to where
    they are when the other frame is taken.
    """
    points = move(back_project(depth, camera), rotation, translation, pivot)  # [B, 3, H*W]
    places = project(points, camera)
    image = sample(other, places, depth.shape[-2], depth.shape[-1])
    return View(image, places, points[:, 2:].clamp_min(LEAST_DEPTH).view_as(depth))
