from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dagan_rt.training.geometry.synthesis import (
    FARTHEST,
    NEAREST,
    Camera,
    back_project,
    depth_of,
    disparity_of,
    move,
    project,
    rotation_matrix,
    sample,
    synthesise,
)
from dagan_rt.training.heads.motion import draw_motion
from dagan_rt.training.heads.person import draw_person, draw_scene
from dagan_rt.training.heads.render import place
from dagan_rt.training.heads.render import project as heads_project
from dagan_rt.training.heads.shape import landmark_points, make_face
from tests.training.geometry.conftest import EXPRESSION


def rodrigues(vector: np.ndarray) -> np.ndarray:
    """Rotation written out from its formula, one vector [3]."""
    angle = np.linalg.norm(vector)
    if angle == 0:
        return np.eye(3)
    x, y, z = vector / angle
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * skew + (1 - math.cos(angle)) * skew @ skew


def read_bilinear(image: np.ndarray, u: float, v: float) -> np.ndarray:
    """`image` [C, h, w] at (u, v) in [0, 1]: four pixels, the border repeated."""
    _, height, width = image.shape
    x, y = min(max(u * width - 0.5, 0), width - 1), min(max(v * height - 0.5, 0), height - 1)
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    a, b = x - left, y - top
    return (
        (1 - a) * (1 - b) * image[:, top, left]
        + a * (1 - b) * image[:, top, left + 1]
        + (1 - a) * b * image[:, top + 1, left]
        + a * b * image[:, top + 1, left + 1]
    )


