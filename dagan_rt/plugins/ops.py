"""The four custom operators of ONNX domain `dagan_rt`: their tensors, shapes, and the kernel that computes each.

| operator         | in -> out                                                            | of `dagan_rt.kernels` |
|------------------|----------------------------------------------------------------------|-----------------------|
| `FlowWarp`       | feature, flow, occlusion -> warped                                   | `flow_warp`           |
| `CrossAttention` | query, key, value, residual, gamma -> attended                       | `cross_attention`     |
| `SparseMotion`   | thumbnail, key points of source and driving -> the estimator's input | `sparse_motion`       |
| `DenseFlow`      | mask and occlusion logits, key points of both -> flow, occlusion     | `dense_flow`          |

Everything that speaks of them (the surgery of graphs, the plugins of TensorRT, tests) reads this table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

DOMAIN = "dagan_rt"  # of the operators in ONNX, and the namespace of the plugins
VERSION = "1"
ANY = "T"  # one type for all tensors marked so: float32, float16 or bfloat16
FLOAT = "float32"

Shape = Sequence[Any]  # numbers, or a library's expressions for them, which can be added and multiplied


@dataclass(frozen=True)
class Op:
    """One operator."""

    name: str
    inputs: dict[str, str]  # by name, in order: ANY or FLOAT
    outputs: dict[str, str]
    shapes: Callable[..., list[Shape]]  # shapes of the inputs -> shapes of the outputs
    kernel: str  # the function of `dagan_rt.kernels`
    attributes: tuple[str, ...] = field(default=())  # integers, 0 unless the node says otherwise

    @property
    def types(self) -> list[str]:
        """ANY or FLOAT of every input, then of every output."""
        return [*self.inputs.values(), *self.outputs.values()]

    def run(self, inputs: Sequence[Any], attributes: dict[str, int], **how: Any) -> Any:
        """The kernel on arrays in the order of `inputs`; `how` is its `out` and `stream`, or `reference`."""
        from dagan_rt import kernels

        options = {name: bool(value) for name, value in attributes.items()}
        return getattr(kernels, self.kernel)(*inputs, **options, **how)


_KEY_POINTS = dict.fromkeys(("source_value", "source_jacobian", "driving_value", "driving_jacobian"), FLOAT)


def _stacked(thumbnail: Shape, source_value: Shape, *rest: Shape) -> list[Shape]:
    batch, _, height, width = thumbnail
    return [[batch, source_value[1] * 4 + 4, height, width]]


def _flow_and_occlusion(mask: Shape, occlusion: Shape, *rest: Shape) -> list[Shape]:
    batch, _, height, width = mask
    return [[batch, height, width, 2], occlusion]


OPS = {
    op.name: op
    for op in (
        Op(
            "FlowWarp",
            {"feature": ANY, "flow": FLOAT, "occlusion": FLOAT},
            {"warped": ANY},
            lambda feature, *rest: [feature],
            "flow_warp",
            ("align_corners",),
        ),
        Op(
            "CrossAttention",
            {"query": ANY, "key": ANY, "value": ANY, "residual": ANY, "gamma": FLOAT},
            {"attended": ANY},
            lambda query, key, value, residual, gamma: [residual],
            "cross_attention",
        ),
        Op("SparseMotion", {"thumbnail": ANY, **_KEY_POINTS}, {"stacked": ANY}, _stacked, "sparse_motion"),
        Op(
            "DenseFlow",
            {"mask": ANY, "occlusion": ANY, **_KEY_POINTS},
            {"flow": FLOAT, "visible": FLOAT},
            _flow_and_occlusion,
            "dense_flow",
        ),
    )
}
