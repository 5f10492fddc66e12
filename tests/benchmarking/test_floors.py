"""What a frame must do at least, against PyTorch's own counter of operations and counts by hand."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch.utils.flop_counter import FlopCounterMode

from dagan_rt.benchmarking.floors import Cost, Work, cost_of, stage_costs
from dagan_rt.benchmarking.subjects import CONFIGS
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.model import Model

SMALL = CONFIGS["small"]


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_operations_are_those_that_pytorch_counts() -> None:
    costs = stage_costs(SMALL, 3)
    with torch.device("meta"):
        model = Model(SMALL).eval()
        image = torch.empty(3, 3, 64, 64)
        feature = torch.empty(3, SMALL.feature_width, 16, 16)
        assert model.depth is not None
        assert costs["depth"].flops == counted(lambda: model.depth(image))
        assert costs["residual blocks"].flops == counted(lambda: model.generator.bottleneck(feature))
        assert costs["final"].flops == counted(lambda: model.generator.final(torch.empty(3, 8, 64, 64)))
        query = model.generator.AttnModule.query(feature)
        assert costs["attention"].flops == counted(lambda: model.generator.AttnModule(query, feature))
        # The up blocks are counted as four 2 × 2 convolutions each: 16 taps where 36 were.
        x, plain = feature, 0
        for block in model.generator.up_blocks:
            plain += counted(lambda block=block, x=x: block(x))
            x = block(x)
    assert costs["upsampling"].flops == pytest.approx(plain * 16 / 36)


def test_bytes_of_single_convolutions_by_hand() -> None:
    costs = stage_costs(SMALL, 2, size=2)
    (final,) = costs["final"].works
    assert final.bytes == 2 * (2 * 8 * 64 * 64) + 2 * 3 * 64 * 64 + 2 * (3 * 8 * 49)  # the image is uint8
    up = costs["upsampling"].works[-1]  # 16 -> 8 channels, 32² -> 64²
    assert up.bytes == 2 * (2 * 16 * 32 * 32 + 2 * 8 * 64 * 64 + 4 * (16 * 8 * 4))
    down = next(work for work in costs["keypoints"].works if work.name.endswith("encoder.down_blocks.0.conv"))
    assert down.bytes == 2 * (2 * 4 * 16 * 16 + 2 * 16 * 8 * 8 + 16 * 4 * 9)  # pooled before it is written
    assert costs["image"].bytes == 2 * 3 * 64 * 64 * 3


def test_a_floor_takes_the_ceiling_that_binds_each_work() -> None:
    cost = Cost((Work(flops=1e9, bytes=1e3), Work(flops=1e3, bytes=4e6)))
    # 1 GFLOP at 100 TFLOP/s is 10 µs, 4 MB at 2000 GB/s 2 µs; the rest is hidden behind them.
    assert cost.floor(copy=2000.0, product=100.0) == (pytest.approx(12.0), False)
    assert cost.floor(copy=200.0, product=100.0) == (pytest.approx(30.0), True)


@pytest.mark.parametrize("variant", ["dagan", "dagan_spade", "dagan_sa", "baseline", "fomm"])
def test_stages_of_graphs_are_sums(variant: str) -> None:
    config = NetworkConfig.from_dict({**SMALL.to_dict(), "variant": variant, "spade_width": 8, "spade_hidden": 8})
    costs = stage_costs(config, 1)
    assert ("attention" in costs) == (config.parts.attention is not None)
    assert ("decoder" in costs) == (config.parts.decoder == "spade")
    driving, generator, whole = (cost_of(name, costs) for name in ("driving", "generator", "frame"))
    assert driving and generator and whole
    parts = driving.flops + costs["motion"].flops + generator.flops
    assert whole.flops == pytest.approx(parts) and whole.bytes > driving.bytes
    assert cost_of("motion", costs) == costs["motion"] and cost_of("something else", costs) is None
