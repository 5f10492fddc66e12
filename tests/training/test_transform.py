"""The random warp against the golden frame, a float64 loop, and automatic differentiation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dagan_rt.training.transform import Transform

LOSSES = Path(__file__).parents[1] / "data" / "losses.npz"


@pytest.fixture
def strong() -> Transform:
    """Warps far from the identity, in float64."""
    generator = torch.Generator().manual_seed(3)
    warps = Transform.random(2, sigma_affine=0.3, sigma_tps=0.05, generator=generator)
    return Transform(warps.theta.double(), warps.control_params.double())


def random_points(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2.4 - 1.2


def test_frame_agrees_with_the_golden_transformed_driving():
    with np.load(LOSSES) as golden:
        warps = Transform(torch.from_numpy(golden["theta"]), torch.from_numpy(golden["control_params"]))
        driving = torch.from_numpy(golden["driving"]).float() / 255
        expected = torch.from_numpy(golden["transformed_driving"])
    torch.testing.assert_close(warps.frame(driving)[..., ::4, ::4], expected, atol=1e-4, rtol=0)


def test_warp_agrees_with_a_loop_over_control_points(strong):
    points = random_points(5)
    got = strong.warp(points)
    for b in range(2):
        for n in range(5):
            x, y = points[b, n].tolist()
            bend = 0.0
            for row in range(5):
                for column in range(5):
                    r = abs(x - (column / 2 - 1)) + abs(y - (row / 2 - 1))
                    bend += strong.control_params[b, 0, 5 * row + column].item() * r * r * math.log(r + 1e-6)
            theta = strong.theta[b].tolist()
            expected = [line[0] * x + line[1] * y + line[2] + bend for line in theta]
            assert got[b, n].tolist() == pytest.approx(expected, abs=1e-12)


def test_jacobian_is_the_derivative_of_the_warp(strong):
    points = random_points(6)
    full = torch.autograd.functional.jacobian(strong.warp, points)  # [B, N, 2, B, N, 2]
    expected = torch.einsum("bnibnj->bnij", full)
    torch.testing.assert_close(strong.jacobian(points), expected, atol=1e-12, rtol=0)


def test_jacobian_is_finite_on_control_points(strong):
    points = torch.tensor([[[0.0, 0.0], [0.5, -1.0]]], dtype=torch.float64).expand(2, -1, -1)
    assert strong.jacobian(points).isfinite().all()


def test_points_found_in_the_transformed_frame_are_taken_back():
    """A bright spot drawn around warp(p) in the original frame must show up at p in the transformed one."""
    warps = Transform.random(2, 0.1, 0.01, torch.Generator().manual_seed(3))
    warps = Transform(warps.theta.double(), warps.control_params.double())
    size = 129
    ticks = torch.linspace(-1, 1, size, dtype=torch.float64)
    wanted = torch.tensor([0.1, -0.2], dtype=torch.float64).expand(2, 1, 2)
    origin = warps.warp(wanted)[:, 0]
    distance = (ticks[None, None, :] - origin[:, :1, None]) ** 2 + (ticks[None, :, None] - origin[:, 1:, None]) ** 2
    shown = warps.frame(torch.exp(-distance / 0.001)[:, None])[:, 0]
    mass = shown.sum((1, 2))
    found = torch.stack([(shown.sum(1) * ticks).sum(1) / mass, (shown.sum(2) * ticks).sum(1) / mass], 1)
    torch.testing.assert_close(found, wanted[:, 0], atol=0.016, rtol=0)  # a pixel


def test_without_noise_the_warp_is_the_identity():
    warps = Transform.random(2, sigma_affine=0, sigma_tps=0)
    points = random_points(4).float()
    torch.testing.assert_close(warps.warp(points), points)
    torch.testing.assert_close(warps.jacobian(points), torch.eye(2).expand(2, 4, 2, 2))


def test_random_has_the_asked_spread_and_follows_its_generator():
    def draw(seed: int) -> Transform:
        return Transform.random(400, generator=torch.Generator().manual_seed(seed))

    one, same, other = draw(1), draw(1), draw(2)
    assert torch.equal(one.theta, same.theta) and torch.equal(one.control_params, same.control_params)
    assert not torch.equal(one.theta, other.theta)
    assert (one.theta - torch.eye(2, 3)).std().item() == pytest.approx(0.05, rel=0.1)
    assert one.control_params.std().item() == pytest.approx(0.005, rel=0.1)


@pytest.mark.parametrize(
    ("theta", "control", "message"),
    [((2, 3, 3), (2, 1, 25), "theta must be"), ((2, 2, 3), (2, 1, 16), "control_params must be")],
)
def test_wrong_shapes_are_refused(theta, control, message):
    with pytest.raises(ValueError, match=message):
        Transform(torch.zeros(theta), torch.zeros(control))
