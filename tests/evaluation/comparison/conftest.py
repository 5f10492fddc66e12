"""A folder of recipes like train/recipes/table1*.toml, but tiny."""

from __future__ import annotations

from pathlib import Path

import pytest

BASE = """
[network]
{network}
[data]
kind = "heads"
cache = "{cache}"
identities = 2
frames = 3
held_out = 0
workers = 1
[training]
batch = 2
learning_rate = 1e-3
threads = 1
tensorboard = false
[losses]
perceptual = 0
keypoint_distance = 0
generator_gan = 0
feature_matching = 0
equivariance_value = 0
equivariance_jacobian = 0
pixel = 10
[[stage]]
name = "all"
steps = 2
networks = ["generator", "keypoints"]
"""
DEPTH = """
base = "table1.toml"
[losses]
pixel = 0
[[stage]]
name = "depth"
steps = 1
networks = ["depth", "pose"]
neighbours = 1
losses = { photometric = 1.0, smoothness = 1e-3 }
"""


@pytest.fixture(scope="session")
def recipes(tmp_path_factory: pytest.TempPathFactory, tiny_network: str) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "table1.toml").write_text(BASE.format(network=tiny_network, cache=(folder / "cache").as_posix()))
    (folder / "table1-depth.toml").write_text(DEPTH)
    for variant, points in (("baseline", 15), ("fomm", 10), ("dagan_sa", 15), ("dagan", 15)):
        text = f'base = "table1.toml"\n[network]\nvariant = "{variant}"\nnum_keypoints = {points}\n'
        (folder / f"table1-{variant}.toml").write_text(text)
    return folder
