"""The emulated GPU, which the tests of the kernels have too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))


@pytest.fixture
def emulated() -> Iterator[Any]:
    """A GPU that CPU tensors lie on for the length of a test; nothing is launched on it here."""
    from emulated import EmulatedDevice, emulation

    with emulation(EmulatedDevice()) as device:
        yield device
