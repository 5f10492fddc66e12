"""Pose network: how the face moved between two frames, and the camera that saw it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dagan_rt.networks.config import NetworkConfig
from dagan_rt.training.geometry.synthesis import Camera

SCALE = 0.3
"""What the motion's raw numbers are multiplied by: an untrained network begins near no motion, and the ten degrees that
a head turns between two frames are a number of the size that networks give. (Cameras on cars take 0.01.)"""

FOCAL = 2.0
"""Focal length in picture widths where the raw number is 0: a head and shoulders from two metres."""

PLACES = 4  # across and down, of which the network keeps apart what moved

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
    """Convolutions of stride 2 on two frames at once, down to 4 × 4 places whose features are laid side by side.

    As in unsupervised ego-motion (SfMLearner, Zhou et al. 2017) there is no batch norm. Neither is there an average
    over the picture, for how a face turned shows in what moves where. A ResNet-18 with batch norm, the usual choice
    for cars, takes tens of thousands of steps to find how heads turn.
    """

    def __init__(self, config: NetworkConfig) -> None:
        """Built for pictures of config.size; others are pooled to the same places. Its width is the depth encoder's."""
        super().__init__()
        widths = [6]
        for halvings in range(1, max(1, math.ceil(math.log2(config.size / PLACES))) + 1):
            widths.append(config.depth_width * min(8, 2**halvings))
        self.convolutions = nn.ModuleList(nn.Conv2d(*channels, 3, 2, 1) for channels in pairwise(widths))
        self.gather = nn.Linear(widths[-1] * PLACES**2, 8 * config.depth_width)
        self.head = nn.Linear(8 * config.depth_width, 10)

    def forward(self, target: Tensor, other: Tensor) -> Motion:
        """Both [B, 3, H, W] in [0, 1]."""
        features = (torch.cat([target, other], dim=1) - 0.45) / 0.225
        for convolution in self.convolutions:
            features = F.relu(convolution(features))
        places = F.adaptive_avg_pool2d(features, PLACES).flatten(1)  # [B, C * PLACES²]
        raw = self.head(F.relu(self.gather(places))).float()  # [B, 10]
        rotation, translation, focal, centre = raw.split((3, 3, 2, 2), dim=1)
        # softplus(log(e - 1)) = 1: at raw 0 the focal length is FOCAL.
        focal = FOCAL * F.softplus(focal + 0.541324855)
        return Motion(SCALE * rotation, SCALE * translation, Camera(focal, 0.5 + CENTRE * torch.tanh(centre)))
