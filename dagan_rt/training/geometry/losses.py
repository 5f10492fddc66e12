"""Losses of self-supervised depth: a frame must look right when it is drawn from its neighbours through its depth."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dagan_rt.networks.depth import DepthNetwork
from dagan_rt.training.geometry.pose import Motion, PoseNetwork
from dagan_rt.training.geometry.synthesis import (
    FARTHEST,
    NEAREST,
    View,
    depth_of,
    disparity_of,
    pixel_centres,
    sample,
    synthesise,
)
from dagan_rt.training.losses import LossWeights

SSIM_SHARE = 0.85  # of the photometric error; the rest is L1
PIVOT = 2 / (1 / NEAREST + 1 / FARTHEST)
"""Depth of the point on the axis about which faces turn: the middle disparity, where an untrained network puts them.

The world turns about the camera in most training of depth from video. A clip of a head is the other way round: the
head turns and the room stands still, and turning it about the camera, eight head radii away, moves it out of the
picture unless a translation brings it back exactly. Turning about a fixed point near the face takes that burden from
the pose network. Every rigid motion can still be said, and the losses are the same.
"""
BULGE = (0.3, 0.4, 0.2)
"""Half axes of `bulge` in picture widths and heights, and how much nearer its middle is than its rim."""

TIE = 1e-5  # noise that decides between a warped and an unwarped neighbour which explain a pixel equally well


def ssim_distance(image: Tensor, other: Tensor) -> Tensor:
    """(1 - SSIM) / 2 of every pixel and channel, in [0, 1]; [..., C, H, W] each, leading dimensions broadcast.

    Moments are 3×3 averages, reflected at the border; the constants are the usual 0.01² and 0.03² for data in [0, 1].
    """
    mean, other_mean = _average(image), _average(other)
    variance = _average(image * image) - mean * mean
    other_variance = _average(other * other) - other_mean * other_mean
    product = mean * other_mean
    above = (2 * product + 0.01**2) * (2 * (_average(image * other) - product) + 0.03**2)
    below = (mean * mean + other_mean * other_mean + 0.01**2) * (variance + other_variance + 0.03**2)
    return ((1 - above / below) / 2).clamp(0, 1)


def _average(x: Tensor) -> Tensor:
    """3×3 means of [..., C, H, W]. A convolution per channel: on a CPU ten times as fast as pooling by one pixel."""
    channels = x.shape[-3]
    box = x.new_full((channels, 1, 3, 3), 1 / 9)
    padded = F.pad(x.flatten(0, -4), (1, 1, 1, 1), mode="reflect").contiguous(memory_format=torch.channels_last)
    return F.conv2d(padded, box, groups=channels).view_as(x)


def photometric_error(image: Tensor, target: Tensor) -> Tensor:
    """0.85 SSIM distance + 0.15 L1, averaged over channels: [..., C, H, W] twice -> [..., 1, H, W]; broadcasts."""
    structure = ssim_distance(image, target).mean(-3, keepdim=True)
    return SSIM_SHARE * structure + (1 - SSIM_SHARE) * (image - target).abs().mean(-3, keepdim=True)


def masked_minimum(warped: Tensor, unwarped: Tensor) -> Tensor:
    """The least error of every pixel: errors of N neighbours, warped [S, N, B, 1, H, W] and as they are [N, B, 1, H, W]
    -> [S, B, 1, H, W].

    The minimum over neighbours lets the one that sees a point explain it. Where a neighbour fits better as it is (what
    does not move, or moves with the camera), the pixel's error is a constant without gradient: that is the auto-mask.
    Masked pixels count in the mean with that constant, so that a mean over a batch is the mean of its halves' means.
    """
    still = unwarped.detach()
    still = (still + TIE * torch.randn_like(still)).amin(0)
    return torch.minimum(warped.amin(1), still)


def smoothness(disparity: Tensor, image: Tensor) -> Tensor:
    """Edge-aware smoothness: disparity [B, 1, H, W], image [B, C, H, W] -> a number.

    The disparity is divided by each picture's mean, or shrinking it would be the smoothest of all.
    """
    relative = disparity / (disparity.mean((2, 3), keepdim=True) + 1e-7)
    total = torch.zeros((), dtype=disparity.dtype, device=disparity.device)
    for dim in (2, 3):
        edge = image.diff(dim=dim).abs().mean(1, keepdim=True)
        total = total + (relative.diff(dim=dim).abs() * torch.exp(-edge)).mean()
    return total


def bulge(like: Tensor) -> Tensor:
    """Disparity of a plane with an ellipsoid standing out of its middle, near `PIVOT`: like [..., H, W] -> [H, W].

    Small motions of a shallow relief look nearly the same when the relief is turned inside out and the motion with it,
    and what is learnt first stays. Beginning here settles that with the one thing everybody knows of faces.
    """
    height, width = like.shape[-2:]
    half_axes = like.new_tensor(BULGE[:2]).unsqueeze(1)
    away = ((pixel_centres(height, width, like) - 0.5) / half_axes).square().sum(0)  # [H*W]
    relief = BULGE[2] * (1 - away).clamp_min(0).sqrt()
    return disparity_of(PIVOT * (1 + BULGE[2] / 2 - relief)).view(height, width)


def depth_losses(
    depth: DepthNetwork, pose: PoseNetwork, batch: Mapping[str, Tensor], weights: LossWeights
) -> dict[str, Tensor]:
    """Weighted terms `photometric` and `smoothness` of a batch {target, before, after}: float32 [B, 3, H, W] in [0, 1].

    Each is a mean over the batch, the pixels and the four scales of disparity. Where their weights are above 0 there
    are also `consistency`, see there, and `convexity`, the mean distance of disparity from `bulge`: for a short first
    stage.
    """
    target, neighbours = batch["target"], torch.cat([batch["before"], batch["after"]])  # [B, ...], [2B, ...]
    seen = torch.cat([target, neighbours]) if weights.consistency else target
    every = [disparity.float() for disparity in depth.scales(seen)]
    disparities = [disparity[: len(target)] for disparity in every]  # [B, 1, H/2^s, W/2^s]
    motion = pose(target.repeat(2, 1, 1, 1), neighbours)
    with torch.autocast(target.device.type, enabled=False):  # geometry takes all the digits of float32
        target, neighbours = target.float(), neighbours.float()
        views = [_view(neighbours, disparity, motion) for disparity in disparities]
        drawn = torch.stack([view.image for view in views]).unflatten(1, (2, -1))  # [4, 2, B, C, H, W]
        warped = photometric_error(drawn, target)  # [4, 2, B, 1, H, W]
        unwarped = photometric_error(neighbours.unflatten(0, (2, -1)), target)  # [2, B, 1, H, W]
        rough = []
        for scale, disparity in enumerate(disparities):
            small = F.interpolate(target, disparity.shape[-2:], mode="area") if scale else target
            rough.append(smoothness(disparity, small) / 2**scale)
        terms = {
            "photometric": weights.photometric * masked_minimum(warped, unwarped).mean(),
            "smoothness": weights.smoothness * torch.stack(rough).mean(),
        }
        if weights.consistency:
            moved = (warped[0] < unwarped).flatten(0, 1)  # [2B, 1, H, W]
            terms["consistency"] = weights.consistency * consistency(views[0], every[0][len(target) :], moved)
        if weights.convexity:
            away = [(disparity - bulge(disparity)).abs().mean() for disparity in disparities]
            terms["convexity"] = weights.convexity * torch.stack(away).mean()
        return terms


def consistency(view: View, disparity: Tensor, counts: Tensor) -> Tensor:
    """How far the depths of two frames disagree once one is moved to the other: |a - b| / (a + b), in [0, 1].

    disparity [B, 1, H, W]: the other frame's; counts [B, 1, H, W]: pixels that take part, the rest being 0 in the
    mean. (SC-SfMLearner, Bian et al. 2019.) There it keeps a film's scale. On faces it tells a deep relief that turns
    a little from a shallow one that turns more, which look the same: the turned face's depth must be tilted by just
    the angle that it was turned by.
    """
    there = sample(depth_of(disparity), view.places, *counts.shape[-2:])
    inside = ((view.places > 0) & (view.places < 1)).all(1).view_as(counts)
    return ((view.depth - there).abs() / (view.depth + there) * (counts & inside)).mean()


def _view(others: Tensor, disparity: Tensor, motion: Motion) -> View:
    """Targets drawn from others [2B, C, H, W] through disparity [B, 1, h, w] of any scale, at full resolution.

    The motion is the pose network's: about a point at `PIVOT`, shifts in units of it.

    Judged at its own size, a coarse map would find the textureless regions of small pictures as good as any other.
    """
    whole = F.interpolate(disparity, others.shape[-2:], mode="bilinear", align_corners=False)
    depth = depth_of(whole).repeat(2, 1, 1, 1)  # [2B, 1, H, W]
    pivot = depth.new_tensor([0, 0, PIVOT]).expand(len(depth), 3)
    return synthesise(others, depth, motion.camera, motion.rotation, motion.translation * PIVOT, pivot)
