"""Kernels compiled for GPUs without a GPU, what they take of one, and the cache of what was compiled.

All kernels for one architecture take a minute or two to compile. Slow tests take those architectures whose code
differs; the others are the same source to the preprocessor, and only ptxas could give them other registers and spills:
`make test-kernels` compiles them, too. What is launched is held against the kernels' parameters for all of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt import kernels
from dagan_rt._assets import asset
from dagan_rt.errors import InputError, MissingPackage
from dagan_rt.kernels import _arrays, _build
from dagan_rt.kernels.__main__ import main
from dagan_rt.kernels._arrays import view
from dagan_rt.kernels._build import Compiled, Resources
from dagan_rt.kernels._devices import Array, Launch, Unit

IMAGE = Unit("image", "image")
#: Compiled and checked at every run (minutes each); the others where slow tests run.
EVERY_RUN: tuple[int, ...] = ()
#: Architectures that see the same code as another one.
SAME_CODE = {86: 80, 89: 80, 100: 120}
#: Whether these are compiled as well.
COMPILE_ALL = os.environ.get("DAGAN_RT_TEST_ARCHITECTURES") == "all"
#: Kernels that may spill, as architecture, unit and name, and why. They use all 255 registers, so that every change of
#: the source or the compiler moves a few bytes.
MAY_SPILL = {
    r"sm_75 \S*forward_mma-HEAD32-CHANNELS256-KEYS64 .*": "not launched there: shared memory asks for 32 keys",
    r"sm_75 conv2d.forward_(mma-TILE_M128-TILE_N24|patch-TILE_N64-LINES2)\S* conv2d_\w+": "8 and 180 bytes",
    r"sm_120 \S*forward_mma-HEAD32-CHANNELS256-KEYS64 .*": "not launched there: shared memory asks for 32 keys",
    r"sm_120 \S*forward_mma-HEAD32-CHANNELS256-KEYS32 \w+_nchw": "12 bytes; channels-last has none",
    r"sm_1[02]0 \S*backward_mma-\S*WIDE256 backward_keys_\w+_nchw": "16 to 64 bytes; channels-last has none",
}


# ---- every kernel on every architecture ----


@pytest.fixture(scope="session")
def resources(request: pytest.FixtureRequest) -> Any:
    """`resources(tasks) -> {(unit, architecture): [Resources]}`, kept from one run of the tests to the next."""
    pytest.importorskip("cupy")
    folder = request.config.cache.mkdir("kernels") if getattr(request.config, "cache", None) else None

    def one(task: tuple[Unit, str]) -> list[Resources]:
        unit, architecture = task
        digest = _build._digest(unit, architecture, *_build._options(unit), "1")
        path = folder / f"{_build.title(unit)}-{digest[:20]}.json" if folder else None
        if path and path.exists():
            return [Resources(**values) for values in json.loads(path.read_text())]
        found = _build.resources(_build.compile(unit, architecture))
        if path:
            _build._write(path, json.dumps([asdict(it) for it in found]).encode())
        return found

    def of(tasks: Sequence[tuple[Unit, str]]) -> dict[tuple[Unit, str], list[Resources]]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(tasks, pool.map(one, tasks), strict=True))

    return of


def compiled_as(number: int) -> int:
    """The architecture whose kernels are compiled in its stead."""
    return number if COMPILE_ALL else SAME_CODE.get(number, number)


def parameters(numbers: Iterable[int]) -> list[Any]:
    """Architectures as parameters of a test."""
    return [pytest.param(number, marks=() if number in EVERY_RUN else pytest.mark.slow) for number in numbers]


def test_architectures_of_the_same_code_see_the_same_code():
    texts = [path.read_text(encoding="utf-8") for path in asset("kernels").glob("*/*.cu*")]
    conditions = {it for text in texts for it in re.findall(r"__CUDA_ARCH__ (>=|==) (\d+)", text)}
    assert len(conditions) >= 3
    assert all(
        len(re.findall("__CUDA_ARCH", text)) == len(re.findall(r"__CUDA_ARCH__ [>=]= \d", text)) for text in texts
    )
    for number, same in SAME_CODE.items():
        for comparison, value in conditions:
            seen = [it * 10 >= int(value) if comparison == ">=" else it * 10 == int(value) for it in (number, same)]
            assert seen[0] == seen[1], f"sm_{number} and sm_{same} differ in __CUDA_ARCH__ {comparison} {value}"


@pytest.mark.parametrize("number", parameters(sorted({compiled_as(number) for number in _build.ARCHITECTURES})))
def test_every_kernel_fits_every_architecture(number: int, resources: Any):
    tasks = [(unit, target) for unit in _build.units() for target in _build.architectures(unit, [number])]
    spilling = []
    for (unit, target), found in resources(tasks).items():
        source = _build.sources(unit)[f"{unit.source}.cu"]
        assert found, f"{_build.title(unit)} holds no kernel for {target}"
        for kernel in found:
            where = f"{kernel.kernel} of {_build.title(unit)} on {target}: {kernel}"
            named = f"{target} {_build.title(unit)} {kernel.kernel}"
            if kernel.spills and not any(re.fullmatch(it, named) for it in MAY_SPILL):
                spilling.append(where)
            assert kernel.registers * kernel.threads <= _build.REGISTERS, where
            assert kernel.threads <= _build.THREADS, where
            assert kernel.shared <= _build.STATIC_SHARED, where
            assert "?" not in kernel.parameters, f"pointers, int, long long and float only: {where}"
        assert 'extern "C"' in source
    assert not spilling, "\n".join(spilling)


@dataclass
class Recorder:
    """A GPU of some architecture that writes launches down, and does none."""

    number: int
    name: str = "a recorder"
    multiprocessors: int = 132
    launches: list[Launch] = field(default_factory=list)
    memory: list[np.ndarray] = field(default_factory=list)

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(self.number, 10)

    @property
    def shared_per_block(self) -> int:
        return _build.SHARED_PER_BLOCK[self.number]

    def launch(self, launch: Launch, stream: int) -> None:
        self.launches.append(launch)

    def workspace(self, stream: int, nbytes: int, zeroed: bool = False) -> Array:
        self.memory.append(np.zeros(nbytes, np.uint8))
        return Array(self.memory[-1].ctypes.data, (nbytes,), (1,), "uint8", self, None)


def calls() -> Iterator[None]:
    """Each operation on shapes, dtypes and layouts that choose among its kernels; every step is one call."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for layout in (torch.contiguous_format, torch.channels_last):

            def make(*shape: int, dtype: torch.dtype = dtype, layout: Any = layout) -> torch.Tensor:
                return torch.empty(shape, dtype=dtype, memory_format=layout)

            for B, H, W in ((1, 5, 7), (1, 256, 256), (32, 64, 64)):
                kernels.image_to_planes(
                    torch.zeros(B, H, W, 3, dtype=torch.uint8), dtype=name,
                    layout="nhwc" if layout == torch.channels_last else "nchw",
                )  # fmt: skip
                yield kernels.planes_to_image(make(B, 3, H, W), sigmoid=B > 1)
            for B, K, H, W in ((1, 1, 5, 7), (1, 15, 64, 64), (32, 63, 32, 32)):
                points = (torch.zeros(B, K, 2), torch.zeros(B, K, 2, 2)) * 2
                yield kernels.sparse_motion(make(B, 3, H, W), *points)
                yield kernels.dense_flow(make(B, K + 1, H, W), make(B, 1, H, W), *points)
                yield kernels.soft_keypoints(make(B, 5 * K, H, W))
                yield kernels.transfer(*points, *points[:2], torch.zeros(B, 1))
            for B, C, H, W in ((1, 3, 113, 203), (1, 256, 64, 64), (32, 256, 64, 64), (2, 5, 1, 1), (1, 64, 512, 512)):
                for size in ((H, W), (64, 64)):
                    flow, occlusion = torch.zeros(B, *size, 2), torch.zeros(B, 1, *size)
                    yield kernels.flow_warp(make(B, C, H, W), flow, occlusion if B == 1 else None)
            for B, D, C, H, W in (
                (1, 32, 256, 64, 64), (32, 32, 256, 64, 64), (1, 256, 256, 64, 64), (1, 16, 40, 16, 16),
                (2, 8, 5, 3, 7), (1, 100, 300, 10, 10), (1, 32, 256, 1, 1),
            ):  # fmt: skip
                query, value = make(B, D, H, W), make(B, C, H, W)
                yield kernels.cross_attention(query, query, value, value, torch.zeros(1))
            for B, C, H, W in ((1, 3, 9, 11), (2, 256, 32, 32)):
                leaves = [make(B, C, H, W), torch.zeros(B, H, W, 2), torch.zeros(B, 1, H, W)]
                yield _backwards(kernels.flow_warp, leaves)
            for B, D, C, H, W in ((1, 32, 256, 16, 16), (1, 16, 40, 8, 8), (2, 8, 5, 3, 7), (1, 100, 300, 10, 10)):
                leaves = [make(B, it, H, W) for it in (D, D, C, C)]
                yield _backwards(kernels.cross_attention, [*leaves, torch.zeros(1)])
            if dtype == torch.float16 and layout == torch.channels_last:
                yield from _convolutions(make)

        for B, C, H, W in ((1, 8, 5, 7), (1, 64, 128, 128), (32, 256, 64, 64), (2, 4096, 1, 1)):
            x = torch.empty((B, C, H, W), dtype=dtype).to(memory_format=torch.channels_last)
            yield kernels.image_to_features(torch.zeros(B, H, W, 3, dtype=torch.uint8), dtype=name)
            yield kernels.max_pool(x)
            yield kernels.normalize_relu(x, torch.zeros(C), torch.zeros(C))
            for depth in (torch.zeros(B, 1, H, W), torch.zeros(B, 1, H, W, dtype=dtype), None):
                yield kernels.antialias(x, depth, torch.zeros(13, 13))
            yield kernels.gather([x, torch.zeros(B, 15, 2)], torch.zeros(3, dtype=torch.int32))


