"""config.pbtxt: plain dictionaries to Protocol Buffers text, in one place for every model of a repository.

A dictionary is a message, a list a repeated field, an `Enum` a word without quotes; a key that starts with # is a
comment line, whose value is not looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dagan_rt.bundle import MANIFEST, Bundle
from dagan_rt.errors import InputError
from dagan_rt.serving.repository import RESOURCE

if TYPE_CHECKING:
    from dagan_rt.serving.repository import ServingPlan

#: Types of tensors, as a manifest has them and as Triton calls them.
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}


class Enum(str):
    """The name of an enumeration's value, as KIND_GPU."""


def to_pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """The fields of a message as text, a line each."""
    lines = []
    for name, value in message.items():
        if name.startswith("#"):
            lines.append(f"{indent}{name}\n")
            continue
        if isinstance(value, list) and all(isinstance(item, (int, float)) for item in value):
            lines.append(f"{indent}{name}: [{', '.join(map(_scalar, value))}]\n")
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                lines.append(_message(name, item, indent))
            else:
                lines.append(f"{indent}{name}: {_scalar(item)}\n")
    return "".join(lines)


def _message(name: str, message: Mapping[str, Any], indent: str) -> str:
    """In one line where it is a short one."""
    body = to_pbtxt(message, indent + "  ")
    line = f"{indent}{name} {{ {' '.join(map(str.strip, body.splitlines()))} }}\n"
    return line if len(line) <= 120 and "#" not in body else f"{indent}{name} {{\n{body}{indent}}}\n"


def to_map(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A map field: a list of entries, sorted by key."""
    return [{"key": key, "value": value} for key, value in sorted(values.items())]


def parameters(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The field `parameters` of a model."""
    return to_map({key: {"string_value": str(value)} for key, value in values.items()})


def bundle_parameters(bundle: Bundle) -> dict[str, str]:
    """What every model says of the bundle it was made from."""
    precisions = {graph.precision for graph in bundle.graphs.values()}
    manifest = (bundle.path / MANIFEST).read_bytes()  # it holds the hashes of all other files
    return {
        "variant": bundle.config.variant,
        "size": str(bundle.config.size),
        "precision": precisions.pop() if len(precisions) == 1 else "mixed",
        "bundle_sha256": hashlib.sha256(manifest).hexdigest(),
    }


def instance_group(plan: ServingPlan) -> list[dict[str, Any]]:
    """Where a model's instances live, and what the rate limiter counts of them."""
    group: dict[str, Any] = {"kind": Enum("KIND_GPU" if plan.on_gpus else "KIND_CPU"), "count": plan.count}
    if plan.gpus:
        group["gpus"] = list(plan.gpus)
    if plan.rate_limit:
        group[f"# {plan.rate_limit} at once: tritonserver --rate-limit=execution_count "
              f"--rate-limit-resource={RESOURCE}:{plan.rate_limit}"] = None  # fmt: skip
        group["rate_limiter"] = {"resources": [{"name": RESOURCE, "count": 1}], "priority": 1}
    return [group]


def data_type(dtype: str) -> Enum:
    """Triton's name of a NumPy type; InputError for one that no graph of a bundle has."""
    if dtype not in TYPES:
        raise InputError(f"a tensor must be {', '.join(TYPES)}, got {dtype[:80]!r}")
    return Enum(TYPES[dtype])


def _scalar(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    # JSON escapes quotes, backslashes and control characters as Protocol Buffers text does, but for \uXXXX.
    return json.dumps(str(value), ensure_ascii=False)
