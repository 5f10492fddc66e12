"""From what a person asks for to evaluations: the model, the frames, the image sets, and what goes on record."""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dagan_rt import __version__
from dagan_rt.errors import InputError
from dagan_rt.evaluation.extractors import load_extractors
from dagan_rt.evaluation.metrics import Lpips
from dagan_rt.evaluation.pairs import read_pairs
from dagan_rt.evaluation.reenactments import BundleReenactment, RepeatSource, TorchReenactment
from dagan_rt.evaluation.report import Evaluated
from dagan_rt.evaluation.runner import evaluate, measurable
from dagan_rt.evaluation.sets import NamedClips, SetList, sample_sets
from dagan_rt.training.data import ClipFolder, HeadsData
from dagan_rt.training.heads import HELD_OUT

PACKAGES = ("numpy", "torch", "torchmetrics", "onnxruntime", "openvino", "pillow", "av")
MOTION = {"self": "absolute", "cross": "relative"}
Reenact = Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]


@dataclass(frozen=True)
class Options:
    """What is evaluated on what; as the command's arguments of the same names."""

    bundle: str | None = None
    checkpoint: Path | None = None
    depth: Path | None = None
    data: Path | None = None
    heads: int | None = None
    frames: int = 16
    cache: str = ""
    modes: tuple[str, ...] = ("self", "cross")
    pairs: Path | None = None
    sets: int | None = None
    videos: int | None = None
    extractors: tuple[str, ...] = ()
    lpips_backbone: Path | None = None
    motion: str | None = None
    adapt_scale: bool = False
    backend: str | None = None
    device: str | None = None
    threads: int | None = None
    batch: int = 8
    seed: int = 0
    baseline: bool = True
    progress: bool = True


def evaluate_all(
    options: Options,
) -> tuple[list[Evaluated], ClipFolder | HeadsData, dict[str, Any], dict[str, Reenact]]:
    """Each mode's evaluation; the clips, the record of how it was made, and what was evaluated, by mode."""
    size, by_mode, weights = _model(options)
    extractors = load_extractors(options.extractors, options.threads)
    lpips = Lpips(options.lpips_backbone) if options.lpips_backbone is not None else None
    clips, notes = _clips(options, size)
    modes = [mode for mode in options.modes if measurable(mode, extractors, lpips)[0]] or options.modes[:1]
    notes += [f"{mode} mode is left out: it needs extractors" for mode in options.modes if mode not in modes]
    lists = {mode: chosen_sets(options, clips, mode) for mode in modes}
    described = {kind: it.describe() for kind, it in extractors.items()}
    evaluated = []
    for mode, chosen in lists.items():
        settings = {"motion": _motion(options, mode), "adapt scale": _adapts(options, mode), "extractors": described,
                    "model": getattr(by_mode[mode], "name", "")}  # fmt: skip

        def once(reenact: Reenact, mode: str = mode, chosen: SetList = chosen, settings: Any = settings) -> Any:
            return evaluate(
                reenact, clips, chosen.sets, extractors, mode, batch=options.batch, progress=options.progress,
                lpips=lpips, seed=options.seed, settings=settings,
            )  # fmt: skip

        found = once(by_mode[mode])
        found = replace(found, notes=(*notes, *chosen.notes, *found.notes))
        baseline = once(RepeatSource(), settings={"model": RepeatSource.name, "extractors": described})
        evaluated.append(Evaluated(found, baseline if options.baseline else None, chosen.sets))
    return evaluated, clips, _provenance(options, weights, described), by_mode


