"""A GPU that is none: CUDA kernels compiled by g++ for the host, every thread a fiber (tests/kernels/emulation).

    device = EmulatedDevice()                  # or sanitize="address" / "thread", seed=1
    with emulation(device):
        out = flow_warp(torch.randn(1, 8, 5, 7), ...)

A kernel's arrays are copied to places of their own between guards for the time of a launch, so that a write beside
them is seen at once. With `sanitize`, a launch runs in a child process under AddressSanitizer (with UBSan's checks of
alignment, bounds and overflow) or ThreadSanitizer, whose report becomes the message of `EmulationError`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "emulation"
KERNELS = Path(__file__).parents[2] / "kernels"

#: Where compiled kernels are kept, by the digest of what they were made of; pytest's cache folder in tests.
FOLDER = Path(tempfile.gettempdir()) / f"dagan-rt-emulation-{os.getuid()}"

# x86-64-v3 brings conversions of half precision and fused multiply-adds, which nvcc uses by default too.
MACHINE_FLAGS = ("-march=x86-64-v3",) if os.uname().machine == "x86_64" else ()
COMMON_FLAGS = ("-std=c++17", "-fPIC", "-g1", *MACHINE_FLAGS)
# Builds of one source that differ in their defines must not share the statics of templates: no unique symbols.
KERNEL_FLAGS = (
    "-w", "-fno-strict-aliasing", "-fno-math-errno", "-fno-exceptions", "-fno-gnu-unique", "-shared", "-nostartfiles"
)  # fmt: skip
# Compiling takes longer than what the tests then run. At -O0 ThreadSanitizer forgets accesses before it sees the race.
SANITIZER_FLAGS = {
    None: ("-O1",),
    "address": ("-O0", "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"),
    "thread": ("-O1", "-fsanitize=thread"),
}
MACHINE_DEFINES = {None: (), "address": ("-DEMULATED_ADDRESS",), "thread": ("-DEMULATED_THREAD",)}

POINTERS = {"float32": "float*", "float16": "f16*", "bfloat16": "bf16*", "uint8": "u8*", "int32": "int*"}
SCALARS = {"int32": "int", "int64": "long long", "float32": "float"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4, "uint32": 4, "int64": 8, "float64": 8}
GUARD = 4096


class EmulationError(AssertionError):
    """A launch that a GPU might have let pass or punished: a deadlock, a race, an access outside of an array …"""


class _Entry(ctypes.Structure):
    _fields_ = [
        ("call", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(ctypes.c_char_p)),
        ("most_threads", ctypes.c_int),
        ("cluster", ctypes.c_int * 3),
        ("statics", ctypes.c_void_p),
        ("statics_end", ctypes.c_void_p),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.POINTER(_Entry)),
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_int * 3),
        ("block", ctypes.c_int * 3),
        ("shared", ctypes.c_long),
        ("seed", ctypes.c_ulonglong),
    ]


# ---- compiling ----


def _run(command: Sequence[str | Path]) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise EmulationError(f"{' '.join(map(str, command))}\n{result.stderr[-8000:]}")
    return result.stdout


def _made(name: str, ingredients: Sequence[str], make: Any) -> Path:
    """The file of this name made of these ingredients: from FOLDER, or by `make(path)`."""
    digest = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:20]
    path = FOLDER / f"{name}-{digest}"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            make(Path(folder) / path.name)
            (Path(folder) / path.name).rename(path)  # at once: others may be making the same
    return path


@cache
def _machine(sanitize: str | None) -> Path:
    """The emulated GPU: a library for this process, or a program that runs one launch under a sanitizer."""
    sources = [HERE / "machine.cpp"] + ([HERE / "runner.cpp"] if sanitize else [])
    text = [(HERE / name).read_text() for name in ("machine.h", "machine.cpp", "runner.cpp")]
    # No loop becomes a call of memset or memcpy, which a sanitizer would take for an access by the kernel.
    compiler = _compiler()
    flags = [*COMMON_FLAGS, "-O3", "-fno-tree-loop-distribute-patterns", *MACHINE_DEFINES[sanitize]]
    if sanitize:
        flags.append(f"-fsanitize={'address,undefined' if sanitize == 'address' else 'thread'}")

    def make(path: Path) -> None:
        if sanitize is None:
            _run(["g++", *flags, "-shared", *sources, "-o", path])
            return
        # The sanitizer watches the kernels, not the machine: it is only linked here.
        objects = [path.with_name(f"{source.stem}.o") for source in sources]
        for source, output in zip(sources, objects, strict=True):
            _run(["g++", *flags[:-1], "-c", source, "-o", output])
        _run(["g++", flags[-1], "-rdynamic", *objects, "-ldl", "-o", path])

    return _made(f"machine-{sanitize or 'plain'}", [*text, *flags, compiler], make)


@cache
def _compiler() -> str:
    if shutil.which("g++") is None:
        raise EmulationError("emulating kernels needs g++ 11 or newer: apt-get install g++")
    return _run(["g++", "--version"])


_BRACKETS = r"\s*\(((?:[^()]|\([^()]*\))*)\)"  # which may hold brackets themselves


def _attribute(declaration: str, name: str, default: str) -> str:
    """What stands in the brackets of an attribute."""
    found = re.search(name + _BRACKETS, declaration)
    return found.group(1) if found else default


def _entries(preprocessed: str) -> list[str]:
    """One line ENTRY(name, (launch bounds), (cluster)) for each kernel of a source."""
    lines = []
    for declaration in re.findall(r"__global__([^{};]*)", preprocessed):
        bounds = _attribute(declaration, "__launch_bounds__", "0")
        cluster = _attribute(declaration, "__cluster_dims__", "1")
        name = re.search(r"(\w+)\s*\(", re.sub(r"__\w+__" + _BRACKETS, "", declaration))
        assert name, f"no name in: __global__{declaration}"
        lines.append(f"ENTRY({name.group(1)}, ({bounds}), ({cluster}))")
    return lines


@cache
def _library(source: Path, defines: tuple[tuple[str, int], ...], arch: int, sanitize: str | None, stamp: int) -> Path:
    """A kernel source as a shared library; `stamp` is the time of its last change."""
    flags = [
        *COMMON_FLAGS, *KERNEL_FLAGS, *SANITIZER_FLAGS[sanitize], f"-D__CUDA_ARCH__={arch}",
        *(f"-D{name}={value}" for name, value in defines), f"-I{HERE}", f"-I{source.parent}", f"-I{KERNELS / 'common'}",
        "-include", str(HERE / "prelude.h"),
    ]  # fmt: skip
    scan = [flag for flag in flags if not flag.startswith("-fsanitize")]
    text = _run(["g++", *scan, "-DEMULATED_SCAN", "-E", "-P", "-x", "c++", source])
    entries = _entries(text)

    def make(path: Path) -> None:
        wrapper = path.with_suffix(".cpp")
        wrapper.write_text("\n".join([f'#include "{source}"', '#include "entry.h"', *entries, ""]))
        _run(["g++", *flags, wrapper, "-o", path])

    ingredients = [text, (HERE / "entry.h").read_text(), (HERE / "prelude.h").read_text(), *flags, _compiler()]
    return _made(f"{source.stem}-{sanitize or 'plain'}.so", ingredients, make)


@cache
def _loaded(library: Path) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    machine = ctypes.CDLL(str(_machine(None)), mode=ctypes.RTLD_GLOBAL)
    machine.emulated_launch.restype = ctypes.c_char_p
    return machine, ctypes.CDLL(str(library))


# Reports go to stderr; symbols come from the libraries themselves. TSan would wait a second before it exits.
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=66",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=66",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0:atexit_sleep_ms=0:history_size=2",
}


def _run_sanitized(sanitize: str | None, library: Path, kernel: str, before: Path, after: Path) -> None:
    command = [str(part) for part in (_machine(sanitize), library, kernel, before, after)]
    environment = {**os.environ, **_OPTIONS}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    # Where the system scatters memory more than the sanitizer can bear, it must not be scattered.
    if "unexpected memory mapping" in result.stderr:
        result = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, env=environment)
    if result.returncode:
        raise EmulationError(result.stderr.removeprefix("EMULATED: ").strip() or f"{kernel}: exit {result.returncode}")


# ---- memory ----


@dataclass
class _Region:
    """Memory of the caller that one or more overlapping arrays of a launch lie in."""

    start: int
    end: int
    arrays: list[Any]

    def __str__(self) -> str:
        return "the array " + " and ".join(f"{array.dtype} {array.shape}" for array in self.arrays)

    def bytes(self) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_ubyte * (self.end - self.start)).from_address(self.start))

    def holes(self) -> np.ndarray:
        """Which bytes belong to no array: those between the channels of a slice, say."""
        hole = np.ones(self.end - self.start, bool)
        for array in self.arrays:
            item = ITEM_BYTES[array.dtype]
            own = np.ndarray((*array.shape, item), bool, hole.data, array.pointer - self.start,
                             (*(item * stride for stride in array.strides), 1))  # fmt: skip
            own[...] = False
        return hole


def _extent(array: Any) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True))
    return array.pointer, array.pointer + (last + 1) * ITEM_BYTES[array.dtype]


def _regions(arrays: Sequence[Any]) -> list[_Region]:
    regions: list[_Region] = []
    for array in sorted(arrays, key=lambda array: array.pointer):
        start, end = _extent(array)
        if regions and start < regions[-1].end:
            regions[-1].end = max(regions[-1].end, end)
            regions[-1].arrays.append(array)
        else:
            regions.append(_Region(start, end, [array]))
    return regions


def _index(regions: Sequence[_Region], array: Any) -> int:
    return next(i for i, region in enumerate(regions) if region.start <= array.pointer < region.end)


def _filled(region: _Region) -> bool:
    """Every byte of the region is one array's; else the others are looked for."""
    size = region.end - region.start
    return any(int(np.prod(array.shape)) * ITEM_BYTES[array.dtype] == size for array in region.arrays)


