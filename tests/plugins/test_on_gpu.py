"""Engines with plugins on a real GPU compute what ONNX Runtime computes of the plain graphs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dagan_rt.backends import open_backend
from dagan_rt.bundle import Bundle
from dagan_rt.engines import FLAVOURS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("flavour", "plugins"), [("tensorrt", "python"), ("tensorrt", "aot"), ("tensorrt-rtx", "python")]
)
def test_a_bundle_runs_with_its_plugins(
    flavour: str, plugins: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if reason := FLAVOURS[flavour].missing():
        pytest.skip(reason)
    tiny_bundle: Path = request.getfixturevalue("tiny_bundle")  # exported only where an engine can run
    from dagan_rt.export.rebuild import rebuild

    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    bundle, _ = rebuild(tmp_path / "bundle", (flavour,), plugins=plugins)
    rng = np.random.default_rng(0)
    for graph in ("motion", "generator"):
        inputs = {}
        for tensor in bundle.graphs[graph].inputs:
            shape = (1, *(int(size) for size in tensor.shape[1:]))
            values = rng.uniform(-1, 1, shape)
            if tensor.name.endswith("jacobian"):
                values = np.eye(2) + 0.1 * values
            inputs[tensor.name] = values.astype(np.float32)
        found = {}
        for name in (flavour, "onnxruntime"):
            backend = open_backend(name, Bundle.open(bundle.path))
            outputs = backend.run(graph, {key: backend.from_numpy(it) for key, it in inputs.items()})
            found[name] = {key: backend.to_numpy(it) for key, it in outputs.items()}
        for key, wanted in found["onnxruntime"].items():
            np.testing.assert_allclose(found[flavour][key], wanted, atol=1e-3 * max(1, np.abs(wanted).max()))
