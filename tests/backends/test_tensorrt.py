"""The TensorRT backend: what it asks of the library, what it refuses, and that it waits for nothing."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dagan_rt import backends, engines, plugins
from dagan_rt.backends import tensorrt as adapter
from dagan_rt.bundle import BatchProfile, Bundle, write_manifest
from dagan_rt.engines import FLAVOURS
from dagan_rt.errors import InputError
from dagan_rt.export.tensorrt import build_engines, graphs_of
from dagan_rt.kernels._arrays import handle

STREAM = 4321


@cache
def imitation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dagan_rt_tests_imitation", Path(__file__).with_name("imitation.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imitation().install(monkeypatch)


def build(bundle: Bundle, root: Path, flavour: str = "tensorrt", **options: Any) -> Bundle:
    """A copy of the bundle with engines."""
    shutil.copytree(bundle.path, root)
    build_engines(
        root, flavour, graphs_of(bundle), precisions=dict.fromkeys(bundle.graphs, "fp32"), recipe_hash="0" * 12,
        **{"batch": BatchProfile.parse("1:1:4"), "timing_cache": root.parent / "times"} | options,
    )  # fmt: skip
    write_manifest(root, bundle.manifest)
    return Bundle.open(root)


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with engines for the imitated library and GPU."""
    with pytest.MonkeyPatch.context() as patch:
        imitation().install(patch)
        return build(Bundle.open(tiny_bundle), tmp_path_factory.mktemp("built") / "bundle")


@pytest.fixture
def backend(built: Bundle, library: ModuleType) -> Iterator[adapter.TensorRTBackend]:
    yield adapter.open(built, stream=STREAM)
    imitation().driver.raise_errors()


@pytest.fixture(scope="module")
def reference(tiny_bundle: Path) -> Any:
    return backends.open_backend("onnxruntime", Bundle.open(tiny_bundle), threads=1)


