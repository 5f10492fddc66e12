"""The face detector: against hand-made networks whose answer is known, and CenterFace itself on a real face."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dagan_rt import faces
from dagan_rt.errors import InputError, MissingPackage
from dagan_rt.faces import detector_file, load_detector, overlaps

try:
    faces.detector_file()
    INSTALLED = True
except MissingPackage:
    INSTALLED = False
centerface = pytest.mark.skipif(not INSTALLED, reason="the extra faces is not installed")


def constant_network(path: Path, outputs: list[np.ndarray], size: tuple[Any, Any] = (64, 96)) -> Path:
    """A network that answers the same to every picture."""
    nodes = [
        helper.make_node("Constant", [], [f"out{place}"], value=numpy_helper.from_array(array.astype(np.float32)))
        for place, array in enumerate(outputs)
    ]
    declared = [
        helper.make_tensor_value_info(f"out{place}", TensorProto.FLOAT, list(array.shape))
        for place, array in enumerate(outputs)
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, *size])
    graph = helper.make_graph(nodes, "constant", [image], declared)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_boxes_come_back_in_the_pixels_of_the_picture(tmp_path: Path) -> None:
    points = np.arange(10.0)
    rows = np.array([[10, 20, 30, 50, 0.6, *points], [40, 8, 60, 24, 0.9, *points + 3]])
    detector = load_detector(constant_network(tmp_path / "d.onnx", [rows[None]]))
    first, second = detector(picture(128, 160))  # into 64 x 96: halved
    np.testing.assert_allclose(first.box, [80, 16, 120, 48])
    np.testing.assert_allclose(second.box, [20, 40, 60, 100])
    assert first.score == pytest.approx(0.9) and second.score == pytest.approx(0.6)
    assert first.landmarks is not None and first.landmarks.shape == (5, 2)
    np.testing.assert_allclose(first.landmarks.ravel(), 2 * (points + 3))


def test_a_small_picture_is_not_enlarged(tmp_path: Path) -> None:
    rows = np.array([[10, 20, 30, 50, 0.6]])
    (face,) = load_detector(constant_network(tmp_path / "d.onnx", [rows]))(picture(60, 40))
    np.testing.assert_allclose(face.box, rows[0, :4])
    assert face.landmarks is None


def test_faces_are_inside_the_picture_sure_finite_and_told_once(tmp_path: Path) -> None:
    rows = np.array(
        [
            [-5, -5, 20, 20, 0.8],
            [-4, -5, 20, 21, 0.7],  # the same one
            [0, 0, 10, 10, 0.49],
            [np.nan, 0, 10, 10, 0.9],
            [30, 30, 30, 40, 0.9],  # no area
            [60, 30, 200, 40, 0.95],
            [200, 30, 300, 40, 0.95],  # outside
        ]
    )
    found = load_detector(constant_network(tmp_path / "d.onnx", [rows]))(picture(64, 96))
    np.testing.assert_allclose([face.box for face in found], [[60, 30, 96, 40], [0, 0, 20, 20]])


def test_many_boxes_are_bounded(tmp_path: Path) -> None:
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(0, 90, 3), np.arange(0, 60, 3)))
    rows = np.stack([x, y, x + 2, y + 2, np.linspace(0.6, 0.9, x.size)], axis=1)
    found = load_detector(constant_network(tmp_path / "d.onnx", [rows]))(picture(64, 96))
    assert len(found) == faces.MOST_FACES
    assert [face.score for face in found] == pytest.approx(np.sort(rows[:, 4])[::-1][: faces.MOST_FACES])


def mean_colour_network(path: Path) -> Path:
    """Answers one box (10 x the left upper pixel's red, green, blue, then 40 x 50) with score 0.9."""
    start, ends = (numpy_helper.from_array(np.array(v, np.int64), n) for v, n in (([0, 0], "start"), ([1, 1], "ends")))
    axes = numpy_helper.from_array(np.array([2, 3], np.int64), "axes")
    shape = numpy_helper.from_array(np.array([1, 3], np.int64), "shape")
    rest = numpy_helper.from_array(np.array([[255.0, 0.9]], np.float32), "rest")
    nodes = [
        helper.make_node("Slice", ["image", "start", "ends", "axes"], ["pixel"]),
        helper.make_node("Reshape", ["pixel", "shape"], ["colour"]),
        helper.make_node("Concat", ["colour", "rest"], ["box"], axis=1),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "h", "w"])
    box = helper.make_tensor_value_info("box", TensorProto.FLOAT, [1, 5])
    graph = helper.make_graph(nodes, "colour", [image], [box], [start, ends, axes, shape, rest])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_the_network_sees_red_green_blue_levels_of_a_picture_of_any_size(tmp_path: Path) -> None:
    image = np.zeros((300, 280, 3), np.uint8)
    image[:] = (11, 22, 133)
    detector = load_detector(mean_colour_network(tmp_path / "d.onnx"))
    (face,) = detector(image)
    np.testing.assert_allclose(face.box, [11, 22, 133, 255])
    (face,) = load_detector(tmp_path / "d.onnx", longest=150)(image)
    np.testing.assert_allclose(face.box, [22, 44, 266, 300])


