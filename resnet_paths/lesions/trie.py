"""Many chains on one batch, no step computed twice.

A chain is a sequence of steps: stem, blocks, head. Several chains form a trie over those sequences, and every edge of
the trie is computed once. Each prediction is the one that the chain gives on its own, bit for bit: the same modules run
on the same inputs. Activations live while a branch of the trie still needs them: depth first, light branches first, so
that few are alive at once whatever the number of chains.

Where one batch leaves the device idle, states that wait for the same step are stacked into one batch for it: then the
chains move forward side by side, as many at once as the budget of examples allows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from resnet_paths.chain import Block, Parallel, ResidualChain, Scaled, is_identity
from resnet_paths.lesions.batchnorm import Statistics

__all__ = ["Trie", "chain_key", "steps_of"]


@dataclass
class _Node:
    """A step that several chains make from one state."""

    step: nn.Module
    kind: int  # equal for nodes whose steps compute the same thing
    place: int  # of the step in its chain
    members: int = 0  # bit i is set if chain i passes
    children: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    """A step that waits to be made from a state."""

    node: int
    state: Any


class Trie:
    """Chains as one tree of steps. It holds no state between batches, but for BatchNorm statistics estimated anew.

    Args:
        chains: Edits of one chain, and the chain itself.

    Attributes:
        num_chains: How many.
        block_evaluations: Steps of the tree that are blocks: what all chains together cost on a batch.
        statistics: BatchNorm statistics of each step, if `estimate` was called.
    """

    def __init__(self, chains: Sequence[ResidualChain]) -> None:
        self.num_chains = len(chains)
        self.nodes: list[_Node] = []
        self.roots: list[int] = []
        self.block_evaluations = 0
        self.statistics: dict[int, Statistics] = {}
        # Parts written by hand may change a state in place; exported ones do not.
        self._copies_states = not all(chain.eval_only for chain in chains)
        found: dict[tuple[int | None, Hashable], int] = {}
        kinds: dict[Hashable, int] = {}
        for index, chain in enumerate(chains):
            node: int | None = None
            for place, step in steps_of(chain):
                key = _step_key(step)
                if (node, key) not in found:
                    found[node, key] = len(self.nodes)
                    (self.roots if node is None else self.nodes[node].children).append(len(self.nodes))
                    self.nodes.append(_Node(step, kinds.setdefault(key, len(kinds)), place))
                    self.block_evaluations += isinstance(step, Block)
                node = found[node, key]
                self.nodes[node].members |= 1 << index
            assert node is not None  # every chain has a stem and a head
            self.nodes[node].ends.append(index)
        self._sort_children()

    def _sort_children(self) -> None:
        """Behind each node the child that holds most states comes first: it is run last, when no other waits."""
        held = [1] * len(self.nodes)  # states at once, from a node's output on
        for number in reversed(range(len(self.nodes))):  # children were made after their parents
            children = self.nodes[number].children
            children.sort(key=lambda child: -held[child])
            if children:
                held[number] = max(held[children[0]], *(held[child] + 1 for child in children[1:2]))
        self.roots.sort(key=lambda root: -held[root])

    def logits(
        self, inputs: torch.Tensor, wanted: Sequence[int] | None = None, most_examples: int | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(Index, logits) of the chains, each step computed once.

        Args:
            inputs: Batch for the stem, [batch, ...].
            wanted: Indices of chains; all if None.
            most_examples: How many examples one step may take: states are stacked up to it. None stacks nothing.

        Yields:
            The index of a chain and what it returns, in the order of the tree.
        """
        mask = (1 << self.num_chains) - 1 if wanted is None else sum(1 << index for index in wanted)
        at_once = 1 if most_examples is None or self.statistics else max(1, most_examples // max(1, len(inputs)))
        pool = [_Task(root, state) for root, state in self._handed_out(self.roots, inputs, mask)]
        while pool:
            tasks = self._next_tasks(pool, at_once)
            for task, state in zip(tasks, self._run(tasks, len(inputs)), strict=True):
                node = self.nodes[task.node]
                for index in node.ends:
                    if mask >> index & 1:
                        yield index, state
                pool += [_Task(child, given) for child, given in self._handed_out(node.children, state, mask)]
            del tasks, task, state

    def estimate(self, inputs: torch.Tensor) -> None:
        """Take BatchNorm statistics from a batch, anew for each step of the tree; further batches are averaged in.

        Each step normalises by the batch's own statistics meanwhile, as in training; with `logits` by their averages.

        Args:
            inputs: Batch for the stem, [batch, ...].
        """
        for number in range(len(self.nodes)):
            self.statistics.setdefault(number, Statistics())
        pool = [_Task(root, state) for root, state in self._handed_out(self.roots, inputs, -1)]
        while pool:
            task = pool.pop()
            with self.statistics[task.node].measured():
                state = self.nodes[task.node].step(task.state)
            pool += [
                _Task(child, given) for child, given in self._handed_out(self.nodes[task.node].children, state, -1)
            ]
            del task, state

    def _next_tasks(self, pool: list[_Task], at_once: int) -> list[_Task]:
        """Take out of the pool what is run next: one task, or several whose steps are the same."""
        if at_once == 1:
            return [pool.pop()]
        # While there is room the hindmost go on, so that the others are caught up with; then the foremost finish.
        choose: Callable[..., int] = min if len(pool) < at_once else max
        first = choose(range(len(pool)), key=lambda i: self.nodes[pool[i].node].place)
        kind = self.nodes[pool[first].node].kind
        same = [i for i, task in enumerate(pool) if i != first and self.nodes[task.node].kind == kind]
        taken = sorted([first, *same[: at_once - 1]], reverse=True)
        return [pool.pop(i) for i in taken]

    def _run(self, tasks: list[_Task], batch: int) -> list[Any]:
        node = self.nodes[tasks[0].node]
        if self.statistics:
            with self.statistics[tasks[0].node].applied():
                return [node.step(tasks[0].state)]
        if len(tasks) == 1 or not all(len(part) == batch for task in tasks for part in _parts(task.state)):
            return [node.step(task.state) for task in tasks]
        return _unstacked(node.step(_stacked([task.state for task in tasks])), len(tasks))

    def _handed_out(self, nodes: Sequence[int], state: Any, mask: int) -> Iterator[tuple[int, Any]]:
        """The nodes that lead to a wanted chain, each with a state that it may have for itself."""
        nodes = [node for node in nodes if self.nodes[node].members & mask]
        for node in nodes:
            several = len(nodes) > 1 and self._copies_states
            yield (
                node,
                tuple(p.clone() for p in state)
                if several and isinstance(state, tuple)
                else (state.clone() if several else state),
            )


def steps_of(chain: ResidualChain) -> list[tuple[int, nn.Module]]:
    """The steps of a chain, each with its place: its stem, the blocks that do something, its head.

    Args:
        chain: The chain.

    Returns:
        (Place, step): 0 and the stem, i + 1 and block i, n + 1 and the head. A deleted block with an identity skip is
        no step.
    """
    blocks = [
        (place, block)
        for place, block in enumerate(chain, start=1)
        if not (block.branch is None and all(map(is_identity, (block.pre, block.skip, block.post))))
    ]
    return [(0, chain.stem), *blocks, (len(chain) + 1, chain.head)]


def chain_key(chain: ResidualChain, key_of: Callable[[nn.Module], Hashable]) -> Hashable:
    """Equal for chains that compute the same thing, if `key_of` is for the parts that edits do not make anew."""
    return tuple(_step_key(step, key_of) for _, step in steps_of(chain))


def _step_key(step: nn.Module, key_of: Callable[[nn.Module], Hashable] = id) -> Hashable:
    if isinstance(step, Block):
        return ("block", *(_part_key(part, key_of) for part in (step.pre, step.skip, step.branch, step.post)))
    return _part_key(step, key_of)


def _part_key(part: nn.Module | None, key_of: Callable[[nn.Module], Hashable]) -> Hashable:
    """Wrappers are made anew by each edit, so their content counts."""
    if part is None or is_identity(part):
        return type(part).__name__
    if isinstance(part, Scaled):
        return ("scaled", part.factor, _part_key(part.branch, key_of))
    if isinstance(part, Parallel):
        return ("parallel", part.onto_skip, *(_part_key(branch, key_of) for branch in part))
    return key_of(part)


def _parts(state: Any) -> tuple[torch.Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def _stacked(states: list[Any]) -> Any:
    if isinstance(states[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*states, strict=True))
    return torch.cat(states)


def _unstacked(state: Any, count: int) -> list[Any]:
    if isinstance(state, tuple):
        return list(zip(*(part.chunk(count) for part in state), strict=True))
    return list(state.chunk(count))
