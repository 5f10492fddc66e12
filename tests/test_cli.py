"""The command line as a shell sees it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dagan_rt
from dagan_rt import cli
from dagan_rt.errors import InputError


def shell(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dagan_rt", *arguments], capture_output=True, text=True, check=False, **options
    )


def parser_that_runs(action: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.set_defaults(run=action)
    return parser


def answer(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def fail(arguments: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(cli, "build_parser", lambda: parser_that_runs(fail))
    return cli.main([])


def test_help_names_every_command() -> None:
    done = shell("--help")
    assert done.returncode == 0 and done.stderr == ""
    for name in cli.COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0 and f"dagan-rt {name}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from dagan_rt.cli import build_parser\n"
        "build_parser().format_help()\n"
        "heavy = {'torch', 'numpy', 'av', 'PIL', 'onnx', 'onnxruntime', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    done = shell("--version")
    assert done.returncode == 0 and done.stdout == f"dagan-rt {dagan_rt.__version__}\n"


@pytest.mark.parametrize("arguments", [(), ("dance",), ("animate",), ("animate", "--bundl", "x"), ("--nothing",)])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    done = shell(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert "usage: dagan-rt" in done.stderr and "error:" in done.stderr and "Traceback" not in done.stderr


def test_bad_input_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(monkeypatch, InputError("image x.png is\n  damaged")) == 2
    assert capsys.readouterr().err == "dagan-rt: error: image x.png is damaged\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "/data/out.mp4"), "/data/out.mp4: No space left on device"),
        (PermissionError(13, "Permission denied", "a.txt"), "a.txt: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("something"), "something"),
    ],
)
def test_system_errors_name_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError, expected: str
) -> None:
    assert answer(monkeypatch, error) == 2
    assert capsys.readouterr().err == f"dagan-rt: error: {expected}\n"


def test_mistakes_of_the_program_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        answer(monkeypatch, ZeroDivisionError())


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "dagan-rt: interrupted\n"


def test_the_exit_code_of_a_command_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, expected in [(0, 0), (None, 0), (3, 3)]:
        monkeypatch.setattr(cli, "build_parser", lambda code=code: parser_that_runs(lambda arguments: code))
        assert cli.main([]) == expected


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_is_quiet(lines: int) -> None:
    script = (
        "import argparse, sys\n"
        "from dagan_rt import cli\n"
        "def run(arguments):\n"
        "    sys.stdin.readline()\n"
        f"    for number in range({lines}):\n"
        "        print('a long line of output', number)\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.set_defaults(run=run)\n"
        "cli.build_parser = lambda: parser\n"
        "sys.exit(cli.main([]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"go on\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_full_stdout_is_one_sentence() -> None:
    script = (
        "import argparse, sys\n"
        "from dagan_rt import cli\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.set_defaults(run=lambda arguments: print('some output'))\n"
        "cli.build_parser = lambda: parser\n"
        "sys.exit(cli.main([]))\n"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode != 0 and "dagan-rt: error: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_in_the_midst_of_an_import_has_the_same_exit_code(tmp_path: Path) -> None:
    """CPython remembers one that passed through `exec` of source text, and would end by the signal itself."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\nfrom dagan_rt.cli import guarded\n"
        "sys.exit(guarded('x', lambda: exec('raise KeyboardInterrupt')))\n"
    )
    found = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], env=os.environ | {"PYTHONPATH": found}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "x: interrupted\n")
