"""One sheet and a few facts that say what happened inside the networks, so that a person sees why a result looks wrong.

    found = inspect(model, source, driving, initial)
    write_sheet("sheet.png", explanation_sheet(found))
    print(facts(found), notes(found))

All places and distances are in pixels of the model's picture.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from dagan_rt.inspection import Inspection
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.variants import VARIANTS
from dagan_rt.training.sheets import (
    STRONGEST,
    attention_image,
    contact_sheet,
    depth_image,
    draw_points,
    enlarge,
    heat,
    mark_place,
)

CELL = 256  # pixels of a panel on the sheet
HIDDEN = 0.5  # occlusion below which a position counts as one that the source does not show
FLAT = 0.05  # a depth map that spans less says nothing about a face


class Panel(NamedTuple):
    """One picture of the sheet, and the words below it: what it is, what to look for."""

    title: str
    words: str
    picture: np.ndarray  # uint8 [CELL, CELL, 3]


def explanation_sheet(found: Inspection, pixel: tuple[int, int] | None = None) -> np.ndarray:
    """All panels in rows with their words, uint8 [height, width, 3]; `pixel` as in `panels`."""
    shown = panels(found, pixel)
    columns = min((4, 3), key=lambda count: -len(shown) % count)  # the fewest empty places
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    pictures = [[panel.picture for panel in row] for row in rows]
    captions = [[f"{panel.title}\n{panel.words}" for panel in row] for row in rows]
    return contact_sheet(pictures, cell=CELL, gap=16, captions=captions)


def panels(found: Inspection, pixel: tuple[int, int] | None = None) -> list[Panel]:
    """What the variant has, from what is given to the result.

    pixel: (x, y) of the result for which the attention is shown; None: the middle of the face. Raises InputError for
    one outside the picture.
    """
    before = [*_given(found), _transfer(found), *_depths(found), *_flow(found)]
    return [*before, *_warped(found), *_attention(found, pixel), _result(found)]


def facts(found: Inspection, pixel: tuple[int, int] | None = None) -> dict[str, str]:
    """What can be said in numbers, by subject; `pixel` as in `panels`."""
    moved, shifted = moves(found), np.linalg.norm(shifts(found), axis=-1)
    return {
        "model": f"{found.variant}, {found.size} x {found.size} pixels, {len(moved)} key points",
        "motion": _motion_fact(found),
        "key points": f"outside the picture: {', '.join(_outside_by_face(found))}, of {len(moved)} each",
        "movement": f"key points move {moved.mean():.1f} pixels on average, {moved.max():.1f} at most; "
        f"{mirrored(found)} of {len(moved)} turn their surroundings inside out",
        "flow": f"moves the picture {shifted.mean():.1f} pixels on average, {shifted.max():.1f} at most; "
        f"{_percent(outside_flow(found))} of it comes from outside the source, which is black",
        "occlusion": f"{_percent(hidden(found))} of the picture is hidden in the source (below {HIDDEN}) and made up",
        "depth": _depth_fact(found),
        "attention": _attention_fact(found, pixel),
        "result": f"{_difference(found.result, found.warped_source):.1f} of 255 levels from the warped source on "
        f"average, {_difference(found.result, found.source):.1f} from the source",
        "time": ", ".join(f"{stage} {1000 * seconds:.0f} ms" for stage, seconds in found.seconds.items()),
    }


def notes(found: Inspection) -> list[str]:
    """Sentences about what stands out and what to do about it; none where nothing does."""
    said = []
    if found.initial is not None and np.array_equal(found.initial, found.driving):
        said.append("the driving frame is the initial one, from which relative motion is measured: nothing moves")
    if count := outside(found.driving_points):
        said.append(f"{count} key points of the driving frame lie outside the picture: centre the face in the clip")
    if count := outside(found.moved_points):
        said.append(f"{count} key points are moved out of the picture: choose a portrait with more room at its sides")
    if count := mirrored(found):
        said.append(f"{count} key points turn their surroundings inside out: the face folds there")
    if not np.isfinite(found.flow).all():
        said.append("the flow is not a number everywhere: the local frame of a key point cannot be inverted")
    if hidden(found) > 0.5:
        said.append("more than half of the picture is made up: choose a portrait posed more like the driving face")
    for name, depth in (("source", found.source_depth), ("driving frame", found.driving_depth)):
        if depth is not None and np.ptp(depth) < FLAT:
            said.append(f"the depth of the {name} is flat: the depth network knows no such picture, or was not trained")
    return said


def outside(points: KeyPoints) -> int:
    """How many key points (value [K, 2]) lie outside the picture."""
    return int((np.abs(points.value) > 1).any(axis=-1).sum())


def moves(found: Inspection) -> np.ndarray:
    """How far each key point of the source moves, in pixels: [K]."""
    return np.linalg.norm(found.moved_points.value - found.source_points.value, axis=-1) * _pixels_a_unit(found)


def mirrored(found: Inspection) -> int:
    """How many key points have a motion around them that turns left to right: a local frame of negative determinant."""
    frames = found.source_points.jacobian, found.moved_points.jacobian
    return int((np.linalg.det(frames[0]) * np.linalg.det(frames[1]) < 0).sum())


def shifts(found: Inspection) -> np.ndarray:
    """How far, in pixels, and where to the flow moves what is seen at each position: (x, y), [m, m, 2]."""
    height, width = found.flow.shape[:2]
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return (np.stack([x, y], axis=-1) - found.flow) * _pixels_a_unit(found)


def outside_flow(found: Inspection) -> float:
    """The share of positions that the flow fills from outside the source, where sampling finds black alone."""
    return float((np.abs(found.flow) > 1 + 1 / found.size).any(axis=-1).mean())


def hidden(found: Inspection) -> float:
    """The share of positions that the source does not show."""
    return float((found.occlusion < HIDDEN).mean())


def _given(found: Inspection) -> list[Panel]:
    """The pictures and their key points."""
    given = {
        "Source": (found.source, found.source_points,
                   f"As the model sees it, {found.size} x {found.size} pixels. The dots are key points; most should "
                   "sit on the face."),
        "Driving frame": (found.driving, found.driving_points,
                          "Each colour should mark the same part of the face as in the source."),
    }  # fmt: skip
    if found.initial is not None and found.initial_points is not None:
        words = "Motion is measured from here: this pose should be near the source's."
        given["Initial driving frame"] = (found.initial, found.initial_points, words)
    return [
        Panel(name, words, draw_points(enlarge(picture, CELL), points.value))
        for name, (picture, points, words) in given.items()
    ]


def _depths(found: Inspection) -> list[Panel]:
    """Depth maps, both on one scale."""
    depths = {"Source depth": found.source_depth, "Driving depth": found.driving_depth}
    known = {name: depth for name, depth in depths.items() if depth is not None}
    if not known:
        return []
    least, most = min(depth.min() for depth in known.values()), max(depth.max() for depth in known.values())
    words = f"White is near. Both maps from {least:.2f} (black) to {most:.2f}. The face should stand out."
    return [
        Panel(name, words, enlarge(depth_image((depth - least) / max(most - least, 1e-6)), CELL))
        for name, depth in known.items()
    ]


def _transfer(found: Inspection) -> Panel:
    """Where key points go."""
    words = (
        f"Lines lead from the source's key points to where they go, {moves(found).mean():.1f} pixels on average. "
        "Crossing lines tear the face."
    )
    return Panel("Motion transfer", words, _moves_picture(found))


def _flow(found: Inspection) -> list[Panel]:
    """What the motion estimator makes of the key points: where to all else goes, and what is hidden."""
    shifted = np.nan_to_num(shifts(found), posinf=0, neginf=0)
    most = max(float(np.percentile(np.linalg.norm(shifted, axis=-1), 99)), 1.0)
    return [
        Panel("Dense flow", f"Colours: where to the picture moves (see the wheel), full at {most:.1f} pixels. It "
              "should be smooth on the face.", _with_wheel(enlarge(flow_image(shifted / most), CELL))),
        Panel("Occlusion", f"White: the source shows it. Black: hidden there ({_percent(hidden(found))}) and made up "
              "by the generator.", enlarge(depth_image(found.occlusion), CELL)),
    ]  # fmt: skip


def _warped(found: Inspection) -> list[Panel]:
    """What the flow does to the source, and to its feature."""
    return [
        Panel("Warped source", "The flow alone, a thin dark rim is normal. What looks wrong here comes from key points "
              "or flow, not from the generator.", enlarge(found.warped_source, CELL)),
        Panel("Warped feature", "Three principal components as red, green, blue, after warp and occlusion: what the "
              "generator is given.", enlarge(components_image(found.warped_feature), CELL, smooth=False)),
    ]  # fmt: skip


def _attention(found: Inspection, pixel: tuple[int, int] | None) -> list[Panel]:
    """Where the attention looks for one pixel, over the result."""
    if found.query is None:
        return []
    x, y = pixel or found.middle
    weights = found.attention(x, y)
    relative = weights * weights.size
    place = (2 * x / (found.size - 1) - 1, 2 * y / (found.size - 1) - 1)
    words = (
        f"Where the pixel in the ring ({x}, {y}) looks, over the result. Bar: 0 to {STRONGEST:.0f} times looking "
        f"everywhere alike; at most {relative.max():.1f}."
    )
    picture = mark_place(enlarge(attention_image(found.result, relative), CELL), place)
    return [Panel("Attention", words, _with_bar(picture))]


def _result(found: Inspection) -> Panel:
    words = f"{found.variant}, {found.motion} motion: the source with the driving face's motion."
    return Panel("Result", words, enlarge(found.result, CELL))


def flow_image(vectors: np.ndarray) -> np.ndarray:
    """Vectors (x, y) [h, w, 2] as colours, uint8 [h, w, 3]: hue by direction, full at length 1, white at 0."""
    hue = np.arctan2(vectors[..., 1], vectors[..., 0]) / (2 * np.pi) % 1
    strength = np.clip(np.linalg.norm(vectors, axis=-1), 0, 1)
    hsv = np.stack([hue, strength, np.ones_like(hue)], axis=-1) * 255
    return np.asarray(Image.fromarray(np.rint(hsv).astype(np.uint8), "HSV").convert("RGB"))


def components_image(feature: np.ndarray) -> np.ndarray:
    """The first three principal components of a feature [C, h, w] over its positions, as uint8 [h, w, 3].

    Each is stretched from its 1st to its 99th percentile; its sign makes the channel of the largest weight count up.
    """
    flat = np.nan_to_num(feature.reshape(len(feature), -1).astype(np.float64))
    centred = flat - flat.mean(axis=1, keepdims=True)
    _, axes = np.linalg.eigh(centred @ centred.T)
    axes = axes[:, :-4:-1]  # largest first
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])])
    components = np.zeros((3, flat.shape[1]))
    components[: axes.shape[1]] = axes.T @ centred
    low, high = np.percentile(components, (1, 99), axis=1)[..., None]
    levels = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1) * 255
    return np.rint(levels).astype(np.uint8).T.reshape(*feature.shape[1:], 3)


def _moves_picture(found: Inspection) -> np.ndarray:
    """The source, pale, with a line from each key point to where it goes, and a dot there."""
    pale = (255 - (255 - enlarge(found.source, CELL).astype(np.float64)) * 0.5).astype(np.uint8)
    canvas = Image.fromarray(pale)
    pen = ImageDraw.Draw(canvas)
    for places in zip(found.source_points.value, found.moved_points.value, strict=True):
        start, end = ((np.clip(place, -1.2, 1.2) + 1) / 2 * (CELL - 1) for place in places)
        pen.line([*start.tolist(), *end.tolist()], fill=(0, 0, 0), width=2)
    return draw_points(np.asarray(canvas), found.moved_points.value)


def _with_wheel(picture: np.ndarray, side: int = 49) -> np.ndarray:
    """The colours of directions in a corner: to the right of the wheel's middle is the colour of what moves right."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    wheel, inside = flow_image(np.stack([x, y], axis=-1)), x**2 + y**2 <= 1
    drawn = picture.copy()
    corner = drawn[-side - 6 : -6, -side - 6 : -6]
    corner[x**2 + y**2 <= 1.12] = 60
    corner[inside] = wheel[inside]
    return drawn


