"""What is measured: the networks of a bundle, or networks of random weights, which take as long; and faces to drive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dagan_rt.bundle import BatchProfile, Bundle, Graph
from dagan_rt.errors import InputError, require
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.config import NetworkConfig

if TYPE_CHECKING:
    from dagan_rt.networks.model import Model

#: By name; `full` is the published network, `small` is for trying the benchmarks out.
CONFIGS = {
    "full": NetworkConfig(),
    "small": NetworkConfig(
        size=64, depth_width=8, depth_decoder_widths=(8, 8, 8, 8, 8), keypoint_width=8, keypoint_max=16,
        keypoint_blocks=2, motion_width=8, motion_max=16, motion_blocks=2, generator_width=8, generator_max=16,
        residual_blocks=1, query_width=8, discriminator_width=4, discriminator_max=8, discriminator_blocks=2,
    ),
}  # fmt: skip
SEED = 20220607
SOURCES = 2  # portraits; the slots take turns, so that a frame of the wrong slot is seen


@dataclass(frozen=True)
class Subject:
    """Networks, on the CPU and in evaluation mode, and the bundle that describes them."""

    name: str
    model: Model
    bundle: Bundle
    exported: bool  # the bundle lies on a disk, with graphs that other backends can load


@dataclass(frozen=True)
class Faces:
    """Portraits and driving frames of drawn heads, uint8 [N, H, W, 3]."""

    sources: np.ndarray
    frames: np.ndarray

    def batch(self, at: int, size: int) -> list[np.ndarray]:
        """`size` frames from the `at`-th on, around the ring."""
        return [self.frames[(at + k) % len(self.frames)] for k in range(size)]


def open_subject(model: str = "full", folder: Path | None = None) -> Subject:
    """The networks of the bundle in `folder`, or random ones of the sizes that `CONFIGS` calls `model`.

    InputError where the bundle is damaged, cannot reenact, or holds no weights to check results with.
    """
    require("torch", extra="torch", why="benchmarking")
    if folder is None:
        config = CONFIGS[model]
        return Subject(model, random_model(config), described(config), exported=False)
    from dagan_rt import checkpoints

    bundle = Bundle.open(folder)
    if reason := bundle.cannot_reenact:
        raise InputError(f"bundle {folder} cannot be measured: {reason}")
    if bundle.weights is None:
        raise InputError(f"bundle {folder} holds no weights to check results with: export without --no-torch-weights")
    loaded = checkpoints.load(bundle.weights, depth=bundle.depth_weights)
    return Subject(folder.resolve().name, loaded.eval(), bundle, exported=True)


def described(config: NetworkConfig) -> Bundle:
    """A bundle of no files, for backends that have their networks already."""
    from dagan_rt.export.subnetworks import subnetworks

    graphs = {it.name: Graph(it.name, Path(f"{it.name}.onnx"), it.runs, it.inputs, it.outputs)
              for it in subnetworks(config)}  # fmt: skip
    return Bundle(Path("random weights"), {"files": {}}, config, graphs, BatchProfile(1, 1, 1))


def random_model(config: NetworkConfig, seed: int = SEED) -> Model:
    """Networks of seeded random weights whose activations stay in range, and whose images follow the driving frame.

    The same on every machine but for rounding: statistics come from drawn heads, on the CPU.
    """
    import torch

    from dagan_rt.networks.model import Model

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = Model(config)
        for name, parameter in model.named_parameters():
            if name.endswith("jacobian.weight"):
                parameter.data.normal_(std=2e-3)  # near the identity, as trained frames are
            elif name.endswith("AttnModule.gamma"):
                parameter.data.fill_(0.5)  # it starts at 0, where attention does nothing
    _settle(model.requires_grad_(False), faces(config.size, 2))
    return model.eval()


def _settle(model: Model, drawn: Faces) -> None:
    """Batch-norm statistics from drawn heads, and heads whose logits spread about as trained ones do."""
    import torch

    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    generator = model.generator
    spreads = {model.keypoints.kp: 0.1, generator.dense_motion_network.mask: 1.0}
    if model.config.parts.decoder != "spade":
        spreads[generator.final] = 1.0

    def spread(module: Any, _inputs: Any, output: Any) -> Any:
        factor = spreads[module] / output.std()
        module.weight.mul_(factor)
        module.bias.mul_(factor)
        return output * factor

    hooks = [module.register_forward_hook(spread) for module in spreads]
    for norm in norms:
        norm.momentum = 1.0  # the statistics are those of the last batch
        norm.train()
    planes = torch.from_numpy(drawn.frames).permute(0, 3, 1, 2) / 255.0
    with torch.no_grad():
        depth = model.depth(planes) if model.depth is not None else None
        points = model.find_keypoints(planes, depth)
        generator(planes, KeyPoints(points.value.flip(0), points.jacobian.flip(0)), points, depth)
    for hook in hooks:
        hook.remove()
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()


def faces(size: int, count: int) -> Faces:
    """`SOURCES` portraits, and `count` frames of another head that talks."""
    from dagan_rt.training.heads import HELD_OUT, draw_clip

    sources = [draw_clip(HELD_OUT.start + 1 + k, 1, size).frames[0] for k in range(SOURCES)]
    return Faces(np.stack(sources), np.ascontiguousarray(draw_clip(HELD_OUT.start, count, size).frames))
