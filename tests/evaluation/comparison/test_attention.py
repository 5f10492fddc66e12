"""Attention maps are the module's own, and the mass on the face is measured where the face is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.evaluation.comparison.attention import attention_of, face_cover, face_share, mass_on
from dagan_rt.training.heads import HELD_OUT, draw_clip


@pytest.mark.parametrize("variant", ["dagan", "dagan_sa"])
def test_the_weights_give_the_module_s_output(small_model: Any, variant: str) -> None:
    model = small_model(variant).eval()
    module = model.generator.AttnModule
    with torch.no_grad():
        module.gamma.fill_(0.7)
        for convolution in (module.query_conv, module.key_conv, module.value_conv):
            convolution.weight.mul_(8.0)
            convolution.bias.add_(torch.linspace(-1, 2, len(convolution.bias)))  # sharp maps, some of it cut by ReLU
    size = model.config.size
    source, driving = torch.rand(2, 2, 3, size, size, generator=torch.Generator().manual_seed(1)).unbind(0)
    found = attention_of(model, source, driving)
    B, h, w = found.weights.shape[:3]
    flat = found.weights.reshape(B, h * w, h * w)
    assert torch.allclose(flat.sum(-1), torch.ones(B, h * w), atol=1e-5)
    assert flat.std() > 0.05 / (h * w)
    with torch.no_grad():
        value = torch.relu(module.value_conv(found.warped)).flatten(2)
        again = module.gamma * torch.einsum("bcn,bqn->bcq", value, flat).reshape(found.warped.shape) + found.warped
        assert (again - found.warped).abs().max() > 1e-3
        assert torch.allclose(again, found.attended, atol=1e-5)
        assert torch.equal(found.prediction, model(source, driving).prediction)


def test_a_variant_without_attention_has_none(small_model: Any) -> None:
    model = small_model("baseline").eval()
    image = torch.zeros(1, 3, model.config.size, model.config.size)
    with pytest.raises(InputError, match="baseline has no attention"):
        attention_of(model, image, image)


def test_the_mass_on_everything_is_one_and_on_parts_adds_up() -> None:
    rng = np.random.default_rng(0)
    weights = rng.random((5, 4, 6, 7))
    weights /= weights.sum((-2, -1), keepdims=True)
    cover = rng.random((6, 7))
    assert mass_on(weights, np.ones((6, 7))) == pytest.approx(np.ones((5, 4)))
    assert mass_on(weights, cover) + mass_on(weights, 1 - cover) == pytest.approx(np.ones((5, 4)))


def test_looking_everywhere_alike_has_the_face_s_area() -> None:
    cover = np.random.default_rng(1).random((8, 8))
    face, area = face_share(np.full((8, 8, 8, 8), 1 / 64), cover)
    assert face == pytest.approx(area) == pytest.approx(cover.mean())


def test_the_cover_is_what_the_outline_encloses() -> None:
    """A square of landmarks from -0.5 to 0.5 of a 32 × 32 grid: 15.5 cells a side, from 7.75 to 23.25."""
    corners = np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, 0.5], [0.5, -0.5]])
    landmarks = np.zeros((68, 2))
    landmarks[:17] = np.repeat(corners[:3], [6, 6, 5], axis=0)  # jaw: down the left side, across, up the right
    landmarks[17:27] = np.repeat(corners[[0, 3]], 5, axis=0)  # brows from left to right
    cover = face_cover(landmarks, 32, 32)
    expected = np.clip(np.minimum(np.arange(32) + 0.5 - 7.75, 23.25 - (np.arange(32) - 0.5)), 0, 1)
    assert cover == pytest.approx(
        np.outer(expected, expected), abs=0.22
    )  # the outline itself is drawn, half a sub-pixel wide
    assert cover.sum() == pytest.approx(15.5**2, rel=0.02)


def test_the_cover_lies_on_a_drawn_face() -> None:
    """The face is nearer than everything else of the picture but the neck and the hair around it."""
    clip = draw_clip(HELD_OUT[7], 1, 64)
    cover = face_cover(clip.landmarks[0], 64, 64)
    background = clip.depth[0] >= clip.depth[0].max() - 1e-3
    assert 0.03 < cover.mean() < 0.5
    assert (cover * background).sum() < 0.02 * cover.sum()
