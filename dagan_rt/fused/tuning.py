"""Which configuration each convolution runs in on this GPU: timed once, then kept in the user's cache.

The heuristic of `kernels.conv2d` is the start; which tile and split wins depends on the chip. A convolution is timed in
a CUDA graph, where the host has no share, with weights that are not in the cache of the GPU: in a frame they are not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dagan_rt import kernels
from dagan_rt.kernels import _build
from dagan_rt.kernels._arrays import view
from dagan_rt.kernels.conv2d import UNITS

log = logging.getLogger(__name__)

LAUNCHES = 16  # timed together, of small batches; fewer where one launch is long enough
REPLAYS = 3  # of all of them
EVICTED = 96 << 20  # bytes of weights that launches take turns in: more than the cache of any GPU of today
CANDIDATES = 14  # configurations of a convolution, by the heuristic's order
LARGEST_FILE = 4 << 20


class Tuning:
    """Configurations by the convolution's shape; measured where unknown inside `measuring`, else the heuristic's."""

    def __init__(self, file: Path | None = None) -> None:
        """`file`: where results are kept from run to run; None: nowhere. A damaged file is measured anew."""
        self.file, self._measuring, self._changed = file, False, False
        self._known: dict[str, tuple[int, kernels.Config]] = {}
        if file is not None:
            self._known = _read(file)

    @classmethod
    def of(cls, index: int) -> Tuning:
        """What is known of the GPU of that number, for the kernels as they are now."""
        folder = None
        with suppress(RuntimeError):  # no home folder
            folder = _build.cache_folder().parent / "tuning"
        device = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(index))
        # Names of fat binaries hold a digest of their sources: other kernels are measured anew.
        sources = hashlib.sha256("".join(_build.fat_binary_path(unit).name for unit in UNITS).encode()).hexdigest()
        return cls(folder and folder / f"{device}-{sources[:16]}.json")

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """In here a configuration that is not known is measured; at the end all are kept."""
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False
            self._save()

    def choose(
        self, name: str, x: Tensor, packs: Sequence[kernels.Packed], call: dict[str, Any]
    ) -> tuple[kernels.Packed, kernels.Config | None]:
        """For one call of `kernels.conv2d`: the weights to take of `packs`, and a configuration or None for its own.

        `name` is the layer's, for the log.
        """
        key = _key(x, packs[0], call)
        found = self._known.get(key)
        if found is None and self._measuring:
            if not self._changed:
                print("dagan-rt: timing the convolutions on this GPU (once, some seconds)", file=sys.stderr, flush=True)
            found = self._known[key] = _fastest(name, x, packs, call)
            self._changed = True
        if found is None:
            return packs[0], None
        phases, config = found
        return next((it for it in packs if it.phases == phases), packs[0]), config

    def _save(self) -> None:
        """Write what was measured, if anything was."""
        if self.file is None or not self._changed:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(f".{os.getpid()}")
            values = {key: [phases, *astuple(config)] for key, (phases, config) in sorted(self._known.items())}
            temporary.write_text(json.dumps(values, indent=0), encoding="utf-8")
            temporary.replace(self.file)
        except OSError as error:  # a cache: without it the next start measures again
            log.warning("the measured configurations cannot be kept in %s: %s", self.file, error.strerror)
        self._changed = False


def _key(x: Tensor, packed: Any, call: dict[str, Any]) -> str:
    """What decides how fast a configuration is."""
    options = [f"{name}={call[name]}" for name in ("stride", "padding", "pad_mode", "activation") if name in call]
    options += [name for name in ("pool", "repeat") if call.get(name)]
    options += [name for name in ("residual", "normalized") if call.get(name) is not None]
    options += ["upsample"] if packed.upsample else []
    kind = "16 bit" if call["out"].dtype == x.dtype else str(call["out"].dtype).removeprefix("torch.")
    B, C, H, W = x.shape
    shape = f"{B}x{C}x{H}x{W} {packed.out_channels} k{packed.kernel}"
    return " ".join([shape, *options, kind])  # float16 and bfloat16 take the same time


def _fastest(name: str, x: Tensor, packs: Sequence[kernels.Packed], call: dict[str, Any]) -> tuple[int, kernels.Config]:
    device, times = view(x, "x").device, {}
    launches = LAUNCHES if len(x) <= 4 else LAUNCHES // 4
    for packed in packs:
        copies = max(1, min(launches, EVICTED // packed.weight.nbytes))
        turns = [packed, *(_copied(packed) for _ in range(copies - 1))]
        options = {name: call[name] for name in ("stride", "padding", "pool", "repeat") if name in call}
        for config in kernels.configs(tuple(x.shape), packed, device=device, most=CANDIDATES, **options):
            times[packed.phases, config] = _seconds(x, turns, dict(call, config=config), launches)
    best = min(times, key=times.__getitem__)
    log.info("%s: %s, %.1f us, of %d configurations", name, best, times[best] * 1e6, len(times))
    return best


def _copied(packed: kernels.Packed) -> kernels.Packed:
    """The same weights elsewhere in memory."""
    changes: dict[str, Any] = {}
    for name in ("weight", "swizzled", "spread"):
        array = getattr(packed, name)
        changes[name] = None if array is None else array.clone()
    return replace(packed, **changes)


def _seconds(x: Tensor, packs: list[Any], call: dict[str, Any], launches: int) -> float:
    """Of one launch; infinity for a configuration that cannot be launched here."""
    try:
        kernels.conv2d(x, packs[0], **call)
        torch.cuda.current_stream().synchronize()
    except RuntimeError as error:
        log.warning("configuration %s cannot run: %s", call["config"], error)
        return float("inf")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(launches):
            kernels.conv2d(x, packs[index % len(packs)], **call)
    with torch.cuda.stream(stream):
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1000 / (launches * REPLAYS)


def _read(file: Path) -> dict[str, tuple[int, kernels.Config]]:
    try:
        if file.stat().st_size > LARGEST_FILE:
            return {}
        values = json.loads(file.read_text(encoding="utf-8"))
        return {
            str(key): (int(phases), kernels.Config(str(kernel), int(tile), int(split)))
            for key, (phases, kernel, tile, split) in values.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