def _model(options: Options) -> tuple[int, dict[str, Reenact], dict[str, str]]:
    """Image size, what re-enacts by mode, and SHA-256 of the weights by file name."""
    motions = {mode: (_motion(options, mode), _adapts(options, mode)) for mode in options.modes}
    if options.bundle is not None:
        from dagan_rt.bundle import MANIFEST
        from dagan_rt.reenactor import Reenactor

        reenactor = Reenactor(options.bundle, options.backend or "auto", threads=options.threads)
        manifest = Path(options.bundle) / MANIFEST
        weights = {manifest.name: _sha256(manifest)} if manifest.is_file() else {}
        return reenactor.size, {mode: BundleReenactment(reenactor, *it) for mode, it in motions.items()}, weights
    import torch

    from dagan_rt import checkpoints

    assert options.checkpoint is not None
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = checkpoints.load(options.checkpoint, options.depth)
    if options.device is not None:
        model = model.to(_device(options.device))
    files = [options.checkpoint]
    if options.depth is not None and model.depth is not None:
        files += [options.depth / name for name in checkpoints.DEPTH_FILES.values()]
    weights = {file.name: _sha256(file) for file in files}
    return model.config.size, {mode: TorchReenactment(model, *it) for mode, it in motions.items()}, weights


def _device(name: str) -> str:
    import torch

    if name not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no GPU")
    return name


def _clips(options: Options, size: int) -> tuple[ClipFolder | HeadsData, list[str]]:
    """The clips at the model's size, and what was left out of them."""
    if options.heads is not None:
        if options.heads > len(HELD_OUT):
            raise InputError(f"--heads must be at most {len(HELD_OUT):,}, got {options.heads}")
        chosen = HELD_OUT[: options.heads]
        return HeadsData(chosen, options.frames, size, cache=options.cache, progress=options.progress), []
    assert options.data is not None
    folder = options.data / "test" if (options.data / "test").is_dir() else options.data
    clips = ClipFolder(folder, size, options.progress)
    if not clips.bad:
        return clips, []
    told = [f"  {path.name}: {reason}" for path, reason in clips.bad[:8]]
    return clips, [f"{len(clips.bad)} of {len(clips.bad) + len(clips)} clips are left out:", *told]


def chosen_sets(options: Options, clips: NamedClips, mode: str) -> SetList:
    """The image sets of a mode: of the file of pairs, without those of the other mode, or drawn."""
    if options.pairs is None:
        return sample_sets(clips, mode, options.sets, options.videos, options.seed)
    read = read_pairs(options.pairs, clips, options.seed)
    if mode == "self":
        kept = [it for it in read.sets if it.source_clip == it.driving_clip]
        wrong = "take source and driving frame from two clips"
    else:
        kept = [it for it in read.sets if clips.identity(it.source_clip) != clips.identity(it.driving_clip)]
        wrong = "show one identity twice"
    if not kept:
        raise InputError(f"{options.pairs}: all {len(read.sets)} rows {wrong}; is it for the other --mode?")
    left_out = len(read.sets) - len(kept)
    notes = (f"{options.pairs}: {left_out} rows are left out: they {wrong}",) if left_out else ()
    return SetList(kept, read.notes + notes)


def _motion(options: Options, mode: str) -> str:
    return options.motion or MOTION[mode]


def _adapts(options: Options, mode: str) -> bool:
    return options.adapt_scale and _motion(options, mode) == "relative"


def _provenance(options: Options, weights: dict[str, str], described: dict[str, Any]) -> dict[str, Any]:
    """How it was made; files by their names, for the folders of one machine tell nobody else anything."""
    versions = {"dagan-rt": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if options.heads is not None:
        data = f"{options.heads} synthetic heads from identity {HELD_OUT.start} on, {options.frames} frames each"
    else:
        data = f"clips of the folder {Path(str(options.data)).resolve().name}"
    plain = {key: _plain(value) for key, value in asdict(options).items() if key not in ("progress", "cache")}
    return {"command": _command(), "weights sha256": weights, "data": data, "options": plain,
            "extractors": described, "versions": versions}  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, tuple):
        return [_plain(Path(it)) for it in value]
    return Path(value).name if isinstance(value, str) else value


def _command() -> str:
    return " ".join(["dagan-rt", *(shlex.quote(it.rstrip("/").rsplit("/", 1)[-1]) for it in sys.argv[1:])])


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
