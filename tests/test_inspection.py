"""What is shown of the networks is what happens in them: against the runtime, and against loops in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt import Reenactor
from dagan_rt.backends.torch import TorchBackend
from dagan_rt.benchmarking.subjects import described
from dagan_rt.errors import InputError
from dagan_rt.inspection import Inspection, inspect
from dagan_rt.networks.model import Model
from dagan_rt.networks.variants import VARIANTS
from dagan_rt.training.heads import HELD_OUT, draw_clip

ATTENTIVE = [name for name, variant in VARIANTS.items() if variant.attention]


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    """A portrait, and two frames of somebody else."""
    clip = draw_clip(HELD_OUT[1], 30, 64).frames
    return {"source": draw_clip(HELD_OUT[0], 1, 64).frames[0], "driving": clip[29], "initial": clip[0]}


def vivid(model: Model) -> Model:
    """The same networks with contrast in their images, sharp attention, and little that is symmetric."""
    generator = model.generator
    last = [layer for layer in generator.modules() if isinstance(layer, torch.nn.Conv2d) and layer.out_channels == 3]
    with torch.no_grad():
        last[-1].weight.mul_(40)
        generator.dense_motion_network.mask.weight.mul_(20)
        generator.dense_motion_network.occlusion.weight.mul_(5)
        if model.config.parts.attention:
            module = generator.AttnModule
            module.gamma.fill_(0.7)
            for layer in (module.query_conv, module.key_conv, module.value_conv):
                layer.weight.mul_(20)
                layer.bias.add_(torch.linspace(-1, 2, len(layer.bias)))  # some of it cut off by the ReLU
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("motion", "adapt_scale", "motion_scale"),
    [("absolute", False, 1.0), ("relative", False, 1.0), ("relative", True, 1.0), ("relative", False, 0.5)],
)
def test_the_result_is_that_of_the_runtime(
    small_model: Any,
    pictures: dict[str, np.ndarray],
    variant: str,
    motion: str,
    adapt_scale: bool,
    motion_scale: float,
) -> None:
    model = vivid(small_model(variant))
    reenactor = Reenactor(described(model.config), TorchBackend(model), motion, adapt_scale, motion_scale=motion_scale)
    reenactor.set_source(pictures["source"])
    if motion == "relative":
        reenactor.drive(pictures["initial"])
    expected = reenactor.drive(pictures["driving"])
    initial = pictures["initial"] if motion == "relative" else None
    options: dict[str, Any] = {"adapt_scale": adapt_scale, "motion_scale": motion_scale}
    found = inspect(model, pictures["source"], pictures["driving"], initial, **options)
    assert found.motion == motion and (found.scale == motion_scale) == (not adapt_scale)
    difference = np.abs(found.result.astype(int) - expected)
    assert (
        difference.max() <= 2 and difference.mean() < 0.05
    )  # the runtime subtracts the initial points, then adds them
    other = inspect(
        model, pictures["source"], pictures["driving"], None if initial is not None else pictures["initial"]
    )
    assert (
        np.abs(found.result.astype(int) - other.result).mean() > 10 * difference.mean() + 0.2
    )  # it tells motions apart


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_ranges(small_model: Any, pictures: dict[str, np.ndarray], variant: str) -> None:
    model = small_model(variant)
    found = inspect(model, **pictures)
    K, C, D = model.config.num_keypoints, 16, 4
    shapes = {
        "flow": (16, 16, 2), "occlusion": (16, 16), "mask": (K + 1, 16, 16), "warped_feature": (C, 16, 16),
        "attended_feature": (C, 16, 16), "warped_source": (64, 64, 3), "result": (64, 64, 3),
        "source_depth": (64, 64), "driving_depth": (64, 64), "query": (D, 16, 16), "key": (D, 16, 16),
    }  # fmt: skip
    parts = VARIANTS[variant]
    absent = {"source_depth", "driving_depth"} if not parts.uses_depth else set()
    absent |= {"query", "key"} if parts.attention is None else set()
    for name, shape in shapes.items():
        value = getattr(found, name)
        if name in absent:
            assert value is None
        else:
            assert value.shape == shape and value.dtype == (
                np.uint8 if len(shape) == 3 and shape[2] == 3 else np.float32
            )
    for points in (found.source_points, found.driving_points, found.initial_points, found.moved_points):
        assert points is not None and points.value.shape == (K, 2) and points.jacobian.shape == (K, 2, 2)
    assert found.mask.sum(0) == pytest.approx(np.ones((16, 16)), abs=1e-5)
    assert found.occlusion.min() > 0 and found.occlusion.max() < 1
    assert list(found.seconds) == ["source", "initial", "driving", "motion", "generator"]
    assert min(found.seconds.values()) > 0
    assert list(inspect(model, pictures["source"], pictures["driving"]).seconds) == [
        "source", "driving", "motion", "generator",
    ]  # fmt: skip
    assert (found.attended_feature == found.warped_feature).all() == (parts.attention is None)


def test_each_picture_has_its_own_points_and_depth(small_model: Any, pictures: dict[str, np.ndarray]) -> None:
    model = small_model("dagan")
    found = inspect(model, **pictures)
    for name, picture in pictures.items():
        alone = inspect(model, picture, picture)
        assert getattr(found, name) is picture
        np.testing.assert_array_equal(getattr(found, f"{name}_points").value, alone.source_points.value)
        np.testing.assert_array_equal(getattr(found, f"{name}_points").jacobian, alone.source_points.jacobian)
        if name != "initial":
            np.testing.assert_array_equal(getattr(found, f"{name}_depth"), alone.source_depth)


def test_key_points_move_as_the_paper_says(small_model: Any, pictures: dict[str, np.ndarray]) -> None:
    model = small_model("baseline")
    absolute = inspect(model, pictures["source"], pictures["driving"])
    np.testing.assert_array_equal(absolute.moved_points.value, absolute.driving_points.value)
    found = inspect(model, **pictures, adapt_scale=True)
    assert found.initial_points is not None
    for k in range(model.config.num_keypoints):
        source, driving, initial = (
            (points.value[k].astype(np.float64), points.jacobian[k].astype(np.float64))
            for points in (found.source_points, found.driving_points, found.initial_points)
        )
        value = source[0] + found.scale * (driving[0] - initial[0])
        jacobian = driving[1] @ np.linalg.inv(initial[1]) @ source[1]
        np.testing.assert_allclose(found.moved_points.value[k], value, atol=1e-6)
        np.testing.assert_allclose(found.moved_points.jacobian[k], jacobian, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ATTENTIVE)
def test_a_row_of_attention_is_the_module_s(small_model: Any, pictures: dict[str, np.ndarray], variant: str) -> None:
    model = vivid(small_model(variant))
    module, given = model.generator.AttnModule, {}
    handles = [module.register_forward_hook(lambda _, inputs, output: given.update(warped=inputs[1], out=output))]
    if VARIANTS[variant].attention == "depth":
        blocks = model.generator.src_down_blocks
        handles.append(blocks[-1].register_forward_hook(lambda _, inputs, output: given.update(depth=output)))
    found = inspect(model, **pictures)
    for handle in handles:
        handle.remove()
    arrays = {name: tensor[0].double().numpy() for name, tensor in given.items()}
    warped = arrays["warped"]
    asking = arrays.get("depth", warped)
    np.testing.assert_array_equal(found.warped_feature, warped.astype(np.float32))
    contrasts = []
    for x, y in [(0, 0), (63, 63), (35, 10), (7, 61)]:
        q = one(module.query_conv, asking[:, y // 4, x // 4])
        exponents = np.zeros((16, 16))
        for i in range(16):
            for j in range(16):
                exponents[i, j] = q @ one(module.key_conv, warped[:, i, j])
        expected = np.exp(exponents - exponents.max())
        expected /= expected.sum()
        row = found.attention(x, y)
        contrasts.append(expected.max() / expected.min())
        np.testing.assert_allclose(row, expected, rtol=2e-3, atol=1e-6)
        assert row.sum() == pytest.approx(1, abs=1e-5)
        looked = sum(expected[i, j] * one(module.value_conv, warped[:, i, j]) for i in range(16) for j in range(16))
        out = found.attended_feature[:, y // 4, x // 4]
        np.testing.assert_allclose(out, 0.7 * looked + warped[:, y // 4, x // 4], rtol=2e-3, atol=1e-4)
    assert max(contrasts) > 2  # it does not look everywhere alike


def one(convolution: torch.nn.Conv2d, feature: np.ndarray) -> np.ndarray:
    """A 1 × 1 convolution and the ReLU after it at one position, in float64."""
    weight, bias = (tensor.detach().double().numpy() for tensor in (convolution.weight, convolution.bias))
    return np.maximum(weight[:, :, 0, 0] @ feature + bias, 0)


def test_the_warped_source_is_the_source_sampled_at_the_flow(small_model: Any, pictures: dict[str, np.ndarray]) -> None:
    found = inspect(vivid(small_model("baseline")), **pictures)
    source = found.source.astype(np.float64)
    expected = np.zeros((64, 64, 3))
    for i in range(64):
        for j in range(64):
            # The flow's positions are cells of 4 × 4 pixels; at the border its values go on.
            x, y = bilinear(found.flow.astype(np.float64), (i + 0.5) / 4 - 0.5, (j + 0.5) / 4 - 0.5, border="edge")
            expected[i, j] = bilinear(source, ((y + 1) * 64 - 1) / 2, ((x + 1) * 64 - 1) / 2, border="zero")
    assert np.abs(expected - found.warped_source).max() < 0.51 + 0.1
    assert np.abs(expected - source).mean() > 5


def bilinear(image: np.ndarray, row: float, column: float, border: str) -> np.ndarray:
    """The sample of [H, W, C] at a place in pixels."""
    H, W, C = image.shape
    if border == "edge":
        row, column = min(max(row, 0), H - 1), min(max(column, 0), W - 1)
    top, left = int(np.floor(row)), int(np.floor(column))
    total = np.zeros(C)
    for i, wi in ((top, 1 - (row - top)), (top + 1, row - top)):
        for j, wj in ((left, 1 - (column - left)), (left + 1, column - left)):
            if 0 <= i < H and 0 <= j < W:
                total += wi * wj * image[i, j]
    return total


def test_the_middle_is_that_of_the_generated_face(small_model: Any, pictures: dict[str, np.ndarray]) -> None:
    found = inspect(small_model("baseline"), **pictures)
    x, y = found.moved_points.value.mean(0)
    assert found.middle == (round((x + 1) / 2 * 63), round((y + 1) / 2 * 63))
    found.moved_points.value[:] = (-3, 3)
    assert found.middle == (0, 63)


def test_what_cannot_be_looked_at_is_refused(small_model: Any, pictures: dict[str, np.ndarray]) -> None:
    model = small_model("dagan")
    found: Inspection = inspect(model, **pictures)
    for x, y in [(64, 0), (0, 64), (-1, 0), (0, -1)]:
        with pytest.raises(InputError, match=rf"pixel must be \(x, y\) in 0\.\.63, got \({x}, {y}\)"):
            found.attention(x, y)
    with pytest.raises(InputError, match="fomm has no attention"):
        inspect(small_model("fomm"), **pictures).attention(1, 1)
    for name in pictures:
        with pytest.raises(
            InputError, match=rf"{name} must be uint8 \[H, W, 3\] = \(64, 64, 3\), got uint8 \(32, 32, 3\)"
        ):
            inspect(model, **pictures | {name: np.zeros((32, 32, 3), np.uint8)})
    with pytest.raises(InputError, match="movement scale"):
        flat = small_model("baseline")
        for parameter in flat.keypoints.parameters():
            parameter.data.zero_()
        inspect(flat, **pictures, adapt_scale=True)
