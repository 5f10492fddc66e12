"""Arrays of every library as the kernels see them; without a GPU, objects in imitation on a device that is none."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt.errors import InputError, MissingPackage
from dagan_rt.kernels import _arrays, _devices
from dagan_rt.kernels._arrays import Array, current_stream, expect, new, short, stream_for, together, view, zeros

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "uint8": torch.uint8}


class Somewhere(_devices.CudaDevice):
    """A device that only has a name."""

    def __init__(self, index: int) -> None:
        self.index, self.name = index, f"GPU {index}"
        self.cleared: list[tuple[int, int, int]] = []

    def clear(self, pointer: int, nbytes: int, stream: int) -> None:
        self.cleared.append((pointer, nbytes, stream))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Somewhere]:
    """Two devices; memory from address 1 << 40 on is the second's."""
    found = [Somewhere(0), Somewhere(1)]
    monkeypatch.setattr(_devices, "device", lambda index: found[index])
    monkeypatch.setattr(_devices, "pointer_device", lambda pointer, name: found[pointer >> 40])
    return found


@pytest.fixture
def here() -> Iterator[Somewhere]:
    """CPU tensors lie on this device."""
    device = Somewhere(0)
    _arrays.emulate(device)
    yield device
    _arrays.emulate(None)


class Foreign:
    """An array with nothing but `__cuda_array_interface__`."""

    def __init__(self, shape: tuple[int, ...], typestr: str = "<f4", pointer: int = 0x5000, **more: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": typestr, "data": (pointer, False), "version": 3, **more,
        }  # fmt: skip


