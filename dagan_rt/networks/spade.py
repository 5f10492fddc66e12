"""The SPADE decoder: every normalisation is modulated by the deformed source (Park et al., 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from dagan_rt.networks.config import NetworkConfig

_COMPRESSED = 4  # channels of the feature that joins the deformed source in the conditioning map


class _Spade(nn.Module):
    """Instance norm whose scale and shift are predicted from the conditioning map, pixel by pixel."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.mlp_shared = nn.Sequential(nn.Conv2d(_COMPRESSED + 3, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.mlp_shared(F.interpolate(condition, size=x.shape[2:], mode="nearest"))
        return F.instance_norm(x, eps=1e-5) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class _SpadeBlock(nn.Module):
    """Residual block of SPADE norms, leaky ReLU and spectrally normalised convolutions."""

    def __init__(self, in_channels: int, out_channels: int, hidden: int) -> None:
        super().__init__()
        middle = min(in_channels, out_channels)
        self.conv_0 = spectral_norm(nn.Conv2d(in_channels, middle, 3, padding=1))
        self.conv_1 = spectral_norm(nn.Conv2d(middle, out_channels, 3, padding=1))
        self.norm_0 = _Spade(in_channels, hidden)
        self.norm_1 = _Spade(middle, hidden)
        self.conv_s: nn.Module | None = None
        if in_channels != out_channels:
            self.conv_s = spectral_norm(nn.Conv2d(in_channels, out_channels, 1, bias=False))
            self.norm_s = _Spade(in_channels, hidden)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        y = self.conv_0(F.leaky_relu(self.norm_0(x, condition), 0.2))
        y = self.conv_1(F.leaky_relu(self.norm_1(y, condition), 0.2))
        return y + (x if self.conv_s is None else self.conv_s(self.norm_s(x, condition)))


class SpadeDecoder(nn.Module):
    """Attended feature and deformed source to an image."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, hidden = config.feature_width, config.spade_hidden
        self.compress = nn.Conv2d(width, _COMPRESSED, 3, padding=1)
        self.fc = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.G_middle_0 = _SpadeBlock(2 * width, 2 * width, hidden)
        self.G_middle_1 = _SpadeBlock(2 * width, 2 * width, hidden)
        self.G_middle_2 = _SpadeBlock(2 * width, 2 * width, hidden)
        self.up_0 = _SpadeBlock(2 * width, width, hidden)
        self.up_1 = _SpadeBlock(width, config.spade_width, hidden)
        self.conv_img = nn.Conv2d(config.spade_width, 3, 3, padding=1)

    def forward(self, feature: Tensor, deformed: Tensor) -> Tensor:
        """`feature` [B, C, h, w], `deformed` [B, 3, H, W] (occlusion-weighted) -> image [B, 3, H, W] in (0, 1)."""
        compressed = F.interpolate(self.compress(feature), size=deformed.shape[2:], mode="nearest")
        condition = torch.cat([compressed, deformed], dim=1)
        x = self.fc(feature)
        for block in (self.G_middle_0, self.G_middle_1, self.G_middle_2):
            x = block(x, condition)
        for block in (self.up_0, self.up_1):
            x = block(F.interpolate(x, scale_factor=2.0, mode="nearest"), condition)
        return torch.sigmoid(self.conv_img(F.leaky_relu(x, 0.2)))
