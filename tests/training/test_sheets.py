"""Contact sheets: every image lands in its cell, and marks land on their key points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dagan_rt.training.sheets import (
    STRONGEST,
    attention_image,
    contact_sheet,
    depth_image,
    difference_image,
    draw_points,
    enlarge,
    heat,
    mark_place,
    write_sheet,
)


def flat(level: int, height: int = 20, width: int = 20) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def test_images_lie_in_rows_and_columns() -> None:
    sheet = contact_sheet([[flat(10), flat(20)], [flat(30), flat(40)]], gap=2)
    assert sheet.shape == (46, 46, 3) and sheet.dtype == np.uint8
    for (y, x), level in {(2, 2): 10, (2, 24): 20, (24, 2): 30, (24, 24): 40}.items():
        assert (sheet[y : y + 20, x : x + 20] == level).all()


def test_labels_take_room_beside_the_images_and_not_on_them() -> None:
    sheet = contact_sheet([[flat(10)], [flat(30)]], ["source", "result"], ["a"], gap=2)
    assert sheet.shape[0] > 46 and sheet.shape[1] > 24
    assert (sheet[-22:-2, -22:-2] == 30).all()
    assert (sheet[:, :-24] < 128).any()  # ink to the left


def test_captions_take_room_below_their_image() -> None:
    """Two rows of 120-pixel images, gap 6: a caption of three lines makes its row taller, and stays in its column."""
    rows = [[flat(10, 120, 120), flat(20, 120, 120)], [flat(30, 120, 120)]]
    long = "Title\n" + "some words that do not fit into a single line of this width " * 2
    plain = contact_sheet(rows, gap=6)
    sheet = contact_sheet(rows, gap=6, captions=[["Short", long], ["Last"]])
    assert sheet.shape[1] == plain.shape[1] == 3 * 6 + 2 * 120
    assert (sheet[6:126, 6:126] == 10).all() and (sheet[6:126, 132:252] == 20).all()
    ink = (sheet < 200).any(2)
    below = slice(126, sheet.shape[0] - 126 - 30)
    assert ink[below, 6:126].any() and ink[below, 132:252].sum() > 3 * ink[below, 6:126].sum()
    assert not ink[below, :6].any() and not ink[:, 126:132].any() and not ink[:, 252:].any()
    second = int(np.argmax((sheet[:, 6:126] == 30).all((1, 2))))  # its image begins where the first row's words end
    assert second > 200 and (sheet[second : second + 120, 6:126] == 30).all() and not ink[second - 4 : second].any()
    assert ink[second + 126 :, 6:126].any()  # and it has its own


def test_uneven_rows_and_sizes() -> None:
    sheet = contact_sheet([[flat(10, 40, 40)], [flat(30), flat(40), flat(50, 10, 20)]], cell=20, gap=0)
    assert sheet.shape == (40, 60, 3)
    assert (sheet[:20, :20] == 10).all() and (sheet[20:30, 40:] == 50).all()
    assert contact_sheet([[np.zeros((5, 5), np.uint8)]]).ndim == 3


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([[]])
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\] or \[H, W\], got float64 \(4, 4, 3\)"):
        contact_sheet([[np.zeros((4, 4, 3))]])


def test_points_are_drawn_where_they_are() -> None:
    marked = draw_points(flat(0, 101, 101), np.array([[-0.5, 0.2]]))
    ys, xs = np.nonzero(marked.any(2))
    assert (xs.mean(), ys.mean()) == pytest.approx((25, 60), abs=1)
    assert draw_points(flat(0), np.zeros((0, 2)), scale=3).shape == (60, 60, 3)


def test_a_place_is_ringed_where_it_is() -> None:
    ys, xs = np.nonzero(mark_place(flat(0, 101, 101), (0.5, -0.2)).any(2))
    assert (xs.mean(), ys.mean()) == pytest.approx((75, 40), abs=1)
    assert not mark_place(flat(0, 101, 101), (0.5, -0.2))[40, 75].any()  # what is in the ring can be seen


def test_enlarging_keeps_blocks_where_it_is_not_smooth() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    assert (enlarge(image, 8, smooth=False) == np.kron(image, np.ones((4, 4, 1), np.uint8))).all()
    assert enlarge(image, 8).shape == (8, 8, 3) and (enlarge(image, 8) != enlarge(image, 8, smooth=False)).any()


def test_heat_grows_brighter_all_along() -> None:
    colours = heat(np.linspace(-0.5, 1.5, 400))
    assert (np.diff(colours.sum(1)) >= 0).all() and colours.shape == (400, 3)
    assert colours[0].sum() < 10 and colours[-1].sum() > 600


def test_attention_is_dark_where_none_falls_and_bright_from_the_strongest_on() -> None:
    relative = np.array([[0.0, STRONGEST / 2], [STRONGEST, 100 * STRONGEST]])
    image = attention_image(flat(100, 8, 8), relative)
    assert (image[:4, :4] == 60).all()  # the picture itself, darker and gray
    assert (image[4:] == heat(np.array(1.0))).all()
    share = 0.5**0.5
    assert image[0, 7] == pytest.approx((1 - share) * 60 + share * heat(np.array(0.5)), abs=1)


def test_difference_and_depth() -> None:
    assert (difference_image(flat(10), flat(30), gain=2) == 40).all()
    assert (difference_image(flat(0), flat(255)) == 255).all()
    assert depth_image(np.array([[0.0, 0.5, 1.0]]))[0, :, 1].tolist() == [0, 128, 255]


def test_written_whole(tmp_path: Path) -> None:
    write_sheet(tmp_path / "new" / "a.png", flat(7))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    assert (np.asarray(Image.open(tmp_path / "new" / "a.png")) == 7).all()
