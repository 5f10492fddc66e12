"""The variants of the paper's comparison, as one table: which has which parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variant:
    """The parts that tell one variant from another."""

    name: str
    decoder: Literal["plain", "spade"]
    attention: Literal["depth", "self"] | None  # where the queries come from
    rgbd_keypoints: bool  # key points found on RGB-D instead of RGB
    num_keypoints: int

    @property
    def uses_depth(self) -> bool:
        """Whether the face depth network is part of the variant."""
        return self.rgbd_keypoints or self.attention == "depth"


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        #       name           decoder  attention  RGB-D key points  how many
        Variant("dagan",       "plain", "depth",   True,             15),  # the paper's method
        Variant("dagan_spade", "spade", "depth",   True,             15),  # its later release, SPADE decoder
        Variant("dagan_sa",    "plain", "self",    True,             15),  # supplementary B.3: self-attention
        Variant("baseline",    "plain", None,      False,            15),  # supplementary B.3: no depth, no attention
        Variant("fomm",        "plain", None,      False,            10),  # First Order Motion Model
    )
}  # fmt: skip
