"""Where the attention looks: its weights over the warped feature, and how much of them lies on the face (Figure 3).

Query positions and key positions both lie on the grid of the warped feature, so in the geometry of the driving frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from dagan_rt.errors import InputError
from dagan_rt.inspection import trace
from dagan_rt.networks.attention import attention_weights
from dagan_rt.networks.model import Model

FINE = 8
"""Sub-pixels a side of a feature's cell, to measure how much of it is face."""


@dataclass(frozen=True)
class Attention:
    """Weights [B, h, w, h, w], of each query position (first) over key positions, summing to 1; and the image made.

    warped, attended [B, C, h, w]: before and after the attention; prediction [B, 3, H, W] in (0, 1).
    """

    weights: Tensor
    warped: Tensor
    attended: Tensor
    prediction: Tensor


def attention_of(model: Model, source: Tensor, driving: Tensor) -> Attention:
    """Self-reenactment with absolute motion, and the weights of its attention: source, driving [B, 3, H, W] in [0, 1].

    The model should be in evaluation mode; no gradient is kept. InputError for a variant without attention.
    """
    if model.config.parts.attention is None:
        raise InputError(f"{model.config.variant} has no attention to look at")
    found = trace(model, source, driving)
    assert found.query is not None and found.key is not None
    B, _, h, w = found.key.shape
    weights = attention_weights(found.query.flatten(2), found.key.flatten(2)).reshape(B, h, w, h, w)
    generated = found.generated
    return Attention(weights, generated.warped_feature, generated.attended_feature, generated.prediction)


def face_cover(landmarks: np.ndarray, height: int, width: int) -> np.ndarray:
    """How much of each cell of a grid over the image is face: float64 [height, width] in [0, 1].

    landmarks: [68, 2] on the corner-aligned grid, iBUG order. The face is what jaw and brows enclose.
    """
    outline = np.concatenate([landmarks[:17], landmarks[26:16:-1]])  # jaw from left to right, brows back
    size = np.array([width, height])
    # Corner-aligned: -1 and 1 are the centres of the first and last cell. Seen on a finer grid, by its cells' centres.
    centres = ((outline + 1) / 2 * (size - 1) + 0.5) * FINE - 0.5
    picture = Image.new("L", (width * FINE, height * FINE))
    ImageDraw.Draw(picture).polygon([(float(x), float(y)) for x, y in centres], fill=1)
    return np.asarray(picture, np.float64).reshape(height, FINE, width, FINE).mean((1, 3))


def mass_on(weights: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """The share of each query's attention that falls on what `cover` [h, w] covers.

    weights: [..., h, w], each summing to 1 over the last two axes; returns [...] in [0, 1].
    """
    return (weights * cover).sum((-2, -1))


def face_share(weights: np.ndarray, cover: np.ndarray) -> tuple[float, float]:
    """(attention on the face, the face's own share of the positions): the mean over all queries of one image.

    weights: [h, w, h, w]; cover: [h, w]. The second number is what looking everywhere alike would give.
    """
    return float(mass_on(weights, cover).mean()), float(cover.mean())
