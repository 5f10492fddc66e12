"""Finds the files that are no Python code: recipes, templates, kernel sources, demo weights.

They lie in top-level folders of the checkout and, once installed, in `dagan_rt/assets/`. One of the two is chosen,
once.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path, PurePosixPath

from dagan_rt.errors import InputError

FOLDERS = ("kernels", "export", "train", "benchmarks")


def choose_root(package: Path) -> Path:
    """Return the folder that holds `FOLDERS`: `package/assets` where it exists, else the checkout around `package`.

    Raises `InputError` if neither holds them.
    """
    installed = package / "assets"
    root = installed if installed.is_dir() else package.parent
    absent = [folder for folder in FOLDERS if not (root / folder).is_dir()]
    if absent:
        raise InputError(
            f"{root} must hold the asset folders {', '.join(FOLDERS)}, but {', '.join(absent)} is missing: "
            "install dagan-rt again, or run it from a complete checkout"
        )
    return root


@cache
def assets_root() -> Path:
    """Return the folder that holds the asset folders of this installation."""
    return choose_root(Path(__file__).resolve().parent)


def asset(*parts: str) -> Path:
    """Return the path of a file or folder that ships with dagan-rt: `asset("train", "recipes", "demo.toml")`.

    The first part is one of `FOLDERS`. Raises `InputError` for another folder, for a path that leaves it, and for a
    file that is not there.
    """
    relative = PurePosixPath(*parts)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or relative.parts[0] not in FOLDERS:
        raise InputError(f"an asset must lie in one of {', '.join(FOLDERS)}, got {'/'.join(parts)!r}")
    path = assets_root() / relative
    if not path.exists():
        raise InputError(f"asset {str(relative)!r} must exist in {assets_root()}, but there is no such file")
    return path
