"""Sampling of image sets: the published counts, no repetition, and the same sets whatever the clips' order."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagan_rt.errors import InputError
from dagan_rt.evaluation.sets import sample_cross, sample_self, sample_sets


def vox(fake_clips, clips: int = 130, people: int = 11):
    rng = np.random.default_rng(5)
    return fake_clips({f"id{i % people}#v{i}#0-9.mp4": int(rng.integers(60, 900)) for i in range(clips)})


def named(clips, sets):
    return [(clips.name(it.source_clip), it.source_frame, clips.name(it.driving_clip), it.driving_frame) for it in sets]


def test_self_sets_are_2083_of_100_videos(fake_clips) -> None:
    clips = vox(fake_clips)
    found = sample_sets(clips, "self")
    assert len(found.sets) == len(set(found.sets)) == 2083 and found.notes == ()
    counts = Counter(it.source_clip for it in found.sets)
    assert len(counts) == 100 and set(counts.values()) == {20, 21}
    for it in found.sets:
        assert it.source_clip == it.driving_clip and it.source_frame != it.driving_frame
        assert 0 <= min(it.source_frame, it.driving_frame) <= max(it.source_frame, it.driving_frame)
        assert max(it.source_frame, it.driving_frame) < clips.frame_count(it.source_clip)


def test_cross_sets_are_2000_of_different_people_uniformly(fake_clips) -> None:
    clips = vox(fake_clips)
    found = sample_sets(clips, "cross")
    assert len(found.sets) == len(set(found.sets)) == 2000 and found.notes == ()
    pairs = Counter((clips.identity(it.source_clip), clips.identity(it.driving_clip)) for it in found.sets)
    assert all(one != other for one, other in pairs)
    # 110 ordered pairs of people, 18.2 sets each expected: chi-square of 109 degrees of freedom, mean 109, σ 14.8.
    expected = 2000 / 110
    chi_square = sum((pairs[one, other] - expected) ** 2 / expected for one, other in pairs) + expected * (
        110 - len(pairs)
    )
    assert 109 - 5 * 14.8 < chi_square < 109 + 5 * 14.8


@pytest.mark.parametrize("mode", ["self", "cross"])
def test_sets_depend_on_names_and_seed_alone(fake_clips, mode: str) -> None:
    clips = vox(fake_clips, 20, 5)
    order = np.random.default_rng(1).permutation(len(clips))
    shuffled = fake_clips({clips.names[i]: clips.counts[i] for i in order})
    one, other = (sample_sets(it, mode, sets=200, videos=9, seed=3) for it in (clips, shuffled))
    assert named(clips, one.sets) == named(shuffled, other.sets)
    assert sample_sets(clips, mode, sets=200, videos=9, seed=4).sets != one.sets
    assert len({it.source_clip for it in one.sets}) == 9


def test_fewer_clips_than_asked_are_all_used_and_told(fake_clips) -> None:
    clips = fake_clips({"a#1": 2, "b#1": 3, "c#1": 1})
    found = sample_self(clips)
    assert sorted((it.source_clip, it.source_frame, it.driving_frame) for it in found.sets) == [
        (0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 0, 2), (1, 1, 0), (1, 1, 2), (1, 2, 0), (1, 2, 1),
    ]  # fmt: skip
    assert [note.split(" were")[0] for note in found.notes] == ["100 clips", "2083 image sets"]
    crossed = sample_cross(clips)
    brute = {
        (s, i, d, j)
        for s in range(3) for d in range(3) if s != d for i in range(clips.counts[s]) for j in range(clips.counts[d])
    }  # fmt: skip
    assert {(it.source_clip, it.source_frame, it.driving_clip, it.driving_frame) for it in crossed.sets} == brute
    assert len(crossed.sets) == len(brute) and "2000 image sets" in crossed.notes[0]


def test_a_short_clip_leaves_its_share_to_the_others(fake_clips) -> None:
    clips = fake_clips({"a#1": 2, "b#1": 100, "c#1": 100})
    counts = Counter(it.source_clip for it in sample_self(clips, sets=52, videos=3).sets)
    assert counts == {0: 2, 1: 25, 2: 25}


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=8), sets=st.integers(1, 300), videos=st.integers(1, 10),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_counts(fake_clips, counts: list[int], sets: int, videos: int, seed: int) -> None:
    clips = fake_clips({f"p{i // 2}#{i}": count for i, count in enumerate(counts)})
    usable = [count for count in counts if count > 1]
    if usable:
        found = sample_self(clips, sets, videos, seed)
        assert len(found.sets) == len(set(found.sets)) <= sets
        assert all(it.source_clip == it.driving_clip and it.source_frame != it.driving_frame for it in found.sets)
        if len(usable) <= videos:
            assert len(found.sets) == min(sets, sum(count * (count - 1) for count in usable))
    else:
        with pytest.raises(InputError, match="two frames"):
            sample_self(clips, sets, videos, seed)
    if len(counts) > 2:
        crossed = sample_cross(clips, sets, seed)
        assert len(crossed.sets) == len(set(crossed.sets)) <= sets
        assert all(clips.identity(it.source_clip) != clips.identity(it.driving_clip) for it in crossed.sets)
        assert all(it.source_frame < counts[it.source_clip] for it in crossed.sets)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda clips: sample_sets(clips, "both"), "mode must be self or cross"),
        (lambda clips: sample_self(clips, sets=0), "sets must be from 1"),
        (lambda clips: sample_self(clips, videos=10**9), "videos must be from 1"),
        (lambda clips: sample_cross(clips), "at least two identities"),
    ],
)
def test_wrong_requests(fake_clips, call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(fake_clips({"a#1": 5, "a#2": 5}))
