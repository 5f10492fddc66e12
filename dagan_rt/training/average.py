"""An exponential moving average of the weights (EMA), which is steadier than the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

WARM_UP = 10  # updates after which the average is no longer mostly the last weights


class Average:
    """Averages of every parameter of a model, by name: they outlive its changes of size.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that the first weights do not linger. Buffers, such
    as the statistics of batch norm, are not averaged: the model's own are used.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's present weights."""
        decay = min(self.decay, (1 + self.updates) / (WARM_UP + self.updates))
        self.updates += 1
        own, theirs = zip(
            *((self.values[name], value.detach()) for name, value in model.named_parameters()), strict=True
        )
        torch._foreach_lerp_(list(own), list(theirs), 1 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the averaged weights; its own come back at the end."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.data, self.values[name] = self.values[name], parameter.data

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return {"updates": self.updates, "values": self.values}

    @torch.no_grad()
    def load(self, updates: int, values: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave, for a model of the same parameters."""
        self.updates = updates
        for name, value in self.values.items():
            value.copy_(values[name])
