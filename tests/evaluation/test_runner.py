"""Whole evaluations: what is averaged, what counts as failed or unreadable, and what is given to whom."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.evaluation import ImageSet, RepeatSource, TorchReenactment, evaluate, sample_cross, sample_self


class Colour:
    """Finds the mean colour of a picture, and no face in one that is dark."""

    def __init__(self, kind: str, darkest: float = 0.0, noise: dict[str, float] | None = None) -> None:
        self.kind, self.name, self.noise, self.darkest, self.asked = kind, f"colour {kind}", noise or {}, darkest, 0

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.asked += len(images)
        means = images.astype(np.float64).mean((1, 2))
        found = means.mean(1) >= self.darkest
        values = {
            "landmarks": means[:, None, :2], "identity": means / np.linalg.norm(means, axis=1, keepdims=True),
            "pose": means, "actions": (means >= 128).astype(float),
        }[self.kind]  # fmt: skip
        return np.where(found.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan), found


def test_every_metric_of_repeating_the_source(fake_clips) -> None:
    clips = fake_clips({f"p{i}#0": 5 for i in range(4)})
    extractors = {kind: Colour(kind) for kind in ("landmarks", "identity", "pose", "actions")}
    sets = sample_self(clips, 30).sets
    found = evaluate(RepeatSource(), clips, sets, extractors, "self", batch=7, progress=False)
    assert list(found.scores) == ["l1", "ssim", "psnr", "akd", "aed"] and list(found.absent) == ["lpips"]
    assert extractors["landmarks"].asked == 60 and extractors["pose"].asked == 0
    l1, akd = [], []
    for it in sets:
        source, driving = (
            clips.read(it.source_clip, [frame])[0].image for frame in (it.source_frame, it.driving_frame)
        )
        l1.append(np.abs(source.astype(float) - driving).mean() / 255)
        akd.append(math.dist(source.mean((0, 1))[:2], driving.mean((0, 1))[:2]))
    assert found.scores["l1"].mean == pytest.approx(np.mean(l1)) and found.scores["l1"].count == 30
    assert (
        found.scores["akd"].mean == pytest.approx(np.mean(akd)) and found.scores["akd"].extractor == "colour landmarks"
    )
    assert [row["l1"] for row in found.rows] == pytest.approx(l1)
    assert found.rows[0]["source_identity"] == found.rows[0]["source_clip"].split("#")[0]

    crossed = sample_cross(clips, 20).sets
    found = evaluate(RepeatSource(), clips, crossed, extractors, "cross", batch=7, progress=False)
    assert list(found.scores) == ["csim", "prmse", "aucon"] and found.absent == {}
    assert found.scores["csim"].mean == pytest.approx(1)  # it is the source
    squares = []
    for it in crossed:
        source, driving = (clips.read(*place)[0].image.mean((0, 1)) for place in
                           ((it.source_clip, [it.source_frame]), (it.driving_clip, [it.driving_frame])))  # fmt: skip
        squares += ((source - driving) ** 2).tolist()
    assert found.scores["prmse"].mean == pytest.approx(math.sqrt(np.mean(squares)))


def test_batches_change_nothing(fake_clips) -> None:
    clips = fake_clips({f"p{i}#0": 5 for i in range(4)})
    sets, extractors = sample_self(clips, 23).sets, {"landmarks": Colour("landmarks")}
    one, other = (evaluate(RepeatSource(), clips, sets, extractors, batch=n, progress=False) for n in (1, 8))
    assert one.rows == other.rows and one.scores == other.scores


def test_failures_are_counted_and_never_averaged(fake_clips) -> None:
    clips = fake_clips({f"p{i}#0": 5 for i in range(4)})
    sets = sample_self(clips, 40).sets
    levels = [clips.read(it.driving_clip, [it.driving_frame])[0].image.mean() for it in sets]
    darkest = float(np.median(levels))
    extractors = {"landmarks": Colour("landmarks", darkest, {"akd": 1.5}), "identity": Colour("identity")}
    found = evaluate(RepeatSource(), clips, sets, extractors, progress=False)
    failed = [
        any(
            clips.read(it.source_clip, [frame])[0].image.mean() < darkest
            for frame in (it.source_frame, it.driving_frame)
        )
        for it in sets
    ]
    assert 0 < sum(failed) < 40
    akd = found.scores["akd"]
    assert (akd.failed, akd.count, akd.noise) == (sum(failed), 40 - sum(failed), 1.5)
    assert [row["akd"] is None for row in found.rows] == failed
    assert akd.mean == pytest.approx(np.mean([row["akd"] for row in found.rows if row["akd"] is not None]))
    assert found.scores["aed"].failed == 0 and found.scores["l1"].count == 40
    blind = evaluate(RepeatSource(), clips, sets[:3], {"landmarks": Colour("landmarks", 999)}, progress=False)
    assert math.isnan(blind.scores["akd"].mean) and blind.scores["akd"].failed == 3


def test_what_cannot_be_read_is_left_out_and_counted(fake_clips) -> None:
    clips = fake_clips({f"p{i}#0": 4 for i in range(5)}, broken=["p1#0", "p3#0"])
    sets = sample_cross(clips, 60).sets
    lost = [{"p1#0", "p3#0"} & {clips.name(it.source_clip), clips.name(it.driving_clip)} for it in sets]
    kept: list[int] = []
    found = evaluate(
        RepeatSource(), clips, sets, {"pose": Colour("pose")}, "cross", batch=4, progress=False,
        keep=lambda number, source, driving, generated: kept.append(number),
    )  # fmt: skip
    assert len(found.rows) == sum(not names for names in lost)
    assert kept == [number for number, names in enumerate(lost) if not names]
    assert sum(entry["sets"] for entry in found.unreadable.values()) == sum(bool(names) for names in lost)
    assert found.unreadable["p1#0"]["reason"] == "p1#0 is corrupt"
    everything = fake_clips({"a#0": 3, "b#0": 3}, broken=["a#0", "b#0"])
    with pytest.raises(InputError, match="no image set to evaluate: a#0 is corrupt"):
        evaluate(RepeatSource(), everything, [ImageSet(0, 0, 0, 1)], progress=False)


def test_relative_motion_gets_its_initial_frame(fake_clips) -> None:
    clips = fake_clips({"a#0": 9, "b#0": 9})
    seen: list[np.ndarray | None] = []

    def reenact(source: np.ndarray, driving: np.ndarray, initial: np.ndarray | None) -> np.ndarray:
        seen.append(initial)
        return driving

    sets = [ImageSet(0, 1, 1, 2), ImageSet(0, 1, 1, 2, 6)]
    evaluate(reenact, clips, sets, progress=False)
    reenact.relative = True  # type: ignore[attr-defined]
    found = evaluate(reenact, clips, sets, progress=False)
    assert seen[0] is None and found.scores["l1"].mean == 0
    assert np.array_equal(seen[1][0], clips.read(1, [0])[0].image)
    assert np.array_equal(seen[1][1], clips.read(1, [6])[0].image)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"mode": "both"}, "mode must be self or cross"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"mode": "cross"}, "nothing can be measured in cross mode: csim needs an extractor of identity"),
        ({"sets": []}, "no image set to evaluate: none was given"),
        ({"reenact": lambda source, driving, initial: driving / 255}, r"must give uint8 \[1, 32, 32, 3\], got float64"),
        ({"reenact": lambda source, driving, initial: driving[:, ::2]}, r"got uint8 \[1, 16, 32, 3\]"),
    ],
)
def test_wrong_requests(fake_clips, keywords: dict, message: str) -> None:
    given = {"reenact": RepeatSource(), "sets": [ImageSet(0, 0, 0, 1)], "progress": False} | keywords
    with pytest.raises(InputError, match=message):
        evaluate(given.pop("reenact"), fake_clips({"a#0": 3}), given.pop("sets"), **given)


def images(seed: int, count: int = 3) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


@pytest.mark.parametrize("variant", ["dagan", "fomm"])
def test_model_in_pytorch(tiny_model, variant: str) -> None:
    model = tiny_model(variant)
    source, driving, initial = images(0), images(1), images(2)
    absolute, relative = TorchReenactment(model), TorchReenactment(model, "relative")
    assert not model.training and not absolute.relative and relative.relative
    with torch.no_grad():
        planes = [torch.from_numpy(it).permute(0, 3, 1, 2).float() / 255 for it in (source, driving)]
        expected = np.rint(model(*planes).prediction.permute(0, 2, 3, 1).numpy() * 255)
    assert np.array_equal(absolute(source, driving, None), expected)
    # A face that has not moved since its first frame leaves the source's own points.
    assert abs(relative(source, driving, driving).astype(int) - absolute(source, source, None)).max() <= 1
    # And one that began as the source stands ends where absolute motion does.
    assert abs(relative(source, driving, source).astype(int) - absolute(source, driving, None)).max() <= 1
    assert abs(absolute(source, driving, None).astype(int) - absolute(source, source, None)).max() > 5
    assert abs(relative(source, driving, initial).astype(int) - relative(source, initial, driving)).max() > 5
    moved = relative(source, driving, initial)
    assert (moved != relative(source, initial, initial)).any()
    # Each of a batch as if alone.
    alone = np.concatenate([relative(*(it[i : i + 1] for it in (source, driving, initial))) for i in range(3)])
    assert abs(moved.astype(int) - alone).max() <= 1
    with pytest.raises(InputError, match="needs the initial frames"):
        relative(source, driving, None)
    with pytest.raises(InputError, match="motion must be"):
        TorchReenactment(model, "sideways")


def test_movement_scale_is_that_of_each_set(tiny_model) -> None:
    model = tiny_model("fomm")
    source, driving, initial = images(0), images(1), images(2)
    scaled = TorchReenactment(model, "relative", adapt_scale=True)
    together = scaled(source, driving, initial)
    assert (together != TorchReenactment(model, "relative")(source, driving, initial)).any()
    alone = np.concatenate([scaled(*(it[i : i + 1] for it in (source, driving, initial))) for i in range(3)])
    assert abs(together.astype(int) - alone).max() <= 1 and scaled.unscaled == 0
    torch.nn.init.zeros_(model.keypoints.kp.weight)  # every heat map is flat: all points in one place
    torch.nn.init.zeros_(model.keypoints.kp.bias)
    scaled(source, driving, initial)
    assert scaled.unscaled == 3
    clips_note = evaluate(scaled, _Still(), [ImageSet(0, 0, 0, 1)], progress=False).notes
    assert "4 sets were driven at scale 1" in clips_note[0]


class _Still:
    size = 32

    def __len__(self) -> int:
        return 1

    def name(self, clip: int) -> str:
        return "still"

    identity = name

    def frame_count(self, clip: int) -> int:
        return 2

    def read(self, clip: int, frames: list[int]) -> list:
        from dagan_rt.training.data import Frame

        return [Frame(images(frame, 1)[0]) for frame in frames]
