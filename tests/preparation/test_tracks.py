"""Tracking, cutting and cropping: boxes in, stretches and squares out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dagan_rt.faces import Face, overlaps
from dagan_rt.preparation.scenes import Cuts
from dagan_rt.preparation.tracks import STAYS, Track, Tracker, smooth, spans, square


def face(left: float, top: float = 20, side: float = 40) -> Face:
    return Face(np.array([left, top, left + side, top + side], np.float32), 0.9)


def test_two_people_are_two_tracks_whatever_the_order_of_detections() -> None:
    tracker = Tracker()
    for frame in range(0, 40, 5):
        faces = [face(20 + frame / 4), face(150 - frame / 4)]
        tracker.update(frame, faces[:: 1 if frame % 10 else -1])
    tracks = tracker.finish(43)
    assert len(tracks) == 2 and all(track.held == 42 and track.frames == list(range(0, 40, 5)) for track in tracks)
    assert {tuple(np.sign(np.diff([box[0] for box in track.boxes]))) for track in tracks} == {(1,) * 7, (-1,) * 7}


def test_the_nearer_face_continues_a_track() -> None:
    tracker = Tracker()
    tracker.update(0, [face(20)])
    tracker.update(5, [face(38), face(24)])
    first, second = tracker.finish(6)
    assert [box[0] for box in first.boxes] == [20, 24] and second.boxes[0][0] == 38


def test_a_face_may_be_missed_twice_not_thrice() -> None:
    for misses, count in ((2, 1), (3, 2)):
        tracker = Tracker()
        tracker.update(0, [face(20)])
        for frame in range(misses):
            tracker.update(5 * (frame + 1), [])
        tracker.update(5 * (misses + 1), [face(23)])
        tracks = tracker.finish(30)
        assert len(tracks) == count and tracks[-1].held == 29
        if count == 2:
            assert tracks[0].held == 0  # where it was last seen
    np.testing.assert_allclose(Track([0, 4], [face(20).box, face(24).box], 5).dense()[:, 0], [20, 21, 22, 23, 24, 24])


def test_a_jump_and_a_cut_begin_a_new_track() -> None:
    tracker = Tracker()
    tracker.update(0, [face(20)])
    tracker.update(5, [face(60)])
    tracker.cut(8)
    tracker.update(8, [face(60)])
    assert [(track.frames, track.held) for track in tracker.finish(10)] == [([0], 0), ([5], 7), ([8], 9)]


def test_a_track_ends_a_clip_where_the_face_has_left_its_first_box() -> None:
    frames = list(range(0, 101, 5))
    track = Track(frames, [face(10.0 + frame).box for frame in frames], 100)
    found = spans(track, 1000)
    boxes = track.dense()
    expected = [0]
    for frame in range(101):
        if overlaps(boxes[frame : frame + 1], boxes[expected[-1]])[0] < STAYS:
            expected.append(frame)
    assert [span.first for span in found] == expected and len(found) > 2
    assert [span.last + 1 for span in found] == [*expected[1:], 101]
    for span in found:
        part = boxes[span.first : span.last + 1]
        np.testing.assert_allclose(span.box, [*part.min(0)[:2], *part.max(0)[2:]])


def test_long_stretches_become_several() -> None:
    track = Track([10, 200], [face(10).box, face(12).box], 209)
    assert [(span.first, span.last, span.frames) for span in spans(track, 90)] == [
        (10, 99, 90), (100, 189, 90), (190, 209, 20),
    ]  # fmt: skip


def test_smoothing_takes_out_an_outlier_and_leaves_a_motion() -> None:
    line = np.outer(np.arange(9.0), np.ones(4))
    np.testing.assert_allclose(smooth(line)[1:-1], line[1:-1])
    broken = line.copy()
    broken[4] += 500
    assert np.abs(smooth(broken) - line).max() < 1
    np.testing.assert_array_equal(smooth(line[:2]), line[:2])


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 300), st.floats(0, 200), st.floats(1, 300), st.floats(1, 200), st.floats(0, 3),
    st.integers(16, 320), st.integers(16, 240),
)  # fmt: skip
def test_squares_lie_in_the_picture_and_hold_the_face(
    left: float, top: float, wide: float, high: float, margin: float, width: int, height: int
) -> None:
    box = np.array([left, top, left + wide, top + high]).clip(0, [width, height, width, height])
    found = square(box, margin, width, height)
    needed = (box[2:] - box[:2]).max()
    if needed > min(width, height):
        assert found is None
        return
    assert found is not None
    x0, y0, x1, y1 = found
    assert x1 - x0 == y1 - y0 and x0 >= 0 and x1 <= width and y0 >= 0 and y1 <= height
    assert abs((x1 - x0) - min(needed * (1 + 2 * margin), min(width, height))) <= 0.5
    assert x0 <= box[0] + 1 and y0 <= box[1] + 1 and x1 >= box[2] - 1 and y1 >= box[3] - 1


def test_a_square_is_centred_where_there_is_room() -> None:
    assert square(np.array([100.0, 80, 140, 130]), 0.5, 640, 480) == (70, 55, 170, 155)
    assert square(np.array([0.0, 80, 40, 130]), 0.5, 640, 480) == (0, 55, 100, 155)
    assert square(np.array([100.0, 80, 140, 130]), 0.5, 90, 480) is not None


def noise(seed: int) -> np.ndarray:
    """Soft blots."""
    cells = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8))
    return np.asarray(cells.resize((160, 90), Image.Resampling.BICUBIC))


def test_cuts_are_told_from_motion() -> None:
    wide = np.concatenate([noise(1), noise(2)], axis=1)
    other = (255 - wide[:, :160].astype(int) // 2).astype(np.uint8)
    cuts = Cuts()
    pan = [cuts(wide[:, shift : shift + 160], []) for shift in range(0, 20, 2)]
    assert not any(pan)
    assert cuts(other, []) and not cuts(other, [])
    assert cuts(wide[:, :160], [])


def test_a_small_change_is_a_cut_where_nothing_moved_before() -> None:
    before, after = noise(1) // 8 * 7, noise(1) // 8 * 7
    after[:40, :60] = 255 - after[:40, :60]
    still, restless = Cuts(), Cuts()
    assert not any(still(before + level, []) for level in (0, 1, 0, 2, 1))
    assert not any(restless(before + level, []) for level in (0, 12, 0, 14, 2))
    assert still(after, []) and not restless(after, [])
    assert not still(after, [])


def test_another_face_in_the_same_place_is_a_cut() -> None:
    wall = np.full((90, 160, 3), 100, np.uint8)
    one, other = wall.copy(), wall.copy()
    one[30:50, 60:80], other[30:50, 60:80] = (200, 150, 120), (110, 80, 60)
    box = np.array([60, 30, 80, 50])
    for boxes, expected in (([box], True), ([box + 1000], False)):
        cuts = Cuts()
        for _ in range(3):
            assert not cuts(one, boxes)
        assert cuts(other, boxes) == expected


@pytest.mark.slow
def test_no_cut_in_clips_of_heads_and_one_between_any_two() -> None:
    from dagan_rt.training.heads import draw_clip

    cuts, found = Cuts(), []
    for identity in range(6):
        for frame in draw_clip(identity, 15, 128).frames:
            found.append(cuts(frame, [np.array([40, 30, 85, 92])]))
    assert np.flatnonzero(found).tolist() == list(range(15, 90, 15))
