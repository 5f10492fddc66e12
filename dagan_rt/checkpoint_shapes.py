"""Which network a state dict belongs to and how wide it is, read from its keys and shapes alone. No torch needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.variants import VARIANTS, Variant

Shape = tuple[int, ...]

# One entry that only this network has.
LANDMARKS = {
    "generator": "dense_motion_network.mask.weight",
    "kp_detector": "kp.weight",
    "discriminator": "discs.1.",
    "depth_encoder": "encoder.conv1.weight",
    "depth_decoder": "decoder.0.conv.conv.weight",
}


# Blocks of each stage, and the last convolution of a block.
RESNETS: dict[tuple[tuple[int, ...], str], int] = {((2, 2, 2, 2), "conv2"): 18, ((3, 4, 6, 3), "conv3"): 50}


def identify(keys: Collection[str]) -> str | None:
    """The published name of the network whose state dict has these keys, or None."""
    for network, landmark in LANDMARKS.items():
        if any(key.startswith(landmark) for key in keys):
            return network
    return None


@dataclass(frozen=True)
class Ladder:
    """Blocks that double their width up to a cap: block e has min(cap, width · 2^e) channels."""

    exponent: int  # e of the first width that the weights show
    first: int
    blocks: int
    last: int  # min(cap, width · 2^blocks)

    def infer(self, default_cap: int) -> tuple[int, int]:
        """(width, cap); a cap that no block reaches is the default one, or the last width where that is larger."""
        width = self.first >> self.exponent
        return width, self.last if self.last < width << self.blocks else max(self.last, default_cap)

    def fits(self, width: int, cap: int) -> bool:
        """Whether blocks of this width and cap would have these channels."""
        return (min(cap, width << self.exponent), min(cap, width << self.blocks)) == (self.first, self.last)


@dataclass
class Observed:
    """What the shapes say about a NetworkConfig."""

    values: dict[str, Any] = field(default_factory=dict)
    ladders: dict[str, Ladder] = field(default_factory=dict)  # by the prefix of their two fields, _width and _max
    parts: tuple[Any, ...] = ()  # decoder, attention, RGB-D key points


class Shapes:
    """The shapes of one network's state dict; asking for an entry it lacks is the user's error, not a KeyError."""

    def __init__(self, network: str, entries: Mapping[str, Any]):
        self.network = network
        self.entries: dict[str, Shape] = {
            key: tuple(int(side) for side in getattr(value, "shape", value)) for key, value in entries.items()
        }

    def __contains__(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.entries)

    def convolution(self, key: str) -> tuple[int, int]:
        """(output, input) channels of a convolution's weight."""
        shape = self.entries.get(key)
        if shape is None:
            raise InputError(f"{self.network} has no entry {key}, so its widths cannot be told (incomplete file?)")
        if len(shape) != 4 or 0 in shape:
            raise InputError(f"{self.network} entry {key} must be a convolution [out, in, h, w], got {list(shape)}")
        return shape[0], shape[1]

    def count(self, prefix: str) -> int:
        """How many blocks are numbered prefix0, prefix1, ... without a gap."""
        blocks = 0
        while f"{prefix}{blocks}." in self:
            blocks += 1
        if not blocks:
            raise InputError(f"{self.network} has no entry {prefix}0, so its widths cannot be told (incomplete file?)")
        return blocks


def infer_config(state_dicts: Mapping[str, Mapping[str, Any]], declared: NetworkConfig | None = None) -> NetworkConfig:
    """The configuration of the networks whose state dicts (or key → shape tables) these are.

    state_dicts: `generator` and `kp_detector`; optionally `discriminator`, `depth_encoder`, `depth_decoder`.
    declared: the configuration the file itself states. It wins where the shapes are silent (image size, caps that
    no layer reaches, baseline or fomm); where it contradicts them, InputError names the entry.
    Without it the image size is 256, and a network without depth is `fomm` with 10 key points, else `baseline`.
    Raises InputError when the networks do not belong together or match no variant.
    """
    observed = observe({network: Shapes(network, entries) for network, entries in state_dicts.items()})
    if declared is not None:
        _check_declared(observed, declared)
        return declared
    values = dict(observed.values)
    for prefix, ladder in observed.ladders.items():
        values[f"{prefix}_width"], values[f"{prefix}_max"] = ladder.infer(getattr(NetworkConfig, f"{prefix}_max"))
    return NetworkConfig(variant=_variant(observed).name, **values)


