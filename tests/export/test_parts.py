"""The paper's parts, each exported alone: names, shapes and numbers are those of the networks themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dagan_rt import checkpoints, cli
from dagan_rt.bundle import Bundle
from dagan_rt.errors import InputError
from dagan_rt.export import export
from dagan_rt.export.__main__ import main
from dagan_rt.export.plan import Plan
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.model import Model
from dagan_rt.networks.variants import VARIANTS
from dagan_rt.reenactor import Reenactor

#: What Figure 1 of the supplementary shows, variant by variant, written down once more.
PARTS = {
    "dagan": ["depth", "keypoints", "feature_encoder", "depth_encoder", "attention", "decoder", "discriminator"],
    "dagan_spade": ["depth", "keypoints", "feature_encoder", "depth_encoder", "attention", "decoder", "discriminator"],
    "dagan_sa": ["depth", "keypoints", "feature_encoder", "attention", "decoder", "discriminator"],
    "baseline": ["keypoints", "feature_encoder", "decoder", "discriminator"],
    "fomm": ["keypoints", "feature_encoder", "decoder", "discriminator"],
}
ATTENTION = {"dagan": "depth", "dagan_spade": "depth", "dagan_sa": "self"}
SIZE, COARSE, CHANNELS = 64, 16, 16  # of the small model: the image, its feature map, and that map's channels


def arrays(variant: str, part: str, batch: int) -> dict[str, torch.Tensor]:
    """Inputs of a part, by the names and in the shapes that they must have."""
    generator = torch.Generator().manual_seed(batch)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(batch, *shape, generator=generator)

    image, depth, feature = some(3, SIZE, SIZE), some(1, SIZE, SIZE), some(CHANNELS, COARSE, COARSE)
    if part == "keypoints":
        return {"image": image} | ({"depth": depth} if variant in ATTENTION else {})
    if part == "depth_encoder":
        return {"depth": depth}
    if part == "attention":
        asked = {"depth_feature": some(CHANNELS, COARSE, COARSE)} if ATTENTION[variant] == "depth" else {}
        return asked | {"warped_feature": feature}
    if part == "decoder":
        deformed = {"deformed": some(3, SIZE, SIZE)} if variant == "dagan_spade" else {}
        return {"attended_feature": feature} | deformed
    if part == "discriminator":
        return {"image": image, "kp_value": 2 * some(VARIANTS[variant].num_keypoints, 2) - 1}
    return {"image": image}


def network(model: Model, part: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the networks compute, called as a trainer calls them."""
    generator = model.generator
    if part == "depth":
        assert model.depth is not None
        return {"depth": model.depth(given["image"])}
    if part == "keypoints":
        found = model.keypoints(torch.cat(list(given.values()), dim=1))
        return {"kp_value": found.value, "kp_jacobian": found.jacobian}
    if part == "feature_encoder":
        return {"feature": generator.encode_image(given["image"])}
    if part == "depth_encoder":
        return {"depth_feature": generator.encode_depth(given["depth"])}
    if part == "attention":
        warped = given["warped_feature"]
        query = generator.AttnModule.query(given.get("depth_feature", warped))
        return {"attended_feature": generator.AttnModule(query, warped)}
    if part == "decoder":
        return {"prediction": generator.decode(given["attended_feature"], given.get("deformed"))}
    points = given["kp_value"]
    identity = torch.eye(2).expand(*points.shape[:2], 2, 2)
    features, scores = model.discriminator(given["image"], KeyPoints(points, identity))
    return {f"feature_{number}": feature for number, feature in enumerate(features)} | {"scores": scores}


