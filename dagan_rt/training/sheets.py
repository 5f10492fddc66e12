"""Contact sheets: images in rows and columns with labels, for a person to judge at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dagan_rt.images import write_image

_PAPER = (250, 250, 248)
_INK = (40, 40, 40)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int = 0,
    gap: int = 4,
) -> np.ndarray:
    """Lay out images (uint8 [H, W, 3], or [H, W] for gray) in rows; returns uint8 [H, W, 3].

    Every image is scaled to `cell` pixels wide (0: the widest of them), keeping its shape. Labels are drawn to the
    left of rows and above columns. Raises ValueError when there is no image or an image has another dtype or shape.
    """
    if not rows or not any(len(row) for row in rows):
        raise ValueError("a contact sheet needs at least one image, got none")
    width = cell or max(_checked(image).shape[1] for row in rows for image in row)
    scaled = [[_scaled(_checked(image), width) for image in row] for row in rows]
    heights = [max(image.height for image in row) if row else 0 for row in scaled]
    font = _font(max(10, min(20, width // 8)))
    left = gap + (max(int(font.getlength(label)) for label in row_labels) + 2 * gap if row_labels else 0)
    top = gap + (_line_height(font) + gap if column_labels else 0)
    columns = max(len(row) for row in scaled)
    sheet = Image.new("RGB", (left + columns * (width + gap), top + sum(heights) + gap * len(heights)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        pen.text((left + column * (width + gap), gap), label, fill=_INK, font=font)
    y = top
    for number, (row, height) in enumerate(zip(scaled, heights, strict=True)):
        if number < len(row_labels):
            pen.text((gap, y + (height - _line_height(font)) // 2), row_labels[number], fill=_INK, font=font)
        for column, image in enumerate(row):
            sheet.paste(image, (left + column * (width + gap), y))
        y += height + gap
    return np.asarray(sheet)


def draw_points(image: np.ndarray, points: np.ndarray, scale: int = 1) -> np.ndarray:
    """Mark key points [K, 2] ((x, y) in [-1, 1], corner-aligned) on uint8 [H, W, 3], one hue each.

    `scale` enlarges the image first, so that the marks do not hide a small face.
    """
    height, width = image.shape[0] * scale, image.shape[1] * scale
    canvas = Image.fromarray(_checked(image)).resize((width, height), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    radius = max(1.5, width / 90)
    for number, (x, y) in enumerate(np.clip(points, -1.2, 1.2)):
        centre = ((x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1))
        box = [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]
        pen.ellipse(box, fill=_hue(number / len(points)), outline=(0, 0, 0))
    return np.asarray(canvas)


def difference_image(image: np.ndarray, other: np.ndarray, gain: float = 3.0) -> np.ndarray:
    """Absolute difference of two uint8 images, times `gain`: black where they agree. uint8 [H, W, 3]."""
    difference = np.abs(image.astype(np.float32) - other.astype(np.float32)) * gain
    return np.clip(np.rint(difference), 0, 255).astype(np.uint8)


def depth_image(disparity: np.ndarray) -> np.ndarray:
    """Disparity [H, W] in [0, 1], near = 1, as a gray uint8 [H, W, 3] whose near side is white."""
    gray = np.clip(np.rint(disparity * 255), 0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def write_sheet(path: str | Path, sheet: np.ndarray) -> None:
    """Write a sheet as PNG, complete or not at all, into a folder that is made where it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_image(path, sheet)


def _checked(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"image must be uint8 [H, W, 3] or [H, W], got {image.dtype} {tuple(image.shape)}")
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else np.ascontiguousarray(image)


def _scaled(image: np.ndarray, width: int) -> Image.Image:
    picture = Image.fromarray(image)
    if picture.width == width:
        return picture
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except (OSError, ImportError, TypeError):  # Pillow built without FreeType, or before 10.1
        return ImageFont.load_default()


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return int(font.getbbox("Ag")[3]) + 1


def _hue(fraction: float) -> tuple[int, int, int]:
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb(fraction, 0.85, 1.0)
    return int(red * 255), int(green * 255), int(blue * 255)
