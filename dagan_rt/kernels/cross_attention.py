"""Cross-modal attention: gamma · softmax(QᵀK) V + residual, the logits never stored (kernels/cross_attention)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.kernels import _attention_backward
from dagan_rt.kernels._arrays import FLOATS, expect, new, short, stream_for, together, view
from dagan_rt.kernels._devices import Array, Device, Launch, Unit

OP = "cross_attention"


def mma_unit(head: int, channels: int, keys: int) -> Unit:
    """forward_mma.cu for so many features of a query, channels of a chunk and keys of a tile."""
    return Unit(OP, "forward_mma", (("HEAD", head), ("CHANNELS", channels), ("KEYS", keys)))


def simt_unit(head: int, channels: int) -> Unit:
    """forward_simt.cu for so many features of a query at a time and channels of a chunk."""
    return Unit(OP, "forward_simt", (("HEAD", head), ("CHANNELS", channels)))


WGMMA = Unit(OP, "forward_wgmma", feature="a")
# What is shipped compiled: the attention of the published model, and of the small one this repository trains.
UNITS = (
    WGMMA,
    mma_unit(32, 256, 64),
    mma_unit(32, 256, 32),
    mma_unit(16, 64, 64),
    simt_unit(32, 256),
    simt_unit(8, 64),
    *_attention_backward.UNITS,
)


def cross_attention(
    query: Any,
    key: Any,
    value: Any,
    residual: Any,
    gamma: Any,
    *,
    out: Any = None,
    stream: Any = None,
    reference: bool = False,
    kernel: str | None = None,
) -> Any:
    """`gamma` · softmax(QᵀK) over the keys · V + `residual`, without a 1/√D scale: like the residual.

    query: [B, D, h, w], key: [B, D, h', w'], value: [B, C, h', w'], residual: [B, C, h, w], or pixels in one axis; all
    float32, float16 or bfloat16, all contiguous or all channels-last. gamma: [1] float32; only the GPU reads it.
    out: the array to write to, like the residual in shape, dtype and layout; it may be the residual itself.
    stream: where to run, else the current stream. reference: run the PyTorch twin, on tensors of any device.
    kernel: "wgmma", "mma" or "simt" insists on one of the kernels, for tests and measurements.

    Sums are in float32. A row of logits that holds NaN gives NaN, as in PyTorch. PyTorch tensors that require a
    gradient get it from kernels too. Raises InputError if an array is not as said here, or if there is no GPU.
    """
    arrays = (query, key, value, residual, gamma)
    if reference:
        attended = _reference(*arrays)
        return attended if out is None else out.copy_(attended)
    if any(getattr(array, "requires_grad", False) for array in arrays) and sys.modules["torch"].is_grad_enabled():
        if out is not None:
            raise InputError("out cannot be given where a gradient is asked for: leave it out, or use torch.no_grad()")
        return _function().apply(*arrays, stream, kernel)
    return _forward(*arrays, out, stream, kernel)


def _forward(
    query: Any, key: Any, value: Any, residual: Any, gamma: Any, out: Any, stream: Any, kernel: str | None
) -> Any:
    problem = _checked(query, key, value, residual, gamma)
    if out is None:
        out = new(residual, problem.residual.shape, layout=problem.layout, stream=stream)
    target = view(out, "out")
    expect("out", target, problem.residual.shape, problem.residual.dtype)
    if not _lies(target, problem.layout):
        raise InputError(f"out must be {_WORDS[problem.layout]} as residual is, got the strides {target.strides}")
    together(query=problem.query, out=target)
    _launch(problem, _Results(target), stream_for(query, stream), kernel)
    return out


@cache
def _function() -> Any:
    """The autograd.Function, made when it is first needed: PyTorch is not imported before."""
    import torch
    from torch.autograd.function import once_differentiable

    class CrossAttention(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, query: Any, key: Any, value: Any, residual: Any, gamma: Any, stream: Any, kernel: str | None
        ) -> Any:
            problem = _checked(query, key, value, residual, gamma)
            out = new(residual, residual.shape, layout=problem.layout, stream=stream)
            attended = new(residual, residual.shape, layout=problem.layout, stream=stream)
            log_sum_exp = new(residual, (problem.B, problem.N), "float32", stream=stream)
            results = _Results(view(out, "out"), view(attended, "attended"), view(log_sum_exp, "log_sum_exp"))
            _launch(problem, results, stream_for(query, stream), kernel)
            ctx.save_for_backward(query, key, value, attended, log_sum_exp, gamma)
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Any) -> Any:
            query, key, value, attended, log_sum_exp, gamma = ctx.saved_tensors
            q, k, v, r, g = ctx.needs_input_grad[:5]
            dquery, dkey, dvalue, dgamma = _attention_backward.backward(
                grad, query, key, value, attended, log_sum_exp, gamma, (q, k, v, g)
            )
            return dquery, dkey, dvalue, grad if r else None, dgamma, None, None

    return CrossAttention


# ---------------------------------------------------------------------------------------------------------------------
# What was given

_WORDS = {"nchw": "contiguous", "nhwc": "channels-last"}


@dataclass(frozen=True)
class _Problem:
    query: Array
    key: Array
    value: Array
    residual: Array
    gamma: Array
    layout: str
    device: Device
    B: int
    D: int
    C: int
    N: int  # queries
    M: int  # keys

    @property
    def suffix(self) -> str:
        """Of the kernels' names."""
        return f"{short(self.query.dtype)}_{self.layout}"

    @property
    def aligned(self) -> bool:
        """Whether what is contiguous starts at multiples of 16 bytes and holds multiples of 8 elements."""
        lengths = (self.N, self.M) if self.layout == "nchw" else (self.D, self.C)
        pointers = (self.query.pointer, self.key.pointer, self.value.pointer)
        return all(it % 8 == 0 for it in lengths) and all(it % 16 == 0 for it in pointers)


