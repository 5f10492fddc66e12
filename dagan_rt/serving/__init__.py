"""Serving by Triton Inference Server: the model it runs, the client, what starts, checks and loads a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagan_rt.serving.asynchronous import AsyncClient
    from dagan_rt.serving.client import Client, Session
    from dagan_rt.serving.sessions import AsyncSession
    from dagan_rt.serving.transport import (
        DeadlineExceeded,
        ServerBusy,
        ServerError,
        ServerUnavailable,
        ServingError,
        SessionLost,
    )

_MODULES = {
    "asynchronous": ("AsyncClient",),
    "client": ("Client", "Session"),
    "sessions": ("AsyncSession",),
    "transport": (
        "DeadlineExceeded", "ServerBusy", "ServerError", "ServerUnavailable", "ServingError", "SessionLost",
    ),
}  # fmt: skip
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AsyncClient", "AsyncSession", "Client", "DeadlineExceeded", "ServerBusy", "ServerError", "ServerUnavailable",
    "ServingError", "Session", "SessionLost",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the public names when they are first asked for: the served model needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
