"""Videos as clips: any frame, found by the time it is shown at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dagan_rt.files import open_input
from dagan_rt.training.data.protocol import BadClip
from dagan_rt.training.data.readers import LARGEST_SIDE


class Video:
    """A video file; its frames are in the order they are shown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        open_input(path, "video").close()
        times, keys = _presentation_times(path)
        self._times, self._keys = np.array(times, np.int64), np.array(keys, np.int64)

    def __len__(self) -> int:
        return len(self._times)

    def frame_name(self, frame: int) -> str:
        """As the published test pairs name the frames of a video, by their number."""
        return f"{frame:07d}.png"

    def read(self, frames: Sequence[int]) -> list[np.ndarray]:
        return _decode(self.path, self._times[list(frames)].tolist(), self._keys)


def _presentation_times(path: Path) -> tuple[list[int], list[int]]:
    """Of all frames, and of the key frames among them; sorted."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if max(stream.width, stream.height) > LARGEST_SIDE:
                raise BadClip(f"frames of {stream.width} × {stream.height}, at most {LARGEST_SIDE} a side")
            packets = {packet.pts: packet.is_keyframe for packet in container.demux(stream) if packet.pts is not None}
            return sorted(packets), sorted(time for time, key in packets.items() if key)
    except (av.FFmpegError, IndexError, OSError) as error:
        raise BadClip(f"not a readable video: {error}") from None


def _decode(path: Path, times: Sequence[int], keys: np.ndarray) -> list[np.ndarray]:
    """The frames shown at `times`, each decoded from the key frame before it, or on from the one found before."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # the loader has its own threads; these would be started for each clip
        frames: Any = container.decode(stream)
        found: dict[int, np.ndarray] = {}
        before = None
        try:
            for time in sorted(set(times)):
                image = None
                if before is not None and not ((keys > before) & (keys <= time)).any():
                    image = _at(frames, time)
                for start in (time, 0):  # some containers seek past the frame: then decode from the start
                    if image is None:
                        container.seek(start, stream=stream, backward=True)
                        frames = container.decode(stream)
                        image = _at(frames, time)
                if image is None:
                    raise BadClip(f"no frame at time {time}")
                found[time], before = image, time
        finally:
            frames.close()  # while the container that it reads is open
    return [found[time] for time in times]


def _at(frames: Iterator[Any], time: int) -> np.ndarray | None:
    """The frame shown at `time`, of frames in that order; None if there is none."""
    from dagan_rt.video import upright_rgb

    for frame in frames:
        if frame.pts == time:
            return upright_rgb(frame)
        if frame.pts is not None and frame.pts > time:
            return None
    return None
