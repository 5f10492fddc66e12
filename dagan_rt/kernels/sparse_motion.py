"""The motion estimator's input: a thumbnail moved by each key point, and heat maps (kernels/sparse_motion)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.kernels import _gradients
from dagan_rt.kernels._arrays import FLOATS, expect, new, short, stream_for, together, view
from dagan_rt.kernels._devices import Array, Launch, Unit

SPARSE_MOTION = Unit("sparse_motion", "sparse_motion")
UNITS = (SPARSE_MOTION,)
# As in the sources: the most motions (key points and the background), and the tile of pixels of a block.
MOST_MOTIONS = 64
MOST_THREADS = 512
TILES = {"nchw": (16, 2), "nhwc": (8, 4)}  # width, height: 32 pixels
MOST_BLOCKS = 65535  # along the second and third axis of a grid


def sparse_motion(
    thumbnail: Any,
    source_value: Any,
    source_jacobian: Any,
    driving_value: Any,
    driving_jacobian: Any,
    *,
    layout: str | None = None,
    out: Any = None,
    stream: Any = None,
    reference: bool = False,
) -> Any:
    """What the motion estimator's hourglass takes, as `networks.motion` stacks it: [B, 4 (K + 1), h, w].

    Channels 4 k … 4 k + 3 belong to the background (k = 0) or key point k: the Gaussian around the driving point less
    that around the source point (zero for the background), then the thumbnail's three channels sampled where the
    motion T(z) = J_s J_d⁻¹ (z - d) + s of the point says. Samples outside, or at coordinates that are not finite, are
    zero: those of a singular driving Jacobian, and all where h or w is 1, whose grid has no coordinates (0 / 0); its
    heat maps are NaN there, as the reference's are.

    thumbnail: [B, 3, h, w] float32, float16 or bfloat16, of any strides: the source shrunken to the estimator's grid.
    source_value, driving_value: [B, K, 2] float32, (x, y) in [-1, 1], contiguous; K is 1 to 63.
    source_jacobian, driving_jacobian: [B, K, 2, 2] float32, contiguous. Nothing is broadcast over the batch.
    layout: "nchw" or "nhwc" (channels-last) of the result; None: the thumbnail's.
    out: the array to write to, of the thumbnail's dtype, contiguous or channels-last; its layout is then taken.
    stream: where to run, else the current one. reference: run the PyTorch twin, on tensors of any device.

    Raises InputError if an array is not as said here, or if there is no GPU.
    """
    if layout not in ("nchw", "nhwc", None):
        raise InputError(f"layout must be nchw, nhwc or None, got {layout!r}")
    if reference:
        return _reference(thumbnail, source_value, source_jacobian, driving_value, driving_jacobian, layout, out)
    _gradients.refuse(
        thumbnail=thumbnail, source_value=source_value, source_jacobian=source_jacobian, driving_value=driving_value,
        driving_jacobian=driving_jacobian,
    )  # fmt: skip
    image = view(thumbnail, "thumbnail")
    expect("thumbnail", image, (None, 3, None, None), FLOATS, axes="B 3 h w")
    points = key_points("thumbnail", image, source_value, source_jacobian, driving_value, driving_jacobian)
    B, _, h, w = image.shape
    motions = points["source_value"].shape[1] + 1
    if sum((n - 1) * abs(stride) for n, stride in zip(image.shape[1:], image.strides[1:], strict=True)) >= 2**31:
        raise InputError(f"thumbnail must span less than 2^31 elements a face, got the strides {image.strides}")

    if out is None:
        out = new(thumbnail, (B, 4 * motions, h, w), image.dtype, layout or image.layout or "nchw", stream)
    stacked = view(out, "out")
    expect("out", stacked, (B, 4 * motions, h, w), image.dtype, axes="B 4(K+1) h w")
    version = stacked.layout
    bytes_at_once = 16 if image.dtype == "float32" else 8
    if version is None or (version == "nhwc" and stacked.pointer % bytes_at_once):
        raise InputError(
            f"out must be contiguous or channels-last, and channels-last ones start at a multiple of {bytes_at_once} "
            f"bytes, got the strides {stacked.strides} at {stacked.pointer:#x}"
        )

    width, height = TILES[version]
    grid = (-(-w // width), -(-h // height), B)
    if max(grid[1:]) > MOST_BLOCKS:
        raise InputError(f"thumbnail may have B up to {MOST_BLOCKS} and h up to {2 * MOST_BLOCKS}, got {image.shape}")
    # Threads that are neighbours in a block write neighbours in memory.
    block = (motions, min(32, MOST_THREADS // motions), 1) if version == "nhwc" else (32, min(motions, 16), 1)
    strides = (np.int64(image.strides[0]), *map(np.int32, image.strides[1:]))
    args = (image, *points.values(), stacked, *strides, np.int32(motions - 1), np.int32(h), np.int32(w))
    kernel = f"sparse_motion_{short(image.dtype)}_{version}"
    device = together(thumbnail=image, **points, out=stacked)
    device.launch(Launch(SPARSE_MOTION, kernel, grid, block, args, early=True), stream_for(thumbnail, stream))
    return out


def key_points(name: str, image: Array, *arrays: Any) -> dict[str, Array]:
    """Source and driving values and Jacobians, checked, by name. `image`, called `name`, says what B is."""
    names = ("source_value", "source_jacobian", "driving_value", "driving_jacobian")
    views = {it: view(array, it) for it, array in zip(names, arrays, strict=True)}
    expect("source_value", views["source_value"], (None, None, 2), "float32", axes="B K 2")
    B, K = image.shape[0], views["source_value"].shape[1]
    if K >= MOST_MOTIONS:
        raise InputError(f"source_value must hold at most {MOST_MOTIONS - 1} key points, got {K}")
    for it, array in views.items():
        if array.shape[0] != B:
            raise InputError(
                f"{it} must have the batch of {name}, {B}, got {array.shape[0]}: nothing is broadcast, so repeat it"
            )
        shape, axes = ((B, K, 2), "B K 2") if it.endswith("value") else ((B, K, 2, 2), "B K 2 2")
        expect(it, array, shape, "float32", axes=axes)
        if not contiguous(array):
            raise InputError(f"{it} must be contiguous, got the strides {array.strides}: copy it")
    return views


def contiguous(array: Array) -> bool:
    """Whether elements lie one after the other in the order of the axes."""
    step = 1
    for length, stride in zip(reversed(array.shape), reversed(array.strides), strict=True):
        if length != 1 and stride != step:
            return False
        step *= length
    return True


def _reference(thumbnail: Any, *rest: Any) -> Any:
    """As `networks.motion.MotionEstimator.forward` does it; the geometry in the key points' dtype."""
    import torch

    from dagan_rt.keypoints import KeyPoints
    from dagan_rt.networks.geometry import gaussian_heatmaps, sample
    from dagan_rt.networks.motion import sparse_flows

    source_value, source_jacobian, driving_value, driving_jacobian, layout, out = rest
    B, _, h, w = thumbnail.shape
    flows = sparse_flows(KeyPoints(source_value, source_jacobian), KeyPoints(driving_value, driving_jacobian), h, w)
    # Beyond 3 every sample is zero; grid_sample leaves open what NaN and infinity give.
    flows = torch.where((flows.abs() <= 3).all(-1, keepdim=True), flows, 3.0).to(thumbnail.dtype)
    motions = flows.shape[1]
    copies = thumbnail[:, None].expand(-1, motions, -1, -1, -1).reshape(B * motions, 3, h, w)
    deformed = sample(copies, flows.reshape(B * motions, h, w, 2)).reshape(B, motions, 3, h, w)
    difference = gaussian_heatmaps(driving_value, h, w) - gaussian_heatmaps(source_value, h, w)
    heatmaps = torch.cat([torch.zeros_like(difference[:, :1]), difference], dim=1).to(thumbnail.dtype)
    stacked = torch.cat([heatmaps[:, :, None], deformed], dim=2).reshape(B, 4 * motions, h, w)
    if out is not None:
        return out.copy_(stacked)
    last = not thumbnail.is_contiguous() and thumbnail.is_contiguous(memory_format=torch.channels_last)
    nhwc = last if layout is None else layout == "nhwc"
    return stacked.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
