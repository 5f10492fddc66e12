"""The regressors' own error: the arithmetic on made-up answers, and the files that ship against their log."""

from __future__ import annotations

import numpy as np
import pytest

from dagan_rt._assets import asset
from dagan_rt.evaluation.descriptors import KINDS, METRICS_OF
from dagan_rt.evaluation.extractors import load_extractors
from dagan_rt.evaluation.heads.files import read_log
from dagan_rt.evaluation.heads.frames import draw_frames, pick_times
from dagan_rt.evaluation.heads.measure import (
    FRAMES,
    QUICK,
    SIZE,
    Material,
    against_truth,
    agreement,
    draw_material,
    equal_error_rate,
    extract,
    measure,
    noise,
    pairs_of,
    truth_of,
    verification,
)
from dagan_rt.evaluation.heads.run import describe

LARGEST = 2_500_000  # bytes of all shipped files


@pytest.fixture(scope="module")
def material() -> Material:
    return draw_material(QUICK)


def test_the_truth_itself_has_no_error(material: Material) -> None:
    truth = truth_of(material.frames)
    errors = against_truth(truth, material.frames)
    rows = {"landmarks_px": 0, "pose_deg": 0, "yaw_deg": 0, "actions": 1, "gaze_x": 1}
    assert {row: errors[row] for row in rows} == rows
    for row in agreement(truth, material).values():
        assert row["rms_difference"] == 0 and row["correlation"] == pytest.approx(1)


def test_errors_are_in_their_units(material: Material) -> None:
    truth = truth_of(material.frames)
    wrong = {"landmarks": truth["landmarks"] + [3, 4], "pose": truth["pose"] + [1, -2, 2], "actions": truth["actions"]}
    wrong["actions"] = wrong["actions"].copy()
    wrong["actions"][::4, 0] = 1 - wrong["actions"][::4, 0]
    errors = against_truth(wrong, material.frames)
    assert errors["landmarks_px"] == 5 and errors["pose_deg"] == pytest.approx(np.sqrt(3), abs=1e-4)
    assert (errors["yaw_deg"], errors["pitch_deg"], errors["roll_deg"]) == (1, 2, 2)
    assert errors["mouth_open"] == 0.75 and errors["smile"] == 1


def test_landmarks_are_where_the_reader_says(material: Material) -> None:
    """In pixels at 256: the first frame's landmarks agree with those of the same frame drawn at 256."""
    identity = int(material.frames.identity[0])
    large = draw_frames(identity, 0, pick_times(identity, 0, FRAMES)[:1], 256)
    # A picture's corners lie elsewhere by half a pixel where sizes differ, hence within one at 256.
    apart = truth_of(material.frames)["landmarks"][0] - (large.landmarks[0].astype(np.float64) + 1) / 2 * 255
    assert np.abs(apart).max() < 1


def test_equal_errors_by_hand() -> None:
    assert equal_error_rate(np.array([0.8, 0.9]), np.array([0.1, 0.2])) == 0
    assert equal_error_rate(np.array([0.1, 0.9]), np.array([0.2, 0.3])) == 0.5
    assert equal_error_rate(np.array([0.3, 0.6, 0.7, 0.8]), np.array([0.1, 0.2, 0.25, 0.65])) == 0.25


def test_verification_of_perfect_and_of_blind_embeddings(material: Material) -> None:
    people = np.repeat(np.eye(QUICK), 2 * FRAMES, axis=0)
    perfect = verification(people, material)
    assert (perfect["same"], perfect["different"], perfect["eer"], perfect["auc"]) == (1, 0, 0, 1)
    rng = np.random.default_rng(0)
    blind = rng.standard_normal(people.shape)
    blind /= np.linalg.norm(blind, axis=1, keepdims=True)
    assert verification(blind, material)["eer"] == pytest.approx(0.5, abs=0.2)


