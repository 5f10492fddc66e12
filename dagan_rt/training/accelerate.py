"""Quicker forms of the generator's warp and attention for training: those of `dagan_rt.kernels` on a GPU, where the
attention's is for 16 bits; on a CPU PyTorch's fused attention, which does not store the N × N logits either (two cores,
float32, N = 4096, batch 8, forward and backward: 0.65 s in place of 2.9 s).

Beside what the networks call by themselves, on an NVIDIA H200 with the published sizes, channels-last, batches of 8 to
32 (benchmarks/results/kernels-h200.json): the warp took an eighth to a twentieth of the time forward and a fifth to a
third backward in every dtype; attention in 16 bits a fifth forward and two fifths backward. cuDNN's attention, which
the networks do not call, is 1.2 to 1.4 times as fast backward. In float32 the attention kernels take twice PyTorch's
time, but no kernel stores the N × N logits: there they are for sizes whose logits do not fit the GPU's memory.

What was measured are the functions alone. Training with them has not been run on a GPU yet, so each is tried against
its PyTorch twin before it takes the place of one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from dagan_rt import kernels
from dagan_rt.networks.attention import cross_attention
from dagan_rt.networks.generator import Generator
from dagan_rt.networks.model import Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = (8, 0)  # the least compute capability whose 16-bit attention runs on them, forward and backward
COPIES = 4  # of the logits that PyTorch holds at a time: logits and weights, and the gradients of both
PIXELS = 12  # side of what the kernels are tried on
MOST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.005}  # of a trial, relative


def accelerate(model: Model, precision: str = "fp32", batch: int = 1) -> list[str]:
    """Let the model's generator warp and attend by CUDA kernels where they run and pay; a line on each says what was
    done and why. On a CPU the attention is PyTorch's fused one, and there is nothing to say.

    precision: fp32, bf16 or fp16, in which it is trained; batch: images that it takes at a time.
    State dicts do not change; another `Model` has PyTorch's functions again.
    """
    generator, device = model.generator, next(model.parameters()).device
    if device.type != "cuda":
        if generator.config.parts.attention:
            generator.AttnModule.attend = fused_attention
        return []
    notes = [_use_warp(generator, device, DTYPES[precision])]
    if generator.config.parts.attention:
        notes.append(_use_attention(generator, device, DTYPES[precision], batch))
    return notes


def _use_warp(generator: Generator, device: torch.device, dtype: torch.dtype) -> str:
    if torch.are_deterministic_algorithms_enabled():
        return "warp: PyTorch's, for the kernel adds up gradients in any order"
    if wrong := fault(
        partial(warp, reference=False), partial(warp, reference=True), _warp_trial(generator, device, dtype)
    ):
        return f"warp: PyTorch's, for the kernel does not run here: {wrong}"
    generator.warp = warp
    return "warp: by the CUDA kernel"


def _use_attention(generator: Generator, device: torch.device, dtype: torch.dtype, batch: int) -> str:
    config = generator.config
    pixels = (config.size // 2**config.down_blocks) ** 2
    too_many = COPIES * 4 * batch * pixels**2 > torch.cuda.get_device_properties(device).total_memory // 2
    if dtype == torch.float32 and not too_many:
        return "attention: PyTorch's, which is faster in float32"
    if dtype != torch.float32 and torch.cuda.get_device_capability(device) < TENSOR_CORES:
        return "attention: PyTorch's, for tensor cores of this GPU are not used by the kernel"
    kernel = partial(attention, in_float32=True)
    if wrong := fault(kernel, cross_attention, _attention_trial(generator, device, dtype)):
        return f"attention: PyTorch's, for the kernel does not run here: {wrong}"
    generator.AttnModule.attend = partial(attention, in_float32=too_many)
    return "attention: by the CUDA kernel" + (", for its logits would not fit the memory" if too_many else "")


# ---------------------------------------------------------------------------------------------------------------------
# What takes the places of PyTorch's functions. Autocast does not know these kernels: it casts nothing for them.


def warp(feature: Tensor, flow: Tensor, occlusion: Tensor, *, reference: bool = False) -> Tensor:
    """`dagan_rt.networks.generator.warp` by a kernel; float32 comes out of 16 bits too, as under autocast of that one.

    The feature is sampled in its own dtype; where to and how much is said in float32 at least, for 16 bits cannot tell
    the places of neighbouring pixels apart. The sum is in float32 and rounded to the feature's dtype.
    """
    exact = torch.promote_types(flow.dtype, torch.float32)
    flow, occlusion = flow.to(exact).contiguous(), occlusion.to(exact).contiguous()
    if not feature.is_contiguous() and not feature.is_contiguous(memory_format=torch.channels_last):
        feature = feature.contiguous()
    return kernels.flow_warp(feature, flow, occlusion, reference=reference).to(exact)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, in_float32: bool = False, reference: bool = False
) -> Tensor:
    """`dagan_rt.networks.attention.cross_attention` by a kernel; in float32 by PyTorch, unless `in_float32`.

    The kernel could add γ times this to the warped feature too. In 16 bits that sum would swallow what attention says
    while γ, which starts at zero, is small; so it stays outside, in float32.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as autocast does for the products of matrices
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
    if query.dtype == torch.float32 and not in_float32:
        return cross_attention(query, key, value)
    if not all(tensor.transpose(1, 2).is_contiguous() for tensor in (query, key, value)):  # all channels-last, or none
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    one = torch.ones(1, device=query.device)
    return kernels.cross_attention(query, key, value, torch.zeros_like(value), one, reference=reference)


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`dagan_rt.networks.attention.cross_attention` by PyTorch's fused attention.

    On a CPU that takes equally wide queries, keys and values whose channels lie together: else it stores all logits.
    """
    missing = value.shape[1] - query.shape[1]
    if missing > 0:  # channels of zeros change no product
        query, key = (functional.pad(tensor, (0, 0, 0, missing)) for tensor in (query, key))
    query, key, value = (tensor.transpose(1, 2).contiguous().unsqueeze(1) for tensor in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Trials


def fault(kernel: Callable[..., Tensor], twin: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> str:
    """Run both on the same inputs, forward and backward; what is wrong with the kernel, in a line, or nothing.

    The twin computes in float32 what the kernel does in the inputs' dtype.
    """
    dtype = inputs[0].dtype
    try:
        found = _with_gradients(kernel, inputs)
        expected = _with_gradients(twin, tuple(tensor.float() for tensor in inputs))
    except Exception as error:  # whatever keeps it from running here is a reason to do without it
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    for got, wanted in zip(found, expected, strict=True):
        off = float((got.float() - wanted).norm() / wanted.norm())
        if not off <= MOST_ERROR[dtype]:
            return f"its result is off by {off:.1e}"
    return ""


def _with_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    slope = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)  # float16 cannot count so far
    return [out.detach(), *torch.autograd.grad(out, leaves, slope.to(out.dtype))]


def _warp_trial(generator: Generator, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    feature = torch.randn(2, generator.config.feature_width, PIXELS, PIXELS, generator=random)
    flow = torch.rand(2, PIXELS // 2, PIXELS // 2, 2, generator=random) * 2.2 - 1.1
    occlusion = torch.rand(2, 1, PIXELS // 2, PIXELS // 2, generator=random)
    feature = feature.to(device, dtype, memory_format=torch.channels_last)
    return feature, flow.to(device), occlusion.to(device)


def _attention_trial(generator: Generator, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    widths = (generator.config.query_width, generator.config.query_width, generator.config.feature_width)
    query, key, value = (
        torch.randn(2, PIXELS**2, width, generator=random).to(device, dtype).transpose(1, 2) for width in widths
    )
    return query / widths[0] ** 0.5, key, value
