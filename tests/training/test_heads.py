from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dagan_rt.errors import InputError
from dagan_rt.training.heads import EXPRESSIONS, HELD_OUT, TRAINING, Clip, draw_clip
from dagan_rt.training.heads.motion import draw_motion
from dagan_rt.training.heads.person import HAIR_STYLES, draw_person, draw_scene
from dagan_rt.training.heads.shape import Face, landmark_points, make_face, surface

IDENTITIES = (0, 1, 2, 3, HELD_OUT.start + 4)


@pytest.fixture(scope="module")
def clips() -> dict[int, Clip]:
    return {identity: draw_clip(identity, 16, 64) for identity in IDENTITIES}


def pixels(landmarks: np.ndarray, size: int) -> np.ndarray:
    return (landmarks.astype(np.float64) + 1.0) / 2.0 * (size - 1)


def rotation_of(pose: np.ndarray) -> np.ndarray:
    """The head's axes written out from what the angles mean, not by multiplying the program's matrices."""
    yaw, pitch, roll = np.radians(np.asarray(pose, np.float64))
    nose = np.array([np.sin(yaw), -np.cos(yaw) * np.sin(pitch), np.cos(yaw) * np.cos(pitch)])
    right = np.array([np.cos(yaw), np.sin(yaw) * np.sin(pitch), -np.sin(yaw) * np.cos(pitch)])
    turn = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
    nose[:2], right[:2] = turn @ nose[:2], turn @ right[:2]
    return np.column_stack([right, np.cross(nose, right), nose])


