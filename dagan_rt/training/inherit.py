"""Recipes that differ in a few lines: `base = "other.toml"` at the top of a file, resolved into one complete text.

The file's tables are merged into the base's key by key. Stages, which are a list, are either replaced whole (the file
has `[[stage]]` tables of its own) or patched by name (`[stage.NAME]` changes keys of the base's stage of that name).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.tables import parse, printable, read_text

MOST_BASES = 8
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def resolved_text(path: str | Path) -> str:
    """The text of a recipe with nothing left to look up: the file as it is, or merged with its base and written anew.

    A base lies in the same folder and may have a base itself, up to `MOST_BASES`. InputError names the file and what
    is wrong with it.
    """
    text = read_text(path)
    if "base" not in parse(text, str(path)):
        return text
    chain = [Path(path)]
    tables = _with_bases(chain)
    names = " on ".join(link.name for link in chain)
    return f"# {names}, merged\n\n{to_toml(tables)}"


def merge(base: dict[str, Any], change: dict[str, Any], name: str) -> dict[str, Any]:
    """`base` with the keys of `change` put in, tables within tables alike; neither is altered.

    A table of tables laid over a list of tables (stages) changes those entries by their `name`; InputError, with
    `name` for the file, where there is no such entry or a table meets something that is none.
    """
    merged = dict(base)
    for key, value in change.items():
        before = base.get(key)
        if isinstance(value, dict) and isinstance(before, list):
            merged[key] = _patched(before, value, f"{name}: [{printable(key)}", name)
        elif isinstance(value, dict) and isinstance(before, dict):
            merged[key] = merge(before, value, name)
        elif isinstance(before, dict) and not isinstance(value, dict) and type(value) not in (int, float):
            raise InputError(f"{name}: {printable(key)} must be a table, as in its base, got {type(value).__name__}")
        else:
            merged[key] = value  # a number over a table is one learning rate for all networks
    return merged


def to_toml(tables: dict[str, Any]) -> str:
    """TOML text of tables of strings, numbers, booleans, lists and tables: what recipes hold. InputError otherwise."""
    plain = {key: value for key, value in tables.items() if not isinstance(value, dict) and not _is_tables(value)}
    parts = ["".join(_line(key, value) for key, value in plain.items())]
    for key, value in tables.items():
        if key in plain:
            continue
        head = f"[{_key(key)}]\n" if isinstance(value, dict) else f"[[{_key(key)}]]\n"
        for entry in [value] if isinstance(value, dict) else value:
            parts.append(head + "".join(_line(name, inner) for name, inner in entry.items()))
    return "\n".join(part for part in parts if part)


def _with_bases(chain: list[Path]) -> dict[str, Any]:
    """Tables of the last file of `chain`, merged into those of its bases; they are added to the chain."""
    path = chain[-1]
    tables = parse(read_text(path), str(path))
    if "base" not in tables:
        return tables
    base = tables.pop("base")
    if not isinstance(base, str) or not base.endswith(".toml") or base != Path(base).name or "\\" in base:
        raise InputError(f'{path}: base must be the plain name of a recipe in the same folder, such as "x.toml"')
    following = path.with_name(base)
    if len(chain) > MOST_BASES:
        raise InputError(f"{path}: base {printable(base)} leads in a circle or through more than {MOST_BASES} files")
    chain.append(following)
    return merge(_with_bases(chain), tables, str(path))


def _patched(entries: list[Any], changes: dict[str, Any], where: str, name: str) -> list[Any]:
    places = {entry.get("name"): place for place, entry in enumerate(entries) if isinstance(entry, dict)}
    patched = list(entries)
    for entry, change in changes.items():
        if entry not in places or not isinstance(change, dict):
            known = ", ".join(printable(str(place)) for place in places)
            raise InputError(f"{where}.{printable(entry)}] must be a table for one of the base's: {known}")
        patched[places[entry]] = merge(entries[places[entry]], change, name)
    return patched


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def _line(key: str, value: Any) -> str:
    return f"{_key(key)} = {_value(value)}\n"


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_value(inner) for inner in value) + "]"
    if isinstance(value, str):  # a basic string's escapes are JSON's, and DEL must be one of them
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (bool, int)):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value)  # inf and nan included, as TOML writes them
    raise InputError(f"a recipe cannot hold a {type(value).__name__}: {value}")
