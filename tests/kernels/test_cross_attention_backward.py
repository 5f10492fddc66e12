"""The backward of cross_attention against its formulas in float64 and against PyTorch's autograd of the same dtype."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from emulated import EmulatedDevice, emulation
from torch import Tensor

from dagan_rt.kernels import cross_attention
from dagan_rt.kernels._attention_backward import WIDTHS, backward

NAMES = ("query", "key", "value", "gamma")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL = (True, True, True, True)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


@dataclass
class Case:
    """Inputs on the CPU, [B, C, N] and contiguous."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    gamma: Tensor

    @classmethod
    def draw(cls, B=1, D=8, C=16, N=40, M=40, dtype=torch.float32, *, logits=1.0, gamma=0.7):
        generator = torch.Generator().manual_seed(B + 10 * D + 100 * C + 1000 * N + M)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        query = (normal(B, D, N) * logits).to(dtype)
        return cls(query, normal(B, D, M), normal(B, C, M), normal(B, C, N), torch.tensor([gamma]))

    def forward(self, dtype):
        """log_sum_exp [B, N] and attended [B, C, N] in this precision."""
        query, key, value = (it.to(dtype) for it in (self.query, self.key, self.value))
        logits = query.transpose(1, 2) @ key
        return torch.logsumexp(logits, -1), value @ torch.softmax(logits, -1).transpose(1, 2)

    def autograd(self, dtype):
        """The gradients of the networks' formula by PyTorch, computed in this dtype throughout."""
        inputs = [it.to(dtype).requires_grad_() for it in (self.query, self.key, self.value, self.gamma)]
        query, key, value, gamma = inputs
        weights = torch.softmax(torch.matmul(query.transpose(1, 2), key), dim=-1)
        out = gamma * torch.matmul(value, weights.transpose(1, 2))
        return torch.autograd.grad(out, inputs, self.grad.to(dtype))

    def floors(self):
        """What float32 arithmetic alone may cost: its epsilon times the sum of the terms' sizes.

        A logit of size L is off by epsilon · L, and the weight by as much of itself; delta comes from an `attended`
        that was rounded to the dtype, and its terms' errors add up like those of a random walk.
        """
        epsilon, step = torch.finfo(torch.float32).eps, torch.finfo(self.query.dtype).eps
        query, key, value, grad, gamma = (
            it.double() for it in (self.query, self.key, self.value, self.grad, self.gamma)
        )
        logits = query.transpose(1, 2) @ key
        weights = torch.softmax(logits, -1)  # [B, N, M]
        terms = weights * (grad.abs().transpose(1, 2) @ value.abs())
        loss = epsilon * (4 + logits.abs().max()) * gamma.abs()
        attended = value @ weights.transpose(1, 2)
        return (
            loss * (key.abs() @ terms.transpose(1, 2)).max(),
            loss * (query.abs() @ terms).max(),
            loss * (grad.abs() @ weights).max(),
            epsilon * (grad * attended).abs().sum() + step * (grad * attended).norm(),
        )


def run(case, place="emulated", *, layout="nchw", needs=ALL, shape=lambda it: it, device=None, misaligned=False):
    """The kernels' gradients, brought to the CPU, and the `attended` they were given rounded as the forward does."""
    log_sum_exp, attended = case.forward(torch.float64)
    log_sum_exp, attended = log_sum_exp.float(), attended.to(case.query.dtype)

    def laid_out(tensor):
        tensor = shape(tensor.to("cuda" if place == "cuda" else "cpu"))
        if layout == "nhwc":
            tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
        if misaligned:
            memory = tensor.new_empty(tensor.numel() + 1)[1:]
            tensor = memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        return tensor

    tensors = [laid_out(it) for it in (case.grad, case.query, case.key, case.value, attended)]
    extra = [it.to(tensors[0].device) for it in (log_sum_exp, case.gamma)]
    where = emulation(device or EmulatedDevice()) if place == "emulated" else contextlib.nullcontext()
    with where:
        gradients = backward(*tensors, *extra, needs)
    for gradient, like in zip(gradients, (*tensors[1:4], case.gamma), strict=True):
        if gradient is not None:
            assert gradient.shape == like.shape and gradient.dtype == like.dtype
            assert gradient.ndim == 1 or 1 in like.shape or gradient.stride() == like.stride()
    return [
        None if it is None else it.cpu().reshape(it.shape[0], it.shape[1] if it.ndim > 1 else 1, -1) for it in gradients
    ]


