"""What the tests of the CUDA layer share: the imitated driver."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can `import imitated_driver`


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Stands in for libcuda."""
    from imitated_driver import installed

    with installed(monkeypatch) as imitation:
        yield imitation
