"""`Server`: what it finds, starts, says of failures, and leaves behind: nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dagan_rt.errors import InputError
from dagan_rt.serving import server as module
from dagan_rt.serving.server import Installation, Server, find

ROOT = Path(__file__).resolve().parents[2]


def segments(prefix: str) -> list[str]:
    """Of one server; others may come and go meanwhile."""
    assert re.match(r"dagan-rt-\w{12}-", prefix)
    return [name for name in os.listdir("/dev/shm") if name.startswith(prefix[:22])]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    late = time.monotonic() + seconds
    while not condition() and time.monotonic() < late:
        time.sleep(0.02)
    return condition()


def copied(repository: Path, folder: Path, *, models: tuple[str, ...] = ("reenact",)) -> Path:
    """Some models of a repository, to break."""
    for name in models:
        shutil.copytree(repository / name, folder / name)
    return folder


# ---- what is found ----


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a good environment would say of itself; a test spoils it."""
    packages = tmp_path / "site-packages"
    root = packages / "pytriton" / "tritonserver"
    backend = root / "backends" / "python"
    stubs = [root / "python_backend_stubs" / version / "triton_python_backend_stub" for version in ("3.9", "3.11")]
    for path in (*stubs, backend / "libtriton_python.so", backend / "triton_python_backend_utils.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.parent.name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").touch()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libpython3.11.so.1.0").touch()
    said = {
        "bin": str(tmp_path / "bin"), "version": "3.11", "numpy": "1.26.4", "dagan_rt": "here",
        "pytriton": str(packages / "pytriton"), "libpython": str(tmp_path / "lib" / "libpython3.11.so.1.0"),
    }  # fmt: skip
    monkeypatch.setattr(module, "_facts", lambda python: said)
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "linux")
    return said


def test_a_server_out_of_the_package(facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/other")
    (tmp_path / "folder").mkdir()
    (tmp_path / "extra").mkdir()
    found = find("python")
    command = found.assemble(tmp_path / "folder", {"extra": tmp_path / "extra"})
    assert f"PATH={tmp_path / 'bin'}:/bin" in command
    libraries = tmp_path / "folder" / "libraries"
    packaged = tmp_path / "site-packages" / "nvidia_pytriton.libs"
    assert f"LD_LIBRARY_PATH={libraries}:/other" in command  # no such folder in the imitation: it is not searched
    packaged.mkdir()
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    assert f"LD_LIBRARY_PATH={packaged}:{libraries}:/other" in found.assemble(tmp_path / "folder", {})
    assert [it.name for it in libraries.iterdir()] == ["libpython3.11.so.1.0"]  # and nothing else that lies beside it
    backend = tmp_path / "folder" / "backends" / "python"
    assert (backend / "triton_python_backend_stub").read_text() == "3.11"
    assert {it.name for it in backend.parent.iterdir()} == {"python"}
    assert command[-2:] == ["--backend-directory", str(tmp_path / "folder" / "backends")]
    assert command[-3].endswith("pytriton/tritonserver/bin/tritonserver")


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("version", "3.14", "serves models in Python 3.9, 3.11, python is 3.14"),
        ("numpy", "2.1.0", r"needs numpy < 2, python has numpy 2\.1\.0"),
        ("numpy", None, "needs numpy < 2, python has none"),
        ("libpython", None, r"without a shared libpython3\.11\.so\.1\.0.*apt-get install libpython3\.11"),
        ("bin", "elsewhere", "beside a python3"),
        ("dagan_rt", None, "does not have dagan-rt"),
    ],
)
def test_an_environment_that_cannot_serve(facts: dict[str, Any], fact: str, value: Any, message: str):
    facts[fact] = value
    with pytest.raises(InputError, match=message):
        find("python")


