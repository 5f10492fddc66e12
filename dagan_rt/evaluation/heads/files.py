"""The regressors as extractor files: one ONNX graph and one TOML descriptor each, and the log of their training."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dagan_rt.errors import require
from dagan_rt.evaluation.extractors import ANGLES, KINDS
from dagan_rt.evaluation.heads.frames import SIZE
from dagan_rt.evaluation.heads.learn import DEVIATION, MEAN
from dagan_rt.evaluation.heads.targets import ACTIONS

OPSET = 17
VERSION = 1  # of the shipped regressors, part of the name beside each number
LOG = "training.json"

_OF_KIND = {
    "landmarks": 'units = "centred"\n',
    "identity": "",
    "pose": f'units = "degrees"\norder = {json.dumps(ANGLES)}\n',
    "actions": f"threshold = 0.5\nnames = {json.dumps(ACTIONS)}\n",
}


def write_graph(network: nn.Module, kind: str, path: Path) -> None:
    """Export a trained network as ONNX: `image` float32 [B, 3, 64, 64] → an output named as its kind, B dynamic."""
    onnx = require("onnx", extra="export", why="writing extractor files")
    network.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer says that it is the older one
            torch.onnx.export(
                network, (torch.rand(2, 3, SIZE, SIZE),), str(path), dynamo=False, opset_version=OPSET,
                input_names=["image"], output_names=[kind], dynamic_axes={"image": {0: "batch"}, kind: {0: "batch"}},
            )  # fmt: skip
    finally:
        logger.setLevel(level)
    onnx.checker.check_model(str(path), full_check=True)


def write_descriptor(folder: Path, kind: str, noise: dict[str, float] | None = None, noise_from: str = "") -> None:
    """The TOML file beside `kind`.onnx, with the metrics' noise once it is measured."""
    lines = [
        f'kind = "{kind}"',
        f'name = "heads {kind} {VERSION}"',
        f'model = "{kind}.onnx"',
        f"size = [{SIZE}, {SIZE}]",
        'channels = "RGB"',
        'layout = "NCHW"',
        f"scale = {1 / 255!r}",
        f"mean = {[MEAN] * 3}",
        f"std = {[DEVIATION] * 3}",
        f'output = "{kind}"',
    ]
    text = "\n".join(lines) + "\n" + _OF_KIND[kind]
    if noise:
        text += f"noise_from = {json.dumps(noise_from, ensure_ascii=False)}\n\n[noise]\n"
        text += "".join(f"{metric} = {value}\n" for metric, value in noise.items())
    assert kind in KINDS
    (folder / f"{kind}.toml").write_text(text, encoding="utf-8")


def write_log(folder: Path, key: str, values: Any) -> None:
    """One table of the training log, beside those it already has."""
    known = read_log(folder)
    known[key] = values
    rows = [f"  {json.dumps(name)}: {_compact(value)}" for name, value in known.items()]
    (folder / LOG).write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def read_log(folder: Path) -> dict[str, Any]:
    """The training log, empty where there is none yet."""
    path = folder / LOG
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _compact(value: Any) -> str:
    """A row a line, so that a change shows where it is."""
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()) + "\n  }"
    return json.dumps(value)
