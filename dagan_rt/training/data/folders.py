"""A folder of clips: videos, folders of frames, and packed clips, at any depth."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from dagan_rt.errors import InputError
from dagan_rt.images import center_square
from dagan_rt.training.data.packed import PackedClip
from dagan_rt.training.data.protocol import BadClip, Frame
from dagan_rt.training.data.readers import PACKED_ENDING, VIDEO_ENDINGS, FrameFolder, Reader, is_frame
from dagan_rt.training.data.videos import Video

THREADS = 8  # that open clips at the same time: most of it is waiting for the disk


class ClipFolder:
    """A folder of videos (mp4, gif, mov, mkv, webm, avi), of folders of png or jpg frames, and of packed clips (zip
    files of such frames, stored), at any depth.

    Frames are upright, cropped to the central square and resized to `size`; a clip may hold several sizes, which is
    warned of once. A clip that cannot be opened or has fewer than two frames is left out; `bad` holds (path, reason)
    of each. InputError when nothing usable remains.

    Whose face a clip shows (`identity`): in the published naming, IDENTITY#VIDEO#START-END, what stands before the
    first #; otherwise the first folder on the clip's path, where clips lie in several of them; otherwise every clip is
    somebody else.
    """

    def __init__(self, path: str | Path, size: int, progress: bool = True) -> None:
        self.path, self.size = Path(path), size
        if not self.path.is_dir():
            raise InputError(f"data folder {self.path} does not exist; expected a folder of videos or of frame folders")
        self.bad: list[tuple[Path, str]] = []
        candidates = self._find()
        self._clips: list[Reader] = []
        with ThreadPoolExecutor(THREADS) as pool:
            opened = pool.map(_open, candidates)
            bar = tqdm(opened, "clips", len(candidates), unit="clip", disable=not progress or len(candidates) < 50)
            for (found, _), clip in zip(candidates, bar, strict=True):
                if isinstance(clip, str):
                    self.bad.append((found, clip))
                else:
                    self._clips.append(clip)
        if not self._clips:
            raise self._nothing()
        self._several = _several_folders(self.name(clip) for clip in range(len(self)))
        self._sizes: dict[Path, tuple[int, ...]] = {}  # of the frame that was read first
        self._mixed: list[Path] = []

    def _find(self) -> list[tuple[Path, list[str]]]:
        """(path, names of its frames if it is a folder), sorted; neither links to folders nor what is hidden."""
        found: list[tuple[Path, list[str]]] = []

        def note(error: OSError) -> None:
            self.bad.append((Path(error.filename or self.path), error.strerror or str(error)))

        for parent, folders, files in os.walk(self.path, onerror=note):
            folders[:] = [name for name in folders if not name.startswith(".")]
            single = (name for name in files if name.lower().endswith((*VIDEO_ENDINGS, PACKED_ENDING)))
            found += [(Path(parent, name), []) for name in single if not name.startswith(".")]
            frames = [name for name in files if is_frame(name)]
            # One picture beside the clips is a picture of them, as `dagan-rt prepare` writes, and no clip.
            beside = len(frames) == 1 and Path(parent) == self.path and (folders or len(found) > 0)
            if frames and not beside:
                found.append((Path(parent), frames))
        return sorted(found, key=lambda item: item[0])

    def _nothing(self) -> InputError:
        found = f"{len(self.bad)} clips, none of them readable" if self.bad else "no clips"
        first = f" (first: {self.bad[0][0].name}: {self.bad[0][1]})" if self.bad else ""
        return InputError(
            f"data folder {self.path} holds {found}{first}; expected videos ({', '.join(VIDEO_ENDINGS)}), "
            f"folders of at least two png or jpg frames, or such frames packed ({PACKED_ENDING}, stored)"
        )

    def __len__(self) -> int:
        return len(self._clips)

    def name(self, clip: int) -> str:
        """The clip's path inside the folder."""
        return str(self._clips[clip].path.relative_to(self.path))

    def identity(self, clip: int) -> str:
        name = self.name(clip)
        *folders, last = Path(name).parts or (name,)
        if "#" in last:
            return last.split("#")[0]
        return folders[0] if self._several and folders else name

    def frame_count(self, clip: int) -> int:
        return len(self._clips[clip])

    def frame_name(self, clip: int, frame: int) -> str:
        """File name of a frame inside its clip; of a video, its number as 0000000.png."""
        return self._clips[clip].frame_name(frame)

    def read(self, clip: int, frames: Sequence[int]) -> list[Frame]:
        reader = self._clips[clip]
        try:
            images = reader.read(frames)
            result = [Frame(center_square(image, self.size)) for image in images]
        except BadClip:
            raise
        except Exception as error:  # decoders raise many kinds; each means this clip is of no use
            raise BadClip(_reason(error)) from None
        for image in images:
            self._note_size(reader.path, image.shape[:2])
        return result

    def _note_size(self, path: Path, size: tuple[int, ...]) -> None:
        first = self._sizes.setdefault(path, size)
        if size == first or self._mixed:
            return
        self._mixed.append(path)
        (height, width), (other, broad) = first, size
        warnings.warn(
            f"clip {path.relative_to(self.path)} holds frames of {width} × {height} and of {broad} × {other}; each is "
            "cropped and resized by itself (said once, other clips may do so too)", stacklevel=2,
        )  # fmt: skip

    def subset(self, chosen: Sequence[int]) -> ClipFolder:
        """The same folder restricted to some clips."""
        other = object.__new__(ClipFolder)
        other.__dict__.update(self.__dict__, bad=[], _clips=[self._clips[clip] for clip in chosen])
        return other

    def at_size(self, size: int) -> ClipFolder:
        """The same clips read at another size."""
        other = self.subset(range(len(self)))
        other.size = size
        return other


def _open(candidate: tuple[Path, list[str]]) -> Reader | str:
    """The clip, or why it is of no use."""
    path, frames = candidate
    try:
        clip = _reader(path, frames)
        return clip if len(clip) >= 2 else f"{len(clip)} frames, at least 2 needed"
    except Exception as error:  # whatever a damaged file raises, it must not end the indexing of the others
        return _reason(error)


def _reader(path: Path, frames: list[str]) -> Reader:
    if frames:
        return FrameFolder(path, frames)
    return PackedClip(path) if path.name.lower().endswith(PACKED_ENDING) else Video(path)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _several_folders(names: Iterable[str]) -> bool:
    parts = [Path(name).parts for name in names]
    return len({part[0] for part in parts if len(part) > 1}) > 1
