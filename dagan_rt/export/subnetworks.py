"""The one declaration of the graphs an export holds: names, shapes, batch profiles, tolerances, all derives from it.

The four that a `Reenactor` runs:

| graph       | runs          | in -> out                                                                            |
|-------------|---------------|--------------------------------------------------------------------------------------|
| `source`    | once a source | image -> feature, query, depth, key points, thumbnail                                |
| `driving`   | every frame   | image -> depth, key points                                                           |
| `motion`    | every frame   | source, driving and initial key points, movement scale, thumbnail -> flow, occlusion |
| `generator` | every frame   | feature, query, flow, occlusion -> prediction                                        |

and the paper's own parts, each exported alone on request:

| graph             | in -> out                                                        |
|-------------------|------------------------------------------------------------------|
| `depth`           | image -> depth                                                   |
| `keypoints`       | image, depth -> key points                                       |
| `feature_encoder` | image -> feature                                                 |
| `depth_encoder`   | depth -> depth feature                                           |
| `attention`       | depth feature, warped feature -> attended feature                |
| `decoder`         | attended feature (SPADE: and deformed source) -> prediction      |
| `discriminator`   | image, positions of key points -> features of each block, scores |

A variant without depth attention has no query, one without the face depth network no depth, and the SPADE decoder
takes the source image as well. Images are float32 NCHW RGB in [0, 1]. PyTorch is imported only to build or run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dagan_rt.bundle import Tensor
from dagan_rt.errors import InputError
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.config import NetworkConfig

if TYPE_CHECKING:
    from torch import nn

    from dagan_rt.networks.model import Model

Arrays = Mapping[str, Any]  # tensors by name
BATCH = "batch"  # the one dynamic axis
ONCE, ALWAYS, PART = "once a source", "every frame", "a part, alone"

#: Where a precision below fp32 may be used: the convolutional trunks, by the prefixes that tracing gives their nodes.
#: All else is geometry or a head whose error it would multiply.
TRUNKS = (
    "/depth/encoder/encoder/", "/depth/decoder/", "/keypoints/predictor/",
    "/dense_motion_network/hourglass/", "/first/", "/down_blocks.", "/src_first/", "/src_down_blocks.",
    "/query_conv/", "/AttnModule/", "/bottleneck/", "/up_blocks.", "/final/", "/decoder/", "/discriminator/discs.1/",
)  # fmt: skip


@dataclass(frozen=True)
class Tolerance:
    """How far an output may be from fp32 PyTorch."""

    max_abs: float  # in units of the output's largest magnitude where that exceeds 1
    psnr: float  # dB, at least


FP16, INT8 = Tolerance(0.1, 40.0), Tolerance(1.0, 20.0)  # of one graph; the whole reenactment has its own budget


@dataclass(frozen=True)
class Subnetwork:
    """One graph: what it computes, under which names, how often, and how exact its export must be."""

    name: str
    runs: str  # ONCE, ALWAYS or PART
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    exact: float  # largest error of an fp32 export, as in `Tolerance.max_abs`
    forward: Callable[[Model, Arrays], dict[str, Any]]
    trunks: tuple[str, ...] = TRUNKS

    def tolerance(self, precision: str) -> Tolerance:
        """What an export in `precision` must keep; with few bits single values may be far off, and PSNR counts."""
        return {"fp32": Tolerance(self.exact, 60.0), "fp16": FP16, "int8": INT8}[precision]

    def to_dict(self) -> dict[str, Any]:
        """What the manifest says of the graph."""
        inputs, outputs = ([tensor.to_dict() for tensor in side] for side in (self.inputs, self.outputs))
        return {"file": f"{self.name}.onnx", "runs": self.runs, "inputs": inputs, "outputs": outputs}

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


def parts(config: NetworkConfig) -> tuple[Subnetwork, ...]:
    """The parts of Figure 1 of the supplementary that a variant has, each with the inputs it has in the paper."""
    side, coarse = config.size, config.size // 2**config.down_blocks
    image, depth = Tensor("image", (BATCH, 3, side, side)), Tensor("depth", (BATCH, 1, side, side))
    feature, warped, attended, asking = (
        Tensor(name, (BATCH, config.feature_width, coarse, coarse))
        for name in ("feature", "warped_feature", "attended_feature", "depth_feature")
    )
    deformed = (Tensor("deformed", image.shape),) if config.parts.decoder == "spade" else ()
    value, jacobian = _keypoints(config)
    judged = tuple(Tensor(f"feature_{block}", _judged(config, block)) for block in range(config.discriminator_blocks))
    scores = Tensor("scores", (BATCH, 1, *judged[-1].shape[2:]))
    found = []
    if config.parts.uses_depth:
        found.append(Subnetwork("depth", PART, (image,), (depth,), 1e-4, _depth))
    seen = (image, depth) if config.parts.rgbd_keypoints else (image,)
    found += [
        Subnetwork("keypoints", PART, seen, (value, jacobian), 1e-4, _find_keypoints),
        Subnetwork("feature_encoder", PART, (image,), (feature,), 1e-4, _encode_image),
    ]
    if config.parts.attention == "depth":
        found.append(Subnetwork("depth_encoder", PART, (depth,), (asking,), 1e-4, _encode_depth))
    if config.parts.attention:
        asks = (asking,) if config.parts.attention == "depth" else ()
        found.append(Subnetwork("attention", PART, (*asks, warped), (attended,), 1e-3, _attend))
    return (
        *found,
        Subnetwork("decoder", PART, (attended, *deformed), (Tensor("prediction", image.shape),), 1e-3, _decode),
        Subnetwork("discriminator", PART, (image, value), (*judged, scores), 1e-3, _judge),
    )


def choose(config: NetworkConfig, names: Sequence[str] = ()) -> tuple[Subnetwork, ...]:
    """The four runtime graphs, or the runtime graphs and parts called `names`; InputError for one it does not have."""
    if not names:
        return subnetworks(config)
    known = {subnetwork.name: subnetwork for subnetwork in (*subnetworks(config), *parts(config))}
    for name in names:
        if name not in known:
            raise InputError(f"{config.variant} has no subnetwork {name!r} to export; it has {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def _judged(config: NetworkConfig, block: int) -> tuple[int | str, ...]:
    """Shape of a discriminator block's output: 4 × 4 convolutions without padding, halved by all but the last."""
    side, last = config.size, config.discriminator_blocks - 1
    for index in range(block + 1):
        side = (side - 3) // (2 if index < last else 1)
    return (BATCH, min(config.discriminator_max, config.discriminator_width * 2 ** (block + 1)), side, side)


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


