"""Key points: soft arg-max of heat maps with local frames, and relative transfer (kernels/keypoints)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.kernels import _gradients
from dagan_rt.kernels._arrays import FLOATS, expect, new, short, stream_for, together, view
from dagan_rt.kernels._devices import Array, Launch, Unit
from dagan_rt.kernels._pixels import MOST_BLOCKS
from dagan_rt.kernels.sparse_motion import contiguous

KEYPOINTS = Unit("keypoints", "keypoints")
UNITS = (KEYPOINTS,)
# As in the source: pixels of a tile, and the most key points of a block.
TILE, MOST_POINTS = 32, 16
PART_BYTES = 32  # what a share of the tiles leaves of a key point
THREADS = 128  # of a block of `transfer`


def soft_keypoints(
    logits: Any, *, temperature: float = 0.1, out: Any = None, stream: Any = None, reference: bool = False
) -> tuple[Any, Any]:
    """Positions [B, K, 2] and local frames [B, K, 2, 2] of K key points, float32, as `networks.keypoints` has them.

    The softmax of a key point's logits / temperature over all pixels weighs the pixels' coordinates, (x, y) in
    [-1, 1], corner-aligned, and its four Jacobian maps. All is summed in float32, in an order that does not vary.
    NaN where the logits hold NaN or infinity, and along a side of one pixel, whose grid has no coordinates (0 / 0).

    logits: [B, 5 K, h, w] float32, float16 or bfloat16: K heat maps, then the maps of the frames, channel K + 4 k + j
    for entry j of key point k. Pixels evenly spaced in memory (NCHW, channels-last, or a slice of channels of either).
    temperature: positive. out: the pair of arrays to write to, float32, contiguous.
    stream: where to run, else the current one. reference: run the PyTorch twin, on tensors of any device.

    Raises InputError if an array is not as said here, or if there is no GPU.
    """
    if not 1e-30 < temperature < math.inf:
        raise InputError(f"temperature must be a positive number, got {temperature}")
    if reference:
        return _reference(logits, temperature, out)
    _gradients.refuse(logits=logits)
    maps = view(logits, "logits")
    expect("logits", maps, (None, None, None, None), FLOATS, axes="B 5K h w")
    B, channels, h, w = maps.shape
    K, rest = divmod(channels, 5)
    stride_b, stride_c, row, step = maps.strides
    span = (channels - 1) * abs(stride_c) + (h - 1) * abs(row) + (w - 1) * abs(step)  # of a face, in elements
    if rest or B > MOST_BLOCKS or span >= 2**30:
        raise InputError(
            f"logits must be [B, 5 K, h, w], B up to {MOST_BLOCKS} and a face below 2^30 elements, got {maps.shape}"
        )
    if w == 1:
        step = row
    if h > 1 and row != w * step:
        raise InputError(f"logits must have evenly spaced pixels, got the strides {maps.strides}: copy it")
    out, results = _results(logits, out, B, K, stream)
    device = together(logits=maps, **results)
    stream = stream_for(logits, stream)

    groups = -(-K // MOST_POINTS)
    points, tiles = -(-K // groups), -(-h * w // TILE)
    # As many blocks as run at once, two on each multiprocessor.
    each = -(-tiles // max(1, 2 * device.multiprocessors // (B * groups)))  # tiles of a share
    shares = -(-tiles // each)
    parts = arrived = None
    if shares > 1:
        parts = device.workspace(stream, PART_BYTES * B * K * shares)
        arrived = device.workspace(stream, 4 * B * groups, zeroed=True)
    strides = np.int64(stride_b), np.int32(stride_c), np.int32(step)
    sharpness = np.float32(math.log2(math.e) / temperature)
    args = (maps, *strides, *results.values(), parts, arrived, sharpness, *map(np.int32, (K, h, w, each)))
    kernel = f"soft_keypoints_{short(maps.dtype)}_{'nhwc' if abs(stride_c) < abs(step) else 'nchw'}"
    device.launch(Launch(KEYPOINTS, kernel, (shares, groups, B), (32 * points, 1, 1), args, early=True), stream)
    return out


def transfer(
    source_value: Any,
    source_jacobian: Any,
    driving_value: Any,
    driving_jacobian: Any,
    initial_value: Any,
    initial_jacobian: Any,
    scale: Any,
    *,
    out: Any = None,
    stream: Any = None,
    reference: bool = False,
) -> tuple[Any, Any]:
    """The source's key points moved as the driving face's have moved from the initial ones: values and frames.

    value = source + scale · (driving - initial), frame = J_driving J_initial⁻¹ J_source, as `dagan_rt.transfer` does
    it. The frame of a singular initial Jacobian is not finite.

    values: [B, K, 2] float32, (x, y) in [-1, 1]; Jacobians: [B, K, 2, 2] float32; scale: [B, 1] float32. All are
    contiguous, and nothing is broadcast over the batch.
    out: the pair of arrays to write to, float32, contiguous; perhaps the driving ones. stream: where to run, else the
    current one. reference: run the PyTorch twin, on tensors of any device.

    Raises InputError if an array is not as said here, or if there is no GPU.
    """
    given = {
        "source_value": source_value, "source_jacobian": source_jacobian, "driving_value": driving_value,
        "driving_jacobian": driving_jacobian, "initial_value": initial_value, "initial_jacobian": initial_jacobian,
    }  # fmt: skip
    if reference:
        return _transfer_reference(given, scale, out)
    _gradients.refuse(**given, scale=scale)
    views = {name: view(array, name) for name, array in given.items()}
    expect("source_value", views["source_value"], (None, None, 2), "float32", axes="B K 2")
    B, K, _ = views["source_value"].shape
    for name, array in views.items():
        _expect_points(name, array, B, K)
    views["scale"] = view(scale, "scale")
    expect("scale", views["scale"], (B, 1), "float32", axes="B 1")
    if not contiguous(views["scale"]):
        raise InputError(f"scale must be contiguous, got the strides {views['scale'].strides}: copy it")
    out, results = _results(source_value, out, B, K, stream)
    args = (*views.values(), *results.values(), np.int32(K), np.int32(B * K))
    launch = Launch(KEYPOINTS, "transfer_f32", (-(-B * K // THREADS), 1, 1), (THREADS, 1, 1), args, early=True)
    together(**views, **results).launch(launch, stream_for(source_value, stream))
    return out


def _expect_points(name: str, array: Array, B: int, K: int) -> None:
    """Values or Jacobians of K key points, as the last word of the name says."""
    shape, axes = ((B, K, 2), "B K 2") if name.endswith("value") else ((B, K, 2, 2), "B K 2 2")
    expect(name, array, shape, "float32", axes=axes)
    if not contiguous(array):
        raise InputError(f"{name} must be contiguous, got the strides {array.strides}: copy it")


def _results(like: Any, out: Any, B: int, K: int, stream: Any) -> tuple[tuple[Any, Any], dict[str, Array]]:
    """The pair to write to, or a new one, and both checked by name."""
    value, jacobian = out or [new(like, (B, K, *rest), "float32", stream=stream) for rest in ((2,), (2, 2))]
    views = {"out_value": view(value, "out_value"), "out_jacobian": view(jacobian, "out_jacobian")}
    for name, array in views.items():
        _expect_points(name, array, B, K)
    return (value, jacobian), views


def _reference(logits: Any, temperature: float, out: Any) -> tuple[Any, Any]:
    """As `networks.keypoints.KeypointEstimator.forward` does it, in float32, or float64 of such logits."""
    import torch

    from dagan_rt.networks.geometry import coordinate_grid

    B, channels, h, w = logits.shape
    K = channels // 5
    maps = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(B, channels, h * w)
    heatmap = torch.softmax(maps[:, :K] / temperature, dim=2)
    value = torch.matmul(heatmap, coordinate_grid(h, w, heatmap).reshape(h * w, 2))
    jacobian = torch.matmul(maps[:, K:].reshape(B, K, 4, h * w), heatmap[..., None]).reshape(B, K, 2, 2)
    return _given(out, value, jacobian)


def _transfer_reference(given: dict[str, Any], scale: Any, out: Any) -> tuple[Any, Any]:
    """As `export.subnetworks` has it in its graph."""
    import torch

    from dagan_rt.networks.geometry import invert_2x2

    moved = given["driving_value"] - given["initial_value"]
    value = given["source_value"] + scale[:, :, None] * moved
    turned = torch.matmul(given["driving_jacobian"], invert_2x2(given["initial_jacobian"]))
    return _given(out, value, torch.matmul(turned, given["source_jacobian"]))


def _given(out: Any, *results: Any) -> Any:
    """The results, in the arrays to write to if there are such."""
    return results if out is None else tuple(to.copy_(it) for to, it in zip(out, results, strict=True))
