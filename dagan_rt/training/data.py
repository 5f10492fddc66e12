"""Pairs of frames of one clip: from folders of videos, or from synthetic heads whose depth and landmarks are known.

A sample is a pure function of (seed, epoch, index), and a batch of (seed, step): a run that stops and resumes sees
what it would have seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from dagan_rt.errors import InputError
from dagan_rt.images import center_square
from dagan_rt.training.augment import colour_matrix, jitter, mirror_image, mirror_landmarks

VIDEO_ENDINGS = (".mp4", ".gif", ".mov", ".mkv", ".webm", ".avi")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
LAYOUT = 1  # of the cache of drawn heads
LARGEST_SIDE = 8192  # of a frame, pixels: refused before anything is allocated


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a pair; `Augmentation.none()` for evaluation."""

    flip: bool = True
    time_flip: bool = True
    jitter: float = 0.1
    still: float = 0.0  # share of pairs whose driving frame is the source itself

    @classmethod
    def none(cls) -> Augmentation:
        return cls(flip=False, time_flip=False, jitter=0.0)


@dataclass(frozen=True)
class Frame:
    """One frame: image uint8 [S, S, 3]; where known disparity float32 [S, S] and landmarks float32 [68, 2]."""

    image: np.ndarray
    disparity: np.ndarray | None = None
    landmarks: np.ndarray | None = None


class Clips(Protocol):
    """What a data set is: clips, each with frames that can be read at random."""

    size: int

    def __len__(self) -> int: ...

    def frame_count(self, clip: int) -> int: ...

    def read(self, clip: int, frames: Sequence[int]) -> list[Frame]:
        """The frames asked for; raises `BadClip` when the clip turns out to be unreadable."""
        ...


class BadClip(Exception):
    """A clip that cannot be used, with the reason."""


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sample(clips: Clips, augmentation: Augmentation, seed: int, epoch: int, index: int) -> dict[str, np.ndarray]:
    """Two random frames of one clip, augmented: a pure function of (seed, epoch, index).

    `index` counts clips × repeats; the clip is index modulo the number of clips. A clip that cannot be read is
    replaced by another one, chosen by the same random stream.
    Returns source, driving float32 [3, S, S] in [0, 1] and, where known, *_disparity [1, S, S] and *_landmarks [68, 2].
    """
    rng = np.random.default_rng([seed, epoch, index])
    clip = index % len(clips)
    for _ in range(20):
        chosen = rng.choice(clips.frame_count(clip), size=2, replace=False)
        try:
            pair = clips.read(clip, chosen.tolist())
            break
        except BadClip as error:
            warnings.warn(f"clip skipped: {error}", stacklevel=2)
            clip = int(rng.integers(len(clips)))
    else:
        raise InputError("20 clips in a row could not be read; check the data folder")
    if augmentation.time_flip and rng.random() < 0.5:
        pair.reverse()
    flip = augmentation.flip and rng.random() < 0.5
    if augmentation.still and rng.random() < augmentation.still:
        pair[1] = pair[0]
    colour = colour_matrix(rng, augmentation.jitter) if augmentation.jitter else None
    return {
        **_tensors(pair[0], "source", flip, colour),
        **_tensors(pair[1], "driving", flip, colour),
    }


def _tensors(frame: Frame, name: str, flip: bool, colour: tuple[np.ndarray, float] | None) -> dict[str, np.ndarray]:
    image = frame.image.astype(np.float32) / np.float32(255)
    image = mirror_image(image) if flip else image
    image = jitter(image, *colour) if colour else image
    result = {name: np.ascontiguousarray(image.transpose(2, 0, 1))}
    if frame.disparity is not None:
        disparity = mirror_image(frame.disparity) if flip else frame.disparity
        result[f"{name}_disparity"] = np.ascontiguousarray(disparity[None])
    if frame.landmarks is not None:
        result[f"{name}_landmarks"] = mirror_landmarks(frame.landmarks) if flip else frame.landmarks
    return result


