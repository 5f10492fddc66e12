"""VGG-19 features for the perceptual loss (supplementary equation 1).

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", configuration E, cut at
relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1. Parameters carry torchvision's names, so its ImageNet weights load.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dagan_rt.errors import InputError

logger = logging.getLogger(__name__)

# (index in torchvision's `features`, output channels); one tuple a slice, which ends at the ReLU after its last entry.
# None is a 2 x 2 max pool.
_SLICES: tuple[tuple[tuple[int, int] | None, ...], ...] = (
    ((0, 64),),
    ((2, 64), None, (5, 128)),
    ((7, 128), None, (10, 256)),
    ((12, 256), (14, 256), (16, 256), None, (19, 512)),
    ((21, 512), (23, 512), (25, 512), None, (28, 512)),
)
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)
_SMALLEST_SIDE = 16  # four 2 x 2 pools before relu5_1


class Vgg19(nn.Module):
    """The first 13 convolutions of VGG-19, frozen.

    width: factor on every channel count (1.0 = VGG-19). A slim one has no published weights.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        if not 0 < width <= 1:
            raise InputError(f"the VGG width factor must be above 0 and at most 1, got {width}")
        layers: dict[str, nn.Module] = {}
        channels = 3
        for step in (step for one_slice in _SLICES for step in one_slice if step is not None):
            index, full_width = step
            out_channels = max(1, round(full_width * width))
            layers[str(index)] = nn.Conv2d(channels, out_channels, 3, padding=1)
            channels = out_channels
        self.features = nn.ModuleDict(layers)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(_DEVIATION).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features after relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1 of `image` [B, 3, H, W] RGB in [0, 1].

        The i-th of the five is [B, C_i, H / 2^i, W / 2^i]. Raises ValueError for a side shorter than 16 pixels.
        """
        if min(image.shape[-2:]) < _SMALLEST_SIDE:
            raise ValueError(f"VGG-19 needs images of at least 16 x 16 pixels, got {tuple(image.shape)}")
        x = (image - self.mean) / self.deviation
        features = []
        for one_slice in _SLICES:
            for step in one_slice:
                x = F.max_pool2d(x, 2) if step is None else F.relu(self.features[str(step[0])](x))
            features.append(x)
        return features


def load_vgg(weights: Path | str | None = None, width: float = 1.0, seed: int = 0) -> Vgg19:
    """VGG-19 with the weights of a local file, or with random ones when `weights` is None.

    weights: a state dict as torchvision saves it for vgg19 (its later layers are ignored). Nothing is downloaded.
    width: see `Vgg19`; other than 1.0 only without a file.
    seed: of the random weights (He initialisation). Random features still compare images, at less value.

    Raises InputError for a file that is missing, needs pickle code, or lacks an entry.
    """
    network = Vgg19(width)
    if weights is None:
        logger.warning("perceptual loss: no VGG-19 weights given, using random ones (seed %d, width %g)", seed, width)
        _fill_randomly(network, seed)
        return network
    if width != 1.0:
        raise InputError(f"{weights}: VGG-19 weights fit the width factor 1.0 only, got {width}")
    _load_file(network, Path(weights))
    return network


def _fill_randomly(network: Vgg19, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.zero_()
        else:
            fan_in = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5)


def _load_file(network: Vgg19, path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the state dict of torchvision's vgg19")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: expected a state dict that loads without running code, got {error}") from error
    wanted = network.state_dict()
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected the state dict of torchvision's vgg19, got a {type(state).__name__}")
    for name, own in wanted.items():
        found = state.get(name)
        shape = tuple(found.shape) if isinstance(found, Tensor) else None
        if shape != tuple(own.shape):
            got = "nothing" if shape is None else shape
            raise InputError(f"{path}: expected torchvision's vgg19 with {name} of shape {tuple(own.shape)}, got {got}")
    network.load_state_dict({name: state[name] for name in wanted})
