"""The layout of a Triton model repository without Python: a model for each graph, and ensembles that join them.

| model                       | runs                                  | in -> out                                     |
|-----------------------------|---------------------------------------|-----------------------------------------------|
| `dagan_source`, `_driving`, | the bundle's graphs                   | as the bundle declares them                   |
| `_motion`, `_generator`     |                                       |                                               |
| `dagan_from_image`          | uint8 NHWC to float32 NCHW in [0, 1]  | image -> planes                               |
| `dagan_to_image`            | and back                              | planes -> image                               |
| `dagan_points`              | nothing: it hands on the key points   | driving key points -> key points              |
| `dagan_open`                | from_image, source                    | image -> all that a session keeps             |
| `dagan_keypoints`           | from_image, driving                   | frame -> key points                           |
| `dagan_drive`               | from_image, driving, motion,          | frame, session, initial key points, scale     |
|                             | generator, to_image, points           | -> image, key points                          |

The server keeps nothing between requests: a session is the tensors that `dagan_open` gives under the names under which
`dagan_drive` takes them, with the key points of the first frame as `initial_*` (absolute motion: the source's own) and
the movement scale, which the client sends or leaves in shared memory. Which tensors these are follows from the
graphs' names alone, and differs from variant to variant.

No output of an ensemble is also an input of one of its steps: where a request does not ask for such an output, Triton
takes the step that makes it for superfluous, and the request fails with "unexpected deadlock". Hence `dagan_points`,
which runs only if the key points are asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dagan_rt.bundle import GRAPHS, Bundle, Graph, Tensor
from dagan_rt.engines import EngineSet, engine_sets
from dagan_rt.errors import InputError, require
from dagan_rt.export.subnetworks import BATCH
from dagan_rt.export.triton_config import (
    Enum,
    bundle_parameters,
    data_type,
    instance_group,
    parameters,
    to_map,
    to_pbtxt,
)
from dagan_rt.serving.protocol import DRIVE_MODEL, FRAME, IMAGE, KEYPOINTS_MODEL, OPEN_MODEL

if TYPE_CHECKING:
    from onnx import ModelProto

    from dagan_rt.serving.repository import ServingPlan

PREFIX = "dagan_"
FROM_IMAGE, TO_IMAGE, POINTS = f"{PREFIX}from_image", f"{PREFIX}to_image", f"{PREFIX}points"
PLANES = "planes"
OPSET, IR_VERSION = 17, 8  # of the conversions: what every ONNX Runtime of the last years reads
STAGES = 5  # models that a frame passes


@dataclass(frozen=True)
class Step:
    """One model within an ensemble: its tensors, and under which names of the ensemble they go."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Ensemble:
    """Models joined by the names of tensors."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    steps: tuple[Step, ...]


def write_graphs(bundle: Bundle, folder: Path, plan: ServingPlan) -> list[str]:
    """Write the models into the model repository `folder`, and return their names.

    The graphs are served as ONNX, or as engines where the plan's backend is "tensorrt". Raises InputError if the bundle
    has no graphs to animate with, or no engines that Triton can run.
    """
    if reason := bundle.cannot_reenact:
        raise InputError(f"bundle {bundle.path} cannot be served: {reason}")
    wiring = Wiring(bundle)
    writer = _Writer(bundle, folder, plan)
    for name in GRAPHS:
        writer.graph(bundle.graphs[name])
    for name, (nodes, inputs, outputs) in wiring.conversions().items():
        writer.conversion(name, nodes, inputs, outputs)
    for ensemble in wiring.ensembles():
        writer.ensemble(ensemble)
    return writer.written


# ----------------------------------------------------------------------------------------------------------------------
# what runs


class Wiring:
    """Which tensor of the four graphs goes where, found by their names."""

    def __init__(self, bundle: Bundle) -> None:
        self.source, self.driving, self.motion, self.generator = (bundle.graphs[name] for name in GRAPHS)
        taken = {tensor.name: tensor for graph in (self.motion, self.generator) for tensor in graph.inputs}
        for tensor in self.motion.outputs:
            taken.pop(tensor.name, None)
        points = [tensor for tensor in self.driving.outputs if taken.pop(f"driving_{tensor.name}", None)]
        # What the source graph gives, by the names under which the others take it.
        names = {
            it.name: f"source_{it.name}" if f"source_{it.name}" in taken else it.name for it in self.source.outputs
        }
        given = {its: name for its, name in names.items() if name in taken}
        kept = [tensor for tensor in taken.values() if tensor.name in ("source_image", *given.values())]
        chosen = {"scale", *(f"initial_{tensor.name}" for tensor in points)}
        for name in taken:
            if name not in chosen and all(name != tensor.name for tensor in kept):
                raise InputError(f"bundle {bundle.path} cannot be served as an ensemble: no graph gives {name}")
        side = bundle.config.size
        self.picture, self.planes = (BATCH, side, side, 3), (BATCH, 3, side, side)
        self.points = tuple(points)  # of the driving graph
        self.given = given  # outputs of the source graph by the names that others have for them
        self.kept = tuple(kept)  # what a session keeps
        self.taken = tuple(taken.values())  # what `dagan_drive` takes besides the frame

    def ensembles(self) -> tuple[Ensemble, ...]:
        """All of them."""
        image, frame = Tensor(IMAGE, self.picture, "uint8"), Tensor(FRAME, self.picture, "uint8")
        look = Step(FROM_IMAGE, {IMAGE: FRAME}, {PLANES: PLANES})
        return (
            Ensemble(OPEN_MODEL, (image,), self.kept, tuple(self._open())),
            Ensemble(KEYPOINTS_MODEL, (frame,), self.points, (look, self._find(""))),
            Ensemble(DRIVE_MODEL, (frame, *self.taken), (image, *self.points), (look, *self._drive())),
        )

    def _open(self) -> Iterator[Step]:
        yield Step(FROM_IMAGE, {IMAGE: IMAGE}, {PLANES: PLANES})
        yield Step(model_name("source"), {self.source.inputs[0].name: PLANES}, self.given)
        if any(tensor.name == "source_image" for tensor in self.kept):
            yield Step(FROM_IMAGE, {IMAGE: IMAGE}, {PLANES: "source_image"})

    def _find(self, role: str) -> Step:
        found = {tensor.name: f"{role}{tensor.name}" for tensor in self.points}
        return Step(model_name("driving"), {self.driving.inputs[0].name: PLANES}, found)

    def _drive(self) -> Iterator[Step]:
        yield (find := self._find("driving_"))
        for graph in (self.motion, self.generator):
            inputs, outputs = ({tensor.name: tensor.name for tensor in side} for side in (graph.inputs, graph.outputs))
            yield Step(model_name(graph.name), inputs, outputs)
        yield Step(TO_IMAGE, {PLANES: self.generator.outputs[0].name}, {IMAGE: IMAGE})
        yield Step(POINTS, {name: name for name in find.outputs.values()}, {name: name for name in find.outputs})

    def conversions(self) -> dict[str, tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """The models that are not graphs of the bundle: their nodes in ONNX's notation, inputs and outputs.

        Images are converted as the CPU backends do it, to the last bit; Round takes halves to the even number.
        """
        image, planes = Tensor(IMAGE, self.picture, "uint8"), Tensor(PLANES, self.planes)
        driven = tuple(replace(tensor, name=f"driving_{tensor.name}") for tensor in self.points)
        pairs = zip(self.points, driven, strict=True)
        return {
            FROM_IMAGE: (_FROM_IMAGE, (image,), (planes,)),
            TO_IMAGE: (_TO_IMAGE, (planes,), (image,)),
            POINTS: ("".join(f"{out.name} = Identity ({given.name})\n" for out, given in pairs), driven, self.points),
        }


_FROM_IMAGE = """
    rows = Transpose <perm = [0, 3, 1, 2]> (image)
    levels = Cast <to = 1> (rows)
    white = Constant <value_float = 255.0> ()
    planes = Div (levels, white)
