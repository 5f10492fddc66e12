"""The two commands: train the regressors and write their files; measure the files and write down their noise."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dagan_rt.errors import InputError, require
from dagan_rt.evaluation.descriptors import KINDS, METRICS_OF
from dagan_rt.evaluation.extractors import Extractor
from dagan_rt.evaluation.heads.files import write_descriptor, write_graph, write_log
from dagan_rt.evaluation.heads.frames import LENGTH, cached_set, training_identities
from dagan_rt.evaluation.heads.learn import Pool, Schedule, train_actions, train_geometry, train_identity
from dagan_rt.evaluation.heads.measure import (
    NOISE_FROM,
    QUICK,
    SIZE,
    Material,
    draw_material,
    extract,
    measure,
    pairs_of,
    truth_of,
)

NETWORKS = ("geometry", "actions", "identity")  # in the order of training


def train(arguments: argparse.Namespace) -> None:
    """Draw, learn, write graphs and descriptors without noise, which `validate` measures."""
    _check(arguments)
    torch = require("torch", extra="train", why="training the regressors")
    require("onnx", extra="export", why="writing extractor files")  # not only after an hour
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    identities = training_identities(arguments.identities)
    frames = cached_set(identities, arguments.frames, arguments.cache, arguments.workers, progress=True)
    began = time.process_time()
    pool = Pool(frames, arguments.seed, progress=True)
    degrading = time.process_time() - began
    log: list[dict[str, Any]] = []
    seed = arguments.seed
    steps = dict(zip(NETWORKS, arguments.steps, strict=True))
    geometry = train_geometry(pool, Schedule(steps["geometry"], arguments.batch), seed, log)
    for kind in ("landmarks", "pose"):
        write_graph(geometry.single(kind), kind, out / f"{kind}.onnx")
    actions = train_actions(pool, geometry, Schedule(steps["actions"], arguments.batch), seed, log)
    write_graph(actions, "actions", out / "actions.onnx")
    # Fine-tuning starts lower, so as not to forget what the trunk knows.
    identity = train_identity(pool, geometry, Schedule(steps["identity"], arguments.batch, rate=3e-3), seed, log)
    write_graph(identity, "identity", out / "identity.onnx")
    for kind in KINDS:
        write_descriptor(out, kind)
    write_log(out, "settings", {
        "identities": [identities.start, identities.stop], "frames": len(frames), "batch": arguments.batch,
        "steps": steps, "seed": seed, "torch": torch.__version__.split("+")[0],
        "cpu_s_degrading": round(degrading, 1), "cpu_s": round(time.process_time() - began, 1),
    })  # fmt: skip
    write_log(out, "loss", log)


def _check(arguments: argparse.Namespace) -> None:
    """InputError for what could not be trained with."""
    if min(arguments.steps) < 1:
        raise InputError(f"--steps must be whole numbers above 0, got {' '.join(map(str, arguments.steps))}")
    if not 1 <= arguments.frames <= LENGTH:
        raise InputError(f"--frames must be between 1 and {LENGTH}, got {arguments.frames}")
    if not 4 <= arguments.batch <= 2 * arguments.identities:  # a batch shows nobody twice
        raise InputError(f"--batch must be between 4 and twice the identities, got {arguments.batch}")
    for name in ("threads", "workers"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(arguments, name)}")


def validate(arguments: argparse.Namespace) -> None:
    """Measure the files on identities that no training sees, print the tables, and write them down where asked."""
    from dagan_rt._assets import asset
    from dagan_rt.evaluation.extractors import load_extractors

    folder: Path = arguments.extractors or asset("train", "extractors")
    extractors = load_extractors([folder / f"{kind}.toml" for kind in KINDS], threads=1)
    material = draw_material(arguments.identities, arguments.workers, progress=True)
    measured = measure(extractors, material)
    print(describe(measured, material))
    if arguments.figure is not None:
        write_figure(extractors, material, arguments.figure)
    if arguments.write:
        text = NOISE_FROM.format(count=material.count, size=SIZE)
        for kind in KINDS:
            write_descriptor(folder, kind, {metric: measured["noise"][metric] for metric in METRICS_OF[kind]}, text)
        write_log(folder, "validation", {"identities": arguments.identities, **measured})
        write_log(folder, "quick", {"identities": QUICK, **measure(extractors, draw_material(QUICK))})


def describe(measured: dict[str, Any], material: Material) -> str:
    """The tables as text."""
    truth, identity = measured["truth"], measured["identity"]
    lines = [f"{material.count} held-out identities, {len(material.frames)} frames of {SIZE} pixels", ""]
    lines += [f"{'error against the truth':28}" + "".join(f"{name:>16}" for name in truth)]
    lines += [f"{row:28}" + "".join(f"{truth[name][row]:16.3f}" for name in truth) for row in truth["clean"]]
    lines += ["", f"{'identity (cosines)':28}" + "".join(f"{name:>16}" for name in identity)]
    lines += [f"{row:28}" + "".join(f"{identity[name][row]:16.3f}" for name in identity) for row in identity["clean"]]
    lines += ["", "what the metrics read for a perfect, slightly worse picture (written into the files)"]
    lines += [f"{metric:28}{value:16.3f}" for metric, value in measured["noise"].items()]
    lines += ["", "the same between a frame and itself slightly worse: no other person involved"]
    lines += [f"{metric:28}{value:16.3f}" for metric, value in measured["same_frame"].items()]
    columns = list(measured["agreement"]["akd"])
    lines += ["", f"{'pairs, truth and regressors':28}" + "".join(f"{column:>16}" for column in columns)]
    lines += [f"{metric:28}" + "".join(f"{row[column]:16.3f}" for column in columns)
              for metric, row in measured["agreement"].items()]  # fmt: skip
    return "\n".join(lines)


def write_figure(extractors: Mapping[str, Extractor], material: Material, path: Path) -> None:
    """Scatter of the metrics of single pairs, by the regressors over by the truth."""
    matplotlib = require("matplotlib", extra="train", why="drawing a figure")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = pairs_of(extract(extractors, material.frames.images), material)
    true = pairs_of(truth_of(material.frames), material)
    units = {"akd": "AKD, pixels at 256", "prmse": "PRMSE, degrees", "aucon": "AUCON"}
    figure, panels = pyplot.subplots(1, 3, figsize=(9.0, 3.2), dpi=80)
    jitter = np.random.default_rng(0).uniform(-0.02, 0.02, (2, len(true["aucon"])))  # else points lie on each other
    for panel, (metric, unit) in zip(panels, units.items(), strict=True):
        moved = jitter if metric == "aucon" else np.zeros_like(jitter)
        panel.scatter(true[metric] + moved[0], found[metric] + moved[1], s=4, alpha=0.5, linewidths=0)
        ends = [min(true[metric].min(), found[metric].min()), max(true[metric].max(), found[metric].max())]
        panel.plot(ends, ends, color="black", linewidth=0.6)
        panel.set(title=unit, xlabel="from the truth", ylabel="from the regressors")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
