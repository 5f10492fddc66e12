"""The server that is measured: one that runs, or one started on a repository or a bundle for as long as it takes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagan_rt.bundle import MANIFEST, Bundle
from dagan_rt.errors import InputError
from dagan_rt.reenactor import is_address
from dagan_rt.serving import protocol
from dagan_rt.serving.repository import BUNDLE, MARKER, Repository, ServingPlan


@dataclass(frozen=True)
class Target:
    """Where it is reached, and what is known of it."""

    urls: tuple[str, ...]  # the one that was given; gRPC, HTTP
    metrics: str = ""  # URL; "": not given
    bundle: Bundle | None = None  # what it serves
    memory: Callable[[], int] | None = None  # bytes that it holds


@contextlib.contextmanager
def opened(
    where: str, bundle: Path | None = None, metrics: str = "", python: str | None = None, **plan: Any
) -> Iterator[Target]:
    """where: a server's URL, a model repository or a bundle.

    bundle: what a server at a URL serves. metrics: its metrics' URL. python: the interpreter that runs the model of a
    server that is started. plan: of `ServingPlan`, for a bundle. Raises InputError where it is none of them.
    """
    if is_address(where):
        yield Target((where,), metrics, Bundle.open(bundle) if bundle is not None else None)
        return
    if bundle is not None or metrics:
        raise InputError(f"--bundle and --metrics are for a server that runs, got them with {where}")
    with contextlib.ExitStack() as stack:
        root = Path(where)
        if (root / MANIFEST).is_file():
            from dagan_rt.export.triton import write_repository

            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dagan-rt-"))
            repository = write_repository(Bundle.open(root), Path(folder, "repository"), ServingPlan(**plan))
        elif (root / MARKER).is_file():
            repository = Repository.open(root)
        else:
            raise InputError(
                f"what is measured must be a server's URL like grpc://host:8001, a model repository ({MARKER}) or a "
                f"bundle ({MANIFEST}), got {where}"
            )
        from dagan_rt.serving.server import Server

        served = Bundle.open(repository.path / protocol.MODEL / str(repository.plan.version) / BUNDLE)
        server = stack.enter_context(Server(repository.path, python))
        yield Target((server.grpc_url, server.http_url), server.metrics_url, served, server.memory)
