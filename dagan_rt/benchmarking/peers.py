"""What the kernels are compared with: the same computations by PyTorch, in the best forms known to us.

"eager"           the networks' own functions, in half precision with coordinates in float32
"eager, T flow"   coordinates in the dtype of the feature: less exact, and allowed a larger error for that
"naive"           attention as two batched matrix products around a softmax
"sdpa BACKEND [SxE]"  PyTorch's fused attention. As it stands, with values wider than queries, or cut into S heads of E
                  channels of the values, which all share the queries and keys, zero-padded to E: backends that want one
                  width for all (flash) accept that, and at S > 1 have S times as many blocks to spread
"flex"            flex_attention, which is meant to be compiled
"compile FORM", "compile-max FORM"  torch.compile of a form, mode default or max-autotune-no-cudagraphs

Forms return whatever memory layout they arrive at; converting it is not held against them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.keypoints import KeyPoints

COMPILED = {"compile": "default", "compile-max": "max-autotune-no-cudagraphs"}
SDPA = re.compile(r"sdpa (math|flash|efficient|cudnn)(?: (\d+)x(\d+))?")
LOOSER = {"eager, T flow": 40.0}  # times the tolerance


def image_to_planes(dtype: Any, layout: str) -> Callable[..., Any]:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] in [0, 1]."""

    def run(image: Any) -> Any:
        planes = image.permute(0, 3, 1, 2)
        planes = planes.contiguous() if layout == "nchw" else planes
        return planes.to(dtype) / 255

    return run


