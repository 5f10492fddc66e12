"""How much of a face's shape a depth network has found: measured on synthetic heads, whose depth is known.

Two things are unknown to any method that learns from pictures alone. Its unit of length: depths are scaled by the
quotient of medians first. And how deep the relief is against how far the head turned (the bas-relief ambiguity, nearly
exact at the focal lengths of portraits): so the relief is judged a second time after the best scale and shift of
disparity, which only the relief's form survives. That scale may not be negative: a face turned inside out is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dagan_rt.networks.depth import DepthNetwork
from dagan_rt.training.geometry.synthesis import depth_of
from dagan_rt.training.heads import draw_clip
from dagan_rt.training.heads.render import FAR

FRAMES = (0, 6, 11)  # of each clip: far enough apart for the head to have turned

METRICS = {
    "abs_rel": "mean of |depth / truth - 1|, medians equal",
    "delta_1.25": "share of pixels with depth / truth in [1/1.25, 1.25], medians equal",
    "delta_1.02": "the same within 1.02: a face varies by a few hundredths of its distance",
    "relief_rmse": "root of the mean squared error in head radii, medians equal",
    "aligned_rmse": "the same, disparity scaled and shifted to fit best",
    "aligned_delta_1.01": "share of pixels within 1.01, disparity scaled and shifted to fit best",
    "correlation": "of depth with truth; below 0: inside out",
}
"""What `score` reports; all inside the face, a mean over faces."""

ELLIPSOID = (0.4946, 0.4828, 0.3715, 0.4818, 0.2299)
"""Centre (x, y), half axes (x, y) and depth of the fixed ellipsoid: in picture widths, the depth in distances of its
outline's plane. They minimise abs_rel on training identities 0 to 59, see `fit_ellipsoid`."""


@dataclass(frozen=True)
class Faces:
    """N pictures [N, S, S, 3] uint8 with their depth [N, S, S] in head radii and where the face is, bool [N, S, S]."""

    images: np.ndarray
    depth: np.ndarray
    mask: np.ndarray


def draw_faces(identities: Sequence[int], size: int, frames: Sequence[int] = FRAMES) -> Faces:
    """The given frames of one clip of each identity."""
    images, depths, masks = [], [], []
    for identity in identities:
        clip = draw_clip(identity, max(frames) + 1, size)
        for frame in frames:
            images.append(clip.frames[frame])
            depths.append(clip.depth[frame])
            masks.append(face_mask(clip.landmarks[frame], clip.depth[frame]))
    return Faces(np.stack(images), np.stack(depths), np.stack(masks))


