"""Key-point estimator F_kp: an hourglass on the shrunken image, soft arg-max positions and local frames (Figure 1b)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.blocks import AntiAliasDownsample, Hourglass
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.geometry import coordinate_grid, exact

TEMPERATURE = 0.1


class KeypointEstimator(nn.Module):
    """K key points of an RGB-D (or RGB) image."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        channels = 4 if config.parts.rgbd_keypoints else 3
        self.predictor = Hourglass(channels, config.keypoint_width, config.keypoint_max, config.keypoint_blocks)
        # No padding: the heat maps are six pixels smaller than the features, so that no point sticks to the border.
        self.kp = nn.Conv2d(self.predictor.out_channels, config.num_keypoints, 7)
        self.jacobian = nn.Conv2d(self.predictor.out_channels, 4 * config.num_keypoints, 7)
        self.down = AntiAliasDownsample(channels, config.motion_scale)
        nn.init.zeros_(self.jacobian.weight)  # training starts from the identity frame
        self.jacobian.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(config.num_keypoints))

    def forward(self, image: Tensor) -> KeyPoints:
        """`image` [B, 3 or 4, H, W] in [0, 1] (depth last) -> positions [B, K, 2] and frames [B, K, 2, 2]."""
        feature = self.predictor(self.down(image))
        logits, frames = self.kp(feature).float(), self.jacobian(feature).float()
        B, K, H, W = logits.shape
        with exact(image):
            heatmap = torch.softmax(logits.reshape(B, K, H * W) / TEMPERATURE, dim=2)
            grid = coordinate_grid(H, W, heatmap).reshape(H * W, 2)
            value = torch.matmul(heatmap, grid)
            jacobian = torch.matmul(frames.reshape(B, K, 4, H * W), heatmap[..., None])  # average under the same map
        return KeyPoints(value, jacobian.reshape(B, K, 2, 2))
