"""The repository as a whole: small, and free of what belongs to one machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEGABYTE = 1_000_000

# A path that exists on one machine only: it starts at the root, in a folder where people keep their work.
MACHINE_PATH = re.compile(r"(?<![\w.~$}*-])/(?:home|mnt|root|scratch|tmp|Users|work)/\w")
# Written in two halves, so that this file does not find itself.
REGISTRY_HOST = re.compile(
    "|".join(
        re.escape(name + domain)
        for name, domain in [
            ("pypi", ".org"),
            ("pythonhosted", ".org"),
            ("registry.npmjs", ".org"),
            ("npmjs", ".com"),
            ("deb.debian", ".org"),
            ("download.pytorch", ".org"),
            ("conda.anaconda", ".org"),
        ]
    )
)


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file that is committed or would be."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """Return a file's text, or nothing for a binary file."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return ""


def findings(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        if pattern.search(line)
    ]


def test_no_path_of_one_machine(files: list[Path]):
    assert findings(MACHINE_PATH, files) == []


def test_no_registry_host(files: list[Path]):
    assert findings(REGISTRY_HOST, files) == []


def test_the_patterns_find_what_they_look_for(tmp_path: Path):
    for line in ("see /ho" + "me/someone/x", 'open("/wo' + 'rk/data.npz")'):
        assert MACHINE_PATH.search(line)
    for line in ("dagan_rt/networks/work/model.py", "$HOME/work/x", "</root>", "out/tmp/x"):
        assert not MACHINE_PATH.search(line)
    assert REGISTRY_HOST.search("https://pypi" + ".org/simple")


def test_the_tree_is_small(files: list[Path]):
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in files}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert sum(sizes.values()) < 25 * MEGABYTE, f"the largest files: {largest}"


def test_asset_folders_are_no_packages(files: list[Path]):
    folders = {"kernels", "export", "train", "benchmarks"}
    inits = [path for path in files if path.name == "__init__.py" and path.relative_to(ROOT).parts[0] in folders]
    assert inits == []


@pytest.mark.parametrize("folder", ["kernels", "export", "train", "benchmarks"])
def test_each_asset_folder_says_where_its_code_lives(folder: str):
    first_line = (ROOT / folder / "README.md").read_text(encoding="utf-8").splitlines()[0]
    assert "dagan_rt/" in first_line


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for path in (ROOT / "dagan_rt").rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()] == []
