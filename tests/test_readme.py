"""The README's options and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dagan_rt.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_named_files_exist() -> None:
    for name in re.findall(r"`((?:tests|train|benchmarks|export|dagan_rt)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_every_command_is_in_the_table() -> None:
    from dagan_rt.cli import COMMANDS

    assert [name for name in COMMANDS if f"`dagan-rt {name}`" not in README] == []


def test_the_animate_example_parses() -> None:
    line = next(line for line in README.splitlines() if line.startswith("dagan-rt animate"))
    arguments = build_parser().parse_args(line.split()[1:])
    assert str(arguments.out) == "result.mp4"


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`(--[\w-]+)`", README))))
def test_options_exist(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["animate", "--help"])
    assert option in capsys.readouterr().out


def test_the_python_example_runs(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    shown: list[np.ndarray] = []
    picture = np.full((64, 64, 3), 128, np.uint8)
    code = example[1].replace('"bundle/"', repr(str(tiny_bundle)))
    exec(code, {"image": picture, "frames": [picture, picture], "show": shown.append})
    assert [frame.shape for frame in shown] == [(64, 64, 3)] * 2
