"""Pose network: how the face moved between two frames, and the camera that saw it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.depth import ResNet
from dagan_rt.training.geometry.synthesis import Camera

SCALE = 0.3
"""What the motion's raw numbers are multiplied by: an untrained network begins near no motion, and the ten degrees that
a head turns between two frames are a number of the size that networks give. (Cameras on cars take 0.01.)"""

FOCAL = 2.0
"""Focal length in picture widths where the raw number is 0: a head and shoulders from two metres."""

CENTRE = 0.1  # the principal point stays this near to the middle, in widths and heights


@dataclass(frozen=True)
class Motion:
    """From the target frame to the other one.

    rotation [B, 3]: axis times angle, radians. translation [B, 3] (right, down, ahead), in units
    of the depth of the point that rotation is about.
    camera: of both frames.
    """

    rotation: Tensor
    translation: Tensor
    camera: Camera


class PoseNetwork(nn.Module):
    """A ResNet-18 on two frames at once, then a small head; its width is that of the depth network's encoder."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.encoder = ResNet(18, config.depth_width, in_channels=6)
        width = self.encoder.widths[-1]
        self.squeeze = nn.Conv2d(width, width // 2, 1)
        self.mix = nn.Conv2d(width // 2, width // 2, 3, 1, 1)
        self.head = nn.Conv2d(width // 2, 10, 1)

    def forward(self, target: Tensor, other: Tensor) -> Motion:
        """Both [B, 3, H, W] in [0, 1]."""
        features = self.encoder((torch.cat([target, other], dim=1) - 0.45) / 0.225)[-1]
        features = F.relu(self.mix(F.relu(self.squeeze(features))))
        raw = self.head(features).mean((2, 3)).float()  # [B, 10]
        rotation, translation, focal, centre = raw.split((3, 3, 2, 2), dim=1)
        # softplus(log(e - 1)) = 1: at raw 0 the focal length is FOCAL.
        focal = FOCAL * F.softplus(focal + 0.541324855)
        return Motion(SCALE * rotation, SCALE * translation, Camera(focal, 0.5 + CENTRE * torch.tanh(centre)))
