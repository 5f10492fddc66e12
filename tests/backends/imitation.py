"""TensorRT in imitation: the same names and rules, carried out by ONNX Runtime in the memory of the imitated driver.

An engine is its ONNX graph. What is enqueued on a stream runs when the driver (tests/cuda) takes its turn, which may be
late, so a backend that looks too early sees NaN; in a CUDA graph it is captured and replayed. The names are those of
the real packages: `foreign_names` compares.
tensorrt-11.4.json holds what `dir()` shows of classes in tensorrt_cu13_bindings 11.4.0.106.
"""

from __future__ import annotations

import ctypes
import enum
import inspect
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

TENSORRT_11_4 = {
    name: set(members.split())
    for name, members in json.loads(Path(__file__).with_name("tensorrt-11.4.json").read_text()).items()
}
UNSUPPORTED = ("DeformConv", "Inverse")
#: The imitation's own attributes, which no real object has.
OWN = {"calls", "content", "model", "session", "graph"}

calls: list[tuple[Any, ...]] = []  # what was asked of the library, in order
driver: Any = None  # the imitated one, once installed


def foreign_names(library: ModuleType, real: dict[str, set[str]]) -> set[str]:
    """Public names of the imitation's classes that the real ones do not have."""
    found = set()
    for name, cls in vars(library).items():
        if inspect.isclass(cls) and name in real:
            public = cls.__members__ if issubclass(cls, enum.Enum) else dir(cls)
            own = {member for member in public if not member.startswith("_")} | _instance_names(cls)
            found |= {f"{name}.{member}" for member in own - real[name] - OWN}
        elif inspect.isclass(cls):
            found.add(name)
    return found


def _instance_names(cls: type) -> set[str]:
    """The attributes that `__init__` sets."""
    if not inspect.isfunction(cls.__init__):
        return set()
    names = cls.__init__.__code__.co_names
    return {name for name in names if f"self.{name} " in inspect.getsource(cls.__init__)}


# ---------------------------------------------------------------------------------------------------------------------
# TensorRT


def tensorrt(version: str = "11.4.0.106") -> ModuleType:
    """A module that imitates `tensorrt` of a version; 10 builds weakly typed networks unless told otherwise."""
    library = ModuleType("tensorrt")
    library.__spec__ = ModuleSpec("tensorrt", None)
    library.__version__ = version  # type: ignore[attr-defined]
    for cls in (
        ILogger, Builder, IBuilderConfig, INetworkDefinition, ITensor, IOptimizationProfile, ITimingCache, OnnxParser,
        ParserError, Runtime, ICudaEngine, IExecutionContext, EngineInspector, Refitter, OnnxParserRefitter, DataType,
        BuilderFlag, NetworkDefinitionCreationFlag, ExecutionContextAllocationStrategy, ProfilingVerbosity,
        LayerInformationFormat,
    ):  # fmt: skip
        setattr(library, cls.__name__, cls)
    return library


class DataType(enum.Enum):
    FLOAT, HALF = 0, 1


class BuilderFlag(enum.Enum):
    TF32, STRIP_PLAN, REFIT_IDENTICAL = range(3)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, USER_MANAGED = 0, 2


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class ProfilingVerbosity(enum.Enum):
    DETAILED = 0


class LayerInformationFormat(enum.Enum):
    JSON = 0


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    INTERNAL_ERROR, ERROR, WARNING = Severity

    def log(self, severity: Any, message: str) -> None:
        raise AssertionError("the real one prints to stderr")


class ITensor:
    def __init__(self, value: Any) -> None:
        kind = value.type.tensor_type
        self.name = value.name
        self.dtype = {1: DataType.FLOAT, 10: DataType.HALF}[kind.elem_type]
        self.shape = tuple(-1 if axis.dim_param else axis.dim_value for axis in kind.shape.dim)


class INetworkDefinition:
    def __init__(self) -> None:
        self.model: Any = None

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    @property
    def num_outputs(self) -> int:
        return len(self.model.graph.output)

    @property
    def num_layers(self) -> int:
        return len(self.model.graph.node)

    def get_input(self, index: int) -> ITensor:
        return ITensor(self.model.graph.input[index])

    def get_output(self, index: int) -> ITensor:
        return ITensor(self.model.graph.output[index])


class ParserError:
    def __init__(self, node: Any) -> None:
        self.content = node

    def node_operator(self) -> str:
        return self.content.op_type

    def node_name(self) -> str:
        return self.content.name

    def desc(self) -> str:
        return "Plugin not found,\nare the plugin name, version, and namespace correct?"

    def code(self) -> str:
        return "ErrorCode.UNSUPPORTED_NODE"


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self.graph = (network, logger)
        self.content: list[Any] = []

    def parse_from_file(self, path: str) -> bool:
        import onnx

        network, logger = self.graph
        network.model = onnx.load(path)
        self.content = [node for node in network.model.graph.node if node.op_type in UNSUPPORTED]
        if self.content:
            logger.log(ILogger.ERROR, "ModelImporter.cpp:140: While parsing a node")
        return not self.content

    @property
    def num_errors(self) -> int:
        return len(self.content)

    def get_error(self, index: int) -> ParserError:
        return ParserError(self.content[index])


class IOptimizationProfile:
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        calls.append(("set_shape", input, tuple(min), tuple(opt), tuple(max)))


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content or b"measured on 8.9"