def _convolutions(make: Any) -> Iterator[Any]:
    """Layers of each kind, small batches and large, in every way that is worth a try."""
    layers: tuple[tuple[int, int, int, int, dict[str, Any]], ...] = (
        (8, 256, 64, 7, {"stride": 2}), (64, 64, 64, 3, {}), (512, 8, 512, 3, {}), (256, 64, 256, 3, {}),
        (40, 64, 75, 7, {"padding": 0}), (128, 64, 17, 7, {}), (64, 256, 3, 7, {}),
        (16, 256, 1, 3, {"pad_mode": "reflect"}), (96, 128, 32, 3, {"pad_mode": "reflect"}),
    )  # fmt: skip
    for Cin, size, Cout, k, options in layers:
        packed = kernels.pack(torch.zeros(Cout, Cin, k, k), None, "float16")
        for B in (1, 32):
            x = make(B, Cin, size, size)
            asked = {name: value for name, value in options.items() if name != "pad_mode"}
            for config in kernels.configs(tuple(x.shape), packed, device=view(x, "x").device, most=99, **asked):
                yield kernels.conv2d(x, packed, config=config, **options)
    for Cin, size, Cout in ((1024, 4, 256), (256, 64, 128)):
        packed = kernels.pack(torch.zeros(Cout, Cin, 3, 3), None, "float16", upsample=True)
        yield kernels.conv2d(make(1, Cin, size, size), packed)


