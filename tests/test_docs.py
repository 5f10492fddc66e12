"""What README.md and docs/ say is so: commands parse, examples run, files, options, targets and links exist.

Every fenced block is one of these:

- `bash`, or no language: each line is parsed by the very parser of its program; one `…` stands for what is required.
  Lines under a comment `<!-- not run: why -->` as well. Those in CHEAP are really run.
- `python`: run in a folder that holds a bundle, a portrait and a clip, with `image`, `portrait`, `frame`, `frames` and
  `show` there; under `<!-- not run: why -->` only compiled, its names looked up and its arguments compared with the
  signatures, as those of all others are, too. NOT_RUN counts them.
- with a `:caption:`, a file of the checkout that a tutorial adds: written to a copy of it, where its tests are run.
- `text`: what something printed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from dagan_rt.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(path for path in DOCS.rglob("*.md"))]

#: Why blocks are not run, and how many are not: a new one is a decision, not an accident.
NOT_RUN = {"server": 1, "gpu": 1, "container": 1}
#: Beginnings of lines that are run for real, since they are quick and need only what the folder holds.
CHEAP = (
    "dagan-rt info bundle/", "dagan-rt explain --bundle bundle/", "dagan-rt animate --bundle bundle/",
    "dagan-rt motion --bundle bundle/", "dagan-rt triton write bundle/", "dagan-rt triton check repository/",
)  # fmt: skip
#: What `…` stands for after a program, and what lines that leave out the obvious are given.
LEFT_OUT = {
    "dagan_rt.export": {"--checkpoint": "model.pth.tar", "--depth": "depth/", "--out": "bundle/"},
    "train": {"--recipe": "train/recipes/demo.toml", "--out": "runs/x"},
    "animate": {"--bundle": "bundle/", "--source": "portrait.png", "--driving": "clip.mp4", "--out": "result.mp4"},
    "evaluate": {"--out": "scores/"},
    "heads": {"--out": "heads/"},
    "prepare": {"--out": "data/"},
    "explain": {"--bundle": "b/", "--source": "portrait.png", "--driving": "clip.mp4", "--out": "sheet.png"},
    "write": {"": "bundle/", "--out": "repository/"},
}
#: Programs of other people, whose arguments are theirs.
OTHERS = {"pip", "apt-get", "curl", "docker", "kubectl", "helm", "tensorboard", "tritonserver", "git"}


# ---- pages and their blocks ----


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    caption: str  # the file that it is, or ""
    not_run: str  # why, or ""
    with_files: tuple[str, ...]  # captions of files that have to be there

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


_FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[\w ]+) -->\n|<!-- run with: (?P<files>[\w./ ]+) -->\n)?"
    r"^(?P<fence>```+)(?P<head>[^\n`]*)\n(?P<body>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)


@functools.cache
def blocks_of(page: Path) -> tuple[Block, ...]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        head, body, caption = match["head"].strip(), match["body"], ""
        if head.startswith("{") and not head.startswith("{code-block}"):
            continue  # a directive: what it holds is Sphinx's to check
        head = head.removeprefix("{code-block}").strip()
        if options := re.match(r"(?::\w+: .*\n)+\n?", body):
            (caption,) = re.findall(r"^:caption: (.*)$", options[0], re.MULTILINE)
            body = body[options.end() :]
        line = text.count("\n", 0, match.start("fence")) + 1
        files = tuple((match["files"] or "").split())
        found.append(Block(page, line, head or "bash", body, caption, match["why"] or "", files))
    return tuple(found)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
PYTHON = [block for block in BLOCKS if block.language == "python" and not block.caption]
FILES = {block.caption: block for block in BLOCKS if block.caption}


def prose(page: Path) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def lines_of(block: Block) -> list[list[str]]:
    """The words of each command, comments left out."""
    text = block.text.replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@functools.cache
def extension(name: str) -> Any:
    """A module of docs/_extensions/."""
    spec = importlib.util.spec_from_file_location(f"dagan_rt_docs_{name}", DOCS / "_extensions" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_block_has_a_language_that_is_known() -> None:
    known = {"bash", "python", "text", "toml", "cuda"}
    assert [f"{block} {block.language}" for block in BLOCKS if block.language not in known] == []
    assert [str(block) for block in BLOCKS if block.language in ("toml", "cuda") and not block.caption] == []


def test_what_is_not_run_is_counted() -> None:
    assert Counter(block.not_run for block in BLOCKS if block.not_run) == NOT_RUN


# ---- commands ----


class Parsed(BaseException):
    """Carries what a program has parsed out of it, before it does anything."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments


