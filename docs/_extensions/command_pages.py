"""The command reference, written from the parsers themselves each time the documentation is built.

A page holds the line `<!-- commands: dagan_rt.cli -->`; it is replaced by what that module's parser declares.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

MARKER = re.compile(r"^<!-- commands: ([\w.]+)((?: [\w-]+)*) -->$", re.MULTILINE)
WIDTH = "100"  # of usage lines, in characters


class Asked(BaseException):
    """Carries a parser out of the program that was about to use it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def parser_of(module: str, words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser that `python -m MODULE WORDS…` parses its command line with; nothing else of the program runs."""

    def ask(parser: argparse.ArgumentParser, *args: Any, **more: Any) -> Any:
        raise Asked(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", ask):
        try:
            program_of(module)(list(words))
        except Asked as asked:
            return asked.parser
    raise LookupError(f"{module} parses no arguments")


def program_of(module: str) -> Any:
    """The function `main(argv)` that `python -m MODULE` calls."""
    for name in (f"{module}.__main__", module):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(name)
            if hasattr(found, "main"):
                return found.main
    raise LookupError(f"{module} has no main")


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """Each command below a parser that has options of its own: its name, its parser, and its line of help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, below in action.choices.items():
                yield name, below, helps.get(name, "")


def plain(text: str) -> str:
    """Text whose characters mean nothing in Markdown."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))


def markdown(parser: argparse.ArgumentParser, level: int = 2, said: str = "") -> str:
    """A program, its options, and each of its commands likewise below it."""
    below = list(commands(parser))
    description = parser.description or ""
    parts = [f"{'#' * level} {parser.prog}", ""]
    words = description if description else said and said[0].upper() + said[1:] + "."
    parts += [f"{plain(words)}", ""] if words else []
    with mock.patch.dict("os.environ", COLUMNS=WIDTH, NO_COLOR="1"):
        usage = parser.format_usage().removeprefix("usage: ").rstrip()
        if not below:
            parts += ["```text", re.sub(r"^ {7}", "", usage, flags=re.MULTILINE), "```", ""]
        parts += options(parser)
    if parser.epilog:
        parts += [plain(parser.epilog), ""]
    parts += [markdown(it, level + 1, help) for _, it, help in below]
    return "\n".join(parts)


def options(parser: argparse.ArgumentParser) -> list[str]:
    """A list of what a command takes, in the order of its help."""
    lines: list[str] = []
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)) or action.help == argparse.SUPPRESS:
            continue
        if action.option_strings:
            value = "" if action.nargs == 0 else " " + formatter._format_args(action, _metavar(action))
            name = ", ".join(f"`{option}{value}`" for option in action.option_strings)
        else:
            name = f"`{formatter._format_args(action, _metavar(action)).strip('[]')}`"
        needed = " (required)" if action.required and action.option_strings else ""
        help = plain(formatter._expand_help(action)) if action.help else ""
        lines += [f"{name}{needed}", f": {help or 'see the usage above'}", ""]
    return lines


def _metavar(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper() if action.option_strings else action.dest


def filled(text: str) -> str:
    """A page with its markers replaced."""
    return MARKER.sub(lambda match: markdown(parser_of(match[1], match[2].split())), text)


def _read(app: Any, name: str, source: list[str]) -> None:
    source[0] = filled(source[0])


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