def _backwards(operation: Any, leaves: list[torch.Tensor]) -> None:
    result = operation(*[leaf.requires_grad_() for leaf in leaves])
    result.backward(torch.empty_like(result))


@pytest.mark.parametrize("number", parameters(_build.ARCHITECTURES))
def test_what_the_operations_launch_is_what_the_kernels_take(number: int, resources: Any):
    device = Recorder(number)
    _arrays.emulate(device)
    try:
        for _ in calls():
            device.memory.clear()
    finally:
        _arrays.emulate(None)
    wanted = {(it.unit, *_build.architectures(it.unit, [number])) for it in device.launches}
    assert all(len(task) == 2 for task in wanted), "a unit was launched that is not compiled for this architecture"
    shipped = [task for task in wanted if task[0] in _build.units()]
    assert {it.op for it, _ in shipped} == set(_build.OPERATIONS)
    compiled = [(unit, *_build.architectures(unit, [compiled_as(number)])) for unit, _ in shipped]
    known = {(unit, it.kernel): it for (unit, _), found in resources(compiled).items() for it in found}
    for launch in device.launches:
        if launch.unit not in _build.units():
            continue  # of the same sources as one that is, with other sizes
        kernel = known[launch.unit, launch.kernel]
        letters = "".join(_LETTERS[type(arg)] for arg in launch.args)
        assert letters == kernel.parameters, launch
        assert 1 <= np.prod(launch.block) <= kernel.threads, launch
        assert min(launch.grid) >= 1 and launch.grid[0] < 1 << 31 and max(launch.grid[1:]) < 1 << 16, launch
        assert kernel.shared + launch.shared <= device.shared_per_block, launch


