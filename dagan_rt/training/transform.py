"""A random smooth warp of the image plane: the known transform of the equivariance loss.

The warp is an affine map plus a thin-plate spline. It maps a place in the *transformed* frame to the place in the
original frame whose colour it shows, so `frame` samples with it, and key points found in the transformed frame are
taken back to the original frame by `warp`: the T^-1 of supplementary equation 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dagan_rt.networks.geometry import coordinate_grid

CONTROL_POINTS_A_SIDE = 5
_LOG_OFFSET = 1e-6  # keeps log finite where a point meets a control point


@dataclass(frozen=True)
class Transform:
    """A batch of warps, one for each frame of a batch.

    theta: [B, 2, 3] float, the affine part (identity = [[1, 0, 0], [0, 1, 0]]).
    control_params: [B, 1, 25] float, the spline's weight at each of 5 x 5 control points on [-1, 1]^2, row by row.

    The spline moves x and y by the same amount, and measures distances in the L1 norm; both as the published
    training of the First Order Motion Model does, which the paper adopts (supplementary section A.1).

    Raises ValueError for other shapes.
    """

    theta: Tensor
    control_params: Tensor

    def __post_init__(self) -> None:
        batch, points = self.theta.shape[0], CONTROL_POINTS_A_SIDE**2
        if tuple(self.theta.shape) != (batch, 2, 3):
            raise ValueError(f"theta must be [B, 2, 3], got {tuple(self.theta.shape)}")
        if tuple(self.control_params.shape) != (batch, 1, points):
            got = tuple(self.control_params.shape)
            raise ValueError(f"control_params must be [B, 1, {points}] = ({batch}, 1, {points}), got {got}")

    @classmethod
    def random(
        cls,
        batch: int,
        sigma_affine: float = 0.05,
        sigma_tps: float = 0.005,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Transform:
        """Draw one warp for each of `batch` frames.

        Drawn on the generator's own device and then moved, so that a seed gives one sequence whatever the device.
        """
        home = generator.device if generator is not None else torch.device("cpu")
        theta = torch.eye(2, 3) + sigma_affine * torch.randn(batch, 2, 3, generator=generator, device=home).cpu()
        spline = sigma_tps * torch.randn(batch, 1, CONTROL_POINTS_A_SIDE**2, generator=generator, device=home)
        return cls(theta.to(device), spline.to(device))

    def to(self, device: torch.device | str) -> Transform:
        """The same warps on another device."""
        return Transform(self.theta.to(device), self.control_params.to(device))

    def warp(self, points: Tensor) -> Tensor:
        """Places in the original frame, for `points` [B, N, 2] = (x, y) in the transformed one. Returns [B, N, 2]."""
        # Not a matrix product: autocast would run that in half precision, too coarse for coordinates.
        affine = (self.theta[:, None, :, :2] * points.unsqueeze(2)).sum(-1) + self.theta[:, None, :, 2]
        _, distance = self._to_control_points(points)
        bend = (distance.square() * torch.log(distance + _LOG_OFFSET) * self.control_params).sum(-1, keepdim=True)
        return affine + bend

    def jacobian(self, points: Tensor) -> Tensor:
        """Derivative of `warp` at `points` [B, N, 2], in closed form. Returns [B, N, 2, 2], rows = outputs."""
        offset, distance = self._to_control_points(points)
        slope = 2 * distance * torch.log(distance + _LOG_OFFSET) + distance.square() / (distance + _LOG_OFFSET)
        bend = ((slope * self.control_params).unsqueeze(-1) * offset.sign()).sum(2)  # [B, N, 2]
        return self.theta[:, None, :, :2] + bend.unsqueeze(2)

    def frame(self, image: Tensor) -> Tensor:
        """Show `image` [B, C, H, W] through the warp: same shape and range. Reflected beyond the border."""
        batch, _, height, width = image.shape
        pixels = coordinate_grid(height, width, image).view(1, -1, 2).expand(batch, -1, -1)
        grid = self.warp(pixels).view(batch, height, width, 2)
        return F.grid_sample(image, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def _to_control_points(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets [B, N, 25, 2] and L1 distances [B, N, 25] from `points` to the control points."""
        control = coordinate_grid(CONTROL_POINTS_A_SIDE, CONTROL_POINTS_A_SIDE, points).view(1, 1, -1, 2)
        offset = points.unsqueeze(2) - control
        return offset, offset.abs().sum(-1)
