"""The exported directory: manifest, hashes, lookup.

    bundle/
        manifest.json            what this file declares, and the SHA-256 of every other file
        verify.json              what the export measured against PyTorch
        source.onnx  driving.onnx  motion.onnx  generator.onnx
        weights/                 the checkpoint, for the torch backend; may be left out
            model.pth.tar
            depth/encoder.pth  depth/depth.pth
        engines/<key>/           engines of one TensorRT flavour, version and GPU, where they were asked for

A manifest is untrusted input: it names files by plain relative names only, and nothing is read before its size is
known.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.report import REPORT, Report
from dagan_rt.tables import printable

FORMAT = "dagan-rt bundle"
VERSION = 2
MANIFEST = "manifest.json"
PRECISIONS = ("fp32", "fp16", "int8")
GRAPHS = ("source", "driving", "motion", "generator")
WEIGHTS = "weights/model.pth.tar"
DEPTH_WEIGHTS = "weights/depth"

LARGEST_MANIFEST = 1 << 20  # bytes
MOST_FILES = 256
LARGEST_BATCH = 1024
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")  # no "..", no "/x", no "C:\\"


@dataclass(frozen=True)
class Tensor:
    """A named input or output of a graph; a dimension is a size or the name of a dynamic axis."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"

    def to_dict(self) -> dict[str, Any]:
        """Plain strings and lists, for the manifest."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}


@dataclass(frozen=True)
class BatchProfile:
    """How many faces a graph takes at once: from `least` to `most`, tuned for `usual`; fixed where all are equal."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.usual <= self.most <= LARGEST_BATCH:
            raise InputError(
                f"batch must be N or MIN:USUAL:MAX with 1 <= MIN <= USUAL <= MAX <= {LARGEST_BATCH}, got {self}"
            )

    @classmethod
    def parse(cls, text: str) -> BatchProfile:
        """`"4"` is always four; `"1:8:32"` is one to 32, tuned for eight. InputError for anything else."""
        sizes = text.split(":")
        if len(sizes) not in (1, 3) or not all(re.fullmatch(r"[0-9]{1,9}", size) for size in sizes):
            raise InputError(f"batch must be N, as 1, or MIN:USUAL:MAX, as 1:8:32, got {text!r}")
        return cls(*(int(size) for size in (sizes * 3)[:3]))

    @property
    def fixed(self) -> bool:
        """Whether there is one size only."""
        return self.least == self.most

    def __str__(self) -> str:
        return str(self.least) if self.fixed else f"{self.least}:{self.usual}:{self.most}"


@dataclass(frozen=True)
class Graph:
    """What the manifest says of one graph."""

    name: str
    file: Path
    runs: str  # "once a source", "every frame" or "a part, alone"
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    precision: str = "fp32"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, of which every file was checked against the manifest."""

    path: Path
    manifest: Mapping[str, Any] = field(repr=False)
    config: NetworkConfig
    graphs: Mapping[str, Graph] = field(repr=False)
    batch: BatchProfile

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Check the manifest and the SHA-256 of every file it names; raises InputError that says what does not fit."""
        root = Path(path)
        manifest = _read_manifest(root)
        _check_files(root, _mapping(manifest, "files", root))
        return cls.described(root, manifest)

    @classmethod
    def described(cls, root: Path, manifest: Mapping[str, Any]) -> Bundle:
        """The bundle in the folder `root` that `manifest` describes; its files are not looked at."""
        try:
            config = NetworkConfig.from_dict(_mapping(manifest, "config", root))
            batch = BatchProfile.parse(str(manifest.get("batch")))
        except InputError as error:
            raise InputError(f"{root / MANIFEST}: {error}") from None
        if manifest.get("variant") != config.variant:
            raise InputError(
                f"{root / MANIFEST}: variant must be that of the config, {config.variant!r}, "
                f"got {manifest.get('variant')!r}"
            )
        return cls(root, manifest, config, _read_graphs(root, manifest), batch)

    @property
    def report(self) -> Report:
        """What the export measured."""
        if REPORT not in self.manifest["files"]:
            raise InputError(f"bundle {self.path} holds no {REPORT}: export it again")
        return Report.read(self.path / REPORT)

    @property
    def cannot_reenact(self) -> str | None:
        """None, or why this bundle has nothing for a `Reenactor`."""
        missing = [name for name in GRAPHS if name not in self.graphs]
        if missing:
            return f"it was exported with --only and lacks the graph {missing[0]}"
        if self.batch.least > 1:
            return f"its graphs take batches of {self.batch}, and a session is one face: export with --batch 1"
        return None

    def graph(self, name: str) -> Path:
        """The ONNX file of one graph."""
        if name not in self.graphs:
            raise InputError(f"bundle {self.path} has no graph {name!r}; it has {', '.join(self.graphs)}")
        return self.graphs[name].file

    @property
    def weights(self) -> Path | None:
        """The checkpoint in the published layout, or None if the bundle was exported without it."""
        return self.path / WEIGHTS if WEIGHTS in self.manifest["files"] else None

    @property
    def depth_weights(self) -> Path | None:
        """The folder of the face depth network's two files, or None."""
        listed = all(f"{DEPTH_WEIGHTS}/{name}" in self.manifest["files"] for name in ("encoder.pth", "depth.pth"))
        return self.path / DEPTH_WEIGHTS if listed else None

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the digests of all weights' files, the same in whatever form they were exported; "" without."""
        files = self.manifest["files"]
        digests = [files[name]["sha256"] for name in sorted(files) if Path(name).parts[0] == Path(WEIGHTS).parts[0]]
        return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""