def parse(module: str, words: list[str]) -> argparse.Namespace:
    """What `python -m MODULE WORDS…` makes of its command line, by its own parser."""
    original = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *args: Any, **more: Any) -> Any:
        raise Parsed(original(parser, *args, **more))

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                code = extension("command_pages").program_of(module)(words)
        except Parsed as parsed:
            return parsed.arguments
        except SystemExit as error:
            code = error.code
    raise AssertionError(f"python -m {module} {shlex.join(words)}: exit {code}: {said.getvalue()}")


def completed(module: str, words: list[str], always: bool = False) -> list[str]:
    """Words with what `…` stands for in its place, or where asked for, with what is required at the end."""
    if "…" not in words and not always:
        return words
    key = module if module in LEFT_OUT else next((word for word in words if word in LEFT_OUT), "")
    given = LEFT_OUT.get(key, {})
    rest = [word for word in words if word != "…"]
    if module == "dagan_rt.export" and "--rebuild" in rest:
        given = {}
    if "…" in words and "" in given:  # an argument without a name
        rest.append(given[""])
    return [
        *rest,
        *(part for option, value in given.items() if option and option not in rest for part in (option, value)),
    ]


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """The module and the arguments of a program of ours; None for another's."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if words and words[0] == "dagan-rt":
        return "dagan_rt", words[1:]
    if "-m" in words and (Path(words[0]).name.startswith("python") or words[0] == "torchrun"):
        at = words.index("-m")
        if words[at + 1].split(".")[0] == "dagan_rt":
            return words[at + 1], words[at + 2 :]
    return None


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def extras() -> dict[str, Any]:
    """What setup.py declares, without building anything."""
    declared: dict[str, Any] = {}
    with mock.patch("setuptools.setup", lambda **given: declared.update(given)):
        spec = importlib.util.spec_from_file_location("dagan_rt_setup", ROOT / "setup.py")
        assert spec and spec.loader
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return declared["extras_require"]


def check_command(words: list[str]) -> None:
    """Raise AssertionError unless this line can be meant."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if ours := program(words):
        module, rest = ours
        parse(module, completed(module, rest))
        named = [word for word in rest if re.match(r"(train|tests|benchmarks|export|kernels)/.*\.\w+$", word)]
        for name in named:
            assert (ROOT / name).exists() or name in FILES, f"{shlex.join(words)}: {name} is not there"
    elif words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert set(targets) <= makefile_targets(), shlex.join(words)
    elif "pip" in words and "install" in words:
        for word in words[words.index("install") + 1 :]:
            if match := re.fullmatch(r"dagan-rt\[([\w,-]+)\]", word):
                assert set(match[1].split(",")) <= set(extras()), word
    elif words[:3] == ["python", "-m", "pytest"]:
        for word in words[3:]:
            assert not word.startswith("tests/") or (ROOT / word).exists() or word in FILES, word
    elif words[0].endswith(("python", "python3")):
        assert words[1:3] == ["-m", "venv"] or (ROOT / words[1]).is_file(), shlex.join(words)
    else:
        assert words[0] in OTHERS, f"{shlex.join(words)}: what is {words[0]}?"


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_what_their_programs_take(block: Block) -> None:
    for words in lines_of(block):
        check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_in_the_text_are_what_their_programs_take(page: Path) -> None:
    for code in re.findall(r"(?<!`)`((?:dagan-rt |python -m dagan_rt|torchrun |make )[^`]*)`(?!`)", prose(page)):
        words = shlex.split(" ".join(code.split()))
        ours = program(words)
        if ours is None:
            assert words[0] in ("make", "dagan-rt") and set(words[1:]) <= makefile_targets() | {"TORCH=…"}, code
            continue
        module, rest = ours
        if rest and not rest[-1].startswith("-"):  # the name of a command alone is no whole line
            with contextlib.suppress(LookupError):
                named = extension("command_pages").parser_of(module, rest)
                if named.prog.endswith(f" {shlex.join([module, *rest])}"):
                    continue
                while rest and rest[0] in (below := dict((n, p) for n, p, _ in commands_of(named))):
                    named, rest = below[rest[0]], rest[1:]
                if not rest:
                    continue
                rest = ours[1]
        if not rest:
            assert extension("command_pages").program_of(module), code
            continue
        flags = [word for word in rest if word.startswith("--")]
        if rest[-1] in flags and not _is_flag(module, rest):  # an option is named without its value
            rest = [*rest, "1"]
        parse(module, completed(module, rest, always=True))