_LETTERS = {Array: "Q", type(None): "Q", np.int64: "Q", np.int32: "i", np.float32: "f"}


def test_units_name_files_and_have_names_of_their_own():
    units = _build.units()
    assert {unit.op for unit in units} == set(_build.OPERATIONS)
    assert len({_build.title(unit) for unit in units}) == len({*units}) == len(units)
    shipped = {(unit.op, f"{unit.source}.cu") for unit in units}
    assert {(path.parent.name, path.name) for path in asset("kernels").glob("*/*.cu")} == shipped


def test_the_sources_include_no_header_of_cuda():
    for path in asset("kernels").glob("*/*.cu*"):
        included = re.findall(r"#include\s+(\S+)", path.read_text(encoding="utf-8"))
        here = {f'"{it.name}"' for it in [*asset("kernels", "common").glob("*.cuh"), *path.parent.glob("*.cuh")]}
        assert set(included) <= here, path


def test_resources_are_read_from_ptx_and_log():
    ptx = """
.visible .entry warp_f32(
	.param .u64 warp_f32_param_0,
	.param .u32 warp_f32_param_1,
	.param .align 8 .b8 warp_f32_param_2[16],
	.param .f32 warp_f32_param_3
)
.maxntid 128, 2, 1
{
}
.visible .entry plain()
{
}"""
    log = """
ptxas info    : Compiling entry function 'warp_f32' for 'sm_90'
ptxas info    : Function properties for warp_f32
ptxas         .     8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem
ptxas info    : Compiling entry function 'plain' for 'sm_90'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert _build.resources(Compiled(b"", ptx, log)) == [
        Resources("plain", 8, 0, 0, 1024, ""),
        Resources("warp_f32", 40, 128, 32, 256, "Qi?f"),
    ]


# ---- NVRTC ----


def test_an_error_is_shown_as_the_compiler_says_it(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("cupy")
    monkeypatch.setattr(_build, "sources", lambda unit: {"image.cu": "int kernel() { return nothing; }"})
    with pytest.raises(
        InputError, match=r"(?s)^NVRTC cannot compile image/image.cu for sm_90:\n.*\"nothing\" is undef"
    ):
        _build.compile(IMAGE, "sm_90")


def test_threads_may_be_first_together():
    """In a new process, where NVRTC has compiled nothing yet."""
    pytest.importorskip("cupy")
    program = """
from concurrent.futures import ThreadPoolExecutor
from dagan_rt.kernels import _build
from dagan_rt.kernels._devices import Unit
_build.sources = lambda unit: {"image.cu": 'extern "C" __global__ void k(int* x) { x[0] = 1; }'}
with ThreadPoolExecutor(4) as pool:
    print({len(it.cubin) > 0 for it in pool.map(lambda n: _build.compile(Unit("image", "image"), "sm_90"), range(4))})
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("{True}\n", "")


def test_defines_reach_the_source(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("cupy")
    text = {
        "image.cu": '#include "sizes.cuh"\nextern "C" __global__ void k(int* x) { x[0] = TIMES_1000(ROWS); }',
        "sizes.cuh": "#define TIMES_1000(n) (1000 * n)",
    }
    monkeypatch.setattr(_build, "sources", lambda unit: text)
    assert "47000" in _build.compile(replace(IMAGE, defines=(("ROWS", 47),)), "sm_90").ptx


def test_what_is_compiled_for_a_gpu():
    known = (75, 80, 86, 87, 89, 90, 100, 120)
    feature = replace(IMAGE, feature="a")
    assert _build._target(IMAGE, (8, 7), known) == "sm_87"
    assert _build._target(feature, (9, 0), known) == "sm_90a"
    assert _build._target(IMAGE, (11, 0), known) == "compute_100"
    assert _build._target(IMAGE, (13, 1), known) == "compute_120"
    with pytest.raises(InputError, match=r"need compute capability 7.5, this GPU has 7.0"):
        _build._target(IMAGE, (7, 0), known)
    with pytest.raises(InputError, match=r"needs compute capability 9.0, this GPU has 10.0"):
        _build._target(feature, (10, 0), known)


def test_ptx_for_a_gpu_that_is_too_new(cache: Cache):
    image = _build.compiled(IMAGE, (19, 0))
    assert image == b"ptx of image for compute_90\0"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingPackage, match=r"compiling the CUDA kernels .* pip install 'dagan-rt\[cuda\]'"):
        _build.compiled(IMAGE, (9, 0))
    broken = SimpleNamespace(getVersion=_raiser(RuntimeError("CuPy failed to load libnvrtc.so.13: no such file")))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(nvrtc=broken))  # type: ignore[arg-type]
    with pytest.raises(MissingPackage, match=r"NVRTC, which CuPy does not find \(CuPy failed to load libnvrtc"):
        _build.compiled(IMAGE, (9, 0))


