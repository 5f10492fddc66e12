"""`tensorrt` as far as quick-deployable plugins need it, on a machine that has no TensorRT.

`tensorrt.plugin` is NVIDIA's own, from the Python sources of the package tensorrt-cu13-bindings. Below it, enumerations
and plugin fields are those of TensorRT-RTX, and what only TensorRT has is imitated: expressions of sizes, the registry
and the two interfaces of plugins with ahead-of-time kernels.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Expression:
    """A size: a number, or the value of a dynamic axis under an operation."""

    compute: Any  # (value of the dynamic axis) -> int
    fixed: bool

    def is_constant(self) -> bool:
        return self.fixed

    def get_constant_value(self) -> int:
        assert self.fixed, "a plugin asked for the value of a size that is not known yet"
        return self.compute(None)


class Builder:
    """Makes expressions, as TensorRT's IExprBuilder."""

    def constant(self, value: int) -> Expression:
        assert isinstance(value, int)
        return Expression(lambda batch: value, True)

    def dynamic(self) -> Expression:
        return Expression(lambda batch: batch, False)

    def operation(self, operation: Any, first: Expression, second: Expression) -> Expression:
        operations = {
            "SUM": lambda a, b: a + b,
            "PROD": lambda a, b: a * b,
            "SUB": lambda a, b: a - b,
            "CEIL_DIV": lambda a, b: -(-a // b),
            "FLOOR_DIV": lambda a, b: a // b,
        }
        apply = operations[operation.name]
        fixed = first.fixed and second.fixed
        return Expression(lambda batch: apply(first.compute(batch), second.compute(batch)), fixed)


class _Dimensions(list):
    """DimsExprs: of a length, or of expressions."""

    def __init__(self, of: Any) -> None:
        super().__init__([None] * of if isinstance(of, int) else of)


class _Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


class Descriptor:
    """DynamicPluginTensorDesc: a linear tensor while an engine is built, -1 for the dynamic axis."""

    def __init__(self, kind: Any, shape: tuple[int | None, ...]) -> None:
        rtx = importlib.import_module("tensorrt_rtx")
        self.desc = rtx.PluginTensorDesc()
        self.desc.type, self.desc.format = kind, rtx.TensorFormat.LINEAR
        self.desc.dims = rtx.Dims([-1 if size is None else size for size in shape])


class Arguments(dict):
    """ISymExprs: a kernel's arguments between its inputs and outputs."""

    nbSymExprs = 0


class _Bare:
    """An interface without behaviour."""

    def __init__(self) -> None:
        pass


def sources() -> Path | None:
    """The folder of NVIDIA's `tensorrt.plugin`, or None."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    folder = Path(spec.origin).parent / "plugin" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None


@contextlib.contextmanager
def installed() -> Iterator[types.ModuleType]:
    """In here `import tensorrt` gives the imitation, which is given too."""
    rtx = importlib.import_module("tensorrt_rtx")
    folder = sources()
    assert folder is not None
    trt = types.ModuleType("tensorrt")
    trt.__dict__.update({name: value for name, value in vars(rtx).items() if not name.startswith("__")})
    request = enum.Enum("QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT")
    registry = _Registry()
    trt.__dict__.update(
        __version__="11.4.0", __path__=[], IPluginV3QuickAOTBuild=type("IPluginV3QuickAOTBuild", (_Bare,), {}),
        ISymExpr=type("ISymExpr", (_Bare,), {}), QuickPluginCreationRequest=request, IDimensionExpr=Expression,
        DimsExprs=_Dimensions, DynamicPluginTensorDesc=Descriptor, get_plugin_registry=lambda: registry,
    )  # fmt: skip
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    trt.plugin = importlib.util.module_from_spec(spec)  # type: ignore[attr-defined]

    def take() -> dict[str, types.ModuleType]:
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "tensorrt"}

    before = take()
    try:
        sys.modules.update({"tensorrt": trt, "tensorrt.plugin": trt.plugin})
        spec.loader.exec_module(trt.plugin)
        yield trt
    finally:
        take()
        sys.modules.update(before)
