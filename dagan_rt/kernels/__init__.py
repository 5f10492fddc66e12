"""The CUDA kernels: functions on GPU arrays of PyTorch, CuPy, PyCUDA or anyone else, on the caller's stream.

Each takes arrays with `__cuda_array_interface__` or DLPack and returns an array of the caller's library. With
`reference=True` the PyTorch twin beside the kernel runs instead, on the CPU too. Importing loads and compiles nothing;
a kernel is loaded, and where no fat binary fits compiled, when it is first called on a device.
"""

from __future__ import annotations

# At once, for a function has the name of its module: whoever imports a module later still finds the function here.
from dagan_rt.kernels.antialias import antialias
from dagan_rt.kernels.conv2d import Config, Packed, configs, conv2d, pack
from dagan_rt.kernels.cross_attention import cross_attention
from dagan_rt.kernels.dense_flow import dense_flow
from dagan_rt.kernels.flow_warp import flow_warp
from dagan_rt.kernels.gather import gather
from dagan_rt.kernels.image import image_to_features, image_to_planes, planes_to_image
from dagan_rt.kernels.keypoints import soft_keypoints, transfer
from dagan_rt.kernels.normalize import normalize_relu
from dagan_rt.kernels.pooling import max_pool
from dagan_rt.kernels.sparse_motion import sparse_motion

__all__ = [
    "Config", "Packed", "antialias", "configs", "conv2d", "cross_attention", "dense_flow", "flow_warp", "gather",
    "image_to_features", "image_to_planes", "max_pool", "normalize_relu", "pack", "planes_to_image",
    "soft_keypoints", "sparse_motion", "transfer",
]  # fmt: skip
