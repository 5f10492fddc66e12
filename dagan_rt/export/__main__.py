"""python -m dagan_rt.export: a checkpoint to a verified bundle."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from dagan_rt.cli import guarded
from dagan_rt.errors import InputError


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the arguments)")


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = _Parser(
        prog="python -m dagan_rt.export",
        description="Export a checkpoint to a bundle of ONNX graphs, each compared with PyTorch before it is kept.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="generator and key points")
    parser.add_argument(
        "--depth", type=Path, metavar="DIR", help="folder with encoder.pth and depth.pth, for variants that use depth"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the bundle to write")
    parser.add_argument("--force", action="store_true", help="replace the bundle that --out already is")
    parser.add_argument("--opset", type=int, default=17, metavar="N", help="ONNX operator set, 17 (default) to 20")
    parser.add_argument(
        "--no-torch-weights", action="store_true", help="leave the checkpoint out: smaller, and no torch backend"
    )
    parser.add_argument(
        "--verify-with",
        type=Path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="up to four images of faces to compare on: a source, then driving ones (default: a drawn head)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export and return the exit code: 0 done, 2 bad input or a graph that is not the network, 130 interrupted."""
    return guarded("python -m dagan_rt.export", lambda: run(build_parser().parse_args(argv)))


def run(arguments: argparse.Namespace) -> int:
    """Check what is cheap to check first, then load, export, verify, and say what to run next."""
    from tqdm import tqdm

    from dagan_rt.bundle import GRAPHS, check_target
    from dagan_rt.export.onnx import check_tools

    if len(arguments.verify_with) > 4:
        raise InputError(f"--verify-with takes at most 4 images, got {len(arguments.verify_with)}")
    check_target(arguments.out, force=arguments.force)
    check_tools(arguments.opset)

    from dagan_rt import checkpoints
    from dagan_rt.export import export
    from dagan_rt.export.verify import table

    checkpoint = checkpoints.inspect(arguments.checkpoint, arguments.depth)
    for note in checkpoint.notes:
        print(f"note: {note}")
    model = checkpoint.build()
    del checkpoint
    with tqdm(total=len(GRAPHS) + 2, unit="step", disable=None) as bar:

        def report(step: str) -> None:
            bar.set_description(step)
            bar.update()

        bundle, errors = export(
            model,
            arguments.out,
            opset=arguments.opset,
            weights=not arguments.no_torch_weights,
            force=arguments.force,
            images=arguments.verify_with,
            report=report,
        )
    print(table(errors))
    size, megabytes = bundle.config.size, sum(entry["bytes"] for entry in bundle.manifest["files"].values()) / 1e6
    print(f"wrote {bundle.path}: {bundle.config.variant}, {size} × {size}, {megabytes:.0f} MB")
    files = ["--source", "portrait.png", "--driving", "clip.mp4", "--out", "result.mp4"]
    print("next: " + shlex.join(["dagan-rt", "animate", "--bundle", str(bundle.path), *files]))
    return 0


@contextlib.contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """Let SIGTERM end the export like an exception, so that the half-made folder is deleted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
