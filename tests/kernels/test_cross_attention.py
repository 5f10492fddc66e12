"""Cross-modal attention against PyTorch in float64, with PyTorch in the same dtype as the measure of its errors."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from emulated import EmulatedDevice, emulation

from dagan_rt.errors import InputError
from dagan_rt.kernels._arrays import view
from dagan_rt.kernels._build import SHARED_PER_BLOCK
from dagan_rt.kernels.cross_attention import cross_attention

module = importlib.import_module("dagan_rt.kernels.cross_attention")

# B, D, C, pixels of the queries, pixels of the keys
CASES = [
    (1, 8, 40, (1, 1), (1, 1)),
    (3, 5, 7, (3, 5), (1, 1)),
    (1, 8, 40, (8, 8), (8, 8)),
    (3, 32, 64, (9, 11), (13, 7)),  # nothing aligned in nchw
    (2, 3, 9, (5, 5), (7, 9)),  # nor in nhwc
    (1, 16, 24, (8, 16), (8, 10)),  # the last tile of keys is not full
    (1, 40, 272, (2, 8), (5, 16)),  # two chunks of channels
    (1, 72, 16, (4, 4), (5, 8)),
    (1, 256, 32, (1, 17), (2, 35)),
    (1, 32, 256, (8, 17), (8, 9)),  # the published model's widths
    (1, 32, 4, (3, 2), (113, 203)),
]
KERNELS = [("simt", torch.float32), ("simt", torch.bfloat16), ("mma", torch.float16), ("mma", torch.bfloat16)]
KERNELS += [("wgmma", torch.float16), ("wgmma", torch.bfloat16)]
each_kernel = pytest.mark.parametrize(("kernel", "dtype"), KERNELS, ids=lambda it: str(it).removeprefix("torch."))
each_layout = pytest.mark.parametrize("layout", ["nchw", "nhwc"])


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors are to lie; an emulated GPU shares the keys among few blocks."""
    if request.param == "cuda":
        yield "cuda"
    else:
        with emulation(EmulatedDevice(multiprocessors=2)):
            yield "cpu"


def draw(
    shape: tuple[int, int, int, tuple[int, int], tuple[int, int]],
    dtype: torch.dtype,
    layout: str = "nchw",
    where: str = "cpu",
    scale: float = 1,
) -> list[torch.Tensor]:
    """query, key, value, residual and gamma; `scale` of the first two."""
    B, D, C, of_query, of_key = shape
    random = torch.Generator().manual_seed(B + D + C)
    order = torch.channels_last if layout == "nhwc" else torch.contiguous_format

    def normal(channels: int, pixels: tuple[int, int], scale: float = 1) -> torch.Tensor:
        tensor = torch.randn(B, channels, *pixels, generator=random) * scale
        return tensor.to(where, dtype).contiguous(memory_format=order)

    tensors = [normal(D, of_query, scale), normal(D, of_key, scale), normal(C, of_key), normal(C, of_query)]
    return [*tensors, torch.tensor([0.7], device=where)]


def channels(kernel: str) -> int:
    """Of a value, small but where only the published model's are served."""
    return 256 if kernel == "wgmma" else 40


def exact(*arrays: torch.Tensor) -> torch.Tensor:
    return cross_attention(*(array.double() for array in arrays), reference=True)


def attend(*arrays: torch.Tensor, kernel: str | None, **options: Any) -> torch.Tensor:
    """The result; skips where the kernel is for other GPUs or shapes."""
    try:
        return cross_attention(*arrays, kernel=kernel, **options)
    except InputError as error:
        if "does not serve" in str(error):
            pytest.skip(str(error))
        raise


def check(out: torch.Tensor, *arrays: torch.Tensor) -> None:
    """At most twice the error of PyTorch in this dtype, largest and mean square, and one rounding.

    Half a unit in the last place of the largest element more, because in a small tensor PyTorch may be exact by luck.
    """
    expected = exact(*arrays)
    rounding = torch.finfo(out.dtype).eps / 2 * expected.abs().max()
    errors = (out.double() - expected).abs()
    allowed = (cross_attention(*arrays, reference=True).double() - expected).abs()
    assert errors.max() <= 2 * allowed.max() + rounding
    assert errors.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + rounding


@pytest.mark.parametrize("case", CASES, ids=str)
@each_layout
@each_kernel
def test_close_to_float64(kernel: str, dtype: torch.dtype, layout: str, case: Any, where: str) -> None:
    arrays = draw(case, dtype, layout, where, scale=0.5 if case[1] > 64 else 1)
    out = attend(*arrays, kernel=kernel)
    assert out.shape == arrays[3].shape and out.dtype == dtype
    assert out.stride() == arrays[3].stride()
    check(out, *arrays)


