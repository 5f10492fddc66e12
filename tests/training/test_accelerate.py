"""The kernels in the places of PyTorch's functions: same results, same gradients; tried before they are taken."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dagan_rt import kernels
from dagan_rt.errors import InputError
from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.attention import cross_attention
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.generator import warp as plain_warp
from dagan_rt.networks.model import Model
from dagan_rt.networks.variants import VARIANTS
from dagan_rt.training import accelerate as module
from dagan_rt.training import loop
from dagan_rt.training.accelerate import accelerate, attention, fault, fused_attention, warp
from dagan_rt.training.recipe import parse_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # where the emulated GPU lies

SMALL: dict[str, Any] = {
    "size": 32, "depth_width": 4, "depth_decoder_widths": (4, 4, 4, 4, 4), "keypoint_width": 4, "keypoint_max": 8,
    "keypoint_blocks": 2, "motion_width": 4, "motion_max": 8, "motion_blocks": 2, "motion_scale": 0.5,
    "generator_width": 4, "generator_max": 8, "residual_blocks": 1, "query_width": 2, "spade_width": 4,
    "spade_hidden": 4, "discriminator_width": 4, "discriminator_max": 8, "discriminator_blocks": 1,
}  # fmt: skip


@pytest.fixture
def emulated() -> Iterator[Any]:
    """An emulated GPU that CPU tensors lie on for the length of a test."""
    from emulated import EmulatedDevice, emulation

    with emulation(EmulatedDevice()) as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIXELS", 4)
        yield device


def built(variant: str = "dagan", down_blocks: int = 2) -> Model:
    """A small model whose attention says something: γ is not zero."""
    torch.manual_seed(0)
    model = Model(NetworkConfig(variant, down_blocks=down_blocks, **SMALL))
    if model.config.parts.attention:
        torch.nn.init.constant_(model.generator.AttnModule.gamma, 0.7)
    return model.to(memory_format=torch.channels_last)


def replaced(model: Model, **options: Any) -> Model:
    """The same weights with the functions of `accelerate`."""
    other = copy.deepcopy(model)
    other.generator.warp = partial(warp, **options)
    if other.config.parts.attention:
        other.generator.AttnModule.attend = partial(attention, in_float32=True, **options)
    return other


def results(model: Model, like: torch.dtype) -> dict[str, Tensor]:
    """Of the generator forward and back: images, features, and the gradient of every weight and of the key points."""
    random = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 32, 32, generator=random).to(like).contiguous(memory_format=torch.channels_last)
    depth = torch.rand(2, 1, 32, 32, generator=random).to(like)
    points = [(torch.rand(2, model.config.num_keypoints, 2, generator=random) * 1.6 - 0.8).to(like) for _ in range(2)]
    turns = torch.eye(2) + 0.2 * torch.randn(2, model.config.num_keypoints, 2, 2, generator=random)
    leaves = [it.requires_grad_() for it in points]
    generated = model.generator(images, *(KeyPoints(it, turns.to(like)) for it in leaves), depth=depth)
    (generated.prediction * torch.rand(2, 3, 32, 32, generator=random).to(like)).sum().backward()
    names = ("prediction", "warped_feature", "attended_feature", "deformed")
    found = {name: getattr(generated, name).detach() for name in names}
    assert all(parameter.grad is not None for parameter in model.generator.parameters())
    grads = {name: weight.grad for name, weight in model.generator.named_parameters() if weight.grad is not None}
    return found | grads | {f"points {at}": it.grad for at, it in enumerate(leaves) if it.grad is not None}


def test_the_generator_calls_them_and_its_state_dict_does_not_know() -> None:
    model, calls = built(), list[str]()

    def counted(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        calls.append(getattr(function, "__name__", ""))
        return function(*tensors)

    keys = list(model.state_dict())
    model.generator.warp, model.generator.AttnModule.attend = partial(counted, warp), partial(counted, attention)
    with pytest.raises(InputError, match="GPU"):  # of which there is none: nothing else was called instead
        results(model, torch.float32)
    assert calls == ["warp"] and list(model.state_dict()) == keys


# The flow is 16 × 16: twice the feature's size, or, with a single down block, just its size.
@pytest.mark.parametrize(("variant", "down_blocks"), [*((name, 2) for name in VARIANTS), ("dagan", 1)])
def test_by_the_kernels_twins_everything_is_the_same(variant: str, down_blocks: int) -> None:
    model = built(variant, down_blocks).double()
    other = replaced(model, reference=True)
    expected, got = results(model, torch.float64), results(other, torch.float64)
    assert expected.keys() == got.keys() and len(got) > 40
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("variant", ["dagan", "dagan_sa"])
def test_under_autocast_too(variant: str) -> None:
    model = built(variant)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = results(model, torch.float32), results(replaced(model, reference=True), torch.float32)
    for name in ("prediction", "warped_feature", "attended_feature"):
        assert got[name].dtype == expected[name].dtype, name
    alone = results(replaced(model, reference=True), torch.float32)
    assert apart(got, expected) < 1.5 * apart(alone, expected)  # no farther than rounding takes PyTorch from itself


def apart(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Relative difference of all results and gradients together."""
    pairs = [(some[name].double().flatten(), others[name].double().flatten()) for name in others]
    return max(float((a - b).norm() / b.norm()) for a, b in [tuple(map(torch.cat, zip(*pairs, strict=True)))])


