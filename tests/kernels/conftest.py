"""What the tests of the kernels share: the emulated GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can `import emulated`


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels(request: pytest.FixtureRequest) -> None:
    """Compiled kernels are kept from one run of the tests to the next."""
    import emulated

    if (cache := getattr(request.config, "cache", None)) is not None:
        emulated.FOLDER = cache.mkdir("emulation")


@pytest.fixture
def emulated() -> Iterator[Any]:
    """An emulated GPU that CPU tensors lie on for the length of a test."""
    from emulated import EmulatedDevice, emulation

    with emulation(EmulatedDevice()) as device:
        yield device


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors are made: for "cpu" the kernels are emulated."""
    from emulated import EmulatedDevice, emulation

    if request.param == "cuda":
        yield "cuda"
    else:
        with emulation(EmulatedDevice()):
            yield "cpu"
