"""Model repositories: what is written into them, and that they appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from dagan_rt import cli, export
from dagan_rt._assets import asset
from dagan_rt.bundle import Bundle, digest
from dagan_rt.commands import triton as command
from dagan_rt.errors import InputError
from dagan_rt.export.__main__ import main
from dagan_rt.export.plan import Plan, read_plan, read_serving
from dagan_rt.export.triton import check, export_repository, write_repository
from dagan_rt.export.triton_config import Enum, to_pbtxt
from dagan_rt.serving import protocol
from dagan_rt.serving.check import check as check_repository
from dagan_rt.serving.protocol import Settings
from dagan_rt.serving.repository import Repository, ServingPlan

from ..test_staging import fill


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """fomm, 64 pixels, 10 key points; graphs that are no ONNX, as nothing here runs them."""
    (tmp_path / "bundle").mkdir()
    fill(tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def config(repository: Path, name: str = "reenact") -> Any:
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_lies_in_it(bundle: Bundle, tmp_path: Path) -> None:
    written = write_repository(bundle, tmp_path / "out", ServingPlan(stream=True, version=2))
    files = ["manifest.json", *bundle.manifest["files"]]
    models = ("reenact", "reenact_stream")
    expected = [f"{model}/2/bundle/{file}" for model in models for file in files]
    expected += [f"{model}/{file}" for model in models for file in ("config.pbtxt", "2/model.py")]
    assert names(tmp_path / "out") == sorted(["dagan-rt.json", *expected])
    for model in models:
        assert Bundle.open(tmp_path / "out" / model / "2" / "bundle").manifest == bundle.manifest
        line = (tmp_path / "out" / model / "2" / "model.py").read_text()
        assert line.split("  #")[0] == "from dagan_rt.serving.model import TritonPythonModel"
    assert written == Repository.open(tmp_path / "out") and written.models == models
    assert written.bundle_sha256 == digest(tmp_path / "bundle" / "manifest.json")["sha256"]
    # Both models share a file, and the bundle that was given stays apart.
    copies = [tmp_path / "out" / model / "2" / "bundle" / "motion.onnx" for model in models]
    assert copies[0].samefile(copies[1]) and not copies[0].samefile(bundle.path / "motion.onnx")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_the_tensors_are_those_of_the_protocol(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "out", ServingPlan(stream=True))
    kinds = {"TYPE_UINT8": 2, "TYPE_STRING": 13, "TYPE_FP32": 11, "TYPE_BOOL": 1}  # model_config.proto

    def declared(side: Any) -> dict[str, tuple[int, list[int]]]:
        return {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in side}

    one, many = config(tmp_path / "out"), config(tmp_path / "out", "reenact_stream")
    byte, text, real, truth = (kinds[name] for name in ("TYPE_UINT8", "TYPE_STRING", "TYPE_FP32", "TYPE_BOOL"))
    assert declared(one.input) == {
        "frame": (byte, [64, 64, 3]), "source": (byte, [64, 64, 3]), "frame_encoded": (text, [1]),
        "source_encoded": (text, [1]), "end": (truth, [1]),
    }  # fmt: skip
    assert declared(one.output) == {
        "image": (byte, [64, 64, 3]), "image_encoded": (text, [1]), "kp_value": (real, [10, 2]),
        "kp_jacobian": (real, [10, 2, 2]),
    }  # fmt: skip
    assert declared(many.input) == {
        "frame": (byte, [-1, 64, 64, 3]), "source": (byte, [1, 64, 64, 3]), "frame_encoded": (text, [-1]),
        "source_encoded": (text, [1]), "end": (truth, [1]),
    }  # fmt: skip
    assert declared(many.output) == {
        "image": (byte, [1, 64, 64, 3]), "image_encoded": (text, [1]), "kp_value": (real, [1, 10, 2]),
        "kp_jacobian": (real, [1, 10, 2, 2]),
    }  # fmt: skip
    assert set(declared(one.input)) == {
        protocol.FRAME, protocol.FRAME_ENCODED, protocol.SOURCE, protocol.SOURCE_ENCODED, protocol.END,
    }  # fmt: skip
    assert all(tensor.optional and tensor.allow_ragged_batch for tensor in one.input)
    assert all(tensor.optional and not tensor.allow_ragged_batch for tensor in many.input)


def test_how_it_serves(bundle: Bundle, tmp_path: Path) -> None:
    plan = ServingPlan(stream=True, sequences=500, idle=2.5, batch=7, queue=3, backend="onnxruntime", most_pixels=4096)
    write_repository(bundle, tmp_path / "out", plan)
    one, many = config(tmp_path / "out"), config(tmp_path / "out", "reenact_stream")
    for name, found in (("reenact", one), ("reenact_stream", many)):
        assert found.name == name and found.backend == "python" and not found.response_cache.enable
        oldest = found.sequence_batching.oldest
        assert found.sequence_batching.max_sequence_idle_microseconds == 7_500_000
        assert oldest.max_candidate_sequences == 16384 and oldest.max_queue_delay_microseconds == 0
        assert not oldest.preserve_ordering and not found.sequence_batching.state
        parameters = {key: entry.string_value for key, entry in found.parameters.items()}
        assert Settings.from_parameters(parameters) == plan.settings
        about = {"variant": "fomm", "size": "64", "precision": "fp32",
                 "bundle_sha256": digest(bundle.path / "manifest.json")["sha256"]}  # fmt: skip
        assert parameters == plan.settings.to_parameters() | about
        assert found.version_policy.latest.num_versions == 1
        (warm_up,) = found.model_warmup
        assert list(warm_up.inputs) == ["end"] and warm_up.inputs["end"].zero_data
    assert (one.max_batch_size, many.max_batch_size) == (7, 0)
    assert [found.model_warmup[0].batch_size for found in (one, many)] == [1, 0]
    assert [found.model_transaction_policy.decoupled for found in (one, many)] == [False, True]
    assert [one.instance_group[0].kind, one.instance_group[0].count] == [2, 1]  # KIND_CPU


def test_without_a_warm_up(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "out", ServingPlan(warm_up=False))
    assert not config(tmp_path / "out").model_warmup


@pytest.mark.parametrize(("instances", "gpus"), [("gpu", []), ("gpu:0", [0]), ("gpu:2,0", [2, 0])])
def test_instances_on_gpus(bundle: Bundle, tmp_path: Path, instances: str, gpus: list[int]) -> None:
    write_repository(bundle, tmp_path / "out", ServingPlan(instances=instances, count=3, rate_limit=2))
    (group,) = config(tmp_path / "out").instance_group
    assert (group.kind, group.count, list(group.gpus)) == (1, 3, gpus)  # KIND_GPU
    (resource,) = group.rate_limiter.resources
    assert resource.name == "dagan_rt" and resource.count == 1 and not getattr(resource, "global")
    assert "--rate-limit-resource=dagan_rt:2" in (tmp_path / "out" / "reenact" / "config.pbtxt").read_text()


def test_a_person_can_read_it(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "out", ServingPlan(stream=True, rate_limit=2))
    for name in ("reenact", "reenact_stream"):
        lines = (tmp_path / "out" / name / "config.pbtxt").read_text().splitlines()
        assert max(map(len, lines)) <= 120 and len(lines) < 70
        assert "Triton's sequence batcher takes no queue policy" in "\n".join(lines)


def test_text_of_any_kind_comes_back() -> None:
    """The parser of Protocol Buffers itself reads what was written."""
    strange = 'a "b" \\ c\n\td #é  two  spaces }'
    message = {
        "# a comment": None, "name": strange, "max_batch_size": 3,
        "parameters": [{"key": strange, "value": {"string_value": strange * 9}}],
        "instance_group": [{"kind": Enum("KIND_GPU"), "gpus": [0, 1], "# within": None, "count": 2}],
        "response_cache": {"enable": True},
    }  # fmt: skip
    found = text_format.Parse(to_pbtxt(message), model_config_pb2.ModelConfig())
    assert found.name == strange and found.parameters[strange].string_value == strange * 9
    assert list(found.instance_group[0].gpus) == [0, 1] and found.instance_group[0].kind == 1
    assert found.max_batch_size == 3 and found.response_cache.enable


# ----------------------------------------------------------------------------------------------------------------------
# Whole or not at all


def test_what_cannot_be_served_is_not_written(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be served: it holds no tensorrt engines"):
        write_repository(bundle, tmp_path / "out", ServingPlan(backend="tensorrt"))
    assert sorted(os.listdir(tmp_path)) == ["bundle"]


def test_a_bundle_that_changed_since_it_was_opened(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / "motion.onnx").write_bytes(b"new")
    with pytest.raises(InputError, match="motion.onnx must have SHA-256"):
        write_repository(bundle, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["bundle"]


def test_only_force_replaces_and_only_what_is_ours(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_repository(bundle, out)
    with pytest.raises(InputError, match="out is a model repository already: choose another name, or .* --force"):
        write_repository(bundle, out)
    write_repository(bundle, out, ServingPlan(sequences=2), force=True)
    assert Repository.open(out).plan.sequences == 2
    (out / "dagan-rt.json").unlink()
    with pytest.raises(InputError, match="is not a bundle, nor a model repository of dagan-rt"):
        write_repository(bundle, out, force=True)
    assert (out / "reenact" / "config.pbtxt").is_file() and sorted(os.listdir(tmp_path)) == ["bundle", "out"]
    shutil.copytree(bundle.path, tmp_path / "older")
    write_repository(bundle, tmp_path / "older", force=True)
    assert Repository.open(tmp_path / "older").models == ("reenact",)


def exported(model: Any, out: Path, plan: Plan, **options: Any) -> tuple[Bundle, Any]:
    """Stands for an export: minutes of work that other tests do."""
    from dagan_rt.staging import staged

    with staged(out) as folder:
        fill(folder)
    if plan.opset == 18:
        raise InputError("a graph differs from PyTorch")
    return Bundle.open(out), "the report"


@pytest.mark.parametrize("layout", ["stateful", "graphs", "both"])
def test_an_export_ends_in_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.setattr(export, "export", exported)
    plan = Plan(targets=("triton",), batch="1")
    written, report = export_repository(None, tmp_path / "out", plan, ServingPlan(layout=layout))  # type: ignore[arg-type]
    assert report == "the report" and written == Repository.open(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert set(os.listdir(tmp_path / "out")) == {"dagan-rt.json", *written.models}  # and no bundle beside the models
    assert ("reenact" in written.models, "dagan_drive" in written.models) == (layout != "graphs", layout != "stateful")
    assert check_repository(tmp_path / "out").problems == []


def test_an_export_that_fails_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "export", exported)
    export_repository(None, tmp_path / "out", Plan(targets=("triton",)))  # type: ignore[arg-type]
    before = (tmp_path / "out" / "dagan-rt.json").read_bytes()
    with pytest.raises(InputError, match="differs from PyTorch"):
        export_repository(None, tmp_path / "out", Plan(opset=18), force=True)  # type: ignore[arg-type]
    assert (tmp_path / "out" / "dagan-rt.json").read_bytes() == before and os.listdir(tmp_path) == ["out"]


# ----------------------------------------------------------------------------------------------------------------------
# The commands


@pytest.mark.parametrize(
    ("plan", "serving", "words"),
    [
        ({}, {"backend": "tensorrt"}, "the backend tensorrt needs engines: name the target tensorrt beside triton"),
        ({"torch_weights": False}, {"backend": "torch-cuda"}, "the backend torch-cuda needs the weights"),
        ({"batch": "4"}, {}, "a model repository animates single faces: it cannot be made of batches of 4"),
        ({"only": ("attention",)}, {}, "it cannot be made of parts alone (--only)"),
        ({}, {"backend": "warp"}, "backend must be auto or one of"),
    ],
)
def test_what_an_export_could_not_serve_is_told_before(plan: Any, serving: Any, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        check(Plan(targets=("triton",), **plan), ServingPlan(**serving))
    check(Plan(targets=("triton", "tensorrt")), ServingPlan(backend="tensorrt"))


@pytest.mark.parametrize("path", sorted(asset("export", "recipes").glob("triton-*.toml")), ids=lambda path: path.stem)
def test_recipes_name_what_can_be_served(path: Path, bundle: Bundle, tmp_path: Path) -> None:
    plan, serving = read_plan(path.stem), read_serving(path.stem)
    check(plan, serving)
    assert plan.repository and serving != ServingPlan()
    write_repository(bundle, tmp_path / "out", serving)
    checked = check_repository(tmp_path / "out")
    assert (checked.problems, checked.warnings) == ([], [])


def test_wrong_tables_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.toml"
    for text, words in (
        ("[triton]\nwings = 2", "mine.toml: triton.wings is not a known key; expected one of backend, threads"),
        ("[triton]\nsequences = 0", "mine.toml: sequences must be 1 to 4096, got 0"),
        ("[triton]\nsequences = '9'", "mine.toml: triton.sequences must be int, got str '9'"),
        ("triton = 3", "mine.toml: [triton] must be a table, got int"),
        ("[triton]\nbackend = 'tensorrt'", "the backend tensorrt needs engines"),
    ):
        recipe.write_text('targets = ["triton"]\n' * ("[" in text) + text)
        target = [] if "[" in text else ["--target", "triton"]
        arguments = ["--checkpoint", "x", "--out", str(tmp_path / "out"), "--recipe", str(recipe), *target]
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(InputError, match="^triton-gpu, changed by options: queue must be 1 to 1024, got 0"):
        read_serving("triton-gpu", {"queue": 0})


def test_a_rebuild_makes_no_repository(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rebuild", str(bundle.path), "--target", "triton"]) == 2
    assert "--target triton cannot be used with --rebuild: run dagan-rt triton write" in capsys.readouterr().err


def test_every_setting_is_an_option(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed: dict[str, Any] = {
        "layout": "both", "instances": "gpu:1", "count": 2, "version": 5, "backend": "onnxruntime", "threads": 3,
        "sequences": 9, "queue": 4, "batch": 6, "deadline": 0.5, "idle": 9.5, "most_pixels": 999, "rate_limit": 1,
        "timeout": 2.5, "stream": True, "warm_up": False,
    }  # fmt: skip
    assert set(changed) == set(ServingPlan.__dataclass_fields__) == {*command.OPTIONS, *command.SWITCHES}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items() if name in command.OPTIONS]
    arguments = ["triton", "write", str(bundle.path), "--out", str(tmp_path / "out"), *options]
    assert cli.main([*arguments, "--stream", "--no-warm-up", "--recipe", "triton-gpu"]) == 0
    written = Repository.open(tmp_path / "out")
    assert written.plan == ServingPlan(**changed)
    printed = capsys.readouterr().out
    assert f"dagan-rt triton check {tmp_path / 'out'}\n" in printed and "fomm, 64 × 64" in printed
    assert cli.main([*arguments, "--no-stream"]) == 2
    assert "out is a model repository already" in capsys.readouterr().err
    assert cli.main([*arguments[:5], "--force", "--recipe", "triton-gpus"]) == 0
    assert Repository.open(tmp_path / "out").plan == read_serving("triton-gpus")
    marker = json.loads((tmp_path / "out" / "dagan-rt.json").read_text())
    assert marker["settings"]["instances"] == "gpu" and marker["precision"]["motion"] == "fp32"
