from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dagan_rt.checkpoints import load_depth_network, save_depth
from dagan_rt.errors import InputError
from dagan_rt.images import read_image
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.model import Model
from dagan_rt.training.geometry.__main__ import main
from dagan_rt.training.geometry.score import (
    ELLIPSOID,
    METRICS,
    Faces,
    compare,
    constant_guess,
    draw_faces,
    ellipsoid_guess,
    face_mask,
    fit_ellipsoid,
    score,
    score_guess,
)
from dagan_rt.training.heads import HELD_OUT, draw_clip

TINY = NetworkConfig(
    size=32, depth_width=4, depth_decoder_widths=(4, 4, 4, 8, 8), keypoint_width=2, keypoint_max=4, motion_width=2,
    motion_max=4, generator_width=2, generator_max=4, residual_blocks=1, query_width=2, discriminator_width=2,
    discriminator_max=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def faces() -> Faces:
    return draw_faces(HELD_OUT[:2], 64, (0, 4))


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("depth")
    save_depth(folder, Model(TINY))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_the_truth_is_perfect_in_any_unit(faces: Faces) -> None:
    for unit in (1.0, 0.01):
        found = score(unit * faces.depth, faces)
        assert found["abs_rel"] < 1e-6 and found["relief_rmse"] < 1e-5 and found["aligned_rmse"] < 1e-5
        assert found["delta_1.25"] == found["delta_1.02"] == found["aligned_delta_1.01"] == 1
        assert found["correlation"] == pytest.approx(1)
    assert set(found) == set(METRICS)


def test_numbers_worked_out_by_hand() -> None:
    truth, depth = np.array([4.0, 5.0, 8.0]), np.array([2.0, 2.0, 3.0])  # medians 5 and 2: scaled to 5, 5, 7.5
    found = compare(depth, truth)
    assert found["abs_rel"] == pytest.approx((1 / 4 + 0 + 0.5 / 8) / 3)
    assert found["relief_rmse"] == pytest.approx(np.sqrt((1 + 0 + 0.25) / 3))
    assert found["delta_1.25"] == pytest.approx(2 / 3)  # 5 / 4 is not below 1.25
    assert found["delta_1.02"] == pytest.approx(1 / 3)
    # Disparities 1/2, 1/2, 1/3 fitted to 1/4, 1/5, 1/8: the mean of the first two, and the third exactly.
    aligned = np.array([1 / 0.225, 1 / 0.225, 8.0])
    assert found["aligned_rmse"] == pytest.approx(np.sqrt(((aligned - truth) ** 2).mean()))
    assert found["aligned_delta_1.01"] == pytest.approx(1 / 3)


def test_alignment_forgives_a_deeper_relief_but_none_turned_inside_out() -> None:
    truth = np.random.default_rng(0).uniform(6.0, 7.0, 200)
    deeper, inverted = 1 / (3 / truth + 0.2), 1 / (0.5 - 1 / truth)
    assert compare(deeper, truth)["aligned_rmse"] < 1e-9 < 1e-3 < compare(deeper, truth)["relief_rmse"]
    assert compare(inverted, truth)["aligned_rmse"] == pytest.approx(compare(np.ones(200), truth)["aligned_rmse"])
    assert compare(inverted, truth)["correlation"] < -0.99
    assert compare(np.ones(200), truth)["correlation"] == 0


def test_alignment_is_the_least_squares_fit() -> None:
    rng = np.random.default_rng(1)
    truth = rng.uniform(6.0, 7.0, 100)
    depth = truth * rng.uniform(0.9, 1.1, 100)
    fit, *_ = np.linalg.lstsq(np.stack([1 / depth, np.ones(100)], axis=1), 1 / truth, rcond=None)
    expected = np.sqrt((((1 / (fit[0] / depth + fit[1])) - truth) ** 2).mean())
    assert compare(depth, truth)["aligned_rmse"] == pytest.approx(expected)


def test_delta_1_25_tells_nothing_on_a_head_and_delta_1_02_does(faces: Faces) -> None:
    found = score_guess(constant_guess, faces)
    assert found["delta_1.25"] == 1
    assert found["delta_1.02"] < 0.8


# ---------------------------------------------------------------------------------------------------------------------
# Where, and the guesses


def test_the_mask_is_the_landmarks_hull_on_the_head() -> None:
    clip = draw_clip(HELD_OUT[3], 8, 64)
    points, depth = clip.landmarks[7].astype(np.float64), clip.depth[7]
    mask = face_mask(points, depth)
    axis = np.linspace(-1, 1, 64)
    for row in range(0, 64, 3):
        for column in range(0, 64, 3):
            away = points - (axis[column], axis[row])
            angles = np.sort(np.arctan2(away[:, 1], away[:, 0]))
            widest = np.diff(np.append(angles, angles[0] + 2 * np.pi)).max()
            on_head = depth[row, column] < depth.max() - 1.5
            if abs(widest - np.pi) > 0.05:  # inside a hull no half plane is empty
                assert mask[row, column] == (widest < np.pi and on_head), (row, column)
    assert 0.05 < mask.mean() < 0.2


def test_the_ellipsoid_is_the_best_one_on_training_heads() -> None:
    """Its constants cannot be improved by much on training identities, and it beats a constant on other ones."""
    training = draw_faces(range(0, 60, 6), 32)
    best = score_guess(lambda size: ellipsoid_guess(size, fit_ellipsoid(training, rounds=6)), training)
    fixed = score_guess(ellipsoid_guess, training)
    assert best["abs_rel"] <= fixed["abs_rel"] < 1.1 * best["abs_rel"]
    assert ellipsoid_guess(64).min() == pytest.approx(1 - ELLIPSOID[4], abs=1e-3)


def test_the_ellipsoid_beats_a_constant_on_held_out_heads(faces: Faces) -> None:
    ellipsoid, constant = score_guess(ellipsoid_guess, faces), score_guess(constant_guess, faces)
    for metric in ("abs_rel", "relief_rmse", "aligned_rmse"):
        assert ellipsoid[metric] < constant[metric]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_prints_the_table_and_writes_its_files(
    depth_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / "score.json"), str(tmp_path / "sheet.png")]
    arguments = ["score", "--depth", str(depth_folder), "--identities", "1", "--size", "32"]
    assert main([*arguments, "--json", files[0], "--picture", files[1]]) == 0
    printed = capsys.readouterr().out
    found = json.loads(Path(files[0]).read_text())
    assert found["faces"] == 3 and set(found["scores"]) == {"constant", "ellipsoid", "network"}
    for method in found["scores"]:
        assert f"{found['scores'][method]['abs_rel']:.4f}" in printed
    assert read_image(files[1]).shape[1] > 5 * 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--depth", "nowhere"], "depth folder nowhere does not exist"),
        (["--size", "50"], "--size must be a multiple of 32"),
        (["--identities", "0"], "--identities must be from 1"),
        (["--json", "table.txt"], "table.txt"),
    ],
)
def test_bad_arguments_are_one_sentence(
    depth_folder: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", "--depth", str(depth_folder), *change]) == 2
    assert message in capsys.readouterr().err


def test_a_depth_network_is_read_alone_with_its_sizes(depth_folder: Path) -> None:
    network = load_depth_network(depth_folder)
    torch.manual_seed(0)
    own = Model(TINY).eval()
    image = torch.rand(1, 3, 64, 64)
    assert own.depth is not None and not network.training
    torch.testing.assert_close(network(image), own.depth(image))


def test_a_diverged_depth_network_is_refused(tmp_path: Path) -> None:
    model = Model(TINY)
    assert model.depth is not None
    with torch.no_grad():
        next(model.depth.decoder.parameters()).fill_(float("nan"))
    save_depth(tmp_path, model)
    with pytest.raises(InputError, match="NaN"):
        load_depth_network(tmp_path)
