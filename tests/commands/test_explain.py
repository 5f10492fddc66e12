"""`dagan-rt explain` from end to end, with networks of random weights."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dagan_rt import checkpoints
from dagan_rt.bundle import write_manifest
from dagan_rt.cli import main
from dagan_rt.explanation import explanation_sheet
from dagan_rt.images import center_square
from dagan_rt.inspection import inspect
from dagan_rt.networks.variants import VARIANTS
from dagan_rt.training.heads import HELD_OUT, draw_clip
from dagan_rt.video import VideoReader

from ..clips import write_clip

SUBJECTS = [
    "model", "motion", "key points", "movement", "flow", "occlusion", "depth", "attention", "result", "time",
]  # fmt: skip


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, small_model: Any) -> Callable[[str], Path]:
    """`weights(variant)`: a bundle of a small model's weights, with a file that stands in for its graphs."""
    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            folder = made[variant] = tmp_path_factory.mktemp(variant)
            model = small_model(variant)
            depth = folder / "weights" / "depth" if model.depth is not None else None
            (folder / "weights").mkdir()
            checkpoints.save(folder / "weights" / "model.pth.tar", model, depth_dir=depth)
            (folder / "driving.onnx").write_bytes(b"no graph")
            graph = {"file": "driving.onnx", "runs": "every frame", "inputs": [], "outputs": [], "precision": "fp32"}
            config = json.loads(json.dumps(asdict(model.config)))
            described = {"variant": variant, "config": config, "batch": "1", "graphs": {"driving": graph}}
            write_manifest(folder, described)
        return made[variant]

    return make


@pytest.fixture
def files(tmp_path: Path, weights: Callable[[str], Path]) -> dict[str, Path]:
    """A bundle, a portrait and a clip that are wider than high, and a place for the sheet."""
    portrait = np.pad(draw_clip(HELD_OUT[0], 1, 64).frames[0], [(0, 0), (20, 10), (0, 0)])
    Image.fromarray(portrait).save(tmp_path / "portrait.png")
    write_clip(tmp_path / "clip.mp4", list(draw_clip(HELD_OUT[1], 6, 64).frames))
    (tmp_path / "result").mkdir()
    return {
        "bundle": weights("dagan"),
        "source": tmp_path / "portrait.png",
        "driving": tmp_path / "clip.mp4",
        "out": tmp_path / "result" / "sheet.png",
    }


def explain(files: dict[str, Path], *options: str, **other: Path | str) -> int:
    named = [part for name, path in {**files, **other}.items() for part in (f"--{name}", str(path))]
    return main(["explain", *named, *options])