def test_the_server_of_an_image_or_none(facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    facts |= {"pytriton": None, "numpy": "2.4.0"}  # the image knows which numpy it serves
    monkeypatch.setenv("PATH", str(tmp_path / "opt" / "bin"))
    monkeypatch.setattr(module, "IMAGE_SERVER", tmp_path / "none")
    with pytest.raises(InputError, match=r"does not have nvidia-pytriton, and there is none on PATH: run make serve"):
        find("python")
    program = tmp_path / "opt" / "bin" / "tritonserver"
    (tmp_path / "opt" / "backends" / "onnxruntime").mkdir(parents=True)
    program.parent.mkdir()
    program.touch(mode=0o755)
    found = find("python")
    assert found == Installation(program, "python", facts["bin"])
    (tmp_path / "folder").mkdir()
    assert found.assemble(tmp_path / "folder", {})[-1] == str(program)  # with the backends that it has
    found.assemble(tmp_path / "folder", {"extra": tmp_path})
    assert {it.name for it in (tmp_path / "folder" / "backends").iterdir()} == {"onnxruntime", "extra"}


def test_other_machines_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.platform, "machine", lambda: "arm64")
    with pytest.raises(InputError, match="tritonserver runs on Linux x86-64, this is .* arm64"):
        find()


def test_the_interpreter_says_what_it_has():
    facts = module._facts(sys.executable)
    assert facts["version"] == ".".join(map(str, sys.version_info[:2]))
    assert Path(facts["dagan_rt"]) == ROOT / "dagan_rt"
    for wrong in ("/bin/ls", "/no/such/python"):
        with pytest.raises(InputError, match=f"{wrong} must be a Python interpreter"):
            module._facts(wrong)


# ---- before anything starts ----


def test_ports_are_free_and_chosen_once(tmp_path: Path):
    server = Server(tmp_path)
    assert server._choose_ports() == ["http_port", "grpc_port", "metrics_port"]
    ports = (server.http_port, server.grpc_port, server.metrics_port)
    assert len({*ports}) == 3 and all(ports)
    assert server._choose_ports() == [] and ports == (server.http_port, server.grpc_port, server.metrics_port)


def test_an_occupied_port_is_named(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"grpc_port {port} on 127.0.0.1 cannot be listened on: Address already"):
            Server(tmp_path, grpc_port=port).start()


def test_bad_arguments(tmp_path: Path):
    with pytest.raises(InputError, match="http_port must be 0 to 65535, got 70000"):
        Server(tmp_path, http_port=70000).start()
    with pytest.raises(InputError, match="host must be an IPv4 address or a name that has one, got 'no host'"):
        Server(tmp_path, host="no host").start()
    with pytest.raises(InputError, match="must be a model repository"):
        Server(tmp_path).start()
    with pytest.raises(InputError, match="is not running"):
        Server(tmp_path).memory()
    Server(tmp_path).stop()
    Server(tmp_path).kill()


def test_the_reason_is_read_from_the_log():
    failed = (
        "I1123 00:29:28.384373 2814 pb_stub.cc:366] \"Failed to initialize\"\n"
        "E1123 00:29:28.592939 2814 lifecycle.cc:642] \"failed to load 'reenact' version 1: Internal: InputError: "
        'a.onnx must have SHA-256 5, got d: it was\\nchanged\\n\\nAt:\\n  bundle.py(270): _check_files\\n"\n'
        "error: creating server: Internal - failed to load all models\n"
    )  # fmt: skip
    message = "model reenact could not be loaded: a.onnx must have SHA-256 5, got d: it was changed"
    assert str(module._reason(failed)) == message
    taken = "error: creating server: Unavailable - Socket '127.0.0.1:8000' already in use "
    assert str(module._reason(taken)).startswith("127.0.0.1:8000 cannot be listened on")
    other = 'E1123 server.cc:241] "CudaDriverHelper has not been initialized."\nerror: creating server: \x1b[2J\nlast\n'
    assert str(module._reason(other)) == "tritonserver did not start: error: creating server: ?[2J"
    assert str(module._reason("")) == "tritonserver did not start: it printed nothing"


