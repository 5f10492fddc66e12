"""Errors that a person reads: one sentence that names the file or argument, what was expected and what came."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """Something the user gave cannot be used. The command line prints the message and exits with code 2."""


class MissingPackage(InputError):
    """An optional package is needed and not installed; the message holds the pip line that brings it."""


class DeviceLost(RuntimeError):
    """The GPU is gone: it was reset, fell off the bus, or a kernel broke its context. It takes a new process."""


def require(package: str, *, extra: str, why: str) -> ModuleType:
    """Import and return an optional package, or raise `MissingPackage` naming the extra that installs it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.split(".")[0]:
            raise
        raise MissingPackage(
            f"{why} needs the package {package}, which is not installed: run pip install 'dagan-rt[{extra}]'"
        ) from None
