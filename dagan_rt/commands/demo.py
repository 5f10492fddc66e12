"""`dagan-rt demo`: a page in the browser where a portrait and a clip can be tried, with all that happens inside."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dagan_rt.commands.shared import add_engine_options, check_threads
from dagan_rt.errors import InputError, require


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the subparsers of the command line."""
    parser = subparsers.add_parser(
        "demo",
        allow_abbrev=False,
        help="a page in the browser: a portrait and a clip or a camera, and what happens inside",
        description="Serve a page for this machine's browser, until Ctrl-C: give a portrait and a clip, or a camera, "
        "and see result, depth maps, key points, flow, occlusion, attention and latencies while it runs; the result "
        "can be downloaded, with the sound of the clip. Nothing is sent elsewhere; all files are deleted at the end.",
    )
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="exported model (a folder)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="default 127.0.0.1: this machine alone; others are warned of",
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default 7860; 0 takes any that is free")
    add_engine_options(parser)
    parser.add_argument("--no-browser", action="store_true", help="do not open the page, only print its address")
    parser.add_argument(
        "--most-megabytes", type=float, default=100, metavar="N", help="largest upload, default %(default)g"
    )
    parser.add_argument("--most-seconds", type=float, default=30, metavar="N", help="longest clip, default %(default)g")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C; returns the exit code."""
    _check_options(arguments)
    require("gradio", extra="demo", why="dagan-rt demo")
    from dagan_rt.page.runs import Studio
    from dagan_rt.page.server import LOOPBACK, serving, wait

    studio = Studio(arguments.bundle, arguments.backend, arguments.threads, most_seconds=arguments.most_seconds)
    if arguments.host not in LOOPBACK:
        print(
            f"warning: --host {arguments.host} serves the page to everybody who reaches this machine, without a "
            "password",
            file=sys.stderr,
        )
    try:
        with serving(
            studio,
            arguments.host,
            arguments.port,
            most_megabytes=arguments.most_megabytes,
            browser=not arguments.no_browser,
        ) as address:
            print(f"serving {arguments.bundle} at {address} until Ctrl-C", flush=True)
            wait()
    except KeyboardInterrupt:
        print("\nstopped; all files of the page are deleted", file=sys.stderr)
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.port <= 65535:
        raise InputError(f"--port must be 0 to 65535, got {arguments.port}")
    check_threads(arguments)
    for option in ("most_megabytes", "most_seconds"):
        if not 0 < getattr(arguments, option) < float("inf"):
            raise InputError(f"--{option.replace('_', '-')} must be over 0, got {getattr(arguments, option):g}")
