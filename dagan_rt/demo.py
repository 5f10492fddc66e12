"""`make demo`: export the demo weights, animate a held-out portrait with a held-out clip, lay the result out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from dagan_rt import cli
from dagan_rt._assets import asset
from dagan_rt.video import VideoReader

SHOWN = 8  # frames on the contact sheet


def main(argv: list[str] | None = None) -> int:
    """Write bundle/, demo.mp4 and demo.png into the output folder; 0 on success, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m dagan_rt.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    out = parser.parse_args(argv).out
    return cli.guarded("python -m dagan_rt.demo", lambda: make(out))


def make(out: Path) -> int:
    """The three steps; stops at the first that fails."""
    out.mkdir(parents=True, exist_ok=True)
    return export(out) or animate(out) or lay_out(out)


def export(out: Path) -> int:
    """The demo weights as a bundle of ONNX graphs, each compared with PyTorch."""
    from dagan_rt.export.__main__ import main as run

    weights = asset("train", "demo", "model.pth.tar")
    depth = asset("train", "demo", "depth")
    return run(["--checkpoint", str(weights), "--depth", str(depth), "--out", str(out / "bundle"), "--force"])


def animate(out: Path) -> int:
    """source | driving | result, as a video; prints the time a frame takes."""
    portrait, clip = asset("train", "demo", "portrait.png"), asset("train", "demo", "driving.mp4")
    files = ["--source", str(portrait), "--driving", str(clip), "--out", str(out / "demo.mp4")]
    return cli.main(["animate", "--bundle", str(out / "bundle"), *files, "--side-by-side"])


def lay_out(out: Path) -> int:
    """A few frames of the video side by side on one sheet."""
    from dagan_rt.training.sheets import contact_sheet, write_sheet

    with VideoReader(out / "demo.mp4") as reader:
        frames = list(reader)
    chosen = [frames[index] for index in np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)]
    source, driving, result = ([panel for panel in panels] for panels in zip(*map(_panels, chosen), strict=True))
    sheet = contact_sheet([source[:1] + driving, source[:1] + result], row_labels=["driving", "result"])
    write_sheet(out / "demo.png", sheet)
    print(f"{out / 'demo.png'}: the portrait, then frames of the driving clip over the portrait's answer")
    return 0


def _panels(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = frame.shape[1] // 3
    return frame[:, :size], frame[:, size : 2 * size], frame[:, 2 * size :]


if __name__ == "__main__":
    sys.exit(main())
