"""python -m dagan_rt.evaluation.heads: train the regressors for synthetic heads, and measure them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dagan_rt.cli import guarded


def build_parser() -> argparse.ArgumentParser:
    """The two commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m dagan_rt.evaluation.heads",
        description="The landmark, pose, action and identity extractors for synthetic heads: small regressors.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="draw heads, train the regressors, write and validate their files")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    train.add_argument("--identities", type=int, default=3000, help="how many heads to learn from (%(default)s)")
    train.add_argument("--frames", type=int, default=3, help="frames of each head in each of 2 scenes (%(default)s)")
    train.add_argument("--steps", type=int, nargs=3, default=(1200, 1200, 700), metavar="N",
                       help="optimisation steps of geometry, actions and identity (1200 1200 700)")  # fmt: skip
    train.add_argument("--batch", type=int, default=64, help="frames a step (%(default)s)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--threads", type=int, default=1, help="of PyTorch (%(default)s)")
    train.add_argument("--cache", default="", metavar="DIR", help="where drawn heads are kept (the user's cache)")
    train.add_argument("--workers", type=int, default=2, help="processes that draw (%(default)s)")
    validate = commands.add_parser("validate", help="measure the files on identities kept for measuring")
    validate.add_argument("--extractors", type=Path, metavar="DIR", help="the files' folder (those that ship)")
    validate.add_argument("--identities", type=int, default=200, help="how many heads to measure on (%(default)s)")
    validate.add_argument("--write", action="store_true", help="write the measured noise into the files of DIR")
    validate.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw metrics by regressors over metrics by truth"
    )
    validate.add_argument("--workers", type=int, default=2, help="processes that draw (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return guarded("python -m dagan_rt.evaluation.heads", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "train":
        from dagan_rt.evaluation.heads.run import train

        train(arguments)
    else:
        from dagan_rt.evaluation.heads.run import validate

        validate(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
