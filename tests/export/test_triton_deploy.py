"""What serves in containers: the image's command, compose, Kubernetes and KServe manifests, rules, and the README."""

from __future__ import annotations

import ast
import contextlib
import http.client
import json
import os
import platform
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dagan_rt._assets import asset
from dagan_rt.bundle import Bundle
from dagan_rt.cli import build_parser
from dagan_rt.export.__main__ import build_parser as export_parser
from dagan_rt.export.plan import read_serving
from dagan_rt.export.triton import write_repository
from dagan_rt.serving import server
from dagan_rt.serving.load import load_parser
from dagan_rt.serving.model import COUNTERS, OPEN
from dagan_rt.serving.protocol import OPTIONS
from dagan_rt.serving.repository import MARKER, Repository, ServingPlan

ROOT = Path(__file__).parents[2]
FOLDER = asset("export", "triton")
README = (FOLDER / "README.md").read_text(encoding="utf-8")
FILES = sorted(FOLDER.rglob("*.y*ml"))
# Of other projects: no schema of theirs can be had offline.
FOREIGN = ("monitoring.coreos.com/v1", "serving.kserve.io/v1alpha1", "serving.kserve.io/v1beta1")


def load(*parts: str) -> Any:
    """The only document of a file."""
    return yaml.safe_load((FOLDER.joinpath(*parts)).read_text(encoding="utf-8"))


