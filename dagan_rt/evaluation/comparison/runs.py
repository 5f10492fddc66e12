"""One training and its measurements, each done once: what is finished is not repeated, what was cut short goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dagan_rt import checkpoints
from dagan_rt.errors import InputError
from dagan_rt.evaluation import Evaluation, Extractor, RepeatSource, TorchReenactment, evaluate, sample_sets
from dagan_rt.evaluation.comparison.plan import digest
from dagan_rt.evaluation.sets import MODES, ImageSet
from dagan_rt.inspection import planes
from dagan_rt.networks.model import Model
from dagan_rt.tables import read_text
from dagan_rt.training import journal
from dagan_rt.training.data import HeadsData
from dagan_rt.training.heads import HELD_OUT
from dagan_rt.training.loop import train
from dagan_rt.training.recipe import Recipe

FIRST = 1000
"""The first held-out identity that is measured; training logs look at those from 0 on."""

LARGEST_RESULT = 64 << 20  # bytes


class Stopped(Exception):
    """A signal ended a training, which left a checkpoint; the argument is the signal's number."""


@dataclass(frozen=True)
class Trained:
    """A finished run: how many samples it saw, how long that took, and how many weights make an image."""

    samples: int
    seconds: float
    parameters: int


@dataclass(frozen=True)
class Measure:
    """On what the trained networks are compared; everything here is the same for all of them."""

    clips: int = 100  # held-out identities, one clip each
    frames: int = 24
    self_sets: int = 500
    cross_sets: int = 500
    seed: int = 0
    motion: str = "absolute"

    def data(self, recipe: Recipe) -> HeadsData:
        """The clips, at the recipe's size and out of its cache."""
        chosen = HELD_OUT[FIRST : FIRST + self.clips]
        data = recipe.data
        return HeadsData(chosen, self.frames, recipe.largest_size, self.seed, data.cache, data.workers, False)

    def sets(self, clips: HeadsData, mode: str) -> list[ImageSet]:
        """Image sets of a mode, as in the supplementary's B.1 with these numbers."""
        count = self.self_sets if mode == "self" else self.cross_sets
        return sample_sets(clips, mode, count, self.clips, self.seed).sets


def train_once(recipe: Recipe, folder: Path, threads: int | None, progress: bool) -> None:
    """Train into `folder`, or go on where it was stopped, or do nothing where it is finished.

    Raises InputError where the folder holds a run of another recipe, `Stopped` where a signal came.
    """
    written = folder / "recipe.toml"
    if written.exists() and read_text(written) != recipe.text:
        raise InputError(f"{folder} holds a run of another recipe; choose another --out, or delete that folder")
    if _finished(recipe, folder):
        return
    outcome = train(recipe, folder, threads=threads, progress=progress)
    if outcome.signal:
        raise Stopped(outcome.signal)


def model_of(folder: Path) -> Model:
    """The trained networks of a finished run, in evaluation mode."""
    depth = folder / "model" / "depth"
    return checkpoints.load(folder / "model" / "model.pth.tar", depth if depth.is_dir() else None).eval()


def trained(folder: Path) -> Trained:
    """What a finished run took, from its log."""
    last = journal.read_rows(folder)[-1]
    model = model_of(folder)
    used = [network for name, network in model.networks().items() if name != "discriminator"]
    parameters = sum(parameter.numel() for network in used for parameter in network.parameters())
    return Trained(int(last["samples"]), float(last["seconds"]), parameters)


def measure_once(
    folder: Path, recipe: Recipe, measure: Measure, extractors: Mapping[str, Extractor], repeat: bool, progress: bool
) -> dict[str, Evaluation]:
    """The evaluations of a finished run by mode, kept in `folder`; repeat: of showing the source itself instead."""
    found = {}
    model = None
    for mode in MODES:
        settings = asdict(measure) | {
            "mode": mode,
            "size": recipe.largest_size,
            "extractors": {kind: {"name": it.name, "noise": dict(it.noise)} for kind, it in extractors.items()},
            "trained by": "nothing" if repeat else digest(recipe.text),
        }

        def compute(mode: str = mode, settings: dict[str, Any] = settings) -> dict[str, Any]:
            nonlocal model
            if model is None and not repeat:
                model = model_of(folder)
            reenact = TorchReenactment(model, measure.motion) if model is not None else RepeatSource()
            clips = measure.data(recipe)
            sets = measure.sets(clips, mode)
            found = evaluate(reenact, clips, sets, extractors, mode, progress=progress, settings=settings)
            return found.to_dict()

        path = folder / f"{mode}.json"
        found[mode] = Evaluation.from_dict(once(path, settings, compute), str(path))
    return found


def attention_once(folder: Path, recipe: Recipe, measure: Measure) -> list[dict[str, Any]]:
    """Of each self-reenactment set the attention's share on the face, kept in `folder`; for variants with attention.

    Rows: clip, face (share of the attention), area (the face's share of the positions).
    """
    settings = asdict(measure) | {"size": recipe.largest_size, "trained by": digest(recipe.text)}

    def compute() -> dict[str, Any]:
        from dagan_rt.evaluation.comparison.attention import attention_of, face_cover, face_share

        model, clips, rows = model_of(folder), measure.data(recipe), []
        for it in measure.sets(clips, "self"):
            source, driving = clips.read(it.source_clip, [it.source_frame, it.driving_frame])
            weights = attention_of(model, *(planes(frame.image) for frame in (source, driving))).weights[0].numpy()
            assert driving.landmarks is not None
            face, area = face_share(weights, face_cover(driving.landmarks, *weights.shape[:2]))
            rows.append({"clip": clips.name(it.driving_clip), "face": face, "area": area})
        return {"rows": rows, "settings": settings}

    return list(once(folder / "attention.json", settings, compute)["rows"])


def once(path: Path, settings: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `path` holds if it was computed with these settings; otherwise compute it and write it, whole."""
    if path.exists():
        kept = json.loads(_bounded(path))
        if isinstance(kept, dict) and kept.get("settings") == settings:
            return kept
    values = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("." + path.name)
    partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
    partial.replace(path)
    return values


def _finished(recipe: Recipe, folder: Path) -> bool:
    depth_alone = all(stage.losses.trains_depth_alone for stage in recipe.stages)
    return (folder / "model" / ("depth/depth.pth" if depth_alone else "model.pth.tar")).exists()


def _bounded(path: Path) -> str:
    if path.stat().st_size > LARGEST_RESULT:
        raise InputError(f"{path} must be at most {LARGEST_RESULT:,} bytes; delete it to measure again")
    return path.read_text(encoding="utf-8")