def twin(
    other: np.ndarray, depth: np.ndarray, focal: np.ndarray, centre: np.ndarray, rotation: np.ndarray,
    translation: np.ndarray, pivot: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """View synthesis of one picture, a pixel at a time, in float64."""
    height, width = depth.shape
    drawn = np.empty((other.shape[0], height, width))
    for row in range(height):
        for column in range(width):
            u, v, z = (column + 0.5) / width, (row + 0.5) / height, depth[row, column]
            point = np.array([(u - centre[0]) / focal[0] * z, (v - centre[1]) / focal[1] * z, z])
            point = rodrigues(rotation) @ (point - pivot) + pivot + translation
            seen = point[:2] / max(point[2], 1e-3) * focal + centre
            drawn[:, row, column] = read_bilinear(other, seen[0], seen[1])
    return drawn


def random_scene(height: int = 7, width: int = 5, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    return {
        "other": draw(batch, 3, height, width),
        "depth": 1 + draw(batch, 1, height, width),
        "focal": 1 + draw(batch, 2),
        "centre": 0.4 + 0.2 * draw(batch, 2),
        "rotation": 0.4 * (draw(batch, 3) - 0.5),
        "translation": 0.3 * (draw(batch, 3) - 0.5),
        "pivot": draw(batch, 3),
    }


def drawn_from(scene: dict[str, torch.Tensor]) -> torch.Tensor:
    camera = Camera(scene["focal"], scene["centre"])
    return synthesise(
        scene["other"], scene["depth"], camera, scene["rotation"], scene["translation"], scene["pivot"]
    ).image  # fmt: skip


def test_synthesis_equals_its_twin_pixel_by_pixel() -> None:
    scene = random_scene()
    drawn = drawn_from(scene)
    single = drawn_from({name: tensor.float() for name, tensor in scene.items()})
    for index in range(2):
        values = {name: tensor[index].numpy() for name, tensor in scene.items()}
        expected = twin(**(values | {"depth": values["depth"][0]}))
        np.testing.assert_allclose(drawn[index].numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(single[index].numpy(), expected, atol=1e-5)


def test_no_motion_draws_the_frame_itself() -> None:
    scene = random_scene()
    still = scene | {"rotation": torch.zeros(2, 3).double(), "translation": torch.zeros(2, 3).double()}
    torch.testing.assert_close(drawn_from(still), scene["other"])


def test_gradients_reach_depth_motion_and_camera() -> None:
    scene = random_scene(4, 5, 1)
    wanted = ("depth", "rotation", "translation", "focal", "centre")
    inputs = [scene[name].clone().requires_grad_() for name in wanted]

    def run(*values: torch.Tensor) -> torch.Tensor:
        return drawn_from(scene | dict(zip(wanted, values, strict=True)))

    assert torch.autograd.gradcheck(run, inputs, eps=1e-7, atol=1e-5)


def test_rotations_are_rodrigues_and_smooth_at_zero() -> None:
    vectors = torch.tensor([[0.0, 0, 0], [1e-7, 0, 0], [0.3, -0.2, 0.9], [2.0, 1.0, -1.5]], dtype=torch.float64)
    expected = np.stack([rodrigues(vector.numpy()) for vector in vectors])
    np.testing.assert_allclose(rotation_matrix(vectors).numpy(), expected, atol=1e-12)
    assert torch.autograd.gradcheck(rotation_matrix, [torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)])


def test_disparity_spans_the_depths() -> None:
    disparity = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    expected = [FARTHEST, 2 / (1 / NEAREST + 1 / FARTHEST), NEAREST]
    torch.testing.assert_close(depth_of(disparity), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(disparity_of(depth_of(disparity)), disparity)


def test_projection_undoes_back_projection_at_every_size() -> None:
    scene = random_scene()
    camera = Camera(scene["focal"], scene["centre"])
    for height, width in ((7, 5), (14, 10)):
        depth = F.interpolate(scene["depth"], (height, width))
        places = project(back_project(depth, camera), camera).unflatten(2, (height, width))
        torch.testing.assert_close(places[0, 0, 0], (torch.arange(width).double() + 0.5) / width)
        torch.testing.assert_close(places[0, 1, :, 0], (torch.arange(height).double() + 0.5) / height)


def test_what_moves_behind_the_camera_stays_finite() -> None:
    scene = random_scene()
    scene["translation"] = torch.tensor([[0.0, 0.0, -5.0]] * 2, dtype=torch.float64)
    scene["depth"].requires_grad_()
    drawn_from(scene).sum().backward()
    assert bool(torch.isfinite(scene["depth"].grad).all())  # type: ignore[arg-type]


def test_outside_the_picture_the_border_repeats() -> None:
    image = torch.arange(6.0).view(1, 1, 2, 3)
    places = torch.tensor([[[-1.0, 2.0], [0.25, 0.75]]])  # (x, y): far left in the first row, far right in the second
    assert sample(image, places, 1, 2).flatten().tolist() == [0.0, 5.0]


# ---------------------------------------------------------------------------------------------------------------------
# Heads: with the true depth, motion and camera a frame is drawn from another one


@pytest.mark.parametrize("identity", [1, 3])
def test_a_head_is_drawn_from_its_neighbour_by_the_true_geometry(identity: int, head_pair: Any) -> None:
    from dagan_rt.training.geometry.score import face_mask
    from dagan_rt.training.heads import draw_clip

    clip = draw_clip(identity, 5, 128)
    mask = torch.from_numpy(face_mask(clip.landmarks[0], clip.depth[0]))
    pair = {
        name: torch.from_numpy(np.asarray(value, np.float64))
        for name, value in head_pair(identity, (0, 4), 128).items()
    }

    def error(scale: float) -> float:
        """Mean error in the face when the head turns by `scale` times the truth (0: as it is)."""
        camera = Camera(pair["focal"][None], torch.full((1, 2), 0.5).double())
        drawn = synthesise(
            pair["images"][1:], pair["depth"][None, :1], camera, scale * pair["rotation"][None],
            scale * pair["translation"][None], pair["pivot"][None],
        )  # fmt: skip
        return float((drawn.image[0] - pair["images"][0])[:, mask].abs().mean())

    assert error(1.0) < 0.6 * error(0.0)
    assert error(1.0) < min(error(0.8), error(1.2), error(-1.0))


def test_landmarks_move_with_the_head_to_the_last_digit(head_pair: Any) -> None:
    """The drawing code's own projection of both poses, with one expression, against motion and camera."""
    size, pair = 64, head_pair(2, (0, 7), 64)
    motion, scene = draw_motion(2, 0, 8), draw_scene(2, 0)
    points = landmark_points(make_face(draw_person(2), np.reshape(EXPRESSION, (7, 1, 1))))[0]  # [68, 3]
    seen = [heads_project(points, place(motion.pose[frame], motion.shift[frame]), scene) for frame in (0, 7)]
    first, second = (torch.from_numpy((corner * (size - 1) / size + 1) / 2).T[None] for corner, _ in seen)  # [1, 2, 68]
    camera = Camera(torch.from_numpy(pair["focal"])[None], torch.full((1, 2), 0.5).double())
    depth = torch.from_numpy(seen[0][1])
    ray = (first - 0.5) / camera.focal[..., None]
    spatial = torch.cat([ray, torch.ones_like(ray[:, :1])], dim=1) * depth  # [1, 3, 68]
    about = {name: torch.from_numpy(pair[name])[None].double() for name in ("rotation", "translation", "pivot")}
    torch.testing.assert_close(project(move(spatial, **about), camera), second, atol=1e-12, rtol=0)


def test_points_move_by_rotation_then_translation_about_the_pivot() -> None:
    quarter = torch.tensor([[0.0, 0.0, math.pi / 2]], dtype=torch.float64)
    point = torch.tensor([[[2.0], [0.0], [5.0]]], dtype=torch.float64)
    pivot = torch.tensor([[1.0, 0.0, 9.0]], dtype=torch.float64)
    shift = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([1.0, 1.0, 6.0], dtype=torch.float64)  # x turns towards y, which points down
    torch.testing.assert_close(move(point, quarter, shift, pivot).flatten(), expected)
