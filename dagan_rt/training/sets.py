"""The training and held-out data sets that a recipe asks for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

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
    """`train/` and `test/` inside the folder where both exist; otherwise clips spread over the folder are set aside."""
    data, size = recipe.data, recipe.largest_size
    if not data.path:
        raise InputError('data.kind is "clips" but data.path is empty; set it, or pass --data FOLDER')
    root = Path(data.path)
    if (root / "train").is_dir() and (root / "test").is_dir():
        training, held_out = ClipFolder(root / "train", size, progress), ClipFolder(root / "test", size, progress)
        _tell_bad(training)
        _tell_bad(held_out)
        count = min(data.held_out, len(held_out))
        return training, held_out.subset(_spread(count, len(held_out))) if count else None
    clips = ClipFolder(root, size, progress)
    _tell_bad(clips)
    if not data.held_out:
        return clips, None
    if len(clips) <= data.held_out:
        raise InputError(
            f"data folder {root} holds {len(clips)} clips and data.held_out is {data.held_out}; "
            "nothing is left to train on: lower held_out or add clips"
        )
    aside = set(_spread(data.held_out, len(clips)))
    return clips.subset([i for i in range(len(clips)) if i not in aside]), clips.subset(sorted(aside))


def _spread(count: int, total: int) -> list[int]:
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _tell_bad(clips: ClipFolder) -> None:
    if clips.bad:
        path, reason = clips.bad[0]
        warnings.warn(f"{len(clips.bad)} of {len(clips.bad) + len(clips)} clips in {clips.path} are left out "
                      f"(first: {path.name}: {reason})", stacklevel=2)  # fmt: skip
