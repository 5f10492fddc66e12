"""Run as a process of its own: builds TensorRT-RTX engines with plugins from ONNX files, and prints what it saw.

A library that cannot make a Python plugin aborts, which must not be the test's process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import onnx
import tensorrt_rtx as trt

from dagan_rt import plugins
from dagan_rt.export import plugin_nodes


def build(path: str) -> dict[str, Any]:
    model = onnx.load(path)
    nodes = plugin_nodes.insert(model)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    if not parser.parse(model.SerializeToString()):
        return {"errors": [str(parser.get_error(i)) for i in range(parser.num_errors)]}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    for tensor in tensors:
        if -1 in tensor.shape:
            rest = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, (1, *rest), (2, *rest), (8, *rest))
    if any(-1 in tensor.shape for tensor in tensors):
        config.add_optimization_profile(profile)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    made = {}
    for layer in layers:
        if layer.type == trt.LayerType.PLUGIN_V3:
            made[layer.name] = [
                [list(layer.get_output(i).shape), layer.get_output(i).dtype.name] for i in range(layer.num_outputs)
            ]
    engine = builder.build_serialized_network(network, config)
    return {"nodes": nodes, "plugins": made, "bytes": engine.nbytes if engine is not None else 0}


if __name__ == "__main__":
    plugins.register(trt, "python")
    plugins.register(trt, "python")  # is done once
    print(json.dumps({path: build(path) for path in sys.argv[1:]}))
