"""Launching through the CUDA driver: an imitation of it (tests/cuda) writes down what it is asked, byte by byte."""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagan_rt.cuda import driver as cuda
from dagan_rt.errors import InputError
from dagan_rt.kernels import _build, _devices
from dagan_rt.kernels._devices import Array, CudaDevice, CudaError, Launch, Unit

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
from imitated_driver import Driver, installed  # noqa: E402

UNIT = Unit("flow_warp", "flow_warp")
POINTER = 0x7F00_1234_5600


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Stands in for libcuda; a fat binary of every unit is there, whose content is its name."""
    monkeypatch.setattr(_build, "fat_binary", lambda unit: f"fat {unit.source}".encode())
    monkeypatch.setattr(_build, "compiled", lambda unit, capability: f"cubin {unit.source} {capability}".encode())
    with installed(monkeypatch) as imitation:
        yield imitation


def launch(*args: Any, **changes: Any) -> Launch:
    values = {"unit": UNIT, "kernel": "flow_warp_f32", "grid": (4, 3, 2), "block": (128, 1, 1), "args": args}
    return Launch(**{**values, **changes})


def array(device: Any, pointer: int = POINTER, stream: int | None = None) -> Array:
    return Array(pointer, (1,), (1,), "float32", device, None, stream)


def test_what_a_device_says_of_itself(driver: Driver):
    found = [_devices.device(index) for index in (0, 1)]
    assert [it.name for it in found] == ["GPU 0", "GPU 1"]
    assert [it.capability for it in found] == [(9, 0), (8, 6)]
    assert [it.multiprocessors for it in found] == [132, 131]
    assert [it.shared_per_block for it in found] == [227 * 1024, 99 * 1024]
    assert _devices.device(0) is found[0]
    assert _devices.missing() is None
    with pytest.raises(InputError, match="no GPU 2"):
        _devices.device(2)


def test_arguments_lie_as_a_kernel_reads_them(driver: Driver):
    device = _devices.device(0)
    args = (array(device), np.int32(-3), None, np.float32(0.5), np.int64(1 << 40), np.int32(7))
    device.launch(launch(*args), 0x77)
    *_, line = driver.journal()
    # As the C struct {void*; int; void*; float; long long; int}: each at a multiple of its size.
    expected = struct.pack("<Qi4xQf4xqi", POINTER, -3, 0, 0.5, 1 << 40, 7)
    assert line == (
        f"launch flow_warp_f32 (4, 3, 2) (128, 1, 1) 0 stream 0x77 in {device.context:#x}: {expected.hex()}"
    )


def test_an_early_launch_is_one_to_the_driver_too(driver: Driver):
    device = _devices.device(0)
    early = replace(launch(array(device), np.int32(5)), early=True)
    device.launch(early, 0x77)
    *_, first, second = driver.journal()
    assert first == "early flow_warp_f32"
    expected = struct.pack("<Qi", POINTER, 5)
    assert second == (
        f"launch flow_warp_f32 (4, 3, 2) (128, 1, 1) 0 stream 0x77 in {device.context:#x}: {expected.hex()}"
    )
    device.capability = (8, 9)  # where there is no such thing it is an ordinary one
    device.launch(early, 0x77)
    assert not [line for line in driver.journal() if line.startswith("early")]


@pytest.mark.parametrize("wrong", [1, 1.0, True, np.float64(1), np.uint32(1), "x"])
def test_other_arguments_are_refused(driver: Driver, wrong: Any):
    with pytest.raises(TypeError, match="takes an Array"):
        _devices.device(0).launch(launch(wrong), 0)


def test_a_kernel_is_loaded_once_a_device(driver: Driver):
    first, second = _devices.device(0), _devices.device(1)
    for _ in range(2):
        first.launch(launch(), 0)
        first.launch(launch(kernel="flow_warp_f16"), 0)
        second.launch(launch(), 0)
    journal = driver.journal()
    assert [line.split(":")[0] for line in journal if line.startswith(("load", "function"))] == [
        f"load fat flow_warp in {first.context:#x} mode 2",
        "function flow_warp_f32 of fat flow_warp",
        "function flow_warp_f16 of fat flow_warp",
        f"load fat flow_warp in {second.context:#x} mode 2",
        "function flow_warp_f32 of fat flow_warp",
    ]
    launches = [line for line in journal if line.startswith("launch")]
    assert [f"in {second.context:#x}" in line for line in launches] == [False, False, True] * 2


def test_a_launch_leaves_the_callers_context_current(driver: Driver):
    library, current = driver.library, ctypes.c_void_p()
    device = _devices.device(0)
    library.cuCtxPushCurrent_v2(ctypes.c_void_p(0xBEEF))
    device.launch(launch(), 0)
    library.cuCtxGetCurrent(ctypes.byref(current))
    assert current.value == 0xBEEF
    driver.fail("launch", 1)
    with pytest.raises(CudaError):
        device.launch(launch(), 0)
    library.cuCtxGetCurrent(ctypes.byref(current))
    assert current.value == 0xBEEF
    library.cuCtxPopCurrent_v2(ctypes.byref(current))
    lines = [line for line in driver.journal() if line.startswith(("load", "launch"))]
    assert all(f"in {device.context:#x}" in line for line in lines)


@pytest.mark.parametrize("status", [200, 209, 222])
def test_a_fat_binary_for_other_gpus_is_passed_over(driver: Driver, status: int):
    driver.fail("load", status)
    _devices.device(1).launch(launch(), 0)
    loads = [line for line in driver.journal() if line.startswith("load")]
    assert [line.split(" in ")[0] for line in loads] == ["load fat flow_warp", "load cubin flow_warp (8, 6)"]


def test_other_failures_are_shown(driver: Driver):
    device = _devices.device(0)
    driver.fail("load", 2)
    with pytest.raises(CudaError, match="loading the fat binary of flow_warp failed with CUDA_ERROR 2: as told"):
        device.launch(launch(), 0)
    driver.fail("launch", 1)
    with pytest.raises(
        CudaError, match=r"launching flow_warp_f32 with a grid of \(4, 3, 2\).*INVALID_VALUE 1"
    ) as caught:
        device.launch(launch(), 0)
    assert caught.value.status == 1


def test_large_shared_memory_is_asked_for_once(driver: Driver):
    device = _devices.device(1)
    for size in (48 * 1024, 60 * 1024, 50 * 1024, 99 * 1024):
        device.launch(launch(shared=size), 0)
    wanted = [line for line in driver.journal() if line.startswith("attribute")]
    assert wanted == [f"attribute flow_warp_f32 8 = {size}" for size in (60 * 1024, 99 * 1024)]
    with pytest.raises(InputError, match="flow_warp_f32 needs 101377 bytes of shared memory a block, GPU 1 has 101376"):
        device.launch(launch(shared=99 * 1024 + 1), 0)


def test_a_launch_waits_for_the_stream_an_array_names(driver: Driver):
    device = _devices.device(0)
    device.launch(launch(array(device, stream=0x99), array(device, stream=0x77), array(device)), 0x77)
    journal = [line for line in driver.journal() if line.startswith(("record", "wait", "destroy", "launch"))]
    assert journal[:3] == ["record 0xe002 on 0x99", "wait 0x77 for 0xe002", "destroy 0xe002"]
    assert len(journal) == 4 and journal[3].startswith("launch")


def test_workspaces_are_kept_and_grow(driver: Driver):
    device = _devices.device(0)
    driver.journal()
    first = device.workspace(0x1, 100)
    assert device.workspace(0x1, 1 << 20) is first  # small ones are rounded up
    grown = device.workspace(0x1, 3 << 20)
    assert grown.shape == (4 << 20,) and grown.pointer != first.pointer
    assert device.workspace(0x1, 5) is grown and device.workspace(0x2, 5) is not grown
    journal = driver.journal()
    assert [line.split()[1] for line in journal] == [str(1 << 20), str(4 << 20), str(1 << 20)]
    assert all(line.startswith("allocate") and line.endswith("mode 2") for line in journal)  # also while capturing


def test_a_zeroed_workspace_is_apart_and_all_zeros(driver: Driver):
    device = _devices.device(0)
    plain, zeroed = device.workspace(0, 1000), device.workspace(0, 1000, zeroed=True)
    assert plain.pointer != zeroed.pointer
    assert ctypes.string_at(zeroed.pointer, zeroed.shape[0]) == bytes(zeroed.shape[0])
    assert any(ctypes.string_at(plain.pointer, 1000))
    journal = driver.journal()
    # On a stream of its own, waited for, so that a graph being captured does not hold the zeroing.
    assert journal[-3:] == ["memset 0 1048576 stream 0x5001", "synchronize 0x5001", "destroy 0x5001"]
    ctypes.memset(zeroed.pointer, 1, 10)
    assert device.workspace(0, 1000, zeroed=True) is zeroed
    assert driver.journal() == []


def test_no_memory(driver: Driver):
    device = _devices.device(0)
    driver.library.test_memory(3 << 20)
    with pytest.raises(InputError, match=r"scratch .* needs 4.2 MB of GPU memory and GPU 0 has 3.1 MB of its 3.1 MB"):
        device.workspace(0, 4 << 20)
    driver.fail("allocate", 1)
    with pytest.raises(CudaError, match="allocating 1048576 bytes on GPU 0 failed"):
        device.workspace(0, 1)
    assert device.workspace(0, 1).shape == (1 << 20,)


def test_threads_share_what_is_loaded(driver: Driver):
    device = _devices.device(0)
    threads = [threading.Thread(target=lambda: [device.launch(launch(), 0) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal = driver.journal()
    assert sum(line.startswith("load") for line in journal) == 1


def test_where_memory_lies(driver: Driver):
    device, other = _devices.device(0), _devices.device(1)
    driver.library.test_place(POINTER, 1, other.context)
    assert _devices.pointer_device(POINTER, "flow") is other
    driver.library.test_place(POINTER, 0, None)  # of a stream-ordered pool
    assert _devices.pointer_device(POINTER, "flow") is device
    driver.library.test_place(POINTER, 0, 0xDEAD)
    with pytest.raises(InputError, match=r"flow must lie in the primary CUDA context .* pycuda.autoprimaryctx"):
        _devices.pointer_device(POINTER, "flow")
    with pytest.raises(InputError, match="flow must lie in GPU memory"):
        _devices.pointer_device(POINTER + 16, "flow")


def test_no_driver(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "LIBRARY", "libnothing-of-that-name.so")
    reason = _devices.missing()
    assert reason is not None and "no NVIDIA driver" in reason
    with pytest.raises(InputError, match="no NVIDIA driver"):
        CudaDevice(0)


def test_a_driver_without_a_gpu(driver: Driver):
    driver.library.test_gpus(0)
    assert _devices.missing() == "there is no NVIDIA GPU on this machine"
    cuda._load.cache_clear()
    driver.fail("cuInit", 100)
    reason = _devices.missing()
    assert reason is not None and reason.startswith("the NVIDIA driver finds no usable GPU (CUDA_ERROR 100")


@pytest.mark.parametrize(
    ("shape", "strides", "layout"),
    [
        ((2, 3, 4, 5), (60, 20, 5, 1), "nchw"),
        ((2, 3, 4, 5), (60, 1, 15, 3), "nhwc"),
        ((2, 3, 4, 5), (60, 20, 1, 4), None),
        ((2, 3, 4, 5), (120, 20, 5, 1), None),  # every second of a batch
        ((1, 3, 4, 5), (7, 20, 5, 1), "nchw"),  # the stride of an axis of one is nobody's business
        ((2, 1, 4, 5), (20, 1, 5, 1), "nchw"),
        ((2, 3, 1, 1), (3, 1, 3, 3), "nchw"),
        ((2, 3, 4, 1), (12, 1, 3, 3), "nhwc"),
        ((3, 4, 5), (20, 5, 1), None),
    ],
)
def test_layouts(shape: tuple[int, ...], strides: tuple[int, ...], layout: str | None):
    assert Array(POINTER, shape, strides, "float32", None, None).layout == layout  # type: ignore[arg-type]