def commands_of(parser: argparse.ArgumentParser) -> Any:
    return extension("command_pages").commands(parser)


def _all_options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    yield from parser._actions
    for _, below, _ in commands_of(parser):
        yield from _all_options(below)


def _is_flag(module: str, rest: list[str]) -> bool:
    parser = extension("command_pages").parser_of(module, rest)
    return all(it.nargs in (0, "?") for it in _all_options(parser) if rest[-1] in it.option_strings)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every program of the command reference, by how it is called."""
    page = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    pages = extension("command_pages")
    found = [pages.parser_of(module, words.split()) for module, words in pages.MARKER.findall(page)]
    return {parser.prog: parser for parser in found}


@functools.cache
def options_of() -> dict[str, set[str]]:
    """The options of each program and each command, by how it is called: "dagan-rt animate"."""
    found: dict[str, set[str]] = {}

    def add(parser: argparse.ArgumentParser) -> None:
        shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
        found[parser.prog] = {option for action in shown for option in action.option_strings}
        for _, below, _ in commands_of(parser):
            add(below)

    for parser in parsers().values():
        add(parser)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_in_the_text_exist(page: Path) -> None:
    """Of the command that its row or paragraph names, or of `dagan-rt animate`; elsewhere, of any."""
    known = options_of()
    anywhere = set().union(*known.values())
    for part in re.split(r"\n\n|\n(?=[|*-] ?)", prose(page)):
        named = [program for program in known if f"`{program}`" in part or f"`{program} " in part]
        allowed = set().union(*(known[program] for program in named)) if part.startswith("| `") and named else anywhere
        for option in re.findall(r"`(--[\w-]+)[ `]", part):
            assert option in allowed, f"{option} in: {part.strip()[:80]}"


def test_every_command_is_in_the_table() -> None:
    readme = README.read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`dagan-rt {name}`" not in readme] == []


def test_the_animate_example_parses() -> None:
    animate = [words for block in SHELL if block.page == README for words in lines_of(block) if "animate" in words]
    words = next(words for words in animate if "bundle/" in words)
    assert str(parse("dagan_rt", words[1:]).out) == "result.mp4"


def test_the_reference_has_every_command() -> None:
    text = extension("command_pages").filled((DOCS / "reference" / "commands.md").read_text(encoding="utf-8"))
    headings = set(re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    assert set(options_of()) <= headings and {f"dagan-rt {name}" for name in COMMANDS} <= headings
    for program_name, options in options_of().items():
        section = re.split(r"^#+ ", text.split(f"# {program_name}\n")[1], flags=re.MULTILINE)[0]
        missing = [option for option in options - {"-h", "--help"} if f"`{option}" not in section]
        assert missing == [], program_name


def test_programs_with_arguments_are_in_the_reference() -> None:
    """Whatever can be run with -m and parses arguments."""
    mains = [path.parent for path in (ROOT / "dagan_rt").rglob("__main__.py") if path.parent.name != "dagan_rt"]
    called = {f"python -m {'.'.join(folder.relative_to(ROOT).parts)}" for folder in mains}
    assert called <= {name for name in parsers()}


def test_training_is_told_alike_in_both_places() -> None:
    """README and tutorial: the commands that test_own_clips.py runs from beginning to end."""

    def told(page: Path) -> set[str]:
        lines = [shlex.join(words) for block in SHELL if block.page == page for words in lines_of(block)]
        return {
            line
            for line in lines
            if re.match(r"dagan-rt (prepare raw/ --out data/|train .*--batch 12|evaluate .*--data)", line)
        }

    assert len(told(README)) == 3 and told(README) == told(DOCS / "tutorials" / "train.md")


# ---- files and links ----


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files_exist(page: Path) -> None:
    for name in re.findall(r"`((?:tests|train|benchmarks|export|kernels|docs|dagan_rt)/[\w./-]+)`", prose(page)):
        known = name in FILES or any(file.startswith(name.rstrip("/") + "/") for file in FILES)
        later = name in {"dagan_rt/assets/", "kernels/fade/README.md"}  # of an installation; yours to write
        assert (ROOT / name).exists() or known or later, name


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = page.read_text(encoding="utf-8")
    if page.name == "commands.md":
        text = extension("command_pages").filled(text)
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {*names, *(re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") for heading in headings)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(
        r"^```\{(?:figure|image)\} (\S+)$", text, re.MULTILINE
    )
    for target in targets:
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert page == README or file.suffix != ".md" or file.is_relative_to(DOCS), f"{target} is no page of docs/"
        if anchor:
            assert anchor in anchors(file), f"{target}: {sorted(anchors(file))}"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set()
    for page in PAGES[1:]:
        for body in re.findall(
            r"^```\{toctree\}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            names = [line for line in body.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    assert listed == {page for page in PAGES[1:] if page != DOCS / "index.md"}


def test_the_public_names_are_in_the_reference() -> None:
    import dagan_rt
    from dagan_rt import kernels, serving

    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)$", pages, re.MULTILINE))
    for module in (dagan_rt, kernels, serving):
        names = {f"{module.__name__}.{name}" for name in module.__all__ if not name.startswith("__")}
        assert names <= documented, names - documented
    for name in documented:  # where the generator is not installed, too
        home, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(home), attribute), name


# ---- Python: looked up ----


class Names:
    """What the names of a block mean, as far as imports and annotations tell."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.types: dict[str, Any] = {}  # of variables

    def of(self, node: ast.expr) -> Any:
        """The object that an expression names, or None."""
        if isinstance(node, ast.Name):
            return self.found.get(node.id)
        if isinstance(node, ast.Attribute):
            if (kind := self.type_of(node.value)) is not None:
                assert hasattr(kind, node.attr) or node.attr in getattr(kind, "__annotations__", {}) or (
                    node.attr in _own_attributes(kind)), f"{kind.__name__} has no {node.attr}"  # fmt: skip
                return getattr(kind, node.attr, None)
            if inspect.ismodule(home := self.of(node.value)):
                assert hasattr(home, node.attr), f"{home.__name__} has no {node.attr}"
                return getattr(home, node.attr)
        return None

    def type_of(self, node: ast.expr) -> Any:
        """The class of ours that an expression's value has, or None."""
        if isinstance(node, ast.Name):
            return self.types.get(node.id)
        if isinstance(node, ast.Call):
            called = self.of(node.func)
            if inspect.isclass(called):
                return called if called.__module__.startswith("dagan_rt") else None
            if inspect.isfunction(called):
                with contextlib.suppress(NameError, TypeError):
                    returned = typing.get_type_hints(called).get("return")
                    if inspect.isclass(returned) and returned.__module__.startswith("dagan_rt"):
                        return returned
        return None