def random_arrays(bundle: Bundle, graph: str, batch: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {
        x.name: [batch if isinstance(size, str) else size for size in x.shape] for x in bundle.graphs[graph].inputs
    }
    return {
        name: (rng.uniform(0, 0.2, shape) + (np.eye(2) if name.endswith("jacobian") else 0)).astype(np.float32)
        for name, shape in shapes.items()
    }


def content(array: Any) -> np.ndarray:
    """What is in a float32 array of the GPU now."""
    import imitated_driver

    return imitated_driver.memory(array.pointer, array.shape)


def waits() -> list[str]:
    return imitation().driver.journal("synchronize")


def uploaded(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: imitation().on_device(values) for name, values in arrays.items()}


# ---------------------------------------------------------------------------------------------------------------------
# running


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("graph", ["source", "driving", "motion", "generator"])
def test_it_computes_what_onnxruntime_computes(
    built: Bundle, backend: Any, reference: Any, graph: str, batch: int
) -> None:
    arrays = random_arrays(built, graph, batch)
    found = backend.run(graph, uploaded(dict(reversed(arrays.items()))))
    expected = reference.run(graph, arrays)
    assert list(found) == [tensor.name for tensor in built.graphs[graph].outputs]
    for name, values in expected.items():
        np.testing.assert_array_equal(backend.to_numpy(found[name]), values)


def test_nothing_waits_for_the_gpu(built: Bundle, backend: Any) -> None:
    waits()
    planes = backend.from_image(np.zeros((64, 64, 3), np.uint8))
    first = backend.run("driving", {"image": planes})
    second = backend.run("driving", {"image": planes})
    assert waits() == []
    assert all(np.isnan(content(it)).all() for it in (*first.values(), *second.values()))  # the work is still to come
    assert first["depth"].pointer != second["depth"].pointer
    assert np.isfinite(backend.to_numpy(first["depth"])).all()
    assert waits() == [f"synchronize {STREAM:#x}"]


def test_the_work_goes_to_the_users_stream(built: Bundle, backend: Any) -> None:
    inputs = uploaded(random_arrays(built, "driving"))
    assert backend.stream == STREAM
    outputs = backend.run("driving", inputs)
    backend.run_into("driving", inputs, outputs, stream=SimpleNamespace(ptr=99))
    assert [call[1] for call in imitation().calls if call[0] == "execute_async_v3"] == [STREAM, 99]


def test_without_a_stream_it_has_one_of_its_own(built: Bundle, library: ModuleType) -> None:
    first, second = adapter.open(built), adapter.open(built)
    assert 0 not in (first.stream, second.stream) and first.stream != second.stream


def test_shapes_are_set_when_the_batch_changes_only(built: Bundle, backend: Any) -> None:
    imitation().calls.clear()
    for batch in (1, 1, 2, 1):
        backend.run("motion", uploaded(random_arrays(built, "motion", batch)))
    set_shapes = [call[2] for call in imitation().calls if call[0] == "set_input_shape" and call[1] == "scale"]
    assert set_shapes == [(1, 1), (2, 1), (1, 1)]


def test_outputs_can_be_given(built: Bundle, backend: Any, reference: Any) -> None:
    arrays = random_arrays(built, "driving", 2)
    outputs = {name: imitation().on_device(np.zeros_like(values))
               for name, values in reference.run("driving", arrays).items()}  # fmt: skip
    backend.run_into("driving", uploaded(arrays), outputs)
    backend.to_numpy(outputs["depth"])  # waits
    for name, values in reference.run("driving", arrays).items():
        np.testing.assert_array_equal(outputs[name], values)


class Foreign:
    """Another library's array: it has the interface and nothing else."""

    def __init__(self, values: np.ndarray, **changes: Any) -> None:
        self.values = imitation().on_device(values)
        self.__cuda_array_interface__ = self.values.__cuda_array_interface__ | changes


def test_any_librarys_arrays_will_do(built: Bundle, backend: Any, reference: Any) -> None:
    arrays = random_arrays(built, "driving")
    strides = arrays["image"].strides
    for values in (Foreign(arrays["image"]), Foreign(arrays["image"], strides=(7, *strides[1:]))):  # 7: of one face
        found = backend.run("driving", {"image": values})
        np.testing.assert_array_equal(backend.to_numpy(found["kp_value"]), reference.run("driving", arrays)["kp_value"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "input image of graph driving must be an array on the GPU, .*, got nothing"),
        (np.zeros((1, 3, 64, 64), np.float32), "with __cuda_array_interface__, got ndarray"),
        (np.zeros((1, 3, 64, 65), np.float32), r"must be <f4 \(1, 3, 64, 64\), got <f4 \(1, 3, 64, 65\)"),
        (np.zeros((3, 64, 64), np.float32), r"must be <f4 \(3, 3, 64, 64\), got <f4 \(3, 64, 64\)"),
        (np.zeros((1, 3, 64, 64), np.float64), r"must be <f4 \(1, 3, 64, 64\), got <f8"),
        (np.zeros((1, 64, 64, 3), np.float32).transpose(0, 3, 1, 2), "image of graph driving must be contiguous, got"),
        (np.zeros((5, 3, 64, 64), np.float32), "the engine of graph driving takes a batch of 1:1:4, got 5"),
        (np.zeros((0, 3, 64, 64), np.float32), "the engine of graph driving takes a batch of 1:1:4, got 0"),
        (np.zeros((), np.float32), r"must be <f4 \(1, 3, 64, 64\), got <f4 \(\)"),
    ],
    ids=["none", "host", "size", "rank", "dtype", "strides", "batch", "no face", "scalar"],
)
def test_a_wrong_input_is_refused_in_one_sentence(backend: Any, wrong: Any, message: str) -> None:
    on_host = "got ndarray" in message
    inputs = {} if wrong is None else {"image": wrong if on_host else imitation().on_device(wrong)}
    with pytest.raises(InputError, match=message) as caught:
        backend.run("driving", inputs)
    assert "\n" not in str(caught.value)
    assert not any(call[0] == "execute_async_v3" for call in imitation().calls)


