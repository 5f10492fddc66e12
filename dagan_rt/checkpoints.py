"""Checkpoints in the published layout: foreign files in, the same layout out.

One file holds `generator`, `kp_detector` and, from training, `discriminator`, `optimizer_*` and `epoch`; the face depth
network is a folder with `encoder.pth` and `depth.pth`. Which variant it is and how wide is read from the shapes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dagan_rt.checkpoint_files import read_weights
from dagan_rt.checkpoint_shapes import identify, infer_config, infer_depth_config
from dagan_rt.errors import InputError
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.depth import DepthNetwork
from dagan_rt.networks.model import Model

__all__ = ["Checkpoint", "infer_config", "inspect", "load", "save"]

StateDict = dict[str, Tensor]
NETWORKS = ("generator", "kp_detector", "discriminator")
DEPTH_FILES = {"depth_encoder": "encoder.pth", "depth_decoder": "depth.pth"}
DEPTH_SIDE_ENTRIES = ("height", "width", "use_stereo")  # plain values beside the encoder's tensors
FRESH = "training would start with a fresh one"
MOST_PARAMETERS = 1_000_000_000  # ten times the largest published variant; a forged shape costs no file size


@dataclass(frozen=True)
class Checkpoint:
    """What a file (and its depth folder) holds, checked to fit together; nothing copied into a model yet."""

    path: Path
    config: NetworkConfig
    state_dicts: Mapping[str, StateDict] = field(repr=False)  # published network name -> entries, only usable networks
    optimizers: Mapping[str, Any] = field(repr=False)  # name without `optimizer_` -> its state dict
    epoch: int | None
    extra: Mapping[str, Any] = field(repr=False)  # every other entry of the file
    notes: tuple[str, ...]  # what was assumed, ignored or left out, a sentence each
    missing_depth: str | None = None  # why no model can be built without a depth folder, or None
    parameters: Mapping[str, int] = field(default_factory=dict)  # trainable parameters of each network of the variant

    def build(self) -> Model:
        """The model in eval mode on the CPU, float32; networks absent from the file are freshly initialised.

        Raises InputError when the depth network is missing or a weight is NaN or infinite.
        """
        if self.missing_depth:
            raise InputError(self.missing_depth)
        broken = self.not_finite()
        if broken:
            raise InputError(
                f"{self.path}: {len(broken)} entries hold NaN or infinite values, the first is {broken[0]}: "
                "its training diverged, so take an earlier checkpoint"
            )
        model = Model(self.config)
        for network, module in model.networks().items():
            if network in self.state_dicts:
                module.load_state_dict(self.state_dicts[network])
        return model.eval()

    def not_finite(self) -> list[str]:
        """Names (network and entry) of the weights that hold NaN or infinity. Reads every weight."""
        return [
            f"{network} {key}"
            for network, state in self.state_dicts.items()
            for key, value in state.items()
            if value.is_floating_point() and not bool(torch.isfinite(value).all())
        ]


def load(path: str | Path, depth: str | Path | None = None, variant: str | None = None) -> Model:
    """The model of a checkpoint, in eval mode on the CPU.

    path: the `.pth.tar` file. depth: the folder with `encoder.pth` and `depth.pth`, for variants that use depth.
    variant: refuse a checkpoint of any other variant.
    Raises InputError, one sentence that names the file and what does not fit.
    """
    checkpoint = inspect(path, depth)
    found = checkpoint.config.variant
    if variant is not None and found != variant:
        raise InputError(
            f"{path}: checkpoint is {found} ({checkpoint.config.num_keypoints} key points), you asked for {variant}"
        )
    return checkpoint.build()


def inspect(path: str | Path, depth: str | Path | None = None) -> Checkpoint:
    """Read a checkpoint and check that keys and shapes are those of its variant; weights stay on disk where possible.

    Without the depth folder of a variant that needs one this still succeeds (with a note); `build` does not.
    """
    path = Path(path)
    notes: list[str] = []
    payload = read_weights(path)
    _check_is_checkpoint(path, payload)
    states = {name: _state_dict(path, name, payload[name], notes) for name in NETWORKS if name in payload}
    _check_slots(path, states)
    declared = _declared_config(path, payload)

    discriminator = states.pop("discriminator", None)
    with _naming(path):
        config = infer_config(states, declared)
    needs_depth = config.parts.uses_depth and depth is None
    if needs_depth:
        assumed = f"a ResNet-{config.depth_layers} is {'declared' if declared else 'assumed'}"
        notes.append(f"no depth folder given: {assumed}, and the checkpoint alone cannot be used")
    elif depth is not None and not config.parts.uses_depth:
        notes.append(f"{config.variant} has no depth network: {depth} is not used")
    elif depth is not None:
        states |= _read_depth(Path(depth), notes)
        with _naming(path):
            config = infer_config(states, declared)
    config = _with_discriminator(config, states, discriminator, declared, notes)
    if declared is None:
        notes.append(_assumptions(config))

    expected = _meta_model(path, config).networks()
    _check_fit(path, depth, states, expected, notes)
    optimizers, extra = _other_entries(payload, notes)
    epoch = payload.get("epoch")
    return Checkpoint(
        path=path,
        config=config,
        state_dicts=states,
        optimizers=optimizers,
        epoch=epoch if type(epoch) is int else None,
        extra=extra,
        notes=tuple(dict.fromkeys(notes)),
        missing_depth=_missing_depth(path, config) if needs_depth else None,
        parameters={name: sum(p.numel() for p in module.parameters()) for name, module in expected.items()},
    )


def save(
    path: str | Path,
    model: Model,
    depth_dir: str | Path | None = None,
    optimizers: Mapping[str, Any] | None = None,
    epoch: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the published layout, plus one entry `config` (plain numbers) that also tells the image size.

    depth_dir: folder for the depth network's `encoder.pth` and `depth.pth`; None leaves the depth network unwritten.
    optimizers: name -> torch optimizer or its state dict, stored as `optimizer_<name>`.
    extra: further plain entries (numbers, strings, tensors, lists, dicts).
    All files are written beside their targets, read back, and only then renamed into place: on failure (InputError)
    whatever was there before is untouched and nothing new is left.
    """
    path = Path(path)
    states = {name: _plain_state(module) for name, module in model.networks().items()}
    payload: dict[str, Any] = {name: states[name] for name in NETWORKS}
    for name, optimizer in (optimizers or {}).items():
        payload[f"optimizer_{name}"] = optimizer.state_dict() if hasattr(optimizer, "state_dict") else optimizer
    payload |= {"epoch": int(epoch), "config": model.config.to_dict()}
    taken = [key for key in extra or {} if key in payload]
    if taken:
        raise InputError(f"extra entry {taken[0]!r} of {path} is already the name of a part of the checkpoint")
    files: dict[Path, Any] = {}
    if depth_dir is not None:
        files |= _depth_files(model, Path(depth_dir))
    files[path] = payload | dict(extra or {})  # last: whoever waits for this file finds its depth folder complete
    _write_all(files)


