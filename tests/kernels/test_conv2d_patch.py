"""The convolution from a patch in shared memory (kernels/conv2d/forward_patch.cu) against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.kernels import Config, _conv2d_patch, configs, conv2d, pack

#: Shapes that the tiles are for, in small: odd sizes, more than one tile each way, a last odd eight of K, chunks.
CASES = {
    "five channels": ((2, 8, 20, 21), 5, 3, {}, 0, 1),
    "one, reflected": ((3, 16, 17, 17), 1, 3, {"activation": "sigmoid", "pad_mode": "reflect"}, 0, 1),
    "stride 2": ((1, 8, 35, 20), 60, 7, {"stride": 2}, 4, 1),
    "a head": ((1, 40, 23, 18), 75, 7, {"padding": 0}, 6, 1),
    "a head in five parts": ((1, 40, 23, 18), 75, 7, {"padding": 0}, 6, 5),
    "chunks": ((1, 96, 18, 33), 32, 3, {"pad_mode": "reflect", "activation": "elu"}, 3, 1),
    "chunks in parts": ((1, 96, 18, 33), 32, 3, {"pad_mode": "reflect", "activation": "elu"}, 3, 3),
    "repeated": ((1, 32, 10, 12), 16, 3, {"repeat": True, "pad_mode": "reflect"}, 1, 2),
    "many channels in parts": ((1, 128, 9, 9), 17, 7, {}, 2, 4),
    "five by five": ((2, 16, 17, 17), 64, 5, {"activation": "relu"}, 5, 1),
}


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("case", CASES)
def test_close_to_float64(case: str, dtype: str, device: str) -> None:
    (B, Cin, H, W), Cout, k, options, tile, split = CASES[case]
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    x = torch.randn((B, H, W, Cin), generator=generator).to(device, kind).permute(0, 3, 1, 2)
    weight = torch.randn((Cout, Cin, k, k), generator=generator) / (Cin * k * k) ** 0.5
    packed = pack(weight.to(device), torch.randn(Cout, generator=generator).to(device), dtype)
    asked: dict[str, Any] = options | {"config": Config("patch", tile, split)}
    found = conv2d(x, packed, **asked)
    exact = conv2d(x.double().cpu(), packed.to("cpu"), reference=True, **options)
    same = conv2d(x.cpu(), packed.to("cpu"), reference=True, **options)
    error, allowed = (found.cpu().double() - exact).abs().max(), (same.double() - exact).abs().max()
    assert error <= 2 * allowed + 1e-6, (error, allowed)
    torch.testing.assert_close(conv2d(x, packed, **asked), found, rtol=0, atol=0)  # the counters are zero again


def test_slices_of_wider_maps_and_their_neighbours(device: str) -> None:
    wide = torch.randn(2, 18, 18, 24).half().to(device).permute(0, 3, 1, 2)
    packed = pack(torch.randn(8, 16, 3, 3).to(device) / 12, None, "float16")
    out = torch.full((2, 18, 18, 24), 7.0, dtype=torch.half, device=device).permute(0, 3, 1, 2)
    conv2d(wide[:, 8:], packed, out=out[:, 8:16], config=Config("patch", 0, 1))
    expected = conv2d(wide[:, 8:].float().cpu(), packed.to("cpu"), reference=True)
    torch.testing.assert_close(out[:, 8:16].float().cpu(), expected, rtol=2e-3, atol=2e-3)
    assert (out[:, :8] == 7).all() and (out[:, 16:] == 7).all()


def test_what_it_does_not_serve_is_refused(emulated: Any) -> None:
    x = torch.zeros(1, 8, 8, 64).half().permute(0, 3, 1, 2)
    wide = pack(torch.zeros(128, 64, 3, 3), None, "float16")
    with pytest.raises(InputError, match="does not serve"):
        conv2d(x, wide, config=Config("patch", 4, 1))  # more channels than the tile makes
    few = pack(torch.zeros(8, 64, 3, 3), None, "float16")
    with pytest.raises(InputError, match="does not serve"):
        conv2d(x, few, pool=True, config=Config("patch", 0, 1))
    with pytest.raises(InputError, match="does not serve"):
        conv2d(x, few, config=Config("patch", 0, 9))  # of eight eights of channels


def test_it_is_a_candidate_where_channels_are_few(emulated: Any) -> None:
    def kernels_of(shape: tuple[int, ...], Cout: int, k: int) -> set[str]:
        packed = pack(torch.zeros(Cout, shape[1], k, k), None, "float16")
        return {it.kernel for it in configs(shape, packed, device=emulated, most=20)}

    assert "patch" in kernels_of((1, 16, 256, 256), 16, 3)
    assert "patch" in kernels_of((1, 40, 64, 64), 75, 7)
    assert "patch" not in kernels_of((1, 256, 64, 64), 256, 3)


def test_a_chunk_is_what_shared_memory_holds() -> None:
    for tile in _conv2d_patch.TILES:
        chunk = _conv2d_patch.chunk_of(tile, 128, 7, 1, 4, 227 << 10)
        assert chunk is not None and 128 % chunk == 0 and 128 // chunk >= 4
        assert tile.shared_for(chunk, 7, 1) <= 227 << 10
    assert _conv2d_patch.chunk_of(_conv2d_patch.TILES[6], 128, 7, 1, 1, 48 << 10) is None
