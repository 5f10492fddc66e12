"""Interleaved uint8 images to planes or features in [0, 1] for the networks, and back (kernels/image)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.kernels import _gradients
from dagan_rt.kernels._arrays import FLOATS, expect, new, short, stream_for, together, view
from dagan_rt.kernels._devices import Array, Launch, Unit
from dagan_rt.kernels._pixels import MOST_BLOCKS, pixel_stride

IMAGE = Unit("image", "image")
UNITS = (IMAGE,)
THREADS = 256  # of a block, as in the source


def image_to_planes(
    image: Any,
    *,
    dtype: str = "float32",
    layout: str = "nchw",
    out: Any = None,
    stream: Any = None,
    reference: bool = False,
) -> Any:
    """uint8 images as the networks take them: value / 255, [B, 3, H, W] in [0, 1].

    image: [B, H, W, 3] uint8 in [0, 255], of any strides (a crop is fine); contiguous ones are fastest.
    dtype: float32, float16 or bfloat16. layout: "nchw", or "nhwc" for channels-last memory.
    out: the array to write to, of any strides; dtype and layout then are its own. stream: where to run, else the
    current one. reference: run the PyTorch twin, on tensors of any device.

    Raises InputError if an array is not as said here, or if there is no GPU.
    """
    if dtype not in FLOATS:
        raise InputError(f"dtype must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}, got {dtype!r}")
    if layout not in ("nchw", "nhwc"):
        raise InputError(f"layout must be nchw or nhwc, got {layout!r}")
    if reference:
        return _planes_reference(image, dtype, layout, out)
    source = view(image, "image")
    expect("image", source, (None, None, None, 3), "uint8", axes="B H W 3")
    B, H, W, _ = source.shape
    if out is None:
        out = new(image, (B, 3, H, W), dtype, layout, stream)
    planes = view(out, "out")
    expect("out", planes, (B, 3, H, W), FLOATS, axes="B 3 H W")
    _launch("image_to_planes", source, planes, (source, planes), stream_for(image, stream))
    return out


def image_to_features(
    image: Any, *, dtype: str = "float16", out: Any = None, stream: Any = None, reference: bool = False
) -> Any:
    """uint8 images as a first convolution takes them: [B, 8, H, W], channels-last: red, green, blue, 1, 0, 0, 0, 0.

    Colours are value / 255. The 1 lets a convolution's zero padding tell inside from outside, so that a normalisation
    of the input folds into its weights; 8 channels are one vector of 16 bytes.

    image: [B, H, W, 3] uint8 in [0, 255], of any strides; B up to 65,535.
    dtype: float32, float16 or bfloat16. out: the array to write to, channels-last or a slice of 8 channels of such,
    aligned to 16 bytes; dtype then is its own. stream: where to run, else the current one. reference: run the PyTorch
    twin, on tensors of any device.

    Raises InputError if an array is not as said here, or if there is no GPU.
    """
    if dtype not in FLOATS:
        raise InputError(f"dtype must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}, got {dtype!r}")
    if reference:
        return _features_reference(image, dtype, out)
    source = view(image, "image")
    expect("image", source, (None, None, None, 3), "uint8", axes="B H W 3")
    B, H, W, _ = source.shape
    if B > MOST_BLOCKS or H * W >= 2**30:
        raise InputError(f"image may have B up to {MOST_BLOCKS} and H * W below 2^30, got {source.shape}")
    if out is None:
        out = new(image, (B, 8, H, W), dtype, "nhwc", stream)
    features = view(out, "out")
    expect("out", features, (B, 8, H, W), FLOATS, axes="B 8 H W")
    stride = pixel_stride("out", features)
    args = (source, *map(np.int64, source.strides), features, np.int64(stride), np.int32(H * W), np.int32(W))
    kernel, grid = f"image_to_features_{short(features.dtype)}", (-(-H * W // THREADS), B, 1)
    device = together(image=source, out=features)
    device.launch(Launch(IMAGE, kernel, grid, (THREADS, 1, 1), args, early=True), stream_for(image, stream))
    return out


def planes_to_image(
    planes: Any, *, sigmoid: bool = False, out: Any = None, stream: Any = None, reference: bool = False
) -> Any:
    """What a network paints as uint8 images: [B, H, W, 3], 255 · value rounded to nearest, ties to even.

    planes: [B, 3, H, W] float32, float16 or bfloat16, of any strides; contiguous and channels-last ones are fastest.
    Values are clamped to [0, 1]; NaN gives 0. sigmoid: the planes are logits, values are their sigmoid.
    out: the array to write to, uint8, of any strides. stream: where to run, else the current one.
    reference: run the PyTorch twin, on tensors of any device.

    Raises InputError if an array is not as said here, or if there is no GPU.
    """
    if reference:
        return _image_reference(planes, sigmoid, out)
    _gradients.refuse(planes=planes)
    source = view(planes, "planes")
    expect("planes", source, (None, 3, None, None), FLOATS, axes="B 3 H W")
    B, _, H, W = source.shape
    if out is None:
        out = new(planes, (B, H, W, 3), "uint8", stream=stream)
    image = view(out, "out")
    expect("out", image, (B, H, W, 3), "uint8", axes="B H W 3")
    _launch("planes_to_image", image, source, (source, image), stream_for(planes, stream), np.int32(sigmoid))
    return out


def _launch(
    name: str, image: Array, planes: Array, from_to: tuple[Array, Array], stream: int, *options: np.int32
) -> None:
    """Enqueue the version of a kernel that fits these arrays; `options` are its last arguments."""
    B, H, W, _ = image.shape
    pixels = H * W
    values = 4 if planes.dtype == "float32" else 8  # that a thread moves at once
    # As many bytes on the one side as values on the other, both at once; "nchw" is what a contiguous image is, too.
    fast = image.layout == "nchw" and image.pointer % values == 0 and planes.pointer % 16 == 0
    args: tuple[Any, ...]
    if fast and planes.layout == "nchw" and pixels % values == 0:
        version, blocks = "nchw", -(-pixels // (values * THREADS))
        grid, args = B * blocks, (*from_to, np.int64(pixels), np.int32(blocks))
    elif fast and planes.layout == "nhwc" and B * pixels * 3 % values == 0:
        version, groups = "nhwc", B * pixels * 3 // values
        grid, args = -(-groups // THREADS), (*from_to, np.int64(groups))
    else:
        version, grid = "any", -(-B * pixels // THREADS)
        sides = [it for array in from_to for it in (array, *map(np.int64, array.strides))]
        args = (*sides, np.int64(B * pixels), np.int32(H), np.int32(W))
    kernel = f"{name}_{short(planes.dtype)}_{version}"
    device = together(image=image, planes=planes)
    device.launch(Launch(IMAGE, kernel, (grid, 1, 1), (THREADS, 1, 1), (*args, *options)), stream)


def _planes_reference(image: Any, dtype: str, layout: str, out: Any) -> Any:
    import torch

    # By a tensor: on a GPU PyTorch multiplies by the rounded 1 / 255 of a number.
    planes = (image.permute(0, 3, 1, 2).float() / torch.full((), 255.0, device=image.device)).to(getattr(torch, dtype))
    if out is not None:
        return out.copy_(planes)
    return planes.contiguous(memory_format=torch.contiguous_format if layout == "nchw" else torch.channels_last)


def _features_reference(image: Any, dtype: str, out: Any) -> Any:
    import torch
    import torch.nn.functional as F

    colours = _planes_reference(image, dtype if out is None else "float32", "nchw", None)
    features = torch.cat([colours, torch.ones_like(colours[:, :1])], dim=1)
    features = F.pad(features, (0, 0, 0, 0, 0, 4))
    return features.contiguous(memory_format=torch.channels_last) if out is None else out.copy_(features)


def _image_reference(planes: Any, sigmoid: bool, out: Any) -> Any:
    import torch

    values = torch.sigmoid(planes.float()) if sigmoid else planes.float()
    levels = (values.nan_to_num(nan=0.0).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return levels.contiguous() if out is None else out.copy_(levels)
