"""Still images in and out: whatever the file holds, the library sees HWC uint8 RGB."""

from __future__ import annotations

import io
import os
import re
import warnings
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import Image, ImageOps

from dagan_rt.errors import InputError
from dagan_rt.files import AtomicFile, check_output, open_input

MAX_PIXELS = 100_000_000  # 300 MB once decoded; checked in the header, before decoding
MIN_SIDE = 16
# Named, because Pillow would otherwise also try formats that start other programs (EPS runs Ghostscript).
READABLE = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ENCODINGS = ("JPEG", "PNG", "WEBP")  # what travels between programs: `decode_image`, `encode_image`
_PILLOW = re.compile(r"PIL\.")  # its modules, as filters of warnings name them
WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image file as HWC uint8 RGB in [0, 255].

    The EXIF rotation is applied; grayscale is repeated over the channels; 16-bit samples are scaled (65535 becomes
    255); transparent pixels are laid over white; of an animation the first frame is taken.

    Raises `InputError` for a file that is missing, not an image, damaged, over `MAX_PIXELS` or under `MIN_SIDE`.
    """
    path = Path(path)
    with open_input(path, "image") as file:
        return _decode(file, f"image {path}", READABLE, MAX_PIXELS)


def is_still(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an image that `read_image` knows, damaged or not; a GIF that moves is a video.

    Raises `InputError` for a file that is missing, a folder, empty or not readable.
    """
    _silence_pillow()
    with open_input(path, "file") as file:
        try:
            with Image.open(file, formats=READABLE) as image:
                return image.format != "GIF" or getattr(image, "n_frames", 1) == 1
        except Image.UnidentifiedImageError:
            return False
        except Exception:  # of a damaged file, about every type there is
            return True


def decode_image(
    data: bytes, what: str, formats: tuple[str, ...] = ENCODINGS, most_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Read an image in memory as `read_image` does; `what` ("source", "frame") names it in errors.

    formats: of `READABLE`. Raises `InputError` for bytes that are none of them, damaged, over `most_pixels` or under
    `MIN_SIDE`; the size is known and refused before anything is decoded.
    """
    return _decode(io.BytesIO(data), what, formats, most_pixels)


def encode_image(image: np.ndarray, encoding: str, quality: int = 95) -> bytes:
    """HWC uint8 RGB as a file in memory, of a kind in `ENCODINGS`; `quality` is from 1 to 95, for JPEG and WebP."""
    check_picture(image, "image")
    if encoding not in ENCODINGS:
        raise InputError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
    if not 1 <= quality <= 95:
        raise InputError(f"quality must be 1 to 95, got {quality}")
    file = io.BytesIO()
    # PNG: the least effort is several times faster than the default and hardly larger on photographs.
    options = {"compress_level": 1} if encoding == "PNG" else {"quality": quality}
    Image.fromarray(image).save(file, encoding, **options)
    return file.getvalue()


def _decode(file: IO[bytes], what: str, formats: tuple[str, ...], most_pixels: int) -> np.ndarray:
    _silence_pillow()
    try:
        with Image.open(file, formats=formats) as image:
            _check_size(what, image.size, most_pixels)
            image.load()
            return np.ascontiguousarray(_as_rgb(what, _upright(image)))
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{what} has too many pixels: {most_pixels:,} are allowed") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{what} is not an image this program reads ({', '.join(formats)})") from None
    except Exception as error:  # Pillow's decoders raise about every type there is on damaged files
        raise InputError(f"{what} is damaged: {error or type(error).__name__}") from None


def _silence_pillow() -> None:
    """No warnings from Pillow: about damaged EXIF data, which is not needed, and sizes, bounded here.

    Once for the whole process: `warnings.catch_warnings` around each image would, in threads that decode at the same
    time, now and then leave its filter behind and swallow everybody's warnings.
    """
    if ("ignore", None, Warning, _PILLOW, 0) not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)


def _check_size(what: str, size: tuple[int, int], most_pixels: int) -> None:
    width, height = size
    if width * height > most_pixels:
        raise InputError(f"{what} has too many pixels: {width}x{height}, {most_pixels:,} are allowed")
    if min(size) < MIN_SIDE:
        raise InputError(f"{what} is {width}x{height}, too small: each side must be at least {MIN_SIDE} pixels")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data says nothing about the pixels, which are fine
        return image


def _as_rgb(what: str, image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise InputError(f"{what} holds 32-bit samples, expected 8 or 16 bits: convert it first")
        gray = ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise InputError(f"{what} holds floating-point samples, expected 8 or 16 bits: convert it first")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return np.asarray(image.convert("RGB"))


def center_square(image: np.ndarray, size: int) -> np.ndarray:
    """Crop the largest centred square of an HWC uint8 RGB image and resample it (Lanczos) to [size, size, 3]."""
    check_picture(image, "image")
    if size < 1:
        raise InputError(f"size must be at least 1, got {size}")
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    if side == size:
        return np.ascontiguousarray(square)
    # reducing_gap averages whole pixels first where the square is much larger: several times faster, no aliasing.
    resized = Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return np.array(resized)


def at_most(image: np.ndarray, longest: int) -> np.ndarray:
    """An HWC uint8 RGB image, shrunk (Lanczos) where a side has more than `longest` pixels, in its shape."""
    check_picture(image, "image")
    height, width, _ = image.shape
    if max(height, width) <= longest:
        return image
    size = (max(round(width * longest / max(height, width)), 1), max(round(height * longest / max(height, width)), 1))
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0))


def check_picture(image: np.ndarray, what: str) -> None:
    """Raise `InputError` unless `image` is a non-empty uint8 [H, W, 3] array."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"{what} must be uint8 [H, W, 3], got {got}")
    if image.size == 0:
        raise InputError(f"{what} must hold at least one pixel, got {image.shape}")


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write HWC uint8 RGB as PNG, JPEG, WebP or BMP, by the extension; the file appears whole or not at all.

    Raises `InputError` for a bad array, extension or folder, and `OSError` naming the file when the disk is full.
    """
    check_picture(image, "image")
    path = check_output(path, WRITABLE)
    file = AtomicFile(path)
    try:
        quality = {"quality": 95} if WRITABLE[path.suffix.lower()] in ("JPEG", "WEBP") else {}
        Image.fromarray(image).save(cast(IO[bytes], file), format=WRITABLE[path.suffix.lower()], **quality)
    except BaseException:
        file.discard()
        raise
    file.commit()
