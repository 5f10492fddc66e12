"""A driving frame from uint8 to uint8 as launches on fixed memory, for any mixture of sources."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dagan_rt import kernels
from dagan_rt.fused.networks import Attention, Decoder, Depth, Keypoints, Motion
from dagan_rt.fused.tools import Tools
from dagan_rt.kernels.gather import MOST as MOST_POOLS
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.model import Model


class Driving:
    """Key points of driving frames: the part of a frame that the source has no share in."""

    def __init__(self, tools: Tools, model: Model, most: int, pixels: Tensor | None = None) -> None:
        """`pixels`: uint8 [most, H, W, 3] on the device, where the frames will be; None makes it."""
        self._tools, side = tools, model.config.size
        self._rgbd = model.config.parts.rgbd_keypoints
        self.pixels = tools.images(most, side) if pixels is None else pixels
        self._features = tools.maps(most, 8, side, side)
        self._depth = None
        if self._rgbd:
            assert model.depth is not None
            self._depth = Depth(tools, model.depth, most, side)
        self._keypoints = Keypoints(tools, model.keypoints, most, side)

    def steps(self, B: int) -> dict[str, Callable[[], object]]:
        """The launches for the first `B` of `pixels`, in groups by name, in order."""
        features = self._features[:B]
        found: dict[str, Callable[[], object]] = {
            "image": lambda: kernels.image_to_features(
                self.pixels[:B], dtype=self._tools.dtype, out=features, reference=self._tools.reference
            )
        }
        depth = self._depth
        if depth is not None:
            found["depth"] = lambda: depth(features)
        found["keypoints"] = lambda: self._keypoints(features, None if depth is None else depth.output(B))
        return found

    def output(self, B: int) -> tuple[Tensor, Tensor]:
        """Positions [B, K, 2] and frames [B, K, 2, 2] of the last call, float32."""
        return self._keypoints.value[:B], self._keypoints.jacobian[:B]

    def __call__(self, B: int) -> tuple[Tensor, Tensor]:
        for step in self.steps(B).values():
            step()
        return self.output(B)


class Frame:
    """Everything of a driving frame: `pixels` and `chosen` in, `result` out."""

    def __init__(
        self,
        tools: Tools,
        model: Model,
        slots: int,
        most: int,
        *,
        pixels: Tensor | None = None,
        chosen: Tensor | None = None,
        result: Tensor | None = None,
    ) -> None:
        """`slots`: how many sources it keeps. `most`: the largest batch.

        pixels, result: uint8 [most, H, W, 3]; chosen: int32 [most]; memory on the device, each made where not given.
        """
        config, generator = model.config, model.generator
        self.config, self._tools, self._generator = config, tools, generator
        side, coarse = config.size, config.size >> config.down_blocks
        small = round(side * config.motion_scale)
        before = tools.bytes
        self.pools = pools(tools, config, slots)
        self.slot_bytes = (tools.bytes - before) // slots
        # One source in one slot is the batch itself; else a launch gathers the chosen rows.
        self._gathers = slots > 1 or most > 1
        self._rows = pools(tools, config, most) if self._gathers else self.pools
        self.chosen = torch.zeros(most, dtype=torch.int32, device=tools.device) if chosen is None else chosen
        self.driving = Driving(tools, model, most, pixels)
        self.pixels = self.driving.pixels
        self.result = tools.images(most, side) if result is None else result
        self._motion = Motion(tools, generator.dense_motion_network, most, small)
        self._warped = tools.maps(most, config.feature_width, coarse, coarse)
        kind = config.parts.attention
        self._attention = None
        if kind is not None:
            self._attention = Attention(tools, generator.AttnModule, kind == "self", most, coarse)
        self._spade = config.parts.decoder == "spade"
        if not self._spade:
            self._decoder = Decoder(tools, generator, most, coarse)

    def steps(self, B: int) -> dict[str, Callable[[], object]]:
        """The launches for the first `B` of `pixels`, in groups by name, in order; they read what the former wrote."""
        rows = {name: row[:B] for name, row in self._rows.items()}
        reference = self._tools.reference
        source, initial = ((rows[f"{it}_value"], rows[f"{it}_jacobian"]) for it in ("source", "initial"))
        flow, occlusion, warped = self._motion.flow[:B], self._motion.occlusion[:B], self._warped[:B]
        found: dict[str, Callable[[], object]] = {}
        if self._gathers:
            found["gather"] = lambda: self._gather(B)
        found |= self.driving.steps(B)
        found["motion"] = lambda: self._motion(
            rows["thumbnail"], source, self.driving.output(B), initial, rows["scale"]
        )
        found["warp"] = lambda: kernels.flow_warp(rows["feature"], flow, occlusion, out=warped, reference=reference)
        attended, attention = warped, self._attention
        if attention is not None:
            attended = attention.output(B)
            found["attention"] = lambda: attention(warped, rows.get("query"))
        if self._spade:
            found["decoder"] = lambda: self._paint_spade(attended, rows["source_image"], flow, occlusion)
            return found
        decoder = self._decoder
        found["residual blocks"] = lambda: decoder.residual(attended)
        found["upsampling"] = lambda: decoder.upsample(decoder.feature(attended))
        found["final"] = lambda: decoder.paint(B, self.result[:B].permute(0, 3, 1, 2))
        return found

    def __call__(self, B: int) -> Tensor:
        """Run the first `B` faces; `result` [B, H, W, 3] holds what they become."""
        for step in self.steps(B).values():
            step()
        return self.result[:B]

    def _gather(self, B: int) -> None:
        """The chosen rows of the pools, some pools at a launch."""
        pools, rows = list(self.pools.values()), [row[:B] for row in self._rows.values()]
        for at in range(0, len(pools), MOST_POOLS):
            part = slice(at, at + MOST_POOLS)
            kernels.gather(pools[part], self.chosen[:B], rows[part], reference=self._tools.reference)

    def _paint_spade(self, attended: Tensor, image: Tensor, flow: Tensor, occlusion: Tensor) -> None:
        """The SPADE decoder has no fused form: the module itself, in the frame's dtype."""
        deformed = kernels.flow_warp(image, flow, occlusion, reference=self._tools.reference)
        module = self._tools.kept("spade", self._spade_module)
        planes = module(attended, deformed)
        kernels.planes_to_image(planes, out=self.result[: len(planes)], reference=self._tools.reference)

    def _spade_module(self) -> torch.nn.Module:
        made: Any = copy.deepcopy(self._generator.decoder).to(self._tools.device, getattr(torch, self._tools.dtype))
        return made.to(memory_format=torch.channels_last).eval()


def pools(tools: Tools, config: NetworkConfig, count: int) -> dict[str, Tensor]:
    """Zeros for what `count` slots keep, [count, ...] each; only what the variant has."""
    side, coarse, points = config.size, config.size >> config.down_blocks, config.num_keypoints
    small = round(side * config.motion_scale)
    found = {
        "feature": tools.maps(count, config.feature_width, coarse, coarse),
        "thumbnail": tools.maps(count, 3, small, small),
        "scale": tools.numbers(count, 1),
    }
    for role in ("source", "initial"):
        found[f"{role}_value"] = tools.numbers(count, points, 2)
        found[f"{role}_jacobian"] = tools.numbers(count, points, 2, 2)
    if config.parts.attention == "depth":
        found["query"] = tools.maps(count, config.query_width, coarse, coarse)
    if config.parts.decoder == "spade":
        found["source_image"] = tools.maps(count, 3, side, side)
    return found
