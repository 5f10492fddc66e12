"""The run's curves and pictures for TensorBoard, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


class Board:
    """Writes to `folder`, or nowhere where `wanted` is False or TensorBoard is missing. Nothing waits for it."""

    def __init__(self, folder: Path, wanted: bool) -> None:
        self.folder, self.wanted = folder, wanted
        self.writer: Any = None

    def continue_from(self, step: int) -> None:
        """Open the folder; what it says of steps after `step` is void."""
        if not self.wanted:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # an extra; the log has the same numbers
            return
        self.writer = SummaryWriter(self.folder, purge_step=step + 1 if step else None)

    def row(self, row: dict[str, Any]) -> None:
        """A row of the log: loss terms, speed, rates, the held-out error."""
        if self.writer is None:
            return
        groups = {"loss": row["terms"], "held out": row.get("held_out", {})}
        groups["run"] = {name: row[name] for name in ("samples_per_second", "waiting", "learning_rate")}
        for group, values in groups.items():
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, row["step"])

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture, uint8 [H, W, 3]."""
        if self.writer is not None:
            self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is left."""
        if self.writer is not None:
            self.writer.close()
