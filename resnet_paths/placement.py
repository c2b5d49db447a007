"""Chains on another device, in another precision or layout: copies, so that the model they were read from stays put."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from resnet_paths.chain import ResidualChain
from resnet_paths.device import choose_device
from resnet_paths.errors import ResnetPathsError

__all__ = ["PRECISIONS", "device_of", "place_chains"]

PRECISIONS = {
    "float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
"""Names of the precisions that a study can run in."""


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter or buffer lies; the CPU if it has none."""
    return next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))


def place_chains(
    chains: Sequence[ResidualChain],
    *,
    device: str | torch.device = "auto",
    precision: str | None = None,
    channels_last: bool = False,
) -> list[ResidualChain]:
    """Chains in the place asked for, together, so that what they share they share afterwards.

    Args:
        chains: Edits of one chain; none is changed.
        device: Where to; ``"auto"`` is where the chains are, but for the accelerator where they are on the CPU and
            there is one.
        precision: A key of `PRECISIONS`; None leaves every parameter in its own.
        channels_last: Whether images are to lie in memory with their channels last, which many convolutions are faster
            with.

    Returns:
        The chains themselves if nothing has to change, else copies.

    Raises:
        ResnetPathsError: If the device or the precision is not one.
    """
    chains = list(chains)
    if precision is not None and precision not in PRECISIONS:
        raise ResnetPathsError("precision", precision, f"one of {', '.join(map(repr, PRECISIONS))}, or None")
    here = device_of(chains[0])
    there = here if device == "auto" and here.type != "cpu" else choose_device(device)
    # "cuda" and "cuda:0" are one device, but not equal.
    moves = there.type != here.type or (there.index is not None and there.index != (here.index or 0))
    dtype = None if precision is None else PRECISIONS[precision]
    floats = (t.dtype for t in [*chains[0].parameters(), *chains[0].buffers()] if t.is_floating_point())
    converts = dtype is not None and any(kind != dtype for kind in floats)
    if not (moves or converts or channels_last):
        return chains
    together = nn.ModuleList(copy.deepcopy(chains))
    together.to(device=there, dtype=dtype if converts else None)
    if channels_last:
        together.to(memory_format=torch.channels_last)
    if moves:
        for module in together.modules():
            if isinstance(module, GraphModule):
                _make_constants_on(module, there)
    return list(together)  # type: ignore[arg-type]


def _make_constants_on(module: GraphModule, device: torch.device) -> None:
    """Let the tensors that an exported graph makes as it runs be made on another device."""
    changed = False
    for node in module.graph.nodes:
        args, kwargs = (
            map_aggregate(value, lambda v: device if isinstance(v, torch.device) else v)
            for value in (node.args, node.kwargs)
        )
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs = args, kwargs
            changed = True
    if changed:
        module.recompile()
