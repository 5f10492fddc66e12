"""The recipes that ship, each built from the demo weights as far as a machine without a GPU can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dagan_rt import Reenactor, checkpoints
from dagan_rt._assets import asset
from dagan_rt.bundle import Bundle
from dagan_rt.export.__main__ import main
from dagan_rt.export.plan import read_plan
from dagan_rt.serving.check import check as check_repository
from dagan_rt.training.heads import HELD_OUT, draw_clip

#: But for those that export what another one does, and serve it otherwise.
RECIPES = sorted({path.stem for path in asset("export", "recipes").glob("*.toml")} - {"triton-cpu", "triton-gpus"})
PRECISION = {
    "cpu-fp32": "fp32",
    "cpu-int8": "int8",
    "rtx-desktop": "fp16",
    "datacenter-fp16": "fp16",
    "triton-gpu": "fp16",
    "triton-graphs": "fp32",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo() -> list[str]:
    """The arguments that name the demo weights."""
    weights, depth = asset("train", "demo", "model.pth.tar"), asset("train", "demo", "depth")
    return ["--checkpoint", str(weights), "--depth", str(depth)]


@pytest.fixture(scope="module", params=RECIPES)
def built(request: pytest.FixtureRequest, demo: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(recipe, bundle); without its engines where they need the GPU they are for, and without what Triton copies."""
    out = tmp_path_factory.mktemp(request.param) / "bundle"
    recipe = [*demo, "--recipe", request.param, "--out", str(out)]
    graphs_alone = request.param in ("datacenter-fp16", "triton-graphs")
    assert main([*recipe, *(["--target", "onnx"] if graphs_alone else [])]) == 0
    if request.param == "triton-gpu":
        checked = check_repository(out)
        assert checked.problems == [] and checked.warnings == []
        out = out / "reenact" / "1" / "bundle"
    return request.param, Bundle.open(out)


def test_every_recipe_builds_a_bundle_that_passed(built: Any) -> None:
    recipe, bundle = built
    report, plan = bundle.report, read_plan(recipe)
    assert report.failures() == [] and "onnxruntime" in report.reenactment
    assert str(bundle.batch) == plan.batch and (bundle.weights is not None) == plan.torch_weights
    precisions = {graph.precision for graph in bundle.graphs.values()}
    assert precisions == {PRECISION[recipe]} if recipe in PRECISION else precisions <= {"fp32", "fp16", "int8"}
    assert ("fp16 rounding" in report.reenactment) == ("fp16" in precisions)  # a CPU alone would not show it
    for name in bundle.graphs:
        operations = {node.op_type for node in onnx.load(bundle.graph(name)).graph.node}
        assert ("QuantizeLinear" in operations) == (bundle.graphs[name].precision == "int8")
    if recipe == "cpu-auto":
        reasons = [note.partition(":")[0] for note in report.notes]
        assert reasons[:4] == ["source", "driving", "motion", "generator"]
    assert any("synthetic heads" in note for note in report.notes) == (plan.calibrate == "heads")


def test_rtx_engines_are_real_and_tied_to_their_graphs(built: Any) -> None:
    recipe, bundle = built
    if recipe != "rtx-desktop":
        assert not bundle.report.engines
        return
    from dagan_rt.engines import engine_sets

    (engines,) = engine_sets(bundle)
    assert engines.compute_capabilities == ("8.6", "8.9", "12.0") and engines.key in bundle.report.engines
    for name in bundle.graphs:
        assert engines.graphs[name].onnx == bundle.manifest["files"][f"{name}.onnx"]["sha256"]
        assert engines.file(bundle.path, name).stat().st_size > 100_000


def test_frames_that_the_export_never_saw_stay_close(built: Any) -> None:
    """Another held-out head than the verification's, against PyTorch itself."""
    import torch

    recipe, bundle = built
    model = checkpoints.load(asset("train", "demo", "model.pth.tar"), asset("train", "demo", "depth"))
    frames = draw_clip(HELD_OUT.start + 9, 24, bundle.config.size).frames[::4]
    reenactor = Reenactor(bundle, "onnxruntime", "absolute")
    reenactor.set_source(frames[0])
    squares = []
    with torch.inference_mode():
        images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        for frame, image in zip(frames, images, strict=True):
            expected = model.eval()(images[:1], image[None]).prediction[0].permute(1, 2, 0).numpy()
            squares.append((reenactor.drive(frame) / 255.0 - expected) ** 2)
    psnr = -10 * np.log10(np.mean(squares))
    assert psnr >= {"fp32": 55, "fp16": 45, "int8": 35}.get(PRECISION.get(recipe, "int8"), 35), psnr


def test_the_data_centre_recipe_asks_for_its_library(
    demo: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        assert main([*demo, "--recipe", "datacenter-fp16", "--out", str(tmp_path / "bundle")]) == 2
        line = capfd.readouterr().err
        assert "pip install tensorrt-cu13" in line and line.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
