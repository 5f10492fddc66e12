"""Convolution against PyTorch in float64, with PyTorch in the same dtype as the measure of its errors."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from emulated import EmulatedDevice, emulation
from torch.nn import functional as F

from dagan_rt.errors import InputError
from dagan_rt.kernels import _conv2d_spread, _conv2d_wgmma
from dagan_rt.kernels._arrays import view
from dagan_rt.kernels._build import SHARED_PER_BLOCK
from dagan_rt.kernels.conv2d import TILES, Config, configs, conv2d, pack

module = importlib.import_module("dagan_rt.kernels.conv2d")

each_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
each_tile = pytest.mark.parametrize("tile", range(len(TILES)), ids=lambda i: f"{TILES[i].m}x{TILES[i].n}")

# B, Cin, H, W, Cout, k, and what else is asked for
CASES: list[tuple[tuple[int, int, int, int, int, int], dict[str, Any]]] = [
    ((1, 8, 1, 1, 1, 1), {}),
    ((2, 16, 5, 6, 20, 3), {"activation": "relu"}),
    ((1, 8, 9, 7, 64, 7), {"stride": 2, "activation": "relu"}),
    ((3, 24, 6, 6, 8, 1), {"stride": 2}),
    ((2, 8, 7, 5, 3, 7), {"activation": "sigmoid"}),
    ((1, 40, 9, 8, 75, 7), {"padding": 0}),
    ((1, 16, 4, 5, 17, 5), {"padding": 4}),
    ((2, 72, 4, 4, 24, 3), {"stride": 2, "residual": True, "activation": "relu"}),
    ((1, 16, 6, 5, 24, 3), {"pad_mode": "reflect", "activation": "elu"}),
    ((2, 8, 4, 6, 16, 7), {"pad_mode": "reflect", "stride": 2}),
    ((2, 16, 1, 3, 16, 3), {"pad_mode": "reflect", "activation": "elu"}),
    ((1, 8, 1, 1, 5, 3), {"pad_mode": "reflect"}),
    ((1, 16, 3, 5, 32, 3), {"repeat": True, "activation": "elu", "pad_mode": "reflect"}),
    ((2, 16, 3, 2, 3, 1), {"repeat": True, "normalized": True}),
    ((2, 16, 4, 6, 40, 3), {"pool": True, "activation": "relu"}),
    ((1, 8, 2, 2, 7, 3), {"pool": True, "normalized": True}),
    ((1, 24, 5, 4, 24, 3), {"residual": True, "normalized": True}),
    ((2, 16, 3, 3, 13, 1), {"residual": True, "normalized": True, "activation": "sigmoid"}),
    ((1, 16, 3, 4, 24, 3), {"upsample": True, "activation": "relu"}),
    ((2, 8, 1, 1, 3, 3), {"upsample": True}),
    ((2, 8, 2, 3, 16, 3), {"upsample": True, "residual": True, "normalized": True}),
    ((2, 16, 3, 2, 9, 3), {"upsample": True, "phases": 1, "activation": "relu", "residual": True}),
]


def draw(case: tuple[int, int, int, int, int, int], dtype: str, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """x in the dtype, and weight and bias in float32: numbers so round that their sums are exact in either dtype."""
    B, Cin, H, W, Cout, k = case
    random = torch.Generator().manual_seed(sum(case))
    x = torch.randn(B, Cin, H, W, generator=random).to(getattr(torch, dtype))
    size = 2.0 ** -round(math.log2(Cin * k * k) / 2)
    weight = torch.randint(-20, 21, (Cout, Cin, k, k), generator=random) * size / 8
    bias = torch.randint(-64, 65, (Cout,), generator=random) / 64
    return x.to(device, memory_format=torch.channels_last), weight.to(device), bias.to(device)


def like(shape: Any, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Random numbers, channels-last."""
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=random).to(device, dtype, memory_format=torch.channels_last)


