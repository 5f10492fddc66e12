"""python -m dagan_rt.training.geometry: how much of a face's shape a depth network has found."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dagan_rt.cli import guarded
from dagan_rt.errors import InputError, require
from dagan_rt.files import check_output


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m dagan_rt.training.geometry", description="Self-supervised face depth.", allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    score = commands.add_parser(
        "score",
        help="compare a depth network with the truth of synthetic heads",
        description="Compare a depth network with the truth inside the faces of held-out synthetic heads, beside two "
        "guesses that look at no picture: a constant depth, and an ellipsoid at the mean place of a face.",
    )
    score.add_argument("--depth", type=Path, required=True, metavar="DIR", help="folder with encoder.pth and depth.pth")
    score.add_argument("--identities", type=int, default=32, metavar="N", help="held-out heads, 3 frames each (32)")
    score.add_argument("--size", type=int, default=64, metavar="S", help="side in pixels, that of training (64)")
    score.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    score.add_argument("--picture", type=Path, metavar="FILE", help="write a PNG: image, depth, truth, error")
    score.set_defaults(run=run_score)
    return parser


def run_score(arguments: argparse.Namespace) -> int:
    """Print the table, write the files asked for; returns the exit code."""
    require("torch", extra="train", why="depth networks")
    from dagan_rt.checkpoints import load_depth_network
    from dagan_rt.training.geometry.score import METRICS, draw_faces, score_network
    from dagan_rt.training.heads import HELD_OUT

    for path, ending in ((arguments.json, ".json"), (arguments.picture, ".png")):
        if path is not None:
            check_output(path, [ending])
    if not 1 <= arguments.identities <= len(HELD_OUT):
        raise InputError(f"--identities must be from 1 to {len(HELD_OUT)}, got {arguments.identities}")
    if arguments.size % 32 or not 32 <= arguments.size <= 1024:
        raise InputError(f"--size must be a multiple of 32 from 32 to 1024, got {arguments.size}")
    network = load_depth_network(arguments.depth)
    faces = draw_faces(HELD_OUT[: arguments.identities], arguments.size)
    scores = score_network(network, faces)
    print(table(scores))
    print("\n".join(f"{name}: {meaning}" for name, meaning in METRICS.items()))
    if arguments.json is not None:
        result = {"faces": len(faces.images), "size": arguments.size, "scores": scores}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.picture is not None:
        from dagan_rt.training.geometry.picture import depth_sheet
        from dagan_rt.training.sheets import write_sheet

        write_sheet(arguments.picture, depth_sheet(network, faces))
    return 0


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Methods in columns, metrics in rows, as Markdown."""
    methods = list(scores)
    lines = ["| | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for metric in scores[methods[0]]:
        lines.append(f"| {metric} | " + " | ".join(f"{scores[method][metric]:.4f}" for method in methods) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 2 bad input."""

    def run() -> int:
        arguments = build_parser().parse_args(argv)
        return int(arguments.run(arguments))

    return guarded("dagan-rt depth", run)


if __name__ == "__main__":
    sys.exit(main())