@dataclass(frozen=True)
class _Results:
    out: Array
    attended: Array | None = None  # softmax(QᵀK) V, like `out`
    log_sum_exp: Array | None = None  # [B, N] float32, natural logarithm


def _checked(query: Any, key: Any, value: Any, residual: Any, gamma: Any) -> _Problem:
    q, k, v, r = view(query, "query"), view(key, "key"), view(value, "value"), view(residual, "residual")
    g = view(gamma, "gamma")
    if len(q.shape) not in (3, 4):
        raise InputError(f"query must be [B, D, h, w] or [B, D, N], got {q.shape}")
    pixels = "h w" if len(q.shape) == 4 else "N"
    expect("query", q, (None,) * len(q.shape), FLOATS, f"B D {pixels}")
    B, D, *of_query = q.shape
    expect("key", k, (B, D, *[None] * len(of_query)), q.dtype, f"B D {pixels}")
    of_key = k.shape[2:]
    expect("value", v, (B, None, *of_key), q.dtype, f"B C {pixels}")
    C = v.shape[1]
    expect("residual", r, (B, C, *of_query), q.dtype, f"B C {pixels}")
    expect("gamma", g, (1,), "float32")
    arrays = {"query": q, "key": k, "value": v, "residual": r}
    layout = next((it for it in _WORDS if all(_lies(array, it) for array in arrays.values())), None)
    if layout is None:
        strides = ", ".join(f"{name} {array.strides}" for name, array in arrays.items())
        raise InputError(f"query, key, value and residual must all be contiguous or all channels-last, got {strides}")
    device = together(**arrays, gamma=g)
    return _Problem(q, k, v, r, g, layout, device, B, D, C, prod(of_query), prod(of_key))


