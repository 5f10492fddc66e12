"""What runs the graphs of a bundle: one file a backend, found by being in this folder.

A backend's module is its name with "_" for "-". It defines `RANK` (the lower, the faster: "auto" tries it earlier),
`missing(bundle=None) -> str | None` (why it cannot run here, or cannot run that bundle) and
`open(bundle, threads) -> Backend`. Importing it imports nothing heavy.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from dagan_rt.bundle import Bundle
from dagan_rt.errors import InputError

if TYPE_CHECKING:
    import numpy as np

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


class Choice(NamedTuple):
    """Which backend, and why."""

    name: str | None  # None: no backend can run here
    reasons: dict[str, str]  # of each that was considered, best first: why it was chosen, or why not

    @property
    def reason(self) -> str:
        """One line: why this one, and why none of those that come before it."""
        listed = list(self.reasons)
        before = listed if self.name is None else listed[: listed.index(self.name)]
        refusals = [f"{name}: {self.reasons[name]}" for name in before]
        return "; ".join(([] if self.name is None else [self.reasons[self.name]]) + refusals)


FASTEST = "the fastest that runs here"


def choose(bundle: Bundle | None = None) -> Choice:
    """What "auto" takes, as far as can be told without loading it: the first by rank whose requirements are there."""
    reasons: dict[str, str] = {}
    chosen = None
    for name, lacking in available(bundle).items():
        if lacking is not None:
            reasons[name] = lacking
        elif chosen is None:
            chosen, reasons[name] = name, FASTEST
        else:
            reasons[name] = f"could run, and comes after {chosen}"
    return Choice(chosen, reasons)


def open_backend(name: str, bundle: Bundle, threads: int | None = None) -> Backend:
    """Load a bundle's graphs into the backend `name`, or into the fastest one that can run it here for "auto".

    `threads` limits the CPU threads of one graph; None takes all cores. Raises InputError if the backend is unknown,
    cannot run here, or cannot load the bundle. "auto" passes over a backend that should run here and fails to load,
    and logs a warning that names it, the reason, and the backend used instead.
    """
    return open_chosen(name, bundle, threads)[0]


def open_chosen(name: str, bundle: Bundle, threads: int | None = None) -> tuple[Backend, Choice]:
    """As `open_backend`, together with the reasons for the choice."""
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    if name == "auto":
        return _open_fastest(bundle, threads)
    if name not in names():
        raise InputError(f"backend must be auto or one of {', '.join(names())}, got {name!r}")
    if reason := missing(name, bundle):
        raise InputError(f"backend {name} cannot run here: {reason}")
    return _module(name).open(bundle, threads), Choice(name, {name: "asked for by name"})


def _open_fastest(bundle: Bundle, threads: int | None) -> tuple[Backend, Choice]:
    reasons: dict[str, str] = {}
    failed: list[str] = []
    for name in names():
        if reason := missing(name, bundle):
            reasons[name] = reason
            continue
        try:
            backend: Backend = _module(name).open(bundle, threads)
        except Exception as error:  # a driver, a library or a file may fail in any way
            reasons[name] = f"failed to load: {_sentence(error)}"
            failed.append(name)
            continue
        reasons[name] = FASTEST
        for other in failed:
            logging.getLogger("dagan_rt").warning(
                "warning: backend %s %s; %s is used instead", other, reasons[other], name
            )
        return backend, Choice(name, reasons)
    raise InputError(f"no backend can run here: {'; '.join(reasons.values())}")


def _sentence(error: Exception) -> str:
    """What an exception says, on one line."""
    words = " ".join(str(error).split())[:300]
    return words if isinstance(error, InputError) else f"{type(error).__name__}: {words}"


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
