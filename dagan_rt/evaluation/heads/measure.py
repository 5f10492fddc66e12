"""How far the regressors can be trusted: their error against the truth, and what each metric reads when all is right.

Everything goes through the files and the reader that an evaluation uses, on identities that no training sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from dagan_rt.evaluation.extractors import ANGLES, Extractor
from dagan_rt.evaluation.heads.degrade import degrade, degrade_slightly
from dagan_rt.evaluation.heads.frames import Frames, draw_frames, draw_set, measured_identities, pick_times, regrid
from dagan_rt.evaluation.heads.targets import ACTIONS, activations
from dagan_rt.evaluation.metrics import (
    action_agreement,
    embedding_cosine,
    embedding_distance,
    landmark_distance,
    pose_error,
)

SIZE = 128
"""Side in pixels of the frames that are measured; the reader averages them down to what the regressors take."""

FRAMES = 3  # of each identity in each of two scenes

QUICK = 6
"""So few identities are measured beside the many, for a test that the files still give what the log says."""

NOISE_FROM = (
    "{count} held-out heads at {size} pixels, made slightly worse (half the resolution and back, colours ± 2 %, "
    "noise, JPEG 90): akd and aed against the same frame untouched; csim, prmse and aucon of the perfect reenactment, "
    "the source's person drawn with the driving motion"
)

Found = dict[str, np.ndarray]


@dataclass(frozen=True)
class Material:
    """frames: [identity][scene][frame] flattened, N · 2 · 3. perfect: uint8 [N, S, S, 3], identity i in scene 0 with
    the motion that identity i + 1 has in frame 1 of its scene 0."""

    frames: Frames
    perfect: np.ndarray

    @property
    def count(self) -> int:
        return len(self.perfect)

    def at(self, values: np.ndarray, scene: int, frame: int) -> np.ndarray:
        """Values of all frames [N · 2 · 3, ...] → those of one frame of each identity, [N, ...]."""
        return values.reshape(self.count, 2, FRAMES, *values.shape[1:])[:, scene, frame]


def draw_material(count: int, workers: int = 1, progress: bool = False) -> Material:
    """Draw what is measured: the same for the same count, on any machine."""
    identities = measured_identities(count)
    frames = draw_set(identities, FRAMES, (SIZE, SIZE), workers, progress)
    jobs = [(identities[i], identities[(i + 1) % count]) for i in range(count)]
    if workers <= 1:
        perfect = [_draw_perfect(job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            perfect = list(pool.map(_draw_perfect, jobs, chunksize=8))
    return Material(frames, np.stack(perfect))


def _draw_perfect(job: tuple[int, int]) -> np.ndarray:
    source, driver = job
    time = pick_times(driver, 0, FRAMES)[1]
    return draw_frames(source, 0, [time], SIZE, driver).images[0]


def measure(extractors: Mapping[str, Extractor], material: Material) -> dict[str, Any]:
    """All tables, as plain numbers: see the functions below."""
    frames = material.frames
    clean = extract(extractors, frames.images)
    slight = extract(extractors, _each(degrade_slightly, frames.images, 1))
    heavy = extract(extractors, _each(degrade, frames.images, 2))
    perfect = extract(extractors, _each(degrade_slightly, material.perfect, 3))
    return {
        "truth": {name: against_truth(found, frames) for name, found in
                  (("clean", clean), ("slightly worse", slight), ("degraded", heavy))},
        "identity": {name: verification(found["identity"], material) for name, found in
                     (("clean", clean), ("degraded", heavy))},
        "noise": noise(clean, slight, perfect, material),
        "same_frame": same_frame(clean, slight),
        "agreement": agreement(clean, material),
    }  # fmt: skip


def extract(extractors: Mapping[str, Extractor], images: np.ndarray, batch: int = 64) -> Found:
    """What each extractor finds in images uint8 [N, S, S, 3]; not finding a face in any of them is an error here."""
    found: Found = {}
    for kind, extractor in extractors.items():
        parts = [extractor(images[start : start + batch]) for start in range(0, len(images), batch)]
        assert all(ok.all() for _, ok in parts), f"{kind}: no finite answer"
        found[kind] = np.concatenate([values for values, _ in parts])
    return found


def truth_of(frames: Frames) -> Found:
    """What perfect extractors would find, but for identity: in the reader's units."""
    landmarks = (regrid(frames.landmarks, frames.images.shape[1], 256).astype(np.float64) + 1) / 2 * 255
    actions = (activations(frames.expression) >= 0.5).astype(np.float64)
    return {"landmarks": landmarks, "pose": frames.pose.astype(np.float64), "actions": actions}


def against_truth(found: Found, frames: Frames) -> dict[str, float]:
    """Errors of single frames: landmarks in pixels at 256 (mean distance), angles in degrees (root mean square),
    actions as the share of frames in which each is told rightly."""
    truth = truth_of(frames)
    apart = np.linalg.norm(found["landmarks"] - truth["landmarks"], axis=-1)
    turned = found["pose"] - truth["pose"]
    right = found["actions"] == truth["actions"]
    return {
        "landmarks_px": _rounded(apart.mean()),
        "landmarks_px_95": _rounded(np.quantile(apart.mean(-1), 0.95)),
        "pose_deg": _rounded(np.sqrt((turned**2).mean())),
        **{f"{angle}_deg": _rounded(np.sqrt((turned[:, i] ** 2).mean())) for i, angle in enumerate(ANGLES)},
        "actions": _rounded(right.mean()),
        **{name: _rounded(right[:, i].mean()) for i, name in enumerate(ACTIONS)},
    }


