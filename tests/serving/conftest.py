"""Real servers: the tritonserver of the environment that `make serve` and `make test-slow` create, on a tiny bundle."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dagan_rt.serving.server import Server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def server_python() -> str:
    """The interpreter that runs served models; its absence is a failure where the server could run at all."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        pytest.skip("tritonserver runs on Linux x86-64")
    python = os.environ.get("DAGAN_RT_TRITON_PYTHON") or str(ROOT / ".venv-triton" / "bin" / "python")
    if not Path(python).exists():
        pytest.fail(f"{python} does not exist: run make serve or make test-slow, which create it")
    return python


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundle: Path, louder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with images that tell whose they are."""
    folder = tmp_path_factory.mktemp("louder") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    return Path(louder(folder))


@pytest.fixture(scope="session")
def make_repository(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_repository(**values)`: the tiny bundle as `reenact` and `reenact_stream`; values of `ServingPlan`."""
    from dagan_rt.bundle import Bundle
    from dagan_rt.export.triton import write_repository
    from dagan_rt.serving.repository import ServingPlan

    def make(**values: Any) -> Path:
        out = tmp_path_factory.mktemp("repository") / "models"
        return write_repository(Bundle.open(tiny_bundle), out, ServingPlan(**{"stream": True, **values})).path

    return make


@pytest.fixture(scope="session")
def tiny_repository(make_repository: Callable[..., Path]) -> Path:
    """The tiny bundle with default settings. Leave it as it is: many share it."""
    return make_repository(threads=1)


@pytest.fixture
def running(server_python: str) -> Iterator[Callable[..., Server]]:
    """`running(repository, **arguments of Server) -> Server`, started; ended with the test."""
    servers: list[Server] = []

    def start(repository: Path, **arguments: Any) -> Server:
        servers.append(Server(repository, server_python, **arguments))
        return servers[-1].start()

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def server(server_python: str, tiny_repository: Path) -> Iterator[Server]:
    """One on the tiny bundle for all tests of a module."""
    started = Server(tiny_repository, server_python).start()
    yield started
    started.kill()
