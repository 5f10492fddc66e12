"""What `--smooth` does to key points: how much less they tremble in noise, and how far they lag behind a moving head.

    python benchmarks/smoothing.py --bundle out/bundle

A held-out synthetic head stands still in noise as of a camera's sensor, then moves without noise. Distances are means
over key points and frames, in pixels of the model's picture; the lag is the distance over that from frame to frame.
"""

from __future__ import annotations

import argparse
from fractions import Fraction

import numpy as np

from dagan_rt import driving
from dagan_rt.driving import Steady
from dagan_rt.reenactor import Reenactor
from dagan_rt.training.heads import draw_clip

IDENTITY, FRAMES, RATE, NOISE = 1_000_101, 50, 25, 6.0  # held out; frames a second; levels of 255


def main() -> None:
    """Print a row a setting; the first is no filter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, metavar="DIR", help="exported model, as `make demo` writes")
    model = Reenactor(parser.parse_args().bundle, threads=1)
    moving = draw_clip(IDENTITY, FRAMES, model.size).frames
    noise = np.random.default_rng(0).normal(0, NOISE, moving.shape)
    still = (moving[:1] + noise).clip(0, 255).round().astype(np.uint8)
    found = {
        name: [model.keypoints(frame) for frame in frames] for name, frames in (("still", still), ("moving", moving))
    }
    unit = (model.size - 1) / 2
    speed = np.abs(np.diff(values(found["moving"]), axis=0)).mean() * unit
    chosen = driving.LEAST_CUTOFF, driving.BETA
    print(f"{model.backend_name}, {model.size} x {model.size}; the moving head: {speed:.2f} pixels a frame")
    print("cutoff Hz  beta  trembling, pixels a frame  displaced, pixels  lag, frames")
    for setting in (None, chosen, (1.0, 1.0), (1.0, 4.0), (2.0, 4.0), (1.0, 10.0), (1.0, 40.0)):
        shown = {name: values(smoothed(points, setting)) for name, points in found.items()}
        trembling = np.abs(np.diff(shown["still"][10:], axis=0)).mean() * unit
        displaced = np.abs(shown["moving"] - values(found["moving"])).mean() * unit
        name = "{:>9}  {:>4}".format(*(setting or ("none", "")))
        print(f"{name}  {trembling:>25.3f}  {displaced:>17.2f}  {displaced / speed:>11.2f}")


def smoothed(points: list, setting: tuple[float, float] | None) -> list:
    """The key points of a clip as `--smooth` would give them with other constants; None: as they are."""
    if setting is None:
        return points
    driving.LEAST_CUTOFF, driving.BETA = setting
    steady = Steady()
    return [steady(it, Fraction(number, RATE)) for number, it in enumerate(points)]


def values(points: list) -> np.ndarray:
    """[T, K, 2]."""
    return np.concatenate([it.value for it in points])


if __name__ == "__main__":
    main()