def expected(x: torch.Tensor, weight: torch.Tensor, bias: Any, **asked: Any) -> tuple[torch.Tensor, Any]:
    """What a network's own layers make of it, each in x's dtype: the result, and the normalized one."""
    k = weight.shape[2]
    padding = asked.get("padding")
    pad = k // 2 if padding is None else padding
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if asked.get("upsample"):
        x = F.interpolate(x, scale_factor=2)
    if asked.get("pad_mode") == "reflect":
        rows, columns = (_mirrored(size, pad) for size in x.shape[2:])
        x, pad = x[:, :, rows][..., columns], 0
    y = F.conv2d(x, weight, bias, stride=asked.get("stride", 1), padding=pad)
    if asked.get("residual") is not None:
        y = y + asked["residual"].to(y.dtype)
    if asked.get("activation"):
        y = {"relu": F.relu, "elu": F.elu, "sigmoid": torch.sigmoid}[asked["activation"]](y)
    if asked.get("pool"):
        y = F.avg_pool2d(y, 2)
    if asked.get("repeat"):
        y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
    if asked.get("normalized") is None:
        return y, None
    scale, shift, *_ = asked["normalized"]
    return y, F.relu(y * scale.to(y.dtype).view(-1, 1, 1) + shift.to(y.dtype).view(-1, 1, 1))


def _mirrored(size: int, pad: int) -> list[int]:
    """Indices of a reflected axis, one at a time."""
    period = max(2 * size - 2, 1)
    places = [(i - pad) % period for i in range(size + 2 * pad)]
    return [place if place < size else period - place for place in places]


def close(out: torch.Tensor, exact: torch.Tensor, measure: torch.Tensor) -> None:
    """At most twice the error of `measure`, largest and mean square, and one rounding of the largest element."""
    assert out.shape == exact.shape
    eps = torch.finfo(measure.dtype).eps
    rounding = eps / 2 * max(exact.abs().max().item(), 1e-3)
    errors, allowed = (out.double() - exact).abs(), (measure.double() - exact).abs()
    assert errors.max() <= 2 * allowed.max() + rounding
    assert errors.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + rounding / 2


def run(
    case: tuple[int, int, int, int, int, int], dtype: str, device: str = "cpu", config: Config | None = None,
    bias: bool = True, **asked: Any,
) -> torch.Tensor:  # fmt: skip
    """One convolution, checked."""
    x, weight, b = draw(case, dtype, device)
    upsample, phases = asked.pop("upsample", False), asked.pop("phases", None)
    packed = pack(weight, b if bias else None, dtype, upsample=upsample, phases=phases)
    plain = {name: value for name, value in asked.items() if name not in ("residual", "normalized")}
    shape = conv2d(x.cpu(), packed.to("cpu"), reference=True, **plain).shape
    if asked.get("residual"):
        asked["residual"] = like(shape, x.dtype, device)
    if asked.get("normalized"):
        C = shape[1]
        numbers = torch.arange(2.0 * C, device=device).remainder(7) / 4 - 0.5
        asked["normalized"] = (numbers[:C], numbers[C:], torch.full_like(like(shape, x.dtype, device), 99))
    out = conv2d(x, packed, config=config, **asked)
    assert out.dtype == x.dtype and out.is_contiguous(memory_format=torch.channels_last)
    asked["upsample"] = upsample
    exact, exact_second = expected(x.double(), weight, b if bias else None, **asked)
    measure, measure_second = expected(x, weight, b if bias else None, **asked)
    close(out, exact, measure)
    if exact_second is not None:
        close(asked["normalized"][2], exact_second, measure_second)
    return out


@pytest.mark.parametrize(("case", "asked"), CASES, ids=str)
@each_dtype
def test_close_to_float64(case: Any, asked: dict[str, Any], dtype: str, device: str) -> None:
    run(case, dtype, device, **asked)


@pytest.mark.parametrize("split", [1, 2, 5])
@each_tile
def test_each_tile_and_parts_of_k(tile: int, split: int, device: str) -> None:
    config = Config("mma", tile, split)
    run((1, 40, 12, 13, 72, 3), "float16", device, config, residual=True, activation="relu")  # K is no multiple of 64
    run((2, 64, 4, 4, 136, 3), "bfloat16", device, config, pool=True, bias=False)
    run((3, 128, 3, 3, 9, 3), "float16", device, config, upsample=True)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("halo", [False, True])
