"""From kernel sources to what the CUDA driver loads.

`make kernels` compiles each unit with nvcc to one fat binary, which needs no compiler where it runs. Where none fits,
NVRTC (through CuPy) compiles for the GPU that is there, and keeps the result in the user's cache folder. Both names
hold a digest of the sources, so that what was compiled from others is never loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from dagan_rt._assets import asset
from dagan_rt.engines import one_line
from dagan_rt.errors import InputError, MissingPackage, require
from dagan_rt.kernels._devices import Unit

OPERATIONS = (
    "image", "antialias", "pooling", "normalize", "keypoints", "gather", "sparse_motion", "dense_flow", "flow_warp",
    "cross_attention", "conv2d",
)  # fmt: skip
#: What fat binaries are built for, as the number in sm_75; the newest also as PTX, for GPUs that come later.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
FEATURE_CAPABILITY = (9, 0)  # of units with a feature: they run nowhere else
STANDARD = "-std=c++17"
_TOOLKIT = (
    "install the CUDA Toolkit, or run pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm"
)


def units() -> tuple[Unit, ...]:
    """Everything that is shipped as fat binaries: what the operations name as their UNITS."""
    modules = [importlib.import_module(f"dagan_rt.kernels.{operation}") for operation in OPERATIONS]
    return tuple(unit for module in modules for unit in module.UNITS)


def sources(unit: Unit) -> dict[str, str]:
    """The text of a unit by file name: its own file first, then every header it may include."""
    folder = asset("kernels", unit.op)
    headers = [*sorted(asset("kernels", "common").glob("*.cuh")), *sorted(folder.glob("*.cuh"))]
    paths = [asset("kernels", unit.op, f"{unit.source}.cu"), *headers]
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def title(unit: Unit) -> str:
    """A unit's name for people and files: forward_mma-D32-C256."""
    name = unit.source if unit.source.startswith(unit.op) else f"{unit.op}.{unit.source}"
    return "-".join([name, *(f"{name}{value}" for name, value in unit.defines)])


def architectures(unit: Unit, numbers: Sequence[int] = ARCHITECTURES) -> list[str]:
    """The architectures of these numbers that a unit is compiled for: sm_75, or sm_90a alone if it has a feature."""
    if unit.feature:
        return [f"sm_{number}{unit.feature}" for number in numbers if divmod(number, 10) == FEATURE_CAPABILITY]
    return [f"sm_{number}" for number in numbers]


def _digest(unit: Unit, *more: str) -> str:
    parts = [repr((unit.source, unit.defines, unit.feature)), *more]
    for name, text in sources(unit).items():
        parts += [name, text]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _options(unit: Unit) -> list[str]:
    return [STANDARD, *(f"-D{name}={value}" for name, value in unit.defines)]


# ---------------------------------------------------------------------------------------------------------------------
# Fat binaries


def fat_binary_path(unit: Unit, folder: Path | None = None) -> Path:
    """Where the fat binary of a unit as its sources are now lies, or would lie."""
    folder = folder or asset("kernels") / "fatbin"
    return folder / f"{title(unit)}-{_digest(unit)[:16]}.fatbin"


def fat_binary(unit: Unit) -> bytes | None:
    """The fat binary of a unit, or None if `make kernels` has not built it from these sources."""
    try:
        return fat_binary_path(unit).read_bytes()
    except OSError:
        return None


