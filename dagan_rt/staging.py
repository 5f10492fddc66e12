"""A bundle or a model repository appears whole or not at all, and an older one stays until then."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from dagan_rt.bundle import is_bundle
from dagan_rt.errors import InputError
from dagan_rt.serving.repository import is_repository

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def staged(target: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place when the block ends well, and is deleted when not.

    An existing bundle or repository is replaced only with `force`, and stays as it is if the block fails. Anything else
    that already stands at `target`, save an empty folder, is never touched: InputError. What a killed process left
    half-made for the same target is deleted first. A disk that is full is an InputError too.
    """
    target = Path(target)
    check_target(target, force=force)
    _sweep(target)
    check_target(target, force=force)  # an older bundle may have come back
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    with _naming(target, partial):
        try:
            partial.mkdir()
            with _locked(partial):
                yield partial
                check_target(target, force=force)
                _swap(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def check_target(target: Path, *, force: bool) -> None:
    """Raise InputError unless a bundle or a repository may be written to `target`."""
    if target.name in ("", "..") or "\0" in target.name:
        raise InputError(f"{target} cannot be written: give the folder's own name, as some/folder/bundle")
    if not target.parent.is_dir():
        raise InputError(f"{target} cannot be written: the folder {target.parent} does not exist, make it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"{target} cannot be written: the folder {target.parent} is read-only")
    if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        return
    if target.is_symlink():
        raise InputError(f"{target} cannot be written: it is a link, which is not a bundle; name the folder itself")
    kind = "a bundle" if is_bundle(target) else "a model repository" if is_repository(target) else None
    if kind is None:
        raise InputError(
            f"{target} cannot be written: what stands there is not a bundle, nor a model repository of dagan-rt: "
            "choose another name"
        )
    if not force:
        raise InputError(f"{target} is {kind} already: choose another name, or replace it with --force")


def share(file: Path, copy: Path) -> None:
    """The same file under a second name where the file system can, else a copy: nothing here changes one in place."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, copy)
    except OSError:
        shutil.copyfile(file, copy)


def _swap(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; what stood there is deleted afterwards."""
    if not target.exists():
        partial.rename(target)
    elif _exchange(partial, target):
        shutil.rmtree(partial, ignore_errors=True)
    else:  # two renames: if the process is killed between them, the next one brings the older bundle back
        aside = target.parent / f".{target.name}.{secrets.token_hex(4)}.replaced"
        target.rename(aside)
        try:
            partial.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(one), os.fsencode(other)
    return rename is not None and rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


@contextlib.contextmanager
def _naming(target: Path, partial: Path) -> Iterator[None]:
    """Say of a write that failed which folder it was for: the system names no file, or one that is gone by now."""
    try:
        yield
    except OSError as error:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        inside = any(Path(name).is_relative_to(partial) for name in names)
        if not inside and (names or error.errno not in _NO_ROOM):
            raise
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, which ends with the process, so that `_sweep` can tell whose work goes on."""
    handle = os.open(folder, os.O_RDONLY) if os.name == "posix" else None
    try:
        if handle is not None:
            import fcntl

            with contextlib.suppress(OSError):  # some network file systems know no locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _sweep(target: Path) -> None:
    """Clear up after processes that were killed: delete what is half-made, bring back what was put aside."""
    name = f".{glob.escape(target.name)}.????????"
    for aside in target.parent.glob(f"{name}.replaced"):
        with contextlib.suppress(OSError):
            if os.path.lexists(target):
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(target)
    if os.name != "posix":
        return
    import fcntl

    for leftover in target.parent.glob(f"{name}.partial"):
        with contextlib.suppress(OSError):  # another process is at work in it, or it is gone
            handle = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(handle)