def test_a_long_compilation_says_so(capfd: pytest.CaptureFixture[str]):
    with _build._hint("compiling", seconds=0.01):
        threading.Event().wait(0.5)
    assert capfd.readouterr().err == "compiling\n"
    with _build._hint("compiling", seconds=60):
        pass
    assert capfd.readouterr().err == ""


# ---- the cache ----


class Cache:
    """The user's cache folder, and a compiler in imitation that counts what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, 0

    def compile(self, unit: Unit, architecture: str) -> Compiled:
        self.asked += 1
        cubin = b"cubin" * 1000 if architecture.startswith("sm_") else b""
        return Compiled(cubin, f"ptx of {unit.source} for {architecture}\0", "")

    def entries(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Cache(tmp_path / "cache" / "dagan-rt" / "kernels")
    nvrtc = SimpleNamespace(getVersion=lambda: (13, 0), getSupportedArchs=lambda: (75, 90))
    monkeypatch.setattr(_build, "_nvrtc", lambda: nvrtc)
    monkeypatch.setattr(_build, "compile", made.compile)
    _build._warn_once.cache_clear()
    return made


def test_what_was_compiled_is_kept(cache: Cache):
    assert [_build.compiled(IMAGE, (9, 0)) for _ in range(3)] == [b"cubin" * 1000] * 3
    (entry,) = cache.entries()
    assert cache.asked == 1 and entry.name.startswith("image-sm_90-")
    assert entry.read_bytes()[:32] == hashlib.sha256(b"cubin" * 1000).digest()
    _build.compiled(IMAGE, (7, 5))
    assert cache.asked == 2 and len(cache.entries()) == 2


@pytest.mark.parametrize("what", ["source", "header", "new header", "define", "version"])
def test_a_change_of_anything_compiles_anew(cache: Cache, what: str, monkeypatch: pytest.MonkeyPatch):
    unit, text = replace(IMAGE, defines=(("ROWS", 4),)), _build.sources(IMAGE)
    _build.compiled(unit, (9, 0))
    if what == "define":
        unit = replace(unit, defines=(("ROWS", 8),))
    elif what == "version":
        nvrtc = SimpleNamespace(getVersion=lambda: (13, 1), getSupportedArchs=lambda: (75, 90))
        monkeypatch.setattr(_build, "_nvrtc", lambda: nvrtc)
    else:
        name = {"source": "image.cu", "header": "types.cuh", "new header": "x.cuh"}[what]
        changed = {**text, name: text.get(name, "") + " "}
        monkeypatch.setattr(_build, "sources", lambda unit: changed)
    for _ in range(2):
        _build.compiled(unit, (9, 0))
    assert cache.asked == 2


@pytest.mark.parametrize("damage", ["cut short", "a flipped bit", "empty", "only the digest", "of another"])
def test_a_damaged_entry_is_compiled_anew(cache: Cache, damage: str):
    good = _build.compiled(IMAGE, (9, 0))
    (entry,) = cache.entries()
    content = entry.read_bytes()
    entry.write_bytes(
        {
            "cut short": content[:-1],
            "a flipped bit": content[:100] + bytes([content[100] ^ 4]) + content[101:],
            "empty": b"",
            "only the digest": hashlib.sha256(b"").digest(),
            "of another": b"\0" * 32 + content[32:],
        }[damage]
    )
    assert _build.compiled(IMAGE, (9, 0)) == good
    assert cache.asked == 2 and entry.read_bytes() == content
    assert _build.compiled(IMAGE, (9, 0)) == good and cache.asked == 2


def _raiser(error: Exception) -> Any:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("trouble", ["read-only", "full", "a file in the way", "no home"])
def test_where_nothing_can_be_kept_it_works_with_one_warning(
    cache: Cache, trouble: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if trouble == "read-only":
        monkeypatch.setattr(tempfile, "mkstemp", _raiser(PermissionError(errno.EACCES, "Permission denied")))
    elif trouble == "full":
        monkeypatch.setattr(os, "replace", _raiser(OSError(errno.ENOSPC, "No space left on device")))
    elif trouble == "a file in the way":
        (tmp_path / "cache").write_bytes(b"")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", _raiser(RuntimeError("Could not determine home directory.")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert _build.compiled(IMAGE, (9, 0)) == b"cubin" * 1000
    assert cache.asked == 3 and cache.entries() == []  # no temporary file stays either
    assert len(caught) == 1 and "compiled kernels cannot be kept" in str(caught[0].message)


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    for value in ("", "relative/folder"):  # the specification says to ignore the latter
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert _build.cache_folder() == tmp_path / ".cache" / "dagan-rt" / "kernels"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert _build.cache_folder() == tmp_path / "local" / "dagan-rt" / "kernels"


def test_processes_at_once_share_one_entry(tmp_path: Path):
    pytest.importorskip("cupy")
    program = """