def verification(embeddings: np.ndarray, material: Material) -> dict[str, float]:
    """Telling people apart by one frame of each of two scenes (other light, clothes, background, pose).

    Cosines (mean and standard deviation) of the same person in two scenes, of the same person in other frames of one
    scene, and of different people in two scenes; equal error rate and area under the ROC curve of the two-scene pairs.
    """
    grouped = embeddings.reshape(material.count, 2, FRAMES, -1)
    same = np.einsum("nae,nbe->nab", grouped[:, 0], grouped[:, 1]).ravel()
    within = embedding_cosine(grouped[:, :, 0], grouped[:, :, 1]).ravel()
    crossed = grouped[:, 0, 0] @ grouped[:, 1, 0].T
    different = crossed[~np.eye(material.count, dtype=bool)]
    rate = equal_error_rate(same, different)
    order = np.searchsorted(np.sort(different), same)
    return {
        "same": _rounded(same.mean()), "same_std": _rounded(same.std()),
        "same_scene": _rounded(within.mean()), "same_scene_std": _rounded(within.std()),
        "different": _rounded(different.mean()), "different_std": _rounded(different.std()),
        "eer": _rounded(rate), "auc": _rounded(order.mean() / len(different)),
    }  # fmt: skip


def equal_error_rate(same: np.ndarray, different: np.ndarray) -> float:
    """Where as many same pairs lie below the threshold as different pairs lie on or above it, in shares."""
    thresholds = np.unique(np.concatenate([same, different]))
    missed = np.searchsorted(np.sort(same), thresholds) / len(same)
    accepted = 1 - np.searchsorted(np.sort(different), thresholds) / len(different)
    nearest = np.argmin(np.abs(missed - accepted))
    return float((missed[nearest] + accepted[nearest]) / 2)


def noise(clean: Found, slight: Found, perfect: Found, material: Material) -> dict[str, float]:
    """What each metric reads for a perfect generator, its pictures made slightly worse (see `NOISE_FROM`)."""
    source = material.at(clean["identity"], 0, 0)
    driving = {kind: material.at(values, 0, 1) for kind, values in clean.items()}
    follow = {kind: np.roll(values, -1, axis=0) for kind, values in driving.items()}  # identity i is driven by i + 1
    return {
        "akd": _rounded(landmark_distance(slight["landmarks"], clean["landmarks"]).mean()),
        "aed": _rounded(embedding_distance(slight["identity"], clean["identity"]).mean()),
        "csim": _rounded(embedding_cosine(perfect["identity"], source).mean()),
        "prmse": _rounded(_root_mean_square(pose_error(perfect["pose"], follow["pose"]))),
        "aucon": _rounded(action_agreement(perfect["actions"], follow["actions"]).mean()),
    }


def same_frame(clean: Found, slight: Found) -> dict[str, float]:
    """What the metrics of cross-identity read between a frame and itself made slightly worse: no person changes."""
    return {
        "csim": _rounded(embedding_cosine(slight["identity"], clean["identity"]).mean()),
        "prmse": _rounded(_root_mean_square(pose_error(slight["pose"], clean["pose"]))),
        "aucon": _rounded(action_agreement(slight["actions"], clean["actions"]).mean()),
    }


def pairs_of(found: Found, material: Material) -> dict[str, np.ndarray]:
    """Metrics of pairs that differ: AKD of two frames of a clip, PRMSE and AUCON of two people; [N · 2] each."""
    one, other = (np.concatenate([material.at(found["landmarks"], scene, frame) for scene in (0, 1)])
                  for frame in (0, 1))  # fmt: skip

    def people(kind: str, metric: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        values = [[material.at(found[kind], scene, frame) for frame in (0, 1)] for scene in (0, 1)]
        return np.concatenate([metric(first, np.roll(second, -1, axis=0)) for first, second in values])

    return {
        "akd": landmark_distance(one, other),
        "prmse": people("pose", pose_error),
        "aucon": people("actions", action_agreement),
    }


def agreement(clean: Found, material: Material) -> dict[str, dict[str, float]]:
    """Metrics of single pairs by the regressors and by the truth: does the metric measure what it says?"""
    by_truth, by_regressors = pairs_of(truth_of(material.frames), material), pairs_of(clean, material)
    return {
        metric: {
            "correlation": _rounded(_correlation(true, found)),
            "mean_truth": _rounded(true.mean()),
            "mean_regressor": _rounded(found.mean()),
            "rms_difference": _rounded(_root_mean_square(found - true)),
        }
        for (metric, true), found in zip(by_truth.items(), by_regressors.values(), strict=True)
    }


def _each(change: Callable[[np.ndarray, np.random.Generator], np.ndarray], images: np.ndarray, seed: int) -> np.ndarray:
    return np.stack([change(image, np.random.default_rng([seed, number])) for number, image in enumerate(images)])


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; 0 where one of the two is always the same."""
    return float(np.corrcoef(one, other)[0, 1]) if one.std() and other.std() else 0.0


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


def _rounded(value: float) -> float:
    return round(float(value), 4)