@functools.cache
def _own_attributes(kind: type) -> frozenset[str]:
    """What the methods of a class set on `self`."""
    return frozenset(re.findall(r"\bself\.(\w+)", inspect.getsource(kind)))


def check_call(called: Any, call: ast.Call, method: bool) -> None:
    """Raise AssertionError unless a function takes these arguments."""
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):
        return
    if any(isinstance(it, ast.Starred) for it in call.args) or any(it.arg is None for it in call.keywords):
        return
    given = [None] * (len(call.args) + method)
    try:
        signature.bind(*given, **{str(keyword.arg): None for keyword in call.keywords})
    except TypeError as error:
        raise AssertionError(f"{ast.unparse(call)}: {error}") from None


def look_up(text: str) -> None:
    """Compile a block, import what it imports, and compare every call of that with its signature."""
    tree = ast.parse(text)
    names = Names()

    def bind(target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name) and (kind := names.type_of(value)) is not None:
            names.types[target.id] = kind

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.found[alias.asname or alias.name.split(".")[0]] = importlib.import_module(
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            home = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(home, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                names.found[alias.asname or alias.name] = getattr(home, alias.name)
        for child in ast.iter_child_nodes(node):
            visit(child)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                bind(target, node.value)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            bind(node.optional_vars, node.context_expr)
        elif isinstance(node, ast.Attribute):
            names.of(node)
        elif isinstance(node, ast.Call) and (called := names.of(node.func)) is not None:
            bound = isinstance(node.func, ast.Attribute) and names.type_of(node.func.value) is not None
            check_call(called, node, bound and inspect.isfunction(called))

    visit(tree)


@pytest.mark.parametrize("block", [it for it in PYTHON if not it.with_files], ids=str)
def test_python_names_and_arguments_exist(block: Block) -> None:
    compile(block.text, str(block), "exec")
    look_up(block.text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("from dagan_rt import Reenactr", "Reenactr"),
        ("from dagan_rt import Reenactor\nReenactor('b/', motions='absolute')", "motions"),
        ("from dagan_rt import Reenactor\nr = Reenactor('b/')\nr.drives(1)", "no drives"),
        ("from dagan_rt.serving import Client\nwith Client('x') as c, c.open(1) as s:\n    s.stream(frame=1)", "frame"),
        ("from dagan_rt.kernels import flow_warp\nflow_warp(1, 2, 3, inplace=True)", "inplace"),
    ],
)
def test_the_looking_up_finds_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises((AssertionError, ImportError), match=message):
        look_up(text)


def test_the_parsing_finds_what_is_wrong() -> None:
    for line in (
        "dagan-rt animate --bundle b/", "dagan-rt animat", "python -m dagan_rt.export --recipie x --out y",
        "make teste",
        "pip install 'dagan-rt[tritons]'", "python -m pytest tests/test_nothing.py", "frobnicate x",
        "dagan-rt train --recipe train/recipes/nothing.toml --out runs/x",
    ):  # fmt: skip
        with pytest.raises((AssertionError, LookupError)):
            check_command(shlex.split(line))


# ---- Python and commands: run ----


@pytest.fixture(scope="module")
def workplace(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: bundle/, portrait.png, clip.mp4, nod.mp4 and nod.motion."""
    from dagan_rt.images import write_image
    from dagan_rt.training.heads import HELD_OUT, draw_clip
    from dagan_rt.video import VideoWriter

    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(tiny_bundle, folder / "bundle")
    heads = [draw_clip(HELD_OUT.start + identity, 8, 128).frames for identity in (101, 103)]
    write_image(folder / "portrait.png", heads[0][0])
    with VideoWriter(folder / "clip.mp4", 25, 128, 128) as writer:
        for number in range(32):
            writer.write(heads[1][number % 8])
    shutil.copyfile(folder / "clip.mp4", folder / "nod.mp4")
    from dagan_rt.cli import main

    options = ["--bundle", str(tiny_bundle), "--backend", "onnxruntime", "--driving", str(folder / "clip.mp4")]
    assert main(["motion", *options, "--out", str(folder / "nod.motion")]) == 0
    return folder


@pytest.fixture
def there(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, and in it."""
    folder = tmp_path / "pages"
    shutil.copytree(workplace, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("block", [it for it in PYTHON if not it.not_run and not it.with_files], ids=str)
def test_python_examples_run(block: Block, there: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(3)]
    shown: list[np.ndarray] = []
    given = {"image": pictures[0], "portrait": pictures[0], "frame": pictures[1], "frames": pictures[1:]}
    exec(compile(block.text, str(block), "exec"), {**given, "show": shown.append, "__name__": "example"})
    assert "show(" not in block.text or shown
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in shown)
    frames = 2 if "in frames:" in block.text else 32 if "in Template.read(" in block.text else 1
    assert len(shown) == (frames if "show(" in block.text else 0)


def cheap(block: Block) -> list[list[str]]:
    """Lines that can be run in the folder, and no others."""
    if block.language != "bash":
        return []
    return [
        words for words in lines_of(block)
        if shlex.join(words).startswith(CHEAP) and "…" not in words and "--backend" not in words
    ]  # fmt: skip


@pytest.mark.parametrize("page", [it for it in PAGES if any(map(cheap, blocks_of(it)))],
                         ids=lambda page: page.relative_to(ROOT).as_posix())  # fmt: skip
def test_cheap_commands_run(page: Path, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dagan_rt.cli import main

    lines = {shlex.join(words): words for block in blocks_of(page) if not block.not_run for words in cheap(block)}
    assert lines
    for line, words in lines.items():
        if words[1:3] == ["triton", "check"] and not (there / words[3]).exists():  # a line that is not cheap wrote it
            assert main(["triton", "write", "bundle/", "--out", words[3]]) == 0
        assert main(words[1:]) == 0, f"{line}: {capsys.readouterr().err}"
        if "--out" in words:
            assert (there / words[words.index("--out") + 1]).exists(), line


# ---- what the tutorials add to a checkout ----


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the files of the tutorials in it."""
    root = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "fatbin")
    for folder in (
        "dagan_rt",
        "kernels",
        "export",
        "train",
        "benchmarks",
        "tests/backends",
        "tests/kernels",
        "tests/data",
    ):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copyfile(ROOT / name, root / name)
    for name, block in FILES.items():
        assert not (root / name).exists(), f"{block}: {name} is there already"
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(block.text, encoding="utf-8")
    return root


def run_there(checkout: Path, *command: str) -> str:
    run = subprocess.run(
        [sys.executable, *command], cwd=checkout, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_files_of_the_tutorials_are_python_as_it_is_written_here(checkout: Path) -> None:
    pytest.importorskip("ruff")
    names = [name for name in FILES if name.endswith(".py")]
    run_there(checkout, "-m", "ruff", "check", "--quiet", *names)
    run_there(checkout, "-m", "ruff", "format", "--check", "--quiet", *names)


@pytest.mark.parametrize("test", ["backend", "kernel"])
@pytest.mark.slow
def test_the_tutorials_tests_pass(test: str, checkout: Path) -> None:
    lines = [words for block in SHELL if block.page.stem == test for words in lines_of(block)]
    ((_, _, _, *words),) = [words for words in lines if words[:3] == ["python", "-m", "pytest"]]
    said = run_there(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words)
    expected = {"backend": "22 passed", "kernel": "12 passed"}[test]
    assert expected in said and expected in (DOCS / "tutorials" / f"{test}.md").read_text(encoding="utf-8")


def test_a_new_backend_is_listed(checkout: Path) -> None:
    assert "onnxruntime-lean" in run_there(checkout, "-m", "dagan_rt", "info")


@pytest.mark.parametrize("block", [it for it in PYTHON if it.with_files], ids=str)
def test_examples_beside_the_tutorials_files_run(block: Block, checkout: Path) -> None:
    pytest.importorskip("cupy", reason="NVRTC comes with the extra cuda")
    assert set(block.with_files) <= set(FILES)
    said = run_there(checkout, "-c", block.text).splitlines()
    page = block.page.read_text(encoding="utf-8")
    assert said and all(line.split(" ")[0] in page for line in said)


def test_the_small_recipe_is_a_recipe(checkout: Path) -> None:
    from dagan_rt.training.recipe import read_recipe

    recipe = read_recipe(checkout / "train" / "recipes" / "small.toml")
    assert [stage.steps for stage in recipe.stages] == [2, 2] and recipe.network.size == 64


# ---- the whole ----


@pytest.mark.slow
def test_the_documentation_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the generator comes with the extra docs")
    pytest.importorskip("furo", reason="the theme comes with the extra docs")
    pytest.importorskip("myst_parser", reason="the parser comes with the extra docs")
    command = re.search(r"^docs:.*\n\t\$\(RUN\) (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert command is not None and "--fail-on-warning" in command[1]
    words = shlex.split(command[1].replace("$(OUT)", str(tmp_path)))
    run = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    pages = {path.relative_to(tmp_path / "docs").with_suffix("") for path in (tmp_path / "docs").rglob("*.html")}
    assert {page.relative_to(DOCS).with_suffix("") for page in PAGES[1:]} <= pages
    for path in (tmp_path / "docs").rglob("*"):
        if path.suffix in (".html", ".css"):
            fetched = re.findall(
                r"""<(?:script|img|link|iframe)\b[^>]*(?:src|href)=["'](?:https?:)?//[^"']+|@import|url\(["']?(?:https?:)?//""",
                path.read_text(encoding="utf-8"),
            )
            assert fetched == [], path