class FakeCupy(ModuleType):
    """What is used of CuPy, with host memory; `_stream` is the current stream's handle."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.made: list[Any] = []
        self.streams = [0x77]

        class ndarray:
            def __init__(own, shape: Any, dtype: Any, memory: Any, strides: Any) -> None:
                own.shape, own.dtype, own.strides, own.data = shape, np.dtype(dtype), strides, memory
                own.itemsize, own.device = own.dtype.itemsize, SimpleNamespace(id=memory.device)

        class Within:
            def __init__(own, enter: Any, leave: Any) -> None:
                own.enter, own.leave = enter, leave

            def __enter__(own) -> None:
                own.enter()

            def __exit__(own, *error: object) -> None:
                own.leave()

        self.devices = [0]
        self.ndarray = ndarray
        self.cuda = SimpleNamespace(
            Device=lambda index: Within(lambda: self.devices.append(index), self.devices.pop),
            ExternalStream=lambda handle: Within(lambda: self.streams.append(handle), self.streams.pop),
            alloc=self._alloc,
            get_current_stream=lambda device: SimpleNamespace(ptr=self.streams[-1] + device),
        )

    def _alloc(self, nbytes: int) -> Any:
        self.made.append((nbytes, self.devices[-1], self.streams[-1]))
        return SimpleNamespace(ptr=0x9000, device=self.devices[-1])

    def array(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, device: int = 0) -> Any:
        return self.ndarray(shape, dtype, SimpleNamespace(ptr=0x4000, device=device), strides)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


# ---- views ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_is_seen_as_it_is(here: Somewhere, dtype: str):
    tensor = torch.zeros(2, 3, 4, 5).to(DTYPES[dtype])[:, :, 1:, ::2]
    seen = view(tensor, "image")
    assert (seen.pointer, seen.shape, seen.strides) == (tensor.data_ptr(), (2, 3, 3, 3), (60, 20, 5, 2))
    assert (seen.dtype, seen.device, seen.owner, seen.stream, seen.layout) == (dtype, here, tensor, None, None)


def test_the_layouts_of_tensors(here: Somewhere):
    tensor = torch.zeros(2, 3, 4, 5)
    assert view(tensor, "x").layout == "nchw"
    assert view(tensor.to(memory_format=torch.channels_last), "x").layout == "nhwc"


def test_cpu_tensors_are_refused_and_told_of_the_reference():
    with pytest.raises(InputError, match=r"^flow must lie on a GPU, got torch.Tensor on the CPU: .*reference=True$"):
        view(torch.zeros(1), "flow")
    with pytest.raises(InputError, match=r"^flow must lie on a GPU, got numpy.ndarray on the CPU: .*reference=True$"):
        view(np.zeros(1), "flow")


@pytest.mark.parametrize("wrong", [None, 3.0, "x", [[1.0]], object()])
def test_what_is_no_array_is_refused(wrong: Any):
    with pytest.raises(InputError, match="^feature must be a GPU array of PyTorch, CuPy or PyCUDA.*, got "):
        view(wrong, "feature")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.int8, torch.bool])
def test_other_dtypes_are_refused(here: Somewhere, dtype: torch.dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=f"^x must be float32, float16, bfloat16 or uint8, got {name}$"):
        view(torch.zeros(2, dtype=dtype), "x")


def test_empty_arrays_are_refused(here: Somewhere, gpus: list[Somewhere]):
    for empty in (torch.zeros(2, 0, 3), Foreign((2, 0, 3))):
        with pytest.raises(InputError, match=r"^x must not be empty, got the shape \(2, 0, 3\)$"):
            view(empty, "x")


def test_the_interface_of_anyone(gpus: list[Somewhere]):
    array = Foreign((2, 3, 4), "<f2", pointer=1 << 40 | 0x5000, stream=0x99)
    seen = view(array, "x")
    assert (seen.pointer, seen.shape, seen.strides) == (1 << 40 | 0x5000, (2, 3, 4), (12, 4, 1))
    assert (seen.dtype, seen.device, seen.owner, seen.stream) == ("float16", gpus[1], array, 0x99)
    assert view(Foreign((2, 3), strides=(4, 8)), "x").strides == (1, 2)
    assert view(Foreign((2, 3), strides=None), "x").strides == (3, 1)
    assert view(Foreign((2, 3), "|u1"), "x").dtype == "uint8"
    for typestr in ("<f8", ">f4", "<V2", "|b1"):
        with pytest.raises(InputError, match="x must be float32"):
            view(Foreign((2, 3), typestr), "x")


def test_cupy_arrays(gpus: list[Somewhere], cupy: FakeCupy):
    array = cupy.array((2, 3, 4), (24, 8, 2), "float16", device=1)
    seen = view(array, "x")
    assert (seen.pointer, seen.shape, seen.strides) == (0x4000, (2, 3, 4), (12, 4, 1))
    assert (seen.dtype, seen.device, seen.owner, seen.stream) == ("float16", gpus[1], array, None)
    with pytest.raises(InputError, match="x must be float32.* got float64"):
        view(cupy.array((2,), (8,), "float64"), "x")


class Capsule:
    """An array that knows only DLPack."""

    def __init__(self, tensor: torch.Tensor, kind: int = 2) -> None:
        self.tensor, self.kind = tensor, kind

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0


def test_dlpack(here: Somewhere, monkeypatch: pytest.MonkeyPatch):
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    capsule = Capsule(tensor)
    # PyTorch takes memory that calls itself a GPU's for what it is here.
    monkeypatch.setattr(torch, "from_dlpack", lambda array: torch.utils.dlpack.from_dlpack(array.__dlpack__()))
    seen = view(capsule, "x")
    assert (seen.pointer, seen.shape, seen.dtype) == (tensor.data_ptr(), (2, 3), "bfloat16")
    with pytest.raises(InputError, match="x must lie on a GPU, got .*Capsule on the CPU"):
        view(Capsule(tensor, kind=1), "x")


def test_dlpack_needs_somebody_who_takes_it(monkeypatch: pytest.MonkeyPatch):
    for library in ("torch", "cupy"):
        monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install 'dagan-rt\[cuda\]'"):
        _arrays._from_dlpack(object())


# ---- what is expected ----


def test_expectations(here: Somewhere):
    grid = view(torch.zeros(1, 2, 64, 64), "grid")
    expect("grid", grid, (1, 2, 64, 64), ("float32", "float16"))
    expect("grid", grid, [1, None, 64, None], "float32")
    expect("grid", grid)
    message = r"^grid must be \[B, H, W, 2\] = \(1, 64, 64, 2\), got \(1, 2, 64, 64\)$"
    with pytest.raises(InputError, match=message):
        expect("grid", grid, (1, 64, 64, 2), axes="B H W 2")
    for shape in ((1, 2, 64), (1, 2, 64, 64, 1), (None, 3, None, None)):
        with pytest.raises(InputError, match=r"^grid must be \("):
            expect("grid", grid, shape)
    with pytest.raises(InputError, match=r"^grid must be \(\*,\), got"):
        expect("grid", grid, (None,))
    with pytest.raises(InputError, match="^grid must be float16 or uint8, got float32$"):
        expect("grid", grid, dtypes=("float16", "uint8"))


def test_one_device_for_all(gpus: list[Somewhere]):
    near, far = view(Foreign((1,)), "feature"), view(Foreign((1,), pointer=1 << 40), "flow")
    assert together(feature=near, flow=near, occlusion=None) is gpus[0]
    with pytest.raises(InputError, match=r"^flow must lie on the same GPU as feature \(CudaDevice\(0\)\), got one on"):
        together(feature=near, occlusion=None, flow=far)


def test_short_names():
    assert [short(dtype) for dtype in DTYPES] == ["f32", "f16", "bf16", "u8"]


# ---- streams ----


def test_the_callers_stream(here: Somewhere, gpus: list[Somewhere], cupy: FakeCupy):
    assert current_stream(torch.zeros(1)) == 0
    assert current_stream(cupy.array((1,), (4,), "float32", device=1)) == 0x78
    assert current_stream(Foreign((1,))) == 0
    assert current_stream(Foreign((1,), stream=0x99)) == 0x99
    assert stream_for(Foreign((1,), stream=0x99), 0x11) == 0x11
    assert stream_for(Foreign((1,)), SimpleNamespace(ptr=0x12)) == 0x12
    assert stream_for(Foreign((1,)), 0) == 0
    with pytest.raises(InputError, match="stream must be a CUDA stream"):
        stream_for(Foreign((1,)), "main")


# ---- new arrays ----


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (2, 3, 7), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_new_tensors(here: Somewhere, shape: tuple[int, ...], dtype: str):
    like = torch.zeros(1, dtype=DTYPES[dtype])
    made = new(like, shape)
    assert made.shape == shape and made.dtype == DTYPES[dtype] and made.is_contiguous()
    assert new(like, list(shape), "float16").dtype == torch.float16
    last = new(like, shape, layout="nhwc")
    assert last.shape == shape and last.movedim(1, -1).is_contiguous()
    if len(shape) == 4:
        assert last.is_contiguous(memory_format=torch.channels_last)
    cleared = zeros(like, shape, dtype)
    assert cleared.shape == shape and not cleared.any()


def test_new_cupy_arrays(gpus: list[Somewhere], cupy: FakeCupy):
    like = cupy.array((1,), (4,), "float32", device=1)
    made = new(like, (2, 3, 4, 5), "float16", layout="nhwc")
    assert (made.shape, made.strides, made.dtype) == ((2, 3, 4, 5), (120, 2, 30, 6), np.float16)
    new(like, (2, 3), stream=0x55)
    assert cupy.made == [(240, 1, 0x77), (24, 1, 0x55)]
    zeros(like, (2, 3), "float32", stream=0x66)
    assert gpus[1].cleared == [(0x9000, 24, 0x66)]


def test_pycuda_arrays(gpus: list[Somewhere], monkeypatch: pytest.MonkeyPatch):
    made = []

    class GPUArray(Foreign):
        def __init__(self, shape: Any, dtype: Any, strides: Any = None) -> None:
            super().__init__(shape, np.dtype(dtype).str, strides=strides)
            made.append((shape, strides, contexts[-1]))

    contexts = [-1]
    monkeypatch.setattr(
        Somewhere, "current", lambda self: _within(lambda: contexts.append(self.index), contexts.pop), raising=False
    )
    module = ModuleType("pycuda.gpuarray")
    module.GPUArray = GPUArray  # type: ignore[attr-defined]
    package = ModuleType("pycuda")
    package.gpuarray = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.gpuarray", module)
    like = GPUArray((1, 3, 4, 5), np.float32)
    assert isinstance(new(like, (1, 3, 4, 5), layout="nhwc"), GPUArray)
    assert made[-1] == ((1, 3, 4, 5), (240, 4, 60, 12), 0)
    assert isinstance(zeros(like, (2, 3), "float32"), GPUArray)
    assert gpus[0].cleared == [(0x5000, 24, 0)]


class _within:
    def __init__(self, enter: Any, leave: Any) -> None:
        self.enter, self.leave = enter, leave

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *error: object) -> None:
        self.leave()


def test_importing_is_silent_and_light():
    program = """