def test_autocast_gives_the_kernels_16_bits_and_places_in_float32(monkeypatch: Any) -> None:
    given: dict[str, list[torch.dtype]] = {}

    def seen(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor, reference: bool) -> Tensor:
            given[name] = [tensor.dtype for tensor in tensors]
            return function(*tensors, reference=True)

        return call

    monkeypatch.setattr(module.kernels, "flow_warp", seen("warp", kernels.flow_warp))
    monkeypatch.setattr(module.kernels, "cross_attention", seen("attention", kernels.cross_attention))
    model = replaced(built())
    with torch.autocast("cpu", torch.bfloat16):
        results(model, torch.float32)
    assert given["warp"] == [torch.bfloat16, torch.float32, torch.float32]
    assert given["attention"] == [torch.bfloat16] * 4 + [torch.float32]
    given.clear()
    torch.manual_seed(0)
    arrays = torch.randn(3, 1, 4, 9)
    assert torch.equal(attention(*arrays), cross_attention(*arrays)) and not given  # PyTorch's own in float32
    with torch.autocast("cpu", torch.bfloat16):
        attention(*arrays)
    assert given["attention"][:3] == [torch.bfloat16] * 3


@pytest.mark.parametrize("autocast", [False, True])
def test_by_the_kernels_themselves(emulated: Any, autocast: bool) -> None:
    model = built()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, got = results(model, torch.float32), results(replaced(model), torch.float32)
    units = {name.split("_", 2)[0] + "_" + name.split("_", 2)[1] for name in emulated.launches}
    assert {"flow_warp", "cross_attention"} <= units and any("backward" in name for name in emulated.launches)
    if not autocast:
        assert apart(got, expected) < 1e-5
    else:
        twin = replaced(model, reference=True)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = results(twin, torch.float32)
        alone = results(replaced(model, reference=True), torch.float32)
        assert apart(got, rounded) < 1.5 * apart(alone, rounded)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_arrays_that_lie_oddly_are_copied(emulated: Any, layout: Any) -> None:
    random = torch.Generator().manual_seed(0)
    feature = torch.randn(2, 8, 6, 5, generator=random).contiguous(memory_format=layout)[:, :, ::2]
    flow = (torch.rand(2, 2, 4, 3, generator=random) * 2 - 1).permute(0, 3, 2, 1)  # planes, columns first
    occlusion = torch.rand(2, 1, 8, 3, generator=random)[:, :, ::2].transpose(2, 3)
    torch.testing.assert_close(warp(feature, flow, occlusion), plain_warp(feature, flow, occlusion))
    query, key = torch.randn(2, 4, 9, generator=random), torch.randn(2, 9, 4, generator=random).transpose(1, 2)
    value = torch.randn(2, 9, 8, generator=random).transpose(1, 2)
    torch.testing.assert_close(attention(query, key, value, in_float32=True), cross_attention(query, key, value))


def test_on_the_cpu_attention_is_fused() -> None:
    model = built()
    assert accelerate(model) == []
    assert model.generator.warp is plain_warp and model.generator.AttnModule.attend is fused_attention
    assert accelerate(built("baseline")) == []


