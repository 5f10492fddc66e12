"""`dagan-rt demo` as a shell sees it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from dagan_rt.cli import main


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--port", "70000"], "--port must be 0 to 65535, got 70000"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--most-seconds", "0"], "--most-seconds must be over 0, got 0"),
        (["--most-megabytes", "nan"], "--most-megabytes must be over 0, got nan"),
    ],
)
def test_wrong_options_are_one_sentence(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--bundle", str(tmp_path), *options]) == 2
    assert capsys.readouterr().err == f"dagan-rt: error: {expected}\n"


def test_without_gradio_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--bundle", str(tmp_path)]) == 2
    assert "dagan-rt demo needs the package gradio, which is not installed: run pip install 'dagan-rt[demo]'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("host", "number"),
    [("127.0.0.1", signal.SIGINT), pytest.param("127.0.0.2", signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_it_serves_until_it_is_ended(
    host: str, number: int, tiny_bundle: Path, tmp_path: Path, heed_interrupts: Callable[[], None]
) -> None:
    pytest.importorskip("gradio", reason="the page needs dagan-rt[demo]")
    options = ["--bundle", str(tiny_bundle), "--host", host, "--port", "0", "--no-browser", "--backend", "onnxruntime"]
    with subprocess.Popen(
        [sys.executable, "-m", "dagan_rt", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        preexec_fn=heed_interrupts,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        match = re.fullmatch(r"serving \S+ at (http://\S+:\d+/) until Ctrl-C\n", line)
        assert match is not None, line + process.stderr.read()
        with urllib.request.urlopen(match[1]) as answer:
            assert answer.status == 200
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("dagan-rt-")]
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == (0 if number == signal.SIGINT else 143) and "Traceback" not in said
    assert said.endswith("stopped; all files of the page are deleted\n") == (number == signal.SIGINT)
    assert ("warning: --host 127.0.0.2 serves the page to everybody" in said) == (host == "127.0.0.2")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("dagan-rt-")] == []
