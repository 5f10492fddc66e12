"""The process between `Server` and tritonserver: ends the server when asked, or when whoever started it is gone.

Run by its path, so that it imports nothing but the standard library:

    python _guard.py FOLDER PREFIX GRACE COMMAND…

starts COMMAND in a process group of its own and prints its process id. Once anything, or the end, is read from stdin,
the command gets SIGTERM, and SIGKILL after GRACE seconds. However it ended, what is left of its group is killed, and
FOLDER and the segments in shared memory whose names start with PREFIX are deleted. The exit code is the command's.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import select
import shutil
import signal
import subprocess
import sys
import time

SHARED_MEMORY = "/dev/shm"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None)


def main(folder: str, prefix: str, grace: str, *command: str) -> int:
    """Returns the exit code of the command, 128 more than the signal that ended it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever sends these to everybody ends us through stdin
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of the server are ours to reap
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=_apart)
    print(server.pid, flush=True)
    asked: float | None = None
    while not _ended(server.pid):
        if asked is None and select.select([0], [], [], 0.05)[0]:
            asked = time.monotonic()
            os.kill(server.pid, signal.SIGTERM)
        elif asked is not None:
            time.sleep(0.02)
            if time.monotonic() - asked > float(grace):
                os.kill(server.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # before the server is reaped: until then the group's id is its own
        os.killpg(server.pid, signal.SIGKILL)
    code = server.wait()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    for path in glob.glob(f"{SHARED_MEMORY}/{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError):
            os.unlink(path)
    shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _apart() -> None:
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
