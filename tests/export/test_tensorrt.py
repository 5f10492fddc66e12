"""Real TensorRT-RTX engines, which need no GPU to build, and TensorRT's own ways on an imitation of it."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dagan_rt import engines
from dagan_rt.bundle import BatchProfile, Tensor, digest
from dagan_rt.engines import EngineSet
from dagan_rt.errors import InputError, MissingPackage
from dagan_rt.export import tensorrt as adapter
from dagan_rt.export.subnetworks import Subnetwork, choose, subnetworks
from dagan_rt.export.tensorrt import PORTABLE, Summary, build_engines

GRAPHS = ("source", "driving", "motion", "generator")
RECIPE = "0123456789ab"

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the package tensorrt_rtx: pip install -e '.[dev]'"
)
without_gpu = pytest.mark.skipif(engines.compute_capability() is not None, reason="is about machines without a GPU")


@cache
def imitation() -> ModuleType:
    path = Path(__file__).parents[1] / "backends" / "imitation.py"
    spec = importlib.util.spec_from_file_location("dagan_rt_tests_imitation", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def all_traced(traced: Any) -> Any:
    """`all_traced(variant)`: every subnetwork with its fp32 graph, dynamic in the batch."""
    return lambda variant: [traced(variant, graph) for graph in GRAPHS]


def write(folder: Path, traced: list[tuple[Subnetwork, Any]], precision: str = "fp32") -> adapter.Graphs:
    """The ONNX files of a variant in one precision, as `build_engines` takes them."""
    from dagan_rt.export import onnx
    from dagan_rt.export.precision import lower

    rng = np.random.default_rng(0)
    graphs = {}
    for subnetwork, graph in traced:
        shapes = {x.name: [1 if isinstance(size, str) else size for size in x.shape] for x in subnetwork.inputs}
        sample = {name: rng.uniform(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
        path = folder / f"{subnetwork.name}.onnx"
        onnx.save(lower(graph, precision, subnetwork.trunks, [sample] if precision == "int8" else None), path)
        graphs[subnetwork.name] = (path, subnetwork.inputs)
    return graphs


def build(
    folder: Path, graphs: adapter.Graphs, flavour: str = "tensorrt-rtx", precision: str = "fp32", **options: Any
) -> tuple[EngineSet, dict[str, Summary]]:
    options = {"batch": BatchProfile.parse("1:2:8"), "timing_cache": folder / "times"} | options
    precisions = dict.fromkeys(graphs, precision)
    return build_engines(folder, flavour, graphs, precisions=precisions, recipe_hash=RECIPE, **options)


def one_node(path: Path, operation: str, domain: str = "", dtype: int = 1, **attributes: Any) -> adapter.Graphs:
    """A graph of one node after another, the second of which is `operation`."""
    import onnx
    from onnx import helper

    shape = ["batch", 2, 4, 4]
    values = [helper.make_tensor_value_info(name, dtype, shape) for name in ("x", "y")]
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="first"),
        helper.make_node(operation, ["r"], ["y"], name="second", domain=domain, **attributes),
    ]
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    return {"odd": (path, (Tensor("x", ("batch", 2, 4, 4)),))}


def assert_one_line(message: str, *parts: str) -> None:
    assert "\n" not in message and len(message) < 600
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def assert_nothing_left(folder: Path) -> None:
    assert not (folder / "engines").exists()


# ---------------------------------------------------------------------------------------------------------------------
# TensorRT-RTX


@needs_rtx
@without_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("variant", ["dagan", "dagan_spade", "fomm"])
def test_every_graph_becomes_an_engine(
    tmp_path: Path, all_traced: Any, capfd: pytest.CaptureFixture[str], variant: str, precision: str
) -> None:
    import tensorrt_rtx

    graphs = write(tmp_path, all_traced(variant), precision)
    capfd.readouterr()
    steps: list[str] = []
    found, summaries = build(tmp_path, graphs, precision=precision, report=steps.append)
    assert capfd.readouterr() == ("", "")
    assert steps == list(GRAPHS)
    assert found.compute_capabilities == PORTABLE and found.version == tensorrt_rtx.__version__
    folder = tmp_path / "engines" / found.key
    assert sorted(path.name for path in folder.iterdir()) == sorted(["engine.json", *(f"{it}.engine" for it in GRAPHS)])
    assert EngineSet.from_dict(json.loads((folder / "engine.json").read_text())) == found
    runtime = tensorrt_rtx.Runtime(engines.logger(tensorrt_rtx))
    for subnetwork, _ in all_traced(variant):
        summary, file = summaries[subnetwork.name], found.file(tmp_path, subnetwork.name)
        # By name: the order of the parsed network is its own.
        assert {it.name: it for it in summary.inputs} == {it.name: it for it in subnetwork.inputs}
        assert {it.name: it for it in summary.outputs} == {it.name: it for it in subnetwork.outputs}
        assert summary.bytes == file.stat().st_size == found.graphs[subnetwork.name].bytes > 10_000
        assert summary.layers == found.graphs[subnetwork.name].layers > 10 and summary.seconds > 0
        assert summary.fused is None and "where there is a GPU" in summary.not_inspected
        assert found.graphs[subnetwork.name].onnx == digest(graphs[subnetwork.name][0])["sha256"]
        assert not malformed(runtime, file.read_bytes())


def malformed(runtime: Any, content: bytes) -> bool:
    """Whether the library knows bytes to be no engine of its own; it tells even without a driver."""
    import tensorrt_rtx

    _, diagnostics = runtime.get_engine_validity(content)
    flag = tensorrt_rtx.EngineInvalidityDiagnostics.MALFORMED_ENGINE
    return bool(int(diagnostics) & int(flag))


@needs_rtx
@without_gpu
def test_the_library_tells_an_engine_from_other_bytes_and_needs_a_driver_to_load_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import tensorrt_rtx

    found, _ = build(tmp_path, one_node(tmp_path / "odd.onnx", "Sigmoid"))
    content = found.file(tmp_path, "odd").read_bytes()
    runtime = tensorrt_rtx.Runtime(engines.logger(tensorrt_rtx))
    assert not malformed(runtime, content)
    assert malformed(runtime, b"no engine" + content[9:])
    engines.complaint(tensorrt_rtx)
    assert runtime.deserialize_cuda_engine(content) is None
    assert_one_line(engines.complaint(tensorrt_rtx), "CUDA driver version is insufficient")
    assert capfd.readouterr() == ("", "")


class Recording:
    """A real builder that remembers the profiles and configurations it made."""

    def __init__(self, builder: Any) -> None:
        self._builder, self.profiles, self.configs = builder, [], []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def create_optimization_profile(self) -> Any:
        self.profiles.append(self._builder.create_optimization_profile())
        return self.profiles[-1]

    def create_builder_config(self) -> Any:
        self.configs.append(self._builder.create_builder_config())
        return self.configs[-1]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    found: list[Recording] = []
    original = adapter._Build.__init__

    def init(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        self.builder = Recording(self.builder)
        found.append(self.builder)

    monkeypatch.setattr(adapter._Build, "__init__", init)
    return found


@needs_rtx
@without_gpu
def test_the_profile_and_the_configuration_are_what_was_asked(
    tmp_path: Path, all_traced: Any, recorded: list[Recording]
) -> None:
    import tensorrt_rtx as rtx

    build(tmp_path, write(tmp_path, all_traced("dagan")), compute_capabilities=("12.0", "8.6", "8.6"))
    motion = recorded[GRAPHS.index("motion")]
    (profile,), (config,) = motion.profiles, motion.configs
    assert config.num_optimization_profiles == 1
    assert [tuple(shape) for shape in profile.get_shape("source_kp_jacobian")] == [(n, 15, 2, 2) for n in (1, 2, 8)]
    assert [tuple(shape) for shape in profile.get_shape("scale")] == [(n, 1) for n in (1, 2, 8)]
    targets = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert targets == [rtx.ComputeCapability.SM86, rtx.ComputeCapability.SM120]
    assert not config.get_flag(rtx.BuilderFlag.TF32)
    assert config.get_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)


@needs_rtx
@without_gpu
def test_attention_of_many_large_faces_has_room(tmp_path: Path) -> None:
    """The logits of 32 faces at 64 × 64 positions take 2 GB, and softmax as much again."""
    import torch

    from dagan_rt.export.onnx import save, trace
    from dagan_rt.networks.config import NetworkConfig
    from dagan_rt.networks.model import Model

    torch.manual_seed(0)
    widths = {"generator_width": 8, "generator_max": 16, "query_width": 16}
    config = NetworkConfig(variant="dagan_sa", size=128, down_blocks=1, **widths)
    profile, (attention,) = BatchProfile.parse("1:8:32"), choose(config, ["attention"])
    save(trace(Model(config).eval(), attention, profile), tmp_path / "attention.onnx")
    build(tmp_path, {"attention": (tmp_path / "attention.onnx", attention.inputs)}, batch=profile)


@needs_rtx
@without_gpu
def test_a_fixed_batch_needs_no_profile(tmp_path: Path, small_model: Any, recorded: list[Recording]) -> None:
    from dagan_rt.export.onnx import save, trace

    model, three = small_model("fomm"), BatchProfile.parse("3")
    motion = next(it for it in subnetworks(model.config) if it.name == "motion")
    save(trace(model, motion, three), tmp_path / "motion.onnx")
    found, summaries = build(tmp_path, {"motion": (tmp_path / "motion.onnx", motion.inputs)}, batch=three)
    assert recorded[0].configs[0].num_optimization_profiles == 0
    assert "-b3-" in found.key
    assert {it.shape[0] for it in (*summaries["motion"].inputs, *summaries["motion"].outputs)} == {3}
    with pytest.raises(InputError) as caught:
        build(tmp_path, {"motion": (tmp_path / "motion.onnx", motion.inputs)}, batch=BatchProfile.parse("2"))
    assert_one_line(str(caught.value), "must be float32 ['batch', 10, 2] with a batch of 2, got float32 [3, 10, 2]")


@needs_rtx
@without_gpu
def test_building_again_gives_the_same_key_and_replaces(tmp_path: Path) -> None:
    graphs = one_node(tmp_path / "odd.onnx", "Sigmoid")
    first, _ = build(tmp_path, graphs)
    first.file(tmp_path, "odd").write_bytes(b"damaged")
    second, _ = build(tmp_path, graphs)
    assert second.key == first.key
    assert second.file(tmp_path, "odd").stat().st_size == second.graphs["odd"].bytes
    assert len(list((tmp_path / "engines").iterdir())) == 1


@needs_rtx
@pytest.mark.parametrize(("operation", "domain"), [("Inverse", "com.microsoft"), ("Det", "")])
def test_an_operator_that_is_lacking_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], operation: str, domain: str
) -> None:
    with pytest.raises(InputError) as caught:
        build(tmp_path, one_node(tmp_path / "odd.onnx", operation, domain))
    version = engines.FLAVOURS["tensorrt-rtx"].load().__version__
    failed = f"graph odd (odd.onnx) cannot be built by tensorrt-rtx {version}: the op {operation} of node 'second': "
    assert_one_line(str(caught.value), failed)
    assert str(caught.value).startswith(failed)
    assert_nothing_left(tmp_path)
    assert capfd.readouterr() == ("", "")


@needs_rtx
@without_gpu
def test_a_later_graph_that_fails_takes_the_earlier_with_it(tmp_path: Path) -> None:
    good = one_node(tmp_path / "good.onnx", "Sigmoid")["odd"]
    with pytest.raises(InputError, match="graph odd"):
        build(tmp_path, {"good": good, **one_node(tmp_path / "odd.onnx", "Det")})
    assert_nothing_left(tmp_path)
    kept, _ = build(tmp_path, {"good": good})
    with pytest.raises(InputError, match="graph odd"):
        build(tmp_path, {"good": good, **one_node(tmp_path / "odd.onnx", "Det")})
    assert [path.name for path in (tmp_path / "engines").iterdir()] == [kept.key]


@needs_rtx
@without_gpu
def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    graphs = {name: one_node(tmp_path / f"{name}.onnx", "Sigmoid")["odd"] for name in ("one", "two")}

    def interrupt(graph: str) -> None:
        if graph == "two":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, graphs, report=interrupt)
    assert_nothing_left(tmp_path)


@needs_rtx
def test_a_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.onnx").write_bytes(b"no graph" * 100)
    with pytest.raises(InputError) as caught:
        build(tmp_path, {"odd": (tmp_path / "odd.onnx", (Tensor("x", ("batch", 2, 4, 4)),))})
    assert_one_line(str(caught.value), "graph odd (odd.onnx) cannot be built by tensorrt-rtx", "Failed to parse")


@needs_rtx
@pytest.mark.parametrize(
    ("declared", "found"),
    [
        (Tensor("image", ("batch", 2, 4, 4)), "its inputs must be image, got x"),
        (Tensor("x", ("batch", 2, 4, 5)), "x must be float32 ['batch', 2, 4, 5] with a batch of 1:2:8, got float32"),
        (Tensor("x", ("batch", 2, 4)), "got float32 ['batch', 2, 4, 4]"),
        (Tensor("x", (1, 2, 4, 4)), "x must be float32 [1, 2, 4, 4]"),
    ],
)
def test_a_graph_that_is_not_as_declared_is_refused(tmp_path: Path, declared: Tensor, found: str) -> None:
    graphs = {"odd": (one_node(tmp_path / "odd.onnx", "Sigmoid")["odd"][0], (declared,))}
    with pytest.raises(InputError) as caught:
        build(tmp_path, graphs)
    assert_one_line(str(caught.value), "graph odd (odd.onnx)", found)
    assert_nothing_left(tmp_path)


@needs_rtx
def test_half_precision_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x must be float32 .*, got float16 \['batch', 2, 4, 4\]"):
        build(tmp_path, one_node(tmp_path / "odd.onnx", "Sigmoid", dtype=10))


@needs_rtx
@pytest.mark.parametrize("capability", ["9.0", "86", "8.6.1", "", "CURRENT", "8.60"])
def test_an_unknown_compute_capability_is_answered_with_the_known(tmp_path: Path, capability: str) -> None:
    with pytest.raises(InputError) as caught:
        build(tmp_path, one_node(tmp_path / "odd.onnx", "Sigmoid"), compute_capabilities=("8.6", capability))
    known = ", ".join(adapter.supported(engines.FLAVOURS["tensorrt-rtx"].load()))
    assert known.startswith("7.5, 8.0, 8.6, 8.9, 12.0")
    assert_one_line(str(caught.value), f"compute capability must be one that tensorrt-rtx serves, {known}, got")
    assert_nothing_left(tmp_path)


@needs_rtx
def test_turing_needs_fp16(tmp_path: Path) -> None:
    graphs = one_node(tmp_path / "odd.onnx", "Sigmoid")
    with pytest.raises(InputError, match="compute capability 7.5 needs fp16 graphs, got fp32 for odd"):
        build(tmp_path, graphs, compute_capabilities=("7.5",))
    assert_nothing_left(tmp_path)


@needs_rtx
@without_gpu
def test_what_turing_cannot_multiply_is_named(
    tmp_path: Path, all_traced: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """The matrix products of the geometry stay in fp32 where the trunks are fp16."""
    graphs = write(tmp_path, all_traced("dagan"), "fp16")
    capfd.readouterr()
    with pytest.raises(InputError) as caught:
        build(tmp_path, graphs, precision="fp16", compute_capabilities=("7.5",))
    assert_one_line(str(caught.value), "for compute capability 7.5: ", "Turing")
    assert_nothing_left(tmp_path)


@needs_rtx
@without_gpu
def test_weights_are_not_stripped_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tensorrt-rtx strips weights only where there is a GPU, and there is none"):
        build(tmp_path, one_node(tmp_path / "odd.onnx", "Sigmoid"), stripped=True)
    assert_nothing_left(tmp_path)


@needs_rtx
def test_the_gpu_at_hand_is_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = engines.FLAVOURS["tensorrt-rtx"].load()
    assert adapter._targets(library, "tensorrt-rtx", (), "8.9") == ("8.9",)
    assert adapter._targets(library, "tensorrt-rtx", ("12.0", "8.6"), "8.9") == ("8.6", "12.0")
    with pytest.raises(InputError, match="the compute capability of the GPU here must be one .*, got '9.0'"):
        adapter._targets(library, "tensorrt-rtx", (), "9.0")


# ---------------------------------------------------------------------------------------------------------------------
# TensorRT


def test_without_the_library_the_pip_line_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(MissingPackage, match="run pip install tensorrt-cu13$"):
        build(tmp_path, {}, "tensorrt")
    assert_nothing_left(tmp_path)


def test_tensorrt_without_a_gpu_points_to_tensorrt_rtx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imitation().install(monkeypatch, capability=None)
    with pytest.raises(InputError) as caught:
        build(tmp_path, one_node(tmp_path / "odd.onnx", "Sigmoid"), "tensorrt")
    assert_one_line(str(caught.value), "for the GPU at hand, and there is none here", "--target tensorrt-rtx")


def test_tensorrt_builds_for_no_other_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imitation().install(monkeypatch)
    graphs = one_node(tmp_path / "odd.onnx", "Sigmoid")
    with pytest.raises(InputError, match="the GPU at hand, compute capability 8.9, got 8.6, 8.9: leave the"):
        build(tmp_path, graphs, "tensorrt", compute_capabilities=("8.6", "8.9"))
    assert build(tmp_path, graphs, "tensorrt", compute_capabilities=("8.9",))[0].compute_capabilities == ("8.9",)


@pytest.mark.parametrize("version", ["10.13.2.6", "11.4.0.106"])
def test_tensorrt_networks_are_strongly_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    library = imitation().install(monkeypatch, version)
    found, summaries = build(tmp_path, one_node(tmp_path / "odd.onnx", "Sigmoid"), "tensorrt")
    calls = imitation().calls
    assert ("create_network", 0b10) in calls  # the bit of STRONGLY_TYPED
    assert ("clear_flag", library.BuilderFlag.TF32) in calls
    assert ("set_shape", "x", (1, 2, 4, 4), (2, 2, 4, 4), (8, 2, 4, 4)) in calls
    assert not any(call[0] == "set_flag" for call in calls)
    assert re.fullmatch(rf"tensorrt-{version}-sm89-fp32-b1\.2\.8-[0-9a-f]{{8}}", found.key)
    assert summaries["odd"].fused == ("first", "second") and summaries["odd"].not_inspected == ""


def test_a_version_without_the_flag_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = imitation().install(monkeypatch, "12.0.0.1")
    monkeypatch.setattr(library, "NetworkDefinitionCreationFlag", object, raising=False)
    build(tmp_path, one_node(tmp_path / "odd.onnx", "Sigmoid"), "tensorrt")
    assert ("create_network", 0) in imitation().calls


def test_weights_can_be_stripped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = imitation().install(monkeypatch).BuilderFlag
    graphs = one_node(tmp_path / "odd.onnx", "Sigmoid")
    whole, _ = build(tmp_path, graphs, "tensorrt")
    stripped, _ = build(tmp_path, graphs, "tensorrt", stripped=True)
    assert ("set_flag", flags.STRIP_PLAN) in imitation().calls
    assert ("set_flag", flags.REFIT_IDENTICAL) in imitation().calls
    assert stripped.stripped and stripped.key != whole.key


def test_timings_are_kept_for_the_next_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imitation().install(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    graphs = one_node(tmp_path / "odd.onnx", "Sigmoid")
    build(tmp_path, graphs, "tensorrt", timing_cache=None)
    kept = tmp_path / "cache" / "dagan-rt" / "tensorrt-11.4.0.106-sm89.timing"
    assert kept.read_bytes() == b"measured on 8.9"
    build(tmp_path, graphs, "tensorrt", timing_cache=None)
    given = [call[1:] for call in imitation().calls if call[0] == "set_timing_cache"]
    assert given == [(b"", False, True), (b"measured on 8.9", False, True)]


@pytest.mark.parametrize("content", [b"measured on 7.5", b"damaged"])
def test_timings_that_do_not_fit_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    imitation().install(monkeypatch)
    (tmp_path / "times").write_bytes(content)
    build(tmp_path, one_node(tmp_path / "odd.onnx", "Sigmoid"), "tensorrt")
    assert (tmp_path / "times").read_bytes() == b"measured on 8.9"


def test_timings_that_cannot_be_kept_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imitation().install(monkeypatch)
    (tmp_path / "a file").write_bytes(b"")
    cache = tmp_path / "a file" / "times"
    found, _ = build(tmp_path, one_node(tmp_path / "odd.onnx", "Sigmoid"), "tensorrt", timing_cache=cache)
    assert found.file(tmp_path, "odd").is_file()


def test_a_build_that_fails_says_the_librarys_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    imitation().install(monkeypatch)
    graphs = one_node(tmp_path / "odd.onnx", "Sigmoid")
    graph = onnx.load(str(tmp_path / "odd.onnx"))
    graph.graph.name = "too large"
    onnx.save(graph, str(tmp_path / "odd.onnx"))
    with pytest.raises(InputError) as caught:
        build(tmp_path, graphs, "tensorrt")
    failed = "graph odd (odd.onnx) cannot be built by tensorrt 11.4.0.106 for compute capability 8.9: "
    assert str(caught.value) == failed + "Error Code 2: OutOfMemory (no memory))"
    assert_nothing_left(tmp_path)
    assert not (tmp_path / "times").exists() or (tmp_path / "times").read_bytes()


def test_tensorrts_parser_errors_are_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imitation().install(monkeypatch)
    with pytest.raises(InputError) as caught:
        build(tmp_path, one_node(tmp_path / "odd.onnx", "Inverse", "com.microsoft"), "tensorrt")
    assert_one_line(str(caught.value), "the op Inverse of node 'second': Plugin not found, are", "(UNSUPPORTED_NODE)")


def test_the_imitation_has_no_names_of_its_own() -> None:
    assert imitation().foreign_names(imitation().tensorrt(), imitation().TENSORRT_11_4) == set()


@needs_rtx
def test_tensorrt_rtx_has_the_same_names() -> None:
    import tensorrt_rtx

    real = {name: set(dir(getattr(tensorrt_rtx, name))) for name in imitation().TENSORRT_11_4}
    assert imitation().foreign_names(imitation().tensorrt(), real) == set()
