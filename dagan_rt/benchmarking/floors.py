"""What each stage of a frame must do at least: operations, and bytes between memory and the multiprocessors.

Counted from the networks' own shapes, on PyTorch's meta device: no weights, no arithmetic.

Operations are multiplications and additions of convolutions and of attention's two products; all else is left out.
A convolution after nearest ×2 upsampling counts as the four 2 × 2 convolutions on the small map that equal it.
Bytes: each convolution reads its weights and its input once and writes its output once; batch norm, activation,
pooling and upsampling cost nothing, as they can be fused into it. Attention reads query, key, value and the warped
feature and writes its output; its logits never leave the chip. Other stages read their inputs and write their outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dagan_rt.networks.config import NetworkConfig

if TYPE_CHECKING:
    from torch import nn

    from dagan_rt.networks.model import Model


@dataclass(frozen=True)
class Work:
    """One launch at best."""

    flops: float
    bytes: float
    name: str = ""


@dataclass(frozen=True)
class Cost:
    """What a stage must do; its works follow each other."""

    works: tuple[Work, ...] = ()

    @property
    def flops(self) -> float:
        """Of all works."""
        return sum(work.flops for work in self.works)

    @property
    def bytes(self) -> float:
        """Of all works."""
        return sum(work.bytes for work in self.works)

    def __add__(self, other: Cost) -> Cost:
        return Cost((*self.works, *other.works))

    def floor(self, copy: float, product: float) -> tuple[float, bool]:
        """Microseconds at `copy` GB/s or `product` TFLOP/s, whichever binds each work; is most of it copying."""
        moving = [work.bytes / copy / 1e3 for work in self.works]
        computing = [work.flops / product / 1e6 for work in self.works]
        copied = sum(a for a, b in zip(moving, computing, strict=True) if a >= b)
        total = sum(max(pair) for pair in zip(moving, computing, strict=True))
        return total, copied >= total / 2


#: Of which of the stages counted here a stage of some backend consists.
TOGETHER = {
    "driving": ("image", "depth", "keypoints"),
    "generator": ("warp", "attention", "residual blocks", "upsampling", "final", "decoder"),
    "residual": ("residual blocks",),
    "frame": (
        "gather", "image", "depth", "keypoints", "motion", "warp", "attention", "residual blocks", "upsampling",
        "final", "decoder",
    ),
}  # fmt: skip


def stage_costs(config: NetworkConfig, batch: int, size: int = 2) -> dict[str, Cost]:
    """By stage of a driving frame; `size`: bytes of a number in feature maps and weights."""
    import torch

    from dagan_rt.networks.model import Model

    with torch.device("meta"):
        model = Model(config).eval().requires_grad_(False)
    count = _Counter(model, batch, size)
    side, coarse = config.size, config.size >> config.down_blocks
    small, points = round(side * config.motion_scale), config.num_keypoints
    generator, width = model.generator, config.feature_width
    numbers = 6 * 4 * points  # a face's key points, float32
    kept = size * (width * coarse**2 + 3 * small**2 + config.query_width * coarse**2) + 2 * numbers
    costs = {
        # A source's row in and out; where there is one source only, backends need not.
        "gather": Cost((Work(0, 2 * batch * kept, "gather"),)),
        "image": Cost((Work(0, batch * 3 * side**2 * (1 + size), "image"),)),
    }
    if (depth := model.depth) is not None:
        costs["depth"] = count.of(lambda: depth(count.map(3, side)))
    costs["keypoints"] = count.of(lambda: model.keypoints(count.map(4 if config.parts.rgbd_keypoints else 3, side)))
    motion = generator.dense_motion_network
    costs["motion"] = count.of(
        lambda: count.through(motion.hourglass, motion.mask, motion.occlusion, 4 * (points + 1), small)
    )
    flow = 3 * 4 * small**2
    costs["warp"] = Cost((Work(0, batch * (2 * size * width * coarse**2 + flow), "warp"),))
    if config.parts.attention is not None:
        costs["attention"] = _attention(config, batch, size, coarse)
    if config.parts.decoder == "spade":
        costs["decoder"] = count.of(lambda: generator.decoder(count.map(width, coarse), count.map(3, side)))
        return costs
    costs["residual blocks"] = count.of(lambda: generator.bottleneck(count.map(width, coarse)))
    costs["upsampling"] = count.of(lambda: _chain(generator.up_blocks, count.map(width, coarse)))
    final = count.of(lambda: generator.final(count.map(generator.final.in_channels, side)))
    # The image is written as uint8, not in the maps' dtype.
    costs["final"] = Cost(
        tuple(Work(it.flops, it.bytes - batch * 3 * side**2 * (size - 1), it.name) for it in final.works)
    )
    return costs


def cost_of(stage: str, costs: Mapping[str, Cost]) -> Cost | None:
    """Of a stage by a backend's name for it; None where it is not known."""
    named = [name for name in TOGETHER.get(stage, (stage,)) if name in costs]
    return sum((costs[name] for name in named), Cost()) if named else None


class _Counter:
    """Runs networks on the meta device and writes down what their convolutions do."""

    def __init__(self, model: Model, batch: int, size: int) -> None:
        from dagan_rt.networks.blocks import DownBlock, UpBlock

        self._batch, self._size, self._works = batch, size, list[Work]()
        pooled = {block.conv for block in model.modules() if isinstance(block, DownBlock)}
        enlarged = {block.conv for block in model.modules() if isinstance(block, UpBlock)}
        import torch

        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(self._hook(name, module in pooled, module in enlarged))

    def map(self, channels: int, side: int) -> Any:
        """A feature map."""
        import torch

        return torch.empty(self._batch, channels, side, side, device="meta")

    def of(self, run: Callable[[], Any]) -> Cost:
        """What the convolutions do that `run` calls."""
        self._works.clear()
        run()
        return Cost(tuple(self._works))

    def through(self, hourglass: Any, mask: Any, occlusion: Any, channels: int, side: int) -> None:
        """The trunk of the motion network; what is around it is small."""
        feature = hourglass(self.map(channels, side))
        mask(feature), occlusion(feature)

    def _hook(self, name: str, pooled: bool, enlarged: bool) -> Callable[[Any, Any, Any], None]:
        def hook(module: nn.Conv2d, inputs: Any, output: Any) -> None:
            taps = module.weight[0].numel()  # of one output: inputs / groups times the kernel's
            flops = 2 * output.numel() * taps * (4 / 9 if enlarged else 1)
            read = inputs[0].numel() / (4 if enlarged else 1)
            written = output.numel() / (4 if pooled else 1)
            weights = module.weight.numel() * (16 / 9 if enlarged else 1)  # four 2 × 2 kernels for one 3 × 3
            self._works.append(Work(flops, self._size * (read + written + weights), name))

        return hook


def _chain(blocks: Any, x: Any) -> None:
    for block in blocks:
        x = block(x)


def _attention(config: NetworkConfig, batch: int, size: int, side: int) -> Cost:
    """Keys and values by 1 × 1 convolutions of the warped feature, then both products."""
    n, wide, narrow = side * side, config.feature_width, config.query_width
    asked = 2 if config.parts.attention == "self" else 1  # projections of `narrow` channels
    projected = asked * narrow + wide
    weights = size * wide * projected
    projections = Work(2 * batch * n * wide * projected, size * batch * n * (wide + projected) + weights, "projections")
    products = Work(2 * batch * n * n * (narrow + wide), size * batch * n * (2 * narrow + 3 * wide), "attention")
    return Cost((projections, products))
