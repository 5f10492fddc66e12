"""TensorRT engines in a bundle: the two libraries that run them, where they lie, and which of them fit here.

    bundle/engines/<key>/
        engine.json                the sidecar: by what, for what and from which graphs the engines were built
        source.engine  driving.engine  motion.engine  generator.engine

An engine runs only with the library version and on the GPUs it was built for. Its bytes differ from build to build, so
it is tied to the hash of the ONNX graph it came from. Like the manifest, a sidecar is untrusted input.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dagan_rt.bundle import PRECISIONS, BatchProfile, Bundle
from dagan_rt.cuda.driver import compute_capability as compute_capability
from dagan_rt.errors import InputError, MissingPackage
from dagan_rt.plugins import KINDS
from dagan_rt.tables import fill, read_json

FOLDER, SIDECAR = "engines", "engine.json"
MOST_SETS = 16  # kinds of engines in one bundle

CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]")  # a compute capability
_SIDECAR_NAME = re.compile(rf"{FOLDER}/([^/]+)/{re.escape(SIDECAR)}")


@dataclass(frozen=True)
class Flavour:
    """One of two libraries with the same API: `tensorrt` 10 or 11, and `tensorrt-rtx`, which builds without a GPU."""

    name: str
    module: str
    package: str  # what pip calls it

    def missing(self) -> str | None:
        """None, or one sentence that says how to install it. Imports nothing."""
        if importlib.util.find_spec(self.module) is None:
            return f"the package {self.module} is not installed: run pip install {self.package}"
        return None

    def load(self) -> ModuleType:
        """Import the library; raises MissingPackage, or InputError if its shared libraries cannot be loaded."""
        if reason := self.missing():
            raise MissingPackage(reason)
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:  # the Python bindings without the libraries they bind
            raise InputError(
                f"the package {self.module} cannot be loaded ({one_line(error)}): "
                f"run pip install --force-reinstall {self.package}"
            ) from None


FLAVOURS = {
    it.name: it
    for it in (
        Flavour("tensorrt", "tensorrt", "tensorrt-cu13"),
        Flavour("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx-cu13"),
    )
}


def flavour_named(name: str) -> Flavour:
    """The library of that name; raises InputError for another."""
    if name not in FLAVOURS:
        raise InputError(f"engines are built by {' or '.join(FLAVOURS)}, got {name!r}")
    return FLAVOURS[name]


_loggers: dict[ModuleType, Any] = {}


def logger(library: ModuleType) -> Any:
    """The process's one logger of a library, which keeps errors for `complaint` instead of printing them.

    One only, and for good: the library keeps using the first it was given, and warns of a second.
    """
    if library not in _loggers:

        class Kept(library.ILogger):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                super().__init__()
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR) and len(self.errors) < 100:
                    self.errors.append(message)

        _loggers[library] = Kept()
    return _loggers[library]


def complaint(library: ModuleType) -> str:
    """The first error the library logged since the last call, in one line, "it gave no reason" if there was none."""
    kept = logger(library)
    errors, kept.errors = kept.errors, []
    return one_line(errors[0]) if errors else "it gave no reason"


def one_line(message: object) -> str:
    """A library's message without line breaks and the places in its own sources, cut to 300 characters."""
    text = re.sub(r"\(?In \w+ at \S+?:\d+\)? ?", "", " ".join(str(message).split()))
    return text[:300].rstrip(". ")


@dataclass(frozen=True)
class BuiltGraph:
    """One engine of a set."""

    precision: str
    onnx: str  # SHA-256 of the graph it was built from
    bytes: int
    layers: int  # of the parsed network; the builder fuses them