@pytest.mark.gpu
@each_layout
@pytest.mark.parametrize("kernel", ["simt", "mma", "wgmma", None])
@pytest.mark.parametrize(
    "case",
    [(1, 32, 256, (64, 64), (64, 64)), (3, 32, 256, (33, 64), (64, 64)), (1, 8, 40, (113, 203), (113, 203))],
    ids=str,
)
def test_whole_images(case: Any, kernel: str | None, layout: str) -> None:
    arrays = draw(case, torch.float32 if kernel == "simt" else torch.float16, layout, "cuda")
    check(attend(*arrays, kernel=kernel), *arrays)


# ---------------------------------------------------------------------------------------------------------------------
# Shares of the keys


@each_layout
@each_kernel
def test_shares_of_the_keys_are_joined_whichever_comes_last(kernel: str, dtype: torch.dtype, layout: str) -> None:
    arrays = draw((2, 32, channels(kernel), (8, 17), (40, 16)), dtype, layout)
    outs = []
    for multiprocessors, seed in ((1, 0), (12, 0), (12, 1), (12, 2), (12, 3)):
        with emulation(EmulatedDevice(multiprocessors=multiprocessors, seed=seed)) as device:
            outs.append(attend(*arrays, kernel=kernel))
            again = cross_attention(*arrays, kernel=kernel)  # finds the counters as they were
        assert torch.equal(again, outs[-1])
        assert device.launches == device.launches[:1] * 2
    check(outs[0], *arrays)
    check(outs[1], *arrays)
    assert all(torch.equal(out, outs[1]) for out in outs[2:])


@each_layout
@each_kernel
def test_tiles_are_not_overwritten_while_they_are_read(kernel: str, dtype: torch.dtype, layout: str) -> None:
    arrays = draw((1, 32, channels(kernel), (8, 17), (40, 24)), dtype, layout)  # 15 tiles of wgmma's, thrice its ring
    outs = []
    for seed in range(4):
        with emulation(EmulatedDevice(multiprocessors=1, seed=seed)):
            outs.append(attend(*arrays, kernel=kernel))
    check(outs[0], *arrays)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_keys_are_shared_where_there_are_few_queries() -> None:
    with recording(multiprocessors=132) as device:
        arrays = draw((1, 32, 256, (64, 64), (64, 64)), torch.float16)
        cross_attention(*arrays, kernel="mma")
        assert device.last.grid == (64, 4, 1)
        cross_attention(*draw((32, 32, 256, (64, 64), (64, 64)), torch.float16), kernel="mma")
        assert device.last.grid == (2048, 1, 1)
        assert device.last.args[8:10] == (None, None)


