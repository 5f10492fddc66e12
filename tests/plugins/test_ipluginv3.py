"""The plugins in Python: engines are built from graphs cut at the kernels; a launch reaches the kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from dagan_rt import kernels, plugins
from dagan_rt.errors import InputError
from dagan_rt.export import precision
from dagan_rt.plugins.ipluginv3 import creators
from dagan_rt.plugins.ops import DOMAIN, OPS

trt = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the loader finds the library under the name it opens itself by."""
    libraries = pytest.importorskip("tensorrt_rtx_libs")
    folder = tmp_path_factory.mktemp("linked")
    (folder / "libtensorrt_rtx.so").symlink_to(Path(libraries.__file__).parent / "libtensorrt_rtx.so.1")
    return {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}


def test_engines_are_built_with_the_plugins(traced: Any, linked: dict[str, str], tmp_path: Path) -> None:
    cases = {}
    for variant, batch, lowered in (
        ("dagan", "1:1:8", "fp16"),
        ("dagan", "2", "fp16"),
        ("dagan_spade", "1:1:8", "fp16"),
        ("fomm", "1", "fp32"),
    ):
        for name in ("motion", "generator"):
            subnetwork, model = traced(variant, name, batch)
            graph = precision.lower(model, lowered, subnetwork.trunks)
            path = tmp_path / f"{variant}-{batch.replace(':', '.')}-{lowered}-{subnetwork.name}.onnx"
            onnx.save(graph, path)
            cases[str(path)] = (-1 if ":" in batch else int(batch), lowered, subnetwork.name)
    script = Path(__file__).with_name("build_engines.py")
    run = subprocess.run([sys.executable, script, *cases], env=linked, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for path, (batch, lowered, graph) in cases.items():
        built = found[path]
        assert built.get("bytes", 0) > 100_000, (path, built)
        assert len(built["plugins"]) == sum(built["nodes"].values()) >= 1
        made = {name.rpartition("/")[2]: outputs for name, outputs in built["plugins"].items() if "Mul_1" not in name}
        if graph == "motion":
            points = 11 if "fomm" in path else 16
            assert made["SparseMotion"] == [[[batch, 4 * points, 16, 16], "FLOAT"]]
            assert made["DenseFlow"] == [[[batch, 16, 16, 2], "FLOAT"], [[batch, 1, 16, 16], "FLOAT"]]
        else:
            assert made["FlowWarp"] == [[[batch, 16, 16, 16], "FLOAT"]]
            kind = "HALF" if lowered == "fp16" else "FLOAT"
            assert made.get("CrossAttention", [[[batch, 16, 16, 16], kind]]) == [[[batch, 16, 16, 16], kind]]
            assert ("CrossAttention" in made) == ("dagan" in path.rpartition("/")[2])


def test_where_the_library_cannot_open_itself_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *rest: Any) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(plugins.ctypes, "CDLL", refuse)
    monkeypatch.setattr(plugins.sys, "platform", "linux")
    with pytest.raises(InputError, match=r"libtensorrt_rtx\.so where the loader finds it.*LD_LIBRARY_PATH"):
        plugins.register(trt, "python")
    with pytest.raises(InputError, match="need tensorrt 10.9 or newer, got tensorrt_rtx"):
        plugins.register(trt, "aot")
    with pytest.raises(InputError, match="plugins must be one of python, aot, got 'jit'"):
        plugins.register(trt, "jit")


