"""What is measured on faces never trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dagan_rt.errors import InputError
from dagan_rt.training.data import BadClip, Frame, HeadsData
from dagan_rt.training.held_out import ReliefScore, evaluate, evaluate_depth
from dagan_rt.training.recipe import Recipe


class Known(nn.Module):
    """A depth network that knows the truth of the pictures it is shown, and bends it."""

    def __init__(self, clips: HeadsData, bend: Any) -> None:
        super().__init__()
        self.weight, self.bend = nn.Parameter(torch.zeros(1)), bend
        self.frames = [frame for clip in range(len(clips)) for frame in clips.read(clip, range(clips.frames))]

    def forward(self, image: Tensor) -> Tensor:
        shown = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
        truth = next(frame.disparity for frame in self.frames if np.array_equal(frame.image, shown))
        assert truth is not None
        return torch.from_numpy(self.bend(truth)).float()[None, None]


class Holder(nn.Module):
    def __init__(self, depth: nn.Module) -> None:
        super().__init__()
        self.depth = depth


@pytest.fixture(scope="module")
def heads(cache: Path) -> HeadsData:
    return HeadsData(range(1_000_000, 1_000_002), 4, 64, cache=cache, progress=False)


@pytest.mark.parametrize(
    ("bend", "correlation"),
    [(lambda truth: 0.3 * truth + 0.1, 1.0), (lambda truth: 1 - truth, -1.0), (lambda truth: 0 * truth + 0.5, 0.0)],
)
def test_relief_is_judged_whatever_its_unit(heads: HeadsData, bend: Any, correlation: float) -> None:
    score = evaluate_depth(Holder(Known(heads, bend)), heads, 2)  # type: ignore[arg-type]
    assert score is not None and score.correlation == pytest.approx(correlation, abs=1e-4)
    assert score.ratio == pytest.approx(0.0 if correlation == 1 else 1.0, abs=0.02)


def test_the_ratio_is_that_of_the_fitted_disparity_to_a_flat_one() -> None:
    rng = np.random.default_rng(0)
    truth, found = rng.normal(size=500), rng.normal(size=500)
    found += 0.7 * truth
    fitted = np.polyval(np.polyfit(found, truth, 1), found)
    score = ReliefScore(float(np.corrcoef(found, truth)[0, 1]))
    assert score.ratio == pytest.approx(np.std(truth - fitted) / np.std(truth), rel=1e-9)


class Unreadable:
    size = 32

    def __len__(self) -> int:
        return 2

    def frame_count(self, clip: int) -> int:
        return 3

    def name(self, clip: int) -> str:
        return f"clip {clip}"

    def identity(self, clip: int) -> str:
        return self.name(clip)

    def read(self, clip: int, frames: Any) -> list[Frame]:
        raise BadClip("gone")


def test_where_nothing_can_be_read_it_says_so(recipe: Recipe) -> None:
    from dagan_rt.networks.model import Model

    with pytest.raises(InputError, match="no held-out clip can be read"), pytest.warns(UserWarning, match="gone"):
        evaluate(Model(recipe.network), Unreadable(), 2)


def test_without_truth_there_is_no_score_of_depth(recipe: Recipe, heads: HeadsData) -> None:
    class Pictures(Unreadable):
        size = 64

        def read(self, clip: int, frames: Any) -> list[Frame]:
            return [Frame(frame.image) for frame in heads.read(clip, frames)]

    assert evaluate_depth(Holder(Known(heads, lambda truth: truth)), Pictures(), 2) is None  # type: ignore[arg-type]
