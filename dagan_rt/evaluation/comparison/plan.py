"""What is trained for the comparison: one recipe a variant, equal but for the variant, times the seeds."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.networks.variants import VARIANTS
from dagan_rt.tables import parse
from dagan_rt.training.inherit import resolved_text, to_toml
from dagan_rt.training.recipe import Recipe, parse_recipe

DEPTH = "depth"
PREFIX = "table1-"
FREE = ("variant", "num_keypoints")
"""Keys of [network] in which the recipes may differ: the variant and what it brings."""

Tables = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Recipes by variant, and that of the depth network which the variants with depth share; all as TOML tables."""

    variants: dict[str, Tables]
    depth: Tables | None
    seeds: int

    @classmethod
    def read(cls, folder: Path, variants: tuple[str, ...], seeds: int, budget_steps: int | None = None) -> Plan:
        """`table1-VARIANT.toml` of each variant and, where one has depth, `table1-depth.toml`, out of `folder`.

        budget_steps: about as many steps a run instead of the recipe's; every stage is shortened by the same factor.
        InputError where recipes differ in more than the variant, or do not fit together.
        """
        if len(set(variants)) != len(variants) or not variants:
            raise InputError(f"variants must be one or more different names, got {', '.join(variants) or 'none'}")
        read = {variant: _read(folder, variant) for variant in variants}
        for variant, tables in read.items():
            if _network(tables).get("variant") != variant:
                raise InputError(
                    f"{_file(folder, variant)}: network.variant must be {variant!r}, as in the file's name"
                )
            _check_alike(tables, read[variants[0]], _file(folder, variant), _file(folder, variants[0]))
        with_depth = [variant for variant in variants if VARIANTS[variant].uses_depth]
        depth = _read(folder, DEPTH) if with_depth else None
        if depth is not None:
            _check_depth(depth, read[with_depth[0]], _file(folder, DEPTH))
        if budget_steps is not None:
            total = sum(stage.get("steps", 0) for stage in read[variants[0]]["stage"])
            for tables in [*read.values(), *([depth] if depth is not None else [])]:
                _shorten(tables, budget_steps / max(1, total))
        return cls(read, depth, seeds)

    def recipe(self, variant: str, seed: int, depth: Path | None = None) -> Recipe:
        """The complete recipe of one run. depth: the folder of the trained depth network, for variants that use one."""
        tables = copy.deepcopy(self.variants[variant])
        tables.setdefault("training", {})["seed"] = seed
        if VARIANTS[variant].uses_depth:
            if depth is None:
                raise InputError(f"{variant} needs the folder of a trained depth network, got none")
            tables["start"] = {"depth": str(depth)}
        return parse_recipe(f"# {variant}, seed {seed}\n\n{to_toml(tables)}", f"recipe of {variant}")

    def depth_recipe(self) -> Recipe:
        """The recipe of the shared depth network."""
        assert self.depth is not None
        return parse_recipe(f"# depth\n\n{to_toml(self.depth)}", "recipe of the depth network")

    def digests(self) -> dict[str, str]:
        """SHA-256 of each recipe's content, which formatting and comments leave as it is."""
        named = self.variants | ({DEPTH: self.depth} if self.depth is not None else {})
        return {name: digest(tables) for name, tables in named.items()}


def digest(content: Any) -> str:
    """SHA-256 of plain numbers, strings, lists and tables, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file(folder: Path, name: str) -> Path:
    return folder / f"{PREFIX}{name}.toml"


def _read(folder: Path, name: str) -> Tables:
    path = _file(folder, name)
    text = resolved_text(path)
    recipe = parse_recipe(text, str(path))
    if recipe.data.kind != "heads":
        raise InputError(
            f'{path}: data.kind must be "heads", whose truth the comparison needs, got {recipe.data.kind!r}'
        )
    if recipe.start.model or recipe.start.depth:
        raise InputError(f"{path}: [start] must be left out: the comparison trains everything itself")
    return parse(text, str(path))


def _network(tables: Tables) -> Tables:
    return tables.get("network", {})


def _check_alike(tables: Tables, others: Tables, path: Path, other: Path) -> None:
    for key in sorted({*tables, *others}):
        mine, theirs = (
            {name: value for name, value in it.items() if name not in FREE} if key == "network" else it
            for it in (tables.get(key, {}), others.get(key, {}))
        )
        if mine != theirs:
            raise InputError(f"{path} and {other} must be equal but for {' and '.join(FREE)}, and differ in {key!r}")


def _check_depth(depth: Tables, tables: Tables, path: Path) -> None:
    for key in sorted(key for key in {*_network(depth), *_network(tables)} if key.startswith("depth_")):
        if _network(depth).get(key) != _network(tables).get(key):
            raise InputError(f"{path}: network.{key} must be {_network(tables).get(key)}, as in the variants' recipes")
    if not all(stage.losses.trains_depth_alone for stage in parse_recipe(to_toml(depth), str(path)).stages):
        raise InputError(f"{path}: every stage must train depth alone, from frames (losses.photometric above 0)")


def _shorten(tables: Tables, factor: float) -> None:
    for stage in tables["stage"]:
        if "steps" not in stage:
            raise InputError(
                f"stage {stage.get('name')!r} counts epochs; only stages that count steps can be shortened"
            )
        stage["steps"] = max(1, round(stage["steps"] * factor))
        if "warmup" in stage:
            stage["warmup"] = min(stage["warmup"], max(1, round(stage["warmup"] * factor)))
