"""Exporting small models: the graphs are the network, or nothing is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dagan_rt import checkpoints
from dagan_rt.bundle import Bundle
from dagan_rt.export import export
from dagan_rt.export import onnx as exporter
from dagan_rt.export.__main__ import main
from dagan_rt.export.plan import Plan
from dagan_rt.export.subnetworks import Subnetwork, Tolerance, subnetworks
from dagan_rt.export.verify import ExportError, compare, verification_frames
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.model import Model
from dagan_rt.networks.variants import VARIANTS
from dagan_rt.report import Measured
from dagan_rt.transfer import transfer

GRAPHS = ("source", "driving", "motion", "generator")


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request: pytest.FixtureRequest, small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, bundle, what was measured) of each variant."""
    model = small_model(request.param)
    plan = Plan(torch_weights=request.param == "dagan")
    return model, *export(model, tmp_path_factory.mktemp(request.param) / "bundle", plan)


def session(bundle: Bundle, graph: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(bundle.graph(graph)), providers=["CPUExecutionProvider"])


def test_names_shapes_and_types_are_the_declared_ones(exported: Any) -> None:
    model, bundle, _ = exported
    for subnetwork in subnetworks(model.config):
        graph = onnx.load(bundle.graph(subnetwork.name)).graph
        for declared, found in ((subnetwork.inputs, graph.input), (subnetwork.outputs, graph.output)):
            shapes = {
                it.name: tuple(dim.dim_param or dim.dim_value for dim in it.type.tensor_type.shape.dim) for it in found
            }
            assert shapes == {tensor.name: tensor.shape for tensor in declared}
            assert {it.type.tensor_type.elem_type for it in found} == {onnx.TensorProto.FLOAT}


def test_each_variant_has_the_inputs_of_its_parts(exported: Any) -> None:
    model, bundle, _ = exported
    parts = model.config.parts
    generator = {tensor.name for tensor in bundle.graphs["generator"].inputs}
    source = {tensor.name for tensor in bundle.graphs["source"].outputs}
    assert ("query" in generator) == ("query" in source) == (parts.attention == "depth")
    assert ("source_image" in generator) == (parts.decoder == "spade")
    assert ("depth" in source) == parts.uses_depth
    assert {"feature", "kp_value", "kp_jacobian", "thumbnail"} <= source


def test_batch_norms_are_folded(exported: Any) -> None:
    _, bundle, _ = exported
    for name in bundle.graphs:
        graph = onnx.load(bundle.graph(name)).graph
        makers = {output: node.op_type for node in graph.node for output in node.output}
        for node in graph.node:
            if node.op_type == "BatchNormalization":
                assert makers.get(node.input[0]) != "Conv", (name, node.name)
        kinds = Counter(node.op_type for node in graph.node)
        assert kinds["BatchNormalization"] <= 1, kinds  # the one before a residual block's first convolution


def test_nothing_in_a_graph_is_dead(exported: Any) -> None:
    _, bundle, _ = exported
    for name in bundle.graphs:
        graph = onnx.load(bundle.graph(name)).graph
        wanted = {output.name for output in graph.output}
        for node in reversed(graph.node):
            assert wanted.intersection(node.output), (name, node.name)
            wanted.update(node.input)
        assert wanted >= {tensor.name for tensor in (*graph.initializer, *graph.input)}, name


def test_no_frame_computes_again_what_the_source_alone_decides(exported: Any) -> None:
    """Convolutions, matrix products, sampling: all of them see something of the driving frame."""
    _, bundle, _ = exported
    for name in ("motion", "generator"):
        graph = onnx.load(bundle.graph(name)).graph
        moving = {it.name for it in graph.input if it.name.startswith("driving_") or it.name in ("flow", "occlusion")}
        assert moving
        for node in graph.node:
            if moving.intersection(node.input):
                moving.update(node.output)
            else:
                assert node.op_type not in ("Conv", "ConvTranspose", "MatMul", "GridSample", "Softmax"), node.name


