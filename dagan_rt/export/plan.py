"""What to export: precision, batch, targets. A whole deployment, from a recipe's TOML table or the command line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from dagan_rt._assets import asset
from dagan_rt.bundle import BatchProfile
from dagan_rt.engines import CAPABILITY, FLAVOURS
from dagan_rt.errors import InputError
from dagan_rt.plugins import KINDS
from dagan_rt.serving.repository import ServingPlan
from dagan_rt.tables import fill, parse, read_text, table

T = TypeVar("T")

TRITON = "triton"  # the target, and the table of a recipe that says how
TARGETS = ("onnx", *FLAVOURS, TRITON)
OPSETS = range(17, 21)  # GridSample came with 16; the tracer's limit is 20
REWRITES = ("cpu", "openvino", "none")
#: Least PSNR in dB of reenacted frames against fp32 PyTorch; fp32 is held to `verify.EXACT_FRAMES` instead.
BUDGETS = {"fp32": 0.0, "fp16": 45.0, "int8": 35.0, "auto": 40.0}


@dataclass(frozen=True)
class Plan:
    """One deployment; every field is a key of a recipe and an option of the command."""

    precision: str = "fp32"  # or fp16, int8, or auto: for each graph the fastest that keeps the budget
    targets: tuple[str, ...] = ("onnx",)  # ONNX graphs are always written; "triton" puts all into a model repository
    batch: str = "1:1:8"  # a BatchProfile
    budget: float = 0.0  # least PSNR in dB of reenacted frames; 0 takes the precision's own
    calibrate: str = ""  # what int8 is calibrated on: a folder of clips and pictures, or "heads", synthetic ones
    opset: int = 17
    only: tuple[str, ...] = ()  # these subnetworks instead of the four that reenact
    torch_weights: bool = True  # also store the checkpoint, which the torch backend needs
    compute_capabilities: tuple[str, ...] = ()  # GPUs that engines are built for, as "8.9"; empty: the flavour's choice
    strip_weights: bool = False  # engines without weights, filled from the ONNX graphs beside them when loaded
    plugins: str = ""  # dagan-rt's kernels in engines, as one of `dagan_rt.plugins.KINDS`; empty: the library's own
    rewrites: str = "cpu"  # what the ONNX graphs are rewritten for, one of REWRITES; beside engines they never are

    def __post_init__(self) -> None:
        self.profile  # noqa: B018 (raises for a wrong batch)
        if self.precision not in BUDGETS:
            raise InputError(f"precision must be one of {', '.join(BUDGETS)}, got {self.precision!r}")
        for target in self.targets:
            if target not in TARGETS:
                raise InputError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
        if self.opset not in OPSETS:
            raise InputError(f"opset must be in {OPSETS.start}..{OPSETS.stop - 1}, got {self.opset}")
        if self.precision == "int8" and not self.calibrate:
            raise InputError(
                "int8 needs frames to calibrate on: give a folder of clips with --calibrate, "
                "or --calibrate heads for synthetic ones"
            )
        if self.budget and self.precision == "fp32":
            raise InputError("budget is for fp16, int8 and auto: fp32 is held to the last 8-bit level")
        if self.calibrate and self.precision not in ("int8", "auto"):
            raise InputError(f"calibrate is for int8 and auto, got it with the precision {self.precision}")
        for capability in self.compute_capabilities:
            if not CAPABILITY.fullmatch(capability):
                raise InputError(f"a compute capability must be a number such as 8.9, got {capability!r}")
        if self.plugins not in ("", *KINDS):
            raise InputError(f"plugins must be one of {', '.join(KINDS)}, got {self.plugins!r}")
        if self.plugins == "aot" and "tensorrt-rtx" in self.flavours:
            raise InputError("plugins of the kind aot are for tensorrt alone: name python for tensorrt-rtx")
        if self.rewrites not in REWRITES:
            raise InputError(f"rewrites must be one of {', '.join(REWRITES)}, got {self.rewrites!r}")
        for name in ("compute_capabilities", "strip_weights", "plugins"):
            if getattr(self, name) and not self.flavours:
                raise InputError(f"{name} is for engines: name the target tensorrt or tensorrt-rtx too")

    @property
    def profile(self) -> BatchProfile:
        """The batch sizes."""
        return BatchProfile.parse(self.batch)

    @property
    def flavours(self) -> tuple[str, ...]:
        """The kinds of TensorRT to build engines for."""
        return tuple(target for target in dict.fromkeys(self.targets) if target in FLAVOURS)

    @property
    def repository(self) -> bool:
        """Whether a model repository for Triton is wanted, with the bundle inside it."""
        return TRITON in self.targets

    @property
    def rewritten_for_cpus(self) -> bool:
        """Whether the graphs take the forms that are faster on CPUs; engines are built from graphs as traced."""
        return self.rewrites != "none" and not self.flavours

    @property
    def least_psnr(self) -> float:
        """The budget in force, dB."""
        return self.budget or BUDGETS[self.precision]

    @property
    def digest(self) -> str:
        """A short hash of everything in the plan, part of an engine's key."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain strings, numbers and lists, for a manifest."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def read_plan(recipe: str | None, changes: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a recipe with some keys changed.

    recipe: a TOML file, the name of one that ships with dagan-rt, as `cpu-int8`, or None for the defaults.
    changes: values as TOML has them (lists, not tuples), which replace the recipe's.
    Raises InputError naming the file and the key of what is wrong.
    """

    def of(tables: Mapping[str, Any], name: str) -> Plan:
        plan: Plan = fill(
            Plan, {key: value for key, value in tables.items() if key != TRITON} | dict(changes or {}), name
        )
        return plan

    return _read(recipe, of, bool(changes))


def read_serving(recipe: str | None, changes: Mapping[str, Any] | None = None) -> ServingPlan:
    """How a model repository serves: the table [triton] of a recipe with some keys changed; as `read_plan`."""

    def of(tables: Mapping[str, Any], name: str) -> ServingPlan:
        where = TRITON if recipe is not None else ""
        plan: ServingPlan = fill(ServingPlan, table(tables, TRITON, name) | dict(changes or {}), name, where)
        return plan

    return _read(recipe, of, bool(changes))


def _read(recipe: str | None, of: Callable[[Mapping[str, Any], str], T], changed: bool) -> T:
    """What `of` makes of the tables of a recipe, which its errors name."""
    if recipe is None:
        return of({}, "the options")
    path = Path(recipe)
    if not path.is_file() and path.name == recipe and not path.suffix:
        shipped = sorted(file.stem for file in asset("export", "recipes").glob("*.toml"))
        if recipe not in shipped:
            raise InputError(f"recipe must be a TOML file or one of {', '.join(shipped)}, got {recipe!r}")
        path = asset("export", "recipes", f"{recipe}.toml")
    text = read_text(path)
    try:
        return of(parse(text, recipe), recipe)
    except InputError as error:
        if str(error).startswith(recipe):
            raise
        raise InputError(f"{recipe}{', changed by options' if changed else ''}: {error}") from None