def objects() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every Kubernetes object, with the name of its file."""
    for path in FILES:
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if "apiVersion" in document and document["kind"] != "Kustomization":
                yield path.relative_to(FOLDER).as_posix(), document


def the(kind: str, name: str = "dagan-rt") -> dict[str, Any]:
    """The object of this kind and name."""
    (found,) = [it for _, it in objects() if it["kind"] == kind and it["metadata"]["name"] == name]
    return found


def pod() -> dict[str, Any]:
    """The pod that the Deployment makes."""
    template: dict[str, Any] = the("Deployment")["spec"]["template"]
    return template


# ----------------------------------------------------------------------------------------------------------------------
# Kubernetes


@pytest.mark.parametrize("version", ["1.29", "1.34"])
def test_kubernetes_objects_are_what_the_schemas_say(version: str) -> None:
    checked = []
    for name, document in objects():
        if document["apiVersion"] not in FOREIGN:
            kubernetes_validate.validate(document, version, strict=True)
            checked.append(document["kind"])
        else:
            assert name.startswith(("kubernetes/monitoring/", "kserve/"))
    assert sorted(checked) == sorted(
        ["Deployment", "Service", "Service", "PersistentVolumeClaim", "PodDisruptionBudget", "NetworkPolicy",
         "HorizontalPodAutoscaler"]
    )  # fmt: skip


def test_the_gpu_patches_are_what_the_schemas_say() -> None:
    patched = {}
    for patch in load("kubernetes", "gpu", "kustomization.yaml")["patches"]:
        document = patched[patch["target"]["kind"]] = the(patch["target"]["kind"], patch["target"]["name"])
        for change in yaml.safe_load(patch["patch"]):
            *path, last = change["path"].strip("/").split("/")
            place: Any = document
            for step in path:
                place = place[int(step) if isinstance(place, list) else step]
            assert (last in place) == (change["op"] == "replace")
            place[last] = change["value"]
        kubernetes_validate.validate(document, "1.34", strict=True)
    (container,) = patched["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert _most_sequences(patched["HorizontalPodAutoscaler"]) == 0.75 * read_serving("triton-gpu").sequences
    assert _most_sequences(the("HorizontalPodAutoscaler")) == 0.75 * read_serving("triton-cpu").sequences


def _most_sequences(autoscaler: dict[str, Any]) -> int:
    metrics = {it["pods"]["metric"]["name"]: it["pods"]["target"] for it in autoscaler["spec"]["metrics"]}
    return int(metrics[OPEN]["averageValue"])


def test_kustomizations_name_every_file_once() -> None:
    for path in FOLDER.rglob("kustomization.yaml"):
        resources = yaml.safe_load(path.read_text(encoding="utf-8"))["resources"]
        manifests = {it.name for it in path.parent.glob("*.yaml")} - {path.name, "prometheus-adapter.yaml"}
        assert {name for name in resources if name.endswith(".yaml")} == manifests, path
        assert all((path.parent / name).exists() for name in resources), path
        assert len(resources) == len(set(resources))


def test_selectors_find_the_pods() -> None:
    labels = pod()["metadata"]["labels"].items()
    selectors = [
        the("Deployment")["spec"]["selector"]["matchLabels"],
        the("Service")["spec"]["selector"],
        the("Service", "dagan-rt-http")["spec"]["selector"],
        the("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        the("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        the("PodMonitor")["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector and selector.items() <= labels for selector in selectors)
    assert the("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == the("Deployment")["metadata"]["name"]
    (volume,) = [it for it in pod()["spec"]["volumes"] if it["name"] == "models"]
    assert volume["persistentVolumeClaim"] == {"claimName": the("PersistentVolumeClaim", "dagan-rt-models")
                                               ["metadata"]["name"], "readOnly": True}  # fmt: skip


def test_ports_are_the_same_everywhere() -> None:
    options = {name: server.run.__kwdefaults__[f"{name}_port"] for name in ("http", "grpc", "metrics")}
    script = dict(re.findall(r"(http|grpc|metrics)=\$\{\w+:-(\d+)\}", (FOLDER / "serve.sh").read_text()))
    assert {name: int(port) for name, port in script.items()} == options
    (container,) = pod()["spec"]["containers"]
    assert {it["name"]: it["containerPort"] for it in container["ports"]} == options
    ports = [port for name in ("dagan-rt", "dagan-rt-http") for port in the("Service", name)["spec"]["ports"]]
    assert {it["targetPort"]: it["port"] for it in ports} == {name: options[name] for name in ("http", "grpc")}
    named = {it["port"] for rule in the("NetworkPolicy")["spec"]["ingress"] for it in rule["ports"]}
    named |= {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    named |= {it["port"] for it in the("PodMonitor")["spec"]["podMetricsEndpoints"]}
    assert named == set(options)
    for service in (load("compose.yaml")["services"][name] for name in ("cpu", "gpu")):
        assert [int(it.rpartition(":")[2]) for it in service["ports"]] == list(options.values())
    (runtime,) = the("ServingRuntime", "dagan-rt-triton")["spec"]["containers"]
    assert [it["containerPort"] for it in runtime["ports"]] == [options["grpc"]]
    assert {runtime[it]["httpGet"]["port"] for it in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        options["http"]
    }
    (scraped,) = load("prometheus", "prometheus.yml")["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": [f"server:{options['metrics']}"]}]
    exposed = re.search(r"^EXPOSE (.+)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert exposed and [int(port) for port in exposed[1].split()] == list(options.values())


def test_nobody_but_this_machine_is_let_in_unasked() -> None:
    for service in load("compose.yaml")["services"].values():
        assert all(it.startswith(("127.0.0.1:", "${ADDRESS:-127.0.0.1}:")) for it in service["ports"])
    assert all(rule["from"] for rule in the("NetworkPolicy")["spec"]["ingress"])
    assert set(the("NetworkPolicy")["spec"]["policyTypes"]) == {"Ingress", "Egress"}


def test_containers_may_do_nothing_they_need_not() -> None:
    (deployed,) = pod()["spec"]["containers"]
    (served,) = the("ServingRuntime", "dagan-rt-triton")["spec"]["containers"]
    for container in (deployed, served):
        security = pod()["spec"]["securityContext"] | container["securityContext"]
        assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"] and security["capabilities"] == {"drop": ["ALL"]}
        writable = [it["mountPath"] for it in container["volumeMounts"] if not it.get("readOnly")]
        assert writable == ["/dev/shm", "/tmp"]  # the Python backend does not start without the second
        assert container["resources"]["limits"]["memory"]
    for service in (load("compose.yaml")["services"][name] for name in ("cpu", "gpu")):
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["tmpfs"] == ["/tmp"]
        assert service["volumes"][0]["read_only"] and service["deploy"]["resources"]["limits"]["memory"]


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def expressions() -> list[str]:
    """Everything that is asked of Prometheus, recorded names replaced by what they stand for."""
    (group,) = the("PrometheusRule")["spec"]["groups"]
    adapter = load("kubernetes", "monitoring", "prometheus-adapter.yaml")["rules"]["custom"]
    (metric,) = the("InferenceService")["spec"]["predictor"]["autoScaling"]["metrics"]
    asked = [rule["expr"] for rule in group["rules"]] + [rule["seriesQuery"] for rule in adapter]
    asked.append(metric["external"]["metric"]["query"])
    recorded = {rule["record"]: rule["expr"] for rule in group["rules"] if "record" in rule}
    for name, expression in recorded.items():
        asked = [it.replace(name, expression) for it in asked]
    return asked


def test_rules_ask_for_what_the_model_counts() -> None:
    names = {name for it in expressions() for name in re.findall(r"\b(?:\w+:)?dagan_\w+(?::\w+)?", it)}
    assert names and names <= {*COUNTERS, OPEN}
    rated = {name for it in expressions() for name in re.findall(r"rate\((\w+)", it)}
    assert rated == set(COUNTERS)  # all of them, and no gauge


def test_the_autoscaler_gets_its_metrics() -> None:
    adapter = load("kubernetes", "monitoring", "prometheus-adapter.yaml")["rules"]["custom"]
    asked = {it["pods"]["metric"]["name"] for it in the("HorizontalPodAutoscaler")["spec"]["metrics"]}
    assert asked == {rule["name"]["as"] for rule in adapter}


# ----------------------------------------------------------------------------------------------------------------------
# The image


def test_the_image_installs_what_there_is() -> None:
    dockerfile = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = set(re.findall(r'^        "([\w-]+)": ', setup, re.MULTILINE))
    asked = re.findall(r"(?:^ARG |--build-arg )EXTRAS=([\w,-]+)", dockerfile + README, re.MULTILINE)
    assert {"openvino", "torch,cuda"} <= set(asked)
    assert {name for it in asked for name in it.split(",")} <= extras
    (parts,) = re.findall(r"print\(asset\(([^)]*)\)\)", dockerfile)
    assert asset(*ast.literal_eval(f"({parts})")).samefile(FOLDER / "serve.sh")
    assert re.findall(r"^CMD (.+)$", dockerfile, re.MULTILINE) == ['["dagan-rt-serve"]']
    assert "/usr/local/bin/dagan-rt-serve" in dockerfile
    commands = [load("compose.yaml")["services"][name]["command"] for name in ("cpu", "gpu")]
    commands += [it["args"] for it in the("ServingRuntime", "dagan-rt-triton")["spec"]["containers"]]
    assert commands == [["dagan-rt-serve"]] * 3
    assert "args" not in pod()["spec"]["containers"][0]


def test_no_registry_is_named() -> None:
    hosts = re.compile("|".join(map(re.escape, ("nvcr" + ".io", "docker" + ".io", "quay" + ".io", "ghcr" + ".io"))))
    for path in FOLDER.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not hosts.search(text), path
            for image in re.findall(r"^\s*(?:image:|FROM) (\S+)", text, re.MULTILINE):
                assert "." not in re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", image).split("/")[0], (path, image)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder that is first on PATH; `imitate` puts programs into it."""
    folder = tmp_path / "programs"
    folder.mkdir()
    return folder