@pytest.mark.parametrize("slots", [2, 72, 264])
@pytest.mark.parametrize("groups", [1, 3, 64, 1000])
@pytest.mark.parametrize("tiles", [1, 2, 5, 63, 64, 1000])
def test_no_share_is_empty(groups: int, tiles: int, slots: int) -> None:
    tiles_a_share = module._tiles_a_share(groups, tiles, slots)
    shares = -(-tiles // tiles_a_share)
    assert 1 <= tiles_a_share <= tiles and shares <= 32
    assert (shares - 1) * tiles_a_share < tiles


# ---------------------------------------------------------------------------------------------------------------------
# Logits of all kinds


@each_layout
@each_kernel
@pytest.mark.parametrize("size", [10, 100, 60000])
def test_huge_logits(kernel: str, dtype: torch.dtype, layout: str, size: float, where: str) -> None:
    # Whole numbers, so that every logit is exact in float32 whatever the order of the sum. Half precision would
    # overflow in PyTorch's logits, so the measure is the rounding of the result.
    random = torch.Generator().manual_seed(0)
    arrays = draw((1, 32, channels(kernel), (8, 8), (8, 16)), dtype, layout, where)
    for array in arrays[:2]:
        signs = torch.randint(-1, 2, array.shape, generator=random) * (torch.rand(array.shape, generator=random) < 0.2)
        array.copy_(signs * size)
    out, expected = attend(*arrays, kernel=kernel), exact(*arrays)
    assert (out.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


@each_kernel
@pytest.mark.parametrize("level", [0.0, 1e4, -1e4])
def test_equal_logits_give_the_mean(kernel: str, dtype: torch.dtype, level: float, where: str) -> None:
    arrays = draw((1, 32, channels(kernel), (8, 8), (8, 9)), dtype, "nchw", where)
    arrays[0].fill_(1)
    arrays[1].fill_(level / 32)
    out = attend(*arrays, kernel=kernel).double()
    expected = arrays[2].double().mean((2, 3), keepdim=True) * arrays[4] + arrays[3].double()
    assert (out - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


@each_kernel
def test_the_largest_logit_may_come_last_or_first(kernel: str, dtype: torch.dtype, where: str) -> None:
    arrays = draw((1, 32, channels(kernel), (8, 8), (20, 16)), dtype, "nchw", where)
    arrays[0].fill_(1)
    for ramp in (torch.linspace(-3, 3, 320), torch.linspace(3, -3, 320)):
        arrays[1].copy_(ramp.reshape(20, 16).to(where))
        check(attend(*arrays, kernel=kernel), *arrays)


@each_layout
@each_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1, 2, 3, 4])
def test_what_is_not_finite_spreads_as_in_pytorch(
    kernel: str, dtype: torch.dtype, layout: str, which: int, value: float, where: str
) -> None:
    arrays = draw((2, 32, channels(kernel), (8, 9), (8, 10)), dtype, layout, where)
    place = (0,) if which == 4 else (1, 3, 5, 6)
    arrays[which][place] = value
    if which == 0 and value < 0:  # a row of nothing but -infinity, whose softmax is 0 / 0
        arrays[1].abs_()
    out, expected = attend(*arrays, kernel=kernel), exact(*arrays)
    if which == 2:  # 0 · inf is NaN where a weight is less than what the dtype holds, which is not the same in float64
        assert not out[1, 3].isfinite().any()
        assert out[0].isfinite().all() and out[1, :3].isfinite().all() and out[1, 4:].isfinite().all()
        return
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    known = expected.isfinite()
    assert (out[known].double() - expected[known]).abs().max() < 0.1 if known.any() else True


# ---------------------------------------------------------------------------------------------------------------------
# What the backward needs


@each_layout
@each_kernel
@pytest.mark.parametrize("multiprocessors", [1, 12])
def test_attended_and_log_sum_exp(kernel: str, dtype: torch.dtype, layout: str, multiprocessors: int) -> None:
    arrays = draw((2, 32, channels(kernel), (3, 24), (14, 24)), dtype, layout)
    with emulation(EmulatedDevice(multiprocessors=multiprocessors)):
        problem = module._checked(*arrays)
        out, attended = torch.empty_like(arrays[3]), torch.empty_like(arrays[3])
        log_sum_exp = torch.empty(2, problem.N)
        if not module.KERNELS[kernel][0](problem):
            pytest.skip(f"{kernel} does not serve")
        results = module._Results(view(out, "out"), view(attended, "attended"), view(log_sum_exp, "log_sum_exp"))
        module._launch(problem, results, 0, kernel)
        assert torch.equal(out, cross_attention(*arrays, kernel=kernel))
    query, key = (array.double().flatten(2) for array in arrays[:2])
    expected = (query.transpose(1, 2) @ key).logsumexp(-1)
    assert (log_sum_exp - expected).abs().max() < 2e-6 * expected.abs().max()
    check(attended, *arrays[:3], torch.zeros_like(arrays[3]), torch.ones(1))


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype, layout: str, where: str) -> None:
    arrays = draw((2, 16, 24, (4, 8), (3, 16)), dtype, layout, where)

    def gradients(tensors: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        out = cross_attention(*tensors, **options)
        random = torch.Generator().manual_seed(1)
        return torch.autograd.grad((out * torch.randn(out.shape, generator=random).to(out)).sum(), tensors)

    found = gradients(arrays)
    expected = gradients([array.double() for array in arrays], reference=True)
    pytorch = gradients(arrays, reference=True)
    for mine, theirs, right, array in zip(found, pytorch, expected, arrays, strict=True):
        assert mine.shape == array.shape and mine.dtype == array.dtype
        # The gradient of gamma is one number, of which PyTorch may be closer by luck than sums of that length are.
        floor = 4 * torch.finfo(dtype).eps * right.abs().max()
        assert (mine - right).abs().max() <= 2 * (theirs - right).abs().max() + floor


def test_gradients_only_where_asked_for(where: str) -> None:
    arrays = draw((1, 8, 8, (2, 3), (2, 3)), torch.float32, "nchw", where)
    arrays[1].requires_grad_()
    cross_attention(*arrays).sum().backward()
    assert arrays[1].grad is not None
    with pytest.raises(InputError, match=r"out cannot be given where a gradient is asked for"):
        cross_attention(*arrays, out=torch.empty_like(arrays[3]))
    with torch.no_grad():
        out = torch.empty_like(arrays[3])
        assert cross_attention(*arrays, out=out) is out


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@each_layout
@pytest.mark.parametrize(("kernel", "dtype"), [("simt", torch.float32), ("mma", torch.float16)], ids=str)
def test_pixels_in_one_axis(kernel: str, dtype: torch.dtype, layout: str, where: str) -> None:
    arrays = draw((2, 8, 24, (4, 6), (4, 4)), dtype, layout, where)
    flat = [array.flatten(2) for array in arrays[:4]]
    out = cross_attention(*flat, arrays[4], kernel=kernel)
    assert out.stride() == flat[3].stride()
    assert torch.equal(out, cross_attention(*arrays, kernel=kernel).flatten(2))


@each_kernel
def test_out_may_be_the_residual(kernel: str, dtype: torch.dtype, where: str) -> None:
    arrays = draw((1, 32, channels(kernel), (8, 9), (8, 16)), dtype, "nchw", where)
    expected = attend(*arrays, kernel=kernel)
    assert cross_attention(*arrays, kernel=kernel, out=arrays[3]) is arrays[3]
    assert torch.equal(arrays[3], expected)


@pytest.mark.parametrize(("kernel", "dtype"), [("simt", torch.float32), ("mma", torch.float16)], ids=str)
def test_an_address_that_is_not_aligned(kernel: str, dtype: torch.dtype, where: str) -> None:
    arrays = draw((1, 16, 16, (8, 8), (8, 8)), dtype, "nchw", where)
    shifted = []
    for array in arrays[:4]:
        memory = torch.empty(array.numel() + 1, dtype=dtype, device=where)
        shifted.append(memory[1:].reshape(array.shape).copy_(array))
    out = cross_attention(*shifted, arrays[4], kernel=kernel)
    assert torch.equal(out, cross_attention(*arrays, kernel=kernel))


@pytest.mark.parametrize(("D", "C"), [(1, 16), (16, 1)])
def test_one_channel_lies_in_either_layout(D: int, C: int, where: str) -> None:
    arrays = draw((2, D, C, (3, 5), (4, 4)), torch.float32, "nhwc", where)
    check(cross_attention(*arrays), *arrays)


# ---------------------------------------------------------------------------------------------------------------------
# Which kernel


class recording(EmulatedDevice):  # noqa: N801 (reads as what it does)
    """A device on which launches are only recorded."""

    def launch(self, launch: Any, stream: int = 0) -> None:
        self.last = launch

    def __enter__(self) -> Any:
        self._emulation = emulation(self)
        return self._emulation.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._emulation.__exit__(*error)


@pytest.mark.parametrize(
    ("dtype", "number", "source"),
    [
        (torch.float32, 75, "forward_simt"),
        (torch.float16, 75, "forward_mma"),
        (torch.bfloat16, 75, "forward_simt"),
        (torch.float32, 80, "forward_simt"),
        (torch.float16, 80, "forward_mma"),
        (torch.bfloat16, 86, "forward_mma"),
        (torch.bfloat16, 100, "forward_mma"),
        (torch.float16, 120, "forward_mma"),
    ],
)
def test_the_kernel_for_a_device(dtype: torch.dtype, number: int, source: str) -> None:
    arrays = draw((1, 32, 256, (8, 8), (8, 8)), dtype)
    with recording(capability=divmod(number, 10), shared_per_block=SHARED_PER_BLOCK[number]) as device:
        cross_attention(*arrays)
    assert device.last.unit.source == source
    assert device.last.unit in module.UNITS


@pytest.mark.parametrize("number", SHARED_PER_BLOCK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shared_memory_fits_every_device(number: int, dtype: torch.dtype) -> None:
    with recording(capability=divmod(number, 10), shared_per_block=SHARED_PER_BLOCK[number]) as device:
        for D in (1, 8, 32, 33, 64, 100, 256, 300):
            for C in (1, 17, 40, 96, 256, 257, 700):
                cross_attention(*draw((1, D, C, (2, 2), (2, 2)), dtype))
                assert device.last.shared <= SHARED_PER_BLOCK[number]
                defines = dict(device.last.unit.defines)
                assert defines["CHANNELS"] * device.last.grid[1] >= C


@pytest.mark.parametrize(("C", "chunk"), [(1, 16), (16, 16), (40, 64), (256, 256), (272, 128), (320, 128), (512, 256)])
def test_chunks_of_channels_waste_little(C: int, chunk: int) -> None:
    assert module._chunk(C, 32, (16, 32, 64, 128, 256)) == chunk


def test_a_kernel_can_be_asked_for(emulated: EmulatedDevice) -> None:
    arrays = draw((1, 8, 8, (2, 2), (2, 2)), torch.float32)
    with pytest.raises(InputError, match=r"the kernel mma does not serve these arrays on emulated"):
        cross_attention(*arrays, kernel="mma")
    with pytest.raises(InputError, match=r"kernel must be wgmma, mma, simt or None, got best"):
        cross_attention(*arrays, kernel="best")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: lambda q: q[0, 0]}, r"query must be \[B, D, h, w\] or \[B, D, N\], got \(4, 4\)"),
        ({0: lambda q: q.double()}, r"query must be float32, float16, bfloat16 or uint8, got float64"),
        ({1: lambda k: k[:, :7]}, r"key must be \[B, D, h, w\] = \(2, 8, \*, \*\), got \(2, 7, 3, 5\)"),
        ({1: lambda k: k.half()}, r"key must be float32, got float16"),
        ({2: lambda v: v[..., 1:]}, r"value must be \[B, C, h, w\] = \(2, \*, 3, 5\), got \(2, 6, 3, 4\)"),
        ({3: lambda r: r[:, 1:]}, r"residual must be \[B, C, h, w\] = \(2, 6, 4, 4\), got \(2, 5, 4, 4\)"),
        ({4: lambda g: g.half()}, r"gamma must be float32, got float16"),
        ({4: lambda g: g.expand(2)}, r"gamma must be \(1,\), got \(2,\)"),
        (
            {2: lambda v: v.contiguous(memory_format=torch.channels_last)},
            r"must all be contiguous or all channels-last",
        ),
        ({0: lambda q: q.transpose(2, 3)}, r"must all be contiguous or all channels-last"),
        ({1: lambda k: k[..., :0], 2: lambda v: v[..., :0]}, r"key must not be empty, got the shape \(2, 8, 3, 0\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[int, Any], message: str, emulated: EmulatedDevice) -> None:
    arrays = draw((2, 8, 6, (4, 4), (3, 5)), torch.float32)
    for which, function in change.items():
        arrays[which] = function(arrays[which])
    with pytest.raises(InputError, match=message):
        cross_attention(*arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out[:1], r"out must be \(2, 6, 4, 4\), got \(1, 6, 4, 4\)"),
        (lambda out: out.half(), r"out must be float32, got float16"),
        (lambda out: out.transpose(2, 3), r"out must be contiguous as residual is"),
    ],
)
def test_an_out_that_does_not_fit_is_refused(change: Any, message: str, emulated: EmulatedDevice) -> None:
    arrays = draw((2, 8, 6, (4, 4), (3, 5)), torch.float32)
    with pytest.raises(InputError, match=message):
        cross_attention(*arrays, out=change(arrays[3].clone()))


