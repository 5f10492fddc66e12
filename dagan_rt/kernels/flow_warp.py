"""Flow-field warp: a feature sampled where a flow points, weighted by an occlusion map (kernels/flow_warp)."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.kernels._arrays import FLOATS, expect, new, short, stream_for, together, view
from dagan_rt.kernels._devices import Array, Device, Launch, Unit

# Pixels of which a thread of the channels-last version has all corners under way.
IN_FLIGHT = 2
# Shared memory that planes of an NCHW feature may take in a block; with 0 they are sampled from device memory.
PLANE_BYTES = 100 << 10
# How many groups of planes a block samples, one after the other, where that leaves blocks enough.
PLANE_GROUPS = 2

FORWARD = Unit("flow_warp", "flow_warp", (("IN_FLIGHT", IN_FLIGHT),))
BACKWARD = Unit("flow_warp", "flow_warp_backward")
UNITS = (FORWARD, BACKWARD)


def flow_warp(
    feature: Any,
    flow: Any,
    occlusion: Any = None,
    *,
    align_corners: bool = False,
    out: Any = None,
    stream: Any = None,
    reference: bool = False,
) -> Any:
    """`feature` sampled bilinearly at `flow`, zeros outside, times `occlusion`: [B, C, H, W], laid out as the feature.

    feature: [B, C, H, W] float32, float16 or bfloat16, contiguous or channels-last.
    flow: [B, h, w, 2], (x, y) in [-1, 1], float32 or of the feature's dtype; resized bilinearly (align_corners=False)
    to H × W where it has another size. A sample whose place is not finite is zero, and gives no gradient.
    occlusion: [B, 1, h, w] of the flow's dtype, resized like it; None is 1 everywhere.
    align_corners: what -1 and 1 mean, as in `torch.nn.functional.grid_sample`.
    out: the array to write to, like the feature in shape, dtype and layout, and not the feature itself.
    stream: where to run, else the current stream. reference: run the PyTorch twin, on tensors of any device.

    PyTorch tensors that require a gradient get it from a kernel too, summed in float32.
    Raises InputError if an array is not as said here, or if there is no GPU.
    """
    if reference:
        warped = _reference(feature, flow, occlusion, align_corners)
        return warped if out is None else out.copy_(warped)
    if _wants_gradient(feature, flow, occlusion):
        if out is not None:
            raise InputError("out cannot be given where a gradient is asked for: leave it out, or use torch.no_grad()")
        return _function().apply(feature, flow, occlusion, align_corners, stream)
    return _forward(feature, flow, occlusion, align_corners, out, stream)


def _forward(feature: Any, flow: Any, occlusion: Any, align_corners: bool, out: Any, stream: Any) -> Any:
    source, field, device, dtypes = _checked(feature, flow, occlusion, align_corners)
    if out is None:
        out = new(feature, source.shape, source.dtype, source.layout or "nchw", stream)
    target = view(out, "out")
    expect("out", target, source.shape, source.dtype, "B C H W")
    if target.layout != source.layout:
        raise InputError(f"out must be laid out as feature ({source.layout}), got the strides {target.strides}")
    together(feature=source, out=target)

    aligned = source.pointer | target.pointer
    version, grid, block, last, shared = (
        _tiles(source, aligned, device, IN_FLIGHT)
        if source.layout == "nhwc"
        else _planes(source, aligned, device) or _pixels(source, aligned, device)
    )
    args = (source, *field, target, np.int32(source.shape[1]), *last)
    launch = Launch(FORWARD, f"flow_warp_{dtypes}_{version}", grid, block, args, shared)
    device.launch(launch, stream_for(feature, stream))
    return out


def _backward(
    grad_output: Any, feature: Any, flow: Any, occlusion: Any, align_corners: bool, wanted: tuple[bool, ...]
) -> tuple[Any, ...]:
    """Gradients of the tensors feature, flow and occlusion, None where not wanted."""
    import torch

    source, field, device, dtypes = _checked(feature, flow, occlusion, align_corners)
    layout = torch.channels_last if source.layout == "nhwc" else torch.contiguous_format
    gradient = view(grad_output.contiguous(memory_format=layout), "the gradient of the output")
    tensors = ((feature, layout), (flow, torch.contiguous_format), (occlusion, torch.contiguous_format))
    sums = [
        torch.zeros_like(tensor, dtype=torch.float32, memory_format=order) if want else None
        for (tensor, order), want in zip(tensors, wanted, strict=True)
    ]

    aligned = source.pointer | gradient.pointer
    version, grid, block, last, shared = (
        _tiles(source, aligned, device, 1) if source.layout == "nhwc" else _pixels(source, 1, device)
    )
    buffers = [None if sum is None else view(sum, "a gradient") for sum in sums]
    args = (gradient, source, *field, *buffers, np.int32(source.shape[1]), *last)
    launch = Launch(BACKWARD, f"flow_warp_backward_{dtypes}_{version}", grid, block, args, shared)
    device.launch(launch, stream_for(feature))
    return tuple(None if sum is None else sum.to(of.dtype) for sum, (of, _) in zip(sums, tensors, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# What was given


def _checked(
    feature: Any, flow: Any, occlusion: Any, align_corners: bool
) -> tuple[Array, tuple[Any, ...], Device, str]:
    """The feature; the arguments that describe flow and occlusion to a kernel; the device; their dtypes in its name."""
    source, motion = view(feature, "feature"), view(flow, "flow")
    mask = None if occlusion is None else view(occlusion, "occlusion")
    expect("feature", source, (None,) * 4, FLOATS, "B C H W")
    B, _, H, W = source.shape
    expect("flow", motion, (B, None, None, 2), tuple(dict.fromkeys(("float32", source.dtype))), "B h w 2")
    h, w = motion.shape[1:3]
    if mask is not None:
        expect("occlusion", mask, (B, 1, h, w), motion.dtype, "B 1 h w")
    if source.layout is None:
        raise InputError(f"feature must be contiguous or channels-last, got the strides {source.strides}: copy it")
    if B > 65535 or max(H * W, h * w) > 1 << 30:
        raise InputError(f"a batch has at most 65535 images of at most 2^30 pixels, got {source.shape}: split it")

    field = (
        motion,
        mask,
        *map(np.int32, (h, w, H, W, align_corners)),
        np.float32(h / H),
        np.float32(w / W),
        np.int32(motion.strides[3]),
        np.int32(_pixel_stride("flow", h, w, *motion.strides[1:3])),
        np.int32(0 if mask is None else _pixel_stride("occlusion", h, w, *mask.strides[2:])),
        np.int64(motion.strides[0]),
        np.int64(0 if mask is None else mask.strides[0]),
    )
    device = together(feature=source, flow=motion, occlusion=mask)
    return source, field, device, f"{short(source.dtype)}_{short(motion.dtype)}"


def _pixel_stride(name: str, h: int, w: int, y_stride: int, x_stride: int) -> int:
    """Elements from one pixel to the next, row after row."""
    if w == 1:
        return y_stride
    if h > 1 and y_stride != w * x_stride:
        strides = (y_stride, x_stride)
        raise InputError(f"{name} must have its rows one after the other, got the strides {strides}: copy it")
    return x_stride


# ---------------------------------------------------------------------------------------------------------------------
# Launches: the kernel's version, grid, block, last arguments and bytes of shared memory. `aligned`: the addresses of
# feature and output, or-ed.

Shape = tuple[str, tuple[int, int, int], tuple[int, int, int], tuple[Any, ...], int]


def _tiles(source: Array, aligned: int, device: Device, in_flight: int) -> Shape:
    """Channels-last: blocks of 256 threads on square tiles of pixels, the larger the more pixels there are."""
    B, C, H, W = source.shape
    per_thread = 16 // _itemsize(source)
    vector = C % per_thread == 0 and aligned % 16 == 0
    lanes = min(32, _power_of_two(-(-C // per_thread) if vector else C))
    slots = min(256 // lanes, 256 // in_flight)
    pixels = slots * in_flight
    while pixels < 256 and 8 * pixels * device.multiprocessors <= B * H * W:
        pixels *= 2
    width = min(_power_of_two(round(pixels**0.5)), _power_of_two(W))
    height = pixels // width
    grid = (-(-W // width), -(-H // height), B)
    last = (np.int32(width.bit_length() - 1), np.int32(height))
    return "nhwc_vector" if vector else "nhwc", grid, (lanes, slots, 1), last, 32 * pixels


def _planes(source: Array, aligned: int, device: Device) -> Shape | None:
    """NCHW in shared memory: 16 bytes of each pixel at a time, or 4 where those make few blocks; None if neither."""
    B, C, H, W = source.shape
    size = _itemsize(source)
    if H * W % 2 or aligned % (2 * size):
        return None
    for pixel_bytes in (16, 4):
        channels, shared = pixel_bytes // size, (H * W + 1) * pixel_bytes
        blocks = B * C // channels
        if C % channels or shared > min(PLANE_BYTES, device.shared_per_block):
            continue
        if pixel_bytes == 4 or blocks >= device.multiprocessors:
            groups = PLANE_GROUPS if blocks >= 2 * PLANE_GROUPS * device.multiprocessors else 1
            grid = (-(-C // (channels * groups)), 1, B)
            threads = min(512, -(-H * W // 64) * 32)
            return f"planes_{pixel_bytes}", grid, (threads, 1, 1), (np.int32(groups),), shared
    return None


def _pixels(source: Array, aligned: int, device: Device) -> Shape:
    """NCHW of any size: a thread owns one pixel, or two adjacent ones, in as many planes as leaves blocks enough."""
    B, C, H, W = source.shape
    pairs = H * W % 2 == 0 and aligned % (2 * _itemsize(source)) == 0
    blocks = -(-H * W // (256 if pairs else 128))
    channels = 32
    while channels > 4 and B * blocks * -(-C // channels) < 8 * device.multiprocessors:
        channels //= 2
    grid = (blocks, -(-C // channels), B)
    return "nchw_pairs" if pairs else "nchw", grid, (128, 1, 1), (np.int32(channels),), 0


def _itemsize(array: Array) -> int:
    return 4 if array.dtype == "float32" else 2


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch


def _reference(feature: Any, flow: Any, occlusion: Any, align_corners: bool) -> Any:
    """The same in PyTorch, in the wider of the dtypes of feature and flow."""
    import torch
    import torch.nn.functional as F

    from dagan_rt.networks.geometry import resize_flow, resize_map

    H, W = feature.shape[2:]
    dtype = torch.promote_types(feature.dtype, flow.dtype)
    flow = resize_flow(flow.to(dtype), H, W)
    # grid_sample makes NaN of places that are not finite on the CPU, zeros on a GPU. All beyond ±4 is outside anyway.
    finite = flow.isfinite().all(-1)
    flow = torch.where(finite[..., None], flow.clamp(-4, 4), 0)
    # Contiguous: of a channels-last feature in 16 bits, grid_sample leaves parts of its result unwritten on the CPU.
    feature, kind = feature.to(dtype).contiguous(), feature.dtype
    warped = F.grid_sample(feature, flow, mode="bilinear", padding_mode="zeros", align_corners=align_corners)
    warped = torch.where(finite[:, None], warped, 0)
    if occlusion is not None:
        warped = warped * resize_map(occlusion.to(dtype), H, W)
    return warped.to(kind)


def _wants_gradient(*arrays: Any) -> bool:
    return any(getattr(array, "requires_grad", False) for array in arrays) and sys.modules["torch"].is_grad_enabled()


@cache
def _function() -> Any:
    """The autograd.Function, made when it is first needed: PyTorch is not imported before."""
    import torch
    from torch.autograd.function import once_differentiable

    class FlowWarp(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, feature: Any, flow: Any, occlusion: Any, align_corners: bool, stream: Any
        ) -> torch.Tensor:
            ctx.save_for_backward(feature, flow, occlusion)
            ctx.align_corners = align_corners
            return _forward(feature, flow, occlusion, align_corners, None, stream)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
            feature, flow, occlusion = ctx.saved_tensors
            wanted = ctx.needs_input_grad[:3]
            return *_backward(grad_output, feature, flow, occlusion, ctx.align_corners, wanted), None, None

    return FlowWarp