def describe(bundle: Bundle) -> str:
    """A table of the bundle's files, graphs and measured errors, for a person to read."""
    config, tools = bundle.config, _mapping(bundle.manifest, "tools", bundle.path)
    lines = [
        f"bundle     {bundle.path}",
        f"variant    {config.variant}, {config.size} × {config.size} pixels, {config.num_keypoints} key points",
        f"batch      {bundle.batch}",
        f"made with  {', '.join(f'{name} {version}' for name, version in tools.items())}",
        "",
        f"{'file':<28} {'size':>10}  SHA-256",
    ]
    for name, entry in bundle.manifest["files"].items():
        lines.append(f"{name:<28} {entry['bytes'] / 1e6:>7.1f} MB  {entry['sha256'][:16]}…")
    for graph in bundle.graphs.values():
        lines += ["", f"{graph.name} ({graph.runs}, {graph.precision})"]
        lines += [f"    in   {tensor.name:<18} {_shape(tensor)}" for tensor in graph.inputs]
        lines += [f"    out  {tensor.name:<18} {_shape(tensor)}" for tensor in graph.outputs]
    lines += ["", *bundle.report.table().split("\n")]
    # Names out of a foreign manifest must not steer the terminal.
    return "\n".join(map(printable, lines))


def digest(path: Path) -> dict[str, Any]:
    """The manifest's entry for one file: its size in bytes and its SHA-256."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            sha256.update(piece)
    return {"bytes": path.stat().st_size, "sha256": sha256.hexdigest()}


def file_names(root: Path) -> list[str]:
    """The files now in `root`, the manifest aside, by their relative names."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return [name for name in names if name != MANIFEST]


