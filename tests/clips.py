"""Small clips for tests."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

SOUND_RATE = 48000


def write_clip(path: Path, images: Sequence[np.ndarray], sound: bool = False, rate: int = 25, **options: Any) -> Path:
    """H.264 that is nearly `images`, with a tone of AAC as long as they are; `options` of `av.open`."""
    with av.open(str(path), "w", **options) as output:
        stream: Any = output.add_stream("libx264", rate=Fraction(rate), options={"crf": "5"})
        stream.height, stream.width, _ = images[0].shape
        stream.pix_fmt = "yuv420p"
        tone: Any = output.add_stream("aac", rate=SOUND_RATE, layout="mono") if sound else None
        for image in images:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode())
        if sound:
            samples = np.sin(np.arange(SOUND_RATE * len(images) // rate) * 0.05).astype(np.float32)[None] / 2
            block = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            block.sample_rate, block.pts = SOUND_RATE, 0
            output.mux(tone.encode(block))
            output.mux(tone.encode())
    return path