class Loader:
    """Batches by step number, made ahead of time by a few threads.

    `loader.batch(step)` is a pure function of (seed, step). An epoch visits every clip `repeats` times in an order
    drawn from (seed, epoch). Threads suffice: decoding, resizing and copying release the interpreter's lock.
    """

    def __init__(
        self, clips: Clips, batch: int, seed: int, augmentation: Augmentation, repeats: int = 1, threads: int = 1
    ) -> None:
        self.clips, self.size, self.seed = clips, batch, seed
        self.augmentation, self.repeats, self.threads = augmentation, repeats, threads
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def items(self) -> int:
        """Items of an epoch."""
        return len(self.clips) * self.repeats

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
                self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.items)
            return self._orders[epoch]

    def numbers(self, step: int) -> list[tuple[int, int]]:
        """(epoch, index) of each item of batch number `step`."""
        first = step * self.size
        places = [divmod(first + offset, self.items) for offset in range(self.size)]
        return [(epoch, int(self._order(epoch)[place])) for epoch, place in places]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step: arrays with a leading batch axis, see `sample`."""
        items = [sample(self.clips, self.augmentation, self.seed, *number) for number in self.numbers(step)]
        return {name: np.stack([item[name] for item in items]) for name in items[0]}

    def from_step(self, step: int) -> Generator[dict[str, np.ndarray], None, None]:
        """Batches from `step` on, without end; close the iterator to stop the threads."""
        ahead: list[Future[dict[str, np.ndarray]]] = []
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="loader")
        try:
            while True:
                while len(ahead) <= self.threads:
                    ahead.append(pool.submit(self.batch, step + len(ahead)))
                yield ahead.pop(0).result()
                step += 1
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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


# ---------------------------------------------------------------------------------------------------------------------
# Folders of clips


class ClipFolder:
    """A folder of videos (mp4, gif, mov, mkv, webm, avi) and of folders of png or jpg frames, at any depth.

    Frames are cropped to the central square and resized to `size`. A clip that cannot be opened or has fewer than two
    frames is left out; `bad` holds (path, reason) of each. InputError when nothing usable remains.
    """

    def __init__(self, path: str | Path, size: int, progress: bool = True) -> None:
        self.path, self.size = Path(path), size
        if not self.path.is_dir():
            raise InputError(f"data folder {self.path} does not exist; expected a folder of videos or of frame folders")
        candidates = _candidates(self.path)
        self.bad: list[tuple[Path, str]] = []
        self._clips: list[tuple[Path, list[Any]]] = []
        for candidate in tqdm(candidates, desc="clips", unit="clip", disable=not progress or len(candidates) < 50):
            try:
                self._clips.append((candidate, _index_clip(candidate)))
            except BadClip as error:
                self.bad.append((candidate, str(error)))
        if not self._clips:
            found = f"{len(self.bad)} clips, none of them readable" if self.bad else "no clips"
            first = f" (first: {self.bad[0][0].name}: {self.bad[0][1]})" if self.bad else ""
            raise InputError(
                f"data folder {self.path} holds {found}{first}; expected videos ({', '.join(VIDEO_ENDINGS)}) "
                "or folders of at least two png or jpg frames"
            )

    def __len__(self) -> int:
        return len(self._clips)

    def name(self, clip: int) -> str:
        """The clip's path inside the folder."""
        return str(self._clips[clip][0].relative_to(self.path))

    def frame_count(self, clip: int) -> int:
        return len(self._clips[clip][1])

    def read(self, clip: int, frames: Sequence[int]) -> list[Frame]:
        path, index = self._clips[clip]
        try:
            if path.is_dir():
                images = [_read_image(index[frame]) for frame in frames]
            else:
                images = _read_video(path, [index[frame] for frame in frames])
        except BadClip:
            raise
        except Exception as error:  # decoders raise many kinds; each means this clip is of no use
            raise BadClip(f"{path}: {error}") from None
        return [Frame(center_square(image, self.size)) for image in images]

    def subset(self, chosen: Sequence[int]) -> ClipFolder:
        """The same folder restricted to some clips."""
        other = object.__new__(ClipFolder)
        other.path, other.size, other.bad = self.path, self.size, []
        other._clips = [self._clips[clip] for clip in chosen]
        return other

    def at_size(self, size: int) -> ClipFolder:
        """The same clips read at another size."""
        other = self.subset(range(len(self)))
        other.size = size
        return other


