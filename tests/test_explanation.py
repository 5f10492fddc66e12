"""The facts are counted by hand on made-up insides, the panels are those that the variant has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dagan_rt import explanation
from dagan_rt.errors import InputError
from dagan_rt.explanation import (
    CELL,
    components_image,
    explanation_sheet,
    facts,
    flow_image,
    notes,
    panels,
    shifts,
)
from dagan_rt.inspection import Inspection, inspect
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.variants import VARIANTS

SIZE = 65  # a unit is 32 pixels


def points(*places: tuple[float, float]) -> KeyPoints:
    return KeyPoints(np.array(places, np.float32), np.tile(np.eye(2, dtype=np.float32), (len(places), 1, 1)))


def identity(side: int) -> np.ndarray:
    """A flow that leaves everything where it is."""
    axis = np.linspace(-1, 1, side)
    return np.stack(np.meshgrid(axis, axis), axis=-1).astype(np.float32)


def made(**changes: Any) -> Inspection:
    """A face of four key points that move by (3, 4) pixels; 13 x 13 positions of flow, 5 x 5 of attention."""
    rng = np.random.default_rng(0)
    source = points((0, 0), (0.5, 0), (0, 0.5), (-0.5, -0.5))
    moved = KeyPoints(source.value + np.float32([3 / 32, 4 / 32]), source.jacobian)
    picture = np.full((SIZE, SIZE, 3), 100, np.uint8)
    feature = rng.normal(size=(5, 5, 5)).astype(np.float32)
    insides: dict[str, Any] = {
        "variant": "dagan", "source": picture, "driving": picture + 20, "initial": picture + 10,
        "source_points": source, "driving_points": moved, "initial_points": source, "moved_points": moved, "scale": 1.0,
        "source_depth": np.linspace(0.1, 0.9, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE),
        "driving_depth": np.linspace(0.2, 0.7, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE),
        "flow": identity(13), "occlusion": np.ones((13, 13), np.float32), "mask": np.full((5, 13, 13), 0.2, np.float32),
        "warped_source": picture + 4, "warped_feature": feature, "attended_feature": 1.25 * feature,
        "query": np.zeros((2, 5, 5), np.float32), "key": rng.normal(size=(2, 5, 5)).astype(np.float32),
        "result": picture + 6, "seconds": {"source": 0.012, "initial": 0.001, "driving": 0.002, "motion": 0.003},
    }  # fmt: skip
    return Inspection(**insides | changes)


def test_the_facts_of_a_face_that_is_well() -> None:
    found = made()
    said = facts(found)
    assert said["model"] == "dagan, 65 x 65 pixels, 4 key points"
    assert (
        said["motion"].startswith("relative: ") and "initial frame are 0.0 pixels from the source's" in said["motion"]
    )
    assert said["key points"] == "outside the picture: source 0, driving 0, after transfer 0, of 4 each"
    assert said["movement"].startswith("key points move 5.0 pixels on average, 5.0 at most; 0 of 4 ")
    assert said["flow"].startswith("moves the picture 0.0 pixels on average, 0.0 at most; 0 % ")
    assert said["occlusion"].startswith("0 % ")
    assert said["depth"] == "source 0.10 to 0.90, driving 0.20 to 0.70, where 1 is near"
    assert said["result"] == "2.0 of 255 levels from the warped source on average, 6.0 from the source"
    assert said["time"] == "source 12 ms, initial 1 ms, driving 2 ms, motion 3 ms"
    assert notes(found) == []


def test_points_outside_and_how_far_they_go() -> None:
    found = made(
        driving_points=points((0, 0), (1.01, 0), (0, -1.5), (1, 1)),
        moved_points=points((0, 0), (0.5, 1.25), (0, 0.5), (-0.5, -0.5)),
        initial_points=points((0, 0.25), (0.5, 0.25), (0, 0.75), (-0.5, -0.25)),
        scale=1.5,
    )
    said = facts(found)
    assert said["key points"] == "outside the picture: source 0, driving 2, after transfer 1, of 4 each"
    assert said["movement"].startswith("key points move 10.0 pixels on average, 40.0 at most")
    assert "times 1.50" in said["motion"] and "8.0 pixels from the source's" in said["motion"]
    assert [note[:13] for note in notes(found)] == ["2 key points ", "1 key points "]


def test_absolute_motion_is_called_so() -> None:
    assert facts(made(initial=None, initial_points=None))["motion"].startswith("absolute: ")


def test_the_initial_frame_itself_moves_nothing() -> None:
    found = made()
    assert "nothing moves" in notes(replace(found, initial=found.driving.copy()))[0]


def test_a_frame_turned_inside_out_is_counted() -> None:
    moved = made().moved_points
    moved.jacobian[2] = [[0, 1], [1, 0]]
    moved.jacobian[3] = [[-1, 0], [0, -1]]  # half a turn, which is none
    found = made(moved_points=moved)
    assert "1 of 4 turn their surroundings inside out" in facts(found)["movement"]
    assert notes(found) == ["1 key points turn their surroundings inside out: the face folds there"]


def test_a_flow_that_takes_from_the_left_moves_the_picture_to_the_right() -> None:
    """Everything comes from a quarter unit, 8 pixels, further left and half as far below."""
    flow = identity(13) + np.float32([-0.25, 0.125])
    found = made(flow=flow)
    assert shifts(found) == pytest.approx(np.tile([8.0, -4.0], (13, 13, 1)), abs=1e-4)
    said = facts(found)["flow"]
    assert said.startswith("moves the picture 8.9 pixels on average, 8.9 at most")
    outside = (flow[..., 0] < -1 - 1 / 65) | (
        flow[..., 1] > 1 + 1 / 65
    )  # a step of the grid is a sixth: 2 rows, 1 line
    assert outside.sum() == 2 * 13 + 11 and f"; {100 * 37 / 169:.0f} % of it" in said
    assert "0 % of it" in facts(made(flow=identity(13) * np.float32(1.01)))["flow"]  # half a pixel is still seen


def test_what_is_hidden_is_counted() -> None:
    occlusion = np.ones((13, 13), np.float32)
    occlusion[:7] = 0.49
    occlusion[7] = 0.5
    found = made(occlusion=occlusion)
    assert facts(found)["occlusion"].startswith(f"{100 * 7 / 13:.0f} % ")
    assert "more than half" in notes(found)[0]


def test_a_flat_depth_is_noted() -> None:
    found = made(driving_depth=np.full((SIZE, SIZE), 0.4, np.float32))
    assert len(notes(found)) == 1 and notes(found)[0].startswith("the depth of the driving frame is flat")


def test_attention_is_told_where_it_looks() -> None:
    """A key of ln 6 at one of 25 positions, and 0 elsewhere: a weight of 6 / 30 there, 1 / 30 at each other."""
    query, key = np.zeros((2, 5, 5), np.float32), np.zeros((2, 5, 5), np.float32)
    query[0, 1, 3], key[0, 2, 0] = 1, np.log(6.1)
    found = made(query=query, key=key)
    said = facts(found, (50, 20))["attention"]
    assert "the source's depth at (50, 20), it looks most at (6, 32), 5.1 times as much" in said
    assert "half of it falls on 10 of 25 positions" in said  # 6.1 + 9 · 1 of 30.1
    assert "changes the feature by 25 %" in said
    assert "the warped feature at" in facts(replace(found, variant="dagan_sa"), (50, 20))["attention"]
    assert f"at ({found.middle[0]}, {found.middle[1]}), " in facts(found)["attention"]
    with pytest.raises(InputError, match="pixel must be"):
        panels(found, (65, 0))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("motion", ["relative", "absolute"])
def test_each_variant_has_its_panels(small_model: Any, variant: str, motion: str) -> None:
    rng = np.random.default_rng(0)
    source, driving, initial = rng.integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    found = inspect(small_model(variant), source, driving, initial if motion == "relative" else None)
    parts, shown = VARIANTS[variant], panels(found)
    titles = ["Source", "Driving frame"] + ["Initial driving frame"] * (motion == "relative") + ["Motion transfer"]
    titles += ["Source depth", "Driving depth"] * parts.uses_depth + ["Dense flow", "Occlusion"]
    titles += ["Warped source", "Warped feature"] + ["Attention"] * (parts.attention is not None) + ["Result"]
    assert [panel.title for panel in shown] == titles
    for panel in shown:
        assert panel.picture.shape == (CELL, CELL, 3) and panel.picture.dtype == np.uint8
        assert panel.words.endswith(".") and panel.words.encode("latin-1")  # what any font has
    said = facts(found)
    assert said["depth"].startswith("none: ") == (not parts.uses_depth)
    assert said["attention"].startswith("none: ") == (parts.attention is None)
    columns = 3 if len(shown) == 9 else 4
    sheet = explanation_sheet(found)
    assert sheet.shape[1] == columns * (CELL + 16) + 16
    for number, panel in enumerate(shown[:columns]):
        left = 16 + number * (CELL + 16)
        assert (sheet[16 : 16 + CELL, left : left + CELL] == panel.picture).all()


def test_the_panels_show_what_they_say(small_model: Any) -> None:
    """Each by what it is made of: the pictures, maps and marks that its words name."""
    found = made(occlusion=np.repeat(np.float32([[0], [1]]), 13, axis=1))
    shown = {panel.title: panel.picture.astype(int) for panel in panels(found, (48, 16))}
    assert (shown["Result"] == 106).all() and (shown["Warped source"] == 104).all()
    assert (shown["Source"][0] == 100).all() and (shown["Driving frame"][0] == 120).all()
    assert (shown["Initial driving frame"][0] == 110).all()
    for name, (x, y) in {
        "Source": (0.5, 0),
        "Driving frame": (0.5 + 3 / 32, 4 / 32),
        "Motion transfer": (0, 0.5),
    }.items():
        row, column = round((y + 1) / 2 * 255), round((x + 1) / 2 * 255)
        near = shown[name][row - 4 : row + 5, column - 4 : column + 5]
        assert (near != shown[name][0, 0]).any(), name
    places = [(0.5, 0), (0.5 + 3 / 32, 4 / 32)]  # a line begins at the first, a dot is at the second
    coloured = [np.ptp(shown["Motion transfer"][round((y + 1) * 127.5), round((x + 1) * 127.5)]) for x, y in places]
    assert coloured[0] == 0 and coloured[1] > 100
    assert shown["Motion transfer"][round(1 * 127.5) + 8, round(1.5 * 127.5) + 6].max() < 100  # between: the line
    assert shown["Occlusion"][0].max() == 0 and shown["Occlusion"][-1].min() == 255
    assert shown["Source depth"][0, 0].max() <= 2 and shown["Source depth"][-1, -1].min() >= 253
    assert shown["Driving depth"][0, 0, 0] == pytest.approx(0.1 / 0.8 * 255, abs=2)  # on the scale of both
    assert shown["Driving depth"][-1, -1, 0] == pytest.approx(0.6 / 0.8 * 255, abs=2)
    assert (shown["Dense flow"][:100] == 255).all()  # nothing moves
    to_the_right = made(flow=identity(13) - np.float32([0.25, 0]))
    flow = next(panel.picture for panel in panels(to_the_right) if panel.title == "Dense flow")
    assert flow[0, 0].tolist() == [255, 0, 0] and flow[255 - 6 - 24, 255 - 6 - 2].tolist()[1] < 30  # as on the wheel
    ring = (shown["Attention"] == (0, 255, 255)).all(2)
    assert ring.any() and np.argwhere(ring).mean(0) == pytest.approx([16 / 64 * 255, 48 / 64 * 255], abs=1)


def test_flow_colours_tell_directions_apart() -> None:
    right, down, left, up, still = np.array([[[1, 0], [0, 1], [-1, 0], [0, -1], [0, 0]]], float)[0]
    colours = flow_image(np.array([[right, down, left, up, still, 0.5 * right, 7 * right]]))[0].astype(int)
    assert colours[0].tolist() == [255, 0, 0] and colours[4].tolist() == [255, 255, 255]
    assert colours[5] == pytest.approx([255, 127, 127], abs=2) and (colours[6] == colours[0]).all()
    assert len({tuple(colour) for colour in colours[:5]}) == 5


def test_components_show_what_varies_most() -> None:
    """Of five channels one varies much, one less, one a little; the others are constant."""
    y, x = np.mgrid[0:8, 0:8] / 7
    feature = np.stack([0 * x, 9 * x, 0 * x + 3, -3 * y, 0.1 * (x - 0.5) * (y - 0.5)]).astype(np.float32)
    image = components_image(feature).astype(int)
    assert (np.diff(image[..., 0], axis=1) > 0).all() and (np.diff(image[..., 0], axis=0) == 0).all()
    assert (np.diff(image[..., 1], axis=0) < 0).all() and np.ptp(image[..., 1], axis=1).max() <= 1
    assert image[0, 0, 2] == 255 and image[0, 7, 2] == 0
    assert components_image(np.ones((2, 4, 4), np.float32)).shape == (4, 4, 3)


def test_what_is_not_a_number_is_said_and_drawn_all_the_same() -> None:
    flow = identity(13)
    flow[3, 4] = np.nan
    found = made(flow=flow, warped_feature=np.full((5, 5, 5), np.nan, np.float32))
    assert any("not a number" in note for note in notes(found))
    assert explanation_sheet(found).shape[1] == 4 * (CELL + 16) + 16


def test_no_caption_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """No word is wider than its panel: lines are broken between words."""
    from dagan_rt.training import sheets

    lines = []
    broken = sheets._broken

    def noted(text: str, font: Any, width: int) -> list[str]:
        found = broken(text, font, width)
        lines.extend(font.getlength(line) - width for line in found)
        return found

    monkeypatch.setattr(sheets, "_broken", noted)
    explanation_sheet(made())
    assert len(lines) > 20 and max(lines) <= 0
    assert explanation.STRONGEST == sheets.STRONGEST
