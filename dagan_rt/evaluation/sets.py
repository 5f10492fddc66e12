"""Which frames an evaluation compares: image sets sampled as in the supplementary, B.1.

An image set is one source frame and one driving frame. Self-reenactment takes both from one clip, so that the driving
frame is the truth; cross-identity reenactment takes them from clips of different people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dagan_rt.errors import InputError

SELF_SETS, SELF_VIDEOS, CROSS_SETS = 2083, 100, 2000
"""Of the supplementary, B.1: 2,083 image sets out of 100 videos of VoxCeleb1's test split; 2,000 of CelebV."""

MODES = ("self", "cross")
MOST_SETS = 1_000_000


@dataclass(frozen=True, order=True)
class ImageSet:
    """Clips and frames by their numbers in a data set; `initial_frame`, of the driving clip, starts relative motion."""

    source_clip: int
    source_frame: int
    driving_clip: int
    driving_frame: int
    initial_frame: int = 0


@dataclass(frozen=True)
class SetList:
    """Image sets and, a sentence each, where they are not what was asked for."""

    sets: list[ImageSet]
    notes: tuple[str, ...] = ()


class NamedClips(Protocol):
    """What sampling has to know of a data set (see `dagan_rt.training.data.Clips`); no frame is read."""

    def __len__(self) -> int: ...

    def frame_count(self, clip: int) -> int: ...

    def name(self, clip: int) -> str: ...

    def identity(self, clip: int) -> str: ...


def sample_sets(
    clips: NamedClips, mode: str, sets: int | None = None, videos: int | None = None, seed: int = 0
) -> SetList:
    """`sample_self` or `sample_cross` with the published numbers where None is given; `videos` None: 100, or all."""
    if mode not in MODES:
        raise InputError(f"mode must be {' or '.join(MODES)}, got {mode!r}")
    if mode == "self":
        return sample_self(clips, SELF_SETS if sets is None else sets, SELF_VIDEOS if videos is None else videos, seed)
    return sample_cross(clips, CROSS_SETS if sets is None else sets, seed, videos)


def sample_self(clips: NamedClips, sets: int = SELF_SETS, videos: int = SELF_VIDEOS, seed: int = 0) -> SetList:
    """Source and driving frames of one clip, `sets` of them spread evenly over `videos` clips chosen at random.

    No set appears twice and none drives with its own source. A pure function of the clips' names and frame counts, of
    the numbers and of `seed`: the order of the clips plays no part. Where there are fewer clips or fewer pairs of
    frames than asked for, all there are are used, and a note says so. InputError where no clip has two frames.
    """
    _check_counts(sets=sets, videos=videos)
    rng = np.random.default_rng([seed, 0])
    usable = [clip for clip in _by_name(clips) if clips.frame_count(clip) >= 2]
    if not usable:
        raise InputError("self-reenactment needs a clip of at least two frames, and there is none")
    chosen = [usable[place] for place in rng.permutation(len(usable))[:videos]]
    pairs = [clips.frame_count(clip) * (clips.frame_count(clip) - 1) for clip in chosen]
    found = []
    for clip, quota in zip(chosen, _quotas(sets, pairs), strict=True):
        frames = clips.frame_count(clip)
        # Ordered pairs of different frames, numbered: the driving frame skips over the source frame.
        numbers = rng.choice(frames * (frames - 1), size=quota, replace=False, shuffle=True)
        for source, driving in zip(*divmod(numbers, frames - 1), strict=True):
            found.append(ImageSet(clip, int(source), clip, int(driving) + int(driving >= source)))
    return SetList(found, tuple(_shortages(sets, len(found), videos, len(chosen))))


def sample_cross(
    clips: NamedClips, sets: int = CROSS_SETS, seed: int = 0, videos: int | None = None
) -> SetList:  # fmt: skip
    """Source and driving frames of clips of different identities, uniformly.

    Each of the two identities is drawn uniformly, then a clip of it, then a frame; no set appears twice. `videos`
    restricts it to that many clips chosen at random, None to none. Pure, and short of sets, as `sample_self`.
    InputError where all clips are of one identity.
    """
    _check_counts(sets=sets, **({} if videos is None else {"videos": videos}))
    rng = np.random.default_rng([seed, 1])
    usable = [clip for clip in _by_name(clips) if clips.frame_count(clip) >= 1]
    chosen = usable if videos is None else [usable[place] for place in sorted(rng.permutation(len(usable))[:videos])]
    people: dict[str, list[int]] = {}
    for clip in chosen:
        people.setdefault(clips.identity(clip), []).append(clip)
    if len(people) < 2:
        raise InputError(
            "cross-identity reenactment needs clips of at least two identities, "
            f"got {len(chosen)} clips of {len(people)}"
        )
    groups = [people[name] for name in sorted(people)]
    frames = np.array([sum(clips.frame_count(clip) for clip in group) for group in groups], object)
    possible = int(sum(frames) ** 2 - sum(frames**2))
    if possible <= 2 * sets:
        every = _all_cross(clips, groups)
        found = [every[place] for place in rng.permutation(len(every))[:sets]]
    else:
        found = _draw_cross(clips, groups, sets, rng)
    asked = len(chosen) if videos is None else videos
    return SetList(found, tuple(_shortages(sets, len(found), asked, len(chosen))))


def _draw_cross(
    clips: NamedClips, groups: Sequence[Sequence[int]], sets: int, rng: np.random.Generator
) -> list[ImageSet]:
    """At least twice as many sets are possible; those drawn before are drawn again, some rare ones never."""
    found: dict[ImageSet, None] = {}
    for _ in range(100 * sets):
        if len(found) == sets:
            break
        pair = rng.choice(len(groups), size=2, replace=False)
        source, driving = (groups[who][int(rng.integers(len(groups[who])))] for who in pair)
        places = (int(rng.integers(clips.frame_count(clip))) for clip in (source, driving))
        found[ImageSet(source, next(places), driving, next(places))] = None
    return list(found)


def _all_cross(clips: NamedClips, groups: Sequence[Sequence[int]]) -> list[ImageSet]:
    return [
        ImageSet(source, source_frame, driving, driving_frame)
        for one in groups
        for other in groups
        if one is not other
        for source in one
        for driving in other
        for source_frame in range(clips.frame_count(source))
        for driving_frame in range(clips.frame_count(driving))
    ]


def _by_name(clips: NamedClips) -> list[int]:
    """Clip numbers in the order of their names."""
    return sorted(range(len(clips)), key=clips.name)


def _quotas(total: int, most: Sequence[int]) -> list[int]:
    """`total` spread as evenly as each one's `most` allows; the largest ones take what does not divide."""
    quotas, left = [0] * len(most), total
    for done, place in enumerate(sorted(range(len(most)), key=lambda place: most[place])):
        quotas[place] = min(most[place], left // (len(most) - done))
        left -= quotas[place]
    return quotas


def _shortages(sets: int, got_sets: int, videos: int, got_videos: int) -> list[str]:
    notes = []
    if got_videos < videos:
        notes.append(f"{videos} clips were asked for, and there are {got_videos}: all are used")
    if got_sets < sets:
        notes.append(f"{sets} image sets were asked for, and the clips give {got_sets} different ones")
    return notes


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not 1 <= count <= MOST_SETS:
            raise InputError(f"{name} must be from 1 to {MOST_SETS:,}, got {count}")
