"""Several processes that train one model, as `torchrun` starts them; one process is the same code, with nobody to ask.

The batch of a step is split over the processes, DistributedDataParallel averages their gradients, and batch norm uses
the statistics of the whole batch: the result is that of one process with all of it, but for rounding.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dagan_rt.errors import InputError

PATIENCE = datetime.timedelta(hours=2)  # the others wait while one process draws heads, evaluates or saves


class World:
    """The processes of this run: which one this is, of how many, and what they do together."""

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size
        self._control: Any = None  # the group for small decisions, on the CPU whatever the networks are on

    @classmethod
    def join(cls, device: str = "auto") -> World:
        """The processes that `torchrun` describes in the environment (RANK, WORLD_SIZE, LOCAL_RANK), or this one.

        device: auto, cpu or cuda; with several processes a GPU each, by LOCAL_RANK. InputError for one that is missing.
        """
        size = _number("WORLD_SIZE", 1)
        chosen = _device(device, _number("LOCAL_RANK", 0) if size > 1 else None)
        if size == 1:
            return cls(chosen)
        world = cls(chosen, _number("RANK", 0), size)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
        world._control = dist.new_group(backend="gloo", timeout=PATIENCE)
        return world

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes, evaluates and speaks."""
        return self.rank == 0

    def share(self, batch: int) -> int:
        """What this process takes of a batch. InputError where it does not divide."""
        if batch % self.size:
            raise InputError(f"batch must be a multiple of the {self.size} processes that share it, got {batch}")
        return batch // self.size

    def greatest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes: how they agree to stop, or to save."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control)
        return tensor.tolist()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes; one that is not finite anywhere is so everywhere."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            dist.barrier(group=self._control)

    def together(self, step: nn.Module) -> nn.Module:
        """`step` with gradients averaged over the processes; as it is where nothing in it trains."""
        if self.size == 1 or not any(parameter.requires_grad for parameter in step.parameters()):
            return step
        # Which parameters a step reaches depends on its loss weights. Buffers are equal already: see `synchronized`.
        return DistributedDataParallel(step, broadcast_buffers=False, find_unused_parameters=True)

    def synchronized(self, network: Any) -> Any:
        """`network` whose batch norms use the statistics of the whole batch; keys of its state dict stay."""
        if self.size == 1:
            return network
        if self.device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(network)
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncBatchNorm2d
        return network

    def leave(self) -> None:
        """Give up the process group, where there is one."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on the CPU, where PyTorch's `SyncBatchNorm` does not go.

    Every process must hold equally many values. Gradients flow through the shared mean and variance.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, C, H, W] -> [B, C, H, W]."""
        if not self.training:
            return super().forward(x)
        size = dist.get_world_size()
        values = x.float()
        mean = all_reduce(values.mean((0, 2, 3))) / size
        centred = values - mean[:, None, None]
        variance = all_reduce(centred.square().mean((0, 2, 3))) / size
        self._remember(mean.detach(), variance.detach(), size * values.numel() // values.shape[1])
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)


def first_process() -> bool:
    """Whether this is the only process, or the first of those that `torchrun` started."""
    return _number("RANK", 0) == 0


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Every batch norm of a network, synchronized or not."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise InputError(f"the environment variable {name} must be a whole number, as torchrun sets it, got {text!r}")
    return int(text or default)


def _device(name: str, local_rank: int | None) -> torch.device:
    found = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if found else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be auto, cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and not found:
        raise InputError(f"device {name!r} was asked for, but PyTorch finds no CUDA device; use cpu or auto")
    if device.type == "cuda" and local_rank is not None:
        if local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise InputError(f"process {local_rank} of this machine needs a GPU of its own, but it has {count}")
        return torch.device("cuda", local_rank)
    return device
