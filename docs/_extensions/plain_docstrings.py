"""Docstrings as this package writes them, for autodoc: plain paragraphs, `code` in backticks, arguments as "name: …".

    image: HWC uint8 RGB.        a line that names arguments of the function, or fields of the class, begins an entry,
                                 and so does a further name after a sentence of it
    - a point                    a list
        stream.push(frame)       four spaces more than the text: an example

Fields of dataclasses, named tuples and protocols are listed with their types, defaults, and the comments on their
lines.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

ENTRY = re.compile(r"([a-z_][a-z0-9_]*(?:, [a-z_][a-z0-9_]*)*): (.*)")
FURTHER = re.compile(r"([.;)]) (?=([a-z_][a-z0-9_]*(?:, [a-z_][a-z0-9_]*)*): )")
GENERATED = ("Alias for field number", "Create new instance of")  # what Python writes about named tuples


def names_of(thing: Any) -> set[str]:
    """The arguments of a function or class, and the fields of a class."""
    names = set(getattr(thing, "__annotations__", {}) if inspect.isclass(thing) else {})
    with contextlib.suppress(TypeError, ValueError):
        names |= set(inspect.signature(thing).parameters)
    return names


def inline(text: str) -> str:
    """Plain text with `code` in backticks as reStructuredText."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick without its twin
        return re.sub(r"([\\*|_`])", r"\\\1", text)
    out = ""
    for index, part in enumerate(parts):
        if index % 2 == 0:
            glue = "\\ " if index and part[:1].isalnum() else ""
            out += glue + re.sub(r"([\\*|_])", r"\\\1", part)
        else:
            out += ("\\ " if out[-1:].isalnum() else "") + f"``{part}``"
    return out


def blocks(lines: list[str]) -> list[list[str]]:
    """Lines between blank ones."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [block for block in found if block]


def entries(block: list[str], names: set[str]) -> list[tuple[str, list[str]]]:
    """The pieces of a block: ("", text), or the names of an entry and what is said of them; ("-", text) of a list."""
    pieces: list[tuple[str, list[str]]] = []
    for line in block:
        match = ENTRY.fullmatch(line)
        if match and set(match[1].split(", ")) <= names:
            pieces.append((match[1], [match[2]]))
        elif line.startswith("- "):
            pieces.append(("-", [line[2:]]))
        elif not pieces or (
            pieces[-1][0] and not line.startswith("  ") and pieces[-1][1][-1].endswith((".", ")", ":"))
        ):
            pieces.append(("", [line]))  # a sentence at the margin, after an entry that has ended
        else:
            pieces[-1][1].append(line.strip())
    return [piece for name, said in pieces for piece in apart(name, said, names)]


def apart(name: str, said: list[str], names: set[str]) -> Iterator[tuple[str, list[str]]]:
    """An entry and those that begin inside it, one by one."""
    text, start = " ".join(line.strip() for line in said), 0
    for match in FURTHER.finditer(text) if name not in ("", "-") else ():
        if set(match[2].split(", ")) <= names:
            yield name, [text[start : match.start()] + match[1].replace(";", ".")]
            name, start = match[2], match.end() + len(match[2]) + 2
    yield name, [text[start:]]


def converted(lines: list[str], names: set[str]) -> list[str]:
    """A docstring as reStructuredText."""
    out: list[str] = []
    example = False
    for block in blocks(lines):
        if all(line.startswith("    ") for line in block):
            out += [*([] if example else ["::", ""]), *block, ""]
            example = True
            continue
        example = False
        for name, said in entries(block, names):
            words = inline(" ".join(line.strip() for line in said))
            if name == "-":
                out += [f"- {words}", ""]
            elif name:
                out += [f"- {_bold(name)}: {words}", ""]
            else:
                out += [words, ""]
    return out


def fields(thing: type) -> Iterator[tuple[str, str, str]]:
    """Of a dataclass or named tuple: name, annotation with the default, and the comment on its line."""
    source = textwrap.dedent(inspect.getsource(thing))
    lines = source.split("\n")
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if node.target.id.startswith("_"):
            continue
        declared = ast.unparse(node.annotation)
        if node.value is not None and not (
            isinstance(node.value, ast.Call) and "field" in ast.unparse(node.value.func)
        ):
            declared += f" = {ast.unparse(node.value)}"
        _, _, comment = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")
        yield node.target.id, declared, "" if comment.startswith("noqa") else comment


def _bold(names: str) -> str:
    return ", ".join(f"**{name}**".replace("_", r"\_") for name in names.split(", "))


def _listed(thing: Any) -> bool:
    """Whether the fields of a class are worth a list."""
    return inspect.isclass(thing) and (
        dataclasses.is_dataclass(thing) or hasattr(thing, "_fields") or getattr(thing, "_is_protocol", False)
    )


def _process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    if any(line.startswith(GENERATED) for line in lines):  # autodoc asks for what __init__ says, too
        lines.clear()
        return
    names = names_of(thing)
    if what == "class":
        names |= names_of(getattr(thing, "__init__", None))
    told = {it for block in blocks(lines) for entry, _ in entries(block, names) for it in entry.split(", ")}
    lines[:] = converted(lines, names)
    if _listed(thing):
        for field, declared, comment in fields(thing):
            if field not in told:
                said = f": {inline(comment)}" if comment else ""
                lines += [f"- {_bold(field)} (``{declared}``){said}", ""]


def _skip(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what the list of fields has said."""
    return True if (getattr(thing, "__doc__", None) or "").startswith(GENERATED) else None


def _signature(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, None] | None:
    """No arguments beside the name of a class whose fields are listed below it."""
    return ("", None) if what == "class" and _listed(thing) else None


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