def check(case, gradients):
    exact, same = case.autograd(torch.float64), case.autograd(case.query.dtype)
    for name, ours, theirs, truth, floor in zip(NAMES, gradients, same, exact, case.floors(), strict=True):
        if ours is None:
            continue
        error = (ours.double().reshape(truth.shape) - truth).abs().max()
        allowed = 2 * (theirs.double() - truth).abs().max() + floor
        assert error <= allowed, (
            f"d {name} is off by {error:.3g}, allowed {allowed:.3g}, largest {truth.abs().max():.3g}"
        )


# Tiles are of 64 rows, 32 (tensor cores) or 128 columns, slabs of 32 or 128 channels, chunks of 8 or 16.
SHAPES = {
    "one": dict(B=1, D=1, C=1, N=1, M=1),
    "odd": dict(B=3, D=5, C=7, N=33, M=65),
    "whole tiles": dict(B=1, D=32, C=64, N=64, M=128),
    "more queries": dict(B=2, D=8, C=16, N=136, M=24),
    "more keys": dict(B=2, D=24, C=40, N=24, M=200),
    "wide": dict(B=1, D=32, C=256, N=40, M=72),
    "wide heads": dict(B=1, D=64, C=200, N=72, M=40),
    "beyond tensor cores": dict(B=1, D=80, C=264, N=33, M=40),
}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_as_close_to_float64_as_pytorchs(place, shape, dtype, layout):
    case = Case.draw(**SHAPES[shape], dtype=dtype)
    check(case, run(case, place, layout=layout))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 256, 1024, 1024), (1, 32, 256, 1023, 777), (1, 33, 65, 1500, 2049)], ids=str)
