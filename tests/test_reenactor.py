"""Sessions on a backend of plain arithmetic, so that what the reenactor feeds each graph can be read off exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagan_rt import InputError, Reenactor
from dagan_rt.bundle import BatchProfile, Bundle, Graph
from dagan_rt.export.subnetworks import subnetworks
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.transfer import KeyPoints, transfer

SIZE = 32
CORNERS = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float32)


class Arithmetic:
    """Four key points at the corners of a square whose side is the image's mean level over 255; the rest follows."""

    name = "arithmetic"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.motion: dict[str, np.ndarray] = {}

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.calls.append(graph)
        if graph in ("source", "driving"):
            level = inputs["image"].mean()
            found = {
                "kp_value": level * CORNERS[None] + np.float32(0.1) * inputs["image"][:, :1, 0, 0, None],
                "kp_jacobian": (1 + level) * np.eye(2, dtype=np.float32)[None, None].repeat(4, 1),
            }
            return found | {"depth": level, "feature": level, "query": level, "thumbnail": level}
        if graph == "motion":
            self.motion = dict(inputs)
            faces = (KeyPoints(inputs[f"{role}_kp_value"], inputs[f"{role}_kp_jacobian"])
                     for role in ("source", "driving", "initial"))  # fmt: skip
            self.moved = transfer(*faces, inputs["scale"])
            return {"flow": self.moved.value, "occlusion": inputs["thumbnail"]}
        assert graph == "generator"
        return {"prediction": np.full((1, 3, SIZE, SIZE), inputs["flow"].max())}

    def from_image(self, image: np.ndarray) -> np.ndarray:
        return image.transpose(2, 0, 1)[None].astype(np.float32) / 255

    def to_image(self, prediction: np.ndarray) -> np.ndarray:
        return np.rint(prediction[0].clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)

    def from_numpy(self, values: np.ndarray) -> np.ndarray:
        return values

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        return array


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    config = NetworkConfig(variant="dagan", size=SIZE, num_keypoints=4)
    graphs = {it.name: Graph(it.name, tmp_path, it.runs, it.inputs, it.outputs) for it in subnetworks(config)}
    return Bundle(tmp_path, {"files": {}}, config, graphs, BatchProfile(1, 1, 8))


def picture(level: int, corner: int = 0) -> np.ndarray:
    image = np.full((SIZE, SIZE, 3), level, np.uint8)
    image[0, 0] = corner
    return image


def points(image: np.ndarray) -> np.ndarray:
    level = (image.astype(np.float32) / 255).mean()
    return level * CORNERS + np.float32(0.1) * (image[0, 0, 0] / np.float32(255))


def test_the_source_is_computed_once(bundle: Bundle) -> None:
    backend = Arithmetic()
    reenactor = Reenactor(bundle, backend)
    reenactor.set_source(picture(100))
    for _ in range(3):
        result = reenactor.drive(picture(50))
    assert backend.calls == ["source", *["driving", "motion", "generator"] * 3]
    assert result.shape == (SIZE, SIZE, 3) and result.dtype == np.uint8
    assert (reenactor.size, reenactor.backend_name) == (SIZE, "arithmetic")


def test_each_graph_gets_its_declared_inputs_and_nothing_else(bundle: Bundle) -> None:
    backend = Arithmetic()
    reenactor = Reenactor(bundle, backend)
    reenactor.set_source(picture(100))
    reenactor.drive(picture(50))
    assert backend.motion.keys() == {tensor.name for tensor in bundle.graphs["motion"].inputs}
    assert backend.motion["scale"].shape == (1, 1) and backend.motion["scale"].dtype == np.float32


def test_relative_motion_starts_at_the_first_driven_frame(bundle: Bundle) -> None:
    backend, source = Arithmetic(), picture(100)
    reenactor = Reenactor(bundle, backend)
    reenactor.set_source(source)
    reenactor.drive(picture(60))
    np.testing.assert_allclose(backend.moved.value[0], points(source), atol=1e-6)
    reenactor.drive(picture(60, corner=255))
    moved = points(source) + points(picture(60, corner=255)) - points(picture(60))
    np.testing.assert_allclose(backend.moved.value[0], moved, atol=1e-6)
    reenactor.reset()
    reenactor.drive(picture(200))
    np.testing.assert_allclose(backend.moved.value[0], points(source), atol=1e-6)