def test_what_is_printed_of_the_log(tmp_path: Path):
    path = tmp_path / "log"
    path.write_text("E1123 before it was ready\n")

    class Imitated:
        """Prints once, then is not intact any more."""

        _log, _from = path.open("a+b"), 0
        later = ["I1123 more\nW1123 warn\n\n| table |\n+---+\nmodel says\n"]

        @property
        def intact(self) -> bool:
            if not self.later:
                return False
            with path.open("a") as file:
                file.write(self.later.pop())
            return True

    server: Any = Imitated()
    assert list(module._lines(server, False)) == ["W1123 warn", "model says"]
    assert len(list(module._lines(server, True))) == 7
    server._log.close()


# ---- the guard, around something that is no tritonserver ----


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1] + "segment", "w").close()
print(child.pid, file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["asked", "its starter is killed", "the command is killed", "the guard is killed"])
def test_the_guard_ends_everything(how: str, tmp_path: Path):
    if not sys.platform.startswith("linux"):
        pytest.skip("of Linux")
    prefix = f"dagan-rt-test-{os.getpid()}-"
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, "-I", "-S", str(module._GUARD), str(folder), prefix, "0.2"]
    command += [sys.executable, "-c", STUBBORN, f"/dev/shm/{prefix}"]
    other = Path(f"/dev/shm/dagan-rt-other-{os.getpid()}")
    other.touch()
    program = f"""
import subprocess, sys, time
guard = subprocess.Popen({command!r}, stdin=subprocess.PIPE, start_new_session=True)
print(guard.pid, flush=True)
sys.stdin.read()
guard.stdin.close()
sys.exit(guard.wait())
"""
    starter = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert starter.stdin and starter.stdout and starter.stderr
        pids = [int(starter.stdout.readline()), int(starter.stdout.readline()), int(starter.stderr.readline())]
        guard, server, _ = pids
        assert all(map(alive, pids)) and Path(f"/dev/shm/{prefix}segment").exists()
        if how == "asked":
            starter.stdin.close()
            assert starter.wait(10) == 128 + signal.SIGKILL  # it would not go
        else:
            os.kill(
                {"the command is killed": server, "the guard is killed": guard}.get(how, starter.pid), signal.SIGKILL
            )
        if how == "the guard is killed":
            assert until(lambda: not alive(server))  # all that is left to it
            os.kill(pids[2], signal.SIGKILL)
            Path(f"/dev/shm/{prefix}segment").unlink()
            return
        assert until(lambda: not any(map(alive, pids[1:])))
        assert until(lambda: not folder.exists() and not Path(f"/dev/shm/{prefix}segment").exists())
        assert other.exists()
    finally:
        other.unlink()
        starter.kill()
        starter.wait()
        for pipe in (starter.stdin, starter.stdout, starter.stderr):
            pipe.close()  # type: ignore[union-attr]


# ---- the real one ----


@pytest.mark.slow
def test_it_serves_this_machine_alone_and_no_settings(server: Server):
    assert server.models() == ["reenact", "reenact_stream"] and server.intact
    assert len(server.processes()) == 3 and 50e6 < server.memory() < 5e9
    own = socket.gethostbyname(socket.gethostname())
    addresses = [own] if not own.startswith("127.") else [f"127.0.0.{last}" for last in (2, 77)]
    for port in (server.http_port, server.grpc_port, server.metrics_port):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        for address in addresses:
            with pytest.raises(OSError), socket.create_connection((address, port), timeout=5):
                pass
    metrics = urllib.request.urlopen(server.metrics_url, timeout=5).read().decode()
    assert 'dagan_sequences_open{' in metrics  # fmt: skip
    for path in ("/v2/logging", "/v2/trace/setting", "/v2/repository/models/reenact/unload"):
        request = urllib.request.Request(server.http_url + path, data=b"{}", method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=5)
        assert refused.value.code == 403 and b"restricted" in refused.value.read()
    assert server.models() == ["reenact", "reenact_stream"]