def test_inputs_of_two_batches_are_refused(built: Bundle, backend: Any) -> None:
    inputs = uploaded(random_arrays(built, "motion", 2) | {"scale": np.ones((1, 1), np.float32)})
    with pytest.raises(InputError, match=r"input scale of graph motion must be <f4 \(2, 1\), got <f4 \(1, 1\)"):
        backend.run("motion", inputs)


def test_unknown_names_are_refused(built: Bundle, backend: Any) -> None:
    inputs = uploaded(random_arrays(built, "driving"))
    with pytest.raises(InputError, match="graph driving has no input 'depth'"):
        backend.run("driving", inputs | {"depth": inputs["image"]})
    with pytest.raises(InputError, match="graph driving has no output 'image'"):
        backend.run_into("driving", inputs, inputs)
    with pytest.raises(InputError, match="output depth of graph driving must be an array on the GPU, .* got nothing"):
        backend.run_into("driving", inputs, {})


def test_a_read_only_output_is_refused(built: Bundle, backend: Any) -> None:
    inputs = uploaded(random_arrays(built, "driving"))
    outputs = backend.run("driving", inputs)
    address = outputs["depth"].__cuda_array_interface__["data"][0]
    outputs["depth"] = Foreign(np.zeros((1, 1, 64, 64), np.float32), data=(address, True))
    with pytest.raises(InputError, match="output depth of graph driving must be writable"):
        backend.run_into("driving", inputs, outputs)


def test_what_the_library_cannot_run_is_told_with_its_reason(
    built: Bundle, backend: Any, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, stream_handle: int) -> bool:
        engines.logger(library).log(library.ILogger.ERROR, "Cuda failure: out of memory")  # type: ignore[attr-defined]
        return False

    monkeypatch.setattr(library.IExecutionContext, "execute_async_v3", fail)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="graph driving cannot be run by tensorrt: Cuda failure: out of memory"):
        backend.run("driving", uploaded(random_arrays(built, "driving")))


# ---------------------------------------------------------------------------------------------------------------------
# loading


