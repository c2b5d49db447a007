"""Whether the blocks of a chain hold what a person would look for in them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import networkx as nx
import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from resnet_paths._utils.errors import UnravelError
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.parts import context_read_by
from resnet_paths.core.weight_layers import is_weighted
from resnet_paths.unraveling.merges import EARLIER_STATE
from resnet_paths.unraveling.packing import Packed
from resnet_paths.unraveling.tracing import common_module, describe, is_within, module_stack
from resnet_paths.unraveling.verification.claim import Claim

__all__ = ["check_structure"]

_ADDITIONS = {torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor}


def check_structure(claim: Claim) -> None:
    """Check that every weight layer is in the chain, and that no residual addition is hidden in it.

    Args:
        claim: The chain and its graph. Nothing is checked where the chain was not cut from one.

    Raises:
        UnravelError: If a weight layer is missing, or a stem, a head or a block without a skip adds a branch
            to a skip inside it; the node is named.
    """
    if claim.traced is None:
        return
    _check_weight_layers(claim)
    for place, module in _outside_branches(claim):
        hidden = [node for segment in _segments(module) for node in _residual_additions(segment.graph)]
        if hidden and (_only_blocks_read(claim.chain, module, hidden) or _are_beside_the_state(claim, module, hidden)):
            tower = _tower(hidden)
            note = (
                f"{place[0].upper()}{place[1:]} holds residual additions whose output the blocks read beside the state"
            )
            advice = f": unravel(model.{tower}, ...) makes a chain of them." if tower else "."
            claim.chain.notes += (note + advice,)
        elif hidden:
            raise UnravelError(
                "model",
                f"{hidden[0].name} ({describe(hidden[0])})",
                f"residual additions between the blocks; this one is inside {place}",
                EARLIER_STATE if _enters_a_lane(claim, module) else _advice(place, _tower(hidden)),
            )


def _are_beside_the_state(claim: Claim, module: nn.Module, hidden: Sequence[Node]) -> bool:
    """Whether some nodes make what blocks in a row read beside their own value, such as one query for all of them."""
    if not _enters_a_lane(claim, module):
        return False
    (result,) = hidden[0].graph.output_node().args
    if not isinstance(result, Node) or result.target is not torch.ops.aten.cat.default:
        return False
    return set(hidden).isdisjoint(_needed(result.all_input_nodes[0]))


def _enters_a_lane(claim: Claim, module: nn.Module) -> bool:
    """Whether a module makes the state of the first of several blocks that read something beside their own value."""
    return any(
        module is block.pre and isinstance(part.start, Node) and isinstance(part.fork, Packed) and not part.joins
        for block, part in zip(claim.chain, claim.parts, strict=True)
    )


def _only_blocks_read(chain: ResidualChain, module: nn.Module, hidden: Sequence[Node]) -> bool:
    """Whether blocks alone read what some nodes of the stem make, as those of a decoder read an encoder's output."""
    if module is not chain.stem:
        return False
    (result,) = hidden[0].graph.output_node().args
    outputs: list[Node] = list(result) if isinstance(result, tuple | list) else [result]  # type: ignore[arg-type, list-item]
    if len(outputs) != 1 + len(chain.context_names):
        return False
    made = [not set(hidden).isdisjoint(_needed(output)) for output in outputs]
    names = {name for name, depends in zip(chain.context_names, made[1:], strict=True) if depends}
    read = {name for block in chain for name in block.reads_context}
    return not made[0] and names <= read and names.isdisjoint(context_read_by(chain.head))


def _needed(target: Node) -> set[Node]:
    found, waiting = set[Node](), [target]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _advice(place: str, tower: str) -> str:
    if place.startswith("block"):
        return "Blocks whose halves update one another (reversible, CSP) are not of the form skip(x) + branch(x)."
    return (
        "A second tower or an encoder is a chain of its own"
        + (f": unravel(model.{tower}, ...)." if tower else ".")
        + " Wrap what follows it in a module that takes its output as an input."
    )


