"""Cross-modal attention: depth features ask where in the warped image feature to look (paper, Section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(QᵀK) over key positions, without a 1/√d scale, times V.

    `query`, `key` [B, D, N], `value` [B, C, N] -> [B, C, N].
    """
    weights = torch.softmax(torch.matmul(query.transpose(1, 2), key), dim=-1)  # [B, N query, N key]
    return torch.matmul(value, weights.transpose(1, 2))


class CrossModalAttention(nn.Module):
    """Out = γ · attention + warped feature; γ starts at zero."""

    def __init__(self, channels: int, query_width: int) -> None:
        super().__init__()
        # Another implementation may take its place.
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_attention
        self.query_conv = nn.Conv2d(channels, query_width, 1)
        self.key_conv = nn.Conv2d(channels, query_width, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def query(self, feature: Tensor) -> Tensor:
        """Queries of the depth feature (or of the warped feature itself): [B, C, h, w] -> [B, D, h, w]."""
        return torch.relu(self.query_conv(feature))

    def forward(self, query: Tensor, warped: Tensor) -> Tensor:
        """`query` [B, D, h, w], `warped` [B, C, h, w] -> [B, C, h, w]."""
        key = torch.relu(self.key_conv(warped))
        value = torch.relu(self.value_conv(warped))
        attended = self.attend(query.flatten(2), key.flatten(2), value.flatten(2))
        return self.gamma * attended.reshape(warped.shape) + warped