def _with_bar(picture: np.ndarray, width: int = 96, height: int = 8) -> np.ndarray:
    """The colours of attention in a corner, from none to `STRONGEST`."""
    drawn = picture.copy()
    drawn[-height - 8 : -6, 6 : width + 8] = 255
    drawn[-height - 7 : -7, 7 : width + 7] = np.rint(heat(np.linspace(0, 1, width)))
    return drawn


def _pixels_a_unit(found: Inspection) -> float:
    return (found.size - 1) / 2


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float64) - other).mean())


def _outside_by_face(found: Inspection) -> list[str]:
    faces = {"source": found.source_points, "driving": found.driving_points, "after transfer": found.moved_points}
    return [f"{name} {outside(points)}" for name, points in faces.items()]


def _motion_fact(found: Inspection) -> str:
    if found.initial_points is None:
        return "absolute: the source's key points go where the driving ones are"
    apart = np.linalg.norm(found.initial_points.value - found.source_points.value, axis=-1).mean()
    scaled = "" if found.scale == 1 else f", times {found.scale:.2f}"
    return (
        f"relative: the source's key points move as the driving ones did since the initial frame{scaled}; those of the "
        f"initial frame are {apart * _pixels_a_unit(found):.1f} pixels from the source's on average"
    )


def _depth_fact(found: Inspection) -> str:
    if found.source_depth is None or found.driving_depth is None:
        return f"none: {found.variant} has no depth network"
    ranges = [f"{depth.min():.2f} to {depth.max():.2f}" for depth in (found.source_depth, found.driving_depth)]
    return f"source {ranges[0]}, driving {ranges[1]}, where 1 is near"


def _attention_fact(found: Inspection, pixel: tuple[int, int] | None) -> str:
    if found.query is None:
        return f"none: {found.variant} has no attention"
    x, y = pixel or found.middle
    weights = found.attention(x, y)
    asked_by = {"depth": "the source's depth", "self": "the warped feature"}[str(VARIANTS[found.variant].attention)]
    row, column = np.unravel_index(weights.argmax(), weights.shape)
    cell = found.size / weights.shape[0]
    most = [(place + 0.5) * cell - 0.5 for place in (column, row)]
    ranked = np.sort(weights, axis=None)[::-1]
    half = int(np.searchsorted(np.cumsum(ranked), 0.5 * ranked.sum())) + 1
    change = np.linalg.norm(found.attended_feature - found.warped_feature) / np.linalg.norm(found.warped_feature)
    return (
        f"asked by {asked_by} at ({x}, {y}), it looks most at ({most[0]:.0f}, {most[1]:.0f}), "
        f"{weights.max() * weights.size:.1f} times as much as everywhere alike; half of it falls on "
        f"{half} of {weights.size} positions; over all it changes the feature by {_percent(float(change))}"
    )
