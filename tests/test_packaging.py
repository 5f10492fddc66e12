"""What a user gets: the wheel and the source distribution, built from the checkout as it is."""

from __future__ import annotations

import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dagan_rt import __version__
from dagan_rt._assets import FOLDERS
from dagan_rt.images import write_image
from dagan_rt.video import VideoReader, VideoWriter

ROOT = Path(__file__).resolve().parents[1]
BESIDE_THE_WHEEL = ("docs", "tests")  # in the source distribution alone
SHIPPED = ("dagan_rt", *FOLDERS, *BESIDE_THE_WHEEL)
SHIPPED_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "Makefile")

# What only an extra brings: the runtime must work where none of it is installed.
OPTIONAL = ("torch", "onnx", "onnxscript", "onnxsim", "matplotlib", "tritonclient")


def checkout_files() -> list[Path]:
    """Every file of the folders that are shipped, relative to the checkout, without what git ignores."""
    if (ROOT / ".git").exists():
        command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listing = subprocess.run(
            [*command, *SHIPPED], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split("\0")
        return sorted(Path(name) for name in listing if name and (ROOT / name).is_file())
    paths = [path.relative_to(ROOT) for folder in SHIPPED for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in paths if "__pycache__" not in path.parts)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a wheel or sdist with the tools of this environment, so that nothing is fetched. Returns the file."""
    run = subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(target), str(source)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = target.iterdir()
    return built


def wheel_contents(wheel: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: digest(archive.read(name)) for name in archive.namelist()}


def run_elsewhere(command: list[str | Path], folder: Path) -> str:
    """Run a command in a folder that is not the checkout, without anything that points back at it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
    return run.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in [*checkout_files(), *map(Path, SHIPPED_FILES)]:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, copy / path)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked where no checkout is near."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_checkout_file_by_file(wheel: Path):
    expected = {}
    for path in checkout_files():
        top = path.parts[0]
        if top not in BESIDE_THE_WHEEL:
            name = path.as_posix() if top == "dagan_rt" else f"dagan_rt/assets/{path.as_posix()}"
            expected[name] = digest((ROOT / path).read_bytes())
    contents = {name: value for name, value in wheel_contents(wheel).items() if ".dist-info/" not in name}
    assert contents == expected


def test_the_metadata_says_what_a_plain_install_brings(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"dagan_rt-{__version__}.dist-info/METADATA"))
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == ("dagan-rt", __version__, ">=3.10")
    plain = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {re.split(r"[^\w-]", line)[0] for line in plain if "python_version" not in line}
    assert names == {"numpy", "onnxruntime", "av", "pillow", "tqdm"}
    assert {"torch", "export", "train", "triton", "triton-server", "dev"} <= set(metadata.get_all("Provides-Extra"))


def test_the_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert wheel_contents(again) == wheel_contents(wheel)


def test_the_sdist_holds_the_tests_and_the_documentation(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(member.name).parts[1:]) for member in archive.getmembers() if member.isfile()}
    beside = {path for path in checkout_files() if path.parts[0] in BESIDE_THE_WHEEL}
    assert {path.parts[0] for path in beside} == set(BESIDE_THE_WHEEL) and beside <= names
    assert {Path(name) for name in SHIPPED_FILES} <= names


def test_the_unpacked_wheel_works_without_the_extras(installed: Path, tmp_path: Path):
    program = f"""
import sys
sys.path.insert(0, {str(installed)!r})
sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # None there makes the import fail
import dagan_rt
from dagan_rt._assets import asset, assets_root
from dagan_rt.cli import main
assert dagan_rt.__version__ == {__version__!r}
assert str(assets_root()) == {str(installed / "dagan_rt" / "assets")!r}, assets_root()
assert asset("export", "README.md").is_file()
assert dagan_rt.Reenactor
main(["--help"])
"""
    output = run_elsewhere([sys.executable, "-I", "-c", program], tmp_path)
    assert "animate" in output and "info" in output


@pytest.mark.slow
def test_a_fresh_environment_animates_without_torch(wheel: Path, tiny_bundle: Path, tmp_path: Path):
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, with_pip=True)
    binaries = environment / ("Scripts" if os.name == "nt" else "bin")
    python, dagan_rt = binaries / "python", binaries / "dagan-rt"
    run_elsewhere([python, "-m", "pip", "install", "--quiet", wheel], elsewhere)
    present = f"import importlib.util as u; print([name for name in {OPTIONAL!r} if u.find_spec(name)])"
    assert run_elsewhere([python, "-c", present], elsewhere).strip() == "[]"
    run_elsewhere([python, "-m", "pip", "check"], elsewhere)

    assert "animate" in run_elsewhere([dagan_rt, "--help"], elsewhere)
    assert "dagan" in run_elsewhere([dagan_rt, "info", tiny_bundle], elsewhere)
    random = np.random.default_rng(0)
    write_image(tmp_path / "portrait.png", random.integers(0, 256, (80, 64, 3), dtype=np.uint8))
    with VideoWriter(tmp_path / "driving.mp4", fps=10, width=96, height=64) as writer:
        for frame in random.integers(0, 256, (5, 64, 96, 3), dtype=np.uint8):
            writer.write(frame)
    files = ["--source", tmp_path / "portrait.png", "--driving", tmp_path / "driving.mp4", "--out", "result.mp4"]
    run_elsewhere([dagan_rt, "animate", "--bundle", tiny_bundle, *files], elsewhere)
    with VideoReader(elsewhere / "result.mp4") as reader:
        assert [frame.shape for frame in reader] == [(64, 64, 3)] * 5
