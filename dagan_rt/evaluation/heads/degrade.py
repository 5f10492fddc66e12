"""What generated images look like when they are not quite right: blur, lost resolution, JPEG, noise, shifted colours.

Nothing here moves what is in the picture: landmarks, pose, expression and identity stay true.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

REFERENCE = 64
"""Side in pixels that blurs are given for; they grow with the picture."""


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random mixture of degradations, mild to heavy: uint8 [S, S, 3] → uint8 [S, S, 3]."""
    size = image.shape[0]
    chance = rng.random(6)
    if chance[0] < 0.5:
        image = shift_colours(image, rng, 0.12)
    if chance[1] < 0.3:
        image = lose_resolution(image, max(8, round(size * rng.uniform(0.35, 0.9))))
    if chance[2] < 0.4:
        soft = blur(image, rng.uniform(0.2, 1.3))
        image = soft if chance[3] < 0.5 else _in_part(image, soft, rng)
    if chance[4] < 0.4:
        image = add_noise(image, rng, rng.uniform(0.0, 8.0))
    if chance[5] < 0.25:
        image = jpeg(image, int(rng.integers(30, 95)))
    return image


def degrade_slightly(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a nearly perfect generator would still change: uint8 [S, S, 3] → uint8 [S, S, 3].

    Averaged to half the size and back, each colour channel scaled within ± 2 %, noise of 2 levels, JPEG of quality 90.
    """
    image = shift_colours(lose_resolution(image, image.shape[0] // 2), rng, 0.02)
    return jpeg(add_noise(image, rng, 2.0), 90)


def shift_colours(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Each channel scaled, and all of them raised or lowered, by up to ± strength of the range."""
    gain = rng.uniform(1 - strength, 1 + strength, 3) * rng.uniform(1 - strength, 1 + strength)
    return _bytes(image * gain.astype(np.float32) + np.float32(127.5 * rng.uniform(-strength, strength)))


def lose_resolution(image: np.ndarray, side: int) -> np.ndarray:
    """Resized to `side` pixels, antialiased, and back."""
    size = image.shape[0]
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def blur(image: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian blur; `deviation` in pixels of an image of `REFERENCE` pixels."""
    radius = deviation * image.shape[0] / REFERENCE
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def add_noise(image: np.ndarray, rng: np.random.Generator, deviation: float) -> np.ndarray:
    """Independent Gaussian noise, `deviation` in levels of 255."""
    return _bytes(image + np.float32(deviation) * rng.standard_normal(image.shape, np.float32))


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Through a JPEG file in memory."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
        return np.asarray(decoded.convert("RGB"))


def _in_part(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`other` on one side of a soft line through the picture, `image` on the other side."""
    axis = np.linspace(-1, 1, image.shape[0], dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.float32(np.cos(angle)) * axis[None, :] + np.float32(np.sin(angle)) * axis[:, None]
    cover = np.clip(2 * (ramp + np.float32(rng.uniform(-0.4, 0.4))) + 0.5, 0, 1)[:, :, None]
    return _bytes(image + cover * (other.astype(np.float32) - image))


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
