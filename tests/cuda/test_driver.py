"""Finding the driver, and what its errors become."""

from __future__ import annotations

import ctypes

import pytest
from imitated_driver import Driver

from dagan_rt.cuda import driver as cuda
from dagan_rt.cuda.driver import CudaError
from dagan_rt.errors import DeviceLost, InputError
from dagan_rt.kernels import _devices


def test_the_compute_capability_is_that_of_the_current_gpu_else_of_the_first(driver: Driver):
    assert cuda.compute_capability() == "9.0"
    with _devices.device(1).current():
        assert (cuda.current_device(), cuda.compute_capability()) == (1, "8.6")
    assert cuda.compute_capability() == "9.0"


def test_without_a_gpu_there_is_no_compute_capability(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    driver.fail("cuInit", 100)
    assert cuda.compute_capability() is None
    driver.library.test_break(999)
    assert cuda.compute_capability() is None
    driver.library.test_break(0)
    monkeypatch.setattr(cuda, "LIBRARY", "libnothing-of-that-name.so")
    assert cuda.compute_capability() is None
    assert cuda.missing() == "there is no NVIDIA driver on this machine (libcuda is not found)"


def test_a_driver_that_is_too_old_says_what_is_needed(driver: Driver):
    driver.library.test_version(11040)
    with pytest.raises(InputError) as caught:
        _devices.device(0)
    assert (
        str(caught.value)
        == cuda.missing()
        == (
            "the NVIDIA driver is too old: dagan-rt needs a driver for CUDA 12.0 or newer, this one is for 11.4: "
            "update the NVIDIA driver"
        )
    )


@pytest.mark.parametrize("status", [803, 804])
def test_a_driver_that_does_not_fit_its_libraries(driver: Driver, status: int):
    driver.fail("cuInit", status)
    reason = cuda.missing()
    assert reason is not None
    assert reason.startswith(f"the NVIDIA driver does not fit its libraries (CUDA_ERROR {status}: as told by the test)")
    assert reason.endswith("needs a driver for CUDA 12.0 or newer, this one is for 13.0: update the NVIDIA driver")


def test_a_kernel_for_a_newer_driver(driver: Driver):
    with pytest.raises(InputError, match="loading a kernel failed with .*: dagan-rt needs a driver for CUDA 12.0"):
        cuda.check(222, "loading a kernel")


@pytest.mark.parametrize(
    ("status", "kind"), [(1, CudaError), (2, CudaError), (400, CudaError), (46, DeviceLost), (700, DeviceLost),
                         (719, DeviceLost), (999, DeviceLost)]
)  # fmt: skip
def test_errors_by_what_can_be_done(driver: Driver, status: int, kind: type[Exception]):
    cuda.check(0, "nothing")
    with pytest.raises(kind, match=f"copying failed with CUDA_ERROR.* {status}: as told by the test"):
        cuda.check(status, "copying")


def test_every_function_is_in_the_real_library():
    """Where there is one: a name that it lacks would be told at the first call only."""
    try:
        library = ctypes.CDLL(cuda.LIBRARY)
    except OSError:
        pytest.skip("there is no NVIDIA driver here")
    assert [name for name in cuda._PROTOTYPES if not hasattr(library, name)] == []