def test_wgmma(halo: bool, split: int, device: str) -> None:
    tiles = _conv2d_wgmma.TILES
    config = Config("wgmma", next(i for i, it in enumerate(tiles) if it.halo == halo and it.channels == 64), split)
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")
    run((2, 128, 5, 6, 128, 3), "float16", device, config, residual=True, activation="relu")
    run((1, 128, 4, 4, 64, 3), "bfloat16", device, config, upsample=True)
    run((1, 128, 4, 6, 64, 3), "float16", device, config, pool=True)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("tile", range(len(_conv2d_spread.TILES)))
def test_spread(tile: int, split: int, device: str) -> None:
    config = Config("spread", tile, split)
    Cout = 3 if tile < 2 else 17
    run((2, 40, 9, 10, Cout, 7), "float16", device, config, activation="sigmoid")
    run((1, 64, 3, 64, Cout - 2, 7), "bfloat16", device, config, residual=True)
    run((1, 40, 10, 64, Cout, 7), "float16", device, config, padding=0, normalized=True)
    run((1, 40, 5, 70, Cout, 7), "float16", device, config)  # two segments of a line
    run((1, 40, 5, 70, Cout, 7), "float16", device, config, padding=1, bias=False)
    run((1, 40, 5, 60, Cout, 7), "float16", device, config, pad_mode="reflect")


@each_tile
def test_parts_are_added_in_order_whichever_comes_last(tile: int) -> None:
    x, weight, bias = draw((1, 128, 5, 5, 24, 3), "float16")
    packed = pack(weight, bias, "float16")
    outs = []
    for seed in range(4):
        with emulation(EmulatedDevice(seed=seed)) as gpu:
            outs.append(conv2d(x, packed, config=Config("mma", tile, 5)))
            again = conv2d(x, packed, config=Config("mma", tile, 5))  # finds the counters as they were
        assert torch.equal(again, outs[-1])
        assert gpu.launches == ["conv2d_mma_f16"] * 2
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_segments_and_chunks_of_spread_in_any_order_of_threads() -> None:
    x, weight, bias = draw((1, 64, 3, 70, 3, 7), "float16")  # two segments of a line, two chunks of channels
    packed, outs = pack(weight, bias, "float16"), []
    for seed in range(4):
        with emulation(EmulatedDevice(seed=seed)):
            outs.append(conv2d(x, packed, config=Config("spread", 0, 1)))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address", "thread"])
@pytest.mark.parametrize("tile", [2, 5, 7])
def test_sanitizers_find_nothing(tile: int, sanitize: str) -> None:
    with emulation(EmulatedDevice(sanitize=sanitize, seed=1)):
        run((1, 40, 5, 5, 20, 3), "float16", config=Config("mma", tile, 2), pad_mode="reflect", normalized=True)
        run((1, 8, 2, 3, 3, 3), "float16", config=Config("mma", tile, 1), upsample=True)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("kind", ["same", "float32", "uint8"])
@pytest.mark.parametrize(("start", "wide", "Cout"), [(8, 48, 24), (3, 29, 19), (8, 48, 19), (5, 48, 24)])
def test_slices_of_wider_maps(kind: str, start: int, wide: int, Cout: int, device: str) -> None:
    x, weight, bias = draw((2, 16, 4, 6, Cout, 3), "float16", device)
    packed = pack(weight, bias, "float16")
    around = like((2, 40, 4, 6), torch.float16, device)
    around[:, 8:24] = x
    dtype = x.dtype if kind == "same" else getattr(torch, kind)
    wide_out = torch.full((2, 4, 6, wide), 7, dtype=dtype, device=device).permute(0, 3, 1, 2)
    wide_second, residual = wide_out.clone(), like((2, wide, 4, 6), x.dtype, device)[:, start : start + Cout]
    out, second = (it[:, start : start + Cout] for it in (wide_out, wide_second))
    scale, shift = torch.ones(Cout, device=device), torch.full((Cout,), -0.25, device=device)
    asked: dict[str, Any] = {"residual": residual, "activation": "sigmoid", "normalized": (scale, shift, second)}
    assert conv2d(around[:, 8:24], packed, out=out, **asked) is out
    exact, measure = (expected(it, weight, bias, **asked) for it in (x.double(), x))
    for got, best, other in zip((out, second), exact, measure, strict=True):
        if kind == "uint8":
            assert (got.double() - 255 * best.clamp(0, 1)).abs().max() <= 0.51
        else:
            close(got, best, other)
    for map in (wide_out, wide_second):
        assert (map[:, :start] == 7).all() and (map[:, start + Cout :] == 7).all()


