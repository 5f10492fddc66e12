"""A model repository for Triton Inference Server: how it serves, what lies in it, and the marker that says it is ours.

    repository/
        dagan-rt.json              the marker: what was written, from which bundle, and hashes of code and graphs
        reenact/                   of the layouts "stateful" and "both"
            config.pbtxt
            1/model.py             one line, which imports `dagan_rt.serving.model`
            1/bundle/              the bundle, whole
        reenact_stream/            the same, decoupled, where `stream` was asked for
        dagan_…/                   of the layouts "graphs" and "both": the subnetworks, and ensembles of them

Triton looks at the folders alone and passes over the marker. Like a manifest, it is untrusted input.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dagan_rt import backends
from dagan_rt.bundle import Bundle
from dagan_rt.engines import FLAVOURS, engine_sets
from dagan_rt.errors import InputError
from dagan_rt.serving import protocol
from dagan_rt.serving.protocol import Settings
from dagan_rt.tables import fill, read_json

if TYPE_CHECKING:
    from dagan_rt.networks.config import NetworkConfig

FORMAT = "dagan-rt model repository"
VERSION = 1
MARKER = "dagan-rt.json"
CONFIG = "config.pbtxt"
CODE, BUNDLE = "model.py", "bundle"
SOURCE = "from dagan_rt.serving.model import TritonPythonModel  # noqa: F401\n"  # of CODE
LAYOUTS = ("stateful", "graphs", "both")
TRITONS_OWN = ("auto", "onnxruntime", "tensorrt")  # what runs the graphs where no Python does; auto: onnxruntime
RESOURCE = "dagan_rt"  # what Triton's rate limiter counts
MOST_GPUS = 64
MOST_MODELS = 64

_INSTANCES = re.compile(r"cpu|gpu|gpu:[0-9]{1,4}(,[0-9]{1,4})*")
_FILE = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9_.-]*(/\.?[A-Za-z0-9_][A-Za-z0-9_.-]*)*")  # no "..", no "/x"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ServingPlan(Settings):
    """One way to serve a bundle; every field is a key of a recipe's table [triton] and an option of the command.

    The fields of `Settings` are for the layout "stateful"; of them batch, deadline and queue also hold for "graphs".
    """

    layout: str = "stateful"  # one of LAYOUTS
    stream: bool = False  # also a decoupled model, which takes many frames a request and answers with one after another
    instances: str = "cpu"  # or "gpu", every GPU of the server, or "gpu:0,1", these
    count: int = 1  # instances a device, each with its own copy of the networks
    version: int = 1  # the number of the folder that the models lie in
    warm_up: bool = True  # run everything once before a model is called ready
    rate_limit: int = 0  # executions at once a device, over all models of the repository; 0: no limit
    timeout: float = 10.0  # seconds in Triton's queue after which the layout "graphs" refuses a request

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in LAYOUTS:
            raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if not _INSTANCES.fullmatch(self.instances):
            raise InputError(f"instances must be cpu, gpu (every GPU) or gpu:0,1 (these), got {self.instances[:80]!r}")
        if len(set(self.gpus)) != len(self.gpus) or any(gpu >= MOST_GPUS for gpu in self.gpus):
            raise InputError(f"instances must name each GPU once, 0 to {MOST_GPUS - 1}, got {self.instances[:80]!r}")
        for name, least, most in (("count", 1, 64), ("version", 1, 1 << 31), ("rate_limit", 0, 1024),
                                  ("timeout", 0.001, 3600)):  # fmt: skip
            if not least <= (value := getattr(self, name)) <= most:
                raise InputError(f"{name} must be {least} to {most}, got {value}")
        if not self.stateful and self.backend not in TRITONS_OWN:
            raise InputError(
                f"backend of the layout graphs must be {', '.join(TRITONS_OWN)}, got {self.backend[:80]!r}"
            )
        if self.stream and not self.stateful:
            raise InputError(f"stream is for the layout stateful or both, got it with the layout {self.layout}")

    @property
    def stateful(self) -> bool:
        """Whether there is `reenact`."""
        return self.layout != "graphs"

    @property
    def on_gpus(self) -> bool:
        """Whether instances are given a GPU."""
        return self.instances != "cpu"

    @property
    def gpus(self) -> tuple[int, ...]:
        """The GPUs by number; none for the CPU and for "gpu", which is all of them."""
        return tuple(int(number) for number in self.instances.partition(":")[2].split(",") if number)

    @property
    def settings(self) -> Settings:
        """What the stateful model reads from its parameters."""
        return Settings(**{entry.name: getattr(self, entry.name) for entry in fields(Settings)})

    def to_dict(self) -> dict[str, Any]:
        """Plain strings and numbers, for the marker."""
        return asdict(self)


class Port(NamedTuple):
    """An input or output of a stateful model, as a config.pbtxt declares it."""

    name: str
    data_type: str
    dims: tuple[int, ...]  # -1: any number


def ports(model: str, config: NetworkConfig) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """(inputs, all of them optional; outputs) of `reenact`, which Triton batches, or of `reenact_stream`.

    The leading dimension that Triton adds to a batched model is not among the dims.
    """
    image, points = (config.size, config.size, 3), config.num_keypoints
    many, one = ((-1,), (1,)) if model == protocol.STREAM_MODEL else ((), ())
    inputs = (
        Port(protocol.FRAME, "TYPE_UINT8", (*many, *image)),
        Port(protocol.SOURCE, "TYPE_UINT8", (*one, *image)),
        Port(protocol.FRAME_ENCODED, "TYPE_STRING", many or (1,)),
        Port(protocol.SOURCE_ENCODED, "TYPE_STRING", (1,)),
        Port(protocol.END, "TYPE_BOOL", (1,)),
    )
    value, jacobian = protocol.POINTS
    outputs = (
        Port(protocol.IMAGE, "TYPE_UINT8", (*one, *image)),
        Port(protocol.IMAGE_ENCODED, "TYPE_STRING", (1,)),
        Port(value, "TYPE_FP32", (*one, points, 2)),
        Port(jacobian, "TYPE_FP32", (*one, points, 2, 2)),
    )
    return inputs, outputs


@dataclass(frozen=True)
class Repository:
    """What the marker says. Its files were not looked at: `dagan_rt.serving.check` does."""

    path: Path
    plan: ServingPlan
    models: tuple[str, ...]
    variant: str
    size: int  # side of the square images, pixels
    precision: Mapping[str, str]  # of each graph
    bundle_sha256: str  # of the bundle's manifest.json, which holds the hashes of all its other files
    files: Mapping[str, Any]  # bytes and sha256 of each file that is neither in a bundle nor a config.pbtxt

    @classmethod
    def open(cls, path: str | Path) -> Repository:
        """Read the marker; raises InputError if there is none, or if it is not what `to_dict` writes."""
        root = Path(path)
        values = _read_marker(root)
        if values.get("version") != VERSION:
            raise InputError(
                f"{root / MARKER} has format version {values.get('version')!r}, this dagan-rt reads {VERSION}: "
                "write the repository again"
            )
        try:
            marker = fill(
                _Marker, {key: value for key, value in values.items() if key not in ("format", "version")}, ""
            )
        except InputError as error:
            raise InputError(f"{root / MARKER}: {str(error).removeprefix(': ')}") from None
        return cls(root, marker.settings, marker.models, marker.variant, marker.size, marker.precision,
                   marker.bundle_sha256, {name: vars(entry) for name, entry in marker.files.items()})  # fmt: skip

    @property
    def stateful(self) -> tuple[str, ...]:
        """The names of the models that hold the bundle and serve sequences."""
        return tuple(name for name in self.models if name in (protocol.MODEL, protocol.STREAM_MODEL))

    def to_dict(self) -> dict[str, Any]:
        """The marker."""
        return {
            "format": FORMAT, "version": VERSION, "layout": self.plan.layout, "models": list(self.models),
            "variant": self.variant, "size": self.size, "precision": dict(self.precision),
            "bundle_sha256": self.bundle_sha256, "settings": self.plan.to_dict(), "files": dict(self.files),
        }  # fmt: skip


@dataclass(frozen=True)
class _File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Marker:
    """The keys of the file, format and version aside."""

    layout: str
    models: tuple[str, ...]
    variant: str
    size: int
    precision: dict[str, str]
    bundle_sha256: str
    settings: ServingPlan
    files: dict[str, _File]

    def __post_init__(self) -> None:
        if self.layout != self.settings.layout:
            raise InputError(f"layout must be that of the settings, {self.settings.layout}, got {self.layout[:80]!r}")
        if not 1 <= len(self.models) <= MOST_MODELS:
            raise InputError(f"models must be 1 to {MOST_MODELS} names, got {len(self.models)}")
        for name in self.models:
            if not re.fullmatch("[a-z][a-z0-9_]{0,63}", name):
                raise InputError(f"models must be names such as {protocol.MODEL}, got {name[:80]!r}")
        for name in self.files:
            if not _FILE.fullmatch(name):
                raise InputError(f"files must have plain relative names inside the repository, got {name[:80]!r}")
        if not _SHA256.fullmatch(self.bundle_sha256):
            raise InputError(f"bundle_sha256 must be 64 hexadecimal digits, got {self.bundle_sha256[:80]!r}")


def outside_bundles(root: Path, models: Iterable[str]) -> list[str]:
    """The files of the models in the repository `root` that the marker has hashes of, by their relative names.

    Not those in bundles, whose manifests have them, nor a config.pbtxt, which people may change. Links are not
    followed.
    """
    found = []
    for model in models:
        for folder, folders, names in os.walk(root / model):
            within = Path(folder).relative_to(root / model)
            if len(within.parts) == 1 and BUNDLE in folders:
                folders.remove(BUNDLE)
            found += [(model / within / name).as_posix() for name in names if (within / name) != Path(CONFIG)]
    return sorted(found)


def unservable(bundle: Bundle, backend: str) -> str | None:
    """None, or why no machine could serve this bundle with that backend; what is installed here does not matter."""
    if reason := bundle.cannot_reenact:
        return reason
    if backend == "auto":
        return None
    if backend not in backends.names():
        return f"backend must be auto or one of {', '.join(backends.names())}, got {backend[:80]!r}"
    if backend in FLAVOURS and not any(engines.flavour == backend for engines in engine_sets(bundle)):
        return f"it holds no {backend} engines: export it with --target {backend}, or name another backend"
    if backend.startswith("torch") and bundle.weights is None:
        return f"it holds no weights for the backend {backend}: export it without --no-torch-weights"
    return None


def is_repository(path: Path) -> bool:
    """Whether a repository of any version stands at `path`."""
    try:
        _read_marker(path)
    except InputError:
        return False
    return True


def _read_marker(root: Path) -> dict[str, Any]:
    if not (root / MARKER).is_file():
        raise InputError(f"{root} must be a model repository that dagan-rt wrote: it holds no {MARKER}")
    values = read_json(root / MARKER, "marker")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{root / MARKER} is not the marker of a model repository: its format must be {FORMAT!r}")
    return values