def build(unit: Unit, folder: Path, numbers: Sequence[int] = ARCHITECTURES) -> Path | None:
    """Compile a unit with nvcc to a fat binary in `folder`; None if it is for none of these architectures.

    Fat binaries of older sources are deleted. Raises InputError with what nvcc says of an error in the sources.
    """
    wanted = architectures(unit, numbers)
    if not wanted:
        return None
    codes = [f"-gencode=arch={it.replace('sm', 'compute')},code={it}" for it in wanted]
    if not unit.feature:
        newest = wanted[-1].replace("sm", "compute")
        codes.append(f"-gencode=arch={newest},code={newest}")
    path = fat_binary_path(unit, folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Compiled from the very text the digest is of.
    with tempfile.TemporaryDirectory(prefix="dagan-rt-") as workplace:
        for name, text in sources(unit).items():
            (Path(workplace) / name).write_text(text, encoding="utf-8")
        flags = ["-fatbin", "-Xfatbin=-compress-all", "--threads=0", *_options(unit), *codes]
        command = [nvcc(), *flags, "-o", "out.fatbin", f"{unit.source}.cu"]
        run = subprocess.run(command, cwd=workplace, capture_output=True, text=True)
        if run.returncode:
            raise InputError(f"nvcc cannot compile {unit.op}/{unit.source}.cu:\n{run.stdout}{run.stderr}".rstrip())
        _write(path, (Path(workplace) / "out.fatbin").read_bytes())
    for old in folder.glob(f"{title(unit)}-{'[0-9a-f]' * 16}.fatbin"):
        if old != path:
            old.unlink()
    return path


def nvcc() -> str:
    """The compiler of CUDA_HOME, on the PATH or from pip; raises InputError where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""
    if found := (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc"):
        return found
    spec = importlib.util.find_spec("nvidia")
    for packages in spec.submodule_search_locations or () if spec else ():
        for folder in sorted(Path(packages).glob("cu[0-9]*/bin"), reverse=True):
            if found := shutil.which("nvcc", path=folder):
                return found
    raise InputError(f"nvcc is neither in CUDA_HOME nor on the PATH: {_TOOLKIT}")


# ---------------------------------------------------------------------------------------------------------------------
# NVRTC


@dataclass(frozen=True)
class Compiled:
    """What NVRTC makes of a unit."""

    cubin: bytes  # empty where only PTX was asked for
    ptx: str
    log: str  # of ptxas, with the resources of each kernel


_FIRST = threading.Lock()


def _nvrtc() -> ModuleType:
    require("cupy", extra="cuda", why="compiling the CUDA kernels (no fat binary is here for this GPU)")
    from cupy.cuda import nvrtc

    try:
        with _FIRST:  # CuPy loads NVRTC's two libraries now, and a second thread would go on after the first of them
            nvrtc.getVersion()
    except Exception as error:  # CuPy's own words differ from version to version
        raise MissingPackage(
            f"compiling the CUDA kernels needs NVRTC, which CuPy does not find ({one_line(error)}): "
            "run pip install 'dagan-rt[cuda]'"
        ) from None
    return nvrtc


def compile(unit: Unit, architecture: str) -> Compiled:
    """Compile a unit for sm_89, or to PTX for compute_89; raises InputError with NVRTC's log for an error in it."""
    nvrtc = _nvrtc()
    (name, text), *headers = sources(unit).items()
    options = (*_options(unit), f"-arch={architecture}", "--ptxas-options=-v")
    bodies = tuple(body.encode() for _, body in headers)
    program = nvrtc.createProgram(text, name, bodies, tuple(header.encode() for header, _ in headers))
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program).strip() or str(error)
            raise InputError(f"NVRTC cannot compile {unit.op}/{name} for {architecture}:\n{log}") from None
        cubin = nvrtc.getCUBIN(program) if architecture.startswith("sm_") else b""
        return Compiled(cubin, nvrtc.getPTX(program).decode(), nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def compiled(unit: Unit, capability: tuple[int, int]) -> bytes:
    """What the driver loads of a unit on a GPU of this compute capability: from the cache, else compiled now.

    A cubin; PTX for a GPU that this NVRTC does not know.
    """
    nvrtc = _nvrtc()
    target = _target(unit, capability, nvrtc.getSupportedArchs())
    key = _digest(unit, target, *_options(unit), str(nvrtc.getVersion()))
    path = None
    with contextlib.suppress(RuntimeError):  # no home folder
        path = cache_folder() / f"{title(unit)}-{target}-{key[:32]}.bin"
    if path is not None and (kept := _read(path)) is not None:
        return kept
    with _hint(f"dagan-rt: compiling the kernel {title(unit)} for {target} (once, kept in {path and path.parent})"):
        result = compile(unit, target)
    image = result.cubin or result.ptx.encode().rstrip(b"\0") + b"\0"  # the driver takes PTX as a C string
    try:
        if path is None:
            raise OSError("there is no home folder")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(path, hashlib.sha256(image).digest() + image)
    except OSError as error:
        _warn_once(f"compiled kernels cannot be kept, each process compiles them anew: {error}")
    return image


def _target(unit: Unit, capability: tuple[int, int], known: Sequence[int]) -> str:
    """sm_89 for (8, 9); the PTX of the newest architecture below, if NVRTC does not know that one."""
    if unit.feature and capability != FEATURE_CAPABILITY:
        raise InputError(f"{title(unit)} needs compute capability 9.0, this GPU has {'.'.join(map(str, capability))}")
    number = 10 * capability[0] + capability[1]
    if number in known:
        return f"sm_{number}{unit.feature}"
    older = [it for it in known if it < number]
    if not older:
        raise InputError(f"the kernels need compute capability {min(ARCHITECTURES) / 10}, this GPU has {number / 10}")
    return f"compute_{max(older)}"


# ---------------------------------------------------------------------------------------------------------------------
# The cache: one file a unit and architecture, the SHA-256 of the rest in its first 32 bytes


def cache_folder() -> Path:
    """The user's own: in XDG_CACHE_HOME or ~/.cache, on Windows in LOCALAPPDATA. RuntimeError if there is no home."""
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "dagan-rt" / "kernels"


def _read(path: Path) -> bytes | None:
    """An entry's content, or None where it is not there or damaged."""
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    digest, image = entry[:32], entry[32:]
    return image if image and hashlib.sha256(image).digest() == digest else None


def _write(path: Path, content: bytes) -> None:
    """Put a file in place whole, however many processes do so at once."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


@contextlib.contextmanager
def _hint(message: str, seconds: float = 2.0) -> Iterator[None]:
    """Say what is going on if it takes long."""
    timer = threading.Timer(seconds, lambda: print(message, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# What a kernel takes of a multiprocessor


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture."""

    kernel: str
    registers: int  # a thread
    shared: int  # static, bytes a block
    spills: int  # bytes a thread
    threads: int  # the most a block may have: its launch bounds, 1024 without
    parameters: str  # the types in struct's letters: "QQif"


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". The same for all: 65,536 registers a
# multiprocessor and a block, 255 a thread, 1024 threads a block, 48 KB of static shared memory a block.
REGISTERS, THREADS, STATIC_SHARED = 65536, 1024, 48 * 1024
#: The most shared memory of a block, static and dynamic, bytes.
SHARED_PER_BLOCK = {
    number: kilobytes * 1024
    for number, kilobytes in {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}.items()
}

_USED = re.compile(
    r"Function properties for (\w+)\n"
    r".*?(\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*?Used (\d+) registers([^\n]*)"
)
_ENTRY = re.compile(r"\.entry (\w+)\((.*?)\)([^{]*)\{", re.DOTALL)
_LETTERS = {"u64": "Q", "u32": "i", "f32": "f"}


def resources(result: Compiled) -> list[Resources]:
    """The resources of each kernel, from what ptxas logged and from the PTX."""
    bounds, parameters = {}, {}
    for kernel, types, directives in _ENTRY.findall(result.ptx):
        found = re.search(r"\.(?:maxntid|reqntid) (\d+)(?:, (\d+))?(?:, (\d+))?", directives)
        bounds[kernel] = _product(int(it or 1) for it in found.groups()) if found else THREADS
        parameters[kernel] = "".join(_LETTERS.get(it, "?") for it in re.findall(r"\.param \.(\w+)", types))
    kernels = []
    for kernel, stores, loads, registers, rest in _USED.findall(result.log):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Resources(
                kernel,
                int(registers),
                int(shared[1]) if shared else 0,
                int(stores) + int(loads),
                bounds[kernel],
                parameters[kernel],
            )  # fmt: skip
        )
    return sorted(kernels, key=lambda it: it.kernel)


def _product(numbers: Iterator[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
