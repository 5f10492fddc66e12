"""Files a user names: inputs opened with one-sentence errors, outputs that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from dagan_rt.errors import InputError


def open_input(path: str | os.PathLike[str], what: str) -> BinaryIO:
    """Open a regular file for reading; `what` ("image", "video") names its role in the error.

    Raises `InputError` when it is missing, a folder, a device or pipe, empty or not readable.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{what} {path} is a folder, expected a file")
        if path.exists() and not path.is_file():
            raise InputError(f"{what} {path} is not a regular file: save it to disk first")
        file = path.open("rb")
        if os.fstat(file.fileno()).st_size == 0:
            file.close()
            raise InputError(f"{what} {path} is empty (0 bytes)")
        return file
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} {str(path)!r} is not a file name: {error}") from None  # an embedded null byte


def check_output(
    path: str | os.PathLike[str], extensions: Iterable[str], inputs: Iterable[str | os.PathLike[str]] = ()
) -> Path:
    """Return the output path once it is known to be writable in principle; nothing is created.

    Raises `InputError` for an extension outside `extensions`, a missing folder, a target that is a folder, and a
    target that is one of `inputs` (also through a link).
    """
    path = Path(path)
    known = tuple(extensions)
    if path.suffix.lower() not in known:
        raise InputError(f"output {path} must end in {', '.join(known)}, got {path.suffix or 'no extension'}")
    try:
        if path.is_dir():
            raise InputError(f"output {path} is a folder, expected a file name")
        if not path.parent.is_dir():
            raise InputError(f"output folder {path.parent} does not exist: create it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise InputError(f"output folder {path.parent} is not writable")
        for other in inputs:
            if path.exists() and Path(other).exists() and path.samefile(other):
                raise InputError(f"output {path} is also an input ({other}): give it another name")
    except OSError as error:
        raise InputError(f"output {path} cannot be used: {error.strerror or error}") from None
    return path


class AtomicFile:
    """A binary file, written under a temporary name beside its target.

    `commit` renames it into place, `discard` deletes it. The first write that fails is kept in `failure`, an
    `OSError` with the name of the target, and later ones do nothing: encoders written in C swallow exceptions, so
    whoever hands them this file calls `check` afterwards. `commit` checks too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.failure: OSError | None = None
        # mkstemp would make a file that only its owner reads; this one follows the umask like any other output.
        self._temporary = self.path.with_name(f".{secrets.token_hex(6)}.partial{self.path.suffix}")
        try:
            self._file = self._temporary.open("xb")
        except OSError as error:
            raise self._named(error) from error

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror or str(error), str(self.path))

    def check(self) -> None:
        """Raise the first failure, if there was one."""
        if self.failure is not None:
            raise self.failure

    def write(self, data: bytes) -> int:
        if self.failure is None:
            try:
                return self._file.write(data)
            except OSError as error:
                self.failure = self._named(error)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        if self.failure is None:
            try:
                return self._file.seek(offset, whence)  # flushes the buffer, so it can fail like a write
            except OSError as error:
                self.failure = self._named(error)
        return offset

    def tell(self) -> int:
        return self._file.tell() if self.failure is None else 0

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        """For Pillow, which flushes at the end of each image; `commit` does the work."""

    def commit(self) -> None:
        """Put the file in place; raises `OSError` (and deletes it) when a byte of it could not be written."""
        try:
            if self.failure is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self.path)
        except OSError as error:
            self.failure = self._named(error)
        if self.failure is not None:
            self.discard()
            self.check()

    def discard(self) -> None:
        """Delete the temporary file; the target keeps what it held before."""
        with contextlib.suppress(OSError):  # what is still in the buffer did not fit; it is unwanted
            self._file.close()
        self._temporary.unlink(missing_ok=True)