def infer_depth_config(state_dicts: Mapping[str, Mapping[str, Any]]) -> NetworkConfig:
    """The configuration of a depth network alone, `depth_encoder` and `depth_decoder`; the rest is the default.

    Raises InputError when the halves do not belong together.
    """
    observed = Observed()
    encoder, decoder = (Shapes(network, state_dicts[network]) for network in ("depth_encoder", "depth_decoder"))
    _observe_depth(observed, encoder, decoder)
    return NetworkConfig(**observed.values)


def observe(networks: Mapping[str, Shapes]) -> Observed:
    """Everything that the shapes determine; raises InputError when the networks contradict one another."""
    observed = Observed()
    generator, keypoints = networks["generator"], networks["kp_detector"]
    rgbd = _observe_keypoints(observed, keypoints)
    _observe_motion(observed, generator)
    _observe_generator(observed, generator, rgbd)
    _check_motion_scale(observed, generator, keypoints)
    if "discriminator" in networks:
        _observe_discriminator(observed, networks["discriminator"])
    if "depth_encoder" in networks and "depth_decoder" in networks:
        _observe_depth(observed, networks["depth_encoder"], networks["depth_decoder"])
    return observed


def _observe_keypoints(observed: Observed, network: Shapes) -> bool:
    ladder, channels = _hourglass(network, "predictor")
    observed.values |= {"keypoint_blocks": ladder.blocks, "num_keypoints": network.convolution("kp.weight")[0]}
    observed.ladders["keypoint"] = ladder
    if channels not in (3, 4):
        raise InputError(f"kp_detector must read RGB (3 channels) or RGB-D (4), got {channels} channels")
    return channels == 4


def _observe_motion(observed: Observed, network: Shapes) -> None:
    ladder, _ = _hourglass(network, "dense_motion_network.hourglass")
    observed.values["motion_blocks"] = ladder.blocks
    observed.ladders["motion"] = ladder
    points = network.convolution("dense_motion_network.mask.weight")[0] - 1
    if points != observed.values["num_keypoints"]:
        raise InputError(
            f"generator is for {points} key points but kp_detector finds {observed.values['num_keypoints']}: "
            "they come from different checkpoints"
        )


def _hourglass(network: Shapes, prefix: str) -> tuple[Ladder, int]:
    """Its widths, from full resolution to the deepest level, and its input channels."""
    blocks = network.count(f"{prefix}.encoder.down_blocks.")
    width, _ = network.convolution(f"{prefix}.decoder.up_blocks.{blocks - 1}.conv.weight")
    last, _ = network.convolution(f"{prefix}.encoder.down_blocks.{blocks - 1}.conv.weight")
    _, channels = network.convolution(f"{prefix}.encoder.down_blocks.0.conv.weight")
    return Ladder(0, width, blocks, last), channels


def _observe_generator(observed: Observed, network: Shapes, rgbd: bool) -> None:
    blocks = network.count("down_blocks.")
    observed.values["down_blocks"] = blocks
    width, _ = network.convolution("first.conv.weight")
    last, _ = network.convolution(f"down_blocks.{blocks - 1}.conv.weight")
    observed.ladders["generator"] = Ladder(0, width, blocks, last)

    spade = "decoder.compress." in network
    if spade:
        observed.values["spade_width"] = network.convolution("decoder.conv_img.weight")[1]
        observed.values["spade_hidden"] = network.convolution("decoder.G_middle_0.norm_0.mlp_shared.0.weight")[0]
    else:
        observed.values["residual_blocks"] = network.count("bottleneck.r")

    attention: str | None = None
    if "AttnModule." in network:
        attention = "depth" if "src_first." in network else "self"
        observed.values["query_width"] = network.convolution("AttnModule.query_conv.weight")[0]
    observed.parts = ("spade" if spade else "plain", attention, rgbd)


def _check_motion_scale(observed: Observed, generator: Shapes, keypoints: Shapes) -> None:
    scales = [
        _scale_from_taps(network, key)
        for network, key in ((generator, "dense_motion_network.down.weight"), (keypoints, "down.weight"))
    ]
    if scales[0] != scales[1]:
        raise InputError(f"generator shrinks its input to {scales[0]:g}× but kp_detector to {scales[1]:g}×")
    observed.values["motion_scale"] = scales[0]


