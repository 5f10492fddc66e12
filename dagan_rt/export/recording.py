"""What every subnetwork is given while a face drives a portrait, recorded in PyTorch: to verify and to calibrate on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dagan_rt.export.subnetworks import PART, Subnetwork, subnetworks

if TYPE_CHECKING:
    from dagan_rt.networks.model import Model

Arrays = dict[str, np.ndarray]  # by name


def session(
    model: Model, declared: Sequence[Subnetwork], portraits: np.ndarray, clips: Sequence[np.ndarray], scale: float = 1.0
) -> Iterator[dict[str, Arrays]]:
    """The inputs of each declared subnetwork, by its name, frame by frame.

    model: on the CPU, in evaluation mode. portraits: uint8 [B, size, size, 3], of B sessions at once. clips: their
    driving frames, shaped alike, the initial ones first. scale: of the movement. What both a portrait and a driving
    face have (image, depth, key points) is the driving face's.
    """
    import torch

    graphs = {subnetwork.name: subnetwork for subnetwork in subnetworks(model.config)}
    alone = any(subnetwork.runs == PART for subnetwork in declared)
    points = ("kp_value", "kp_jacobian")
    with torch.inference_mode():
        image = _planes(portraits)
        source = graphs["source"].run(model, {"image": image})
        arrays = {**source, "source_image": image, "scale": torch.full((len(portraits), 1), scale)}
        arrays |= {f"source_{name}": source[name] for name in points}
        for number, frames in enumerate(clips):
            arrays["image"] = _planes(frames)
            arrays |= (found := graphs["driving"].run(model, arrays))
            for role in ("driving_", "initial_") if number == 0 else ("driving_",):
                arrays |= {role + name: found[name] for name in points}
            arrays |= graphs["motion"].run(model, arrays)
            if alone:
                arrays |= _inside(model, arrays)
            yield {it.name: {tensor.name: arrays[tensor.name].numpy() for tensor in it.inputs} for it in declared}


def _inside(model: Model, arrays: dict[str, Any]) -> dict[str, Any]:
    """What passes between the parts of one graph, for those exported alone."""
    generator, flow, occlusion = model.generator, arrays["flow"], arrays["occlusion"]
    warped = generator.warp(arrays["feature"], flow, occlusion)
    inside = {
        "warped_feature": warped,
        "attended_feature": generator.attend(warped, arrays.get("query")),
        "deformed": generator.warp(arrays["source_image"], flow, occlusion),
    }
    if model.config.parts.attention == "depth":
        inside["depth_feature"] = generator.encode_depth(arrays["depth"])
    return inside


def _planes(images: np.ndarray) -> Any:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
