"""What a driven frame costs on a CPU: engines, precisions and forms of the graphs against the published procedure.

The published procedure is eager PyTorch: depth and key points of the source once, and for every frame those of the
driving face, motion, and the whole generator, which encodes the source's image and depth each time. Engines compute all
that depends on the source once.

Results are compared before anything is timed: fp32 by the largest difference of a picture in [0, 1], int8 by PSNR.
All forms of a precision run in turn, round by round, so that what else the machine does falls on all of them alike;
a ratio is the median over rounds of the published procedure's time by the form's in the same round. Beside it stands
the same of processor time, summed over threads, which does not count the waiting for a busy processor.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dagan_rt._assets import asset
from dagan_rt.errors import InputError

if TYPE_CHECKING:
    from dagan_rt.backends import Backend
    from dagan_rt.bundle import Bundle
    from dagan_rt.networks.model import Model

ENGINES = ("onnxruntime", "openvino")
FORMS = {"none": "as traced", "cpu": "for CPUs", "openvino": "for OpenVINO"}  # by a plan's `rewrites`
PUBLISHED, KEPT = "as published", "source kept"  # the two rows of eager PyTorch
EXACT = 1e-3  # largest error of a picture in fp32
SETTLE = 0.02  # seconds of rest between two forms, for threads of one that still spin when it has answered
COLUMNS = (
    "weights", "precision", "engine", "graphs", "ms", "p10", "p90", "times", "processor_ms", "processor_times",
    "max_error", "psnr_db",
)  # fmt: skip
Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    sizes = "full: the published sizes, random weights; demo: the trained demo weights, 128 × 128"
    arguments.add_argument("--weights", nargs="+", default=["full", "demo"], choices=["full", "demo"], help=sizes)
    arguments.add_argument("--precisions", nargs="+", default=["fp32", "int8"], choices=["fp32", "int8"])
    arguments.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    arguments.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--bundles", type=Path, help="keep the exported bundles here, and take those that are there")
    arguments.add_argument("--out", type=Path, help="write the rows here as JSON")
    arguments.add_argument("--commit", default="", help="what was measured, for --out")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table as it grows, write the rows."""
    options = parser().parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before PyTorch loads
    import torch

    torch.set_num_threads(options.threads)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for weights in options.weights:
            model = load(weights)
            for precision in options.precisions:
                bundles = {form: exported(options.bundles or Path(folder), model, weights, precision, form)
                           for form in options.forms if form != "openvino" or precision == "int8"}  # fmt: skip
                for row in measure(model, bundles, options.engines, options.threads, options.rounds):
                    rows.append({"weights": weights, "precision": precision, **row})
                    print("| " + " | ".join(_shown(rows[-1].get(column, "")) for column in COLUMNS) + " |", flush=True)
    if options.out:
        where = provenance(options)
        options.out.write_text(json.dumps({"provenance": where, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def load(weights: str) -> Model:
    """The demo weights, or the published sizes with random ones: batch norms and γ away from their neutral start."""
    import torch

    from dagan_rt import checkpoints
    from dagan_rt.networks.config import NetworkConfig
    from dagan_rt.networks.model import Model

    if weights == "demo":
        return checkpoints.load(asset("train", "demo", "model.pth.tar"), asset("train", "demo", "depth")).eval()
    torch.manual_seed(0)
    model = Model(NetworkConfig()).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "gamma")):
            tensor.data.add_(0.2 * torch.randn_like(tensor))
    return model


def exported(root: Path, model: Model, weights: str, precision: str, form: str) -> Bundle:
    """The bundle under `root`, exported unless it is there; int8 is calibrated on synthetic heads."""
    from dagan_rt.bundle import Bundle, is_bundle
    from dagan_rt.export import export
    from dagan_rt.export.plan import Plan

    path = root / f"{weights}-{precision}-{form}"
    if is_bundle(path):
        return Bundle.open(path)
    # Random weights lose more in int8 than any trained ones: the budget only has to let them pass.
    plan = Plan(precision="fp32", batch="1", torch_weights=False, rewrites=form)
    if precision == "int8":
        plan = replace(plan, precision="int8", calibrate="heads", budget=10.0)
    root.mkdir(parents=True, exist_ok=True)
    return export(model, path, plan)[0]


def measure(
    model: Model, bundles: Mapping[str, Bundle], engines: Sequence[str], threads: int, rounds: int
) -> Iterator[Row]:
    """A row each for eager PyTorch's two procedures and every engine on every form of the graphs of one precision."""
    from dagan_rt.backends import missing, open_backend
    from dagan_rt.backends.torch import TorchBackend
    from dagan_rt.training.heads import HELD_OUT, draw_clip

    faces = draw_clip(HELD_OUT.start, 16, model.config.size).frames[::4]
    reference = published(model, faces[0], faces[-1])()
    runs: dict[tuple[str, str], Callable[[], np.ndarray]] = {
        ("torch", PUBLISHED): published(model, faces[0], faces[-1])
    }
    precision = next(iter(bundles.values())).graphs["generator"].precision
    kept = TorchBackend(model, threads)
    runs["torch", KEPT] = driven(kept, next(iter(bundles.values())), faces[0], faces[-1])
    for engine in engines:
        if reason := missing(engine):
            raise InputError(f"engine {engine} cannot be measured: {reason}")
        for form, bundle in bundles.items():
            if form in ENGINES and form != engine:
                continue
            backend = open_backend(engine, bundle, threads)
            runs[engine, FORMS[form]] = driven(backend, bundle, faces[0], faces[-1])
    errors = {}
    for key, run in runs.items():
        difference = run().astype(np.float64) - reference
        errors[key] = {
            "max_error": float(np.abs(difference).max()),
            "psnr_db": round(float(-10 * np.log10(max((difference**2).mean(), 1e-20))), 1),
        }
        if (precision == "fp32" or key[0] == "torch") and not errors[key]["max_error"] <= EXACT:
            raise InputError(f"{' '.join(key)} is wrong by {errors[key]['max_error']:.1e}: nothing was timed")
    elapsed: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            time.sleep(SETTLE)
            begun, busy = time.perf_counter(), time.process_time()
            run()
            elapsed[key].append((1000 * (time.perf_counter() - begun), 1000 * (time.process_time() - busy)))
    first = np.array(elapsed["torch", PUBLISHED])
    for key, times in elapsed.items():
        low, middle, high = np.percentile(times, (10, 50, 90), axis=0).round(1)
        ratio = np.median(first / times, axis=0).round(2)
        yield {
            "engine": key[0], "graphs": key[1], "ms": float(middle[0]), "p10": float(low[0]), "p90": float(high[0]),
            "times": float(ratio[0]), "processor_ms": float(middle[1]), "processor_times": float(ratio[1]),
            **errors[key],
        }  # fmt: skip


def published(model: Model, source: np.ndarray, driving: np.ndarray) -> Callable[[], np.ndarray]:
    """One frame by the published procedure, uint8 HWC faces -> the picture [1, 3, H, W] in [0, 1]; absolute motion.

    Key points and depth of the source are known already; the generator encodes it anew.
    """
    import torch

    from dagan_rt.backends.torch import TorchBackend

    convert = TorchBackend(model).from_image
    with torch.no_grad():
        portrait = convert(source)
        depth = model.depth(portrait) if model.depth is not None else None
        at = model.find_keypoints(portrait, depth)

    def run() -> np.ndarray:
        with torch.no_grad():
            frame = convert(driving)
            to = model.find_keypoints(frame, model.depth(frame) if model.depth is not None else None)
            return model.generator(portrait, at, to, depth).prediction.numpy()

    return run


def driven(backend: Backend, bundle: Bundle, source: np.ndarray, driving: np.ndarray) -> Callable[[], np.ndarray]:
    """The same frame from a backend that keeps the source."""
    names = {name: [tensor.name for tensor in graph.inputs] for name, graph in bundle.graphs.items()}
    points = ("kp_value", "kp_jacobian")

    def find(graph: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return backend.run(graph, {name: arrays[name] for name in names[graph]})

    image = backend.from_image(source)
    found = find("source", {"image": image})
    still = {**found, "source_image": image, "scale": backend.from_numpy(np.ones((1, 1), np.float32))}
    # Absolute motion is relative motion from the source's own key points.
    still |= {f"{role}_{name}": found[name] for name in points for role in ("source", "initial")}

    def run() -> np.ndarray:
        to = find("driving", {"image": backend.from_image(driving)})
        arrays = still | {f"driving_{name}": to[name] for name in points}
        return backend.to_numpy(find("generator", arrays | find("motion", arrays))["prediction"])

    return run


def provenance(options: argparse.Namespace) -> dict[str, str]:
    """On what and with what it was measured."""
    from dagan_rt.benchmarking.provenance import provenance as known

    return known("cpu", "", options.commit) | {
        "command": f"python benchmarks/cpu.py --rounds {options.rounds} --threads {options.threads}",
        "device": processor(),
        "threads": str(options.threads),
    }


def processor() -> str:
    """The model name that the system gives, and the instructions that convolutions are made of."""
    import platform

    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    described = {name.strip(): value.strip() for name, value in lines.items()}
    flags = [
        it for it in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if it in described["flags"].split()
    ]
    return f"{described.get('model name', platform.machine())} ({', '.join(flags)})"


def _shown(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) and 0 < value < 0.01 else str(value)
