"""Names of blocks: those of the modules that they are, each once in the whole tree."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence

from torch.fx import Node

from resnet_paths.core.weight_layers import is_weighted
from resnet_paths.unraveling.packing import Packed, values_of
from resnet_paths.unraveling.parts import Part
from resnet_paths.unraveling.tracing import Trace, call_of, common_module, common_path, module_path

__all__ = ["names_of", "names_of_branches"]


def names_of(traced: Trace, parts: Sequence[Part], taken: Collection[str] = ()) -> list[str]:
    """A name for each block of a chain.

    The name is that of the module whose forward merges. Where one module merges several times in one call, each block
    is named after the innermost module that holds its branch.

    Args:
        traced: The graph.
        parts: The blocks, in order.
        taken: Names that stand elsewhere in the tree.

    Returns:
        Names that differ from each other and from those taken: a module that is run again, with the same weights, is
        ``layer``, ``layer@1``, ``layer@2``...
    """
    by_merge = [part.module for part in parts]
    calls = Counter((part.module, call_of(values_of(part.merge)[0], part.module)) for part in parts)
    merging_again = {module for (module, _), number in calls.items() if number > 1}
    names: list[str] = []
    for index, (part, name) in enumerate(zip(parts, by_merge, strict=True)):
        used = {"", *taken, *names}
        if name not in used and by_merge.count(name) == 1:
            names.append(name)
            continue
        if name and by_merge.count(name) > 1 and name not in merging_again:
            names.append(_numbered(name, used))
            continue
        candidates, last = _modules_of_branch(traced, part, part.branches)
        # What is computed elsewhere for all blocks, such as angles of rotary positions, belongs to none.
        candidates.sort(key=lambda candidate: name != "" and not f"{candidate}.".startswith(f"{name}."))
        free = [candidate for candidate in candidates if candidate not in used | set(by_merge)]
        known = next((candidate for candidate in [*candidates, name] if candidate), "")
        if free:
            names.append(free[0])
        elif known in {*taken, *names}:
            names.append(_numbered(known, used))
        elif unused := [each for each in last if each not in used | set(by_merge)]:
            names.append(unused[0])
        else:
            several = (f"{name or 'block'}{'#' if name else ''}{k}" for k in itertools.count(index))
            names.append(next(each for each in several if each not in used))
    return names


def _numbered(name: str, used: Collection[str]) -> str:
    """The first of ``layer``, ``layer@1``, ``layer@2``... that is not used."""
    each = itertools.chain([name], (f"{name}@{k}" for k in itertools.count(1)))
    return next(numbered for numbered in each if numbered not in used)


def names_of_branches(traced: Trace, part: Part, name: str, taken: Collection[str] = ()) -> list[str]:
    """A name for each of several branches of a block: that of the innermost module that holds it.

    Args:
        traced: The graph.
        part: The block.
        name: The name of the block.
        taken: Names that stand elsewhere in the tree.

    Returns:
        Names that differ from each other and from those taken; none for a single branch.
    """
    names: list[str] = []
    for number, branch in enumerate(part.branches if len(part.branches) > 1 else [], start=1):
        candidates, _ = _modules_of_branch(traced, part, [branch])
        inside = [each for each in candidates if each.startswith(f"{name}.") and each not in {*taken, *names}]
        names.append(inside[0] if inside else f"{name}.branch{number}")
    return names


def _modules_of_branch(traced: Trace, part: Part, branches: Sequence[Node | Packed]) -> tuple[list[str], list[str]]:
    """Modules that hold all of some branches, their weight layers or the weights; names of the last weight layer."""
    region = traced.in_order(_region_of(traced, part, branches))
    behind: set[Node] = set()  # the weight layers and what is computed from them: a normalisation ahead is left out
    for node in region:
        if is_weighted(node) or any(arg in behind for arg in node.all_input_nodes):
            behind.add(node)
    weighted = [node for node in region if is_weighted(node)]
    read = {arg for node in weighted for arg in node.all_input_nodes if arg.op == "get_attr"}
    holders = [str(node.target).rpartition(".")[0] for node in read]
    last = weighted[-1:] or region[-1:]
    weights = [str(arg.target) for node in last for arg in node.all_input_nodes if arg.op == "get_attr"]
    holding = [common_module(nodes) for nodes in (region, behind, weighted)]
    return [*holding, common_path(filter(None, holders))], [*map(module_path, last), *weights[:1]]


def _region_of(traced: Trace, part: Part, branches: Sequence[Node | Packed]) -> set[Node]:
    """The nodes between the fork and the branches' ends."""
    found: set[Node] = set()
    for branch in branches:
        for node in values_of(branch):
            found |= traced.region(values_of(part.fork), node)
    return found