def save_depth(folder: str | Path, model: Model) -> None:
    """Write the depth network alone, `encoder.pth` and `depth.pth`, as `save` does."""
    _write_all(_depth_files(model, Path(folder)))


def load_depth(folder: str | Path, model: Model) -> None:
    """Put the depth network of `encoder.pth` and `depth.pth` into `model`. InputError where it is of other sizes."""
    if model.depth is None:
        raise InputError(f"{model.config.variant} has no depth network to read from {folder}")
    for name, state in _read_depth(Path(folder), []).items():
        misfit = _misfit(name, state, model.networks()[name])
        if misfit:
            raise InputError(f"{folder}: {misfit}")
        model.networks()[name].load_state_dict(state, strict=False)  # old files do not count batches


def load_depth_network(folder: str | Path) -> DepthNetwork:
    """The depth network of `encoder.pth` and `depth.pth` alone, its sizes read from the shapes: eval mode, on the CPU.

    Raises InputError, one sentence that names the folder or file and what does not fit.
    """
    folder = Path(folder)
    states = _read_depth(folder, [])
    with _naming(folder):
        config = infer_depth_config(states)
    _check_fit(folder, folder, states, _meta_model(folder, config).networks(), [])
    network = DepthNetwork(config)
    network.encoder.load_state_dict(states["depth_encoder"], strict=False)  # old files do not count batches
    network.decoder.load_state_dict(states["depth_decoder"])
    if not all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters()):
        raise InputError(f"{folder} holds NaN or infinite weights: its training diverged, so take an earlier one")
    return network.eval()