import hashlib
from dagan_rt.kernels import _build
from dagan_rt.kernels._devices import Unit
print(hashlib.sha256(_build.compiled(Unit("image", "image"), (9, 0))).hexdigest())
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    digests = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    (entry,) = (tmp_path / "dagan-rt" / "kernels").iterdir()
    assert digests == {hashlib.sha256(entry.read_bytes()[32:]).hexdigest()}
    assert entry.read_bytes()[32:36] == b"\x7fELF"


# ---- fat binaries ----


def fat_contents(path: Path) -> list[tuple[str, int]]:
    """The parts of a fat binary: ("ptx" | "cubin", 90), by the headers that nvcc writes before each."""
    content, found = path.read_bytes(), []
    assert struct.unpack_from("<I", content) == (0xBA55ED50,)
    at = 16
    while at < len(content):
        kind, _, header, size = struct.unpack_from("<HHIQ", content, at)
        found.append(({1: "ptx", 2: "cubin"}[kind], struct.unpack_from("<I", content, at + 28)[0]))
        at += header + size
    return found


def has_nvcc() -> bool:
    try:
        return bool(_build.nvcc())
    except InputError:
        return False


@pytest.mark.skipif(not has_nvcc(), reason="nvcc is not installed")
def test_fat_binaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(_build, "units", lambda: (IMAGE, Unit("cross_attention", "forward_wgmma", feature="a")))
    text = {
        "image.cu": '#include "a.cuh"\nextern "C" __global__ void k(int* x) { x[0] = ONE; }',
        "a.cuh": "#define ONE 1",
    }
    monkeypatch.setattr(_build, "sources", lambda unit: {f"{unit.source}.cu": text["image.cu"], "a.cuh": text["a.cuh"]})
    assert main(["build", "--out", str(tmp_path), "--arch", "75", "120"]) == 0
    (path,) = tmp_path.iterdir()  # the other unit is for neither
    assert sorted(fat_contents(path)) == [("cubin", 75), ("cubin", 120), ("ptx", 120)]
    assert path == _build.fat_binary_path(IMAGE, tmp_path) and path.name in capsys.readouterr().out
    # From other sources it is another file, and the old one goes.
    text["a.cuh"] = "#define ONE 2"
    assert _build.fat_binary_path(IMAGE, tmp_path) != path
    assert main(["build", "--out", str(tmp_path), "--arch", "90"]) == 0
    names = sorted(it.name.rpartition("-")[0] for it in tmp_path.iterdir())
    assert names == ["cross_attention.forward_wgmma", "image"] and not path.exists()
    assert fat_contents(_build.fat_binary_path(_build.units()[1], tmp_path)) == [("cubin", 90)]
    text["a.cuh"] = "#define ONE nothing"
    assert main(["build", "--out", str(tmp_path), "--arch", "90"]) == 2
    assert '"nothing" is undefined' in capsys.readouterr().err


def test_a_fat_binary_of_other_sources_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_build, "asset", lambda *parts: tmp_path if parts == ("kernels",) else asset(*parts))
    assert _build.fat_binary(IMAGE) is None
    path = _build.fat_binary_path(IMAGE)
    path.parent.mkdir()
    path.write_bytes(b"fat")
    assert _build.fat_binary(IMAGE) == b"fat"
    sources = _build.sources(IMAGE)
    monkeypatch.setattr(_build, "sources", lambda unit: {**sources, "types.cuh": sources["types.cuh"] + "//"})
    assert _build.fat_binary(IMAGE) is None


