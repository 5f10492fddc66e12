"""Small data sets whose frames are a function of clip and frame, and extractors whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.model import Model
from dagan_rt.training.data import BadClip, Frame

TINY: dict[str, Any] = {
    "size": 32, "num_keypoints": 4, "depth_width": 4, "depth_decoder_widths": (4, 4, 4, 4, 4), "keypoint_width": 4,
    "keypoint_max": 8, "keypoint_blocks": 2, "motion_width": 4, "motion_max": 8, "motion_blocks": 2,
    "motion_scale": 0.5, "generator_width": 4, "generator_max": 8, "residual_blocks": 1, "query_width": 2,
    "discriminator_width": 4, "discriminator_max": 8, "discriminator_blocks": 1,
}  # fmt: skip


class FakeClips:
    """Clips of noise, named; some cannot be read."""

    size = 32

    def __init__(self, counts: dict[str, int], identities: dict[str, str] | None = None, broken: Sequence[str] = ()):
        self.names, self.counts = list(counts), list(counts.values())
        self.identities, self.broken = identities or {}, set(broken)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, clip: int) -> str:
        return self.names[clip]

    def identity(self, clip: int) -> str:
        return self.identities.get(self.names[clip], self.names[clip].split("#")[0])

    def frame_count(self, clip: int) -> int:
        return self.counts[clip]

    def read(self, clip: int, frames: Sequence[int]) -> list[Frame]:
        if self.names[clip] in self.broken:
            raise BadClip(f"{self.names[clip]} is corrupt")
        seed = [sum(map(ord, self.names[clip]))]
        return [
            Frame(np.random.default_rng([*seed, frame]).integers(0, 256, (self.size, self.size, 3), np.uint8))
            for frame in frames
        ]


@pytest.fixture(scope="session")
def fake_clips() -> type[FakeClips]:
    return FakeClips


def onnx_model(
    path: Path, *, shape: Sequence[Any] = ("B", 3, 16, 16), outputs: dict[str, tuple[str, Any]] | None = None
) -> None:
    """Write a graph whose outputs are known functions of the means of its input's three channels, m [B, 3].

    outputs: name -> (kind, constant): "means" m; "scaled" m * constant [3]; "points" m's first two, repeated and
    shifted by the constant [L, 2]; "score" the first mean, [B, 1].
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, infos = [], [], []
    axes = [1, 2] if shape[-1] == 3 else [2, 3]
    nodes.append(helper.make_node("ReduceMean", ["image"], ["channels"], axes=axes, keepdims=0))

    def constant(name: str, value: Any, kind: Any = np.float32) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    for name, (kind, value) in (outputs or {"output": ("means", None)}).items():
        if kind == "means":
            nodes.append(helper.make_node("Identity", ["channels"], [name]))
        elif kind == "scaled":
            nodes.append(helper.make_node("Mul", ["channels", constant(f"{name}_by", value)], [name]))
        elif kind == "score":
            nodes.append(helper.make_node("Slice", ["channels", constant(f"{name}_0", [0], np.int64),
                                                    constant(f"{name}_1", [1], np.int64),
                                                    constant(f"{name}_a", [1], np.int64)], [name]))  # fmt: skip
        else:
            cut = [
                constant(f"{name}_{letter}", [number], np.int64)
                for letter, number in zip("xyz", (0, 2, 1), strict=True)
            ]
            nodes.append(helper.make_node("Slice", ["channels", *cut], [f"{name}_two"]))
            middle = constant(f"{name}_middle", [1], np.int64)
            nodes.append(helper.make_node("Unsqueeze", [f"{name}_two", middle], [f"{name}_rows"]))
            nodes.append(helper.make_node("Add", [f"{name}_rows", constant(f"{name}_shift", value)], [name]))
        infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, list(shape))
    graph = helper.make_graph(nodes, "known", [image], infos, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def descriptor(
    folder: Path, of: str = "identity", file: str = "", graph: dict[str, Any] | None = None, **keys: Any
) -> Path:
    """Write a descriptor and, unless `graph` is None, its ONNX file; keys replace or add entries, None leaves out."""
    file = file or of
    values: dict[str, Any] = {
        "kind": of, "name": f"known {of}", "model": f"{file}.onnx", "size": [16, 16], "output": "output",
    } | keys  # fmt: skip
    values |= {"units": "pixels"} if of == "landmarks" and "units" not in keys else {}
    values |= {"units": "degrees"} if of == "pose" and "units" not in keys else {}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items() if value is not None)
    (folder / f"{file}.toml").write_text(text)
    if graph is not None:
        onnx_model(folder / f"{file}.onnx", **graph)
    return folder / f"{file}.toml"


@pytest.fixture(scope="session")
def write_descriptor() -> Callable[..., Path]:
    return descriptor


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Model]:
    def make(variant: str = "dagan") -> Model:
        torch.manual_seed(3)
        model = Model(NetworkConfig(variant=variant, **TINY))
        with torch.no_grad():  # untrained, nearly all is gray and nothing moves: make differences show
            for layer, factor in ((model.generator.final, 100), (model.keypoints.kp, 100),
                                  (model.generator.dense_motion_network.mask, 30)):  # fmt: skip
                layer.weight *= factor
        return model

    return make
