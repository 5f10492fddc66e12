"""2-D convolution of channels-last 16-bit maps, with all that surrounds one in the networks fused (kernels/conv2d)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.kernels import _conv2d_patch, _conv2d_spread, _conv2d_wgmma
from dagan_rt.kernels._arrays import ITEM_BYTES, expect, new, short, stream_for, together, view
from dagan_rt.kernels._devices import Array, Device, Launch, Unit

OP = "conv2d"
DTYPES = ("float16", "bfloat16")
ACTIVATIONS = (None, "relu", "elu", "sigmoid")  # in the order of their numbers
PAD_MODES = ("zeros", "reflect")

# ---------------------------------------------------------------------------------------------------------------------
# Weights


@dataclass(frozen=True)
class Packed:
    """Weights as the kernels read them; `pack` makes them once.

    weight: [phases · rows, taps · Cin] of a 16-bit dtype, the taps row by row and the channels of a tap together; rows
    is Cout rounded up to a multiple of 8, the last of them zeros. bias: [rows] float32.
    """

    weight: Any
    bias: Any
    out_channels: int
    in_channels: int
    kernel: int  # rows and columns of the convolution meant, 3 where upsample
    upsample: bool = False  # the input is first enlarged to nearest ×2
    phases: int = 1  # 4: the pixels of the enlarged map in four products of 2 × 2 taps of the small one
    swizzled: Any = None  # the weights as Hopper's kernel wants them for some tiles, where it could serve
    spread: Any = None  # likewise for the kernel of 7 × 7 taps and few channels

    @property
    def rows(self) -> int:
        return _up(self.out_channels, 8)

    @property
    def taps(self) -> int:
        """Rows and columns of the taps of one product."""
        return 2 if self.phases == 4 else self.kernel

    def to(self, device: Any) -> Packed:
        """The same on another device of PyTorch."""

        def moved(tensor: Any) -> Any:
            return None if tensor is None else tensor.to(device)

        names = ("weight", "bias", "swizzled", "spread")
        return replace(self, **{name: moved(getattr(self, name)) for name in names})


def pack(
    weight: Any,
    bias: Any,
    dtype: str,
    *,
    in_channels: int | None = None,
    upsample: bool = False,
    phases: int | None = None,
) -> Packed:
    """Trained weights for conv2d, on the device they are on.

    weight: [Cout, Cin, k, k] tensor of PyTorch, k odd and at most 7. bias: [Cout] tensor, or None.
    dtype: "float16" or "bfloat16", of the maps and the weights; "float32" is for the twin only.
    in_channels: zero channels are added up to so many, a multiple of 8.
    upsample: conv2d is to enlarge its input to nearest ×2 before this 3 × 3 convolution.
    phases: 4 (the default with upsample) has 4/9 of the multiplications and 16/9 of the weights, 1 neither.

    Raises InputError for anything else.
    """
    import torch

    if dtype not in (*DTYPES, "float32"):
        raise InputError(f"dtype must be float16 or bfloat16, or float32 for the twin, got {dtype!r}")
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] not in (1, 3, 5, 7):
        raise InputError(f"weight must be [Cout, Cin, k, k] with k of 1, 3, 5 or 7, got {tuple(weight.shape)}")
    Cout, Cin, k, _ = weight.shape
    if bias is not None and tuple(bias.shape) != (Cout,):
        raise InputError(f"bias must be [Cout] = ({Cout},), got {tuple(bias.shape)}")
    channels = Cin if in_channels is None else in_channels
    if channels < Cin or channels % 8:
        raise InputError(f"the input's channels must be a multiple of 8, at least the weight's {Cin}, got {channels}: "
                         "pass in_channels and fill the input up with zeros")  # fmt: skip
    if upsample and k != 3:
        raise InputError(f"upsample is for 3 × 3 weights, got {k} × {k}")
    phases = phases or (4 if upsample else 1)
    if phases not in ((1, 4) if upsample else (1,)):
        raise InputError(f"phases must be 1, or with upsample 4, got {phases}")
    with torch.no_grad():
        parts = _phases(weight.float()) if phases == 4 else [weight.float()]
        rows = _up(Cout, 8)
        taps = parts[0].shape[2]
        packed = weight.new_zeros((phases, rows, taps, taps, channels), dtype=getattr(torch, dtype))
        for phase, part in enumerate(parts):
            packed[phase, :Cout, ..., :Cin] = part.permute(0, 2, 3, 1)
        padded = weight.new_zeros(rows, dtype=torch.float32)
        if bias is not None:
            padded[:Cout] = bias
        packed = packed.reshape(phases * rows, -1)
        hopper = not weight.is_cuda or torch.cuda.get_device_capability(weight.device) == (9, 0)
        swizzled = spread = None
        if hopper and dtype in DTYPES and taps in (2, 3) and channels % 64 == 0 and rows % 64 == 0:
            swizzled = _conv2d_wgmma.swizzled(packed, phases)
        if dtype in DTYPES and k == _conv2d_spread.KERNEL and _conv2d_spread.width(Cout):
            spread = _conv2d_spread.spread(packed, Cout)
    return Packed(packed, padded, Cout, channels, k, upsample, phases, swizzled, spread)


def _phases(weight: Any) -> list[Any]:
    """3 × 3 weights over a map enlarged to nearest ×2 as 2 × 2 weights over the map itself, for each output phase."""
    import torch

    def halves(w: Any, axis: int) -> list[Any]:  # of even and odd output rows or columns
        first, middle, last = w.unbind(axis)
        return [torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)]

    return [part for half in halves(weight, 2) for part in halves(half, 3)]


# ---------------------------------------------------------------------------------------------------------------------
# The operation


def conv2d(
    x: Any,
    packed: Packed,
    *,
    stride: int = 1,
    padding: int | None = None,
    pad_mode: str = "zeros",
    activation: str | None = None,
    residual: Any = None,
    pool: bool = False,
    repeat: bool = False,
    normalized: tuple[Any, Any, Any] | None = None,
    out: Any = None,
    config: Config | None = None,
    stream: Any = None,
    reference: bool = False,
) -> Any:
    """activation(conv(x) + bias + residual), pooled or repeated, in one launch; [B, Cout, Ho, Wo] channels-last.

    x: [B, Cin, H, W] float16 or bfloat16, channels-last, or a slice of the channels of such a map; pixels and the
    first channel at multiples of 16 bytes. packed: the weights, of `pack`, in x's dtype.
    stride: 1 or 2. padding: on all sides, default k // 2; "reflect" mirrors the map (one of length 1 is repeated).
    activation: None, "relu", "elu" or "sigmoid". residual: [B, Cout, Ho, Wo] of x's dtype; not with pool or repeat.
    pool: 2 × 2 averages of the result are written. repeat: each pixel is written 2 × 2 times.
    normalized: (scale, shift, second), float32 [Cout] each: relu(result · scale + shift) is written to `second`, an
    array like the result.
    out: where to write: x's dtype, float32, or uint8 for round(255 · result) with the result clamped to [0, 1];
    channels-last, perhaps a slice of the channels of a wider map, the rest of which is left alone. It may be the
    residual, but not overlap x. config: one of `configs`, the first by default. stream: where to run, else the
    current one. reference: run the PyTorch twin, on tensors of any device and floating dtype.

    Sums are in float32. Raises InputError if an argument is not as said here, or if there is no GPU.
    """
    options = _Options(stride, padding, pad_mode, activation, pool, repeat)
    if reference:
        options.check(packed, tuple(x.shape), residual)
        return _reference(x, packed, options, residual, normalized, out)
    problem = _checked(x, packed, options, residual)
    shape = options.result(problem.x.shape, packed)
    if out is None:
        out = new(x, shape, layout="nhwc", stream=stream)
    target = _map("out", view(out, "out"), shape, (problem.x.dtype, "float32", "uint8"))
    second = None
    if normalized is not None:
        second = _second(normalized, target, shape)
    together(x=problem.x, out=target.array)
    queue = stream_for(x, stream)
    problem.device.launch(_launch(problem, target, second, config, queue), queue)
    return out


@dataclass(frozen=True)
class _Options:
    stride: int = 1
    padding: int | None = None
    pad_mode: str = "zeros"
    activation: str | None = None
    pool: bool = False
    repeat: bool = False

    def check(self, packed: Packed, x: tuple[int, ...], residual: Any) -> None:
        """Raise InputError unless the options go together, and with an input of this shape."""
        if len(x) != 4 or x[1] != packed.in_channels:
            raise InputError(f"x must be [B, Cin, H, W] with Cin = {packed.in_channels} as packed, got {x}")
        if self.stride not in (1, 2):
            raise InputError(f"stride must be 1 or 2, got {self.stride}")
        if self.pad_mode not in PAD_MODES:
            raise InputError(f"pad_mode must be zeros or reflect, got {self.pad_mode!r}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation must be None, relu, elu or sigmoid, got {self.activation!r}")
        pad = self.pad(packed)
        if pad < 0:
            raise InputError(f"padding must not be negative, got {pad}")
        if packed.upsample and (self.stride, pad, self.pad_mode) != (1, 1, "zeros"):
            raise InputError("weights packed with upsample take stride 1 and padding 1 of zeros only")
        if self.pad_mode == "reflect" and any(size != 1 and pad >= size for size in x[2:]):
            raise InputError(f"a reflected padding of {pad} needs a larger map than {x[2]} × {x[3]}")
        Ho, Wo = self.size(x, packed)
        if min(Ho, Wo) < 1:
            raise InputError(f"x of {x[2]} × {x[3]} is too small for {packed.kernel} × {packed.kernel} taps "
                             f"and a padding of {pad}")  # fmt: skip
        if self.pool + self.repeat + packed.upsample > 1:
            raise InputError("pool, repeat and weights packed with upsample exclude each other")
        if self.pool and (self.stride != 1 or Ho % 2 or Wo % 2):
            raise InputError(f"pool needs stride 1 and a result of even height and width, got {Ho} × {Wo}")
        if residual is not None and (self.pool or self.repeat):
            raise InputError("a residual does not go with pool or repeat: add it afterwards")

    def pad(self, packed: Packed) -> int:
        return packed.kernel // 2 if self.padding is None else self.padding

    def size(self, x: Sequence[int], packed: Packed) -> tuple[int, int]:
        """Height and width of the convolution's result, before it is pooled or repeated."""
        scale, grown = 1 + packed.upsample, 2 * self.pad(packed) - packed.kernel
        height, width = [(scale * length + grown) // self.stride + 1 for length in x[2:]]
        return height, width

    def result(self, x: Sequence[int], packed: Packed) -> tuple[int, int, int, int]:
        """Shape of what is written."""
        height, width = self.size(x, packed)
        if self.pool:
            height, width = height // 2, width // 2
        if self.repeat:
            height, width = 2 * height, 2 * width
        return x[0], packed.out_channels, height, width


# ---------------------------------------------------------------------------------------------------------------------
# What was given


@dataclass(frozen=True)
class _Map:
    """An array [B, C, H, W], channels-last."""

    array: Array
    pitch: int  # elements from a pixel to the next

    @property
    def vectors(self) -> bool:
        """Whether 8 channels, the first a multiple of 8, can be moved at once."""
        return self.pitch * ITEM_BYTES[self.array.dtype] % 16 == 0 and self.array.pointer % 16 == 0


@dataclass(frozen=True)
class _Problem:
    x: Array
    pitch: int
    packed: Packed
    weight: Array
    bias: Array
    residual: _Map | None
    options: _Options
    device: Device


def _checked(x: Any, packed: Packed, options: _Options, residual: Any) -> _Problem:
    source, weight, bias = view(x, "x"), view(packed.weight, "packed.weight"), view(packed.bias, "packed.bias")
    options.check(packed, source.shape, residual)
    expect("x", source, None, DTYPES)
    lies = _map("x", source, source.shape, DTYPES)
    if not lies.vectors:
        raise InputError("the pixels of x must start at multiples of 16 bytes, got "
                         f"the address {source.pointer:#x} and a pixel every {lies.pitch} elements")  # fmt: skip
    rows, taps = packed.phases * packed.rows, packed.taps**2 * packed.in_channels
    expect("packed.weight", weight, (rows, taps), source.dtype)
    expect("packed.bias", bias, (packed.rows,), "float32")
    if weight.strides != (taps, 1) or weight.pointer % 16 or bias.strides != (1,) or bias.pointer % 16:
        raise InputError("packed must be as pack makes it: contiguous, and at multiples of 16 bytes")
    other = None
    if residual is not None:
        other = _map("residual", view(residual, "residual"), options.result(source.shape, packed), source.dtype)
    device = together(x=source, weight=weight, bias=bias, residual=other.array if other else None)
    if source.dtype == "bfloat16" and device.capability < (8, 0):
        raise InputError(f"bfloat16 needs compute capability 8.0, {device.name} has less: use float16")
    B, _, H, W = source.shape
    if B * H * W * lies.pitch >= 1 << 31:
        raise InputError(f"x must span less than 2^31 elements, got {B * H * W * lies.pitch}: split the batch")
    return _Problem(source, lies.pitch, packed, weight, bias, other, options, device)


def _map(name: str, array: Array, shape: tuple[int, ...], dtypes: str | Sequence[str]) -> _Map:
    """The array as a channels-last map of that shape, or InputError."""
    expect(name, array, shape, dtypes, "B C H W")
    B, C, H, W = shape
    sB, sC, sH, sW = array.strides
    if W > 1:
        pitch = sW
    elif H > 1:
        pitch = sH
    else:
        pitch = sB // (H * W) if B > 1 else _up(C, 8)  # of a single pixel any will do
    wanted = {"B": (B, sB, H * W * pitch), "C": (C, sC, 1), "H": (H, sH, W * pitch)}
    if pitch < C or any(size > 1 and stride != right for size, stride, right in wanted.values()):
        raise InputError(f"{name} must be channels-last, or a slice of the channels of such a map, "
                         f"got {shape} with the strides {array.strides}")  # fmt: skip
    return _Map(array, pitch)


@dataclass(frozen=True)
class _Second:
    scale: Array
    shift: Array
    map: _Map


def _second(normalized: tuple[Any, Any, Any], out: _Map, shape: tuple[int, ...]) -> _Second:
    scale, shift, second = normalized
    found = _Second(
        view(scale, "scale"), view(shift, "shift"), _map("second", view(second, "second"), shape, out.array.dtype)
    )
    for name, array in (("scale", found.scale), ("shift", found.shift)):
        expect(name, array, (shape[1],), "float32")
        if array.strides != (1,) and shape[1] > 1:
            raise InputError(f"{name} must be contiguous, got the strides {array.strides}")
    together(out=out.array, second=found.map.array, scale=found.scale, shift=found.shift)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Which kernel, and its launch


@dataclass(frozen=True)
class Config:
    """One way to compute a convolution."""

    kernel: str  # "mma", "wgmma", "spread" or "patch"
    tile: int  # index into the kernel's tiles
    split: int  # parts of K, of as many blocks a tile


@dataclass(frozen=True)
class Tile:
    """What a block of forward_mma.cu makes: m pixels × n channels."""

    m: int
    n: int
    warps_m: int
    warps_n: int
    stages: int  # places of the ring

    @property
    def unit(self) -> Unit:
        sizes = (self.m, self.n, self.warps_m, self.warps_n, self.stages)
        names = ("TILE_M", "TILE_N", "WARPS_M", "WARPS_N", "STAGES")
        return Unit(OP, "forward_mma", tuple(zip(names, sizes, strict=True)))

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: the ring, in which the sums then lie, and a flag."""
        pitch = self.n if self.n % 16 else self.n + 8
        return max(2 * self.stages * (self.m + self.n) * DEPTH, 4 * self.m * pitch) + 16

    @property
    def resident(self) -> int:
        """Blocks of a multiprocessor, by their registers."""
        area = self.m * self.n
        return 256 // self.threads if area > 8192 else 2 if area == 8192 else 3 if area >= 4096 else 4


DEPTH = 64  # values of K in a step, as in the sources
TILES = (
    Tile(128, 128, 2, 4, 3),
    Tile(128, 64, 2, 2, 4),
    Tile(128, 80, 4, 1, 3),
    Tile(64, 64, 2, 2, 4),
    Tile(64, 32, 2, 2, 4),
    Tile(128, 24, 4, 1, 3),
    Tile(128, 16, 4, 1, 3),
    Tile(128, 8, 4, 1, 3),
    Tile(32, 64, 1, 4, 4),
    Tile(16, 64, 1, 4, 6),
)
UNITS = (*(tile.unit for tile in TILES), *_conv2d_wgmma.UNITS, *_conv2d_spread.UNITS, *_conv2d_patch.UNITS)


def configs(
    x: Sequence[int], packed: Packed, *, stride: int = 1, padding: int | None = None, pool: bool = False,
    repeat: bool = False, device: Device, most: int = 8,
) -> list[Config]:  # fmt: skip
    """The ways to convolve an input of shape `x` that are worth a try on a device, the most promising first.

    At most `most` of them, few of a tile. The options are those of conv2d, of which the others make no difference.
    """
    options = _Options(stride, padding, pool=pool, repeat=repeat)
    return list(_configs(_product(x, packed, options), *_of(device))[:most])


@dataclass(frozen=True)
class _Product:
    """The matrix product [M, K] [K, N] that a convolution is."""

    B: int
    Ho: int  # of the pixels of M: before pooling and repeating, and of one phase
    Wo: int
    rows: int  # N
    in_channels: int
    k: int
    stride: int
    phases: int
    out_channels: int
    padding: int
    plain: bool  # what is written is neither pooled nor repeated, what is read not enlarged
    unpooled: bool  # perhaps repeated

    @property
    def steps(self) -> int:
        return -(-(self.k**2) * self.in_channels // DEPTH)

    def tiles(self, tile: Tile) -> int:
        """Of one phase."""
        return -(-self.B * self.Ho * self.Wo // tile.m) * -(-self.rows // tile.n)


def _product(x: Sequence[int], packed: Packed, options: _Options) -> _Product:
    height, width = options.size(x, packed)
    if packed.phases == 4:
        height, width = height // 2, width // 2
    plain = not (options.pool or options.repeat or packed.upsample)
    return _Product(
        x[0], height, width, packed.rows, packed.in_channels, packed.taps, options.stride, packed.phases,
        packed.out_channels, options.pad(packed), plain, not (options.pool or packed.upsample),
    )  # fmt: skip


def _of(device: Device) -> tuple[int, int, tuple[int, int]]:
    return device.multiprocessors, device.shared_per_block, device.capability


@cache
def _configs(product: _Product, multiprocessors: int, shared: int, capability: tuple[int, int]) -> tuple[Config, ...]:
    """All candidates, best guess first."""
    found = []
    fitting = [(index, tile) for index, tile in enumerate(TILES) if tile.shared <= shared]
    for index, tile in [it for it in fitting if it[1].n < 2 * product.rows] or fitting:
        tiles = product.tiles(tile) * product.phases
        splits = [s for s in _SPLITS if s == 1 or (4 * s <= product.steps and s * tiles <= 3 * multiprocessors)]
        costs = sorted((_cycles(tile, tiles, product.steps, s, multiprocessors, shared), s) for s in splits)
        found += [(cost, Config("mma", index, split)) for cost, split in costs[:2]]
    if capability == (9, 0):
        found += _of_wgmma(product, multiprocessors)
    if product.plain and (product.k, product.stride) == (_conv2d_spread.KERNEL, 1):
        guesses = _conv2d_spread.candidates(
            B=product.B, Ho=product.Ho, Wo=product.Wo, in_channels=product.in_channels, padding=product.padding,
            out_channels=product.out_channels, multiprocessors=multiprocessors, shared=shared,
        )  # fmt: skip
        found += [(cost, Config("spread", index, split)) for cost, index, split in guesses]
    if product.unpooled:
        guesses = _conv2d_patch.candidates(
            B=product.B, Ho=product.Ho, Wo=product.Wo, rows=product.rows, in_channels=product.in_channels,
            k=product.k, stride=product.stride, multiprocessors=multiprocessors, shared=shared,
        )  # fmt: skip
        found += [(cost, Config("patch", index, split)) for cost, index, split in guesses]
    return tuple(config for _, config in sorted(found, key=lambda it: it[0]))


def _of_wgmma(product: _Product, multiprocessors: int) -> list[tuple[float, Config]]:
    names = ("B", "Ho", "Wo", "in_channels", "rows", "k", "stride", "phases")
    shape, found = {name: getattr(product, name) for name in names}, []
    for index, split in _conv2d_wgmma.candidates(**shape, multiprocessors=multiprocessors):
        tile = _conv2d_wgmma.TILES[index]
        down, across = _conv2d_wgmma.tiles_of(tile, product.B, product.Ho, product.Wo, product.rows)
        blocks, steps = down * across * product.phases * split, -(-product.steps // split)
        cost = _conv2d_wgmma._clocks(tile, blocks, steps, split, product.k, multiprocessors)
        found.append((cost, Config("wgmma", index, split)))
    return found


_SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)


def _cycles(tile: Tile, tiles: int, steps: int, split: int, multiprocessors: int, shared: int) -> float:
    """About how long the launch takes; the constants are an H200's, in cycles of a multiprocessor."""
    own, area = -(-steps // split), tile.m * tile.n
    turns = -(-tiles * split // multiprocessors)  # blocks that the busiest multiprocessor works off
    together = max(1, min(tile.resident, shared // tile.shared, turns))
    multiplying, copying = area * DEPTH / 1000, 2 * (tile.m + tile.n) * DEPTH / 40
    busy = turns * own * max(multiplying, copying)
    waiting = -(-turns // together) * (1800 + own * max(200, multiplying))  # for the first step, and for each other
    joining = 1500 + split * area * 4 / 48 + turns * area * 4 / 32 if split > 1 else 0
    return max(busy, waiting) + turns * area * 4 / 64 + joining


# As in kernels/conv2d/conv2d.cuh.
_REFLECT, _ACTIVATION, _POOL, _REPEAT, _UPSAMPLE, _NEAREST, _VECTORS = 1, 1 << 1, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 9
_OUT = {"float32": 1 << 7, "uint8": 2 << 7}


def _launch(problem: _Problem, out: _Map, second: _Second | None, config: Config | None, stream: int) -> Launch:
    options, packed, device = problem.options, problem.packed, problem.device
    product = _product(problem.x.shape, packed, options)
    if config is None:
        config = _configs(product, *_of(device))[0]
    _check_config(config, product, device)
    split = config.split
    maps = [it for it in (out, problem.residual, second.map if second else None) if it is not None]
    flags = (
        _REFLECT * (options.pad_mode == "reflect")
        | _ACTIVATION * ACTIVATIONS.index(options.activation)
        | _POOL * options.pool
        | _REPEAT * options.repeat
        | (_UPSAMPLE if packed.phases == 4 else _NEAREST * packed.upsample)
        | _OUT.get(out.array.dtype, 0)
        | _VECTORS * all(it.vectors for it in maps)
    )
    B, Cin, H, W = problem.x.shape
    sizes = (
        B, H, W, Cin, problem.pitch, product.Ho, product.Wo, packed.out_channels, packed.rows, out.pitch,
        second.map.pitch if second else 0, problem.residual.pitch if problem.residual else 0,
        packed.taps, options.stride, options.pad(packed), split, flags,
    )  # fmt: skip
    weight, dtype = problem.weight, problem.x.dtype
    wgmma_sizes = (B, product.Ho, product.Wo, packed.rows, packed.phases, split)
    tile = _KERNELS[config.kernel][config.tile]
    shared = 0 if isinstance(tile, _conv2d_patch.Tile) else tile.shared
    if isinstance(tile, _conv2d_wgmma.Tile):
        if tile.halo:
            weight = view(packed.swizzled, "packed.swizzled")
        partials = _conv2d_wgmma.partials_bytes(tile, *wgmma_sizes)
        counters = _conv2d_wgmma.counters_bytes(tile, *wgmma_sizes)
    elif isinstance(tile, _conv2d_spread.Tile):
        weight = view(packed.spread, "packed.spread")
        whole = W <= _conv2d_spread.SPAN and options.pad_mode == "zeros"
        blocks = _conv2d_spread.blocks(tile, B, product.Ho, product.Wo, whole)
        partials, counters = 4 * blocks * split * tile.fields * tile.threads, 4 * blocks
    elif isinstance(tile, _conv2d_patch.Tile):
        chunk = _conv2d_patch.chunk_of(tile, Cin, packed.kernel, options.stride, split, device.shared_per_block)
        assert chunk is not None
        shared, sizes = tile.shared_for(chunk, packed.kernel, options.stride), (*sizes[:-1], flags | chunk << 16)
        blocks = _conv2d_patch.blocks(tile, B, product.Ho, product.Wo)
        partials, counters = 4 * blocks * split * tile.fields * tile.threads, 4 * blocks
    else:
        blocks = product.tiles(tile)
        partials, counters = 4 * packed.phases * blocks * split * tile.m * tile.n, 4 * packed.phases * blocks
    arrays = (
        problem.x, weight, problem.bias, problem.residual and problem.residual.array, out.array,
        second and second.map.array, second and second.scale, second and second.shift,
    )  # fmt: skip
    scratch: tuple[Array | None, Array | None] = (None, None)
    if split > 1:
        scratch = (device.workspace(stream, partials), device.workspace(stream, counters, zeroed=True))
    args = (*arrays, *scratch, *map(np.int32, sizes))
    if isinstance(tile, _conv2d_wgmma.Tile):
        return _conv2d_wgmma.launch(tile, dtype, args, *wgmma_sizes)
    grid = (blocks, packed.phases * split, 1)
    kernel = f"{OP}_{config.kernel}_{short(dtype)}"
    return Launch(tile.unit, kernel, grid, (tile.threads, 1, 1), args, shared, early=True)


_KERNELS: dict[str, tuple[Any, ...]] = {
    "mma": TILES, "wgmma": _conv2d_wgmma.TILES, "spread": _conv2d_spread.TILES, "patch": _conv2d_patch.TILES
}  # fmt: skip


def _check_config(config: Config, product: _Product, device: Device) -> None:
    """Raise InputError unless the device and the product can be served so."""
    if not 0 <= config.tile < len(_KERNELS.get(config.kernel, ())):
        raise InputError(f"config must name the kernel mma, wgmma, spread or patch and one of its tiles, got {config}")
    tile = _KERNELS[config.kernel][config.tile]
    if config.kernel == "wgmma":
        served = _conv2d_wgmma.serves(
            tile, capability=device.capability, in_channels=product.in_channels, rows=product.rows, k=product.k,
            stride=product.stride, split=config.split,
        )  # fmt: skip
    elif config.kernel == "spread":
        served = product.plain and _conv2d_spread.serves(
            tile, out_channels=product.out_channels, in_channels=product.in_channels, k=product.k,
            stride=product.stride, padding=product.padding, split=config.split,
        )  # fmt: skip
    elif config.kernel == "patch":
        served = product.unpooled and _conv2d_patch.serves(
            tile, rows=product.rows, in_channels=product.in_channels, k=product.k, stride=product.stride,
            split=config.split, shared=device.shared_per_block,
        )  # fmt: skip
    else:
        served = 1 <= config.split <= product.steps
    if not served or (config.kernel != "patch" and tile.shared > device.shared_per_block):
        raise InputError(f"{config} does not serve this convolution on {device.name}: take one of configs(…)")


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch


def _reference(x: Any, packed: Packed, options: _Options, residual: Any, normalized: Any, out: Any) -> Any:
    """The same in PyTorch, each step in the dtype of x."""
    from torch.nn import functional as F

    y = _convolved(x, packed, options)
    if residual is not None:
        y = y + residual
    if options.activation is not None:
        y = getattr(F, options.activation)(y)
    if options.pool:
        y = F.avg_pool2d(y, 2)
    if options.repeat:
        y = F.interpolate(y, scale_factor=2, mode="nearest")
    if normalized is not None:
        scale, shift, second = normalized
        second.copy_(_as(F.relu(y * scale.to(y)[:, None, None] + shift.to(y)[:, None, None]), second))
    return y if out is None else out.copy_(_as(y, out))


def _convolved(x: Any, packed: Packed, options: _Options) -> Any:
    import torch
    from torch.nn import functional as F

    rows, taps, Cout = packed.rows, packed.taps, packed.out_channels
    weights = packed.weight.to(x.dtype).reshape(packed.phases, rows, taps, taps, -1).permute(0, 1, 4, 2, 3)[:, :Cout]
    bias = packed.bias[:Cout].to(x.dtype)
    if packed.phases == 4:
        B, _, H, W = x.shape
        padded = F.pad(x, (1, 1, 1, 1))
        parts = [
            F.conv2d(padded[..., i // 2 : i // 2 + H + 1, i % 2 : i % 2 + W + 1], weights[i], bias) for i in range(4)
        ]
        y = torch.stack(parts).reshape(2, 2, B, Cout, H, W).permute(2, 3, 4, 0, 5, 1)
        return y.reshape(B, Cout, 2 * H, 2 * W).contiguous(memory_format=torch.channels_last)
    if packed.upsample:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    pad = options.pad(packed)
    if options.pad_mode == "reflect":
        for axis, sides in ((3, (pad, pad, 0, 0)), (2, (0, 0, pad, pad))):
            x = F.pad(x, sides, mode="reflect" if x.shape[axis] > 1 else "replicate")
        pad = 0
    return F.conv2d(x, weights[0], bias, options.stride, pad)


def _as(y: Any, like: Any) -> Any:
    """y for an array of this dtype: levels of [0, 1] for bytes."""
    import torch

    return (y.float().clamp(0, 1) * 255).round().to(torch.uint8) if like.dtype == torch.uint8 else y
