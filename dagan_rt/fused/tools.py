"""What the fused networks are built with: maps in channels-last memory, packed weights, convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dagan_rt import kernels
from dagan_rt.fused.tuning import Tuning

GRANULE = 8  # channels of a map come in eights: 16 bytes in 16 bit


def padded(channels: int) -> int:
    """Channels of a map that holds so many."""
    return -(-channels // GRANULE) * GRANULE


class Tools:
    """One device, one dtype; weights are packed once, however many instances of a network there are."""

    def __init__(
        self,
        device: str | torch.device,
        dtype: str = "float16",
        *,
        reference: bool = False,
        tuning: Tuning | None = None,
    ) -> None:
        """`dtype`: "float16" or "bfloat16", or "float32" with `reference`, which runs the kernels' PyTorch twins."""
        self.device, self.dtype, self.reference = torch.device(device), dtype, reference
        self.tuning = tuning
        self._kept: dict[str, Any] = {}
        self.bytes = 0  # of maps and weights

    def maps(self, B: int, C: int, H: int, W: int, dtype: str | None = None) -> Tensor:
        """Zeros [B, C, H, W] in channels-last memory; `C` as it is, so that a uint8 image may have three."""
        kind = getattr(torch, dtype or self.dtype)
        made = torch.zeros((B, H, W, C), dtype=kind, device=self.device)
        self.bytes += made.nbytes
        return made.permute(0, 3, 1, 2)

    def images(self, B: int, side: int) -> Tensor:
        """Zeros, uint8 [B, side, side, 3]."""
        made = torch.zeros((B, side, side, 3), dtype=torch.uint8, device=self.device)
        self.bytes += made.nbytes
        return made

    def numbers(self, *shape: int) -> Tensor:
        """Zeros, float32 and contiguous: key points and the like."""
        made = torch.zeros(shape, device=self.device)
        self.bytes += made.nbytes
        return made

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gave under this name the first time."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def vector(self, values: Tensor) -> Tensor:
        """A float32 copy on the device."""
        made = values.detach().to(self.device, torch.float32).contiguous()
        self.bytes += made.nbytes
        return made

    def convolution(
        self,
        name: str,
        conv: Any,
        norm: Any = None,
        *,
        parts: Sequence[int] = (),
        change: Callable[[Tensor], Tensor] | None = None,
        upsample: bool = False,
        **options: Any,
    ) -> Convolution:
        """A convolution ready to run; several of the same input become one, their outputs one after the other.

        conv: a torch.nn.Conv2d, or several. norm: the batch norm that follows it, folded into it. parts: channels of
        the maps that its input concatenates, each of which is padded by itself. change: of the weight
        [Cout, Cin, k, k] before it is padded. options: of `kernels.conv2d`.
        """

        def make() -> tuple[kernels.Packed, ...]:
            weight, bias = folded([conv] if isinstance(conv, nn.Conv2d) else conv, norm)
            weight, bias = spread(change(weight) if change else weight, parts).to(self.device), bias.to(self.device)
            # Four phases have 4/9 of the multiplications and 16/9 of the weights: what is better depends on the batch.
            made = tuple(
                kernels.pack(weight, bias, self.dtype, upsample=upsample, phases=phases)
                for phases in ((4, 1) if upsample else (1,))
            )
            arrays = (array for it in made for array in (it.weight, it.bias, it.swizzled, it.spread))
            self.bytes += sum(array.nbytes for array in arrays if array is not None)
            return made

        first = conv if isinstance(conv, nn.Conv2d) else conv[0]
        options.setdefault("stride", int(first.stride[0]))
        options.setdefault("padding", int(first.padding[0]))
        return Convolution(self, name, self.kept(name, make), options)


class Convolution:
    """One convolution of a network: weights, packed in one or two ways, and options; called on maps of any batch."""

    def __init__(self, tools: Tools, name: str, packs: tuple[kernels.Packed, ...], options: dict[str, Any]) -> None:
        self._tools, self._name, self._packs, self._options = tools, name, packs, options

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None, normalized: Any = None) -> Tensor:
        """Run on `x` and write to `out`, and return it; `residual` and `normalized` as `kernels.conv2d` takes them.

        The maps may have more channels than the convolution: the padding is left as it is.
        """
        channels = self._packs[0].out_channels
        if residual is not None:
            residual = residual[:, :channels]
        call = dict(self._options, residual=residual, normalized=normalized, out=out[:, :channels])
        if self._tools.reference:
            kernels.conv2d(x, self._packs[0], reference=True, **call)
            return out
        packed, config = self._packs[0], None
        if self._tools.tuning is not None:
            packed, config = self._tools.tuning.choose(self._name, x, self._packs, call)
        kernels.conv2d(x, packed, config=config, **call)
        return out


def folded(convs: Sequence[nn.Conv2d], norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Weight [Cout, Cin, k, k] and bias [Cout] of convolutions and the batch norm after them, float32."""
    weight = torch.cat([conv.weight.detach().double() for conv in convs])
    biases = [torch.zeros(len(it.weight)).to(it.weight) if it.bias is None else it.bias.detach() for it in convs]
    bias = torch.cat(biases).double()
    if norm is not None:
        scale, shift = (it.double() for it in affine(norm))
        weight, bias = weight * scale[:, None, None, None], bias * scale + shift
    return weight.float(), bias.float()


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation as x · scale + shift, float32 [C] each."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale.float(), (norm.bias.detach().double() - norm.running_mean.double() * scale).float()


def spread(weight: Tensor, parts: Sequence[int]) -> Tensor:
    """Zeros in a weight's input channels where the parts of its input are padded; no parts: at its end alone."""
    pieces = []
    for part in torch.split(weight, list(parts) or [weight.shape[1]], dim=1):
        missing = padded(part.shape[1]) - part.shape[1]
        pieces += [part, part.new_zeros(len(part), missing, *part.shape[2:])]
    return torch.cat(pieces, dim=1)
