"""What many tests share: the golden files, and models filled with the reproducible weights they were made with."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

# gRPC, once it has been used, would see to children that are forked, and complain in them; ours run another program.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

DATA = Path(__file__).parent / "data"

# Files of few tests that take long: first, so that at the end no process is left alone with one of them.
LONGEST = (
    "test_golden_runtime.py", "test_long_runs.py", "test_loop.py", "test_interrupted.py", "test_golden_networks.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@cache
def _fill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dagan_rt_tests_fill", DATA / "fill.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Golden:
    """One published variant: its keys and shapes, its arrays, and its networks filled with the golden weights."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.keys: dict[str, dict[str, Any]] = json.loads((DATA / f"{variant}.keys.json").read_text())
        with np.load(DATA / f"{variant}.npz") as arrays:
            self.arrays = dict(arrays)

    def state_dict(self, network: str) -> dict[str, Any]:
        """Every entry of one published network but the fixed anti-alias filters, as torch tensors."""
        import torch

        return {
            key: torch.from_numpy(_fill().tensor(network, key, tuple(shape)))
            for key, (shape, _) in self.keys[network].items()
            if not key.endswith("down.weight")
        }

    def config(self) -> Any:
        from dagan_rt.networks.config import NetworkConfig

        if self.variant == "fomm":
            return NetworkConfig(variant="fomm", num_keypoints=10)
        if self.variant == "dagan_depth50":
            return NetworkConfig(variant="dagan", depth_layers=50)
        return NetworkConfig(variant=self.variant)

    @cache  # noqa: B019 (one object a variant a session, kept by the fixture anyway)
    def model(self) -> Any:
        """The model in eval mode with the golden weights."""
        from dagan_rt.networks.model import Model

        model = Model(self.config()).eval()
        for name, network in model.networks().items():
            if name not in self.keys:  # the FOMM files hold no discriminator
                continue
            state = {key: value for key, value in self.state_dict(name).items() if not key.startswith("encoder.fc.")}
            missing, unexpected = network.load_state_dict(state, strict=False)
            assert not unexpected and all(key.endswith("down.weight") for key in missing), (missing, unexpected)
        return model


_golden = cache(Golden)


@pytest.fixture(scope="session")
def golden() -> Any:
    """`golden(variant) -> Golden` for dagan, dagan_depth50, dagan_spade and fomm."""
    return _golden


@pytest.fixture(scope="session")
def fill() -> Any:
    """`fill.tensor(network, key, shape, salt=0)`: the golden weights."""
    return _fill()


def _small_model(variant: str, seed: int = 0, **sizes: Any) -> Any:
    import torch

    from dagan_rt.networks.config import NetworkConfig
    from dagan_rt.networks.model import Model
    from dagan_rt.networks.variants import VARIANTS

    config = NetworkConfig(
        variant=variant, size=64, num_keypoints=VARIANTS[variant].num_keypoints, depth_width=8,
        depth_decoder_widths=(4, 4, 8, 8, 8), keypoint_width=4, keypoint_max=16, keypoint_blocks=2, motion_width=4,
        motion_max=16, motion_blocks=2, generator_width=8, generator_max=16, residual_blocks=1, query_width=4,
        spade_width=8, spade_hidden=8, discriminator_width=4, discriminator_max=8, discriminator_blocks=2,
    )  # fmt: skip
    config = replace(config, **sizes)
    torch.manual_seed(seed)
    model = Model(config).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "gamma")):
            tensor.data.add_(0.2 * torch.randn_like(tensor))
        elif name.endswith("jacobian.weight"):
            tensor.data.add_(0.02 * torch.randn_like(tensor))  # more, and some frames are nearly singular
    return model


@pytest.fixture(scope="session")
def small_model() -> Any:
    """`small_model(variant, seed=0, **config)`: 64 pixels, few channels, unless `config` says otherwise.

    Batch norms and attention are away from a neutral start.
    """
    return _small_model


@cache
def _traced(variant: str, graph: str, least: int | None, opset: int) -> Any:
    from dagan_rt.bundle import BatchProfile
    from dagan_rt.export.onnx import trace
    from dagan_rt.export.subnetworks import choose

    model = _small_model(variant)
    (subnetwork,) = choose(model.config, [graph])
    return subnetwork, trace(model, subnetwork, BatchProfile.parse("1:1:8" if least is None else str(least)), opset)


@pytest.fixture(scope="session")
def traced() -> Any:
    """`traced(variant, graph, batch="1:1:8", opset=17) -> (Subnetwork, ModelProto)` of the small model.

    Each is traced once; the graph is the caller's to change.
    """
    from dagan_rt.bundle import BatchProfile

    def get(variant: str, graph: str, batch: str = "1:1:8", opset: int = 17) -> Any:
        profile = BatchProfile.parse(batch)  # in the graph only where it is fixed
        subnetwork, model = _traced(variant, graph, profile.least if profile.fixed else None, opset)
        return subnetwork, copy.deepcopy(model)

    return get


@pytest.fixture(scope="session")
def portrait() -> np.ndarray:
    """The source of the golden files: uint8 [256, 256, 3] RGB, not to be changed."""
    with np.load(DATA / "dagan.npz") as arrays:
        image: np.ndarray = arrays["source"]
    image.setflags(write=False)
    return image


@pytest.fixture
def searched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of a camera's picture for faces is through when it was begun."""

    def now(call: Any, image: np.ndarray) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(image))
        return done

    monkeypatch.setattr("dagan_rt.cropping.aside", now)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported `dagan` bundle of the small model."""
    from dagan_rt import checkpoints
    from dagan_rt.export.__main__ import main as export

    root = tmp_path_factory.mktemp("tiny")
    checkpoints.save(root / "model.pth.tar", _small_model("dagan"), depth_dir=root / "depth")
    options = ["--checkpoint", root / "model.pth.tar", "--depth", root / "depth", "--out", root / "bundle"]
    assert export([str(option) for option in options]) == 0
    return root / "bundle"


def _louder(folder: Path) -> Path:
    import onnx

    from dagan_rt.bundle import write_manifest

    model = onnx.load(folder / "generator.onnx")
    last = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    for tensor in model.graph.initializer:
        if tensor.name == last.input[1]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(40 * onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, folder / "generator.onnx")
    described = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, {key: it for key, it in described.items() if key not in ("format", "version", "files")})
    return folder


@pytest.fixture(scope="session")
def louder() -> Any:
    """`louder(bundle folder)`, changed where it is: images of untrained graphs that tell sources and frames apart.

    Others are nearly gray, a level apart in a few values. The weights for PyTorch stay as they were.
    """
    return _louder


TINY_NETWORK = """
size = 32
depth_width = 4
depth_decoder_widths = [4, 4, 4, 4, 4]
keypoint_width = 4
keypoint_max = 8
keypoint_blocks = 2
motion_width = 4
motion_max = 8
motion_blocks = 2
motion_scale = 0.5
generator_width = 4
generator_max = 8
residual_blocks = 1
query_width = 2
discriminator_width = 4
discriminator_max = 8
discriminator_blocks = 1
"""


@pytest.fixture(scope="session")
def tiny_network() -> str:
    """Lines of a recipe's [network]: the smallest sizes that every variant can have."""
    return TINY_NETWORK


@pytest.fixture(scope="session")
def heed_interrupts() -> Callable[[], None]:
    """To be run in a child process: what a shell starts in the background ignores SIGINT, and hands that on."""

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return heed
