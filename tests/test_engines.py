"""Engines are found when they fit, refused with what differs when not, and their sidecar is believed in nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dagan_rt import engines
from dagan_rt.bundle import PLAIN_NAME, Bundle, digest, write_manifest
from dagan_rt.engines import FLAVOURS, BuiltGraph, EngineSet, find, flavour_named
from dagan_rt.errors import InputError, MissingPackage
from dagan_rt.export.subnetworks import subnetworks
from dagan_rt.networks.config import NetworkConfig

CONFIG = NetworkConfig(variant="dagan", size=64)
RTX = FLAVOURS["tensorrt-rtx"]
SET = EngineSet(
    "tensorrt-rtx", "1.7.1.116", ("8.6", "8.9", "12.0"), "1:1:8", "0123456789ab", False, 1.5,
    {name: BuiltGraph("fp16", "0" * 64, 7, 100) for name in ("source", "driving", "motion", "generator")},
)  # fmt: skip


def write_bundle(root: Path, *sets: EngineSet) -> Bundle:
    """A bundle whose graphs and engines are no such thing: only names and hashes matter here."""
    declared = subnetworks(CONFIG)
    root.mkdir(exist_ok=True)
    for it in declared:
        (root / f"{it.name}.onnx").write_bytes(b"a graph: " + it.name.encode())
    for engine_set in sets:
        add(root, engine_set)
    graphs = {
        it.name: {
            "file": f"{it.name}.onnx",
            "runs": it.runs,
            "inputs": [tensor.to_dict() for tensor in it.inputs],
            "outputs": [tensor.to_dict() for tensor in it.outputs],
            "precision": "fp32",
        }
        for it in declared
    }
    manifest = {"variant": "dagan", "config": CONFIG.to_dict(), "batch": "1:1:8", "tools": {}, "graphs": graphs}
    write_manifest(root, manifest)
    return Bundle.open(root)


def add(root: Path, engine_set: EngineSet) -> EngineSet:
    """Write a set with the graphs' true hashes, as a build does."""
    hashed = {
        name: replace(graph, onnx=digest(root / f"{name}.onnx")["sha256"]) for name, graph in engine_set.graphs.items()
    }
    engine_set = replace(engine_set, graphs=hashed)
    folder = root / "engines" / engine_set.key
    folder.mkdir(parents=True)
    for name in hashed:
        (folder / f"{name}.engine").write_bytes(b"engine")
    (folder / "engine.json").write_text(json.dumps(engine_set.to_dict()))
    return engine_set


def sidecar(bundle: Bundle) -> Path:
    return next(bundle.path.glob("engines/*/engine.json"))


