from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.depth import DepthNetwork
from dagan_rt.training.geometry.losses import (
    TIE,
    bulge,
    consistency,
    depth_losses,
    masked_minimum,
    photometric_error,
    smoothness,
    ssim_distance,
)
from dagan_rt.training.geometry.pose import Motion, PoseNetwork
from dagan_rt.training.geometry.score import Faces, constant_guess, draw_faces, score_guess, score_network
from dagan_rt.training.geometry.synthesis import Camera, disparity_of, synthesise
from dagan_rt.training.heads.person import draw_scene
from dagan_rt.training.losses import LossWeights

SMALL = NetworkConfig(size=32, depth_width=4, depth_decoder_widths=(4, 4, 4, 8, 8))
WEIGHTS = LossWeights(photometric=2.0, smoothness=0.5)


def networks(seed: int = 0) -> tuple[DepthNetwork, PoseNetwork]:
    torch.manual_seed(seed)
    return DepthNetwork(SMALL), PoseNetwork(SMALL)


def random_batch(count: int = 2, size: int = 32, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(count, 3, size, size, generator=generator) for name in ("target", "before", "after")}


# ---------------------------------------------------------------------------------------------------------------------
# Photometric error


def reflected(index: int, count: int) -> int:
    return -index if index < 0 else 2 * count - 2 - index if index >= count else index


