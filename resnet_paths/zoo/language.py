"""A small language model: the transformer of GPT-2, on bytes (Radford et al. 2019)."""

from __future__ import annotations

import torch
from torch import nn

from resnet_paths.zoo.vit import EncoderLayer

__all__ = ["LanguageModel"]


class LanguageModel(nn.Module):
    """Causal transformer that predicts the next byte of a text.

    GPT-2's arrangement, much smaller: learned positions, LayerNorm at the start of each branch and before the last
    linear layer. It is not one of the networks by name, whose data are images.

    Args:
        num_layers: Layers of attention and MLP, two blocks each.
        width: Width of the state.
        num_heads: Heads of attention.
        context: The most bytes that it reads.
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
        """Logits [batch, 256] of the byte that follows bytes [batch, place]."""
        return self.at_every_place(text)[:, -1]

    def at_every_place(self, text: torch.Tensor) -> torch.Tensor:
        """Logits [batch, place, 256] of the byte that follows each place of [batch, place]."""
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
