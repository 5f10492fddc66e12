"""Print what a driven frame costs on a CPU, by engine, precision and form of the graphs: `python benchmarks/cpu.py`."""

from __future__ import annotations

import sys

from dagan_rt.benchmarking.cpu import main

if __name__ == "__main__":
    sys.exit(main())
