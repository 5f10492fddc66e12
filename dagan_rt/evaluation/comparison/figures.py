"""Pictures for a person to judge: attention maps as in the supplementary's Figure 3, results as in its Figures 4 and 5.

Rows are the first image sets of the first clips: nothing is picked by how it looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dagan_rt.evaluation.comparison.attention import Attention, attention_of
from dagan_rt.evaluation.sets import ImageSet
from dagan_rt.inspection import pixels, planes
from dagan_rt.networks.model import Model
from dagan_rt.training.data import Clips, Frame
from dagan_rt.training.sheets import (
    STRONGEST,
    attention_image,
    contact_sheet,
    depth_image,
    draw_points,
    enlarge,
    heat,
    mark_place,
    write_sheet,
)

CELL = 160  # pixels of a picture on a sheet
QUERIES = {"eye": (36, 37, 38, 39, 40, 41), "mouth": (60, 62, 64, 66), "cheek": (2, 31, 48)}
"""Where the attention is asked from: the mean of these true landmarks; and "background", a corner of the picture."""

CORNER = (0.88, -0.88)


def write_reenactments(path: Path, models: Mapping[str, Model], clips: Clips, sets: Sequence[ImageSet]) -> None:
    """A row an image set: source and driving frame with key points, their depths, and what each variant makes of them.

    Key points and depth are those of dagan where it is there, else of the first variant that has them. Depth is drawn
    on one scale all over the sheet, black at its smallest and white at its largest value.
    """
    shown = models.get("dagan", next(iter(models.values())))
    frames = [(_frame(clips, it.source_clip, it.source_frame), _frame(clips, it.driving_clip, it.driving_frame))
              for it in sets]  # fmt: skip
    with torch.no_grad():
        depths = [[_depth(shown, frame) for frame in pair] for pair in frames]
        everything = [depth for pair in depths for depth in pair if depth is not None]
        least, most = (np.min(everything), np.max(everything)) if everything else (0.0, 1.0)
        lines = []
        for (source, driving), pair in zip(frames, depths, strict=True):
            line = [_pointed(shown, source), _pointed(shown, driving)]
            line += [depth_image((depth - least) / max(most - least, 1e-6)) for depth in pair if depth is not None]
            lines.append(line + [_result(model, source, driving) for model in models.values()])
    labels = ["source", "driving"] + (["source depth", "driving depth"] if everything else [])
    write_sheet(path, contact_sheet(lines, column_labels=[*labels, *models], cell=CELL))


def write_attention(path: Path, models: Mapping[str, Model], clips: Clips, sets: Sequence[ImageSet]) -> None:
    """Of each self-reenactment set a row a variant with attention: where it looks from each of four places.

    Maps lie over the variant's own result, in grey. Colours are the weight in multiples of looking everywhere alike, up
    to `STRONGEST`; the ring is the place asked from, in the driving frame's geometry, as are the maps.
    """
    attentive = {name: model for name, model in models.items() if model.config.parts.attention}
    lines, labels = [], []
    for it in sets:
        source, driving = (_frame(clips, it.source_clip, frame) for frame in (it.source_frame, it.driving_frame))
        queries = _queries(driving)
        for name, model in attentive.items():
            attention = attention_of(model, planes(source.image), planes(driving.image))
            maps = [_map(attention, place) for place in queries.values()]
            lines.append([enlarge(source.image, CELL), enlarge(driving.image, CELL), *maps])
            labels.append(name)
    titles = ["source", "driving", *(f"from {query}" for query in (*QUERIES, "background"))]
    sheet = contact_sheet(lines, labels, titles, cell=CELL)
    write_sheet(path, np.concatenate([sheet, _scale(sheet.shape[1])]))


def _map(attention: Attention, place: tuple[float, float]) -> np.ndarray:
    """The weights of the query at a place over the result in grey, with a ring at the place."""
    weights = attention.weights[0].numpy()
    row, column = _cell(place, *weights.shape[:2])
    relative = weights[row, column] * weights[row, column].size
    return mark_place(enlarge(attention_image(pixels(attention.prediction), relative), CELL), place)


def _queries(frame: Frame) -> dict[str, tuple[float, float]]:
    assert frame.landmarks is not None
    named = {name: frame.landmarks[list(group)].mean(0) for name, group in QUERIES.items()}
    return {name: (float(x), float(y)) for name, (x, y) in named.items()} | {"background": CORNER}


def _cell(place: tuple[float, float], height: int, width: int) -> tuple[int, int]:
    """Row and column of the position nearest to a place on the corner-aligned grid."""
    column, row = ((value + 1) / 2 * (side - 1) for value, side in zip(place, (width, height), strict=True))
    return int(np.clip(round(row), 0, height - 1)), int(np.clip(round(column), 0, width - 1))


def _scale(width: int) -> np.ndarray:
    """The colours and what they mean, as a strip to go below a sheet: uint8 [height, width, 3]."""
    bar = np.rint(heat(np.tile(np.linspace(0, 1, 240), (14, 1)))).astype(np.uint8)
    labelled = contact_sheet([[bar]], ["attention, even = 1:  0"], cell=240)
    end = contact_sheet([[np.full((14, 120, 3), 250, np.uint8)]], [f"{STRONGEST:.0f} and more"], cell=120)
    height = max(labelled.shape[0], end.shape[0])
    strip = np.full((height, width, 3), labelled[0, 0], np.uint8)
    left = 0
    for part in (labelled, end):
        part = part[:, : width - left]
        strip[: part.shape[0], left : left + part.shape[1]] = part
        left += part.shape[1]
    return strip


def _pointed(model: Model, frame: Frame) -> np.ndarray:
    points = model.find_keypoints(planes(frame.image)).value[0].numpy()
    return draw_points(frame.image, points, max(1, CELL // frame.image.shape[0] + 1))


def _depth(model: Model, frame: Frame) -> np.ndarray | None:
    return model.depth(planes(frame.image))[0, 0].numpy() if model.depth is not None else None


def _result(model: Model, source: Frame, driving: Frame) -> np.ndarray:
    return enlarge(pixels(model(planes(source.image), planes(driving.image)).prediction), CELL)


def _frame(clips: Clips, clip: int, frame: int) -> Frame:
    return clips.read(clip, [frame])[0]
