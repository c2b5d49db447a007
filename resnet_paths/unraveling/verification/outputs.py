"""Whether a chain returns what the model returns."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Interpreter, Node

from resnet_paths._utils.errors import UnravelError
from resnet_paths.unraveling.packing import Packed
from resnet_paths.unraveling.tracing import Trace, name_of
from resnet_paths.unraveling.verification.claim import Claim

__all__ = ["agree", "check_output"]


@torch.no_grad()
def check_output(claim: Claim) -> torch.Tensor:
    """Check the output on the example.

    Args:
        claim: The chain and the model.

    Returns:
        The chain's output.

    Raises:
        UnravelError: If the chain returns something else than the model; the first block that differs is named.
    """
    returned = claim.run_chain(claim.tensors)
    if agree(returned, claim.expected):
        return returned
    if claim.traced is None:
        raise UnravelError(
            "blocks",
            [block.name for block in claim.chain],
            "modules between which and after which nothing else reads the input",
            "The chain does not return what the model returns, on the example or on one made from it.",
        )
    raise UnravelError(
        "model",
        f"{name_of(claim.model)}: the chain's output differs from the model's",
        "a model that unravels exactly",
        f"The first difference is in {_first_difference(claim, claim.traced)}. Please report the model.",
    )


def _first_difference(claim: Claim, traced: Trace) -> str:
    """The first part of the chain that does not return what the graph computes there, for a message."""
    returned: list[torch.Tensor | tuple[torch.Tensor, ...]] = []
    with contextlib.ExitStack() as hooks:
        for part in (claim.chain.stem, *claim.chain):
            handle = part.register_forward_hook(lambda _module, _args, output: returned.append(output))
            hooks.callback(handle.remove)
        claim.run_chain(claim.tensors)
    ends = [claim.parts[0].start, *(part.end for part in claim.parts)]
    values = _Recorder(traced, ends).values_on(claim.tensors)
    places = ["the stem", *(f"block {block.name!r}" for block in claim.chain)]
    if len(ends) == len(places):  # each block is one part of the graph
        for place, end, state in zip(places, ends, returned, strict=True):
            first = state[0] if isinstance(state, tuple) else state  # the rest is read beside the state
            if end in values and not agree(first, values[end]):
                return place
    return "the head, or the export itself"


class _Recorder(Interpreter):
    """Runs the flat graph on real inputs and keeps the values of some nodes."""

    def __init__(self, traced: Trace, wanted: Sequence[Node | Packed]) -> None:
        self._tensors = traced.tensors
        self._wanted: set[object] = set(wanted)
        self._kept: dict[object, torch.Tensor] = {}
        super().__init__(nn.Module(), graph=traced.graph, garbage_collect_values=False)

    def fetch_attr(self, target: str) -> object:
        return self._tensors[target]

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if n in self._wanted and isinstance(value, torch.Tensor):
            self._kept[n] = value
        return value

    def values_on(self, inputs: tuple[torch.Tensor, ...]) -> dict[object, torch.Tensor]:
        self.run(*inputs)
        return self._kept


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal, bit for bit or, where kernels differ, to rounding of their dtype.

    Args:
        found: A tensor.
        expected: Another.

    Returns:
        Whether no entry differs by more than 1000 epsilon (5 % in half precision) of the largest expected entry.
    """
    if torch.equal(found, expected):
        return True
    if found.shape != expected.shape or found.dtype != expected.dtype or not found.is_floating_point():
        return False
    tolerance = min(1000 * torch.finfo(found.dtype).eps, 0.05)
    largest = expected.abs().max().clamp_min(torch.finfo(found.dtype).tiny)
    same_holes = torch.equal(torch.isfinite(found), torch.isfinite(expected))
    return same_holes and bool(((found - expected).abs().nan_to_num() <= tolerance * largest.nan_to_num()).all())
