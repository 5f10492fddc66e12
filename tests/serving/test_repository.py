"""How a repository serves, and the marker that tells it."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dagan_rt import backends
from dagan_rt.bundle import Bundle
from dagan_rt.errors import InputError
from dagan_rt.serving.protocol import Settings
from dagan_rt.serving.repository import LAYOUTS, Repository, ServingPlan, is_repository, outside_bundles, unservable

from ..test_staging import fill

MARKER: dict[str, Any] = {
    "format": "dagan-rt model repository", "version": 1, "layout": "stateful", "models": ["reenact"],
    "variant": "fomm", "size": 64, "precision": {"source": "fp32"}, "bundle_sha256": "0f" * 32,
    "settings": {"layout": "stateful", "sequences": 3, "idle": 5, "instances": "gpu:2,0"},
    "files": {"reenact/1/model.py": {"bytes": 7, "sha256": "1e" * 32}},
}  # fmt: skip


def test_a_plan_holds_what_the_model_reads() -> None:
    plan = ServingPlan(sequences=3, deadline=0.01, backend="openvino", layout="both", stream=True)
    assert plan.settings == Settings(backend="openvino", sequences=3, deadline=0.01)
    assert type(plan.settings) is Settings  # its parameters are those of the model alone
    assert {entry.name for entry in fields(Settings)} < {entry.name for entry in fields(ServingPlan)}
    assert Settings.from_parameters(plan.settings.to_parameters()) == plan.settings
    assert [ServingPlan(layout=layout).stateful for layout in LAYOUTS] == [True, False, True]


@pytest.mark.parametrize(
    ("instances", "on_gpus", "gpus"),
    [("cpu", False, ()), ("gpu", True, ()), ("gpu:0", True, (0,)), ("gpu:3,1,12", True, (3, 1, 12))],
)
def test_where_instances_go(instances: str, on_gpus: bool, gpus: tuple[int, ...]) -> None:
    plan = ServingPlan(instances=instances)
    assert (plan.on_gpus, plan.gpus) == (on_gpus, gpus)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": "python"}, "layout must be one of stateful, graphs, both, got 'python'"),
        *(({"instances": text}, f"instances must be cpu, gpu (every GPU) or gpu:0,1 (these), got {text!r}")
          for text in ("", "GPU", "gpu:", "gpu:0,", "gpu:-1", "gpu:1.5", "cpu:0", "gpu:0 1", "gpu\n")),
        *(({"instances": text}, f"each GPU once, 0 to 63, got {text!r}") for text in ("gpu:1,1", "gpu:64", "gpu:0,00")),
        ({"count": 0}, "count must be 1 to 64, got 0"),
        ({"version": 0}, "version must be 1 to"),
        ({"rate_limit": 1025}, "rate_limit must be 0 to 1024, got 1025"),
        ({"timeout": 0.0}, "timeout must be 0.001 to 3600, got 0.0"),
        ({"stream": True, "layout": "graphs"}, "stream is for the layout stateful or both"),
        ({"backend": "openvino", "layout": "graphs"}, "backend of the layout graphs must be auto, onnxruntime"),
        ({"sequences": 0}, "sequences must be 1 to 4096, got 0"),
        ({"idle": float("nan")}, "idle must be 0.1 to 86400, got nan"),
    ],
)  # fmt: skip
def test_plans_that_are_none(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        ServingPlan(**change)


def test_the_marker_there_and_back(tmp_path: Path) -> None:
    (tmp_path / "dagan-rt.json").write_text(json.dumps(MARKER))
    found = Repository.open(tmp_path)
    assert found.plan == ServingPlan(sequences=3, idle=5.0, instances="gpu:2,0") and found.stateful == ("reenact",)
    assert (found.variant, found.size, found.models) == ("fomm", 64, ("reenact",)) and found.path == tmp_path
    whole = {**MARKER, "settings": found.plan.to_dict()}
    assert found.to_dict() == whole
    (tmp_path / "dagan-rt.json").write_text(json.dumps(whole))
    assert Repository.open(tmp_path) == found


def test_a_repository_of_any_version_is_one(tmp_path: Path) -> None:
    assert not is_repository(tmp_path) and not is_repository(tmp_path / "nothing")
    cases = {
        "{}": False, "[" * 100_000: False, "\0": False, json.dumps(MARKER): True,
        json.dumps(MARKER | {"version": 2}): True, json.dumps(MARKER | {"format": 1}): False,
    }  # fmt: skip
    for text, ours in cases.items():
        (tmp_path / "dagan-rt.json").write_text(text)
        assert is_repository(tmp_path) == ours, text[:80]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "a//b", "a\\b", "C:/x", "a/..", "..", ".", "a/\n", ""])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    entry = {"bytes": 1, "sha256": "1e" * 32}
    (tmp_path / "dagan-rt.json").write_text(json.dumps(MARKER | {"files": {name: entry}}))
    with pytest.raises(InputError, match="plain relative names inside the repository"):
        Repository.open(tmp_path)


def test_the_marker_has_the_files_that_nothing_else_has(tmp_path: Path) -> None:
    for name in (
        "a/config.pbtxt", "a/1/model.py", "a/1/bundle/x.onnx", "a/warmup/bundle", "b/2/model.onnx", "b/2/.keep",
        "b/2/deep/config.pbtxt", "c/1/x",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = ["a/1/model.py", "a/warmup/bundle", "b/2/.keep", "b/2/deep/config.pbtxt", "b/2/model.onnx"]
    assert outside_bundles(tmp_path, ["a", "b"]) == expected


def test_what_no_machine_could_serve(tmp_path: Path) -> None:
    fill(tmp_path)
    bundle = Bundle.open(tmp_path)
    reasons = {name: unservable(bundle, name) for name in ("auto", *backends.names())}
    assert {name for name, reason in reasons.items() if reason is None} == {
        "auto", "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "openvino",
    }  # fmt: skip
    assert "holds no tensorrt-rtx engines: export it with --target tensorrt-rtx" in str(reasons["tensorrt-rtx"])
    assert "holds no weights for the backend torch-cuda" in str(reasons["torch-cuda"])
    assert "backend must be auto or one of tensorrt, " in str(unservable(bundle, "warp"))
    part = replace(bundle, graphs={"motion": bundle.graphs["motion"]})
    assert "it was exported with --only" in str(unservable(part, "auto"))