def imitate(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def run_script(programs: Path, repository: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """Return the exit code, and what was printed: to files, since the watching process may outlive the server."""
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "MODEL_REPOSITORY": str(repository), "WATCH_SECONDS": "0.1"} | variables
    with open(programs / "out", "w+") as out, open(programs / "err", "w+") as err:
        command = ["sh", str(FOLDER / "serve.sh"), *arguments]
        code = subprocess.run(command, env=environment, stdout=out, stderr=err, timeout=20).returncode
    return code, (programs / "out").read_text(), (programs / "err").read_text()


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the marker of a repository alone, which asks the server for a rate limit."""
    folder = tmp_path_factory.mktemp("marked")
    marker = Repository(folder, ServingPlan(rate_limit=3), ("reenact",), "dagan", 64, {}, "0" * 64, {}).to_dict()
    (folder / MARKER).write_text(json.dumps(marker, indent=1))
    return folder


def test_the_image_starts_the_server_as_serve_does(programs: Path, marked: Path) -> None:
    imitate(programs, "tritonserver", 'printf "%s\\n" "$@"')
    code, out, _ = run_script(programs, marked, "--log-verbose=1", GRPC_PORT="9000")
    options = dict(line.split("=", 1) for line in out.splitlines())
    key = options["--http-restricted-api"].rpartition("=")[2]
    assert code == 0 and re.fullmatch("[0-9a-f]{64}", key)
    closed = f"{server.CLOSED},{server.CLOSED_TO_OTHERS}:{server.KEY}={key}"
    limit = server._rate_limit(marked)
    assert options == {
        "--model-repository": str(marked), "--http-port": "8000", "--grpc-port": "9000", "--metrics-port": "8002",
        "--exit-timeout-secs": "5", "--http-restricted-api": closed, "--grpc-restricted-protocol": closed,
        "--log-verbose": "1", **dict(zip(limit[::2], limit[1::2], strict=True)),
    }  # fmt: skip
    assert options["--rate-limit-resource"] == "dagan_rt:3"
    _, again, _ = run_script(programs, marked)
    assert key not in again


def test_the_image_serves_no_other_folder(programs: Path, tmp_path: Path) -> None:
    imitate(programs, "tritonserver", "echo started")
    assert run_script(programs, tmp_path) == (
        2, "",
        f"dagan-rt-serve: {tmp_path} must be a model repository that dagan-rt wrote: it holds no dagan-rt.json\n",
    )  # fmt: skip


@pytest.mark.parametrize("instances", [0, 1])
def test_a_lost_instance_ends_the_server(programs: Path, marked: Path, instances: int) -> None:
    imitate(programs, "tritonserver", "exec sleep 0.6")
    imitate(programs, "curl", f"yes 'dagan_sequences_open{{instance=\"x\"}} 0' | head -n {instances}")
    code, _, err = run_script(programs, marked)
    assert code == (-signal.SIGTERM if instances else 0)
    assert ("the process of a model instance is gone" in err) == bool(instances)


@pytest.mark.parametrize(("left", "sleeps"), [("600", 3), ("10", 2)])
def test_draining_waits_for_open_sequences(programs: Path, left: str, sleeps: int) -> None:
    imitate(programs, "sleep", f'echo "$1" >> {programs}/slept')
    metrics = "dagan_frames_driven{} 7\\ndagan_sequences_open{} 0\\ndagan_sequences_open{} "
    imitate(programs, "curl", f'printf "{metrics}%d\\n" $(( $(wc -l < {programs}/slept) < 3 ))')
    code, out, err = run_script(programs, programs, "drain", DRAIN_SECONDS=left)
    assert (code, out, err) == (0, "", "")
    assert (programs / "slept").read_text() == "5\n" * sleeps


def test_pods_drain_before_they_end() -> None:
    (deployed,) = pod()["spec"]["containers"]
    (served,) = the("ServingRuntime", "dagan-rt-triton")["spec"]["containers"]
    for container in (deployed, served):
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["dagan-rt-serve", "drain"]
    seconds = re.search(r"DRAIN_SECONDS:-(\d+)", (FOLDER / "serve.sh").read_text())
    assert seconds
    for spec in (pod()["spec"], the("InferenceService")["spec"]["predictor"]):
        assert spec["terminationGracePeriodSeconds"] == int(seconds[1]) + 30


@pytest.mark.slow
def test_the_real_server_starts_closed_and_ends_with_its_model(
    programs: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        pytest.skip("tritonserver runs on Linux x86-64")
    repository = write_repository(Bundle.open(tiny_bundle), tmp_path / "repository", ServingPlan(threads=1)).path
    python = os.environ.get("DAGAN_RT_TRITON_PYTHON") or str(ROOT / ".venv-triton" / "bin" / "python")
    real = server.find(python).assemble(programs / "linked", {})
    imitate(programs, "tritonserver", f'exec {shlex.join(real)} "$@"')
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(socket.socket()) for _ in range(3)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        http_port, *others = [listener.getsockname()[1] for listener in listeners]
    ports = dict(zip(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"), map(str, (http_port, *others)), strict=True))
    environment = os.environ | ports | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "MODEL_REPOSITORY": str(repository),
        "WATCH_SECONDS": "0.5",
    }  # fmt: skip
    prefix = f"dagan-rt-{secrets.token_hex(6)}-"
    options = [f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")]
    options.append(f"--backend-config=python,shm-region-prefix-name={prefix}")
    script = ["sh", str(FOLDER / "serve.sh"), *options]
    started = subprocess.Popen(script, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while _ask(http_port, "GET", "/v2/health/ready")[0] != 200:
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        for path in ("/v2/repository/index", "/v2/models/reenact/trace/setting", "/v2/logging"):
            status, text = _ask(http_port, "POST", path)
            assert status != 200 and "restricted" in text
        assert _ask(http_port, "GET", "/v2/models/reenact/config")[0] == 200
        children = ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(started.pid)]
        listing = subprocess.run(children, capture_output=True, text=True, check=True).stdout.splitlines()
        (model,) = [line.split()[0] for line in listing if "triton_python_backend_stub" in line]
        os.kill(int(model), signal.SIGKILL)
        _, said = started.communicate(timeout=60)
        assert "the process of a model instance is gone" in said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        for segment in Path("/dev/shm").glob(f"{prefix}*"):
            segment.unlink()


def _ask(port: int, method: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except OSError:
        return 0, ""
    finally:
        connection.close()


# ----------------------------------------------------------------------------------------------------------------------
# The README


def test_the_readme_says_where_its_code_lives() -> None:
    assert "`dagan_rt/serving/`" in README.splitlines()[0]


def test_the_readme_names_what_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (FOLDER / target).exists(), target
    for name in re.findall(r"\b(?:export|kubernetes|kserve|base|monitoring)/[\w./-]*[\w/]", README):
        home = next(it for it in (ROOT, FOLDER, FOLDER / "kubernetes") if (it / name.split("/")[0]).exists())
        assert (home / name).exists(), name
    for name in re.findall(r"\bdagan_rt/[\w./*]+[\w/]", README):
        assert list(ROOT.glob(name)), name
    recipes = set(re.findall(r"\btriton-(?:cpu|gpus?|graphs)\b", README))
    assert recipes == {path.stem for path in asset("export", "recipes").glob("triton-*.toml")}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE):
        assert f"\n{''.join(target)}:" in makefile


def test_the_readme_commands_parse() -> None:
    lines = [line.partition(" #")[0] for block in re.findall(r"```\n(.*?)```", README, re.DOTALL)
             for line in block.splitlines()]  # fmt: skip
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("dagan-rt ")]
    commands.append(["triton", *shlex.split(re.search(r"`dagan-rt triton (write [^`]+)`", README)[1])])  # type: ignore[index]
    assert len(commands) == 4
    for command in commands:
        build_parser().parse_args(command)
    (export,) = [shlex.split(line)[3:] for line in lines if line.startswith("python -m dagan_rt.export")]
    export_parser().parse_args(export)
    (load_,) = re.findall(r"`python -m dagan_rt.serving.load ([^`]+)`", README)
    load_parser().parse_args(shlex.split(load_))


def rows(title: str) -> list[list[str]]:
    """The cells of the table under a title of the README, without its head."""
    (part,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_readme_has_the_settings_as_they_are() -> None:
    for name, default, _ in rows("Sizing"):
        assert default == str(getattr(ServingPlan(), name.strip("`")))
    assert {row[0].strip("`") for row in rows("Metrics")} == {*COUNTERS, OPEN}
    assert all(text.lower() == COUNTERS.get(name.strip("`"), text).lower() for name, text in rows("Metrics"))
    assert [name for name in OPTIONS if f"`{name}`" not in README] == []


def test_the_readme_quotes_what_is_said() -> None:
    said = (FOLDER / "serve.sh").read_text(encoding="utf-8")
    for path in (ROOT / "dagan_rt" / "serving").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        spoken = (node for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.Constant)))
        said += "\n".join(ast.unparse(node) for node in spoken if id(node) not in documented)
    of_triton = {"This API is restricted", "Failed to create temporary directory"}
    quoted = [row[0].strip("`") for row in rows("When something is wrong") if row[0].startswith("`")]
    assert quoted and [it for it in quoted if it not in said and it not in of_triton] == []
