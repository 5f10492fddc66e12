"""verify.json: what an export measured against PyTorch, and how it reads in a terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.tables import fill, printable, read_json

REPORT = "verify.json"


@dataclass(frozen=True)
class Measured:
    """How far one output is from PyTorch's; the absolute errors in the output's own units."""

    max_abs: float
    mean_abs: float
    psnr: float  # dB against the reference's largest magnitude, for frames against 1; 200 where nothing differs
    tolerance: float  # what `max_abs` may reach
    least_psnr: float = 0.0  # what `psnr` may fall to

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.max_abs <= self.tolerance and self.psnr >= self.least_psnr


@dataclass(frozen=True)
class GraphReport:
    """One graph: its precision, what it costs, and its errors by backend and output."""

    precision: str
    bytes: int
    operations: int
    multiply_accumulates: int  # for one face
    errors: dict[str, dict[str, Measured]]


@dataclass(frozen=True)
class EngineReport:
    """One set of engines: a TensorRT flavour and version, for some GPUs."""

    flavour: str
    seconds: float  # to build
    bytes: dict[str, int]  # by graph
    layers: dict[str, int]  # of the parsed network, by graph
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # the engine's own layers, where a GPU shows them
    not_run: str = ""  # why they were only built here


@dataclass(frozen=True)
class Report:
    """What an export measured."""

    reference: str  # what the errors are measured against
    frames: str  # the faces they are measured on
    graphs: dict[str, GraphReport]
    reenactment: dict[str, Measured]  # whole sessions, in [0, 1], by backend
    engines: dict[str, EngineReport] = field(default_factory=dict)  # by their folder under engines/
    notes: tuple[str, ...] = ()  # what was chosen and why, what could not be done here

    def failures(self) -> list[str]:
        """What is out of its tolerance, one sentence each."""
        return [
            f"{graph}: {output} on {backend} differs from PyTorch by {it.max_abs:.3g} ({it.psnr:.1f} dB), allowed is "
            f"{it.tolerance:.3g} (at least {it.least_psnr:.0f} dB)"
            for graph, backend, output, it in self._rows()
            if not it.passed
        ]

    def to_dict(self) -> dict[str, Any]:
        """For verify.json."""
        return asdict(self) | {"notes": list(self.notes), "verdict": "failed" if self.failures() else "passed"}

    def write(self, folder: Path) -> None:
        """Write verify.json into the folder of a bundle."""
        (folder / REPORT).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a verify.json, which may come from anywhere; InputError names what is wrong with it."""
        values = read_json(path, "report")
        if not isinstance(values, dict):
            raise InputError(f"{path} must hold an object, got {type(values).__name__}")
        values.pop("verdict", None)
        report: Report = fill(cls, values, str(path))
        return report

    def table(self) -> str:
        """Every measurement, for a person to read."""
        lines = [f"errors against {self.reference}, on {self.frames}", ""]
        lines.append(f"{'graph':<15} {'precision':<9} {'size MB':>8} {'operations':>10} {'GMAC':>8}")
        for name, graph in self.graphs.items():
            lines.append(
                f"{name:<15} {graph.precision:<9} {graph.bytes / 1e6:>8.1f} {graph.operations:>10} "
                f"{graph.multiply_accumulates / 1e9:>8.2f}"
            )
        lines += ["", f"{'graph':<15} {'output':<16} {'backend':<13} {'max abs':>8} {'allowed':>8} {'mean abs':>8} "
                      f"{'PSNR dB':>8} {'allowed':>8}  verdict"]  # fmt: skip
        for graph_name, backend, output, it in self._rows():
            lines.append(
                f"{graph_name:<15} {output:<16} {backend:<13} {it.max_abs:>8.1e} {it.tolerance:>8.1e} "
                f"{it.mean_abs:>8.1e} {it.psnr:>8.1f} {it.least_psnr:>8.0f}  {'passed' if it.passed else 'FAILED'}"
            )
        for key, engine in self.engines.items():
            sizes = ", ".join(
                f"{name} {size / 1e6:.1f} MB ({engine.layers.get(name, 0)} layers"
                + (f", fused to {len(engine.fused[name])})" if name in engine.fused else ")")
                for name, size in engine.bytes.items()
            )
            run = f"; not measured: {engine.not_run}" if engine.not_run else ""
            lines += ["", f"engines {key}, built in {engine.seconds:.1f} s: {sizes}{run}"]
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(map(printable, lines))

    def _rows(self) -> list[tuple[str, str, str, Measured]]:
        rows = [
            (name, backend, output, measured)
            for name, graph in self.graphs.items()
            for backend, outputs in graph.errors.items()
            for output, measured in outputs.items()
        ]
        return rows + [("reenactment", backend, "frames", measured) for backend, measured in self.reenactment.items()]