def test_without_a_gpu_the_reference_is_named() -> None:
    arrays = draw((1, 8, 6, (4, 4), (3, 5)), torch.float32)
    with pytest.raises(InputError, match=r"query must lie on a GPU.*reference=True"):
        cross_attention(*arrays)
    assert cross_attention(*arrays, reference=True).shape == (1, 6, 4, 4)


def test_the_reference_against_a_loop() -> None:
    arrays = draw((2, 3, 4, (2, 3), (3, 2)), torch.float64)
    query, key, value, residual = (array.flatten(2).numpy() for array in arrays[:4])
    expected = np.empty_like(residual)
    for b in range(2):
        for n in range(6):
            weights = np.exp([query[b, :, n] @ key[b, :, m] for m in range(6)])
            expected[b, :, n] = arrays[4].item() * (value[b] @ weights) / weights.sum() + residual[b, :, n]
    np.testing.assert_allclose(cross_attention(*arrays, reference=True).flatten(2).numpy(), expected, rtol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# Races and reads beside arrays


@pytest.mark.slow
@each_layout
@pytest.mark.parametrize("sanitize", ["address", "thread"])
@pytest.mark.parametrize(("kernel", "dtype"), [("simt", torch.float32), ("mma", torch.float16)], ids=str)
def test_sanitizers_find_nothing(kernel: str, dtype: torch.dtype, layout: str, sanitize: str) -> None:
    for case in ((1, 32, 40, (9, 9), (9, 15)), (1, 16, 64, (8, 9), (8, 25))):
        arrays = draw(case, dtype, layout)
        with emulation(EmulatedDevice(multiprocessors=8, sanitize=sanitize)):
            out = cross_attention(*arrays, kernel=kernel)
        check(out, *arrays)