def test_a_new_source_starts_a_new_session(bundle: Bundle) -> None:
    backend = Arithmetic()
    reenactor = Reenactor(bundle, backend)
    reenactor.set_source(picture(100))
    reenactor.drive(picture(60))
    reenactor.set_source(picture(150))
    reenactor.drive(picture(200))
    np.testing.assert_allclose(backend.moved.value[0], points(picture(150)), atol=1e-6)


def test_absolute_motion_takes_the_driving_points(bundle: Bundle) -> None:
    backend = Arithmetic()
    reenactor = Reenactor(bundle, backend, motion="absolute")
    reenactor.set_source(picture(100))
    for frame in (picture(60), picture(200, corner=7)):
        reenactor.drive(frame)
        np.testing.assert_allclose(backend.moved.value[0], points(frame), atol=1e-6)


def test_the_scale_is_that_of_the_first_frame_for_the_whole_session(bundle: Bundle) -> None:
    backend = Arithmetic()
    reenactor = Reenactor(bundle, backend, adapt_scale=True)
    reenactor.set_source(picture(200))
    for level in (50, 100, 150):  # the source's square has four times the side of the initial frame's
        reenactor.drive(picture(level))
        assert backend.motion["scale"][0, 0] == pytest.approx(200 / 50, rel=1e-3)
    reenactor.reset()
    reenactor.drive(picture(100))
    assert backend.motion["scale"][0, 0] == pytest.approx(2, rel=1e-3)


def test_the_motion_can_change_between_frames(bundle: Bundle) -> None:
    backend, source = Arithmetic(), picture(200)
    reenactor = Reenactor(bundle, backend)
    reenactor.set_source(source)
    reenactor.drive(picture(50))
    reenactor.set_motion("absolute")
    assert (reenactor.motion, reenactor.adapt_scale) == ("absolute", False)
    reenactor.drive(picture(60, corner=7))
    np.testing.assert_allclose(backend.moved.value[0], points(picture(60, corner=7)), atol=1e-6)
    reenactor.set_motion("relative", adapt_scale=True)
    assert (reenactor.motion, reenactor.adapt_scale) == ("relative", True)
    reenactor.drive(picture(100))
    assert backend.motion["scale"][0, 0] == pytest.approx(2, rel=1e-3)  # a new session: this frame is the initial one
    np.testing.assert_allclose(backend.moved.value[0], points(source), atol=1e-6)
    assert backend.calls.count("source") == 1
    for wrong, words in (("sideways", "must be relative or absolute"), ("absolute", "adapt_scale")):
        with pytest.raises(InputError, match=words):
            reenactor.set_motion(wrong, adapt_scale=True)
    assert (reenactor.motion, reenactor.adapt_scale) == ("relative", True)


def test_a_frame_without_a_face_does_not_become_the_initial_one(bundle: Bundle) -> None:
    backend = Arithmetic()
    reenactor = Reenactor(bundle, backend, adapt_scale=True)
    reenactor.set_source(picture(200))
    with pytest.raises(InputError, match="initial driving frame"):
        reenactor.drive(picture(0))
    reenactor.drive(picture(100))
    assert backend.motion["scale"][0, 0] == pytest.approx(2, rel=1e-3)


def test_keypoints_leave_the_session_alone(bundle: Bundle) -> None:
    backend = Arithmetic()
    reenactor = Reenactor(bundle, backend)
    found = reenactor.keypoints(picture(90))
    assert found.value.shape == (1, 4, 2) and found.jacobian.shape == (1, 4, 2, 2)
    np.testing.assert_allclose(found.value[0], points(picture(90)), atol=1e-6)
    reenactor.set_source(picture(100))
    reenactor.keypoints(picture(90))
    reenactor.drive(picture(30))
    np.testing.assert_allclose(backend.moved.value[0], points(picture(100)), atol=1e-6)


def test_views_and_read_only_frames_are_fine(bundle: Bundle) -> None:
    reenactor = Reenactor(bundle, Arithmetic())
    wide = np.random.default_rng(0).integers(0, 255, (SIZE, 2 * SIZE, 3), np.uint8)
    view = wide[::-1, ::2, ::-1]
    view.flags.writeable = False
    reenactor.set_source(view)
    np.testing.assert_array_equal(reenactor.drive(view), reenactor.drive(view.copy()))


