"""`python -m dagan_rt.serving.load`: what a server does under load, what it adds to a frame, and whether it endures.

    load URL --streams 8 --fps 30 --seconds 30     N sessions at their own pace (pacing.py)
    load overhead REPOSITORY                       one session, in this process and through the server (overhead.py)
    load soak REPOSITORY --frames 20000            sequences that come and go, and the server's memory (soak.py)

Images are compared with those of this process where the bundle is at hand, otherwise with the first answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dagan_rt.cli import guarded
from dagan_rt.errors import require
from dagan_rt.files import check_output

PROGRAM = "python -m dagan_rt.serving.load"
SHARED_MEMORY: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where an image was wrong, or a soak failed; 2 on bad input."""
    given = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        parsers = {"overhead": overhead_parser, "soak": soak_parser}
        name = given[0] if given and given[0] in parsers else "load"
        args = parsers.get(name, load_parser)().parse_args(given if name == "load" else given[1:])
        if args.json is not None:
            check_output(args.json, (".json",))
        for package in ("tritonclient", "grpc"):
            require(package, extra="triton", why="measuring a server")
        from dagan_rt.serving import measuring

        return {"load": measuring.load, "overhead": measuring.compare, "soak": measuring.endure}[name](args, given)

    return guarded(PROGRAM, run)


def load_parser() -> argparse.ArgumentParser:
    """Of the paced load."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, allow_abbrev=False, epilog=f"Also: {PROGRAM} overhead --help; {PROGRAM} soak --help.",
        description="N sessions at F frames a second each, evenly spread, whatever the server does: latencies, drops, "
        "errors, and what the server says of its queue. Exit code 1: an image was wrong.",
    )  # fmt: skip
    parser.add_argument("where", metavar="URL", help="a server's, like grpc://host:8001; or a repository or a bundle")
    parser.add_argument("--streams", type=int, nargs="+", default=[8], metavar="N", help="one load after the other")
    parser.add_argument("--fps", type=float, default=30.0, metavar="F", help="of each stream (default: %(default)g)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of each load (default: %(default)g)")
    parser.add_argument("--http", type=int, nargs="?", const=0, metavar="PORT", help="HTTP on the URL's host (default: "
                        "the port before gRPC's)")  # fmt: skip
    parser.add_argument("--encoding", choices=("JPEG", "PNG", "WEBP"), help="how images travel (default: raw)")
    parser.add_argument(
        "--churn", type=float, default=0.0, metavar="S", help="begin anew with another source every S s"
    )
    parser.add_argument("--deadline", type=float, default=1.0, metavar="S", help="a frame without an answer by then is "
                        "dropped (default: %(default)g)")  # fmt: skip
    parser.add_argument("--late", type=float, default=150.0, metavar="MS", help="an answer is late that much after its "
                        "frame was due (default: %(default)g)")  # fmt: skip
    _add_common(parser, shared="auto")
    return parser


def overhead_parser() -> argparse.ArgumentParser:
    """Of the comparison with this process."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} overhead", allow_abbrev=False,
        description="One session, in this process and through every way to the server, frame by frame in turn. Exit "
        "code 1: an image was wrong.",
    )  # fmt: skip
    parser.add_argument("where", metavar="REPOSITORY", help="or a bundle, or the URL of a server with --bundle")
    parser.add_argument("--frames", type=int, default=300, metavar="N", help="of each way (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=0.0, metavar="MS", help="before each frame; where engines have "
                        "more than one thread, theirs spin on for a while (default: 0)")  # fmt: skip
    _add_common(parser)
    return parser


def soak_parser() -> argparse.ArgumentParser:
    """Of the soak."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} soak", allow_abbrev=False,
        description="Very many frames over sequences that come and go, which end or whose clients vanish. "
        "Exit code 1: an image was wrong, a request failed, memory grew by 2 % or more, or sequences stayed open.",
    )  # fmt: skip
    parser.add_argument("where", metavar="REPOSITORY", help="or a bundle, or the URL of a server with --bundle")
    parser.add_argument("--frames", type=int, default=20_000, metavar="N", help="answered (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=16, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument("--sources", type=int, default=24, metavar="N", help="portraits (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sequences' lengths and ends (default: 0)")
    parser.add_argument("--idle", type=float, default=5.0, metavar="S", help="of a server started on a bundle: it then "
                        "frees a sequence that was left alone (default: %(default)g)")  # fmt: skip
    _add_common(parser, shared="off")
    return parser


def _add_common(parser: argparse.ArgumentParser, shared: str = "") -> None:
    if shared:
        parser.add_argument("--shared-memory", choices=tuple(SHARED_MEMORY), default=shared,
                            help="with a server on this machine (default: %(default)s)")  # fmt: skip
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="what the server at the URL serves, to check images")
    parser.add_argument(
        "--backend", help="of this process, and of a server started on a bundle (default: the server's)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="likewise: CPU threads (default: the server's)")
    parser.add_argument("--tolerance", type=int, default=0, metavar="N",
                        help="levels that a value of an image may be off by (default: 0)")  # fmt: skip
    parser.add_argument("--metrics", default="", metavar="URL", help="like http://host:8002/metrics (default: on the "
                        "server's host, the port after gRPC's, two after HTTP's)")  # fmt: skip
    parser.add_argument("--python", metavar="FILE", help="the interpreter for models, where a server is started")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="keep the rows, with what they were measured on")
    parser.add_argument("--commit", default="", help="which commit this is, for the record")


if __name__ == "__main__":
    sys.exit(main())
