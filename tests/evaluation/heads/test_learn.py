"""The networks, their training and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from dagan_rt.evaluation.descriptors import KINDS, METRICS_OF, read_descriptor
from dagan_rt.evaluation.extractors import OnnxExtractor
from dagan_rt.evaluation.heads.__main__ import main
from dagan_rt.evaluation.heads.files import read_log, write_descriptor, write_graph, write_log
from dagan_rt.evaluation.heads.frames import draw_frames, draw_set, training_identities
from dagan_rt.evaluation.heads.learn import (
    PARTS,
    TEMPERATURE,
    Pool,
    Schedule,
    _contrast,
    normalised,
    train_actions,
    train_geometry,
    train_identity,
)
from dagan_rt.evaluation.heads.networks import EMBEDDING, PART_SIDE, Actions, Geometry, Head, Identity, Trunk, distance


def scattered(network: torch.nn.Module) -> torch.nn.Module:
    """Batch norms with statistics of their own, as training leaves them: folding them wrongly would show."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator) * 0.3
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    return network.eval()


def network_of(kind: str) -> torch.nn.Module:
    if kind == "identity":
        return scattered(Identity(7))
    return scattered(Actions(Geometry()) if kind == "actions" else Geometry().single(kind))


def test_the_trunk_knows_where_and_what() -> None:
    """Its places are means over the grid: in [-1, 1], and the one bright spot moves them the way it moves."""
    torch.manual_seed(0)
    trunk = Trunk().eval()
    with torch.no_grad():
        features = trunk(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, Trunk.width)
    assert features[:, :80].abs().max() <= 1
    assert trunk.grid[0].tolist() == [-1, -1] and trunk.grid[1][1] == -1 and trunk.grid[1][0] > -1  # x runs first


def test_a_head_speaks_the_units_of_its_targets() -> None:
    torch.manual_seed(0)
    head, targets = Head(5, 2), torch.tensor([[10.0, -3.0], [14.0, -3.5], [18.0, -4.0]])
    head.set_units(targets)
    with torch.no_grad():
        said = head(torch.randn(400, 5))
    torch.testing.assert_close(head.mean, targets.mean(0))
    assert (said.mean(0) - targets.mean(0)).abs().lt(2 * targets.std(0)).all()
    one_deviation_off = head.distance(targets + targets.std(0), targets)
    torch.testing.assert_close(one_deviation_off, torch.tensor(1 - 0.05))  # smooth L1 with beta 0.1


