"""A bundle to a model repository that Triton Inference Server loads, see `dagan_rt.serving.repository`."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagan_rt import backends
from dagan_rt.bundle import MANIFEST, Bundle, digest
from dagan_rt.engines import FLAVOURS
from dagan_rt.errors import InputError
from dagan_rt.export.plan import TRITON, Plan
from dagan_rt.export.triton_config import (
    Enum,
    bundle_parameters,
    instance_group,
    parameters,
    to_map,
    to_pbtxt,
)
from dagan_rt.serving import protocol
from dagan_rt.serving.repository import (
    BUNDLE,
    CODE,
    CONFIG,
    MARKER,
    SOURCE,
    Port,
    Repository,
    ServingPlan,
    outside_bundles,
    ports,
    unservable,
)
from dagan_rt.staging import share, staged

if TYPE_CHECKING:
    from dagan_rt.networks.model import Model
    from dagan_rt.report import Report

QUEUE_DELAY = 0  # microseconds: the model gathers frames by itself, and waiting twice would only make them late
# Sequences that Triton keeps at a time, four times what a model may: a START that is refused holds one until idle time.
CANDIDATES = 16384
PATIENCE = 5.0  # seconds that Triton keeps an idle sequence longer than the model, whose refusal says more


def write_repository(
    bundle: Bundle, out: str | Path, plan: ServingPlan | None = None, *, force: bool = False
) -> Repository:
    """Write a model repository for an opened bundle to the folder `out`: whole, or not at all.

    The bundle is copied. force: replace a repository or a bundle that stands there. Raises InputError if the bundle
    cannot be served as `plan` says, or if `out` cannot be written.
    """
    plan = plan or ServingPlan()
    with staged(out, force=force) as folder:
        if plan.stateful:
            bundle = _copied(bundle, folder / protocol.MODEL / str(plan.version) / BUNDLE)
        written = _fill(folder, bundle, plan)
    return replace(written, path=Path(out))


def export_repository(
    model: Model,
    out: str | Path,
    plan: Plan,
    serving: ServingPlan | None = None,
    *,
    force: bool = False,
    images: Sequence[Path] = (),
    report: Callable[[str], None] = lambda step: None,
) -> tuple[Repository, Report]:
    """As `dagan_rt.export.export`, but to a model repository, with the bundle inside it."""
    from dagan_rt.export import export

    serving = serving or ServingPlan()
    with staged(out, force=force) as folder:
        # The models of the layout "graphs" are copies of what is in a bundle: without `reenact` it is not kept.
        place = folder / protocol.MODEL / str(serving.version) / BUNDLE if serving.stateful else folder / BUNDLE
        place.parent.mkdir(parents=True, exist_ok=True)
        bundle, measured = export(model, place, plan, images=images, report=report)
        written = _fill(folder, bundle, serving)
        if not serving.stateful:
            shutil.rmtree(place)
    return replace(written, path=Path(out)), measured


def check(plan: Plan, serving: ServingPlan) -> None:
    """Raise InputError if what `plan` exports could not be served as `serving` says: asked before long work begins."""
    backend = serving.backend
    if backend != "auto" and backend not in backends.names():
        raise InputError(f"backend must be auto or one of {', '.join(backends.names())}, got {backend[:80]!r}")
    if plan.only or plan.profile.least > 1:
        what = "parts alone (--only)" if plan.only else f"batches of {plan.batch}"
        raise InputError(f"a model repository animates single faces: it cannot be made of {what}")
    if backend in FLAVOURS and backend not in plan.flavours:
        raise InputError(f"the backend {backend} needs engines: name the target {backend} beside {TRITON}")
    if backend.startswith("torch") and not plan.torch_weights:
        raise InputError(f"the backend {backend} needs the weights: leave torch_weights as it is")


def described(repository: Repository) -> str:
    """What was written, and what to run next, for a person to read."""
    files = [path.stat() for path in repository.path.rglob("*") if path.is_file()]
    megabytes = sum({status.st_ino: status.st_size for status in files}.values()) / 1e6
    commands = [shlex.join(["dagan-rt", "triton", what, str(repository.path)]) for what in ("check", "serve")]
    return (
        f"wrote {repository.path}: {', '.join(repository.models)} ({repository.variant}, {repository.size} × "
        f"{repository.size}), {megabytes:.0f} MB\nnext: {commands[0]}\n      {commands[1]}"
    )


def stateful_config(name: str, bundle: Bundle, plan: ServingPlan) -> dict[str, Any]:
    """The config of `reenact` or `reenact_stream`, for `to_pbtxt`."""
    decoupled = name == protocol.STREAM_MODEL
    inputs, outputs = ports(name, bundle.config)
    config: dict[str, Any] = {
        f"# {bundle.config.variant}, {bundle.config.size} pixels; requests: dagan_rt/serving/protocol.py.": None,
        "name": name,
        "backend": "python",
        "max_batch_size": 0 if decoupled else plan.batch,
        "# A frame or none, a source or none: the model says what is missing or too much.": None,
        "input": [_tensor(port) | {"optional": True} | ({} if decoupled else {"allow_ragged_batch": True})
                  for port in inputs],
        "output": [_tensor(port) for port in outputs],
        "sequence_batching": _sequences(plan),
        "instance_group": instance_group(plan),
        "version_policy": {"latest": {"num_versions": 1}},
        "# What the model goes by; the bundle's are what it was written with.": None,
        "parameters": parameters(plan.settings.to_parameters() | bundle_parameters(bundle)),
        "# Two equal requests of one sequence have different answers.": None,
        "response_cache": {"enable": False},
    }  # fmt: skip
    if plan.warm_up:
        nothing = {"data_type": Enum("TYPE_BOOL"), "dims": [1], "zero_data": True}
        config["# Of no sequence: the model drives a picture of its own, once."] = None
        config["model_warmup"] = {
            "name": "first_frame", "batch_size": 0 if decoupled else 1, "inputs": to_map({protocol.END: nothing})
        }  # fmt: skip
    if decoupled:
        config["# One request of N frames, N responses."] = None
        config["model_transaction_policy"] = {"decoupled": True}
    return config


def _sequences(plan: ServingPlan) -> dict[str, Any]:
    """Triton hands over all requests at once: what may wait is bounded in the model, which can say no."""
    return {
        "# Triton's sequence batcher takes no queue policy, and lets requests wait without end where all": None,
        "# candidates are taken: it has far more than the model takes, and hands over at once. The parameters": None,
        "# sequences, queue and idle are the bounds; beyond them the model answers UNAVAILABLE.": None,
        "max_sequence_idle_microseconds": round((plan.idle + PATIENCE) * 1e6),
        "oldest": {
            "max_candidate_sequences": CANDIDATES,
            "max_queue_delay_microseconds": QUEUE_DELAY,
        },
    }  # fmt: skip


def _tensor(port: Port) -> dict[str, Any]:
    return {"name": port.name, "data_type": Enum(port.data_type), "dims": list(port.dims)}


def _fill(folder: Path, bundle: Bundle, plan: ServingPlan) -> Repository:
    """Everything but the first copy of the bundle; the marker last, which is read again."""
    if reason := unservable(bundle, plan.backend):
        raise InputError(f"bundle {bundle.path} cannot be served: {reason}")
    models = []
    if plan.stateful:
        models = [protocol.MODEL, *([protocol.STREAM_MODEL] if plan.stream else [])]
    for name in models:
        home = folder / name / str(plan.version)
        if name != protocol.MODEL:
            for file in _files(bundle):
                share(bundle.path / file, home / BUNDLE / file)
        (home / CODE).write_text(SOURCE, encoding="utf-8")
        (folder / name / CONFIG).write_text(to_pbtxt(stateful_config(name, bundle, plan)), encoding="utf-8")
    if plan.layout != "stateful":
        from dagan_rt.export.triton_graphs import write_graphs

        models += write_graphs(bundle, folder, plan)
    written = Repository(
        folder, plan, tuple(models), bundle.config.variant, bundle.config.size,
        {name: graph.precision for name, graph in bundle.graphs.items()},
        bundle_parameters(bundle)["bundle_sha256"],
        {name: digest(folder / name) for name in outside_bundles(folder, models)},
    )  # fmt: skip
    (folder / MARKER).write_text(json.dumps(written.to_dict(), indent=1) + "\n", encoding="utf-8")
    return Repository.open(folder)


def _copied(bundle: Bundle, place: Path) -> Bundle:
    """A copy, not a link: whoever changes one does not change the other. Its hashes are compared again."""
    for file in _files(bundle):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / file, place / file)
    return Bundle.open(place)


def _files(bundle: Bundle) -> list[str]:
    return [*bundle.manifest["files"], MANIFEST]