def test_large_gradients_are_as_close_to_float64_as_pytorchs(shape, dtype, layout):
    case = Case.draw(*shape, dtype=dtype)
    check(case, run(case, "cuda", layout=layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feature_maps_keep_their_shape_and_layout(place, dtype):
    for layout in ("nchw", "nhwc"):
        case = Case.draw(2, 8, 16, 5 * 7, 5 * 7, dtype)
        check(case, run(case, place, layout=layout, shape=lambda it: it.unflatten(2, (5, 7))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_is_not_aligned(place, dtype):
    for layout in ("nchw", "nhwc"):
        case = Case.draw(1, 16, 16, 40, 48, dtype)
        check(case, run(case, place, layout=layout, misaligned=True))


def test_grad_may_come_in_another_layout(place):
    case = Case.draw(1, 8, 16, 40, 40)
    where = emulation(EmulatedDevice()) if place == "emulated" else contextlib.nullcontext()
    on = "cuda" if place == "cuda" else "cpu"
    log_sum_exp, attended = (it.float().to(on) for it in case.forward(torch.float64))
    grad = case.grad.to(on).transpose(1, 2).contiguous().transpose(1, 2)
    inputs = [it.to(on) for it in (case.query, case.key, case.value)]
    with where:
        gradients = backward(grad, *inputs, attended, log_sum_exp, case.gamma.to(on), ALL)
        broadcast = backward(
            case.grad[:, :, :1].to(on).expand_as(grad), *inputs, attended, log_sum_exp, case.gamma.to(on), ALL
        )
    check(case, [it.cpu() for it in gradients])
    case.grad = case.grad[:, :, :1].expand_as(grad)
    check(case, [it.cpu() for it in broadcast])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gamma_learns_from_zero_and_alone(place, dtype):
    case = Case.draw(2, 8, 16, 40, 24, dtype, gamma=0.0)
    gradients = run(case, place)
    check(case, gradients)
    assert gradients[3].abs().item() > 0.1
    for gradient in gradients[:3]:
        assert not gradient.any()


def test_gamma_of_more_blocks_than_threads_sum_them(place):
    case = Case.draw(1, 1, 2, 32 * 256 + 100, 2)
    case.grad += 0.3  # so that no part of the sum is near zero
    case.value += 1
    check(case, run(case, place, needs=(False, False, False, True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", [30.0, 1000.0])
def test_huge_logits(place, dtype, logits):
    case = Case.draw(1, 16, 24, 72, 40, dtype, logits=logits)
    gradients = run(case, place)
    assert all(gradient.isfinite().all() for gradient in gradients)
    check(case, gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_logits_far_below_zero(place, dtype):
    """A key that is not there has the logit 0, beyond all others: it must weigh nothing."""
    case = Case.draw(1, 16, 24, 40, 40, dtype)
    case.query, case.key = case.query.abs() * -4, case.key.abs() * 4
    gradients = run(case, place)
    assert all(gradient.isfinite().all() for gradient in gradients)
    check(case, gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_what_is_needed(place, dtype):
    case = Case.draw(1, 8, 16, 40, 24, dtype)
    everything = run(case, place)
    for bits in range(16):
        needs = tuple(bool(bits >> i & 1) for i in range(4))
        gradients = run(case, place, needs=needs)
        for gradient, whole, needed in zip(gradients, everything, needs, strict=True):
            assert (gradient is not None) == needed
            assert gradient is None or torch.equal(gradient, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_of_the_columns_add_up(dtype):
    """A large GPU splits the columns of a small problem, one multiprocessor does not; some splits are empty."""
    case = Case.draw(1, 8, 16, 40, 300, dtype)
    for multiprocessors in (1, 3, 200):
        check(case, run(case, device=EmulatedDevice(multiprocessors=multiprocessors)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_inputs_give_equal_bits(place, dtype):
    case = Case.draw(2, 8, 16, 100, 90, dtype)
    seeds = [EmulatedDevice(seed=seed) for seed in (0, 1, 2)]
    first, *others = [run(case, place, device=device) for device in seeds]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_tensor_cores_are_used_where_they_serve(capability):
    for dtype in DTYPES:
        device = EmulatedDevice(capability=capability)
        case = Case.draw(1, 8, 16, 24, 24, dtype)
        check(case, run(case, device=device))
        mma = any(name.startswith("backward_keys_") for name in device.launches)
        assert mma == (dtype != torch.float32 and capability >= (8, 0))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_gradcheck(place, layout):
    """Through the public function: differences of its own outputs, as exact as float32 lets them be."""
    case = Case.draw(2, 3, 2, 6, 4)
    tensors = [case.query.unflatten(2, (2, 3)), case.key.unflatten(2, (2, 2)), case.value.unflatten(2, (2, 2))]
    tensors.append(case.grad.unflatten(2, (2, 3)))  # any residual
    if layout == "nhwc":
        tensors = [it.contiguous(memory_format=torch.channels_last) for it in tensors]
    inputs = [it.to("cuda" if place == "cuda" else "cpu").requires_grad_() for it in (*tensors, case.gamma)]
    where = emulation(EmulatedDevice()) if place == "emulated" else contextlib.nullcontext()
    with where, pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(cross_attention, inputs, eps=1e-2, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_public_function_gives_the_networks_gradients(place, dtype):
    case = Case.draw(1, 8, 16, 40, 24, dtype)
    leaves = (case.query, case.key, case.value, torch.zeros_like(case.grad), case.gamma)
    inputs = [it.to("cuda" if place == "cuda" else "cpu").requires_grad_() for it in leaves]
    where = emulation(EmulatedDevice()) if place == "emulated" else contextlib.nullcontext()
    with where:
        out = cross_attention(*inputs)
        *gradients, of_residual, of_gamma = torch.autograd.grad(out, inputs, case.grad.to(out.device))
    assert torch.equal(of_residual.cpu(), case.grad)
    check(case, [it.cpu() for it in (*gradients, of_gamma)])


@pytest.mark.slow
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_every_width_of_the_tensor_cores(widths, layout):
    case = Case.draw(1, *widths, 72, 40, torch.bfloat16)
    check(case, run(case, layout=layout))


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address", "thread"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sanitizers_find_nothing(dtype, sanitize):
    for layout in ("nchw", "nhwc"):
        for N, M in ((72, 40), (33, 65)):
            run(Case.draw(2, 7, 17, N, M, dtype), layout=layout, device=EmulatedDevice(sanitize=sanitize))
            run(Case.draw(1, 8, 16, N, M, dtype), layout=layout, device=EmulatedDevice(sanitize=sanitize))
