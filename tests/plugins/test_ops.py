"""The table of operators: shapes and kernels agree with each other and with PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dagan_rt.plugins.ops import OPS

from ..export.plugin_twins import TWINS

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

POINTS = [(2, 4, 2), (2, 4, 2, 2)] * 2
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "FlowWarp": [(2, 6, 11, 9), (2, 6, 7, 2), (2, 1, 6, 7)],
    "CrossAttention": [(2, 16, 4, 6), (2, 16, 4, 6), (2, 20, 4, 6), (2, 20, 4, 6), (1,)],
    "SparseMotion": [(2, 3, 6, 10), *POINTS],
    "DenseFlow": [(2, 5, 6, 7), (2, 1, 6, 7), *POINTS],
}


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> Iterator[Any]:
    """An emulated GPU that CPU tensors lie on."""
    import emulated

    emulated.FOLDER = request.config.cache.mkdir("emulation")
    with emulated.emulation(emulated.EmulatedDevice()) as device:
        yield device


def _inputs(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = []
    for (key, kind), shape in zip(OPS[name].inputs.items(), SHAPES[name], strict=True):
        values = torch.randn(shape, generator=generator) * (0.3 if key.endswith("value") or key == "flow" else 1)
        if key.endswith("jacobian"):
            values = torch.eye(2) + 0.1 * values
        tensors.append(values.to(dtype if kind == "T" else torch.float32))
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(OPS))
def test_the_kernel_computes_the_operator_into_the_shapes(name: str, dtype: torch.dtype, emulated: Any) -> None:
    """As a plugin calls it: into memory of the shapes and types that the table says."""
    op, inputs = OPS[name], _inputs(name, dtype)
    attributes = {"align_corners": 1} if "align_corners" in op.attributes else {}
    expected = TWINS[name](*inputs, **attributes)
    expected = expected if isinstance(expected, tuple) else (expected,)
    kinds = [dtype if kind == "T" else torch.float32 for kind in op.outputs.values()]
    made = [torch.full(tuple(shape), torch.nan, dtype=kind)
            for shape, kind in zip(op.shapes(*SHAPES[name]), kinds, strict=True)]  # fmt: skip
    op.run(inputs, attributes, out=made[0] if len(made) == 1 else tuple(made), stream=0)
    for found, wanted in zip(made, expected, strict=True):
        error = 2e-5 if wanted.dtype == torch.float32 else 2e-3
        torch.testing.assert_close(found, wanted, atol=error * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("name", list(OPS))
def test_the_reference_is_the_operator(name: str) -> None:
    inputs = _inputs(name, torch.float32)
    expected = TWINS[name](*inputs)
    found = OPS[name].run(inputs, {}, reference=True)
    if not isinstance(expected, tuple):
        found, expected = (found,), (expected,)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-5)
