"""Batch norm with frozen statistics and ReLU, channels-last (kernels/normalize)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.kernels import _gradients
from dagan_rt.kernels._arrays import FLOATS, expect, new, short, stream_for, together, view
from dagan_rt.kernels._devices import Launch, Unit
from dagan_rt.kernels._pixels import block_of, pixel_stride, vectors

NORMALIZE = Unit("normalize", "normalize")
UNITS = (NORMALIZE,)
PIXELS = 4  # of a thread, as in the source


def normalize_relu(
    x: Any, scale: Any, shift: Any, *, out: Any = None, stream: Any = None, reference: bool = False
) -> Any:
    """relu(x · scale + shift) channel by channel, computed in float32: [B, C, H, W]. NaN stays NaN.

    x: float32, float16 or bfloat16, channels-last or a slice of channels of such, aligned to 16 bytes, C a multiple of
    8 (float32: 4). scale, shift: [C] float32, contiguous, aligned to 16 bytes: of a batch norm γ / √(σ² + ε) and
    β - μ γ / √(σ² + ε).
    out: the array to write to, as x is, and perhaps x itself. stream: where to run, else the current one.
    reference: run the PyTorch twin, on tensors of any device and layout.

    Raises InputError if an array is not as said here, or if there is no GPU.
    """
    if reference:
        return _reference(x, scale, shift, out)
    _gradients.refuse(x=x, scale=scale, shift=shift)
    source = view(x, "x")
    expect("x", source, (None, None, None, None), FLOATS, axes="B C H W")
    B, C, H, W = source.shape
    affine = {"scale": view(scale, "scale"), "shift": view(shift, "shift")}
    for name, array in affine.items():
        expect(name, array, (C,), "float32", axes="C")
        if (C > 1 and array.strides != (1,)) or array.pointer % 16:
            raise InputError(
                f"{name} must be contiguous and start at a multiple of 16 bytes, got the strides {array.strides} at "
                f"{array.pointer:#x}: copy it"
            )
    x_stride = pixel_stride("x", source)
    if out is None:
        out = new(x, source.shape, source.dtype, "nhwc", stream)
    target = view(out, "out")
    expect("out", target, source.shape, source.dtype, axes="B C H W")
    strides = np.int64(x_stride), np.int64(pixel_stride("out", target))
    block = block_of(vectors(source))
    args = (source, *affine.values(), target, *strides, np.int64(B * H * W), np.int32(vectors(source)))
    grid = (-(-B * H * W // (PIXELS * block[1])), 1, 1)
    device = together(x=source, **affine, out=target)
    device.launch(
        Launch(NORMALIZE, f"normalize_relu_{short(source.dtype)}", grid, block, args, early=True), stream_for(x, stream)
    )
    return out


def _reference(x: Any, scale: Any, shift: Any, out: Any) -> Any:
    import torch

    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.relu(x.to(wide) * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last) if out is None else out.copy_(y)