def test_float32_results_are_not_rounded(device: str) -> None:
    x, weight, bias = draw((1, 16, 5, 5, 16, 3), "float16", device)
    out = torch.empty(1, 16, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    conv2d(x, pack(weight, bias, "float16"), out=out)
    torch.testing.assert_close(out.double(), expected(x.double(), weight, bias)[0], rtol=1e-6, atol=1e-5)


def test_an_image_of_bytes(device: str) -> None:
    x, weight, bias = draw((2, 8, 5, 7, 3, 7), "float16", device)
    image = torch.empty(2, 5, 7, 3, dtype=torch.uint8, device=device)
    conv2d(x * 4, pack(weight, bias, "float16"), out=image.permute(0, 3, 1, 2))  # without sigmoid: it must clamp
    levels = 255 * expected(x.double() * 4, weight, bias)[0].clamp(0, 1).permute(0, 2, 3, 1)
    assert (image.double() - levels).abs().max() <= 0.51
    assert image.min() == 0 and image.max() == 255


def test_a_residual_may_be_overwritten(device: str) -> None:
    x, weight, bias = draw((1, 16, 5, 5, 16, 3), "float16", device)
    out = like(x.shape, x.dtype, device)
    packed, before = pack(weight, bias, "float16"), out.clone()
    conv2d(x, packed, residual=out, out=out)
    assert torch.equal(out, conv2d(x, packed, residual=before))


def test_channels_are_added(device: str) -> None:
    x, weight, bias = draw((1, 8, 6, 6, 16, 3), "float16", device)
    x[:, 3:] = 0
    out = conv2d(x, pack(weight[:, :3], bias, "float16", in_channels=8))
    exact, measure = (expected(it[:, :3], weight[:, :3], bias)[0] for it in (x.double(), x))
    close(out, exact, measure)


def test_not_a_number_stays(device: str) -> None:
    x, weight, bias = draw((1, 8, 6, 6, 16, 1), "float16", device)
    x[0, 2, 3, 4] = float("nan")
    for activation in (None, "relu", "elu", "sigmoid"):
        nans = conv2d(x, pack(weight, bias, "float16"), activation=activation).isnan()
        assert nans[0, :, 3, 4].all() and nans.sum() == 16


# ---------------------------------------------------------------------------------------------------------------------
# The choice


#: What the networks ask for at batch 1: B, Cin, H, W, Cout, k; stride; upsample.
LAYERS = [
    ((1, 8, 256, 256, 64, 7), 2, False), ((1, 64, 64, 64, 64, 3), 1, False), ((1, 128, 32, 32, 256, 3), 2, False),
    ((1, 512, 8, 8, 512, 3), 1, False), ((1, 16, 256, 256, 1, 3), 1, False), ((1, 1024, 2, 2, 512, 3), 1, True),
    ((1, 40, 64, 64, 75, 7), 1, False), ((1, 128, 64, 64, 17, 7), 1, False), ((1, 256, 64, 64, 256, 3), 1, False),
    ((1, 256, 64, 64, 32, 1), 1, False), ((32, 256, 64, 64, 128, 3), 1, True), ((1, 64, 256, 256, 3, 7), 1, False),
]  # fmt: skip


@pytest.mark.parametrize("number", sorted(SHARED_PER_BLOCK))
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_configs_fit_the_device(layer: Any, number: int) -> None:
    (B, Cin, H, W, Cout, k), stride, upsample = layer
    packed = pack(torch.zeros(Cout, Cin, k, k), None, "float16", upsample=upsample)
    gpu = EmulatedDevice(
        capability=divmod(number, 10), multiprocessors=132, shared_per_block=SHARED_PER_BLOCK[number]
    )  # fmt: skip
    found = configs((B, Cin, H, W), packed, stride=stride, device=gpu)
    assert 1 <= len(found) <= 8 and len(set(found)) == len(found)
    product = module._product((B, Cin, H, W), packed, module._Options(stride))
    for config in found:
        module._check_config(config, product, gpu)


def test_small_maps_occupy_the_device() -> None:
    gpu = EmulatedDevice(multiprocessors=132)
    for case in ((1, 512, 8, 8, 512, 3), (1, 1024, 4, 4, 1024, 3), (1, 2048, 8, 8, 512, 1)):
        B, Cin, H, W, Cout, k = case
        packed = pack(torch.zeros(Cout, Cin, k, k), None, "float16")
        product = module._product((B, Cin, H, W), packed, module._Options())
        first = next(it for it in configs((B, Cin, H, W), packed, device=gpu) if it.kernel == "mma")
        blocks = product.tiles(TILES[first.tile]) * first.split
        assert 80 <= blocks <= 3 * 132, (case, first)


def test_the_first_config_is_the_default(emulated: EmulatedDevice) -> None:
    x, weight, bias = draw((1, 128, 4, 4, 24, 3), "float16")
    packed = pack(weight, bias, "float16")
    found = configs(x.shape, packed, device=view_device(x))
    assert torch.equal(conv2d(x, packed), conv2d(x, packed, config=found[0]))


def view_device(x: torch.Tensor) -> Any:
    return view(x, "x").device


# ---------------------------------------------------------------------------------------------------------------------
# The twin, and errors


@pytest.mark.parametrize(("case", "asked"), CASES, ids=str)
def test_the_reference_is_what_the_networks_do(case: Any, asked: dict[str, Any]) -> None:
    x, weight, bias = draw(case, "float16")
    asked, x = dict(asked), x.double()
    packed = pack(weight, bias, "float16", upsample=asked.pop("upsample", False), phases=asked.pop("phases", None))
    plain = {name: value for name, value in asked.items() if name not in ("residual", "normalized")}
    shape = conv2d(x, packed, reference=True, **plain).shape
    if asked.get("residual"):
        asked["residual"] = like(shape, torch.float64)
    if asked.get("normalized"):
        asked["normalized"] = (torch.rand(shape[1]), torch.rand(shape[1]), torch.empty(shape, dtype=torch.float64))
    out = conv2d(x, packed, reference=True, **asked)
    exact, second = expected(x, weight, bias, **asked, upsample=packed.upsample)
    torch.testing.assert_close(out, exact)
    if second is not None:
        torch.testing.assert_close(asked["normalized"][2], second)


def test_the_reference_writes_bytes() -> None:
    x, weight, bias = draw((1, 8, 5, 7, 3, 3), "float16")
    packed, out = pack(weight, bias, "float16"), torch.empty(1, 3, 5, 7, dtype=torch.uint8)
    assert conv2d(x.float(), packed, activation="sigmoid", out=out, reference=True) is out
    exact = torch.sigmoid(F.conv2d(x.double(), weight.double(), bias.double(), padding=1)) * 255
    assert (out.double() - exact).abs().max() <= 0.51


X = torch.zeros(2, 16, 4, 6, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"x": X[:, :8]}, r"x must be \[B, Cin, H, W\] with Cin = 16"),
    ({"x": X.contiguous()}, "x must be channels-last"),
    ({"x": X.float()}, "x must be float16 or bfloat16, got float32"),
    ({"x": X.bfloat16()}, "packed.weight must be bfloat16, got float16"),
    ({"x": torch.zeros(2, 4, 6, 20, dtype=torch.float16).permute(0, 3, 1, 2)[:, :16]}, "at multiples of 16 bytes"),
    ({"x": torch.zeros(2, 4, 6, 24, dtype=torch.float16).permute(0, 3, 1, 2)[:, 1:17]}, "at multiples of 16 bytes"),
    ({"stride": 3}, "stride must be 1 or 2, got 3"),
    ({"padding": -1}, "padding must not be negative, got -1"),
    ({"pad_mode": "wrap"}, "pad_mode must be zeros or reflect, got 'wrap'"),
    ({"pad_mode": "reflect", "padding": 4}, "a reflected padding of 4 needs a larger map than 4 × 6"),
    ({"activation": "gelu"}, "activation must be None, relu, elu or sigmoid, got 'gelu'"),
    ({"pool": True, "repeat": True}, "exclude each other"),
    ({"pool": True, "stride": 2}, "pool needs stride 1"),
    ({"pool": True, "padding": 2, "x": X[:, :, :3]}, "a result of even height and width, got 5 × 8"),
    ({"pool": True, "residual": X}, "a residual does not go with pool"),
    ({"residual": X[:, :8]}, "residual must be"),
    ({"residual": X.float()}, "residual must be float16, got float32"),
    ({"out": X.contiguous()}, "out must be channels-last"),
    ({"out": torch.zeros(2, 16, 4, 5, dtype=torch.float16)}, r"out must be \[B, C, H, W\] = \(2, 16, 4, 6\)"),
    ({"out": X.bfloat16()}, "out must be float16 or float32 or uint8, got bfloat16"),
    ({"normalized": (torch.ones(16), torch.ones(8), X)}, r"shift must be \(16,\), got \(8,\)"),
    ({"normalized": (torch.ones(16), torch.ones(32)[::2], X)}, "shift must be contiguous"),
    ({"normalized": (torch.ones(16), torch.ones(16), X.float())}, "second must be float16, got float32"),
    ({"config": Config("mma", 99, 1)}, "config must name the kernel mma, wgmma, spread or patch"),
    ({"config": Config("simt", 0, 1)}, "config must name the kernel mma, wgmma, spread or patch"),
    ({"config": Config("mma", 0, 4)}, "does not serve this convolution on emulated"),
    ({"config": Config("wgmma", 0, 1)}, "does not serve this convolution on emulated"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "message"), WRONG, ids=lambda it: it if isinstance(it, str) else "")
