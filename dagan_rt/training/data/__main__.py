"""`python -m dagan_rt.training.data bench DATA`: whether the loader keeps up with a training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dagan_rt.cli import guarded

PROGRAM = "python -m dagan_rt.training.data"


def build_parser() -> argparse.ArgumentParser:
    """The parser; each command sets `run`, a function from the parsed arguments to the exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Measure training data.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    bench = commands.add_parser(
        "bench",
        help="samples a second that the loader makes, by form of the clips",
        description="Take the first clips of DATA, write their frames in each form that the loader reads (folders of "
        "png and jpg, packed clips of both, mp4), check every frame that is read against a plain decoder, and time "
        "the loader with the published augmentation. Exit code 1: a frame was wrong.",
    )
    bench.add_argument("data", metavar="DATA", help="a folder of clips, or heads: synthetic ones, drawn first")
    bench.add_argument("--size", type=int, default=256, help="side of the samples, pixels (default %(default)s)")
    bench.add_argument("--batch", type=int, default=32, help="(default %(default)s)")
    bench.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="(default 1 2 4)")
    bench.add_argument(
        "--step-ms", type=float, default=0.0, metavar="T", help="a training step takes so long: is it fed?"
    )
    bench.add_argument("--clips", type=int, default=8, help="clips taken (default %(default)s)")
    bench.add_argument("--frames", type=int, default=32, help="at most, of each clip (default %(default)s)")
    bench.add_argument("--neighbours", type=int, default=0, metavar="N", help="time depth batches, of three frames")
    bench.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default %(default)s)")
    bench.set_defaults(run=_bench)
    return parser


def _bench(arguments: argparse.Namespace) -> int:
    from dagan_rt.training.data.bench import Plan, bench

    options = {name: value for name, value in vars(arguments).items() if name != "run"}
    return bench(Plan(**options))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""

    def run() -> int:
        arguments = build_parser().parse_args(argv)
        return int(arguments.run(arguments))

    return guarded(PROGRAM, run)


if __name__ == "__main__":
    sys.exit(main())