def _lies(array: Array, layout: str) -> bool:
    """Whether [B, channels, pixels…] lies in memory so; along a length of one any stride will do."""
    order = [0, 1, *range(2, len(array.shape))] if layout == "nchw" else [0, *range(2, len(array.shape)), 1]
    stride = 1
    for axis in reversed(order):
        if array.shape[axis] != 1 and array.strides[axis] != stride:
            return False
        stride *= array.shape[axis]
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Which kernel, and its launch


def _launch(problem: _Problem, results: _Results, stream: int, kernel: str | None) -> None:
    """Enqueue the first kernel of the table that serves, or the one asked for."""
    if kernel is None:
        kernel = next(name for name, (serves, _) in KERNELS.items() if serves(problem))
    elif kernel not in KERNELS:
        raise InputError(f"kernel must be {', '.join(KERNELS)} or None, got {kernel}")
    elif not KERNELS[kernel][0](problem):
        raise InputError(f"the kernel {kernel} does not serve these arrays on {problem.device.name}")
    problem.device.launch(KERNELS[kernel][1](problem, results, stream), stream)


# As in the kernels.
WGMMA_QUERIES, WGMMA_KEYS, WGMMA_SHARED = 128, 64, 184400
MMA_QUERIES, SIMT_QUERIES, SIMT_KEYS = 64, 64, 16


def _serves_wgmma(problem: _Problem) -> bool:
    aligned = problem.aligned and problem.residual.pointer % 16 == 0
    sixteen_bits = problem.query.dtype in ("float16", "bfloat16")
    return problem.device.capability == (9, 0) and sixteen_bits and (problem.D, problem.C) == (32, 256) and aligned


