"""What to run: suites in TOML, and which part of one.

`Suite` is that of the kernels; `FrameSuite` that of whole frames, their stages, and streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dagan_rt.benchmarking.rows import OURS
from dagan_rt.errors import InputError
from dagan_rt.tables import fill, parse, read_text

DTYPES = ("float16", "bfloat16", "float32")
LAYOUTS = ("nchw", "nhwc")
FLOWS = ("smooth", "scatter")
PEERS = ("published", "eager-fp16", "compile-fp16")  # of whole frames, see frame_peers.py


@dataclass(frozen=True)
class Shapes:
    """The sizes of the networks that the operations are measured at; the defaults are the published ones."""

    image: int = 256  # side of the square images, pixels
    feature: int = 64  # side of the feature maps and the flow
    points: int = 15  # K
    channels: int = 256  # C
    queries: int = 32  # D, channels of queries and keys


@dataclass(frozen=True)
class Case:
    """One operation under one set of circumstances."""

    op: str
    batch: int
    dtype: str
    layout: str
    flow: str = ""  # of warps: smooth (motion) or scatter (each sample from anywhere)

    def circumstances(self) -> dict[str, str]:
        """All but the operation, as a row states them."""
        stated = {"batch": str(self.batch), "dtype": self.dtype, "layout": self.layout}
        return stated | ({"flow": self.flow} if self.flow else {})

    def __str__(self) -> str:
        return " ".join((self.op, *self.circumstances().values()))


@dataclass(frozen=True)
class Run:
    """One operation, its peers, and all cases of these circumstances."""

    op: str
    peers: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = ("float16",)
    layouts: tuple[str, ...] = ("nhwc",)
    flows: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Goal:
    """What our rows should reach; zero means it is not asked for."""

    ops: tuple[str, ...]  # their times are added
    batch: int
    dtype: str
    layout: str
    flow: str = ""
    microseconds: float = 0.0  # at most
    fraction: float = 0.0  # of the ceiling, at least
    speedup: float = 0.0  # over the fastest of the peers whose name starts with `over`, at least
    over: str = ""


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float = 240.0  # the whole suite; rows that would start later are skipped, and say so
    row_seconds: float = 0.08  # the repeats of one row
    repeats: int = 30  # of one row, at most; at least 5


@dataclass(frozen=True)
class Suite:
    """A file of benchmarks/suites/, or what `select` left of it."""

    runs: tuple[Run, ...]
    shapes: Shapes = field(default_factory=Shapes)
    effort: Effort = field(default_factory=Effort)
    goals: tuple[Goal, ...] = ()
    digest: str = ""  # of the file

    @classmethod
    def read(cls, path: Path) -> Suite:
        """InputError names the key that is wrong."""
        suite: Suite = _filled(cls, path)
        for at, run in enumerate(suite.runs):
            suite._check(run, f"{path}: runs[{at}]")
        return suite

    def _check(self, run: Run, where: str) -> None:
        from dagan_rt.benchmarking.operations import OPERATIONS
        from dagan_rt.benchmarking.peers import known

        if run.op not in OPERATIONS:
            raise InputError(f"{where}.op must be one of {', '.join(OPERATIONS)}, got {run.op!r}")
        flows = FLOWS if OPERATIONS[run.op].warps else ("",)
        for key, allowed in (("dtypes", DTYPES), ("layouts", LAYOUTS), ("flows", flows)):
            for value in getattr(run, key):
                if value not in allowed:
                    raise InputError(f"{where}.{key} must be of {', '.join(map(repr, allowed))}, got {value!r}")
        for peer in run.peers:
            if not known(OPERATIONS[run.op].forward, peer):
                raise InputError(f"{where}.peers: {peer!r} is not a known form of {run.op}")
        if not run.batches or min(run.batches) < 1:
            raise InputError(f"{where}.batches must each be at least 1, got {list(run.batches)}")

    def select(self, **wanted: tuple[str, ...]) -> Suite:
        """Only some `ops`, `batches`, `dtypes`, `layouts`, `flows`; `peers` by how their names start.

        InputError where nothing is left.
        """
        peers = wanted.pop("peers", None)
        runs = []
        for run in self.runs:
            if run.op not in wanted.get("ops", (run.op,)):
                continue
            kept: dict[str, tuple[Any, ...]] = {
                key: tuple(value for value in getattr(run, key) if str(value) in wanted[key])
                for key in ("batches", "dtypes", "layouts", "flows")
                if key in wanted
            }
            if peers is not None:
                kept["peers"] = tuple(peer for peer in run.peers if peer.startswith(peers))
            if all(values for key, values in kept.items() if key != "peers"):
                runs.append(replace(run, **kept))  # type: ignore[arg-type]  # the keys are named above
        if not runs:
            asked = "; ".join(f"{key} {', '.join(values)}" for key, values in wanted.items())
            raise InputError(f"the suite holds no row of {asked}: ask for less, or add a run to the suite")
        return replace(self, runs=tuple(runs))

    def cases(self) -> dict[Case, tuple[str, ...]]:
        """The forms of every case, ours first. Runs of the same case add their peers."""
        forms: dict[Case, dict[str, None]] = {}
        for run in self.runs:
            for case in (
                Case(run.op, batch, dtype, layout, flow)
                for dtype in run.dtypes
                for layout in run.layouts
                for flow in run.flows
                for batch in run.batches
            ):
                forms.setdefault(case, {OURS: None}).update(dict.fromkeys(run.peers))
        return {case: tuple(names) for case, names in forms.items()}


@dataclass(frozen=True)
class Form:
    """Whole frames by a peer, or by dagan-rt's backends, in batches."""

    name: str  # one of PEERS, or OURS for every backend that runs
    batches: tuple[int, ...]
    seconds: float = 0.0  # for all of it in a process of its own, which is then ended; 0: in this one

    def wanted(self, starts: Sequence[str]) -> bool:
        """Whether one of its names may start so; which backends of ours there are is not known yet."""
        return self.name == OURS or any(self.name.startswith(start) for start in starts)


