"""The face detector that ships with dagan-rt: CenterFace with its weights in 8 bits, a quarter of the file.

    python -m dagan_rt.export.detector --out export/detector/centerface.onnx

It is computed in float32 all the same: ONNX Runtime turns the weights back when it loads the graph.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dagan_rt import cli
from dagan_rt.errors import require
from dagan_rt.faces import detector_file, with_free_size
from dagan_rt.files import AtomicFile, check_output

LEAST = 512  # elements of a tensor that is worth it


def main(argv: list[str] | None = None) -> int:
    """Write the file; 0 on success, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m dagan_rt.export.detector", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .onnx file to write")
    out = parser.parse_args(argv).out
    return cli.guarded("python -m dagan_rt.export.detector", lambda: write(out))


def write(out: Path) -> int:
    """Write CenterFace, from the extra `faces`, with weights in 8 bits."""
    check_output(out, (".onnx",))
    onnx = require("onnx", extra="faces", why="writing the face detector")
    model = onnx.load_model_from_string(with_free_size(detector_file()))
    weights_in_8_bits(model)
    onnx.checker.check_model(model)
    file = AtomicFile(out)
    file.write(model.SerializeToString())
    file.commit()
    print(f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


def weights_in_8_bits(model: Any) -> None:
    """Replace the large float32 initializers of a graph by int8 and a scale for each element of their first axis.

    Symmetric: 127 is the largest magnitude of the element. Opset 9 has no DequantizeLinear for channels: a Cast and a
    Mul in front of the graph do the same, and are folded where a runtime loads it.
    """
    from onnx import TensorProto, helper, numpy_helper

    added = []
    for tensor in list(model.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < LEAST:
            continue
        scale = np.abs(values).reshape(len(values), -1).max(1).reshape(-1, *[1] * (values.ndim - 1)) / np.float32(127)
        scale = np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(np.rint(values / scale).astype(np.int8), f"{name}_int8"))
        model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
        added += [
            helper.make_node("Cast", [f"{name}_int8"], [f"{name}_float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}_float", f"{name}_scale"], [name]),
        ]
    nodes = [*added, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


if __name__ == "__main__":
    sys.exit(main())