def _depth(model: Model, inputs: Arrays) -> dict[str, Any]:
    assert model.depth is not None
    return {"depth": model.depth(inputs["image"])}


def _find_keypoints(model: Model, inputs: Arrays) -> dict[str, Any]:
    keypoints = model.find_keypoints(inputs["image"], inputs.get("depth"))
    return {"kp_value": keypoints.value, "kp_jacobian": keypoints.jacobian}


def _encode_image(model: Model, inputs: Arrays) -> dict[str, Any]:
    return {"feature": model.generator.encode_image(inputs["image"])}


def _encode_depth(model: Model, inputs: Arrays) -> dict[str, Any]:
    return {"depth_feature": model.generator.encode_depth(inputs["depth"])}


def _attend(model: Model, inputs: Arrays) -> dict[str, Any]:
    query = model.generator.AttnModule.query(inputs["depth_feature"]) if "depth_feature" in inputs else None
    return {"attended_feature": model.generator.attend(inputs["warped_feature"], query)}


def _decode(model: Model, inputs: Arrays) -> dict[str, Any]:
    return {"prediction": model.generator.decode(inputs["attended_feature"], inputs.get("deformed"))}


def _judge(model: Model, inputs: Arrays) -> dict[str, Any]:
    # The discriminator looks at positions only; a local frame would be an input that nothing reads.
    features, scores = model.discriminator(inputs["image"], KeyPoints(inputs["kp_value"], inputs["kp_value"]))
    return {f"feature_{block}": feature for block, feature in enumerate(features)} | {"scores": scores}
