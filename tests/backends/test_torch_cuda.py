"""Whole frames on a GPU against float32 PyTorch: every variant, slots that never mix, batches that are padded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.gpu

SIZES = {"generator_width": 16, "generator_max": 64, "query_width": 16, "residual_blocks": 2}


def pictures(count: int, side: int, seed: int) -> np.ndarray:
    """Smooth ones: noise would measure rounding alone."""
    coarse = torch.rand((count, 3, 6, 6), generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return np.ascontiguousarray((fine * 255).round().byte().permute(0, 2, 3, 1).numpy())


def opened(small_model: Any, variant: str = "dagan", dtype: str = "float16", **options: Any) -> Any:
    """Backend, its frames, and the frames of the same networks run one after the other in float32."""
    from dagan_rt.backends.torch_cuda import TorchCudaBackend
    from dagan_rt.export.subnetworks import subnetworks
    from dagan_rt.frames import GraphFrames

    model = small_model(variant, **SIZES)
    if hasattr(model.generator, "final"):
        model.generator.final.weight.data.mul_(8)  # untrained networks paint in grey
    backend = TorchCudaBackend(model.cuda(), dtype)
    graphs = SimpleNamespace(config=model.config, graphs={it.name: it for it in subnetworks(model.config)})
    return backend.frames(**options), GraphFrames(backend, graphs, options.get("slots", 1))  # type: ignore[arg-type]


def agree(found: np.ndarray, expected: np.ndarray, db: float = 35.0) -> None:
    error = np.square(found.astype(float) - expected).mean()
    assert 10 * np.log10(255**2 / max(error, 1e-9)) >= db
    assert expected.std() > 5, "a flat picture proves nothing"


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("variant", ("dagan", "dagan_sa", "dagan_spade", "baseline", "fomm"))
def test_a_frame_is_that_of_float32(variant: str, dtype: str, small_model: Any) -> None:
    if dtype == "bfloat16" and variant != "dagan":
        pytest.skip("one variant tells what bfloat16 costs")
    frames, exact = opened(small_model, variant, dtype)
    source, *driving = pictures(4, frames.size, seed=1)
    for it in (frames, exact):
        it.set_source(0, source)
        it.begin(0, driving[0])
    for frame in driving:
        agree(frames.submit([0], [frame]).result()[0], exact.submit([0], [frame]).result()[0],
              35.0 if dtype == "float16" else 25.0)  # fmt: skip
    frames.close()


def test_slots_never_mix_and_batches_are_padded(small_model: Any) -> None:
    frames, exact = opened(small_model, slots=3, batches=(1, 2, 4))
    sources, driving = pictures(3, frames.size, seed=2), pictures(6, frames.size, seed=3)
    for slot in range(3):
        for it in (frames, exact):
            it.set_source(slot, sources[slot])
            it.begin(slot, None if slot == 1 else driving[slot], adapt_scale=slot == 2)
    alone = {(slot, i): exact.submit([slot], [driving[i]]).result()[0] for slot in range(3) for i in range(6)}
    for slots, chosen in (([2, 0, 1], [0, 1, 2]), ([1], [3]), ([0, 0, 2, 1], [4, 5, 4, 4]), ([1, 2], [0, 0])):
        images = frames.submit(slots, [driving[i] for i in chosen]).result()
        assert len(images) == len(slots)
        for image, key in zip(images, zip(slots, chosen, strict=True), strict=True):
            agree(image, alone[key])
    frames.close()


def test_a_source_is_changed_while_batches_are_under_way(small_model: Any) -> None:
    frames, _ = opened(small_model, slots=2, batches=(1, 2))
    sources, driving = pictures(3, frames.size, seed=4), pictures(8, frames.size, seed=5)
    for slot in range(2):
        frames.set_source(slot, sources[slot])
        frames.begin(slot, driving[0])
    expected = [frames.submit([0], [frame]).result()[0] for frame in driving]
    pending = [frames.submit([0], [frame]) for frame in driving[:2]]
    frames.set_source(1, sources[2])
    frames.begin(1, driving[1])
    pending += [frames.submit([0], [frame]) for frame in driving[2:]]
    for image, wanted in zip([it.result()[0] for it in pending], expected, strict=True):
        np.testing.assert_array_equal(image, wanted)
    frames.close()


def test_too_little_memory_is_one_sentence(small_model: Any) -> None:
    from dagan_rt.errors import InputError

    frames, _ = opened(small_model)
    with pytest.raises(InputError, match="too little memory"):
        opened(small_model, slots=10_000_000)
    source, frame = pictures(2, frames.size, seed=6)
    frames.set_source(0, source)  # others are unharmed
    frames.begin(0, frame)
    assert frames.submit([0], [frame]).result().shape == (1, frames.size, frames.size, 3)
    frames.close()


def test_memory_stays_flat(small_model: Any) -> None:
    frames, _ = opened(small_model, slots=2, batches=(1, 2))
    sources, driving = pictures(2, frames.size, seed=7), pictures(4, frames.size, seed=8)

    def work(count: int) -> int:
        for i in range(count):
            if i % 50 == 0:
                frames.set_source(i % 2, sources[0])
                frames.begin(i % 2, driving[0])
            frames.submit([0, 1], [driving[i % 4], driving[(i + 1) % 4]]).result()
        return torch.cuda.mem_get_info()[0]

    for slot in range(2):
        frames.set_source(slot, sources[slot])
        frames.begin(slot, driving[0])
    before = work(200)
    assert work(1000) == before
    frames.close()
