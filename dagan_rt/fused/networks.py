"""Depth, key points, motion and decoder as launches on fixed maps: `dagan_rt.networks`, step by step.

A concatenation is a map whose parts are written by whoever makes them; a skip connection is a part written early.
Every network is made for a largest batch and runs on the first `B` faces of its maps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dagan_rt import kernels
from dagan_rt.fused.tools import Tools, affine, padded
from dagan_rt.networks import blocks
from dagan_rt.networks.attention import CrossModalAttention
from dagan_rt.networks.depth import DepthNetwork
from dagan_rt.networks.generator import Generator
from dagan_rt.networks.keypoints import TEMPERATURE, KeypointEstimator
from dagan_rt.networks.motion import MotionEstimator


class Hourglass:
    """U-Net: the map of each level is [what comes up | what goes down]; `input` and `output` are those of level 0."""

    def __init__(self, tools: Tools, name: str, net: blocks.Hourglass, most: int, side: int, channels: int) -> None:
        downs: Any = net.encoder.down_blocks
        ups: Any = net.decoder.up_blocks
        into = [channels, *(block.conv.out_channels for block in downs)]
        out = [block.conv.out_channels for block in ups][::-1]  # finest first
        self._downs = [
            tools.convolution(f"{name}.down{i}", block.conv, block.norm, activation="relu", pool=True)
            for i, block in enumerate(downs)
        ]
        self._ups = [
            tools.convolution(
                f"{name}.up{level}",
                block.conv,
                block.norm,
                parts=(into[-1],) if level + 1 == len(downs) else (out[level + 1], into[level + 1]),
                activation="relu",
                upsample=True,
            )
            for level, block in reversed(list(enumerate(reversed(ups))))
        ]  # coarsest first
        self._maps = [
            tools.maps(most, padded(out[level]) + padded(into[level]), side >> level, side >> level)
            for level in range(len(downs))
        ]
        self._from = [padded(width) for width in out]
        self._coarsest = tools.maps(most, padded(into[-1]), side >> len(downs), side >> len(downs))
        self.parts = (out[0], channels)  # of `output`

    def input(self, B: int) -> Tensor:
        """Where its input is to be written: [B, padded channels, side, side]."""
        return self._maps[0][:B, self._from[0] :]

    def output(self, B: int) -> Tensor:
        """[B, both parts padded, side, side]."""
        return self._maps[0][:B]

    def __call__(self, B: int) -> Tensor:
        depth = len(self._downs)
        for level, down in enumerate(self._downs):
            last = level + 1 == depth
            target = self._coarsest[:B] if last else self._maps[level + 1][:B, self._from[level + 1] :]
            down(self._maps[level][:B, self._from[level] :], out=target)
        x = self._coarsest[:B]
        for level, up in zip(reversed(range(depth)), self._ups, strict=True):
            up(x, out=self._maps[level][:B])
            x = self._maps[level][:B]
        return x


class Depth:
    """ResNet and decoder; reads the eight-channel features of an image, whose fourth channel is 1."""

    def __init__(self, tools: Tools, net: DepthNetwork, most: int, side: int) -> None:
        resnet: Any = net.encoder.encoder
        decoder: Any = net.decoder.decoder
        self._most, self._tools = most, tools
        self._stem = tools.convolution(
            "depth.stem", resnet.conv1, resnet.bn1, change=_with_normalisation, activation="relu"
        )
        self._pooled = tools.maps(most, padded(resnet.widths[0]), side // 4, side // 4)
        widths = [decoder[2 * index].conv.conv.out_channels for index in range(5)]  # coarsest first
        skips = [*resnet.widths[3::-1], 0]  # of the stage whose map is (side / 16, …, side)
        # The map of a decoder stage: [what was upsampled | the encoder's feature].
        self._maps = [
            tools.maps(most, padded(width) + padded(skip), side >> (4 - index), side >> (4 - index))
            for index, (width, skip) in enumerate(zip(widths, skips, strict=True))
        ]
        self._widths = widths
        targets = [self._skip(stage) for stage in (2, 1, 0)]  # of layer1, layer2, layer3
        self._blocks, x = [], self._pooled
        for index in range(4):
            layer = resnet.get_submodule(f"layer{index + 1}")
            for position, block in enumerate(layer):
                last = position + 1 == len(layer)
                target = targets[index] if last and index < 3 else None
                self._blocks.append(_Residual(tools, f"depth.layer{index}.{position}", block, x, target))
                x = self._blocks[-1].output
        self._coarsest = x
        elu: dict[str, Any] = {"activation": "elu", "pad_mode": "reflect", "padding": 1}
        before, self._decoder = resnet.widths[-1], []
        for index in range(5):
            up = tools.convolution(
                f"depth.up{index}", decoder[2 * index].conv.conv, parts=(before,), repeat=True, **elu
            )
            parts = (widths[index], skips[index]) if skips[index] else (widths[index],)
            join = tools.convolution(f"depth.join{index}", decoder[2 * index + 1].conv.conv, parts=parts, **elu)
            wide = self._maps[index].shape[2]
            self._decoder.append((up, join, tools.maps(most, padded(widths[index]), wide, wide)))
            before = widths[index]
        self._head = tools.convolution(
            "depth.head", decoder[10].conv, activation="sigmoid", pad_mode="reflect", padding=1
        )
        self._depth = tools.maps(most, 1, side, side)

    def _skip(self, index: int) -> Tensor:
        return self._maps[index][:, padded(self._widths[index]) :]

    def __call__(self, features: Tensor) -> Tensor:
        """`features` [B, 8, H, W] as `kernels.image_to_features` gives them -> depth [B, 1, H, W] in (0, 1)."""
        B = len(features)
        stem = self._skip(3)[:B]
        self._stem(features, out=stem)
        kernels.max_pool(stem, out=self._pooled[:B], reference=self._tools.reference)
        for block in self._blocks:
            block(B)
        x = self._coarsest[:B]
        for index, (up, join, joined) in enumerate(self._decoder):
            up(x, out=self._maps[index][:B])
            x = join(self._maps[index][:B], out=joined[:B])
        return self._head(x, out=self.output(B))

    def output(self, B: int) -> Tensor:
        """The depth [B, 1, H, W] of the last call."""
        return self._depth[:B]


def _with_normalisation(weight: Tensor) -> Tensor:
    """A convolution of (x - 0.45) / 0.225 as one of x and of a channel that is 1 inside the image and 0 outside."""
    inside = -(0.45 / 0.225) * weight.sum(dim=1, keepdim=True)
    return torch.cat([weight / 0.225, inside], dim=1)


class _Residual:
    """A block of the ResNet; its output is `output`, a map of its own where no `target` is given."""

    def __init__(self, tools: Tools, name: str, block: Any, x: Tensor, target: Tensor | None) -> None:
        self._x = x
        convs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if hasattr(block, "conv3"):
            convs.append((block.conv3, block.bn3))
        self._convs = [
            tools.convolution(f"{name}.{index}", conv, norm, activation="relu")
            for index, (conv, norm) in enumerate(convs)
        ]
        self._shortcut = None
        if isinstance(block.downsample, nn.Sequential):
            self._shortcut = tools.convolution(f"{name}.shortcut", block.downsample[0], block.downsample[1])
        self._maps, height = [], x.shape[2]
        for conv, _ in convs:
            height //= int(conv.stride[0])
            self._maps.append(tools.maps(len(x), padded(conv.out_channels), height, height))
        if target is not None:
            self._maps[-1] = target
        self._short = tools.maps(len(x), padded(convs[-1][0].out_channels), height, height) if self._shortcut else x
        self.output = self._maps[-1]

    def __call__(self, B: int) -> None:
        if self._shortcut is not None:
            self._shortcut(self._x[:B], out=self._short[:B])
        x = self._x[:B]
        for conv, out in zip(self._convs[:-1], self._maps[:-1], strict=True):
            x = conv(x, out=out[:B])
        self._convs[-1](x, out=self.output[:B], residual=self._short[:B])


class Keypoints:
    """Anti-aliased thumbnail, hourglass, both heads as one convolution, soft arg-max."""

    def __init__(self, tools: Tools, net: KeypointEstimator, most: int, side: int) -> None:
        self._tools, small = tools, side // net.down.step
        channels = net.down.get_buffer("weight").shape[0]
        self._rgbd = channels == 4
        self._taps = tools.kept("keypoints.taps", lambda: tools.vector(net.down.get_buffer("weight")[0, 0]))
        self._step = net.down.step
        self._hourglass = Hourglass(tools, "keypoints", net.predictor, most, small, channels)
        self._heads = tools.convolution(
            "keypoints.heads", (net.kp, net.jacobian), parts=self._hourglass.parts, padding=0
        )
        self._count = net.kp.out_channels
        self._logits = tools.maps(most, 5 * self._count, small - 6, small - 6, "float32")
        self.value = tools.numbers(most, self._count, 2)
        self.jacobian = tools.numbers(most, self._count, 2, 2)

    def __call__(self, features: Tensor, depth: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features [B, 8, H, W] and depth [B, 1, H, W] -> positions [B, K, 2] and frames [B, K, 2, 2], float32."""
        B, reference = len(features), self._tools.reference
        kernels.antialias(
            features, depth if self._rgbd else None, self._taps, step=self._step, out=self._hourglass.input(B),
            reference=reference,
        )  # fmt: skip
        logits = self._heads(self._hourglass(B), out=self._logits[:B])
        return kernels.soft_keypoints(
            logits, temperature=TEMPERATURE, out=(self.value[:B], self.jacobian[:B]), reference=reference
        )


