"""Whether a model repository can be served, told before it ships: its files, its configs, and what will bite later."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagan_rt.bundle import MANIFEST, PRECISIONS, Bundle, digest
from dagan_rt.engines import engine_sets
from dagan_rt.errors import InputError, require
from dagan_rt.serving import protocol
from dagan_rt.serving.protocol import Settings
from dagan_rt.serving.repository import BUNDLE, CONFIG, MARKER, Port, Repository, outside_bundles, ports, unservable
from dagan_rt.tables import printable, read_text

MOST_FILES = 10_000
MUCH_WAITING = 2 << 30  # bytes of raw frames that may wait
ON_CPUS = ("onnxruntime", "openvino", "torch")  # backends that leave a GPU idle
ABOUT_BUNDLE = ("variant", "size", "precision", "bundle_sha256")

Config = Any  # of tritonclient.grpc.model_config_pb2


@dataclass
class Checked:
    """What was looked at, what is wrong, and what is not wrong but will be noticed."""

    path: Path
    rows: list[tuple[str, str]] = field(default_factory=list)  # what was checked, what was found
    problems: list[str] = field(default_factory=list)  # a sentence each; none: it can be served
    warnings: list[str] = field(default_factory=list)

    def table(self) -> str:
        """For a person to read."""
        lines = [f"{what:<26}{found}" for what, found in self.rows]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines.append(f"{self.path}: {_count(len(self.problems), 'problem')}, {_count(len(self.warnings), 'warning')}")
        return "\n".join(map(printable, lines))

    def attempt(self, check: Callable[..., None], *arguments: Any) -> None:
        """Run one check; the InputError that it raises is a problem."""
        try:
            check(*arguments)
        except InputError as error:
            self.problems.append(" ".join(str(error).split()))
        except OSError as error:
            self.problems.append(f"{error.filename or self.path} cannot be read: {error.strerror or error}")


def check(path: str | Path) -> Checked:
    """Look at every file of a repository.

    Raises MissingPackage without the package tritonclient, which knows the format of config.pbtxt. All else that is
    wrong is among the `problems`.
    """
    checked = Checked(Path(path))
    require("tritonclient.grpc", extra="triton", why="checking a model repository")
    checked.attempt(_check_all, checked)
    return checked


def _check_all(checked: Checked) -> None:
    repository = Repository.open(checked.path)
    plan = repository.plan
    about = f"{plan.layout}, {repository.variant}, {repository.size} × {repository.size}, {_precisions(repository)}"
    checked.rows.append(("repository", about))
    before = len(checked.problems)
    checked.attempt(_check_tree, checked, repository)
    if len(checked.problems) > before:
        return  # nothing is read through a link, or from folders without an end
    checked.attempt(_check_names, checked, repository)
    checked.attempt(_check_files, checked, repository)
    configs: dict[str, Config] = {}
    for name in repository.models:
        checked.attempt(_read_config, checked, repository, name, configs)
    for name, config in configs.items():
        checked.attempt(_check_common, checked, repository, name, config)
        if name in repository.stateful:
            _check_stateful(checked, repository, name, config)
        else:
            checked.attempt(_check_graph, checked, repository, name, configs)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def _check_tree(checked: Checked, repository: Repository) -> None:
    """Ordinary files and folders, nothing that leads elsewhere."""
    count = size = 0
    for folder, folders, names in os.walk(repository.path):
        for name in (*folders, *names):
            path = Path(folder, name)
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                checked.problems.append(f"{path} is a link: put the file itself there, a repository is one whole")
            elif not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                checked.problems.append(f"{path} is neither a file nor a folder: delete it")
            count, size = count + (name in names), size + status.st_size * (name in names)
        if count > MOST_FILES:
            raise InputError(f"{repository.path} must hold at most {MOST_FILES} files: it is no repository of dagan-rt")
    checked.rows.append(("files", f"{count}, {size / 1e6:.1f} MB, no links"))


def _check_names(checked: Checked, repository: Repository) -> None:
    """The models of the marker, and nothing beside them that Triton would load too."""
    known = {*repository.models, MARKER}
    for name in sorted(set(os.listdir(repository.path)) - known):
        where = repository.path / name
        if where.is_dir():
            checked.problems.append(
                f"{where} is not among the models that dagan-rt wrote, and Triton would load it: delete it, or give it "
                "a repository of its own"
            )
        else:
            checked.warnings.append(f"{where} was not written by dagan-rt: Triton passes over it")
    expected = _models_of(repository)
    if repository.stateful != expected:
        raise InputError(
            f"{repository.path / MARKER}: the models of these settings are {', '.join(expected) or 'graphs alone'}, "
            f"got {', '.join(repository.stateful) or 'none of them'}"
        )


def _models_of(repository: Repository) -> tuple[str, ...]:
    plan = repository.plan
    return tuple([protocol.MODEL][: plan.stateful] + [protocol.STREAM_MODEL][: plan.stream])


def _check_files(checked: Checked, repository: Repository) -> None:
    """Code and graphs are as they were written, by the hashes in the marker; bundles have their own."""
    found = set(outside_bundles(repository.path, repository.models))
    for name, entry in repository.files.items():
        path = repository.path / name
        if name not in found:
            checked.problems.append(f"{path} is named in {MARKER}, and is not there: write the repository again")
        elif path.stat().st_size != entry["bytes"] or digest(path)["sha256"] != entry["sha256"]:
            checked.problems.append(f"{path} is not what was written (its SHA-256 differs): write the repository again")
    for name in sorted(found - set(repository.files)):
        if "__pycache__" in name.split("/"):
            checked.warnings.append(f"{repository.path / name} was left by a server: delete it before this ships")
        else:
            checked.problems.append(f"{repository.path / name} was not written by dagan-rt: delete it")
    checked.rows.append(("code and graphs", f"{_count(len(repository.files), 'file')}, SHA-256 compared"))


# ----------------------------------------------------------------------------------------------------------------------
# What every config has


def _read_config(checked: Checked, repository: Repository, name: str, configs: dict[str, Config]) -> None:
    """The parsed config.pbtxt of a model goes into `configs`."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    path = repository.path / name / CONFIG
    if not path.is_file():
        raise InputError(f"{path} is not there: a model of Triton needs one")
    try:
        configs[name] = text_format.Parse(read_text(path, "config"), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise InputError(f"{path} is not a model configuration: {str(error)[:200]}") from None


def _check_common(checked: Checked, repository: Repository, name: str, config: Config) -> None:
    """Name, version, response cache, and what the parameters say of the bundle."""
    where = repository.path / name / CONFIG
    if config.name != name:
        checked.problems.append(f"{where}: name must be that of the folder, {name!r}, got {config.name[:80]!r}")
    if config.response_cache.enable:
        checked.problems.append(f"{where}: response_cache must be off: equal requests may have different answers")
    _check_instances(checked, repository, where, config)
    parameters = {key: entry.string_value for key, entry in config.parameters.items()}
    together = _precisions(repository)
    whole = name in repository.stateful or config.platform == "ensemble"
    expected = {
        "variant": repository.variant,
        "size": str(repository.size),
        "precision": together if whole else repository.precision.get(name.removeprefix("dagan_"), "fp32"),
        "bundle_sha256": repository.bundle_sha256,
    }
    for key, value in expected.items():
        if parameters.get(key) != value:
            got = parameters.get(key, "none")[:80]
            checked.problems.append(f"{where}: parameter {key} must be that of {MARKER}, {value!r}, got {got!r}")
    _check_versions(repository, name, where, config)


def _check_versions(repository: Repository, name: str, where: Path, config: Config) -> None:
    """One version, the written one, and a policy that serves it."""
    version = repository.plan.version
    folders = sorted(path.name for path in (repository.path / name).iterdir() if path.is_dir() and path.name.isdigit())
    if folders != [str(version)]:
        raise InputError(f"{where.parent} must hold the version {version} alone, got {', '.join(folders) or 'none'}")
    policy = config.version_policy
    if policy.WhichOneof("policy_choice") == "specific" and version not in policy.specific.versions:
        raise InputError(
            f"{where}: version_policy must serve the version {version}, got {list(policy.specific.versions)}"
        )


def _check_instances(checked: Checked, repository: Repository, where: Path, config: Config) -> None:
    from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

    for group in config.instance_group:
        kind = _named(ModelInstanceGroup.Kind, group.kind)
        if kind not in ("KIND_CPU", "KIND_GPU"):
            checked.problems.append(f"{where}: instance_group must be KIND_CPU or KIND_GPU, got {kind}")
        if group.gpus and kind != "KIND_GPU":
            checked.problems.append(f"{where}: instance_group names gpus, and its kind is {kind}")
        if group.count < 0 or len(set(group.gpus)) != len(group.gpus) or any(gpu < 0 for gpu in group.gpus):
            checked.problems.append(
                f"{where}: instance_group must have a count of 1 or more and each GPU once, got {group.count} on "
                f"{list(group.gpus)}"
            )
    if repository.plan.rate_limit and config.platform != "ensemble":
        limited = [it.name for group in config.instance_group for it in group.rate_limiter.resources]
        if not limited:
            checked.warnings.append(
                f"{where}: no rate_limiter, and {MARKER} has rate_limit {repository.plan.rate_limit}"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Models with a state


def _check_stateful(checked: Checked, repository: Repository, name: str, config: Config) -> None:
    where = repository.path / name / CONFIG
    opened: list[Bundle] = []
    checked.attempt(_check_bundle, checked, repository, name, opened)
    checked.attempt(_check_batching, name, where, config)
    read: list[Settings] = []
    checked.attempt(_check_settings, checked, repository, where, config, read)
    for bundle in opened:
        checked.attempt(_check_ports, checked, name, where, config, bundle)
        for settings in read:
            if reason := unservable(bundle, settings.backend):
                checked.problems.append(f"{where}: the bundle cannot be served: {reason}")
            else:
                checked.attempt(_check_engines, checked, where, bundle, settings)
    for settings in read:
        _warn(checked, repository, where, config, settings)


def _check_bundle(checked: Checked, repository: Repository, name: str, opened: list[Bundle]) -> None:
    """Every hash in its manifest, the manifest's own, nothing else in it, and that it is the one of the marker."""
    place = repository.path / name / str(repository.plan.version) / BUNDLE
    bundle = Bundle.open(place)
    opened.append(bundle)
    if (found := digest(place / MANIFEST)["sha256"]) != repository.bundle_sha256:
        raise InputError(
            f"{place} is another bundle than the one that was written (its {MANIFEST} has SHA-256 {found[:16]}…, "
            f"{MARKER} says {repository.bundle_sha256[:16]}…): run dagan-rt triton write again"
        )
    config, precision = bundle.config, {graph: it.precision for graph, it in bundle.graphs.items()}
    if (config.variant, config.size, precision) != (repository.variant, repository.size, repository.precision):
        raise InputError(f"{repository.path / MARKER}: variant, size and precision must be those of {place}")
    listed = {place / file for file in (*bundle.manifest["files"], MANIFEST)}
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        if path not in listed:
            checked.problems.append(f"{path} was not written by dagan-rt: delete it")
    checked.rows.append(
        (f"{name} bundle", f"{_count(len(listed), 'file')}, SHA-256 compared, {repository.bundle_sha256[:16]}…")
    )


def _check_batching(name: str, where: Path, config: Config) -> None:
    decoupled = name == protocol.STREAM_MODEL
    if config.backend != "python":
        raise InputError(f"{where}: backend must be 'python', got {(config.backend or config.platform)[:80]!r}")
    if config.WhichOneof("scheduling_choice") != "sequence_batching" or not config.sequence_batching.HasField("oldest"):
        raise InputError(
            f"{where}: it must have sequence_batching with the strategy oldest, which hands over everything"
        )
    if decoupled != config.model_transaction_policy.decoupled:
        raise InputError(f"{where}: model_transaction_policy decoupled must be {str(decoupled).lower()}")
    if decoupled and config.max_batch_size:
        raise InputError(f"{where}: max_batch_size must be 0, got {config.max_batch_size}")
    if not decoupled and config.max_batch_size < 1:
        raise InputError(f"{where}: max_batch_size must be 1 or more, got {config.max_batch_size}")


def _check_settings(
    checked: Checked, repository: Repository, where: Path, config: Config, read: list[Settings]
) -> None:
    """The parameters are those that the model reads, with values that it takes."""
    parameters = {key: entry.string_value for key, entry in config.parameters.items()}
    try:
        settings = Settings.from_parameters(parameters)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    read.append(settings)
    written, ours = repository.plan.settings.to_parameters(), settings.to_parameters()
    for key in sorted(set(parameters) - {*ours, *ABOUT_BUNDLE}):
        checked.warnings.append(f"{where}: nothing reads the parameter {key[:80]}")
    for key, value in ours.items():
        if value != written[key]:
            checked.warnings.append(f"{where}: parameter {key} is {value}, and was written as {written[key]}")


def _check_ports(checked: Checked, name: str, where: Path, config: Config, bundle: Bundle) -> None:
    """Tensors as the protocol has them, for the size and key points of the bundle."""
    inputs, outputs = ports(name, bundle.config)
    before = len(checked.problems)
    for side, found, declared in (("input", config.input, inputs), ("output", config.output, outputs)):
        checked.problems += [f"{where}: {words}" for words in _differences(side, found, declared)]
    for tensor in config.input:
        if not tensor.optional:
            checked.problems.append(f"{where}: input {tensor.name} must be optional")
        elif config.max_batch_size and not tensor.allow_ragged_batch:
            checked.problems.append(f"{where}: input {tensor.name} must have allow_ragged_batch, or none are batched")
    if len(checked.problems) == before:
        checked.rows.append(
            (f"{name} tensors", f"{len(inputs)} inputs, {len(outputs)} outputs as the protocol has them")
        )


def _differences(side: str, found: Iterable[Any], declared: Iterable[Port]) -> list[str]:
    """A sentence for each tensor that is not as declared."""
    tensors = {tensor.name: tensor for tensor in found}
    words = []
    for port in declared:
        tensor = tensors.pop(port.name, None)
        if tensor is None:
            words.append(f"{side} {port.name} is missing")
            continue
        if (given := _type(tensor)) != port.data_type:
            words.append(f"{side} {port.name} must be {port.data_type}, got {given}")
        if tuple(tensor.dims) != port.dims:
            words.append(f"{side} {port.name} must have dims {list(port.dims)}, got {list(tensor.dims)}")
    return words + [f"{side} {name[:80]} is not in the protocol" for name in tensors]


def _check_engines(checked: Checked, where: Path, bundle: Bundle, settings: Settings) -> None:
    for engines in engine_sets(bundle):
        if settings.backend not in ("auto", engines.flavour):
            continue
        if engines.profile.least > 1:
            raise InputError(
                f"{where}: the engines {engines.key} take batches of {engines.batch}, and a sequence may be alone: "
                "build them for 1 and more"
            )
        if engines.profile.most < settings.batch:
            checked.warnings.append(
                f"{where}: batch is {settings.batch}, and the engines {engines.key} take {engines.profile.most} at once"
            )


def _warn(checked: Checked, repository: Repository, where: Path, config: Config, settings: Settings) -> None:
    """What can be served and will be noticed."""
    batching, name = config.sequence_batching, where.parent.name
    idle, candidates = batching.max_sequence_idle_microseconds / 1e6, batching.oldest.max_candidate_sequences
    waiting = settings.sequences * settings.queue * repository.size**2 * 3
    kinds = sorted({"KIND_GPU" if group.kind == 1 else "KIND_CPU" for group in config.instance_group})
    checked.rows += [
        (f"{name} serves", f"{settings.sequences} sequences an instance, {settings.queue} frames of each may wait "
         f"({waiting / 1e6:.0f} MB raw), {settings.batch} driven at once"),
        (f"{name} frees", f"a sequence after {settings.idle:g} s without a request (Triton: {idle:g} s)"),
        (f"{name} runs on", f"{' and '.join(kinds) or 'what Triton chooses'}, backend {settings.backend}"),
    ]  # fmt: skip
    if idle <= settings.idle:
        checked.warnings.append(
            f"{where}: Triton forgets a sequence after {idle:g} s and the model after {settings.idle:g} s, which keeps "
            "memory for sequences that nobody can reach: set max_sequence_idle_microseconds above the parameter idle"
        )
    if candidates < 2 * settings.sequences:
        checked.warnings.append(
            f"{where}: max_candidate_sequences is {candidates} for {settings.sequences} sequences: more would wait in "
            "Triton without end, instead of being refused"
        )
    if waiting > MUCH_WAITING:
        checked.warnings.append(
            f"{where}: {settings.sequences} sequences with {settings.queue} waiting frames each may take "
            f"{waiting / 2**30:.1f} GiB an instance"
        )
    if kinds == ["KIND_GPU"] and settings.backend in ON_CPUS:
        checked.warnings.append(f"{where}: KIND_GPU, and the backend {settings.backend} computes on the CPU")
    if kinds == ["KIND_CPU"] and settings.backend not in ("auto", *ON_CPUS):
        checked.warnings.append(f"{where}: KIND_CPU, and the backend {settings.backend} computes on the first GPU")


# ----------------------------------------------------------------------------------------------------------------------
# Graphs and ensembles


def _check_graph(checked: Checked, repository: Repository, name: str, configs: Mapping[str, Config]) -> None:
    config, where = configs[name], repository.path / name / CONFIG
    if config.platform != "ensemble":
        if config.backend not in ("onnxruntime", "tensorrt"):
            raise InputError(f"{where}: backend must be 'onnxruntime' or 'tensorrt', got {config.backend[:80]!r}")
        if not config.input or not config.output:
            raise InputError(
                f"{where}: a graph has inputs and outputs, got {len(config.input)} and {len(config.output)}"
            )
        counts = _count(len(config.input), "input"), _count(len(config.output), "output")
        checked.rows.append((name, ", ".join((config.backend, *counts))))
        return
    before = len(checked.problems)
    checked.problems += [f"{where}: {words}" for words in _joins(config, configs)]
    if len(checked.problems) == before:
        checked.rows.append(
            (name, f"ensemble of {', '.join(step.model_name for step in config.ensemble_scheduling.step)}")
        )


def _joins(ensemble: Config, configs: Mapping[str, Config]) -> list[str]:
    """A sentence for each tensor of an ensemble that nothing gives, or that two models see differently."""
    tensors = {tensor.name: tensor for tensor in ensemble.input}
    words = []
    for step in ensemble.ensemble_scheduling.step:
        model = configs.get(step.model_name)
        if model is None:
            words.append(f"step {step.model_name[:80]} is no model of this repository")
            continue
        if model.max_batch_size < ensemble.max_batch_size:
            words.append(f"max_batch_size is {ensemble.max_batch_size}, and {model.name} takes {model.max_batch_size}")
        inputs, outputs = ({it.name: it for it in side} for side in (model.input, model.output))
        for its, name in step.input_map.items():
            if its not in inputs or name not in tensors:
                words.append(f"input {its[:80]} of {model.name} takes {name[:80]}, which is not there")
            elif _shape(inputs[its]) != _shape(tensors[name]):
                words.append(
                    f"input {its} of {model.name} is {_shape(inputs[its])}, and {name} is {_shape(tensors[name])}"
                )
        words += [f"input {its} of {model.name} gets nothing" for its in inputs if its not in step.input_map]
        for its, name in step.output_map.items():
            if its not in outputs:
                words.append(f"{model.name} has no output {its[:80]}")
            else:
                tensors[name] = outputs[its]
    for tensor in ensemble.output:
        if tensor.name not in tensors:
            words.append(f"output {tensor.name[:80]} comes from no step")
        elif _shape(tensors[tensor.name]) != _shape(tensor):
            words.append(f"output {tensor.name} is {_shape(tensor)}, and gets {_shape(tensors[tensor.name])}")
    return words


def _type(tensor: Any) -> str:
    from tritonclient.grpc.model_config_pb2 import DataType

    return _named(DataType, tensor.data_type)


def _named(kind: Any, number: int) -> str:
    """The word for a value of an enumeration; a file may hold any number."""
    return str(kind.Name(number)) if number in kind.values() else str(number)


def _shape(tensor: Any) -> str:
    return f"{_type(tensor)} {list(tensor.dims)}"


def _precisions(repository: Repository) -> str:
    precisions = {precision for precision in repository.precision.values() if precision in PRECISIONS}
    return precisions.pop() if len(precisions) == 1 else "mixed"


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
