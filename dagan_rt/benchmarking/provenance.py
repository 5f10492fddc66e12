"""On what, with what and how a result was measured."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata

from dagan_rt import __version__

PACKAGES = (
    "torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino",
    "tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13",
)  # fmt: skip
PROGRAM = "dagan-rt bench"  # or python -m dagan_rt.benchmarking, where it is not installed
CLOCKS = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"


def provenance(device: str, digest: str, commit: str) -> dict[str, str]:
    """Names and versions; `commit` is what the caller knows the checkout as."""
    known = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command(sys.argv[2:] if sys.argv[1:2] == ["bench"] else sys.argv[1:]),
        "commit": commit or "not stated",
        "suite digest": digest,
        "dagan-rt": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": device,
    }
    for package in PACKAGES:
        try:
            known[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return known | (_cuda() if device != "cpu" else {})


def command(arguments: Sequence[str]) -> str:
    """As typed, files by their names: the folders of one machine tell nobody else anything."""
    return " ".join([PROGRAM, *(shlex.quote(it.rsplit("/", 1)[-1]) for it in arguments)])


def _cuda() -> dict[str, str]:
    import torch

    it = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "capability": f"{it.major}.{it.minor}",
        "multiprocessors": str(it.multi_processor_count),
        "L2 bytes": str(it.L2_cache_size),
        "memory bytes": str(it.total_memory),
    }


def clocks(device: str) -> str:
    """Driver, clocks, temperature and power of the first GPU now, where nvidia-smi is there and answers."""
    program = shutil.which("nvidia-smi")
    if device == "cpu" or program is None:
        return "not known"
    query = [program, f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {type(error).__name__}"
    named = zip(CLOCKS.split(","), answer.split(","), strict=False)
    return ", ".join(f"{name} {value.strip()}" for name, value in named)
