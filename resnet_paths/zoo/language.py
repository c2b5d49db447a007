"""Small language models: the transformer of GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

import torch
from torch import nn

from resnet_paths.zoo.vit import EncoderLayer

__all__ = ["GPT", "LanguageModel"]


class LanguageModel(nn.Module):
    """Causal transformer that predicts the next token of a text.

    The architecture of GPT-2 at a small size: learned positions, LayerNorm at the start of each branch and before the
    last linear layer. Without a tokenizer, the tokens are bytes.

    Args:
        num_layers: Number of layers, each with an attention and an MLP block.
        width: Width of the state.
        num_heads: Number of attention heads.
        context: Maximum number of tokens in the input.
        vocabulary: Number of different tokens.
    """

    def __init__(
        self, num_layers: int = 6, width: int = 64, num_heads: int = 4, context: int = 64, *, vocabulary: int = 256
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.layers = nn.Sequential(
            *(EncoderLayer(width, num_heads, 4 * width, is_causal=True) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocabulary] of the token that follows the tokens [batch, position]."""
        return self.at_every_position(text)[:, -1]

    def at_every_position(self, text: torch.Tensor) -> torch.Tensor:
        """Logits [batch, position, vocabulary] of the token that follows each of the tokens [batch, position]."""
        state = self.tokens(text) + self.places.weight[: text.shape[1]]
        logits: torch.Tensor = self.out(self.norm(self.layers(state)))
        return logits

    def initialise(self, generator: torch.Generator) -> None:
        """Linear layers and embeddings from a normal distribution of standard deviation 0.02, with biases of 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


class GPT(LanguageModel):
    """Language model of 12 layers and width 128 whose output is the logits at every position.

    Four heads and a context of 128 tokens.

    Args:
        in_channels: Not used; networks by name are built with it.
        num_classes: Number of different tokens.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 1024) -> None:
        super().__init__(num_layers=12, width=128, num_heads=4, context=128, vocabulary=num_classes)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Logits [batch, position, num_classes] of the token that follows each of the tokens [batch, position]."""
        return self.at_every_position(text)