def face_mask(landmarks: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Pixels inside the hull of the landmarks [68, 2] and on the head, by its depth [S, S]: bool [S, S]."""
    return hull(landmarks, depth.shape[0]) & (depth < depth.max() - FAR / 2)  # the background lies FAR behind the head


def hull(landmarks: np.ndarray, size: int) -> np.ndarray:
    """Pixels inside the convex hull of landmarks [68, 2], (x, y) in [-1, 1] corner-aligned: bool [size, size].

    A point is in the hull where no direction sees it beyond all landmarks; 256 directions miss a ten-thousandth.
    """
    angle = np.linspace(0, 2 * np.pi, 256, endpoint=False)
    directions = np.stack([np.cos(angle), np.sin(angle)])  # [2, 256]
    axis = np.linspace(-1, 1, size)
    pixels = np.stack(np.meshgrid(axis, axis), axis=-1)  # [S, S, 2]
    return (pixels @ directions <= (landmarks @ directions).max(0) + 1e-9).all(-1)


def compare(depth: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """`METRICS` of one face: depth and truth [P] in its P pixels, both above 0."""
    depth, truth = depth.astype(np.float64), truth.astype(np.float64)
    scaled = depth * (np.median(truth) / np.median(depth))
    aligned = align(depth, truth)
    varies = depth.std() > 1e-9 * depth.mean()
    return {
        "abs_rel": float(np.abs(scaled / truth - 1).mean()),
        "delta_1.25": _within(scaled, truth, 1.25),
        "delta_1.02": _within(scaled, truth, 1.02),
        "relief_rmse": float(np.sqrt(((scaled - truth) ** 2).mean())),
        "aligned_rmse": float(np.sqrt(((aligned - truth) ** 2).mean())),
        "aligned_delta_1.01": _within(aligned, truth, 1.01),
        "correlation": float(np.corrcoef(depth, truth)[0, 1]) if varies else 0.0,
    }


def align(depth: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Depth [P] whose disparity is scaled (by no less than 0) and shifted to the least squares fit of the truth's."""
    disparity, wanted = 1 / depth, 1 / truth
    offset = disparity - disparity.mean()
    spread = (offset**2).mean()
    slope = max(0.0, (offset * wanted).mean() / spread) if spread > (1e-9 * disparity.mean()) ** 2 else 0.0
    return 1 / np.maximum(wanted.mean() + slope * offset, 1e-6)


def _within(depth: np.ndarray, truth: np.ndarray, most: float) -> float:
    return float((np.maximum(depth / truth, truth / depth) < most).mean())


def score(depth: np.ndarray, faces: Faces) -> dict[str, float]:
    """Mean of every metric over the faces; depth [N, S, S], in any unit."""
    rows = [compare(own[mask], truth[mask]) for own, truth, mask in zip(depth, faces.depth, faces.mask, strict=True)]
    return {name: float(np.mean([row[name] for row in rows])) for name in METRICS}


# ---------------------------------------------------------------------------------------------------------------------
# What is scored


def predict(network: DepthNetwork, images: np.ndarray, batch: int = 16) -> np.ndarray:
    """The network's depth [N, S, S] of uint8 images [N, S, S, 3], in evaluation mode; the mode is restored."""
    training, device = network.training, next(network.parameters()).device
    network.eval()
    with torch.no_grad():
        parts = []
        for start in range(0, len(images), batch):
            pixels = torch.from_numpy(images[start : start + batch]).to(device)
            parts.append(depth_of(network(pixels.permute(0, 3, 1, 2).float() / 255)[:, 0]).cpu().numpy())
    network.train(training)
    return np.concatenate(parts)


def constant_guess(size: int) -> np.ndarray:
    """Every pixel equally far: [S, S]."""
    return np.ones((size, size))


def ellipsoid_guess(size: int, constants: Sequence[float] = ELLIPSOID) -> np.ndarray:
    """An ellipsoid's front, always at the same place, before a plane through its outline: [S, S]."""
    x, y, half_x, half_y, depth = constants
    axis = (np.arange(size) + 0.5) / size
    across, down = (axis[None, :] - x) / half_x, (axis[:, None] - y) / half_y
    return 1 - depth * np.sqrt(np.maximum(1 - across**2 - down**2, 0))


def fit_ellipsoid(faces: Faces, start: Sequence[float] = ELLIPSOID, rounds: int = 60) -> tuple[float, ...]:
    """The constants of the ellipsoid with the least abs_rel: a pattern search that halves its steps when stuck."""

    def cost(constants: np.ndarray) -> float:
        return score_guess(lambda size: ellipsoid_guess(size, constants.tolist()), faces)["abs_rel"]

    best, step = np.array(start, np.float64), 0.1
    least = cost(best)
    for _ in range(rounds):
        tried = [best * (1 + step * sign * unit) for unit in np.eye(len(best)) for sign in (-1, 1)]
        costs = [cost(constants) for constants in tried]
        if min(costs) < least:
            least, best = min(costs), tried[int(np.argmin(costs))]
        else:
            step /= 2
        if step < 1e-3:
            break
    return tuple(float(value) for value in best)


def score_guess(guess: Callable[[int], np.ndarray], faces: Faces) -> dict[str, float]:
    """`score` of one depth map [S, S] for all faces."""
    count, size = faces.mask.shape[:2]
    return score(np.broadcast_to(guess(size), (count, size, size)), faces)


def score_network(network: DepthNetwork, faces: Faces) -> dict[str, dict[str, float]]:
    """The network beside both guesses: method -> metric -> mean over faces."""
    return {
        "constant": score_guess(constant_guess, faces),
        "ellipsoid": score_guess(ellipsoid_guess, faces),
        "network": score(predict(network, faces.images), faces),
    }