def _is_array(argument: Any) -> bool:
    return hasattr(argument, "pointer")


def _check_arguments(kernel: str, parameters: Sequence[str], arguments: Sequence[Any]) -> None:
    """Types against the kernel's signature: cuLaunchKernel would read whatever bytes it finds."""
    given = []
    for argument in arguments:
        if argument is None:
            given.append("null")
        elif _is_array(argument):
            given.append(POINTERS.get(argument.dtype, "void*"))
        else:
            assert isinstance(argument, np.generic), f"{kernel}: scalars must be NumPy's, got {argument!r}"
            given.append(SCALARS.get(argument.dtype.name, argument.dtype.name))
    # Bytes may be anything: workspaces are.
    same = len(given) == len(parameters) and all(
        g == p or (p.endswith("*") and (g in ("null", "u8*") or p == "void*"))
        for g, p in zip(given, parameters, strict=True)
    )
    if not same:
        raise EmulationError(f"{kernel}({', '.join(parameters)}) was launched with ({', '.join(given)})")


# ---- the device ----


@dataclass(eq=False)
class EmulatedDevice:
    """A `Device` of dagan_rt.kernels that emulates. `seed` 0 takes threads and blocks in order, others shuffle them."""

    sanitize: str | None = None
    seed: int = 0
    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 4
    name: str = "emulated"
    shared_per_block: int = 227 << 10
    sources: Path = KERNELS
    launches: list[str] = field(default_factory=list)  # names of the kernels run so far
    _workspaces: dict[Any, Any] = field(default_factory=dict)

    def launch(self, launch: Any, stream: int = 0) -> None:
        """Run a kernel to its end. Raises EmulationError."""
        unit = launch.unit
        source = self.sources / unit.op / f"{unit.source}.cu"
        arch = 100 * self.capability[0] + 10 * self.capability[1]
        stamp = max(path.stat().st_mtime_ns for path in source.parent.glob("*.cu*"))
        plain = _library(source, tuple(unit.defines), arch, None, stamp)
        entry = self._entry(plain, launch)
        self.launches.append(launch.kernel)
        if self.sanitize is None:
            self._launch_here(plain, entry, launch)
        else:
            library = _library(source, tuple(unit.defines), arch, self.sanitize, stamp)
            self._launch_apart(library, entry, launch)

    def _entry(self, library: Path, launch: Any) -> Any:
        """The kernel's description, once what the launch asks for agrees with it and with the device."""
        try:
            find = getattr(_loaded(library)[1], f"entry_{launch.kernel}")
        except AttributeError:
            raise EmulationError(f"{launch.unit.source}.cu has no kernel {launch.kernel}") from None
        find.restype = ctypes.POINTER(_Entry)
        entry = find()
        if launch.waiting:  # blocks that wait for each other run at once, as those of a cluster do
            entry = ctypes.pointer(_Entry.from_buffer_copy(entry.contents))
            entry.contents.cluster = (ctypes.c_int * 3)(*launch.grid)
        parameters: list[str] = []
        while (parameter := entry.contents.parameters[len(parameters)]) is not None:
            parameters.append(parameter.decode())
        _check_arguments(launch.kernel, parameters, launch.args)
        threads = int(np.prod(launch.block))
        most = entry.contents.most_threads or 1024
        cluster = tuple(entry.contents.cluster)
        statics = (entry.contents.statics_end or 0) - (entry.contents.statics or 0)
        problems = {
            f"a block of {launch.block} has more than {most} threads": not 1 <= threads <= most,
            f"a grid of {launch.grid} is too large or empty": min(launch.grid) < 1 or max(launch.grid[1:]) > 65535,
            f"a grid of {launch.grid} is no multiple of the clusters of {cluster}":
                any(size % part for size, part in zip(launch.grid, cluster, strict=True)),
            f"{launch.shared} bytes of shared memory are more than {self.shared_per_block}":
                launch.shared > self.shared_per_block,
            f"{np.prod(launch.grid)} blocks wait for each other, there are {self.multiprocessors} multiprocessors":
                launch.waiting and np.prod(launch.grid) > self.multiprocessors,
            f"{np.prod(cluster)} blocks run at once, and would share the __shared__ arrays of this file":
                statics and np.prod(cluster) > 1,
        }  # fmt: skip
        for problem, found in problems.items():
            if found:
                raise EmulationError(f"{launch.kernel}: {problem}")
        return entry

    def _launch_here(self, library: Path, entry: Any, launch: Any) -> None:
        regions = _regions([argument for argument in launch.args if _is_array(argument)])
        copies = [np.full(region.end - region.start + 2 * GUARD + 256, 0xFF, np.uint8) for region in regions]
        starts = []
        for region, copy in zip(regions, copies, strict=True):
            # As far from a multiple of 256 as the original, which a kernel may have asked for alignment.
            offset = GUARD + (region.start - copy.ctypes.data - GUARD) % 256
            starts.append(offset)
            copy[offset : offset + region.end - region.start] = region.bytes()

        values: list[Any] = []
        for argument in launch.args:
            if argument is None:
                values.append(ctypes.c_void_p(None))
            elif _is_array(argument):
                i = _index(regions, argument)
                address = copies[i].ctypes.data + starts[i] + argument.pointer - regions[i].start
                values.append(ctypes.c_void_p(address))
            else:
                values.append(np.ctypeslib.as_ctypes_type(argument.dtype)(argument.item()))
        pointers = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(value) for value in values))
        what = _Launch(entry, launch.kernel.encode(), launch.grid, launch.block, launch.shared, self.seed)
        error = _loaded(library)[0].emulated_launch(ctypes.byref(what), pointers)
        if error is not None:
            raise EmulationError(error.decode())

        for region, copy, offset in zip(regions, copies, starts, strict=True):
            size = region.end - region.start
            before, after = copy[:offset], copy[offset + size :]
            if not (before == 0xFF).all() or not (after == 0xFF).all():
                side = "before" if not (before == 0xFF).all() else "after"
                raise EmulationError(f"{launch.kernel} wrote {side} {region}")
            mine, new = region.bytes(), copy[offset : offset + size]
            changed = new != mine
            if changed.any():
                if not _filled(region) and (changed & region.holes()).any():
                    raise EmulationError(f"{launch.kernel} wrote between the elements of {region}")
                mine[...] = new

    def _launch_apart(self, library: Path, entry: Any, launch: Any) -> None:
        regions = _regions([argument for argument in launch.args if _is_array(argument)])
        parts: list[bytes] = []

        def add(*numbers: int) -> None:
            parts.append(struct.pack(f"<{len(numbers)}q", *numbers))

        add(*launch.grid, *launch.block, *entry.contents.cluster, launch.shared, self.seed)
        add(len(regions), len(launch.args))
        for region in regions:
            holes = not _filled(region)
            add(region.end - region.start, region.start % 256, holes)
            parts.append(region.bytes().tobytes())
            if holes:
                parts.append(region.holes().tobytes())
        for argument in launch.args:
            if argument is None:
                add(-1, 0)
            elif _is_array(argument):
                i = _index(regions, argument)
                add(i, argument.pointer - regions[i].start)
            else:
                add(-1)
                parts.append(argument.tobytes().ljust(8, b"\0"))

        with tempfile.TemporaryDirectory() as folder:
            before, after = Path(folder) / "launch", Path(folder) / "result"
            before.write_bytes(b"".join(parts))
            _run_sanitized(self.sanitize, library, launch.kernel, before, after)
            results = after.read_bytes()
        for region in regions:
            size = region.end - region.start
            region.bytes()[...] = np.frombuffer(results[:size], np.uint8)
            results = results[size:]

    def workspace(self, stream: int, nbytes: int, zeroed: bool = False) -> Any:
        """Bytes that kernels may use; NaN at every request, or zero, as every kernel must have left them."""
        from dagan_rt.kernels._devices import Array

        memory = self._workspaces.get((stream, zeroed))
        if memory is not None and zeroed and memory.any():
            raise EmulationError(f"{self.launches[-1]}, or one before it, did not leave its zeroed workspace zero")
        if memory is None or memory.size < nbytes:
            memory = self._workspaces[stream, zeroed] = np.zeros(nbytes, np.uint8)
        if not zeroed:
            memory[...] = 0xFF
        return Array(memory.ctypes.data, (nbytes,), (1,), "uint8", self, memory)


@contextmanager
def emulation(device: EmulatedDevice) -> Iterator[EmulatedDevice]:
    """Let CPU tensors lie on this device for the kernels of dagan_rt."""
    from dagan_rt.kernels import _arrays

    _arrays.emulate(device)
    try:
        yield device
    finally:
        _arrays.emulate(None)