WRONG: list[tuple[Any, str]] = [
    (np.zeros((SIZE, SIZE, 3), np.float32), "got float32 (32, 32, 3)"),
    (np.zeros((SIZE, SIZE), np.uint8), "got uint8 (32, 32)"),
    (np.zeros((SIZE, SIZE, 4), np.uint8), "got uint8 (32, 32, 4)"),
    (np.zeros((3, SIZE, SIZE), np.uint8), "got uint8 (3, 32, 32)"),
    (np.zeros((1, SIZE, SIZE, 3), np.uint8), "got uint8 (1, 32, 32, 3)"),
    (np.zeros((0, 0, 3), np.uint8), "got uint8 (0, 0, 3)"),
    ([[1, 2, 3]], "got list"),
    (None, "got NoneType"),
]


@pytest.mark.parametrize(("wrong", "got"), WRONG)
def test_a_wrong_frame_is_refused_and_the_session_goes_on(bundle: Bundle, wrong: Any, got: str) -> None:
    backend = Arithmetic()
    reenactor = Reenactor(bundle, backend)
    reenactor.set_source(picture(100))
    reenactor.drive(picture(60))
    for name, call in (("image", reenactor.set_source), ("frame", reenactor.drive), ("frame", reenactor.keypoints)):
        with pytest.raises(ValueError) as caught:
            call(wrong)
        assert str(caught.value) == f"{name} must be uint8 [H, W, 3] = (32, 32, 3), {got}"
    reenactor.drive(picture(60, corner=255))
    moved = points(picture(100)) + points(picture(60, corner=255)) - points(picture(60))
    np.testing.assert_allclose(backend.moved.value[0], moved, atol=1e-6)


class Held:
    """A backend with frames of its own, whose results wait until they are let go."""

    name, size, ahead = "held", SIZE, 2

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.let_go = False

    def frames(self, slots: int, batches: Any) -> Held:
        self.calls.append(("frames", slots, tuple(batches)))
        return self

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Held:
            self.calls.append((name, *(x for x in arguments if not isinstance(x, np.ndarray))))
            return self

        return call

    def done(self) -> bool:
        return self.let_go

    def result(self) -> np.ndarray:
        return np.full((1, SIZE, SIZE, 3), 7, np.uint8)


def test_one_slot_of_a_backends_own_frames_does_it_all(bundle: Bundle) -> None:
    backend = Held()
    with Reenactor(bundle, backend, adapt_scale=True) as reenactor:  # type: ignore[arg-type]
        reenactor.set_source(picture(1))
        assert (reenactor.drive(picture(2)) == 7).all() and reenactor.frames is backend
    calls = [call[0] for call in backend.calls]
    assert backend.calls[0] == ("frames", 1, (1,)) and calls[1:] == ["set_source", "begin", "submit", "close"]
    assert backend.calls[1:3] == [("set_source", 0), ("begin", 0, True, 1.0)]
    with pytest.raises(InputError, match="call set_source"):
        reenactor.drive(picture(1))


def test_a_session_is_not_rewritten_while_frames_are_under_way(bundle: Bundle) -> None:
    backend = Held()
    reenactor = Reenactor(bundle, backend)  # type: ignore[arg-type]
    reenactor.set_source(picture(1))
    pending = reenactor.submit(picture(2))
    assert reenactor.submit(picture(2)).result().shape == (1, SIZE, SIZE, 3)
    with pytest.raises(InputError, match="set_source must wait for the frames under way: take the results of submit"):
        reenactor.set_source(picture(1))
    with pytest.raises(InputError, match="set_motion must wait for the frames under way"):
        reenactor.set_motion("absolute")
    assert reenactor.motion == "relative"
    reenactor.reset()
    with pytest.raises(InputError, match="a new initial frame must wait for the frames under way"):
        reenactor.submit(picture(2))
    backend.let_go = True
    assert (pending.result() == 7).all()
    reenactor.submit(picture(2))
    reenactor.set_source(picture(1))


