"""The surface of a head and the curves drawn on it.

Head coordinates: x to the image's right, y down, z out of the face, origin in the middle of the skull,
unit one head radius. The surface is where `surface` is zero: an ellipsoid with a tapered jaw, raised by
nose, brows, cheeks, lips, chin and hair, hollowed at the eyes. Features are placed by (x, y), as seen from the front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dagan_rt.training.heads.person import Person

Array = Any  # float or ndarray: a frame's ray points, or all frames' landmarks at once

BROW_INNER, BROW_SPAN = 0.125, 0.36


@dataclass(frozen=True)
class Face:
    """One person wearing one expression. Fields are floats, or [T, 1] arrays for the landmarks of a whole clip."""

    person: Person
    gap: Array
    jaw_drop: Array
    smile: Array
    mouth_half: Array
    blink_left: Array
    blink_right: Array
    brow_raise: Array
    gaze_x: Array
    gaze_y: Array

    # Curves, as y (down) over x. `u` runs over [-1, 1] across the feature.

    def mouth_line(self, u: Array) -> Array:
        corner = 0.25 * self.gap - 0.055 * (self.smile - 0.25)
        return self.person.mouth_y + 0.02 * self.smile + (corner - 0.02 * self.smile) * u * u

    def upper_lip_bottom(self, u: Array) -> Array:
        return self.mouth_line(u) - 0.12 * self.gap * _bow(u)

    def lower_lip_top(self, u: Array) -> Array:
        return self.mouth_line(u) + 0.88 * self.gap * _bow(u)

    def upper_lip_top(self, u: Array) -> Array:
        notch = 1.0 - 0.28 * np.exp(-((u / 0.18) ** 2))
        return self.upper_lip_bottom(u) - self.person.upper_lip * (1.0 - 0.2 * self.smile) * notch * _bow(u)

    def lower_lip_bottom(self, u: Array) -> Array:
        return self.lower_lip_top(u) + self.person.lower_lip * (1.0 - 0.15 * self.smile) * np.sqrt(_bow(u)) * 0.95

    def upper_lid(self, u: Array, blink: Array) -> Array:
        """Height over the line between the eye's corners, negative upwards."""
        height = self.person.eye_height
        return height * _bow(u) * (1.45 * blink - 1.0)

    def lower_lid(self, u: Array) -> Array:
        return self.person.eye_height * (0.55 - 0.18 * self.smile) * _bow(u) + 0.0 * u

    def eye_axis(self, side_x: Array) -> Array:
        """y of the line between the corners at |x| = side_x."""
        return self.person.eye_y - self.person.eye_tilt * (side_x - self.person.eye_x)

    def brow_line(self, along: Array) -> Array:
        """y of the brow's middle, `along` from 0 (inner end) to 1 (outer end)."""
        arch = self.person.brow_arch * (4.0 * along * (1.0 - along)) - 0.035 * along * along
        return self.person.brow_y - 0.085 * self.brow_raise - arch


def make_face(person: Person, expression: Any) -> Face:
    """A face from expression parameters in the order of `EXPRESSIONS`, each a float or a [T, 1] array."""
    opening, smile, left, right, brows, gaze_x, gaze_y = expression
    gap = 0.19 * opening
    half = person.mouth_width * (1.0 + 0.24 * smile - 0.14 * opening)
    return Face(person, gap, 0.85 * gap, smile, half, left, right, brows, 2.0 * gaze_x - 1.0, 2.0 * gaze_y - 1.0)


def surface(face: Face, x: Array, y: Array, z: Array) -> Array:
    """Below zero inside the head, above zero outside; about 1.2 a head radius steep near the surface."""
    # The lower jaw drops: undo it, and everything under the lips is found where it rests.
    rest = y - face.jaw_drop * _smooth((y - 0.52) * 2.2)
    return _height(face, x, rest, z, _features(face, x, np.abs(x), y, rest))


def _height(face: Face, x: Array, rest: Array, z: Array, raised: Array) -> Array:
    """`surface`, given what the features add at (x, y), whatever z."""
    person = face.person
    lower = np.clip(rest, 0.0, 1.5)
    taper = 1.0 - person.jaw_taper * lower * lower
    across = x / (person.width * taper)
    along = z / person.depth
    upper = np.minimum(rest, 0.0) * (1.0 / person.crown)
    body = np.sqrt(across * across + along * along + upper * upper + lower * lower * np.sqrt(lower) + 1e-6)
    front = _smooth(z * 3.0)
    return body - 1.0 - front * raised - hair_height(person, x, rest, z)