def _depth_files(model: Model, folder: Path) -> dict[Path, Any]:
    if model.depth is None:
        raise InputError(f"{model.config.variant} has no depth network to write to {folder}")
    side = {"height": model.config.size, "width": model.config.size, "use_stereo": False}
    return {
        folder / "encoder.pth": _plain_state(model.depth.encoder) | side,
        folder / "depth.pth": _plain_state(model.depth.decoder),
    }


# --- reading -----------------------------------------------------------------------------------------------------


def _check_is_checkpoint(path: Path, payload: Any) -> None:
    """Refuse whatever is not a dict with a generator and a kp_detector, saying what it is instead."""
    if not isinstance(payload, Mapping) or not all(isinstance(key, str) for key in payload):
        raise InputError(f"{path} must hold a dict of state dicts, got {type(payload).__name__}")
    if not payload:
        raise InputError(f"{path} holds an empty dict: no generator, no kp_detector")
    if "generator" in payload and "kp_detector" in payload:
        return
    bare = identify([_strip_module(key) for key in payload])
    if bare in DEPTH_FILES:
        raise InputError(
            f"{path} is the {bare.removeprefix('depth_')} half of a depth network, not a checkpoint: give the "
            "generator's .pth.tar file, and the folder of this file as depth (--depth)"
        )
    if bare:
        raise InputError(
            f"{path} is the state dict of a {bare} alone: a checkpoint holds it under {bare!r}, beside the others"
        )
    for present, absent in (("generator", "kp_detector"), ("kp_detector", "generator")):
        if present in payload:
            raise InputError(f"{path} has a {present} but no {absent}: both are needed, from the same checkpoint")
    if all(key == "discriminator" or key.startswith("optimizer_") or key == "epoch" for key in payload):
        raise InputError(
            f"{path} holds only what training needs ({_first_three(payload)}): give the file with generator and "
            "kp_detector"
        )
    raise InputError(f"{path} must hold generator and kp_detector, got {_first_three(payload)}")


def _state_dict(path: Path, name: str, value: Any, notes: list[str]) -> StateDict:
    """One network's entries, without the `module.` of multi-GPU training, tensors only."""
    if not isinstance(value, Mapping):
        raise InputError(f"{path}: {name} must be a state dict, got {type(value).__name__}")
    state: StateDict = {}
    for key, tensor in value.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {name} entry {key} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise InputError(f"{path}: {name} entry {key} must be an ordinary dense tensor, got a {tensor.type()}")
        stripped = _strip_module(str(key))
        if stripped in state:
            raise InputError(f"{path}: {name} has entry {stripped} twice, with and without module.")
        state[stripped] = tensor
    if any("module" in str(key).split(".") for key in value):
        notes.append("module. prefixes (multi-GPU training) stripped")
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()}
    if kinds - {"float32"}:
        notes.append(f"{name} is stored as {', '.join(sorted(kinds))} and becomes float32")
    return state


def _strip_module(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "module")


def _check_slots(path: Path, states: Mapping[str, StateDict]) -> None:
    """Refuse networks stored under each other's names."""
    for name in ("generator", "kp_detector"):
        found = identify(states[name])
        if found != name:
            what = f"the state dict of a {found}" if found else f"unknown entries ({_first_three(states[name])})"
            raise InputError(f"{path}: under {name!r} it holds {what}, not of a {name}")


