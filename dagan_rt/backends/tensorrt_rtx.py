"""TensorRT-RTX on an NVIDIA RTX GPU: the same API as TensorRT, with engines that can be built anywhere."""

from __future__ import annotations

from typing import Any

from dagan_rt.backends import tensorrt
from dagan_rt.bundle import Bundle
from dagan_rt.engines import FLAVOURS

RANK = 2


def missing(bundle: Bundle | None = None) -> str | None:
    """None, or why this backend cannot run here."""
    return tensorrt.missing(bundle, FLAVOURS["tensorrt-rtx"])


def open(bundle: Bundle, threads: int | None = None, stream: Any = None) -> tensorrt.TensorRTBackend:
    """Load a bundle's engines; see `dagan_rt.backends.tensorrt.open`."""
    return tensorrt.open(bundle, threads, stream, FLAVOURS["tensorrt-rtx"])
