"""Time every graph rewrite against the graph as traced: `python benchmarks/graph_passes.py [--full-size]`.

All forms of a graph run in turn, round by round, so that what else the machine does falls on all of them alike; what
they are judged by is processor time, summed over threads, which does not count the waiting for a busy processor.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from dagan_rt._assets import asset
from dagan_rt.bundle import BatchProfile
from dagan_rt.export import calibration, passes, precision
from dagan_rt.export.counts import multiply_accumulates, operations
from dagan_rt.export.onnx import trace
from dagan_rt.export.subnetworks import choose
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.model import Model

AS_TRACED = "as traced"
DYNAMIC, ONE = BatchProfile.parse("1:1:4"), BatchProfile.parse("1")
FORMS: dict[str, dict[str, Any]] = {  # what each form changes
    AS_TRACED: {},
    "transposed": {"transpose": True},
    "blocked": {"block": True},
    "both": {"transpose": True, "block": True},
    "batch 1": {"batch": ONE},
    "opset 20": {"opset": 20},
}
ROUNDING = 1e-4  # allowed difference of an fp32 form, in units of the output's largest magnitude
Inputs = dict[str, np.ndarray]
Engine = Callable[[Inputs], list[np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=asset("train", "demo", "model.pth.tar"))
    parser.add_argument("--depth", type=Path, default=asset("train", "demo", "depth"))
    parser.add_argument("--full-size", action="store_true", help="the published sizes with random weights instead")
    parser.add_argument("--graphs", nargs="+", default=["driving", "motion", "generator"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help=f"besides {AS_TRACED!r}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    model = _model(options)
    declared = choose(model.config, options.graphs)
    samples = calibration.record(model, declared, calibration.HEADS, count=4)
    engines = {"onnxruntime": _onnxruntime} | ({"openvino": _openvino} if importlib.util.find_spec("openvino") else {})
    where = _provenance(engines, options)
    print(f"{', '.join(f'{key} {value}' for key, value in where.items())}\n")
    print("| graph | precision | engine | form | nodes | GMAC | difference | p50 ms | processor ms | times as fast |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for subnetwork in declared:
        for lowered in options.precisions:
            forms = dict(_forms(model, subnetwork, lowered, samples[subnetwork.name], options.forms))
            for name, load in engines.items():
                for row in _rows(forms, load, samples[subnetwork.name][-1], options, exact=lowered == "fp32"):
                    rows.append({"graph": subnetwork.name, "precision": lowered, "engine": name, **row})
                    print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"provenance": where, "rows": rows}, indent=1) + "\n")


def _model(options: argparse.Namespace) -> Model:
    if options.full_size:
        torch.manual_seed(0)
        return Model(NetworkConfig()).eval()
    from dagan_rt import checkpoints

    return checkpoints.inspect(options.checkpoint, options.depth).build().eval()


def _forms(
    model: Model, subnetwork: Any, lowered: str, samples: list[Inputs], wanted: list[str]
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """A graph as traced, and the wanted forms that differ from it."""
    for form, changes in FORMS.items():
        if form != AS_TRACED and form not in wanted:
            continue
        graph = trace(model, subnetwork, changes.get("batch", DYNAMIC), changes.get("opset", 17))
        changed = passes.transpose_upsampling(graph) if changes.get("transpose") else 0
        graph = precision.lower(graph, lowered, subnetwork.trunks, samples)
        # After lowering, which knows a picture's convolution, to be left in float32, by its few channels.
        changed += passes.block_narrow_convolutions(graph) if changes.get("block") else 0
        if changed or "transpose" not in changes and "block" not in changes:
            yield form, graph


def _rows(
    forms: dict[str, onnx.ModelProto], load: Callable[..., Engine], inputs: Inputs, options: Any, exact: bool
) -> Iterator[dict[str, Any]]:
    """Check, then time all forms in turn; the last column is the median over rounds of traced time by own time."""
    loaded = {form: load(graph, inputs, options.threads) for form, graph in forms.items()}
    reference = loaded[AS_TRACED](inputs)
    differences = {}
    for form, engine in loaded.items():
        pairs = zip(engine(inputs), reference, strict=True)
        differences[form] = max(float(np.abs(x - y).max() / max(1, np.abs(y).max())) for x, y in pairs)
        if exact and not differences[form] <= ROUNDING:
            raise SystemExit(f"{form} differs from the graph as traced by {differences[form]:.1e}")
    elapsed: dict[str, list[float]] = {form: [] for form in loaded}
    busy: dict[str, list[float]] = {form: [] for form in loaded}
    for _ in range(options.rounds):
        for form, engine in loaded.items():
            begun, busy_before = time.perf_counter(), time.process_time()
            engine(inputs)
            elapsed[form].append(1000 * (time.perf_counter() - begun))
            busy[form].append(1000 * (time.process_time() - busy_before))
    for form, graph in forms.items():
        yield {
            "form": form,
            "nodes": operations(graph),
            "gmac": round(multiply_accumulates(graph) / 1e9, 3),
            "difference": f"{differences[form]:.0e}",
            "p50_ms": round(float(np.median(elapsed[form])), 1),
            "processor_ms": round(float(np.median(busy[form])), 1),
            "times_as_fast": round(float(np.median(np.divide(busy[AS_TRACED], busy[form]))), 2),
        }


def _onnxruntime(graph: onnx.ModelProto, inputs: Inputs, threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow the next form's turn
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def _openvino(graph: onnx.ModelProto, inputs: Inputs, threads: int) -> Engine:
    import io

    from dagan_rt.backends.openvino import core

    network = core().read_model(io.BytesIO(graph.SerializeToString()))
    network.reshape({name: value.shape for name, value in inputs.items()})
    # Left to itself it picks bfloat16, which is slower where the processor has no AMX.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core().compile_model(network, "CPU", settings).create_infer_request()
    return lambda inputs: [np.array(value) for value in request.infer(inputs).values()]


def _provenance(engines: dict[str, Any], options: argparse.Namespace) -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = {name: metadata.version(name) for name in ("numpy", "torch", "onnx", *engines)}
    return {
        "device": names[0] if names else platform.processor(),
        "threads": str(options.threads),
        "rounds": str(options.rounds),
        "weights": "full size, random" if options.full_size else options.checkpoint.name,
        **versions,
    }


if __name__ == "__main__":
    main()