def centerface_maps(boxes: np.ndarray, scores: list[float], height: int, width: int) -> list[np.ndarray]:
    """Maps in which the network would say these boxes: the definition, written from the other side."""
    heat, size = np.zeros((1, 1, height // 4, width // 4)), np.zeros((1, 2, height // 4, width // 4))
    offset, points = np.zeros_like(size), np.zeros((1, 10, height // 4, width // 4))
    for (left, top, right, bottom), score in zip(boxes, scores, strict=True):
        x, y = (left + right) / 2, (top + bottom) / 2
        column, row = int(x // 4), int(y // 4)
        heat[0, 0, row, column] = score
        for beside in ((row, column - 1), (row + 1, column)):
            heat[(0, 0, *beside)] = score - 0.05  # a hill, of which the top counts
        size[0, :, row, column] = np.log((bottom - top) / 4), np.log((right - left) / 4)
        offset[0, :, row, column] = y / 4 - row - 0.5, x / 4 - column - 0.5
        points[0, :, row, column] = np.linspace(0.1, 0.9, 10)
    return [heat, size, offset, points]


def test_centerface_maps_are_decoded(tmp_path: Path) -> None:
    boxes = np.array([[12.5, 20.25, 40.5, 60.0], [61.0, 5.0, 90.0, 40.5]])
    maps = centerface_maps(boxes, [0.7, 0.95], 64, 96)
    found = load_detector(constant_network(tmp_path / "c.onnx", maps))(picture(64, 96))
    np.testing.assert_allclose([face.box for face in found], boxes[::-1], atol=1e-4)
    assert [face.score for face in found] == pytest.approx([0.95, 0.7])
    left, top, right, bottom = boxes[1]
    assert found[0].landmarks is not None
    np.testing.assert_allclose(
        found[0].landmarks,
        [
            (left + across * (right - left), top + down * (bottom - top))
            for down, across in np.linspace(0.1, 0.9, 10).reshape(5, 2)
        ],
        atol=1e-4,
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 12)] * 4), min_size=1, max_size=6), st.tuples(*[st.integers(0, 12)] * 4))
def test_overlaps_are_counted_pixel_by_pixel(boxes: list[tuple[int, ...]], box: tuple[int, ...]) -> None:
    def drawn(corners: tuple[int, ...]) -> np.ndarray:
        mask = np.zeros((12, 12), bool)
        mask[corners[1] : corners[3], corners[0] : corners[2]] = True
        return mask

    def ordered(corners: tuple[int, ...]) -> tuple[int, ...]:
        (a, c), (b, d) = sorted(corners[::2]), sorted(corners[1::2])
        return a, b, c, d

    boxes, box = [ordered(one) for one in boxes], ordered(box)
    expected = [(drawn(one) & drawn(box)).sum() / max((drawn(one) | drawn(box)).sum(), 1) for one in boxes]
    np.testing.assert_allclose(overlaps(np.array(boxes), np.array(box)), expected)


def test_files_that_are_no_detector_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "folder.onnx").mkdir()
    constant_network(tmp_path / "two.onnx", [np.zeros((3, 5)), np.zeros((3, 5))])
    constant_network(tmp_path / "wide.onnx", [np.zeros((3, 7))])
    for name, words in [
        ("absent.onnx", "No such file"),
        ("text.onnx", "cannot be loaded by ONNX Runtime"),
        ("empty.onnx", "got 0 bytes"),
        ("folder.onnx", "must be an ONNX file"),
        ("model.pth", "must be auto, centerface, centerface-int8 or an .onnx file"),
        ("two.onnx", "is no face detector this program knows"),
    ]:
        with pytest.raises(InputError, match=words):
            load_detector(tmp_path / name)
    with pytest.raises(InputError, match=r"boxes \[N, 5\] or \[N, 15\], got \[3, 7\]"):
        load_detector(tmp_path / "wide.onnx")(picture(64, 96))
    for wrong in ({"threads": 0}, {"least_score": 1.0}, {"longest": 8}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            load_detector(tmp_path / "wide.onnx", **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="image must be uint8"):
        load_detector(tmp_path / "wide.onnx")(np.zeros((4, 4, 3), np.float32))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(MissingPackage, match=r"pip install 'dagan-rt\[faces\]'"):
        load_detector()


@centerface
def test_centerface_finds_a_real_face_wherever_it_is(portrait: np.ndarray) -> None:
    """The eyes, nose and mouth of the golden portrait are where a person sees them."""
    detector = load_detector()
    (face,) = detector(portrait)
    assert face.score > 0.8 and face.landmarks is not None
    np.testing.assert_allclose(face.box, [82, 54, 169, 165], atol=8)
    np.testing.assert_allclose(face.landmarks[[0, 1, 2]], [[103, 91], [144, 92], [123, 114]], atol=6)
    canvas = np.full((500, 700, 3), 90, np.uint8)
    canvas[200:456, 100:356] = portrait
    canvas[100:356, 400:656] = portrait[:, ::-1]
    left, right = sorted(detector(canvas), key=lambda face: face.box[0])
    np.testing.assert_allclose(left.box - [100, 200, 100, 200], face.box, atol=6)
    mirrored = [256 - face.box[2], face.box[1], 256 - face.box[0], face.box[3]]
    np.testing.assert_allclose(right.box - [400, 100, 400, 100], mirrored, atol=8)
    assert detector(picture(256, 256)) == []


def test_what_ships_finds_the_same_face_without_the_extra(
    portrait: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = load_detector()(portrait) if INSTALLED else (None,)

    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    monkeypatch.setitem(sys.modules, "onnx", None)
    (face,) = load_detector("auto")(portrait)
    assert face.score > 0.8 and face.landmarks is not None
    np.testing.assert_allclose(face.box, [82, 54, 169, 165], atol=8)
    if expected is not None and expected.landmarks is not None:
        np.testing.assert_allclose(face.box, expected.box, atol=1)
        np.testing.assert_allclose(face.landmarks, expected.landmarks, atol=1.5)


@centerface
def test_what_ships_is_made_of_the_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dagan_rt.export.detector import main

    assert main(["--out", str(tmp_path / "made.onnx")]) == 0
    made, kept = (onnx.load(path) for path in (tmp_path / "made.onnx", detector_file("centerface-int8")))
    assert made.graph == kept.graph
    assert (tmp_path / "made.onnx").stat().st_size < detector_file("centerface").stat().st_size / 3.5
    assert "made.onnx: 2.0 MB" in capsys.readouterr().out
    assert main(["--out", str(tmp_path / "made.txt")]) == 2


@centerface
@pytest.mark.slow
def test_centerface_finds_synthetic_heads() -> None:
    """Not all of them: they are drawn, and it was trained on photographs."""
    from dagan_rt.training.heads import draw_clip

    detector, hits = load_detector(), 0
    for identity in range(20):
        clip = draw_clip(identity, 1, 256)
        points = (clip.landmarks[0] + 1) / 2 * 255
        truth = np.concatenate([points.min(0), points.max(0)])
        hits += any(overlaps(face.box[None], truth)[0] > 0.5 for face in detector(clip.frames[0]))
    assert hits >= 18
