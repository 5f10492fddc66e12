"""Synthetic heads as a data set: drawn once, kept in a cache folder, with disparity, landmarks, pose and expression."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dagan_rt.errors import InputError
from dagan_rt.training.data.protocol import Frame

LAYOUT = 1  # of the cache of drawn heads


def disparity_of(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Distance to the camera → disparity in [0, 1]: affine in 1/z, 1 at `near`, 0 at `far` and beyond. float32."""
    inverse = 1.0 / np.maximum(depth, 1e-6)
    return np.clip((inverse - 1 / far) / (1 / near - 1 / far), 0.0, 1.0).astype(np.float32)


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """Area-average a square image [S, S, ...] of any number type to float32 [size, size, ...]; S a multiple of size."""
    factor, rest = divmod(image.shape[0], size)
    if rest or factor < 1 or image.shape[0] != image.shape[1]:
        raise InputError(f"cannot shrink an image of {image.shape[0]} × {image.shape[1]} to {size} by whole blocks")
    total = np.zeros((size, size, *image.shape[2:]), np.uint32 if image.dtype.kind == "u" else np.float32)
    for row in range(factor):
        for column in range(factor):  # strided sums: several times faster than a mean over reshaped blocks
            total += image[row::factor, column::factor]
    return total.astype(np.float32) / np.float32(factor * factor)


class HeadsData:
    """Clips of synthetic heads, drawn once at `size` by worker processes and kept in a cache folder.

    The cache is keyed by the parameters and by the source of the drawing code; processes that start at the same time
    may both draw, and one of the two results is kept. Of every frame disparity, landmarks, pose and expression are
    known. Disparity is affine in 1/z, 1 at the
    nearest and 0 at the farthest depth of the clip: a single picture tells no more, since a larger head may be nearer.
    """

    def __init__(
        self, identities: Sequence[int], frames: int, size: int, seed: int = 0, cache: str | Path = "",
        workers: int = 2, progress: bool = True,
    ) -> None:  # fmt: skip
        self.identities, self.frames, self.drawn_size, self.size = list(identities), frames, size, size
        self.seed = seed
        self._tracks: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of the clips that have been read
        folder = Path(cache) if cache else _user_cache()
        key = _heads_key(self.identities, frames, size, seed)
        self.folder = folder / f"heads-{size}-{len(self.identities)}x{frames}-{key}"
        if not (self.folder / "done.json").exists():
            _draw_all(self.folder, self.identities, frames, size, seed, workers, progress)
        self._images = self._load("images")  # uint8 [N, T, S, S, 3]
        self._disparity = self._load("disparity")  # uint16 [N, T, S, S]
        self._landmarks = self._load("landmarks")  # float32 [N, T, 68, 2]

    def _load(self, name: str) -> np.ndarray:
        try:
            return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"the cache of drawn heads {self.folder} cannot be read ({name}.npy: {error}); delete the folder to "
                "draw them again"
            ) from None

    def __len__(self) -> int:
        return len(self.identities)

    def name(self, clip: int) -> str:
        return f"identity {self.identities[clip]}"

    def identity(self, clip: int) -> str:
        return str(self.identities[clip])

    def frame_count(self, clip: int) -> int:
        return self.frames

    def read(self, clip: int, frames: Sequence[int]) -> list[Frame]:
        return [self._frame(clip, frame) for frame in frames]

    def _frame(self, clip: int, frame: int) -> Frame:
        image, disparity = self._images[clip, frame], self._disparity[clip, frame]
        if self.size != self.drawn_size:
            image = np.rint(shrink(image, self.size)).astype(np.uint8)
            disparity = shrink(disparity, self.size)
        # A landmark's position is relative to the image, so it only moves by the corner-aligned grid's half pixel.
        landmarks = _regrid(np.asarray(self._landmarks[clip, frame]), self.drawn_size, self.size)
        pose, expression = self._motion(clip)
        return Frame(
            np.asarray(image), disparity.astype(np.float32) / np.float32(65535), landmarks, pose[frame],
            expression[frame],
        )  # fmt: skip

    def _motion(self, clip: int) -> tuple[np.ndarray, np.ndarray]:
        """Pose [T, 3] and expression [T, 7] of a clip, as `heads.draw_clip` has them: quicker drawn than read."""
        if clip not in self._tracks:
            from dagan_rt.training.heads.motion import draw_motion

            motion = draw_motion(self.identities[clip], self.seed, self.frames)
            self._tracks[clip] = motion.pose.astype(np.float32), motion.expression.astype(np.float32)
        return self._tracks[clip]

    def at_size(self, size: int) -> HeadsData:
        """The same clips, area-averaged to a smaller size on reading."""
        if self.drawn_size % size:
            raise InputError(f"heads drawn at {self.drawn_size} cannot be averaged to {size}; use a whole fraction")
        other = object.__new__(HeadsData)
        other.__dict__.update(self.__dict__, size=size)
        return other


