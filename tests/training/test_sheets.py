"""Contact sheets: every image lands in its cell, and marks land on their key points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dagan_rt.training.sheets import contact_sheet, depth_image, difference_image, draw_points, write_sheet


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


def test_difference_and_depth() -> None:
    assert (difference_image(flat(10), flat(30), gain=2) == 40).all()
    assert (difference_image(flat(0), flat(255)) == 255).all()
    assert depth_image(np.array([[0.0, 0.5, 1.0]]))[0, :, 1].tolist() == [0, 128, 255]


def test_written_whole(tmp_path: Path) -> None:
    write_sheet(tmp_path / "new" / "a.png", flat(7))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    assert (np.asarray(Image.open(tmp_path / "new" / "a.png")) == 7).all()
