"""Discriminator D at one scale, conditioned on the driving key points (Figure 1h)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.geometry import gaussian_heatmaps


class _DiscriminatorBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm: bool, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4)
        self.norm = nn.InstanceNorm2d(out_channels, affine=True) if norm else nn.Identity()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.conv(x)), 0.2)
        return F.avg_pool2d(x, 2) if self.pool else x


class _ScaleDiscriminator(nn.Module):
    def __init__(self, in_channels: int, widths: list[int]) -> None:
        super().__init__()
        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            _DiscriminatorBlock(before, after, norm=index > 0, pool=index < last)
            for index, (before, after) in enumerate(zip([in_channels, *widths[:-1]], widths, strict=True))
        )
        self.conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        features = []
        for block in self.down_blocks:
            x = block(x)
            features.append(x)
        return features, self.conv(x)


class Discriminator(nn.Module):
    """Judges an image together with the heat maps of the key points it should show."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        widths = [
            min(config.discriminator_max, config.discriminator_width * 2 ** (i + 1))
            for i in range(config.discriminator_blocks)
        ]
        # The published layout names discriminators by the scale of their input; there is one, at scale 1.
        self.discs = nn.ModuleDict({"1": _ScaleDiscriminator(3 + config.num_keypoints, widths)})

    def forward(self, image: Tensor, keypoints: KeyPoints) -> tuple[list[Tensor], Tensor]:
        """`image` [B, 3, H, W] in [0, 1] -> features of each block, and the map of scores [B, 1, h, w]."""
        heatmaps = gaussian_heatmaps(keypoints.value, *image.shape[2:])
        return self.discs["1"](torch.cat([image, heatmaps], dim=1))
