"""The one declaration of the graphs a bundle holds; names, shapes, parity tests and tables all derive from it.

| graph       | runs          | in -> out                                                                            |
|-------------|---------------|--------------------------------------------------------------------------------------|
| `source`    | once a source | image -> feature, query, depth, key points, thumbnail                                |
| `driving`   | every frame   | image -> depth, key points                                                           |
| `motion`    | every frame   | source, driving and initial key points, movement scale, thumbnail -> flow, occlusion |
| `generator` | every frame   | feature, query, flow, occlusion -> prediction                                        |

A variant without depth attention has no query, one without the face depth network no depth, and the SPADE decoder
takes the source image as well. Images are float32 NCHW RGB in [0, 1]. PyTorch is imported only to build or run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dagan_rt.bundle import Tensor
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.config import NetworkConfig

if TYPE_CHECKING:
    from torch import nn

    from dagan_rt.networks.model import Model

Arrays = Mapping[str, Any]  # tensors by name
BATCH = "batch"  # the one dynamic axis
ONCE, ALWAYS = "once a source", "every frame"


@dataclass(frozen=True)
class Subnetwork:
    """One graph: what it computes, under which names, how often, and how exact an fp32 export must be."""

    name: str
    runs: str  # ONCE or ALWAYS
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tolerance: float  # largest error allowed, in units of the output's largest magnitude where that exceeds 1
    forward: Callable[[Model, Arrays], dict[str, Any]]

    def run(self, model: Model, inputs: Arrays) -> dict[str, Any]:
        """The outputs by name, in the declared order, computed by `model` on tensors by name."""
        found = self.forward(model, inputs)
        return {output.name: found[output.name] for output in self.outputs}

    def build(self, model: Model) -> nn.Module:
        """A module that takes the inputs and gives a tuple of the outputs, both in the declared order."""
        from torch import nn

        subnetwork = self

        class Built(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, *inputs: Any) -> tuple[Any, ...]:
                named = {tensor.name: value for tensor, value in zip(subnetwork.inputs, inputs, strict=True)}
                return tuple(subnetwork.run(self.model, named).values())

        return Built().eval()


def subnetworks(config: NetworkConfig) -> tuple[Subnetwork, ...]:
    """The four graphs of a variant at the sizes of `config`."""
    side, small = config.size, round(config.size * config.motion_scale)
    coarse = side // 2**config.down_blocks
    image = Tensor("image", (BATCH, 3, side, side))
    depth = [Tensor("depth", (BATCH, 1, side, side))] if config.parts.uses_depth else []
    thumbnail = Tensor("thumbnail", (BATCH, 3, small, small))
    feature = Tensor("feature", (BATCH, config.feature_width, coarse, coarse))
    asks = config.parts.attention == "depth"
    query = [Tensor("query", (BATCH, config.query_width, coarse, coarse))] if asks else []
    source_image = [Tensor("source_image", image.shape)] if config.parts.decoder == "spade" else []
    motion = (Tensor("flow", (BATCH, small, small, 2)), Tensor("occlusion", (BATCH, 1, small, small)))
    prediction = Tensor("prediction", image.shape)
    keypoints = _keypoints(config)
    faces = [tensor for role in ("source_", "driving_", "initial_") for tensor in _keypoints(config, role)]
    return (
        Subnetwork("source", ONCE, (image,), (feature, *query, *depth, *keypoints, thumbnail), 1e-4, _source),
        Subnetwork("driving", ALWAYS, (image,), (*depth, *keypoints), 1e-4, _driving),
        Subnetwork("motion", ALWAYS, (*faces, Tensor("scale", (BATCH, 1)), thumbnail), motion, 1e-3, _motion),
        Subnetwork("generator", ALWAYS, (feature, *query, *motion, *source_image), (prediction,), 1e-3, _generator),
    )


def _keypoints(config: NetworkConfig, role: str = "") -> tuple[Tensor, Tensor]:
    count = config.num_keypoints
    return (
        Tensor(f"{role}kp_value", (BATCH, count, 2)),
        Tensor(f"{role}kp_jacobian", (BATCH, count, 2, 2)),
    )


def _source(model: Model, inputs: Arrays) -> dict[str, Any]:
    image = inputs["image"]
    found = _driving(model, inputs)
    found["feature"] = model.generator.encode_image(image)
    found["thumbnail"] = model.generator.thumbnail(image)
    if model.config.parts.attention == "depth":
        found["query"] = model.generator.query(found["depth"])
    return found


def _driving(model: Model, inputs: Arrays) -> dict[str, Any]:
    image = inputs["image"]
    depth = model.depth(image) if model.depth is not None else None
    keypoints = model.find_keypoints(image, depth)
    return {"depth": depth, "kp_value": keypoints.value, "kp_jacobian": keypoints.jacobian}


def _motion(model: Model, inputs: Arrays) -> dict[str, Any]:
    source, driving, initial = (
        KeyPoints(inputs[f"{role}_kp_value"], inputs[f"{role}_kp_jacobian"])
        for role in ("source", "driving", "initial")
    )
    moved = _transfer(source, driving, initial, inputs["scale"])
    motion = model.generator.dense_motion_network(inputs["thumbnail"], source, moved)
    return {"flow": motion.flow, "occlusion": motion.occlusion}


def _transfer(source: KeyPoints, driving: KeyPoints, initial: KeyPoints, scale: Any) -> KeyPoints:
    """`dagan_rt.transfer.transfer` on tensors, for the inside of the graph; `scale` [B, 1]."""
    import torch

    from dagan_rt.networks.geometry import invert_2x2

    value = source.value + scale[:, :, None] * (driving.value - initial.value)
    jacobian = torch.matmul(torch.matmul(driving.jacobian, invert_2x2(initial.jacobian)), source.jacobian)
    return KeyPoints(value, jacobian)


def _generator(model: Model, inputs: Arrays) -> dict[str, Any]:
    from dagan_rt.networks.geometry import resize_flow, resize_map, sample

    generator, flow, occlusion = model.generator, inputs["flow"], inputs["occlusion"]
    warped = generator.warp(inputs["feature"], flow, occlusion)
    deformed = None
    if model.config.parts.decoder == "spade":
        image = inputs["source_image"]
        height, width = image.shape[2:]
        deformed = sample(image, resize_flow(flow, height, width)) * resize_map(occlusion, height, width)
    return {"prediction": generator.decode(generator.attend(warped, inputs.get("query")), deformed)}
