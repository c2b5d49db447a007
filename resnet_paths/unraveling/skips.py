"""Which of several values that are added up is the skip.

The value at the fork itself is; else the one with the fewest weight layers on the way, such as a projection beside two
convolutions. Where several have as few, a name that the caller gives decides, then the names that modules have, then
the number of weights: a 1x1 convolution beside a 3x3, a linear map beside a recurrent layer.

Every operation may be on a skip, such as pooling or slicing: kinds of skip are not listed here. Which nodes join a skip
and a branch is decided in `merges.is_merge`; other forms of an addition are rewritten in `rewrites`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from resnet_paths.core.weight_layers import is_weighted
from resnet_paths.unraveling.tracing import Trace, common_module, is_within

__all__ = ["skip_among"]

_NAMES = ("shortcut", "downsample", "proj", "residual", "skip")


def skip_among(
    traced: Trace, fork: Node, operands: Sequence[Node], skips: Sequence[str] = ()
) -> tuple[Node | None, str]:
    """The operand that is the skip, and why another could be.

    Args:
        traced: The graph.
        fork: Where the operands part.
        operands: The values that are added up.
        skips: Names of modules that the caller says are skips.

    Returns:
        The skip, None if no operand carries less than the others; and how it was guessed, empty where it was not.
    """
    if fork in operands:
        return fork, ""
    regions = [traced.region([fork], operand) for operand in operands]
    layers = [sum(map(is_weighted, region)) for region in regions]
    fewest = [i for i, number in enumerate(layers) if number == min(layers)]
    modules = [common_module(filter(is_weighted, region)) or common_module(region) for region in regions]
    named = [i for i, module in enumerate(modules) if any(is_within(module, skip) for skip in skips)]
    if len(named) == 1:
        return operands[named[0]], ""
    if len(fewest) == 1:
        return operands[fewest[0]], ""
    if len(operands) > 2 or not any(layers):
        return None, ""
    hinted = [i for i in fewest if _is_named_a_skip(modules[i])]
    if len(hinted) == 1:
        return operands[hinted[0]], f"{modules[hinted[0]]} is the skip by its name"
    sizes = [_num_weights(traced, region) for region in regions]
    smallest = [i for i in fewest if sizes[i] == min(sizes)]
    if len(smallest) == 1:
        skip, branch = modules[smallest[0]], modules[1 - smallest[0]]
        return operands[smallest[0]], f"{skip} is the skip since it has fewer weights than {branch}"
    return None, f"{' and '.join(modules)} carry as much: both are branches; skip= names the skip"


def _is_named_a_skip(module: str) -> bool:
    last = module.lower().split(".")
    return any(name in part for part in last[-2:] for name in _NAMES)


def _num_weights(traced: Trace, region: set[Node]) -> int:
    """Number of weights that the weight layers of a region read."""
    read = {arg for node in region if is_weighted(node) for arg in node.all_input_nodes if arg.op == "get_attr"}
    return sum(int(traced.tensors[str(node.target)].numel()) for node in read)
