"""TensorRT on an NVIDIA GPU, from the engines inside the bundle; `tensorrt_rtx.py` is the same with TensorRT-RTX.

Inputs are arrays of any library that speaks `__cuda_array_interface__`: CuPy, PyTorch, PyCUDA, Numba. All work goes to
one CUDA stream, and nothing here waits for it but the two ways back to the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dagan_rt import engines, plugins
from dagan_rt.backends import _device
from dagan_rt.bundle import Bundle, Graph, Tensor
from dagan_rt.engines import FLAVOURS, Flavour
from dagan_rt.errors import InputError

RANK = 1


def missing(bundle: Bundle | None = None, flavour: Flavour = FLAVOURS["tensorrt"]) -> str | None:
    """None, or why this backend cannot run here: the library, the GPU, fitting engines, an array library."""
    if reason := flavour.missing():
        return reason
    capability = engines.compute_capability()
    if capability is None:
        return f"{flavour.name} needs an NVIDIA GPU with its driver, and there is none here"
    if bundle is not None:
        try:
            found = _find(bundle, flavour, capability)
        except InputError as error:
            return str(error)
        if found.plugins == "python" and (reason := plugins.missing()):
            return f"the {flavour.name} engines need the kernels of dagan-rt: {reason}"
    return _device.missing()


def open(
    bundle: Bundle, threads: int | None = None, stream: Any = None, flavour: Flavour = FLAVOURS["tensorrt"]
) -> TensorRTBackend:
    """Load a bundle's engines; raises InputError that says what differs if they were not built for this machine.

    threads: not used. stream: a CUDA stream to work on, or its handle; None makes one.
    """
    return TensorRTBackend(bundle, flavour, stream)


class TensorRTBackend:
    """One execution context a graph, so one thread at a time; arrays are float32 on the GPU."""

    def __init__(self, bundle: Bundle, flavour: Flavour, stream: Any = None) -> None:
        self.name = flavour.name
        self._engines = _find(bundle, flavour, engines.compute_capability())
        self._library = flavour.load()
        if self._engines.plugins == "python":  # an engine names them, and the library must know them to load it
            plugins.register(self._library, "python")
        self._arrays = _device.arrays(stream)  # first of all: it makes the CUDA context that the engines load into
        self._graphs = dict(bundle.graphs)
        self._runtime = self._library.Runtime(engines.logger(self._library))
        self._kept: list[Any] = []  # what the contexts use
        self._contexts = {name: self._load(bundle, graph) for name, graph in self._graphs.items()}
        self._batches: dict[str, int] = {}  # the size each context is set to

    @property
    def stream(self) -> int:
        """The handle of the CUDA stream that all work goes to."""
        return self._arrays.stream

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name of one graph, in memory of their own, complete once `stream` is; raises as `run_into`."""
        batch = self._batch(graph, inputs)
        outputs = {tensor.name: self._arrays.empty(_sized(tensor, batch)) for tensor in self._graphs[graph].outputs}
        self.run_into(graph, inputs, outputs)
        return outputs

    def run_into(self, graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], stream: Any = None) -> None:
        """Enqueue one graph from and into arrays of the caller, who keeps them alive and orders the streams.

        Inputs and outputs: contiguous float32 with `__cuda_array_interface__`, by name, shaped as declared.
        stream: another stream than the backend's, or its handle. To capture it in a CUDA graph, run it once before
        with the same batch; the capture then holds the addresses of these arrays.
        Raises InputError for a wrong array, RuntimeError if the library cannot run it.
        """
        declared, context = self._graphs[graph], self._contexts[graph]
        batch = self._batch(graph, inputs)
        addresses: dict[str, int] = {}
        for kind, tensors, arrays in (("input", declared.inputs, inputs), ("output", declared.outputs, outputs)):
            if unknown := set(arrays) - {tensor.name for tensor in tensors}:
                raise InputError(f"graph {graph} has no {kind} {min(unknown)!r}")
            for tensor in tensors:
                where, shape = f"{kind} {tensor.name} of graph {graph}", _sized(tensor, batch)
                addresses[tensor.name] = _address(where, arrays.get(tensor.name), shape, kind == "output")
        if self._batches.get(graph) != batch:  # setting a shape costs time, and no capture may hold it
            self._batches.pop(graph, None)
            for tensor in declared.inputs:
                self._require(context.set_input_shape(tensor.name, _sized(tensor, batch)), graph)
            self._batches[graph] = batch
        for name, address in addresses.items():
            self._require(context.set_tensor_address(name, address), graph)
        self._require(context.execute_async_v3(self.stream if stream is None else _device.handle(stream)), graph)

    def from_image(self, image: np.ndarray) -> Any:
        """HWC uint8 RGB -> [1, 3, H, W] float32 in [0, 1]; the conversion happens on the GPU."""
        return self._arrays.planes(image)

    def to_image(self, prediction: Any) -> np.ndarray:
        """[1, 3, H, W] in [0, 1] -> HWC uint8 RGB, converted on the GPU."""
        return self._arrays.image(prediction)

    def from_numpy(self, values: np.ndarray) -> Any:
        """A float32 array on the GPU."""
        return self._arrays.upload(values)

    def to_numpy(self, array: Any) -> np.ndarray:
        """A float32 array."""
        return self._arrays.download(array)

    def _batch(self, graph: str, inputs: Mapping[str, Any]) -> int:
        """How many faces the inputs hold, by the first of them."""
        first, profile = self._graphs[graph].inputs[0], self._engines.profile
        interface = getattr(inputs.get(first.name), "__cuda_array_interface__", None)
        if not interface or not interface["shape"] or not isinstance(first.shape[0], str):
            return profile.usual  # whatever is wrong with it is told when its address is taken
        batch = int(interface["shape"][0])
        if not profile.least <= batch <= profile.most:
            raise InputError(f"the engine of graph {graph} takes a batch of {profile}, got {batch}")
        return batch

    def _load(self, bundle: Bundle, graph: Graph) -> Any:
        """The execution context of one engine."""
        path = self._engines.file(bundle.path, graph.name)
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            reason = engines.complaint(self._library)
            raise InputError(f"{path} cannot be loaded by {self.name} {self._library.__version__}: {reason}")
        if self._engines.stripped:
            self._refit(engine, graph)
        self._check_names(engine, graph, str(path))
        context = self._context(engine)
        if context is None:
            raise InputError(f"{path} cannot be made ready to run: {engines.complaint(self._library)}")
        self._kept.append(engine)
        return context

    def _refit(self, engine: Any, graph: Graph) -> None:
        """Put the weights of the ONNX graph into an engine that was stripped of them."""
        log = engines.logger(self._library)
        refitter = self._library.Refitter(engine, log)
        filled = self._library.OnnxParserRefitter(refitter, log).refit_from_file(str(graph.file))
        if not filled or not refitter.refit_cuda_engine():
            raise InputError(f"{graph.file} cannot fill its stripped engine: {engines.complaint(self._library)}")

    def _check_names(self, engine: Any, graph: Graph, path: str) -> None:
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        declared = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        if found != declared:
            names = ", ".join(sorted(declared))
            raise InputError(f"{path}: the manifest declares {names}, the engine has {', '.join(sorted(found))}")
        for name in sorted(found):
            if engine.get_tensor_dtype(name) != self._library.DataType.FLOAT:
                raise InputError(f"{path}: {name} must be float32, got {engine.get_tensor_dtype(name)}")

    def _context(self, engine: Any) -> Any:
        library = self._library
        if not hasattr(library, "DynamicShapesKernelSpecializationStrategy"):
            return engine.create_execution_context()
        # TensorRT-RTX compiles kernels for a shape it has not seen before. Let it do so at once, not in the background
        # while a CUDA graph holds the old ones, and let it work in memory that stays where it is.
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = library.DynamicShapesKernelSpecializationStrategy.EAGER
        config.set_execution_context_allocation_strategy(library.ExecutionContextAllocationStrategy.USER_MANAGED)
        context = engine.create_execution_context(config)
        if context is not None and (size := engine.device_memory_size_v2):
            scratch = self._arrays.empty((-(-size // 4),))
            context.set_device_memory(scratch.__cuda_array_interface__["data"][0], size)
            self._kept += [config, scratch]
        return context

    def _require(self, done: bool, graph: str) -> None:
        if not done:
            raise RuntimeError(f"graph {graph} cannot be run by {self.name}: {engines.complaint(self._library)}")


def _find(bundle: Bundle, flavour: Flavour, capability: str | None) -> engines.EngineSet:
    """`engines.find`; the library is imported only to ask its version of a bundle that has engines for it."""
    has = any(found.flavour == flavour.name for found in engines.engine_sets(bundle))
    return engines.find(bundle, flavour, flavour.load().__version__ if has else "", capability)


def _sized(tensor: Tensor, batch: int) -> tuple[int, ...]:
    return tuple(batch if isinstance(size, str) else size for size in tensor.shape)


def _address(where: str, array: Any, shape: tuple[int, ...], written: bool) -> int:
    """The address of an array on the GPU, which must be contiguous float32 of that shape."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        got = "nothing" if array is None else type(array).__name__
        raise InputError(f"{where} must be an array on the GPU, with __cuda_array_interface__, got {got}")
    if tuple(interface["shape"]) != shape or interface["typestr"] != "<f4":
        raise InputError(f"{where} must be <f4 {shape}, got {interface['typestr']} {tuple(interface['shape'])}")
    strides, dense = interface.get("strides"), 4
    for size, stride in zip(reversed(shape), reversed(strides or ()), strict=False):
        if size > 1 and stride != dense:
            raise InputError(f"{where} must be contiguous, got strides {tuple(strides)} for {shape}: copy it first")
        dense *= size
    address, read_only = interface["data"]
    if written and read_only:
        raise InputError(f"{where} must be writable")
    return int(address)
