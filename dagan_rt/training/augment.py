"""Augmentation of a pair of frames: mirror, swap in time, colour jitter (the same for both frames)."""

from __future__ import annotations

import numpy as np

# Where each iBUG-68 landmark goes when the face is mirrored: the point on the other side of the face.
LANDMARK_MIRROR = np.array(
    [16 - i for i in range(17)]  # jaw
    + [43 - i for i in range(17, 27)]  # brows
    + [27, 28, 29, 30]  # bridge of the nose
    + [66 - i for i in range(31, 36)]  # nostrils
    + [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40]  # eyes
    + [102 - i for i in range(48, 55)]  # outer lips, upper
    + [114 - i for i in range(55, 60)]  # outer lips, lower
    + [124 - i for i in range(60, 65)]  # inner lips, upper
    + [132 - i for i in range(65, 68)]  # inner lips, lower
)

_LUMA = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)

# Pixels multiplied at once. OpenBLAS gives larger products to all cores, whose waiting for each other costs ten times
# the product, the more so in several of the loader's threads; the numbers are the same.
BLOCK = 16_384


def mirror_image(image: np.ndarray) -> np.ndarray:
    """[H, W, ...] flipped left to right."""
    return image[:, ::-1]


def mirror_landmarks(landmarks: np.ndarray) -> np.ndarray:
    """[68, 2] in [-1, 1]: x changes sign and every point takes the name of its partner."""
    mirrored = landmarks[LANDMARK_MIRROR].copy()
    mirrored[:, 0] *= -1
    return mirrored


def colour_matrix(rng: np.random.Generator, strength: float) -> tuple[np.ndarray, float]:
    """Draw a jitter: (matrix [3, 3] of brightness, saturation and hue; contrast factor).

    Each factor is uniform in 1 ± strength; hue turns by up to ± strength of a full circle, in the YIQ plane.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    angle = 2 * np.pi * rng.uniform(-strength, strength)
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = _FROM_YIQ @ np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) @ _TO_YIQ
    saturate = saturation * np.eye(3) + (1 - saturation) * np.tile(_LUMA, (3, 1))
    return brightness * turn @ saturate, float(contrast)


def jitter(image: np.ndarray, matrix: np.ndarray, contrast: float) -> np.ndarray:
    """Apply a drawn jitter to float32 [H, W, 3] in [0, 1]; contrast is about the mean luma of the image."""
    pixels, turned = image.reshape(-1, 3), matrix.T.astype(np.float32)
    coloured = np.empty_like(pixels)
    count = len(pixels)
    for start in range(0, count, BLOCK):
        np.matmul(pixels[start : start + BLOCK], turned, out=coloured[start : start + BLOCK])
    middle = float(np.full(count, 1 / count, np.float32) @ coloured @ _LUMA.astype(np.float32))  # quicker than mean(0)
    coloured *= np.float32(contrast)
    coloured += np.float32((1 - contrast) * middle)
    return np.clip(coloured, 0.0, 1.0, out=coloured).reshape(image.shape)
