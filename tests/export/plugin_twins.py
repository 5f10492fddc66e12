"""The operators of domain `dagan_rt` for onnx's reference evaluator, written a second time in plain PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx.reference.op_run import OpRun
from torch import Tensor


def _grid(height: int, width: int) -> Tensor:
    y, x = (torch.linspace(-1, 1, size) for size in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def _motions(ks: Tensor, js: Tensor, kd: Tensor, jd: Tensor, height: int, width: int) -> Tensor:
    """[B, K + 1, h, w, 2]: where each motion sends each pixel."""
    grid = _grid(height, width)
    away = grid[None, None] - kd[:, :, None, None]
    moved = torch.einsum("bkij,bkyxj->bkyxi", js @ torch.linalg.inv(jd), away) + ks[:, :, None, None]
    return torch.cat([grid.expand(len(ks), 1, -1, -1, -1), moved], 1)


def flow_warp(feature: Tensor, flow: Tensor, occlusion: Tensor, align_corners: int = 0) -> Tensor:
    size = feature.shape[2:]
    flow, occlusion = flow.permute(0, 3, 1, 2), occlusion
    if flow.shape[2:] != size:
        flow, occlusion = (F.interpolate(it, size=size, mode="bilinear") for it in (flow, occlusion))
    warped = F.grid_sample(feature.float(), flow.permute(0, 2, 3, 1), align_corners=bool(align_corners))
    return (warped * occlusion).to(feature.dtype)


def cross_attention(query: Tensor, key: Tensor, value: Tensor, residual: Tensor, gamma: Tensor) -> Tensor:
    q, k, v = (it.flatten(2).double() for it in (query, key, value))
    attended = torch.einsum("bcm,bnm->bcn", v, torch.softmax(torch.einsum("bdn,bdm->bnm", q, k), -1))
    return (gamma * attended.reshape(residual.shape) + residual).to(residual.dtype)


def sparse_motion(thumbnail: Tensor, ks: Tensor, js: Tensor, kd: Tensor, jd: Tensor) -> Tensor:
    height, width = thumbnail.shape[2:]
    motions = _motions(ks, js, kd, jd, height, width)

    def heat(points: Tensor) -> Tensor:
        distance = (_grid(height, width)[None, None] - points[:, :, None, None]).square().sum(-1)
        return torch.exp(-0.5 * distance / 0.01)

    heats = F.pad(heat(kd) - heat(ks), (0, 0, 0, 0, 1, 0))
    parts = []
    for k in range(motions.shape[1]):
        parts += [heats[:, k : k + 1], F.grid_sample(thumbnail.float(), motions[:, k], align_corners=False)]
    return torch.cat(parts, 1).to(thumbnail.dtype)


def dense_flow(
    mask: Tensor, occlusion: Tensor, ks: Tensor, js: Tensor, kd: Tensor, jd: Tensor
) -> tuple[Tensor, Tensor]:
    motions = _motions(ks, js, kd, jd, *mask.shape[2:])
    weights = torch.softmax(mask.float(), 1)
    return (weights[..., None] * motions).sum(1), torch.sigmoid(occlusion.float())


TWINS = {
    "FlowWarp": flow_warp,
    "CrossAttention": cross_attention,
    "SparseMotion": sparse_motion,
    "DenseFlow": dense_flow,
}


def _op(name: str) -> type[OpRun]:
    """An operator class as the reference evaluator finds it: by its name and domain."""

    def run(self: Any, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
        options = {key: value for key, value in attributes.items() if not key.startswith("plugin_") and value}
        found = TWINS[name](*(torch.from_numpy(np.array(it)) for it in inputs), **options)
        return tuple(it.numpy() for it in (found if isinstance(found, tuple) else (found,)))

    if name == "FlowWarp":  # the evaluator passes attributes by the names of `_run`'s arguments

        def _run(self: Any, x: Any, f: Any, o: Any, align_corners: Any = None, plugin_namespace: Any = None,
                 plugin_version: Any = None) -> Any:  # fmt: skip
            return run(self, x, f, o, align_corners=align_corners)
    else:

        def _run(self: Any, *inputs: Any, plugin_namespace: Any = None, plugin_version: Any = None) -> Any:
            return run(self, *inputs)

    return type(name, (OpRun,), {"_run": _run, "op_domain": "dagan_rt"})


EVALUATED = [_op(name) for name in TWINS]
