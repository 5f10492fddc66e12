"""Rows of several arrays chosen by slots, against indexing: every byte exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.kernels.gather import gather

# What a source keeps: a feature and a query channels-last, a thumbnail, key points, a scale. Some rows are no multiple
# of 16 bytes; one is larger than a chunk, one exactly a chunk.
ROWS = [((32, 17, 16), "float16"), ((8, 32, 32), "float16"), ((3, 16, 15), "bfloat16"), ((15, 2), "float32"),
        ((15, 2, 2), "float32"), ((1,), "float32"), ((4, 5, 3), "uint8"), ((7, 11), "float32")]  # fmt: skip


def pools(S: int, device: str = "cpu", count: int = 8) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(S)
    found = []
    for shape, dtype in ROWS[:count]:
        made = (200 * torch.rand(S, *shape, generator=random)).to(getattr(torch, dtype))
        if len(shape) == 3:
            made = made.contiguous(memory_format=torch.channels_last)
        found.append(made.to(device))
    return found


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("slots", [[0], [2, 2, 0, 4, 1], list(range(5))], ids=str)
def test_rows_are_copied(device: str, slots: list[int], count: int) -> None:
    from_ = pools(5, device, count)
    chosen = torch.tensor(slots, dtype=torch.int32, device=device)
    for options in ({}, {"reference": True}):
        found = gather(from_, chosen, **options)
        assert len(found) == count
        for row, pool in zip(found, from_, strict=True):
            assert row.dtype == pool.dtype and torch.equal(row, pool[chosen.long()])
    outs = [torch.empty_like(it) for it in found]
    assert gather(from_, chosen, outs)[0] is outs[0]
    assert all(torch.equal(*pair) for pair in zip(outs, found, strict=True))
    assert [it.stride() for it in outs] == [it.stride() for it in found]


def test_a_slot_out_of_range_is_the_last(device: str) -> None:
    from_ = pools(3, device)
    chosen = torch.tensor([3, -1, 1, 2**31 - 1, -(2**31)], dtype=torch.int32, device=device)
    for options in ({}, {"reference": True}):
        for row, pool in zip(gather(from_, chosen, **options), from_, strict=True):
            assert torch.equal(row, pool[[2, 2, 1, 2, 2]])


def test_parts_of_larger_arrays(device: str) -> None:
    """Rows that begin where no 16 bytes do; and nothing beside the chosen rows is written."""
    from_ = pools(4, device)
    larger = torch.arange(4 * 12 + 3, dtype=torch.float32, device=device)
    from_[0], from_[5] = from_[0][1:], larger[3:].view(4, 12)[1:]
    from_[1:5] = [it[1:] for it in from_[1:5]]
    outs = [torch.full((5, *it.shape[1:]), 9, dtype=it.dtype, device=device) for it in from_[:6]]
    outs = [out.to(memory_format=torch.channels_last) if out.dim() == 4 else out for out in outs]
    chosen = torch.tensor([7, 2, 0, 1, 7], dtype=torch.int32, device=device)
    gather(from_[:6], chosen[1:4], [it[1:4] for it in outs])
    for out, pool in zip(outs, from_[:6], strict=True):
        assert torch.equal(out[1:4], pool[[2, 0, 1]]) and out[[0, 4]].eq(9).all()


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_sanitizers_find_nothing(sanitize: str) -> None:
    from emulated import EmulatedDevice, emulation

    with emulation(EmulatedDevice(sanitize=sanitize, seed=5)):
        from_ = pools(3)
        chosen = torch.tensor([2, 0, 9], dtype=torch.int32)
        for row, pool in zip(gather(from_, chosen), from_, strict=True):
            assert torch.equal(row, pool[[2, 0, 2]])


def test_what_cannot_be_used_is_named(emulated: Any) -> None:
    from_, chosen = pools(3), torch.tensor([0, 1], dtype=torch.int32)
    rows = [torch.empty_like(it[:2]) for it in from_]
    for message, call in {
        "pools must be 1 to 8 arrays, got 0": lambda: gather([], chosen),
        "pools must be 1 to 8 arrays, got 9": lambda: gather([*from_, from_[0]], chosen),
        "outs must be as many arrays as pools, 8, got 7": lambda: gather(from_, chosen, rows[:7]),
        "slots must be .*, got int64": lambda: gather(from_, chosen.long()),
        "slots must be int32, got float32": lambda: gather(from_, chosen.float()),
        r"slots must be \[B\] = \(\*,\), got \(1, 2\)": lambda: gather(from_, chosen[None]),
        "slots must be contiguous": lambda: gather(from_, torch.zeros(4, dtype=torch.int32)[::2]),
        r"pools\[1\] must be \(3, 8, 32, 32\), got \(2, 8, 32, 32\)": lambda: gather([from_[0], rows[1]], chosen),
        r"outs\[2\] must be \(2, 3, 16, 15\), got \(1, 3, 16, 15\)":
            lambda: gather(from_, chosen, [*rows[:2], rows[2][:1], *rows[3:]]),
        r"outs\[3\] must be float32, got float16":
            lambda: gather(from_, chosen, [*rows[:3], rows[3].half(), *rows[4:]]),
        r"pools\[0\] must have no gaps in memory": lambda: gather([from_[0][:, :8]], chosen),
        r"outs\[0\] must lie in memory as pools\[0\] does": lambda: gather(from_[:1], chosen, [rows[0].contiguous()]),
        "rows multiples of 4 bytes, got 2 bytes": lambda: gather([torch.zeros(3, 1).half()], chosen),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()
