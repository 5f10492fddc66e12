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

from dagan_rt.checkpoints import inspect, save
from dagan_rt.errors import InputError
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.model import Model

PUBLISHED_NAMES = {"keypoints": "kp_detector"}  # the recipe's name of a network -> the file's, where they differ
FILE_NAME = "model.pth.tar"


@dataclass(frozen=True)
class Place:
    """Where a run stood when its checkpoint was written."""

    step: int
    samples: int
    seconds: float
    optimizers: Mapping[str, dict[str, Any]]  # by the recipe's names


def save_model(folder: Path, model: Model) -> None:
    """The weights alone: `model.pth.tar`, and `depth/` where the variant has a depth network."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / FILE_NAME, model, folder / "depth" if model.depth is not None else None)


def save_checkpoint(
    out: Path,
    model: Model,
    optimizers: Mapping[str, torch.optim.Optimizer],
    epoch: int,
    place: dict[str, Any],
    keep: int,
) -> Path:
    """Write `out`/checkpoints/step-N under a temporary name, rename it into place, delete all but the newest `keep`.

    `place` holds step, samples and seconds.
    """
    folder = out / "checkpoints" / f"step-{place['step']:07d}"
    temporary = folder.with_name("." + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    named = {PUBLISHED_NAMES.get(name, name): optimizer for name, optimizer in optimizers.items()}
    depth = temporary / "depth" if model.depth is not None else None
    save(temporary / FILE_NAME, model, depth, optimizers=named, epoch=epoch, extra={"run": place})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in _folders(out)[:-keep]:
        shutil.rmtree(old)
    return folder


def latest_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint folder of a run, or None."""
    folders = _folders(out)
    return folders[-1] if folders else None


def restore(folder: Path, network: NetworkConfig, model_for_step: Callable[[int], Model]) -> Place:
    """Load a checkpoint's weights into `model_for_step(step)` and say where the run stood.

    InputError when it is not a run's checkpoint or belongs to a recipe with other networks.
    """
    path = folder / FILE_NAME
    checkpoint = inspect(path, folder / "depth" if (folder / "depth").is_dir() else None)
    run = checkpoint.extra.get("run")
    if not isinstance(run, dict) or {"step", "samples", "seconds"} - run.keys():
        raise InputError(f"{path} has no place in a run; resume from a checkpoint that dagan-rt train wrote")
    model = model_for_step(int(run["step"]))
    stored, wanted = checkpoint.config.to_dict(), model.config.to_dict()
    for name, value in wanted.items():
        if stored[name] != value:
            raise InputError(
                f"{path} was trained with {name} = {stored[name]}, the recipe says {value}; "
                "use the recipe of that run or another --out"
            )
    for name, module in model.networks().items():
        module.load_state_dict(checkpoint.state_dicts[name])
    own = {published: name for name, published in PUBLISHED_NAMES.items()}
    optimizers = {own.get(name, name): _copied(state) for name, state in checkpoint.optimizers.items()}
    return Place(int(run["step"]), int(run["samples"]), float(run["seconds"]), optimizers)


def _copied(value: Any) -> Any:
    """Tensors in memory of their own: the file they are mapped from will be deleted."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value


def _folders(out: Path) -> list[Path]:
    return sorted(path for path in (out / "checkpoints").glob("step-*") if (path / FILE_NAME).is_file())
