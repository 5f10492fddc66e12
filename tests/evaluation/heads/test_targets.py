"""What the regressors are told: activations, persons, and the truth of moved pictures."""

from __future__ import annotations

import numpy as np
import torch

from dagan_rt.evaluation.heads.frames import draw_frames
from dagan_rt.evaluation.heads.moving import Batch, move
from dagan_rt.evaluation.heads.targets import ACTIONS, ACTIVE, activations, person_signs, person_vector
from dagan_rt.training.heads.motion import draw_motion
from dagan_rt.training.heads.person import draw_person, draw_scene
from dagan_rt.training.heads.render import place, project
from dagan_rt.training.heads.shape import landmark_points, make_face


def test_an_action_is_active_above_its_threshold() -> None:
    for number, name in enumerate(ACTIONS):
        expression = np.tile(np.linspace(0, 1, 101)[:, None], (1, len(ACTIONS)))
        activation = activations(expression)[:, number]
        np.testing.assert_array_equal(activation > 0.5 + 1e-6, expression[:, number] > ACTIVE[name] + 1e-6)
        assert activation[0] == 0 and activation[-1] == 1 and (np.diff(activation) > 0).all()


def test_actions_are_neither_rare_nor_constant() -> None:
    """At chance, AUCON reads p² + (1 - p)²: it can tell nothing of an action that is nearly always or never active."""
    expression = np.concatenate([draw_motion(500_000 + i, 0, 96).expression[::12] for i in range(300)])
    share = (activations(expression) > 0.5).mean(0)
    assert (share > 0.2).all() and (share < 0.6).all(), share
    # What rests is not active: lids hang down to 0.22.
    assert ACTIVE["blink_left"] > 0.22 and ACTIVE["blink_right"] > 0.22


def test_a_person_is_all_numbers_and_nobody_elses() -> None:
    one, other, signs = person_vector(3), person_vector(4), person_signs()
    assert one.shape == other.shape == signs.shape and not np.array_equal(one, other)
    person = draw_person(3)
    assert one[0] == np.float32(person.width) and np.isin(person.iris, one).all()
    (mirrored,) = np.flatnonzero(signs < 0)
    assert one[mirrored] == np.float32(person.hair_part)


WINKING = 500_017  # in the first frames of its clip one eye is shut and the other is not


def truth(frame_count: int = 1) -> Batch:
    frames = draw_frames(WINKING, 0, list(range(frame_count)), 64)
    images = torch.from_numpy(frames.images).permute(0, 3, 1, 2).float() / 255
    landmarks, pose = torch.from_numpy(frames.landmarks), torch.from_numpy(frames.pose)
    return Batch(images, landmarks, pose, torch.from_numpy(activations(frames.expression)))


def test_landmarks_stay_on_what_they_mark_when_pictures_move() -> None:
    """Blobs at known places are moved; their centres of mass are where the landmarks say."""
    count, size = 16, 64
    axis = torch.linspace(-1, 1, size)
    places = torch.tensor([[0.3, -0.2], [-0.4, 0.1], [0.1, 0.45]])
    blobs = torch.exp(-((axis[None, None, :] - places[:, 0, None, None]) ** 2
                        + (axis[None, :, None] - places[:, 1, None, None]) ** 2) / 0.06**2)  # fmt: skip
    landmarks = torch.zeros(count, 68, 2)
    landmarks[:, 27:30] = places  # points of the bridge of the nose, which mirroring does not rename
    batch = Batch(blobs.repeat(count, 1, 1, 1), landmarks, torch.zeros(count, 3), torch.zeros(count, 7))
    mirrored = torch.arange(count) % 2 == 0
    moved = move(batch, mirrored, torch.Generator().manual_seed(0))
    weight = moved.images / moved.images.sum((2, 3), keepdim=True)
    centres = torch.stack([(weight * axis).sum((2, 3)), (weight * axis[:, None]).sum((2, 3))], -1)
    apart = (centres - moved.landmarks[:, 27:30]).norm(dim=-1) * (size - 1) / 2
    assert apart.max() < 0.25, apart.max()  # pixels
    assert (moved.landmarks[:, 27:30] - places).abs().mean() > 0.05


def test_mirrored_truth_is_that_of_the_mirrored_head() -> None:
    """Against the heads' own geometry: the other pose and expression, projected, give the mirrored landmarks."""
    person, scene, motion = draw_person(WINKING), draw_scene(WINKING, 0), draw_motion(WINKING, 0, 3)
    batch = truth(3)
    moved = _still(batch)
    for number in range(3):
        pose, shift, expression = motion.pose[number], motion.shift[number].copy(), motion.expression[number]
        left, right = ACTIONS.index("blink_left"), ACTIONS.index("blink_right")
        assert abs(expression[left] - expression[right]) > 0.2
        other = expression.copy()
        other[[left, right]] = expression[[right, left]]
        other[ACTIONS.index("gaze_x")] = 1 - expression[ACTIONS.index("gaze_x")]
        shift[0] *= -1
        face = make_face(person, other[:, None, None])
        points = project(landmark_points(face)[0], place(moved.pose[number].double().numpy(), shift), scene)[0]
        np.testing.assert_allclose(moved.landmarks[number, 17:].numpy(), points[17:], atol=1e-4)
        # The jaw's ends lie on hair, whose waves no person has the other way round.
        np.testing.assert_allclose(moved.landmarks[number, :17].numpy(), points[:17], atol=0.01)
        np.testing.assert_allclose(moved.actions[number].numpy(), activations(other), atol=1e-5)
        assert moved.pose[number, 1] == np.float32(pose[1])


def _still(batch: Batch) -> Batch:
    """Mirrored, and not moved otherwise."""
    from unittest import mock

    from dagan_rt.evaluation.heads import moving

    with mock.patch.multiple(moving, SCALE=0.0, SHIFT=0.0):
        moved = move(batch, torch.ones(len(batch.images), dtype=torch.bool), torch.Generator(), 0.0)
    torch.testing.assert_close(moved.images, batch.images.flip(3), atol=1e-5, rtol=0)
    return moved


def test_the_same_generator_moves_alike() -> None:
    batch = truth(2)
    mirrored = torch.tensor([True, False])
    one, other = (move(batch, mirrored, torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(one.images, other.images, rtol=0, atol=0)
    torch.testing.assert_close(one.landmarks, other.landmarks, rtol=0, atol=0)
