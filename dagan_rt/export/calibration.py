"""Faces to calibrate int8 on, and what every subnetwork is given while they drive one another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.export.recording import Arrays, session

if TYPE_CHECKING:
    from dagan_rt.export.subnetworks import Subnetwork
    from dagan_rt.networks.model import Model

HEADS = "heads"
ON_HEADS = "int8 was calibrated on synthetic heads: for weights of real faces give --calibrate a folder of their clips"
FRAMES = 16
PER_CLIP = 4  # a few frames show how far a face moves; more faces show more
EVERY = 4  # frames of a drawn clip between two that are taken


def clips(source: str | Path, size: int, count: int = FRAMES) -> list[np.ndarray]:
    """At most `count` faces, clip by clip: each uint8 [n, size, size, 3] RGB, the central square of the frame.

    source: "heads" draws synthetic ones, of identities that are never measured on; else a video, an image, or a folder
    with videos and images at any depth, of which the images of one folder count as a clip. Clips are spread evenly
    over the folder, frames over each clip. Raises InputError if nothing is there, or for a file that cannot be read.
    """
    if str(source) == HEADS:
        return _draw(size, count)
    found = find_clips(Path(source))
    chosen = [found[at] for at in _spread(max(1, count // PER_CLIP), len(found))]
    return [_read(clip, size, count // len(chosen)) for clip in chosen]


def record(
    model: Model, declared: Sequence[Subnetwork], source: str | Path, count: int = FRAMES
) -> dict[str, list[Arrays]]:
    """The inputs of each declared subnetwork in PyTorch, one sample a frame of `clips`, batches of one.

    model: on the CPU, in evaluation mode. Every clip drives its own first face, or that of the next clip, in turn, with
    relative motion: small and large motions both occur.
    """
    faces = clips(source, model.config.size, count)
    samples: dict[str, list[Arrays]] = {subnetwork.name: [] for subnetwork in declared}
    for number, clip in enumerate(faces):
        portrait = faces[(number + number % 2) % len(faces)][:1]
        for inputs in session(model, declared, portrait, [clip[at : at + 1] for at in range(len(clip))]):
            for name, arrays in inputs.items():
                samples[name].append(arrays)
    return samples


def _draw(size: int, count: int) -> list[np.ndarray]:
    from dagan_rt.training.heads import TRAINING, draw_clip

    identities = [TRAINING[at] for at in _spread(max(1, count // PER_CLIP), len(TRAINING))]
    each = count // len(identities)
    return [draw_clip(identity, each * EVERY, size).frames[::EVERY] for identity in identities]


def find_clips(source: Path) -> list[list[Path]]:
    """The clips under a folder: a video alone, or the images of one folder. Raises InputError if there are none."""
    from dagan_rt.training.data import IMAGE_ENDINGS, VIDEO_ENDINGS

    if not source.exists():
        raise InputError(
            f"calibration data {source} does not exist: give a folder with videos or images of faces, or {HEADS}"
        )
    folders = [(folder, names) for folder, _, names in os.walk(source)]  # of a file: none
    found = []
    for folder, names in sorted(folders) or [(str(source.parent), [source.name])]:
        videos = sorted(name for name in names if name.lower().endswith(VIDEO_ENDINGS))
        images = sorted(name for name in names if name.lower().endswith(IMAGE_ENDINGS))
        found += [[Path(folder, name)] for name in videos]
        found += [[Path(folder, name) for name in images]] if images else []
    if not found:
        endings = ", ".join((*VIDEO_ENDINGS, *IMAGE_ENDINGS))
        raise InputError(f"calibration data {source} holds no video and no image: expected files ending in {endings}")
    return found


def _read(clip: Sequence[Path], size: int, count: int) -> np.ndarray:
    from dagan_rt.images import center_square, read_image
    from dagan_rt.training.data import VIDEO_ENDINGS

    if clip[0].name.lower().endswith(VIDEO_ENDINGS):
        return np.stack(_read_video(clip[0], size, count))
    return np.stack([center_square(read_image(clip[at]), size) for at in _spread(count, len(clip))])


def _read_video(path: Path, size: int, count: int) -> list[np.ndarray]:
    """Frames spread over a video whose length nobody knows before its end; at most twice `count` are held."""
    from dagan_rt.images import center_square
    from dagan_rt.video import VideoReader

    kept: list[np.ndarray] = []
    step = 1
    with VideoReader(path) as reader:
        for number, image in enumerate(reader):
            if number % step == 0:
                kept.append(center_square(image, size))
            if len(kept) == 2 * count:
                kept, step = kept[::2], 2 * step
    return [kept[at] for at in _spread(count, len(kept))]


def _spread(count: int, total: int) -> list[int]:
    """At most `count` of the numbers below `total`, evenly spread, the first among them."""
    count = min(count, total)
    return [at * total // count for at in range(count)]
