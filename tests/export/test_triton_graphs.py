"""The layout without Python: what Triton is told, and what an independent walk through the ensembles computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from dagan_rt import Reenactor
from dagan_rt.backends.onnxruntime import NumpyImages
from dagan_rt.bundle import GRAPHS, BatchProfile, Bundle, digest, write_manifest
from dagan_rt.engines import BuiltGraph, EngineSet
from dagan_rt.errors import InputError
from dagan_rt.export import onnx as onnx_export
from dagan_rt.export.subnetworks import subnetworks
from dagan_rt.export.triton_graphs import write_graphs
from dagan_rt.serving.repository import ServingPlan

PLAN = ServingPlan(layout="graphs", threads=1)
ENSEMBLES = ("dagan_open", "dagan_keypoints", "dagan_drive")
DTYPES = {"TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32}
Arrays = dict[str, np.ndarray]


def export(model: Any, folder: Path, batch: str = "1:1:8") -> Bundle:
    """A bundle of a model's graphs, without what else an export does."""
    folder.mkdir(parents=True)
    declared = subnetworks(model.config)
    for it in declared:
        onnx_export.save(onnx_export.trace(model, it, BatchProfile.parse(batch)), folder / f"{it.name}.onnx")
    write_manifest(folder, {
        "variant": model.config.variant, "config": model.config.to_dict(), "batch": batch, "tools": {},
        "graphs": {it.name: it.to_dict() | {"precision": "fp32"} for it in declared},
    })  # fmt: skip
    return Bundle.open(folder)