def _features(face: Face, x: Array, side: Array, y: Array, rest: Array) -> Array:
    person = face.person
    root = person.eye_y - 0.10
    down = np.clip((y - root) * (1.0 / (person.nose_y - root)), 0.0, 1.0)
    ridge = person.bridge + (person.nose_height - person.bridge) * down * down
    ridge = ridge * _smooth((y - root + 0.08) * 6.0) * _smooth((person.nose_y + 0.085 - y) * 9.0)
    spread = x / (0.075 + (person.nose_width - 0.075) * down)
    raised = ridge * np.exp(-spread * spread)
    raised += 0.055 * _hill(side, y, 0.8 * person.nose_width, person.nose_y + 0.025, 0.05, 0.05)
    raised += person.brow_ridge * _hill(side, y, 0.27, person.brow_y + 0.02, 0.20, 0.08)
    raised -= 0.10 * _hill(side, y, person.eye_x - 0.03, person.eye_y - 0.01, 0.17, 0.10)
    raised += 0.045 * _hill(side, y, person.eye_x, person.eye_y + 0.005, 0.12, 0.075)
    raised += (person.cheek + 0.03 * face.smile) * _hill(side, y, 0.40, 0.27, 0.19, 0.16)
    raised -= 0.03 * _hill(side, y, 0.42, 0.60, 0.14, 0.20)
    raised += 0.045 * _hill(x, y, 0.0, face.mouth_line(0.0), 0.26, 0.16)
    raised += 0.022 * _hill(x, y, 0.0, face.upper_lip_bottom(0.0) - 0.02, 0.8 * face.mouth_half, 0.032)
    raised += 0.028 * _hill(x, y, 0.0, face.lower_lip_top(0.0) + 0.03, 0.7 * face.mouth_half, 0.034)
    raised -= 0.03 * _hill(x, rest, 0.0, person.mouth_y + 0.135, 0.15, 0.04)
    raised += person.chin * _hill(x, rest, 0.0, 0.90, 0.22, 0.14)
    raised += person.jaw_corner * _hill(side, rest, 0.50, 0.62, 0.16, 0.20)
    return raised


def hair_mask(person: Person, x: Array, y: Array, z: Array, softness: float) -> Array:
    """1 where hair grows, 0 on bare skin, along a hairline that runs from the forehead down to the nape."""
    line = person.hairline + person.hair_slope * (0.72 - z)
    if person.hair_style == "fringe":
        line = line + 0.03 * np.sin(11.0 * x + 9.0 * person.hair_part) - 0.25 * x * x
    else:
        line = line + 0.16 * np.abs(x - 0.3 * person.hair_part) - 0.02
    return _smooth((line - y) * (1.0 / softness) + 0.5)


def hair_height(person: Person, x: Array, y: Array, z: Array) -> Array:
    """How far the hair stands off the skull, in units of `surface`."""
    if person.hair_style == "bald":
        return 0.0
    lift = 0.55 + 0.45 * _smooth(0.5 - y)
    if person.hair_style != "crop":
        lock = 6.0 * (x - 0.4 * y * person.hair_part)
        lift = lift + 0.10 * person.hair_wave * np.sin(lock + 5.0 * person.hair_part) * np.cos(3.0 * z)
    return person.hair_thickness * lift * hair_mask(person, x, y, z, 0.16)


