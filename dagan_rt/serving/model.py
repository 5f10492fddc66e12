"""The served model: `TritonPythonModel`, which Triton's Python backend makes of every instance.

It is loaded by a model.py of one line in the model repository, in a process of its own for every instance.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
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
        threading.Thread(target=_leave, args=(self._sequences.lost,), name="dagan-rt device lost", daemon=True).start()
        print(streams.report(), file=sys.stderr, flush=True)

    def execute(self, requests: list[Any]) -> None:
        """Take requests; answers go through each one's sender, later. Nothing is left waiting in Triton's queue."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                taken = _Request(self._triton, request, sender, self._decoupled)
            except Exception as error:  # an exception out of here would be a second answer to those before it
                _refuse(self._triton, sender, "INVALID_ARGUMENT", f"the request cannot be read: {error}")
            else:
                self._sequences.accept(taken)

    def finalize(self) -> None:
        """Answer what is under way, and free the memory."""
        self._metrics.close()
        self._sequences.close()


def _visible(device: str) -> str:
    """The device of an instance, as a number among those this process may see."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return allowed[int(device)] if len(allowed) > int(device) and allowed[0] else device


def _leave(lost: threading.Event) -> None:
    """End the process once its device is gone: whoever supervises the server sees that, and starts it anew."""
    lost.wait()
    time.sleep(1.0)  # while those that wait are told
    print("the device is lost: this instance ends", file=sys.stderr, flush=True)
    os._exit(1)


class _Request:
    """A `sequences.Request` of Triton's."""

    def __init__(self, triton: Any, request: Any, sender: Any, many: bool) -> None:
        self._triton, self._sender = triton, sender
        flags = request.flags()
        self.sequence: int | str = request.correlation_id()
        self.start, self.end, self.many = bool(flags & START), bool(flags & END), many
        self.parameters: Mapping[str, Any] = json.loads(request.parameters() or "{}")
        self.wanted: Collection[str] = frozenset(request.requested_output_names())
        # Copies: what Triton lends ends with the request.
        self.inputs = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}

    def cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())

    def answer(self, outputs: Mapping[str, np.ndarray], last: bool = True) -> None:
        tensors = [self._triton.Tensor(name, self._shaped(array)) for name, array in outputs.items()]
        final = self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        self._sender.send(self._triton.InferenceResponse(output_tensors=tensors), flags=final)

    def refuse(self, status: str, message: str) -> None:
        _refuse(self._triton, self._sender, status, message)

    def _shaped(self, array: np.ndarray) -> np.ndarray:
        """An output as config.pbtxt has it, which gives encoded images a batch dimension where others have one."""
        if array.dtype == object:
            return array if self.many else array[None]
        return array[None] if array.dtype == np.uint8 else array  # key points have theirs


def _refuse(triton: Any, sender: Any, status: str, message: str) -> None:
    code = getattr(triton.TritonError, {"INVALID_ARGUMENT": "INVALID_ARG"}.get(status, status))
    response = triton.InferenceResponse(output_tensors=[], error=triton.TritonError(message, code))
    sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


OPEN = "dagan_sequences_open"
COUNTERS = {
    "dagan_frames_driven": "Frames driven",
    "dagan_frames_failed": "Frames that could not be driven",
    "dagan_requests_refused": "Requests answered with an error",
    "dagan_batches": "Batches given to the device",
    "dagan_frame_queue_us": "Microseconds that driven frames waited for their batch, summed over frames",
    "dagan_frame_compute_us": "Microseconds from a frame's batch to its result, summed over frames",
}


class _Metrics:
    """What Triton's own metrics cannot know, under /metrics; refreshed every second."""

    def __init__(self, triton: Any, streams: Streams, sequences: Sequences, model: str, instance: str) -> None:
        self._streams, self._sequences = streams, sequences
        kinds = {OPEN: ("Sequences that are open now", triton.MetricFamily.GAUGE)}
        kinds |= {name: (text, triton.MetricFamily.COUNTER) for name, text in COUNTERS.items()}
        self._families = [triton.MetricFamily(name, text, kind) for name, (text, kind) in kinds.items()]
        labels = {"model": model, "instance": instance}
        self._metrics = dict(zip(kinds, (family.Metric(labels=labels) for family in self._families), strict=True))
        self._told = dict.fromkeys(COUNTERS, 0.0)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dagan-rt metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(1.0):
            self.refresh()

    def refresh(self) -> None:
        stats = self._streams.stats
        counts = (
            stats.driven, stats.errors, self._sequences.refused, self._streams.batches, 1e6 * stats.queue,
            1e6 * stats.compute,
        )  # fmt: skip
        now = dict(zip(COUNTERS, counts, strict=True))
        for name, value in now.items():
            self._metrics[name].increment(value - self._told[name])
        self._told = now
        self._metrics[OPEN].set(self._sequences.open)