def camera_of(identity: int, frame: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Rotation, offset, distance and half view of a frame (a head turns about a point low in its back)."""
    motion, scene = draw_motion(identity, seed, frame + 1), draw_scene(identity, seed)
    rotation = rotation_of(motion.pose[frame])
    pivot = np.array([0.0, 0.45, -0.25])
    offset = motion.shift[frame] + np.array([0.0, -0.12, 0.0]) + pivot - rotation @ pivot
    return rotation, offset, scene.distance, scene.half_view


def face_of(identity: int, frame: int) -> Face:
    expression = draw_motion(identity, 0, frame + 1).expression[frame]
    return make_face(draw_person(identity), [float(value) for value in expression])


def all_landmarks_3d(identity: int, frames: int) -> np.ndarray:
    expression = draw_motion(identity, 0, frames).expression
    return landmark_points(make_face(draw_person(identity), expression.T[:, :, None]))


# ---------------------------------------------------------------------------------------------------------------------
# Same numbers, same clip


def test_a_clip_repeats_bit_for_bit(clips: dict[int, Clip]) -> None:
    for field in dataclasses.fields(Clip):
        np.testing.assert_array_equal(getattr(clips[1], field.name), getattr(draw_clip(1, 16, 64), field.name))


def test_a_longer_clip_begins_with_the_shorter(clips: dict[int, Clip]) -> None:
    short = draw_clip(2, 5, 64)
    np.testing.assert_array_equal(short.frames, clips[2].frames[:5])
    np.testing.assert_array_equal(short.landmarks, clips[2].landmarks[:5])


def test_identities_and_seeds_differ(clips: dict[int, Clip]) -> None:
    first = {identity: clip.frames[0].astype(int) for identity, clip in clips.items()}
    for one in IDENTITIES:
        for other in IDENTITIES:
            assert one == other or np.abs(first[one] - first[other]).mean() > 5.0
    assert np.abs(draw_clip(1, 1, 64, seed=1).frames[0] - first[1]).mean() > 5.0


def test_a_person_keeps_the_face_in_every_clip() -> None:
    """Seeds change motion and scene; the 3-D landmarks under one expression are the person's own."""
    expression = np.full((7, 1, 1), 0.5)
    shapes = [landmark_points(make_face(draw_person(identity), expression))[0] for identity in (5, 5, 6)]
    np.testing.assert_array_equal(shapes[0], shapes[1])
    assert np.abs(shapes[0] - shapes[2]).max() > 0.02


def test_held_out_people_are_not_training_people() -> None:
    assert not set(TRAINING) & set(HELD_OUT)
    assert (TRAINING.start, TRAINING.stop, HELD_OUT.start, HELD_OUT.stop) == (0, 1_000_000, 1_000_000, 2_000_000)
    # An identity's number alone seeds it: the same offset in the other range is somebody else.
    assert draw_person(7).width != draw_person(HELD_OUT.start + 7).width


def test_every_hair_style_is_worn() -> None:
    assert {draw_person(identity).hair_style for identity in range(100)} == set(HAIR_STYLES)


# ---------------------------------------------------------------------------------------------------------------------
# Types and ranges


def test_types_shapes_and_ranges(clips: dict[int, Clip]) -> None:
    for identity, clip in clips.items():
        assert clip.identity == identity
        for name, shape, kind in (
            ("frames", (16, 64, 64, 3), np.uint8),
            ("depth", (16, 64, 64), np.float32),
            ("landmarks", (16, 68, 2), np.float32),
            ("pose", (16, 3), np.float32),
            ("expression", (16, len(EXPRESSIONS)), np.float32),
        ):
            array = getattr(clip, name)
            assert array.shape == shape and array.dtype == kind, name
            assert np.isfinite(array).all(), name
        assert clip.depth.min() > 4.0 and clip.depth.max() < 13.0
        assert (np.abs(clip.pose) <= (35.0, 18.0, 15.0)).all()
        assert clip.expression.min() >= 0.0 and clip.expression.max() <= 1.0
        assert np.abs(clip.landmarks).max() < 1.0
        assert clip.frames.std() > 20.0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((-1, 2, 64), "identity"), ((2_000_000, 2, 64), "identity"), ((0, 0, 64), "frames"), ((0, 2, 8), "size"),
     ((0, 2, 100_000), "size"), ((0, 2, 64, -1), "seed")],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(arguments: tuple[int, ...], word: str) -> None:
    with pytest.raises(InputError, match=word):
        draw_clip(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Truth against geometry


@pytest.mark.parametrize("identity", IDENTITIES)
def test_depth_matches_a_brute_force_march(clips: dict[int, Clip], identity: int) -> None:
    """Rays in float64, 2000 steps each: the first step below the skin is the depth, at face pixels."""
    frame = 9
    rotation, offset, distance, half_view = camera_of(identity, frame)
    face, clip = face_of(identity, frame), clips[identity]
    inner = pixels(clip.landmarks[frame, 27:68], 64)
    low, high = np.floor(inner.min(axis=0)).astype(int), np.ceil(inner.max(axis=0)).astype(int)
    rows, columns = np.mgrid[low[1] : high[1] + 1 : 3, low[0] : high[0] + 1 : 3].reshape(2, -1)
    ray = np.stack(
        [(2 * columns / 63 - 1) * half_view, (2 * rows / 63 - 1) * half_view, np.full(columns.size, -1.0)], axis=1
    )
    depths = np.linspace(distance - 2.0, distance + 1.0, 2000)
    camera = np.array([0.0, 0.0, distance])
    points = (camera + depths[:, None, None] * ray - offset) @ rotation
    inside = surface(face, points[..., 0], points[..., 1], points[..., 2]) < 0.0
    assert inside.any(axis=0).mean() > 0.8
    hit = inside.any(axis=0)
    marched = depths[inside.argmax(axis=0)]
    error = np.abs(marched - clip.depth[frame, rows, columns])[hit]
    # A step of the march is 0.0015; rays that graze the side of the nose may stop on either side of it.
    assert np.median(error) < 0.002
    assert np.mean(error < 0.01) > 0.93, np.sort(error)[-10:]


@pytest.mark.parametrize("identity", IDENTITIES)
def test_landmarks_are_the_projected_surface(clips: dict[int, Clip], identity: int) -> None:
    points, clip = all_landmarks_3d(identity, 16), clips[identity]
    for frame in (0, 7, 15):
        face = face_of(identity, frame)
        assert np.abs(surface(face, *points[frame].T)).max() < 1e-4, "landmarks lie on the skin"
        rotation, offset, distance, half_view = camera_of(identity, frame)
        camera = points[frame] @ rotation.T + offset
        depth = distance - camera[:, 2]
        seen = camera[:, :2] / depth[:, None] / half_view
        np.testing.assert_allclose(seen, clip.landmarks[frame], atol=1e-5)
        # Where the skin faces the camera, the depth picture holds the landmark's own depth.
        at = np.rint(pixels(clip.landmarks[frame], 64)).astype(int)
        drawn = clip.depth[frame, at[:, 1], at[:, 0]]
        central = [21, 22, 27, 28, 29, 30, 33, 39, 42, 51, 57, 62, 66]
        assert np.median(np.abs(drawn - depth)[central]) < 0.03
        assert np.abs(drawn - depth)[central].max() < 0.30


def test_landmarks_come_in_ibug_order() -> None:
    """Seen from the front: each run of points goes the way iBUG draws it, and the face is its own mirror image."""
    still = np.array([0.6, 0.4, 0.0, 0.0, 0.5, 0.5, 0.5])[:, None, None]
    for identity in range(8):
        x, y, _ = landmark_points(make_face(draw_person(identity), still))[0].T
        rightwards = (range(17), range(17, 27), range(31, 36), (*range(36, 40), *range(42, 46)), range(48, 55),
                      (59, 58, 57, 56, 55), (41, 40, 47, 46), range(60, 65), (67, 66, 65))  # fmt: skip
        for run in rightwards:
            assert (np.diff(x[list(run)]) > 0.0).all(), run
        for down in ((19, 37, 41, 31, 50, 61, 67, 58, 7), (24, 44, 46, 35, 52, 63, 65, 56, 9), range(27, 31)):
            assert (np.diff(y[list(down)]) > 0.0).all(), down
        mirror = [*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1), 45, 44, 43, 42, 47,
                  46, 39, 38, 37, 36, 41, 40, *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1),
                  67, 66, 65]  # fmt: skip
        difference = np.abs(np.stack([-x[mirror], y[mirror]]) - np.stack([x, y]))
        assert difference.max() < 0.05  # locks of hair are not symmetric, and the jaw line may pass under them