def test_what_is_missing_is_said_in_order(built: Bundle, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Bundle.open(tiny_bundle)
    if importlib.util.find_spec("tensorrt") is None:
        assert backends.missing("tensorrt") == "the package tensorrt is not installed: run pip install tensorrt-cu13"
    imitation().install(monkeypatch, capability=None)
    assert backends.missing("tensorrt", built) == (
        "tensorrt needs an NVIDIA GPU with its driver, and there is none here"
    )
    imitation().install(monkeypatch, capability="7.5")
    assert backends.missing("tensorrt") is None
    assert "holds no tensorrt engines: run python -m" in str(backends.missing("tensorrt", bare))
    assert "for compute capability 8.9, this GPU has 7.5: run" in str(backends.missing("tensorrt", built))
    imitation().install(monkeypatch, version="11.5.0.1")
    assert "built by version 11.4.0.106, installed is 11.5.0.1: run" in str(backends.missing("tensorrt", built))
    imitation().install(monkeypatch)
    assert backends.missing("tensorrt", built) is None
    monkeypatch.setattr(plugins, "missing", lambda: "a compiler is missing")
    reason = "the tensorrt engines need the kernels of dagan-rt: a compiler is missing"
    assert backends.missing("tensorrt", built) == reason
    with pytest.raises(InputError, match=f"backend tensorrt cannot run here: {reason}"):
        backends.open_backend("tensorrt", built)


def test_auto_prefers_it_where_its_engines_fit(built: Bundle, tiny_bundle: Path, library: ModuleType) -> None:
    assert backends.open_backend("auto", built).name == "tensorrt"
    assert backends.open_backend("auto", Bundle.open(tiny_bundle)).name != "tensorrt"


def test_the_library_is_not_imported_for_a_bundle_without_engines(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imitation().install(monkeypatch)
    monkeypatch.setattr(engines.Flavour, "load", lambda self: pytest.fail("it was imported"))
    assert "holds no tensorrt engines" in str(backends.missing("tensorrt", Bundle.open(tiny_bundle)))


def replaced(built: Bundle, root: Path, graph: str, content: bytes) -> Bundle:
    """A copy of the bundle with another file for one engine."""
    shutil.copytree(built.path, root)
    next(root.glob(f"engines/*/{graph}.engine")).write_bytes(content)
    write_manifest(root, built.manifest)
    return Bundle.open(root)


def test_an_engine_that_the_library_refuses_is_named(built: Bundle, library: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        adapter.open(replaced(built, tmp_path / "bundle", "motion", b"other GPU"))
    message = str(caught.value)
    assert "motion.engine cannot be loaded by tensorrt 11.4.0.106: the engine plan file is not compatible" in message


def test_an_engine_of_another_graph_is_refused(built: Bundle, library: ModuleType, tmp_path: Path) -> None:
    driving = next(built.path.glob("engines/*/driving.engine")).read_bytes()
    with pytest.raises(
        InputError, match="motion.engine: the manifest declares driving_kp_jacobian, .*, the engine has"
    ):
        adapter.open(replaced(built, tmp_path / "bundle", "motion", driving))


def test_an_engine_of_another_precision_outside_is_refused(
    built: Bundle, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = library.DataType.HALF  # type: ignore[attr-defined]
    monkeypatch.setattr(library.ICudaEngine, "get_tensor_dtype", lambda self, name: half)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"source.engine: depth must be float32, got DataType.HALF"):
        adapter.open(built)


def test_stripped_engines_are_filled_from_the_graphs(
    tiny_bundle: Path, library: ModuleType, tmp_path: Path, reference: Any
) -> None:
    bundle = build(Bundle.open(tiny_bundle), tmp_path / "bundle", stripped=True)
    backend = adapter.open(bundle)
    filled = [call[1] for call in imitation().calls if call[0] == "refit_from_file"]
    assert filled == [f"{name}.onnx" for name in bundle.graphs]
    arrays = random_arrays(bundle, "driving")
    found = backend.run("driving", uploaded(arrays))
    np.testing.assert_array_equal(backend.to_numpy(found["depth"]), reference.run("driving", arrays)["depth"])


@pytest.mark.parametrize("failing", ["OnnxParserRefitter.refit_from_file", "Refitter.refit_cuda_engine"])
def test_stripped_engines_that_cannot_be_filled_are_refused(
    tiny_bundle: Path, library: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    bundle = build(Bundle.open(tiny_bundle), tmp_path / "bundle", stripped=True)
    cls, method = failing.split(".")
    monkeypatch.setattr(getattr(library, cls), method, lambda *arguments: False)
    with pytest.raises(InputError, match="source.onnx cannot fill its stripped engine: it gave no reason"):
        adapter.open(bundle)


def test_tensorrt_rtx_compiles_at_once_and_works_in_given_memory(
    built: Bundle, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(dynamic_shapes_kernel_specialization_strategy=None, strategy=None)
    config.set_execution_context_allocation_strategy = lambda it: setattr(config, "strategy", it)
    engine = library.ICudaEngine  # type: ignore[attr-defined]
    create = engine.create_execution_context
    monkeypatch.setattr(engine, "create_runtime_config", lambda self: config, raising=False)
    monkeypatch.setattr(engine, "device_memory_size_v2", 1001)
    monkeypatch.setattr(engine, "create_execution_context", lambda self, used: create(self) if used is config else None)
    strategies = {
        "DynamicShapesKernelSpecializationStrategy": SimpleNamespace(EAGER="eager"),
        "ExecutionContextAllocationStrategy": SimpleNamespace(USER_MANAGED="user"),
    }
    for name, members in strategies.items():
        monkeypatch.setattr(library, name, members, raising=False)
    adapter.open(built)
    assert (config.dynamic_shapes_kernel_specialization_strategy, config.strategy) == ("eager", "user")
    given = [call[1:] for call in imitation().calls if call[0] == "set_device_memory"]
    assert len({memory for memory, _ in given}) == 4 and {size for _, size in given} == {1001}
    if importlib.util.find_spec("tensorrt_rtx"):
        real = importlib.import_module("tensorrt_rtx")
        assert hasattr(real.DynamicShapesKernelSpecializationStrategy, "EAGER")
        assert hasattr(real.ExecutionContextAllocationStrategy, "USER_MANAGED")
        assert hasattr(real.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
        assert hasattr(real.IRuntimeConfig, "set_execution_context_allocation_strategy")
        assert hasattr(real.IExecutionContext, "set_device_memory")
        assert hasattr(real.ICudaEngine, "create_runtime_config")
        assert hasattr(real.ICudaEngine, "device_memory_size_v2")


# ---------------------------------------------------------------------------------------------------------------------
# streams


@pytest.mark.parametrize(
    "stream",
    [
        7,
        SimpleNamespace(ptr=7),
        SimpleNamespace(cuda_stream=7),
        SimpleNamespace(handle=7),
        SimpleNamespace(__cuda_stream__=lambda: (0, 7)),
    ],
)
def test_every_librarys_stream_has_a_handle(stream: Any) -> None:
    assert handle(stream) == 7


def test_what_is_no_stream_is_refused() -> None:
    with pytest.raises(InputError, match="stream must be a CUDA stream or its handle, got str"):
        handle("default")


# ---------------------------------------------------------------------------------------------------------------------
# on a GPU


@pytest.fixture(scope="module", params=FLAVOURS)
def real(request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with real engines for the GPU here."""
    flavour = FLAVOURS[request.param]
    if reason := backends.missing(flavour.name):
        pytest.skip(reason)
    return build(Bundle.open(tiny_bundle), tmp_path_factory.mktemp(flavour.module) / "bundle", flavour.name)


def open_real(real: Bundle) -> Any:
    name = engines.engine_sets(real)[0].flavour
    return importlib.import_module(f"dagan_rt.backends.{name.replace('-', '_')}").open(real)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["source", "driving", "motion", "generator"])
def test_engines_compute_what_onnxruntime_computes(real: Bundle, reference: Any, graph: str) -> None:
    backend = open_real(real)
    for batch in (1, 3):
        arrays = random_arrays(real, graph, batch)
        found = backend.run(graph, {name: backend.from_numpy(values) for name, values in arrays.items()})
        for name, values in reference.run(graph, arrays).items():
            scale = max(1.0, float(np.abs(values).max()))
            np.testing.assert_allclose(backend.to_numpy(found[name]), values, atol=1e-3 * scale)


@pytest.mark.gpu
def test_a_cuda_graph_replays_an_engine(real: Bundle, reference: Any) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("capturing here needs PyTorch with CUDA")
    backend, stream = open_real(real), torch.cuda.Stream()
    inputs = {name: torch.from_numpy(x).cuda() for name, x in random_arrays(real, "driving").items()}
    outputs = {x.name: torch.empty([1, *x.shape[1:]], device="cuda") for x in real.graphs["driving"].outputs}
    torch.cuda.synchronize()
    backend.run_into("driving", inputs, outputs, stream=stream)
    stream.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        backend.run_into("driving", inputs, outputs, stream=stream)
    arrays = random_arrays(real, "driving", seed=1)
    inputs["image"].copy_(torch.from_numpy(arrays["image"]))
    captured.replay()
    torch.cuda.synchronize()
    for name, values in reference.run("driving", arrays).items():
        np.testing.assert_allclose(outputs[name].cpu().numpy(), values, atol=1e-3 * max(1, np.abs(values).max()))


@pytest.mark.gpu
def test_a_real_mismatch_is_told(real: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "compute_capability", lambda: "5.0")
    with pytest.raises(InputError, match="this GPU has 5.0: run python -m dagan_rt.export --rebuild"):
        open_real(real)