@pytest.mark.slow
def test_a_second_server_on_the_same_ports_is_refused(server: Server, tiny_repository: Path, server_python: str):
    other = Server(tiny_repository, server_python, http_port=server.http_port)
    with pytest.raises(InputError, match=f"http_port {server.http_port} on 127.0.0.1 cannot be listened on"):
        other.start()
    with pytest.raises(InputError, match=rf"runs already, as process {server.pid}"):
        server.start()


@pytest.mark.slow
def test_a_corrupted_bundle_is_not_served(tiny_repository: Path, tmp_path: Path, server_python: str):
    repository = copied(tiny_repository, tmp_path / "models")
    graph = next(repository.glob("reenact/*/bundle/driving.onnx"))
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    server = Server(repository, server_python)
    with pytest.raises(
        InputError, match=r"^model reenact could not be loaded: \S+driving\.onnx must have SHA-256 \w+, got"
    ):
        server.start()
    assert segments(server._prefix) == [] and not server.running


@pytest.mark.slow
def test_killed_servers_and_stubs(tiny_repository: Path, tmp_path: Path, running: Any):
    """A crash leaves nothing, and the server starts again; `intact` says that a model lost its process."""
    log = tmp_path / "log"
    server = running(copied(tiny_repository, tmp_path / "models"), log=log)
    pids, url = [*server.processes()], server.grpc_url
    assert server.intact and segments(server._prefix)
    (stub,) = set(pids) - {server.pid}
    os.kill(stub, signal.SIGKILL)
    assert until(lambda: not server.intact) and server.running
    with urllib.request.urlopen(server.http_url + "/v2/health/ready", timeout=5) as answer:
        assert answer.status == 200  # what `intact` is for: Triton does not notice
    os.kill(server.pid, signal.SIGKILL)
    assert until(lambda: not server.running)
    assert segments(server._prefix) == [] and not any(map(alive, pids))

    server.start()
    assert server.intact and server.grpc_url == url and server.models() == ["reenact"]
    pids = [*server.processes()]
    server.stop()
    assert segments(server._prefix) == [] and not any(map(alive, pids)) and not server.running
    assert "All models are stopped" in log.read_text()


@pytest.mark.slow
def test_in_the_foreground(tiny_repository: Path, server_python: str, tmp_path: Path):
    """It says where it serves, brings back a model that lost its process, and takes all along when it is killed."""
    command = [sys.executable, "-m", "dagan_rt.serving.server", copied(tiny_repository, tmp_path / "models")]
    command += ["--python", server_python, "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert run.stdout and run.stderr
        said = "".join(run.stdout.readline() for _ in range(6))
        assert re.search(r"^Serving reenact out of .*\n  gRPC     grpc://127\.0\.0\.1:\d+$", said, re.MULTILINE)
        assert re.search(r"^Now run: dagan-rt animate --bundle grpc://127\.0\.0\.1:\d+ ", said, re.MULTILINE)
        ((stub, _),) = _stubs(tmp_path).items()
        os.kill(stub, signal.SIGKILL)
        assert "a model's process ended, killed or crashed: starting the server again" in run.stderr.readline()
        assert until(lambda: any(pid != stub for pid in _stubs(tmp_path)), 30)
        prefixes = [*_stubs(tmp_path).values()]
        run.kill()
        assert until(lambda: not _stubs(tmp_path) and not any(map(segments, prefixes)))
    finally:
        run.kill()
        run.communicate(timeout=30)


def _stubs(folder: Path) -> dict[int, str]:
    """Processes of models that lie in a folder, and the names of their shared memory."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"triton_python_backend_stub") and words[1].startswith(bytes(folder)):
            found[int(path.parent.name)] = words[2].decode()
    return found
