"""The operations of `dagan_rt.kernels` as the benchmark sees them: inputs, exact results, and what each must cost.

B batch; H × W image, h × w feature map and flow; N = h·w; C channels; D channels of queries; K key points; s bytes of a
number. Bytes count every input once and every output once, flops a multiplication and an addition as two.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dagan_rt.benchmarking import peers
from dagan_rt.benchmarking.suites import Case, Shapes

SIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
FLOW_SPREAD = 3.0  # pixels, how far a smooth flow strays from the identity
POINT_BYTES = 2 * (2 + 4) * 4  # value and jacobian of a key point of the source and of the driving frame, float32


@dataclass(frozen=True)
class Operation:
    """One operation, or the backward pass of one."""

    draw: Callable[[Draw], tuple[Any, ...]]
    exact: Callable[..., Any]  # float64 in, float64 out
    kernel: str  # the function of dagan_rt.kernels
    options: Callable[[Case], dict[str, Any]]
    cost: str  # as people read it
    bytes: Callable[[int, Shapes, int], float]  # (B, shapes, s)
    flops: Callable[[int, Shapes], float]
    tolerance: dict[str, float]  # of a result, by dtype
    forward: str  # the operation, which a backward pass shares its peers with
    backward: bool = False  # the gradients of all inputs; the last input is then the output's gradient
    matrix: bool = False  # matrix products: measured against those of the same dtype
    warps: bool = False  # has a flow


class Draw:
    """Random inputs of a case on a device, the same at every draw."""

    def __init__(self, case: Case, shapes: Shapes, device: Any) -> None:
        import torch

        self.case, self.shapes, self.device = case, shapes, device
        self.dtype = getattr(torch, case.dtype)
        self._generator = torch.Generator(device).manual_seed(zlib.crc32(str(case).encode()))

    def normal(self, *shape: int) -> Any:
        """Float32 [*shape], of mean 0 and deviation 1."""
        import torch

        return torch.randn(shape, generator=self._generator, device=self.device)

    def uniform(self, *shape: int) -> Any:
        """Float32 [*shape] in [0, 1)."""
        import torch

        return torch.rand(shape, generator=self._generator, device=self.device)

    def map(self, channels: int, side: int, relu: bool = False) -> Any:
        """A feature map [B, channels, side, side] in the case's dtype and layout."""
        import torch

        values = self.normal(self.case.batch, channels, side, side)
        form = torch.channels_last if self.case.layout == "nhwc" else torch.contiguous_format
        return (values.relu() if relu else values).to(self.dtype).contiguous(memory_format=form)

    def points(self) -> tuple[Any, ...]:
        """Key points of a source and of a driving frame that moved a little: value, jacobian, value, jacobian."""
        import torch

        B, K = self.case.batch, self.shapes.points
        value = 1.6 * self.uniform(B, K, 2) - 0.8
        jacobian = torch.eye(2, device=self.device) + 0.1 * self.normal(B, K, 2, 2)
        moved = jacobian + 0.05 * self.normal(B, K, 2, 2)
        return value, jacobian, value + 0.05 * self.normal(B, K, 2), moved

    def flow(self) -> Any:
        """Float32 [B, h, w, 2]: identity and a smooth motion of some pixels, or points anywhere.

        Kept a hundredth of a pixel off the pixels' centres: across one the gradient of bilinear sampling jumps, so that
        rounding alone would decide which of two right values a result is compared with.
        """
        import torch
        import torch.nn.functional as F

        from dagan_rt.networks.geometry import coordinate_grid

        B, side = self.case.batch, self.shapes.feature
        if self.case.flow == "scatter":
            flow = 2.2 * self.uniform(B, side, side, 2) - 1.1
        else:
            motion = F.interpolate(self.normal(B, 2, 5, 5), size=(side, side), mode="bicubic", align_corners=True)
            grid = coordinate_grid(side, side, motion)
            flow = grid + motion.permute(0, 2, 3, 1) * FLOW_SPREAD * 2 / side
        pixel = ((flow + 1) * side - 1) / 2
        pixel = pixel.floor() + (pixel - pixel.floor()).clamp(0.01, 0.99)
        return torch.add(2 * pixel, 1).div(side).sub(1).contiguous()


def _image(draw: Draw) -> tuple[Any, ...]:
    import torch

    side = draw.shapes.image
    return ((256 * draw.uniform(draw.case.batch, side, side, 3)).to(torch.uint8),)


