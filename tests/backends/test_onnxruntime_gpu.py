"""ONNX Runtime's GPU providers on a machine without one: what is said, and the same code on the CPU's provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagan_rt import backends
from dagan_rt.backends import onnxruntime_cuda, onnxruntime_tensorrt
from dagan_rt.bundle import Bundle
from dagan_rt.cuda.driver import compute_capability
from dagan_rt.errors import InputError

onnxruntime = pytest.importorskip("onnxruntime")
CUDA, TENSORRT = onnxruntime_cuda.PROVIDER, onnxruntime_tensorrt.PROVIDER


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.mark.parametrize(("name", "provider"), [("onnxruntime-cuda", CUDA), ("onnxruntime-tensorrt", TENSORRT)])
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, name: str, provider: str) -> None:
    install = "run pip uninstall -y onnxruntime; pip install onnxruntime-gpu"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert backends.missing(name) == f"the package onnxruntime that is installed has no {provider}: {install}"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime_cuda, "compute_capability", lambda: None)
    monkeypatch.setattr(onnxruntime_cuda, "missing_gpu", lambda: "there is no NVIDIA GPU on this machine")
    assert backends.missing(name) == f"{provider} needs an NVIDIA GPU: there is no NVIDIA GPU on this machine"
    monkeypatch.setattr(onnxruntime_cuda, "compute_capability", lambda: "9.0")
    assert backends.missing(name) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backends.missing(name) == f"the package onnxruntime-gpu is not installed: {install}"


@pytest.mark.parametrize(("module", "provider"), [(onnxruntime_cuda, CUDA), (onnxruntime_tensorrt, TENSORRT)])
@pytest.mark.skipif(compute_capability() is not None, reason="is about machines without a GPU")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_falling_back_to_the_cpu_is_an_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: Any, provider: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=f"^{provider} of ONNX Runtime .* would run on CPUExecutionProvider: install"):
        module.open(bundle)


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_it_computes_what_the_cpu_backend_computes(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_cuda.OnnxRuntimeGpuBackend, "device", "cpu")
    backend = onnxruntime_cuda.OnnxRuntimeGpuBackend(bundle, 1, "onnxruntime-cuda", [("CPUExecutionProvider", {})])
    reference = backends.open_backend("onnxruntime", bundle, threads=1)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    planes = backend.from_image(image)
    found, wanted = (
        backend.run("driving", {"image": planes}),
        reference.run("driving", {"image": reference.from_image(image)}),
    )
    assert list(found) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_array_equal(backend.to_numpy(found[name]), values)
    np.testing.assert_array_equal(backend.to_image(planes), image)


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_errors_of_the_gpu_do_not_go_on_with_the_cpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_cuda.OnnxRuntimeGpuBackend, "device", "cpu")
    backend = onnxruntime_cuda.OnnxRuntimeGpuBackend(bundle, 1, "onnxruntime-cuda", [("CPUExecutionProvider", {})])
    assert not any(session._enable_fallback for session in backend._sessions.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_on_a_gpu(bundle: Bundle, name: str) -> None:
    if reason := backends.missing(name, bundle):
        pytest.skip(reason)
    backend, reference = (backends.open_backend(it, bundle) for it in (name, "onnxruntime"))
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    found, wanted = (it.run("source", {"image": it.from_image(image)}) for it in (backend, reference))
    for output, values in wanted.items():
        np.testing.assert_allclose(backend.to_numpy(found[output]), values, atol=1e-2 * max(1, np.abs(values).max()))
