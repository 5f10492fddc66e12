"""python -m dagan_rt.kernels list | build | check: the compiled kernels of this installation."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dagan_rt._assets import asset
from dagan_rt.errors import InputError
from dagan_rt.kernels import _build


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where a check failed, 2 for what cannot be done here."""
    parser = argparse.ArgumentParser(prog="python -m dagan_rt.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what is compiled already: fat binaries, and kernels in the user's cache")
    build = commands.add_parser("build", help="compile every kernel with nvcc to fat binaries")
    build.add_argument("--out", type=Path, help="the folder they go to (default: where they are looked for)")
    check = commands.add_parser("check", help="compile every kernel with NVRTC and print what it takes of a GPU")
    for command in (build, check):
        command.add_argument(
            "--arch", type=int, nargs="+", choices=_build.ARCHITECTURES, default=_build.ARCHITECTURES,
            metavar="NUMBER", help="for these only: the number in sm_90",
        )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            return _list()
        if options.command == "build":
            return _make(options.out or asset("kernels") / "fatbin", sorted(options.arch))
        return _check(sorted(options.arch))
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def _list() -> int:
    try:
        cached = sorted(path.name for path in _build.cache_folder().glob("*.bin"))
    except RuntimeError:  # no home folder
        cached = []
    for unit in _build.units():
        fat = _build.fat_binary_path(unit)
        print(f"{_build.title(unit):40s} {fat.name if fat.exists() else 'no fat binary'}")
        for name in cached:
            if name.startswith(f"{_build.title(unit)}-sm_"):
                print(f"{'':40s} cached {name}")
    return 0


def _make(folder: Path, numbers: Sequence[int]) -> int:
    units = _build.units()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path in pool.map(lambda unit: _build.build(unit, folder, numbers), units):
            if path is not None:
                print(f"{path.stat().st_size:>10,} bytes  {path}", flush=True)
    return 0


def _check(numbers: Sequence[int]) -> int:
    tasks = [(unit, target) for unit in _build.units() for target in _build.architectures(unit, numbers)]
    print(f"{'kernel':48s} {'for':8s} registers  threads  static shared  spilled bytes")
    spilled = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda task: _build.resources(_build.compile(*task)), tasks)
        for (_, target), kernels in zip(tasks, results, strict=True):
            for it in kernels:
                spilled += it.spills > 0
                print(
                    f"{it.kernel:48s} {target:8s} {it.registers:9d}  {it.threads:7d}  {it.shared:13d}  {it.spills:13d}"
                )
    if spilled:
        print(f"{spilled} kernels spill registers to memory", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