def _regrid(landmarks: np.ndarray, drawn: int, size: int) -> np.ndarray:
    """Corner-aligned coordinates at one size → the same place at another."""
    if drawn == size:
        return landmarks
    pixels = (landmarks + 1) / 2 * (drawn - 1)
    return ((((pixels + 0.5) * size / drawn - 0.5) / (size - 1)) * 2 - 1).astype(np.float32)


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dagan-rt"


def _heads_key(identities: Sequence[int], frames: int, size: int, seed: int) -> str:
    from dagan_rt.training import heads

    source = hashlib.sha256()
    for file in sorted(Path(heads.__file__).parent.glob("*.py")):
        source.update(file.read_bytes())
    text = json.dumps([list(identities), frames, size, seed, source.hexdigest(), LAYOUT])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _draw_all(
    folder: Path, identities: Sequence[int], frames: int, size: int, seed: int, workers: int, progress: bool
) -> None:
    """Draw every clip into a temporary folder beside the target, then rename it into place."""
    if folder.exists():  # it appears whole, so something has been taken out of it
        raise InputError(f"the cache of drawn heads {folder} is not complete; delete the folder to draw them again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(identities), frames, size, size)
    needed = int(np.prod(shape, dtype=np.int64)) * 5
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise InputError(
            f"drawing {shape[0]} × {frames} heads at {size} needs {needed / 1e9:.1f} GB in {folder.parent}, "
            f"which has {free / 1e9:.1f} GB; use fewer identities or another data.cache"
        )
    temporary = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        images = np.lib.format.open_memmap(temporary / "images.npy", "w+", np.uint8, (*shape, 3))
        disparity = np.lib.format.open_memmap(temporary / "disparity.npy", "w+", np.uint16, shape)
        landmarks = np.lib.format.open_memmap(temporary / "landmarks.npy", "w+", np.float32, (*shape[:2], 68, 2))
        jobs = [(number, identity, frames, size, seed) for number, identity in enumerate(identities)]
        for number, image, near, points in _map(_draw_one, jobs, workers, progress):
            images[number], disparity[number], landmarks[number] = image, near, points
        for array in (images, disparity, landmarks):
            array.flush()
        del images, disparity, landmarks
        (temporary / "done.json").write_text(json.dumps({"clips": len(identities), "frames": frames, "size": size}))
        _move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:  # another process has drawn the same clips meanwhile
        if not (folder / "done.json").exists():
            raise


def _map(function: Any, jobs: Sequence[Any], workers: int, progress: bool) -> Iterator[Any]:
    bar = tqdm(total=len(jobs), desc="drawing heads", unit="clip", disable=not progress)
    with bar:
        if workers <= 1 or len(jobs) < 8:
            for job in jobs:
                yield function(job)
                bar.update()
            return
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # torch's threads do not survive a fork
            for result in pool.map(function, jobs, chunksize=2):
                yield result
                bar.update()


def _draw_one(job: tuple[int, int, int, int, int]) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    from dagan_rt.training import heads

    number, identity, frames, size, seed = job
    clip = heads.draw_clip(identity, frames, size, seed)
    disparity = disparity_of(clip.depth, float(clip.depth.min()), float(clip.depth.max()))
    return number, clip.frames, np.rint(disparity * 65535).astype(np.uint16), clip.landmarks