import sys
heavy = ("torch", "cupy", "pycuda", "onnx", "onnxruntime", "tensorrt")
sys.modules.update(dict.fromkeys(heavy))  # importing one of them fails
import dagan_rt.kernels
from dagan_rt.kernels import cross_attention, dense_flow, flow_warp, image_to_planes, planes_to_image, sparse_motion
from dagan_rt.kernels import _build
assert callable(cross_attention) and callable(flow_warp) and _build.units()
import numpy
try:
    flow_warp(numpy.zeros((1, 2, 3, 4), "float32"), numpy.zeros((1, 3, 4, 2), "float32"))
except dagan_rt.InputError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("feature must lie on a GPU, got numpy.ndarray on the CPU") and run.stderr == ""


def test_a_name_is_the_function_and_not_the_module():
    import dagan_rt.kernels

    for name in dagan_rt.kernels.__all__:
        assert not isinstance(getattr(dagan_rt.kernels, name), ModuleType), name


# ---- on a GPU ----


@pytest.mark.gpu
def test_tensors_on_a_gpu():
    tensor = torch.zeros(2, 3, 4, 5, device="cuda")
    seen = view(tensor, "x")
    assert seen.device is _devices.device(tensor.get_device()) is _devices.pointer_device(seen.pointer, "x")
    assert current_stream(tensor) == torch.cuda.current_stream().cuda_stream
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert current_stream(tensor) == side.cuda_stream != 0
    made = zeros(tensor, (2, 3), "bfloat16", stream=side)
    torch.cuda.synchronize()
    assert made.is_cuda and not made.any()


