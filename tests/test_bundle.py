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
from dagan_rt.bundle import BatchProfile, Bundle, describe, write_manifest
from dagan_rt.errors import InputError
from dagan_rt.export.subnetworks import subnetworks
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.report import GraphReport, Measured, Report

CONFIG = NetworkConfig(variant="dagan_spade", size=64)


def fill(folder: Path, content: bytes = b"a graph") -> None:
    """A bundle whose files are no ONNX at all: opening a bundle looks at hashes only."""
    declared = subnetworks(CONFIG)
    for subnetwork in declared:
        (folder / f"{subnetwork.name}.onnx").write_bytes(content + subnetwork.name.encode())
    (folder / "weights" / "depth").mkdir(parents=True)
    for name in ("model.pth.tar", "depth/encoder.pth", "depth/depth.pth"):
        (folder / "weights" / name).write_bytes(name.encode())
    measured = Measured(1e-6, 1e-7, 120.0, 1e-3)
    errors = {"onnxruntime": {"flow": measured}}
    graphs = {it.name: GraphReport("fp32", 10, 20, 30_000_000, {}) for it in declared}
    graphs["motion"] = GraphReport("fp32", 10, 20, 30_000_000, errors)
    Report("PyTorch", "4 frames", graphs, {"onnxruntime": measured}, notes=("a note",)).write(folder)
    write_manifest(
        folder,
        {
            "variant": CONFIG.variant,
            "config": CONFIG.to_dict(),
            "batch": "1:1:8",
            "tools": {"onnx": "1.0"},
            "graphs": {it.name: it.to_dict() | {"precision": "fp32"} for it in declared},
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
    assert bundle.batch == BatchProfile(1, 1, 8)
    assert bundle.report.graphs["motion"].errors["onnxruntime"]["flow"].max_abs == 1e-6
    assert bundle.cannot_reenact is None
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
    words = ("dagan_spade", "64 × 64", "driving.onnx", "flow", "1.0e-06", "120.0", "onnx 1.0", "every frame", "a note")
    for word in words:
        assert word in text, word


def test_describe_prints_no_control_characters(folder: Path) -> None:
    edit(folder, lambda m: (m["tools"].update({"evil\x1b[2J": "1\r2"}), m["graphs"]["motion"].update(runs="a\nb")))
    text = describe(Bundle.open(folder))
    assert "evil?[2J 1?2" in text and "motion (a?b, fp32)" in text
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
        (b'{"format": "dagan-rt bundle", "version": 9}', ("version 9", "export again")),
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
        (lambda m: m["graphs"].clear(), ("at least one graph",)),
        (lambda m: m.update(batch="8:1"), ("batch", "8:1")),
        (lambda m: m.pop("batch"), ("batch",)),
        (lambda m: m["graphs"]["motion"].update(file="other.onnx"), ("other.onnx",)),
        (lambda m: m["graphs"]["motion"].update(file=["x"]), ("motion",)),
        (lambda m: m["graphs"]["motion"].update(inputs=[{"name": "x"}]), ("inputs", "shape")),
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


def test_a_bundle_of_parts_says_why_it_cannot_reenact(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["graphs"].pop("motion"))
    assert "lacks the graph motion" in str(Bundle.open(folder).cannot_reenact)
    edit(folder, lambda manifest: manifest.update(batch="4"))
    with_motion = Bundle.open(folder)
    assert with_motion.batch.fixed and str(with_motion.batch) == "4"


@pytest.mark.parametrize(("text", "sizes"), [("1", (1, 1, 1)), ("1:8:32", (1, 8, 32)), ("2:2:2", (2, 2, 2))])
def test_batch_profiles(text: str, sizes: tuple[int, int, int]) -> None:
    profile = BatchProfile.parse(text)
    assert (profile.least, profile.usual, profile.most) == sizes
    assert profile.fixed == (sizes[0] == sizes[2])
    assert BatchProfile.parse(str(profile)) == profile


@pytest.mark.parametrize("text", ["", "0", "-1", "1:8", "8:1:32", "1:8:4", "x", "1:2:3:4", "9" * 30, "1.5", "2000"])
def test_batch_profiles_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="batch must be N"):
        BatchProfile.parse(text)
