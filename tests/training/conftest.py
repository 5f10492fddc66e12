"""A tiny recipe on synthetic heads, and what a run of it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dagan_rt.training import loop
from dagan_rt.training.recipe import Recipe, parse_recipe
from dagan_rt.training.saving import latest_checkpoint

TAIL = """
[data]
kind = "heads"
cache = "{cache}"
identities = 3
frames = 4
held_out = 2
held_out_pairs = 2
[training]
batch = 2
learning_rate = 1e-3
threads = 1
log_every = 1
checkpoint_every = 3
sheet_every = 6
evaluate_every = 6
[losses]
perceptual = 0
keypoint_distance = 0
generator_gan = 0
feature_matching = 0
pixel = 10
landmark = 10
disparity = {disparity}
[[stage]]
name = "coarse"
steps = 4
[[stage]]
name = "fine"
steps = 2
size = 64
motion_scale = 0.25
schedule = "cosine"
[stage.losses]
generator_gan = 1
feature_matching = 10
"""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="session")
def recipe_text(tiny_network: str) -> Callable[..., str]:
    """(cache, variant, points, disparity) -> the text of a recipe of two stages, six steps."""

    def text(cache: Path, variant: str = "dagan", points: int = 15, disparity: float = 5) -> str:
        network = f'[network]\nvariant = "{variant}"\nnum_keypoints = {points}\n{tiny_network}'
        return network + TAIL.format(cache=cache, disparity=disparity)

    return text


@pytest.fixture(scope="session")
def recipe(cache: Path, recipe_text: Callable[..., str]) -> Recipe:
    return parse_recipe(recipe_text(cache))


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Every tensor of a run's newest checkpoint, optimisers included, by its path."""
    return _weights


def _weights(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, optimisers included, by its path."""
    folder = latest_checkpoint(run)
    assert folder is not None
    found: dict[str, torch.Tensor] = {}

    def walk(value: object, name: str) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, entry in value.items():
                walk(entry, f"{name}/{key}")

    for file in sorted(folder.rglob("*.*")):
        if file.is_file():
            walk(torch.load(file, weights_only=True), file.name)
    return found


@pytest.fixture(scope="session")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, loop.Outcome]:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole")
    return run, loop.train(recipe, run, progress=False)
