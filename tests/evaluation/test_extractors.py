"""Extractors from files: descriptors that may come from anywhere, and ONNX graphs whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dagan_rt.errors import InputError
from dagan_rt.evaluation.extractors import OnnxExtractor, load_extractors, read_descriptor, resized

POINTS = [[0.0, 0.0], [3.0, 1.0], [15.0, 15.0]]


def colours(*levels: tuple[int, int, int], side: int = 16) -> np.ndarray:
    """Pictures of one colour each, uint8 [B, S, S, 3]."""
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def test_input_is_scaled_then_normalised_by_channel(tmp_path: Path, write_descriptor) -> None:
    images = colours((10, 20, 40), (50, 100, 250))
    keys = {"scale": 1 / 255, "mean": [0.1, -0.2, 0.3], "std": [0.5, 0.25, 2.0]}
    expected = (images[:, 0, 0] / 255 - [0.1, -0.2, 0.3]) / [0.5, 0.25, 2.0]
    plain = OnnxExtractor(write_descriptor(tmp_path, graph={}, **keys))
    assert plain.prepare(images).shape == (2, 3, 16, 16)
    values, found = plain(images)
    assert found.all() and np.linalg.norm(values, axis=1) == pytest.approx([1, 1])
    assert values == pytest.approx(expected / np.linalg.norm(expected, axis=1, keepdims=True), abs=1e-6)
    swapped = OnnxExtractor(write_descriptor(tmp_path, "pose", graph={}, channels="BGR", **keys))
    assert swapped(images)[0] == pytest.approx(expected[:, ::-1], abs=1e-5)
    last = write_descriptor(
        tmp_path, "actions", graph={"shape": ("B", 16, 16, 3)}, layout="NHWC", threshold=0.0, **keys
    )
    assert OnnxExtractor(last)(images)[0].tolist() == (expected >= 0).astype(float).tolist()


def test_frames_are_resized_antialiased(tmp_path: Path, write_descriptor) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    expected = Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(resized(image, (16, 16)), np.asarray(expected))
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 200  # of every two rows one: without averaging, all or nothing is left
    assert abs(resized(stripes, (16, 16)).astype(int) - 100).max() <= 8  # the border averages less
    assert resized(image, (64, 64)) is image
    assert resized(image, (8, 16)).shape == (8, 16, 3)


@pytest.mark.parametrize(
    ("units", "scale", "pixels"),
    [  # of a picture of 16 × 8 pixels (width × height), at 256: 16 and 32 times as large
        ("pixels", 1.0, lambda x, y: ((x + 0.5) * 16 - 0.5, (y + 0.5) * 32 - 0.5)),
        ("unit", 1 / 16, lambda x, y: (x * 256 - 0.5, y * 256 - 0.5)),
        ("centred", 1 / 8, lambda x, y: (((x + 1) / 2 * 15 + 0.5) * 16 - 0.5, ((y + 1) / 2 * 7 + 0.5) * 32 - 0.5)),
    ],
)
def test_landmarks_are_told_in_pixels_at_256(
    tmp_path: Path, write_descriptor, units: str, scale: float, pixels
) -> None:
    shifts = np.array(POINTS) * scale
    graph = {"shape": ("B", 3, 8, 16), "outputs": {"points": ("points", shifts)}}
    path = write_descriptor(
        tmp_path, "landmarks", graph=graph, units=units, size=[8, 16], output="points", scale=1.0, indices=[2, 0]
    )
    values, found = OnnxExtractor(path)(colours((0, 0, 0)))
    assert found.all() and values.shape == (1, 2, 2)
    assert values[0] == pytest.approx(np.array([pixels(*shifts[2]), pixels(*shifts[0])]), abs=1e-4)


def test_pose_is_reordered_and_in_degrees(tmp_path: Path, write_descriptor) -> None:
    graph = {"outputs": {"output": ("scaled", [1.0, 2.0, 3.0])}}
    path = write_descriptor(
        tmp_path, "pose", graph=graph, order=["roll", "yaw", "pitch"], units="radians", scale=1 / 255
    )
    values, _ = OnnxExtractor(path)(colours((51, 102, 204)))
    assert values[0] == pytest.approx(np.degrees([0.8, 2.4, 0.2]), rel=1e-5)


def test_failures_are_low_scores_and_what_is_not_finite(tmp_path: Path, write_descriptor) -> None:
    outputs = {"output": ("scaled", [1.0, 1.0, 1.0]), "sure": ("score", None)}
    path = write_descriptor(tmp_path, "pose", graph={"outputs": outputs}, score="sure", least_score=0.5, scale=1 / 255)
    values, found = OnnxExtractor(path)(colours((255, 0, 0), (100, 0, 0), (128, 0, 0)))
    assert found.tolist() == [True, False, True] and np.isnan(values[1]).all() and np.isfinite(values[[0, 2]]).all()
    for kind in ("pose", "identity", "actions"):
        infinite = write_descriptor(tmp_path, kind, graph={"outputs": {"output": ("scaled", [np.inf, 1, 1])}})
        values, found = OnnxExtractor(infinite)(colours((0, 0, 0), (9, 9, 9)))
        assert not found.any() and np.isnan(values).all(), kind
    nothing = write_descriptor(tmp_path, "identity", graph={})  # an embedding of length 0
    assert not OnnxExtractor(nothing)(colours((0, 0, 0)))[1].any()


def test_a_batch_is_one_image_at_a_time_where_the_graph_takes_one(tmp_path: Path, write_descriptor) -> None:
    images = colours((1, 2, 3), (4, 5, 9), (200, 10, 30))
    one, any_number = (
        OnnxExtractor(write_descriptor(tmp_path, "pose", name, {"shape": (batch, 3, 16, 16)}))
        for name, batch in (("one", 1), ("any", "B"))
    )
    assert np.array_equal(one(images)[0], any_number(images)[0])
    with pytest.raises(InputError, match="any number of images or one, it takes 4"):
        OnnxExtractor(write_descriptor(tmp_path, "pose", "four", {"shape": (4, 3, 16, 16)}))


def test_one_of_a_kind(tmp_path: Path, write_descriptor) -> None:
    paths = [write_descriptor(tmp_path, kind, name, {}) for kind, name in
             (("identity", "a"), ("pose", "b"), ("identity", "c"))]  # fmt: skip
    assert {kind: it.name for kind, it in load_extractors(paths[:2], threads=1).items()} == {
        "identity": "known identity", "pose": "known pose",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"c\.toml and .*a\.toml both give identity"):
        load_extractors(paths, threads=1)
    described = load_extractors(paths[:1])["identity"].describe()
    assert len(described["model sha256"]) == 64 == len(described["descriptor sha256"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "emotion"}, "kind must be one of landmarks"),
        ({"kind": None}, "kind must be one of landmarks"),
        ({"kind": 3}, "kind must be one of landmarks"),
        ({"model": "../identity.onnx"}, "model must be the name of an .onnx file in the same folder"),
        ({"model": "/etc/passwd"}, "model must be the name"),
        ({"model": "a/b.onnx"}, "model must be the name"),
        ({"model": "a\\b.onnx"}, "model must be the name"),
        ({"model": "C:b.onnx"}, "model must be the name"),
        ({"model": "identity.bin"}, "model must be the name"),
        ({"model": "\u0000.onnx"}, "model must be the name"),
        ({"model": "gone.onnx"}, r"gone\.onnx does not exist"),
        ({"name": ""}, "name must be 1 to 200"),
        ({"name": "a\u001b[31mb"}, "name must be 1 to 200"),
        ({"size": [16]}, "size must be a list of 2"),
        ({"size": [16, 100_000]}, "size must be two numbers from 8 to 1024"),
        ({"size": [32, 32]}, r"size and layout give \[3, 32, 32\], identity.onnx takes \[3, 16, 16\]"),
        ({"layout": "NHWC"}, r"size and layout give \[16, 16, 3\]"),
        ({"layout": "HWC"}, "layout must be one of NCHW, NHWC"),
        ({"channels": "RGBA"}, "channels must be one of RGB, BGR"),
        ({"std": [1.0, 0.0, 1.0]}, "scale and std must not be 0"),
        ({"std": [1.0, -1.0, 1.0]}, "finite and not negative"),
        ({"mean": [1.0, 2.0]}, "mean must be a list of 3 numbers"),
        ({"mean": ["a", 2.0, 3.0]}, "mean must be finite numbers"),
        ({"scale": "1"}, "scale must be float"),
        ({"output": "missing"}, "has no output 'missing', it has output"),
        ({"score": "missing"}, "has no output 'missing', it has output"),
        ({"threshold": 0.5}, "threshold is not a known key"),
        ({"units": "pixels"}, "units is not a known key"),
        ({"colour": 1}, "colour is not a known key"),
    ],
)
def test_descriptors_that_cannot_be_used(tmp_path: Path, write_descriptor, keys: dict, message: str) -> None:
    path = write_descriptor(tmp_path, "identity", graph={}, **keys)
    with pytest.raises(InputError, match=message) as error:
        load_extractors([path])
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("landmarks", {"units": "inches"}, "units must be one of pixels, unit, centred"),
        ("landmarks", {"output": "means"}, r"must be \[B, L, 2\] of floats, got float32 \[1, 3\]"),
        ("landmarks", {"indices": [3]}, "indices go up to 3, the output has 3 points"),
        ("landmarks", {"indices": [-1]}, "finite and not negative"),
        ("pose", {"order": ["yaw", "yaw", "roll"]}, "order must hold yaw, pitch and roll"),
        ("pose", {"output": "points"}, r"must be \[B, 3\] of floats, got float32 \[1, 3, 2\]"),
        ("actions", {"names": ["one"]}, "1 names, the output has 3 action units"),
        ("identity", {"output": "points"}, r"must be \[B, E\] of floats"),
    ],
)
def test_outputs_that_do_not_fit(tmp_path: Path, write_descriptor, kind: str, keys: dict, message: str) -> None:
    outputs = {"means": ("means", None), "points": ("points", POINTS)}
    given = {"output": "points" if kind == "landmarks" else "means"} | keys
    path = write_descriptor(tmp_path, kind, graph={"outputs": outputs}, **given)
    with pytest.raises(InputError, match=message):
        load_extractors([path])[kind](colours((1, 2, 3)))


def test_noise_is_of_the_kind_s_own_metrics(tmp_path: Path, write_descriptor) -> None:
    path = write_descriptor(tmp_path, "identity", graph={})
    path.write_text(path.read_text() + 'noise_from = "heads"\n[noise]\naed = 0.1\ncsim = 0.9\n')
    assert read_descriptor(path).noise == {"aed": 0.1, "csim": 0.9}
    path.write_text(path.read_text() + "akd = 1\n")
    with pytest.raises(InputError, match=r"noise\.akd is not a metric of identity: aed, csim"):
        read_descriptor(path)


def test_files_that_are_no_extractor(tmp_path: Path, write_descriptor) -> None:
    path = write_descriptor(tmp_path, "identity")
    (tmp_path / "identity.onnx").write_bytes(b"not a graph at all")
    with pytest.raises(InputError, match=r"identity\.onnx cannot be loaded"):
        load_extractors([path])
    (tmp_path / "identity.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"identity\.onnx is empty"):
        load_extractors([path])
    for content, message in (
        (b"\xff", "cannot be read"),
        (b"kind = ", "not valid TOML"),
        (b"#" * (1 << 21), "at most"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_extractors([path])
    with pytest.raises(InputError, match=r"gone\.toml"):
        load_extractors([tmp_path / "gone.toml"])


def test_weights_outside_the_folder_are_refused(tmp_path: Path, write_descriptor) -> None:
    """An ONNX file may name further files; those of other folders are none of its business."""
    import onnx
    from onnx import TensorProto

    (tmp_path / "in").mkdir()
    path = write_descriptor(tmp_path / "in", "pose", graph={"outputs": {"output": ("scaled", [1.0, 1.0, 1.0])}})
    (tmp_path / "secret.bin").write_bytes(np.ones(3, np.float32).tobytes())
    model = onnx.load(tmp_path / "in" / "pose.onnx")
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../secret.bin"), ("offset", "0"), ("length", "12")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    (tmp_path / "in" / "pose.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"pose\.onnx cannot be loaded"):
        load_extractors([path])


def test_heads_are_the_four_that_ship(tmp_path: Path, write_descriptor, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("landmarks", "identity", "pose", "actions"):
        write_descriptor(tmp_path, kind, graph={})
    asked: list[tuple[str, ...]] = []

    def asset(*parts: str) -> Path:
        asked.append(parts[:-1])
        return tmp_path / parts[-1]

    monkeypatch.setattr("dagan_rt._assets.asset", asset)
    assert sorted(load_extractors(["heads"], threads=1)) == ["actions", "identity", "landmarks", "pose"]
    assert asked == [("train", "extractors")] * 4
