"""The small blocks of Figure 1 of the supplementary: convolutions, down- and up-sampling, hourglass, anti-alias filter.

Attribute names (`conv`, `norm1`, `down_blocks`, …) are those of the published state dicts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """Convolution that keeps the size, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H, W]
        return F.relu(self.norm(self.conv(x)))


class DownBlock(ConvBlock):
    """`ConvBlock`, then 2 × 2 average pooling (Figure 1d)."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H/2, W/2]
        return F.avg_pool2d(super().forward(x), 2)


class UpBlock(ConvBlock):
    """Nearest ×2 upsampling, then `ConvBlock` (Figure 1d)."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', 2H, 2W]
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResidualBlock(nn.Module):
    """Pre-activation residual block: twice (batch norm, ReLU, 3 × 3 convolution), plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class _HourglassEncoder(nn.Module):
    def __init__(self, in_channels: int, widths: list[int]) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(
            DownBlock(before, after) for before, after in zip([in_channels, *widths[:-1]], widths, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [x]
        for block in self.down_blocks:
            levels.append(block(levels[-1]))
        return levels  # full resolution first


class _HourglassDecoder(nn.Module):
    def __init__(self, widths: list[int], out_channels: int) -> None:
        super().__init__()
        coarse_to_fine = widths[::-1]
        # Every block but the first also receives the skip of its level, which has as many channels as its own input.
        inputs = [coarse_to_fine[0], *(2 * width for width in coarse_to_fine[1:])]
        self.up_blocks = nn.ModuleList(
            UpBlock(before, after) for before, after in zip(inputs, [*coarse_to_fine[1:], out_channels], strict=True)
        )

    def forward(self, levels: list[Tensor]) -> Tensor:
        x = levels[-1]
        for block, skip in zip(self.up_blocks, reversed(levels[:-1]), strict=True):
            x = torch.cat([block(x), skip], dim=1)
        return x


class Hourglass(nn.Module):
    """U-Net of `blocks` levels; the output concatenates the input: `out_channels` = width + in_channels."""

    def __init__(self, in_channels: int, width: int, max_width: int, blocks: int) -> None:
        super().__init__()
        widths = [min(max_width, width * 2 ** (level + 1)) for level in range(blocks)]
        self.encoder = _HourglassEncoder(in_channels, widths)
        self.decoder = _HourglassDecoder(widths, min(max_width, width))
        self.out_channels = min(max_width, width) + in_channels

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, out_channels, H, W]
        return self.decoder(self.encoder(x))


class AntiAliasDownsample(nn.Module):
    """Gaussian blur, then every n-th pixel, n = 1 / scale; the blur's σ is (n - 1) / 2 pixels."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.step = round(1 / scale)
        sigma = (self.step - 1) / 2
        radius = round(4 * sigma)
        with torch.device("cpu"):  # on "meta", arithmetic imports PyTorch's compiler, which takes more than a second
            offsets = torch.tensor(range(-radius, radius + 1), dtype=torch.float32)
            taps = torch.exp(-(offsets**2) / (2 * sigma**2)) if sigma else torch.ones(1)
            kernel = torch.outer(taps, taps)
            kernel = kernel / kernel.sum()
        weight = kernel.expand(channels, 1, -1, -1).clone().to(torch.get_default_device())
        # Part of the published state dict where there is a filter at all; never trained.
        self.register_buffer("weight", weight, persistent=self.step > 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H/n, W/n]
        if self.step == 1:
            return x
        weight = self.get_buffer("weight")
        return F.conv2d(x, weight, stride=self.step, padding=weight.shape[-1] // 2, groups=x.shape[1])
