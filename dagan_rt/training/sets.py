"""The training and held-out data sets that a recipe asks for."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dagan_rt.errors import InputError
from dagan_rt.training.data import ClipFolder, HeadsData
from dagan_rt.training.heads import HELD_OUT
from dagan_rt.training.recipe import Recipe


def data_sets(recipe: Recipe, progress: bool = True) -> tuple[Any, Any | None]:
    """(training clips, held-out clips or None), at the largest size any stage needs."""
    if recipe.data.kind == "clips":
        return _clip_folders(recipe, progress)
    data, size = recipe.data, recipe.largest_size
    identities = range(data.first_identity, data.first_identity + data.identities)
    held_out = HELD_OUT[: data.held_out]

    def draw(chosen: range) -> HeadsData:
        return HeadsData(chosen, data.frames, size, data.seed, data.cache, data.workers, progress)

    return draw(identities), draw(held_out) if data.held_out else None


def _clip_folders(recipe: Recipe, progress: bool) -> tuple[ClipFolder, ClipFolder | None]:
    """`train/` and `test/` inside the folder where both exist; otherwise whole identities are set aside."""
    data, size = recipe.data, recipe.largest_size
    if not data.path:
        raise InputError('data.kind is "clips" but data.path is empty; set it, or pass --data FOLDER')
    root = Path(data.path)
    if (root / "train").is_dir() and (root / "test").is_dir():
        training, held_out = ClipFolder(root / "train", size, progress), ClipFolder(root / "test", size, progress)
        _tell_bad(training)
        _tell_bad(held_out)
        _tell_shared(training, held_out)
        count = min(data.held_out, len(held_out))
        return training, held_out.subset(_spread(count, len(held_out))) if count else None
    clips = ClipFolder(root, size, progress)
    _tell_bad(clips)
    if not data.held_out:
        return clips, None
    return _set_aside(clips, data.held_out, progress)


def _set_aside(clips: ClipFolder, count: int, progress: bool) -> tuple[ClipFolder, ClipFolder]:
    """The clips to train on, and `count` of people who are in none of them.

    As few identities as hold `count` clips are taken, spread over the sorted data set; of their clips `count`, spread
    too, are measured, and the rest is left out, so that nobody is on both sides. Where that would take everybody,
    half of the identities are, and fewer clips are measured; a single identity is divided by clips.
    """
    if len(clips) <= count:
        raise InputError(
            f"data folder {clips.path} holds {len(clips)} clips and data.held_out is {count}; "
            "nothing is left to train on: lower held_out or add clips"
        )
    groups = _by_identity(clips)
    aside: list[int] = []
    for people in (*range(1, len(groups)), max(1, len(groups) // 2)):
        aside = sorted(clip for group in _spread(people, len(groups)) for clip in groups[group])
        if len(aside) >= count:
            break
    measured = min(count, len(aside))
    if measured < count:
        warnings.warn(f"{measured} clips are held out, {count} were asked for (data.held_out): more would leave too "
                      f"few of the {len(groups)} identities in {clips.path} to train on", stacklevel=3)  # fmt: skip
    if progress:
        unused = len(aside) - measured
        tqdm.write(
            f"held out: {measured} clips of {people} of {len(groups)} identities"
            + (f"; {unused} more clips of theirs are not used" if unused else ""),
            file=sys.stderr,
        )
    kept = sorted(set(range(len(clips))) - set(aside))
    return clips.subset(kept), clips.subset([aside[place] for place in _spread(measured, len(aside))])


def _by_identity(clips: ClipFolder) -> list[list[int]]:
    """The clips of each identity, in the order of their first clips; each clip by itself if all are of one."""
    owners: dict[str, list[int]] = {}
    for clip in range(len(clips)):
        owners.setdefault(clips.identity(clip), []).append(clip)
    if len(owners) > 1:
        return list(owners.values())
    warnings.warn(f"all clips in {clips.path} are of one identity, {next(iter(owners))}: the held-out clips show a "
                  "face that is trained on", stacklevel=4)  # fmt: skip
    return [[clip] for clip in range(len(clips))]


def _spread(count: int, total: int) -> list[int]:
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _tell_bad(clips: ClipFolder) -> None:
    if clips.bad:
        path, reason = clips.bad[0]
        warnings.warn(f"{len(clips.bad)} of {len(clips.bad) + len(clips)} clips in {clips.path} are left out "
                      f"(first: {path.name}: {reason})", stacklevel=2)  # fmt: skip


def _tell_shared(training: ClipFolder, held_out: ClipFolder) -> None:
    """Say which people are on both sides, where names or folders tell who they are."""
    people = [
        {clips.identity(clip) for clip in range(len(clips)) if clips.identity(clip) != clips.name(clip)}
        for clips in (training, held_out)
    ]
    shared = sorted(people[0] & people[1])
    if shared:
        warnings.warn(f"{len(shared)} of {len(people[1])} identities in {held_out.path} are also in {training.path} "
                      f"(first: {shared[0]}): what is held out has been trained on", stacklevel=2)  # fmt: skip