def _planes(draw: Draw) -> tuple[Any, ...]:
    return (2 * draw.map(3, draw.shapes.image),)


def _sparse_motion(draw: Draw) -> tuple[Any, ...]:
    return draw.map(3, draw.shapes.feature).sigmoid(), *draw.points()


def _dense_flow(draw: Draw) -> tuple[Any, ...]:
    side = draw.shapes.feature
    return 2 * draw.map(draw.shapes.points + 1, side), 2 * draw.map(1, side), *draw.points()


def _flow_warp(draw: Draw) -> tuple[Any, ...]:
    side = draw.shapes.feature
    return draw.map(draw.shapes.channels, side), draw.flow(), draw.uniform(draw.case.batch, 1, side, side)


def _cross_attention(draw: Draw) -> tuple[Any, ...]:
    # Queries, keys and values come out of a ReLU.
    D, C, side = draw.shapes.queries, draw.shapes.channels, draw.shapes.feature
    query, key, value = draw.map(D, side, relu=True), draw.map(D, side, relu=True), draw.map(C, side, relu=True)
    return query, key, value, draw.map(C, side), 0.5 + draw.uniform(1)


def _with_gradient(drawn: Callable[[Draw], tuple[Any, ...]]) -> Callable[[Draw], tuple[Any, ...]]:
    return lambda draw: (*drawn(draw), draw.map(draw.shapes.channels, draw.shapes.feature))


def _attend_exactly(query: Any, key: Any, value: Any, residual: Any, gamma: Any) -> Any:
    """One sample at a time: in float64 the logits of a batch are many gigabytes."""
    import torch

    samples = zip(query.split(1), key.split(1), value.split(1), residual.split(1), strict=True)
    return torch.cat([peers.naive_attention(q, k, v, r, gamma) for q, k, v, r in samples])


def _motion_bytes(B: int, shapes: Shapes, maps_in: float, maps_out: float) -> float:
    return B * (shapes.feature**2 * (maps_in + maps_out) + shapes.points * POINT_BYTES)


def _map_bytes(B: int, shapes: Shapes, channels: float) -> float:
    return B * shapes.feature**2 * channels