def _candidates(folder: Path) -> list[Path]:
    """Videos and folders that hold images, sorted; links out of the folder are not followed."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        found += [Path(parent, file) for file in files if file.lower().endswith(VIDEO_ENDINGS)]
        if any(file.lower().endswith(IMAGE_ENDINGS) for file in files):
            found.append(Path(parent))
    return sorted(found)


def _index_clip(path: Path) -> list[Any]:
    """What identifies each frame: its file, or its presentation time in the video."""
    if path.is_dir():
        frames: list[Any] = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS)
    else:
        frames = _presentation_times(path)
    if len(frames) < 2:
        raise BadClip(f"{len(frames)} frames, at least 2 needed")
    return frames


def _presentation_times(path: Path) -> list[int]:
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if max(stream.width, stream.height) > LARGEST_SIDE:
                raise BadClip(f"frames of {stream.width} × {stream.height}, at most {LARGEST_SIDE} a side")
            return sorted({packet.pts for packet in container.demux(stream) if packet.pts is not None})
    except (av.FFmpegError, IndexError, OSError) as error:
        raise BadClip(f"not a readable video: {error}") from None


def _read_video(path: Path, times: Sequence[int]) -> list[np.ndarray]:
    """Decode the frames shown at `times`, each from the key frame before it."""
    import av

    from dagan_rt.video import upright_rgb

    found: dict[int, np.ndarray] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for time in sorted(set(times)):
            for rewind in (True, False):  # some containers seek past the frame: then decode from the start
                container.seek(time if rewind else 0, stream=stream, backward=True)
                for frame in container.decode(stream):
                    if frame.pts == time:
                        found[time] = upright_rgb(frame)
                        break
                    if frame.pts is not None and frame.pts > time:
                        break
                if time in found:
                    break
            else:
                raise BadClip(f"{path}: no frame at time {time}")
    return [found[time] for time in times]


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        if max(image.size) > LARGEST_SIDE:
            raise BadClip(f"{path}: image of {image.size}, at most {LARGEST_SIDE} a side")
        return np.asarray(image.convert("RGB"))


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic heads


def disparity_of(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Distance to the camera → disparity in [0, 1]: affine in 1/z, 1 at `near`, 0 at `far` and beyond. float32."""
    inverse = 1.0 / np.maximum(depth, 1e-6)
    return np.clip((inverse - 1 / far) / (1 / near - 1 / far), 0.0, 1.0).astype(np.float32)


class HeadsData:
    """Clips of synthetic heads, drawn once at `size` by worker processes and kept in a cache folder.

    The cache is keyed by the parameters and by the source of the drawing code. Disparity is affine in 1/z, 1 at the
    nearest and 0 at the farthest depth of the clip: a single picture tells no more, since a larger head may be nearer.
    """

    def __init__(
        self, identities: Sequence[int], frames: int, size: int, seed: int = 0, cache: str | Path = "",
        workers: int = 2, progress: bool = True,
    ) -> None:  # fmt: skip
        self.identities, self.frames, self.drawn_size, self.size = list(identities), frames, size, size
        folder = Path(cache) if cache else _user_cache()
        key = _heads_key(self.identities, frames, size, seed)
        self.folder = folder / f"heads-{size}-{len(self.identities)}x{frames}-{key}"
        if not (self.folder / "done.json").exists():
            _draw_all(self.folder, self.identities, frames, size, seed, workers, progress)
        self._images = np.load(self.folder / "images.npy", mmap_mode="r")  # uint8 [N, T, S, S, 3]
        self._disparity = np.load(self.folder / "disparity.npy", mmap_mode="r")  # uint16 [N, T, S, S]
        self._landmarks = np.load(self.folder / "landmarks.npy", mmap_mode="r")  # float32 [N, T, 68, 2]

    def __len__(self) -> int:
        return len(self.identities)

    def name(self, clip: int) -> str:
        return f"identity {self.identities[clip]}"

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
        return Frame(np.asarray(image), disparity.astype(np.float32) / np.float32(65535), landmarks)

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
        if not folder.exists():  # somebody else may have drawn the same clips meanwhile
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
