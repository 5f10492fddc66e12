"""A portrait and clips, as somebody would give them to the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dagan_rt.training.heads import HELD_OUT, draw_clip

from ..clips import write_clip

RATE = 25


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files by name: portrait, clip, and those of people who do not know what a portrait or a clip is."""
    folder = tmp_path_factory.mktemp("given")
    portrait = np.pad(draw_clip(HELD_OUT[0], 1, 64).frames[0], [(0, 0), (20, 10), (0, 0)])
    Image.fromarray(portrait).save(folder / "portrait.png")
    frames = list(draw_clip(HELD_OUT[1], 8, 64).frames)
    write_clip(folder / "clip.mp4", frames, sound=True)
    write_clip(folder / "long.mp4", [frames[0]] * (4 * RATE))
    write_clip(folder / "faceless.mp4", [np.full((64, 64, 3), 90, np.uint8)] * 6, sound=True)
    (folder / "text.png").write_text("not a picture")
    (folder / "broken.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:400])
    return {path.name.split(".")[0]: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def make_clip() -> Any:
    """`make_clip(path, images, sound=False, rate=25)`."""
    return write_clip
