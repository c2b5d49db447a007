"""The blocks of a network without skips: its modules, one after the other."""

from __future__ import annotations

import torch
from torch.fx import Node

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.weight_layers import is_weighted
from resnet_paths.unraveling.merges import refuse_node, trunk_between
from resnet_paths.unraveling.parts import Part
from resnet_paths.unraveling.tracing import Trace, common_module, is_within, module_stack

__all__ = ["plain_parts"]

_MERGES = (torch.ops.aten.add.Tensor, torch.ops.aten.cat.default)
_CONTAINERS = {"Sequential", "ModuleList", "ModuleDict"}


def plain_parts(traced: Trace) -> list[Part]:
    """The modules of a network without skips, as blocks without skip.

    Args:
        traced: The network's graph.

    Returns:
        The blocks in order, at least one.

    Raises:
        ResnetPathsError: If the network is not a chain; the node that breaks it is named.
    """
    trunk = trunk_between(traced, None, traced.output)
    # Those on the trunk have been examined before: they hold no weight layer.
    for node in traced.in_order(traced.region([], traced.output) - set(trunk)):
        if node.target in _MERGES and len(traced.dependent_inputs(node)) > 1 and _weighs(traced, node):
            refuse_node(node, "merges that every route passes; some route leads around this one")
    groups = _groups(traced, trunk)
    if len(groups) < 1:
        raise ResnetPathsError(
            "model", "no block found", "a model that adds branches to skips, or a stack of modules with weights"
        )
    return [Part(module, start, start, end, end, None, (end,)) for module, start, end in groups]


def _groups(traced: Trace, trunk: list[Node]) -> list[tuple[str, Node, Node]]:
    """(Module, start, end) of each plain block: the composite modules on the trunk, or else its weight layers."""
    # A wrapper that holds everything with weights is no more than a name before the others.
    wrapper = common_module(n for n in traced.region([], traced.output) if is_weighted(n))
    units = [_unit(node, wrapper) for node in trunk]
    weighs = {name: False for name, _ in units}
    for before, node, (name, _) in zip([None, *trunk], trunk, units, strict=False):
        region = traced.region([before] if before is not None else [], node)
        weighs[name] |= any(is_weighted(n) for n in region)
    composites = {name for name, composite in units if composite and weighs[name]}
    groups: list[tuple[str, int, int]] = []
    previous = None
    for index, (name, _) in enumerate(units):
        begins = name in composites if composites else weighs[name]
        goes_on = name == previous if begins else not composites
        if begins and not goes_on:
            groups.append((name, index - 1, index))
        elif groups and goes_on:
            groups[-1] = (*groups[-1][:2], index)
        previous = name
    if not composites:  # of a stack of weight layers the first is the stem; the last, which makes the logits, the head
        groups = groups[1:-1]
    return [(name, trunk[a], trunk[b]) for name, a, b in groups if a >= 0]


def _unit(node: Node, wrapper: str) -> tuple[str, bool]:
    """The outermost module inside `wrapper` that is no mere container, and whether it holds modules itself."""
    below = [
        (name, kind) for name, kind in module_stack(node) if name not in ("", wrapper) and is_within(name, wrapper)
    ]
    for depth, (name, kind) in enumerate(below):
        if kind.rsplit(".", 1)[-1] not in _CONTAINERS:
            return name, depth < len(below) - 1
    return "", False


def _weighs(traced: Trace, node: Node) -> bool:
    return any(is_weighted(n) for operand in traced.dependent_inputs(node) for n in [operand, *operand.all_input_nodes])
