"""The kernels as TensorRT plugins, in two kinds.

| kind     | in the engine                           | needs at run time             | built by                      |
|----------|-----------------------------------------|-------------------------------|-------------------------------|
| `python` | the name and attributes of every plugin | dagan-rt in the same process  | tensorrt 10, 11, tensorrt-rtx |
| `aot`    | the kernels themselves, compiled to PTX | nothing: Triton, C++ programs | tensorrt 10.9, experimental   |

`python` is `IPluginV3` written in Python (`ipluginv3.py`), `aot` the quick-deployable plugins of `tensorrt.plugin`
with ahead-of-time kernels (`aot.py`). Both take graphs cut by `dagan_rt.export.plugin_nodes`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from dagan_rt.errors import InputError
from dagan_rt.plugins.ops import DOMAIN, OPS

KINDS = ("python", "aot")

_registered: set[tuple[str, str]] = set()


def register(library: ModuleType, kind: str) -> None:
    """Make the plugins known to `tensorrt` or `tensorrt_rtx`, once a process; to build engines, or to load them.

    Engines of the kind `aot` are loaded without. Raises InputError if this library cannot have them.
    """
    if kind not in KINDS:
        raise InputError(f"plugins must be one of {', '.join(KINDS)}, got {kind!r}")
    check(library, kind)
    if other := next((has for name, has in _registered if name == library.__name__ and has != kind), None):
        raise InputError(f"{library.__name__} holds {other} plugins in this process: use another process for {kind}")
    if (library.__name__, kind) in _registered:
        return
    if kind == "aot":
        from dagan_rt.plugins.aot import register_all

        register_all()
    else:
        from dagan_rt.plugins.ipluginv3 import creators

        registry = library.get_plugin_registry()
        for creator in creators(library):
            if not registry.register_creator(creator, DOMAIN):
                raise InputError(f"{library.__name__} does not accept the plugin {creator.name}")
    _registered.add((library.__name__, kind))


def check(library: ModuleType, kind: str) -> None:
    """Raise InputError if this library cannot have plugins of that kind on this machine."""
    name, version = library.__name__, library.__version__
    if kind == "aot":
        if not hasattr(library, "IPluginV3QuickAOTBuild"):
            raise InputError(f"plugins of the kind aot need tensorrt 10.9 or newer, got {name} {version}: use python")
        return
    # The library opens itself by this name when it makes its first Python plugin, and aborts the process if it fails.
    if name == "tensorrt_rtx" and sys.platform == "linux":
        try:
            ctypes.CDLL("libtensorrt_rtx.so")
        except OSError:
            spec = importlib.util.find_spec("tensorrt_rtx_libs")
            held = Path(spec.origin).parent if spec and spec.origin else Path("tensorrt_rtx_libs")
            raise InputError(
                f"plugins need libtensorrt_rtx.so where the loader finds it, {name} {version} has it as "
                f"{held / 'libtensorrt_rtx.so.1'} only: make a link of that name to it in a folder of your own, "
                "and start again with that folder in LD_LIBRARY_PATH"
            ) from None


def missing() -> str | None:
    """None, or why engines with plugins of the kind `python` cannot run on this machine, and what to install."""
    from dagan_rt.kernels import _build, _devices

    if reason := _devices.missing():
        return reason
    try:
        if not all(_build.fat_binary_path(unit).is_file() for unit in _build.units()):
            _build._nvrtc()
    except InputError as error:
        return str(error)
    return None


__all__ = ["DOMAIN", "KINDS", "OPS", "check", "missing", "register"]
