"""Programs in processes of their own, which end when their time is up, with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence


def ended(arguments: Sequence[str], seconds: float) -> str:
    """Run a program; why it ended otherwise than well, with its error or the last thing it said, or nothing."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(arguments, stdout=said, stderr=said, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            reason = f"the process ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            reason = f"not done after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun then ends its own; what a compiler started is killed below
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    told = [line for line in lines if "error" in line.lower()][:1] or lines[-1:]
    return ": ".join([reason, *(line[-300:] for line in told)]) if reason else ""
