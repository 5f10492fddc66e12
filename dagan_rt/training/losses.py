"""What training minimises: the paper's losses (supplementary section A.1) and a few that use a known truth.

`generator_losses` and `discriminator_loss` are all the training loop needs; each term is a function of its own below.
Images are RGB float [B, 3, H, W] in [0, 1]; every loss returns a scalar, averaged over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dagan_rt.errors import InputError
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.depth import DepthNetwork
from dagan_rt.networks.discriminator import Discriminator
from dagan_rt.networks.generator import Generated
from dagan_rt.networks.geometry import invert_2x2
from dagan_rt.networks.model import Model
from dagan_rt.training.transform import Transform

_SMALLEST_VGG_SIDE = 16

# Key point -> the iBUG-68 landmarks whose mean it should sit on. Left and right are the image's.
DEFAULT_LANDMARKS: dict[int, tuple[tuple[int, ...], ...]] = {
    15: (
        (1, 2, 3),  # jaw, left side
        (13, 14, 15),  # jaw, right side
        (7, 8, 9),  # chin
        (18, 19, 20),  # left brow
        (23, 24, 25),  # right brow
        (37, 38),  # left eye, upper lid
        (40, 41),  # left eye, lower lid
        (43, 44),  # right eye, upper lid
        (46, 47),  # right eye, lower lid
        (27, 28),  # nose bridge
        (30, 33),  # nose tip
        (48, 60),  # mouth, left corner
        (54, 64),  # mouth, right corner
        (51, 62),  # upper lip
        (57, 66),  # lower lip
    ),
    10: (
        (1, 2, 3),  # jaw, left side
        (13, 14, 15),  # jaw, right side
        (7, 8, 9),  # chin
        (19, 37, 38),  # left brow and upper lid
        (24, 43, 44),  # right brow and upper lid
        (30, 33),  # nose tip
        (48, 60),  # mouth, left corner
        (54, 64),  # mouth, right corner
        (51, 62),  # upper lip
        (57, 66),  # lower lip
    ),
}


DEPTH_TERMS = ("smoothness", "consistency", "convexity")
"""Terms of self-supervised depth beside `photometric`, which makes a stage one."""

_NOT_OF_DEPTH = (
    "perceptual", "generator_gan", "feature_matching", "equivariance_value", "equivariance_jacobian",
    "keypoint_distance", "pixel", "gradient", "landmark", "disparity",
)  # fmt: skip


@dataclass(frozen=True)
class LossWeights:
    """Factor of each term of the generator step, and the constants the terms need.

    The defaults are the published training's. A term whose weight is 0 is not computed at all.
    `landmark` and `disparity` need a data set that knows the truth. With `disparity` 0 the depth network stays as it
    is, as in the published training; otherwise that loss alone trains it.
    """

    perceptual: float = 10.0  # at each of 5 VGG slices and 4 scales
    generator_gan: float = 1.0
    feature_matching: float = 10.0  # at each feature of the discriminator
    equivariance_value: float = 10.0
    equivariance_jacobian: float = 10.0
    keypoint_distance: float = 10.0  # pulls against `landmark`: eyelids and lips lie closer than `alpha`
    pixel: float = 0.0
    gradient: float = 0.0
    landmark: float = 0.0
    disparity: float = 0.0
    photometric: float = 0.0  # view synthesis between frames of a clip: self-supervised depth, a stage of its own
    smoothness: float = 0.0  # of its disparity, edge-aware
    consistency: float = 0.0  # of the depths of two frames, one moved to the other
    convexity: float = 0.0  # its disparity towards a bulge in the middle: a start that is not hollow
    discriminator_gan: float = 1.0  # of the discriminator's own step

    alpha: float = 0.2  # key points nearer than this are crowded
    scales: int = 4  # of the perceptual and the pixel pyramid, each half the one before
    sigma_affine: float = 0.05
    sigma_tps: float = 0.005

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= getattr(self, field.name) < math.inf:
                raise InputError(f"loss weight {field.name} must be 0 or more, got {getattr(self, field.name)}")
        if self.alpha == 0 or self.scales == 0:
            raise InputError(f"alpha and scales must be above 0, got {self.alpha} and {self.scales}")

    @property
    def uses_discriminator(self) -> bool:
        """Whether a discriminator has anything to teach, and so needs its own step."""
        return self.generator_gan > 0 or self.feature_matching > 0

    @property
    def uses_image(self) -> bool:
        """Whether any term looks at the generated image."""
        return self.perceptual > 0 or self.pixel > 0 or self.gradient > 0 or self.uses_discriminator

    @property
    def trains_depth_alone(self) -> bool:
        """Whether the weights are those of self-supervised depth, which no other term may join."""
        return self.photometric > 0

    @property
    def others_than_depth(self) -> list[str]:
        """Terms beside those of self-supervised depth that have a weight."""
        return [name for name in _NOT_OF_DEPTH if getattr(self, name)]

    @classmethod
    def nothing(cls) -> LossWeights:
        """Every term 0: what a stage of self-supervised depth begins with."""
        zero: dict[str, Any] = dict.fromkeys(_NOT_OF_DEPTH, 0.0)
        return cls(**zero)

    @property
    def uses_transform(self) -> bool:
        return self.equivariance_value > 0 or self.equivariance_jacobian > 0


def generator_losses(
    model: Model,
    batch: dict[str, Tensor],
    weights: LossWeights,
    vgg: Callable[[Tensor], list[Tensor]] | None = None,
    transform: Transform | None = None,
    generator: torch.Generator | None = None,
    landmark_choice: Sequence[Sequence[int]] | None = None,
) -> tuple[dict[str, Tensor], Generated | None, KeyPoints]:
    """One forward pass of the generator step.

    model: a `dagan_rt.networks.Model`.
    batch: `source`, `driving` [B, 3, H, W]; with landmark > 0 also `source_landmarks`, `driving_landmarks` [B, 68, 2];
        with disparity > 0 also `source_disparity`, `driving_disparity` [B, 1, H, W].
    vgg: images -> features, needed with perceptual > 0 (`dagan_rt.training.vgg.load_vgg`).
    transform: the warp of the equivariance loss; drawn with `generator` when None.
    landmark_choice: groups of landmarks, one a key point; `DEFAULT_LANDMARKS` for the number of key points when None.

    Returns the terms already weighted (their sum is the objective), the `Generated` images (None when no term looks
    at them: the generator is not run), and the driving key points.
    The discriminator gets no gradient from them. Raises InputError when a term lacks what it needs.
    """
    source, driving = batch["source"], batch["driving"]
    terms: dict[str, Tensor] = {}

    source_depth, driving_depth = _depths(model, batch, weights, terms)
    source_points = model.find_keypoints(source, source_depth)
    driving_points = model.find_keypoints(driving, driving_depth)
    generated = None
    if weights.uses_image:
        generated = model.generator(source, source_points, driving_points, depth=source_depth)
        terms.update(_image_terms(generated.prediction, driving, weights, vgg))
    if generated is not None and weights.uses_discriminator:
        terms.update(_discriminator_terms(model.discriminator, driving, generated.prediction, driving_points, weights))
    if weights.uses_transform:
        warp = transform or Transform.random(
            len(driving), weights.sigma_affine, weights.sigma_tps, generator, driving.device
        )
        terms.update(_equivariance_terms(model, driving, driving_points, warp, weights))
    if weights.keypoint_distance:
        source_crowding = keypoint_distance_hinge(source_points.value, weights.alpha)
        driving_crowding = keypoint_distance_hinge(driving_points.value, weights.alpha)
        terms["keypoint_distance"] = weights.keypoint_distance * (source_crowding + driving_crowding)
    if weights.landmark:
        points = torch.cat([source_points.value, driving_points.value])
        landmarks = torch.cat([_truth(batch, "source_landmarks"), _truth(batch, "driving_landmarks")])
        terms["landmark"] = weights.landmark * landmark_loss(points, landmarks, landmark_choice)
    return terms, generated, driving_points


def discriminator_loss(
    discriminator: Discriminator, driving: Tensor, prediction: Tensor, keypoints: KeyPoints, weight: float = 1.0
) -> Tensor:
    """Least-squares objective of the discriminator: real to 1, generated to 0 (supplementary A.1, GAN loss).

    `prediction` and `keypoints` (the driving frame's) come from `generator_losses` and are detached here.
    """
    points = _detached(keypoints)
    _, real = discriminator(driving, points)
    _, fake = discriminator(prediction.detach(), points)
    return weight * least_squares_discriminator(real, fake)


# --- the terms ------------------------------------------------------------------------------------------------------


def perceptual_loss(
    prediction: Tensor, truth: Tensor, vgg: Callable[[Tensor], list[Tensor]], scales: int = 4
) -> Tensor:
    """L1 between VGG features, summed over slices and over scales 1, 1/2, 1/4 ... (supplementary equation 1).

    Scales at which the image would be shorter than 16 pixels are left out: VGG has nothing to say about them.
    """
    total = prediction.new_zeros(())
    for level in range(scales):
        if min(truth.shape[-2:]) // 2**level < _SMALLEST_VGG_SIDE:
            break
        with torch.no_grad():
            wanted = vgg(downsample(truth, 2**level))
        for got, want in zip(vgg(downsample(prediction, 2**level)), wanted, strict=True):
            total = total + F.l1_loss(got, want)
    return total


def least_squares_generator(fake: Tensor) -> Tensor:
    """How far the discriminator's map of the prediction is from "real" (supplementary A.1, GAN loss)."""
    return F.mse_loss(fake, torch.ones_like(fake))


def least_squares_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """How far the discriminator's maps are from real = 1, generated = 0 (supplementary A.1, GAN loss)."""
    return F.mse_loss(real, torch.ones_like(real)) + F.mse_loss(fake, torch.zeros_like(fake))


def feature_matching_loss(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """L1 between discriminator features of prediction and truth, summed over them (as in pix2pixHD)."""
    total = fake[0].new_zeros(())
    for got, want in zip(fake, real, strict=True):
        total = total + F.l1_loss(got, want.detach())
    return total


def equivariance_value_loss(driving: KeyPoints, transformed: KeyPoints, transform: Transform) -> Tensor:
    """L1 between the driving frame's key points and the transformed frame's, taken back (supplementary equation 2).

    Averaged, where the equation sums, over key points and coordinates, as the published training does.
    """
    return F.l1_loss(transform.warp(transformed.value), driving.value)


def equivariance_jacobian_loss(driving: KeyPoints, transformed: KeyPoints, transform: Transform) -> Tensor:
    """L1 between identity and J_driving^-1 . J_transform . J_transformed (First Order Motion Model, section 3.2)."""
    back = _product(transform.jacobian(transformed.value), transformed.jacobian)
    cycle = _product(invert_2x2(driving.jacobian), back)
    identity = torch.eye(2, device=cycle.device, dtype=cycle.dtype)
    return F.l1_loss(cycle, identity.expand_as(cycle))


def keypoint_distance_reported(points: Tensor, alpha: float = 0.2) -> Tensor:
    """Crowding of key points [B, K, 2] with the sign() of supplementary equation 3, averaged over the K^2 pairs.

    2 for each pair nearer than `alpha`, 0 for each farther. Its gradient is zero: report it, train with the hinge.
    The equation prints an L1 norm; the published training measures the Euclidean distance, and so does this.
    """
    return (1 - torch.sign(_pair_distances(points) - alpha)).masked_fill(_same_point(points), 0).mean()


def keypoint_distance_hinge(points: Tensor, alpha: float = 0.2) -> Tensor:
    """Hinge surrogate of `keypoint_distance_reported`: zero on the same pairs, with a gradient on the others.

    A pair contributes 2 (1 - distance / alpha), the printed 2 where the points coincide, falling to 0 at `alpha`.
    """
    crowding = 2 * F.relu(1 - _pair_distances(points) / alpha)
    return crowding.masked_fill(_same_point(points), 0).mean()


def landmark_loss(points: Tensor, landmarks: Tensor, choice: Sequence[Sequence[int]] | None = None) -> Tensor:
    """L1 between key points [B, K, 2] and the means of K groups of true landmarks [B, 68, 2], on the same grid.

    choice: K groups of indices below 68; `DEFAULT_LANDMARKS[K]` when None. Raises InputError where they do not fit.
    """
    count = points.shape[1]
    if choice is None:
        if count not in DEFAULT_LANDMARKS:
            raise InputError(f"no default landmarks for {count} key points: give landmark groups, one a key point")
        choice = DEFAULT_LANDMARKS[count]
    if len(choice) != count:
        raise InputError(f"landmark groups must be one a key point = {count}, got {len(choice)}")
    wanted = torch.stack([landmarks[:, list(group)].mean(1) for group in choice], 1)
    return F.l1_loss(points, wanted)


def disparity_loss(scales: Sequence[Tensor], truth: Tensor) -> Tensor:
    """L1 between the depth network's sigmoid outputs [B, 1, h, w] and the truth [B, 1, H, W], averaged over scales.

    The truth, in [0, 1], is averaged down to each output's size.
    """
    total = truth.new_zeros(())
    for output in scales:
        total = total + F.l1_loss(output, F.interpolate(truth, output.shape[-2:], mode="area"))
    return total / len(scales)


def pixel_pyramid_loss(prediction: Tensor, truth: Tensor, scales: int = 4) -> Tensor:
    """L1 between images, summed over scales 1, 1/2, 1/4 ... by 2 x 2 averages: the cheap stand-in for a VGG."""
    difference = prediction - truth
    total = difference.abs().mean()
    for _ in range(1, scales):
        if min(difference.shape[-2:]) < 2:
            break
        difference = F.avg_pool2d(difference, 2)  # averaging is linear, so the difference can be averaged
        total = total + difference.abs().mean()
    return total


def image_gradient_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """L1 between the differences of neighbouring pixels, across and down: punishes soft edges."""
    difference = prediction - truth
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def downsample(image: Tensor, factor: int) -> Tensor:
    """Every `factor`-th pixel of `image` [B, C, H, W] after an anti-alias Gaussian, sigma = (factor - 1) / 2.

    The image counts as black beyond its border.
    """
    if factor == 1:
        return image
    sigma = (factor - 1) / 2
    radius = round(4 * sigma)
    ticks = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-ticks.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, -1)
    # The Gaussian is separable, and only the pixels that stay are computed.
    rows = F.conv2d(image, kernel.unsqueeze(-1), stride=(factor, 1), padding=(radius, 0), groups=image.shape[1])
    return F.conv2d(rows, kernel.unsqueeze(-2), stride=(1, factor), padding=(0, radius), groups=image.shape[1])


# --- putting them together ------------------------------------------------------------------------------------------


def _depths(
    model: Model, batch: dict[str, Tensor], weights: LossWeights, terms: dict[str, Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Depth of source and driving, cut from the gradient; adds the disparity term where the truth trains it."""
    if model.depth is None:
        if weights.disparity:
            raise InputError("loss weight disparity must be 0 for a variant without a depth network")
        return None, None
    both = torch.cat([batch["source"], batch["driving"]])
    if weights.disparity:
        scales = model.depth.scales(both)
        truth = torch.cat([_truth(batch, "source_disparity"), _truth(batch, "driving_disparity")])
        terms["disparity"] = weights.disparity * disparity_loss(scales, truth)
        depth = scales[0].detach()
    else:
        depth = _fixed_depth(model.depth, both)
    source_depth, driving_depth = depth.chunk(2)
    return source_depth, driving_depth


def _image_terms(
    prediction: Tensor, driving: Tensor, weights: LossWeights, vgg: Callable[[Tensor], list[Tensor]] | None
) -> dict[str, Tensor]:
    terms = {}
    if weights.perceptual:
        if vgg is None:
            raise InputError("loss weight perceptual must be 0 where no VGG is given")
        terms["perceptual"] = weights.perceptual * perceptual_loss(prediction, driving, vgg, weights.scales)
    if weights.pixel:
        terms["pixel"] = weights.pixel * pixel_pyramid_loss(prediction, driving, weights.scales)
    if weights.gradient:
        terms["gradient"] = weights.gradient * image_gradient_loss(prediction, driving)
    return terms


def _discriminator_terms(
    discriminator: Discriminator, driving: Tensor, prediction: Tensor, keypoints: KeyPoints, weights: LossWeights
) -> dict[str, Tensor]:
    points = _detached(keypoints)
    with _without_gradient(discriminator):
        fake_features, fake = discriminator(prediction, points)
    terms = {}
    if weights.generator_gan:
        terms["generator_gan"] = weights.generator_gan * least_squares_generator(fake)
    if weights.feature_matching:
        with torch.no_grad():
            real_features, _ = discriminator(driving, points)
        terms["feature_matching"] = weights.feature_matching * feature_matching_loss(fake_features, real_features)
    return terms


def _equivariance_terms(
    model: Model, driving: Tensor, driving_points: KeyPoints, transform: Transform, weights: LossWeights
) -> dict[str, Tensor]:
    with torch.no_grad():
        frame = transform.frame(driving)
        depth = None if model.depth is None else _fixed_depth(model.depth, frame)
    transformed = model.find_keypoints(frame, depth)
    terms = {}
    if weights.equivariance_value:
        value = equivariance_value_loss(driving_points, transformed, transform)
        terms["equivariance_value"] = weights.equivariance_value * value
    if weights.equivariance_jacobian:
        value = equivariance_jacobian_loss(driving_points, transformed, transform)
        terms["equivariance_jacobian"] = weights.equivariance_jacobian * value
    return terms


def _truth(batch: dict[str, Tensor], name: str) -> Tensor:
    if name not in batch:
        raise InputError(f"the batch has no {name}: set the loss weight that needs it to 0, or use a data set with it")
    return batch[name]


def _fixed_depth(network: DepthNetwork, image: Tensor) -> Tensor:
    """Depth of `image` without gradient, and without moving the batch-norm statistics of the depth network."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            return network(image)
    finally:
        network.train(training)


@contextmanager
def _without_gradient(network: nn.Module) -> Iterator[None]:
    """Gradients pass through `network` but do not reach its parameters: they belong to another step."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _detached(keypoints: KeyPoints) -> KeyPoints:
    return KeyPoints(keypoints.value.detach(), keypoints.jacobian.detach())


def _pair_distances(points: Tensor) -> Tensor:
    """Euclidean distances [B, K, K]; their gradient is 0, not NaN, where two points coincide."""
    return torch.linalg.vector_norm(points.unsqueeze(2) - points.unsqueeze(1), dim=-1)


def _same_point(points: Tensor) -> Tensor:
    return torch.eye(points.shape[1], dtype=torch.bool, device=points.device)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product of [..., 2, 2], kept in the inputs' precision under autocast."""
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)
