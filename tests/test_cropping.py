"""Squares around faces: where they lie, what is cut out of them, and how a face is followed through a clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from threading import Event
from time import sleep

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from dagan_rt.cropping import EVERY, MARGIN, MISSES, PAUSE, Follower, Square, around, center, choose, first_face, follow
from dagan_rt.errors import InputError
from dagan_rt.faces import Face
from dagan_rt.images import center_square
from dagan_rt.video import Frame


def face(left: float, top: float, right: float, bottom: float, score: float = 0.9) -> Face:
    return Face(np.array([left, top, right, bottom], np.float32), score)


# ---------------------------------------------------------------------------------------------------------------------
# Squares


@pytest.mark.parametrize(("height", "width"), [(80, 60), (61, 90), (64, 64)])
def test_the_centred_square_is_that_of_the_rest_of_the_library(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for size in (32, 60, 100):
        np.testing.assert_array_equal(center(width, height).cut(image, size), center_square(image, size))


def test_a_square_has_the_margin_of_training_clips_around_the_box() -> None:
    assert around(np.array([100, 80, 140, 130]), 640, 480) == (120 - 45, 105 - 45, 90)
    assert MARGIN == 0.4  # as `dagan-rt prepare` crops
    left, top, side = around(np.array([0, 80, 40, 130]), 640, 480)
    assert (left, top, side) == (0, 60, 90)  # moved inside
    assert around(np.array([10, 10, 90, 90]), 100, 400).side == 100  # as large as there is room


@given(some.tuples(*[some.floats(0, 1)] * 4), some.integers(16, 300), some.integers(16, 300))
def test_squares_are_inside_the_picture_whole_ones_too(edges: tuple[float, ...], width: int, height: int) -> None:
    (left, right), (top, bottom) = sorted(edges[:2]), sorted(edges[2:])
    box = np.array([left * width, top * height, right * width + 1, bottom * height + 1])
    square = around(box, width, height)
    for found in (square, square.whole()):
        assert found.left >= 0 and found.left + found.side <= width + 1e-9
        assert found.top >= 0 and found.top + found.side <= height + 1e-9
    whole = square.whole()
    assert all(isinstance(number, int) for number in whole) and square.side - 1 < whole.side <= square.side
    assert abs(whole.left + whole.side / 2 - square.left - square.side / 2) <= 1


@pytest.mark.parametrize("square", [Square(10.3, 20.7, 50.5), Square(10, 20, 50), Square(3.9, 0.2, 96.0)])
def test_places_between_pixels_are_resampled(square: Square) -> None:
    """A picture whose red is x and whose green is y tells where every pixel of the result came from."""
    y, x = np.mgrid[:100, :120].astype(np.uint8)
    found = square.cut(np.stack([x, y, np.zeros_like(x)], -1), 32)
    places = (np.arange(32) + 0.5) * square.side / 32 - 0.5  # centres of the result's pixels
    inner = slice(3, -3)
    np.testing.assert_allclose(found[16, inner, 0], (square.left + places)[inner], atol=1)
    np.testing.assert_allclose(found[inner, 16, 1], (square.top + places)[inner], atol=1)
    assert abs(float(found[16, inner, 0].mean()) - float((square.left + places)[inner].mean())) < 0.2


# ---------------------------------------------------------------------------------------------------------------------
# Which face


def test_faces_are_chosen_by_size_or_from_the_left() -> None:
    small, large, middle = face(200, 0, 220, 20), face(100, 0, 160, 60), face(0, 0, 40, 40)
    faces = [small, large, middle]
    assert choose(faces, "largest", "it") == [large]
    assert choose(faces, "all", "it") == [middle, large, small]
    assert [choose(faces, number, "it")[0] for number in (1, "2", 3)] == [middle, large, small]
    for number in (0, "4"):
        with pytest.raises(InputError, match=f"--face must be from 1 to 3, the faces found in a.png, got {number}"):
            choose(faces, number, "a.png")
    with pytest.raises(InputError, match="no face was found in a.png: choose center as the crop, or"):
        choose([], "largest", "a.png")


# ---------------------------------------------------------------------------------------------------------------------
# Followed through a clip


def clip(count: int, width: int = 640, height: int = 360) -> Iterator[Frame]:
    """Frames whose first pixels hold their number."""
    for number in range(count):
        image = np.zeros((height, width, 3), np.uint8)
        image[0, 0, 0], image[0, 0, 1] = number % 256, number // 256
        yield Frame(image, Fraction(number, 25), Fraction(1, 25))


def number_of(image: np.ndarray) -> int:
    return int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])


class Scripted:
    """A detector that knows where the faces are in each frame, and which frames it was shown."""

    def __init__(self, boxes: Sequence[Sequence[Sequence[float]]]) -> None:
        self.boxes, self.seen = boxes, []  # type: ignore[var-annotated]

    def __call__(self, image: np.ndarray) -> list[Face]:
        number = number_of(image)
        self.seen.append(number)
        return [face(*box) for box in self.boxes[number]]


def box_at(x: float, y: float = 180, side: float = 80) -> list[float]:
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def followed(detector: Scripted, first: Sequence[float]) -> list[Square]:
    found = list(follow(clip(len(detector.boxes)), detector, np.array(first)))
    assert [number_of(frame.image) for frame, _ in found] == list(range(len(detector.boxes)))
    return [square for _, square in found]


def middles(squares: Sequence[Square]) -> np.ndarray:
    return np.array([(square.left + square.side / 2, square.top + square.side / 2) for square in squares])


def test_a_face_that_stands_still_keeps_its_square() -> None:
    detector = Scripted([[box_at(300)]] * 23)
    assert all(
        square == pytest.approx(around(np.array(box_at(300)), 640, 360)) for square in followed(detector, box_at(300))
    )
    assert detector.seen == list(range(0, 23, EVERY))


def test_one_that_walks_is_followed() -> None:
    path = [160 + 3.0 * number for number in range(100)]  # a side of the box a second
    found = middles(followed(Scripted([[box_at(x)] for x in path]), box_at(path[0])))
    assert np.abs(found[:, 0] - path).max() < 0.35 * 80  # well inside the margin
    assert (np.diff(found[:, 0]) >= 0).all() and np.abs(found[:, 1] - 180).max() < 1e-6


def test_boxes_that_tremble_give_steady_squares() -> None:
    rng = np.random.default_rng(0)
    boxes = [[list(np.array(box_at(300)) + rng.normal(0, 3, 4))] for _ in range(200)]
    found = followed(Scripted(boxes), boxes[0][0])
    steps = np.abs(np.diff(middles(found)[25:], axis=0)).mean()
    raw = (
        np.abs(np.diff(middles([around(np.array(box), 640, 360) for (box,) in boxes[::EVERY]]), axis=0)).mean() / EVERY
    )
    assert steps < 0.5 * raw


def test_the_size_is_followed_too() -> None:
    sides = [60 + 0.4 * number for number in range(100)]
    found = followed(Scripted([[box_at(300, side=side)] for side in sides]), box_at(300, side=sides[0]))
    np.testing.assert_allclose([square.side / (1 + 2 * MARGIN) for square in found], sides, rtol=0.08)


def test_a_face_that_is_missed_for_a_while_is_waited_for() -> None:
    boxes = [[box_at(300)] for _ in range(40)]
    for number in (10, 15):
        boxes[number] = [box_at(600, 60, 100)]  # somebody else, larger
    found = followed(Scripted(boxes), box_at(300))
    assert np.ptp(middles(found), axis=0).max() < 1e-6


def test_a_face_that_is_gone_gives_way_to_the_largest() -> None:
    cut = 4 * EVERY
    other = [box_at(500, side=60), box_at(150, 100, side=120)]
    detector = Scripted([[box_at(300)]] * cut + [other] * 40)
    found = middles(followed(detector, box_at(300)))
    taken = cut + MISSES * EVERY  # of the detections there, the last that waits is at taken - EVERY
    np.testing.assert_allclose(found[:taken], [[300, 180]] * taken)
    expected = around(np.array(other[1]), 640, 360)
    np.testing.assert_allclose(found[taken:], middles([expected] * (len(found) - taken)))


def test_nobody_in_sight_leaves_the_square_where_it_is() -> None:
    detector = Scripted([[box_at(300)]] * 6 + [[]] * 60)
    assert np.ptp(middles(followed(detector, box_at(300))), axis=0).max() < 1e-6


def test_of_two_faces_the_one_followed_stays_the_one_followed() -> None:
    boxes = [[box_at(500 - 2 * number, side=100), box_at(200 + 2 * number)] for number in range(45)]
    found = middles(followed(Scripted(boxes), box_at(200)))
    assert abs(found[-1, 0] - 288) < 25


def test_few_frames_are_held_back() -> None:
    taken = 0

    def counted() -> Iterator[Frame]:
        nonlocal taken
        for frame in clip(40):
            taken += 1
            yield frame

    for given_back, _ in enumerate(follow(counted(), Scripted([[box_at(300)]] * 40), np.array(box_at(300)))):
        assert taken - given_back <= EVERY + 1


def test_the_first_face_is_looked_for() -> None:
    boxes: list[list[list[float]]] = [[] for _ in range(40)]
    boxes[20] = [box_at(100, side=30), box_at(300)]
    detector = Scripted(boxes)
    np.testing.assert_array_equal(first_face((frame.image for frame in clip(40)), detector, "it"), box_at(300))
    assert detector.seen == list(range(0, 21, EVERY))
    with pytest.raises(InputError, match="no face was found in a.mp4: choose center as the crop"):
        first_face((frame.image for frame in clip(12)), Scripted([[]] * 12), "a.mp4")


def test_the_first_frame_with_as_many_faces_says_which_is_which() -> None:
    boxes = [[box_at(300, side=90)]] * 10 + [[box_at(500, side=30), box_at(300)]] * 10
    images = lambda: (frame.image for frame in clip(20))  # noqa: E731
    for which, first in (("largest", boxes[0][0]), (1, boxes[0][0]), ("2", box_at(500, side=30))):
        np.testing.assert_array_equal(first_face(images(), Scripted(boxes), "it", which), first)
    with pytest.raises(InputError, match="--driving-face must be from 1 to 2, the faces found in a.mp4, got 3"):
        first_face(images(), Scripted(boxes), "a.mp4", "3")


# ---------------------------------------------------------------------------------------------------------------------
# Followed in a camera's pictures


def live(detector: Scripted, rate: float = 25.0, which: str = "largest") -> list[Square | None]:
    follower = Follower(detector, which)
    return [follower(frame.image, 100 + number / rate) for number, frame in enumerate(clip(len(detector.boxes)))]


def test_a_camera_is_searched_now_and_then_and_every_picture_has_a_square(searched_at_once: None) -> None:
    detector = Scripted([[]] * 7 + [[box_at(300)]] * 40)
    found = live(detector)
    assert detector.seen[0] == 0 and set(np.diff(detector.seen)) <= {5, 6}  # of 25 a second, and rounded
    assert PAUSE == 5 / 25
    first = next(number for number in detector.seen if number >= 7)
    assert found[:first] == [None] * first
    assert all(square == pytest.approx(around(np.array(box_at(300)), 640, 360)) for square in found[first:])


def test_the_square_follows_a_face_without_holding_pictures_back(searched_at_once: None) -> None:
    """It lags by the pause and the filter, stays about the face, and moves by little at a time."""
    path = [200 + 2.0 * number for number in range(100)]  # 50 pixels a second: 0.6 sides of the box
    squares = [square for square in live(Scripted([[box_at(x)] for x in path])) if square is not None]
    lag = np.array(path) - middles(squares)[:, 0]
    assert len(squares) == 100 and lag.min() >= -1e-6 and lag.max() < 0.35 * 80  # well inside the margin
    assert np.abs(np.diff(middles(squares), axis=0)).max() < 0.1 * 80


def test_somebody_else_is_followed_only_when_the_face_is_gone(searched_at_once: None) -> None:
    both, other = [box_at(300), box_at(520, side=120)], [box_at(520, side=120)]
    squares = live(Scripted([both] * 20 + [other] * 40), which="1")
    at = middles([square for square in squares if square is not None])[:, 0]
    assert at[0] == 300 and at[20] == 300 and at[-1] == 520
    moved = int(np.flatnonzero(at != 300)[0])
    assert 20 + MISSES * PAUSE * 25 <= moved <= 20 + (MISSES + 1) * PAUSE * 25 + 1
    assert (at[moved:] == 520).all()  # at once
    assert live(Scripted([both] * 8), which="3") == [None] * 8


def test_no_picture_waits_for_a_search() -> None:
    """One search at a time; what it found counts from the next picture on; what it raises is raised."""
    allowed, begun = Event(), Event()
    searched: list[int] = []

    def slow(image: np.ndarray) -> list[Face]:
        searched.append(number_of(image))
        begun.set()
        assert allowed.wait(10)
        if len(searched) > 1:
            raise InputError("the detector is broken")
        return [face(*box_at(300))]

    follower = Follower(slow)
    pictures = [frame.image for frame in clip(100)] * 30
    assert [follower(image, number) for number, image in enumerate(pictures[:20])] == [None] * 20
    assert begun.wait(10) and searched == [0]
    allowed.set()
    found = next(square for number in range(20, 1500) if (square := patiently(follower, pictures[number], number)))
    assert found == pytest.approx(around(np.array(box_at(300)), 640, 360))
    with pytest.raises(InputError, match="the detector is broken"):
        for number in range(1500, 3000):
            patiently(follower, pictures[number], number)


def patiently(follower: Follower, image: np.ndarray, time: float) -> Square | None:
    sleep(0.005)
    return follower(image, time)
