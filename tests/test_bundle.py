"""A bundle is checked file by file, nothing in it can point outside, and an export replaces it whole or not at all."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dagan_rt import bundle as bundles
from dagan_rt.bundle import Bundle, describe, staged, write_manifest
from dagan_rt.errors import InputError
from dagan_rt.export.subnetworks import subnetworks
from dagan_rt.networks.config import NetworkConfig

CONFIG = NetworkConfig(variant="dagan_spade", size=64)


def fill(folder: Path, content: bytes = b"a graph") -> None:
    """A bundle whose files are no ONNX at all: opening a bundle looks at hashes only."""
    declared = subnetworks(CONFIG)
    for subnetwork in declared:
        (folder / f"{subnetwork.name}.onnx").write_bytes(content + subnetwork.name.encode())
    (folder / "weights" / "depth").mkdir(parents=True)
    for name in ("model.pth.tar", "depth/encoder.pth", "depth/depth.pth"):
        (folder / "weights" / name).write_bytes(name.encode())
    graphs = {
        it.name: {
            "file": f"{it.name}.onnx",
            "runs": it.runs,
            "inputs": [tensor.to_dict() for tensor in it.inputs],
            "outputs": [tensor.to_dict() for tensor in it.outputs],
        }
        for it in declared
    }
    measured = {"max_abs": 1e-6, "mean_abs": 1e-7, "psnr": 120.0, "tolerance": 1e-3}
    write_manifest(
        folder,
        {
            "variant": CONFIG.variant,
            "config": CONFIG.to_dict(),
            "tools": {"onnx": "1.0"},
            "graphs": graphs,
            "errors": {"source": {"feature": measured}, "reenactment": {"onnxruntime": measured}},
        },
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    fill(tmp_path / "bundle")
    return tmp_path / "bundle"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refuse(folder: Path, *words: str) -> None:
    """Opening fails with one sentence that holds all the words."""
    with pytest.raises(InputError) as caught:
        Bundle.open(folder)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_an_intact_bundle_opens(folder: Path) -> None:
    bundle = Bundle.open(str(folder))
    assert bundle.config == CONFIG
    assert bundle.graph("motion") == folder / "motion.onnx"
    assert bundle.weights == folder / "weights" / "model.pth.tar"
    assert bundle.depth_weights == folder / "weights" / "depth"
    assert [tensor.name for tensor in bundle.graphs["generator"].inputs][-1] == "source_image"
    assert bundle.errors["source"]["feature"]["max_abs"] == 1e-6
    with pytest.raises(InputError, match="no graph 'decoder'"):
        bundle.graph("decoder")


def test_the_manifest_holds_the_sha256_of_every_file(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    on_disk = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert on_disk.keys() - files.keys() == {"manifest.json"}
    for name, entry in files.items():
        data = on_disk[name].read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_describe_is_a_table_of_everything(folder: Path) -> None:
    text = describe(Bundle.open(folder))
    for word in ("dagan_spade", "64 × 64", "driving.onnx", "flow", "1.0e-06", "120 dB", "onnx 1.0", "every frame"):
        assert word in text, word


def test_describe_prints_no_control_characters(folder: Path) -> None:
    edit(folder, lambda m: (m["tools"].update({"evil\x1b[2J": "1\r2"}), m["graphs"]["motion"].update(runs="a\nb")))
    text = describe(Bundle.open(folder))
    assert "evil?[2J 1?2" in text and "motion (a?b)" in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)


def test_a_bundle_without_weights_opens(folder: Path) -> None:
    edit(folder, lambda manifest: [manifest["files"].pop(name) for name in list(manifest["files"]) if "/" in name])
    bundle = Bundle.open(folder)
    assert bundle.weights is None and bundle.depth_weights is None


def test_a_changed_byte_is_found(folder: Path) -> None:
    path = folder / "generator.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    refuse(folder, "generator.onnx", "SHA-256")


def test_a_cut_file_is_found(folder: Path) -> None:
    os.truncate(folder / "generator.onnx", 3)
    refuse(folder, "generator.onnx", "must be 16 bytes, got 3")


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / "weights" / "depth" / "depth.pth").unlink()
    refuse(folder, "depth.pth", "nothing there")


def test_a_folder_in_place_of_a_file_is_found(folder: Path) -> None:
    (folder / "source.onnx").unlink()
    (folder / "source.onnx").mkdir()
    refuse(folder, "source.onnx", "a folder")


OUTSIDE = [
    "../secret",
    "/etc/hostname",
    "weights/../../secret",
    "C:\\x",
    "a\\b",
    "a\n",
    "a//b",
    "a/",
    "",
    ".",
    "..",
    "~",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_could_leave_the_bundle_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"secret")
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    edit(folder, lambda manifest: manifest["files"].update({name: entry}))
    refuse(folder, "plain relative name")


def test_a_link_out_of_the_bundle_is_refused(folder: Path) -> None:
    content = (folder / "motion.onnx").read_bytes()
    (folder.parent / "outside").write_bytes(content)
    (folder / "motion.onnx").unlink()
    (folder / "motion.onnx").symlink_to("../outside")
    refuse(folder, "motion.onnx", "outside")


def test_a_linked_folder_out_of_the_bundle_is_refused(folder: Path) -> None:
    (folder / "weights").rename(folder.parent / "elsewhere")
    (folder / "weights").symlink_to(folder.parent / "elsewhere")
    refuse(folder, "weights", "outside")


def test_a_link_to_itself_is_refused(folder: Path) -> None:
    (folder / "motion.onnx").unlink()
    (folder / "motion.onnx").symlink_to("motion.onnx")
    refuse(folder, "motion.onnx")


def test_a_linked_bundle_opens(folder: Path) -> None:
    (folder.parent / "latest").symlink_to(folder.name)
    assert Bundle.open(folder.parent / "latest").config == CONFIG


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not json", ("JSON",)),
        (b"\xff\xfe", ("JSON",)),
        (b"[" * 200_000, ("JSON",)),
        (b"[]", ("not the manifest",)),
        (b'{"format": "dagan-rt bundle", "version": 2}', ("version 2", "export again")),
        (b" " * (bundles.LARGEST_MANIFEST + 1), ("at most",)),
    ],
)
def test_a_broken_manifest_is_refused(folder: Path, content: bytes, words: tuple[str, ...]) -> None:
    (folder / "manifest.json").write_bytes(content)
    refuse(folder, "manifest.json", *words)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "nothing there")
    refuse(tmp_path, "no manifest.json")
    (tmp_path / "file").write_text("x")
    refuse(tmp_path / "file", "a file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["config"].update(variant="cat"), ("variant", "cat")),
        (lambda m: m["config"].update(wings=2), ("wings",)),
        (lambda m: m.update(variant="dagan"), ("dagan_spade", "dagan")),
        (lambda m: m["graphs"].pop("motion"), ("lacks motion",)),
        (lambda m: m["graphs"]["motion"].update(file="other.onnx"), ("other.onnx",)),
        (lambda m: m["graphs"]["motion"].update(file=["x"]), ("motion",)),
        (lambda m: m["graphs"]["motion"].update(inputs=[{"name": "x"}]), ("inputs", "shape")),
        (lambda m: m.update(errors=3), ("errors",)),
        (lambda m: m["errors"]["source"].update(feature={"psnr": "good"}), ("numbers",)),
        (lambda m: m["errors"]["source"].update(feature={"psnr": 10**400}), ("finite numbers",)),
        (lambda m: m["files"].update({f"f{i}": {} for i in range(300)}), ("at most 256 files",)),
        (lambda m: m["files"]["motion.onnx"].pop("sha256"), ("motion.onnx", "sha256")),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], words: tuple[str, ...]
) -> None:
    edit(folder, change)
    refuse(folder, *words)


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    pairs = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, child in pairs:
        yield value, key
        yield from spots(child)


def test_no_manifest_brings_more_than_an_input_error(folder: Path) -> None:
    intact = json.loads((folder / "manifest.json").read_text())
    rng = random.Random(0)
    strange = [None, True, 0, -1, 0.0, 1e308, "", "../x", [], {}, [[]], {"name": {}}, "x" * 500, 2**80]
    refused = 0
    for _ in range(200):
        manifest = copy.deepcopy(intact)
        container, key = rng.choice(list(spots(manifest)))
        container[key] = rng.choice(strange)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        try:
            describe(Bundle.open(folder))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


def test_staged_writes_a_new_bundle(tmp_path: Path) -> None:
    with staged(tmp_path / "bundle") as partial:
        fill(partial)
        assert not (tmp_path / "bundle").exists()
    assert Bundle.open(tmp_path / "bundle").config == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_staged_leaves_nothing_after_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged(tmp_path / "bundle") as partial:
        fill(partial)
        raise error("halfway")
    assert list(tmp_path.iterdir()) == []


def test_staged_replaces_a_bundle_only_by_force(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="--force"), staged(folder):
        raise AssertionError("must not run")
    with pytest.raises(KeyboardInterrupt), staged(folder, force=True) as partial:
        fill(partial, b"newer ")
        raise KeyboardInterrupt
    assert (folder / "manifest.json").read_bytes() == before
    with staged(folder, force=True) as partial:
        fill(partial, b"newer ")
    assert (Bundle.open(folder).graph("motion")).read_bytes() == b"newer motion"
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_the_old_bundle_comes_back_if_the_swap_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(OSError, match="disk gone"), staged(folder, force=True) as partial:
        fill(partial, b"newer ")
    assert Bundle.open(folder).graph("motion").read_bytes() == b"a graphmotion"
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_staged_never_touches_what_is_no_bundle(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(folder)
    for target in ("holiday", "holiday/photo.jpg", "link"):
        with pytest.raises(InputError, match="not a bundle"), staged(tmp_path / target, force=True):
            raise AssertionError("must not run")
    assert (tmp_path / "holiday" / "photo.jpg").read_bytes() == b"precious"
    with pytest.raises(InputError, match="does not exist"), staged(tmp_path / "no" / "bundle"):
        raise AssertionError("must not run")


def test_staged_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with staged(tmp_path / "empty") as partial:
        fill(partial)
    assert Bundle.open(tmp_path / "empty").config == CONFIG