def test_the_graphs_chained_are_the_network(exported: Any) -> None:
    """With three faces at once, each with its own movement scale, against the undivided network."""
    model, bundle, _ = exported
    faces = torch.from_numpy(verification_frames(model.config)).permute(0, 3, 1, 2).float() / 255
    source, driving, initial = faces[:3], faces[[1, 2, 3]], faces[[2, 3, 0]]
    scale = np.array([[0.7], [1.0], [1.4]], np.float32)
    with torch.inference_mode():
        found = [model.find_keypoints(image) for image in (source, driving, initial)]
        moved = transfer(*(KeyPoints(*(x.numpy() for x in face)) for face in found), scale)
        depth = model.depth(source) if model.depth is not None else None
        expected = model.generator(source, found[0], KeyPoints(*map(torch.from_numpy, moved)), depth)

    arrays: dict[str, np.ndarray] = {"source_image": source.numpy(), "scale": scale}

    def run(graph: str, role: str = "") -> dict[str, np.ndarray]:
        graph_session = session(bundle, graph)
        names = [node.name for node in graph_session.get_outputs()]
        fed = {node.name: arrays[node.name] for node in graph_session.get_inputs()}
        outputs = dict(zip(names, graph_session.run(names, fed), strict=True))
        return {role + name if name.startswith("kp_") else name: value for name, value in outputs.items()}

    for graph, role, image in (("source", "source_", source), ("driving", "driving_", driving),
                               ("driving", "initial_", initial)):  # fmt: skip
        arrays["image"] = image.numpy()
        arrays = run(graph, role) | arrays  # the source's depth is not overwritten by the driving one
    arrays |= run("motion")
    np.testing.assert_allclose(arrays["flow"], expected.motion.flow.numpy(), atol=2e-5)
    np.testing.assert_allclose(arrays["occlusion"], expected.motion.occlusion.numpy(), atol=2e-5)
    np.testing.assert_allclose(run("generator")["prediction"], expected.prediction.numpy(), atol=1e-3)


def test_the_manifest_tells_versions_and_plan(exported: Any) -> None:
    model, bundle, _ = exported
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    assert manifest["tools"]["torch"] == torch.__version__ and manifest["tools"]["onnxruntime"]
    assert manifest["plan"]["opset"] == 17 == onnx.load(bundle.graph("motion")).opset_import[0].version
    assert manifest["batch"] == manifest["plan"]["batch"] == "1:1:8"
    assert NetworkConfig.from_dict(manifest["config"]) == model.config


def test_the_report_holds_every_output(exported: Any) -> None:
    model, bundle, measured = exported
    assert bundle.report == measured and measured.failures() == []
    for subnetwork in subnetworks(model.config):
        graph = measured.graphs[subnetwork.name]
        assert graph.precision == "fp32" and graph.bytes == bundle.graph(subnetwork.name).stat().st_size
        assert graph.operations > 10 and graph.multiply_accumulates > 1000
        for tensor in subnetwork.outputs:
            entry = graph.errors["onnxruntime"][tensor.name]
            assert 0 <= entry.mean_abs <= entry.max_abs <= entry.tolerance and entry.psnr > 60
    assert set(measured.reenactment) == ({"onnxruntime", "torch"} if bundle.weights else {"onnxruntime"})


def test_an_export_is_reproducible(small_model: Any, tmp_path: Path) -> None:
    model = small_model("fomm")
    hashes = []
    for name in ("first", "second"):
        bundle, _ = export(model, tmp_path / name, Plan(torch_weights=False))
        hashes.append({file: entry["sha256"] for file, entry in bundle.manifest["files"].items()
                       if file != "verify.json"})  # fmt: skip
    assert hashes[0] == hashes[1]


