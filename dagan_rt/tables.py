"""TOML and JSON tables into frozen dataclasses; what is wrong is named by file and key."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from dagan_rt.errors import InputError, require

LARGEST_FILE = 1 << 20  # bytes


def read_text(path: str | Path, what: str = "recipe") -> str:
    """The text of a small UTF-8 file; InputError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > LARGEST_FILE:
        raise InputError(f"{what} {path} must be at most {LARGEST_FILE} bytes")
    return text


def read_json(path: str | Path, what: str) -> Any:
    """The value in a small JSON file; InputError if it cannot be read."""
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON, got something else ({str(error)[:200]})") from None


def parse(text: str, name: str) -> dict[str, Any]:
    """The tables of a TOML text; `name` is what error messages call it."""
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli", extra="dev", why="reading recipes")
    try:
        return toml.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, and what endless numbers and nesting bring
        raise InputError(f"{name} is not valid TOML: {error}") from None


def table(tables: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    """The table `key`, empty where it is left out."""
    value = tables.get(key, {})
    if not isinstance(value, dict):
        raise InputError(f"{name}: [{key}] must be a table, got {type(value).__name__}")
    return value


def refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...], name: str, where: str) -> None:
    """InputError naming the first key that is not one of `known`."""
    for key in given:
        if key not in known:
            known_keys = ", ".join(known)
            raise InputError(f"{name}: {_dotted(where, key)} is not a known key; expected one of {known_keys}")


def fill(cls: Any, table: Mapping[str, Any], name: str, where: str = "", base: Any = None) -> Any:
    """A dataclass from a table; what the table leaves out comes from `base` or the defaults.

    Types are those of the fields: str, bool, int (of 64 bits), float (finite, neither negative), tuples, dicts of str,
    dataclasses.
    A dataclass with a classmethod `from_number` may also be given as one number.
    """
    if not isinstance(table, Mapping):
        raise InputError(f"{name}: {where or 'the content'} must be a table, got {type(table).__name__}")
    hints = get_type_hints(cls)
    refuse_unknown(table, tuple(entry.name for entry in fields(cls)), name, where)
    values = {}
    for key, value in table.items():
        previous = getattr(base, key, None) if base is not None else None
        values[key] = _checked(value, hints[key], name, _dotted(where, key), previous)
    try:
        return replace(base, **values) if base is not None else cls(**values)
    except TypeError:  # a field without a default
        absent = [entry.name for entry in fields(cls) if entry.name not in values]
        raise InputError(f"{name}: {where or 'the table'} lacks {', '.join(absent)}") from None


def printable(text: str) -> str:
    """One line that cannot steer a terminal: for names out of foreign files."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _dotted(where: str, key: str) -> str:
    key = printable(key[:80])
    return f"{where}.{key}" if where else key


def _checked(value: Any, hint: Any, name: str, where: str, previous: Any) -> Any:
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        if hasattr(hint, "from_number") and type(value) in (int, float):
            value = vars(hint.from_number(value))
        if not isinstance(value, dict):
            raise InputError(f"{name}: {where} must be a table, got {type(value).__name__}")
        return fill(hint, value, name, where, previous)
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise InputError(f"{name}: {where} must be a table, got {type(value).__name__}")
        kind = get_args(hint)[1]
        return {str(key): _checked(entry, kind, name, _dotted(where, str(key)), None) for key, entry in value.items()}
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(value, list) or (kinds[-1] is not Ellipsis and len(value) != len(kinds)):
            length = "" if kinds[-1] is Ellipsis else f"{len(kinds)} "
            raise InputError(f"{name}: {where} must be a list of {length}{kinds[0].__name__}, got {_shown(value)}")
        return tuple(_checked(entry, kinds[0], name, f"{where}[{i}]", None) for i, entry in enumerate(value))
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not hint:
        raise InputError(f"{name}: {where} must be {hint.__name__}, got {type(value).__name__} {_shown(value)}")
    if hint in (int, float) and not 0 <= value < (math.inf if hint is float else 1 << 63):
        raise InputError(f"{name}: {where} must be finite and not negative, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A value from anywhere in an error message: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists within lists within lists
        return "too much to print"
    return text if len(text) <= 80 else f"{text[:80]}…"
