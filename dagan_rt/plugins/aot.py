"""The operators as quick-deployable plugins with kernels compiled ahead of time: EXPERIMENTAL.

TensorRT from 10.9 on takes a kernel as PTX, with its launch as expressions of the tensors' sizes, and stores both in
the engine, which then runs anywhere that TensorRT does: in Triton and in C++ programs, with no Python. Such a plugin is
one launch with no memory besides its tensors, so that these kernels do without what the functions of `dagan_rt.kernels`
choose among by size: an attention of one face is slower here.

NVIDIA's Python sources of this interface are what the tests drive, with their C++ part imitated and the kernels
emulated. No engine built with it has been run yet.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dagan_rt.engines import compute_capability
from dagan_rt.errors import InputError
from dagan_rt.kernels._devices import Unit
from dagan_rt.plugins.ops import ANY, DOMAIN, OPS, Op, Shape

CHANNELS = 128  # of a block of attention: with more, one face would leave a GPU idle
Divide = Callable[[Any, int], Any]  # rounding up


@dataclass(frozen=True)
class Call:
    """One launch, in numbers or in expressions of sizes that are known when it happens."""

    unit: Unit
    grid: tuple[Any, ...]
    threads: int
    shared: int  # bytes of dynamic shared memory, at most 48 KiB: more would have to be asked for
    sizes: tuple[Any, ...]  # the int32 arguments between the inputs and the outputs


def register_all() -> None:
    """Register all plugins with `tensorrt`, once a process."""
    trtp = importlib.import_module("tensorrt.plugin")
    for op in OPS.values():
        name = f"{DOMAIN}::{op.name}"
        trtp.register(name)(_description(trtp, op))
        trtp.aot_impl(name)(_implementation(trtp, op))


def _description(trtp: Any, op: Op) -> Callable[..., Any]:
    """The function that tells TensorRT shapes and types of the outputs."""
    trt = importlib.import_module("tensorrt")

    def describe(*inputs: Any, **attributes: int) -> Any:
        leads = {kind: tensor.dtype for kind, tensor in zip(op.inputs.values(), inputs, strict=True)}
        types = [leads[ANY] if kind == ANY else trt.DataType.FLOAT for kind in op.outputs.values()]
        shapes = op.shapes(*[list(tensor.shape_expr) for tensor in inputs])
        described = [trtp.from_shape_expr(tuple(it), dtype) for it, dtype in zip(shapes, types, strict=True)]
        return described[0] if len(described) == 1 else tuple(described)

    # TensorRT reads the number of tensors, and names and types of the attributes, from the signature.
    one = trtp.TensorDesc
    outputs = one if len(op.outputs) == 1 else tuple[(one,) * len(op.outputs)]  # type: ignore[misc]
    tensors = [(name, one) for name in op.inputs] + [(name, int) for name in op.attributes]
    describe.__signature__ = _signature(tensors, outputs)  # type: ignore[attr-defined]
    return describe


def _implementation(trtp: Any, op: Op) -> Callable[..., Any]:
    """The function that gives TensorRT the kernel and its launch."""

    def implement(*arguments: Any) -> Any:
        count = len(op.inputs)
        tensors, attributes = arguments[:count], arguments[count:-2]  # the outputs and the tactic are last
        half = tensors[list(op.inputs.values()).index(ANY)].dtype.name == "HALF"
        call = CALLS[op.name](trtp.cdiv, 16 if half else 32, [list(it.shape_expr) for it in tensors], *attributes)
        launch = trtp.KernelLaunchParams()
        for axis, blocks in zip("xyz", call.grid, strict=False):
            setattr(launch, f"grid_{axis}", blocks)
        launch.block_x, launch.shared_mem = call.threads, call.shared
        sizes = trtp.SymIntExprs.from_tuple([trtp.SymInt32(size) for size in call.sizes])
        name = f"{call.unit.op}_plugin_{'f16' if half else 'f32'}"
        return name, ptx(call.unit, _architecture()), launch, sizes

    arguments = [(name, trtp.TensorDesc) for name in op.inputs] + [(name, int) for name in op.attributes]
    arguments += [("outputs", inspect.Parameter.empty), ("tactic", int)]
    result = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    implement.__signature__ = _signature(arguments, result)  # type: ignore[attr-defined]
    return implement


def _signature(parameters: Sequence[tuple[str, Any]], result: Any) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters]
    return inspect.Signature(listed, return_annotation=result)


@cache
def ptx(unit: Unit, architecture: str) -> str:
    """A unit as PTX for an architecture such as compute_89."""
    from dagan_rt.kernels import _build

    return _build.compile(unit, architecture).ptx


def _architecture() -> str:
    """That of the GPU the engine is built on, and runs on."""
    capability = compute_capability()
    if capability is None:
        raise InputError("plugins of the kind aot are compiled for the GPU at hand, and there is none here")
    return f"compute_{capability.replace('.', '')}"


# ---------------------------------------------------------------------------------------------------------------------
# The launches, as kernels/<op>/plugin.cuh says


def _flow_warp(divide: Divide, bits: int, shapes: Sequence[Shape], align_corners: int) -> Call:
    (B, C, H, W), (_, h, w, _), _ = shapes
    grid = divide(H * W, 128), divide(C, 16), B
    unit = Unit("flow_warp", "flow_warp", (("PLUGIN", bits),))
    return Call(unit, grid, 128, 0, (C, H, W, h, w, align_corners))


def _cross_attention(divide: Divide, bits: int, shapes: Sequence[Shape]) -> Call:
    (B, D, h, w), (_, _, m, n), (_, C, _, _), _, _ = shapes
    N, M = h * w, m * n
    head = _number(D)
    # In float32, or where a head and its keys would not fit into 48 KiB: without tensor cores, 32 features at a time.
    if bits == 16 and head <= 64:
        source, queries, threads, keys = "forward_mma", 64, 128, 64 if head <= 32 else 32
        head = -(-head // 16) * 16
        defines = {"KEYS": keys, "TENSOR_CORES": 1}
        shared = 2 * (queries * head + 2 * keys * (head + CHANNELS))
    else:
        source, queries, threads, keys, head = "forward_simt", 64, 256, 16, 32
        defines = {}
        shared = 4 * ((queries + keys) * (head + 4) + (CHANNELS + queries) * (keys + 4))
    unit = Unit(
        "cross_attention", source, tuple({"CHANNELS": CHANNELS, "HEAD": head, "PLUGIN": bits, **defines}.items())
    )
    grid = B * divide(N, queries), divide(C, CHANNELS)
    return Call(unit, grid, threads, shared, (D, C, N, M))


def _sparse_motion(divide: Divide, bits: int, shapes: Sequence[Shape]) -> Call:
    (B, _, h, w), (_, K, _), *_ = shapes
    unit = Unit("sparse_motion", "sparse_motion", (("PLUGIN", bits),))
    return Call(unit, (divide(w, 16), divide(h, 2), B), 512, 0, (K, h, w))


def _dense_flow(divide: Divide, bits: int, shapes: Sequence[Shape]) -> Call:
    (B, _, h, w), _, (_, K, _), *_ = shapes
    unit = Unit("dense_flow", "dense_flow", (("PLUGIN", bits),))
    return Call(unit, (divide(h * w, 32), B), 256, 0, (K, h, w))


def _number(size: Any) -> int:
    """A size that is the same for every batch, which the shape of a kernel's tiles depends on."""
    return size if isinstance(size, int) else int(size.constant_value())


CALLS: dict[str, Callable[..., Call]] = {
    "FlowWarp": _flow_warp,
    "CrossAttention": _cross_attention,
    "SparseMotion": _sparse_motion,
    "DenseFlow": _dense_flow,
}
