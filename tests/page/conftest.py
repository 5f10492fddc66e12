"""A portrait and clips, as somebody would give them to the page."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dagan_rt.training.heads import HELD_OUT, draw_clip

RATE = 25


def write_clip(path: Path, images: list[np.ndarray], sound: bool = True, rate: int = RATE) -> Path:
    """H.264 and a tone of AAC, as long as the pictures."""
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("libx264", rate=rate, options={"crf": "5"})
        stream.height, stream.width, _ = images[0].shape
        stream.pix_fmt = "yuv420p"
        tone: Any = output.add_stream("aac", rate=16000, layout="mono") if sound else None
        for image in images:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode())
        if tone is not None:
            samples = np.sin(np.arange(16000 * len(images) // rate) / 8).astype(np.float32)[None] / 4
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), 0
            for piece in [*_split(frame), None]:
                output.mux(tone.encode(piece))
    return path


def _split(frame: Any) -> list[Any]:
    fifo = av.AudioFifo()
    fifo.write(frame)
    return list(fifo.read_many(1024, partial=True))


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files by name: portrait, clip, and those of people who do not know what a portrait or a clip is."""
    folder = tmp_path_factory.mktemp("given")
    portrait = np.pad(draw_clip(HELD_OUT[0], 1, 64).frames[0], [(0, 0), (20, 10), (0, 0)])
    Image.fromarray(portrait).save(folder / "portrait.png")
    frames = list(draw_clip(HELD_OUT[1], 8, 64).frames)
    write_clip(folder / "clip.mp4", frames)
    write_clip(folder / "long.mp4", [frames[0]] * (4 * RATE), sound=False)
    write_clip(folder / "faceless.mp4", [np.full((64, 64, 3), 90, np.uint8)] * 6)
    (folder / "text.png").write_text("not a picture")
    (folder / "broken.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:400])
    return {path.name.split(".")[0]: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def make_clip() -> Any:
    """`make_clip(path, images, sound=True, rate=25)`."""
    return write_clip