def test_noise_of_exact_extractors_is_none(material: Material) -> None:
    """With the truth in place of regressors, the perfect reenactment has the pose and actions of what drives it."""
    truth = truth_of(material.frames) | {"identity": np.repeat(np.eye(QUICK), 2 * FRAMES, axis=0)}
    driving = {kind: np.roll(material.at(values, 0, 1), -1, axis=0) for kind, values in truth.items()}
    perfect = driving | {"identity": np.eye(QUICK)}
    assert noise(truth, truth, perfect, material) == {"akd": 0, "aed": 0, "csim": 1, "prmse": 0, "aucon": 1}
    # And what is drawn is what is compared: the same motion, of this driver, at this time.
    source, driver = material.frames.identity[0], material.frames.identity[2 * FRAMES]
    time = pick_times(int(driver), 0, FRAMES)[1]
    drawn = draw_frames(int(source), 0, [time], SIZE, int(driver))
    np.testing.assert_array_equal(drawn.images[0], material.perfect[0])
    np.testing.assert_array_equal(drawn.pose[0].astype(np.float64), driving["pose"][0])


def test_shipped_files_are_what_the_log_says(material: Material) -> None:
    """Measured again on a few heads, the files that ship give the numbers that were written down with them."""
    log, folder = read_log(asset("train", "extractors")), asset("train", "extractors")
    extractors = load_extractors(["heads"], threads=1)
    assert set(extractors) == set(KINDS)
    again = measure(extractors, material)
    assert log["quick"]["identities"] == QUICK
    for table in ("truth", "identity", "noise", "same_frame", "agreement"):
        _alike(again[table], log["quick"][table], table)
    for kind in KINDS:  # what an evaluation prints comes from the large measurement
        assert dict(extractors[kind].noise) == {it: log["validation"]["noise"][it] for it in METRICS_OF[kind]}
    assert sum(file.stat().st_size for file in folder.iterdir()) < LARGEST
    assert "gaze_x" in describe(again, material)


def test_shipped_files_can_be_trusted() -> None:
    """The bounds that make the metrics worth printing, on the 200 held-out heads of the log."""
    measured = read_log(asset("train", "extractors"))["validation"]
    assert measured["identities"] >= 200
    clean = measured["truth"]["clean"]
    assert clean["landmarks_px"] < 3 and clean["pose_deg"] < 2 and clean["actions"] > 0.8
    assert measured["identity"]["clean"]["eer"] < 0.05
    agreement = {metric: row["correlation"] for metric, row in measured["agreement"].items()}
    assert agreement["akd"] > 0.95 and agreement["prmse"] > 0.95 and agreement["aucon"] > 0.5


def test_pairs_differ_where_the_truth_does(material: Material) -> None:
    """Against a plain loop over pairs."""
    found = truth_of(material.frames)
    pairs = pairs_of(found, material)
    grouped = {kind: values.reshape(QUICK, 2, FRAMES, *values.shape[1:]) for kind, values in found.items()}
    number = 0
    for scene in (0, 1):
        for person in range(QUICK):
            one, other = grouped["landmarks"][person, scene, :2]
            assert pairs["akd"][number] == pytest.approx(np.hypot(*(one - other).T).mean())
            turned = grouped["pose"][person, scene, 0] - grouped["pose"][(person + 1) % QUICK, scene, 1]
            assert pairs["prmse"][number] == pytest.approx(np.sqrt((turned**2).mean()))
            number += 1


def test_extracting_in_batches_changes_nothing(material: Material) -> None:
    extractors = load_extractors(["heads"], threads=1)
    images = material.frames.images[:5]
    whole, parts = extract(extractors, images), extract(extractors, images, batch=2)
    for kind in KINDS:
        np.testing.assert_allclose(whole[kind], parts[kind], atol=1e-4)


def _alike(found: dict, logged: dict, where: str) -> None:
    assert found.keys() == logged.keys(), where
    for key, value in found.items():
        if isinstance(value, dict):
            _alike(value, logged[key], f"{where}.{key}")
        else:
            # Another processor rounds otherwise; a single action may fall to the other side of its threshold.
            assert value == pytest.approx(logged[key], rel=0.02, abs=0.03), f"{where}.{key}"