def break_graph(monkeypatch: pytest.MonkeyPatch, name: str, original: Callable[..., Any] = exporter.trace) -> None:
    """From now on the exporter spoils the largest weight of one graph; `original` traces."""

    def spoiled(model: Model, subnetwork: Subnetwork, *arguments: Any) -> Any:
        graph = original(model, subnetwork, *arguments)
        if subnetwork.name == name:
            weights = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
            values = onnx.numpy_helper.to_array(weights) * np.float32(1.5)
            weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
        return graph

    monkeypatch.setattr(exporter, "trace", spoiled)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_is_not_the_network_is_not_written(
    small_model: Any, traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    graphs = {graph: traced("baseline", graph)[1] for graph in GRAPHS}
    break_graph(monkeypatch, name, lambda model, subnetwork, *_: graphs[subnetwork.name])
    with pytest.raises(ExportError, match=f"the export is not the network: {name}: .* nothing was written"):
        export(small_model("baseline"), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_older_bundle(
    small_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(small_model("fomm"), tmp_path / "bundle", Plan(torch_weights=False))
    before = {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()}
    break_graph(monkeypatch, "generator")
    with pytest.raises(ExportError):
        export(small_model("fomm", seed=1), tmp_path / "bundle", Plan(torch_weights=False), force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_compare_measures_what_it_says() -> None:
    reference = np.array([0.0, 4.0, -8.0])
    measured = compare(reference + [0, 0.01, 0.02], reference, Tolerance(1e-2, 30.0))
    assert measured.max_abs == pytest.approx(0.02)
    assert measured.mean_abs == pytest.approx(0.01)
    assert measured.tolerance == pytest.approx(0.08)  # a hundredth of the largest magnitude
    assert measured.psnr == pytest.approx(20 * np.log10(8 / np.sqrt((0.01**2 + 0.02**2) / 3)))
    assert measured.passed
    image = np.array([0.1, 0.2])  # PSNR of an image is that of the whole range, however dark it is
    assert compare(image + 0.01, image, Tolerance(1.0, 0.0), unit=1.0).psnr == pytest.approx(40.0)
    assert compare(reference, reference, Tolerance(1e-3, 30.0)) == Measured(0, 0, 200, 0.008, 30)
    assert not compare(reference + 0.09, reference, Tolerance(1e-2, 0.0)).passed
    assert not compare(reference + 0.01, reference, Tolerance(1e-2, 99.0)).passed


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_tolerance_lets_nan_through(value: float) -> None:
    assert not compare(np.array([value, 0.0]), np.zeros(2), Tolerance(1e9, -1e9)).passed
    assert not compare(np.zeros(2), np.array([value, 0.0]), Tolerance(1e9, -1e9)).passed


@pytest.fixture(scope="module")
def checkpoint(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small dagan in the published layout: the arguments that name it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save(folder / "model.pth.tar", small_model("dagan"), depth_dir=folder / "depth")
    return {"--checkpoint": str(folder / "model.pth.tar"), "--depth": str(folder / "depth")}


def command(arguments: dict[str, str], *more: str) -> int:
    return main([word for pair in arguments.items() for word in pair] + list(more))


def test_the_command_exports_and_names_the_next(
    tmp_path: Path, checkpoint: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my bundle"
    assert command(checkpoint, "--out", str(out)) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines()[-1] == (
        f"next: dagan-rt animate --bundle '{out}' --source portrait.png --driving clip.mp4 --out result.mp4"
    )
    assert "kp_jacobian" in printed.out and "reenactment" in printed.out
    assert Bundle.open(out).weights
    before = (out / "manifest.json").read_bytes()
    assert command(checkpoint, "--out", str(out)) == 2
    assert "--force" in capfd.readouterr().err
    assert (out / "manifest.json").read_bytes() == before
    assert command(checkpoint, "--out", str(out), "--force", "--no-torch-weights", "--opset", "18") == 0
    assert Bundle.open(out).weights is None
    assert onnx.load(out / "generator.onnx").opset_import[0].version == 18


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--checkpoint": "missing.pth.tar"}, "missing.pth.tar"),
        ({"--depth": "missing"}, "missing"),
        ({"--depth": None}, "depth"),
        ({"--out": "no/such/folder"}, "no/such"),
        ({"--opset": "16"}, "opset must be in 17..20, got 16"),
        ({"--verify-with": "missing.png"}, "missing.png"),
        ({"--checkpoint": None}, "--checkpoint"),
        ({"--opset": "new"}, "--opset"),
        ({"--wings": "2"}, "--wings"),
    ],
)
def test_bad_arguments_end_in_one_line(
    tmp_path: Path,
    checkpoint: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str | None],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {**checkpoint, "--out": "bundle", **change}
    assert command({name: value for name, value in arguments.items() if value is not None}) == 2
    line = capfd.readouterr().err
    assert line.startswith("python -m dagan_rt.export: error: ") and line.count("\n") == 1
    assert words in line
    assert list(tmp_path.iterdir()) == []
