"""Each metric against an independent twin: loops in float64, or torchmetrics' own network on the same weights."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dagan_rt.errors import InputError
from dagan_rt.evaluation import metrics


def pictures(seed: int, count: int = 2, side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    one = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    noise = rng.integers(-40, 41, one.shape)
    return one, np.clip(one.astype(int) + noise, 0, 255).astype(np.uint8)


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004, equation 13 and section III-C, pixel by pixel over a reflected border."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / np.outer(window, window).sum()
    total = 0.0
    for channel in range(3):
        x, y = (np.pad(image[..., channel] / 255.0, 5, mode="reflect") for image in (one, other))
        for row in range(one.shape[0]):
            for column in range(one.shape[1]):
                a, b = x[row : row + 11, column : column + 11], y[row : row + 11, column : column + 11]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                c1, c2 = 0.01**2, 0.03**2
                total += ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
                    (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
                )
    return total / one.size


def test_pixel_metrics() -> None:
    one, other = pictures(0)
    found = metrics.pixel_metrics(one, other)
    for number in range(len(one)):
        squares = [(int(a) - int(b)) ** 2 / 255**2 for a, b in zip(one[number].flat, other[number].flat, strict=True)]
        absolute = [abs(int(a) - int(b)) / 255 for a, b in zip(one[number].flat, other[number].flat, strict=True)]
        assert found["l1"][number] == pytest.approx(sum(absolute) / len(absolute), rel=1e-12)
        assert found["psnr"][number] == pytest.approx(-10 * math.log10(sum(squares) / len(squares)), rel=1e-6)
        assert found["ssim"][number] == pytest.approx(ssim(one[number], other[number]), rel=1e-6)


def test_equal_pictures_and_black_against_white() -> None:
    one, _ = pictures(1, side=16)
    same = metrics.pixel_metrics(one, one)
    assert (
        same["l1"].tolist() == [0, 0] and same["ssim"] == pytest.approx([1, 1]) and same["psnr"].tolist() == [100] * 2
    )
    black, white = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 255, np.uint8)
    opposite = metrics.pixel_metrics(black, white)
    assert opposite["l1"][0] == 1 and opposite["psnr"][0] == pytest.approx(0, abs=1e-12)


def torchvision_features(network: str) -> nn.Sequential:
    """The layout of torchvision's `features`, written from the papers' tables."""
    layers: list[nn.Module] = []
    if network == "alex":
        layers += [
            nn.Conv2d(3, 64, 11, 4, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
        ]
        layers += [nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1)]
        layers += [nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)]
        return nn.Sequential(*layers)
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        channels = width or channels
    return nn.Sequential(*layers)


@pytest.mark.parametrize("network", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_lpips_is_that_of_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str) -> None:
    from torchmetrics.functional.image import lpips

    torch.manual_seed(0)
    features = torchvision_features(network)
    names = {f"features.{key}": value for key, value in features.state_dict().items()}
    torch.save(names | {"classifier.1.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained=False: features)
    twin = lpips._NoTrainLpips(net=network)
    one, other = pictures(2, side=64)
    planes = [torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 for images in (one, other)]
    with torch.no_grad():
        expected = twin(*planes, normalize=True).flatten().numpy()
    ours = metrics.Lpips(tmp_path / "weights.pth")
    assert ours.network == network
    assert ours(one, other) == pytest.approx(expected, rel=1e-5) and (expected > 0).all()
    assert ours(one, one) == pytest.approx([0, 0], abs=1e-9)


def test_lpips_needs_a_backbone(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"features.0.weight": "text"}, tmp_path / "text.pth")
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for name in ("other.pth", "list.pth", "text.pth", "code.pth", "absent.pth"):
        with pytest.raises(InputError, match=name):
            metrics.Lpips(tmp_path / name)


def test_face_metrics() -> None:
    rng = np.random.default_rng(4)
    one, other = rng.normal(size=(2, 3, 5, 2))
    by_hand = [sum(math.dist(one[b, i], other[b, i]) for i in range(5)) / 5 for b in range(3)]
    assert metrics.landmark_distance(one, other) == pytest.approx(by_hand)

    left, right = (it / np.linalg.norm(it, axis=1, keepdims=True) for it in rng.normal(size=(2, 3, 7)))
    assert metrics.embedding_distance(left, right) == pytest.approx(
        [math.dist(*pair) for pair in zip(left, right, strict=True)]
    )
    cosines = [sum(a * b for a, b in zip(*pair, strict=True)) for pair in zip(left, right, strict=True)]
    assert metrics.embedding_cosine(left, right) == pytest.approx(cosines)
    assert metrics.embedding_cosine(left, left) == pytest.approx([1, 1, 1])
    # For unit vectors the two are one: |a - b|² = 2 - 2 cos.
    assert metrics.embedding_distance(left, right) ** 2 == pytest.approx(2 - 2 * np.array(cosines))

    pose = np.array([[10.0, 0, -5], [179, 0, 0], [0, 0, 0]])
    driving = np.array([[13.0, -4, -5], [-179, 0, 0], [np.nan, 0, 0]])
    assert metrics.pose_error(pose, driving)[:2] == pytest.approx([math.sqrt((9 + 16 + 0) / 3), math.sqrt(4 / 3)])
    assert math.isnan(metrics.pose_error(pose, driving)[2])

    active = np.array([[1.0, 0, 1, 0], [1, 1, 1, 1], [np.nan] * 4])
    assert metrics.action_agreement(active, np.array([[1.0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]))[:2].tolist() == [
        0.75,
        1,
    ]
    assert math.isnan(metrics.action_agreement(active, np.ones((3, 4)))[2])
