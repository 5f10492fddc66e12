"""What runs the graphs of a bundle: one file a backend, found by being in this folder.

A backend's module is its name with "_" for "-". It defines `RANK` (lower is tried first by "auto"),
`missing(bundle=None) -> str | None` (why it cannot run here, or cannot run that bundle) and
`open(bundle, threads) -> Backend`. Importing it imports nothing heavy.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from dagan_rt.bundle import Bundle
from dagan_rt.errors import InputError

Array = Any  # a backend's own kind of array: NumPy for onnxruntime, a tensor on its device for torch


class Backend(Protocol):
    """Runs graphs on arrays of its own kind, which stay opaque to the caller between two calls."""

    name: str

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name of one graph, given its inputs by name (all float32, see the bundle's manifest)."""

    def from_image(self, image: np.ndarray) -> Array:
        """HWC uint8 RGB -> graph input [1, 3, H, W] in [0, 1]."""

    def to_image(self, prediction: Array) -> np.ndarray:
        """Graph output [1, 3, H, W] in [0, 1] -> HWC uint8 RGB, rounded to the nearest level."""

    def from_numpy(self, values: np.ndarray) -> Array:
        """Any float32 array as this backend's kind."""

    def to_numpy(self, array: Array) -> np.ndarray:
        """The inverse of `from_numpy`."""


def names() -> list[str]:
    """The backends this version has, best first, runnable here or not."""
    modules = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return sorted((module.replace("_", "-") for module in modules), key=lambda name: (_module(name).RANK, name))


def available(bundle: Bundle | None = None) -> dict[str, str | None]:
    """Each backend by name, best first: None if it can run here (and run `bundle`), else one sentence that says why."""
    return {name: missing(name, bundle) for name in names()}


def missing(name: str, bundle: Bundle | None = None) -> str | None:
    """None, or one sentence that says why the backend `name` cannot run here, or cannot run `bundle`."""
    reason: str | None = _module(name).missing(bundle)
    return reason


def open_backend(name: str, bundle: Bundle, threads: int | None = None) -> Backend:
    """Load a bundle's graphs into the backend `name`, or into the best one that can run it here for "auto".

    `threads` limits the CPU threads of one graph; None takes all cores. Raises InputError if the backend is unknown,
    cannot run here, or cannot load the bundle.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    if name not in ("auto", *names()):
        raise InputError(f"backend must be auto or one of {', '.join(names())}, got {name!r}")
    reasons = []
    for candidate in names() if name == "auto" else [name]:
        reason = missing(candidate, bundle)
        if reason is None:
            backend: Backend = _module(candidate).open(bundle, threads)
            return backend
        reasons.append(reason)
    which = "no backend can" if name == "auto" else f"backend {name} cannot"
    raise InputError(f"{which} run here: {'; '.join(reasons)}")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
