"""States as vectors: one for each example, or one for each token; padding is left out of either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.signature import Inputs

__all__ = ["Tokens", "counted_positions", "validate_tokens", "vectors_of"]

Tokens: TypeAlias = "str | torch.Tensor | Callable[[Inputs], torch.Tensor] | None"
"""``"all"``, ``"last"``, a mask, or a function from the inputs of a batch to a mask; None for whole examples."""


def validate_tokens(tokens: object, feature_dim: int | None = None) -> None:
    """Validate an argument `tokens`, and that no other dimension than the last is asked for beside it.

    Args:
        tokens: The value received.
        feature_dim: Dimension of the features of a state; None if the caller did not give one.

    Raises:
        ResnetPathsError: If it is none of `Tokens`, or `feature_dim` is not the last of three dimensions.
    """
    if tokens is None:
        return
    known = tokens in ("all", "last") if isinstance(tokens, str) else isinstance(tokens, torch.Tensor)
    if not known and not callable(tokens):
        raise ResnetPathsError(
            "tokens",
            tokens,
            "'all', 'last', a mask [position] or [batch, position], a function from the inputs of a batch to such a "
            "mask, or None",
        )
    if feature_dim not in (None, -1, 2):
        raise ResnetPathsError("feature_dim", feature_dim, "None with tokens, whose features are the last dimension")


def counted_positions(inputs: Inputs, tokens: Tokens, states: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Which positions of a batch count.

    Args:
        inputs: Of the batch; positions where a mapping's ``"attention_mask"`` [batch, position] is 0 do not count.
        tokens: Which of the others count. ``"last"`` is the last of each example.
        states: What the blocks read, [batch, position, feature] with equal positions unless `tokens` is None.

    Returns:
        Bool [batch, position]; None where everything counts.

    Raises:
        ResnetPathsError: If `tokens` does not fit the states.
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    real = mask != 0 if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    if tokens is None:
        return real
    shape = states[0].shape[:2] if real is None else real.shape
    for state in states:
        if state.dim() != 3 or state.shape[:2] != shape:
            raise ResnetPathsError(
                "tokens",
                f"{_shown(tokens)} for states {list(state.shape)}",
                "None, or states [batch, position, feature] with the positions of the attention mask in every block",
            )
    if real is None:
        real = torch.ones(shape, dtype=torch.bool, device=states[0].device)
    if isinstance(tokens, str):
        if tokens == "all":
            return real
        number = torch.arange(1, real.shape[1] + 1, device=real.device)
        return real & (number == (number * real).amax(1, keepdim=True))
    chosen = tokens(inputs) if callable(tokens) else tokens
    if not isinstance(chosen, torch.Tensor) or chosen.shape not in (real.shape, real.shape[1:]):
        raise ResnetPathsError("tokens", _shown(chosen), f"a mask {list(real.shape)} or {list(real.shape[1:])}")
    return real & (chosen.to(real.device) != 0)


def vectors_of(
    state: torch.Tensor, dim: int | None = None, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A state as vectors, and which of them count.

    Args:
        state: The state, [batch, ...].
        dim: Dimension of the features; None for one vector of all numbers of an example.
        positions: From `counted_positions`; read where it fits the state. Positions that do not count are 0 in vectors
            that hold several.

    Returns:
        [batch, vector, feature]; bool [batch, vector].
    """
    if positions is not None and state.dim() > 2 and state.shape[:2] == positions.shape:
        positions = positions.to(state.device)
        counted = positions.reshape(*positions.shape, *[1] * (state.dim() - 2)).expand(state.shape)
        state = torch.where(counted, state, 0)
        own = positions.any(1)
    else:
        counted = torch.ones((), dtype=torch.bool, device=state.device).expand(state.shape)
        own = counted.new_ones(len(state))
    if dim is None:
        return state.flatten(1)[:, None], own[:, None]
    vectors = state.movedim(dim, -1).reshape(len(state), -1, state.shape[dim])
    if dim % state.dim() == 1:  # across positions
        return vectors, own[:, None].expand(vectors.shape[:2])
    return vectors, counted.select(dim, 0).reshape(len(state), -1)


def _shown(tokens: object) -> object:
    return f"a mask {list(tokens.shape)}" if isinstance(tokens, torch.Tensor) else tokens
