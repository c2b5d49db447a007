"""A small language model: the transformer of GPT-2, on bytes (Radford et al. 2019)."""

from __future__ import annotations

import torch
from torch import nn

from resnet_paths.zoo.vit import EncoderLayer

__all__ = ["LanguageModel"]


class LanguageModel(nn.Module):
    """Causal transformer that predicts the next byte of a text.

    The architecture of GPT-2 at a small size: learned positions, LayerNorm at the start of each branch and before the
    last linear layer. It is not among the networks by name, which take images.

    Args:
        num_layers: Number of layers, each with an attention and an MLP block.
        width: Width of the state.
        num_heads: Number of attention heads.
        context: Maximum number of bytes in the input.
    """

    def __init__(self, num_layers: int = 6, width: int = 64, num_heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(context, width)
        self.layers = nn.Sequential(
            *(EncoderLayer(width, num_heads, 4 * width, is_causal=True) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 256] of the byte that follows the bytes [batch, position]."""
        return self.at_every_position(text)[:, -1]

    def at_every_position(self, text: torch.Tensor) -> torch.Tensor:
        """Logits [batch, position, 256] of the byte that follows each position of the bytes [batch, position]."""
        state = self.bytes(text) + self.places.weight[: text.shape[1]]
        logits: torch.Tensor = self.out(self.norm(self.layers(state)))
        return logits

    def initialise(self, generator: torch.Generator) -> None:
        """Linear layers and embeddings from a normal distribution of standard deviation 0.02, with biases of 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