def _declared_config(path: Path, payload: Mapping[str, Any]) -> NetworkConfig | None:
    """The file's own `config` entry; another program's entry of that name is an error only if it looks like ours."""
    values = payload.get("config")
    if not isinstance(values, Mapping) or "variant" not in values:
        return None
    with _naming(path):
        return NetworkConfig.from_dict(values)


def _with_discriminator(
    config: NetworkConfig,
    states: dict[str, StateDict],
    discriminator: StateDict | None,
    declared: NetworkConfig | None,
    notes: list[str],
) -> NetworkConfig:
    """Add the discriminator where it fits. Driving a face does not need it, so one of another design is only noted."""
    if discriminator is None:
        notes.append(f"no discriminator in the file: {FRESH}")
        return config
    try:
        config = infer_config(states | {"discriminator": discriminator}, declared)
    except InputError as error:
        notes.append(f"discriminator left out ({error}): {FRESH}")
    else:
        states["discriminator"] = discriminator
    return config


def _assumptions(config: NetworkConfig) -> str:
    if config.parts.uses_depth or config.parts.attention:
        return f"the file does not tell its image size: {config.size} × {config.size} assumed"
    return (
        f"the file does not tell its image size nor fomm from baseline: {config.size} × {config.size} assumed, and "
        f"{config.variant} from its {config.num_keypoints} key points"
    )