def twin_error(image: np.ndarray, target: np.ndarray) -> np.ndarray:
    """0.85 (1 - SSIM) / 2 + 0.15 L1 of [C, H, W], window by window, averaged over channels: [H, W]."""
    channels, height, width = image.shape
    error = np.zeros((height, width))
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                rows = [reflected(y + offset, height) for offset in (-1, 0, 1)]
                columns = [reflected(x + offset, width) for offset in (-1, 0, 1)]
                a, b = image[channel][np.ix_(rows, columns)], target[channel][np.ix_(rows, columns)]
                covariance = ((a - a.mean()) * (b - b.mean())).mean()
                ssim = (2 * a.mean() * b.mean() + 1e-4) * (2 * covariance + 9e-4)
                ssim /= (a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (a.var() + b.var() + 9e-4)
                structure = min(max((1 - ssim) / 2, 0), 1)
                error[y, x] += (0.85 * structure + 0.15 * abs(image[channel, y, x] - target[channel, y, x])) / channels
    return error


def test_photometric_error_equals_its_twin_window_by_window() -> None:
    generator = torch.Generator().manual_seed(0)
    image, target = (torch.rand(3, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = twin_error(image.numpy(), target.numpy())
    np.testing.assert_allclose(photometric_error(image[None], target[None])[0, 0].numpy(), expected, atol=1e-12)
    single = photometric_error(image[None].float(), target[None].float())[0, 0]
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-4)


@pytest.mark.slow  # for what torchmetrics imports
def test_ssim_agrees_with_torchmetrics_inside_the_border() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    image, target = torch.rand(2, 3, 16, 16).double(), torch.rand(2, 3, 16, 16).double()
    own = 1 - 2 * ssim_distance(image, target)[..., 2:-2, 2:-2]
    _, whole = functional.structural_similarity_index_measure(
        image, target, gaussian_kernel=False, kernel_size=3, data_range=1.0, return_full_image=True
    )
    assert whole.shape == image.shape
    torch.testing.assert_close(own, whole[..., 2:-2, 2:-2], atol=1e-6, rtol=1e-6)


def test_leading_dimensions_broadcast() -> None:
    images, target = torch.rand(4, 2, 3, 3, 6, 6).double(), torch.rand(3, 3, 6, 6).double()
    together = photometric_error(images, target)
    for scale in range(4):
        for neighbour in range(2):
            torch.testing.assert_close(together[scale, neighbour], photometric_error(images[scale, neighbour], target))


def test_equal_pictures_have_no_error_and_gradients_are_right() -> None:
    image = torch.rand(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.rand(1, 2, 4, 5, dtype=torch.float64)
    assert float(photometric_error(target, target).abs().max()) < 1e-12
    assert torch.autograd.gradcheck(lambda x: photometric_error(x, target), [image])


# ---------------------------------------------------------------------------------------------------------------------
# Minimum and auto-mask


def test_an_occluded_pixel_is_explained_by_the_neighbour_that_sees_it() -> None:
    warped = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).view(1, 2, 1, 1, 1, 2).requires_grad_()  # [S, N, B, 1, H, W]
    unwarped = torch.ones(2, 1, 1, 1, 2)
    least = masked_minimum(warped, unwarped)
    assert least.flatten().tolist() == pytest.approx([0.2, 0.1])
    least.sum().backward()
    assert warped.grad is not None
    assert warped.grad.flatten().tolist() == [0, 1, 1, 0]


def test_the_mask_is_an_error_without_gradient() -> None:
    warped = torch.tensor([0.5, 0.1]).view(1, 1, 1, 1, 1, 2).requires_grad_()
    unwarped = torch.tensor([0.2, 0.3]).view(1, 1, 1, 1, 2).requires_grad_()
    least = masked_minimum(warped, unwarped)
    assert least.flatten().tolist() == pytest.approx([0.2, 0.1], abs=5 * TIE)
    least.sum().backward()
    assert warped.grad is not None and unwarped.grad is None
    assert warped.grad.flatten().tolist() == [0, 1]


def test_nothing_is_learnt_from_a_clip_that_stands_still() -> None:
    depth, pose = networks()
    with torch.no_grad():  # a motion that is worse than none
        assert pose.head.bias is not None
        pose.head.bias[3] += 10.0
    target = random_batch()["target"]
    losses = depth_losses(depth, pose, {"target": target, "before": target, "after": target}, WEIGHTS)
    losses["photometric"].backward()
    assert abs(losses["photometric"].item()) < 10 * TIE
    for parameter in [*depth.parameters(), *pose.parameters()]:
        assert parameter.grad is None or float(parameter.grad.abs().max()) == 0


def test_ties_are_broken_by_the_seed_alone() -> None:
    error = torch.full((2, 1, 1, 16, 16), 0.25)

    def chosen(seed: int) -> Tensor:
        torch.manual_seed(seed)
        warped = error[None].clone().requires_grad_()
        masked_minimum(warped, error).sum().backward()
        assert warped.grad is not None
        return warped.grad

    torch.testing.assert_close(chosen(3), chosen(3), rtol=0, atol=0)
    assert not torch.equal(chosen(3), chosen(4))
    share = float(chosen(3).sum()) / 256
    assert 0.1 < share < 0.5  # the least of two noises lies below zero three times in four


# ---------------------------------------------------------------------------------------------------------------------
# Smoothness


def test_smoothness_equals_its_twin_and_ignores_scale() -> None:
    generator = torch.Generator().manual_seed(2)
    disparity = 0.1 + torch.rand(2, 1, 5, 6, generator=generator, dtype=torch.float64)
    image = torch.rand(2, 3, 5, 6, generator=generator, dtype=torch.float64)
    across, down = [], []
    for index in range(2):
        relative = (disparity[index, 0] / disparity[index, 0].mean()).numpy()
        picture = image[index].numpy()
        for y in range(5):
            for x in range(6):
                here = picture[:, y, x]
                if x < 5:
                    edge = np.exp(-np.abs(picture[:, y, x + 1] - here).mean())
                    across.append(abs(relative[y, x + 1] - relative[y, x]) * edge)
                if y < 4:
                    edge = np.exp(-np.abs(picture[:, y + 1, x] - here).mean())
                    down.append(abs(relative[y + 1, x] - relative[y, x]) * edge)
    expected = np.mean(across) + np.mean(down)
    assert float(smoothness(disparity, image)) == pytest.approx(expected, rel=1e-6)
    assert float(smoothness(7.0 * disparity, image)) == pytest.approx(expected, rel=1e-6)


def test_a_step_of_depth_costs_less_where_the_picture_has_an_edge() -> None:
    disparity, image = torch.ones(1, 1, 4, 6), torch.zeros(1, 3, 4, 6)
    disparity[..., 3:], image[..., 3:] = 2.0, 1.0
    assert float(smoothness(disparity, image)) < 0.5 * float(smoothness(disparity, torch.zeros_like(image)))
    assert float(smoothness(torch.ones(1, 1, 4, 6), image)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# All of it


class FixedDepth(nn.Module):
    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def scales(self, image: Tensor) -> list[Tensor]:
        return [disparity[: len(image)] for disparity in self.maps]


class FixedPose(nn.Module):
    def __init__(self, motion: Callable[[Tensor], Motion]) -> None:
        super().__init__()
        self.motion = motion

    def forward(self, target: Tensor, other: Tensor) -> Motion:
        assert target.shape == other.shape
        return self.motion(other)


def test_depth_losses_are_put_together_as_written() -> None:
    """Scale by scale and picture by picture in float64, from parts that have twins of their own."""
    size, batch = 16, random_batch(2, 16)
    generator = torch.Generator().manual_seed(5)
    # of the two targets, then of what was before them and after them
    maps = [torch.rand(6, 1, size // 2**scale, size // 2**scale, generator=generator) for scale in range(4)]
    turns = {"before": [[0.1, -0.2, 0.05], [0.0, 0.1, 0.2]], "after": [[-0.1, 0.2, 0.1], [0.1, 0.1, -0.1]]}
    shifts = {"before": [[0.02, 0.01, 0.03], [0.01, 0.0, 0.0]], "after": [[0.0, 0.02, -0.03], [0.02, 0.01, 0.01]]}

    def motion(neighbours: Tensor) -> Motion:
        names = [next(name for name in turns if (other == batch[name]).flatten(1).all(1).any()) for other in neighbours]
        assert names == ["before", "before", "after", "after"]
        camera = Camera(torch.full((4, 2), 1.5), torch.full((4, 2), 0.5))
        rotation, translation = (torch.tensor(moves["before"] + moves["after"]) for moves in (turns, shifts))
        return Motion(rotation, translation, camera)

    weights = replace(WEIGHTS, consistency=3.0)
    losses = depth_losses(FixedDepth(maps), FixedPose(motion), batch, weights)  # type: ignore[arg-type]
    photometric, rough, disagreeing = [], [], []
    for scale, disparity in enumerate(maps):
        for item in range(2):
            target = batch["target"][item : item + 1].double()
            own = disparity[item : item + 1].double()
            depth = 1 / (0.1 + 0.9 * F.interpolate(own, (size, size), mode="bilinear"))
            errors = []
            for at, name in enumerate(("before", "after"), start=1):
                other = batch[name][item : item + 1].double()
                middle = 1 / 0.55  # depth of disparity 0.5
                pivot = torch.tensor([[0.0, 0.0, middle]]).double()
                turn, shift = (torch.tensor([moves[name][item]]).double() for moves in (turns, shifts))
                camera = Camera(torch.full((1, 2), 1.5).double(), torch.full((1, 2), 0.5).double())
                view = synthesise(other, depth, camera, turn, middle * shift, pivot)
                errors += [photometric_error(view.image, target), photometric_error(other, target)]
                if scale == 0:
                    theirs = maps[0][2 * at + item].double()
                    disagreeing.append(float(consistency(view, theirs[None], errors[-2] < errors[-1])))
            photometric.append(float(torch.cat(errors).amin(0).mean()))
            small = F.avg_pool2d(target, 2**scale)
            rough.append(float(smoothness(own, small)) / 2**scale)
    assert losses["photometric"].item() == pytest.approx(2.0 * np.mean(photometric), abs=2 * TIE)
    assert losses["smoothness"].item() == pytest.approx(0.5 * np.mean(rough), rel=1e-5)
    assert losses["consistency"].item() == pytest.approx(3.0 * np.mean(disagreeing), rel=1e-4)


def test_convexity_pulls_every_scale_to_a_bulge_in_the_middle() -> None:
    start = bulge(torch.zeros(32, 32))
    assert start.argmax() in (15 * 32 + 15, 15 * 32 + 16, 16 * 32 + 15, 16 * 32 + 16)
    assert 0.4 < float(start[0, 0]) == float(start.min()) < 0.5 < float(start.max()) < 0.6
    torch.testing.assert_close(start, start.flip(0).flip(1))
    depth, pose = networks()
    batch = random_batch()
    with torch.no_grad():
        expected = [(own - bulge(own)).abs().mean() for own in depth.eval().scales(batch["target"])]
        losses = depth_losses(depth, pose, batch, replace(WEIGHTS, convexity=3.0))
    assert float(losses["convexity"]) == pytest.approx(3 * float(torch.stack(expected).mean()), rel=1e-5)
    assert set(depth_losses(depth, pose, batch, WEIGHTS)) == {"photometric", "smoothness"}


def rotate(vector: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Rodrigues' formula, for one point."""
    angle = np.linalg.norm(vector)
    axis = vector / angle
    return (
        point * np.cos(angle)
        + np.cross(axis, point) * np.sin(angle)
        + axis * (axis @ point) * (1 - np.cos(angle))
    )  # fmt: skip


def test_consistency_equals_its_twin_pixel_by_pixel() -> None:
    generator = torch.Generator().manual_seed(3)
    size, focal, pivot = 8, 1.5, np.array([0, 0, 2.0])
    depth, other = (1.5 + torch.rand(1, 1, size, size, generator=generator).double() for _ in range(2))
    turn, shift = torch.tensor([[0.1, 0.3, -0.1]]).double(), torch.tensor([[0.1, 0.05, -0.2]]).double()
    counts = torch.rand(1, 1, size, size, generator=generator) < 0.7
    camera = Camera(torch.full((1, 2), focal).double(), torch.full((1, 2), 0.5).double())
    view = synthesise(other, depth, camera, turn, shift, torch.from_numpy(pivot)[None])

    expected, outside = 0.0, 0
    for y in range(size):
        for x in range(size):
            if not counts[0, 0, y, x]:
                continue
            ray = np.array([((x + 0.5) / size - 0.5) / focal, ((y + 0.5) / size - 0.5) / focal, 1])
            point = rotate(turn[0].numpy(), ray * float(depth[0, 0, y, x]) - pivot) + pivot + shift[0].numpy()
            u, v = point[:2] / point[2] * focal + 0.5
            if not (0 < u < 1 and 0 < v < 1):
                outside += 1
                continue
            column, row = (min(max(place * size - 0.5, 0), size - 1) for place in (u, v))
            left, top = min(int(column), size - 2), min(int(row), size - 2)
            a, b = column - left, row - top
            corners = other[0, 0, top : top + 2, left : left + 2].numpy()
            there = np.array([1 - b, b]) @ corners @ np.array([1 - a, a])
            expected += abs(point[2] - there) / (point[2] + there) / size**2
    assert outside > 0
    found = consistency(view, disparity_of(other), counts)
    assert float(found) == pytest.approx(expected, rel=1e-4)  # disparity and back: another interpolation's rounding


@pytest.mark.parametrize("identity", [0, 1, 2])
def test_consistency_tells_the_true_relief_from_one_that_looks_the_same(identity: int, head_pair: Any) -> None:
    """Half as much relief again and two thirds of the turn cost the picture little; the depths then disagree."""
    pair = {
        name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in head_pair(identity, (0, 5), 64).items()
    }
    distance, head = pair["pivot"][2], pair["depth"][:1, None] < pair["depth"].max() - 1
    camera = Camera(pair["focal"][None], torch.full((1, 2), 0.5).double())

    def losses(relief: float) -> tuple[float, float]:
        depth = distance + relief * (pair["depth"][:, None] - distance)  # [2, 1, H, W]: both frames
        view = synthesise(
            pair["images"][1:], depth[:1], camera, pair["rotation"][None] / relief, pair["translation"][None],
            pair["pivot"][None],
        )  # fmt: skip
        error = photometric_error(view.image, pair["images"][:1])
        return float(error[head].mean()), float(consistency(view, disparity_of(depth[1:]), head))

    (seen, true), (seen_deep, deep) = losses(1.0), losses(1.5)
    assert seen < seen_deep < 1.3 * seen
    assert deep / true > 1.5 * seen_deep / seen


def test_consistency_joins_the_terms_where_it_has_a_weight() -> None:
    depth, pose = (network.eval() for network in networks())
    batch = random_batch()
    with torch.no_grad():
        without = depth_losses(depth, pose, batch, WEIGHTS)
        once = depth_losses(depth, pose, batch, replace(WEIGHTS, consistency=1.0))
        twice = depth_losses(depth, pose, batch, replace(WEIGHTS, consistency=2.0))
    assert set(without) == {"photometric", "smoothness"} and set(once) == {*without, "consistency"}
    assert (
        float(twice["consistency"]) == pytest.approx(2 * float(once["consistency"]), rel=1e-5)
        and once["consistency"] > 0
    )
    for name, loss in without.items():
        assert float(once[name]) == pytest.approx(float(loss), abs=4 * TIE), name


def test_the_mean_over_half_batches_is_the_mean_over_the_batch() -> None:
    depth, pose = (network.eval() for network in networks())  # batch norm would see other batches
    batch = random_batch(4)
    whole = depth_losses(depth, pose, batch, WEIGHTS)
    halves = [
        depth_losses(depth, pose, {name: images[part] for name, images in batch.items()}, WEIGHTS)
        for part in (slice(0, 2), slice(2, 4))
    ]
    for name, loss in whole.items():
        assert loss.item() == pytest.approx(sum(half[name].item() for half in halves) / 2, abs=2 * TIE)


def test_every_parameter_learns() -> None:
    depth, pose = networks()
    sum(depth_losses(depth, pose, random_batch(4), WEIGHTS).values()).backward()  # type: ignore[union-attr]
    for network in (depth, pose):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_autocast_leaves_the_geometry_in_float32() -> None:
    depth, pose = networks()
    seen: list[torch.dtype] = []
    pose.register_forward_hook(lambda *arguments: seen.append(arguments[2].rotation.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = depth_losses(depth, pose, random_batch(), WEIGHTS)
    assert {loss.dtype for loss in losses.values()} | set(seen) == {torch.float32}
    sum(losses.values()).backward()  # type: ignore[union-attr]


@pytest.mark.slow
def test_relief_is_learnt_from_pictures_alone(relative_motion: Any, placements: Any) -> None:
    """Where the motions are known, the depth network finds the relief of heads; no depth is ever shown to it.

    A few pictures at 32 pixels: past some fifty steps it learns their noise.
    """
    frames, size, motions, focal = [1, 5, 9], 32, [], []
    for identity in range(8):
        places, scene = placements(identity, frames), draw_scene(identity, 0)
        pairs = [relative_motion([places[1], places[other]]) for other in (0, 2)]
        motions.append([(rotation, shift / scene.distance) for rotation, shift in pairs])
        focal.append((size - 1) / size / (2 * scene.half_view))
    rotation, shift = (
        torch.tensor(np.array([motions[i][side][part] for side in (0, 1) for i in range(8)])).float() for part in (0, 1)
    )
    camera = Camera(torch.tensor(focal).float().repeat(2)[:, None].expand(16, 2), torch.full((16, 2), 0.5))
    pose = FixedPose(lambda _: Motion(rotation, shift, camera))
    clips = [draw_faces([identity], size, frames) for identity in range(8)]
    pictures = torch.from_numpy(np.stack([clip.images for clip in clips])).permute(1, 0, 4, 2, 3).float() / 255
    batch = dict(zip(("before", "target", "after"), pictures, strict=True))
    targets = Faces(*(np.stack([getattr(clip, name)[1] for clip in clips]) for name in ("images", "depth", "mask")))

    def trained(photometric: float) -> dict[str, float]:
        torch.manual_seed(0)
        depth = DepthNetwork(NetworkConfig(size=32, depth_width=8, depth_decoder_widths=(8, 8, 16, 32, 64)))
        optimizer = torch.optim.Adam(depth.parameters(), lr=1e-3)
        for step in range(50):
            weights = LossWeights(photometric=photometric, smoothness=1e-2, convexity=float(step < 40))
            losses = depth_losses(depth, pose, batch, weights)  # type: ignore[arg-type]
            optimizer.zero_grad()
            sum(losses.values()).backward()  # type: ignore[union-attr]
            optimizer.step()
        return score_network(depth, targets)["network"]

    learnt, bulge_alone = trained(1.0), trained(1e-9)
    constant = score_guess(constant_guess, targets)
    assert learnt["abs_rel"] < 0.8 * constant["abs_rel"]
    assert learnt["aligned_rmse"] < 0.7 * constant["aligned_rmse"]
    assert learnt["aligned_rmse"] < 0.95 * bulge_alone["aligned_rmse"]
    assert learnt["correlation"] > 0.7