def _scale_from_taps(network: Shapes, key: str) -> float:
    """Undo kernel = 2·round(4·σ) + 1 with σ = (1/scale - 1)/2, the anti-alias filter of a ×scale downsampling."""
    if key not in network.entries:
        return 1.0
    network.convolution(key)
    taps = network.entries[key][-1]
    for shrink in range(2, 33):
        if 2 * round(4 * (shrink - 1) / 2) + 1 == taps:
            return 1 / shrink
    raise InputError(f"{network.network} entry {key} has {taps} taps, which no whole shrink factor gives")


def _observe_discriminator(observed: Observed, network: Shapes) -> None:
    blocks = network.count("discs.1.down_blocks.")
    first, channels = network.convolution("discs.1.down_blocks.0.conv.weight")
    points = observed.values["num_keypoints"]
    if channels != 3 + points:
        raise InputError(f"discriminator must read RGB and {points} key points ({3 + points} channels), got {channels}")
    observed.values["discriminator_blocks"] = blocks
    last, _ = network.convolution(f"discs.1.down_blocks.{blocks - 1}.conv.weight")
    observed.ladders["discriminator"] = Ladder(1, first, blocks, last)


def _observe_depth(observed: Observed, encoder: Shapes, decoder: Shapes) -> None:
    width, channels = encoder.convolution("encoder.conv1.weight")
    if channels != 3:
        raise InputError(f"depth encoder must read one RGB image (3 channels), got {channels} (a pose encoder?)")
    stages: tuple[int, ...] = tuple(encoder.count(f"encoder.layer{stage}.") for stage in (1, 2, 3, 4))
    last_convolution = "conv3" if "encoder.layer1.0.conv3." in encoder else "conv2"
    layers = RESNETS.get((stages, last_convolution))
    if layers is None:
        raise InputError(f"depth encoder must be a ResNet-18 or ResNet-50, got one with {stages} blocks a stage")
    features, _ = encoder.convolution(f"encoder.layer4.0.{last_convolution}.weight")
    _, expected = decoder.convolution("decoder.0.conv.conv.weight")
    if features != expected:
        raise InputError(
            f"depth encoder is a ResNet-{layers} that gives {features} channels but the depth decoder expects "
            f"{expected}: encoder.pth and depth.pth come from different networks"
        )
    widths = tuple(decoder.convolution(f"decoder.{stage}.conv.conv.weight")[0] for stage in (8, 6, 4, 2, 0))
    observed.values |= {"depth_layers": layers, "depth_width": width, "depth_decoder_widths": widths}


def _variant(observed: Observed) -> Variant:
    matching = [variant for variant in VARIANTS.values() if _parts(variant) == observed.parts]
    if not matching:
        decoder, attention, rgbd = observed.parts
        raise InputError(
            f"no variant has a {decoder} decoder, {f'{attention} attention' if attention else 'no attention'} and "
            f"{'RGB-D' if rgbd else 'RGB'} key points: generator and kp_detector come from different variants"
        )
    points = observed.values["num_keypoints"]
    return next((variant for variant in matching if variant.num_keypoints == points), matching[0])


def _parts(variant: Variant) -> tuple[Any, ...]:
    return (variant.decoder, variant.attention, variant.rgbd_keypoints)


def _check_declared(observed: Observed, declared: NetworkConfig) -> None:
    found = _variant(observed)
    if _parts(declared.parts) != observed.parts:
        raise InputError(f"its config says {declared.variant} but the weights are those of {found.name}")
    for name, value in observed.values.items():
        if getattr(declared, name) != value:
            raise InputError(f"its config says {name} = {getattr(declared, name)} but the weights have {value}")
    for prefix, ladder in observed.ladders.items():
        width, cap = getattr(declared, f"{prefix}_width"), getattr(declared, f"{prefix}_max")
        if not ladder.fits(width, cap):
            raise InputError(
                f"its config says {prefix}_width = {width} and {prefix}_max = {cap} "
                f"but the weights go from {ladder.first} to {ladder.last} channels"
            )
