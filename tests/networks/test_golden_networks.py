"""The networks against the published ones: every golden array, every name and shape of the state dicts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.geometry import invert_2x2
from dagan_rt.transfer import movement_scale

DATA = Path(__file__).parents[1] / "data"
VARIANTS = ["dagan", "dagan_depth50", "dagan_spade", "fomm"]
POINTS_TOLERANCE = 1e-4
IMAGE_TOLERANCE = 1e-3


def to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


def relative(source: KeyPoints, driving: KeyPoints, initial: KeyPoints, scale: float = 1.0) -> KeyPoints:
    value = (driving.value - initial.value) * scale + source.value
    return KeyPoints(value, driving.jacobian @ torch.linalg.inv(initial.jacobian) @ source.jacobian)


@cache
def computed(golden) -> dict[str, np.ndarray]:
    """Every array of a golden file, computed by our networks, subsampled as the file is."""
    model, arrays = golden.model(), golden.arrays
    out: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        source = to_tensor(arrays["source"])
        depth = model.depth(source) if model.depth else None
        points = model.find_keypoints(source, depth)
        frames = [to_tensor(frame) for frame in arrays["driving"]]
        drivers = [model.find_keypoints(frame) for frame in frames]
        scale = movement_scale(*(KeyPoints(*(part.numpy() for part in p)) for p in (points, drivers[0])))

        out |= {"source_kp_value": points.value, "source_kp_jacobian": points.jacobian}
        if depth is not None:
            out["source_depth"] = depth[..., ::4, ::4]
            out["frame2_relative_driving_depth"] = model.depth(frames[2])[..., ::4, ::4]
            out["depth_feature"] = model.generator.encode_depth(depth)[:, ::32, ::2, ::2]
        out["source_feature"] = model.generator.encode_image(source)[:, ::32, ::2, ::2]
        for index in range(3):
            for mode, driving in (
                ("absolute", drivers[index]),
                ("relative", relative(points, drivers[index], drivers[0])),
                ("adapted", relative(points, drivers[index], drivers[0], scale)),
            ):
                name = f"frame{index}_{mode}"
                out |= {f"{name}_kp_value": driving.value, f"{name}_kp_jacobian": driving.jacobian}
                if not any(key.startswith(name) and "_kp_" not in key for key in arrays):
                    continue
                generated = model.generator(source, points, driving, depth)
                out |= {
                    f"{name}_prediction": generated.prediction[..., ::4, ::4],
                    f"{name}_flow": generated.motion.flow,
                    f"{name}_occlusion": generated.motion.occlusion,
                    f"{name}_mask": generated.motion.mask[..., ::2, ::2],
                    f"{name}_warped_feature": generated.warped_feature[:, ::32, ::2, ::2],
                    f"{name}_attended_feature": generated.attended_feature[:, ::32, ::2, ::2],
                    f"{name}_deformed_source": generated.deformed[..., ::4, ::4],
                }
        if "discriminator_map" in arrays:
            features, score = model.discriminator(frames[2], drivers[2])
            out["discriminator_map"] = score
            out |= {f"discriminator_feature{i}": f[:, ::32, ::2, ::2] for i, f in enumerate(features)}
    return {name: value.numpy() for name, value in out.items()}


def stored_arrays() -> list[tuple[str, str]]:
    names = []
    for variant in VARIANTS:
        with np.load(DATA / f"{variant}.npz") as arrays:
            names += [(variant, name) for name in arrays.files if name not in ("source", "driving")]
    return names


@pytest.mark.parametrize(("variant", "name"), stored_arrays())
def test_golden_array(golden, variant: str, name: str) -> None:
    expected, actual = golden(variant).arrays[name], computed(golden(variant))[name]
    assert actual.shape == expected.shape
    tolerance = POINTS_TOLERANCE if "_kp_" in name else IMAGE_TOLERANCE
    assert np.abs(actual - expected).max() <= tolerance


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_names_and_shapes(golden, variant: str) -> None:
    case = golden(variant)
    networks = case.model().networks()
    for name, published in case.keys.items():
        ours = {key: list(value.shape) for key, value in networks[name].state_dict().items()}
        used = {key: shape for key, (shape, _) in published.items() if not key.startswith("encoder.fc.")}
        assert ours == used


def test_inverse_matches_float64() -> None:
    matrix = torch.eye(2) + 0.3 * torch.randn(64, 15, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(invert_2x2(matrix).double(), torch.linalg.inv(matrix.double()), rtol=1e-4, atol=1e-4)
