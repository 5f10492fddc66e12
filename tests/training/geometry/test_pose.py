from __future__ import annotations

import torch

from dagan_rt.networks.config import NetworkConfig
from dagan_rt.training.geometry.pose import CENTRE, FOCAL, PoseNetwork

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


def test_the_order_of_the_frames_matters_and_the_width_follows_the_recipe() -> None:
    torch.manual_seed(0)
    network = PoseNetwork(SMALL).eval()
    target, other = frames(1)
    assert not torch.allclose(network(target, other).rotation, network(other, target).rotation)
    wide = PoseNetwork(NetworkConfig())
    assert wide.encoder.conv1.weight.shape == (64, 6, 7, 7)
    assert network.encoder.conv1.weight.shape == (4, 6, 7, 7)
    named = sum(parameter.numel() for parameter in wide.parameters())
    assert 11_000_000 < named < 14_000_000  # a ResNet-18 and three small convolutions