def test_nearest_point_of_the_face_is_the_nose(clips: dict[int, Clip]) -> None:
    for identity, clip in clips.items():
        frame = int(np.abs(clip.pose[:, :2]).sum(axis=1).argmin())
        row, column = np.unravel_index(clip.depth[frame].argmin(), (64, 64))
        away = np.hypot(*(pixels(clip.landmarks[frame, 30], 64) - (column, row)))
        assert away < 5.0, (identity, away)


def test_features_are_drawn_under_their_landmarks() -> None:
    """Eyes darker than the cheeks at the pupil, brows darker than the forehead, an open mouth differs from the chin."""
    for identity in (0, 2, 8, 10):
        clip = draw_clip(identity, 16, 128)
        gray = clip.frames.astype(np.float64).mean(axis=3)
        frame = int((np.abs(clip.pose[:, 0]) / 35 + clip.expression[:, 2:4].max(axis=1)).argmin())
        points = pixels(clip.landmarks[frame], 128)

        def patch(at: np.ndarray, radius: int = 1, picture: np.ndarray = gray[frame]) -> np.ndarray:
            x, y = np.rint(at).astype(int)
            return picture[y - radius : y + radius + 1, x - radius : x + radius + 1]

        for brow, eye in (([18, 19, 20], range(36, 42)), ([23, 24, 25], range(42, 48))):
            middle = points[brow].mean(axis=0)
            above = middle + 0.6 * (middle - points[list(eye)].mean(axis=0))
            assert patch(middle).min() < patch(above).mean() - 4.0
            centre = points[list(eye)].mean(axis=0)
            below = centre + 1.2 * (centre - middle)
            assert patch(centre, 4).min() < patch(below).mean() - 25.0


def test_mouth_and_lids_follow_the_expression(clips: dict[int, Clip]) -> None:
    for clip in clips.values():
        upright = clip.landmarks.astype(np.float64)
        scale = np.linalg.norm(upright[:, 27] - upright[:, 8], axis=1)
        gap = np.linalg.norm(upright[:, 62] - upright[:, 66], axis=1) / scale
        assert np.corrcoef(gap, clip.expression[:, 0])[0, 1] > 0.95
        for column, lids in ((2, (37, 38, 40, 41)), (3, (43, 44, 46, 47))):
            upper, lower = upright[:, lids[:2]].mean(axis=1), upright[:, lids[2:]].mean(axis=1)
            opening = np.linalg.norm(upper - lower, axis=1) / scale
            if np.ptp(clip.expression[:, column]) > 0.4:
                assert np.corrcoef(opening, clip.expression[:, column])[0, 1] < -0.8


