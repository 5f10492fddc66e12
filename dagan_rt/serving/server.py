"""`Server`: the real tritonserver on a model repository, for a test, a script, or `dagan-rt triton serve REPOSITORY`.

The server comes with the package nvidia-pytriton, of the Python environment that runs the model, or is the
`tritonserver` of this machine, as in NVIDIA's images. The first needs what the package leaves to its caller: a backend
directory with the stub of that Python, its libpython, and numpy < 2 (with numpy 2, outputs are silently empty).
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dagan_rt.cli import guarded
from dagan_rt.errors import InputError
from dagan_rt.tables import printable

PACKAGE = "nvidia-pytriton"
IMAGE_SERVER = Path("/opt/tritonserver/bin/tritonserver")  # where NVIDIA's images have it
STARTING, STOPPING = 120.0, 20.0  # seconds, at most
LOG_READ = 1 << 20  # bytes of a log that are looked at
# Whoever may set these can make the server write files anywhere; who may map shared memory, read that of others.
CLOSED, CLOSED_TO_OTHERS = "model-repository,trace,logging", "shared-memory"
KEY = "dagan-rt-key"  # the header that opens them
_GUARD = Path(__file__).with_name("_guard.py")
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

#: Run in the environment of the model: what of it matters to a server.
_PROBE = """
import importlib.metadata, importlib.util, json, os, sys, sysconfig
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
def folder(name):
    spec = importlib.util.find_spec(name)
    return os.path.dirname(spec.origin) if spec and spec.origin else None
