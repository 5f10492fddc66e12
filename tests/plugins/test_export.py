"""Bundles whose engines hold the plugins: exported, rebuilt, described, and refused where they cannot be loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dagan_rt import plugins
from dagan_rt.backends import tensorrt as backend
from dagan_rt.bundle import Bundle
from dagan_rt.engines import FLAVOURS, EngineSet, engine_sets
from dagan_rt.errors import InputError, require
from dagan_rt.export import tensorrt
from dagan_rt.kernels import _build, _devices
from dagan_rt.kernels._devices import Unit

from .test_ipluginv3 import linked  # noqa: F401

pytest.importorskip("tensorrt_rtx")


def _export(options: list[Any], env: dict[str, str]) -> str:
    command = [sys.executable, "-m", "dagan_rt.export", *map(str, options)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_engines_are_rebuilt_with_plugins_and_keep_them(
    tiny_bundle: Path,
    linked: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    plain = {graph: (bundle / f"{graph}.onnx").read_bytes() for graph in ("motion", "generator")}
    _export(["--rebuild", bundle, "--target", "tensorrt-rtx", "--plugins", "python"], linked)
    (engines,) = engine_sets(Bundle.open(bundle))
    assert engines.plugins == "python"
    for graph in ("motion", "generator"):
        assert (bundle / f"{graph}.onnx").read_bytes() == plain[graph]  # runs anywhere, as before
        assert b"dagan_rt" in engines.file(bundle, graph).read_bytes()
    assert b"dagan_rt" not in engines.file(bundle, "driving").read_bytes()
    _export(["--rebuild", bundle, "--compute-capability", "8.9"], linked)
    assert {it.plugins for it in engine_sets(Bundle.open(bundle))} == {"python"}


def test_plugins_have_a_key_of_their_own() -> None:
    common = ("tensorrt-rtx", "1.7.1", ("8.9",), "1", "0" * 8, False, 1.0, {})
    with pytest.raises(InputError, match="graphs is not what"):
        EngineSet(*common)
    graphs = {"motion": {"precision": "fp16", "onnx": "0" * 64, "bytes": 1, "layers": 1}}
    values = dict(zip(EngineSet.__dataclass_fields__, (*common[:2], ["8.9"], *common[3:7], graphs), strict=False))
    sets = [EngineSet.from_dict(values | more) for more in ({}, {"plugins": "python"}, {"plugins": "aot"})]
    assert [it.key.replace(sets[0].key[-8:], "…") for it in sets] == [
        f"tensorrt-rtx-1.7.1-sm89-fp16-{plugins}b1-…" for plugins in ("", "plugins.python-", "plugins.aot-")
    ]
    assert sets[1] == EngineSet.from_dict(sets[1].to_dict())
    with pytest.raises(InputError, match="plugins is not what a build writes, got 'mine'"):
        EngineSet.from_dict(values | {"plugins": "mine"})


def test_stripped_engines_have_no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "compute_capability", lambda: "8.9")
    with pytest.raises(InputError, match="with plugins cannot be stripped: weights are filled in from graphs without"):
        tensorrt.check("tensorrt-rtx", ("8.9",), stripped=True, plugins="python")


def test_loading_registers_the_plugins_first(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they need and is missing is said before the library is given an engine that it cannot read."""

    class Found:
        plugins = "python"

    def refuse(library: Any, kind: str) -> None:
        raise InputError(f"{library.__name__} needs the {kind} plugins")

    monkeypatch.setattr(backend, "_find", lambda *arguments: Found())
    monkeypatch.setattr(
        backend.TensorRTBackend, "_load", lambda *arguments: pytest.fail("the engines were being loaded")
    )
    monkeypatch.setattr(plugins, "register", refuse)
    with pytest.raises(InputError, match="tensorrt_rtx needs the python plugins"):
        backend.open(Bundle.open(tiny_bundle), flavour=FLAVOURS["tensorrt-rtx"])


def test_engines_whose_kernels_cannot_run_say_what_to_install(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found:
        plugins = "python"

    monkeypatch.setattr(backend, "_find", lambda *arguments: Found())
    monkeypatch.setattr(backend.engines, "compute_capability", lambda: "8.9")
    monkeypatch.setattr(_devices, "missing", lambda: None)
    monkeypatch.setattr(_build, "units", lambda: (Unit("flow_warp", "flow_warp", (("NOBODY_BUILT_THIS", 1),)),))
    monkeypatch.setattr(
        _build, "_nvrtc", lambda: require("no_such_compiler", extra="cuda", why="compiling the kernels")
    )
    words = "the tensorrt-rtx engines need the kernels of dagan-rt: compiling the kernels needs the package no_such"
    reason = backend.missing(Bundle.open(tiny_bundle), FLAVOURS["tensorrt-rtx"])
    assert reason and reason.startswith(words) and reason.endswith("run pip install 'dagan-rt[cuda]'")
    Found.plugins = "aot"  # holds its kernels, but images are converted by others
    assert backend.missing(Bundle.open(tiny_bundle), FLAVOURS["tensorrt-rtx"]) == reason