def planes_to_image(planes: Any) -> Any:
    """Sigmoid, then [B, 3, H, W] -> [B, H, W, 3] uint8."""
    import torch

    levels = (torch.sigmoid(planes.float()) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


def sparse_motion(
    thumbnail: Any, source_value: Any, source_jacobian: Any, driving_value: Any, driving_jacobian: Any
) -> Any:
    """The estimator's input [B, 4 (K + 1), h, w], as networks/motion.py makes it."""
    import torch

    from dagan_rt.networks.geometry import gaussian_heatmaps, sample
    from dagan_rt.networks.motion import sparse_flows

    B, _, H, W = thumbnail.shape
    source, driving = KeyPoints(source_value, source_jacobian), KeyPoints(driving_value, driving_jacobian)
    flows = sparse_flows(source, driving, H, W)
    points = flows.shape[1]
    copies = thumbnail.to(flows.dtype)[:, None].expand(-1, points, -1, -1, -1).reshape(B * points, 3, H, W)
    deformed = sample(copies, flows.reshape(B * points, H, W, 2)).reshape(B, points, 3, H, W)
    difference = gaussian_heatmaps(driving.value, H, W) - gaussian_heatmaps(source.value, H, W)
    heatmaps = torch.cat([torch.zeros_like(difference[:, :1]), difference], dim=1)
    return torch.cat([heatmaps[:, :, None], deformed], dim=2).reshape(B, points * 4, H, W).to(thumbnail.dtype)


def dense_flow(
    mask: Any, occlusion: Any, source_value: Any, source_jacobian: Any, driving_value: Any, driving_jacobian: Any
) -> tuple[Any, Any]:
    """Flow [B, h, w, 2] and occlusion [B, 1, h, w] out of the estimator's logits, as networks/motion.py makes them."""
    import torch

    from dagan_rt.networks.motion import sparse_flows

    source, driving = KeyPoints(source_value, source_jacobian), KeyPoints(driving_value, driving_jacobian)
    flows = sparse_flows(source, driving, *mask.shape[2:])
    weights = torch.softmax(mask.to(flows.dtype), dim=1)
    return (weights[..., None] * flows).sum(dim=1), torch.sigmoid(occlusion.to(flows.dtype))


def flow_warp(feature: Any, flow: Any, occlusion: Any) -> Any:
    """The warped, occlusion-weighted feature [B, C, h, w], as networks/generator.py makes it."""
    from dagan_rt.networks.geometry import resize_flow, resize_map, sample

    H, W = feature.shape[2:]
    warped = sample(feature.to(flow.dtype), resize_flow(flow, H, W))
    return (warped * resize_map(occlusion, H, W)).to(feature.dtype)


def flow_warp_in_half(feature: Any, flow: Any, occlusion: Any) -> Any:
    """The same, the coordinates too in the feature's dtype."""
    if not feature.is_cuda and feature.element_size() == 2:
        # It counts the elements of a feature map in 16 bits too, and reads outside it.
        raise InputError("PyTorch's grid_sample takes no coordinates in half precision on the CPU that can be trusted")
    return flow_warp(feature, flow.to(feature.dtype), occlusion.to(feature.dtype))


def naive_attention(query: Any, key: Any, value: Any, residual: Any, gamma: Any) -> Any:
    """gamma · softmax(QᵀK) · V + residual, as networks/attention.py makes it."""
    from dagan_rt.networks.attention import cross_attention

    attended = cross_attention(query.flatten(2), key.flatten(2), value.flatten(2))
    return _finish(attended.reshape(residual.shape), residual, gamma)


def sdpa(backend: str, heads: int = 0, width: int = 0) -> Callable[..., Any]:
    """Attention by one of PyTorch's backends; with values of `heads` · `width` channels cut into heads."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }

    def run(query: Any, key: Any, value: Any, residual: Any, gamma: Any) -> Any:
        q, k, v = _rows(query), _rows(key), _rows(value)
        if heads:
            B, N, C = v.shape[0], v.shape[2], v.shape[3]
            if heads * width != C or q.shape[3] > width:
                raise InputError(f"{heads} heads of {width} do not hold {C} channels and queries of {q.shape[3]}")
            v = v.reshape(B, N, heads, width).transpose(1, 2)
            q, k = (F.pad(each, (0, width - each.shape[3])).expand(B, heads, -1, width) for each in (q, k))
        with sdpa_kernel(backends[backend]):
            attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)  # [B, heads, N, width]
        return _finish(_columns(attended, residual), residual, gamma)

    return run


def flex_attention(query: Any, key: Any, value: Any, residual: Any, gamma: Any) -> Any:
    """Attention by flex_attention."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    attended = flex(_rows(query), _rows(key), _rows(value), scale=1.0)
    return _finish(_columns(attended, residual), residual, gamma)


def _rows(feature: Any) -> Any:
    """[B, E, h, w] -> [B, 1, N, E], the rows contiguous: copied for NCHW, a view of channels-last memory."""
    return feature.flatten(2).transpose(1, 2)[:, None].contiguous()


def _columns(attended: Any, like: Any) -> Any:
    """[B, heads, N, width] -> [B, heads · width, h, w]."""
    return attended.transpose(2, 3).reshape(like.shape)


def _finish(attended: Any, residual: Any, gamma: Any) -> Any:
    return gamma.to(attended.dtype) * attended + residual


def known(op: str, name: str) -> bool:
    """Whether `form` makes it."""
    first, _, rest = name.partition(" ")
    if first in COMPILED:
        return known(op, rest)
    if op == "cross_attention":
        return name in ("naive", "flex") or SDPA.fullmatch(name) is not None
    return name == "eager" or (op == "flow_warp" and name == "eager, T flow")


def needs_compiler(name: str) -> bool:
    """Whether it takes seconds to make."""
    return name.partition(" ")[0] in COMPILED


def form(op: str, name: str, dtype: Any, layout: str) -> Callable[..., Any]:
    """The function of a name."""
    first, _, rest = name.partition(" ")
    if first in COMPILED:
        return _compiled(form(op, rest, dtype, layout), COMPILED[first])
    matched = SDPA.fullmatch(name)
    if matched:
        return sdpa(matched[1], int(matched[2] or 0), int(matched[3] or 0))
    named: dict[str, dict[str, Callable[..., Any]]] = {
        "image_to_planes": {"eager": image_to_planes(dtype, layout)},
        "planes_to_image": {"eager": planes_to_image},
        "sparse_motion": {"eager": sparse_motion},
        "dense_flow": {"eager": dense_flow},
        "flow_warp": {"eager": flow_warp, "eager, T flow": flow_warp_in_half},
        "cross_attention": {"naive": naive_attention, "flex": flex_attention},
    }
    return named[op][name]


def _compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    import torch
    import torch._functorch.config as functorch

    torch._dynamo.reset()  # else the ninth shape of a function would be run eagerly
    functorch.donated_buffer = False  # a backward pass is repeated over what its forward pass kept
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)