def check(bundle: Bundle, model: Model, part: str, batches: list[int], axis: int | str) -> None:
    """Declared and exported names and shapes, and the numbers of every batch size, against the network's."""
    file = bundle.graph(part)
    graph = onnx.load(file).graph
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for batch in batches:
        given = arrays(model.config.variant, part, batch)
        with torch.inference_mode():
            expected = network(model, part, given)
        for tensors, declared, values in (
            (graph.input, bundle.graphs[part].inputs, given),
            (graph.output, bundle.graphs[part].outputs, expected),
        ):
            found = {
                it.name: [dim.dim_param or dim.dim_value for dim in it.type.tensor_type.shape.dim] for it in tensors
            }
            assert found == {name: [axis, *value.shape[1:]] for name, value in values.items()}
            assert [tensor.name for tensor in declared] == list(values)
            sides = {tensor.name: list(tensor.shape)[1:] for tensor in declared}
            assert sides == {name: shape[1:] for name, shape in found.items()}
        names = [output.name for output in session.get_outputs()]
        results = session.run(names, {name: value.numpy() for name, value in given.items()})
        for name, result in zip(names, results, strict=True):
            reference = expected[name].numpy()
            assert result.shape == reference.shape and reference.std() > 1e-3
            np.testing.assert_allclose(result, reference, rtol=0, atol=1e-4 * max(1, np.abs(reference).max()))


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request: pytest.FixtureRequest, small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, bundle with every part) of each variant."""
    model = small_model(request.param)
    plan = Plan(batch="1:2:4", only=tuple(PARTS[request.param]), torch_weights=False)
    return model, export(model, tmp_path_factory.mktemp(request.param) / "bundle", plan)[0]


def test_every_part_of_every_variant(exported: Any) -> None:
    model, bundle = exported
    assert list(Bundle.open(bundle.path).graphs) == PARTS[model.config.variant]
    for part in PARTS[model.config.variant]:
        check(bundle, model, part, [1, 2, 4], "batch")


def test_each_output_was_measured(exported: Any) -> None:
    _, bundle = exported
    report = bundle.report
    assert report.reenactment == {} and report.failures() == []
    for name, graph in bundle.graphs.items():
        assert set(report.graphs[name].errors["onnxruntime"]) == {tensor.name for tensor in graph.outputs}


def test_a_reenactor_says_why_it_cannot(exported: Any) -> None:
    _, bundle = exported
    with pytest.raises(InputError, match="cannot animate: it was exported with --only and lacks the graph source$"):
        Reenactor(bundle.path)


def test_info_prints_the_parts(exported: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, bundle = exported
    assert cli.main(["info", str(bundle.path)]) == 0
    printed = capsys.readouterr().out
    for name, graph in bundle.graphs.items():
        assert f"{name} (a part, alone, fp32)" in printed and f"{name}.onnx" in printed
        for tensor in (*graph.inputs, *graph.outputs):
            assert tensor.name in printed


def test_the_parts_in_a_row_are_the_generator(exported: Any) -> None:
    """From the image to the picture, with PyTorch doing nothing but the warp."""
    model, bundle = exported
    if model.config.variant == "dagan_spade":
        pytest.skip("its decoder takes the deformed image as well, see the parts one by one")
    torch.manual_seed(3)
    image, points = torch.rand(2, 3, SIZE, SIZE), []
    with torch.inference_mode():
        points = [model.find_keypoints(torch.rand(2, 3, SIZE, SIZE)) for _ in range(2)]
        depth = model.depth(image) if model.depth is not None else None
        expected = model.generator(image, *points, depth)

    def run(part: str, *given: Any) -> np.ndarray:
        session = onnxruntime.InferenceSession(str(bundle.graph(part)), providers=["CPUExecutionProvider"])
        values = [np.asarray(value) for value in given]
        fed = dict(zip([node.name for node in session.get_inputs()], values, strict=True))
        first: np.ndarray = session.run(None, fed)[0]
        return first

    warped = model.generator.warp(torch.from_numpy(run("feature_encoder", image)), *expected.motion[:2])
    attended = warped.numpy()
    if model.config.variant == "dagan":
        attended = run("attention", run("depth_encoder", run("depth", image)), warped)
    elif model.config.variant == "dagan_sa":
        attended = run("attention", warped)
    np.testing.assert_allclose(run("decoder", attended), expected.prediction.numpy(), atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_in_every_shape(small_model: Any, tmp_path: Path, batch: int) -> None:
    model = small_model("dagan")
    plan = Plan(batch=str(batch), only=tuple(PARTS["dagan"]), torch_weights=False)
    bundle, _ = export(model, tmp_path / "bundle", plan)
    for part in PARTS["dagan"]:
        check(bundle, model, part, [batch], batch)
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
            check(bundle, model, part, [batch + 1], batch)


@pytest.mark.parametrize("graph", ["source", "driving", "motion", "generator"])
def test_the_runtime_graphs_may_be_exported_alone(small_model: Any, tmp_path: Path, graph: str) -> None:
    bundle, measured = export(small_model("dagan"), tmp_path / "bundle", Plan(only=(graph, graph), torch_weights=False))
    assert list(bundle.graphs) == [graph] and measured.failures() == []
    other = "source" if graph != "source" else "driving"
    with pytest.raises(InputError, match=f"lacks the graph {other}"):
        Reenactor(tmp_path / "bundle")


def test_the_last_line_of_the_command_names_the_next(
    small_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints.save(tmp_path / "model.pth.tar", small_model("baseline"))
    out = tmp_path / "a bundle"
    command = ["--checkpoint", str(tmp_path / "model.pth.tar"), "--out", str(out), "--only", "keypoints", "decoder"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: dagan-rt info '{out}'"
    assert cli.main(["info", str(out)]) == 0
    assert sorted(path.name for path in out.glob("*.onnx")) == ["decoder.onnx", "keypoints.onnx"]