def write_manifest(
    root: Path, manifest: Mapping[str, Any], unchanged: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write manifest.json over the files now in `root` and return it; format, version and files are filled in here.

    unchanged: entries of files that need not be read again.
    """
    known = unchanged or {}
    files = {name: known.get(name) or digest(root / name) for name in file_names(root)}
    whole = {"format": FORMAT, "version": VERSION, **manifest, "files": files}
    (root / MANIFEST).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole


def is_bundle(path: Path) -> bool:
    """Whether a bundle of any version stands at `path`."""
    try:
        _read_manifest(path, any_version=True)
    except InputError:
        return False
    return True


def _read_manifest(root: Path, any_version: bool = False) -> dict[str, Any]:
    path = root / MANIFEST
    if not root.is_dir():
        raise InputError(f"bundle {root} must be a folder written by python -m dagan_rt.export, got {_kind(root)}")
    if not path.is_file():
        raise InputError(f"bundle {root} has no {MANIFEST}: it is not a bundle, or its export was cut off")
    size = path.stat().st_size
    if size > LARGEST_MANIFEST:
        raise InputError(f"{path} must be at most {LARGEST_MANIFEST} bytes, got {size}")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON, got something else ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a bundle: its format must be {FORMAT!r}")
    if manifest.get("version") != VERSION and not any_version:
        raise InputError(
            f"{path} has format version {manifest.get('version')!r}, this dagan-rt reads {VERSION}: export again"
        )
    return manifest


def _check_files(root: Path, files: Mapping[str, Any]) -> None:
    if len(files) > MOST_FILES:
        raise InputError(f"{root / MANIFEST} must name at most {MOST_FILES} files, got {len(files)}")
    paths = {name: _inside(root, name) for name in files}
    for name, path in paths.items():  # all sizes before the first hash: they cost nothing
        entry = files[name]
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("sha256")) is not str:
            raise InputError(f"{root / MANIFEST}: the entry of file {name!r} must hold 'bytes' and 'sha256'")
        if not path.is_file():
            raise InputError(f"{path} is named in the manifest, got {_kind(path)}: copy the whole bundle again")
        if path.stat().st_size != entry["bytes"]:
            raise InputError(
                f"{path} must be {entry['bytes']} bytes, got {path.stat().st_size}: "
                "it is cut off or was changed after the export"
            )
    for name, path in paths.items():
        found = digest(path)["sha256"]
        if found != files[name]["sha256"]:
            raise InputError(
                f"{path} must have SHA-256 {files[name]['sha256'][:64]}, got {found}: it was changed after the export"
            )


def _inside(root: Path, name: str) -> Path:
    """The file `name` of the bundle, refused unless it lies inside, symbolic links followed."""
    if not PLAIN_NAME.fullmatch(name):
        raise InputError(f"{root / MANIFEST}: a file must have a plain relative name inside the bundle, got {name!r}")
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link that points to itself
        inside = False
    if not inside:
        raise InputError(f"{path} must lie inside the bundle, and links to a place outside it")
    return path


def _read_graphs(root: Path, manifest: Mapping[str, Any]) -> dict[str, Graph]:
    declared = _mapping(manifest, "graphs", root)
    if not declared:
        raise InputError(f"{root / MANIFEST} must declare at least one graph")
    graphs = {}
    for name in declared:
        entry = _mapping(declared, name, root)
        if str(entry.get("file")) not in manifest["files"]:
            raise InputError(
                f"{root / MANIFEST}: graph {name!r} must name one of the bundle's files, got {entry.get('file')!r}"
            )
        inputs, outputs = (_read_tensors(entry.get(side), f"{root / MANIFEST}: graph {name!r}: {side}")
                           for side in ("inputs", "outputs"))  # fmt: skip
        runs, precision = str(entry.get("runs", "")), str(entry.get("precision", ""))
        if precision not in PRECISIONS:
            raise InputError(f"{root / MANIFEST}: graph {name!r} must be {' or '.join(PRECISIONS)}, got {precision!r}")
        graphs[name] = Graph(name, root / entry["file"], runs, inputs, outputs, precision)
    return graphs


def _read_tensors(entries: Any, where: str) -> tuple[Tensor, ...]:
    try:
        tensors = tuple(Tensor(str(entry["name"]), tuple(entry["shape"]), str(entry["dtype"])) for entry in entries)
    except (KeyError, TypeError):
        raise InputError(f"{where} must be a list of name, shape and dtype") from None
    if not all(isinstance(size, (int, str)) for tensor in tensors for size in tensor.shape):
        raise InputError(f"{where} must have shapes of numbers and axis names")
    return tensors


def _mapping(parent: Mapping[str, Any], name: str, root: Path) -> dict[str, Any]:
    value = parent.get(name)
    if not isinstance(value, dict):
        raise InputError(f"{root / MANIFEST}: {name!r} must be an object, got {type(value).__name__}")
    return value


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return "a file" if path.is_file() else "nothing there" if not os.path.lexists(path) else "no ordinary file"


def _shape(tensor: Tensor) -> str:
    return f"{tensor.dtype} [{', '.join(str(size) for size in tensor.shape)}]"
