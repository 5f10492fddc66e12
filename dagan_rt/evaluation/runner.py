"""Image sets through a reenactment and its metrics, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.evaluation import metrics
from dagan_rt.evaluation.extractors import Extractor
from dagan_rt.evaluation.scores import BY_MODE, METRICS, Evaluation, Score, cluster_of, score
from dagan_rt.evaluation.sets import MODES, ImageSet
from dagan_rt.training.data import BadClip, Clips

Keep = Callable[[int, np.ndarray, np.ndarray, np.ndarray], None]
PAIRED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "akd": metrics.landmark_distance,
    "aed": metrics.embedding_distance,
    "csim": metrics.embedding_cosine,
    "prmse": metrics.pose_error,
    "aucon": metrics.action_agreement,
}
"""Of what an extractor finds in the generated frame and in the one it should agree with."""


def evaluate(
    reenact: Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray],
    clips: Clips,
    sets: Sequence[ImageSet],
    extractors: Mapping[str, Extractor] | None = None,
    mode: str = "self",
    *,
    batch: int = 8,
    progress: bool = True,
    keep: Keep | None = None,
    lpips: metrics.Lpips | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """The metrics of a mode over image sets of `clips`.

    reenact: see `reenactments.Reenactment`. extractors: by kind, from `load_extractors`; a metric whose kind is missing
    is absent, with the reason. mode: "self" (L1, SSIM, PSNR, LPIPS, AKD, AED against the driving frame, which is the
    truth) or "cross" (CSIM against the source; PRMSE and AUCON against the driving frame). keep: called with each set's
    number and its source, driving and generated frame, uint8 [S, S, 3]. seed: of the confidence intervals. settings:
    what the caller wants on record.

    A set whose frames cannot be read is left out and counted in `unreadable`; one in which an extractor finds nothing
    counts as failed for its metrics. InputError for wrong arguments, or where no set is left.
    """
    if mode not in MODES:
        raise InputError(f"mode must be {' or '.join(MODES)}, got {mode!r}")
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    extractors = dict(extractors or {})
    wanted, absent = measurable(mode, extractors, lpips)
    if not wanted:
        raise InputError(
            f"nothing can be measured in {mode} mode: {'; '.join(f'{n} {why}' for n, why in absent.items())}"
        )
    rows: list[dict[str, Any]] = []
    unreadable: dict[str, dict[str, Any]] = {}
    relative = bool(getattr(reenact, "relative", False))
    for numbers, source, driving, initial in _batches(clips, sets, relative, batch, unreadable, progress, mode):
        generated = _checked(reenact(source, driving, initial), driving)
        values = _measure(wanted, extractors, lpips, source, driving, generated)
        for place, number in enumerate(numbers):
            rows.append(_row(clips, sets[number]) | {name: _number(values[name][place]) for name in wanted})
            if keep is not None:
                keep(number, source[place], driving[place], generated[place])
    if not rows:
        reason = next(iter(unreadable.values()))["reason"] if unreadable else "none was given"
        raise InputError(f"there is no image set to evaluate: {reason}")
    scores = {name: _score(name, rows, mode, extractors, lpips, seed) for name in wanted}
    return Evaluation(mode, scores, rows, absent, unreadable, _notes(reenact), dict(settings or {}))


def measurable(
    mode: str, extractors: Mapping[str, Extractor], lpips: metrics.Lpips | None
) -> tuple[list[str], dict[str, str]]:
    """Metrics of a mode that can be computed, and those that cannot be, with the reason."""
    absent = {}
    for name in BY_MODE[mode]:
        kind = METRICS[name].kind
        if name == "lpips" and lpips is None:
            absent[name] = "needs the weights of its backbone: --lpips-backbone FILE"
        elif kind is not None and kind not in extractors:
            absent[name] = f"needs an extractor of {kind}: --extractors FILE.toml"
    return [name for name in BY_MODE[mode] if name not in absent], absent


def _batches(
    clips: Clips, sets: Sequence[ImageSet], relative: bool, batch: int,
    unreadable: dict[str, dict[str, Any]], progress: bool, mode: str,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray, np.ndarray | None]]:  # fmt: skip
    """(numbers of the sets, source, driving, initial): what can be read, `batch` at a time."""
    from tqdm import tqdm

    ready: list[tuple[int, list[np.ndarray]]] = []
    for number, it in enumerate(tqdm(sets, desc=mode, unit="set", disable=not progress)):
        images = _read(clips, it, relative, unreadable)
        if images is not None:
            ready.append((number, images))
        if ready and (len(ready) == batch or number == len(sets) - 1):
            source, driving, *initial = (np.stack(part) for part in zip(*(images for _, images in ready), strict=True))
            yield [number for number, _ in ready], source, driving, initial[0] if initial else None
            ready = []


def _read(
    clips: Clips, it: ImageSet, relative: bool, unreadable: dict[str, dict[str, Any]]
) -> list[np.ndarray] | None:  # fmt: skip
    """Source, driving and, for relative motion, initial frame; None where one cannot be read."""
    driving_frames = [it.driving_frame, it.initial_frame] if relative else [it.driving_frame]
    images: list[np.ndarray] = []
    for clip, frames in ((it.source_clip, [it.source_frame]), (it.driving_clip, driving_frames)):
        try:
            images += [frame.image for frame in clips.read(clip, frames)]
        except BadClip as error:
            left_out = unreadable.setdefault(clips.name(clip), {"sets": 0, "reason": str(error)})
            left_out["sets"] += 1
            return None
    return images


def _measure(
    wanted: Sequence[str], extractors: Mapping[str, Extractor], lpips: metrics.Lpips | None,
    source: np.ndarray, driving: np.ndarray, generated: np.ndarray,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Values by metric, float64 [B]; NaN where an extractor found nothing."""
    values = metrics.pixel_metrics(generated, driving) if "l1" in wanted else {}
    if lpips is not None and "lpips" in wanted:
        values["lpips"] = lpips(generated, driving)
    found: dict[tuple[str, bool], np.ndarray] = {}  # by kind, and whether of the source
    for name in wanted:
        kind = METRICS[name].kind
        if kind is None:
            continue
        against_source = name == "csim"
        if (kind, against_source) not in found:
            both = np.concatenate([generated, source if against_source else driving])
            found[kind, against_source] = extractors[kind](both)[0]
        one, other = np.split(found[kind, against_source], 2)
        values[name] = PAIRED[name](one, other)
    return values


