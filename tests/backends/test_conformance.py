"""What every backend must do, asked of each in the same way; a backend that cannot run here is skipped by name.

"imitated" is the TensorRT backend on imitations of TensorRT and CuPy, which need no GPU.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dagan_rt import InputError, Reenactor, backends
from dagan_rt.bundle import Bundle, write_manifest
from dagan_rt.engines import FLAVOURS, compute_capability
from dagan_rt.training.heads import HELD_OUT, draw_clip


@pytest.fixture(scope="module")
def bundle(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from dagan_rt.export import export

    # The variant that uses every input.
    return export(small_model("dagan_spade"), tmp_path_factory.mktemp("conformance") / "bundle")[0]


@cache
def imitation() -> ModuleType:
    spec = util.spec_from_file_location("dagan_rt_tests_imitation", Path(__file__).with_name("imitation.py"))
    assert spec and spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_engines(bundle: Bundle, root: Path, *flavours: str) -> Bundle:
    """A copy of a bundle with engines for the GPU here, or for the imitated one."""
    from dagan_rt.export.tensorrt import build_engines, graphs_of

    shutil.copytree(bundle.path, root)
    for flavour in flavours:
        build_engines(
            root, flavour, graphs_of(bundle), batch=bundle.batch, precisions=dict.fromkeys(bundle.graphs, "fp32"),
            recipe_hash="0" * 12, timing_cache=root.parent / "times",
        )  # fmt: skip
    write_manifest(root, bundle.manifest)
    return Bundle.open(root)


@pytest.fixture(scope="module", params=[*backends.names(), "imitated"])
def backend(request: pytest.FixtureRequest, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    if request.param == "imitated":
        with pytest.MonkeyPatch.context() as patch:
            imitation().install(patch)
            yield backends.open_backend("tensorrt", with_engines(bundle, folder, "tensorrt"))
        return
    flavour = FLAVOURS.get(request.param)
    if flavour and not flavour.missing() and compute_capability():
        bundle = with_engines(bundle, folder, flavour.name)
    if reason := backends.missing(request.param, bundle):
        pytest.skip(reason)
    yield backends.open_backend(request.param, bundle, threads=1)


@pytest.fixture(scope="module")
def frames(bundle: Bundle) -> np.ndarray:
    return draw_clip(HELD_OUT.start + 5, 12, bundle.config.size).frames[::4]


def random_inputs(bundle: Bundle, graph: str, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {
        x.name: [batch if isinstance(size, str) else size for size in x.shape] for x in bundle.graphs[graph].inputs
    }
    arrays = {name: rng.uniform(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    for name in arrays:
        if name.endswith("jacobian"):
            arrays[name] = (np.eye(2) + 0.2 * arrays[name]).astype(np.float32)
    return arrays


def test_it_says_its_name(backend: Any) -> None:
    assert backend.name in backends.names()


def test_images_become_planes_in_zero_to_one(backend: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)
    planes = backend.to_numpy(backend.from_image(image))
    assert planes.shape == (1, 3, 6, 4) and planes.dtype == np.float32
    for y, x, channel in np.ndindex(image.shape):
        assert planes[0, channel, y, x] == pytest.approx(image[y, x, channel] / 255, abs=1e-7)


def test_every_level_survives_the_round_trip(backend: Any) -> None:
    image = np.arange(256 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 16, 3)
    back = backend.to_image(backend.from_image(image))
    np.testing.assert_array_equal(back, image)
    assert back.dtype == np.uint8 and back.flags.c_contiguous


def test_predictions_are_rounded_and_clipped(backend: Any) -> None:
    levels = np.array([-3, 0.49, 0.51, 99.4, 99.6, 254.6, 300], np.float32)
    prediction = np.broadcast_to((levels / 255)[None, None, None], (1, 3, 1, 7))
    result = backend.to_image(backend.from_numpy(prediction))
    np.testing.assert_array_equal(result[0, :, 0], [0, 0, 1, 99, 100, 255, 255])


def test_any_memory_layout_will_do(backend: Any) -> None:
    image = np.random.default_rng(1).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    view = image[::-1, ::2, ::-1]
    view.flags.writeable = False
    np.testing.assert_array_equal(backend.to_image(backend.from_image(view)), view)


def test_an_image_may_be_changed_afterwards(backend: Any) -> None:
    image = np.full((4, 4, 3), 10, np.uint8)
    planes = backend.from_image(image)
    image[:] = 200
    assert (backend.to_image(planes) == 10).all()


def test_arrays_survive_the_round_trip(backend: Any) -> None:
    values = np.random.default_rng(2).standard_normal((2, 5)).astype(np.float32)
    np.testing.assert_array_equal(backend.to_numpy(backend.from_numpy(values)), values)
    assert backend.to_numpy(backend.from_numpy(values.astype(np.float64))).dtype == np.float32


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("graph", ["source", "driving", "motion", "generator"])
def test_graphs_give_their_declared_outputs(backend: Any, bundle: Bundle, graph: str, batch: int) -> None:
    inputs = {name: backend.from_numpy(value) for name, value in random_inputs(bundle, graph, batch).items()}
    outputs = backend.run(graph, inputs)
    declared = {x.name: tuple(batch if isinstance(size, str) else size for size in x.shape)
                for x in bundle.graphs[graph].outputs}  # fmt: skip
    arrays = {name: backend.to_numpy(value) for name, value in outputs.items()}
    assert {name: value.shape for name, value in arrays.items()} == declared
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in arrays.values())


@pytest.mark.parametrize("graph", ["source", "driving", "motion", "generator"])
def test_inputs_are_bound_by_name_and_left_alone(backend: Any, bundle: Bundle, graph: str) -> None:
    arrays = random_inputs(bundle, graph, 1)
    inputs = {name: backend.from_numpy(value.copy()) for name, value in arrays.items()}
    first = backend.run(graph, inputs)
    kept = {name: backend.to_numpy(value).copy() for name, value in first.items()}
    backend.run(graph, {name: backend.from_numpy(v) for name, v in random_inputs(bundle, graph, 1, seed=9).items()})
    again = backend.run(graph, dict(reversed(inputs.items())))
    for name, value in kept.items():
        np.testing.assert_array_equal(backend.to_numpy(first[name]), value)  # a later run does not overwrite it
        np.testing.assert_allclose(backend.to_numpy(again[name]), value, atol=1e-6)
    for name, value in arrays.items():
        np.testing.assert_array_equal(backend.to_numpy(inputs[name]), value)


@pytest.mark.parametrize("options", [{}, {"motion": "absolute"}, {"adapt_scale": True}], ids=str)
def test_a_session_shows_what_the_undivided_network_shows(
    backend: Any, bundle: Bundle, frames: np.ndarray, options: dict[str, Any]
) -> None:
    import torch

    from dagan_rt import checkpoints
    from dagan_rt.keypoints import KeyPoints
    from dagan_rt.transfer import movement_scale, transfer

    assert bundle.weights is not None
    model = checkpoints.load(bundle.weights, bundle.depth_weights)
    source, initial, driving = (torch.from_numpy(x.copy()).permute(2, 0, 1)[None].float() / 255 for x in frames)
    with torch.inference_mode():
        at, start, to = (model.find_keypoints(image) for image in (source, initial, driving))
        if "motion" not in options:
            faces = [KeyPoints(*(x.numpy() for x in face)) for face in (at, to, start)]
            scale = movement_scale(faces[0], faces[2]) if options else 1.0
            to = KeyPoints(*map(torch.from_numpy, transfer(*faces, scale)))
        expected = model.generator(source, at, to, model.depth(source)).prediction[0].permute(1, 2, 0).numpy()
    reenactor = Reenactor(bundle, backend, **options)
    reenactor.set_source(frames[0])
    reenactor.drive(frames[1])
    assert np.abs(reenactor.drive(frames[2]) - expected * 255).max() < 0.6  # rounding alone is 0.5
    by_points = Reenactor(bundle, backend, **options, by_points=True)
    by_points.set_source(frames[0])
    by_points.drive(frames[1])
    again = by_points.submit_points(by_points.keypoints(frames[2])).result()[0]
    assert np.abs(again - expected * 255).max() < 0.6


def test_onnxruntime_names_a_graph_it_cannot_load(bundle: Bundle, tmp_path: Path) -> None:
    from dagan_rt.bundle import Graph

    (tmp_path / "motion.onnx").write_bytes(b"\x08\x07garbage" * 100)
    motion = bundle.graphs["motion"]
    graphs = {**bundle.graphs, "motion": Graph("motion", tmp_path / "motion.onnx", "", motion.inputs, motion.outputs)}
    with pytest.raises(InputError, match="motion.onnx cannot be loaded by ONNX Runtime") as caught:
        backends.open_backend("onnxruntime", replace(bundle, graphs=graphs))
    assert "\n" not in str(caught.value)


def test_onnxruntime_names_a_graph_that_the_manifest_does_not_describe(bundle: Bundle) -> None:
    graphs = {**bundle.graphs, "motion": bundle.graphs["driving"]}
    swapped = replace(bundle, graphs=graphs)
    backends.open_backend("onnxruntime", swapped)
    graphs["motion"] = replace(bundle.graphs["motion"], inputs=bundle.graphs["motion"].inputs[1:])
    with pytest.raises(InputError, match="motion.onnx: the manifest declares the inputs"):
        backends.open_backend("onnxruntime", replace(bundle, graphs=graphs))


def test_torch_needs_weights_in_the_bundle(bundle: Bundle) -> None:
    without = replace(bundle, manifest={"files": {}})
    assert backends.missing("torch") is None
    with pytest.raises(InputError, match="backend torch cannot run here: .* holds no weights for the torch backend"):
        backends.open_backend("torch", without)
    with pytest.raises(InputError, match="holds no weights for the torch backend"):
        importlib.import_module("dagan_rt.backends.torch").open(without)


def test_torch_refuses_weights_of_another_network(bundle: Bundle) -> None:
    other = replace(bundle, config=replace(bundle.config, size=96))
    with pytest.raises(InputError, match="not those that the manifest describes"):
        backends.open_backend("torch", other)


def test_the_runtime_never_imports_torch(bundle: Bundle) -> None:
    program = f"""
import sys
import dagan_rt
assert not {{"numpy", "torch", "onnxruntime"}} & set(sys.modules), "import dagan_rt is heavy"
import numpy as np
from dagan_rt import Reenactor
reenactor = Reenactor({str(bundle.path)!r}, adapt_scale=True)
image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
reenactor.set_source(image)
reenactor.drive(image)
assert reenactor.backend_name in ("openvino", "onnxruntime")
assert not {{"torch", "onnx", "onnxsim"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
