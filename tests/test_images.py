"""Images in and out: every kind of file against values worked out by hand, and every bad file against one sentence."""

from __future__ import annotations

import io
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dagan_rt import images
from dagan_rt.errors import InputError
from dagan_rt.images import ENCODINGS, center_square, decode_image, encode_image, is_still, read_image, write_image


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    """A picture without any symmetry: red grows to the right, green downwards, blue marks the top left corner."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    image[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    image[: height // 4, : width // 4, 2] = 200
    return image


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG put together by hand, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_image(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "ppm"])
def test_lossless_formats_give_the_pixels_that_were_written(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"picture.{extension}"
    Image.fromarray(picture()).save(path)
    np.testing.assert_array_equal(read_image(path), picture())


@pytest.mark.parametrize("extension", ["jpg", "webp"])
def test_lossy_formats_come_close(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"picture.{extension}"
    smooth = picture()
    smooth[..., 2] = 90
    Image.fromarray(smooth).save(path, quality=95)
    assert np.abs(read_image(path).astype(int) - smooth).mean() < 3


def test_a_name_that_lies_about_the_format_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    Image.fromarray(picture()).save(path, format="PNG")
    np.testing.assert_array_equal(read_image(path), picture())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = picture()
    # What a camera stores so that the viewer's turn (EXIF 2.3, tag 0x0112) gives `upright` back.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    path = tmp_path / "picture.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    np.testing.assert_array_equal(read_image(path), upright)


def test_gray_is_repeated_over_the_channels(tmp_path: Path) -> None:
    gray = picture()[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png"), np.stack([gray] * 3, axis=2))


def test_black_and_white(tmp_path: Path) -> None:
    gray = picture()[..., 0] > 127
    Image.fromarray(gray).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png"), np.stack([gray * np.uint8(255)] * 3, axis=2))


@pytest.mark.parametrize("extension", ["png", "tiff"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path, extension: str) -> None:
    gray = np.linspace(0, 65535, 40 * 60).round().astype(np.uint16).reshape(40, 60)
    path = tmp_path / f"deep.{extension}"
    Image.fromarray(gray).save(path)
    expected = np.rint(gray / 257.0).astype(np.uint8)
    np.testing.assert_array_equal(read_image(path), np.stack([expected] * 3, axis=2))


def test_16_bit_colour_is_scaled_not_clipped(tmp_path: Path) -> None:
    deep = picture().astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    (tmp_path / "deep.png").write_bytes(png(60, 40, 16, 2, rows))
    np.testing.assert_allclose(read_image(tmp_path / "deep.png").astype(int), picture(), atol=1)


def test_transparent_pixels_lie_over_white(tmp_path: Path) -> None:
    layer = np.dstack([picture(), np.full((40, 60), 255, np.uint8)])
    layer[:, :20, 3] = 0
    layer[:, 20:40, 3] = 128
    Image.fromarray(layer).save(tmp_path / "layer.png")
    image = read_image(tmp_path / "layer.png").astype(int)
    assert (image[:, :20] == 255).all()
    np.testing.assert_allclose(image[:, 20:40], picture()[:, 20:40] * (128 / 255) + 255 * (127 / 255), atol=1.01)
    np.testing.assert_array_equal(image[:, 40:], picture()[:, 40:])


def test_gray_with_transparency_lies_over_white(tmp_path: Path) -> None:
    layer = np.dstack([np.full((20, 20), 50, np.uint8), np.zeros((20, 20), np.uint8)])
    layer[10:, :, 1] = 255
    Image.fromarray(layer, mode="LA").save(tmp_path / "layer.png")
    image = read_image(tmp_path / "layer.png")
    assert (image[:10] == 255).all() and (image[10:] == 50).all()


def test_palettes_with_and_without_a_transparent_colour(tmp_path: Path) -> None:
    index = np.zeros((20, 20), np.uint8)
    index[10:] = 1
    image = Image.fromarray(index, mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=0)
    plain, clear = read_image(tmp_path / "plain.png"), read_image(tmp_path / "clear.png")
    assert (plain[0, 0] == (10, 20, 30)).all() and (plain[15, 0] == (40, 50, 60)).all()
    assert (clear[0, 0] == 255).all() and (clear[15, 0] == (40, 50, 60)).all()


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (20, 20), (255, 0, 0, 0)).save(tmp_path / "ink.tiff")
    red, green, blue = read_image(tmp_path / "ink.tiff")[10, 10]
    assert red == 0 and green == 255 and blue == 255


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "moving.gif")[10, 10] == (255, 0, 0)).all()


def test_what_moves_is_no_still(tmp_path: Path) -> None:
    frames = [Image.fromarray(picture()), Image.fromarray(255 - picture())]
    for name, kept, still in [("a.png", 1, True), ("a.gif", 1, True), ("b.gif", 2, False), ("a.tiff", 2, True)]:
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:kept])
        assert is_still(tmp_path / name) == still
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    (tmp_path / "text.png").write_text("not an image")
    assert is_still(tmp_path / "cut.png") and not is_still(tmp_path / "text.png")
    for name, words in [("none.png", "none.png does not exist"), (".", "is a folder")]:
        with pytest.raises(InputError, match=words):
            is_still(tmp_path / name)


def test_bad_files_give_one_sentence_each(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(picture()).save(good)
    assert "does not exist" in error_of(tmp_path / "missing.png")
    assert "is a folder" in error_of(tmp_path)
    for name, content, expected in [
        ("empty.png", b"", "empty"),
        ("text.png", b"this is no image at all", "is not an image"),
        ("cut.png", good.read_bytes()[: good.stat().st_size // 2], "damaged"),
        ("header.png", good.read_bytes()[:8], "is not an image"),
        ("vector.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", "is not an image"),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        assert expected in error_of(path)
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert "not a regular file" in error_of(pipe)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.png"
    Image.fromarray(picture()).save(path)

    def refuse(self: Path, *_: object) -> None:  # root may read everything, so the system's answer is played
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read: Permission denied" in error_of(path)


def test_a_truncated_jpeg_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(picture(200, 200)).save(path, quality=95)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged" in error_of(path)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (15, 400), (400, 15)])
def test_too_small(tmp_path: Path, width: int, height: int) -> None:
    Image.new("RGB", (width, height)).save(tmp_path / "small.png")
    assert f"{width}x{height}, too small" in error_of(tmp_path / "small.png")


@pytest.mark.parametrize("side", [10_001, 20_000, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, 8, 2, b""))  # the header promises what the data does not hold
    assert "too many pixels" in error_of(path)


def test_32_bit_samples_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 20), 70_000, np.int32)).save(tmp_path / "deep.tiff")
    assert "32-bit" in error_of(tmp_path / "deep.tiff")
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(tmp_path / "real.tiff")
    assert "floating-point" in error_of(tmp_path / "real.tiff")


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_damaged_files_give_an_image_or_an_input_error(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"picture.{extension}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(path, **({"exif": exif} if extension in ("png", "jpg", "webp") else {}))
    good = path.read_bytes()
    chance = random.Random(7)
    refused = 0
    for _ in range(30):
        bad = bytearray(good)
        for _ in range(chance.choice((1, 4, 30))):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        path.write_bytes(bytes(bad[: chance.randrange(1, len(bad))] if chance.random() < 0.3 else bad))
        try:
            image = read_image(path)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        except InputError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (41, 60), (64, 64)])
@pytest.mark.parametrize("size", [16, 64, 100])
def test_center_square_keeps_the_middle(shape: tuple[int, int], size: int) -> None:
    height, width = shape
    side = min(shape)
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = (np.arange(width) * 4)[None]
    ramp[..., 1] = (np.arange(height) * 4)[:, None]
    square = center_square(ramp, size)
    assert square.shape == (size, size, 3) and square.dtype == np.uint8 and square.flags.c_contiguous
    # A ramp sampled at the centres of the new pixels, away from the border where a filter runs out of samples.
    centers = (np.arange(size) + 0.5) * side / size - 0.5
    inner = slice(size // 4, -size // 4)
    expected_x, expected_y = ((width - side) // 2 + centers) * 4, ((height - side) // 2 + centers) * 4
    np.testing.assert_allclose(square[size // 2, inner, 0], expected_x[inner], atol=1.5)
    np.testing.assert_allclose(square[inner, size // 2, 1], expected_y[inner], atol=1.5)


def test_shrinking_averages_instead_of_skipping() -> None:
    checkers = (np.indices((1024, 1024)).sum(0) % 2 * 255).astype(np.uint8)
    small = center_square(np.stack([checkers] * 3, axis=2), 64)
    assert np.abs(small[4:-4, 4:-4].astype(int) - 127.5).max() < 3


def test_center_square_of_the_right_size_changes_nothing() -> None:
    square = picture(64, 64)
    np.testing.assert_array_equal(center_square(square, 64), square)


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_arrays_that_are_no_pictures(tmp_path: Path, image: np.ndarray) -> None:
    with pytest.raises(InputError, match="image must"):
        center_square(image, 8)
    with pytest.raises(InputError, match="image must"):
        write_image(tmp_path / "out.png", image)


@pytest.mark.parametrize("extension", ["png", "PNG", "bmp"])
def test_written_images_read_back(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"out.{extension}"
    write_image(path, picture())
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), picture())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    current = os.umask(0)
    os.umask(current)
    assert path.stat().st_mode & 0o777 == 0o666 & ~current


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    for path, expected in [
        (tmp_path / "no" / "out.png", "does not exist"),
        (tmp_path / "out.xyz", "must end in"),
        (tmp_path / "out", "no extension"),
    ]:
        with pytest.raises(InputError, match=expected) as caught:
            write_image(path, picture())
        assert str(path.parent) in str(caught.value)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        write_image(tmp_path / "folder.png", picture())


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"what was there before")
    script = (
        "import resource, sys, numpy as np\n"
        "from dagan_rt.images import write_image\n"
        "noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n    write_image(sys.argv[1], noise)\n"
        "except OSError as error:\n    print(error.filename)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(path)
    assert path.read_bytes() == b"what was there before"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_bound_is_what_the_module_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60 - 1)
    assert "too many pixels" in error_of(tmp_path / "picture.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60)
    assert read_image(tmp_path / "picture.png").shape == (40, 60, 3)


# ----------------------------------------------------------------------------------------------------------------------
# images in memory


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_encoded_decodes(encoding: str) -> None:
    data = encode_image(picture(), encoding)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == encoding
    difference = np.abs(decode_image(data, "frame").astype(int) - picture())
    assert difference.mean() <= (0 if encoding == "PNG" else 3)


def test_quality_makes_smaller_files() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    sizes = [len(encode_image(noise, "JPEG", quality)) for quality in (10, 50, 95)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] / 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"not an image", "frame is not an image this program reads (JPEG, PNG, WEBP)"),
        (encode_image(picture(), "JPEG")[:-200], "frame is damaged"),
        (png(20_000, 20_000, 8, 2, b""), "frame has too many pixels: 1,000,000 are allowed"),
        (png(10_000, 10_000, 8, 2, b""), "frame has too many pixels: 10000x10000, 1,000,000 are allowed"),
        (png(1001, 1000, 8, 2, b""), "frame has too many pixels: 1001x1000"),
        (png(40, 2, 8, 2, b""), "frame is 40x2, too small"),
        (png(40, 40, 8, 2, b""), "frame is damaged"),
        (b"", "frame is not an image"),
    ],
)
def test_bad_bytes_give_one_sentence_each(data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        decode_image(data, "frame", most_pixels=1_000_000)


def test_only_the_formats_that_are_named_are_decoded() -> None:
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "BMP")
    with pytest.raises(InputError, match="not an image this program reads"):
        decode_image(file.getvalue(), "frame")
    with pytest.raises(InputError, match="not an image this program reads"):
        decode_image(encode_image(picture(), "PNG"), "frame", formats=("JPEG",))


@pytest.mark.parametrize(("encoding", "quality"), [("GIF", 95), ("jpeg", 95), ("JPEG", 0), ("JPEG", 96)])
def test_encodings_that_are_not_there(encoding: str, quality: int) -> None:
    with pytest.raises(InputError, match="must be"):
        encode_image(picture(), encoding, quality)
