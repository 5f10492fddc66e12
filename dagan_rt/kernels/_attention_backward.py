"""The backward of cross_attention by its kernels (kernels/cross_attention/BACKWARD.md): PyTorch tensors in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dagan_rt.kernels._arrays import current_stream, short, view
from dagan_rt.kernels._devices import Array, Device, Launch, Unit

AROUND = Unit("cross_attention", "backward")
SIMT = Unit("cross_attention", "backward_simt")
#: On tensor cores: the most channels of a query and of a value; the first that fits is taken, else SIMT.
WIDTHS = ((32, 64), (32, 128), (32, 256), (64, 256))
MMA = {(D, C): Unit("cross_attention", "backward_mma", (("HEAD", D), ("WIDE", C))) for D, C in WIDTHS}
UNITS = (AROUND, SIMT, *MMA.values())

# As in backward_mma.cu, backward_simt.cu and backward.cu.
MMA_ROWS, MMA_COLUMNS, SIMT_ROWS, SIMT_COLUMNS, THREADS = 64, 32, 64, 128, 128
SIMT_SHARED = 4 * (8 * (SIMT_ROWS + 4) + 8 * (SIMT_COLUMNS + 4) + SIMT_COLUMNS * (SIMT_ROWS + 4))
DELTA_PIXELS, SUM_PIXELS, SUM_CHANNELS = 32, 32, 32


def backward(
    grad: Any, query: Any, key: Any, value: Any, attended: Any, log_sum_exp: Any, gamma: Any,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Gradients of gamma · V softmax(QᵀK)ᵀ + residual; the residual's is `grad` itself.

    grad [B, C, ...], query [B, D, ...], key [B, D, ...'], value [B, C, ...'] and attended, V softmax(QᵀK)ᵀ, of grad's
    shape: T, float32, float16 or bfloat16, in one layout (grad in any). log_sum_exp [B, N] of each query's logits
    (natural logarithm) and gamma [1]: float32. needs: which of query, key, value and gamma want one.
    Returns their gradients, of their own dtype and layout, None where not needed. Equal inputs give equal bits.
    """
    import torch

    # The kernels see pixels in a row; a view of tensors that are contiguous or channels last.
    planes = [tensor.detach().flatten(2) for tensor in (query, key, value, grad, attended)]
    channels_last = not all(tensor.is_contiguous() for tensor in planes[:3])
    if channels_last:
        planes = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in planes]
    else:
        planes = [tensor.contiguous() for tensor in planes]
    q, k, v, g, a = (view(tensor, name) for tensor, name in zip(planes, _NAMES, strict=True))
    lse = view(log_sum_exp.detach().contiguous(), "log_sum_exp")
    scale = view(gamma.detach(), "gamma")

    def empty(*shape: int, dtype: str = "float32") -> Any:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=query.device)

    work = _Work(q.device, current_stream(query), q, k, v, g, lse, scale, channels_last, empty)
    delta, dgamma = work.delta(a, needs[3])
    gradients = work.on_tensor_cores(delta, needs) if work.mma else work.with_ordinary_arithmetic(delta, needs)
    shaped = [
        None if it is None else it.reshape(like.shape) for it, like in zip(gradients, (query, key, value), strict=True)
    ]
    return (*shaped, dgamma)  # type: ignore[return-value]


_NAMES = ("query", "key", "value", "grad", "attended")