library = "libpython%d.%d.so.1.0" % sys.version_info[:2]
places = [sysconfig.get_config_var("LIBDIR") or "", os.path.join(sys.base_prefix, "lib")]
places += [os.path.join(place, sysconfig.get_config_var("MULTIARCH") or ".") for place in places]
found = [os.path.join(place, library) for place in places if os.path.exists(os.path.join(place, library))]
print(json.dumps({
    "bin": os.path.dirname(sys.executable), "version": "%d.%d" % sys.version_info[:2], "numpy": version("numpy"),
    "dagan_rt": folder("dagan_rt"), "pytriton": folder("pytriton"), "libpython": found[0] if found else None,
}))
"""


class _Occupied(InputError):
    """Another program listens on the port."""


@dataclass(frozen=True)
class Installation:
    """A tritonserver and the environment that its models run in; see `find`."""

    program: Path
    python: str
    path: str  # the folder of that Python, first on PATH: the stub looks for python3 there
    backend: tuple[Path, ...] = ()  # files of the Python backend; none: the server's own
    libraries: tuple[Path, ...] = ()  # folders, and libpython itself

    def assemble(self, folder: Path, backends: Mapping[str, str | os.PathLike[str]]) -> list[str]:
        """The command of a server; what it needs is placed in `folder`."""
        command = ["env", "-u", "PYTHONHOME", "-u", "PYTHONPATH", _variable("PATH", self.path)]
        directory = folder / "backends"
        if self.backend:
            (directory / "python").mkdir(parents=True)
            for file in self.backend:  # copies: for a backend that is written in Python, Triton refuses links
                shutil.copy2(file, directory / "python" / file.name)
            command.append(_variable("LD_LIBRARY_PATH", *self._searched(folder / "libraries")))
        elif backends:
            directory.mkdir()
            for own in (self.program.resolve().parents[1] / "backends").iterdir():
                place = shutil.copytree if own.name == "python" else os.symlink
                place(own, directory / own.name)
        for name, path in backends.items():
            (directory / name).symlink_to(Path(path).resolve())
        command.append(str(self.program))
        return [*command, "--backend-directory", str(directory)] if directory.exists() else command

    def _searched(self, links: Path) -> list[str]:
        """Where libraries are looked for. A file is linked alone: beside it may be others, of other versions."""
        links.mkdir()
        for library in self.libraries:
            if not library.is_dir():
                (links / library.name).symlink_to(library)
        return [*(str(library) for library in self.libraries if library.is_dir()), str(links)]


def _variable(name: str, *first: str) -> str:
    return f"{name}={os.pathsep.join([*first, *filter(None, [os.environ.get(name)])])}"


def find(python: str | os.PathLike[str] | None = None) -> Installation:
    """The tritonserver that runs models in the environment of `python` (None: this one).

    Raises InputError, saying what is missing, where there is none that could.
    """
    python = str(python or sys.executable)
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        here = f"{platform.system()} {platform.machine()}"
        raise InputError(f"tritonserver runs on Linux x86-64, this is {here}: run it in a container or elsewhere")
    facts = _facts(python)
    if facts["dagan_rt"] is None:
        raise InputError(f"{python} does not have dagan-rt, which the served model is made of: install it there")
    if facts["pytriton"] is not None:
        return _packaged(python, facts)
    program = shutil.which("tritonserver") or (str(IMAGE_SERVER) if IMAGE_SERVER.is_file() else None)
    if program is None:
        raise InputError(
            f"no tritonserver here: {python} does not have {PACKAGE}, and there is none on PATH: run make serve in a "
            f"checkout, or pip install 'dagan-rt[triton-server]' in an environment of its own"
        )
    return Installation(Path(program), python, facts["bin"])


def _facts(python: str) -> dict[str, Any]:
    try:
        run = subprocess.run([python, "-E", "-c", _PROBE], capture_output=True, text=True, timeout=60)
        return dict(json.loads(run.stdout))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        raise InputError(f"{python} must be a Python interpreter to run the model in, and did not run") from None


def _packaged(python: str, facts: dict[str, Any]) -> Installation:
    root = Path(facts["pytriton"], "tritonserver")
    stubs = {path.parent.name: path for path in root.glob("python_backend_stubs/*/triton_python_backend_stub")}
    if facts["version"] not in stubs:
        known = ", ".join(sorted(stubs, key=lambda version: [int(part) for part in version.split(".")]))
        raise InputError(
            f"{PACKAGE} serves models in Python {known or 'of no version'}, {python} is {facts['version']}"
        )
    if facts["numpy"] is None or int(facts["numpy"].split(".")[0]) >= 2:
        has = f"numpy {facts['numpy']}" if facts["numpy"] else "none"
        raise InputError(f"{PACKAGE} needs numpy < 2, {python} has {has}: give the server an environment of its own")
    if facts["libpython"] is None:
        raise InputError(
            f"{python} was built without a shared libpython{facts['version']}.so.1.0, which {PACKAGE} needs: take a "
            f"Python that has one (Debian and Ubuntu: apt-get install libpython{facts['version']}; "
            f"pyenv: build it with --enable-shared)"
        )
    if not os.path.exists(os.path.join(facts["bin"], "python3")):
        raise InputError(f"{python} must stand beside a python3, which {PACKAGE} looks for: there is none")
    backend = root / "backends" / "python"
    files = (backend / "libtriton_python.so", backend / "triton_python_backend_utils.py", stubs[facts["version"]])
    libraries = (Path(facts["pytriton"]).parent / "nvidia_pytriton.libs", Path(facts["libpython"]))
    return Installation(root / "bin" / "tritonserver", python, facts["bin"], files, libraries)


@dataclass
class Server:
    """A tritonserver on a model repository.

        with Server("out/repository", python=".venv-triton/bin/python") as server:
            Reenactor(server.grpc_url)

    It listens on `host`, an IPv4 address or name, which is this machine alone unless said otherwise; port 0 chooses a
    free one, once. Loading models, tracing and log settings are closed to clients, and so is shared memory where others
    can reach the server. `log` is a file that gets what it prints (None: kept for `log_text` alone), `arguments` go to
    tritonserver, and `backends` are folders of further backends, by name. What is started ends with this process,
    whatever ends it, and leaves nothing in shared memory.
    """

    repository: str | os.PathLike[str]
    python: str | os.PathLike[str] | None = None
    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    log: str | os.PathLike[str] | None = None
    arguments: Sequence[str] = ()
    backends: Mapping[str, str | os.PathLike[str]] = field(default_factory=dict)
    _guard: subprocess.Popen[str] | None = field(default=None, init=False, repr=False)
    _pid: int = field(default=0, init=False, repr=False)
    _stubs: frozenset[int] = field(default=frozenset(), init=False, repr=False)
    _log: BinaryIO | None = field(default=None, init=False, repr=False)
    _key: str = field(default_factory=secrets.token_hex, init=False, repr=False)
    _prefix: str = field(default="", init=False, repr=False)  # of what is this server's in shared memory
    _from: int = field(default=0, init=False, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    def start(self, timeout: float = STARTING) -> Server:
        """Start, and wait until every model is ready. May be called again after `stop` or `kill`.

        Raises InputError: with the model's own reason if one cannot be loaded, and if a port is taken, nothing can run
        the server, or it is not ready within `timeout` seconds.
        """
        with self._lock:
            if self.running:
                raise InputError(f"the server of {self.repository} runs already, as process {self._pid}")
            for attempt in range(3):
                chosen = self._choose_ports()
                try:
                    self._launch()
                    self._wait_until_ready(timeout)
                    self._stubs = frozenset(self.processes()) - {self._pid}
                    return self
                except BaseException as error:
                    self.stop()
                    if not (isinstance(error, _Occupied) and chosen and attempt < 2):  # or another took it meanwhile
                        raise
                    for name in chosen:
                        setattr(self, name, 0)
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """End it: what is under way is answered first, for a few seconds. Nothing happens where none runs."""
        with self._lock:
            if self._guard is None:
                return
            assert self._guard.stdin and self._guard.stdout
            with contextlib.suppress(OSError):
                self._guard.stdin.close()
            self._guard.wait()
            self._guard.stdout.close()
            self._guard, self._pid = None, 0

    def kill(self) -> None:
        """End it at once, as a crash would (SIGKILL)."""
        with self._lock:
            if self._guard is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                self.stop()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether tritonserver runs; it may have ended by itself."""
        return self._guard is not None and self._guard.poll() is None

    @property
    def intact(self) -> bool:
        """Whether it runs, and every process that it had for its models when it was ready.

        Triton does not start them again: what their models are asked fails with "Stub process … is not healthy", while
        the server calls itself ready. `stop` or `kill`, then `start`, is what helps.
        """
        return self.running and self._stubs <= self.processes().keys()

    @property
    def pid(self) -> int:
        """Of tritonserver. InputError where none runs."""
        if not self.running:
            raise InputError(f"the server of {self.repository} is not running")
        return self._pid

    @property
    def grpc_url(self) -> str:
        """As `Reenactor` and `--bundle` take it."""
        return f"grpc://{self._reached}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """As `Reenactor` and `--bundle` take it; plain HTTP."""
        return f"http://{self._reached}:{self.http_port}"

    @property
    def metrics_url(self) -> str:
        """In Prometheus' text format."""
        return f"http://{self._reached}:{self.metrics_port}/metrics"

    @property
    def _reached(self) -> str:
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    def processes(self) -> dict[int, int]:
        """Resident bytes of tritonserver and of each stub, one an instance of a model, by process id."""
        group, found = self.pid, {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):  # gone meanwhile
                    state, _, of_group, *_ = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                    if int(of_group) == group and state != "Z":
                        found[int(entry)] = int(Path("/proc", entry, "statm").read_text().split()[1]) * _PAGE
        return found

    def memory(self) -> int:
        """Resident bytes of all of them; what they share in memory counts for each."""
        return sum(self.processes().values())

    def log_text(self) -> str:
        """The last MiB, at most, of what the server has printed since it was started."""
        if self._log is None:
            return ""
        end = os.fstat(self._log.fileno()).st_size
        begin = max(self._from, end - LOG_READ)
        return os.pread(self._log.fileno(), end - begin, begin).decode(errors="replace")

    def models(self) -> list[str]:
        """The names of those that are ready."""
        index = json.loads(self._request("POST", "/v2/repository/index")[1])
        return sorted(model["name"] for model in index if model.get("state") == "READY")

    # ------------------------------------------------------------------------------------------------------------------

    def _choose_ports(self) -> list[str]:
        """Refuse those that are taken; the names of those that were chosen now."""
        try:
            address = socket.getaddrinfo(self.host, None, socket.AF_INET)[0][4][0]
        except (OSError, UnicodeError):
            raise InputError(f"host must be an IPv4 address or a name that has one, got {self.host!r}") from None
        chosen = []
        with contextlib.ExitStack() as held:
            for name in ("http_port", "grpc_port", "metrics_port"):
                port = getattr(self, name)
                if not 0 <= port < 65536:
                    raise InputError(f"{name} must be 0 to 65535, got {port}")
                listener = held.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: one may just have ended
                try:
                    listener.bind((address, port))
                    listener.listen()
                except OSError as error:
                    raise _Occupied(
                        f"{name} {port} on {self.host} cannot be listened on: {error.strerror}: another server may run "
                        f"there; name another port, or 0 for a free one"
                    ) from None
                if port == 0:
                    setattr(self, name, listener.getsockname()[1])
                    chosen.append(name)
        return chosen

    def _launch(self) -> None:
        repository = Path(self.repository).resolve()
        if not any(repository.glob("*/config.pbtxt")):
            raise InputError(
                f"{self.repository} must be a model repository (<model>/config.pbtxt): run python -m dagan_rt.export "
                f"--target triton"
            )
        installation = find(self.python)
        prefix = self._prefix = f"dagan-rt-{secrets.token_hex(6)}-"
        if self._log is not None:
            self._log.close()
        self._log = open(self.log, "a+b") if self.log is not None else tempfile.TemporaryFile()  # noqa: SIM115
        self._from = os.fstat(self._log.fileno()).st_size
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        command = installation.assemble(folder, self.backends)
        address = socket.gethostbyname(self.host)
        command += ["--model-repository", str(repository), "--exit-timeout-secs", f"{STOPPING / 2:.0f}"]
        command += ["--backend-config", f"python,shm-region-prefix-name={prefix}"]
        for protocol in ("http", "grpc", "metrics"):
            command += [f"--{protocol}-address", address, f"--{protocol}-port", str(getattr(self, f"{protocol}_port"))]
        closed = CLOSED if address.startswith("127.") else f"{CLOSED},{CLOSED_TO_OTHERS}"
        for option in ("--http-restricted-api", "--grpc-restricted-protocol"):
            command += [option, f"{closed}:{KEY}={self._key}"]
        command += _rate_limit(repository)
        guard = [sys.executable, "-I", "-S", str(_GUARD), str(folder), prefix, str(STOPPING)]
        self._guard = subprocess.Popen(
            [*guard, *command, *self.arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, start_new_session=True,
        )  # fmt: skip
        assert self._guard.stdout
        self._pid = int(self._guard.stdout.readline() or 0)

    def _wait_until_ready(self, timeout: float) -> None:
        late = time.monotonic() + timeout
        while time.monotonic() < late:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._request("GET", "/v2/health/ready")[0] == 200:
                    return
            if not self.running:
                raise _reason(self.log_text())
            time.sleep(0.05)
        raise InputError(f"the server of {self.repository} was not ready within {timeout:g} seconds")

    def _request(self, method: str, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._reached, self.http_port, timeout=5)
        try:
            connection.request(method, path, headers={KEY: self._key})
            response = connection.getresponse()
            return response.status, response.read(LOG_READ)
        finally:
            connection.close()


def _rate_limit(repository: Path) -> list[str]:
    """What a repository of ours asks of the server itself."""
    if not (repository / "dagan-rt.json").is_file():
        return []
    from dagan_rt.serving.repository import RESOURCE, Repository

    limit = Repository.open(repository).plan.rate_limit
    return ["--rate-limit", "execution_count", "--rate-limit-resource", f"{RESOURCE}:{limit}"] if limit else []


def _reason(log: str) -> InputError:
    """Why a server ended before it was ready, out of its log."""
    taken = re.search(r"Socket '([^']+)' already in use", log)
    if taken:
        return _Occupied(f"{printable(taken[1])} cannot be listened on: another server may run there")
    failed = re.search(r"failed to load '([^']+)' version \d+: [\w ]+: (.*?)\"?$", log, re.MULTILINE)
    if failed:
        sentence = failed[2].split(r"\n\nAt:")[0].replace(r"\n", " ")
        sentence = re.sub(r"^(InputError|MissingPackage): ", "", sentence)
        return InputError(f"model {printable(failed[1])} could not be loaded: {printable(sentence)}")
    errors = [line for line in log.splitlines() if re.match(r"E\d{4} |error: |.*: error while loading", line)]
    known = [line for line in errors if "CudaDriverHelper" not in line]
    last = known[0] if known else (log.strip().splitlines() or ["it printed nothing"])[-1]
    return InputError(f"tritonserver did not start: {printable(last)}")


# ----------------------------------------------------------------------------------------------------------------------
# In the foreground


def run(
    repository: str | os.PathLike[str],
    *,
    python: str | os.PathLike[str] | None = None,
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    verbose: bool = False,
    arguments: Sequence[str] = (),
) -> int:
    """Serve until Ctrl-C or SIGTERM (0), or until the server ends by itself (1); prints where, and what it says.

    A server one of whose models lost its process is started again; clients then open their sessions afresh.
    """
    server = Server(repository, python, host, http_port, grpc_port, metrics_port, arguments=arguments)
    with _terminated_as_interrupted():
        try:
            with server:
                print(_serving(server), flush=True)
                while True:
                    for line in _lines(server, verbose):
                        print(printable(line), file=sys.stderr, flush=True)
                    if not server.running:
                        print("tritonserver ended by itself", file=sys.stderr)
                        return 1
                    print("a model's process ended, killed or crashed: starting the server again", file=sys.stderr)
                    server.kill()
                    server.start()
        except KeyboardInterrupt:
            print("stopped", flush=True)
            return 0


def _serving(server: Server) -> str:
    animate = f"dagan-rt animate --bundle {server.grpc_url} --source portrait.png --driving video.mp4 --out result.mp4"
    return "\n".join(
        [
            f"Serving {', '.join(server.models())} out of {server.repository}",
            f"  gRPC     {server.grpc_url}",
            f"  HTTP     {server.http_url}",
            f"  metrics  {server.metrics_url}",
            f"Now run: {animate}",
            "Ctrl-C ends the server.",
        ]
    )


def _lines(server: Server, verbose: bool) -> Iterator[str]:
    """What the server prints, as long as it is intact: warnings, errors, and what models print; or everything."""
    assert server._log is not None
    position, rest = (server._from if verbose else os.fstat(server._log.fileno()).st_size), b""
    while True:
        intact = server.intact
        new = os.pread(server._log.fileno(), LOG_READ, position)
        position += len(new)
        *lines, rest = (rest + new).split(b"\n")
        for line in lines:
            if verbose or not re.match(rb"I\d{4} |[+|]|$", line):
                yield line.decode(errors="replace")
        if not new:
            if not intact:
                return
            time.sleep(0.5)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which containers are ended with, as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of `serve`."""
    parser.add_argument("repository", type=Path, metavar="REPOSITORY", help="what --target triton exported")
    parser.add_argument("--python", metavar="FILE", help="the interpreter that runs the model (default: this one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        parser.add_argument(
            f"--{name}-port", type=int, default=port, metavar="N", help="0: any free one (default: %(default)s)"
        )
    parser.add_argument("--verbose", action="store_true", help="print everything that the server says")


def serve(args: argparse.Namespace) -> int:
    """`run` with parsed `add_options`."""
    return run(
        args.repository, python=args.python, host=args.host, http_port=args.http_port, grpc_port=args.grpc_port,
        metrics_port=args.metrics_port, verbose=args.verbose,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dagan_rt.serving.server REPOSITORY`; returns the exit code."""
    program = "python -m dagan_rt.serving.server"
    parser = argparse.ArgumentParser(prog=program, description="Serve a model repository with tritonserver.")
    add_options(parser)
    return guarded(program, lambda: serve(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
