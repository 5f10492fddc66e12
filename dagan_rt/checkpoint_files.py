"""Read a file of weights that somebody else made: nothing in it runs, and whatever is wrong gets its sentence."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError, require

# What a file starts with, and what to tell the person who passed it as a checkpoint.
SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file it stands for: run git lfs pull and try again"),
    (b"\x89PNG", "is a PNG image, not a checkpoint"),
    (b"\xff\xd8\xff", "is a JPEG image, not a checkpoint"),
    (b"GIF8", "is a GIF image, not a checkpoint"),
    (b"%PDF", "is a PDF document, not a checkpoint"),
    (b"\x89HDF", "is an HDF5 file (Keras?), not a PyTorch checkpoint"),
    (b"\x93NUMPY", "is a NumPy array, not a PyTorch checkpoint"),
    (b"\x1f\x8b", "is gzip-compressed: unpack it and give the checkpoint inside"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it and give the checkpoint inside"),
    (b"Rar!", "is a RAR archive: unpack it and give the checkpoint inside"),
)
MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml")


def read_weights(path: Path) -> Any:
    """Return what `torch.save` stored in the file, on the CPU, memory-mapped where the format allows.

    Only tensors and plain Python values are read (`weights_only=True`); a file that asks for more is refused.
    Raises InputError for anything that is not a readable file of weights.
    """
    torch = require("torch", extra="export", why="reading a checkpoint")
    check_is_torch_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # an unpickler fed foreign bytes can fail with nearly every exception there is
        raise InputError(f"{path} {_why_refused(path, error)}") from error


def check_is_torch_file(path: Path) -> None:
    """Raise InputError, saying what the file looks like, unless it may be a file that `torch.save` wrote."""
    if path.is_dir():
        raise InputError(f"{path} {_what_folder(path)}")
    if not path.is_file():
        raise InputError(f"{path} does not exist" if not path.exists() else f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    foreign = what_else(path, head)
    if foreign:
        raise InputError(f"{path} {foreign}")


def what_else(path: Path, head: bytes) -> str | None:
    """Say what a file is that torch.load cannot read, from its first bytes; None when it may be a checkpoint."""
    if not head:
        return "is empty (0 bytes): the download or copy did not finish"
    for magic, sentence in SIGNATURES:
        if head.startswith(magic):
            return sentence
    if head[:4] == b"RIFF" or head[4:8] == b"ftyp":
        return "is an image or video, not a checkpoint"
    if head.lstrip().lower().startswith(MARKUP):
        return "is an HTML page, not a checkpoint: a download link that answered with a web page, so download it again"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "is a safetensors file: give the published .pth.tar file (torch.save)"
    if path.suffix == ".onnx" or re.match(rb"\x08[\x01-\x20]\x12.{1,2}(pytorch|onnx)", head, re.DOTALL):
        return "is an ONNX graph, which holds no named weights to load: give the .pth.tar file it was exported from"
    if head.startswith(b"PK"):
        return _what_zip(path)
    if head[257:262] == b"ustar":
        return "is a real tar archive: unpack it and give the checkpoint inside"
    if head[0] == 0x80:  # the pickle protocol mark: torch.save before 1.6
        return None
    text = head.decode("utf-8", "replace")
    if all(character.isprintable() or character.isspace() for character in text) and "\ufffd" not in text[:-1]:
        return f"is a text file, not a checkpoint (it starts with {text[:40]!r})"
    return "is not a PyTorch checkpoint (neither the zip nor the pickle format of torch.save)"


def _what_zip(path: Path) -> str | None:
    if not zipfile.is_zipfile(path):
        return f"is cut short at {path.stat().st_size:,} bytes (the directory at its end is missing): download it again"
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [Path(entry.filename).name for entry in entries]
    if "constants.pkl" in names:
        return "is a TorchScript program (torch.jit.save), not a checkpoint of state dicts"
    if "data.pkl" not in names:
        return f"is a zip archive, not a checkpoint: unpack it (it holds {', '.join(names[:3])})"
    if sum(entry.file_size for entry in entries) > path.stat().st_size:  # torch.save never compresses; a zip bomb does
        return "is a compressed zip, which torch.save never writes: save it again with torch.save"
    return None


def _what_folder(path: Path) -> str:
    if (path / "manifest.json").is_file():
        return "is an exported bundle, not a checkpoint file"
    if (path / "encoder.pth").is_file() or (path / "depth.pth").is_file():
        return "is a depth network's folder: give the generator's .pth.tar file, and this folder as depth (--depth)"
    return "is a folder: give the .pth.tar file in it"


def _why_refused(path: Path, error: Exception) -> str:
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted:
        return (
            f"asks for the Python object {wanted[1]} while it is read, which plain weights never need: "
            "refused, nothing was run (if you trust its author, ask for its state dicts alone)"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"is damaged or cut short at {path.stat().st_size:,} bytes ({reason[:120]}): download it again"
