"""Whole frames out of graphs, on a backend whose arrays are plain tuples that say what they were made of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dagan_rt import InputError
from dagan_rt.bundle import BatchProfile, Bundle, Graph
from dagan_rt.export.subnetworks import subnetworks
from dagan_rt.frames import Computed, GraphFrames, Together, batch_sizes, open_frames
from dagan_rt.networks.config import NetworkConfig

SIZE = 32


class Told:
    """A frame's four first pixels are the levels of its source, its initial and its driving frame, and the scale."""

    name = "told"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.before: Callable[[str], None] = lambda graph: None

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.before(graph)
        self.calls.append(graph)
        if graph in ("source", "driving"):
            level = inputs["image"][1]
            names = ("kp_value", "kp_jacobian", "depth", "feature", "query", "thumbnail")
            return {name: (f"{graph} {name}", level) for name in names}
        if graph == "motion":
            assert inputs["source_kp_value"][0] == "source kp_value" and inputs["scale"][0] == "number"
            levels = [inputs[f"{role}_kp_{part}"][1] for role in ("source", "initial", "driving")
                      for part in ("value", "jacobian")]  # fmt: skip
            assert levels[::2] == levels[1::2] and inputs["thumbnail"] == ("source thumbnail", levels[0])
            return {"flow": (*levels[::2], inputs["scale"][1]), "occlusion": ("occlusion", levels[4])}
        assert graph == "generator" and inputs["feature"] == ("source feature", inputs["flow"][0])
        assert inputs.get("source_image") in (None, ("image", inputs["flow"][0]))
        return {"prediction": inputs["flow"]}

    def from_image(self, image: np.ndarray) -> Any:
        return "image", int(image[0, 0, 0])

    def to_image(self, prediction: Any) -> np.ndarray:
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        image[0, :4] = np.array(prediction)[:, None]
        return image

    def from_numpy(self, values: np.ndarray) -> Any:
        return "number", float(values.reshape(()))

    def to_numpy(self, array: Any) -> np.ndarray:
        side = np.float32(array[1])
        return side * np.array([[[0, 0], [1, 0], [1, 1], [0, 1]]], np.float32)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    # The variant whose generator takes the source image, too.
    return declared(NetworkConfig(variant="dagan_spade", size=SIZE, num_keypoints=4), tmp_path)


def declared(config: NetworkConfig, path: Path) -> Bundle:
    graphs = {it.name: Graph(it.name, path, it.runs, it.inputs, it.outputs) for it in subnetworks(config)}
    return Bundle(path, {"files": {}}, config, graphs, BatchProfile(1, 1, 8))


def picture(level: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), level, np.uint8)


def shown(images: np.ndarray) -> list[tuple[int, ...]]:
    assert images.dtype == np.uint8 and images.shape[1:] == (SIZE, SIZE, 3)
    return [tuple(int(x) for x in image[0, :4, 0]) for image in images]


def test_frames_of_many_slots_share_a_batch(bundle: Bundle) -> None:
    frames = GraphFrames(Told(), bundle, slots=3, batches=(1, 4))
    for slot in range(3):
        frames.set_source(slot, picture(10 + slot))
    frames.begin(0, picture(50))
    frames.begin(1, None)
    frames.begin(2, picture(6), adapt_scale=True)
    pending = frames.submit([2, 0, 1, 0], [picture(level) for level in (71, 72, 73, 74)])
    assert pending.done()
    assert shown(pending.result()) == [(12, 6, 71, 2), (10, 50, 72, 1), (11, 11, 73, 1), (10, 50, 74, 1)]


def test_the_points_of_the_initial_frame_are_found_once(bundle: Bundle) -> None:
    backend = Told()
    frames = GraphFrames(backend, bundle)
    frames.set_source(0, picture(10))
    frame = picture(50)
    frames.begin(0, frame)
    assert shown(frames.submit([0], [frame]).result()) == [(10, 50, 50, 1)]
    assert backend.calls == ["source", "driving", "motion", "generator"]
    frames.submit([0], [frame]).result()
    assert backend.calls.count("driving") == 2


def test_an_initial_frame_changed_in_place_is_another_frame(bundle: Bundle) -> None:
    frames = GraphFrames(Told(), bundle)
    frames.set_source(0, picture(10))
    frame = picture(50)
    frames.begin(0, frame)
    frame[:] = 60
    assert shown(frames.submit([0], [frame]).result()) == [(10, 50, 60, 1)]


def test_a_slot_is_rewritten_during_a_batch_of_another(bundle: Bundle) -> None:
    backend = Told()
    frames = GraphFrames(backend, bundle, slots=2, batches=(2,))
    for slot in (0, 1):
        frames.set_source(slot, picture(10 + slot))
        frames.begin(slot, None)
    here, done = threading.current_thread(), []

    def resource() -> None:
        frames.set_source(1, picture(90))
        frames.begin(1, picture(91))
        done.append(True)

    other = threading.Thread(target=resource)

    def between_two_frames(graph: str) -> None:
        if threading.current_thread() is here and graph == "driving" and backend.calls.count("generator") == 1:
            assert done == [True]

    def after_the_first(image: Any) -> np.ndarray:
        other.start()
        other.join(20)  # not while a graph runs, but before the batch is through
        backend.to_image = real  # type: ignore[method-assign]
        return real(image)

    backend.before, real = between_two_frames, backend.to_image
    backend.to_image = after_the_first  # type: ignore[method-assign,assignment]
    assert shown(frames.submit([0, 0], [picture(70), picture(71)]).result()) == [(10, 10, 70, 1), (10, 10, 71, 1)]
    assert shown(frames.submit([1], [picture(72)]).result()) == [(90, 91, 72, 1)]


