"""Frames of synthetic heads with their truth, picked apart in time: what regressors learn from and are judged on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dagan_rt.errors import InputError
from dagan_rt.training import heads
from dagan_rt.training.heads import HELD_OUT, TRAINING
from dagan_rt.training.heads.motion import draw_motion
from dagan_rt.training.heads.person import draw_person, draw_scene
from dagan_rt.training.heads.render import draw_background, place, project, render
from dagan_rt.training.heads.shape import landmark_points, make_face

SIZE = 64
"""Side in pixels of what the regressors look at."""

FIRST = 500_000
"""The first identity that regressors learn from. Recipes of models count from 0, so that neither sees the other's."""

FIRST_MEASURED = 500_000
"""Where in `HELD_OUT` the identities begin that regressors are measured on; models are evaluated on the first ones."""

LENGTH = 96
"""Frames of a clip among which those of a sample are picked: two periods of the slowest sway."""

SCENES = (SIZE, 2 * SIZE)
"""Each identity is drawn in two scenes (seeds 0 and 1) at these sizes: sharp, and averaged down as in an evaluation."""


LAYOUT = 1  # of the cache of drawn frames; also to be raised when other frames are picked


@dataclass(frozen=True)
class Frames:
    """N frames with their truth: images uint8 [N, S, S, 3] RGB, landmarks float32 [N, 68, 2] in [-1, 1] (corner-aligned
    at S), pose float32 [N, 3] in degrees, expression float32 [N, 7] in [0, 1], identity int64 [N], scene int64 [N]."""

    images: np.ndarray
    landmarks: np.ndarray
    pose: np.ndarray
    expression: np.ndarray
    identity: np.ndarray
    scene: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def training_identities(count: int) -> range:
    """The identities that regressors learn from; InputError where they would leave `TRAINING`."""
    if not 2 <= count <= TRAINING.stop - FIRST:
        raise InputError(f"identities must be between 2 and {TRAINING.stop - FIRST}, got {count}")
    return range(FIRST, FIRST + count)


def measured_identities(count: int) -> range:
    """The identities that regressors are measured on; InputError where they would leave `HELD_OUT`."""
    if not 2 <= count <= len(HELD_OUT) - FIRST_MEASURED:
        raise InputError(f"identities must be between 2 and {len(HELD_OUT) - FIRST_MEASURED}, got {count}")
    return HELD_OUT[FIRST_MEASURED : FIRST_MEASURED + count]


def draw_frames(identity: int, seed: int, times: Sequence[int], size: int, driver: int | None = None) -> Frames:
    """The frames of `draw_clip(identity, max(times) + 1, size, seed)` at `times`, without drawing those between.

    driver: whose motion it is, where not the person's own. That is the perfect reenactment: this person, in this light
    and these clothes, with the head's position, pose and expression of the driver's clip of the same seed.
    """
    person, scene = draw_person(identity), draw_scene(identity, seed)
    motion = draw_motion(identity if driver is None else driver, seed, max(times) + 1)
    background = draw_background(scene, size)
    expression = motion.expression[list(times)]
    points = landmark_points(make_face(person, expression.T[:, :, None]))
    images, landmarks = [], []
    for number, time in enumerate(times):
        face = make_face(person, [float(value) for value in expression[number]])
        images.append(render(person, scene, face, motion.pose[time], motion.shift[time], size, background)[0])
        landmarks.append(project(points[number], place(motion.pose[time], motion.shift[time]), scene)[0])
    return Frames(
        np.stack(images), np.stack(landmarks).astype(np.float32), motion.pose[list(times)].astype(np.float32),
        expression.astype(np.float32), np.full(len(times), identity), np.full(len(times), seed),
    )  # fmt: skip