class Motion:
    """Key points' motions blended into flow and occlusion."""

    def __init__(self, tools: Tools, net: MotionEstimator, most: int, side: int) -> None:
        self._tools, points = tools, net.mask.out_channels
        self._moved = (tools.numbers(most, points - 1, 2), tools.numbers(most, points - 1, 2, 2))
        self._stacked = tools.maps(most, 4 * points, side, side)
        self._hourglass = Hourglass(tools, "motion", net.hourglass, most, side, 4 * points)
        self._heads = tools.convolution("motion.heads", (net.mask, net.occlusion), parts=self._hourglass.parts)
        self._points = points
        self._logits = tools.maps(most, points + 1, side, side, "float32")
        self.flow, self.occlusion = tools.numbers(most, side, side, 2), tools.numbers(most, 1, side, side)

    def __call__(
        self, thumbnail: Tensor, source: tuple[Tensor, Tensor], driving: tuple[Tensor, Tensor],
        initial: tuple[Tensor, Tensor], scale: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`thumbnail` [B, 3, h, w], key points, `scale` [B, 1] -> flow [B, h, w, 2] and occlusion [B, 1, h, w]."""
        B, reference = len(thumbnail), self._tools.reference
        moved = (self._moved[0][:B], self._moved[1][:B])
        kernels.transfer(*source, *driving, *initial, scale, out=moved, reference=reference)
        stacked = self._stacked[:B]
        kernels.sparse_motion(thumbnail, *source, *moved, out=stacked, reference=reference)
        self._hourglass.input(B)[:, : stacked.shape[1]].copy_(stacked)
        logits = self._heads(self._hourglass(B), out=self._logits[:B])
        mask, occlusion = logits[:, : self._points], logits[:, self._points :]
        out = (self.flow[:B], self.occlusion[:B])
        return kernels.dense_flow(mask, occlusion, *source, *moved, out=out, reference=reference)


class Attention:
    """Keys and values of the warped feature; the query is the source's, or with self-attention the feature's own."""

    def __init__(self, tools: Tools, net: CrossModalAttention, own_query: bool, most: int, side: int) -> None:
        self._tools = tools
        named = {"key": net.key_conv, "value": net.value_conv} | ({"query": net.query_conv} if own_query else {})
        self._convs = {
            name: tools.convolution(f"attention.{name}", conv, activation="relu") for name, conv in named.items()
        }
        self._maps = {name: tools.maps(most, conv.out_channels, side, side) for name, conv in named.items()}
        self._gamma = tools.kept("attention.gamma", lambda: tools.vector(net.gamma))
        self._attended = tools.maps(most, net.value_conv.out_channels, side, side)

    def output(self, B: int) -> Tensor:
        """The attended feature of the last call."""
        return self._attended[:B]

    def __call__(self, warped: Tensor, query: Tensor | None) -> Tensor:
        """`warped` [B, C, h, w], `query` [B, D, h, w] unless it has its own -> [B, C, h, w]."""
        B = len(warped)
        found = {name: conv(warped, out=self._maps[name][:B]) for name, conv in self._convs.items()}
        asking = found.get("query", query)
        return kernels.cross_attention(
            asking, found["key"], found["value"], warped, self._gamma, out=self.output(B),
            reference=self._tools.reference,
        )  # fmt: skip


class Decoder:
    """Residual blocks, upsampling blocks, the image: [B, C, h, w] -> uint8."""

    def __init__(self, tools: Tools, net: Generator, most: int, side: int) -> None:
        self._tools = tools
        residuals: list[Any] = list(net.bottleneck)
        ups: Any = net.up_blocks
        C = net.config.feature_width
        self._norms = [
            tools.kept(f"decoder.norm{i}", lambda it=it: tuple(map(tools.vector, affine(it.norm1))))  # type: ignore[misc]
            for i, it in enumerate(residuals)
        ]
        self._pairs = [
            (
                tools.convolution(f"decoder.r{i}.conv1", it.conv1, it.norm2, activation="relu"),
                tools.convolution(f"decoder.r{i}.conv2", it.conv2),
            )
            for i, it in enumerate(residuals)
        ]
        self._feature = [tools.maps(most, C, side, side) for _ in range(2)]  # written in turn
        self._active, self._between = tools.maps(most, C, side, side), tools.maps(most, C, side, side)
        self._ups, self._maps = [], []
        for index, block in enumerate(ups):
            side *= 2
            self._ups.append(
                tools.convolution(f"decoder.up{index}", block.conv, block.norm, activation="relu", upsample=True)
            )
            self._maps.append(tools.maps(most, padded(block.conv.out_channels), side, side))
        self._final = tools.convolution("decoder.final", net.final, activation="sigmoid")

    def residual(self, x: Tensor) -> Tensor:
        """The residual blocks; `x` is left as it is."""
        B = len(x)
        active, between = self._active[:B], self._between[:B]
        if self._norms:
            kernels.normalize_relu(x, *self._norms[0], out=active, reference=self._tools.reference)
        for index, (first, second) in enumerate(self._pairs):
            first(active, out=between)
            last = index + 1 == len(self._pairs)
            following = None if last else (*self._norms[index + 1], active)
            x = second(between, out=self._feature[index % 2][:B], residual=x, normalized=following)
        return x

    def feature(self, x: Tensor) -> Tensor:
        """What `residual(x)` returned."""
        return self._feature[(len(self._pairs) - 1) % 2][: len(x)] if self._pairs else x

    def upsample(self, x: Tensor) -> Tensor:
        """The upsampling blocks."""
        for up, out in zip(self._ups, self._maps, strict=True):
            x = up(x, out=out[: len(x)])
        return x

    def paint(self, B: int, out: Tensor) -> None:
        """The last convolution, of what `upsample` gave, to `out` uint8 [B, 3, H, W]."""
        self._final(self._maps[-1][:B], out=out)