def _wgmma(problem: _Problem, results: _Results, stream: int) -> Launch:
    device, groups = problem.device, -(-problem.N // WGMMA_QUERIES)
    splits = _wgmma_splits(problem.B * groups, -(-problem.M // WGMMA_KEYS), device.multiprocessors)
    workspace = arrived = None
    if splits > 1:
        blocks = problem.B * groups * splits
        workspace = device.workspace(stream, blocks * WGMMA_QUERIES * (2 * problem.C + 8))
        arrived = device.workspace(stream, 4 * problem.B * groups, zeroed=True)
    return Launch(
        WGMMA,
        f"{OP}_wgmma_{problem.suffix}",
        (splits, groups, problem.B),
        (384, 1, 1),
        (problem.query, problem.key, problem.value, problem.residual, problem.gamma, results.out, results.log_sum_exp,
         results.attended, workspace, arrived, np.int32(problem.N), np.int32(problem.M)),
        WGMMA_SHARED,
        waiting=splits > 1,
        early=True,
    )  # fmt: skip


def _wgmma_splits(groups: int, tiles: int, multiprocessors: int) -> int:
    """Among how many blocks the keys of each group of queries are shared out: 1, 2, 4 or 8.

    They wait for each other, so all should run at once, and a multiprocessor runs one.
    """
    return max(splits for splits in (1, 2, 4, 8) if splits == 1 or splits <= min(tiles, multiprocessors // groups))


def _serves_mma(problem: _Problem) -> bool:
    least = {"float16": (7, 5), "bfloat16": (8, 0)}.get(problem.query.dtype)
    small = problem.D <= 256 and max(problem.N, problem.M, problem.C) < 1 << 24  # offsets in a tile have 32 bits
    return least is not None and problem.device.capability >= least and small


def _mma(problem: _Problem, results: _Results, stream: int) -> Launch:
    device, head = problem.device, _up(problem.D, 16)
    channels = _chunk(problem.C, head, (16, 32, 64, 128, 256))

    def shared(keys: int) -> int:  # queries, and two tiles of keys and values
        return 2 * (MMA_QUERIES * head + 2 * keys * (head + channels))

    # The larger tile where two blocks fit a multiprocessor.
    tiles = {64: 2 * shared(64), 32: shared(32), 16: shared(16)}
    keys = next(keys for keys, nbytes in tiles.items() if nbytes <= device.shared_per_block)
    return _shared_out(
        problem, results, stream, mma_unit(head, channels, keys), "mma", channels, MMA_QUERIES, keys,
        threads=128, rows=2, shared=shared(keys), last=(np.int32(problem.aligned),),
    )  # fmt: skip


def _simt(problem: _Problem, results: _Results, stream: int) -> Launch:
    head = min(64, max(8, _power_of_two(problem.D)))
    channels = _chunk(problem.C, head, (32, 64, 128, 256))
    shared = 4 * ((SIMT_QUERIES + SIMT_KEYS) * (head + 4) + (channels + SIMT_QUERIES) * (SIMT_KEYS + 4))
    return _shared_out(
        problem, results, stream, simt_unit(head, channels), "simt", channels, SIMT_QUERIES, SIMT_KEYS,
        threads=256, rows=8, shared=shared,
    )  # fmt: skip


def _shared_out(
    problem: _Problem, results: _Results, stream: int, unit: Unit, name: str, channels: int, queries: int, keys: int,
    *, threads: int, rows: int, shared: int, last: tuple[Any, ...] = (),
) -> Launch:  # fmt: skip
    """The launch of a kernel whose blocks make a chunk of channels for a tile of queries from a share of the keys."""
    device, chunks = problem.device, -(-problem.C // channels)
    groups = problem.B * -(-problem.N // queries) * chunks
    tiles = -(-problem.M // keys)
    tiles_a_share = _tiles_a_share(groups, tiles, 2 * device.multiprocessors)
    shares = -(-tiles // tiles_a_share)
    workspace = arrived = None
    if shares > 1:
        fields = 2 * rows + queries * channels // threads  # of a thread: maxima, sums and its part of the result
        workspace = device.workspace(stream, 4 * groups * shares * fields * threads)
        arrived = device.workspace(stream, 4 * groups, zeroed=True)
    sizes = map(np.int32, (problem.D, problem.C, problem.N, problem.M, chunks, tiles_a_share))
    return Launch(
        unit,
        f"{OP}_{name}_{problem.suffix}",
        (groups // chunks, chunks * shares, 1),
        (threads, 1, 1),
        (problem.query, problem.key, problem.value, problem.residual, problem.gamma, results.out, results.attended,
         results.log_sum_exp, workspace, arrived, *sizes, *last),
        shared,
    )  # fmt: skip


@cache
def _tiles_a_share(groups: int, tiles: int, slots: int) -> int:
    """Of how many tiles of keys a block's share is, so that the last of `groups` × shares blocks ends soonest.

    `slots` blocks run at a time. To join a share takes about as long as two tiles.
    """

    def ends(tiles_a_share: int) -> int:
        shares = -(-tiles // tiles_a_share)
        joining = 2 * shares if shares > 1 else 0
        return -(-groups * shares // slots) * tiles_a_share + joining

    return min(sorted({-(-tiles // shares) for shares in range(1, min(tiles, 32) + 1)}, reverse=True), key=ends)


def _chunk(C: int, head: int, sizes: tuple[int, ...]) -> int:
    """Channels of a block, of these, such that all chunks together, each with logits of its own, are the least work."""
    return min(reversed(sizes), key=lambda size: -(-C // size) * (size + head))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


#: The kernels, best first: whether one serves a problem, and its launch.
KERNELS: dict[str, tuple[Callable[[_Problem], bool], Callable[[_Problem, _Results, int], Launch]]] = {
    "wgmma": (_serves_wgmma, _wgmma),
    "mma": (_serves_mma, _mma),
    "simt": (lambda problem: True, _simt),
}


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch


def _reference(query: Any, key: Any, value: Any, residual: Any, gamma: Any) -> Any:
    """The same in PyTorch, in the dtype of the tensors, with all logits in memory."""
    from dagan_rt.networks.attention import cross_attention

    attended = cross_attention(query.flatten(2), key.flatten(2), value.flatten(2))
    return gamma.to(residual.dtype) * attended.reshape(residual.shape) + residual
