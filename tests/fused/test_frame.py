"""A fused frame against the networks it is made of, on the kernels' PyTorch twins: folding, padding, order, skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dagan_rt.export.subnetworks import subnetworks
from dagan_rt.fused.frame import Driving, Frame
from dagan_rt.fused.tools import Tools, spread
from dagan_rt.networks.variants import VARIANTS


def drawn(*shape: int, seed: int) -> Any:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def planes(pixels: Any) -> Any:
    return pixels.permute(0, 3, 1, 2).float() / 255


def reenacted(model: Any, sources: Any, initial: Any, driving: Any, scale: Any) -> Any:
    """uint8 [B, H, W, 3] by the subnetworks themselves, in float32."""
    graphs = {it.name: it for it in subnetworks(model.config)}
    found = graphs["source"].run(model, {"image": planes(sources)})
    arrays = found | {"source_image": planes(sources), "scale": scale}
    for role, values in (
        ("source", found),
        ("initial", graphs["driving"].run(model, {"image": planes(initial)})),
        ("driving", graphs["driving"].run(model, {"image": planes(driving)})),
    ):
        arrays |= {f"{role}_kp_value": values["kp_value"], f"{role}_kp_jacobian": values["kp_jacobian"]}
    arrays |= graphs["motion"].run(model, {it.name: arrays[it.name] for it in graphs["motion"].inputs})
    prediction = graphs["generator"].run(model, {it.name: arrays[it.name] for it in graphs["generator"].inputs})
    return prediction["prediction"].permute(0, 2, 3, 1) * 255


def keep(frame: Frame, model: Any, slot: int, source: Any, initial: Any, scale: Any) -> None:
    """What a backend writes to a slot."""
    graphs = {it.name: it for it in subnetworks(model.config)}
    found = graphs["source"].run(model, {"image": planes(source)})
    begun = graphs["driving"].run(model, {"image": planes(initial)})
    values = {
        "feature": found["feature"], "query": found.get("query"), "thumbnail": found["thumbnail"],
        "source_value": found["kp_value"], "source_jacobian": found["kp_jacobian"], "source_image": planes(source),
        "initial_value": begun["kp_value"], "initial_jacobian": begun["kp_jacobian"], "scale": scale,
    }  # fmt: skip
    for name, pool in frame.pools.items():
        pool[slot] = values[name][0]


@torch.inference_mode()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fused_frame_is_what_the_subnetworks_compute(variant: str, small_model: Any) -> None:
    model = small_model(variant)
    if hasattr(model.generator, "final"):
        model.generator.final.weight.data.mul_(20)  # untrained networks paint in grey
    side = model.config.size
    frame = Frame(Tools("cpu", "float32", reference=True), model, slots=3, most=4)
    sources, initial = drawn(3, side, side, 3, seed=1), drawn(3, side, side, 3, seed=2)
    scale = torch.tensor([[1.0], [0.7], [1.4]])
    for slot in range(3):
        keep(frame, model, slot, sources[slot : slot + 1], initial[slot : slot + 1], scale[slot : slot + 1])
    chosen = torch.tensor([2, 0, 2])  # of a batch of three in maps for four
    driving = drawn(3, side, side, 3, seed=3)
    for _ in range(2):  # nothing is left over from the first time
        frame.pixels[:3], frame.chosen[:3] = driving, chosen.int()
        found = frame(3).float()
        expected = reenacted(model, sources[chosen], initial[chosen], driving, scale[chosen])
        assert (found - expected).abs().max() <= 0.6  # half a level is rounding
    assert expected.std() > 5, "the images must differ for this to prove anything"


@torch.inference_mode()
def test_one_slot_is_read_without_a_copy(small_model: Any) -> None:
    model = small_model("dagan")
    side = model.config.size
    frame = Frame(Tools("cpu", "float32", reference=True), model, slots=1, most=1)
    source, driving = drawn(1, side, side, 3, seed=1), drawn(1, side, side, 3, seed=3)
    keep(frame, model, 0, source, driving, torch.ones(1, 1))
    frame.pixels.copy_(driving)
    assert "gather" not in frame.steps(1)
    expected = reenacted(model, source, driving, driving, torch.ones(1, 1))
    assert (frame(1).float() - expected).abs().max() <= 0.6


@torch.inference_mode()
@pytest.mark.parametrize("layers", (18, 50))
def test_key_points_and_depth_of_both_encoders(layers: int, small_model: Any) -> None:
    model = small_model("dagan", depth_layers=layers)
    side = model.config.size
    driving = Driving(Tools("cpu", "float32", reference=True), model, most=2)
    driving.pixels.copy_(drawn(2, side, side, 3, seed=4))
    value, jacobian = driving(2)
    graph = next(it for it in subnetworks(model.config) if it.name == "driving")
    expected = graph.run(model, {"image": planes(driving.pixels)})
    torch.testing.assert_close(value, expected["kp_value"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(jacobian, expected["kp_jacobian"], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_second_instance_shares_the_weights(small_model: Any) -> None:
    tools = Tools("cpu", "float32", reference=True)
    model = small_model("dagan")
    Driving(tools, model, most=1)
    before = {name: id(kept) for name, kept in tools._kept.items()}
    Driving(tools, model, most=2)
    assert {name: id(kept) for name, kept in tools._kept.items()} == before


def test_the_padding_of_a_concatenation_lies_behind_each_part() -> None:
    weight = torch.arange(1.0, 13).reshape(1, 12, 1, 1)
    wide = spread(weight, (3, 9))
    assert wide.flatten().tolist() == [1, 2, 3, 0, 0, 0, 0, 0, *range(4, 13), 0, 0, 0, 0, 0, 0, 0]
