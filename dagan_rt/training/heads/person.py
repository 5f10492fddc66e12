"""Who is drawn: the proportions and colours of one head, and the scene it sits in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HAIR_STYLES = ("bald", "short", "crop", "fringe", "long", "bob")

# sRGB in [0, 1]; a person's tone lies between two neighbours.
_SKIN = np.array(
    [
        [0.97, 0.83, 0.75],
        [0.94, 0.76, 0.65],
        [0.86, 0.66, 0.53],
        [0.74, 0.54, 0.41],
        [0.58, 0.40, 0.30],
        [0.42, 0.28, 0.21],
    ]
)
_HAIR = np.array(
    [[0.09, 0.07, 0.07], [0.20, 0.13, 0.09], [0.36, 0.22, 0.13], [0.58, 0.40, 0.22], [0.80, 0.64, 0.38],
     [0.55, 0.24, 0.11], [0.62, 0.61, 0.60]]
)  # fmt: skip
_IRIS = np.array([[0.24, 0.13, 0.07], [0.40, 0.25, 0.11], [0.42, 0.42, 0.20], [0.30, 0.48, 0.62], [0.42, 0.47, 0.50]])


@dataclass(frozen=True)
class Person:
    """One identity. Lengths are in head radii (half the head's height), colours linear RGB in [0, 1]."""

    width: float
    depth: float
    crown: float
    jaw_taper: float
    jaw_corner: float
    chin: float
    cheek: float
    brow_ridge: float
    nose_y: float
    nose_height: float
    nose_width: float
    bridge: float
    eye_x: float
    eye_y: float
    eye_width: float
    eye_height: float
    eye_tilt: float
    iris_radius: float
    brow_y: float
    brow_thickness: float
    brow_arch: float
    brow_strength: float
    mouth_y: float
    mouth_width: float
    upper_lip: float
    lower_lip: float
    ear: float
    neck: float
    shoulder: float
    hair_style: str
    hair_thickness: float
    hairline: float
    hair_slope: float
    hair_part: float
    hair_wave: float
    beard: float
    blush: float
    skin: np.ndarray
    lips: np.ndarray
    hair: np.ndarray
    iris: np.ndarray


@dataclass(frozen=True)
class Scene:
    """Camera, light, clothes and background of one clip. `light` is a unit vector (right, down, to the camera)."""

    distance: float
    half_view: float
    light: np.ndarray
    light_colour: np.ndarray
    ambient: float
    cloth: np.ndarray
    collar: float
    background: np.ndarray
    gradient: np.ndarray
    vignette: float
    blobs: np.ndarray


def linear(colour: np.ndarray) -> np.ndarray:
    """Displayed colour to light, with a display gamma of two (cheap to undo with a square root)."""
    return (np.asarray(colour, np.float64) ** 2).astype(np.float32)


def draw_person(identity: int) -> Person:
    """The person of an identity: every number is drawn from a generator seeded by the identity alone."""
    rng = np.random.default_rng([20_210, identity])

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    tone = between(0.0, len(_SKIN) - 1.001)
    step = int(tone)
    skin = _SKIN[step] + (tone - step) * (_SKIN[step + 1] - _SKIN[step])
    skin = np.clip(skin * (1.0 + rng.uniform(-0.04, 0.04, 3)), 0.0, 1.0)
    # Fair hair is rare on dark skin, so dark skin draws from the darker colours.
    hair = _HAIR[int(rng.integers(len(_HAIR)))] if tone < 2.6 else _HAIR[int(rng.integers(3))] * between(0.6, 1.0)
    hair = np.clip(hair * (1.0 + rng.uniform(-0.15, 0.15, 3)), 0.02, 0.95)
    iris = _IRIS[int(rng.integers(len(_IRIS)))] if tone < 2.6 else _IRIS[int(rng.integers(2))]
    lips = skin * np.array([0.86, 0.56, 0.55]) + np.array([0.03, 0.0, 0.01]) * between(0.0, 2.0)
    style = str(rng.choice(HAIR_STYLES, p=(0.08, 0.26, 0.14, 0.16, 0.22, 0.14)))
    line = {"fringe": between(-0.36, -0.29), "bob": between(-0.60, -0.40)}.get(style, between(-0.68, -0.54))
    slope = {"fringe": 0.62, "long": between(1.3, 1.7), "bob": between(1.2, 1.5)}.get(style, between(0.72, 0.88))
    thickness = {"bald": 0.0, "crop": between(0.025, 0.05), "short": between(0.09, 0.20)}.get(
        style, between(0.08, 0.16)
    )
    bearded = style in ("bald", "short", "crop") and rng.random() < 0.45
    return Person(
        width=between(0.67, 0.77),
        depth=between(0.80, 0.90),
        crown=between(0.97, 1.06),
        jaw_taper=between(0.10, 0.30),
        jaw_corner=between(0.0, 0.07),
        chin=between(0.05, 0.13),
        cheek=between(0.015, 0.06),
        brow_ridge=between(0.01, 0.05),
        nose_y=between(0.33, 0.42),
        nose_height=between(0.17, 0.27),
        nose_width=between(0.085, 0.125),
        bridge=between(0.06, 0.12),
        eye_x=between(0.275, 0.325),
        eye_y=between(-0.06, -0.01),
        eye_width=between(0.125, 0.155),
        eye_height=between(0.055, 0.082),
        eye_tilt=between(-0.08, 0.14),
        iris_radius=between(0.060, 0.070),
        brow_y=between(-0.24, -0.19),
        brow_thickness=between(0.020, 0.042),
        brow_arch=between(0.015, 0.06),
        brow_strength=between(0.55, 0.95),
        mouth_y=between(0.595, 0.645),
        mouth_width=between(0.19, 0.255),
        upper_lip=between(0.038, 0.060),
        lower_lip=between(0.048, 0.075),
        ear=between(0.85, 1.15),
        neck=between(0.36, 0.46),
        shoulder=between(1.5, 1.9),
        hair_style=style,
        hair_thickness=thickness,
        hairline=line,
        hair_slope=slope,
        hair_part=between(-0.35, 0.35),
        hair_wave=between(0.3, 1.0),
        beard=between(0.25, 0.9) if bearded else 0.0,
        blush=between(0.1, 0.5),
        skin=linear(skin),
        lips=linear(np.clip(lips, 0.0, 1.0)),
        hair=linear(hair),
        iris=linear(iris),
    )


def draw_scene(identity: int, seed: int) -> Scene:
    """Camera, light, clothes and background: they belong to a clip, not to a person."""
    rng = np.random.default_rng([20_211, identity, seed])
    distance = float(rng.uniform(6.5, 9.0))
    light = np.array([rng.uniform(-0.75, 0.75), rng.uniform(-0.75, -0.15), rng.uniform(0.75, 1.1)])
    warmth = float(rng.uniform(-0.06, 0.08))
    base = _pleasant_colour(rng, 0.18, 0.75)
    other = np.clip(base + rng.uniform(-0.22, 0.22, 3), 0.05, 0.92)
    count = int(rng.choice((0, 0, 3, 5, 7)))
    blobs = np.column_stack(
        [rng.uniform(-1.1, 1.1, 7), rng.uniform(-1.1, 0.9, 7), rng.uniform(0.18, 0.5, 7), rng.uniform(0.12, 0.3, 7),
         linear(np.stack([_pleasant_colour(rng, 0.3, 0.95) for _ in range(7)]))]
    )[:count]  # fmt: skip
    angle = float(rng.uniform(0.0, 2.0 * np.pi))
    return Scene(
        distance=distance,
        half_view=float(rng.uniform(1.75, 2.0)) / distance,
        light=(light / np.linalg.norm(light)).astype(np.float32),
        light_colour=np.array([1.0 + warmth, 1.0, 1.0 - warmth], np.float32),
        ambient=float(rng.uniform(0.26, 0.40)),
        cloth=linear(_pleasant_colour(rng, 0.12, 0.9)),
        collar=float(rng.uniform(0.12, 0.5)),
        background=linear(np.stack([base, other])),
        gradient=np.array([np.cos(angle), np.sin(angle)], np.float32),
        vignette=float(rng.uniform(0.05, 0.35)),
        blobs=blobs.astype(np.float32),
    )


def _pleasant_colour(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """A colour of any hue, mostly muted: one value in [low, high], moved a little apart per channel."""
    value = rng.uniform(low, high)
    saturation = rng.uniform(0.02, 0.30)
    return np.clip(value + saturation * (rng.random(3) - 0.5), 0.03, 0.97)
