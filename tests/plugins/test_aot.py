"""Plugins with kernels compiled ahead of time: what TensorRT would store in an engine, driven through NVIDIA's own
Python sources and launched on the emulated GPU."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt import plugins
from dagan_rt.errors import InputError
from dagan_rt.kernels._arrays import view
from dagan_rt.kernels._devices import Launch, Unit
from dagan_rt.plugins import aot
from dagan_rt.plugins.ops import OPS

from ..export.plugin_twins import TWINS
from . import imitated_tensorrt

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

#: Shapes of the inputs with a batch of None, by operator; sizes that no tile divides.
SHAPES: dict[str, list[tuple[Any, ...]]] = {
    "FlowWarp": [(None, 19, 11, 9), (None, 6, 7, 2), (None, 1, 6, 7)],
    "CrossAttention": [(None, 20, 5, 13), (None, 20, 6, 8), (None, 136, 6, 8), (None, 136, 5, 13), (1,)],
    "SparseMotion": [(None, 3, 11, 18), *[(None, 4, 2), (None, 4, 2, 2)] * 2],
    "DenseFlow": [(None, 5, 11, 7), (None, 1, 11, 7), *[(None, 4, 2), (None, 4, 2, 2)] * 2],
}


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The imitated `tensorrt`, with the plugins registered."""
    pytest.importorskip("tensorrt_rtx")
    if imitated_tensorrt.sources() is None:
        pytest.skip("the Python sources of tensorrt.plugin are not here: run pip install tensorrt-cu13-bindings")
    monkeypatch.setattr(plugins, "_registered", set())
    monkeypatch.setattr(aot, "compute_capability", lambda: "9.0")
    with imitated_tensorrt.installed() as library:
        plugins.register(library, "aot")
        yield library


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    """The units that were compiled to PTX."""
    units: list[Unit] = []
    compile_ = aot.ptx
    monkeypatch.setattr(aot, "ptx", lambda unit, target: compile_(units.append(unit) or unit, target))
    return units


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> Iterator[Any]:
    """An emulated GPU that CPU tensors lie on."""
    import emulated

    emulated.FOLDER = request.config.cache.mkdir("emulation")
    with emulated.emulation(emulated.EmulatedDevice()) as device:
        yield device


def _asked(trt: Any, name: str, kind: str, attributes: dict[str, int]) -> SimpleNamespace:
    """What TensorRT learns of one node as it builds an engine, asked in its order."""
    op, builder = OPS[name], imitated_tensorrt.Builder()
    fields = [trt.PluginField(key, np.array([it]), trt.PluginFieldType.INT64) for key, it in attributes.items()]
    creator = trt.get_plugin_registry().get_creator(name, "1", "dagan_rt")
    ahead = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(name, "dagan_rt", fields, trt.TensorRTPhase.BUILD, ahead)
    types = [getattr(trt.DataType, kind if it == "T" else "FLOAT") for it in op.inputs.values()]
    types += plugin.get_output_data_types(types, [len(shape) for shape in SHAPES[name]])
    sizes = [
        [builder.dynamic() if size is None else builder.constant(size) for size in shape] for shape in SHAPES[name]
    ]
    outputs = plugin.get_output_shapes(sizes, [], builder)
    known = [[size.compute(None) if size.is_constant() else None for size in shape] for shape in sizes + outputs]
    tensors = [imitated_tensorrt.Descriptor(it, tuple(shape)) for it, shape in zip(types, known, strict=True)]
    given, made = tensors[: len(sizes)], tensors[len(sizes) :]
    assert [it.type for it in plugin.get_supported_format_combinations(tensors, len(given))] == types
    plugin.configure_plugin(given, made)
    assert plugin.get_valid_tactics() == []
    plugin.set_tactic(0)
    launch, arguments = SimpleNamespace(), imitated_tensorrt.Arguments()
    plugin.get_launch_params(sizes, tensors, len(given), launch, arguments, builder)
    kernel, ptx = plugin.get_kernel([it.desc for it in given], [it.desc for it in made])
    passed = [arguments[i] for i in range(arguments.nbSymExprs)]
    assert {it.type for it in passed} == {trt.PluginArgType.INT}
    assert {it.dtype for it in passed} == {trt.PluginArgDataType.INT32}
    return SimpleNamespace(
        kernel=kernel, ptx=ptx.decode(), launch=launch, sizes=passed, shapes=outputs, types=types[len(sizes) :]
    )