def test_nvcc_is_found_or_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for home in ("toolkit", "path"):
        (tmp_path / home / "bin").mkdir(parents=True)
        (tmp_path / home / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert _build.nvcc() == str(tmp_path / "toolkit" / "bin" / "nvcc")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert _build.nvcc() == str(tmp_path / "path" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", "")
    (tmp_path / "nvidia" / "cu13" / "bin").mkdir(parents=True)
    (tmp_path / "nvidia" / "cu13" / "bin" / "nvcc").touch(mode=0o755)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: spec)
    assert _build.nvcc() == str(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc")
    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="nvcc is neither in CUDA_HOME nor on the PATH: install the CUDA Toolkit"):
        _build.nvcc()


# ---- the command ----


def test_list_and_check(cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(_build, "units", lambda: (IMAGE,))
    _build.compiled(IMAGE, (9, 0))
    assert main(["list"]) == 0
    assert re.search(r"image +no fat binary\n +cached image-sm_90-", capsys.readouterr().out)
    for spills in (0, 8):
        monkeypatch.setattr(_build, "resources", lambda result, s=spills: [Resources("k_f32", 40, 128, s, 256, "Q")])
        assert main(["check", "--arch", "90", "75"]) == (1 if spills else 0)
        rows = capsys.readouterr().out.splitlines()[1:]
        assert [row.split()[:5] for row in rows] == [["k_f32", sm, "40", "256", "128"] for sm in ("sm_75", "sm_90")]
    with pytest.raises(SystemExit):
        main(["check", "--arch", "70"])


# ---- on a GPU ----


@pytest.mark.gpu
def test_a_fat_binary_is_loaded_by_cupy_and_pycuda_too(tmp_path: Path):
    number = int("".join(map(str, torch.cuda.get_device_capability())))
    path = _build.build(IMAGE, tmp_path, [max(it for it in _build.ARCHITECTURES if it <= number)])
    kernel = "planes_to_image_f32_nchw"
    if cupy := sys.modules.get("cupy") or pytest.importorskip("cupy"):
        assert cupy.RawModule(path=str(path)).get_function(kernel)
    pytest.importorskip("pycuda")
    import pycuda.autoprimaryctx  # noqa: F401
    from pycuda import driver

    assert driver.module_from_buffer(path.read_bytes()).get_function(kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["fat binary", "compiled"])
def test_a_kernel_runs_and_is_captured(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dagan_rt.kernels import _devices

    monkeypatch.setattr(_devices, "_devices", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = None
    if where == "fat binary":
        number = int("".join(map(str, torch.cuda.get_device_capability())))
        path = _build.build(IMAGE, tmp_path / "fat", [max(it for it in _build.ARCHITECTURES if it <= number)])
        found = path.read_bytes()
        monkeypatch.setattr(_build, "compiled", _raiser(AssertionError("the fat binary fits")))
    monkeypatch.setattr(_build, "fat_binary", lambda unit: found)
    image = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8, device="cuda")
    graph, expected = torch.cuda.CUDAGraph(), image.permute(0, 3, 1, 2) / 255
    out = torch.empty(2, 3, 5, 7, device="cuda")
    with torch.cuda.graph(graph):  # the first call of all: loading and capturing at once
        kernels.image_to_planes(image, out=out)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(kernels.image_to_planes(image), expected)


@pytest.mark.gpu
def test_steady_launches_allocate_nothing(monkeypatch: pytest.MonkeyPatch):
    feature, flow = torch.randn(1, 32, 64, 64, device="cuda"), torch.zeros(1, 64, 64, 2, device="cuda")
    query, gamma = torch.randn(1, 32, 64, 64, device="cuda"), torch.ones(1, device="cuda")
    out = torch.empty_like(feature)
    for attempt in range(3):
        before = torch.cuda.memory_stats()["allocation.all.allocated"], torch.cuda.mem_get_info()
        kernels.flow_warp(feature, flow, out=out)
        kernels.cross_attention(query, query, feature, feature, gamma, out=out)
        torch.cuda.synchronize()
        after = torch.cuda.memory_stats()["allocation.all.allocated"], torch.cuda.mem_get_info()
        assert attempt == 0 or before == after