def test_pose_can_be_read_off_the_landmarks() -> None:
    """A scaled orthographic fit of one average 3-D face to 2-D landmarks alone finds yaw, pitch and roll."""
    neutral = np.array([0.1, 0.3, 0.0, 0.0, 0.5, 0.5, 0.5])[:, None, None]
    rigid = [*range(17, 48)]
    mean = np.mean([landmark_points(make_face(draw_person(k), neutral))[0] for k in range(20, 40)], axis=0)[rigid]
    mean = mean - mean.mean(axis=0)
    found, true = [], []
    for identity in range(40, 48):
        clip = draw_clip(identity, 12, 16)
        for landmarks, pose in zip(clip.landmarks[:, rigid], clip.pose, strict=True):
            flat = landmarks.astype(np.float64) - landmarks.mean(axis=0)
            two_rows = np.linalg.lstsq(mean, flat, rcond=None)[0].T
            u, _, v = np.linalg.svd(two_rows, full_matrices=False)
            right_down = u @ v
            nose = np.cross(right_down[0], right_down[1])
            axes = np.vstack([right_down, nose])  # head to camera
            roll = np.arctan2(axes[1, 0] * 1.0, axes[0, 0])
            # Undo the roll, then the nose's direction gives the rest.
            for _ in range(20):
                c, s = np.cos(roll), np.sin(roll)
                level = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) @ axes
                yaw = np.arctan2(level[0, 2], np.hypot(level[1, 2], level[2, 2]))
                pitch = np.arctan2(-level[1, 2], level[2, 2])
                roll += np.arctan2(level[1, 0] - np.sin(yaw) * np.sin(pitch), level[0, 0])
            found.append(np.degrees([yaw, pitch, roll]))
            true.append(pose)
    found_poses, true_poses = np.array(found), np.array(true)
    for angle, limit in ((0, 0.98), (1, 0.85), (2, 0.98)):
        assert np.corrcoef(found_poses[:, angle], true_poses[:, angle])[0, 1] > limit, angle


def test_sizes_show_the_same_scene() -> None:
    """On a corner-aligned grid every pixel of 65 x 65 is also a pixel of 129 x 129."""
    small, large = draw_clip(3, 2, 65), draw_clip(3, 2, 129)
    np.testing.assert_array_equal(small.landmarks, large.landmarks)
    np.testing.assert_array_equal(small.pose, large.pose)
    depth = np.abs(small.depth - large.depth[:, ::2, ::2])
    assert np.mean(depth < 0.01) > 0.96
    colour = np.abs(small.frames.astype(int) - large.frames[:, ::2, ::2].astype(int))
    assert colour.mean() < 2.5


# ---------------------------------------------------------------------------------------------------------------------
# Motion


def test_heads_move_and_move_smoothly() -> None:
    travelled = []
    for identity in range(60):
        motion = draw_motion(identity, 0, 16)
        steps = np.abs(np.diff(motion.pose, axis=0))
        assert steps.max() < 9.0, "degrees from one frame to the next"
        assert np.abs(np.diff(motion.shift, axis=0)).max() < 0.12
        assert np.abs(np.diff(motion.expression, axis=0)).max() < 0.6
        travelled.append(np.abs(motion.pose - motion.pose[0]).max())
    assert np.mean(np.array(travelled) > 8.0) > 0.9
    assert np.median(travelled) > 15.0


def test_repeating_the_first_frame_is_a_bad_prediction(clips: dict[int, Clip]) -> None:
    for clip in clips.values():
        error = np.abs(clip.frames[1:].astype(float) - clip.frames[0]).mean(axis=(1, 2, 3))
        assert error.max() > 4.0
        landmarks = np.linalg.norm(clip.landmarks - clip.landmarks[0], axis=2).mean(axis=1)
        assert landmarks.max() > 0.08
