"""The operators as `IPluginV3`, the plugin interface that `tensorrt` 10 and 11 and `tensorrt_rtx` share.

Tensors are linear (contiguous) and float32 or float16; TensorRT converts where a neighbour wants it otherwise. A launch
goes to TensorRT's stream on TensorRT's memory, and can be captured in a CUDA graph after a first run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from dagan_rt.plugins.ops import ANY, DOMAIN, OPS, VERSION, Op

TYPES = {"FLOAT": "<f4", "HALF": "<f2"}  # no bfloat16: no graph of a bundle has it, and NumPy no name for it


@dataclass(frozen=True)
class Borrowed:
    """TensorRT's memory for the time of one launch, as the kernels take arrays."""

    pointer: int
    shape: tuple[int, ...]
    typestr: str

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # No stream: the launch goes to the one on which TensorRT orders its work.
        return {"data": (self.pointer, False), "shape": self.shape, "typestr": self.typestr, "version": 3}


class _Dimension:
    """A dimension that is not known yet, with the arithmetic of Python."""

    def __init__(self, library: ModuleType, builder: Any, expression: Any) -> None:
        self._library, self._builder, self.expression = library, builder, expression

    def __add__(self, other: int) -> _Dimension:
        return self._combined("SUM", other)

    def __mul__(self, other: int) -> _Dimension:
        return self._combined("PROD", other)

    def _combined(self, operation: str, other: int) -> _Dimension:
        kind = getattr(self._library.DimensionOperation, operation)
        expression = self._builder.operation(kind, self.expression, self._builder.constant(other))
        return _Dimension(self._library, self._builder, expression)


@cache
def creators(library: ModuleType) -> tuple[Any, ...]:
    """One creator an operator, to be registered and kept: the library holds no reference to them."""
    trt: Any = library

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        """One node of a network; all that it knows is its attributes."""

        def __init__(self, op: Op, attributes: dict[str, int]) -> None:
            for base in Plugin.__bases__:
                base.__init__(self)
            self.op, self.attributes = op, attributes
            self.plugin_name, self.plugin_namespace, self.plugin_version = op.name, DOMAIN, VERSION
            self.num_outputs = len(op.outputs)

        def get_capability_interface(self, kind: Any) -> Plugin:
            return self

        def clone(self) -> Plugin:
            return Plugin(self.op, self.attributes)

        def attach_to_context(self, context: Any) -> Plugin:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([_field(name, [value]) for name, value in self.attributes.items()])

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            leads = dict(zip(self.op.inputs.values(), input_types, strict=True))  # by ANY or FLOAT
            return [leads[ANY] if kind == ANY else trt.DataType.FLOAT for kind in self.op.outputs.values()]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, builder: Any) -> list[Any]:
            shapes = [[_Dimension(trt, builder, size) for size in shape] for shape in inputs]
            return [_dimensions(shape, builder) for shape in self.op.shapes(*shapes)]

        def supports_format_combination(self, position: int, tensors: Sequence[Any], num_inputs: int) -> bool:
            tensor, types = tensors[position].desc, self.op.types
            if tensor.format != trt.TensorFormat.LINEAR:
                return False
            if types[position] != ANY:
                return tensor.type == trt.DataType.FLOAT
            return tensor.type.name in TYPES and tensor.type == tensors[types.index(ANY)].desc.type

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def set_tactic(self, tactic: int) -> None:
            pass

        def enqueue(
            self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int
        ) -> None:
            given, made = _borrow(input_desc, inputs), _borrow(output_desc, outputs)
            self.op.run(given, self.attributes, out=made[0] if len(made) == 1 else tuple(made), stream=stream)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes plugins of one operator: of a node's attributes, or of what an engine holds of them."""

        def __init__(self, op: Op) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.op = op
            self.name, self.plugin_namespace, self.plugin_version = op.name, DOMAIN, VERSION
            self.field_names = trt.PluginFieldCollection([_field(name, []) for name in op.attributes])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Plugin:
            given = {field.name: int(field.data[0]) for field in fields}
            return Plugin(self.op, {name: given.get(name, 0) for name in self.op.attributes})

    def _field(name: str, values: list[int]) -> Any:
        return trt.PluginField(name, np.array(values, np.int32), trt.PluginFieldType.INT32)

    def _dimensions(shape: Sequence[Any], builder: Any) -> Any:
        sizes = [it.expression if isinstance(it, _Dimension) else builder.constant(it) for it in shape]
        return trt.DimsExprs(sizes)

    return tuple(Creator(op) for op in OPS.values())


def _borrow(descriptors: Sequence[Any], pointers: Sequence[int]) -> list[Borrowed]:
    return [
        Borrowed(pointer, tuple(descriptor.dims), TYPES[descriptor.type.name])
        for descriptor, pointer in zip(descriptors, pointers, strict=True)
    ]