@pytest.mark.parametrize(("width", "channels", "pixels"), [(8, 40, 300), (5, 3, 17), (4, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_attention_is_attention(width: int, channels: int, pixels: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    sizes = (width, width, channels)
    inputs = [torch.randn(2, size, pixels, generator=random).double().requires_grad_() for size in sizes]
    slope = torch.randn(2, channels, pixels, generator=random).double()
    wanted = cross_attention(*inputs)
    wanted_gradients = torch.autograd.grad(wanted, inputs, slope)
    own = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    got = fused_attention(*own)
    gradients = torch.autograd.grad(got, own, slope.to(dtype))
    most = 1e-4 if dtype == torch.float32 else 1e-10
    for one, other in zip((got, *gradients), (wanted, *wanted_gradients), strict=True):
        assert one.shape == other.shape
        assert float((one.double() - other).norm() / other.norm()) < most


def test_fused_attention_stores_no_logits() -> None:
    from torch.profiler import ProfilerActivity, profile

    query, key, value = (torch.rand(1, size, 400).requires_grad_() for size in (8, 8, 40))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        fused_attention(query, key, value).sum().backward()
    assert not any(list(shape)[-2:] == [400, 400] for event in seen.events() for shape in event.input_shapes if shape)


class Card:
    total_memory = 80 << 30


@pytest.mark.parametrize(
    ("precision", "batch", "capability", "said"),
    [
        ("bf16", 12, (9, 0), "attention: by the CUDA kernel"),
        ("fp16", 12, (7, 5), "attention: PyTorch's, for tensor cores of this GPU are not used by the kernel"),
        ("fp32", 12, (9, 0), "attention: PyTorch's, which is faster in float32"),
        ("fp32", 1 << 25, (9, 0), "attention: by the CUDA kernel, for its logits would not fit the memory"),
    ],
)
def test_who_attends(
    emulated: Any, monkeypatch: Any, precision: str, batch: int, capability: tuple[int, int], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    generator = built().generator
    dtype = module.DTYPES[precision]
    assert module._use_attention(generator, torch.device("cpu"), dtype, batch) == said
    by_kernel = generator.AttnModule.attend is not cross_attention
    assert by_kernel == ("by the CUDA kernel" in said)
    emulated.launches.clear()
    arrays = torch.randn(3, 1, 4, 9, dtype=dtype)
    generator.AttnModule.attend(*arrays)
    assert bool(emulated.launches) == by_kernel
    emulated.launches.clear()
    generator.AttnModule.attend(*arrays.float())  # as evaluation does
    assert bool(emulated.launches) == ("not fit" in said)


def test_a_kernel_that_does_not_run_or_is_wrong_is_not_used(emulated: Any, monkeypatch: Any) -> None:
    generator, cpu = built().generator, torch.device("cpu")
    assert module._use_warp(generator, cpu, torch.bfloat16) == "warp: by the CUDA kernel"
    assert generator.warp is warp
    generator = built().generator

    def broken(*tensors: Tensor, reference: bool) -> Tensor:
        if not reference:
            raise InputError("compiling needs the package cupy\nand more")
        return genuine(*tensors, reference=True)

    genuine = kernels.flow_warp
    monkeypatch.setattr(module.kernels, "flow_warp", broken)
    expected = "warp: PyTorch's, for the kernel does not run here: compiling needs the package cupy"
    assert module._use_warp(generator, cpu, torch.float32) == expected
    assert generator.warp is plain_warp
    monkeypatch.undo()
    torch.use_deterministic_algorithms(True)
    try:
        assert module._use_warp(generator, cpu, torch.float32).endswith("any order") and generator.warp is plain_warp
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("wrong", ["result", "gradient", "nothing"])
def test_a_trial_compares_results_and_gradients(wrong: str) -> None:
    def square(x: Tensor, y: Tensor) -> Tensor:
        return x * x * y

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        if wrong == "result":
            return square(x, y) * 1.001
        return square(x, y) if wrong == "nothing" else square(x, y.detach()) + 0 * y

    found = fault(kernel, square, (torch.randn(5), torch.randn(5)))
    assert (
        found
        == {"result": "its result is off by 1.0e-03", "gradient": "its result is off by 1.0e+00", "nothing": ""}[wrong]
    )


@pytest.mark.parametrize("dtype", module.MOST_ERROR)
def test_what_rounds_as_it_must_passes_a_trial_at_the_published_widths(dtype: torch.dtype) -> None:
    class Published:
        config = NetworkConfig()

    inputs = module._attention_trial(Published, torch.device("cpu"), dtype)  # type: ignore[arg-type]
    assert fault(cross_attention, cross_attention, inputs) == ""
    inputs = module._warp_trial(Published, torch.device("cpu"), dtype)  # type: ignore[arg-type]
    assert fault(partial(warp, reference=True), partial(warp, reference=True), inputs) == ""


RUN = """
[network]
variant = "dagan"
size = 64
generator_width = 16
[data]
kind = "heads"
cache = "{cache}"
identities = 2
frames = 4
held_out = 0
[training]
batch = 4
device = "cuda"
precision = "{precision}"
kernels = {kernels}
tensorboard = false
log_every = 1
[losses]
perceptual = 0
pixel = 10
[[stage]]
name = "all"
steps = 3
"""


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_steps_on_a_gpu_with_and_without(tmp_path: Path, precision: str) -> None:
    from dagan_rt.training import journal

    terms = []
    for used in ("true", "false"):
        text = RUN.format(cache=tmp_path / "heads", precision=precision, kernels=used)
        loop.train(parse_recipe(text), tmp_path / used, progress=False)
        terms.append([row["terms"] for row in journal.read_rows(tmp_path / used)])
    for ours, plain in zip(*terms, strict=True):
        assert ours == pytest.approx(plain, rel=1e-2 if precision == "fp32" else 5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_on_a_gpu_they_pass_their_trials(precision: str) -> None:
    model = built().cuda()
    notes = accelerate(model, precision)
    assert notes[0] == "warp: by the CUDA kernel", notes
    assert ("by the CUDA kernel" in notes[1]) == (precision != "fp32"), notes