@pytest.mark.gpu
def test_cupy_arrays_on_a_gpu():
    real = pytest.importorskip("cupy")
    array = real.ones((2, 3, 4, 5), "float16")
    seen = view(array, "x")
    assert (seen.strides, seen.dtype, seen.device) == ((60, 20, 5, 1), "float16", _devices.device(0))
    for dtype in ("float32", "float16", "uint8", "bfloat16"):
        made = view(new(array, (2, 3, 4, 5), dtype, "nhwc"), "x")
        assert (made.layout, made.dtype) == ("nhwc", dtype)
    assert not zeros(array, (5, 5), "float32").get().any()
    seen = view(torch.ones(2, 3, dtype=torch.bfloat16, device="cuda"), "x")
    capsule = Capsule(seen.owner)
    assert view(capsule, "x").pointer == seen.pointer


@pytest.mark.gpu
def test_pycuda_arrays_on_a_gpu():
    pytest.importorskip("pycuda")
    import pycuda.autoprimaryctx  # noqa: F401
    from pycuda import gpuarray

    array = gpuarray.to_gpu(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    seen = view(array, "x")
    assert (seen.pointer, seen.strides, seen.dtype) == (int(array.gpudata), (12, 4, 1), "float32")
    assert not zeros(array, (2, 3), "float16").get().any()
    assert view(new(array, (2, 3, 4, 5), layout="nhwc"), "x").layout == "nhwc"


def test_a_view_is_an_array(here: Somewhere):
    assert isinstance(view(torch.zeros(1), "x"), Array)