def test_errors_come_out_of_the_result(bundle: Bundle) -> None:
    backend = Told()
    frames = GraphFrames(backend, bundle, slots=2)
    with pytest.raises(InputError, match="slot 1 has no source"):
        frames.begin(1, None)
    with pytest.raises(InputError, match="slot 0 has no session: call set_source and begin first"):
        frames.submit([0], [picture(1)]).result()
    frames.set_source(0, picture(10))
    frames.begin(0, None)
    frames.set_source(0, picture(20))  # a session ends with its source
    with pytest.raises(InputError, match="slot 0 has no session"):
        frames.submit([0], [picture(1)]).result()
    with pytest.raises(InputError, match="initial driving frame span 0"):
        frames.begin(0, picture(0), adapt_scale=True)
    frames.begin(0, None)

    def fail(graph: str) -> None:
        raise RuntimeError("no luck")

    backend.before = fail
    pending = frames.submit([0], [picture(1)])
    with pytest.raises(RuntimeError, match="no luck"):
        pending.result()
    frames.close()
    with pytest.raises(InputError, match="no session"):
        frames.submit([0], [picture(1)]).result()


@pytest.mark.parametrize(("slots", "count"), [([], 0), ([0, 0, 0], 3), ([0, 0], 1)])
def test_a_batch_has_as_many_frames_as_slots_and_no_more_than_it_may(
    bundle: Bundle, slots: list[int], count: int
) -> None:
    frames = GraphFrames(Told(), bundle, batches=(1, 2))
    with pytest.raises(InputError, match=f"1 to 2 frames and as many slots, got {count} and {len(slots)}"):
        frames.submit(slots, [picture(1)] * count)


@pytest.mark.parametrize("variant", ["dagan", "dagan_spade", "fomm"])
def test_memory_is_what_the_networks_give(small_model: Any, tmp_path: Path, variant: str) -> None:
    import torch

    model = small_model(variant)
    image = torch.zeros(1, 3, model.config.size, model.config.size)
    source = next(it for it in subnetworks(model.config) if it.name == "source")
    with torch.inference_mode():
        found = source.run(model, {"image": image})
    kept = [found[name] for name in ("feature", "query", "thumbnail") if name in found]
    points = [found["kp_value"], found["kp_jacobian"]]  # the source's and the initial frame's
    arrays = [*kept, *points, *points, torch.ones(1)] + [image] * (variant == "dagan_spade")
    assert GraphFrames(Told(), declared(model.config, tmp_path)).slot_bytes == 4 * sum(
        array.numel() for array in arrays
    )


def test_stages_run_their_graph_as_often_as_the_batch_is_large(bundle: Bundle) -> None:
    backend = Told()
    stages = GraphFrames(backend, bundle).stages(3)
    assert list(stages) == ["driving", "motion", "generator"]
    for name, run in stages.items():
        backend.calls.clear()
        run()
        assert backend.calls == [name] * 3


def test_times_of_a_cpu_are_all_compute(bundle: Bundle) -> None:
    frames = GraphFrames(Told(), bundle)
    frames.set_source(0, picture(1))
    frames.begin(0, None)
    times = frames.timed([0], [picture(2)])
    assert times.wall == times.device > 0 and times.upload == times.download == 0


def test_a_backend_with_frames_of_its_own_is_asked_for_them(bundle: Bundle) -> None:
    class Own(Told):
        def frames(self, slots: int, batches: Any) -> Any:
            return slots, batches

    assert open_frames(Own(), bundle, 3, (1, 4)) == (3, (1, 4))  # type: ignore[comparison-overlap]
    assert isinstance(open_frames(Told(), bundle), GraphFrames)


@pytest.mark.parametrize(
    ("most", "largest", "sizes"),
    [
        (1, None, (1,)),
        (2, None, (1, 2)),
        (32, None, (1, 2, 4, 8, 16, 32)),
        (24, None, (1, 2, 4, 8, 16, 24)),
        (32, 6, (1, 2, 4, 6)),
        (4, 6, (1, 2, 4)),
    ],
)
def test_batch_sizes_go_as_far_as_the_backend(most: int, largest: int | None, sizes: tuple[int, ...]) -> None:
    backend: Any = SimpleNamespace(frames=None) if largest is None else SimpleNamespace(frames=0, largest_batch=largest)
    assert batch_sizes(backend, most) == sizes
    assert batch_sizes(Told(), most) == (1,)


@pytest.mark.parametrize(
    ("slots", "batches", "words"),
    [
        (0, (1,), "slots must be at least 1, got 0"),
        (1, (), r"ascending numbers of at least 1, got \(\)"),
        (1, (0, 1), "got"),
        (1, (2, 1), "got"),
        (1, (1, 1), "got"),
    ],
)
def test_wrong_numbers_are_refused(bundle: Bundle, slots: int, batches: tuple[int, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_frames(Told(), bundle, slots, batches)


def test_several_sessions_answer_in_their_order() -> None:
    images = [picture(level) for level in (10, 20, 30)]
    together = Together([Computed(image[None]) for image in images])
    assert together.done()
    np.testing.assert_array_equal(together.result(), np.stack(images)[None])
