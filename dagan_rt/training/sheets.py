"""Contact sheets: images in rows and columns with labels, for a person to judge at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dagan_rt.images import write_image

STRONGEST = 12.0
"""Weight at which the colours of attention end, in multiples of looking everywhere alike: the same on every map."""

_PAPER = (250, 250, 248)
_INK = (40, 40, 40)
_PALE = (105, 105, 105)
# Black over purple and orange to pale yellow, ever brighter: matplotlib's inferno at nine places (CC0).
_HEAT = np.array(
    [(0, 0, 4), (33, 12, 74), (87, 16, 110), (138, 34, 106), (188, 55, 84), (228, 90, 49), (249, 142, 9),
     (249, 203, 53), (252, 255, 164)], np.float64
)  # fmt: skip


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int = 0,
    gap: int = 4,
    captions: Sequence[Sequence[str]] = (),
) -> np.ndarray:
    """Lay out images (uint8 [H, W, 3], or [H, W] for gray) in rows; returns uint8 [H, W, 3].

    Every image is scaled to `cell` pixels wide (0: the widest of them), keeping its shape. Labels are drawn to the
    left of rows and above columns, captions below images, in rows as they: the first line of one is its title, the
    text after it is broken into lines where the image ends. Raises ValueError when there is no image or an image has
    another dtype or shape.
    """
    if not rows or not any(len(row) for row in rows):
        raise ValueError("a contact sheet needs at least one image, got none")
    width = cell or max(_checked(image).shape[1] for row in rows for image in row)
    scaled = [[_scaled(_checked(image), width) for image in row] for row in rows]
    texts = [_captions(captions[number] if number < len(captions) else (), width) for number in range(len(rows))]
    heights = [max(image.height for image in row) if row else 0 for row in scaled]
    below = [max((text.height + gap for text in row), default=0) for row in texts]
    font = _font(max(10, min(20, width // 8)))
    left = gap + (max(int(font.getlength(label)) for label in row_labels) + 2 * gap if row_labels else 0)
    top = gap + (_line_height(font) + gap if column_labels else 0)
    columns = max(len(row) for row in scaled)
    tall = top + sum(heights) + sum(below) + gap * len(heights)
    sheet = Image.new("RGB", (left + columns * (width + gap), tall), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        pen.text((left + column * (width + gap), gap), label, fill=_INK, font=font)
    y = top
    for number, (row, height) in enumerate(zip(scaled, heights, strict=True)):
        if number < len(row_labels):
            pen.text((gap, y + (height - _line_height(font)) // 2), row_labels[number], fill=_INK, font=font)
        for column, image in enumerate(row):
            sheet.paste(image, (left + column * (width + gap), y))
        for column, text in enumerate(texts[number]):
            sheet.paste(text, (left + column * (width + gap), y + height + gap))
        y += height + below[number] + gap
    return np.asarray(sheet)


def _captions(captions: Sequence[str], width: int) -> list[Image.Image]:
    """Each as a picture of this width, as tall as it takes."""
    font = _font(max(10, min(14, width // 16)))
    step = _line_height(font) + 2
    drawn = []
    for caption in captions:
        title, *body = caption.split("\n")
        lines = [(title, _INK), *((line, _PALE) for text in body for line in _broken(text, font, width))]
        picture = Image.new("RGB", (width, step * len(lines)), _PAPER)
        pen = ImageDraw.Draw(picture)
        for number, (line, ink) in enumerate(lines):
            pen.text((0, step * number), line, fill=ink, font=font)
        drawn.append(picture)
    return drawn


def _broken(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines that are at most `width` pixels long; a single word that is longer stays whole."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


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


def mark_place(image: np.ndarray, place: tuple[float, float]) -> np.ndarray:
    """A ring around a place ((x, y) in [-1, 1], corner-aligned) on uint8 [H, W, 3]."""
    canvas = Image.fromarray(_checked(image))
    pen = ImageDraw.Draw(canvas)
    x, y = ((value + 1) / 2 * (side - 1) for value, side in zip(place, canvas.size, strict=True))
    for radius, colour in ((7, (0, 0, 0)), (6, (0, 255, 255)), (5, (0, 0, 0))):
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], outline=colour)
    return np.asarray(canvas)


def enlarge(image: np.ndarray, side: int, smooth: bool = True) -> np.ndarray:
    """An image, uint8 [H, W, 3], as [side, side, 3]; not `smooth`: every pixel stays a block of one colour."""
    kind = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(_checked(image)).resize((side, side), kind))


def heat(strength: np.ndarray) -> np.ndarray:
    """Colours of values [...] in [0, 1], clipped, from black to bright yellow: float64 [..., 3] in [0, 255]."""
    places = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(strength, places, _HEAT[:, channel]) for channel in range(3)], axis=-1)


def attention_image(image: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """Attention [h, w] in colours over a gray `image`, uint8 [H, W, 3]; a weight covers the pixels of its cell.

    relative: weights in multiples of looking everywhere alike; the colours end at `STRONGEST`.
    """
    repeats = [large // small for large, small in zip(image.shape[:2], relative.shape, strict=True)]
    strength = np.kron(np.clip(relative / STRONGEST, 0, 1), np.ones(repeats))
    cover = np.sqrt(strength)[..., None]  # faint attention should be seen, and none should leave the picture as it is
    gray = image.mean(2, keepdims=True)
    return np.rint((1 - cover) * 0.6 * gray + cover * heat(strength)).astype(np.uint8)


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
