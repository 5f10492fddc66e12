"""The regressors' networks: one trunk that says where things are and what they look like, and small heads on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dagan_rt.evaluation.heads.targets import ACTIONS

WIDTHS = (16, 32, 64)  # channels at a half, a quarter and an eighth of the image's side
POINTS = 40  # places that the trunk finds for itself
EMBEDDING = 64
PART_SIDE, PART_FEATURES = 16, 32  # of a cut-out: an eye with its brow, or the mouth


def distance(found: Tensor, targets: Tensor, deviation: Tensor) -> Tensor:
    """Mean absolute error in deviations, squared where it is small: near 0.75 where nothing is known."""
    return F.smooth_l1_loss(found / deviation, targets / deviation, beta=0.1)


class Trunk(nn.Module):
    """Normalised images [B, 3, 64, 64] → features [B, 2 · POINTS + 64]: mean positions of heat maps, mean activations.

    The heat maps lie at half the image's side, where an eye still has pixels; the way down and up again lets each of
    them know the whole face. Means of heat maps (soft-argmax) are finer than their grid, and move with the picture,
    which a linear layer on flattened features would have to learn for every place.
    """

    width = 2 * POINTS + WIDTHS[2]
    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        half, quarter, eighth = WIDTHS
        self.down_half = nn.Sequential(_convolution(3, half, 5, 2), _convolution(half, half))
        self.down_quarter = nn.Sequential(_convolution(half, quarter, 3, 2), _convolution(quarter, quarter))
        self.down_eighth = nn.Sequential(_convolution(quarter, eighth, 3, 2), _convolution(eighth, eighth))
        self.lift_quarter, self.up_quarter = nn.Conv2d(eighth, quarter, 1), _convolution(quarter, quarter)
        self.lift_half, self.up_half = nn.Conv2d(quarter, half, 1), _convolution(half, half)
        self.heat = nn.Conv2d(half, POINTS, 1)
        nn.init.normal_(self.heat.weight, std=0.5)  # so that maps have peaks from the start: flat ones all mean (0, 0)
        axis = torch.linspace(-1, 1, 32)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        half = self.down_half(images)
        quarter = self.down_quarter(half)
        eighth = self.down_eighth(quarter)
        up = self.up_quarter(quarter + F.interpolate(self.lift_quarter(eighth), scale_factor=2.0))
        up = self.up_half(half + F.interpolate(self.lift_half(up), scale_factor=2.0))
        places = self.heat(up).flatten(2).softmax(-1) @ self.grid
        return torch.cat([places.flatten(1), eighth.mean((2, 3))], 1)


class Head(nn.Module):
    """Features [B, F] → values [B, N]: a linear map plus a small perceptron, in the units of the training targets."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: int, values: int, hidden: int = 96) -> None:
        super().__init__()
        self.straight = nn.Linear(features, values)
        self.bent = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, values))
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("deviation", torch.ones(values))

    def forward(self, features: Tensor) -> Tensor:
        return self.mean + self.deviation * (self.straight(features) + self.bent(features))

    def set_units(self, targets: Tensor) -> None:
        """Take over mean and standard deviation of targets [M, N], so that the layers work on numbers around 1."""
        self.mean, self.deviation = targets.mean(0), targets.std(0).clamp_min(1e-3)

    def distance(self, found: Tensor, targets: Tensor) -> Tensor:
        """`distance` in the deviations of this head's targets."""
        return distance(found, targets, self.deviation)


class Geometry(nn.Module):
    """Where the face is and how it is turned: landmarks and pose on one trunk, which help each other learn."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.landmarks, self.pose = Head(Trunk.width, 68 * 2), Head(Trunk.width, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Landmarks [B, 68, 2], corner-aligned, and pose [B, 3] in degrees."""
        features = self.trunk(images)
        return self.landmarks(features).unflatten(1, (68, 2)), self.pose(features)

    def single(self, kind: str) -> nn.Module:
        """The network of "landmarks" or of "pose" alone."""
        if kind == "pose":
            return nn.Sequential(self.trunk, self.pose)
        return nn.Sequential(self.trunk, self.landmarks, nn.Unflatten(1, (68, 2)))