def normal(face: Face, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Outward unit normals [3, N] at points on the surface, from central differences of `surface`."""
    step = 0.006
    rest = y - face.jaw_drop * _smooth((y - 0.52) * 2.2)
    raised = _features(face, x, np.abs(x), y, rest)
    gradient = np.stack(
        [
            surface(face, x + step, y, z) - surface(face, x - step, y, z),
            surface(face, x, y + step, z) - surface(face, x, y - step, z),
            _height(face, x, rest, z + step, raised) - _height(face, x, rest, z - step, raised),
        ]
    )
    return gradient / np.sqrt((gradient * gradient).sum(axis=0) + 1e-12)


def landmark_points(face: Face) -> np.ndarray:
    """The 68 iBUG points on the surface, [T, 68, 3] in head coordinates, for a face with [T, 1] fields."""
    person = face.person
    ones = np.ones_like(face.gap)

    def curve(x: Array, y: Array) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(x) * ones, np.asarray(y) * ones

    along = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    brow_x, brow_y = BROW_INNER + BROW_SPAN * along, face.brow_line(along)
    bridge = np.linspace(person.eye_y - 0.02, person.nose_y, 4)
    nostril = np.array([-1.0, -0.5, 0.0, 0.5, 1.0]) * 1.15 * person.nose_width
    base = person.nose_y + 0.075 - 0.02 * np.abs(np.array([-1.0, -0.5, 0.0, 0.5, 1.0]))
    outer = np.array([-0.64, -0.26, 0.0, 0.26, 0.64])
    inner = np.array([-0.4, 0.0, 0.4])
    corner, inner_corner = np.array([1.0]), np.array([0.86])
    mouth = [
        (-corner, face.mouth_line(corner)), (outer, face.upper_lip_top(outer)), (corner, face.mouth_line(corner)),
        (outer[::-1], face.lower_lip_bottom(outer[::-1])), (-inner_corner, face.mouth_line(inner_corner)),
        (inner, face.upper_lip_bottom(inner)), (inner_corner, face.mouth_line(inner_corner)),
        (inner[::-1], face.lower_lip_top(inner[::-1])),
    ]  # fmt: skip
    eye_left, eye_right = _eye_points(face, face.blink_left), _eye_points(face, face.blink_right)
    # The right eye is the left one mirrored, and iBUG walks it from the nose outwards.
    order = [3, 2, 1, 0, 5, 4]
    pieces = [curve(-brow_x, brow_y), curve(brow_x[::-1], brow_y[..., ::-1]), curve(0.0 * bridge, bridge),
              curve(nostril, base), curve(-eye_left[0], eye_left[1]),
              curve(eye_right[0][order], eye_right[1][..., order])]  # fmt: skip
    pieces += [curve(u * face.mouth_half, y) for u, y in mouth]
    x = np.concatenate([piece[0] for piece in pieces], axis=-1)
    y = np.concatenate([piece[1] for piece in pieces], axis=-1)
    z = _bisect(lambda depth: surface(face, x, y, depth), np.full_like(x, 0.2), np.full_like(x, 1.6))
    return np.concatenate([_jaw_points(face), np.stack([x, y, z], axis=-1)], axis=1)


def _eye_points(face: Face, blink: Array) -> tuple[np.ndarray, np.ndarray]:
    """|x| and y of six lid points: outer corner, upper lid (2), inner corner, lower lid (2, from the nose)."""
    u = np.array([1.0, 0.4, -0.4, -1.0, -0.4, 0.4])
    side = face.person.eye_x + u * face.person.eye_width
    lids = np.where(np.arange(6) < 3, face.upper_lid(u, blink), face.lower_lid(u))
    return side, face.eye_axis(side) + lids


def _jaw_points(face: Face) -> np.ndarray:
    """17 points from ear to ear by way of the chin: where rays from the skull's middle leave the skin."""
    turn = np.linspace(-1.0, 1.0, 17) * 0.49 * np.pi
    direction = np.stack([0.9 * np.sin(turn), np.cos(turn), 0.10 + 0.5 * np.cos(turn) ** 2], axis=-1)
    low = np.zeros(np.broadcast_shapes(np.shape(face.gap), (17,)))
    reach = _bisect(
        lambda r: surface(face, r * direction[:, 0], r * direction[:, 1], r * direction[:, 2]), low + 0.3, low + 1.8
    )
    return reach[..., None] * direction


def _bisect(function: Any, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Where `function` turns from negative to positive, to about 1e-6 of a head radius."""
    for _ in range(21):
        middle = 0.5 * (inside + outside)
        within = function(middle) < 0.0
        inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
    return 0.5 * (inside + outside)


def _bow(u: Array) -> Array:
    inside = 1.0 - u * u
    # A NumPy scalar would turn all that it meets into float64.
    return max(inside, 0.0) if isinstance(inside, float) else np.clip(inside, 0.0, 1.0)


def _hill(x: Array, y: Array, centre_x: Array, centre_y: Array, width: Array, height: Array) -> Array:
    across = (x - centre_x) * (1.0 / width)
    down = (y - centre_y) * (1.0 / height)
    return np.exp(-(across * across + down * down))


def _smooth(value: Array) -> Array:
    """0 below 0, 1 above 1, and a cubic between."""
    value = np.minimum(np.maximum(value, 0.0), 1.0)  # np.clip costs twice as much, hundreds of times a frame
    return value * value * (3.0 - 2.0 * value)