def test_driving_before_a_source_says_what_to_do(bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"call set_source\(image\) first"):
        Reenactor(bundle, Arithmetic()).drive(picture(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"motion": "sideways"}, "motion must be relative or absolute, got 'sideways'"),
        ({"motion": "absolute", "adapt_scale": True}, "adapt_scale"),
        ({"backend": "abacus"}, "auto or one of tensorrt, .*onnxruntime, .*torch, got 'abacus'"),
        ({"backend": "onnxruntime", "threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(bundle: Bundle, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Reenactor(bundle, **options)


def test_another_session_has_a_source_of_its_own_on_the_same_backend(bundle: Bundle) -> None:
    backend = Arithmetic()
    first = Reenactor(bundle, backend)
    first.set_source(picture(100))
    first.drive(picture(50))
    second = first.another()
    with pytest.raises(InputError, match="drive needs a source"):
        second.drive(picture(60))
    second.set_source(picture(200))
    assert [int(one.drive(picture(level)).max()) for one, level in ((second, 30), (first, 60), (second, 40))] == [
        200,
        110,
        210,
    ]
    second.close()
    assert int(first.drive(picture(70)).max()) == 120
    assert second.backend_name == first.backend_name == "arithmetic"


@pytest.mark.parametrize(("motion", "adapt_scale"), [("relative", False), ("relative", True), ("absolute", False)])
def test_key_points_drive_as_the_frames_they_are_of(bundle: Bundle, motion: str, adapt_scale: bool) -> None:
    levels = (50, 70, 60, 90)
    by_frames, by_points = (Reenactor(bundle, Arithmetic(), motion, adapt_scale) for _ in range(2))
    for one in (by_frames, by_points):
        one.set_source(picture(100, corner=30))
    for level in levels:
        frame = picture(level, corner=level)
        found = by_points.submit_points(by_points.keypoints(frame)).result()
        np.testing.assert_array_equal(found[0], by_frames.drive(frame))
    by_points.reset()
    by_frames.reset()
    found = by_points.submit_points(by_points.keypoints(picture(80))).result()
    np.testing.assert_array_equal(found[0], by_frames.drive(picture(80)))


def test_key_points_that_cannot_drive(bundle: Bundle) -> None:
    reenactor = Reenactor(bundle, Arithmetic())
    points = reenactor.keypoints(picture(50))
    with pytest.raises(InputError, match="submit_points needs a source"):
        reenactor.submit_points(points)
    reenactor.set_source(picture(100))
    with pytest.raises(InputError, match=r"with K = 4, got \(1, 3, 2\) and \(1, 4, 2, 2\)"):
        reenactor.submit_points(KeyPoints(points.value[:, :3], points.jacobian))
    with pytest.raises(InputError, match="finite"):
        reenactor.submit_points(KeyPoints(points.value * np.float32(np.nan), points.jacobian))

    class Whole:
        name = "whole"

        def frames(self, slots: int, batches: Any) -> Any:
            return type("Frames", (), {"size": SIZE})()

    with pytest.raises(InputError, match="backend whole is driven by key points only with by_points=True"):
        Reenactor(bundle, Whole()).submit_points(points)  # type: ignore[arg-type]


def test_a_backend_whose_frames_take_no_key_points_is_driven_graph_by_graph(bundle: Bundle) -> None:
    class Whole(Arithmetic):
        def frames(self, slots: int, batches: Any) -> Any:
            raise AssertionError("these take pictures alone")

    reenactor, plain = Reenactor(bundle, Whole(), by_points=True), Reenactor(bundle, Arithmetic())
    for one in (reenactor, plain):
        one.set_source(picture(100, corner=30))
        one.drive(picture(50))
    points = plain.keypoints(picture(70, corner=70))
    expected = plain.submit_points(points).result()
    for one in (reenactor, reenactor.another()):
        if one is not reenactor:
            one.set_source(picture(100, corner=30))
            one.drive(picture(50))
        np.testing.assert_array_equal(one.submit_points(points).result(), expected)


def test_motion_is_scaled(bundle: Bundle) -> None:
    backend = Arithmetic()
    for scale, adapt_scale in ((0.5, False), (2.0, True), (0.0, False)):
        reenactor = Reenactor(bundle, backend, adapt_scale=adapt_scale, motion_scale=scale)
        reenactor.set_source(picture(100))
        reenactor.drive(picture(50))
        reenactor.drive(picture(60))
        expected = scale * (2 if adapt_scale else 1)  # the source's face is twice as large
        np.testing.assert_allclose(backend.motion["scale"], [[expected]], rtol=1e-6)
    reenactor.set_motion("absolute")
    reenactor.drive(picture(60))
    np.testing.assert_array_equal(backend.motion["scale"], [[1]])
    for wrong in (-0.1, 4.1, float("nan")):
        with pytest.raises(InputError, match=f"motion_scale must be 0 to 4, got {wrong}"):
            Reenactor(bundle, backend, motion_scale=wrong)
    with pytest.raises(InputError, match="cannot be used with motion='absolute'"):
        Reenactor(bundle, backend, "absolute", motion_scale=0.5)