@pytest.mark.parametrize(
    ("options", "number", "relative", "scales", "pixel"),
    [
        (["--frame", "4"], 4, True, {}, None),
        (["--frame", "4", "--adapt-scale", "--pixel", "3", "60"], 4, True, {"adapt_scale": True}, (3, 60)),
        (["--frame", "3", "--motion-scale", "0.5"], 3, True, {"motion_scale": 0.5}, None),
        (["--frame", "5", "--absolute"], 5, False, {}, None),
        ([], 0, True, {}, None),
        (["--pixel", "0", "0"], 0, True, {}, (0, 0)),
    ],
)
def test_the_sheet_is_that_of_the_frames_named(
    files: dict[str, Path],
    small_model: Any,
    options: list[str],
    number: int,
    relative: bool,
    scales: dict[str, Any],
    pixel: tuple[int, int] | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert explain(files, *options) == 0
    said = capsys.readouterr()
    with VideoReader(files["driving"]) as reader:
        frames = list(reader)
    portrait = np.asarray(Image.open(files["source"]))
    found = inspect(
        small_model("dagan"), center_square(portrait, 64), frames[number], frames[0] if relative else None,
        **scales,
    )  # fmt: skip
    assert (np.asarray(Image.open(files["out"])) == explanation_sheet(found, pixel)).all()
    assert said.err == ""
    lines = said.out.splitlines()
    assert [line[:12].strip() for line in lines if re.match(r"\w.{11}\S", line)][: len(SUBJECTS)] == SUBJECTS
    assert max(map(len, lines[:-1])) <= 100
    assert lines[-1] == f"wrote {files['out']}: {files['driving']}, frame {number}"
    assert ("note        the driving frame is the initial one" in said.out) == (number == 0)
    assert [entry.name for entry in files["out"].parent.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_explained(
    files: dict[str, Path], weights: Callable[[str], Path], variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(files, "--frame", "2", bundle=weights(variant)) == 0
    said = capsys.readouterr().out
    assert (f"attention   none: {variant} has no attention" in said) == (VARIANTS[variant].attention is None)
    assert (f"depth       none: {variant} has no depth" in said) == (not VARIANTS[variant].uses_depth)


def test_the_squares_are_those_of_animate(
    files: dict[str, Path], small_model: Any, faces: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is drawn of them: what is looked at is the chosen face of each picture."""
    from dagan_rt import inspection

    looked_at: list[list[np.ndarray]] = []
    looks = inspection.inspect

    def noted(model: Any, *images: np.ndarray, **options: Any) -> Any:
        looked_at.append(list(images))
        return looks(model, *images, **options)

    monkeypatch.setattr(inspection, "inspect", noted)
    Image.fromarray(faces({96: (20, 20), 220: (150, 60)}, 20)).save(files["source"])
    frames = [faces({100: (8 + number, 40), 200: (120, 40 + number)}, 40) for number in range(8)]
    write_clip(files["driving"], frames)
    Image.fromarray(frames[7]).save(files["source"].with_name("still.png"))
    options = ("--crop", "auto", "--face", "2", "--driving-face", "2")
    assert explain(files, *options, "--frame", "7") == 0
    assert explain(files, *options, driving=files["source"].with_name("still.png")) == 0
    (source, shown, initial), (_, still, nothing) = looked_at
    middle = slice(20, 44)
    assert np.abs(source[middle, middle].astype(int) - 220).max() <= 2 and nothing is None
    for image in (shown, initial, still):
        assert np.abs(image[middle, middle].astype(int) - 200).max() <= 8
        assert 0.7 < (image[..., 1] > 100).mean() * 1.8**2 < 1.3


def test_an_exported_bundle_is_explained(files: dict[str, Path], tiny_bundle: Path) -> None:
    assert explain(files, bundle=tiny_bundle) == 0
    assert files["out"].is_file()


def test_an_image_drives_with_absolute_motion(
    files: dict[str, Path], small_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    image = draw_clip(HELD_OUT[1], 1, 64).frames[0]
    path = files["source"].with_name("driving.png")
    Image.fromarray(image).save(path)
    assert explain(files, driving=path) == 0
    said = capsys.readouterr().out
    assert "motion      absolute: " in said and f"{path}, an image, which has no initial frame" in said
    portrait = center_square(np.asarray(Image.open(files["source"])), 64)
    expected = explanation_sheet(inspect(small_model("dagan"), portrait, image))
    assert (np.asarray(Image.open(files["out"])) == expected).all()


def test_bad_input_is_one_sentence_and_no_output(
    files: dict[str, Path], weights: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("neither image nor video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    bare = tmp_path / "bare"
    shutil.copytree(weights("dagan"), bare)
    shutil.rmtree(bare / "weights")
    described = json.loads((bare / "manifest.json").read_text())
    write_manifest(bare, {key: it for key, it in described.items() if key not in ("format", "version", "files")})
    still, clip = files["source"], files["driving"]
    for changed, options, expected in [
        ({"source": tmp_path / "none.png"}, (), "none.png does not exist"),
        ({"source": tmp_path / "text.txt"}, (), "text.txt is not an image"),
        ({"source": clip}, (), "clip.mp4 is not an image"),
        ({"driving": tmp_path / "none.mp4"}, (), "none.mp4 does not exist"),
        ({"driving": tmp_path / "text.txt"}, (), "; nor is it an image"),
        ({"driving": tmp_path / "empty.mp4"}, (), "empty.mp4 is empty"),
        ({"driving": tmp_path}, (), "is a folder"),
        ({"driving": still}, ("--frame", "1"), "--frame chooses a frame of a video"),
        ({"driving": still}, ("--adapt-scale",), "portrait.png does not have"),
        ({"out": tmp_path / "result" / "sheet.jpg"}, (), "must end in .png, got .jpg"),
        ({"out": tmp_path / "missing" / "sheet.png"}, (), "does not exist"),
        ({"out": tmp_path / "folder.png"}, (), "is a folder"),
        ({"out": still}, (), "also an input"),
        ({"bundle": tmp_path / "nothing"}, (), "nothing must be a folder written by"),
        ({"bundle": bare}, (), "holds no weights to look into: export it without --no-torch-weights"),
        ({"bundle": weights("fomm")}, ("--pixel", "1", "1"), "--pixel asks where attention looks, and fomm has none"),
        ({}, ("--pixel", "64", "0"), "--pixel must be X Y in 0..63 of the model's 64 x 64 pixels, got 64 0"),
        ({}, ("--pixel", "0", "-1"), "--pixel must be X Y in 0..63 of the model's 64 x 64 pixels, got 0 -1"),
        ({}, ("--frame", "6"), "--frame must be 0 to 5 in "),
        ({}, ("--frame", "-1"), "--frame must be at least 0, got -1"),
        ({}, ("--face", "2"), "--face 2 needs --crop auto, which finds faces"),
        ({}, ("--crop", "auto", "--detector", "no.onnx"), "no.onnx cannot be read"),
        ({}, ("--absolute", "--adapt-scale"), "--adapt-scale is about motion since a first frame"),
        ({"driving": still}, ("--motion-scale", "2"), "--motion-scale is about motion since an initial frame"),
        ({}, ("--motion-scale", "4.1"), "--motion-scale must be 0 to 4, got 4.1"),
    ]:  # fmt: skip
        content = still.read_bytes()
        assert explain(files, *options, **changed) == 2, expected
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("dagan-rt: error: ") and said.err.count("\n") == 1
        assert expected in said.err
        assert list((tmp_path / "result").iterdir()) == [] and still.read_bytes() == content


def test_without_pytorch_it_says_what_to_install(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert explain(files) == 2
    assert "dagan-rt explain needs the package torch, which is not installed: run pip install 'dagan-rt[torch]'" in (
        capsys.readouterr().err
    )
