"""The motion estimator's last step: motions blended into one flow, and an occlusion map (kernels/dense_flow)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.kernels import _gradients
from dagan_rt.kernels._arrays import FLOATS, expect, new, short, stream_for, together, view
from dagan_rt.kernels._devices import Launch, Unit
from dagan_rt.kernels.sparse_motion import MOST_BLOCKS, contiguous, key_points

DENSE_FLOW = Unit("dense_flow", "dense_flow")
UNITS = (DENSE_FLOW,)
PIXELS, GROUPS = 32, 8  # of a block, and threads of a pixel, as in the source


def dense_flow(
    mask: Any,
    occlusion: Any,
    source_value: Any,
    source_jacobian: Any,
    driving_value: Any,
    driving_jacobian: Any,
    *,
    out: tuple[Any, Any] | None = None,
    stream: Any = None,
    reference: bool = False,
) -> tuple[Any, Any]:
    """Logits of the motion estimator to `(flow [B, h, w, 2], occlusion [B, 1, h, w])`, both float32 and contiguous.

    flow: Σ softmax(mask)_k T_k(z), (x, y) in [-1, 1] of the source, where T_0 is the identity and T_k the motion
    J_s J_d⁻¹ (z - d) + s of key point k. A singular driving Jacobian gives infinity or NaN, as does a grid with h or w
    of 1, which has no coordinates. occlusion: the sigmoid of its logit, 1 is visible in the source.

    mask: [B, K + 1, h, w] logits, background first, float32, float16 or bfloat16. occlusion: [B, 1, h, w] of its dtype.
    Both may have any strides: slices of one array of K + 2 channels, in either layout.
    source_value, driving_value: [B, K, 2] float32, (x, y) in [-1, 1], contiguous; K is 1 to 63.
    source_jacobian, driving_jacobian: [B, K, 2, 2] float32, contiguous. Nothing is broadcast over the batch.
    out: the two arrays to write to, float32 and contiguous. stream: where to run, else the current one.
    reference: run the PyTorch twin, on tensors of any device.

    Raises InputError if an array is not as said here, or if there is no GPU.
    """
    points = (source_value, source_jacobian, driving_value, driving_jacobian)
    if reference:
        return _reference(mask, occlusion, *points, out)
    _gradients.refuse(
        mask=mask, occlusion=occlusion, source_value=source_value, source_jacobian=source_jacobian,
        driving_value=driving_value, driving_jacobian=driving_jacobian,
    )  # fmt: skip
    logits, hidden = view(mask, "mask"), view(occlusion, "occlusion")
    expect("mask", logits, (None, None, None, None), FLOATS, axes="B K+1 h w")
    B, motions, h, w = logits.shape
    expect("occlusion", hidden, (B, 1, h, w), logits.dtype, axes="B 1 h w")
    checked = key_points("mask", logits, *points)
    K = checked["source_value"].shape[1]
    if motions != K + 1:
        raise InputError(f"mask must have K + 1 = {K + 1} channels, the background first, got {motions}")
    if B > MOST_BLOCKS or h * w > 2**31 - PIXELS:
        raise InputError(f"mask may have B up to {MOST_BLOCKS} and h · w below 2^31, got {logits.shape}")

    if out is None:
        out = new(mask, (B, h, w, 2), "float32", stream=stream), new(mask, (B, 1, h, w), "float32", stream=stream)
    flow, visible = view(out[0], "out[0]"), view(out[1], "out[1]")
    expect("out[0]", flow, (B, h, w, 2), "float32", axes="B h w 2")
    expect("out[1]", visible, (B, 1, h, w), "float32", axes="B 1 h w")
    if not (contiguous(flow) and contiguous(visible)) or flow.pointer % 8:
        raise InputError("out must be two contiguous arrays, the flow at a multiple of 8 bytes: leave it out")

    # A pixel's threads are neighbours where its channels are.
    version = "nhwc" if logits.strides[1] == 1 else "nchw"
    strides = (*logits.strides, hidden.strides[0], *hidden.strides[2:])
    args = (logits, hidden, *checked.values(), flow, visible, *map(np.int64, strides), *map(np.int32, (K, h, w)))
    grid, block = (-(-h * w // PIXELS), B, 1), (PIXELS * GROUPS, 1, 1)
    device = together(mask=logits, occlusion=hidden, **checked, flow=flow, visible=visible)
    kernel = f"dense_flow_{short(logits.dtype)}_{version}"
    launch = Launch(DENSE_FLOW, kernel, grid, block, args, early=True)
    device.launch(launch, stream_for(mask, stream))
    return out


def _reference(mask: Any, occlusion: Any, *rest: Any) -> tuple[Any, Any]:
    """As `networks.motion.MotionEstimator.forward` does it; the geometry in the key points' dtype."""
    import torch

    from dagan_rt.keypoints import KeyPoints
    from dagan_rt.networks.motion import sparse_flows

    source_value, source_jacobian, driving_value, driving_jacobian, out = rest
    source, driving = KeyPoints(source_value, source_jacobian), KeyPoints(driving_value, driving_jacobian)
    flows = sparse_flows(source, driving, *mask.shape[2:])
    flow = (torch.softmax(mask, dim=1)[..., None] * flows).sum(dim=1)
    visible = torch.sigmoid(occlusion).to(flows.dtype).contiguous()
    return (flow, visible) if out is None else (out[0].copy_(flow), out[1].copy_(visible))