def test_the_key_is_readable_and_a_plain_name() -> None:
    assert re.fullmatch(r"tensorrt-rtx-1\.7\.1\.116-sm86\.89\.120-fp16-b1\.1\.8-[0-9a-f]{8}", SET.key)
    assert PLAIN_NAME.fullmatch(f"engines/{SET.key}/motion.engine")
    mixed = replace(SET, batch="4", graphs=SET.graphs | {"motion": replace(SET.graphs["motion"], precision="fp32")})
    assert "-mixed-b4-" in mixed.key


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "ba9876543210"},
        {"stripped": True},
        {"graphs": SET.graphs | {"motion": BuiltGraph("fp16", "1" * 64, 7, 100)}},
        {"graphs": SET.graphs | {"motion": BuiltGraph("int8", "0" * 64, 7, 100)}},
        {"version": "1.7.2.1"},
        {"compute_capabilities": ("8.6",)},
        {"batch": "1"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_tells_apart_what_differs(change: dict[str, Any]) -> None:
    assert replace(SET, **change).key != SET.key


def test_the_key_does_not_depend_on_what_varies_from_build_to_build() -> None:
    sizes = {name: replace(graph, bytes=graph.bytes + 8) for name, graph in SET.graphs.items()}
    assert replace(SET, seconds=9.0, graphs=dict(reversed(sizes.items()))).key == SET.key


def test_a_set_survives_its_sidecar() -> None:
    assert EngineSet.from_dict(json.loads(json.dumps(SET.to_dict()))) == SET


def test_engines_that_fit_are_found(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, SET)
    found = find(bundle, RTX, "1.7.1.116", "8.9", batch=8)
    assert found.flavour == "tensorrt-rtx" and found.file(tmp_path, "motion").read_bytes() == b"engine"


def test_of_several_the_most_particular_is_taken(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, SET, replace(SET, compute_capabilities=("8.9",)), replace(SET, version="1.6.0.1"))
    assert find(bundle, RTX, "1.7.1.116", "8.9").compute_capabilities == ("8.9",)
    assert find(bundle, RTX, "1.7.1.116", "8.6").compute_capabilities == ("8.6", "8.9", "12.0")
    assert find(bundle, RTX, "1.6.0.1", "8.6").version == "1.6.0.1"


@pytest.mark.parametrize(
    ("wanted", "difference"),
    [
        ({"version": "1.8.0.2"}, "the tensorrt-rtx engines were built by version 1.7.1.116, installed is 1.8.0.2"),
        ({"capability": "7.5"}, "were built for compute capability 8.6, 8.9, 12.0, this GPU has 7.5"),
        ({"capability": None}, "were built for compute capability 8.6, 8.9, 12.0, there is no GPU here"),
        ({"batch": 9}, "were built for a batch of 1:1:8, wanted is 9"),
        ({"flavour": FLAVOURS["tensorrt"]}, "holds no tensorrt engines"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_differs_is_said_with_what_to_run(tmp_path: Path, wanted: dict[str, Any], difference: str) -> None:
    bundle = write_bundle(tmp_path, SET)
    here = {"flavour": RTX, "version": "1.7.1.116", "capability": "8.9", "batch": 1} | wanted
    with pytest.raises(InputError) as caught:
        find(bundle, **here)
    message = str(caught.value)
    assert difference in message and "\n" not in message
    command = f"run python -m dagan_rt.export --rebuild {tmp_path} --target {here['flavour'].name}"
    assert message.endswith(command)


def test_a_graph_changed_after_the_build_is_noticed(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, SET)
    (tmp_path / "motion.onnx").write_bytes(b"another graph")
    write_manifest(tmp_path, bundle.manifest)
    with pytest.raises(InputError, match="the graph motion was changed after the tensorrt-rtx engines were built"):
        find(Bundle.open(tmp_path), RTX, "1.7.1.116", "8.9")


def test_engines_for_some_graphs_only_are_not_enough(tmp_path: Path) -> None:
    graphs = {name: graph for name, graph in SET.graphs.items() if name != "generator"}
    bundle = write_bundle(tmp_path, replace(SET, graphs=graphs))
    with pytest.raises(InputError, match="engines lack one for the graph generator"):
        find(bundle, RTX, "1.7.1.116", "8.9")


def test_an_engine_that_the_manifest_does_not_vouch_for_is_not_used(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, SET)
    files = {name: entry for name, entry in bundle.manifest["files"].items() if not name.endswith("motion.engine")}
    (tmp_path / "manifest.json").write_text(json.dumps(dict(bundle.manifest) | {"files": files}))
    with pytest.raises(InputError, match="engines lack one for the graph motion"):
        find(Bundle.open(tmp_path), RTX, "1.7.1.116", "8.9")


def test_a_changed_engine_is_refused_when_the_bundle_is_opened(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, SET)
    next(tmp_path.glob("engines/*/motion.engine")).write_bytes(b"Engine")
    with pytest.raises(InputError, match="motion.engine must have SHA-256"):
        Bundle.open(bundle.path)


def changed(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda original: original | values


def in_motion(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda it: it | {"graphs": it["graphs"] | {"motion": it["graphs"]["motion"] | values}}


def renamed(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda it: it | {"graphs": {name: it["graphs"]["motion"]}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda it: [it], "must hold an object, got list"),
        (lambda it: {}, "lacks flavour"),
        (changed(flavour="openvino"), "tensorrt or tensorrt-rtx, got 'openvino'"),
        (changed(flavour=["tensorrt"]), "flavour must be str, got list"),
        (changed(surplus=1), "surplus is not a known key"),
        (changed(version="../../.."), "version is not what a build writes, got '../../..'"),
        (changed(version="1/7"), "version is not what a build writes"),
        (changed(version="1" * 40), "version is not what a build writes"),
        (changed(version=1.7), "version must be str, got float"),
        (changed(recipe="../recipe"), "recipe is not"),
        (changed(batch="0"), "batch must be"),
        (changed(batch="1:2"), "batch must be"),
        (changed(batch=1), "batch must be str, got int"),
        (changed(compute_capabilities=[]), "compute_capabilities is not"),
        (changed(compute_capabilities=["8.6/../x"]), "compute_capabilities is not"),
        (changed(compute_capabilities="8.6"), "compute_capabilities must be a list"),
        (changed(compute_capabilities=["8.6"] * 17), "compute_capabilities is not"),
        (changed(seconds=float("nan")), "seconds must be finite"),
        (changed(seconds=-1), "seconds must be finite"),
        (changed(stripped="no"), "stripped must be bool, got str"),
        (changed(graphs=[]), "graphs must be a table"),
        (changed(graphs={}), "graphs is not what a build writes"),
        (renamed("../motion"), "graphs is not what a build writes, got '../motion'"),
        (renamed("a/b"), "graphs is not what a build writes"),
        (renamed("x" * 65), "graphs is not what a build writes"),
        (lambda it: it | {"graphs": {f"g{i}": it["graphs"]["motion"] for i in range(65)}}, "graphs is not"),
        (in_motion(precision="fp4"), "graphs.motion.precision is not"),
        (in_motion(onnx="0" * 63), "graphs.motion.onnx is not"),
        (in_motion(onnx=None), "graphs.motion.onnx must be str"),
        (in_motion(bytes=-1), "graphs.motion.bytes must be finite and not negative"),
        (in_motion(bytes=True), "graphs.motion.bytes must be int, got bool"),
        (in_motion(file="/etc/passwd"), "graphs.motion.file is not a known key"),
    ],
)
def test_a_hostile_sidecar_is_refused_by_name_and_key(tmp_path: Path, change: Callable[..., Any], named: str) -> None:
    bundle = write_bundle(tmp_path, SET)
    path = sidecar(bundle)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    write_manifest(tmp_path, bundle.manifest)
    with pytest.raises(InputError) as caught:
        find(Bundle.open(tmp_path), RTX, "1.7.1.116", "8.9")
    assert named in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "must be JSON, got something else"),
        (b"{" * 100_000, "must be JSON, got something else"),
        (b"[" * 100_000, "must be JSON, got something else"),
        (b"\xff\xfe", "cannot be read"),
        (b" " * ((1 << 20) + 1), "must be at most 1048576 bytes"),
    ],
    ids=["empty", "braces", "deep", "no text", "huge"],
)
def test_a_damaged_sidecar_is_refused_by_name(tmp_path: Path, content: bytes, named: str) -> None:
    bundle = write_bundle(tmp_path, SET)
    path = sidecar(bundle)
    path.write_bytes(content)
    write_manifest(tmp_path, bundle.manifest)
    with pytest.raises(InputError) as caught:
        find(Bundle.open(tmp_path), RTX, "1.7.1.116", "8.9")
    assert named in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value)) < 1000