class IBuilderConfig:
    profiling_verbosity: Any = None

    def __init__(self) -> None:
        self.content: ITimingCache | None = None
        self.calls: set[BuilderFlag] = set()

    def set_flag(self, flag: BuilderFlag) -> None:
        calls.append(("set_flag", flag))
        self.calls.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        calls.append(("clear_flag", flag))

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        calls.append(("add_optimization_profile",))
        return 0

    def create_timing_cache(self, content: bytes) -> ITimingCache | None:
        return None if content.startswith(b"damaged") else ITimingCache(content)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        fits = cache.content in (b"", b"measured on 8.9")
        calls.append(("set_timing_cache", cache.content, ignore_mismatch, fits))
        if fits:
            self.content = cache
        return fits

    def get_timing_cache(self) -> ITimingCache | None:
        return self.content


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.graph = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        calls.append(("create_network", flags))
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> memoryview | None:
        """IHostMemory is a buffer with `nbytes`, as a memoryview is. A graph called "too large" cannot be built."""
        if network.model.graph.name == "too large":
            self.graph.log(ILogger.WARNING, "nearly")
            self.graph.log(ILogger.ERROR, "Error Code 2: OutOfMemory\n(In alloc at /src/memory.cpp:12 (no memory))")
            return None
        stripped = b"stripped" if BuilderFlag.STRIP_PLAN in config.calls else b""
        return memoryview(stripped + network.model.SerializeToString())


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.graph = logger

    def deserialize_cuda_engine(self, content: Any) -> ICudaEngine | None:
        if bytes(content).startswith(b"other GPU"):
            self.graph.log(ILogger.ERROR, "the engine plan file is not compatible")
            return None
        return ICudaEngine(bytes(content))


class ICudaEngine:
    device_memory_size_v2 = 512

    def __init__(self, content: bytes) -> None:
        import onnx

        self.session: Any = None
        self.model = onnx.load_from_string(content.removeprefix(b"stripped"))
        if not content.startswith(b"stripped"):
            self._fill(content)

    def _fill(self, content: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    @property
    def _tensors(self) -> list[Any]:
        # In another order than the graph's: names must be used.
        return [*reversed(self.model.graph.output), *reversed(self.model.graph.input)]

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return self._tensors[index].name

    def get_tensor_dtype(self, name: str) -> DataType:
        return ITensor(next(value for value in self._tensors if value.name == name)).dtype

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> IExecutionContext:
        return IExecutionContext(self, strategy)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self.graph = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        return json.dumps({"Layers": [{"Name": node.name} for node in self.graph.model.graph.node], "Bindings": []})


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, strategy: Any) -> None:
        self.graph = engine
        self.content: dict[str, Any] = {}  # shapes and addresses
        self.session = strategy

    def set_device_memory(self, memory: int, size: int) -> None:
        calls.append(("set_device_memory", memory, size))
        self.content["scratch"] = memory, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        calls.append(("set_input_shape", name, shape))
        self.content[f"shape of {name}"] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in {value.name for value in self.graph._tensors}, name
        self.content[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self.session is ExecutionContextAllocationStrategy.USER_MANAGED:
            assert self.content["scratch"][1] >= self.graph.device_memory_size_v2
        content = self.content
        bound, captured = dict(content), driver.captures(stream_handle)
        inputs, outputs = self.graph.model.graph.input, self.graph.model.graph.output

        def work() -> None:
            assert content == bound or not captured, "the context was changed after it was captured"
            if "scratch" in bound:  # nothing else may be in it meanwhile, nothing may expect to find it as it was
                _memory(bound["scratch"][0], (bound["scratch"][1] // 4,))[:] = np.nan
            arrays = {x.name: _memory(bound[x.name], bound[f"shape of {x.name}"]) for x in inputs}
            for output, result in zip(outputs, self.graph.session.run([x.name for x in outputs], arrays), strict=True):
                _memory(bound[output.name], result.shape)[:] = result

        calls.append(("execute_async_v3", stream_handle))
        return driver.enqueue(stream_handle, work) == 0


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self.graph = engine
        self.content = b""

    def refit_cuda_engine(self) -> bool:
        self.graph._fill(self.content)
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self.graph = refitter

    def refit_from_file(self, path: str) -> bool:
        calls.append(("refit_from_file", Path(path).name))
        self.graph.content = Path(path).read_bytes()
        return True


def _memory(address: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)


# Another library's arrays


class DeviceArray(np.ndarray):
    """Memory of the GPU that is seen through the interface only."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        strides = None if self.flags.c_contiguous else self.strides
        data = (self.ctypes.data, not self.flags.writeable)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": data, "strides": strides, "version": 3}


def on_device(values: np.ndarray) -> DeviceArray:
    """A copy in device memory, of the same strides."""
    from dagan_rt.kernels import _devices

    dense = np.array(values, copy=True, order="K")
    memory = (ctypes.c_ubyte * dense.nbytes).from_address(_devices.device(0).reserve(max(dense.nbytes, 1), "an array"))
    found = np.ndarray(dense.shape, dense.dtype, memory, 0, dense.strides)
    found[...] = dense
    return found.view(DeviceArray)


def install(patch: pytest.MonkeyPatch, version: str = "11.4.0.106", capability: str | None = "8.9") -> ModuleType:
    """Let the imitations stand in for `tensorrt` and libcuda, and run kernels emulated; returns the former."""
    from dagan_rt import engines, plugins
    from dagan_rt.export import tensorrt as export

    global driver
    for folder in ("cuda", "kernels"):
        if (path := str(Path(__file__).parents[1] / folder)) not in sys.path:
            sys.path.insert(0, path)
    import emulated
    import imitated_driver

    driver = imitated_driver.install(patch)
    imitated_driver.emulate(patch, driver, emulated.EmulatedDevice())
    library = tensorrt(version)
    calls.clear()
    patch.setitem(sys.modules, "tensorrt", library)
    patch.setattr(plugins, "missing", lambda: None)
    for module in (engines, export):
        patch.setattr(module, "compute_capability", lambda: capability)
    return library
