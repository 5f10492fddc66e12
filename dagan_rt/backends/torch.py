"""PyTorch, from the checkpoint inside the bundle: the reference the other backends are compared with."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np

from dagan_rt.bundle import Bundle
from dagan_rt.errors import InputError

RANK = 90


def missing(bundle: Bundle | None = None) -> str | None:
    """None, or why this backend cannot run here, or not this bundle."""
    if importlib.util.find_spec("torch") is None:
        return "the package torch is not installed: run pip install 'dagan-rt[torch]'"
    if bundle is not None and bundle.weights is None:
        return (
            f"bundle {bundle.path} holds no weights for the torch backend: export it without --no-torch-weights, "
            "or use the backend onnxruntime"
        )
    return None


def open(bundle: Bundle, threads: int | None = None) -> TorchBackend:
    """Load the bundle's checkpoint; raises InputError if it was exported without one."""
    return TorchBackend(load(bundle), threads)


def load(bundle: Bundle) -> Any:
    """The bundle's networks on the CPU, a dagan_rt.networks.model.Model; raises as `open`."""
    from dagan_rt import checkpoints

    if reason := missing(bundle):
        raise InputError(reason)
    assert bundle.weights is not None
    model = checkpoints.load(bundle.weights, depth=bundle.depth_weights)
    if model.config != bundle.config:
        raise InputError(f"{bundle.weights}: the checkpoint's networks are not those that the manifest describes")
    return model


class TorchBackend:
    """Runs the subnetworks as they are declared, without a graph; arrays are tensors on the model's device."""

    name = "torch"

    def __init__(self, model: Any, threads: int | None = None) -> None:
        """`model`: a dagan_rt.networks.model.Model, which is put in evaluation mode."""
        import torch

        from dagan_rt.export.subnetworks import subnetworks

        if threads is not None:
            torch.set_num_threads(threads)  # PyTorch has one setting for the whole process
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self._subnetworks = {subnetwork.name: subnetwork for subnetwork in subnetworks(model.config)}

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name of one graph."""
        import torch

        with torch.inference_mode():
            return self._subnetworks[graph].run(self.model, inputs)

    def from_image(self, image: np.ndarray) -> Any:
        """HWC uint8 RGB -> [1, 3, H, W] float32 in [0, 1]; the conversion happens on the device."""
        import torch

        pixels = torch.from_numpy(np.array(image)).to(self.device)
        return pixels.permute(2, 0, 1)[None].to(torch.float32).contiguous() / 255

    def to_image(self, prediction: Any) -> np.ndarray:
        """[1, 3, H, W] in [0, 1] -> HWC uint8 RGB."""
        import torch

        levels = (prediction[0].clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(1, 2, 0).contiguous().cpu().numpy()

    def from_numpy(self, values: np.ndarray) -> Any:
        """A float32 tensor on the device."""
        import torch

        return torch.from_numpy(np.array(values, np.float32)).to(self.device)

    def to_numpy(self, array: Any) -> np.ndarray:
        """A float32 array."""
        return array.detach().cpu().numpy()
