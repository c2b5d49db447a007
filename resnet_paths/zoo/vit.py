"""Small vision transformer: attention and MLP as residual blocks (Dosovitskiy et al. 2021)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["EncoderLayer", "ViT"]


class Attention(nn.Module):
    """Multi-head self-attention; if causal, no token attends to later tokens."""

    def __init__(self, width: int, num_heads: int, *, is_causal: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, token, width] to the same shape."""
        heads = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=self.is_causal)
        attended: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return attended


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, token, width] to the same shape."""
        y: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class EncoderLayer(nn.Module):
    """Two residual blocks, attention and MLP, with LayerNorm at the start of each branch."""

    def __init__(self, width: int, num_heads: int, hidden: int, *, is_causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, is_causal=is_causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, token, width] to the same shape."""
        x = x + self.attention(self.norm1(x))
        y: torch.Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """Vision transformer of 12 layers, 24 blocks, on patches of 4x4 pixels (Dosovitskiy et al. 2021).

    Width 96, three heads, hidden width 192. Positions are fixed sines and cosines, and the mean over tokens is
    classified, as in Beyer, Zhai and Kolesnikov 2022, without class token, for images of any size.

    Args:
        in_channels: Channels of the image.
        num_classes: Number of logits.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.width = 96
        self.patches = nn.Conv2d(in_channels, self.width, 4, stride=4)
        self.layers = nn.Sequential(*(EncoderLayer(self.width, 3, 192) for _ in range(12)))
        self.norm = nn.LayerNorm(self.width)
        self.fc = nn.Linear(self.width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, num_classes] of images [batch, in_channels, H, W]."""
        x = self.patches(x)
        x = (x + _positions(x)).flatten(2).transpose(1, 2)
        logits: torch.Tensor = self.fc(self.norm(self.layers(x)).mean(1))
        return logits

    def initialise(self, generator: torch.Generator) -> None:
        """Linear layers from a normal distribution of standard deviation 0.02, with biases of 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)


def _positions(x: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of rows and columns at width / 4 rates, [width, H, W], for tokens [batch, width, H, W]."""
    width, height, columns = x.shape[1:]
    rates = 10_000 ** -(torch.arange(width // 4, device=x.device, dtype=x.dtype) / (width // 4))
    by_row = rates[:, None, None] * torch.arange(height, device=x.device)[:, None].expand(height, columns)
    by_column = rates[:, None, None] * torch.arange(columns, device=x.device).expand(height, columns)
    return torch.cat([by_row.sin(), by_row.cos(), by_column.sin(), by_column.cos()])