def test_cut_outs_show_the_part_upright_at_one_size() -> None:
    """A checked pattern drawn in face coordinates looks the same in every cut-out, wherever the face is."""
    torch.manual_seed(0)
    network = Actions(Geometry()).eval()
    frames = draw_frames(500_000, 0, [0], 64)
    rest = torch.from_numpy(frames.landmarks[0]).double()
    middle = rest[36:48].mean(0)
    rest -= middle

    def shown(turn: float, size: float, shift: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
        turned = torch.tensor([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        axis = torch.linspace(-1, 1, 64, dtype=torch.double)
        pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
        face = (pixels - torch.tensor(shift)) @ turned / size  # by the transpose, hence back into the resting face
        image = torch.stack([torch.sin(14 * face[..., 0]), torch.sin(14 * face[..., 1]), face[..., 0] * 2])
        return image[None].float(), (rest @ turned.T * size + torch.tensor(shift))[None].float()

    reference = network.cut(*shown(0.0, 1.0, (0.0, 0.0)))
    for pose in ((0.4, 1.0, (0.1, -0.1)), (-0.3, 1.2, (0.0, 0.2))):
        for name, one, other in zip(("left", "right", "mouth"), reference, network.cut(*shown(*pose)), strict=True):
            assert one.shape == (1, 3, PART_SIDE, PART_SIDE)
            assert (one - other).abs().mean() < 0.06, (name, pose)
    still = (
        network.cut(*shown(0.0, 1.0, (0.0, 0.0))),
        network.cut(shown(0.4, 1.0, (0.0, 0.0))[0], reference_marks(rest)),
    )
    assert (still[0][2] - still[1][2]).abs().mean() > 0.15  # a face that is not followed looks different


def reference_marks(rest: torch.Tensor) -> torch.Tensor:
    return rest[None].float()


def test_actions_leave_the_geometry_alone() -> None:
    torch.manual_seed(0)
    network = Actions(Geometry())
    before = {name: value.clone() for name, value in network.geometry.state_dict().items()}
    network.train()
    network(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all((it.grad is None) == name.startswith("geometry.") for name, it in network.named_parameters())
    for name, value in network.geometry.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_parts_are_all_of_the_face() -> None:
    assert [number for part in PARTS for number in range(68)[part]] == list(range(68))
    torch.testing.assert_close(distance(torch.ones(4, 2), torch.zeros(4, 2), torch.ones(2)), torch.tensor(0.95))


def test_contrast_is_the_cross_entropy_of_finding_the_other_view() -> None:
    torch.manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    expected = []
    for i in range(6):  # view i of a person is that of i + 3
        likeness = {j: float(embedding[i] @ embedding[j]) / TEMPERATURE for j in range(6) if j != i}
        partner = (i + 3) % 6
        expected.append(-likeness[partner] + np.log(sum(np.exp(value) for value in likeness.values())))
    np.testing.assert_allclose(float(_contrast(embedding, 3)), np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("kind", ["landmarks", "actions", "identity"])  # pose goes through the reader, below
def test_files_say_what_the_network_says(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = network_of(kind)
    images = torch.rand(3, 3, 64, 64) * 4 - 2
    with torch.no_grad():
        expected = network(images).numpy()
    write_graph(network, kind, tmp_path / f"{kind}.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / f"{kind}.onnx"), providers=["CPUExecutionProvider"])
    for count in (3, 1):  # the batch is free
        (found,) = session.run([kind], {"image": images[:count].numpy()})
        np.testing.assert_allclose(found, expected[:count], rtol=1e-3, atol=2e-4)
    assert expected.shape[1:] == {"landmarks": (68, 2), "pose": (3,), "actions": (7,), "identity": (EMBEDDING,)}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_descriptors_are_read_back(kind: str, tmp_path: Path) -> None:
    noise = {metric: 0.125 for metric in METRICS_OF[kind]}
    write_descriptor(tmp_path, kind, noise, 'by "hand", ± 2 %')
    descriptor = read_descriptor(tmp_path / f"{kind}.toml")
    assert (descriptor.kind, descriptor.model, descriptor.output) == (kind, f"{kind}.onnx", kind)
    assert descriptor.noise == noise and descriptor.noise_from == 'by "hand", ± 2 %'
    write_descriptor(tmp_path, kind)
    assert read_descriptor(tmp_path / f"{kind}.toml").noise == {}


def test_the_reader_feeds_what_training_fed(tmp_path: Path) -> None:
    """A picture of the size that the network takes, through the reader, is what the network saw in training."""
    torch.manual_seed(1)
    network = network_of("pose")
    write_graph(network, "pose", tmp_path / "pose.onnx")
    write_descriptor(tmp_path, "pose")
    frames = draw_set(training_identities(2), 1, (64,))
    pixels = torch.from_numpy(frames.images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = network(normalised(pixels)).numpy()
    values, found = OnnxExtractor(tmp_path / "pose.toml", threads=1)(frames.images)
    assert found.all()
    np.testing.assert_allclose(values, expected, atol=1e-3)


def test_a_pool_gives_frames_or_degraded_copies_with_their_truth() -> None:
    frames = draw_set(training_identities(2), 1, (64,))
    pool = Pool(frames, seed=0)
    np.testing.assert_array_equal(pool.images[0], frames.images)
    seen = set()
    for step in range(12):
        batch = pool.batch(np.array([1, 0]), np.random.default_rng(step))
        for place, number in enumerate((1, 0)):
            pixels = batch.images[place].permute(1, 2, 0).numpy() * 255
            (same,) = np.flatnonzero([np.abs(pixels - variant).max() < 0.01 for variant in pool.images[:, number]])
            seen.add((number, same))
            np.testing.assert_array_equal(batch.landmarks[place].numpy(), frames.landmarks[number])
            np.testing.assert_array_equal(batch.pose[place].numpy(), frames.pose[number])
    assert seen == {(number, variant) for number in (0, 1) for variant in (0, 1, 2)}


def test_the_log_keeps_its_tables(tmp_path: Path) -> None:
    write_log(tmp_path, "settings", {"steps": [1, 2]})
    write_log(tmp_path, "loss", [{"step": 1, "pose": 0.5}])
    write_log(tmp_path, "settings", {"steps": [3, 4]})
    assert read_log(tmp_path) == {"settings": {"steps": [3, 4]}, "loss": [{"step": 1, "pose": 0.5}]}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--out", "OUT", "--identities", "500001"], "identities must be between 2 and 500000, got 500001"),
        (["train", "--out", "OUT", "--steps", "5", "0", "5"], "--steps must be whole numbers above 0, got 5 0 5"),
        (["train", "--out", "OUT", "--batch", "64", "--identities", "31"], "--batch must be between 4 and twice"),
        (["train", "--out", "OUT", "--frames", "97"], "--frames must be between 1 and 96, got 97"),
        (["validate", "--extractors", "OUT"], "landmarks.toml"),
    ],
)
def test_bad_arguments_end_with_one_sentence(arguments: list[str], sentence: str, tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path) if word == "OUT" else word for word in arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_training_learns() -> None:
    """A few heads by heart: every loss falls well below that of knowing nothing."""
    torch.set_num_threads(1)
    pool = Pool(draw_set(training_identities(16), 3, (64, 64)), seed=0, variants=1)
    log: list[dict[str, Any]] = []
    geometry = train_geometry(pool, Schedule(350, 16, warmup=30), 0, log)
    assert log[-1]["landmarks"] < 0.7 and log[-1]["shape"] < 0.6 and log[-1]["pose"] < 0.35, log
    train_actions(pool, geometry, Schedule(120, 24, warmup=20), 0, log)
    assert log[-1]["actions"] < 0.71, log
    train_identity(pool, geometry, Schedule(100, 24, warmup=20), 0, log)
    assert log[-1]["contrast"] < 0.6 * np.log(23) and log[-1]["person"] < 0.95, log


@pytest.mark.slow
def test_the_command_makes_files_that_the_reader_takes(tmp_path: Path) -> None:
    out, cache = tmp_path / "extractors", tmp_path / "cache"
    shared = ["--identities", "4", "--frames", "1", "--steps", "2", "2", "2", "--batch", "4", "--workers", "1"]
    for _ in range(2):
        assert main(["train", "--out", str(out), "--cache", str(cache), *shared]) == 0
        graphs = [(out / f"{kind}.onnx").read_bytes() for kind in KINDS]
    assert main(["validate", "--extractors", str(out), "--identities", "3", "--workers", "1", "--write"]) == 0
    log = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert log["validation"]["identities"] == 3 and log["settings"]["identities"] == [500_000, 500_004]
    for kind, graph in zip(KINDS, graphs, strict=True):
        assert (out / f"{kind}.onnx").read_bytes() == graph
        descriptor = read_descriptor(out / f"{kind}.toml")
        assert descriptor.noise == {metric: log["validation"]["noise"][metric] for metric in METRICS_OF[kind]}
