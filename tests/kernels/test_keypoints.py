"""Soft arg-max and relative transfer, against float64, the networks and NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.kernels.keypoints import soft_keypoints, transfer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["nchw", "nhwc"]
# (B, K, h, w): the published networks'; a tile that is not full; many key points (two and four groups); few pixels, one
# share; the smallest grid that has coordinates.
SHAPES = [(1, 15, 58, 58), (3, 10, 7, 19), (2, 17, 9, 11), (1, 50, 6, 7), (2, 1, 5, 6), (1, 3, 2, 2)]


def maps(B: int, K: int, h: int, w: int, dtype: Any = torch.float32, layout: str = "nhwc", **where: str) -> Any:
    """Logits with peaks, and frames; each heat map around a height of its own."""
    random = torch.Generator().manual_seed(B + 10 * K + 100 * h + 1000 * w)
    logits = torch.randn(B, 5 * K, h, w, generator=random)
    logits[:, :K] = 0.3 * logits[:, :K] + 4 * torch.randn(B, K, 1, 1, generator=random)
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    return logits.to(dtype=dtype, memory_format=memory_format, **where)


def exact(logits: torch.Tensor, temperature: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """By NumPy, in float64."""
    found = logits.cpu().double().numpy()
    B, channels, h, w = found.shape
    K = channels // 5
    weight = np.exp((found[:, :K] - found[:, :K].max((2, 3), keepdims=True)) / temperature)
    weight /= weight.sum((2, 3), keepdims=True)
    x, y = np.meshgrid(np.linspace(-1, 1, w), np.linspace(-1, 1, h))
    value = np.stack([(weight * x).sum((2, 3)), (weight * y).sum((2, 3))], -1)
    jacobian = (found[:, K:].reshape(B, K, 4, h, w) * weight[:, :, None]).sum((3, 4))
    return value, jacobian.reshape(B, K, 2, 2)


def check(found: Any, logits: torch.Tensor, **options: float) -> None:
    for mine, theirs in zip(found, exact(logits, **options), strict=True):
        assert mine.dtype == torch.float32 and mine.is_contiguous()
        np.testing.assert_allclose(mine.cpu().double().numpy(), theirs, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_what_float64_gives(device: str, shape: Any, dtype: Any, layout: str) -> None:
    logits = maps(*shape, dtype=dtype, layout=layout, device=device)
    check(soft_keypoints(logits), logits)
    check(soft_keypoints(logits, reference=True), logits)


def test_is_what_the_network_finds(device: str) -> None:
    from dagan_rt.networks.config import NetworkConfig
    from dagan_rt.networks.keypoints import KeypointEstimator

    torch.manual_seed(0)
    estimator = KeypointEstimator(NetworkConfig(variant="dagan")).eval()
    torch.nn.init.normal_(estimator.jacobian.weight, std=0.02)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        for head in (estimator.kp, estimator.jacobian):
            head.register_forward_hook(lambda module, inputs, result: seen.append(result))
        expected = estimator(torch.rand(1, 4, 128, 128))
    value, jacobian = soft_keypoints(torch.cat(seen, dim=1).to(device))
    torch.testing.assert_close(value.cpu(), expected.value, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(jacobian.cpu(), expected.jacobian, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_faces_in_one_share_and_in_many(layout: str) -> None:
    """Few multiprocessors: a block goes from tile to tile. Many: the last of more than a warp has lanes merges them."""
    from emulated import EmulatedDevice, emulation

    logits = maps(2, 3, 36, 37, layout=layout)
    for multiprocessors in (1, 2, 5, 132):
        results = []
        for seed in (0, 1, 2):
            with emulation(EmulatedDevice(multiprocessors=multiprocessors, seed=seed)):
                results.append(soft_keypoints(logits))
        check(results[0], logits)
        for other in results[1:]:
            assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 50.0])
def test_far_apart_and_high_logits_are_safe(device: str, temperature: float) -> None:
    logits = maps(2, 4, 9, 10, device=device)
    logits[:, :4] = 1e4 * logits[:, :4].round(decimals=1) + 3e4
    check(soft_keypoints(logits, temperature=temperature), logits, temperature=temperature)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite(device: str, layout: str) -> None:
    logits = maps(1, 6, 9, 10, layout=layout, device=device)
    clean = soft_keypoints(logits)
    logits[0, 0, 3, 4] = math.nan
    logits[0, 1, 8, 9] = math.inf
    logits[0, 2, :5] = -math.inf  # weights of zero
    logits[0, 3] = -math.inf
    logits[0, 6 + 4 * 4 + 2, 1, 1] = math.nan
    found, expected = soft_keypoints(logits), soft_keypoints(logits, reference=True)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=3e-6, rtol=3e-6, equal_nan=True)
    assert found[0][0, [0, 1, 3]].isnan().all() and found[0][0, [2, 4, 5]].isfinite().all()
    assert torch.equal(found[0][:, 5], clean[0][:, 5]) and torch.equal(found[1][:, 5], clean[1][:, 5])


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1)], ids=str)
def test_a_side_of_one_pixel_has_no_coordinates(device: str, size: Any) -> None:
    logits = maps(2, 3, *size, device=device)
    for mine, theirs in zip(soft_keypoints(logits), soft_keypoints(logits, reference=True), strict=True):
        torch.testing.assert_close(mine, theirs, atol=3e-6, rtol=3e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_channels_and_out(device: str, dtype: Any) -> None:
    for layout in LAYOUTS:
        wide = maps(2, 16, 7, 9, dtype=dtype, layout=layout, device=device)
        logits = wide[:, 2:77]
        out = torch.zeros(3, 15, 2, device=device)[1:], torch.zeros(2, 15, 2, 2, device=device)
        value, jacobian = soft_keypoints(logits, out=out)
        assert value is out[0] and jacobian is out[1]
        check(out, logits)
    again = torch.ones(2, 15, 2, device=device), torch.ones(2, 15, 2, 2, device=device)
    soft_keypoints(logits, out=again, reference=True)
    check(again, logits)


def points(B: int, K: int, device: str = "cpu", dtype: Any = torch.float32) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(B + 10 * K)
    found = []
    for _ in range(3):
        found += [torch.rand(B, K, 2, generator=random), torch.eye(2) + 0.3 * torch.randn(B, K, 2, 2, generator=random)]
    return [it.to(device, dtype) for it in (*found, 0.5 + torch.rand(B, 1, generator=random))]


@pytest.mark.parametrize("shape", [(1, 15), (3, 1), (32, 15), (2, 100)], ids=str)
def test_transfer_is_what_float64_gives(device: str, shape: Any) -> None:
    inputs = points(*shape, device=device)
    source, js, driving, jd, initial, ji, scale = (it.cpu().double().numpy() for it in inputs)
    expected = source + scale[:, :, None] * (driving - initial), jd @ np.linalg.inv(ji) @ js
    size = np.abs(jd) @ np.abs(np.linalg.inv(ji)) @ np.abs(js)
    for options in ({}, {"reference": True}):
        value, jacobian = transfer(*inputs, **options)
        np.testing.assert_allclose(value.cpu().numpy(), expected[0], atol=1e-6)
        # A determinant that is small against its products loses as many digits.
        products = np.abs(ji[..., 0, 0] * ji[..., 1, 1]) + np.abs(ji[..., 0, 1] * ji[..., 1, 0])
        lost = (products / np.abs(np.linalg.det(ji)))[..., None, None]
        assert (np.abs(jacobian.cpu().numpy() - expected[1]) <= 1e-6 * size * lost).all()


def test_transfer_is_the_runtimes(device: str) -> None:
    from dagan_rt.keypoints import KeyPoints
    from dagan_rt.transfer import transfer as numpy_transfer

    inputs = points(1, 15, device=device)
    faces = [it.cpu().numpy() for it in inputs[:6]]
    expected = numpy_transfer(*(KeyPoints(*faces[i : i + 2]) for i in (0, 2, 4)), scale=float(inputs[6]))
    value, jacobian = transfer(*inputs)
    np.testing.assert_allclose(value.cpu().numpy(), expected.value, atol=1e-5)
    np.testing.assert_allclose(jacobian.cpu().numpy(), expected.jacobian, atol=1e-4)


def test_transfer_in_place_and_of_a_singular_frame(device: str) -> None:
    inputs = points(2, 5, device=device)
    # Neither product is exact, both round to the same float.
    inputs[5][0, 0] = torch.tensor([[0.1, 0.2], [0.7, 1.4]])
    value, jacobian = transfer(*inputs)
    rest = jacobian.clone()
    assert not jacobian[0, 0].isfinite().any()
    rest[0, 0] = 0
    assert rest.isfinite().all() and value.isfinite().all()
    out = inputs[2], inputs[3]
    assert transfer(*inputs, out=out)[0] is out[0]
    assert torch.equal(out[0], value) and torch.equal(out[1][1], jacobian[1])


@pytest.mark.parametrize("sanitize", ["address", "thread"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sanitizers_find_nothing(sanitize: str, layout: str) -> None:
    from emulated import EmulatedDevice, emulation

    for multiprocessors in (1, 8):
        with emulation(EmulatedDevice(sanitize=sanitize, seed=5, multiprocessors=multiprocessors)):
            logits = maps(1, 17, 9, 11, layout=layout)
            check(soft_keypoints(logits), logits)
    with emulation(EmulatedDevice(sanitize=sanitize, seed=5)):
        transfer(*points(2, 5))


def test_what_cannot_be_used_is_named(emulated: Any) -> None:
    logits, inputs = maps(2, 4, 5, 6), points(2, 4)

    def replaced(place: int, other: Any) -> list[Any]:
        return [*inputs[:place], other, *inputs[place + 1 :]]

    for message, call in {
        r"logits must be \[B, 5 K, h, w\]": lambda: soft_keypoints(logits[:, 1:]),
        r"logits must be \[B, 5K, h, w\] = ": lambda: soft_keypoints(logits[0]),
        "logits must be float32 or float16 or bfloat16": lambda: soft_keypoints(logits.to(torch.uint8)),
        "logits must have evenly spaced pixels": lambda: soft_keypoints(logits[..., 1:]),
        "temperature must be a positive number, got 0": lambda: soft_keypoints(logits, temperature=0),
        "temperature must be a positive number, got nan": lambda: soft_keypoints(logits, temperature=math.nan),
        r"out_value must be \[B, K, 2\] = \(2, 4, 2\), got \(2, 3, 2\)":
            lambda: soft_keypoints(logits, out=(torch.zeros(2, 3, 2), torch.zeros(2, 4, 2, 2))),
        "out_jacobian must be contiguous":
            lambda: soft_keypoints(logits, out=(torch.zeros(2, 4, 2), torch.zeros(2, 4, 2, 2).mT)),
        "logits requires a gradient": lambda: soft_keypoints(logits.clone().requires_grad_()),
        r"source_value must be \[B, K, 2\]": lambda: transfer(*replaced(0, inputs[1])),
        r"driving_jacobian must be \[B, K, 2, 2\] = \(2, 4, 2, 2\), got \(1, 4, 2, 2\)":
            lambda: transfer(*replaced(3, inputs[3][:1])),
        "initial_value must be float32, got float16": lambda: transfer(*replaced(4, inputs[4].half())),
        "initial_jacobian must be contiguous": lambda: transfer(*replaced(5, inputs[5].mT)),
        r"scale must be \[B, 1\] = \(2, 1\), got \(2,\)": lambda: transfer(*replaced(6, inputs[6][:, 0])),
        "driving_value requires a gradient": lambda: transfer(*replaced(2, inputs[2].clone().requires_grad_())),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()
