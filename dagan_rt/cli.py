"""The command line: `dagan-rt <command>`. Commands live in `dagan_rt.commands` and import what they need when run."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dagan_rt import __version__
from dagan_rt.errors import DeviceLost, InputError
from dagan_rt.tables import printable

COMMANDS = (
    "animate", "motion", "webcam", "demo", "explain", "info", "prepare", "train", "evaluate", "heads", "bench",
    "triton",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function from the parsed arguments to the exit code."""
    parser = argparse.ArgumentParser(
        prog="dagan-rt", description="Animate a portrait with the motion of a video (DaGAN).", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"dagan-rt {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"dagan_rt.commands.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, see `guarded`."""

    def run() -> int:
        arguments = build_parser().parse_args(argv)
        return int(arguments.run(arguments) or 0)

    return guarded("dagan-rt", run)


def guarded(program: str, run: Callable[[], int]) -> int:
    """Run a command and turn what went wrong into an exit code.

    0 done; 2 bad input, a lost GPU, or a file that cannot be read or written, with one sentence on stderr;
    130 interrupted; 141 when whatever read our output went away; 143 and 129 ended by SIGTERM and SIGHUP, like an
    exception: what was begun is deleted.
    """
    try:
        with _ended_by_signals():
            code = run()
        sys.stdout.flush()  # here, where a closed pipe can still be answered quietly
        return code
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, DeviceLost) as error:
        message = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"{error.filename}: {reason}" if error.filename is not None else reason
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        # An interrupt that passed through source text being executed (an import that makes a dataclass does that) is
        # remembered by the interpreter, which then ends by the signal, whatever we return. The next text resets it.
        exec("")
        return 130
    print(f"{program}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let the signals that end a process raise SystemExit, so that files that were begun are deleted.

    Where somebody has decided about them, nohup say, that stands.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # Windows has no terminal's
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
