"""Occlusion/motion estimator T: sparse key-point motion to a dense flow and an occlusion map (Figure 1c)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.blocks import AntiAliasDownsample, Hourglass
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.geometry import coordinate_grid, exact, gaussian_heatmaps, invert_2x2, sample


class Motion(NamedTuple):
    """Where every pixel of the driving frame comes from, on the shrunken grid h × w."""

    flow: Tensor  # [B, h, w, 2], (x, y) in the source, [-1, 1]
    occlusion: Tensor  # [B, 1, h, w] in (0, 1), 1 = visible in the source
    mask: Tensor  # [B, K + 1, h, w], weights of the background and each key point's motion, summing to 1


def sparse_flows(source: KeyPoints, driving: KeyPoints, height: int, width: int) -> Tensor:
    """Affine motion around each key point, identity (background) first: [B, K + 1, H, W, 2].

    T_k(z) = J_s J_d⁻¹ (z - k_d) + k_s, the first-order motion of FOMM.
    """
    grid = coordinate_grid(height, width, source.value)
    frame = torch.matmul(source.jacobian, invert_2x2(driving.jacobian))  # [B, K, 2, 2]
    offset = (grid - driving.value[:, :, None, None]).flatten(2, 3)  # [B, K, H·W, 2]
    # One product a key point, not one a pixel, which runtimes would take one by one.
    motion = torch.matmul(offset, frame.transpose(-1, -2)) + source.value[:, :, None]
    motion = motion.reshape(-1, frame.shape[1], height, width, 2)
    identity = torch.zeros_like(motion[:, :1]) + grid
    return torch.cat([identity, motion], dim=1)


class MotionEstimator(nn.Module):
    """Blends the key points' motions into one flow, and says what the source does not show."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        points = config.num_keypoints + 1
        self.hourglass = Hourglass(4 * points, config.motion_width, config.motion_max, config.motion_blocks)
        self.mask = nn.Conv2d(self.hourglass.out_channels, points, 7, padding=3)
        self.occlusion = nn.Conv2d(self.hourglass.out_channels, 1, 7, padding=3)
        self.down = AntiAliasDownsample(3, config.motion_scale)

    def forward(self, thumbnail: Tensor, source: KeyPoints, driving: KeyPoints) -> Motion:
        """`thumbnail` [B, 3, h, w] is the shrunken source, `self.down(image)`."""
        B, _, H, W = thumbnail.shape
        with exact(thumbnail):
            flows = sparse_flows(source, driving, H, W)
        points = flows.shape[1]
        copies = thumbnail[:, None].expand(-1, points, -1, -1, -1).reshape(B * points, 3, H, W)
        deformed = sample(copies, flows.reshape(B * points, H, W, 2)).reshape(B, points, 3, H, W)
        difference = gaussian_heatmaps(driving.value, H, W) - gaussian_heatmaps(source.value, H, W)
        heatmaps = torch.cat([torch.zeros_like(difference[:, :1]), difference], dim=1)
        stacked = torch.cat([heatmaps[:, :, None], deformed], dim=2).reshape(B, points * 4, H, W)
        feature = self.hourglass(stacked)
        mask = torch.softmax(self.mask(feature).to(flows.dtype), dim=1)
        flow = (mask[..., None] * flows).sum(dim=1)
        return Motion(flow, torch.sigmoid(self.occlusion(feature)), mask)
