"""Small movements of training pictures, with landmarks, pose and activations that move along."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dagan_rt.evaluation.heads.targets import ACTIONS
from dagan_rt.training.augment import LANDMARK_MIRROR

SCALE, SHIFT, WARP = 0.1, 0.1, 0.012  # relative; of half the image's side; standard deviation on 5 × 5 points


@dataclass(frozen=True)
class Batch:
    """images float32 [B, 3, S, S] in [0, 1], landmarks [B, 68, 2], pose [B, 3], actions [B, 7] (activations)."""

    images: Tensor
    landmarks: Tensor
    pose: Tensor
    actions: Tensor


def move(batch: Batch, mirrored: Tensor, generator: torch.Generator, strength: float = WARP) -> Batch:
    """Mirror where `mirrored` (bool [B]), scale, shift and warp a little; the truth stays true of the new pictures.

    Scale and shift leave pose and expression alone. The warp moves no point by more than about a pixel of 64, which is
    little for a head and much for an iris or a smile: `strength` 0 is for what is to tell those.
    """
    count, size = len(batch.images), batch.images.shape[-1]

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    side = torch.where(mirrored, -1.0, 1.0)
    scale = 1 + SCALE * uniform(count, 1)
    stretch = torch.cat([side[:, None] * scale, scale], 1)
    shift = SHIFT * uniform(count, 2)
    warp = strength * torch.randn(count, 2, 5, 5, generator=generator)
    warp = F.interpolate(warp, size=(size, size), mode="bicubic", align_corners=True)
    axis = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    origin = stretch[:, None, None] * grid + shift[:, None, None] + warp.permute(0, 2, 3, 1)
    images = F.grid_sample(batch.images, origin, padding_mode="border", align_corners=True)
    landmarks = _follow(batch.landmarks, stretch, shift, warp)
    landmarks = torch.where(mirrored[:, None, None], landmarks[:, LANDMARK_MIRROR], landmarks)
    pose = batch.pose * torch.stack([side, torch.ones_like(side), side], 1)
    actions = torch.where(mirrored[:, None], _mirror_actions(batch.actions), batch.actions)
    return Batch(images, landmarks, pose, actions)


def _follow(landmarks: Tensor, stretch: Tensor, shift: Tensor, warp: Tensor) -> Tensor:
    """Where points go when the picture at u shows what was at stretch · u + shift + warp(u)."""
    moved = (landmarks - shift[:, None]) / stretch[:, None]
    for _ in range(2):  # the warp is to be read at the new place, which two rounds find to a hundredth of a pixel
        there = F.grid_sample(warp, moved[:, :, None], padding_mode="border", align_corners=True)[..., 0]
        moved = (landmarks - shift[:, None] - there.transpose(1, 2)) / stretch[:, None]
    return moved


def _mirror_actions(actions: Tensor) -> Tensor:
    order = [ACTIONS.index({"blink_left": "blink_right", "blink_right": "blink_left"}.get(name, name))
             for name in ACTIONS]  # fmt: skip
    mirrored = actions[:, order].clone()
    gaze = ACTIONS.index("gaze_x")
    mirrored[:, gaze] = 1 - mirrored[:, gaze]
    return mirrored
