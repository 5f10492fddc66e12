"""The losses against the golden numbers, brute force, and what each may and may not send gradients to."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.model import Model
from dagan_rt.training import losses
from dagan_rt.training.losses import DEPTH_TERMS, LossWeights, discriminator_loss, generator_losses
from dagan_rt.training.transform import Transform
from dagan_rt.training.vgg import Vgg19, load_vgg

GOLDEN = Path(__file__).parents[1] / "data" / "losses.npz"
NOTHING = LossWeights(
    perceptual=0, generator_gan=0, feature_matching=0,
    equivariance_value=0, equivariance_jacobian=0, keypoint_distance=0,
)  # fmt: skip


def only(**weights: float) -> LossWeights:
    return LossWeights(**{**vars(NOTHING), **weights})


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- golden ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_run(golden, fill) -> SimpleNamespace:
    """Every term on the golden batch; the reference ran its networks in eval mode."""
    with np.load(GOLDEN) as arrays:
        expected = {name: float(arrays[name]) for name in arrays if name.startswith("loss_")}
        batch = {name: torch.from_numpy(arrays[name]).float() / 255 for name in ("source", "driving")}
        warps = Transform(torch.from_numpy(arrays["theta"]), torch.from_numpy(arrays["control_params"]))
    vgg = Vgg19()
    vgg.load_state_dict(
        {name: torch.from_numpy(fill.tensor("vgg19", name, tuple(v.shape))) for name, v in vgg.state_dict().items()}
    )
    model = golden("dagan").model()
    with torch.no_grad():
        terms, generated, driving = generator_losses(model, batch, LossWeights(), vgg, warps)
        source = model.find_keypoints(batch["source"])
        discriminator = discriminator_loss(model.discriminator, batch["driving"], generated.prediction, driving)
    return SimpleNamespace(expected=expected, terms=terms, source=source, driving=driving, discriminator=discriminator)


@pytest.mark.parametrize(
    ("term", "name"),
    [
        ("perceptual", "loss_perceptual"),
        ("generator_gan", "loss_gen_gan"),
        ("feature_matching", "loss_feature_matching"),
        ("equivariance_value", "loss_equivariance_value"),
        ("equivariance_jacobian", "loss_equivariance_jacobian"),
    ],
)
def test_generator_terms_agree_with_the_golden_numbers(golden_run, term, name):
    assert golden_run.terms[term].item() == pytest.approx(golden_run.expected[name], rel=1e-4)


def test_discriminator_loss_agrees_with_the_golden_number(golden_run):
    assert golden_run.discriminator.item() == pytest.approx(golden_run.expected["loss_disc_gan"], rel=1e-4)


def test_reported_key_point_distance_agrees_with_the_golden_number(golden_run):
    reported = sum(
        losses.keypoint_distance_reported(points.value).item() for points in (golden_run.source, golden_run.driving)
    )
    assert 10 * reported == pytest.approx(golden_run.expected["loss_kp_distance"], rel=1e-5)


# --- key-point distance ---------------------------------------------------------------------------------------------


def test_reported_distance_counts_crowded_pairs():
    points = noise(3, 12, 2, dtype=torch.float64) * 2 - 1
    crowded = sum(
        bool((points[b, i] - points[b, j]).square().sum() < 0.3**2)
        for b in range(3)
        for i, j in itertools.permutations(range(12), 2)
    )
    assert crowded > 0
    assert losses.keypoint_distance_reported(points, 0.3).item() == pytest.approx(2 * crowded / (3 * 12 * 12))


def test_hinge_is_zero_exactly_where_the_reported_form_is():
    first = torch.zeros(1, 1, 2, dtype=torch.float64)
    for distance in (0.0, 0.05, 0.19999, 0.20001, 0.5):
        pair = torch.cat([first, torch.tensor([[[0.6, 0.8]]], dtype=torch.float64) * distance], 1)
        reported, hinge = losses.keypoint_distance_reported(pair), losses.keypoint_distance_hinge(pair)
        assert (hinge == 0) == (reported == 0) == (distance > 0.2)
        assert hinge <= reported


def test_hinge_pushes_crowded_points_apart_and_survives_coinciding_ones():
    points = torch.tensor([[[0.0, 0.0], [0.1, 0.0], [0.9, 0.9], [0.9, 0.9]]], requires_grad=True)
    losses.keypoint_distance_hinge(points).backward()
    assert points.grad is not None and points.grad.isfinite().all()
    step = -points.grad[0]
    assert step[0, 0] < 0 < step[1, 0]


# --- equivariance ---------------------------------------------------------------------------------------------------


def test_perfectly_equivariant_key_points_cost_nothing():
    generator = torch.Generator().manual_seed(5)
    warps = Transform.random(2, 0.2, 0.02, generator)
    value, jacobian = noise(2, 7, 2) * 2 - 1, torch.eye(2) + 0.2 * noise(2, 7, 2, 2, seed=1)
    found = KeyPoints(value, jacobian)
    driving = KeyPoints(warps.warp(value), warps.jacobian(value) @ jacobian)
    assert losses.equivariance_value_loss(driving, found, warps).item() == pytest.approx(0, abs=1e-6)
    assert losses.equivariance_jacobian_loss(driving, found, warps).item() == pytest.approx(0, abs=1e-5)
    # A frame turned by M on the right leaves M^-1 = [[0.5, -0.5], [0, 1]] of the cycle, in this order of factors only.
    moved = KeyPoints(driving.value + 0.1, driving.jacobian @ torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
    assert losses.equivariance_value_loss(moved, found, warps).item() == pytest.approx(0.1, abs=1e-6)
    assert losses.equivariance_jacobian_loss(moved, found, warps).item() == pytest.approx(0.25, abs=1e-5)


# --- image terms ----------------------------------------------------------------------------------------------------


def test_downsample_is_a_zero_padded_gaussian_every_nth_pixel():
    image = noise(1, 2, 12, 16, dtype=torch.float64)
    got = losses.downsample(image, 4)
    assert got.shape == (1, 2, 3, 4)
    sigma, radius = 1.5, 6
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(image.numpy(), [(0, 0), (0, 0), (radius, radius), (radius, radius)])
    for row, column in itertools.product(range(3), range(4)):
        window = padded[0, :, 4 * row : 4 * row + 13, 4 * column : 4 * column + 13]
        np.testing.assert_allclose(got[0, :, row, column].numpy(), (window * kernel).sum((1, 2)), atol=1e-12)
    assert losses.downsample(image, 1) is image


def test_perceptual_loss_leaves_out_scales_too_small_for_vgg():
    vgg, one, other = load_vgg(width=0.1), noise(1, 3, 32, 32), noise(1, 3, 32, 32, seed=1)
    assert losses.perceptual_loss(one, other, vgg, scales=4) == losses.perceptual_loss(one, other, vgg, scales=2)
    assert losses.perceptual_loss(one, other, vgg, scales=2) > losses.perceptual_loss(one, other, vgg, scales=1)
    assert losses.perceptual_loss(one, one, vgg) == 0


def test_pixel_pyramid_adds_up_block_means():
    one, other = noise(2, 3, 8, 8, dtype=torch.float64), noise(2, 3, 8, 8, seed=1, dtype=torch.float64)
    expected = 0.0
    for side in (1, 2, 4):
        blocks = (one - other).numpy().reshape(2, 3, 8 // side, side, 8 // side, side).mean((3, 5))
        expected += np.abs(blocks).mean()
    assert losses.pixel_pyramid_loss(one, other, scales=3).item() == pytest.approx(expected, rel=1e-12)
    assert losses.pixel_pyramid_loss(one[..., :1, :1], other[..., :1, :1], scales=4).isfinite()


def test_image_gradient_loss_ignores_brightness_and_sees_edges():
    image = noise(1, 3, 6, 6, dtype=torch.float64)
    assert losses.image_gradient_loss(image + 0.3, image).item() == pytest.approx(0, abs=1e-12)
    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1  # one of three horizontal differences is 1, no vertical one
    assert losses.image_gradient_loss(step, torch.zeros_like(step)).item() == pytest.approx(1 / 3)


# --- losses against the truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", sorted(losses.DEFAULT_LANDMARKS))
def test_landmark_tables_name_different_places_once(count):
    groups = losses.DEFAULT_LANDMARKS[count]
    used = [index for group in groups for index in group]
    assert len(groups) == count and all(groups)
    assert len(set(used)) == len(used) and set(used) <= set(range(68))


@pytest.mark.parametrize("count", sorted(losses.DEFAULT_LANDMARKS))
def test_landmark_tables_are_symmetric(count):
    """Mirroring a face must map the groups onto each other: no side of the face is favoured."""
    mirror = np.arange(68)
    mirror[:17] = np.arange(16, -1, -1)
    mirror[17:27] = np.arange(26, 16, -1)
    mirror[31:36] = np.arange(35, 30, -1)
    mirror[36:42], mirror[42:48] = [45, 44, 43, 42, 47, 46], [39, 38, 37, 36, 41, 40]
    mirror[48:55], mirror[55:60] = np.arange(54, 47, -1), np.arange(59, 54, -1)
    mirror[60:65], mirror[65:68] = np.arange(64, 59, -1), np.arange(67, 64, -1)
    groups = {frozenset(group) for group in losses.DEFAULT_LANDMARKS[count]}
    assert {frozenset(mirror[list(group)].tolist()) for group in groups} == groups


def test_landmark_loss_is_the_distance_to_group_means():
    landmarks = noise(2, 68, 2)
    groups = ((0, 1), (5,), (7, 8, 9))
    exact = torch.stack([landmarks[:, list(group)].mean(1) for group in groups], 1)
    assert losses.landmark_loss(exact, landmarks, groups) == 0
    exact[0, 1, 0] += 0.6
    assert losses.landmark_loss(exact, landmarks, groups).item() == pytest.approx(0.6 / 12, abs=1e-6)
    with pytest.raises(InputError, match="one a key point = 3, got 2"):
        losses.landmark_loss(exact, landmarks, groups[:2])
    with pytest.raises(InputError, match="no default landmarks for 3"):
        losses.landmark_loss(exact, landmarks)


def test_disparity_loss_averages_the_truth_down():
    truth = noise(1, 1, 8, 8)
    blocks = torch.from_numpy(truth.numpy().reshape(1, 1, 4, 2, 4, 2).mean((3, 5)))
    assert losses.disparity_loss([truth, blocks], truth).item() == pytest.approx(0, abs=1e-7)
    assert losses.disparity_loss([truth, blocks + 0.5], truth).item() == pytest.approx(0.25, abs=1e-6)


# --- the whole step on a small model --------------------------------------------------------------------------------


@pytest.fixture
def small() -> Model:
    torch.manual_seed(0)
    config = NetworkConfig(
        "dagan", size=64, num_keypoints=10, depth_width=8, depth_decoder_widths=(4, 4, 8, 8, 8), keypoint_width=4,
        keypoint_max=16, keypoint_blocks=2, motion_width=4, motion_max=16, motion_blocks=2, generator_width=4,
        generator_max=16, residual_blocks=1, query_width=4, discriminator_width=4, discriminator_max=8,
        discriminator_blocks=2,
    )  # fmt: skip
    return Model(config).train()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {
        "source": noise(2, 3, 64, 64),
        "driving": noise(2, 3, 64, 64, seed=1),
        "source_disparity": noise(2, 1, 64, 64, seed=2),
        "driving_disparity": noise(2, 1, 64, 64, seed=3),
        "source_landmarks": noise(2, 68, 2, seed=4) * 2 - 1,
        "driving_landmarks": noise(2, 68, 2, seed=5) * 2 - 1,
    }


def has_gradient(network: torch.nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters())


EVERYTHING = LossWeights(pixel=1, gradient=1, landmark=1, disparity=1)


def test_every_term_is_there_and_finite(small, batch):
    terms, generated, driving = generator_losses(small, batch, EVERYTHING, load_vgg(width=0.1))
    constants = {"alpha", "scales", "sigma_affine", "sigma_tps"}
    depth_alone = {"photometric", *DEPTH_TERMS}
    assert set(terms) == set(vars(EVERYTHING)) - constants - depth_alone - {"discriminator_gan"}
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    assert generated is not None and generated.prediction.shape == (2, 3, 64, 64)
    assert driving.value.shape == (2, 10, 2)


@pytest.mark.parametrize("name", ["pixel", "landmark", "disparity", "equivariance_value", "feature_matching"])
def test_weights_scale_their_term_and_zero_leaves_it_out(small, batch, name):
    small.eval()  # batch statistics would differ from call to call
    warps = Transform.random(2, generator=torch.Generator().manual_seed(0))
    once, _, _ = generator_losses(small, batch, only(**{name: 1}), transform=warps)
    thrice, _, _ = generator_losses(small, batch, only(**{name: 3}), transform=warps)
    assert set(once) == {name}
    assert thrice[name].item() == pytest.approx(3 * once[name].item(), rel=1e-5)


def test_gradients_reach_generator_and_key_points_only(small, batch):
    terms, _, _ = generator_losses(small, batch, LossWeights(), load_vgg(width=0.1))
    sum(terms.values()).backward()
    assert has_gradient(small.generator) and has_gradient(small.keypoints)
    assert not has_gradient(small.discriminator) and not has_gradient(small.depth)
    assert all(parameter.requires_grad for parameter in small.discriminator.parameters())


def test_depth_learns_from_the_disparity_term_alone(small, batch):
    terms, _, _ = generator_losses(small, batch, LossWeights(pixel=1, perceptual=0, disparity=1))
    disparity = terms.pop("disparity")
    sum(terms.values()).backward(retain_graph=True)
    assert not has_gradient(small.depth)
    disparity.backward()
    assert has_gradient(small.depth)


def test_the_generator_runs_only_where_a_term_looks_at_its_image(small, batch):
    assert generator_losses(small, batch, only(landmark=1, disparity=1))[1] is None
    assert generator_losses(small, batch, only(gradient=1))[1] is not None


def test_a_fixed_depth_network_stays_as_it_was(small, batch):
    before = {name: value.clone() for name, value in small.depth.state_dict().items()}
    generator_losses(small, batch, only(equivariance_value=1))
    assert small.depth.training
    assert all(torch.equal(value, before[name]) for name, value in small.depth.state_dict().items())


def test_discriminator_loss_trains_the_discriminator_only(small, batch):
    _, generated, driving = generator_losses(small, batch, only(generator_gan=1))
    assert generated is not None
    discriminator_loss(small.discriminator, batch["driving"], generated.prediction, driving).backward()
    assert has_gradient(small.discriminator)
    assert not has_gradient(small.generator) and not has_gradient(small.keypoints)


def test_the_same_generator_state_draws_the_same_warp(small, batch):
    small.eval()
    first, second, third = (
        generator_losses(small, batch, only(equivariance_value=1), generator=torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert first["equivariance_value"] == second["equivariance_value"] != third["equivariance_value"]


@pytest.mark.parametrize(("weight", "missing"), [("landmark", "source_landmarks"), ("disparity", "driving_disparity")])
def test_a_batch_without_the_truth_is_refused(small, batch, weight, missing):
    del batch[missing]
    with pytest.raises(InputError, match=missing):
        generator_losses(small, batch, only(**{weight: 1}))


def test_a_perceptual_weight_without_vgg_is_refused(small, batch):
    with pytest.raises(InputError, match="no VGG"):
        generator_losses(small, batch, only(perceptual=1))


@pytest.mark.parametrize("weights", [{"pixel": -1.0}, {"pixel": float("nan")}, {"alpha": 0.0}, {"scales": 0}])
def test_weights_out_of_range_are_refused(weights):
    with pytest.raises(InputError):
        LossWeights(**weights)