@dataclass(frozen=True)
class EngineSet:
    """The sidecar: engines for all graphs of a bundle, built together."""

    flavour: str
    version: str  # of the library
    compute_capabilities: tuple[str, ...]  # as "8.9"
    batch: str  # a BatchProfile
    recipe: str  # hash of the recipe, hexadecimal
    stripped: bool  # the weights are left out, and taken from the ONNX graphs at load
    seconds: float  # the build took
    graphs: dict[str, BuiltGraph]
    plugins: str = ""  # the kind of dagan-rt's plugins that they hold; "python": they run only where dagan-rt is

    def __post_init__(self) -> None:
        flavour_named(self.flavour)
        BatchProfile.parse(self.batch)
        _require(re.fullmatch(r"[0-9][0-9A-Za-z.]{0,31}", self.version), "version", self.version)
        _require(re.fullmatch(r"[0-9a-f]{8,64}", self.recipe), "recipe", self.recipe)
        _require(1 <= len(self.compute_capabilities) <= 16, "compute_capabilities", self.compute_capabilities)
        _require(self.plugins in ("", *KINDS), "plugins", self.plugins)
        for capability in self.compute_capabilities:
            _require(CAPABILITY.fullmatch(capability), "compute_capabilities", capability)
        _require(1 <= len(self.graphs) <= 64, "graphs", tuple(self.graphs)[:3])
        for name, graph in self.graphs.items():
            _require(re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name), "graphs", name)
            _require(graph.precision in PRECISIONS, f"graphs.{name}.precision", graph.precision)
            _require(re.fullmatch(r"[0-9a-f]{64}", graph.onnx), f"graphs.{name}.onnx", graph.onnx)

    @property
    def profile(self) -> BatchProfile:
        """The batch sizes the engines take."""
        return BatchProfile.parse(self.batch)

    @property
    def key(self) -> str:
        """The folder's name, as tensorrt-rtx-1.7.1.116-sm86.89.120-fp16-b1.1.8-3f2a9c1d."""
        precisions = {graph.precision for graph in self.graphs.values()}
        graphs = sorted((name, it.onnx, it.precision) for name, it in self.graphs.items())
        sources = json.dumps([self.recipe, self.stripped, graphs])
        return "-".join(
            (
                self.flavour,
                self.version,
                "sm" + ".".join(capability.replace(".", "") for capability in self.compute_capabilities),
                precisions.pop() if len(precisions) == 1 else "mixed",
                *([f"plugins.{self.plugins}"] if self.plugins else []),
                "b" + self.batch.replace(":", "."),
                hashlib.sha256(sources.encode()).hexdigest()[:8],
            )
        )

    def file(self, bundle: Path, graph: str) -> Path:
        """Where the engine of a graph lies."""
        return bundle / FOLDER / self.key / f"{graph}.engine"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the sidecar."""
        return asdict(self) | {"compute_capabilities": list(self.compute_capabilities)}

    @classmethod
    def from_dict(cls, values: Any, name: str = SIDECAR) -> EngineSet:
        """The inverse of `to_dict` for values from anywhere; raises InputError that names the file and the key."""
        if not isinstance(values, dict):
            raise InputError(f"{name} must hold an object, got {type(values).__name__}")
        try:
            found: EngineSet = fill(cls, values, name)
        except InputError as error:
            raise InputError(str(error) if name in str(error) else f"{name}: {error}") from None
        return found


def engine_sets(bundle: Bundle) -> list[EngineSet]:
    """Every set of engines that the manifest names; raises InputError for a damaged sidecar."""
    names = [name for name in bundle.manifest["files"] if _SIDECAR_NAME.fullmatch(name)]
    if len(names) > MOST_SETS:
        raise InputError(f"{bundle.path / FOLDER} must hold at most {MOST_SETS} sets of engines, got {len(names)}")
    found = []
    for name in names:
        path = bundle.path / name
        engines = EngineSet.from_dict(read_json(path, "sidecar"), str(path))
        if engines.key != path.parent.name:
            raise InputError(f"{path} must lie in the folder {engines.key}: it was moved or changed after the build")
        found.append(engines)
    return found


def find(bundle: Bundle, flavour: Flavour, version: str, capability: str | None, batch: int | None = None) -> EngineSet:
    """The engines of a bundle for this library version, GPU and batch; InputError says what differs and what to run.

    version: of the installed library. capability: of the present GPU, as "8.9", or None. batch: a size they must take.
    Of several that fit, those built for the fewest GPUs are taken.
    """
    sets = [engines for engines in engine_sets(bundle) if engines.flavour == flavour.name]
    differences = [_difference(engines, bundle, version, capability, batch) for engines in sets]
    fitting = [engines for engines, difference in zip(sets, differences, strict=True) if difference is None]
    if fitting:
        return min(fitting, key=lambda engines: len(engines.compute_capabilities))
    rebuild = f"run python -m dagan_rt.export --rebuild {bundle.path} --target {flavour.name}"
    if not sets:
        raise InputError(f"bundle {bundle.path} holds no {flavour.name} engines: {rebuild}")
    raise InputError(f"bundle {bundle.path}: {'; '.join(filter(None, differences[:3]))}: {rebuild}")


def _difference(
    engines: EngineSet, bundle: Bundle, version: str, capability: str | None, batch: int | None
) -> str | None:
    """Why engines cannot be used, or None."""
    name = f"the {engines.flavour} engines"
    if engines.version != version:
        return f"{name} were built by version {engines.version}, installed is {version}"
    if capability not in engines.compute_capabilities:
        here = f"this GPU has {capability}" if capability else "there is no GPU here"
        return f"{name} were built for compute capability {', '.join(engines.compute_capabilities)}, {here}"
    files: Mapping[str, Any] = bundle.manifest["files"]
    for graph in bundle.graphs.values():
        file = engines.file(bundle.path, graph.name).relative_to(bundle.path).as_posix()
        if graph.name not in engines.graphs or file not in files:
            return f"{name} lack one for the graph {graph.name}"
        if engines.graphs[graph.name].onnx != files[graph.file.relative_to(bundle.path).as_posix()]["sha256"]:
            return f"the graph {graph.name} was changed after {name} were built"
    if batch is not None and not engines.profile.least <= batch <= engines.profile.most:
        return f"{name} were built for a batch of {engines.batch}, wanted is {batch}"
    return None


def _require(passed: object, key: str, value: object) -> None:
    if not passed:
        raise InputError(f"{key} is not what a build writes, got {str(value)[:80]!r}")
