"""3 × 3 max pooling with stride 2, channels-last (kernels/pooling)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.kernels import _gradients
from dagan_rt.kernels._arrays import FLOATS, expect, new, short, stream_for, together, view
from dagan_rt.kernels._devices import Launch, Unit
from dagan_rt.kernels._pixels import MOST_BLOCKS, block_of, pixel_stride, vectors

POOLING = Unit("pooling", "pooling")
UNITS = (POOLING,)


def max_pool(x: Any, *, out: Any = None, stream: Any = None, reference: bool = False) -> Any:
    """Maximum of 3 × 3 pixels, stride 2, padding 1, as a ResNet's stem has it: [B, C, H, W] -> [B, C, ⌈H/2⌉, ⌈W/2⌉].

    NaN where the window holds one.

    x: float32, float16 or bfloat16, channels-last or a slice of channels of such, aligned to 16 bytes, C a multiple of
    8 (float32: 4). out: the array to write to, likewise, of x's dtype. stream: where to run, else the current one.
    reference: run the PyTorch twin, on tensors of any device and layout.

    Raises InputError if an array is not as said here, or if there is no GPU.
    """
    if reference:
        return _reference(x, out)
    _gradients.refuse(x=x)
    source = view(x, "x")
    expect("x", source, (None, None, None, None), FLOATS, axes="B C H W")
    B, C, H, W = source.shape
    h, w = (H + 1) // 2, (W + 1) // 2
    if max(B, h) > MOST_BLOCKS or H * W >= 2**31:
        raise InputError(f"x may have B up to {MOST_BLOCKS}, H up to {2 * MOST_BLOCKS}, got {source.shape}")
    x_stride = pixel_stride("x", source)
    if out is None:
        out = new(x, (B, C, h, w), source.dtype, "nhwc", stream)
    target = view(out, "out")
    expect("out", target, (B, C, h, w), source.dtype, axes="B C h w")
    strides = np.int64(x_stride), np.int64(pixel_stride("out", target))
    block = block_of(vectors(source))
    args = (source, target, *strides, *map(np.int32, (H, W, h, w, vectors(source))))
    launch = Launch(POOLING, f"max_pool_{short(source.dtype)}", (-(-w // block[1]), h, B), block, args, early=True)
    together(x=source, out=target).launch(launch, stream_for(x, stream))
    return out


def _reference(x: Any, out: Any) -> Any:
    import torch
    import torch.nn.functional as F

    pooled = F.max_pool2d(x, 3, 2, 1)
    return pooled.contiguous(memory_format=torch.channels_last) if out is None else out.copy_(pooled)