def _other_entries(payload: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(optimizer states by name, everything this library has no name for)."""
    optimizers = {key.removeprefix("optimizer_"): payload[key] for key in payload if key.startswith("optimizer_")}
    known = {*NETWORKS, "epoch", "config", *(f"optimizer_{name}" for name in optimizers)}
    extra = {key: value for key, value in payload.items() if key not in known}
    if extra:
        notes.append(f"entries not used: {_first_three(extra)}")
    return optimizers, extra


# --- the depth folder --------------------------------------------------------------------------------------------


def _missing_depth(path: Path, config: NetworkConfig) -> str:
    needed = f"{path} is {config.variant}, which needs its depth network: give the folder that holds encoder.pth and "
    candidates = _depth_folders(path.parent)
    seen = f"; beside the checkpoint there is {', '.join(map(str, candidates))}" if candidates else ""
    return f"{needed}depth.pth as depth (--depth){seen}"


def _depth_folders(parent: Path) -> list[Path]:
    """Folders beside the checkpoint (itself included) that look like a depth network. Named, never picked."""
    try:
        folders = [parent, *sorted(entry for entry in parent.iterdir() if entry.is_dir())]
    except OSError:
        return []
    return [folder for folder in folders if all((folder / file).is_file() for file in DEPTH_FILES.values())][:3]


def _read_depth(folder: Path, notes: list[str]) -> dict[str, StateDict]:
    """The entries of both halves; the encoder's classifier and its plain numbers are ignored."""
    _check_depth_folder(folder)
    states: dict[str, StateDict] = {}
    for network, file in DEPTH_FILES.items():
        path = folder / file
        payload = read_weights(path)
        if not isinstance(payload, Mapping):
            raise InputError(f"{path} must hold a state dict, got {type(payload).__name__}")
        entries = {key: value for key, value in payload.items() if _strip_module(str(key)) not in DEPTH_SIDE_ENTRIES}
        state = _state_dict(path, network, entries, notes)
        states[network] = {key: value for key, value in state.items() if not key.startswith("encoder.fc.")}
    found = {network: identify(state) for network, state in states.items()}
    if found == {"depth_encoder": "depth_decoder", "depth_decoder": "depth_encoder"}:
        raise InputError(f"{folder}: encoder.pth holds the decoder and depth.pth the encoder: swap their names")
    for network, kind in found.items():
        if kind != network:
            half = network.removeprefix("depth_")
            what = f"a {kind.replace('_', ' ')}" if kind else f"unknown entries ({_first_three(states[network])})"
            raise InputError(f"{folder / DEPTH_FILES[network]} must hold the depth {half}, got {what}")
    return states


def _check_depth_folder(folder: Path) -> None:
    if folder.is_file():
        raise InputError(
            f"depth must be the folder that holds encoder.pth and depth.pth, got the file {folder}"
            + (f": give {folder.parent}" if folder.name in DEPTH_FILES.values() else "")
        )
    if not folder.is_dir():
        raise InputError(f"depth folder {folder} does not exist")
    missing = [file for file in DEPTH_FILES.values() if not (folder / file).is_file()]
    if len(missing) == 2:
        held = _first_three(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise InputError(f"depth folder {folder} must hold encoder.pth and depth.pth, it holds {held}")
    if missing:
        there = next(file for file in DEPTH_FILES.values() if file != missing[0])
        raise InputError(f"depth folder {folder} has {there} but no {missing[0]}: both are needed, from one training")


# --- fitting -----------------------------------------------------------------------------------------------------


def _meta_model(path: Path, config: NetworkConfig) -> Model:
    """The model without memory behind its tensors: names and shapes to compare with, and a size to check first."""
    with torch.device("meta"):
        model = Model(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > MOST_PARAMETERS:
        raise InputError(f"{path} describes {size:,} parameters, more than the {MOST_PARAMETERS:,} that are accepted")
    return model


def _check_fit(
    path: Path,
    depth: str | Path | None,
    states: dict[str, StateDict],
    expected: Mapping[str, nn.Module],
    notes: list[str],
) -> None:
    """Refuse entries that the networks do not have; a discriminator that does not fit is dropped and noted."""
    for network in list(states):
        misfit = _misfit(network, states[network], expected[network])
        if misfit and network == "discriminator":
            del states[network]
            notes.append(f"{misfit}: {FRESH}")
        elif misfit:
            raise InputError(f"{path if network in NETWORKS else depth}: {misfit}")


def _misfit(network: str, state: StateDict, expected: nn.Module) -> str | None:
    """Why the entries are not those of the network, or None."""
    shapes = {key: list(value.shape) for key, value in expected.state_dict().items()}
    # Files from before PyTorch 0.4.1 do not count batches; nothing in eval mode or with fixed momentum reads the count.
    missing = [key for key in shapes if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        return f"{network} lacks {len(missing)} of {len(shapes)} entries: {_first_three(missing)}"
    unknown = [key for key in state if key not in shapes]
    if unknown:
        return f"{network} has {len(unknown)} entries that this network does not know: {_first_three(unknown)}"
    for key, tensor in state.items():
        if list(tensor.shape) != shapes[key]:
            return f"{network} entry {key} must be {shapes[key]}, got {list(tensor.shape)}"
    return None


def _first_three(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f", … ({len(listed)} in all)" if len(listed) > 3 else "")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of an InputError that does not know it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


# --- writing -----------------------------------------------------------------------------------------------------


def _plain_state(module: nn.Module) -> dict[str, Any]:
    return {key: value.detach().cpu() for key, value in module.state_dict().items()}


def _write_all(files: Mapping[Path, Any]) -> None:
    """Write every file or none."""
    temporary = {target: target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in files}
    made: list[Path] = []
    try:
        for target, payload in files.items():
            _make_folder(target.parent, made)
            with temporary[target].open("wb") as file:
                torch.save(payload, file)
                file.flush()
                os.fsync(file.fileno())
            _check_reads_back(target, temporary[target])
        for target in files:
            os.replace(temporary[target], target)
        made.clear()
    except (OSError, RuntimeError) as error:
        reason = _root_cause(error)
        raise InputError(f"{list(files)[-1]} could not be written, nothing was changed: {reason}") from error
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_reads_back(target: Path, written: Path) -> None:
    try:
        read_weights(written)
    except InputError as error:
        raise InputError(
            f"{target} would not be readable, so it was not written; extra and optimizers must hold tensors and plain "
            f"values only ({str(error).removeprefix(str(written)).strip()})"
        ) from error


def _make_folder(folder: Path, made: list[Path]) -> None:
    for level in reversed([folder, *folder.parents]):
        if not level.exists():
            level.mkdir()
            made.append(level)


def _root_cause(error: BaseException) -> str:
    """The operating system's word for it, where torch.save hides it behind its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]
