"""Engines into a bundle that stands: only they and the report change, and a failure changes nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dagan_rt.bundle import Bundle
from dagan_rt.engines import engine_sets
from dagan_rt.errors import InputError
from dagan_rt.export import export, tensorrt
from dagan_rt.export.__main__ import main
from dagan_rt.export.plan import Plan
from dagan_rt.export.rebuild import rebuild

library = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def exported(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = Plan(targets=("tensorrt-rtx",), compute_capabilities=("8.9",), batch="1", precision="fp16")
    return export(small_model("fomm"), tmp_path_factory.mktemp("rebuild") / "bundle", plan)[0].path


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "bundle")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_engines_for_other_gpus_join(bundle: Path) -> None:
    before = content(bundle)
    opened, report = rebuild(bundle, compute_capabilities=("8.6", "12.0"))
    assert {it.compute_capabilities for it in engine_sets(opened)} == {("8.9",), ("8.6", "12.0")}
    assert report.engines.keys() == {it.key for it in engine_sets(opened)}
    assert report.failures() == [] and set(report.reenactment) == {"onnxruntime", "fp16 rounding", "torch"}
    again = Bundle.open(bundle)  # with every hash
    assert again.report == report and again.manifest == opened.manifest
    after = content(bundle)
    assert {name for name in before if after.get(name) != before[name]} == {"manifest.json", "verify.json"}
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_engines_of_an_older_library_are_replaced(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (older,) = engine_sets(Bundle.open(bundle))
    monkeypatch.setattr(library, "__version__", "9.9.9")
    opened, report = rebuild(bundle, compute_capabilities=("8.9",))
    (newer,) = engine_sets(opened)
    assert newer.version == "9.9.9" and list(report.engines) == [newer.key]
    assert not (bundle / "engines" / older.key).exists()
    assert {name: it.onnx for name, it in newer.graphs.items()} == {name: it.onnx for name, it in older.graphs.items()}


def test_nothing_is_written_through_a_second_name(bundle: Path) -> None:
    """Unchanged files are shared with the older bundle: a copy made of links must stay what it was."""
    shutil.copytree(bundle, bundle.parent / "links", copy_function=os.link)
    before = content(bundle.parent / "links")
    rebuild(bundle)
    assert content(bundle.parent / "links") == before


def test_a_failure_leaves_the_bundle_as_it_was(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(bundle)

    def fail(folder: Path, *arguments: Any, **options: Any) -> None:
        (folder / "engines" / "half").mkdir(parents=True)
        raise InputError("the builder is out of memory")

    monkeypatch.setattr(tensorrt, "build_engines", fail)
    with pytest.raises(InputError, match="out of memory"):
        rebuild(bundle)
    assert content(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_without_weights_the_older_errors_stay(small_model: Any, tmp_path: Path) -> None:
    plan = Plan(torch_weights=False, batch="1", only=("motion",))
    _, older = export(small_model("fomm"), tmp_path / "bundle", plan)
    opened, report = rebuild(tmp_path / "bundle", ("tensorrt-rtx",))
    assert report.graphs == older.graphs
    (engines,) = report.engines.values()
    assert engines.not_run == "there are no weights to compare with" and engines.layers["motion"] > 20
    assert Bundle.open(tmp_path / "bundle").report == report


def test_the_command(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--rebuild", str(bundle), "--target", "tensorrt-rtx", "--compute-capability", "8.6"]) == 0
    printed = capfd.readouterr().out
    assert "sm86" in printed and printed.splitlines()[-1] == f"next: dagan-rt info {bundle}"
    assert main(["--rebuild", str(bundle), "--target", "tensorrt"]) == 2
    assert "tensorrt" in capfd.readouterr().err  # the library is missing, or its GPU