"""
_TO_IMAGE = """
    black = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    white = Constant <value_float = 255.0> ()
    clipped = Clip (planes, black, one)
    levels = Mul (clipped, white)
    rounded = Round (levels)
    bytes = Cast <to = 2> (rounded)
    image = Transpose <perm = [0, 2, 3, 1]> (bytes)
"""


def conversion(name: str, nodes: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], fixed: bool) -> ModelProto:
    """A graph from its nodes in ONNX's notation; `fixed`: of one face."""
    onnx = require("onnx", extra="export", why="writing Triton's models")

    def declared(tensors: Sequence[Tensor]) -> str:
        kinds = {"float32": "float"}
        shapes = [", ".join(str(1 if size == BATCH and fixed else size) for size in tensor.shape) for tensor in tensors]
        typed = zip(tensors, shapes, strict=True)
        return ", ".join(f"{kinds.get(tensor.dtype, tensor.dtype)}[{shape}] {tensor.name}" for tensor, shape in typed)

    header = f'<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}]>'
    text = f"{header} {name} ({declared(inputs)}) => ({declared(outputs)}) {{ {nodes} }}"
    model: ModelProto = onnx.parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    return model


def model_name(graph: str) -> str:
    """What Triton calls a graph of the bundle."""
    return f"{PREFIX}{graph}"


