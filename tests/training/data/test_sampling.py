"""Samples: what they hold, and that they depend on nothing but their number."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagan_rt.errors import InputError
from dagan_rt.training.augment import colour_matrix, jitter
from dagan_rt.training.data import Augmentation, ClipFolder, HeadsData, Loader, sample, sample_triple

PLAIN = Augmentation.none()


def place(image: np.ndarray) -> int:
    """The frame's number that `pictures` writes into its blue channel."""
    return round(float(image[2].mean()) * 255) % 16


def test_a_sample_is_a_function_of_its_number_alone(clips: ClipFolder, drawn: HeadsData) -> None:
    for data in (clips, drawn):
        first = sample(data, Augmentation(), 3, 1, 5)
        sample(data, Augmentation(), 3, 1, 6)
        again = sample(data, Augmentation(), 3, 1, 5)
        assert all(np.array_equal(first[name], again[name]) for name in first)
        for other in ((4, 1, 5), (3, 2, 5), (3, 1, 5 + len(data))):
            assert not np.array_equal(first["source"], sample(data, Augmentation(), *other)["source"])


def test_a_sample_has_two_different_frames_of_one_clip(clips: ClipFolder) -> None:
    pairs = set()
    for index in range(0, 160, 4):  # always clip a.mp4
        item = sample(clips, PLAIN, 0, 0, index)
        assert item["source"].shape == (3, 16, 16) and item["source"].dtype == np.float32
        levels = [round((float(item[name].mean()) * 255 - 10) / 20) for name in ("source", "driving")]
        assert levels[0] != levels[1] and all(0 <= level < 12 for level in levels)
        pairs.add(tuple(levels))
    assert len(pairs) > 20


def test_mirrored_heads_keep_landmarks_and_disparity_on_the_face(drawn: HeadsData) -> None:
    flipping = Augmentation(flip=True, time_flip=False, jitter=0)
    flipped = 0
    for index in range(0, 30, 3):
        plain, item = sample(drawn, Augmentation(False, False, 0), 0, 0, index), sample(drawn, flipping, 0, 0, index)
        if np.array_equal(plain["source"], item["source"]):
            continue
        flipped += 1
        for name in ("source", "driving"):
            assert np.array_equal(item[name], plain[name][:, :, ::-1])
            assert np.array_equal(item[f"{name}_disparity"], plain[f"{name}_disparity"][:, :, ::-1])
            got, before = item[f"{name}_landmarks"], plain[f"{name}_landmarks"]
            # Each landmark lies on the mirrored place of its partner: the jaw still runs from left to right.
            assert np.array_equal(got[16], before[0] * [-1, 1]) and np.array_equal(got[36], before[45] * [-1, 1])
            assert np.sign(got[16, 0] - got[0, 0]) == np.sign(before[16, 0] - before[0, 0])
    assert 0 < flipped < 10


def test_a_share_of_pairs_stands_still(drawn: HeadsData) -> None:
    still = Augmentation(flip=True, time_flip=True, jitter=0.1, still=0.5)
    pairs = [sample(drawn, still, 0, 0, index) for index in range(60)]
    same = [
        all(np.array_equal(pair[f"source{end}"], pair[f"driving{end}"]) for end in ("", "_landmarks")) for pair in pairs
    ]
    assert 15 < sum(same) < 45
    moving = [sample(drawn, Augmentation(), 0, 0, index) for index in range(20)]
    assert not any(np.array_equal(pair["source"], pair["driving"]) for pair in moving)


@pytest.mark.parametrize(
    ("augmentation", "digest"),
    [
        (PLAIN, "4d53f5055d1bbd14"),
        (Augmentation(jitter=0), "e805d858dfc48c82"),
        (Augmentation(jitter=0, still=0.4), "8cbd3c23e1f1f910"),
        (Augmentation(flip=False, jitter=0, still=0.4), "75b7c43ebffe55ae"),
    ],
)
def test_batches_are_what_they_always_were(pictures: Any, augmentation: Augmentation, digest: str) -> None:
    """Runs that were begun with an earlier release continue with the batches that it would have seen."""
    loader, seen = Loader(pictures([2, 3, 7]), 4, 7, augmentation, repeats=3), hashlib.sha256()
    for step in range(6):
        for name, array in loader.batch(step).items():
            seen.update(name.encode() + array.tobytes())
    assert seen.hexdigest()[:16] == digest


