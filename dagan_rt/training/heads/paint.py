"""Colours on the head: skin, eyes, brows, lips, beard and hair, by position seen from the front."""

from __future__ import annotations

import numpy as np

from dagan_rt.training.heads.person import Person
from dagan_rt.training.heads.shape import BROW_INNER, BROW_SPAN, Face, hair_mask


def paint_head(face: Face, x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """Albedo [3, N] in linear light and gloss [N] at surface points; `pixel` is a pixel's width in head radii."""
    person = face.person
    colour = np.repeat(person.skin[:, None], x.size, axis=1)
    gloss = np.full(x.size, 0.05, np.float32)
    front = np.flatnonzero(z > 0.05)
    fx, fy = x[front], y[front]
    skin = _paint_skin(face, fx, fy, pixel)
    skin, shine = _paint_mouth(face, skin, fx, fy, pixel)
    skin, glint = _paint_eyes(face, skin, fx, fy, pixel)
    colour[:, front] = _paint_brows(face, skin, fx, fy, pixel)
    gloss[front] += shine + glint
    if person.hair_style == "bald":
        return colour, gloss
    rest = y - face.jaw_drop * np.clip((y - 0.52) * 2.2, 0.0, 1.0)
    hair = hair_mask(person, x, rest, z, max(0.05, 1.5 * pixel))
    gloss = gloss * (1.0 - 0.4 * hair)
    return colour + hair * (hair_colour(person, x, y, z, pixel) - colour), gloss


def hair_colour(person: Person, x: np.ndarray, y: np.ndarray, z: np.ndarray, pixel: float) -> np.ndarray:
    """Strands along the fall of the hair: they fade out where pixels are too coarse to carry them."""
    turn = x * (1.4 + 0.3 * y) + (0.5 * z + 0.2 * y) * person.hair_part
    strand = np.zeros_like(x)
    for waves, share in ((9.0, 0.5), (23.0, 0.5)):
        fade = float(np.exp(-((waves * 1.6 * pixel) ** 2)))
        strand += share * fade * np.sin(waves * turn + 2.0 * np.sin(2.1 * y + waves))
    return person.hair[:, None] * (1.0 + 0.22 * strand)


def _mix(colour: np.ndarray, cover: np.ndarray, other: np.ndarray) -> np.ndarray:
    return colour + cover * (other - colour)


def _edge(distance: np.ndarray, pixel: float, soft: float = 0.0) -> np.ndarray:
    """Coverage of what lies at distance > 0 from its edge."""
    return np.clip(distance * (1.0 / (pixel + soft)) + 0.5, 0.0, 1.0)


def _line(distance: np.ndarray, width: float, pixel: float) -> np.ndarray:
    """A thin soft line: it keeps its ink when it is thinner than a pixel."""
    wide = max(width, 0.6 * pixel)
    return (width / wide) * np.exp(-((distance * (1.0 / wide)) ** 2))


def _spot(x: np.ndarray, y: np.ndarray, cx: float, cy: float, width: float, height: float) -> np.ndarray:
    across, down = (x - cx) * (1.0 / width), (y - cy) * (1.0 / height)
    return np.exp(-(across * across + down * down))


def _paint_skin(face: Face, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    person = face.person
    side = np.abs(x)
    flush = person.blush * (_spot(side, y, 0.40, 0.30, 0.17, 0.15) + 0.6 * _spot(x, y, 0.0, person.nose_y, 0.13, 0.09))
    shadow = 0.38 * _spot(side, y, person.eye_x - 0.07, person.eye_y + 0.02, 0.16, 0.085)
    shadow += 0.22 * _spot(x, y, 0.0, person.nose_y + 0.105, 0.14, 0.045)
    shadow += 0.16 * _spot(x, y, 0.0, float(face.lower_lip_bottom(0.0)) + 0.04, 0.13, 0.035)
    fold_x = 1.25 * person.nose_width + (y - person.nose_y - 0.02) * (face.mouth_half / person.mouth_width * 0.62)
    fold = _line(side - fold_x, 0.022, pixel) * np.clip((y - person.nose_y + 0.02) * 9.0, 0.0, 1.0)
    shadow += (0.08 + 0.20 * face.smile) * fold * np.clip((person.mouth_y + 0.02 - y) * 9.0, 0.0, 1.0)
    tint = np.array([[0.05], [0.32], [0.28]], np.float32)
    colour = person.skin[:, None] * (1.0 - tint * flush) * (1.0 - shadow)
    nostril = _spot(side, y, 0.52 * person.nose_width, person.nose_y + 0.062, 0.034, 0.019 + 0.4 * pixel * 0.5)
    colour = colour * (1.0 - 0.72 * nostril)
    if person.beard:
        grown = np.clip((y - 0.30 - 0.25 * np.clip(0.62 - side, 0.0, 1.0)) * 5.0, 0.0, 1.0)
        hollow = np.clip(1.15 - 1.2 * _spot(side, y, 0.27, 0.46, 0.13, 0.10), 0.0, 1.0)
        colour = _mix(
            colour, 0.85 * person.beard * grown * hollow, person.hair[:, None] * 0.8 + 0.12 * person.skin[:, None]
        )
    return colour


def _paint_mouth(
    face: Face, colour: np.ndarray, x: np.ndarray, y: np.ndarray, pixel: float
) -> tuple[np.ndarray, np.ndarray]:
    person = face.person
    gloss = np.zeros_like(x)
    near = np.flatnonzero((np.abs(x) < face.mouth_half + 0.06) & (np.abs(y - person.mouth_y - 0.08) < 0.34))
    if not near.size:
        return colour, gloss
    x, y = x[near], y[near]
    u = x * (1.0 / face.mouth_half)
    inside = _edge(1.0 - np.abs(u), pixel / face.mouth_half)
    top, bottom = face.upper_lip_top(u), face.lower_lip_bottom(u)
    high, low = face.upper_lip_bottom(u), face.lower_lip_top(u)
    lips = _edge(y - top, pixel, 0.012) * _edge(bottom - y, pixel, 0.016) * inside
    upper = np.clip((0.5 * (high + low) - y) * 30.0 + 0.5, 0.0, 1.0)
    lip_colour = person.lips[:, None] * (1.0 - 0.22 * upper)
    part = _mix(colour[:, near], lips, lip_colour)
    hole = _edge(y - high, pixel) * _edge(low - y, pixel) * inside
    teeth_edge = high + 0.055 + 0.02 * face.smile
    teeth = _edge(teeth_edge - y, pixel, 0.01) * _edge(0.80 - np.abs(u), 2.0 * pixel, 0.25)
    tongue = 0.8 * _spot(x, y, 0.0, float(face.lower_lip_top(0.0)), 0.12, 0.055)
    deep = np.repeat(np.array([[0.035], [0.008], [0.010]], np.float32), x.size, axis=1)
    deep = _mix(deep, tongue, np.array([[0.34], [0.10], [0.10]], np.float32))
    deep = _mix(deep, teeth, np.array([[0.78], [0.74], [0.68]], np.float32) * (0.55 + 0.45 * (1.0 - u * u)))
    part = _mix(part, hole, deep)
    seam = 0.65 * _line(y - 0.5 * (high + low), 0.011, pixel) * inside * np.clip(1.0 - 12.0 * (low - high), 0.0, 1.0)
    colour[:, near] = part * (1.0 - seam)
    gloss[near] = 0.10 * lips * (1.0 - hole)
    return colour, gloss


def _paint_eyes(
    face: Face, colour: np.ndarray, x: np.ndarray, y: np.ndarray, pixel: float
) -> tuple[np.ndarray, np.ndarray]:
    gloss = np.zeros_like(x)
    person = face.person
    for sign, blink in ((-1.0, face.blink_left), (1.0, face.blink_right)):
        side = x * sign
        near = np.flatnonzero(
            (np.abs(side - person.eye_x) < person.eye_width + 0.05) & (np.abs(y - person.eye_y) < 0.19)
        )
        if near.size:
            colour[:, near] = _paint_eye(face, colour[:, near], side[near], y[near], sign, blink, pixel)
    return colour, gloss


def _paint_eye(
    face: Face, colour: np.ndarray, side: np.ndarray, y: np.ndarray, sign: float, blink: float, pixel: float
) -> np.ndarray:
    person = face.person
    u = (side - person.eye_x) * (1.0 / person.eye_width)
    height = y - face.eye_axis(side)
    upper, lower = face.upper_lid(u, blink), face.lower_lid(u)
    across = _edge(1.0 - np.abs(u), pixel / person.eye_width)
    opened = _edge(height - upper, pixel) * _edge(lower - height, pixel) * across
    # The eyeball is darker under the lid and towards the corners.
    white = np.array([[0.80], [0.78], [0.76]], np.float32) * (1.0 - 0.35 * u * u)
    white = white * (0.62 + 0.38 * np.clip((height - upper) * (1.0 / 0.05), 0.0, 1.0))
    iris_x = side - person.eye_x - sign * 0.048 * face.gaze_x
    iris_y = height + 0.22 * person.eye_height - 0.022 * face.gaze_y
    away = np.sqrt(iris_x * iris_x + iris_y * iris_y)
    radius = person.iris_radius
    iris = person.iris[:, None] * (0.65 + 0.7 * np.clip(away * (1.0 / radius), 0.0, 1.0))
    iris = iris * (1.0 - 0.6 * np.clip((away - 0.8 * radius) * (5.0 / radius), 0.0, 1.0))
    ball = _mix(white, _edge(radius - away, pixel), iris)
    ball = _mix(ball, _edge(0.45 * radius - away, pixel), np.full((3, 1), 0.004, np.float32))
    spark_x, spark_y = sign * iris_x + 0.022, iris_y + 0.024
    spark = np.clip((0.017 - np.sqrt(spark_x * spark_x + spark_y * spark_y)) * (1.0 / pixel) + 0.5, 0.0, 1.0)
    ball = _mix(ball, 0.85 * spark * min(1.0, (0.034 / pixel) ** 2), np.ones((3, 1), np.float32))
    colour = _mix(colour, opened, ball)
    lash = np.clip(0.85 * _line(height - upper + 0.004, 0.017, pixel), 0.0, 1.0) * _edge(1.06 - np.abs(u), pixel, 0.15)
    rim = 0.30 * _line(height - lower, 0.010, pixel) * across
    crease = 0.30 * _line(height - upper * 1.0 + 0.045 - 0.02 * blink, 0.014, pixel) * across
    ink = np.array([[0.025], [0.016], [0.014]], np.float32)
    colour = colour * (1.0 - np.maximum(rim, crease) * (1.0 - opened))
    return _mix(colour, lash, ink)


def _paint_brows(face: Face, colour: np.ndarray, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    person = face.person
    along = (np.abs(x) - BROW_INNER) * (1.0 / BROW_SPAN)
    near = np.flatnonzero((along > -0.25) & (along < 1.25) & (np.abs(y - person.brow_y + 0.05) < 0.20))
    if not near.size:
        return colour
    along, y = along[near], y[near]
    inside = np.clip(along, 0.0, 1.0)
    thick = person.brow_thickness * (1.15 - 0.75 * inside * inside)
    ends = np.clip(along * 5.0 + 0.6, 0.0, 1.0) * np.clip((1.0 - along) * 4.0 + 0.3, 0.0, 1.0)
    hairs = _edge(thick - np.abs(y - face.brow_line(inside)), pixel, 0.03) * ends * person.brow_strength
    colour[:, near] = _mix(colour[:, near], hairs, np.minimum(person.hair, 0.22)[:, None] * 0.55)
    return colour
