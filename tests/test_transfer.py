"""Key-point transfer against the golden numbers, float64 linear algebra and a brute-force hull."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from dagan_rt.errors import InputError
from dagan_rt.keypoints import KeyPoints
from dagan_rt.transfer import hull_area, inverse_2x2, movement_scale, transfer

GOLDEN = np.load(Path(__file__).parent / "data" / "dagan.npz")


def golden(name: str) -> KeyPoints:
    return KeyPoints(GOLDEN[f"{name}_kp_value"], GOLDEN[f"{name}_kp_jacobian"])


def random_keypoints(rng: np.random.Generator, batch: int = 3, count: int = 7) -> KeyPoints:
    jacobian = np.eye(2) + 0.2 * rng.standard_normal((batch, count, 2, 2))
    return KeyPoints(rng.uniform(-1, 1, (batch, count, 2)).astype(np.float32), jacobian.astype(np.float32))


def brute_force_area(points: np.ndarray) -> float:
    """A pair of points is a hull edge if all others lie on one side; sum the triangles from the edges to the centre."""
    centre, area = points.mean(0), 0.0
    for first, second in itertools.combinations(range(len(points)), 2):
        edge = points[second] - points[first]
        others = np.delete(points, [first, second], axis=0) - points[first]
        side = edge[0] * others[:, 1] - edge[1] * others[:, 0]
        if (side > 0).all() or (side < 0).all():
            to_centre = centre - points[first]
            area += abs(edge[0] * to_centre[1] - edge[1] * to_centre[0]) / 2
    return area


def initial_frame() -> KeyPoints:
    """The driving key points of frame 0 are not in the file: solve them from a relative frame and its absolute twin."""
    source, moved, driving = golden("source"), golden("frame2_relative"), golden("frame2_absolute")
    value = driving.value - (moved.value - source.value)
    # moved = driving initial^-1 source, hence initial = source moved^-1 driving
    jacobian = source.jacobian @ np.linalg.inv(moved.jacobian) @ driving.jacobian
    return KeyPoints(value, jacobian)


def test_relative_motion_of_the_first_frame_is_none() -> None:
    source, still = golden("source"), golden("frame0_relative")
    np.testing.assert_allclose(still.value, source.value, atol=1e-6)
    np.testing.assert_allclose(still.jacobian, source.jacobian, atol=1e-5)


def test_adapted_motion_matches_the_golden_file() -> None:
    source, driving, initial = golden("source"), golden("frame2_absolute"), initial_frame()
    adapted = transfer(source, driving, initial, movement_scale(source, initial))
    np.testing.assert_allclose(adapted.value, golden("frame2_adapted").value, atol=1e-6)


def test_absolute_motion_is_relative_motion_from_the_source() -> None:
    source, driving = golden("source"), golden("frame2_absolute")
    moved = transfer(source, driving, initial=source, scale=1.0)
    np.testing.assert_allclose(moved.value, driving.value, atol=1e-6)
    np.testing.assert_allclose(moved.jacobian, driving.jacobian, atol=1e-5)


def test_transfer_equals_float64_linear_algebra() -> None:
    rng = np.random.default_rng(0)
    source, driving, initial = (random_keypoints(rng) for _ in range(3))
    scale = rng.uniform(0.5, 2, (3, 1)).astype(np.float32)
    moved = transfer(source, driving, initial, scale)
    for batch, point in itertools.product(range(3), range(7)):
        at = (batch, point)
        expected = source.value[at] + scale[batch, 0] * (driving.value[at] - initial.value[at])
        turned = np.linalg.solve(initial.jacobian[at].T.astype(float), driving.jacobian[at].T).T @ source.jacobian[at]
        np.testing.assert_allclose(moved.value[at], expected, atol=1e-6)
        np.testing.assert_allclose(moved.jacobian[at], turned, rtol=1e-4, atol=1e-5)
    assert moved.value.dtype == moved.jacobian.dtype == np.float32


def test_inverse_of_two_by_two() -> None:
    matrices = np.random.default_rng(1).standard_normal((50, 2, 2))
    np.testing.assert_allclose(inverse_2x2(matrices), np.linalg.inv(matrices), rtol=1e-9)


@pytest.mark.parametrize("count", [3, 4, 5, 10, 15, 40])
def test_hull_area_equals_brute_force(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(20):
        points = rng.uniform(-1, 1, (count, 2))
        assert hull_area(points) == pytest.approx(brute_force_area(points), rel=1e-9)


def test_hull_area_of_known_shapes() -> None:
    grid = np.stack(np.meshgrid(np.linspace(0, 2, 5), np.linspace(0, 3, 4)), -1).reshape(-1, 2)
    assert hull_area(np.concatenate([grid, grid])) == pytest.approx(6)  # points on edges and doubled points
    assert hull_area(np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])) == pytest.approx(0)
    assert hull_area(np.zeros((4, 2))) == 0


def test_scale_is_the_ratio_of_lengths() -> None:
    points = random_keypoints(np.random.default_rng(2), batch=1)
    double = KeyPoints(2 * points.value, points.jacobian)
    assert movement_scale(double, points) == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("bad", [np.zeros((1, 5, 2)), np.full((1, 5, 2), np.nan)])
def test_scale_of_a_face_without_area_is_refused(bad: np.ndarray) -> None:
    points = random_keypoints(np.random.default_rng(3), batch=1)
    with pytest.raises(InputError, match="initial driving frame"):
        movement_scale(points, KeyPoints(bad, None))
    with pytest.raises(InputError, match="source image"):
        movement_scale(KeyPoints(bad, None), points)
