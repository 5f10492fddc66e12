"""The OpenVINO backend beyond what all backends must do (see test_conformance.py)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagan_rt import InputError, backends
from dagan_rt.bundle import Bundle, Graph

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> Any:
    return backends.open_backend("openvino", bundle, threads=1)


def image(bundle: Bundle, seed: int, batch: int = 1) -> dict[str, np.ndarray]:
    size = bundle.config.size
    return {"image": np.random.default_rng(seed).random((batch, 3, size, size), np.float32)}


def test_float32_graphs_are_computed_in_float32(bundle: Bundle, backend: Any) -> None:
    """OpenVINO takes bfloat16 by itself where the processor has it; its errors would be around 1e-3."""
    other = backends.open_backend("onnxruntime", bundle, threads=1)
    expected = other.run("source", image(bundle, 0))
    for name, found in backend.run("source", image(bundle, 0)).items():
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=3e-5 * max(1, np.abs(expected[name]).max()))
    for request in backend._requests.values():
        assert str(request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"


def test_results_are_the_callers_own(bundle: Bundle, backend: Any) -> None:
    first = backend.run("driving", image(bundle, 1))
    kept = {name: value.copy() for name, value in first.items()}
    for value in backend.run("driving", image(bundle, 2)).values():
        value[:] = 0
    for name, value in first.items():
        np.testing.assert_array_equal(value, kept[name])


def test_inputs_may_be_changed_afterwards_and_are_not_changed(bundle: Bundle, backend: Any) -> None:
    inputs = image(bundle, 3)
    before = inputs["image"].copy()
    expected = backend.run("driving", inputs)
    np.testing.assert_array_equal(inputs["image"], before)
    inputs["image"][:] = 0
    np.testing.assert_array_equal(backend.run("driving", {"image": before})["depth"], expected["depth"])


@pytest.mark.parametrize("change", ["read-only", "strided", "float64"])
def test_any_array_of_numbers_will_do(bundle: Bundle, backend: Any, change: str) -> None:
    planes = image(bundle, 4)["image"]
    expected = backend.run("driving", {"image": planes})["kp_value"]
    if change == "read-only":
        planes.flags.writeable = False
    given = {"strided": np.asfortranarray(planes), "float64": planes.astype(np.float64)}.get(change, planes)
    np.testing.assert_array_equal(backend.run("driving", {"image": given})["kp_value"], expected)


def test_threads_may_call_it_at_the_same_time(bundle: Bundle, backend: Any) -> None:
    inputs = [image(bundle, seed) for seed in range(8)]
    expected = [backend.run("driving", it)["depth"] for it in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda it: backend.run("driving", it)["depth"], inputs * 3))
    for at, depth in enumerate(found):
        np.testing.assert_array_equal(depth, expected[at % len(inputs)])


def test_a_batch_is_its_faces(bundle: Bundle, backend: Any) -> None:
    both = image(bundle, 5, batch=2)["image"]
    found = backend.run("driving", {"image": both})
    for face in range(2):
        for name, value in backend.run("driving", {"image": both[face : face + 1]}).items():
            np.testing.assert_allclose(found[name][face : face + 1], value, rtol=0, atol=1e-5)


def test_it_names_a_graph_it_cannot_load(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "motion.onnx").write_bytes(b"\x08\x07garbage" * 100)
    motion = bundle.graphs["motion"]
    graphs = {**bundle.graphs, "motion": Graph("motion", tmp_path / "motion.onnx", "", motion.inputs, motion.outputs)}
    with pytest.raises(InputError, match=r"motion.onnx cannot be loaded by OpenVINO 20\d\d\.") as caught:
        backends.open_backend("openvino", replace(bundle, graphs=graphs))
    assert "\n" not in str(caught.value)


def test_it_names_a_graph_that_the_manifest_does_not_describe(bundle: Bundle) -> None:
    motion = bundle.graphs["motion"]
    for changed in (replace(motion, inputs=motion.inputs[1:]), replace(motion, outputs=motion.outputs[1:])):
        graphs = {**bundle.graphs, "motion": changed}
        with pytest.raises(InputError, match="motion.onnx: the manifest declares the (in|out)puts"):
            backends.open_backend("openvino", replace(bundle, graphs=graphs))


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'dagan-rt[openvino]'" in str(backends.missing("openvino"))


def test_ctrl_c_is_safe_after_backends_that_ended_in_the_order_they_began(
    bundle: Bundle, heed_interrupts: Callable[[], None]
) -> None:
    """Of two `openvino.Core`s that end so, the first takes the stack away on which signals are handled."""
    program = f"""
import signal
from dagan_rt import backends
from dagan_rt.bundle import Bundle
bundle = Bundle.open({str(bundle.path)!r})
first, second = (backends.open_backend("openvino", bundle, 1) for _ in range(2))
del first
del second
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], timeout=120, capture_output=True, text=True, preexec_fn=heed_interrupts
    )
    assert (ran.returncode, ran.stdout) == (0, "interrupted\n"), ran.stderr


def test_nothing_is_reported_to_anybody(bundle: Bundle, tmp_path: Path) -> None:
    """Importing openvino loads what reports to its makers and writes an identifier into the home directory."""
    program = f"""
import sys
from dagan_rt import backends
from dagan_rt.bundle import Bundle
backends.open_backend("openvino", Bundle.open({str(bundle.path)!r}), 1)
assert "openvino" in sys.modules
assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
assert "openvino_telemetry" not in sys.modules or sys.modules["openvino_telemetry"]  # others may still import it
"""
    environment = {"HOME": str(tmp_path), "PATH": "", "PYTHONPATH": str(Path(backends.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)
    assert list(tmp_path.iterdir()) == []