@pytest.fixture
def plugin() -> Any:
    """`plugin(name, **attributes)`: as TensorRT makes it of a node."""

    def make(name: str, **attributes: int) -> Any:
        creator = next(it for it in creators(trt) if it.name == name)
        fields = [
            trt.PluginField(key, np.array([value], np.int32), trt.PluginFieldType.INT32)
            for key, value in attributes.items()
        ]
        return creator.create_plugin("/a/node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)

    return make


def _tensor(kind: str, *shape: int, layout: str = "LINEAR") -> Any:
    """A descriptor as far as plugins look at it; inside of another where TensorRT asks for combinations."""
    desc = SimpleNamespace(type=getattr(trt.DataType, kind), format=getattr(trt.TensorFormat, layout), dims=shape)
    return SimpleNamespace(desc=desc, **vars(desc))


def test_creators_have_the_names_of_the_nodes() -> None:
    made = creators(trt)
    assert creators(trt) is made
    assert [(it.name, it.plugin_namespace, it.plugin_version) for it in made] == [(name, DOMAIN, "1") for name in OPS]
    assert {it.name: [field.name for field in it.field_names] for it in made}["FlowWarp"] == ["align_corners"]


def test_attributes_survive_serialization(plugin: Any) -> None:
    warp = plugin("FlowWarp", align_corners=1)
    creator = next(it for it in creators(trt) if it.name == "FlowWarp")
    again = creator.create_plugin("/a/node", warp.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    for it in (warp, again, again.clone(), again.attach_to_context(None)):
        assert it.attributes == {"align_corners": 1}
        assert (it.plugin_name, it.plugin_namespace, it.plugin_version) == ("FlowWarp", DOMAIN, "1")
        assert it.num_outputs == 1
    assert plugin("FlowWarp").attributes == {"align_corners": 0}
    assert plugin("DenseFlow").num_outputs == 2


@pytest.mark.parametrize(
    ("kinds", "layouts", "fits"),
    [
        ("FLOAT FLOAT FLOAT FLOAT", "", "1111"),
        ("HALF FLOAT FLOAT HALF", "", "1111"),
        ("HALF FLOAT FLOAT FLOAT", "", "1110"),
        ("HALF HALF FLOAT HALF", "", "1011"),
        ("INT8 FLOAT FLOAT INT8", "", "0110"),
        ("BF16 FLOAT FLOAT BF16", "", "0110"),
        ("HALF FLOAT FLOAT HALF", "CHW2 LINEAR LINEAR CHW2", "0110"),
    ],
)
def test_types_and_formats(kinds: str, layouts: str, fits: str, plugin: Any) -> None:
    formats = layouts.split() or ["LINEAR"] * 4
    tensors = [_tensor(kind, 1, 4, 8, 8, layout=it) for kind, it in zip(kinds.split(), formats, strict=True)]
    warp = plugin("FlowWarp")
    assert "".join(str(int(warp.supports_format_combination(i, tensors, 3))) for i in range(4)) == fits


def test_output_types_follow_the_operator(plugin: Any) -> None:
    FLOAT, HALF = trt.DataType.FLOAT, trt.DataType.HALF
    assert plugin("FlowWarp").get_output_data_types([HALF, FLOAT, FLOAT]) == [HALF]
    assert plugin("DenseFlow").get_output_data_types([HALF, HALF, FLOAT, FLOAT, FLOAT, FLOAT]) == [FLOAT, FLOAT]
    assert plugin("CrossAttention").get_output_data_types([HALF] * 4 + [FLOAT]) == [HALF]


def test_a_launch_goes_to_the_kernel_with_tensorrts_memory(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for name in ("flow_warp", "dense_flow"):
        monkeypatch.setattr(
            kernels, name, lambda *inputs, name=name, **how: calls.append((name, inputs, how)), raising=False
        )
    shapes = [(2, 4, 8, 8), (2, 4, 4, 2), (2, 1, 4, 4)]
    described = [_tensor(kind, *shape) for kind, shape in zip(("HALF", "FLOAT", "FLOAT"), shapes, strict=True)]
    warp = plugin("FlowWarp", align_corners=1)
    warp.enqueue(described, [_tensor("HALF", 2, 4, 8, 8)], [256, 512, 768], [1024], 0, 77)
    ((name, inputs, how),) = calls
    assert name == "flow_warp"
    assert [it.__cuda_array_interface__ for it in inputs] == [
        {"data": (pointer, False), "shape": shape, "typestr": kind, "version": 3}
        for pointer, shape, kind in zip((256, 512, 768), shapes, ("<f2", "<f4", "<f4"), strict=True)
    ]
    assert (how["align_corners"], how["stream"]) == (True, 77)
    assert how["out"].__cuda_array_interface__["data"] == (1024, False)

    points = [(1, 3, 2), (1, 3, 2, 2)] * 2
    described = [_tensor("FLOAT", *shape) for shape in ((1, 4, 5, 5), (1, 1, 5, 5), *points)]
    outputs = [_tensor("FLOAT", 1, 5, 5, 2), _tensor("FLOAT", 1, 1, 5, 5)]
    plugin("DenseFlow").enqueue(described, outputs, range(6), [100, 200], 0, 0)
    name, inputs, how = calls[1]
    assert (name, len(inputs), [it.pointer for it in how["out"]]) == ("dense_flow", 6, [100, 200])