def _inputs(name: str, batch: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = []
    for (key, kind), shape in zip(OPS[name].inputs.items(), SHAPES[name], strict=True):
        shape = tuple(batch if size is None else size for size in shape)
        values = torch.randn(shape, generator=generator) * (0.3 if key.endswith("value") or key == "flow" else 1)
        if key.endswith("jacobian"):
            values = torch.eye(2) + 0.1 * values
        tensors.append(values.to(dtype if kind == "T" else torch.float32).contiguous())
    return tensors


@pytest.mark.parametrize("kind", ["FLOAT", "HALF"])
@pytest.mark.parametrize("name", list(OPS))
def test_what_tensorrt_would_launch_computes_the_operator(
    name: str, kind: str, trt: Any, compiled: list[Unit], emulated: Any
) -> None:
    attributes = {"align_corners": 1} if name == "FlowWarp" else {}
    asked = _asked(trt, name, kind, attributes)
    dtype = torch.float16 if kind == "HALF" else torch.float32
    assert [it.name for it in asked.types] == [kind if it == "T" else "FLOAT" for it in OPS[name].outputs.values()]

    # The kernel that is stored takes what TensorRT passes: the inputs, 32-bit sizes, the outputs.
    entries = re.findall(r"\.entry (\w+)\((.*?)\)", asked.ptx, re.DOTALL)
    assert [entry for entry, _ in entries] == [asked.kernel]
    passed = "u64 " * len(OPS[name].inputs) + "u32 " * len(asked.sizes) + "u64 " * len(OPS[name].outputs)
    assert re.findall(r"\.param \.(\w+)", entries[0][1]) == passed.split()
    assert asked.launch.shared_mem.expr.compute(None) <= 48 << 10

    batch = 2

    def now(size: Any) -> int:
        return int(getattr(size, "expr", size).compute(batch))

    inputs = _inputs(name, batch, dtype)
    expected = TWINS[name](*inputs, **attributes)
    expected = expected if isinstance(expected, tuple) else (expected,)
    outputs = [torch.full([now(size) for size in shape], torch.nan, dtype=it.dtype)
               for shape, it in zip(asked.shapes, expected, strict=True)]  # fmt: skip
    arrays = [view(tensor, "tensor") for tensor in (*inputs, *outputs)]
    given, made = arrays[: len(inputs)], arrays[len(inputs) :]
    launch, sizes = asked.launch, [np.int32(now(size)) for size in asked.sizes]
    grid = tuple(now(getattr(launch, f"grid_{axis}")) for axis in "xyz")
    block = tuple(now(getattr(launch, f"block_{axis}")) for axis in "xyz")
    emulated.launch(Launch(compiled[-1], asked.kernel, grid, block, (*given, *sizes, *made), now(launch.shared_mem)), 0)
    for found, wanted in zip(outputs, expected, strict=True):
        error = 2e-3 if wanted.dtype == torch.float16 else 2e-5
        torch.testing.assert_close(found, wanted, atol=error * float(wanted.abs().max()), rtol=0)


def test_without_tensorrt_or_a_gpu_it_is_said(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "compute_capability", lambda: None)
    with pytest.raises(InputError, match="compiled for the GPU at hand, and there is none here"):
        _asked(trt, "DenseFlow", "FLOAT", {})
    with pytest.raises(InputError, match="tensorrt holds aot plugins in this process: use another process for python"):
        plugins.register(trt, "python")
    plugins.register(trt, "aot")  # again, which does nothing


def test_heads_beyond_shared_memory_go_without_tensor_cores() -> None:
    def call(D: int, bits: int) -> aot.Call:
        shapes = [(1, D, 8, 8), (1, D, 8, 8), (1, 256, 8, 8), (1, 256, 8, 8), (1,)]
        return aot.CALLS["CrossAttention"](lambda a, b: -(-a // b), bits, shapes)

    assert [call(D, 16).unit.source for D in (1, 32, 33, 64, 65, 256)] == ["forward_mma"] * 4 + ["forward_simt"] * 2
    assert call(32, 32).unit.source == "forward_simt"
    assert all(call(D, bits).shared <= 48 << 10 for D in range(1, 257) for bits in (16, 32))
    # The queries of a block, and two tiles of keys with their values, in half precision.
    assert call(32, 16).shared == 2 * (32 * 64 + 2 * (32 * 64 + 128 * 64))
    assert call(64, 16).shared == 2 * (64 * 64 + 2 * (64 * 32 + 128 * 32))