def test_errors(asked: dict[str, Any], message: str, emulated: EmulatedDevice) -> None:
    asked = dict(asked)
    packed = pack(torch.zeros(16, 16, 3, 3), None, "float16")
    with pytest.raises(InputError, match=message):
        conv2d(asked.pop("x", X), packed, **asked)
    assert not emulated.launches


@pytest.mark.parametrize(
    ("shape", "asked", "message"),
    [
        (
            (8, 8, 3, 3),
            {"dtype": "float64"},
            "dtype must be float16 or bfloat16, or float32 for the twin, got 'float64'",
        ),
        ((8, 8, 4, 4), {}, "k of 1, 3, 5 or 7"),
        ((8, 8, 3), {}, "weight must be"),
        ((8, 3, 3, 3), {}, "a multiple of 8, at least the weight's 3, got 3"),
        ((8, 16, 3, 3), {"in_channels": 8}, "at least the weight's 16, got 8"),
        ((8, 8, 1, 1), {"upsample": True}, "upsample is for 3 × 3 weights, got 1 × 1"),
        ((8, 8, 3, 3), {"phases": 4}, "phases must be 1"),
        ((8, 8, 3, 3), {"bias": torch.zeros(7)}, r"bias must be \[Cout\] = \(8,\), got \(7,\)"),
    ],
)
def test_errors_of_packing(shape: tuple[int, ...], asked: dict[str, Any], message: str) -> None:
    asked = {"bias": None, "dtype": "float16", **asked}
    with pytest.raises(InputError, match=message):
        pack(torch.zeros(shape), asked.pop("bias"), asked.pop("dtype"), **asked)


def test_without_a_gpu() -> None:
    with pytest.raises(InputError, match="x must lie on a GPU"):
        conv2d(X, pack(torch.zeros(16, 16, 3, 3), None, "float16"))


def test_bfloat16_needs_ampere() -> None:
    packed = pack(torch.zeros(16, 16, 3, 3), None, "bfloat16")
    with (
        emulation(EmulatedDevice(capability=(7, 5), shared_per_block=SHARED_PER_BLOCK[75])),
        pytest.raises(InputError, match="bfloat16 needs compute capability 8.0"),
    ):
        conv2d(X.bfloat16(), packed)


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@each_dtype
def test_layers_of_the_networks(layer: Any, dtype: str) -> None:
    case, stride, upsample = layer
    x, weight, bias = draw(case, dtype, "cuda")
    packed = pack(weight, bias, dtype, upsample=upsample)
    exact, measure = (expected(it, weight, bias, stride=stride, upsample=upsample)[0] for it in (x.double(), x))
    for config in configs(x.shape, packed, stride=stride, device=view_device(x)):
        for _ in range(2):
            close(conv2d(x, packed, stride=stride, config=config), exact, measure)
