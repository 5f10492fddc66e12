"""The metrics, one value an image set: of pixels by torchmetrics, of faces by what extractors found.

Sources: L1, AKD and AED of self-reenactment, Siarohin et al., "First Order Motion Model for Image Animation", 2019,
section 4; CSIM, PRMSE and AUCON, Ha et al., "MarioNETte", 2020, section 4.1; both sets as in the DaGAN paper's tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dagan_rt.errors import InputError, require

ALEX = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))  # out, kernel, stride, padding
ALEX_INDEX, ALEX_POOLED = (0, 3, 6, 8, 10), (False, True, True, False, False)  # in torchvision's `features`
VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG_INDEX = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
LARGEST_BACKBONE = 1 << 30  # bytes; torchvision's VGG-16 has 528 MB


def pixel_metrics(generated: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """L1, SSIM and PSNR of each pair, uint8 [B, S, S, 3] both; float64 [B] each.

    l1: mean absolute difference of values in [0, 1]. ssim: Wang et al., 2004, of values in [0, 1] (data_range 1), a
    Gaussian window of σ = 1.5 and 11 pixels, k1 = 0.01, k2 = 0.03, borders reflected, the mean over pixels and
    channels; in float32, which is ten times faster and changes the seventh digit. psnr: 10 log10(1 / mean squared
    error) in dB, data_range 1; at most 100 dB, which stands for equal images, so that a mean exists.
    """
    torch = require("torch", extra="evaluate", why="evaluation")
    functional = require("torchmetrics", extra="evaluate", why="evaluation").functional.image
    one, other = (_planes(torch, images).double() / 255 for images in (generated, truth))
    ssim = functional.structural_similarity_index_measure(
        one.float(), other.float(), gaussian_kernel=True, sigma=1.5, data_range=1.0, reduction="none"
    )
    psnr = functional.peak_signal_noise_ratio(one, other, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return {
        "l1": (one - other).abs().mean((1, 2, 3)).numpy(),
        "ssim": ssim.reshape(-1).double().numpy(),
        "psnr": psnr.reshape(-1).clamp(max=100.0).numpy(),
    }


class Lpips:
    """LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018), 0.1.

    The linear heads are those that torchmetrics ships; the backbone's ImageNet weights come from a file, for nothing
    is downloaded here.
    """

    def __init__(self, backbone: str | Path) -> None:
        """backbone: a state dict of torchvision's AlexNet or VGG-16. InputError for any other file."""
        torch = require("torch", extra="evaluate", why="LPIPS")
        lpips = require("torchmetrics.functional.image.lpips", extra="evaluate", why="LPIPS")
        self._torch = torch
        weights = _backbone_weights(Path(backbone))
        alex, vgg = _alex(torch, weights), _vgg(torch, weights)
        layers = alex or vgg
        if layers is None:
            raise InputError(f"{backbone} is not the state dict of torchvision's AlexNet or VGG-16")
        self.network, self._layers = "vgg" if alex is None else "alex", layers
        heads = Path(str(lpips.__file__)).parent / "lpips_models" / f"{self.network}.pth"
        loaded = torch.load(heads, map_location="cpu", weights_only=True)
        self._heads = [loaded[f"lin{number}.model.1.weight"].float() for number in range(len(self._layers))]
        self._scaling = lpips.ScalingLayer()
        self.name = f"LPIPS, {'AlexNet' if self.network == 'alex' else 'VGG-16'}"

    def __call__(self, generated: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Distances of pairs, uint8 [B, S, S, 3] both; float64 [B]."""
        torch = self._torch
        with torch.no_grad():
            one, other = (self._scaling(_planes(torch, it).float() / 127.5 - 1) for it in (generated, truth))
            total = torch.zeros(len(generated))
            for layers, head in zip(self._layers, self._heads, strict=True):
                one, other = layers(one), layers(other)
                difference = (_unit(one) - _unit(other)) ** 2
                total += torch.nn.functional.conv2d(difference, head).mean((1, 2, 3))
        return np.asarray(total.double().numpy())


def _planes(torch: Any, images: np.ndarray) -> Any:
    """uint8 [B, H, W, 3] -> uint8 [B, 3, H, W], a tensor."""
    return torch.from_numpy(np.require(images, requirements=("C", "W"))).permute(0, 3, 1, 2)


def _unit(features: Any) -> Any:
    """Each position's channels at length 1."""
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


def _backbone_weights(path: Path) -> dict[str, Any]:
    from dagan_rt.checkpoint_files import read_weights

    if path.is_file() and path.stat().st_size > LARGEST_BACKBONE:
        raise InputError(f"LPIPS backbone {path} must be at most {LARGEST_BACKBONE:,} bytes")
    weights = read_weights(path)
    return dict(weights) if isinstance(weights, Mapping) else {}


def _alex(torch: Any, weights: dict[str, Any]) -> list[Any] | None:
    slices, channels = [], 3
    for (width, kernel, stride, padding), index, pooled in zip(ALEX, ALEX_INDEX, ALEX_POOLED, strict=True):
        layer = _filled(torch, torch.nn.Conv2d(channels, width, kernel, stride, padding), weights, index)
        if layer is None:
            return None
        pool = [torch.nn.MaxPool2d(3, 2)] if pooled else []
        slices.append(torch.nn.Sequential(*pool, layer, torch.nn.ReLU()))
        channels = width
    return slices


def _vgg(torch: Any, weights: dict[str, Any]) -> list[Any] | None:
    slices, channels = [], 3
    for number, (widths, indexes) in enumerate(zip(VGG, VGG_INDEX, strict=True)):
        layers: list[Any] = [torch.nn.MaxPool2d(2)] if number else []
        for width, index in zip(widths, indexes, strict=True):
            layer = _filled(torch, torch.nn.Conv2d(channels, width, 3, padding=1), weights, index)
            if layer is None:
                return None
            layers += [layer, torch.nn.ReLU()]
            channels = width
        slices.append(torch.nn.Sequential(*layers))
    return slices


def _filled(torch: Any, layer: Any, weights: dict[str, Any], index: int) -> Any | None:
    """The convolution with torchvision's weights at `features.index`; None where they are absent or do not fit."""
    state: dict[str, Any] = {name: weights.get(f"features.{index}.{name}") for name in ("weight", "bias")}
    if any(not torch.is_tensor(value) or value.shape != getattr(layer, name).shape for name, value in state.items()):
        return None
    layer.load_state_dict({name: value.float() for name, value in state.items()})
    return layer.requires_grad_(False)


def landmark_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """AKD, average key-point distance: the mean over landmarks of |one - other|, in the units given.

    one, other: [B, L, 2]; float64 [B].
    """
    return np.linalg.norm(one - other, axis=-1).mean(-1)


def embedding_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """AED, average Euclidean distance of identity embeddings of length 1, [B, E] both: float64 [B] in [0, 2]."""
    return np.linalg.norm(one - other, axis=-1)


def embedding_cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """CSIM, cosine similarity of identity embeddings of length 1, [B, E] both: float64 [B] in [-1, 1]."""
    return (one * other).sum(-1)


def pose_error(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of PRMSE: the root of the mean over yaw, pitch and roll of the squared difference, [B, 3] degrees; float64 [B].

    Differences are taken the short way round the circle. PRMSE is the root mean square of these over image sets, hence
    over image sets and angles alike.
    """
    difference = (one - other + 180.0) % 360.0 - 180.0
    return np.sqrt((difference**2).mean(-1))


def action_agreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """AUCON, the share of action units that are active in both or in neither, [B, A] both 0 or 1: float64 [B]."""
    return np.where(np.isnan(one) | np.isnan(other), np.nan, one == other).mean(-1)