# ----------------------------------------------------------------------------------------------------------------------
# engines


def engines_for_triton(bundle: Bundle) -> dict[str, EngineSet]:
    """The TensorRT engines of a bundle by compute capability; InputError says why Triton could not run them."""
    sets = [engines for engines in engine_sets(bundle) if engines.flavour == "tensorrt"]
    where = f"bundle {bundle.path}"
    rebuild = f"run python -m dagan_rt.export --rebuild {bundle.path} --target tensorrt"
    if not sets:
        raise InputError(f"{where} holds no tensorrt engines for Triton to run: {rebuild}")
    found: dict[str, EngineSet] = {}
    for engines in sets:
        if engines.plugins == "python":
            raise InputError(
                f"{where}: the engines {engines.key} hold plugins written in Python, which Triton's TensorRT backend "
                "cannot run: export with --plugins aot, or without plugins"
            )
        if engines.stripped:
            raise InputError(
                f"{where}: the engines {engines.key} have no weights, and Triton's TensorRT backend cannot fill them "
                "in: export without --strip-weights"
            )
        if engines.version != sets[0].version:
            raise InputError(
                f"{where} holds engines of tensorrt {sets[0].version} and {engines.version}, and a server runs one: "
                f"{rebuild}"
            )
        for graph in (bundle.graphs[name] for name in GRAPHS):
            entry = bundle.manifest["files"][graph.file.relative_to(bundle.path).as_posix()]
            built = engines.graphs.get(graph.name)
            file = engines.file(bundle.path, graph.name).relative_to(bundle.path).as_posix()
            if built is None or built.onnx != entry["sha256"] or file not in bundle.manifest["files"]:
                raise InputError(
                    f"{where}: the engines {engines.key} do not belong to its graph {graph.name}: {rebuild}"
                )
        for capability in engines.compute_capabilities:
            found[capability] = engines
    return found


# ----------------------------------------------------------------------------------------------------------------------
# files