def test_a_sidecar_cannot_stand_in_for_other_engines(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, SET)
    folder = sidecar(bundle).parent
    folder.rename(folder.with_name(folder.name.replace("sm86", "sm75")))
    write_manifest(tmp_path, bundle.manifest)
    with pytest.raises(InputError, match="must lie in the folder tensorrt-rtx-1.7.1.116-sm86.89.120-fp16"):
        find(Bundle.open(tmp_path), RTX, "1.7.1.116", "7.5")


def test_too_many_sets_are_not_read(tmp_path: Path) -> None:
    sets = [replace(SET, version=f"1.{minor}") for minor in range(engines.MOST_SETS + 1)]
    with pytest.raises(InputError, match="at most 16 sets of engines, got 17"):
        find(write_bundle(tmp_path, *sets), RTX, "1.7.1.116", "8.9")


def test_only_two_flavours_exist() -> None:
    assert flavour_named("tensorrt").package == "tensorrt-cu13"
    with pytest.raises(InputError, match="tensorrt or tensorrt-rtx, got 'rtx'"):
        flavour_named("rtx")


@pytest.mark.parametrize("name", FLAVOURS)
def test_without_the_library_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(MissingPackage, match=f"run pip install {FLAVOURS[name].package}$"):
        FLAVOURS[name].load()


def test_bindings_without_their_libraries_are_told_from_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt_bindings_only.py").write_text("raise ImportError('libnvinfer.so.11:\\n cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    broken = replace(FLAVOURS["tensorrt"], module="tensorrt_bindings_only")
    with pytest.raises(InputError) as caught:
        broken.load()
    assert "cannot be loaded (libnvinfer.so.11: cannot open): run pip install --force-reinstall" in str(caught.value)


@pytest.mark.gpu
def test_the_compute_capability_is_the_one_pytorch_sees() -> None:
    torch = pytest.importorskip("torch")
    assert engines.compute_capability() == "{}.{}".format(*torch.cuda.get_device_capability())


def test_a_library_has_one_logger_that_keeps_errors(capfd: pytest.CaptureFixture[str]) -> None:
    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    library = ModuleType("library")
    library.ILogger = ILogger  # type: ignore[attr-defined]
    library.__spec__ = ModuleSpec("library", None)
    log = engines.logger(library)
    assert engines.logger(library) is log
    assert engines.complaint(library) == "it gave no reason"
    log.log(ILogger.WARNING, "slow")
    log.log(ILogger.ERROR, "Error Code 1: Cuda Runtime\n (In load at /src/a.cpp:25 (cudaError 35: no driver)).")
    log.log(ILogger.ERROR, "and so on")
    assert engines.complaint(library) == "Error Code 1: Cuda Runtime (cudaError 35: no driver))"
    assert engines.complaint(library) == "it gave no reason"
    for _ in range(1000):
        log.log(ILogger.ERROR, "x" * 1000)
    assert len(log.errors) == 100 and len(engines.complaint(library)) == 300
    assert capfd.readouterr() == ("", "")


def test_importing_it_imports_nothing_heavy() -> None:
    program = (
        "import sys, dagan_rt.engines, dagan_rt.backends.tensorrt, dagan_rt.backends.tensorrt_rtx\n"
        "heavy = {'torch', 'onnx', 'tensorrt', 'tensorrt_rtx', 'cupy', 'pycuda', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
