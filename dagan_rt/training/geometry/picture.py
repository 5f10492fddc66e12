"""What a depth network sees, beside the truth, as one sheet."""

from __future__ import annotations

import numpy as np

from dagan_rt.networks.depth import DepthNetwork
from dagan_rt.training.geometry.score import Faces, align, predict
from dagan_rt.training.sheets import contact_sheet, depth_image

ERROR_RANGE = 0.25  # head radii that are shown in full colour: about a nose


def depth_sheet(network: DepthNetwork, faces: Faces, rows: int = 6) -> np.ndarray:
    """One row a face: image | disparity as it is | relief, aligned | true relief | error; uint8 [H, W, 3].

    Reliefs share the truth's range inside the face, near is white. Error: red is too near, blue too far.
    """
    chosen = np.linspace(0, len(faces.images) - 1, min(rows, len(faces.images))).round().astype(int)
    depth = predict(network, faces.images[chosen])
    lines = []
    for own, number in zip(depth, chosen, strict=True):
        truth, mask = faces.depth[number], faces.mask[number]
        found = truth.copy()
        found[mask] = align(own[mask], truth[mask])
        near, far = truth[mask].min(), truth[mask].max()
        relief = [np.where(mask, (far - face) / max(far - near, 1e-6), 0) for face in (found, truth)]
        lines.append(
            [faces.images[number], depth_image(_stretched(1 / own)), *map(depth_image, relief),
             _signed(np.where(mask, found - truth, 0) / ERROR_RANGE)]
        )  # fmt: skip
    labels = ["image", "disparity", "relief", "true relief", f"error, {ERROR_RANGE} radii"]
    return contact_sheet(lines, column_labels=labels, cell=max(128, faces.images.shape[1]))


def _stretched(values: np.ndarray) -> np.ndarray:
    """To [0, 1] from least to largest."""
    return (values - values.min()) / max(float(values.max() - values.min()), 1e-12)


def _signed(values: np.ndarray) -> np.ndarray:
    """[-1, 1] to a picture: black at 0, red below, blue above."""
    picture = np.zeros((*values.shape, 3))
    picture[..., 0], picture[..., 2] = np.clip(-values, 0, 1), np.clip(values, 0, 1)
    return np.rint(picture * 255).astype(np.uint8)
