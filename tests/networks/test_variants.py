"""What tells the variants apart, and the attention against a float64 twin written out as loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.networks.attention import CrossModalAttention, cross_attention
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.variants import VARIANTS


def test_attention_matches_loops_in_float64() -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 7)), rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
    expected = np.zeros((4, 7))
    for n in range(7):
        logits = [sum(query[d, n] * key[d, m] for d in range(3)) for m in range(5)]  # no 1 / sqrt(d)
        weights = np.exp(logits) / np.exp(logits).sum()
        expected[:, n] = sum(weights[m] * value[:, m] for m in range(5))
    found = cross_attention(*(torch.from_numpy(x)[None] for x in (query, key, value)))
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-12)


def test_attention_at_its_initial_gamma_is_the_identity() -> None:
    warped = torch.randn(1, 8, 4, 4)
    module = CrossModalAttention(8, 2)
    assert torch.equal(module(module.query(warped), warped), warped)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_reenacts(small_model: Any, variant: str) -> None:
    model = small_model(variant)
    image, driving = torch.rand(2, 2, 3, 64, 64).unbind(0)
    with torch.inference_mode():
        generated = model(image, driving)
    assert generated.prediction.shape == (2, 3, 64, 64)
    assert bool(((generated.prediction >= 0) & (generated.prediction <= 1)).all())
    assert generated.motion.flow.shape == (2, 16, 16, 2)
    assert generated.motion.mask.sum(1) == pytest.approx(torch.ones(2, 16, 16), abs=1e-5)
    assert (model.depth is not None) == VARIANTS[variant].uses_depth


@pytest.mark.parametrize(("variant", "used"), [("dagan", True), ("dagan_sa", False), ("dagan_spade", True)])
def test_depth_reaches_the_attention_only_where_the_table_says(small_model: Any, variant: str, used: bool) -> None:
    model = small_model(variant)
    image = torch.rand(1, 3, 64, 64)
    points = model.find_keypoints(image)
    with torch.inference_mode():
        first, second = (
            model.generator(image, points, points, depth).attended_feature for depth in torch.rand(2, 1, 1, 64, 64)
        )
    assert torch.equal(first, second) != used


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"variant": "gan"}, "variant"), ({"size": 100}, "size"), ({"size": 1 << 20}, "size"),
     ({"depth_layers": 34}, "34"),
     ({"motion_scale": 0.0}, "motion_scale"), ({"motion_scale": float("nan")}, "motion_scale"),
     ({"keypoint_blocks": 1000}, "keypoint_blocks"), ({"depth_decoder_widths": (1, 2)}, "depth_decoder_widths"),
     ({"depth_decoder_widths": [1, 2, 3, 4, "x"]}, "depth_decoder_widths"), ({"surprise": 1}, "surprise"),
     ({"size": "256"}, "size"), ({"size": True}, "size")],
)  # fmt: skip
def test_a_config_from_a_file_is_not_believed(changes: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        NetworkConfig.from_dict(NetworkConfig().to_dict() | changes)


def test_a_config_survives_its_dictionary() -> None:
    config = NetworkConfig(variant="fomm", size=128, num_keypoints=10, depth_decoder_widths=(1, 2, 3, 4, 5))
    assert NetworkConfig.from_dict(config.to_dict()) == config
