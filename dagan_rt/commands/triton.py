"""`dagan-rt triton`: write a model repository for Triton Inference Server, check it before it ships, serve it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dagan_rt.tables import printable

#: The fields of `dagan_rt.serving.repository.ServingPlan`: type, what stands for the value, help.
OPTIONS: dict[str, tuple[type, str, str]] = {
    "layout": (str, "L", "stateful (default): a model with state for each sequence; graphs: subnetworks and ensembles, "
               "no Python; or both"),
    "instances": (str, "WHERE", "cpu (default), gpu (every GPU) or gpu:0,1 (these)"),
    "count": (int, "N", "instances a device, each with its own copy of the networks (default 1)"),
    "version": (int, "N", "number of the version (default 1)"),
    "backend": (str, "NAME", "what runs the bundle (default auto: the fastest that runs where it is served)"),
    "threads": (int, "N", "CPU threads of the backend (default 0: its own choice)"),
    "sequences": (int, "N", "that may be open at once, an instance (default 64); more are UNAVAILABLE"),
    "queue": (int, "N", "frames of one sequence that may be under way (default 8); more are UNAVAILABLE"),
    "batch": (int, "N", "frames driven at once, at most (default 32)"),
    "deadline": (float, "SECONDS", "that a frame waits for others to share its batch (default 0.002)"),
    "idle": (float, "SECONDS", "without a request after which a sequence is freed (default 60)"),
    "most_pixels": (int, "N", "of an encoded image (default 16000000)"),
    "rate_limit": (int, "N", "executions at once a device, over all models (default 0: no limit)"),
    "timeout": (float, "SECONDS", "in the queue after which the layout graphs refuses a request (default 10)"),
}  # fmt: skip
SWITCHES = {
    "stream": "also a decoupled model: many frames a request, answers as they come",
    "warm_up": "run everything once before a model is called ready (default)",
}


def add_parser(subparsers: Any) -> None:
    """Register the command, and its own."""
    parser = subparsers.add_parser(
        "triton",
        help="write, check and serve model repositories for Triton Inference Server",
        description="Model repositories for Triton Inference Server.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    write = commands.add_parser(
        "write", allow_abbrev=False, help="write a repository for a bundle",
        description="Write a model repository for a bundle, which is copied into it. A recipe's table [triton] gives "
        "what the options are for; they replace its values.",
    )  # fmt: skip
    write.add_argument("bundle", type=Path, metavar="BUNDLE", help="exported model (a folder)")
    write.add_argument("--out", type=Path, required=True, metavar="DIR", help="the repository to write")
    write.add_argument("--force", action="store_true", help="replace the repository or bundle that --out already is")
    write.add_argument("--recipe", metavar="FILE", help="TOML file, or the name of one that ships, as triton-gpu")
    for name, (kind, metavar, words) in OPTIONS.items():
        write.add_argument(_option(name), type=kind, metavar=metavar, help=words, default=argparse.SUPPRESS)
    for name, words in SWITCHES.items():
        switch: Any = argparse.BooleanOptionalAction
        write.add_argument(_option(name), action=switch, help=words, default=argparse.SUPPRESS)
    write.set_defaults(run=run_write)

    check = commands.add_parser(
        "check", help="say whether a repository can be served, before it ships",
        description="Check a model repository. Exit code 0: it can be served; 2: it cannot, and a sentence says why.",
    )  # fmt: skip
    check.add_argument("repository", type=Path, metavar="REPOSITORY", help="a model repository of dagan-rt")
    check.set_defaults(run=run_check)

    from dagan_rt.serving import server

    serve = commands.add_parser(
        "serve", help="run tritonserver on a repository",
        description="Run tritonserver on a model repository until Ctrl-C, for this machine alone, but for --host.",
    )  # fmt: skip
    server.add_options(serve)
    serve.set_defaults(run=run_serve)


def run_write(args: argparse.Namespace) -> int:
    """Write a repository for a bundle; returns the exit code."""
    from dagan_rt.bundle import Bundle
    from dagan_rt.export.plan import read_serving
    from dagan_rt.export.triton import described, write_repository
    from dagan_rt.staging import check_target

    plan = read_serving(args.recipe, {name: vars(args)[name] for name in (*OPTIONS, *SWITCHES) if name in args})
    check_target(args.out, force=args.force)
    print(described(write_repository(Bundle.open(args.bundle), args.out, plan, force=args.force)))
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Print what was checked; returns the exit code."""
    import sys

    from dagan_rt.serving.check import check

    checked = check(args.repository)
    print(checked.table())
    for problem in checked.problems:
        print(f"dagan-rt: error: {printable(problem)}", file=sys.stderr)
    return 2 if checked.problems else 0


def run_serve(args: argparse.Namespace) -> int:
    """Serve until stopped; returns the exit code."""
    from dagan_rt.serving import server

    return server.serve(args)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
