"""What the benchmarks of whole frames are tried out with."""

from __future__ import annotations

from typing import Any

import pytest

from dagan_rt.benchmarking.suites import Effort

EFFORT = Effort(seconds=600.0, row_seconds=0.02, repeats=3)


@pytest.fixture(scope="session")
def bench() -> Any:
    """A `Bench` of the small random networks on the CPU."""
    pytest.importorskip("torch")
    from dagan_rt.benchmarking.frames import prepare
    from dagan_rt.benchmarking.subjects import open_subject

    return prepare(open_subject("small"), "cpu", EFFORT, ["frames", "--model", "small", "--device", "cpu"])