class _Writer:
    """Writes models one by one."""

    def __init__(self, bundle: Bundle, folder: Path, plan: ServingPlan) -> None:
        self.written: list[str] = []
        self._bundle, self._folder, self._plan = bundle, folder, plan
        self._engines = engines_for_triton(bundle) if plan.backend == "tensorrt" else {}
        most = min([bundle.batch.most, plan.batch, *(its.profile.most for its in self._engines.values())])
        # A graph whose batch is fixed has no axis that Triton could put a batch on: it is part of the shape there.
        self._most = 0 if bundle.batch.fixed else most
        self._parameters = bundle_parameters(bundle)

    def graph(self, graph: Graph) -> None:
        """One graph of the bundle, as ONNX or as engines."""
        name = model_name(graph.name)
        special = {"precision": graph.precision}
        if not self._engines:
            config = self._model(name, "onnxruntime", graph.inputs, graph.outputs, special)
            shutil.copyfile(graph.file, self._place(name, config) / "model.onnx")
            return
        sets = {engines.key: engines for engines in self._engines.values()}
        special["tensorrt_version"] = next(iter(sets.values())).version
        config = self._model(name, "tensorrt", graph.inputs, graph.outputs, special)
        files = {key: "model.plan" if len(sets) == 1 else f"{key}.plan" for key in sets}
        if len(sets) > 1:
            by_capability = {capability: files[its.key] for capability, its in self._engines.items()}
            config["cc_model_filenames"] = to_map(by_capability)
        place = self._place(name, config)
        for key, engines in sets.items():
            shutil.copyfile(engines.file(self._bundle.path, graph.name), place / files[key])

    def conversion(self, name: str, nodes: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """One of the models between the graphs."""
        onnx = require("onnx", extra="export", why="writing Triton's models")
        model = conversion(name, nodes, inputs, outputs, fixed=not self._most)
        config = self._model(name, "onnxruntime", inputs, outputs, {"precision": "fp32"})
        onnx.save_model(model, str(self._place(name, config) / "model.onnx"))

    def ensemble(self, ensemble: Ensemble) -> None:
        """Nothing but a config; yet Triton wants a folder for the version, and an empty one gets lost in copies."""
        config = self._common(ensemble.name, {"platform": "ensemble"}, ensemble.inputs, ensemble.outputs, {})
        config["ensemble_scheduling"] = {
            "step": [
                {
                    "model_name": step.model,
                    "model_version": -1,
                    "input_map": to_map(step.inputs),
                    "output_map": to_map(step.outputs),
                }
                for step in ensemble.steps
            ]
        }
        (self._place(ensemble.name, config) / ".keep").touch()

    # ------------------------------------------------------------------------------------------------------------------
    # configs

    def _model(
        self, name: str, backend: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], special: Mapping[str, str]
    ) -> dict[str, Any]:
        """The config of a model that a device runs."""
        if backend == "onnxruntime" and self._plan.threads:
            special = {**special, "intra_op_thread_count": str(self._plan.threads)}
        config = self._common(name, {"backend": backend}, inputs, outputs, special)
        config["instance_group"] = instance_group(self._plan)
        config["dynamic_batching"] = self._batching()
        if self._plan.warm_up:
            config["model_warmup"] = [self._warm_up(name, inputs, batch) for batch in self._warm_batches()]
        return config

    def _common(
        self, name: str, kind: Mapping[str, str], inputs: Sequence[Tensor], outputs: Sequence[Tensor],
        special: Mapping[str, str],
    ) -> dict[str, Any]:  # fmt: skip
        return {
            "name": name,
            **kind,
            "max_batch_size": self._most,
            "input": [self._tensor(tensor) for tensor in inputs],
            "output": [self._tensor(tensor) for tensor in outputs],
            "version_policy": {"latest": {"num_versions": 1}},
            "response_cache": {"enable": False},
            "parameters": parameters({**self._parameters, **special}),
        }

    def _tensor(self, tensor: Tensor) -> dict[str, Any]:
        return {"name": tensor.name, "data_type": data_type(tensor.dtype), "dims": self._dims(tensor)}

    def _dims(self, tensor: Tensor) -> list[int]:
        return ([] if self._most else [1]) + [int(size) for size in tensor.shape[1:]]

    def _batching(self) -> dict[str, Any]:
        """A queue for requests that share batches, with an end; `REJECT` answers UNAVAILABLE."""
        plan = self._plan
        preferred = sorted({min(self._bundle.batch.usual, self._most), self._most} - {0, 1})
        return {
            **({"preferred_batch_size": preferred} if preferred else {}),
            # A frame queues in one model after the other: together it waits no longer than the plan says.
            "max_queue_delay_microseconds": round(plan.deadline * 1e6 / STAGES) if self._most > 1 else 0,
            "default_queue_policy": {
                "timeout_action": Enum("REJECT"),
                "default_timeout_microseconds": round(plan.timeout * 1e6),
                "allow_timeout_override": True,  # a request may ask for less
                "max_queue_size": plan.queue * plan.sequences,
            },
        }

    def _warm_batches(self) -> list[int]:
        return sorted({1, min(self._bundle.batch.usual, self._most)}) if self._most else [0]

    def _warm_up(self, name: str, inputs: Sequence[Tensor], batch: int) -> dict[str, Any]:
        """A request before the model is ready; zeros, but for local frames, which must have an inverse."""
        entries: dict[str, Any] = {}
        for tensor in inputs:
            data: dict[str, Any] = {"zero_data": True}
            if tensor.shape[-2:] == (2, 2):
                path = self._folder / name / "warmup" / tensor.name
                path.parent.mkdir(parents=True, exist_ok=True)
                np.broadcast_to(np.eye(2), [int(size) for size in tensor.shape[1:]]).astype(tensor.dtype).tofile(path)
                data = {"input_data_file": tensor.name}
            entries[tensor.name] = {"data_type": data_type(tensor.dtype), "dims": self._dims(tensor)} | data
        return {"name": f"batch_{max(batch, 1)}", "batch_size": batch, "inputs": to_map(entries)}

    def _place(self, name: str, config: Mapping[str, Any]) -> Path:
        """Write the config, and make the folder of the version."""
        place = self._folder / name / str(self._plan.version)
        place.mkdir(parents=True, exist_ok=True)
        (self._folder / name / "config.pbtxt").write_text(to_pbtxt(config), encoding="utf-8")
        self.written.append(name)
        return place
