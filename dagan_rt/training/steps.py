"""One optimisation step: what is minimised, as modules that several processes can share, and how weights are moved."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dagan_rt.keypoints import KeyPoints
from dagan_rt.networks.model import Model
from dagan_rt.training.distributed import batch_norms
from dagan_rt.training.losses import LossWeights, discriminator_loss, generator_losses
from dagan_rt.training.transform import Transform
from dagan_rt.training.vgg import Vgg19

if TYPE_CHECKING:
    from dagan_rt.training.geometry import PoseNetwork

Terms = dict[str, Tensor]
Batch = dict[str, Tensor]


class GeneratorStep(nn.Module):
    """The terms that train generator, key points and depth."""

    def __init__(self, model: Model, vgg: Vgg19 | None) -> None:
        super().__init__()
        self.generator, self.keypoints, self.depth = model.generator, model.keypoints, model.depth
        self._whole = (model, vgg)  # a tuple: discriminator and VGG are used here, but not trained

    def forward(
        self, batch: Batch, weights: LossWeights, warp: Transform | None
    ) -> tuple[Terms, tuple[Tensor, Tensor, Tensor] | None]:
        """(weighted terms, (prediction, driving key points, their Jacobians) or None), the latter without gradient."""
        model, vgg = self._whole
        terms, generated, points = generator_losses(model, batch, weights, vgg, warp)
        if generated is None:
            return terms, None
        return terms, (generated.prediction.detach(), points.value.detach(), points.jacobian.detach())


class DiscriminatorStep(nn.Module):
    """The term that trains the discriminator."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.discriminator = model.discriminator

    def forward(self, driving: Tensor, shown: tuple[Tensor, Tensor, Tensor], weight: float) -> Terms:
        """`shown` is what `GeneratorStep` gave beside its terms."""
        prediction, value, jacobian = shown
        loss = discriminator_loss(self.discriminator, driving, prediction, KeyPoints(value, jacobian), weight)
        return {"discriminator": loss}


class DepthStep(nn.Module):
    """The terms of self-supervised depth, which train the depth network and the pose network."""

    def __init__(self, model: Model, pose: PoseNetwork) -> None:
        super().__init__()
        assert model.depth is not None
        self.depth, self.pose = model.depth, pose

    def forward(self, batch: Batch, weights: LossWeights) -> Terms:
        """The weighted terms of a batch of `before`, `target`, `after`."""
        from dagan_rt.training.geometry import depth_losses

        return depth_losses(self.depth, self.pose, batch, weights)


class Mover:
    """Moves weights against the gradient of a loss: scaled where the precision is fp16, clipped, guarded.

    A step whose gradient is not finite moves nothing. `parts` are the networks by name, `optimizers` theirs.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        precision: str,
        clip: float,
        device: torch.device,
    ) -> None:
        self.parts, self.optimizers, self.clip, self.device = parts, optimizers, clip or math.inf, device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Where losses are computed: matrix products in 16 bit, where the recipe asks for it."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def move(self, terms: Terms, names: Sequence[str]) -> str | None:
        """One step of the networks `names`; what was not finite, in which case none of them has moved, or None.

        In fp16 an overflow is a part of the search for the scale and not a fault: the step is left out all the same.
        """
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(torch.stack([term.float() for term in terms.values()]).sum()).backward()
        bad = None
        reached = [name for name in names if any(p.grad is not None for p in self.parts[name].parameters())]
        for name in reached:
            self.scaler.unscale_(self.optimizers[name])
            norm = nn.utils.clip_grad_norm_(self.parts[name].parameters(), self.clip)
            if bad is None and not math.isfinite(float(norm)):
                bad = f"gradient of the {name} network"
        if bad is None or self.scaler.is_enabled():
            for name in reached:
                self.scaler.step(self.optimizers[name])
            self.scaler.update()
            return None if self.scaler.is_enabled() else bad
        return bad


class Statistics:
    """The running statistics of batch norms before a step, to go back to when the step was a bad one."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        norms = [norm for part in parts.values() for norm in batch_norms(part)]
        self.buffers = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
        self.kept: Tensor | None = None

    def keep(self) -> None:
        """Remember them: one copy."""
        self.kept = torch.cat(self.buffers) if self.buffers else None

    def restore(self) -> None:
        """Put them back."""
        if self.kept is not None:
            for buffer, value in zip(self.buffers, self.kept.split([len(b) for b in self.buffers]), strict=True):
                buffer.copy_(value)
