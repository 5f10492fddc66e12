"""uint8 images to planes and back, and to features, against NumPy: every value exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.kernels.image import image_to_features, image_to_planes, planes_to_image

DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("nchw", "nhwc")
# Odd ones; one pixel; less than a thread's share; rows of it; several blocks; a last block that is partly empty.
SHAPES = [(1, 1, 1), (2, 1, 3), (1, 2, 2), (3, 5, 7), (3, 4, 6), (1, 16, 16), (2, 40, 60), (1, 113, 203)]


def picture(*shape: int, device: str = "cpu") -> torch.Tensor:
    """[..., 3] with every level in it, if there is room."""
    levels = np.random.default_rng(0).permutation(np.arange(np.prod(shape) * 3) % 256)
    return torch.from_numpy(levels.astype(np.uint8).reshape(*shape, 3)).to(device)


def values(*shape: int, dtype: str, device: str = "cpu") -> torch.Tensor:
    """[B, 3, H, W] around [0, 1], with ties of rounding, and what is not finite."""
    random = np.random.default_rng(1)
    found = random.uniform(-0.3, 1.3, (shape[0], 3, *shape[1:]))
    ties = (random.integers(0, 255, found.shape) + 0.5) / 255
    found = np.where(random.random(found.shape) < 0.3, ties, found)
    for special in (np.nan, np.inf, -np.inf, -0.0):
        found = np.where(random.random(found.shape) < 0.03, special, found)
    return torch.from_numpy(found).to(getattr(torch, dtype)).to(device)


def expected_planes(image: torch.Tensor, dtype: str) -> torch.Tensor:
    quotients = image.cpu().numpy().astype(np.float32) / np.float32(255)
    return torch.from_numpy(np.moveaxis(quotients, -1, 1).copy()).to(getattr(torch, dtype))


def expected_image(planes: torch.Tensor) -> np.ndarray:
    found = np.nan_to_num(planes.float().cpu().numpy(), nan=0.0)
    return np.moveaxis(np.rint(np.clip(found, 0, 1) * np.float32(255)), 1, -1).astype(np.uint8)


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planes_are_exactly_the_quotients(device: str, shape: Any, dtype: str, layout: str) -> None:
    image = picture(*shape, device=device)
    planes = image_to_planes(image, dtype=dtype, layout=layout)
    assert planes.dtype == getattr(torch, dtype) and planes.shape == (shape[0], 3, *shape[1:])
    memory_format = torch.contiguous_format if layout == "nchw" else torch.channels_last
    assert planes.is_contiguous(memory_format=memory_format)
    assert torch.equal(planes.cpu(), expected_planes(image, dtype))
    assert torch.equal(planes, image_to_planes(image, dtype=dtype, layout=layout, reference=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_are_exactly_the_rounded_planes(device: str, shape: Any, dtype: str, layout: str) -> None:
    planes = values(*shape, dtype=dtype, device=device)
    if layout == "nhwc":
        planes = channels_last(planes)
    image = planes_to_image(planes)
    assert image.dtype == torch.uint8 and image.is_contiguous()
    np.testing.assert_array_equal(image.cpu().numpy(), expected_image(planes))
    assert torch.equal(image, planes_to_image(planes, reference=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 5, 7)], ids=str)
def test_sigmoid_is_within_half_a_level(device: str, shape: Any, dtype: str, layout: str) -> None:
    logits = 20 * values(*shape, dtype=dtype, device=device) - 10
    if layout == "nhwc":
        logits = channels_last(logits)
    image = planes_to_image(logits, sigmoid=True).cpu().double()
    exact = 255 * torch.sigmoid(logits.cpu().double()).nan_to_num(nan=0.0).permute(0, 2, 3, 1)
    # A float's rounding can tip a value that lies almost on a half.
    assert (image - exact).abs().max() <= 0.5 + 1e-4
    assert image[logits.permute(0, 2, 3, 1).cpu() == float("inf")].eq(255).all()
    difference = image - planes_to_image(logits, sigmoid=True, reference=True).cpu()
    assert difference.abs().max() <= 1 and difference.ne(0).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_level_survives_the_round_trip(device: str, dtype: str) -> None:
    image = picture(1, 16, 16, device=device)
    assert len(image.unique()) == 256
    for layout in LAYOUTS:
        assert torch.equal(planes_to_image(image_to_planes(image, dtype=dtype, layout=layout)), image)


@pytest.mark.parametrize("dtype", DTYPES)
def test_crops_and_odd_addresses_take_the_general_way(device: str, dtype: str) -> None:
    frame = picture(2, 20, 24, device=device)
    crop = frame[:, 3:15, 5:21]
    assert torch.equal(image_to_planes(crop, dtype=dtype).cpu(), expected_planes(crop, dtype))
    odd = frame.flatten()[1 : 1 + 12 * 16 * 3].view(1, 12, 16, 3)
    assert odd.data_ptr() % 4
    for layout in LAYOUTS:
        assert torch.equal(image_to_planes(odd, dtype=dtype, layout=layout).cpu(), expected_planes(odd, dtype))

    turned = frame.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)  # every stride is another's
    assert torch.equal(image_to_planes(turned, dtype=dtype).cpu(), expected_planes(frame, dtype))

    planes = values(2, 20, 24, dtype=dtype, device=device)
    turned.zero_()
    np.testing.assert_array_equal(planes_to_image(planes, out=turned).cpu().numpy(), expected_image(planes))
    odd_planes = planes.flatten()[1 : 1 + 3 * 12 * 16].view(1, 3, 12, 16)
    for found in (planes[:, :, 3:15, 5:21], planes.flip(1)[:, :, ::2], odd_planes, planes.transpose(2, 3)):
        np.testing.assert_array_equal(planes_to_image(found).cpu().numpy(), expected_image(found))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_features_are_the_planes_and_one_and_zeros(device: str, shape: Any, dtype: str) -> None:
    image = picture(*shape, device=device)
    features = image_to_features(image, dtype=dtype)
    assert features.dtype == getattr(torch, dtype) and features.shape == (shape[0], 8, *shape[1:])
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(features[:, :3].cpu(), expected_planes(image, dtype))
    assert features[:, 3].eq(1).all() and features[:, 4:].eq(0).all()
    assert torch.equal(features, image_to_features(image, dtype=dtype, reference=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_of_crops_and_in_slices(device: str, dtype: str) -> None:
    frame = picture(2, 20, 24, device=device)
    turned = frame.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)  # every stride is another's
    wide = torch.full((2, 24, 12, 16), 7.0, dtype=getattr(torch, dtype), device=device)
    wide = wide.to(memory_format=torch.channels_last)
    for image in (frame[:, 3:15, 5:21], turned[:, 3:15, 5:21]):
        part = wide[:, 8:16].zero_()
        assert image_to_features(image, out=part) is part
        assert torch.equal(part, image_to_features(image, dtype=dtype, reference=True))
        assert wide[:, :8].eq(7).all() and wide[:, 16:].eq(7).all()
    assert torch.equal(image_to_features(image, out=wide[:, 16:], reference=True), part)


def test_out_is_written_and_nothing_around_it(device: str) -> None:
    image = picture(2, 4, 8, device=device)
    larger = torch.full((2, 3, 6, 10), -1.0, device=device)
    inside = larger[:, :, 1:5, 1:9]
    assert image_to_planes(image, out=inside) is inside
    assert torch.equal(inside.cpu(), expected_planes(image, "float32"))
    assert (larger < 0).sum() == larger.numel() - inside.numel()

    frame = torch.full((2, 6, 10, 3), 7, dtype=torch.uint8, device=device)
    planes_to_image(inside, out=frame[:, 1:5, 1:9])
    assert torch.equal(frame[:, 1:5, 1:9], image)
    frame[:, 1:5, 1:9] = 7
    assert frame.eq(7).all()


def test_contiguous_images_take_the_fast_way(emulated: Any) -> None:
    """The general kernel would give the same values, only slower."""
    image = picture(3, 8, 16)
    for dtype, name in zip(DTYPES, ("f32", "f16", "bf16"), strict=True):
        for layout in LAYOUTS:
            planes_to_image(image_to_planes(image, dtype=dtype, layout=layout))
            assert emulated.launches[-2:] == [f"image_to_planes_{name}_{layout}", f"planes_to_image_{name}_{layout}"]
    image_to_planes(picture(1, 3, 3))
    assert emulated.launches[-1] == "image_to_planes_f32_any"


@pytest.mark.parametrize("sanitize", ["address", "thread"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sanitizers_find_nothing(sanitize: str, dtype: str) -> None:
    from emulated import EmulatedDevice, emulation

    with emulation(EmulatedDevice(sanitize=sanitize, seed=3)):
        for shape in ((1, 40, 60), (2, 5, 7)):
            image = picture(*shape)
            for layout in LAYOUTS:
                assert torch.equal(planes_to_image(image_to_planes(image, dtype=dtype, layout=layout)), image)
            assert torch.equal(image_to_features(image, dtype=dtype)[:, :3].cpu(), expected_planes(image, dtype))


def test_what_cannot_be_used_is_named(emulated: Any) -> None:
    image, planes = picture(1, 4, 4), torch.zeros(1, 3, 4, 4)
    for message, call in {
        r"image must be \[B, H, W, 3\] = \(\*, \*, \*, 3\), got \(1, 3, 4, 4\)":
            lambda: image_to_planes(image.permute(0, 3, 1, 2)),
        "image must be uint8, got float32": lambda: image_to_planes(planes.permute(0, 2, 3, 1)),
        "dtype must be float32, float16 or bfloat16, got 'uint8'": lambda: image_to_planes(image, dtype="uint8"),
        "layout must be nchw or nhwc, got 'hwc'": lambda: image_to_planes(image, layout="hwc"),
        "image must not be empty": lambda: image_to_planes(image[:, :0]),
        r"out must be \[B, 3, H, W\] = \(1, 3, 4, 4\), got \(1, 3, 4, 5\)":
            lambda: image_to_planes(image, out=torch.zeros(1, 3, 4, 5)),
        r"planes must be \[B, 3, H, W\] = \(\*, 3, \*, \*\), got \(1, 4, 4, 3\)":
            lambda: planes_to_image(planes.permute(0, 2, 3, 1)),
        "planes must be float32 or float16 or bfloat16, got uint8":
            lambda: planes_to_image(image.permute(0, 3, 1, 2)),
        "dtype must be float32, float16 or bfloat16, got 'int8'": lambda: image_to_features(image, dtype="int8"),
        "image must be uint8, got int32": lambda: image_to_features(image.int()),
        r"out must be \[B, 8, H, W\] = \(1, 8, 4, 4\), got \(1, 3, 4, 4\)":
            lambda: image_to_features(image, out=planes),
        "out must be channels-last, whole or a slice": lambda: image_to_features(image, out=torch.zeros(1, 8, 4, 4)),
        "out must be uint8, got float32": lambda: planes_to_image(planes, out=torch.zeros(1, 4, 4, 3)),
        "planes requires a gradient, which this kernel does not give":
            lambda: planes_to_image(planes.clone().requires_grad_()),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()
    with torch.no_grad():
        assert planes_to_image(planes.clone().requires_grad_()).eq(0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_call_says_so() -> None:
    with pytest.raises(InputError, match=r"image must lie on a GPU, got .* on the CPU: .*reference=True"):
        image_to_planes(picture(1, 4, 4))
