"""TensorRT on an NVIDIA GPU, from the engines inside the bundle; `tensorrt_rtx.py` is the same with TensorRT-RTX.

Neither PyTorch nor another array library is needed: memory and streams are the driver's own (`dagan_rt.cuda`), images
are converted by the kernels. Graphs take arrays of any library that speaks `__cuda_array_interface__`: CuPy, PyTorch,
PyCUDA, Numba. All work goes to one CUDA stream, and nothing here waits for it but the two ways back to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dagan_rt import engines, plugins
from dagan_rt.bundle import Bundle, Graph, Tensor
from dagan_rt.engines import FLAVOURS, Flavour
from dagan_rt.errors import InputError

if TYPE_CHECKING:
    from dagan_rt.backends._engine_frames import EngineFrames

RANK = 1


def missing(bundle: Bundle | None = None, flavour: Flavour = FLAVOURS["tensorrt"]) -> str | None:
    """None, or why this backend cannot run here: the library, the GPU, fitting engines, the kernels."""
    if reason := flavour.missing():
        return reason
    capability = engines.compute_capability()
    if capability is None:
        return f"{flavour.name} needs an NVIDIA GPU with its driver, and there is none here"
    if bundle is not None:
        try:
            _find(bundle, flavour, capability)
        except InputError as error:
            return str(error)
    if reason := plugins.missing():
        return f"the {flavour.name} engines need the kernels of dagan-rt: {reason}"
    return None


def open(
    bundle: Bundle, threads: int | None = None, stream: Any = None, flavour: Flavour = FLAVOURS["tensorrt"]
) -> TensorRTBackend:
    """Load a bundle's engines; raises InputError that says what differs if they were not built for this machine.

    threads: not used. stream: a CUDA stream to work on, or its handle; None makes one.
    """
    return TensorRTBackend(bundle, flavour, stream)


class TensorRTBackend:
    """One execution context a graph, so one thread at a time; arrays are float32 on the GPU.

    `frames` gives whole frames, which have contexts and streams of their own.
    """

    def __init__(self, bundle: Bundle, flavour: Flavour, stream: Any = None) -> None:
        from dagan_rt.cuda.driver import current_device
        from dagan_rt.cuda.streams import Stream
        from dagan_rt.kernels._arrays import handle
        from dagan_rt.kernels._devices import device

        self.name = flavour.name
        self._bundle, self._engines = bundle, _find(bundle, flavour, engines.compute_capability())
        self._library = flavour.load()
        if self._engines.plugins == "python":  # an engine names them, and the library must know them to load it
            plugins.register(self._library, "python")
        self.device = device(current_device())
        self._graphs = dict(bundle.graphs)
        with self.device.current():  # the context that the engines load into
            self._owner = stream  # must outlive its handle
            self._stream = Stream() if stream is None else Stream(handle(stream))
            self._runtime = self._library.Runtime(engines.logger(self._library))
            self._loaded = {name: self._load(bundle, graph) for name, graph in self._graphs.items()}
            self._contexts = {name: Contexts(self, (name,), (0,)) for name in self._graphs}
        self._batches: dict[str, int] = {}  # the size each context is set to

    @property
    def largest_batch(self) -> int:
        """What the engines were built for."""
        return self._engines.profile.most

    @property
    def stream(self) -> int:
        """The handle of the CUDA stream that all work goes to."""
        return self._stream.handle

    @property
    def weights_bytes(self) -> int:
        """Bytes of the engines, which hold the weights."""
        files = (self._engines.file(self._bundle.path, name) for name in self._graphs)
        return sum(file.stat().st_size for file in files)

    def frames(self, slots: int = 1, batches: Sequence[int] = (1,)) -> EngineFrames:
        """Whole frames, see `dagan_rt.frames`; InputError for too little memory or a batch that no engine takes."""
        from dagan_rt.backends._engine_frames import EngineFrames

        return EngineFrames(self, self._bundle, slots, batches)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name of one graph, in memory of their own, complete once `stream` is; raises as `run_into`."""
        batch = self._batch(graph, inputs)
        outputs = {tensor.name: self._empty(_sized(tensor, batch)) for tensor in self._graphs[graph].outputs}
        self.run_into(graph, inputs, outputs)
        return outputs

    def run_into(self, graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], stream: Any = None) -> None:
        """Enqueue one graph from and into arrays of the caller, who keeps them alive and orders the streams.

        Inputs and outputs: contiguous float32 with `__cuda_array_interface__`, by name, shaped as declared.
        stream: another stream than the backend's, or its handle. To capture it in a CUDA graph, run it once before
        with the same batch; the capture then holds the addresses of these arrays.
        Raises InputError for a wrong array, RuntimeError if the library cannot run it.
        """
        from dagan_rt.kernels._arrays import handle

        declared, context = self._graphs[graph], self._contexts[graph]
        batch = self._batch(graph, inputs)
        addresses: dict[str, int] = {}
        for kind, tensors, arrays in (("input", declared.inputs, inputs), ("output", declared.outputs, outputs)):
            if unknown := set(arrays) - {tensor.name for tensor in tensors}:
                raise InputError(f"graph {graph} has no {kind} {min(unknown)!r}")
            for tensor in tensors:
                where, shape = f"{kind} {tensor.name} of graph {graph}", _sized(tensor, batch)
                addresses[tensor.name] = _address(where, arrays.get(tensor.name), shape, kind == "output")
        with self.device.current():
            if self._batches.get(graph) != batch:  # setting a shape costs time, and no capture may hold it
                self._batches.pop(graph, None)
                context.shape(graph, 0, batch)
                self._batches[graph] = batch
            context.address(graph, 0, addresses)
            context.execute(graph, 0, self.stream if stream is None else handle(stream))

    def from_image(self, image: np.ndarray) -> Any:
        """HWC uint8 RGB -> [1, 3, H, W] float32 in [0, 1]; the conversion happens on the GPU."""
        from dagan_rt.kernels.image import image_to_planes

        pixels = self._upload(np.asarray(image, np.uint8)[None])
        return image_to_planes(pixels, out=self._empty((1, 3, *image.shape[:2])), stream=self.stream)

    def to_image(self, prediction: Any) -> np.ndarray:
        """[1, 3, H, W] in [0, 1] -> HWC uint8 RGB, converted on the GPU."""
        from dagan_rt.kernels.image import planes_to_image

        levels = self._empty((1, *prediction.shape[2:], 3), "uint8")
        return self._download(planes_to_image(prediction, out=levels, stream=self.stream))[0]

    def from_numpy(self, values: np.ndarray) -> Any:
        """A float32 array on the GPU."""
        return self._upload(np.asarray(values, np.float32))

    def to_numpy(self, array: Any) -> np.ndarray:
        """A float32 array, of any contiguous one on the GPU."""
        return self._download(array)

    def check_batches(self, batches: Sequence[int]) -> None:
        """Raise InputError for a batch that the engines do not take."""
        profile = self._engines.profile
        for batch in batches:
            if not profile.least <= batch <= profile.most:
                raise InputError(
                    f"the {self.name} engines of bundle {self._bundle.path} take a batch of {profile}, got {batch}: "
                    f"run python -m dagan_rt.export --rebuild {self._bundle.path} --target {self.name} with a --batch "
                    "that holds it"
                )

    def contexts(self, graphs: Sequence[str], batches: Sequence[int]) -> Contexts:
        """Execution contexts for each of some graphs and batch sizes, for one stream at a time."""
        with self.device.current():
            return Contexts(self, graphs, batches)

    def _empty(self, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        """An array whose memory is taken and given back in order with the stream's work."""
        from dagan_rt.cuda.streams import Memory
        from dagan_rt.kernels._devices import ITEM_BYTES

        nbytes = ITEM_BYTES[dtype] * int(np.prod(shape, dtype=np.int64))
        return Memory(self.device, nbytes, f"an array {shape}", self.stream).array(shape, dtype)

    def _upload(self, values: np.ndarray) -> Any:
        values = np.ascontiguousarray(values)
        array = self._empty(values.shape, values.dtype.name)
        with self.device.current():
            self._stream.upload(array.pointer, values)
        return array

    def _download(self, array: Any) -> np.ndarray:
        interface = array.__cuda_array_interface__
        found = np.empty(tuple(interface["shape"]), interface["typestr"])
        _require_contiguous("array", found.shape, interface, found.itemsize)
        with self.device.current():
            self._stream.download(found, interface["data"][0])
            self._stream.synchronize()
        return found

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
        """One engine."""
        path = self._engines.file(bundle.path, graph.name)
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            reason = engines.complaint(self._library)
            raise InputError(f"{path} cannot be loaded by {self.name} {self._library.__version__}: {reason}")
        if self._engines.stripped:
            self._refit(engine, graph)
        self._check_names(engine, graph, str(path))
        return engine

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


class Contexts:
    """Execution contexts of some engines, one for each batch size, which work in the same memory one after the other.

    Each size has contexts of its own because a CUDA graph holds what its context was set to.
    """

    def __init__(self, backend: TensorRTBackend, graphs: Sequence[str], batches: Sequence[int]) -> None:
        from dagan_rt.cuda.streams import Memory

        self._backend, self._library = backend, backend._library
        loaded = {name: backend._loaded[name] for name in graphs}
        self.nbytes = max(engine.device_memory_size_v2 for engine in loaded.values())
        self._scratch = Memory(backend.device, self.nbytes, "the engines' scratch memory") if self.nbytes else None
        self._configs: list[Any] = []  # must outlive the contexts
        self._contexts = {(name, size): self._make(name, loaded[name]) for name in graphs for size in batches}

    def bind(self, graph: str, batch: int, arrays: Mapping[str, Any]) -> None:
        """Set one to its batch size and to the addresses of these arrays, by the names of its inputs and outputs."""
        self.shape(graph, batch, batch)
        declared = self._backend._graphs[graph]
        self.address(graph, batch, {it.name: arrays[it.name].pointer for it in (*declared.inputs, *declared.outputs)})

    def shape(self, graph: str, key: int, batch: int) -> None:
        """Set the batch size of the context made as `key`."""
        for tensor in self._backend._graphs[graph].inputs:
            self._require(self._contexts[graph, key].set_input_shape(tensor.name, _sized(tensor, batch)), graph)

    def address(self, graph: str, key: int, addresses: Mapping[str, int]) -> None:
        """Say where its inputs and outputs lie."""
        for name, address in addresses.items():
            self._require(self._contexts[graph, key].set_tensor_address(name, address), graph)

    def execute(self, graph: str, key: int, stream: int) -> None:
        """Enqueue it. Raises RuntimeError if the library cannot run it, DeviceLost if the GPU is gone."""
        self._require(self._contexts[graph, key].execute_async_v3(stream), graph)

    def close(self) -> None:
        """Free them and their memory."""
        self._contexts.clear()
        self._configs.clear()
        if self._scratch is not None:
            self._scratch.close()

    def _make(self, graph: str, engine: Any) -> Any:
        library = self._library
        if hasattr(library, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT-RTX compiles kernels for a shape it has not seen before. Let it do so at once, not in the
            # background while a CUDA graph holds the old ones.
            config = engine.create_runtime_config()
            eager = library.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            config.set_execution_context_allocation_strategy(library.ExecutionContextAllocationStrategy.USER_MANAGED)
            self._configs.append(config)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(library.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            reason = engines.complaint(library)
            raise InputError(f"the engine of graph {graph} cannot be made ready to run: {reason}")
        if self._scratch is not None:  # memory that stays where it is
            context.set_device_memory(self._scratch.pointer, self.nbytes)
        return context

    def _require(self, done: bool, graph: str) -> None:
        if done:
            return
        self._backend.device.memory()  # raises DeviceLost if that is why
        reason = engines.complaint(self._library)
        raise RuntimeError(f"graph {graph} cannot be run by {self._backend.name}: {reason}")


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
    _require_contiguous(where, shape, interface, 4)
    address, read_only = interface["data"]
    if written and read_only:
        raise InputError(f"{where} must be writable")
    return int(address)


def _require_contiguous(where: str, shape: tuple[int, ...], interface: Mapping[str, Any], size: int) -> None:
    strides, dense = interface.get("strides"), size
    for length, stride in zip(reversed(shape), reversed(strides or ()), strict=False):
        if length > 1 and stride != dense:
            raise InputError(f"{where} must be contiguous, got strides {strides} for {shape}: copy it first")
        dense *= length