def _check_weight_layers(claim: Claim) -> None:
    """Raise unless the segments of the chain hold every weight layer that leads from the inputs to the output."""
    assert claim.traced is not None  # held by check_structure
    needed = _needed(claim.traced.output)
    varying = [node for node in _varying(claim.traced.graph) if node in needed]
    wanted = Counter(map(_kind, filter(is_weighted, varying)))
    # What several branches share may be computed by each of them; nothing may be missing.
    in_chain = (node for segment in _segments(claim.chain) for node in _varying(segment.graph))
    missing = wanted - Counter(map(_kind, filter(is_weighted, in_chain)))
    if missing:
        node = next(n for n in varying if is_weighted(n) and _kind(n) in missing)
        raise UnravelError(
            "model",
            f"{node.name} ({describe(node)}), which is missing in the chain",
            "a model whose weight layers are in its stem, blocks and head",
            "Please report the model.",
        )


def _kind(node: Node) -> tuple[object, ...]:
    """A weight layer by its operation and the parameters that it reads, which keep their names in every segment."""
    return (node.target, *(str(n.target) for n in node.all_input_nodes if n.op == "get_attr"))


def _segments(module: nn.Module) -> Iterator[GraphModule]:
    return (part for part in module.modules() if isinstance(part, GraphModule))


def _outside_branches(claim: Claim) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a chain that stand for no branch beside a skip, with what to call them."""
    yield "the stem", claim.chain.stem
    for block in claim.chain:
        for part in (block.pre, block.post, *([block.branch] if block.skip is None else [])):
            if part is not None:
                yield f"block {block.name!r}", part
    yield "the head", claim.chain.head


def _varying(graph: Graph) -> list[Node]:
    """The nodes whose values depend on a placeholder."""
    found: dict[Node, None] = {}
    for node in graph.nodes:
        # Sizes that a segment reads off its own input have no value yet.
        is_computed = getattr(node.target, "__module__", "") == "_operator" and node.target is not operator.getitem
        is_size = is_computed or node.target is torch.ops.aten.sym_size.int
        is_number = is_size or isinstance(node.meta.get("val"), torch.SymInt | int)
        if node.op == "placeholder" or (not is_number and any(n in found for n in node.all_input_nodes)):
            found[node] = None
    return list(found)


def _residual_additions(graph: Graph) -> Iterator[Node]:
    """Additions of a value and of what weight layers make of it, that is, residual blocks."""
    nodes = _varying(graph)
    sums = [n for n in nodes if n.target in _ADDITIONS and len({*n.all_input_nodes} & {*nodes}) == 2]
    if not sums:
        return
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_node("inputs")
    for node in nodes:
        before: list[Node | str] = [n for n in node.all_input_nodes if flow.has_node(n)]
        flow.add_edges_from((n, node) for n in (before or ["inputs"]))
    dominators = nx.immediate_dominators(flow, "inputs")
    for node in sums:
        fork = dominators[node]
        if not isinstance(fork, Node) or not _is_floating(fork):
            continue  # different inputs are added, or masks made from tokens
        weighed = [_passes_weights(flow, fork, operand) for operand in node.all_input_nodes if operand in flow]
        if sorted(weighed) == [False, True]:
            yield node


def _is_floating(node: Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))  # several of what is cut into pieces
    return any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values)


def _passes_weights(flow: nx.DiGraph, fork: Node, operand: Node) -> bool:
    """Whether a weight layer is on a way from the fork to an operand."""
    waiting: list[object] = [operand]
    seen = {fork}
    while waiting:
        node = waiting.pop()
        if node not in seen and isinstance(node, Node):
            seen.add(node)
            if is_weighted(node):
                return True
            waiting.extend(flow.predecessors(node))
    return False


def _tower(nodes: Iterable[Node]) -> str:
    """The innermost module that is called and holds all of some nodes; empty for the model itself."""
    nodes = list(nodes)
    common = common_module(nodes)
    called = [name for name, _ in module_stack(nodes[0]) if name and is_within(common, name)]
    return called[-1] if called else ""