def shrink(frames: Frames, size: int) -> Frames:
    """The same frames at a smaller size: whole blocks averaged, landmarks moved to the smaller corner-aligned grid."""
    drawn = frames.images.shape[1]
    if drawn == size:
        return frames
    if drawn % size:
        raise InputError(f"frames of {drawn} pixels cannot be averaged to {size}: not a whole fraction")
    images = np.stack([np.asarray(Image.fromarray(image).reduce(drawn // size)) for image in frames.images])
    landmarks = regrid(frames.landmarks, drawn, size)
    return Frames(images, landmarks, frames.pose, frames.expression, frames.identity, frames.scene)


def regrid(landmarks: np.ndarray, size: int, other: int) -> np.ndarray:
    """Corner-aligned positions in an image of `size` pixels → the same places after a resize to `other`. float32."""
    pixels = (landmarks + 1) / 2 * (size - 1)
    return ((((pixels + 0.5) * other / size - 0.5) / (other - 1)) * 2 - 1).astype(np.float32)


def pick_times(identity: int, seed: int, count: int) -> list[int]:
    """`count` different frame numbers below `LENGTH`, in order."""
    rng = np.random.default_rng([20_213, identity, seed])
    return sorted(rng.choice(LENGTH, count, replace=False).tolist())


def draw_set(
    identities: Sequence[int], frames: int, sizes: Sequence[int] = SCENES, workers: int = 1, progress: bool = False
) -> Frames:
    """`frames` frames of each identity in each of len(sizes) scenes, drawn at these sizes and shrunk to the least."""
    jobs = [(identity, frames, tuple(sizes)) for identity in identities]
    bar = tqdm(total=len(jobs), desc="drawing heads", unit="identity", disable=not progress)
    with bar:
        if workers <= 1:
            drawn = _collect(map(_draw_identity, jobs), bar)
        else:
            with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # torch's threads do not survive a fork
                drawn = _collect(pool.map(_draw_identity, jobs, chunksize=8), bar)
    return _join(drawn)


def cached_set(
    identities: range, frames: int, cache: str | Path = "", workers: int = 2, progress: bool = False
) -> Frames:
    """`draw_set`, kept in a folder of the user's cache that is keyed by the parameters and the drawing code."""
    base = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dagan-rt"
    folder = base / f"regressors-{SIZE}-{len(identities)}x{frames}-{_key(identities, frames)}"
    if not folder.exists():
        base.mkdir(parents=True, exist_ok=True)
        needed = len(identities) * frames * len(SCENES) * SIZE * SIZE * 3 * 2  # once in memory, once on disk
        free = shutil.disk_usage(base).free
        if needed > free:
            raise InputError(f"drawing heads needs {needed / 1e9:.1f} GB in {base}, which has {free / 1e9:.1f} GB")
        drawn = draw_set(identities, frames, workers=workers, progress=progress)
        temporary = Path(tempfile.mkdtemp(prefix=folder.name, dir=base))
        try:
            for field in fields(Frames):
                np.save(temporary / f"{field.name}.npy", getattr(drawn, field.name))
            if not folder.exists():  # somebody else may have drawn the same heads meanwhile
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Frames(**{field.name: np.load(folder / f"{field.name}.npy") for field in fields(Frames)})


def _draw_identity(job: tuple[int, int, tuple[int, ...]]) -> Frames:
    identity, count, sizes = job
    return _join(
        [
            shrink(draw_frames(identity, seed, pick_times(identity, seed, count), size), min(sizes))
            for seed, size in enumerate(sizes)
        ]
    )


def _collect(results: Iterable[Frames], bar: tqdm) -> list[Frames]:
    drawn = []
    for result in results:
        drawn.append(result)
        bar.update()
    return drawn


def _join(parts: Sequence[Frames]) -> Frames:
    return Frames(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Frames)))


def _key(identities: range, frames: int) -> str:
    source = hashlib.sha256()
    for file in sorted(Path(heads.__file__).parent.glob("*.py")):
        source.update(file.read_bytes())
    text = json.dumps([identities.start, identities.stop, frames, SCENES, LENGTH, source.hexdigest(), LAYOUT])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
