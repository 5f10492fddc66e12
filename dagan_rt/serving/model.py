"""The served model: `TritonPythonModel`, which Triton's Python backend makes of every instance.

It is loaded by a model.py of one line in the model repository, in a process of its own for every instance.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dagan_rt.bundle import Bundle
from dagan_rt.serving.protocol import Settings
from dagan_rt.serving.sequences import Sequences
from dagan_rt.streams import Streams

START, END = 1, 2  # TRITONSERVER_REQUEST_FLAG_SEQUENCE_*
BUNDLE = "bundle"  # beside model.py


class TritonPythonModel:
    """One instance: the bundle in its backend, and the sequences that it serves."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Check and load the bundle; whatever is wrong with it keeps the model from being loaded, and is told."""
        import triton_python_backend_utils as triton

        config = json.loads(args["model_config"])
        parameters = {name: str(entry["string_value"]) for name, entry in config.get("parameters", {}).items()}
        if args["model_instance_kind"] == "GPU":  # before anything asks for CUDA: one process, one GPU
            os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
            os.environ["CUDA_VISIBLE_DEVICES"] = _visible(args["model_instance_device_id"])
        settings = Settings.from_parameters(parameters)
        bundle = Bundle.open(Path(args["model_repository"]) / args["model_version"] / BUNDLE)
        streams = Streams(
            bundle, settings.backend, most=settings.sequences, batch=settings.batch, deadline=settings.deadline,
            queue=settings.queue, threads=settings.threads or None,
        )  # fmt: skip
        self._sequences = Sequences(streams, settings)
        self._triton = triton
        self._decoupled = triton.using_decoupled_model_transaction_policy(config)
        self._metrics = _Metrics(triton, streams, self._sequences, args["model_name"], args["model_instance_name"])
        print(streams.report(), file=sys.stderr, flush=True)

    def execute(self, requests: list[Any]) -> None:
        """Take requests; answers go through each one's sender, later. Nothing is left waiting in Triton's queue."""
        for request in requests:
            self._sequences.accept(_Request(self._triton, request, self._decoupled))

    def finalize(self) -> None:
        """Answer what is under way, and free the memory."""
        self._metrics.close()
        self._sequences.close()


def _visible(device: str) -> str:
    """The device of an instance, as a number among those this process may see."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return allowed[int(device)] if len(allowed) > int(device) and allowed[0] else device


class _Request:
    """A `sequences.Request` of Triton's."""

    def __init__(self, triton: Any, request: Any, many: bool) -> None:
        self._triton, self._sender = triton, request.get_response_sender()
        flags = request.flags()
        self.sequence = request.correlation_id()
        self.start, self.end = bool(flags & START), bool(flags & END)
        self.parameters: Mapping[str, Any] = json.loads(request.parameters() or "{}")
        self.wanted: Collection[str] = frozenset(request.requested_output_names())
        # Copies: what Triton lends ends with the request.
        self.many = many
        self._inputs = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}

    def input(self, name: str) -> np.ndarray | None:
        return self._inputs.get(name)

    def answer(self, outputs: Mapping[str, np.ndarray], last: bool = True) -> None:
        tensors = [self._triton.Tensor(name, _batched(array)) for name, array in outputs.items()]
        final = self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        self._sender.send(self._triton.InferenceResponse(output_tensors=tensors), flags=final)

    def refuse(self, status: str, message: str) -> None:
        code = getattr(self._triton.TritonError, {"INVALID_ARGUMENT": "INVALID_ARG"}.get(status, status))
        response = self._triton.InferenceResponse(output_tensors=[], error=self._triton.TritonError(message, code))
        self._sender.send(response, flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _batched(array: np.ndarray) -> np.ndarray:
    """An output with the batch dimension in front: images have none yet, points and strings do or need one."""
    if array.dtype == object:
        return array.reshape(1, -1)
    return array if array.dtype == np.float32 else np.ascontiguousarray(array[None])


class _Metrics:
    """What Triton's own metrics cannot know, under /metrics; refreshed every second."""

    def __init__(self, triton: Any, streams: Streams, sequences: Sequences, model: str, instance: str) -> None:
        self._streams, self._sequences = streams, sequences
        labels = {"model": model, "instance": instance}
        families = {
            "open": ("dagan_sequences_open", "Sequences that are open now", triton.MetricFamily.GAUGE),
            "driven": ("dagan_frames_driven", "Frames driven", triton.MetricFamily.COUNTER),
            "failed": ("dagan_frames_failed", "Frames that could not be driven", triton.MetricFamily.COUNTER),
            "refused": ("dagan_requests_refused", "Requests refused", triton.MetricFamily.COUNTER),
            "batches": ("dagan_batches", "Batches given to the device", triton.MetricFamily.COUNTER),
        }
        self._families = [triton.MetricFamily(name=n, description=d, kind=k) for n, d, k in families.values()]
        self._metrics = dict(zip(families, (family.Metric(labels=labels) for family in self._families), strict=True))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="dagan-rt metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _refresh(self) -> None:
        known = dict.fromkeys(("driven", "failed", "refused", "batches"), 0)
        while not self._closed.wait(1.0):
            stats = self._streams.stats
            now = {
                "driven": stats.driven, "failed": stats.errors, "refused": self._sequences.refused,
                "batches": self._streams.batches,
            }  # fmt: skip
            for name, value in now.items():
                self._metrics[name].increment(value - known[name])
            known = now
            self._metrics["open"].set(self._sequences.open)