@dataclass(frozen=True)
class Load:
    """Streams that each bring frames at their own pace."""

    streams: tuple[int, ...] = (1,)  # how many at once
    fps: float = 30.0  # of each; 0: as fast as they are taken
    seconds: float = 4.0  # for each number of streams


@dataclass(frozen=True)
class Aim:
    """What the best of our rows in a group should reach; zero means it is not asked for."""

    group: str
    case: dict[str, str] = field(default_factory=dict)  # only rows of these circumstances
    microseconds: float = 0.0  # p50, at most
    p99: float = 0.0  # microseconds, at most
    spread: float = 0.0  # p99 over p50, at most
    speedup: float = 0.0  # over the peer `over`, at least
    over: str = ""
    rate: float = 0.0  # frames/s, at least
    streams: int = 0  # how many without a drop and within `p99`, at least


@dataclass(frozen=True)
class FrameSuite:
    """A file of benchmarks/suites/ about whole frames."""

    forms: tuple[Form, ...]
    stages: tuple[int, ...] = (1,)  # batches to take apart
    load: Load = field(default_factory=Load)
    effort: Effort = field(default_factory=Effort)
    goals: tuple[Aim, ...] = ()
    digest: str = ""  # of the file

    @classmethod
    def read(cls, path: Path) -> FrameSuite:
        """InputError names the key that is wrong."""
        suite: FrameSuite = _filled(cls, path)
        for at, form in enumerate(suite.forms):
            if form.name not in (OURS, *PEERS):
                raise InputError(
                    f"{path}: forms[{at}].name must be one of {', '.join((OURS, *PEERS))}, got {form.name!r}"
                )
            if not form.batches or min(form.batches) < 1:
                raise InputError(f"{path}: forms[{at}].batches must each be at least 1, got {list(form.batches)}")
        if min((*suite.stages, *suite.load.streams), default=0) < 1:
            raise InputError(f"{path}: stages and load.streams must each be at least 1")
        return suite


def _filled(kind: Any, path: Path) -> Any:
    """A suite as its file has it, with the file's digest."""
    text = read_text(path, "suite")
    return replace(fill(kind, parse(text, str(path)), str(path)), digest=hashlib.sha256(text.encode()).hexdigest())
