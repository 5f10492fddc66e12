"""All networks of one variant, under the names that checkpoints give them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.depth import DepthNetwork
from dagan_rt.networks.discriminator import Discriminator
from dagan_rt.networks.generator import Generated, Generator
from dagan_rt.networks.keypoints import KeypointEstimator


class Model(nn.Module):
    """The networks that `config.variant` has; `depth` is None where no part uses it."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.depth = DepthNetwork(config) if config.parts.uses_depth else None
        self.keypoints = KeypointEstimator(config)
        self.generator = Generator(config)
        self.discriminator = Discriminator(config)

    def networks(self) -> dict[str, nn.Module]:
        """The networks by the names of the published files; state dicts match those files key by key."""
        named: dict[str, nn.Module] = {
            "generator": self.generator,
            "kp_detector": self.keypoints,
            "discriminator": self.discriminator,
        }
        if self.depth is not None:
            named |= {"depth_encoder": self.depth.encoder, "depth_decoder": self.depth.decoder}
        return named

    def find_keypoints(self, image: Tensor, depth: Tensor | None = None) -> KeyPoints:
        """Key points of `image` [B, 3, H, W] in [0, 1]; its depth is computed where needed and not given."""
        if not self.config.parts.rgbd_keypoints:
            return self.keypoints(image)
        if depth is None:
            assert self.depth is not None
            depth = self.depth(image)
        return self.keypoints(torch.cat([image, depth], dim=1))

    def forward(self, source: Tensor, driving: Tensor) -> Generated:
        """Self-reenactment with absolute motion: both [B, 3, H, W] in [0, 1]."""
        depth = self.depth(source) if self.depth is not None else None
        return self.generator(source, self.find_keypoints(source, depth), self.find_keypoints(driving), depth)
