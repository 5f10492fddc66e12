"""What Triton's Python backend calls, under an imitation of its module `triton_python_backend_utils`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dagan_rt import InputError, Reenactor
from dagan_rt.serving import model as served
from dagan_rt.serving.model import COUNTERS, OPEN, TritonPythonModel
from dagan_rt.serving.sequences import HANDLERS

PATIENCE = 20


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError(Exception):
    INTERNAL, INVALID_ARG, NOT_FOUND, UNAVAILABLE, ALREADY_EXISTS, CANCELLED = range(1, 7)

    def __init__(self, message: str, code: int) -> None:
        message.encode()  # as the binding does
        super().__init__(message)
        self.code = code


class Sender:
    def __init__(self) -> None:
        self.responses: list[Any] = []
        self.through = threading.Event()
        self.cancelled = False

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.through.is_set(), "a response after the last one"
        self.responses.append(response)
        if flags:
            self.through.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


class Request:
    """What the backend hands over; its arrays are its own again once `execute` returns."""

    def __init__(self, sequence: Any, flags: int, inputs: dict[str, np.ndarray], wanted: Any, parameters: str) -> None:
        self.sender = Sender()
        self._sequence, self._flags, self._wanted, self._parameters = sequence, flags, wanted, parameters
        self.tensors = [Tensor(name, array.copy()) for name, array in inputs.items()]

    def correlation_id(self) -> Any:
        return self._sequence

    def flags(self) -> int:
        return self._flags

    def inputs(self) -> list[Tensor]:
        return self.tensors

    def parameters(self) -> str:
        return self._parameters

    def requested_output_names(self) -> Any:
        return self._wanted

    def get_response_sender(self) -> Sender:
        return self.sender


class Metric:
    def __init__(self, labels: dict[str, str]) -> None:
        self.labels, self.value = labels, 0.0

    def increment(self, by: float) -> None:
        assert by >= 0
        self.value += by

    def set(self, value: float) -> None:
        self.value = value


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = Tensor, TritonError, 1
    module.InferenceResponse = lambda output_tensors, error=None: SimpleNamespace(
        outputs={tensor.name(): tensor.as_numpy() for tensor in output_tensors}, error=error
    )
    module.using_decoupled_model_transaction_policy = lambda config: "model_transaction_policy" in config
    module.metrics = {}

    class MetricFamily:
        COUNTER, GAUGE = "counter", "gauge"

        def __init__(self, name: str, description: str, kind: str) -> None:
            self.name, self.kind = name, kind

        def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802 (Triton's name)
            module.metrics[self.name] = Metric(labels)
            return module.metrics[self.name]

    module.MetricFamily = MetricFamily
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return module


@pytest.fixture
def repository(tiny_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_bundle, tmp_path / "reenact" / "3" / "bundle")
    return tmp_path / "reenact"


def arguments(repository: Path, decoupled: bool = False, kind: str = "CPU", **parameters: Any) -> dict[str, str]:
    given = {"backend": "onnxruntime", "threads": 1, "sequences": 2, "bundle_sha256": "ab", **parameters}
    config: dict[str, Any] = {"parameters": {name: {"string_value": str(value)} for name, value in given.items()}}
    if decoupled:
        config["model_transaction_policy"] = {"decoupled": True}
    return {
        "model_config": json.dumps(config), "model_repository": str(repository), "model_version": "3",
        "model_name": "reenact", "model_instance_name": "reenact_0_0", "model_instance_kind": kind,
        "model_instance_device_id": "1",
    }  # fmt: skip


EVERYTHING = ("image", "image_encoded", "kp_value", "kp_jacobian")


def ask(model: Any, *requests: Request, then: Callable[[], None] = lambda: None) -> list[Sender]:
    model.execute(list(requests))
    for request in requests:
        for tensor in request.tensors:
            tensor.as_numpy().fill(0)  # as if the shared memory were used again
    then()
    for request in requests:
        assert request.sender.through.wait(PATIENCE)
    return [request.sender for request in requests]


def request(sequence: Any, flags: int = 0, wanted: Any = EVERYTHING, parameters: Any = None, **inputs: Any) -> Request:
    return Request(sequence, flags, inputs, wanted, json.dumps(parameters) if parameters else "")


def test_a_session_gives_the_pixels_of_a_reenactor(triton: Any, repository: Path) -> None:
    model = TritonPythonModel()
    model.initialize(arguments(repository))
    try:
        frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3)).astype(np.uint8)
        reenactor = Reenactor(repository / "3" / "bundle", "onnxruntime", threads=1)
        reenactor.set_source(frames[0])
        free = threading.Event()
        for _ in range(HANDLERS):
            model._sequences._pool.submit(free.wait, PATIENCE)  # so that the source is looked at after `execute`
        warm, start = ask(model, request(0, end=np.ones((1, 1), bool)), request(7, 1, source=frames[:1]), then=free.set)
        for sender in (warm, start):
            assert [each.error for each in sender.responses] == [None] and not sender.responses[0].outputs
        for frame in frames[1:3]:
            (sender,) = ask(model, request(7, frame=frame[None]))
            assert (sender.responses[0].outputs["image"] == reenactor.drive(frame)).all()
            assert sender.responses[0].outputs["image"].shape == (1, 64, 64, 3)
        (sender,) = ask(model, request(7, wanted=("kp_value", "kp_jacobian"), frame=frames[3:4]))
        value, jacobian = reenactor.keypoints(frames[3])
        assert (sender.responses[0].outputs["kp_value"] == value).all()
        assert (sender.responses[0].outputs["kp_jacobian"] == jacobian).all() and jacobian.shape == (1, 15, 2, 2)
        (sender,) = ask(model, request(7, 2, wanted=("image_encoded",), frame=frames[4:5]))
        assert sender.responses[0].outputs["image_encoded"].shape == (1, 1)
        assert sender.responses[0].outputs["image_encoded"][0, 0].startswith(b"\x89PNG")
        for _ in range(2):  # they are told what came since the last time
            model._metrics.refresh()
        metrics = {name: metric.value for name, metric in triton.metrics.items()}
        assert set(metrics) == {OPEN, *COUNTERS}
        assert metrics[OPEN] == 0 and metrics["dagan_frames_driven"] == 4 and metrics["dagan_batches"] == 4
        assert metrics["dagan_frames_failed"] == metrics["dagan_requests_refused"] == 0
        stats = model._metrics._streams.stats
        assert metrics["dagan_frame_queue_us"] == pytest.approx(1e6 * stats.queue) and stats.queue > 0
        assert metrics["dagan_frame_compute_us"] == pytest.approx(1e6 * stats.compute) and stats.compute > 0
        assert all(
            metric.labels == {"model": "reenact", "instance": "reenact_0_0"} for metric in triton.metrics.values()
        )
    finally:
        model.finalize()


def test_a_decoupled_request_gets_a_response_a_frame(triton: Any, repository: Path) -> None:
    model = TritonPythonModel()
    model.initialize(arguments(repository, decoupled=True))
    try:
        frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3)).astype(np.uint8)
        (sender,) = ask(model, request("a", 1, source=frames[:1], frame=frames[1:], parameters={"encoding": "JPEG"}))
        assert [each.error for each in sender.responses] == [None] * 4
        assert all(each.outputs["image"].shape == (1, 64, 64, 3) for each in sender.responses)
        assert all(each.outputs["image_encoded"].shape == (1,) for each in sender.responses)
    finally:
        model.finalize()


def test_refusals_have_triton_s_codes_and_never_leave_execute(triton: Any, repository: Path) -> None:
    model = TritonPythonModel()
    model.initialize(arguments(repository, sequences=1))
    try:
        source = np.zeros((1, 64, 64, 3), np.uint8)
        unreadable = request(1, frame=source)
        unreadable._parameters = "{"
        gone = request(3, 1, source=source)
        gone.sender.cancelled = True
        senders = ask(
            model, unreadable, request(1, frame=source), request(1, 1, source=source), request(1, 1, source=source),
            request(2, 1, source=source), request(1, parameters={"\ud800": 1}, frame=source), request(1, frame=source),
        )  # fmt: skip
        codes = [each.error.code if (each := sender.responses[0]).error else None for sender in senders]
        assert codes == [
            TritonError.INVALID_ARG, TritonError.NOT_FOUND, None, TritonError.ALREADY_EXISTS, TritonError.UNAVAILABLE,
            TritonError.INVALID_ARG, None,
        ]  # fmt: skip
        assert "cannot be read" in str(senders[0].responses[0].error)
        ask(model, request(1, 2, end=np.ones((1, 1), bool)))
        (sender,) = ask(model, gone)
        assert sender.responses[0].error.code == TritonError.CANCELLED
    finally:
        model.finalize()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queue": 0}, "queue must be 1 to 1024"),
        ({"backend": "abacus"}, "abacus"),
        ({"damage": "generator.onnx"}, "generator"),
        ({"damage": "manifest.json"}, "manifest"),
    ],
)
def test_what_cannot_be_served_is_not_loaded_and_said(
    triton: Any, repository: Path, change: dict[str, Any], message: str
) -> None:
    if name := change.pop("damage", None):
        (file,) = (repository / "3").rglob(name)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 255
        file.write_bytes(data)
    with pytest.raises(InputError, match=message):
        TritonPythonModel().initialize(arguments(repository, **change))


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "1"), ("", "1"), ("4,GPU-ab", "GPU-ab"), ("MIG-x,MIG-y,7", "MIG-y"), ("5", "1")]
)
def test_an_instance_sees_the_gpu_that_it_is_given(
    triton: Any, repository: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(InputError):
        TritonPythonModel().initialize(arguments(repository, kind="GPU", backend="abacus"))
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == (expected, "PCI_BUS_ID")
    monkeypatch.delenv("CUDA_DEVICE_ORDER")


def test_an_instance_whose_device_is_lost_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(served.os, "_exit", ended.append)
    monkeypatch.setattr(served.time, "sleep", lambda seconds: None)
    lost = threading.Event()
    watch = threading.Thread(target=served._leave, args=(lost,))
    watch.start()
    assert not ended
    lost.set()
    watch.join(PATIENCE)
    assert ended == [1]
