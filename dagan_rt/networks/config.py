"""Every width of the networks in one place, so that a small model and the published one are the same code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.networks.variants import VARIANTS, Variant

# A config may come from a downloaded file: no size in it is believed without bounds.
_MOST = {
    "size": 2048, "num_keypoints": 256, "depth_width": 1024,
    "keypoint_width": 1024, "keypoint_max": 4096, "keypoint_blocks": 8,
    "motion_width": 1024, "motion_max": 4096, "motion_blocks": 8,
    "generator_width": 1024, "generator_max": 4096, "down_blocks": 4, "residual_blocks": 64,
    "query_width": 1024, "spade_width": 1024, "spade_hidden": 1024,
    "discriminator_width": 1024, "discriminator_max": 4096, "discriminator_blocks": 8,
}  # fmt: skip


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of all networks; the defaults are those of the published 256 × 256 model."""

    variant: str = "dagan"
    size: int = 256  # side of the square image, pixels
    num_keypoints: int = 15

    depth_layers: int = 18  # ResNet-18 or ResNet-50
    depth_width: int = 64  # channels after the ResNet's stem
    depth_decoder_widths: tuple[int, ...] = (16, 32, 64, 128, 256)  # finest scale first

    keypoint_width: int = 32  # hourglass: channels at full resolution, cap, levels
    keypoint_max: int = 1024
    keypoint_blocks: int = 5

    motion_width: int = 64
    motion_max: int = 1024
    motion_blocks: int = 5
    motion_scale: float = 0.25  # key points and motion are estimated on the image shrunk by this factor

    generator_width: int = 64
    generator_max: int = 512
    down_blocks: int = 2
    residual_blocks: int = 6
    query_width: int = 32  # channels of the attention's queries and keys

    spade_width: int = 64
    spade_hidden: int = 128

    discriminator_width: int = 32
    discriminator_max: int = 512
    discriminator_blocks: int = 4

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.depth_layers not in (18, 50):
            raise InputError(f"depth_layers must be 18 or 50, got {self.depth_layers!r}")
        if self.motion_scale not in [1 / whole for whole in range(1, 17)]:
            raise InputError(f"motion_scale must be 1 over a whole number up to 16, got {self.motion_scale!r}")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise InputError(f"{name} must be from 1 to {most}, got {value!r}")
        if len(self.depth_decoder_widths) != 5 or not all(
            isinstance(width, int) and 1 <= width <= _MOST["depth_width"] for width in self.depth_decoder_widths
        ):
            raise InputError(f"depth_decoder_widths must be 5 widths, finest first, got {self.depth_decoder_widths!r}")
        smallest = 32 if self.parts.uses_depth else 2**self.down_blocks
        if self.size < 32 or self.size % smallest:
            raise InputError(f"size must be a multiple of {smallest}, at least 32, got {self.size!r}")

    @property
    def parts(self) -> Variant:
        """Which parts the variant has."""
        return VARIANTS[self.variant]

    @property
    def feature_width(self) -> int:
        """Channels of the feature map that is warped and attended."""
        return min(self.generator_max, self.generator_width * 2**self.down_blocks)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for a manifest or a checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkConfig:
        """The inverse of `to_dict`; raises InputError on unknown names or values of the wrong type."""
        known = {field.name: field.default for field in fields(cls)}
        checked: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise InputError(f"network config has no entry {name!r}; it knows {', '.join(known)}")
            if isinstance(known[name], tuple) and isinstance(value, (list, tuple)):
                value = tuple(value)
            if isinstance(known[name], float) and type(value) is int:
                value = float(value)
            if type(value) is not type(known[name]):
                raise InputError(
                    f"network config entry {name!r} must be {type(known[name]).__name__}, got {type(value).__name__}"
                )
            checked[name] = value
        return cls(**checked)
