"""Generator: encode the source, warp its feature by the flow, attend over it with depth, decode (Figures 1e–1g)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.attention import CrossModalAttention
from dagan_rt.networks.blocks import ConvBlock, DownBlock, ResidualBlock, UpBlock
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.geometry import resize_flow, resize_map, sample
from dagan_rt.networks.motion import Motion, MotionEstimator
from dagan_rt.networks.spade import SpadeDecoder


class Generated(NamedTuple):
    """The generated image and what led to it."""

    prediction: Tensor  # [B, 3, H, W] in (0, 1)
    motion: Motion
    warped_feature: Tensor  # [B, C, H/4, W/4], warped and occlusion-weighted
    attended_feature: Tensor  # [B, C, H/4, W/4]; the warped feature itself in variants without attention
    deformed: Tensor  # [B, 3, H, W], the source warped by the flow


def warp(feature: Tensor, flow: Tensor, occlusion: Tensor) -> Tensor:
    """`feature` [B, C, H, W] sampled at `flow` and weighted by `occlusion`, both resized if sizes differ."""
    H, W = feature.shape[2:]
    return sample(feature, resize_flow(flow, H, W)) * resize_map(occlusion, H, W)


class Generator(nn.Module):
    """All that is stored under `generator` in a checkpoint, the motion estimator included."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.warp: Callable[[Tensor, Tensor, Tensor], Tensor] = warp  # another implementation may take its place
        widths = [min(config.generator_max, config.generator_width * 2**i) for i in range(config.down_blocks + 1)]
        downs = list(zip(widths[:-1], widths[1:], strict=True))
        self.dense_motion_network = MotionEstimator(config)
        self.first = ConvBlock(3, widths[0], kernel=7)
        self.down_blocks = nn.ModuleList(DownBlock(before, after) for before, after in downs)
        if config.parts.attention == "depth":
            self.src_first = ConvBlock(1, widths[0], kernel=7)
            self.src_down_blocks = nn.ModuleList(DownBlock(before, after) for before, after in downs)
        if config.parts.attention:
            self.AttnModule = CrossModalAttention(widths[-1], config.query_width)
        if config.parts.decoder == "spade":
            self.decoder = SpadeDecoder(config)
        else:
            self.bottleneck = nn.Sequential(
                OrderedDict((f"r{i}", ResidualBlock(widths[-1])) for i in range(config.residual_blocks))
            )
            self.up_blocks = nn.ModuleList(UpBlock(after, before) for before, after in reversed(downs))
            self.final = nn.Conv2d(widths[0], 3, 7, padding=3)

    def encode_image(self, image: Tensor) -> Tensor:
        """Feature encoder E_I: `image` [B, 3, H, W] in [0, 1] -> [B, C, H/4, W/4]."""
        x = self.first(image)
        for block in self.down_blocks:
            x = block(x)
        return x

    def encode_depth(self, depth: Tensor) -> Tensor:
        """Depth encoder E_d: `depth` [B, 1, H, W] in (0, 1) -> [B, C, H/4, W/4]."""
        x = self.src_first(depth)
        for block in self.src_down_blocks:
            x = block(x)
        return x

    def query(self, depth: Tensor) -> Tensor:
        """What the source's depth asks of the warped feature: [B, 1, H, W] -> [B, D, H/4, W/4]."""
        return self.AttnModule.query(self.encode_depth(depth))

    def thumbnail(self, image: Tensor) -> Tensor:
        """The shrunken source the motion estimator works on: [B, 3, H, W] -> [B, 3, h, w]."""
        return self.dense_motion_network.down(image)

    def attend(self, warped: Tensor, query: Tensor | None) -> Tensor:
        """Attention over the warped feature; `query` is used by the depth-aware variants only."""
        attention = self.config.parts.attention
        if attention is None:
            return warped
        if attention == "self":
            query = self.AttnModule.query(warped)
        return self.AttnModule(query, warped)

    def decode(self, feature: Tensor, deformed: Tensor | None = None) -> Tensor:
        """[B, C, H/4, W/4] -> image [B, 3, H, W] in (0, 1).

        `deformed`, the occlusion-weighted warped source [B, 3, H, W], is needed by the SPADE decoder only.
        """
        if self.config.parts.decoder == "spade":
            return self.decoder(feature, deformed)
        x = self.bottleneck(feature)
        for block in self.up_blocks:
            x = block(x)
        return torch.sigmoid(self.final(x))

    def forward(self, image: Tensor, source: KeyPoints, driving: KeyPoints, depth: Tensor | None = None) -> Generated:
        """Move the face in `image` [B, 3, H, W] from `source` key points to `driving` ones.

        `depth` [B, 1, H, W] of the image is needed where the variant's attention is depth-aware.
        """
        motion = self.dense_motion_network(self.thumbnail(image), source, driving)
        feature = self.encode_image(image)
        depth_aware = self.config.parts.attention == "depth"
        query = self.query(depth) if depth_aware and depth is not None else None
        return self.render(image, feature, query, motion)

    def render(self, image: Tensor, feature: Tensor, query: Tensor | None, motion: Motion) -> Generated:
        """A frame of the source `image` [B, 3, H, W], whose feature and query (`attend` says who has one) are known."""
        H, W = image.shape[2:]
        warped = self.warp(feature, motion.flow, motion.occlusion)
        attended = self.attend(warped, query)
        deformed = sample(image, resize_flow(motion.flow, H, W))
        prediction = self.decode(attended, deformed * resize_map(motion.occlusion, H, W))
        return Generated(prediction, motion, warped, attended, deformed)
