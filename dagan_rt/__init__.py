"""Depth-aware talking heads in real time: train, export, animate.

from dagan_rt import Reenactor

reenactor = Reenactor("bundle/")
reenactor.set_source(image)              # HWC uint8 RGB, once
for frame in frames:
    show(reenactor.drive(frame))         # HWC uint8 RGB
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagan_rt.errors import DeviceLost, InputError
    from dagan_rt.reenactor import Reenactor
    from dagan_rt.streams import Streams

__version__ = "0.1.0"
__all__ = ["DeviceLost", "InputError", "Reenactor", "Streams", "__version__"]

_HOMES = {
    "DeviceLost": "dagan_rt.errors",
    "InputError": "dagan_rt.errors",
    "Reenactor": "dagan_rt.reenactor",
    "Streams": "dagan_rt.streams",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first asked for: `import dagan_rt` itself loads nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
