"""Cross-modal attention: depth features ask where in the warped image feature to look (paper, Section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(QᵀK) over key positions, without a 1/√d scale: `query` [B, D, M], `key` [B, D, N] -> [B, M, N]."""
    return torch.softmax(torch.matmul(query.transpose(1, 2), key), dim=-1)


def cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention's weights times V: `query` [B, D, M], `key` [B, D, N], `value` [B, C, N] -> [B, C, M]."""
    return torch.matmul(value, attention_weights(query, key).transpose(1, 2))


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

    def key(self, warped: Tensor) -> Tensor:
        """What the warped feature answers queries with: [B, C, h, w] -> [B, D, h, w]."""
        return torch.relu(self.key_conv(warped))

    def forward(self, query: Tensor, warped: Tensor) -> Tensor:
        """`query` [B, D, h, w], `warped` [B, C, h, w] -> [B, C, h, w]."""
        key = self.key(warped)
        value = torch.relu(self.value_conv(warped))
        attended = self.attend(query.flatten(2), key.flatten(2), value.flatten(2))
        return self.gamma * attended.reshape(warped.shape) + warped
