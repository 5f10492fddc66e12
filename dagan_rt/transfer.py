"""Carrying the motion of a driving face over to a source face: key-point arithmetic in NumPy.

The `motion` graph holds the same arithmetic as `transfer`; only the movement scale is needed outside it, once a
session.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dagan_rt.errors import InputError
from dagan_rt.keypoints import KeyPoints


def transfer(source: KeyPoints, driving: KeyPoints, initial: KeyPoints, scale: ArrayLike = 1.0) -> KeyPoints:
    """Move the source key points as the driving face moved since its initial frame (FOMM section 3.3, equation 15).

    All key points are arrays [B, K, 2] and [B, K, 2, 2]; `scale` is a number or an array [B, 1].

        value = source + scale * (driving - initial)        jacobian = driving initial^-1 source

    Absolute motion is the same with `initial` := `source` and `scale` 1.
    """
    ratio = np.asarray(scale, np.float32).reshape(-1, 1, 1)
    value = source.value + ratio * (driving.value - initial.value)
    jacobian = driving.jacobian @ inverse_2x2(initial.jacobian) @ source.jacobian
    return KeyPoints(value, jacobian)


def inverse_2x2(matrix: np.ndarray) -> np.ndarray:
    """Inverse of matrices [..., 2, 2] in closed form, as the graphs compute it."""
    a, b, c, d = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 0], matrix[..., 1, 1]
    adjugate = np.stack([np.stack([d, -b], -1), np.stack([-c, a], -1)], -2)
    return adjugate / (a * d - b * c)[..., None, None]


def movement_scale(source: KeyPoints, initial: KeyPoints) -> float:
    """How much larger the source face is than the driving one: the square root of the ratio of their hull areas.

    `source` and `initial` hold one face each (B = 1); `initial` is that of the first driving frame.
    Raises InputError if a face's key points span no area, for then no ratio exists.
    """
    areas = {}
    for name, points in (("source image", source.value), ("initial driving frame", initial.value)):
        area = areas[name] = hull_area(np.asarray(points, np.float64).reshape(-1, 2))
        if not np.isfinite(area) or area <= 1e-12:
            raise InputError(
                f"the movement scale needs key points that span an area, and those of the {name} span {area:.3g}: "
                "choose another image, or leave the scale as it is"
            )
    return float(np.sqrt(areas["source image"] / areas["initial driving frame"]))


def hull_area(points: np.ndarray) -> float:
    """Area of the convex hull of points [N, 2]; NaN if a coordinate is not finite."""
    if not np.isfinite(points).all():
        return float("nan")
    corners = _hull(points)
    x, y = corners[:, 0], corners[:, 1]
    return float(0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))


def _hull(points: np.ndarray) -> np.ndarray:
    """Corners of the convex hull, counter-clockwise, by Andrew's monotone chain."""
    ordered = sorted({(float(x), float(y)) for x, y in points})
    if len(ordered) < 3:
        return np.array(ordered)
    lower, upper = _chain(ordered), _chain(ordered[::-1])
    return np.array(lower[:-1] + upper[:-1])


def _chain(ordered: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """One side of the hull: drop every point at which the boundary would not turn left."""
    chain: list[tuple[float, float]] = []
    for x, y in ordered:
        while len(chain) >= 2:
            (ax, ay), (bx, by) = chain[-2], chain[-1]
            if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                break
            chain.pop()
        chain.append((x, y))
    return chain
