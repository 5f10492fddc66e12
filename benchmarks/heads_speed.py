"""Print how fast synthetic heads are drawn: `python benchmarks/heads_speed.py [processes]`."""

from __future__ import annotations

import sys
import time
from multiprocessing import get_context

from dagan_rt.training.heads import draw_clip

CLIPS, FRAMES = 8, 16


def draw(job: tuple[int, int]) -> float:
    """Processor seconds of one clip: the number to trust on a busy machine."""
    identity, size = job
    start = time.process_time()
    draw_clip(identity, FRAMES, size)
    return time.process_time() - start


def main(processes: int) -> None:
    with get_context("spawn").Pool(processes) as pool:
        pool.map(draw, [(0, 64)] * processes, chunksize=1)  # imports and first calls are not counted
        for size in (64, 128, 256):
            start = time.perf_counter()
            busy = pool.map(draw, [(identity, size) for identity in range(CLIPS)], chunksize=1)
            seconds = time.perf_counter() - start
            frames = CLIPS * FRAMES
            print(
                f"{size} px: {frames / seconds:.0f} frames/s with {processes} processes, "
                f"{1000 * sum(busy) / frames:.1f} ms of processor a frame"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
