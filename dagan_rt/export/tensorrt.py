"""ONNX graphs to engines: one adapter for TensorRT 10 and 11 and for TensorRT-RTX.

Networks are strongly typed: the precision is that of the ONNX graph, the builder changes none. What differs:

|                     | tensorrt                          | tensorrt-rtx                                          |
|---------------------|-----------------------------------|-------------------------------------------------------|
| builds              | on the GPU that will run it       | without a GPU, for a list of compute capabilities     |
| finds fast kernels  | by timing them (timing cache)     | when the engine is loaded                             |
| stripped of weights | yes                               | where there is a GPU                                  |
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dagan_rt.bundle import BatchProfile, Bundle, Tensor, digest
from dagan_rt.engines import (
    FOLDER,
    SIDECAR,
    BuiltGraph,
    EngineSet,
    complaint,
    compute_capability,
    flavour_named,
    logger,
)
from dagan_rt.errors import InputError, require
from dagan_rt.export.subnetworks import BATCH
from dagan_rt.files import AtomicFile
from dagan_rt.plugins import check as check_plugins
from dagan_rt.plugins import register

#: What TensorRT-RTX builds for where there is no GPU: GeForce RTX 30 (Ampere), 40 (Ada) and 50 (Blackwell).
PORTABLE = ("8.6", "8.9", "12.0")

Graphs = Mapping[str, tuple[Path, tuple[Tensor, ...]]]  # by name: the ONNX file and its declared inputs


@dataclass(frozen=True)
class Summary:
    """What one build was, for a report."""

    bytes: int
    seconds: float
    layers: int  # of the parsed network
    inputs: tuple[Tensor, ...]  # as the parser understood them
    outputs: tuple[Tensor, ...]
    fused: tuple[str, ...] | None  # the layers of the engine, as its inspector shows them
    not_inspected: str = ""  # why `fused` is None


def graphs_of(bundle: Bundle) -> dict[str, tuple[Path, tuple[Tensor, ...]]]:
    """The graphs of a bundle in the form that `build_engines` takes."""
    return {name: (graph.file, graph.inputs) for name, graph in bundle.graphs.items()}


def build_engines(
    folder: Path,
    flavour: str,
    graphs: Graphs,
    *,
    batch: BatchProfile,
    precisions: Mapping[str, str],
    recipe_hash: str,
    compute_capabilities: Sequence[str] = (),
    stripped: bool = False,
    plugins: str = "",
    timing_cache: Path | None = None,
    report: Callable[[str], None] = lambda step: None,
) -> tuple[EngineSet, dict[str, Summary]]:
    """Build one engine a graph into the bundle `folder`, with the sidecar that says what they are.

    flavour: tensorrt or tensorrt-rtx. precisions: by graph, those the ONNX graphs were lowered to.
    recipe_hash: of how the graphs were made, hexadecimal. compute_capabilities: as "8.9"; empty takes the present
    GPU, or `PORTABLE` where there is none. stripped: leave the weights out, the ONNX graphs beside hold them.
    plugins: a kind of `dagan_rt.plugins`, to build from the graphs cut at the kernels; empty builds them as they are.
    timing_cache: a file for tensorrt to keep measurements in, by default in the user's cache folder.
    report: called with each graph's name as its build begins.

    Returns the set and a summary of each build; the manifest of the bundle is left to the caller. Raises InputError
    if the library is missing or cannot build one of the graphs; then nothing is left.
    """
    library = flavour_named(flavour).load()
    here = compute_capability()
    targets = _targets(library, flavour, tuple(compute_capabilities), here)
    _check_options(flavour, targets, precisions, stripped, here)
    _check_plugins(library, plugins, stripped)
    if plugins:
        register(library, plugins)
    cache = timing_cache or _user_cache() / f"tensorrt-{library.__version__}-sm{targets[0].replace('.', '')}.timing"
    settings = _Settings(batch, targets, stripped, bool(plugins), cache, inspect=here is not None)
    begun = time.perf_counter()
    with _partial(folder / FOLDER) as partial:
        summaries, built = {}, {}
        for name, (path, inputs) in graphs.items():
            report(name)
            failed = f"graph {name} ({path.name}) cannot be built by {flavour} {library.__version__}"
            engine, summary = _Build(library, settings, failed).run(path, inputs)
            (partial / f"{name}.engine").write_bytes(engine)
            built[name] = BuiltGraph(precisions[name], digest(path)["sha256"], summary.bytes, summary.layers)
            summaries[name] = summary
        seconds = round(time.perf_counter() - begun, 3)
        engines = EngineSet(
            flavour, library.__version__, targets, str(batch), recipe_hash, stripped, seconds, built, plugins
        )
        (partial / SIDECAR).write_text(json.dumps(engines.to_dict(), indent=1) + "\n", encoding="utf-8")
        final = folder / FOLDER / engines.key
        if final.exists():  # an earlier build of the same
            shutil.rmtree(final)
        partial.rename(final)
    return engines, summaries


def check(flavour: str, compute_capabilities: Sequence[str] = (), stripped: bool = False, plugins: str = "") -> None:
    """Raise InputError if the library is missing, or cannot build for these GPUs or such plugins on this machine."""
    library, here = flavour_named(flavour).load(), compute_capability()
    targets = _targets(library, flavour, tuple(compute_capabilities), here)
    _check_options(flavour, targets, {}, stripped, here)
    _check_plugins(library, plugins, stripped)


def supported(library: ModuleType) -> tuple[str, ...]:
    """The compute capabilities that TensorRT-RTX can build for, as "8.9"; none for tensorrt, which builds in place."""
    members = library.ComputeCapability.__members__ if hasattr(library, "ComputeCapability") else ()
    return tuple(f"{member[2:-1]}.{member[-1]}" for member in members if member.startswith("SM"))


def _targets(library: ModuleType, name: str, wanted: tuple[str, ...], here: str | None) -> tuple[str, ...]:
    """The compute capabilities to build for, each once, in order."""
    known = supported(library)
    if not known:
        if here is None:
            raise InputError(
                f"{name} builds engines for the GPU at hand, and there is none here: build them on the machine that "
                "will run them, or use --target tensorrt-rtx"
            )
        if wanted and wanted != (here,):
            raise InputError(
                f"{name} builds engines for the GPU at hand, compute capability {here}, got {', '.join(wanted)}: "
                "leave the compute capabilities out"
            )
        return (here,)
    targets = wanted or ((here,) if here else PORTABLE)
    for target in targets:
        if target not in known:
            whose = "compute capability" if wanted else "the compute capability of the GPU here"
            raise InputError(f"{whose} must be one that {name} serves, {', '.join(known)}, got {target!r}")
    return tuple(sorted(set(targets), key=known.index))


def _check_options(
    name: str, targets: tuple[str, ...], precisions: Mapping[str, str], stripped: bool, here: str | None
) -> None:
    full = [graph for graph, precision in precisions.items() if precision == "fp32"]
    if name == "tensorrt-rtx" and "7.5" in targets and full:
        raise InputError(
            f"compute capability 7.5 needs fp16 graphs, got fp32 for {', '.join(full)}: TensorRT-RTX has no fp32 "
            "matrix product for it"
        )
    if name == "tensorrt-rtx" and stripped and here is None:
        raise InputError("tensorrt-rtx strips weights only where there is a GPU, and there is none here")


def _check_plugins(library: ModuleType, plugins: str, stripped: bool) -> None:
    if plugins and stripped:
        raise InputError("engines with plugins cannot be stripped: weights are filled in from graphs without plugins")
    if plugins:
        check_plugins(library, plugins)


@dataclass(frozen=True)
class _Settings:
    """What the builds of one set have in common."""

    batch: BatchProfile
    targets: tuple[str, ...]  # compute capabilities
    stripped: bool
    plugins: bool
    timing_cache: Path
    inspect: bool


class _Build:
    """One network, from its ONNX file to the bytes of an engine; every error begins with `failed`."""

    def __init__(self, library: ModuleType, settings: _Settings, failed: str) -> None:
        self.library, self.settings, self.failed = library, settings, failed
        complaint(library)  # forget what went wrong before
        self.builder = library.Builder(logger(library))
        typed = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        # TensorRT 10 needs the flag; later versions know no other networks.
        self.network = self.builder.create_network(0 if typed is None else 1 << int(typed))

    def run(self, path: Path, inputs: tuple[Tensor, ...]) -> tuple[Any, Summary]:
        """The engine, a buffer of bytes, and what there is to say of it."""
        begun = time.perf_counter()
        self._parse(path)
        config = self._configure(inputs)
        with self._timed(config):
            engine = self.builder.build_serialized_network(self.network, config)
        if engine is None:
            targets = ", ".join(self.settings.targets)
            raise InputError(f"{self.failed} for compute capability {targets}: {complaint(self.library)}")
        seconds = round(time.perf_counter() - begun, 3)
        network = self.network
        found_inputs = tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs))
        found_outputs = tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs))
        fused, reason = self._inspect(engine)
        return engine, Summary(engine.nbytes, seconds, network.num_layers, found_inputs, found_outputs, fused, reason)

    def _parse(self, path: Path) -> None:
        # The parser keeps no reference to its network: `self` does.
        parser = self.library.OnnxParser(self.network, logger(self.library))
        parsed = parser.parse(_cut(path)) if self.settings.plugins else parser.parse_from_file(str(path))
        if parsed:
            return
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reason = complaint(self.library)
        if errors:
            error = errors[0]
            node = f"the op {error.node_operator()} of node {error.node_name()!r}: " if error.node_operator() else ""
            reason = f"{node}{' '.join(str(error.desc()).split())[:200]} ({str(error.code()).rpartition('.')[2]})"
        raise InputError(f"{self.failed}: {reason}")

    def _configure(self, inputs: tuple[Tensor, ...]) -> Any:
        library, config, targets = self.library, self.builder.create_builder_config(), self.settings.targets
        flags = library.BuilderFlag
        config.clear_flag(flags.TF32)  # on by default, and not fp32: it multiplies with 10 bits of mantissa
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED  # for the inspector; costs nothing at run time
        if hasattr(config, "set_compute_capability"):
            config.num_compute_capabilities = len(targets)
            for i, target in enumerate(targets):
                config.set_compute_capability(getattr(library.ComputeCapability, "SM" + target.replace(".", "")), i)
        if hasattr(flags, "REQUIRE_USER_ALLOCATION"):
            config.set_flag(flags.REQUIRE_USER_ALLOCATION)  # else an engine may allocate, and no CUDA graph take it
        if self.settings.stripped:
            config.set_flag(flags.STRIP_PLAN)
            config.set_flag(flags.REFIT_IDENTICAL)
        self._add_profile(config, inputs)
        return config

    def _add_profile(self, config: Any, inputs: tuple[Tensor, ...]) -> None:
        """Compare the declared inputs with the network's by name, and give the sizes of a dynamic batch axis."""
        batch, network = self.settings.batch, self.network
        found = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
        if sorted(found) != sorted(tensor.name for tensor in inputs):
            declared = ", ".join(tensor.name for tensor in inputs)
            raise InputError(f"{self.failed}: its inputs must be {declared}, got {', '.join(found)}")
        profile, dynamic = self.builder.create_optimization_profile(), False
        for tensor in inputs:
            got = _tensor(found[tensor.name])
            least, usual, most = (
                tuple(size if isinstance(axis, str) else axis for axis in tensor.shape)
                for size in (batch.least, batch.usual, batch.most)
            )
            if got != tensor and not (got.dtype == tensor.dtype and batch.fixed and got.shape == most):
                wanted = f"{tensor.dtype} {list(tensor.shape)} with a batch of {batch}"
                raise InputError(f"{self.failed}: {tensor.name} must be {wanted}, got {got.dtype} {list(got.shape)}")
            if BATCH in got.shape:
                dynamic = True
                profile.set_shape(tensor.name, least, usual, most)
        if dynamic and config.add_optimization_profile(profile) < 0:
            raise InputError(f"{self.failed} for a batch of {batch}: {complaint(self.library)}")

    @contextlib.contextmanager
    def _timed(self, config: Any) -> Iterator[None]:
        """Let tensorrt use and extend what earlier builds timed; whatever is wrong with the file, the build goes on."""
        if supported(self.library):  # TensorRT-RTX times nothing while it builds
            yield
            return
        path, content = self.settings.timing_cache, b""
        with contextlib.suppress(OSError):
            content = path.read_bytes()
        # It must live until the engine is built. One that does not belong to this GPU is refused: begin a new one.
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        yield
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = AtomicFile(path)
            file.write(bytes(config.get_timing_cache().serialize()))
            file.commit()

    def _inspect(self, engine: Any) -> tuple[tuple[str, ...] | None, str]:
        """The names of the engine's fused layers, or None and the reason."""
        if not self.settings.inspect:
            return None, "an engine is inspected where there is a GPU"
        library = self.library
        loaded = library.Runtime(logger(library)).deserialize_cuda_engine(engine)
        if loaded is None:
            return None, complaint(library)
        text = loaded.create_engine_inspector().get_engine_information(library.LayerInformationFormat.JSON)
        layers = json.loads(text).get("Layers", [])
        return tuple(layer["Name"] if isinstance(layer, dict) else str(layer) for layer in layers), ""


def _cut(path: Path) -> bytes:
    """A graph cut at the kernels."""
    from dagan_rt.export import plugin_nodes

    model = require("onnx", extra="export", why="building engines with plugins").load(str(path))
    plugin_nodes.insert(model)
    content: bytes = model.SerializeToString()
    return content


def _tensor(tensor: Any) -> Tensor:
    """An input or output as the parser understood it; its dynamic axis is the batch, there is no other."""
    dtype = {"FLOAT": "float32", "HALF": "float16"}.get(tensor.dtype.name, tensor.dtype.name.lower())
    return Tensor(tensor.name, tuple(BATCH if size == -1 else size for size in tensor.shape), dtype)


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` to build in; if it was not renamed by the end it is deleted, an empty parent too."""
    folder.mkdir(exist_ok=True)
    partial = folder / f".{os.getpid()}.partial"
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # succeeds when nothing is in it


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dagan-rt"