class Actions(nn.Module):
    """What the face does, from cut-outs of both eyes with their brows and of the mouth: images → [B, 7].

    An eye is five pixels wide in 64 and its iris moves by less than one: a network that sees the whole picture has to
    find that in every place it may be, one that sees the eye upright and in the middle does not. A `Geometry` that is
    not trained any further says where to cut.
    """

    grid: Tensor

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry.requires_grad_(False)
        self.eye, self.mouth = _part_network(), _part_network()
        self.head = Head(3 * PART_FEATURES + 3, len(ACTIONS))
        axis = torch.linspace(-1, 1, PART_SIDE)
        self.register_buffer("grid", torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Activations [B, 7], see `targets.activations`."""
        with torch.no_grad():
            landmarks, pose = self.geometry(images)
        left, right, mouth = self.cut(images, landmarks)
        # The right eye is looked at in the mirror, by the network that knows the left one.
        parts = [self.eye(left), self.eye(right.flip(3)), self.mouth(mouth)]
        return self.head(torch.cat([*parts, pose / 20], 1))

    def cut(self, images: Tensor, landmarks: Tensor) -> list[Tensor]:
        """Left eye, right eye (the image's) and mouth, [B, 3, PART_SIDE, PART_SIDE] each: upright, of one size, with
        mean 0 and deviation 1, so that neither light nor skin matters."""
        inner = landmarks[:, 17:]
        scale = (inner - inner.mean(1, keepdim=True)).square().sum(2).mean(1, keepdim=True).sqrt()
        eyes = landmarks[:, 36:42].mean(1), landmarks[:, 42:48].mean(1)
        across = F.normalize(eyes[1] - eyes[0], dim=1) * scale
        down = torch.stack([-across[:, 1], across[:, 0]], 1)
        places = [(eye - 0.2 * down, 0.65) for eye in eyes] + [(landmarks[:, 48:].mean(1), 0.8)]
        cuts = []
        for centre, reach in places:
            x, y = self.grid[..., :1], self.grid[..., 1:]
            where = centre[:, None, None] + reach * (x * across[:, None, None] + y * down[:, None, None])
            cut = F.grid_sample(images, where, padding_mode="border", align_corners=True)
            flat = cut.flatten(1)
            mean, deviation = flat.mean(1, keepdim=True), flat.std(1, keepdim=True)
            cuts.append(((flat - mean) / (deviation + 0.1)).view_as(cut))
        return cuts

    def train(self, mode: bool = True) -> Actions:
        """As for every module, but for the geometry, whose batch norms stay as they are."""
        super().train(mode)
        self.geometry.eval()
        return self


class Identity(nn.Module):
    """Who it is: images → unit vectors [B, EMBEDDING]; `person` guesses the person's parameters, for training only."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.hidden = nn.Sequential(nn.Linear(Trunk.width, 128), nn.ReLU())
        self.embedding = nn.Linear(128, EMBEDDING)
        self.person = nn.Linear(128, parameters)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.embedding(self.hidden(self.trunk(images))), dim=1)

    def guess(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, EMBEDDING], and standardised parameters of the persons [B, parameters]."""
        hidden = self.hidden(self.trunk(images))
        return F.normalize(self.embedding(hidden), dim=1), self.person(hidden)


def _part_network() -> nn.Sequential:
    return nn.Sequential(
        _convolution(3, 16), nn.MaxPool2d(2), _convolution(16, 32), nn.MaxPool2d(2), _convolution(32, 32),
        nn.Flatten(), nn.Linear(32 * (PART_SIDE // 4) ** 2, PART_FEATURES), nn.ReLU(),
    )  # fmt: skip


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
