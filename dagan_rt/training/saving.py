"""Checkpoints of a run: one folder each, complete or absent, in the published layout with what resuming needs.

`checkpoints/step-0001000/model.pth.tar` (networks, optimisers, place in the run) and `depth/{encoder,depth}.pth`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dagan_rt.checkpoints import inspect, load_depth, save, save_depth
from dagan_rt.errors import InputError
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.model import Model
from dagan_rt.training.average import Average
from dagan_rt.training.recipe import StartRecipe

PUBLISHED_NAMES = {"keypoints": "kp_detector"}  # the recipe's name of a network -> the file's, where they differ
FILE_NAME = "model.pth.tar"


@dataclass(frozen=True)
class Place:
    """Where a run stood when its checkpoint was written."""

    step: int
    samples: int
    seconds: float
    optimizers: Mapping[str, dict[str, Any]]  # by the recipe's names
    scaler: Mapping[str, Any]  # of the loss, where the precision is fp16


def save_model(folder: Path, model: Model, depth_alone: bool = False) -> None:
    """The weights alone: `model.pth.tar`, and `depth/` where the variant has a depth network; or only the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    if depth_alone:
        save_depth(folder / "depth", model)
    else:
        save(folder / FILE_NAME, model, folder / "depth" if model.depth is not None else None)


def start_from(start: StartRecipe, model: Model) -> None:
    """Put the weights that a recipe begins with into `model`, whatever size of image they come from.

    InputError when a file cannot be read or holds other networks.
    """
    if start.model:
        checkpoint = inspect(start.model, start.depth or None)
        _check_config(checkpoint.config, model.config, start.model, "start with weights of those networks")
        for name, state in checkpoint.state_dicts.items():
            weights = {key: value for key, value in state.items() if not key.endswith("down.weight")}
            model.networks()[name].load_state_dict(weights, strict=False)  # what is absent keeps its first values
    elif start.depth:
        load_depth(start.depth, model)


def save_checkpoint(
    out: Path,
    model: Model,
    optimizers: Mapping[str, torch.optim.Optimizer],
    epoch: int,
    extra: dict[str, Any],
    keep: int,
) -> Path:
    """Write `out`/checkpoints/step-N under a temporary name, rename it into place, delete all but the newest `keep`.

    `extra` holds `run` (step, samples, seconds) and whatever else resuming needs. What fails leaves nothing behind.
    """
    folder = out / "checkpoints" / f"step-{extra['run']['step']:07d}"
    temporary = folder.with_name("." + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    named = {PUBLISHED_NAMES.get(name, name): optimizer for name, optimizer in optimizers.items()}
    depth = temporary / "depth" if model.depth is not None else None
    try:
        save(temporary / FILE_NAME, model, depth, optimizers=named, epoch=epoch, extra=extra)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in _folders(out)[:-keep]:
        shutil.rmtree(old)
    return folder


def latest_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint folder of a run, or None."""
    folders = _folders(out)
    return folders[-1] if folders else None


def restore(
    folder: Path,
    model_for_step: Callable[[int], Model],
    pose: nn.Module | None = None,
    average: Average | None = None,
) -> Place:
    """Load a checkpoint's weights into `model_for_step(step)`, `pose` and `average`, and say where the run stood.

    InputError when it is not a run's checkpoint or belongs to a recipe with other networks.
    """
    path = folder / FILE_NAME
    checkpoint = inspect(path, folder / "depth" if (folder / "depth").is_dir() else None)
    run = checkpoint.extra.get("run")
    if not isinstance(run, dict) or {"step", "samples", "seconds"} - run.keys():
        raise InputError(f"{path} has no place in a run; resume from a checkpoint that dagan-rt train wrote")
    model = model_for_step(int(run["step"]))
    _check_config(
        checkpoint.config, model.config, str(path), "use the recipe of that run or another --out", all_of=True
    )
    for name, module in model.networks().items():
        module.load_state_dict(checkpoint.state_dicts[name])
    own = {published: name for name, published in PUBLISHED_NAMES.items()}
    optimizers = {own.get(name, name): _copied(state) for name, state in checkpoint.optimizers.items()}
    needed = {"pose": pose, "average": average}
    for name, part in needed.items():
        if part is not None and name not in checkpoint.extra:
            raise InputError(f"{path} has no entry {name!r}, which the recipe needs; use the recipe of that run")
    if pose is not None:
        pose.load_state_dict(checkpoint.extra["pose"])
    if average is not None:
        kept = checkpoint.extra["average"]
        average.load(int(kept["updates"]), kept["values"])
    scaler = checkpoint.extra.get("scaler", {})
    return Place(int(run["step"]), int(run["samples"]), float(run["seconds"]), optimizers, scaler)


def _check_config(stored: NetworkConfig, wanted: NetworkConfig, path: str, advice: str, all_of: bool = False) -> None:
    """InputError naming the first size that differs; the image's, which no weight depends on, only with `all_of`."""
    theirs = stored.to_dict()
    for name, value in wanted.to_dict().items():
        if theirs[name] != value and (all_of or name not in ("size", "motion_scale")):
            raise InputError(f"{path} was trained with {name} = {theirs[name]}, the recipe says {value}; {advice}")


def _copied(value: Any) -> Any:
    """Tensors in memory of their own: the file they are mapped from will be deleted."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value


def _folders(out: Path) -> list[Path]:
    return sorted(path for path in (out / "checkpoints").glob("step-*") if (path / FILE_NAME).is_file())