@dataclass(frozen=True)
class _Work:
    """One backward: where, and on what."""

    device: Device
    stream: int
    query: Array  # [B, D, N]
    key: Array  # [B, D, M]
    value: Array  # [B, C, M]
    grad: Array  # [B, C, N]
    log_sum_exp: Array  # [B, N]
    gamma: Array  # [1]
    channels_last: bool
    empty: Any  # (*shape, dtype) -> an uninitialised tensor

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, D, C, N, M."""
        B, D, N = self.query.shape
        return B, D, self.value.shape[1], N, self.key.shape[2]

    @property
    def mma(self) -> Unit | None:
        """The unit for tensor cores, if there is one for this GPU, dtype and size."""
        _, D, C, _, _ = self.sizes
        if self.query.dtype == "float32" or self.device.capability < (8, 0):
            return None
        return next((unit for (head, wide), unit in MMA.items() if head >= D and wide >= C), None)

    def launch(self, unit: Unit, kernel: str, grid: tuple[int, int, int], block: tuple[int, int, int], *args: Any,
               shared: int = 0) -> None:  # fmt: skip
        args = tuple(np.int32(arg) if isinstance(arg, (int, bool)) else arg for arg in args)
        self.device.launch(Launch(unit, kernel, grid, block, args, shared), self.stream)

    def strides(self, channels: int, pixels: int) -> tuple[int, int]:
        """Of a channel and of a pixel."""
        return (1, channels) if self.channels_last else (pixels, 1)

    # ---- around the passes ----

    def delta(self, attended: Array, need_gamma: bool) -> tuple[Array, Any]:
        """delta [B, N], and d gamma [1]."""
        B, _, C, N, _ = self.sizes
        blocks = _ceil(N, DELTA_PIXELS)
        delta, shares = view(self.empty(B, N), "delta"), view(self.empty(B, blocks), "shares")
        self.launch(AROUND, f"backward_delta_{short(self.grad.dtype)}", (blocks, B, 1), (256, 1, 1),
                    self.grad, attended, delta, shares, C, N, *self.strides(C, N))  # fmt: skip
        if not need_gamma:
            return delta, None
        dgamma = self.empty(1)
        self.launch(AROUND, "backward_gamma", (1, 1, 1), (256, 1, 1), shares, view(dgamma, "dgamma"), B * blocks)
        return delta, dgamma

    def sum(self, partial: Array, channels: int) -> Any:
        """gamma times the sum over the splits of `partial` [splits, B, pixels, pitch] -> [B, channels, pixels]."""
        splits, B, pixels, pitch = partial.shape
        shape = (B, pixels, channels) if self.channels_last else (B, channels, pixels)
        memory = self.empty(*shape, dtype=self.query.dtype)
        grid = (_ceil(pixels, SUM_PIXELS), _ceil(channels, SUM_CHANNELS), B)
        self.launch(AROUND, f"backward_sum_{short(self.query.dtype)}", grid, (32, 8, 1), partial, self.gamma,
                    view(memory, "gradient"), splits, pitch, channels, pixels,
                    *self.strides(channels, pixels))  # fmt: skip
        return memory.transpose(1, 2) if self.channels_last else memory

    def splits(self, blocks: int, tiles: int, resident: int = 2) -> int:
        """Into how many shares the columns are split, for `resident` blocks on each multiprocessor."""
        return max(1, min(resident * self.device.multiprocessors // blocks, tiles))

    # ---- the passes ----

    def on_tensor_cores(self, delta: Array, needs: tuple[bool, ...]) -> tuple[Any, Any, Any]:
        B, D, C, N, M = self.sizes
        unit = self.mma
        assert unit is not None
        head, wide = (value for _, value in unit.defines)
        arrays = (self.query, self.key, self.value, self.grad)
        contiguous = (D, C) if self.channels_last else (N, M)
        aligned = all(n % 8 == 0 for n in contiguous) and all(array.pointer % 16 == 0 for array in arrays)
        suffix = f"{short(self.query.dtype)}_{'nhwc' if self.channels_last else 'nchw'}"

        def tile(channels: int, pixels: int) -> int:  # bytes of shared memory
            return 2 * (pixels * (channels + 8) if self.channels_last else channels * (pixels + 8))

        streamed = 2 * (tile(head, MMA_COLUMNS) + tile(wide, MMA_COLUMNS)) + 16 * MMA_COLUMNS

        def walk(kernel: str, rows: int, columns: int, *channels: int) -> list[Array]:
            blocks = _ceil(rows, MMA_ROWS)
            splits = self.splits(B * blocks, _ceil(columns, MMA_COLUMNS), 3 if kernel == "queries" else 2)
            shared = streamed + tile(head, MMA_ROWS) + (tile(wide, MMA_ROWS) if kernel == "keys" else 0)
            partial = [view(self.empty(splits, B, rows, pitch), "partial") for pitch in channels]
            self.launch(unit, f"backward_{kernel}_{suffix}", (blocks, splits, B), (THREADS, 1, 1), *arrays,
                        self.log_sum_exp, delta, *partial, D, C, N, M, aligned, shared=shared)  # fmt: skip
            return partial

        dquery = dkey = dvalue = None
        if needs[0]:
            (partial,) = walk("queries", N, M, head)
            dquery = self.sum(partial, D)
        if needs[1] or needs[2]:
            of_keys, of_values = walk("keys", M, N, head, wide)
            dkey = self.sum(of_keys, D) if needs[1] else None
            dvalue = self.sum(of_values, C) if needs[2] else None
        return dquery, dkey, dvalue

    def with_ordinary_arithmetic(self, delta: Array, needs: tuple[bool, ...]) -> tuple[Any, Any, Any]:
        B, D, C, N, M = self.sizes

        def walk(result: str, rows: int, columns: int, channels: int) -> Any:
            slab = 32 if channels <= 32 else 128
            blocks, slabs = _ceil(rows, SIMT_ROWS), _ceil(channels, slab)
            splits = self.splits(B * blocks * slabs, _ceil(columns, SIMT_COLUMNS))
            partial = view(self.empty(splits, B, rows, slabs * slab), "partial")
            self.launch(SIMT, f"backward_{result}_{short(self.query.dtype)}_{slab}", (blocks, slabs * splits, B),
                        (THREADS, 1, 1), self.query, self.key, self.value, self.grad, self.log_sum_exp, delta, partial,
                        D, C, N, M, self.channels_last, slabs * slab, slabs, shared=SIMT_SHARED)  # fmt: skip
            return self.sum(partial, channels)

        return (
            walk("query", N, M, D) if needs[0] else None,
            walk("key", M, N, D) if needs[1] else None,
            walk("value", M, N, C) if needs[2] else None,
        )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
