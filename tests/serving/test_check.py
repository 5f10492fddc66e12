"""A good repository passes; broken in any one way, it does not, and the sentence says what is broken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dagan_rt import cli
from dagan_rt.bundle import Bundle, write_manifest
from dagan_rt.engines import BuiltGraph, EngineSet
from dagan_rt.errors import InputError
from dagan_rt.export.triton import write_repository
from dagan_rt.serving import check as checking
from dagan_rt.serving.check import check
from dagan_rt.serving.repository import ServingPlan

from ..test_staging import fill

CONFIG, STREAM, PLACE = "reenact/config.pbtxt", "reenact_stream/config.pbtxt", "reenact/1/bundle"
Break = Callable[[Path], Any]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Graphs that are no ONNX: nothing here runs them."""
    folder = tmp_path_factory.mktemp("bundle")
    fill(folder)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def good(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models with a state. To be copied."""
    out = tmp_path_factory.mktemp("good") / "repository"
    write_repository(bundle, out, ServingPlan(stream=True))
    return out


@pytest.fixture
def repository(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "repository"))


def test_a_good_one_passes(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "repository"
    write_repository(bundle, good, ServingPlan(layout="both", stream=True))
    checked = check(good)
    assert checked.problems == [] and checked.warnings == []
    assert cli.main(["triton", "check", str(good)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.endswith(f"{good}: no problems, no warnings\n")
    for words in (
        "both, fomm, 64 × 64, fp32", "reenact_stream bundle", "dagan_generator", "ensemble of", "no links",
        "64 sequences an instance, 8 frames of each may wait (6 MB raw), 32 driven at once",
        "after 60 s without a request (Triton: 65 s)", "KIND_CPU, backend auto",
    ):  # fmt: skip
        assert words in printed.out, words


@pytest.mark.parametrize("layout", ["stateful", "graphs"])
@pytest.mark.parametrize("instances", ["cpu", "gpu", "gpu:0,2"])
def test_so_does_every_plan(bundle: Bundle, tmp_path: Path, layout: str, instances: str) -> None:
    plan = ServingPlan(layout=layout, instances=instances, count=2, version=7, rate_limit=3, warm_up=False)
    write_repository(bundle, tmp_path / "repository", plan)
    checked = check(tmp_path / "repository")
    assert (checked.problems, checked.warnings) == ([], [])


def edit(name: str, old: str, new: str) -> Break:
    """Replace text in a file, the first time it stands there."""

    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text, (name, old)
        (root / name).write_text(text.replace(old, new, 1))

    return change


def mark(**values: Any) -> Break:
    """Change keys of the marker; None deletes one."""

    def change(root: Path) -> None:
        marker = json.loads((root / "dagan-rt.json").read_text()) | values
        (root / "dagan-rt.json").write_text(json.dumps({key: its for key, its in marker.items() if its is not None}))

    return change


def setting(**values: Any) -> Break:
    def change(root: Path) -> None:
        marker = json.loads((root / "dagan-rt.json").read_text())
        mark(settings=marker["settings"] | values)(root)

    return change


def write(name: str, content: bytes = b"print()\n") -> Break:
    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return change


def delete(name: str) -> Break:
    def change(root: Path) -> None:
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()

    return change


def rename(name: str, other: str) -> Break:
    return lambda root: (root / name).rename(root / other)


def link(name: str, target: str) -> Break:
    return lambda root: (root / name).symlink_to(target)


def damaged(name: str) -> Break:
    """One bit of a file, its size as it was."""

    def change(root: Path) -> None:
        data = bytearray((root / name).read_bytes())
        data[len(data) // 2] ^= 1
        (root / name).unlink()  # it has a second name in the other model, which stays as it is
        (root / name).write_bytes(data)

    return change


def both(one: Break, other: Break) -> Break:
    return lambda root: (one(root), other(root))


def rebuilt(root: Path) -> None:
    """A bundle that is whole, and another one."""
    (root / PLACE / "motion.onnx").unlink()
    (root / PLACE / "motion.onnx").write_bytes(b"new")
    bundle = json.loads((root / PLACE / "manifest.json").read_text())
    (root / PLACE / "manifest.json").unlink()
    write_manifest(root / PLACE, {key: value for key, value in bundle.items() if key != "files"})


def parameter(key: str, old: str, new: str, name: str = CONFIG) -> Break:
    pair = 'key: "{}" value {{ string_value: "{}" }}'
    return edit(name, pair.format(key, old), pair.format(key, new))


TENSOR = 'input { name: "frame" data_type: TYPE_UINT8 dims: [64, 64, 3] optional: true allow_ragged_batch: true }\n'
OUTPUT = 'output { name: "kp_value" data_type: TYPE_FP32 dims: [10, 2] }\n'
OLDEST = "oldest { max_candidate_sequences: 16384 max_queue_delay_microseconds: 0 }"
GROUP = "instance_group { kind: KIND_CPU count: 1 }"
POLICY = "version_policy { latest { num_versions: 1 } }"
DRIVE = "dagan_drive/config.pbtxt"

BROKEN: dict[str, tuple[Break, str]] = {
    # the marker
    "no marker": (delete("dagan-rt.json"), "repository must be a model repository that dagan-rt wrote: it holds no da"),
    "no JSON": (write("dagan-rt.json"), "dagan-rt.json must be JSON, got something else"),
    "another's": (mark(format="x"), "is not the marker of a model repository: its format must be 'dagan-rt model repo"),
    "newer": (mark(version=99), "has format version 99, this dagan-rt reads 1: write the repository again"),
    "unknown key": (mark(wings=2), "dagan-rt.json: wings is not a known key; expected one of layout, models"),
    "lacking key": (mark(variant=None), "dagan-rt.json: the table lacks variant"),
    "wrong type": (mark(size="64"), "dagan-rt.json: size must be int, got str '64'"),
    "layouts": (mark(layout="graphs"), "dagan-rt.json: layout must be that of the settings, stateful, got 'graphs'"),
    "no models": (mark(models=[]), "models must be 1 to 64 names, got 0"),
    "strange model": (mark(models=["../x"]), "models must be names such as reenact, got '../x'"),
    "one less": (mark(models=["reenact"]), "the models of these settings are reenact, reenact_stream, got reenact"),
    "hash": (mark(bundle_sha256="0f"), "bundle_sha256 must be 64 hexadecimal digits, got '0f'"),
    "another hash": (mark(bundle_sha256="0" * 64), "is another bundle than the one that was written (its manifest.jso"),
    "variant": (mark(variant="dagan"), "parameter variant must be that of dagan-rt.json, 'dagan', got 'fomm'"),
    "size": (mark(size=128), "dagan-rt.json: variant, size and precision must be those of"),
    "path": (mark(files={"../x": {"bytes": 1, "sha256": "0"}}), "must have plain relative names inside the repository"),
    "settings": (setting(sequences=0), "dagan-rt.json: sequences must be 1 to 4096, got 0"),
    "instances": (setting(instances="tpu"), "instances must be cpu, gpu (every GPU) or gpu:0,1 (these), got 'tpu'"),
    # the tree
    "link": (link("reenact/extra", "config.pbtxt"), "reenact/extra is a link: put the file itself there"),
    "link out": (link("reenact/1/bundle/x", "/etc"), "reenact/1/bundle/x is a link: put the file itself there"),
    "linked model": (link("other", "reenact"), "other is a link"),
    "pipe": (lambda root: os.mkfifo(root / PLACE / "pipe"), "pipe is neither a file nor a folder: delete it"),
    "foreign model": (write("other/config.pbtxt"), "other is not among the models that dagan-rt wrote, and Triton wou"),
    "code changed": (edit("reenact/1/model.py", "serving", "Serving"), "model.py is not what was written (its SHA-256"),
    "code longer": (edit("reenact_stream/1/model.py", "\n", "\n\n"), "reenact_stream/1/model.py is not what was writt"),
    "no code": (delete("reenact/1/model.py"), "model.py is named in dagan-rt.json, and is not there"),
    "more code": (write("reenact/1/other.py"), "reenact/1/other.py was not written by dagan-rt: delete it"),
    "no model": (delete("reenact_stream"), "reenact_stream/config.pbtxt is not there"),
    # configs
    "no config": (delete(CONFIG), "reenact/config.pbtxt is not there: a model of Triton needs one"),
    "no protobuf": (write(CONFIG), "reenact/config.pbtxt is not a model configuration: 1:1"),
    "unknown field": (edit(CONFIG, "backend:", "wings:"), 'no field named "wings"'),
    "no text": (write(CONFIG, b"\xff\xfe"), "config.pbtxt cannot be read"),
    "endless": (write(CONFIG, b"#" * (1 << 21)), "config.pbtxt must be at most 1048576 bytes"),
    "name": (edit(CONFIG, '"reenact"', '"other"'), "name must be that of the folder, 'reenact', got 'other'"),
    "cache": (edit(CONFIG, "enable: false", "enable: true"), "response_cache must be off"),
    "kind": (edit(CONFIG, "KIND_CPU", "KIND_AUTO"), "instance_group must be KIND_CPU or KIND_GPU, got KIND_AUTO"),
    "kind by number": (edit(CONFIG, "KIND_CPU", "77"), "instance_group must be KIND_CPU or KIND_GPU, got 77"),
    "no UTF-8": (edit(CONFIG, '"reenact"', r'"\377"'), "reenact/config.pbtxt is not a model configuration"),
    "steering": (write("other\x1b[2J/config.pbtxt"), "other?[2J is not among the models that dagan-rt wrote"),
    "gpus": (edit(CONFIG, "count: 1", "count: 1 gpus: [0]"), "instance_group names gpus, and its kind is KIND_CPU"),
    "gpu twice": (edit(CONFIG, GROUP, "instance_group { kind: KIND_GPU gpus: [1, 1] }"), "each GPU once, got 0 on [1,"),
    "its variant": (parameter("variant", "fomm", "dagan"), "variant must be that of dagan-rt.json, 'fomm', got 'dagan"),
    "its size": (parameter("size", "64", "65"), "parameter size must be that of dagan-rt.json, '64', got '65'"),
    "its precision": (parameter("precision", "fp32", "int8"), "parameter precision must be that of dagan-rt.json, 'fp"),
    "its bundle": (edit(CONFIG, "bundle_sha256", "sha256"), "parameter bundle_sha256 must be that of dagan-rt.json"),
    "no version": (rename("reenact/1", "reenact/one"), "reenact must hold the version 1 alone, got none"),
    "other version": (rename("reenact/1", "reenact/2"), "reenact must hold the version 1 alone, got 2"),
    "two versions": (write("reenact/2/model.py"), "reenact must hold the version 1 alone, got 1, 2"),
    "policy": (edit(CONFIG, POLICY, "version_policy { specific { versions: [7] } }"), "must serve the version 1, got"),
    # the bundle
    "no bundle": (delete(PLACE), "bundle must be a folder written by python -m dagan_rt.export"),
    "damaged graph": (damaged(f"{PLACE}/motion.onnx"), "motion.onnx must have SHA-256"),
    "cut graph": (write(f"{PLACE}/motion.onnx", b""), "motion.onnx must be 3 bytes, got 0"),
    "lost graph": (delete(f"{PLACE}/motion.onnx"), "motion.onnx is named in the manifest, got nothing there"),
    "no manifest": (delete(f"{PLACE}/manifest.json"), "has no manifest.json"),
    "rebuilt": (rebuilt, "is another bundle than the one that was written"),
    "stowaway": (write(f"{PLACE}/x.onnx"), "x.onnx was not written by dagan-rt: delete it"),
    "no engines": (parameter("backend", "auto", "tensorrt"), "the bundle cannot be served: it holds no tensorrt engin"),
    "no weights": (parameter("backend", "auto", "torch"), "cannot be served: it holds no weights for the backend torc"),
    "backend": (parameter("backend", "auto", "warp"), "backend must be auto or one of"),
    # how it serves
    "not Python": (edit(CONFIG, '"python"', '"onnxruntime"'), "backend must be 'python', got 'onnxruntime'"),
    "direct": (edit(CONFIG, OLDEST, "direct { }"), "it must have sequence_batching with the strategy oldest"),
    "no sequences": (edit(CONFIG, "sequence_batching", "dynamic_batching"), "config.pbtxt is not a model configuratio"),
    "unbatched": (edit(CONFIG, "max_batch_size: 32", ""), "max_batch_size must be 1 or more, got 0"),
    "decoupled": (edit(CONFIG, GROUP, GROUP + "model_transaction_policy { decoupled: true }"), "decoupled must be fal"),
    "coupled": (edit(STREAM, "decoupled: true", "decoupled: false"), "decoupled must be true"),
    "batched": (edit(STREAM, "max_batch_size: 0", "max_batch_size: 4"), "max_batch_size must be 0, got 4"),
    "queue": (parameter("queue", "8", "many"), "config.pbtxt: parameter queue must be int, got 'many'"),
    "no queue": (parameter("queue", "8", "0"), "config.pbtxt: queue must be 1 to 1024, got 0"),
    "idle": (parameter("idle", "60.0", "nan"), "config.pbtxt: idle must be 0.1 to 86400, got nan"),
    # tensors
    "no frame": (edit(CONFIG, TENSOR, ""), "input frame is missing"),
    "type": (edit(CONFIG, "TYPE_UINT8", "TYPE_FP32"), "input frame must be TYPE_UINT8, got TYPE_FP32"),
    "type by number": (edit(CONFIG, "TYPE_UINT8", "77"), "input frame must be TYPE_UINT8, got 77"),
    "dims": (edit(CONFIG, "[64, 64, 3]", "[3, 64, 64]"), "input frame must have dims [64, 64, 3], got [3, 64, 64]"),
    "streamed dims": (edit(STREAM, "[-1, 64, 64, 3]", "[1, 64, 64, 3]"), "input frame must have dims [-1, 64, 64, 3]"),
    "more inputs": (edit(CONFIG, TENSOR, TENSOR + TENSOR.replace("frame", "wings")), "input wings is not in the proto"),
    "required": (edit(CONFIG, "optional: true", "optional: false"), "input frame must be optional"),
    "not ragged": (edit(CONFIG, " allow_ragged_batch: true", ""), "input frame must have allow_ragged_batch"),
    "no points": (edit(CONFIG, OUTPUT, ""), "output kp_value is missing"),
    "other points": (edit(CONFIG, "[10, 2]", "[15, 2]"), "output kp_value must have dims [10, 2], got [15, 2]"),
}  # fmt: skip


BROKEN_GRAPHS: dict[str, tuple[Break, str]] = {
    "graph": (damaged("dagan_motion/1/model.onnx"), "dagan_motion/1/model.onnx is not what was written"),
    "its backend": (edit("dagan_motion/config.pbtxt", '"onnxruntime"', '"python"'), "must be 'onnxruntime' or 'tensor"),
    "its parameters": (parameter("size", "64", "65", "dagan_motion/config.pbtxt"), "size must be that of dagan-rt.jso"),
    "no step": (edit(DRIVE, 'model_name: "dagan_motion"', 'model_name: "x"'), "step x is no model of this repository"),
    "no input": (edit(DRIVE, 'input { name: "frame"', 'input { name: "x"'), "of dagan_from_image takes frame, which i"),
    "input type": (edit(DRIVE, "TYPE_UINT8", "TYPE_FP32"), "input image of dagan_from_image is TYPE_UINT8 [1, 64, 64,"),
    "output": (edit(DRIVE, 'output { name: "image"', 'output { name: "x"'), "output x comes from no step"),
    "batches": (edit(DRIVE, "max_batch_size: 0", "max_batch_size: 4"), "max_batch_size is 4, and dagan_from_image tak"),
}  # fmt: skip


@pytest.mark.parametrize(("harm", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_said(repository: Path, harm: Break, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    harm(repository)
    assert cli.main(["triton", "check", str(repository)]) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert "\x1b" not in printed.err + printed.out  # nothing in a file steers a terminal
    assert all(line.startswith("dagan-rt: error: ") and str(repository) in line for line in lines), lines
    assert any(words in line for line in lines), lines


@pytest.mark.parametrize(("harm", "words"), BROKEN_GRAPHS.values(), ids=BROKEN_GRAPHS)
def test_what_is_broken_without_python_is_said(bundle: Bundle, tmp_path: Path, harm: Break, words: str) -> None:
    write_repository(bundle, tmp_path / "repository", ServingPlan(layout="graphs"))
    harm(tmp_path / "repository")
    problems = check(tmp_path / "repository").problems
    assert any(words in problem for problem in problems), problems


def test_every_problem_is_told_at_once(repository: Path) -> None:
    for harm in ("its size", "queue", "stowaway", "code changed", "coupled"):
        BROKEN[harm][0](repository)
    assert len(check(repository).problems) == 5


def test_a_repository_without_an_end(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "MOST_FILES", 10)
    assert "must hold at most 10 files" in check(repository).problems[0]
    assert "must be a model repository" in check(repository / "nothing").problems[0]


WARNED: dict[str, tuple[Break, str]] = {
    "left over": (write("reenact/1/__pycache__/model.cpython-311.pyc"), "was left by a server: delete it before this"),
    "beside": (write("README.txt"), "README.txt was not written by dagan-rt: Triton passes over it"),
    "idle": (edit(CONFIG, "65000000", "60000000"), "Triton forgets a sequence after 60 s and the model after 60 s"),
    "candidates": (edit(CONFIG, "16384", "100"), "max_candidate_sequences is 100 for 64 sequences"),
    "memory": (parameter("queue", "8", "1024"), "GiB"),
    "changed": (parameter("queue", "8", "9"), "parameter queue is 9, and was written as 8"),
    "unread": (parameter("queue", "8", '8" } } parameters { key: "wings" value { string_value: "2'), "parameter wings"),
    "idle GPU": (both(edit(CONFIG, "KIND_CPU", "KIND_GPU"), parameter("backend", "auto", "openvino")),
                 "KIND_GPU, and the backend openvino computes on the CPU"),
    "first GPU": (parameter("backend", "auto", "onnxruntime-cuda"), "KIND_CPU, and the backend onnxruntime-cuda compu"),
    "unlimited": (setting(rate_limit=2), "no rate_limiter, and dagan-rt.json has rate_limit 2"),
}  # fmt: skip


@pytest.mark.parametrize(("harm", "words"), WARNED.values(), ids=WARNED)
def test_what_will_bite_is_a_warning(
    repository: Path, harm: Break, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checking, "MUCH_WAITING", 500_000_000)
    harm(repository)
    assert cli.main(["triton", "check", str(repository)]) == 0
    printed = capsys.readouterr()
    assert any(words in line for line in printed.out.splitlines() if line.startswith("warning: ")), printed.out


@pytest.mark.parametrize(
    ("profile", "problems", "warnings"),
    [("1:8:32", 0, ""), ("1:4:8", 0, "batch is 32, and the engines"), ("2:4:32", 1, "")],
)
def test_engines_take_the_batches_that_are_driven(
    bundle: Bundle, tmp_path: Path, profile: str, problems: int, warnings: str
) -> None:
    with_engines(bundle, tmp_path / "bundle", profile)
    write_repository(
        Bundle.open(tmp_path / "bundle"), tmp_path / "out", ServingPlan(backend="tensorrt", instances="gpu")
    )
    checked = check(tmp_path / "out")
    assert len(checked.problems) == problems and all("a sequence may be alone" in it for it in checked.problems)
    assert len(checked.warnings) == bool(warnings) and all(warnings in it for it in checked.warnings)


def with_engines(bundle: Bundle, folder: Path, profile: str) -> None:
    """A copy of the bundle with a sidecar and engines, as far as anything reads that does not run them."""
    shutil.copytree(bundle.path, folder)
    files = bundle.manifest["files"]
    graphs = {name: BuiltGraph("fp32", files[f"{name}.onnx"]["sha256"], 3, 1) for name in bundle.graphs}
    engines = EngineSet("tensorrt", "10.13.0", ("8.9",), profile, "0123456789ab", False, 1.0, graphs)
    place = folder / "engines" / engines.key
    place.mkdir(parents=True)
    for name in graphs:
        (place / f"{name}.engine").write_bytes(b"old")
    (place / "engine.json").write_text(json.dumps(engines.to_dict()))
    write_manifest(folder, {key: value for key, value in bundle.manifest.items() if key != "files"})


def test_it_asks_for_its_package(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagan_rt.errors.importlib.import_module", _missing)
    with pytest.raises(InputError, match=r"checking a model repository needs .* pip install 'dagan-rt\[triton\]'"):
        check(good)


def _missing(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