OPERATIONS: dict[str, Operation] = {
    "image_to_planes": Operation(
        draw=_image,
        exact=lambda image: image.permute(0, 3, 1, 2) / 255,
        kernel="image_to_planes",
        options=lambda case: {"dtype": case.dtype, "layout": case.layout},
        cost="B·3·H·W·(1 + s) bytes, B·3·H·W flops",
        bytes=lambda B, shapes, s: B * 3 * shapes.image**2 * (1 + s),
        flops=lambda B, shapes: B * 3 * shapes.image**2,
        tolerance={"float16": 1e-3, "bfloat16": 6e-3, "float32": 1e-6},
        forward="image_to_planes",
    ),
    "planes_to_image": Operation(
        draw=_planes,
        exact=lambda planes: (planes.sigmoid() * 255).round().permute(0, 2, 3, 1),
        kernel="planes_to_image",
        options=lambda case: {"sigmoid": True},
        cost="B·3·H·W·(1 + s) bytes, B·3·H·W·8 flops",
        bytes=lambda B, shapes, s: B * 3 * shapes.image**2 * (1 + s),
        flops=lambda B, shapes: B * 3 * shapes.image**2 * 8,
        tolerance={"float16": 1e-3, "bfloat16": 1e-3, "float32": 1e-3},  # a value between two levels falls to either
        forward="planes_to_image",
    ),
    "sparse_motion": Operation(
        draw=_sparse_motion,
        exact=peers.sparse_motion,
        kernel="sparse_motion",
        options=lambda case: {"layout": case.layout},
        cost="B·(h·w·(3 + 4·(K + 1))·s + 48·K) bytes, B·(K + 1)·h·w·50 flops",
        bytes=lambda B, shapes, s: _motion_bytes(B, shapes, 3 * s, 4 * (shapes.points + 1) * s),
        flops=lambda B, shapes: B * (shapes.points + 1) * shapes.feature**2 * 50,
        tolerance={"float16": 1e-3, "bfloat16": 6e-3, "float32": 1e-4},
        forward="sparse_motion",
    ),
    "dense_flow": Operation(
        draw=_dense_flow,
        exact=peers.dense_flow,
        kernel="dense_flow",
        options=lambda case: {},
        cost="B·(h·w·((K + 2)·s + 12) + 48·K) bytes, B·(K + 1)·h·w·20 flops",
        bytes=lambda B, shapes, s: _motion_bytes(B, shapes, (shapes.points + 2) * s, 12),
        flops=lambda B, shapes: B * (shapes.points + 1) * shapes.feature**2 * 20,
        tolerance={"float16": 1e-3, "bfloat16": 6e-3, "float32": 1e-4},
        forward="dense_flow",
    ),
    "flow_warp": Operation(
        draw=_flow_warp,
        exact=peers.flow_warp,
        kernel="flow_warp",
        options=lambda case: {},
        cost="B·h·w·(2·C·s + 12) bytes, B·h·w·C·9 flops",
        bytes=lambda B, shapes, s: _map_bytes(B, shapes, 2 * shapes.channels * s + 12),
        flops=lambda B, shapes: _map_bytes(B, shapes, 9 * shapes.channels),
        tolerance={"float16": 1e-3, "bfloat16": 6e-3, "float32": 1e-4},
        forward="flow_warp",
        warps=True,
    ),
    "flow_warp_backward": Operation(
        draw=_with_gradient(_flow_warp),
        exact=peers.flow_warp,
        kernel="flow_warp",
        options=lambda case: {},
        cost="B·h·w·(3·C·s + 24) bytes, B·h·w·C·25 flops (of feature, flow and occlusion)",
        bytes=lambda B, shapes, s: _map_bytes(B, shapes, 3 * shapes.channels * s + 24),
        flops=lambda B, shapes: _map_bytes(B, shapes, 25 * shapes.channels),
        tolerance={"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-3},
        forward="flow_warp",
        backward=True,
        warps=True,
    ),
    "cross_attention": Operation(
        draw=_cross_attention,
        exact=_attend_exactly,
        kernel="cross_attention",
        options=lambda case: {},
        cost="B·N·(2·D + 3·C)·s bytes, B·2·N²·(D + C) flops",
        bytes=lambda B, shapes, s: _map_bytes(B, shapes, (2 * shapes.queries + 3 * shapes.channels) * s),
        flops=lambda B, shapes: B * 2 * shapes.feature**4 * (shapes.queries + shapes.channels),
        tolerance={"float16": 5e-3, "bfloat16": 4e-2, "float32": 1e-4},
        forward="cross_attention",
        matrix=True,
    ),
    "cross_attention_backward": Operation(
        draw=_with_gradient(_cross_attention),
        exact=_attend_exactly,
        kernel="cross_attention",
        options=lambda case: {},
        cost="B·N·(4·D + 3·C)·s bytes, B·2·N²·(3·D + 2·C) flops (logits computed anew; of all inputs and gamma)",
        bytes=lambda B, shapes, s: _map_bytes(B, shapes, (4 * shapes.queries + 3 * shapes.channels) * s),
        flops=lambda B, shapes: B * 2 * shapes.feature**4 * (3 * shapes.queries + 2 * shapes.channels),
        tolerance={"float16": 1e-2, "bfloat16": 8e-2, "float32": 1e-3},
        forward="cross_attention",
        backward=True,
        matrix=True,
    ),
}


def bind(operation: Operation, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], tuple[Any, ...]]:
    """What is timed: the function on the inputs, or after one forward pass its backward pass. Outputs as a tuple."""
    if not operation.backward:

        def forward() -> tuple[Any, ...]:
            outputs = function(*inputs)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return forward

    import torch

    *given, gradient = inputs
    leaves = [value.detach().requires_grad_() for value in given]
    output = function(*leaves)
    return lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True)


def exactly(operation: Operation, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The result in float64."""
    outputs = bind(operation, operation.exact, tuple(value.double() for value in inputs))()
    return tuple(output.detach() for output in outputs)


def ours(operation: Operation, case: Case, reference: bool) -> Callable[..., Any]:
    """The kernel as users call it; `reference`: its PyTorch twin. AttributeError where there is none yet."""
    from dagan_rt import kernels

    function = getattr(kernels, operation.kernel)
    options = operation.options(case) | ({"reference": True} if reference else {})
    return lambda *inputs: function(*inputs, **options)
