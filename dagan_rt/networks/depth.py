"""Face depth network F_d: ResNet encoder, decoder with skips, sigmoid maps at four scales (Figure 1a)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dagan_rt.networks.config import NetworkConfig

_LAYERS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + self.downsample(x))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class _ResNet(nn.Module):
    """ResNet without its classifier (He et al., 2016), with every stage's output kept."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        block = _BasicBlock if layers == 18 else _Bottleneck
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.widths = [width]
        for index, count in enumerate(_LAYERS[layers]):
            blocks = []
            for position in range(count):
                before = self.widths[-1] if position == 0 else width * 2**index * block.expansion
                blocks.append(block(before, width * 2**index, stride=2 if index and position == 0 else 1))
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            self.widths.append(width * 2**index * block.expansion)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [F.relu(self.bn1(self.conv1(x)))]
        x = F.max_pool2d(features[0], 3, 2, 1)
        for index in range(4):
            x = self.get_submodule(f"layer{index + 1}")(x)
            features.append(x)
        return features


class DepthEncoder(nn.Module):
    """ResNet-18 or -50 on the normalised image."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.encoder = _ResNet(layers, width)

    def forward(self, image: Tensor) -> list[Tensor]:
        """`image` [B, 3, H, W] in [0, 1] -> five features, [B, C_i, H/2^(i+1), W/2^(i+1)]."""
        return self.encoder((image - 0.45) / 0.225)


class _ReflectConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        # Reflection needs two pixels; the coarsest map of a small image has one, which reflects to itself.
        mode = "reflect" if min(x.shape[-2:]) > 1 else "replicate"
        return self.conv(F.pad(x, (1, 1, 1, 1), mode=mode))


class _DecoderConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _ReflectConv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.conv(x))


class DepthDecoder(nn.Module):
    """Five upsampling stages with skips; `decoder` holds their convolutions coarse to fine, then four heads."""

    def __init__(self, encoder_widths: list[int], widths: tuple[int, ...]) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        before = encoder_widths[-1]
        for stage in reversed(range(5)):
            skip = encoder_widths[stage - 1] if stage else 0
            modules.append(_DecoderConv(before, widths[stage]))
            modules.append(_DecoderConv(widths[stage] + skip, widths[stage]))
            before = widths[stage]
        modules += [_ReflectConv(widths[scale], 1) for scale in range(4)]
        self.decoder = nn.ModuleList(modules)

    def features(self, encoded: list[Tensor]) -> list[Tensor]:
        """Decoder features of the four finest stages, finest first."""
        x, kept = encoded[-1], []
        for index, stage in enumerate(reversed(range(5))):
            x = F.interpolate(self.decoder[2 * index](x), scale_factor=2.0, mode="nearest")
            if stage:
                x = torch.cat([x, encoded[stage - 1]], dim=1)
            x = self.decoder[2 * index + 1](x)
            kept.append(x)
        return kept[:0:-1]

    def forward(self, encoded: list[Tensor]) -> Tensor:
        """The finest map, [B, 1, H, W] in (0, 1)."""
        return torch.sigmoid(self.decoder[10](self.features(encoded)[0]))

    def scales(self, encoded: list[Tensor]) -> list[Tensor]:
        """All four maps in (0, 1), finest first: [B, 1, H/2^s, W/2^s]."""
        return [torch.sigmoid(self.decoder[10 + scale](x)) for scale, x in enumerate(self.features(encoded))]


class DepthNetwork(nn.Module):
    """The face depth network; its two halves are stored as `encoder.pth` and `depth.pth`."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.encoder = DepthEncoder(config.depth_layers, config.depth_width)
        self.decoder = DepthDecoder(self.encoder.encoder.widths, config.depth_decoder_widths)

    def forward(self, image: Tensor) -> Tensor:
        """`image` [B, 3, H, W] in [0, 1] -> depth [B, 1, H, W] in (0, 1), near is large."""
        return self.decoder(self.encoder(image))

    def scales(self, image: Tensor) -> list[Tensor]:
        """Four maps, finest first, for training: [B, 1, H/2^s, W/2^s] in (0, 1)."""
        return self.decoder.scales(self.encoder(image))
