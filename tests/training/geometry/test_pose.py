from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dagan_rt.networks.config import NetworkConfig
from dagan_rt.training.geometry.pose import CENTRE, FOCAL, PoseNetwork
from dagan_rt.training.heads import draw_clip

SMALL = NetworkConfig(size=32, depth_width=4, depth_decoder_widths=(4, 4, 4, 8, 8))


def frames(count: int = 3, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target, other = (torch.rand(count, 3, size, size, generator=generator) for _ in range(2))
    return target, other


def test_shapes_and_where_an_untrained_network_begins() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        motion = PoseNetwork(SMALL)(*frames())
    assert motion.rotation.shape == motion.translation.shape == (3, 3)
    assert motion.camera.focal.shape == motion.camera.centre.shape == (3, 2)
    assert float(motion.rotation.abs().max()) < 0.2 and float(motion.translation.abs().max()) < 0.2
    assert float((motion.camera.focal / FOCAL - 1).abs().max()) < 0.5
    assert float((motion.camera.centre - 0.5).abs().max()) < CENTRE


def test_a_raw_zero_is_no_motion_through_the_expected_camera() -> None:
    network = PoseNetwork(SMALL).eval()
    torch.nn.init.zeros_(network.head.weight)
    assert network.head.bias is not None
    torch.nn.init.zeros_(network.head.bias)
    with torch.no_grad():
        motion = network(*frames(1))
    assert float(motion.rotation.abs().sum() + motion.translation.abs().sum()) == 0
    torch.testing.assert_close(motion.camera.focal, torch.full((1, 2), FOCAL))
    torch.testing.assert_close(motion.camera.centre, torch.full((1, 2), 0.5))


def test_a_camera_stays_possible_whatever_the_network_says() -> None:
    network = PoseNetwork(SMALL).eval()
    assert network.head.bias is not None
    for raw in (-50.0, 50.0):
        torch.nn.init.constant_(network.head.bias, raw)
        with torch.no_grad():
            camera = network(*frames(1)).camera
        assert float(camera.focal.min()) >= 0 and bool(torch.isfinite(camera.focal).all())
        assert float((camera.centre - 0.5).abs().max()) <= CENTRE + 1e-6


def test_the_order_of_the_frames_matters() -> None:
    torch.manual_seed(0)
    network = PoseNetwork(SMALL).eval()
    target, other = frames(1)
    assert not torch.allclose(network(target, other).rotation, network(other, target).rotation)


def test_its_sizes_follow_the_recipe_and_other_pictures_are_pooled_to_the_same_places() -> None:
    def channels(network: PoseNetwork) -> list[int]:
        return [convolution.out_channels for convolution in network.convolutions]  # type: ignore[misc]

    small = PoseNetwork(SMALL)
    assert channels(small) == [8, 16, 32]  # 32 pixels are halved three times to 4
    assert channels(PoseNetwork(NetworkConfig(size=256))) == [128, 256, 512, 512, 512, 512]
    for size in (8, 32, 48, 128):
        assert small(*frames(2, size)).rotation.shape == (2, 3)


def test_it_finds_how_heads_turned_within_two_hundred_steps() -> None:
    """Shown the truth; the ResNet-18 with batch norm that it took the place of had found nothing by then."""
    generator = np.random.default_rng(0)
    clips = [draw_clip(identity, 8, 32) for identity in range(24)]
    pictures = torch.from_numpy(np.stack([clip.frames for clip in clips])).permute(0, 1, 4, 2, 3).float() / 255
    yaw = torch.from_numpy(np.stack([clip.pose[:, 0] for clip in clips])).deg2rad()

    torch.manual_seed(0)
    network = PoseNetwork(replace(SMALL, depth_width=8))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    errors = []
    for _ in range(200):
        chosen = generator.integers(24, size=24)
        first, second = generator.integers(8, size=(2, 24))
        turned = yaw[chosen, first] - yaw[chosen, second]
        found = network(pictures[chosen, first], pictures[chosen, second]).rotation[:, 1]
        loss = (found - turned).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(loss.detach() / turned.abs().mean()))
    assert np.mean(errors[:10]) > 0.8 and np.mean(errors[-20:]) < 0.6