def test_what_replaces_bad_clips_is_what_it_always_was(pictures: Any) -> None:
    clips, seen = pictures([2, 3, 7, 4]), hashlib.sha256()
    clips.bad, clips.bad_frames = {1}, {(2, 3)}
    loader = Loader(clips, 4, 7, PLAIN, repeats=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(6):
            seen.update(b"".join(array.tobytes() for array in loader.batch(step).values()))
    assert seen.hexdigest()[:16] == "e51e4dc682c56bff"


def test_jittered_batches_are_what_they_always_were(pictures: Any) -> None:
    loader = Loader(pictures([2, 3, 7]), 4, 7, Augmentation(), repeats=3)
    means = [float(loader.batch(step)[name].mean(dtype=float)) for step in range(3) for name in ("source", "driving")]
    assert means == pytest.approx(
        [0.3852966, 0.365425, 0.3903787, 0.3848178, 0.3643185, 0.3671888], abs=2e-6
    )  # products of matrices may round otherwise elsewhere


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=5), st.integers(1, 20), st.integers(0, 999))
def test_a_triple_is_three_frames_of_one_clip_in_order(counts: list[int], neighbours: int, seed: int) -> None:
    clips = triples_of(counts)
    if max(counts) < 3:
        with pytest.raises(InputError, match="no clip has three frames"):
            sample_triple(clips, PLAIN, seed, 0, 0, neighbours)
        return
    for index in range(2 * len(counts)):
        item = sample_triple(clips, PLAIN, seed, 0, index, neighbours)
        assert list(item) == ["target", "before", "after", "target_disparity"]
        marks = [round(float(item[name][2].mean()) * 255) for name in ("before", "target", "after")]
        (clip,) = {mark // 16 for mark in marks}
        first, middle, last = (mark % 16 for mark in marks)
        assert 0 <= first < middle < last < counts[clip]
        assert middle - first <= neighbours and last - middle <= neighbours
        assert clip == index % len(counts) or counts[index % len(counts)] < 3
        assert np.array_equal(item["target_disparity"][0], clips.frames[clip][middle].disparity)


def triples_of(counts: list[int]) -> Any:
    from collections import namedtuple

    frame = namedtuple("frame", "image disparity landmarks")
    rng = np.random.default_rng(1)

    class Marked:
        size = 4
        frames = [
            [
                frame(np.full((4, 4, 3), 16 * c + n, np.uint8), rng.random((4, 4), np.float32), None)
                for n in range(count)
            ]
            for c, count in enumerate(counts)
        ]

        def __len__(self) -> int:
            return len(counts)

        def frame_count(self, clip: int) -> int:
            return counts[clip]

        def read(self, clip: int, frames: list[int]) -> list[Any]:
            return [self.frames[clip][number] for number in frames]

    return Marked()


def test_all_triples_that_a_clip_has_are_drawn(pictures: Any) -> None:
    clips, neighbours = pictures([6]), 2
    drawn = set()
    for index in range(400):
        item = sample_triple(clips, PLAIN, 0, 0, index, neighbours)
        drawn.add(tuple(place(item[name]) for name in ("before", "target", "after")))
    gaps = range(1, neighbours + 1)
    assert drawn == {(t - b, t, t + a) for t in range(6) for b in gaps for a in gaps if t - b >= 0 and t + a < 6}


def test_the_frames_of_a_triple_are_changed_alike(pictures: Any) -> None:
    """Against every way that a mirror, a swap in time and one jitter could have made of some three frames."""
    clips, seen = pictures([5]), set()
    for index in range(60):
        item = sample_triple(clips, Augmentation(jitter=0), 3, 0, index, 4)
        order = [place(item[name]) for name in ("before", "target", "after")]
        whole = [clips.frames[0][number].image.transpose(2, 0, 1) / np.float32(255) for number in order]
        plain = all(np.array_equal(item[n], w) for n, w in zip(("before", "target", "after"), whole, strict=True))
        mirrored = all(
            np.array_equal(item[n], w[:, :, ::-1]) for n, w in zip(("before", "target", "after"), whole, strict=True)
        )
        disparity = clips.frames[0][order[1]].disparity
        assert np.array_equal(item["target_disparity"][0], disparity[:, ::-1] if mirrored else disparity)
        assert plain != mirrored and sorted(order) in (order, order[::-1])
        seen.add((mirrored, order[0] < order[1]))
    assert len(seen) == 4


def test_a_triple_has_one_jitter(pictures: Any) -> None:
    clips = pictures([3])
    only_jitter = Augmentation(flip=False, time_flip=False, jitter=0.1)
    plain, item = (sample_triple(clips, how, 5, 0, 0, 1) for how in (PLAIN, only_jitter))
    rng = np.random.default_rng([5, 0, 0])
    rng.integers(1, 2), rng.integers(1, 2), rng.integers(1, 2)  # the frames
    matrix, contrast = colour_matrix(rng, 0.1)
    for name in ("target", "before", "after"):
        expected = jitter(plain[name].transpose(1, 2, 0), matrix, contrast).transpose(2, 0, 1)
        assert item[name] == pytest.approx(expected, abs=1e-6)


def test_triples_do_not_stand_still(pictures: Any) -> None:
    clips = pictures([4])
    for index in range(20):
        item = sample_triple(clips, Augmentation(still=1.0), 0, 0, index, 2)
        assert not np.array_equal(item["target"], item["before"])
