"""Every wrong argument and recipe is one clear line, comes before long work, and writes nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dagan_rt import checkpoints
from dagan_rt._assets import asset
from dagan_rt.export.__main__ import main


@pytest.fixture(scope="module")
def published(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The arguments that name a small checkpoint, by variant."""
    found = {}
    for variant in ("dagan", "fomm"):
        folder = tmp_path_factory.mktemp(variant)
        model = small_model(variant)
        depth = folder / "depth" if model.depth is not None else None
        checkpoints.save(folder / "model.pth.tar", model, depth_dir=depth)
        found[variant] = ["--checkpoint", str(folder / "model.pth.tar"), *(["--depth", str(depth)] if depth else [])]
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a command; what it holds at the start is all it may hold at the end."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "face.png").write_bytes(b"no picture")
    recipes = {
        "unknown.toml": "wings = 2\n", "type.toml": "precision = 3\n", "not.toml": "precision = = 3\n",
        "huge.toml": "#" * (2 << 20), "nested.toml": "only = " + "[" * 100_000,
        "long.toml": "opset = 0x" + "f" * 50_000, "nan.toml": "budget = nan\n",
        "wrong.toml": 'batch = "x"\n', "binary.toml": "\udcff",
    }  # fmt: skip
    for name, text in recipes.items():
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(capfd: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """The command ends with exit code 2 and one line that holds the words; it leaves no new file."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(arguments) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith("python -m dagan_rt.export: error: "), printed.err
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n") and len(printed.err) < 400, printed.err
    assert all(word in printed.err for word in words), printed.err
    assert sorted(Path.cwd().rglob("*")) == before


SHIPPED = ", ".join(sorted(path.stem for path in asset("export", "recipes").glob("*.toml")))
SIZES = ("0", "8:1:32", "x", "-1", "1:8", str(10**9), "1:2:4:8", "1.5", "2000")
#: What is known to be wrong before any checkpoint is looked at.
AT_ONCE = [
    ("--target cuda", "target must be one of onnx, tensorrt, tensorrt-rtx, triton, got 'cuda'"),
    ("--target onnx cuda", "got 'cuda'"),
    ("--precision fp8", "precision must be one of fp32, fp16, int8, auto, got 'fp8'"),
    ("--recipe gpu", f"recipe must be a TOML file or one of {SHIPPED}, got 'gpu'"),
    ("--recipe missing.toml", "recipe missing.toml cannot be read: No such file or directory"),
    ("--recipe empty", "got 'empty'"),
    ("--recipe unknown.toml", "unknown.toml: wings is not a known key; expected one of precision, "),
    ("--recipe type.toml", "type.toml: precision must be str, got int 3"),
    ("--recipe not.toml", "not.toml is not valid TOML"),
    ("--recipe huge.toml", "recipe huge.toml must be at most 1048576 bytes"),
    ("--recipe nested.toml", "nested.toml is not valid TOML"),
    ("--recipe long.toml", "long.toml: opset must be"),
    ("--recipe nan.toml", "nan.toml: budget must be finite and not negative, got nan"),
    ("--recipe wrong.toml", "wrong.toml: batch must be N"),
    ("--recipe binary.toml", "recipe binary.toml cannot be read"),
    ("--recipe cpu-int8 --batch x", "cpu-int8, changed by options: batch must be N"),
    ("--precision int8", "int8 needs frames to calibrate on: give a folder of clips with --calibrate"),
    ("--calibrate heads", "calibrate is for int8 and auto, got it with the precision fp32"),
    ("--calibrate heads --precision fp32", "calibrate is for int8 and auto"),
    *((f"--batch {sizes}", "batch must be N") for sizes in SIZES),
    *((f"--budget {budget}", "budget must be finite and not negative") for budget in ("-1", "nan", "inf", "1e999")),
    ("--budget 50", "budget is for fp16, int8 and auto"),
    ("--precision int8 --calibrate nowhere", "calibration data nowhere does not exist"),
    ("--precision int8 --calibrate empty", "calibration data empty holds no video and no image"),
    ("--strip-weights", "strip_weights is for engines: name the target"),
    ("--plugins python", "plugins is for engines: name the target"),
    ("--plugins jit --target tensorrt-rtx", "plugins must be one of python, aot, got 'jit'"),
    ("--plugins aot --target tensorrt-rtx", "plugins of the kind aot are for tensorrt alone"),
    ("--target tensorrt-rtx --compute-capability 9.0", "compute capability must be one that tensorrt-rtx serves, 7.5"),
    ("--budget much", "argument --budget: invalid float value: 'much'"),
    ("--opset 16", "opset must be in 17..20, got 16"),
    ("--opset 21", "opset must be in 17..20, got 21"),
    ("--opset x", "argument --opset: invalid int value: 'x'"),
    ("--precision auto --only attention", "auto measures whole reenactments in ONNX Runtime: name a precision for"),
    ("--precision auto --target tensorrt-rtx", "name a precision for the target tensorrt-rtx"),
    ("--precision auto --batch 4", "name a precision for a batch of 4"),
    ("--compute-capability 8.9", "compute_capabilities is for engines: name the target"),
    ("--target tensorrt-rtx --compute-capability sm_89", "must be a number such as 8.9, got 'sm_89'"),
    ("--verify-with a b c d e", "--verify-with takes at most 4 images, got 5"),
    ("--rebuild bundle", "--checkpoint cannot be used with --rebuild"),
    ("--wings 2", "unrecognized arguments: --wings 2"),
    ("--batch", "argument --batch: expected one argument"),
    ("--prec fp16", "unrecognized arguments: --prec fp16"),
    ("--out no/bundle", "the folder no does not exist, make it first"),
    ("--out not.toml", "what stands there is not a bundle"),
    ("--out broken", "what stands there is not a bundle"),
    ("--out .", "give the folder's own name"),
]


@pytest.mark.parametrize(("options", "words"), AT_ONCE, ids=[options for options, _ in AT_ONCE])
def test_what_can_be_known_at_once_is_said_at_once(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: str, words: str
) -> None:
    if "9.0" in options:
        pytest.importorskip("tensorrt_rtx")

    def loaded(*arguments: Any) -> Any:
        raise AssertionError("the checkpoint was read first")

    monkeypatch.setattr(checkpoints, "inspect", loaded)
    refuse(capfd, ["--checkpoint", "model.pth.tar", "--out", "bundle", *options.split()], words)


@pytest.mark.parametrize("arguments", [[], ["--out", "bundle"], ["--checkpoint", "x"], ["--recipe", "cpu-fp32"]])
def test_checkpoint_and_place_must_be_named(
    here: Path, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    missing = "--out" if "--checkpoint" in arguments else "--checkpoint"
    refuse(capfd, arguments, f"{missing} is missing: give --checkpoint FILE and --out DIR")


LATER = [
    ("dagan", "--only wings", "dagan has no subnetwork 'wings' to export; it has source, driving, motion"),
    ("fomm", "--only attention", "fomm has no subnetwork 'attention' to export; it has"),
    ("fomm", "--only depth", "fomm has no subnetwork 'depth' to export"),
    ("fomm", "--precision int8 --calibrate broken", "broken/face.png is not an image"),
    ("fomm", "--verify-with missing.png", "image missing.png does not exist"),
    ("fomm", "--verify-with broken/face.png", "broken/face.png is not an image"),
]


@pytest.mark.parametrize(("variant", "options", "words"), LATER, ids=[options for _, options, _ in LATER])
def test_what_needs_the_checkpoint(
    here: Path,
    capfd: pytest.CaptureFixture[str],
    published: dict[str, list[str]],
    variant: str,
    options: str,
    words: str,
) -> None:
    refuse(capfd, [*published[variant], "--out", "bundle", *options.split()], words)


def test_a_checkpoint_that_is_none(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refuse(capfd, ["--checkpoint", "missing.pth.tar", "--out", "bundle"], "missing.pth.tar")
    refuse(capfd, ["--checkpoint", "huge.toml", "--out", "bundle"], "huge.toml")


def test_a_bundle_is_not_replaced_without_force(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "bundle").mkdir()
    (here / "bundle" / "manifest.json").write_text(json.dumps({"format": "dagan-rt bundle", "version": 1}))
    refuse(capfd, ["--checkpoint", "x", "--out", "bundle"], "bundle is a bundle already", "--force")


@pytest.mark.parametrize(
    ("target", "module", "package"),
    [("tensorrt", "tensorrt", "tensorrt-cu13"), ("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx-cu13")],
)
def test_a_missing_library_comes_with_its_pip_line(
    here: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    module: str,
    package: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    monkeypatch.delitem(sys.modules, module, raising=False)
    line = f"the package {module} is not installed: run pip install {package}\n"
    refuse(capfd, ["--checkpoint", "model.pth.tar", "--out", "bundle", "--target", target], line)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--rebuild missing", "missing"),
        ("--rebuild empty", "bundle empty has no manifest.json"),
        ("--rebuild not.toml", "not.toml must be a folder"),
        ("--rebuild empty --out x", "--out cannot be used with --rebuild"),
        ("--rebuild empty --depth x", "--depth cannot be used with --rebuild"),
        ("--rebuild empty --recipe cpu-fp32", "--recipe cannot be used with --rebuild"),
        ("--rebuild empty --precision fp16", "--precision cannot be used with --rebuild: export the checkpoint again"),
        ("--rebuild empty --no-torch-weights", "--no-torch-weights cannot be used with --rebuild"),
        ("--rebuild empty --force", "--force cannot be used with --rebuild"),
        ("--rebuild empty --verify-with face.png", "--verify-with cannot be used with --rebuild"),
    ],
)
def test_rebuild(here: Path, capfd: pytest.CaptureFixture[str], options: str, words: str) -> None:
    refuse(capfd, options.split(), words)


def test_rebuild_of_a_bundle_without_engines(here: Path, capfd: pytest.CaptureFixture[str], tiny_bundle: Path) -> None:
    capfd.readouterr()
    words = f"bundle {tiny_bundle} holds no engines to rebuild: name a kind with --target"
    refuse(capfd, ["--rebuild", str(tiny_bundle)], words)
    refuse(capfd, ["--rebuild", str(tiny_bundle), "--target", "onnx"], words)
    refuse(capfd, ["--rebuild", str(tiny_bundle), "--target", "cuda"], "target must be one of")
