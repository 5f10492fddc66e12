"""The key-point estimator's input: blur and every n-th pixel of image and depth (kernels/antialias)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.kernels import _gradients
from dagan_rt.kernels._arrays import FLOATS, expect, new, short, stream_for, together, view
from dagan_rt.kernels._devices import Array, Launch, Unit
from dagan_rt.kernels._pixels import MOST_BLOCKS, THREADS, pixel_stride
from dagan_rt.kernels.sparse_motion import contiguous

ANTIALIAS = Unit("antialias", "antialias")
UNITS = (ANTIALIAS,)
WIDTH, HEIGHT = 8, 4  # of a block's tile, as in the source


def antialias(
    image: Any,
    depth: Any,
    weight: Any,
    *,
    step: int = 4,
    out: Any = None,
    stream: Any = None,
    reference: bool = False,
) -> Any:
    """`networks.blocks.AntiAliasDownsample` of image and depth: [B, 8, ⌈H/step⌉, ⌈W/step⌉], channels-last.

    Channels are red, green, blue, depth (0 without) and four zeros: one vector of 16 bytes of a concatenation. Each is
    filtered with `weight`, zeros around the image, and every step-th pixel kept; sums are float32.

    image: [B, 3 or more, H, W] float32, float16 or bfloat16, of any strides; its first three channels are used.
    depth: [B, 1, H, W] of the image's dtype or float32, of any strides, or None. weight: [n, n] float32, n odd,
    contiguous. step: 1 or more.
    out: the array to write to, of the image's dtype, channels-last or a slice of 8 channels of such, aligned to 16
    bytes. stream: where to run, else the current one. reference: run the PyTorch twin, on tensors of any device.

    Raises InputError if an array is not as said here, or if there is no GPU.
    """
    if reference:
        return _reference(image, depth, weight, step, out)
    _gradients.refuse(image=image, depth=depth, weight=weight)
    colours, taps = view(image, "image"), view(weight, "weight")
    expect("image", colours, (None, None, None, None), FLOATS, axes="B C H W")
    B, C, H, W = colours.shape
    if C < 3 or B > MOST_BLOCKS:
        raise InputError(f"image must have 3 channels or more, and B up to {MOST_BLOCKS}, got {colours.shape}")
    far = None if depth is None else view(depth, "depth")
    if far is not None:
        expect("depth", far, (B, 1, H, W), (colours.dtype, "float32"), axes="B 1 H W")
    n = _taps(taps, step)
    h, w = -(-H // step), -(-W // step)
    if out is None:
        out = new(image, (B, 8, h, w), colours.dtype, "nhwc", stream)
    target = view(out, "out")
    expect("out", target, (B, 8, h, w), colours.dtype, axes="B 8 h w")
    depth_strides = (0, 0, 0) if far is None else (far.strides[0], *far.strides[2:])
    args = (
        colours, *map(np.int64, colours.strides), far, *map(np.int64, depth_strides), taps, target,
        np.int64(pixel_stride("out", target)), *map(np.int32, (H, W, h, w, n, step)),
    )  # fmt: skip
    grid = (-(-w // WIDTH), -(-h // HEIGHT), B)
    if grid[1] > MOST_BLOCKS:
        raise InputError(f"image may have H up to {MOST_BLOCKS * HEIGHT * step}, got {H}")
    device = together(image=colours, depth=far, weight=taps, out=target)
    shared = 16 * ((WIDTH - 1) * step + n) * ((HEIGHT - 1) * step + n) + 8 * n * n  # a tile's inputs, and the taps
    if shared > device.shared_per_block:
        raise InputError(
            f"weight [{n}, {n}] at step {step} needs {shared} bytes of shared memory, {device.name} has "
            f"{device.shared_per_block}"
        )
    kernel = f"antialias_{short(colours.dtype)}_{short(far.dtype if far else colours.dtype)}"
    device.launch(Launch(ANTIALIAS, kernel, grid, (THREADS, 1, 1), args, shared, early=True), stream_for(image, stream))
    return out


def _taps(weight: Array, step: int) -> int:
    """Taps along an axis, once weight and step are as they must be."""
    expect("weight", weight, (None, None), "float32", axes="n n")
    n = weight.shape[0]
    if weight.shape != (n, n) or n % 2 == 0 or not contiguous(weight):
        raise InputError(f"weight must be [n, n], n odd, contiguous, got {weight.shape} of strides {weight.strides}")
    if step < 1:
        raise InputError(f"step must be 1 or more, got {step}")
    return n


def _reference(image: Any, depth: Any, weight: Any, step: int, out: Any) -> Any:
    import torch
    import torch.nn.functional as F

    wide = torch.promote_types(image.dtype, torch.float32)
    channels = image[:, :3].to(wide)
    if depth is not None:
        channels = torch.cat([channels, depth.to(wide)], dim=1)
    count = channels.shape[1]
    kernel = weight.to(wide).expand(count, 1, *weight.shape)
    filtered = F.conv2d(channels, kernel, stride=step, padding=weight.shape[0] // 2, groups=count)
    filtered = F.pad(filtered, (0, 0, 0, 0, 0, 8 - count)).to(image.dtype)
    return filtered.contiguous(memory_format=torch.channels_last) if out is None else out.copy_(filtered)
