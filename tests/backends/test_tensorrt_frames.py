"""Whole frames of engines: against the same graphs run one face after the other, on imitations of TensorRT and CUDA."""

from __future__ import annotations

import importlib.util
import shutil
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dagan_rt import backends
from dagan_rt.backends import tensorrt as adapter
from dagan_rt.bundle import BatchProfile, Bundle, write_manifest
from dagan_rt.errors import DeviceLost, InputError
from dagan_rt.export.tensorrt import build_engines, graphs_of
from dagan_rt.frames import GraphFrames, open_frames

SIZE = 64


@cache
def imitation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dagan_rt_tests_imitation", Path(__file__).with_name("imitation.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundle(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With engines for the imitated library, of the variant that uses every input."""
    from dagan_rt.export import export

    exported = export(small_model("dagan_spade"), tmp_path_factory.mktemp("spade") / "bundle")[0]
    root = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(exported.path, root)
    with pytest.MonkeyPatch.context() as patch:
        imitation().install(patch)
        build_engines(
            root, "tensorrt", graphs_of(exported), batch=BatchProfile.parse("1:1:4"), recipe_hash="0" * 12,
            precisions=dict.fromkeys(exported.graphs, "fp32"), timing_cache=root.parent / "times",
        )  # fmt: skip
    write_manifest(root, exported.manifest)
    return Bundle.open(root)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    imitation().install(monkeypatch)
    yield imitation().driver
    imitation().driver.raise_errors()


@pytest.fixture
def frames(bundle: Bundle, driver: Any) -> Iterator[Any]:
    found = open_frames(adapter.open(bundle), bundle, slots=3, batches=(1, 2, 4))
    yield found
    found.close()


@pytest.fixture
def expected(bundle: Bundle) -> GraphFrames:
    return GraphFrames(backends.open_backend("onnxruntime", bundle, threads=1), bundle, slots=3, batches=(1, 2, 4))


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)


def begin_all(frames: Any) -> None:
    """Three sessions, each begun another way."""
    for slot in range(3):
        frames.set_source(slot, image(slot))
    frames.begin(0, image(10))
    frames.begin(1, None)
    frames.begin(2, image(12), adapt_scale=True)


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - wanted).max() <= 1  # batches are added up in another order


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_frames_of_many_sessions_in_one_batch(
    driver: Any, frames: Any, expected: GraphFrames, seed: int | None
) -> None:
    for it in (frames, expected):
        begin_all(it)
    if seed is not None:
        driver.library.test_seed(seed)
    asked = []
    for number, slots in enumerate([[0], [2, 1, 0], [1, 1], [0, 0, 2, 1], [2]]):
        pictures = [image(100 + 10 * number + i) for i in range(len(slots))]
        asked.append((frames.submit(slots, pictures), expected.submit(slots, pictures)))
    for pending, wanted in asked:
        assert_same(pending.result(), wanted.result())


def test_a_session_changes_while_batches_of_others_are_under_way(frames: Any, expected: GraphFrames) -> None:
    for it in (frames, expected):
        begin_all(it)
    pending = [frames.submit([0, 1], [image(20 + i), image(30 + i)]) for i in range(2)]
    thread = threading.Thread(target=lambda: (frames.set_source(2, image(7)), frames.begin(2, image(8))))
    thread.start()
    thread.join()
    expected.set_source(2, image(7))
    expected.begin(2, image(8))
    for i, it in enumerate(pending):
        assert_same(it.result(), expected.submit([0, 1], [image(20 + i), image(30 + i)]).result())
    assert_same(frames.submit([2], [image(9)]).result(), expected.submit([2], [image(9)]).result())


def test_a_source_waits_for_no_batch(driver: Any, frames: Any) -> None:
    begin_all(frames)
    pending = frames.submit([0], [image(1)])
    frames.set_source(1, image(2))
    frames.begin(1, image(3), adapt_scale=True)
    assert not pending.done()
    pending.result()


def test_steady_frames_allocate_nothing_and_replay_one_graph_each(driver: Any, frames: Any) -> None:
    begin_all(frames)
    before = driver.library.test_used(), driver.library.test_blocks(), driver.library.test_objects()
    driver.journal()
    imitation().calls.clear()
    for number in range(6):
        frames.submit([number % 3] * (1 + number % 4), [image(number)] * (1 + number % 4)).result()
    assert (driver.library.test_used(), driver.library.test_blocks(), driver.library.test_objects()) == before
    journal = driver.journal()
    assert sum(line.startswith("replay") for line in journal) == 6
    assert not any(line.startswith(("allocate", "pin", "capture")) for line in journal)
    assert imitation().calls == []


def test_each_batch_size_has_contexts_of_its_own_in_shared_scratch_memory(bundle: Bundle, driver: Any) -> None:
    backend = adapter.open(bundle)
    imitation().calls.clear()
    found = open_frames(backend, bundle, slots=1, batches=(1, 3))
    shapes = [call[2][0] for call in imitation().calls if call[0] == "set_input_shape" and call[1] == "image"]
    assert shapes == [1, 3, 1, 1]  # driving of each size; source and driving of one face
    scratch = [call[1] for call in imitation().calls if call[0] == "set_device_memory"]
    assert len(scratch) == 3 * 2 + 2 and len(set(scratch)) == 2  # batches and sources may run at once
    assert found.slot_bytes > 0 and found.fixed_bytes > backend.weights_bytes
    found.close()


def test_all_memory_is_given_back(bundle: Bundle, driver: Any) -> None:
    backend = adapter.open(bundle)
    before = driver.library.test_used(), driver.library.test_blocks(), driver.library.test_objects()
    found = open_frames(backend, bundle, slots=2, batches=(1, 2))
    found.set_source(0, image(0))
    assert driver.library.test_used() >= before[0] + 2 * found.slot_bytes
    found.close()
    found.close()
    assert (driver.library.test_used(), driver.library.test_blocks(), driver.library.test_objects()) == before


def test_too_little_memory_says_what_to_do_and_gives_back_what_was_taken(bundle: Bundle, driver: Any) -> None:
    backend = adapter.open(bundle)
    open_one = open_frames(backend, bundle, slots=1)
    begun = image(0), image(1)
    open_one.set_source(0, begun[0])
    open_one.begin(0, None)
    wanted = open_one.submit([0], [begun[1]]).result()
    used, objects = driver.library.test_used(), driver.library.test_objects()
    whole = open_frames(backend, bundle, slots=64, batches=(1, 4))
    needed = driver.library.test_used() - used
    whole.close()
    for part in (0.1, 0.5, 0.8, 0.95):  # it runs out at one place after the other
        driver.library.test_memory(used + int(part * needed))
        with pytest.raises(InputError, match=r"needs .* MB of GPU memory and GPU 0 has .* free: take fewer slots or"):
            open_frames(backend, bundle, slots=64, batches=(1, 4))
        assert (driver.library.test_used(), driver.library.test_objects()) == (used, objects)
    np.testing.assert_array_equal(open_one.submit([0], [begun[1]]).result(), wanted)  # others do not notice
    open_one.close()


def test_a_batch_that_no_engine_takes_is_refused(bundle: Bundle, driver: Any) -> None:
    with pytest.raises(InputError, match=r"engines of bundle .* take a batch of 1:1:4, got 8: run python -m"):
        open_frames(adapter.open(bundle), bundle, batches=(1, 8))


@pytest.mark.parametrize(
    ("slots", "message"), [([3], "slots must be 0 to 2, got 3"), ([-1], "got -1"), ([1], "slot 1 has")]
)
def test_wrong_slots_are_refused(frames: Any, slots: list[int], message: str) -> None:
    frames.set_source(0, image(0))
    frames.begin(0, None)
    with pytest.raises(InputError, match=message):
        frames.submit(slots, [image(1)])
    with pytest.raises(InputError, match="slot 2 has no source: call set_source first"):
        frames.begin(2, image(1))
    if slots != [1]:
        with pytest.raises(InputError, match=message):
            frames.set_source(slots[0], image(1))


def test_a_lost_gpu(driver: Any, frames: Any) -> None:
    begin_all(frames)
    pending = frames.submit([0], [image(1)])
    driver.library.test_break(700)
    for act in (pending.result, lambda: frames.submit([0], [image(1)]), lambda: frames.set_source(0, image(1))):
        with pytest.raises(DeviceLost, match="the GPU cannot be used by this process any more, start it again"):
            act()
    frames.close()


def test_an_engine_that_fails_because_the_gpu_is_lost_says_so(driver: Any, bundle: Bundle) -> None:
    backend = adapter.open(bundle)
    inputs = {"image": backend.from_image(image(0))}
    outputs = backend.run("driving", inputs)
    driver.library.test_break(719)
    with pytest.raises(DeviceLost):
        backend.run_into("driving", inputs, outputs)


def test_the_time_of_the_parts_and_the_stages(frames: Any) -> None:
    begin_all(frames)
    times = frames.timed([0, 1], [image(1), image(2)])
    assert min(times) > 0 and times.device > times.upload
    stages = frames.stages(2)
    assert list(stages) == ["sessions", "planes", "driving", "motion", "generator", "images"]
    for stage in stages.values():
        stage()


def test_a_reenactor_runs_on_them(bundle: Bundle, driver: Any) -> None:
    from dagan_rt import Reenactor

    pictures = [image(seed) for seed in range(4)]
    results = []
    for backend in ("tensorrt", "onnxruntime"):
        reenactor = Reenactor(bundle, backend)
        reenactor.set_source(pictures[0])
        results.append(np.stack([reenactor.drive(picture) for picture in pictures[1:]]))
    assert_same(*results)