def _score(
    name: str, rows: Sequence[Mapping[str, Any]], mode: str,
    extractors: Mapping[str, Extractor], lpips: metrics.Lpips | None, seed: int,
) -> Score:  # fmt: skip
    clusters = [row[cluster_of(mode)] for row in rows]
    extractor = extractors.get(METRICS[name].kind or "")
    if extractor is not None:
        return score(name, rows, clusters, seed, extractor.noise.get(name), extractor.name)
    return score(name, rows, clusters, seed, extractor=lpips.name if name == "lpips" and lpips is not None else "")


def _row(clips: Clips, it: ImageSet) -> dict[str, Any]:
    return {
        "source_clip": clips.name(it.source_clip),
        "driving_clip": clips.name(it.driving_clip),
        "source_identity": clips.identity(it.source_clip),
        "driving_identity": clips.identity(it.driving_clip),
        "source_frame": it.source_frame,
        "driving_frame": it.driving_frame,
        "initial_frame": it.initial_frame,
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _checked(generated: np.ndarray, driving: np.ndarray) -> np.ndarray:
    if generated.dtype != np.uint8 or generated.shape != driving.shape:
        raise InputError(
            f"reenact must give uint8 {list(driving.shape)}, got {generated.dtype} {list(generated.shape)}"
        )
    return generated


def _notes(reenact: Any) -> tuple[str, ...]:
    unscaled = getattr(reenact, "unscaled", 0)
    return (f"{unscaled} sets were driven at scale 1: key points of a face span no area",) if unscaled else ()
