"""Triton's ONNX Runtime backend, imitated: a backend written in Python, which Triton runs with its python backend.

Put beside the python backend, as onnxruntime/model.py in the folder of backends, it serves every model whose config
says `backend: "onnxruntime"` and that holds model.onnx. Requests that Triton's scheduler batched are stacked and run at
once. Only what the real backend does on a CPU is here, for tests where the real one cannot be had.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """One instance of one model."""

    def initialize(self, args: dict[str, str]) -> None:
        config: dict[str, Any] = json.loads(args["model_config"])
        given = {name: entry["string_value"] for name, entry in config.get("parameters", {}).items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(given.get("intra_op_thread_count", 1))
        options.log_severity_level = 3
        file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._stacks = config["max_batch_size"] > 0
        self._outputs = [output["name"] for output in config["output"]]
        for side, nodes in (("input", self._session.get_inputs()), ("output", self._session.get_outputs())):
            self._check(config, side, nodes)

    def execute(self, requests: list[Any]) -> list[Any]:
        faces = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        if not self._stacks:
            return [self._response(self._session.run(self._outputs, inputs)) for inputs in faces]
        stacked = {name: np.concatenate([inputs[name] for inputs in faces]) for name in faces[0]}
        found = self._session.run(self._outputs, stacked)
        ends = np.cumsum([len(next(iter(inputs.values()))) for inputs in faces])[:-1]
        return [self._response(arrays) for arrays in zip(*(np.split(array, ends) for array in found), strict=True)]

    def _response(self, arrays: Any) -> Any:
        named = zip(self._outputs, arrays, strict=True)
        return triton.InferenceResponse([triton.Tensor(name, np.ascontiguousarray(array)) for name, array in named])

    def _check(self, config: dict[str, Any], side: str, nodes: Any) -> None:
        """The real backend refuses a config that is not the graph's, too."""
        kinds = {"tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16", "tensor(uint8)": "TYPE_UINT8"}
        batch: list[Any] = [-1] if self._stacks else []
        declared = {it["name"]: (it["data_type"], [*batch, *map(int, it["dims"])]) for it in config[side]}
        found = {}
        for node in nodes:
            found[node.name] = (kinds[node.type], [size if isinstance(size, int) else -1 for size in node.shape])
        if declared != found:
            raise triton.TritonModelException(f"{config['name']}: the {side}s of the graph are {found}, not {declared}")