def read(folder: Path, name: str) -> Any:
    """A config.pbtxt, by Triton's own declaration of it."""
    return text_format.Parse((folder / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


class Walk:
    """A model repository without a server: runs a model by its files alone, an ensemble step by step."""

    def __init__(self, folder: Path) -> None:
        self.configs = {path.parent.name: read(folder, path.parent.name) for path in folder.glob("*/config.pbtxt")}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = {
            path.parts[-3]: onnxruntime.InferenceSession(str(path), options) for path in folder.glob("*/1/model.onnx")
        }

    def run(self, name: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        config = self.configs[name]
        self.check(config.input, inputs, config.max_batch_size)
        if name in self.sessions:
            outputs = [output.name for output in config.output]
            found = dict(zip(outputs, self.sessions[name].run(outputs, dict(inputs)), strict=True))
        else:
            tensors, steps = dict(inputs), list(config.ensemble_scheduling.step)
            while steps:  # in the order of data, as Triton does it, whatever that of the file
                step = next(it for it in steps if set(it.input_map.values()) <= set(tensors))
                steps.remove(step)
                given = self.run(step.model_name, {its: tensors[name] for its, name in step.input_map.items()})
                made = {name: given[its] for its, name in step.output_map.items()}
                assert not set(made) & set(tensors)
                tensors |= made
            found = {output.name: tensors[output.name] for output in config.output}
        self.check(config.output, found, config.max_batch_size)
        return found

    @staticmethod
    def check(declared: Any, arrays: Mapping[str, np.ndarray], most: int) -> None:
        assert {tensor.name for tensor in declared} == set(arrays)
        for tensor in declared:
            array = arrays[tensor.name]
            assert array.dtype == DTYPES[model_config_pb2.DataType.Name(tensor.data_type)]
            assert list(array.shape[1:] if most else array.shape) == list(tensor.dims)
            assert not most or array.shape[0] <= most


@pytest.fixture(scope="module")
def served(
    small_model: Any, tiny_bundle: Path, louder: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Bundle, Path]]:
    """`served(variant) -> (bundle, repository)`, once a variant."""
    made: dict[str, tuple[Bundle, Path]] = {}

    def serve(variant: str) -> tuple[Bundle, Path]:
        if variant not in made:
            root = tmp_path_factory.mktemp(variant)
            if variant == "dagan":
                shutil.copytree(tiny_bundle, root / "bundle")
            else:
                export(small_model(variant), root / "bundle")
            bundle = Bundle.open(louder(root / "bundle"))
            assert set(write_graphs(bundle, root / "models", PLAN)) == {
                path.name for path in (root / "models").iterdir()
            }
            made[variant] = bundle, root / "models"
        return made[variant]

    return serve


def pictures(count: int, seed: int = 0, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def open_session(walk: Walk, source: np.ndarray, first: np.ndarray | None) -> Arrays:
    """As a client does it, by the names of tensors alone."""
    state = walk.run("dagan_open", {"image": source[None]})
    found = walk.run("dagan_keypoints", {"frame": first[None]}) if first is not None else {
        name: state[f"source_{name}"] for name in ("kp_value", "kp_jacobian")
    }  # fmt: skip
    return state | {f"initial_{name}": array for name, array in found.items()} | {"scale": np.ones((1, 1), np.float32)}


@pytest.mark.parametrize("variant", ["dagan", "dagan_spade", "fomm"])
def test_the_ensembles_equal_the_library(served: Any, variant: str) -> None:
    bundle, models = served(variant)
    walk = Walk(models)
    source, *frames = pictures(4)
    for motion in ("relative", "absolute"):
        state = open_session(walk, source, frames[0] if motion == "relative" else None)
        with Reenactor(bundle, "onnxruntime", motion, threads=1) as reenactor:
            reenactor.set_source(source)
            seen = set()
            for frame in frames:
                found = walk.run("dagan_drive", {"frame": frame[None], **state})
                np.testing.assert_array_equal(found["image"][0], reenactor.drive(frame))
                seen.add(found["image"].tobytes())
                np.testing.assert_array_equal(found["kp_value"], reenactor.keypoints(frame).value)
            assert len(seen) == len(frames)


def test_a_batch_is_its_rows(served: Any) -> None:
    bundle, models = served("dagan")
    walk = Walk(models)
    sources, frames = pictures(3, 1), pictures(3, 2)
    states = [open_session(walk, source, frame) for source, frame in zip(sources, frames[::-1], strict=True)]
    stacked = {name: np.concatenate([state[name] for state in states]) for name in states[0]}
    together = walk.run("dagan_drive", {"frame": frames, **stacked})["image"]
    alone = [walk.run("dagan_drive", {"frame": f[None], **s})["image"][0] for f, s in zip(frames, states, strict=True)]
    apart = np.abs(together[:, None].astype(int) - np.stack(alone)[None]).mean(axis=(2, 3, 4))
    assert apart.diagonal().max() < 0.002  # another order of additions may turn a level over
    assert apart[~np.eye(3, dtype=bool)].min() > 0.02


def test_the_variants_keep_what_their_graphs_take(served: Any) -> None:
    kept = {
        variant: {output.name for output in read(served(variant)[1], "dagan_open").output}
        for variant in ("dagan", "dagan_spade", "fomm")
    }
    common = {"feature", "thumbnail", "source_kp_value", "source_kp_jacobian"}
    assert kept == {
        "dagan": common | {"query"}, "dagan_spade": common | {"query", "source_image"}, "fomm": common
    }  # fmt: skip


@pytest.mark.parametrize("variant", ["dagan", "dagan_spade", "fomm"])
def test_no_output_of_an_ensemble_feeds_a_step(served: Any, variant: str) -> None:
    """Triton leaves out the step that makes an output nobody asks for, whoever else needs it."""
    for name in ENSEMBLES:
        config = read(served(variant)[1], name)
        taken = {tensor for step in config.ensemble_scheduling.step for tensor in step.input_map.values()}
        assert not taken & {output.name for output in config.output}


def test_the_graphs_are_the_bundles_own(served: Any) -> None:
    bundle, models = served("dagan")
    for graph in GRAPHS:
        assert digest(models / f"dagan_{graph}" / "1" / "model.onnx") == digest(bundle.graph(graph))
    assert not [path for path in models.rglob("*") if path.suffix == ".py"]
    for name in ENSEMBLES:  # an empty folder would get lost on the way to a bucket
        assert list((models / name / "1").iterdir())


def test_the_conversions_are_the_librarys(served: Any) -> None:
    walk, cpu = Walk(served("dagan")[1]), NumpyImages()
    levels = np.arange(64 * 64 * 3, dtype=np.int64).reshape(1, 64, 64, 3).astype(np.uint8)
    planes = walk.run("dagan_from_image", {"image": levels})["planes"]
    np.testing.assert_array_equal(planes, cpu.from_image(levels[0]))
    np.testing.assert_array_equal(walk.run("dagan_to_image", {"planes": planes})["image"], levels)
    halves = np.linspace(-0.1, 1.1, planes.size, dtype=np.float32).reshape(planes.shape)
    halves.flat[:512] = (np.arange(512, dtype=np.float32) / 2 + 0.5) / 255  # where rounding has to choose
    found = walk.run("dagan_to_image", {"planes": halves})["image"][0]
    np.testing.assert_array_equal(found, cpu.to_image(halves))


def test_every_model_bounds_its_queue(served: Any) -> None:
    bundle, models = served("dagan")
    for path in models.iterdir():
        config = read(models, path.name)
        assert config.name == path.name and config.max_batch_size == 8
        assert not config.response_cache.enable and config.version_policy.latest.num_versions == 1
        stated = {key: value.string_value for key, value in config.parameters.items()}
        assert stated["variant"] == "dagan" and stated["size"] == "64" and stated["precision"] == "fp32"
        assert stated["bundle_sha256"] == digest(bundle.path / "manifest.json")["sha256"]
        if path.name in ENSEMBLES:
            assert (
                config.platform == "ensemble" and not config.instance_group and not config.HasField("dynamic_batching")
            )
            continue
        assert config.backend == "onnxruntime" and stated["intra_op_thread_count"] == "1"
        batching, policy = config.dynamic_batching, config.dynamic_batching.default_queue_policy
        assert list(batching.preferred_batch_size) == [8] and batching.max_queue_delay_microseconds == 400
        assert policy.max_queue_size == PLAN.queue * PLAN.sequences and policy.timeout_action == policy.REJECT
        assert policy.default_timeout_microseconds == 10_000_000 and policy.allow_timeout_override


@pytest.mark.parametrize(
    ("instances", "expected"),
    [("cpu", ("KIND_CPU", [])), ("gpu", ("KIND_GPU", [])), ("gpu:0,2", ("KIND_GPU", [0, 2]))],
)
def test_instances_and_batches_follow_the_plan(served: Any, tmp_path: Path, instances: str, expected: Any) -> None:
    plan = replace(PLAN, instances=instances, count=2, version=7, batch=4, queue=3, sequences=5, deadline=0.0)
    write_graphs(served("fomm")[0], tmp_path, plan)
    config = read(tmp_path, "dagan_motion")
    group = config.instance_group[0]
    assert (group.Kind.Name(group.kind), list(group.gpus), group.count) == (*expected, 2)
    assert config.max_batch_size == 4 and list(config.dynamic_batching.preferred_batch_size) == [4]
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 15
    assert (tmp_path / "dagan_motion" / "7" / "model.onnx").is_file()


def test_warm_up_runs_on_local_frames_that_have_an_inverse(served: Any, tmp_path: Path) -> None:
    bundle, models = served("dagan")
    walk = Walk(models)
    for name in ("dagan_source", "dagan_driving", "dagan_motion", "dagan_generator", "dagan_to_image"):
        config = walk.configs[name]
        (request,) = config.model_warmup
        assert request.batch_size == 1 and set(request.inputs) == {tensor.name for tensor in config.input}
        inputs = {}
        for tensor in config.input:
            entry, dtype = request.inputs[tensor.name], DTYPES[model_config_pb2.DataType.Name(tensor.data_type)]
            assert list(entry.dims) == list(tensor.dims) and entry.data_type == tensor.data_type
            inputs[tensor.name] = np.zeros((1, *entry.dims), dtype)
            if entry.input_data_file:
                data = np.fromfile(models / name / "warmup" / entry.input_data_file, dtype)
                inputs[tensor.name][:] = data.reshape(entry.dims)
        assert all(np.isfinite(array).all() for array in walk.run(name, inputs).values())
    write_graphs(bundle, tmp_path, replace(PLAN, warm_up=False))
    assert not read(tmp_path, "dagan_motion").model_warmup


def test_a_fixed_batch_is_part_of_the_shape(small_model: Any, tmp_path: Path) -> None:
    bundle = export(small_model("fomm"), tmp_path / "bundle", batch="1")
    write_graphs(bundle, tmp_path / "models", PLAN)
    walk = Walk(tmp_path / "models")
    assert {config.max_batch_size for config in walk.configs.values()} == {0}
    source, frame = pictures(2)
    state = open_session(walk, source, frame)
    with Reenactor(bundle, "onnxruntime", threads=1) as reenactor:
        reenactor.set_source(source)
        image = walk.run("dagan_drive", {"frame": frame[None], **state})["image"][0]
        np.testing.assert_array_equal(image, reenactor.drive(frame))


def with_engines(served: Any, folder: Path, *sets: EngineSet) -> Bundle:
    """The bundle with engines that are none: only names and hashes matter here."""
    bundle = served("fomm")[0]
    folder.mkdir()
    for graph in GRAPHS:
        (folder / f"{graph}.onnx").write_bytes(bundle.graph(graph).read_bytes())
    for engines in sets:
        graphs = {graph: BuiltGraph("fp16", digest(folder / f"{graph}.onnx")["sha256"], 7, 9) for graph in GRAPHS}
        engines = replace(engines, graphs=graphs)
        (folder / "engines" / engines.key).mkdir(parents=True)
        for graph in GRAPHS:
            engines.file(folder, graph).write_bytes(f"{graph} for {engines.compute_capabilities}".encode())
        (folder / "engines" / engines.key / "engine.json").write_text(json.dumps(engines.to_dict()))
    write_manifest(folder, {key: value for key, value in bundle.manifest.items() if key != "files"})
    return Bundle.open(folder)


ENGINES = EngineSet("tensorrt", "10.9.0.34", ("8.9",), "1:2:4", "0123456789ab", False, 1.0, {
    "source": BuiltGraph("fp16", "0" * 64, 7, 9)
})  # fmt: skip
ON_ENGINES = replace(PLAN, backend="tensorrt", instances="gpu")


def test_engines_take_the_place_of_graphs(served: Any, tmp_path: Path) -> None:
    bundle = with_engines(served, tmp_path / "bundle", replace(ENGINES, plugins="aot"))
    write_graphs(bundle, tmp_path / "models", ON_ENGINES)
    config = read(tmp_path / "models", "dagan_generator")
    assert config.backend == "tensorrt" and config.max_batch_size == 4 and not config.cc_model_filenames
    assert config.parameters["tensorrt_version"].string_value == "10.9.0.34"
    assert (tmp_path / "models/dagan_generator/1/model.plan").read_bytes() == b"generator for ('8.9',)"
    assert read(tmp_path / "models", "dagan_to_image").backend == "onnxruntime"


def test_engines_of_several_gpus_lie_side_by_side(served: Any, tmp_path: Path) -> None:
    sets = [ENGINES, replace(ENGINES, compute_capabilities=("9.0",))]
    write_graphs(with_engines(served, tmp_path / "bundle", *sets), tmp_path / "models", ON_ENGINES)
    files = read(tmp_path / "models", "dagan_motion").cc_model_filenames
    for capability in ("8.9", "9.0"):
        content = (tmp_path / "models/dagan_motion/1" / files[capability]).read_bytes()
        assert content == f"motion for ('{capability}',)".encode()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ((), "holds no tensorrt engines for Triton to run"),
        (
            (replace(ENGINES, plugins="python"),),
            "plugins written in Python, which Triton's TensorRT backend cannot run",
        ),
        ((replace(ENGINES, stripped=True),), "have no weights, and Triton's TensorRT backend cannot fill them in"),
        (
            (ENGINES, replace(ENGINES, version="10.13.0", compute_capabilities=("9.0",))),
            "holds engines of tensorrt 10.*, and a server runs one",
        ),
    ],
)
def test_engines_that_triton_cannot_run_are_refused(served: Any, tmp_path: Path, sets: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_graphs(with_engines(served, tmp_path / "bundle", *sets), tmp_path / "models", ON_ENGINES)


def test_a_bundle_that_cannot_animate_is_refused(served: Any, tmp_path: Path) -> None:
    bundle = served("fomm")[0]
    parts = replace(bundle, graphs={name: graph for name, graph in bundle.graphs.items() if name != "motion"})
    with pytest.raises(InputError, match="cannot be served: it was exported with --only and lacks the graph motion"):
        write_graphs(parts, tmp_path, PLAN)
    generator = bundle.graphs["generator"]
    strange = replace(generator, inputs=(*generator.inputs, replace(generator.inputs[0], name="mood")))
    with pytest.raises(InputError, match="cannot be served as an ensemble: no graph gives mood"):
        write_graphs(replace(bundle, graphs={**bundle.graphs, "generator": strange}), tmp_path, PLAN)


def test_the_conversions_are_old_onnx(served: Any) -> None:
    for name in ("dagan_from_image", "dagan_to_image", "dagan_points"):
        model = onnx.load(str(served("dagan")[1] / name / "1" / "model.onnx"))
        assert model.ir_version == 8 and [it.version for it in model.opset_import] == [17]
