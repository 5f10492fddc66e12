"""The emulated GPU: it must compute what a GPU computes, and not let pass what a GPU lets pass by luck."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from emulated import HERE, EmulatedDevice, EmulationError, emulation

from dagan_rt.kernels._arrays import view
from dagan_rt.kernels._devices import Launch, Unit

SHORT = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
HALVES = [torch.float16, torch.bfloat16]


def run(
    kernel: str,
    grid: Any,
    block: Any,
    *args: Any,
    source: str = "plain",
    shared: int = 0,
    waiting: bool = False,
    **settings: Any,
) -> EmulatedDevice:
    """Launch one of the kernels in emulation/checks; tensors become arrays, ints np.int32."""
    device = EmulatedDevice(sources=HERE, **settings)
    sizes = [size if isinstance(size, tuple) else (size, 1, 1) for size in (grid, block)]
    with emulation(device):
        values = tuple(
            view(arg, "x") if isinstance(arg, torch.Tensor) else np.int32(arg) if isinstance(arg, int) else arg
            for arg in args
        )
        device.launch(Launch(Unit("checks", source), kernel, sizes[0], sizes[1], values, shared, waiting))
    return device


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fails(pattern: str) -> Any:
    return pytest.raises(EmulationError, match=pattern)


# ---- threads, blocks, arguments ----


@pytest.mark.parametrize("settings", [{}, {"seed": 1}, {"sanitize": "address"}, {"sanitize": "thread"}])
@pytest.mark.parametrize("dtype", SHORT)
def test_a_sum_over_the_threads_of_a_block(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    x, out = numbers(700, dtype=dtype), torch.empty(3)
    run(f"block_sum_{SHORT[dtype]}", 3, 256, x, out, 700, **settings)
    expected = torch.nn.functional.pad(x.double(), (0, 68)).view(3, 256).sum(1)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


def test_coordinates_of_threads_and_blocks() -> None:
    out = torch.zeros(24 * 30 * 4, dtype=torch.uint8)  # as bytes, which may be passed for anything
    run("coordinates", (4, 3, 2), (5, 3, 2), out, seed=5)
    values = out.numpy().view(np.int32).reshape(24, 30)
    np.testing.assert_array_equal(values, 1000 * np.arange(24)[:, None] + np.arange(30))


def test_parameters_arrive_by_their_types() -> None:
    out = torch.zeros(4)
    run("parameters", 1, 1, out, -7, np.int64(5 << 33), np.float32(0.25), None)
    assert out.tolist() == [-7, 5, 0.25, 1]


@pytest.mark.parametrize(
    "args",
    [
        (torch.zeros(4), -7, 5, np.float32(0.25), None),  # an int where a long long is expected
        (torch.zeros(4), -7, np.int64(5), np.float32(0.25)),
        (torch.zeros(4, dtype=torch.float16), -7, np.int64(5), np.float32(0.25), None),
    ],
)
def test_parameters_of_other_types_are_refused(args: tuple[Any, ...]) -> None:
    with fails(r"parameters\(float\*, int, long long, float, float\*\) was launched with"):
        run("parameters", 1, 1, *args)


def test_launches_that_no_gpu_takes() -> None:
    x, out = numbers(700), torch.empty(3)
    with fails("more than 256 threads"):
        run("block_sum_f32", 3, 288, x, out, 700)
    with fails("no kernel nonsense"):
        run("nonsense", 1, 1)
    with fails("bytes of shared memory are more than 232448"):
        run("write_dynamic_at", 1, 1, out, 0, shared=232449)
    with fails("no multiple of the clusters"):
        run("cluster_sum_right", 3, 64, numbers(192), out, source="hopper", shared=256)


@pytest.mark.parametrize("width", [32, 16, 8])
def test_exchanges_of_a_warp(width: int) -> None:
    out = torch.empty(6, 32)
    run("shuffles", 1, 32, out, width, seed=3)
    lane = np.arange(32)
    first = lane // width * width
    up, down, across = lane - 3, lane + 3, lane ^ 9
    np.testing.assert_array_equal(out[0], first + 5 % width)
    np.testing.assert_array_equal(out[1], np.where(up >= first, up, lane))
    np.testing.assert_array_equal(out[2], np.where(down < first + width, down, lane))
    np.testing.assert_array_equal(out[3], np.where(across < first + width, across, lane))
    assert set(out[4].tolist()) == {float(np.float32(sum(1 << i for i in range(0, 32, 3))))}
    assert set(out[5].tolist()) == {3.0}


def test_the_seed_decides_the_order() -> None:
    def order(seed: int) -> list[int]:
        counter, out = torch.zeros(4, dtype=torch.uint8), torch.zeros(8 * 4 * 4, dtype=torch.uint8)
        run("tickets", 8, 4, counter, out, seed=seed)
        return out.numpy().view(np.int32).tolist()

    assert order(0) == list(range(32))
    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(32))
    assert all(max(part) - min(part) == 3 for part in np.reshape(order(1), (8, 4)))  # block after block


def test_shared_memory_begins_as_nan_in_every_block() -> None:
    out = torch.zeros(3 * 64)
    run("uninitialised", 3, 32, out, shared=128)
    assert out.isnan().all()


def test_atomic_sums() -> None:
    x, total = numbers(300), torch.zeros(1)
    run("sum_atomically", 3, 128, x, total, 300, seed=1)
    torch.testing.assert_close(total[0], x.sum(), rtol=0, atol=1e-4)


def test_blocks_that_wait_for_each_other() -> None:
    x = numbers(4)

    def total(kernel: str, most: int = 4, **settings: Any) -> torch.Tensor:
        count, out = torch.zeros(4, dtype=torch.uint8), torch.zeros(1)
        given = torch.full((4,), float("nan"))
        run(kernel, 4, 1, x, given, count, out, source="hopper", multiprocessors=most, **settings)
        return out[0]

    for settings in ({}, {"seed": 1}, {"sanitize": "address"}, {"sanitize": "thread"}):
        torch.testing.assert_close(total("add_blocks_right", waiting=True, **settings), x.sum(), rtol=0, atol=1e-5)
    assert total("add_blocks_hasty", waiting=True).isnan()
    with fails("data race"):
        total("add_blocks_hasty", waiting=True, sanitize="thread")
    with fails("4 blocks wait for each other, there are 3 multiprocessors"):
        total("add_blocks_right", waiting=True, most=3)
    with fails(r"of 1, 1 wait at wait_for_count \(hopper.cu:\d+\)"):  # the launch does not say that they wait
        total("add_blocks_right")


# ---- threads that wait for ever ----


def test_a_barrier_some_never_reach() -> None:
    with fails(r"divergent, block \(0, 0, 0\): the threads wait for ever: of 64, "
               r"63 wait at __syncthreads \(plain.cu:\d+\), 1 returned"):  # fmt: skip
        run("divergent", 2, 64, torch.zeros(64))
    with fails(r"__syncthreads diverges"):
        run("two_barriers", 1, 64, torch.zeros(64))
    with fails(r"of 32, 16 wait at __shfl_xor_sync \(plain.cu:\d+\), 16 returned"):
        run("half_a_shuffle", 1, 32, torch.zeros(32))


def test_a_launch_after_one_that_failed() -> None:
    with fails("wait for ever"):
        run("divergent", 2, 64, torch.zeros(64))
    x, out = numbers(256), torch.empty(1)
    run("block_sum_f32", 1, 256, x, out, 256)
    torch.testing.assert_close(out[0], x.sum(), rtol=0, atol=1e-4)


# ---- memory ----


@pytest.mark.parametrize("index", [-1, 5])
def test_writes_beside_an_array(index: int) -> None:
    with fails(f"write_at wrote {'before' if index < 0 else 'after'} the array float32"):
        run("write_at", 1, 1, torch.zeros(5), index)
    with fails("heap-buffer-overflow|use-after-poison"):
        run("write_at", 1, 1, torch.zeros(5), index, sanitize="address")


def test_writes_between_the_elements_of_a_slice() -> None:
    whole = torch.zeros(2, 3, 16)
    with fails("wrote between the elements"):
        run("write_at", 1, 1, whole[:, 1], 20)
    with fails("use-after-poison"):
        run("write_at", 1, 1, whole[:, 1], 20, sanitize="address")
    run("write_at", 1, 1, whole[:, 1], 50, sanitize="address")
    assert whole[1, 1, 2] == 1 and whole.sum() == 1


def test_reads_outside() -> None:
    out = torch.zeros(1)
    with fails("heap-buffer-overflow"):
        run("read_at", 1, 1, torch.ones(5), 5, out, sanitize="address")
    run("read_at", 1, 1, torch.ones(5), 5, out)
    assert out.isnan()  # guards are NaN
    with fails("an address that is not mapped"):
        run("read_at", 1, 1, None, 1 << 20, out)


@pytest.mark.parametrize("kernel", ["write_shared_at", "write_dynamic_at"])
def test_writes_outside_of_shared_memory(kernel: str) -> None:
    run(kernel, 1, 1, torch.zeros(1), 39, shared=160, sanitize="address")
    with fails("buffer-overflow|out of bounds"):
        run(kernel, 1, 1, torch.zeros(1), 40, shared=160, sanitize="address")


def test_misaligned_vectors() -> None:
    with fails("misaligned address"):
        run("read_misaligned", 1, 1, torch.zeros(16), 1, torch.zeros(1), sanitize="address")


def test_overlapping_arrays_stay_so() -> None:
    x = torch.arange(10.0)
    run("read_at", 1, 1, x, 9, x[:1])
    assert x[0] == 9


@pytest.mark.parametrize("seed", [0, 1])
def test_a_missing_barrier_is_a_race(seed: int) -> None:
    with fails("data race(.|\n)*plain.cu"):
        run("block_sum_without_barrier", 1, 256, numbers(256), torch.empty(1), 256, sanitize="thread", seed=seed)


def test_a_shuffle_is_no_barrier() -> None:
    out = torch.empty(32)
    run("neighbours_ordered", 1, 32, out, sanitize="thread")
    assert torch.equal(out, 1.0 + (torch.arange(32) ^ 1))
    with fails("data race(.|\n)*plain.cu"):
        run("neighbours_unordered", 1, 32, out, sanitize="thread")


def test_workspaces() -> None:
    device = EmulatedDevice()
    assert (device.workspace(0, 100).owner == 0xFF).all()
    zeroed = device.workspace(0, 100, zeroed=True)
    assert not zeroed.owner.any()
    device.launches.append("some_kernel")
    zeroed.owner[3] = 1
    with fails("some_kernel, or one before it, did not leave its zeroed workspace zero"):
        device.workspace(0, 50, zeroed=True)


# ---- types ----


def special_values() -> torch.Tensor:
    """Every float whose upper 16 bits are anything and whose lower ones decide a rounding."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    lower = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper[:, None] | lower).flatten()
    return bits.numpy().astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding(dtype: torch.dtype) -> None:
    x = torch.from_numpy(special_values())
    out = torch.empty(x.shape, dtype=dtype)
    run(f"round_{SHORT[dtype]}", x.numel() // 1024, 1024, x, out)
    expected = x.to(dtype)
    nan = expected.isnan()
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(out.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


@pytest.mark.parametrize("dtype", HALVES)
def test_widening(dtype: torch.dtype) -> None:
    x = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(x.shape)
    run(f"widen_{SHORT[dtype]}", 64, 1024, x, out)
    expected = x.float()
    nan = expected.isnan()
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(out.view(torch.int32)[~nan], expected.view(torch.int32)[~nan])


# ---- matrices, copies ----


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sanitize", [None, "thread"])
def test_mma_and_ldmatrix(dtype: torch.dtype, order: str, sanitize: str | None) -> None:
    a, b, d = numbers(16, 16, dtype=dtype), numbers(16, 8, dtype=dtype, seed=1), numbers(16, 8, seed=2)
    expected = d.double() + a.double() @ b.double()
    stored = b if order == "columns" else b.T.contiguous()
    run(f"multiply_{SHORT[dtype]}_{order}", 1, 32, a, stored, d, sanitize=sanitize, seed=1)
    torch.testing.assert_close(d.double(), expected, rtol=0, atol=1e-5)


def test_copies_are_there_after_the_wait_and_not_before() -> None:
    x = numbers(1800)

    def copied(kernel: str, **settings: Any) -> torch.Tensor:
        out = torch.empty(2048)
        run(kernel, 1, 128, x, out, 4, 1800, shared=4096, **settings)
        return out

    expected = torch.nn.functional.pad(x, (0, 248))
    for settings in ({}, {"seed": 1}, {"sanitize": "address"}, {"sanitize": "thread"}):
        assert torch.equal(copied("copy_tiles_right", **settings), expected)
    assert copied("copy_tiles_unfinished").isnan().any()  # a wait for too few
    assert copied("copy_tiles_early").isnan().any()  # a copy to where others still read
    with fails("data race"):
        copied("copy_tiles_early", sanitize="thread")
    with fails("cp_async: shared address .* is not aligned to 16 bytes"):
        run("copy_misaligned", 1, 1, x, torch.empty(1))


# ---- Hopper ----


def image(b: np.ndarray, swizzle: int, mn_major: bool) -> tuple[np.ndarray, int, int, int]:
    """b [K, N] as the tensor cores want it in shared memory, with the bytes leading, stride, and from step to step."""
    K, N = b.shape
    per_row = swizzle // 2
    groups = swizzle * 8  # bytes of 8 rows
    k, n = np.meshgrid(np.arange(K), np.arange(N), indexing="ij")
    if mn_major:
        # A row is one k and holds 64 (32) n; rows of 8 k after one another; then the next n; then the next 8 k.
        leading, stride, step = groups, groups * (N // per_row), 2 * groups * (N // per_row)
        row = k // 8 * (N // per_row) * 8 + n // per_row * 8 + k % 8
        column = n % per_row
    else:
        # A row is one n and holds 64 (32) k; the steps of 16 k lie within it.
        leading, stride, step = 0, groups, 32
        row, column = n, k
        assert per_row == K
    piece = column // 8 ^ (row % 8 if swizzle == 128 else row // 2 % 4)
    memory = np.zeros(row.max() * per_row + per_row, b.dtype)
    memory[row * per_row + piece * 8 + column % 8] = b
    return memory, leading, stride, step


@pytest.mark.parametrize("N", [64, 256])
@pytest.mark.parametrize("mn_major", [False, True])
@pytest.mark.parametrize("swizzle", [64, 128])
@pytest.mark.parametrize("dtype", HALVES)
def test_wgmma(dtype: torch.dtype, swizzle: int, mn_major: bool, N: int) -> None:
    K = swizzle // 2
    a, b, d = numbers(64, K, dtype=dtype), numbers(K, N, dtype=dtype, seed=1), numbers(64, N, seed=2)
    expected = d.double() + a.double() @ b.double()
    memory, leading, stride, step = image(b.view(torch.int16).numpy(), swizzle, mn_major)
    kernel = f"multiply_{SHORT[dtype]}_{N}_{swizzle}_{int(mn_major)}"
    stored = torch.from_numpy(memory).view(dtype)
    bytes = 2 * memory.size
    run(kernel, 1, 128, a, stored, d, K // 16, bytes, leading, stride, step, source="hopper", shared=bytes, seed=1)
    torch.testing.assert_close(d.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("N", [64, 128, 256])
@pytest.mark.parametrize("dtype", HALVES)
def test_wgmma_of_shifted_rows(dtype: torch.dtype, N: int) -> None:
    """Both operands in shared memory; a is 8 × 8 pixels of a patch of 10 × 10, from its pixel (1, 2) on."""
    patch, b, d = numbers(10, 10, 64, dtype=dtype), numbers(64, N, dtype=dtype, seed=1), numbers(64, N, seed=2)
    a = patch[1:9, 2:10].reshape(64, 64)
    expected = d.double() + a.double() @ b.double()
    stored = [image(it.view(torch.int16).numpy(), 128, False)[0] for it in (b, patch.reshape(100, 64).T)]
    images = torch.from_numpy(np.concatenate(stored)).view(dtype)
    bytes, start = 2 * images.numel(), N * 128
    run(f"multiply_shared_{SHORT[dtype]}_{N}", 1, 128, images, d, bytes, start + 12 * 128, 10 * 128, 0,
        source="hopper", shared=bytes, seed=1)  # fmt: skip
    torch.testing.assert_close(d.double(), expected, rtol=0, atol=1e-4)


def test_wgmma_is_asynchronous() -> None:
    def product(which: str, **settings: Any) -> torch.Tensor:
        out = torch.empty(128)
        run(f"product_{which}", 1, 128, out, source="hopper", shared=8192, **settings)
        return out

    for sanitize in (None, "address", "thread"):
        assert (product("right", sanitize=sanitize) == 16).all()
    assert (product("unfinished") != 16).any()
    assert (product("overwritten") != 16).any()
    with fails("data race"):
        product("overwritten", sanitize="thread")
    with fails("wgmma: a wgmma_fence must come before"):
        product("unfenced")
    with fails("the warps of a warpgroup did not issue the same wgmma"):
        product("disagreed")


def test_clusters() -> None:
    x = numbers(256)

    def sums(kernel: str, **settings: Any) -> torch.Tensor:
        out = torch.zeros(2)
        run(kernel, 4, 64, x, out, source="hopper", shared=256, **settings)
        return out

    expected = x.view(2, 128).sum(1)
    for settings in ({}, {"seed": 1}, {"sanitize": "address"}, {"sanitize": "thread"}):
        torch.testing.assert_close(sums("cluster_sum_right", **settings), expected, rtol=0, atol=1e-4)
    assert sums("cluster_sum_unwritten").isnan().all()  # read before the other block wrote
    assert any(sums("cluster_sum_gone", seed=seed).isnan().any() for seed in range(4))  # or after it returned


def test_bulk_copies_to_a_cluster() -> None:
    x = numbers(32)
    for settings in ({}, {"seed": 1}, {"sanitize": "address"}, {"sanitize": "thread"}):
        out = torch.zeros(2, 32)
        run("share_right", 2, 32, x, out, source="hopper", shared=192, **settings)
        assert torch.equal(out, x.expand(2, 32))
    run("share_hasty", 2, 32, x, out, source="hopper", shared=192)
    assert out.isnan().any()  # read before the other block sent its half
    with fails("data race"):
        run("share_hasty", 2, 32, x, out, source="hopper", shared=192, sanitize="thread")


def test_barriers_in_shared_memory() -> None:
    x = numbers(320)

    def piped(kernel: str, **settings: Any) -> torch.Tensor:
        out = torch.zeros(320)
        run(kernel, 1, 64, x, out, 10, source="hopper", shared=320, **settings)
        return out

    expected = x.view(-1, 2).flip(1).flatten()
    for settings in ({}, {"seed": 1}, {"sanitize": "address"}, {"sanitize": "thread"}):
        assert torch.equal(piped("pipeline_right", **settings), expected)
    with fails("32 returned, 32 wait at barrier_wait"):  # a phase went by unseen
        piped("pipeline_hasty")
    with fails("data race"):
        piped("pipeline_hasty", sanitize="thread")
    with fails("no barrier_init came before"):
        piped("pipeline_uninitialised")


def test_named_barriers() -> None:
    out = torch.zeros(128)
    for sanitize in (None, "thread"):
        run("meet_in_pairs", 1, 128, out, 64, source="hopper", shared=512, sanitize=sanitize)
        assert torch.equal(out, (torch.arange(128) ^ 63).float())
    with fails("64 wait at named_barrier .*, 64 wait|wait for ever"):
        run("meet_in_pairs", 1, 128, out, 96, source="hopper", shared=512)
