"""Two hundred malformed portraits and clips give two hundred errors that name the file, and leave nothing behind."""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dagan_rt.cli import main

IMAGES = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
VIDEOS = {"mp4": "libx264", "mkv": "libx264", "avi": "mpeg4", "webm": "libvpx", "mov": "mpeg4"}
EACH = 100  # of images and of videos


class Copying:
    """Plays the model: answers a frame with itself."""

    size, backend_name, backend_reason = 16, "copying", "given"
    frames = SimpleNamespace(ahead=1)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def set_source(self, image: np.ndarray) -> None: ...

    def submit(self, frame: np.ndarray) -> Any:
        return SimpleNamespace(result=lambda: frame[None])

    def __enter__(self) -> Copying:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A good file of each kind."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    files = {}
    for ending, kind in IMAGES.items():
        file = io.BytesIO()
        Image.fromarray(noise[0]).save(file, kind)
        files[ending] = file.getvalue()
    for ending, codec in VIDEOS.items():
        path = tmp_path_factory.mktemp("whole") / f"clip.{ending}"
        with av.open(str(path), "w") as output:
            stream: Any = output.add_stream(codec, rate=Fraction(25))
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for image in noise:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            output.mux(stream.encode())
        files[ending] = path.read_bytes()
    return files


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """The file cut off, its head lost, stretches overwritten, or something else altogether."""
    kind, spoiled = rng.integers(7), bytearray(data)
    if kind == 0:
        return data[: int(rng.integers(len(data)))]
    if kind == 1:
        return data[int(rng.integers(1, 64)) :]
    if kind == 2:
        return rng.bytes(int(rng.integers(1, 4000)))
    if kind == 3:
        return b"\0" * int(rng.integers(1, 4000))
    if kind == 4:  # the head, where sizes and counts stand
        for place in rng.integers(0, min(len(data), 200), 12):
            spoiled[place] = rng.integers(256)
    elif kind == 5:
        start = int(rng.integers(len(data)))
        spoiled[start : start + 300] = rng.bytes(len(spoiled[start : start + 300]))
    else:
        for place in rng.integers(0, len(data), max(4, len(data) // 20)):
            spoiled[place] ^= 1 << rng.integers(8)
    return bytes(spoiled)


def malformed(whole: dict[str, bytes], endings: list[str], seed: int) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(seed)
    while True:
        ending = endings[int(rng.integers(len(endings)))]
        yield ending, damage(whole[ending], rng)


@pytest.mark.parametrize("option", ["source", "driving"])
def test_each_is_one_sentence(
    option: str,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Some damage does no harm, and the file goes through; what is refused is counted up to `EACH`."""
    monkeypatch.setattr("dagan_rt.reenactor.Reenactor", Copying)
    files = {"source": tmp_path / "good.png", "driving": tmp_path / "good.mp4"}
    files["source"].write_bytes(whole["png"])
    files["driving"].write_bytes(whole["mp4"])
    (tmp_path / "out").mkdir()
    outcomes: Counter[int] = Counter()
    for number, (ending, data) in enumerate(malformed(whole, list(IMAGES if option == "source" else VIDEOS), seed=1)):
        if outcomes[2] == EACH:
            break
        bad = tmp_path / f"bad{number}.{ending}"
        bad.write_bytes(data)
        given = files | {option: bad}
        words = ["animate", "--bundle", "bundle", "--out", str(tmp_path / "out" / "out.mp4")]
        code = main([*words, "--source", str(given["source"]), "--driving", str(given["driving"])])
        said = capfd.readouterr().err
        outcomes[code] += 1
        assert code in (0, 2), f"{bad.name}: {code} {said}"
        if code == 2:
            lines = said.strip().splitlines()
            assert (
                len(lines) == 1 and bad.name in lines[0] and re.match(r"dagan-rt: error: (image|video) ", lines[0])
            ), said
            assert len(lines[0]) < 400 + len(str(bad)) and lines[0].isprintable()
            assert os.listdir(tmp_path / "out") == []
        else:
            with av.open(str(tmp_path / "out" / "out.mp4")) as container:
                assert next(container.decode(video=0)).width == 16
            (tmp_path / "out" / "out.mp4").unlink()
        bad.unlink()
    assert outcomes[2] == EACH and sum(outcomes.values()) < 3 * EACH
