"""What the regressors are to say of a frame, from its truth."""

from __future__ import annotations

from dataclasses import fields
from functools import cache

import numpy as np

from dagan_rt.training.heads import EXPRESSIONS
from dagan_rt.training.heads.person import HAIR_STYLES, Person, draw_person

ACTIONS = EXPRESSIONS

ACTIVE = {
    "mouth_open": 0.2,  # half open is rare: 46 % of frames are above this
    "smile": 0.5,
    "blink_left": 0.3,  # lids at rest hang down to 0.22 at most: 24 % of frames are in a blink or a wink
    "blink_right": 0.3,
    "brow_raise": 0.5,
    "gaze_x": 0.5,  # two-sided: active is a look to the image's right, else to its left
    "gaze_y": 0.5,  # active is a look down, else up
}
"""The expression value above which an action is active. At 0.5 smile, brows and both gazes are active in half of the
frames; mouth and lids, which are mostly shut and mostly open, have thresholds of their own."""


def activations(expression: np.ndarray) -> np.ndarray:
    """Expressions [..., 7] in [0, 1] → activations [..., 7] in [0, 1], float32: above 0.5 where the action is active.

    Linear on either side of each action's threshold.
    """
    threshold = np.array([ACTIVE[name] for name in ACTIONS], np.float32)
    below = 0.5 * expression / threshold
    above = 0.5 + 0.5 * (expression - threshold) / (1 - threshold)
    return np.where(expression <= threshold, below, above).astype(np.float32)


@cache
def person_vector(identity: int) -> np.ndarray:
    """The numbers that make a person: lengths, colours and hair style (one-hot), float32 [54]."""
    person = draw_person(identity)
    values: list[float] = []
    for field in fields(Person):
        value = getattr(person, field.name)
        values += (
            [float(value == style) for style in HAIR_STYLES] if isinstance(value, str) else np.ravel(value).tolist()
        )
    return np.array(values, np.float32)


def person_signs() -> np.ndarray:
    """What mirroring the picture does to `person_vector`, as factors: the hair's parting changes sides."""
    person = draw_person(0)
    signs: list[float] = []
    for field in fields(Person):
        value = getattr(person, field.name)
        count = len(HAIR_STYLES) if isinstance(value, str) else np.size(value)
        signs += [-1.0 if field.name == "hair_part" else 1.0] * count
    return np.array(signs, np.float32)
