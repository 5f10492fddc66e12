"""Samples: two frames of a clip, or three in a row, augmented; each a pure function of its number."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.training.augment import colour_matrix, jitter, mirror_image, mirror_landmarks
from dagan_rt.training.data.protocol import BadClip, Clips, Frame

ATTEMPTS = 20  # clips in a row that may fail before it is the data folder that is bad

OnBad = Callable[[str, BadClip], None]  # told the name of a clip that could not be read, and why


@dataclass(frozen=True)
class Augmentation:
    """What may happen to the frames of a sample; `Augmentation.none()` for evaluation."""

    flip: bool = True
    time_flip: bool = True
    jitter: float = 0.1
    still: float = 0.0  # share of pairs whose driving frame is the source itself

    @classmethod
    def none(cls) -> Augmentation:
        return cls(flip=False, time_flip=False, jitter=0.0)


def warn_of(name: str, error: BadClip) -> None:
    warnings.warn(f"clip skipped: {name}: {error}", stacklevel=4)


def sample(
    clips: Clips, augmentation: Augmentation, seed: int, epoch: int, index: int, on_bad: OnBad = warn_of
) -> dict[str, np.ndarray]:
    """Two random frames of one clip, augmented: a pure function of (seed, epoch, index).

    `index` counts clips × repeats; the clip is index modulo the number of clips. A clip that cannot be read is
    replaced by another one, chosen by the same random stream; `on_bad` is told. InputError after 20 of them in a row.
    Returns source, driving float32 [3, S, S] in [0, 1] and, where known, *_disparity [1, S, S] and *_landmarks [68, 2].
    """
    rng = np.random.default_rng([seed, epoch, index])

    def draw(clip: int) -> tuple[int, list[int]]:
        return clip, rng.choice(clips.frame_count(clip), size=2, replace=False).tolist()

    pair = _read(clips, index % len(clips), draw, rng, on_bad)
    if augmentation.time_flip and rng.random() < 0.5:
        pair.reverse()
    flip = augmentation.flip and rng.random() < 0.5
    if augmentation.still and rng.random() < augmentation.still:
        pair[1] = pair[0]
    colour = colour_matrix(rng, augmentation.jitter) if augmentation.jitter else None
    return {
        **_tensors(pair[0], "source", flip, colour),
        **_tensors(pair[1], "driving", flip, colour),
    }


def sample_triple(
    clips: Clips,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    index: int,
    neighbours: int,
    on_bad: OnBad = warn_of,
) -> dict[str, np.ndarray]:
    """A random frame that has others on both sides, and one of each side: a pure function of (seed, epoch, index).

    The gaps to the two sides are drawn apart, each from 1 to `neighbours` as far as the clip reaches. Mirror, swap in
    time and colours are the same for the three frames; `still` does not apply. A clip of fewer than three frames, or
    one that cannot be read, is replaced by another one, chosen by the same random stream.
    Returns target, before, after float32 [3, S, S] in [0, 1] and, where known, target_disparity [1, S, S].
    """
    rng = np.random.default_rng([seed, epoch, index])

    def draw(clip: int) -> tuple[int, list[int]]:
        clip = _long_enough(clips, clip, rng)
        last = clips.frame_count(clip) - 1
        target = int(rng.integers(1, last))
        before = target - int(rng.integers(1, min(neighbours, target) + 1))
        after = target + int(rng.integers(1, min(neighbours, last - target) + 1))
        return clip, [before, target, after]

    triple = _read(clips, index % len(clips), draw, rng, on_bad)
    if augmentation.time_flip and rng.random() < 0.5:
        triple.reverse()
    flip = augmentation.flip and rng.random() < 0.5
    colour = colour_matrix(rng, augmentation.jitter) if augmentation.jitter else None
    before, target, after = triple
    result = {"target": _picture(target, flip, colour), "before": _picture(before, flip, colour),
              "after": _picture(after, flip, colour)}  # fmt: skip
    if target.disparity is not None:
        result["target_disparity"] = _disparity(target.disparity, flip)
    return result


def _read(
    clips: Clips,
    clip: int,
    draw: Callable[[int], tuple[int, list[int]]],
    rng: np.random.Generator,
    on_bad: OnBad,
) -> list[Frame]:
    """The frames drawn of `clip`, or of another one where it cannot be read."""
    for _ in range(ATTEMPTS):
        clip, frames = draw(clip)
        try:
            return clips.read(clip, frames)
        except BadClip as error:
            on_bad(clips.name(clip), error)
            clip = int(rng.integers(len(clips)))
    raise InputError(f"{ATTEMPTS} clips in a row could not be read; check the data folder")


def _long_enough(clips: Clips, clip: int, rng: np.random.Generator) -> int:
    """The clip, or another one if it has fewer than three frames."""
    for _ in range(ATTEMPTS):
        if clips.frame_count(clip) >= 3:
            return clip
        clip = int(rng.integers(len(clips)))
    usable = [clip for clip in range(len(clips)) if clips.frame_count(clip) >= 3]
    if not usable:
        raise InputError("no clip has three frames, which a frame and its neighbours need")
    return usable[int(rng.integers(len(usable)))]


def _tensors(frame: Frame, name: str, flip: bool, colour: tuple[np.ndarray, float] | None) -> dict[str, np.ndarray]:
    result = {name: _picture(frame, flip, colour)}
    if frame.disparity is not None:
        result[f"{name}_disparity"] = _disparity(frame.disparity, flip)
    if frame.landmarks is not None:
        result[f"{name}_landmarks"] = mirror_landmarks(frame.landmarks) if flip else frame.landmarks
    return result


def _picture(frame: Frame, flip: bool, colour: tuple[np.ndarray, float] | None) -> np.ndarray:
    image = frame.image.astype(np.float32) / np.float32(255)
    image = mirror_image(image) if flip else image
    image = jitter(image, *colour) if colour else image
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _disparity(disparity: np.ndarray, flip: bool) -> np.ndarray:
    return np.ascontiguousarray((mirror_image(disparity) if flip else disparity)[None])
