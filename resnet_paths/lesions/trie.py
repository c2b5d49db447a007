"""Many chains on one batch, no step computed twice.

A chain is a sequence of steps: stem, blocks, head. Several chains form a trie over those sequences, and every edge of
the trie is computed once. Each prediction is the one that the chain gives on its own, bit for bit: the same modules run
on the same inputs. Activations live while a branch of the trie still needs them: depth first, and of several branches
the one that holds most states last, so that few are alive at once whatever the number of chains.

Where one batch leaves the device idle, states that wait for the same step are stacked into one batch for it: then some
chains move forward side by side, as many as fill the budget of examples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import nn

from resnet_paths.core.chain import Block, ResidualChain, is_identity
from resnet_paths.core.groups import ungrouped
from resnet_paths.core.in_place import keeps_its_input
from resnet_paths.core.inputs import each_tensor, num_examples, refusing_other_dtypes
from resnet_paths.core.parts import LinearCombination, Parallel, call_part, context_read_by
from resnet_paths.core.placement import place_modules
from resnet_paths.core.signature import arguments_of
from resnet_paths.lesions.batchnorm import averaged_statistics, batch_statistics, given_statistics
from resnet_paths.lesions.functions import step_function

__all__ = ["Trie", "chain_key", "num_block_evaluations", "steps_of"]


_Task = tuple[int, Any, Mapping[str, torch.Tensor]]
"""A step that waits: index of the node, the state that it reads (of a stem, a batch of inputs), and the context."""


class Trie:
    """Chains as one tree of steps. It holds no state between batches, except re-estimated BatchNorm statistics.

    Args:
        chains: Edits of one chain, and the chain itself. Taken one at a time: of each only the steps are kept that no
            other has.

    Attributes:
        num_chains: How many.
        block_evaluations: Steps of the tree that are blocks: what all chains together cost on a batch.
        block_evaluations_naive: What they cost each by itself.
        steps: Modules that the tree is made of, each once.
        statistics: Re-estimated BatchNorm statistics of each node; empty unless `estimate` was called.
        num_estimated: Batches that they are averaged over.
    """

    def __init__(self, chains: Iterable[ResidualChain]) -> None:
        self.num_chains = self.block_evaluations = self.block_evaluations_naive = 0
        self.steps: list[nn.Module] = []
        # Of each node: index of its step (nodes whose steps compute the same thing share one), place of the step in its
        # chain, whether states of several chains may be one batch for it, a number whose bit i is set if chain i
        # passes, its children, and the chains that end there.
        self.step_of: list[int] = []
        self.place_of: list[int] = []
        self.stacks: list[bool] = []
        self.members: list[int] = []
        self.children: list[list[int]] = []
        self.ends: list[list[int]] = []
        self.roots: list[int] = []
        self.statistics: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.num_estimated = 0
        found: dict[tuple[int | None, int], int] = {}
        numbers: dict[Hashable, int] = {}
        for chain in chains:
            node: int | None = None
            chain = ungrouped(chain)
            for place, step in steps_of(chain):
                # Steps are kept, so that no other part is given the identity of one that is gone.
                key = (_step_key(step), chain.context_names) if place == 0 else _step_key(step)
                number = numbers.setdefault(key, len(self.steps))
                if number == len(self.steps):
                    # A stem is kept as a chain without blocks, which knows the names of the context.
                    self.steps.append(chain.with_blocks([]).with_head(nn.Identity()) if place == 0 else step)
                if (node, number) not in found:
                    found[node, number] = len(self.step_of)
                    (self.roots if node is None else self.children[node]).append(len(self.step_of))
                    self.step_of.append(number)
                    self.place_of.append(place)
                    self.stacks.append(_has_batch_first(chain, place))
                    self.members.append(0)
                    self.children.append([])
                    self.ends.append([])
                    self.block_evaluations += isinstance(step, Block)
                node = found[node, number]
                self.members[node] |= 1 << self.num_chains
                self.block_evaluations_naive += isinstance(step, Block)
            assert node is not None  # every chain has a stem and a head
            self.ends[node].append(self.num_chains)
            self.num_chains += 1
        self._sort_children()

    @cached_property
    def _functions(self) -> list[Any]:
        """What each step computes; the steps are not moved any more."""
        known: dict[Any, Any] = {}
        return [_function_of(step, known) for step in self.steps]

    def placed(self, **placement: Any) -> Trie:
        """The same tree with its steps in another place, precision or form.

        Args:
            **placement: As for `resnet_paths.core.placement.place_modules`.

        Returns:
            A tree of the same nodes.
        """
        trie = copy.copy(self)
        trie.steps = place_modules(self.steps, **placement)
        return trie

    def __getstate__(self) -> dict[str, Any]:
        """Without what is found out of the steps: functions cannot be sent to another process."""
        return {key: value for key, value in vars(self).items() if key != "_functions"}

    def _sort_children(self) -> None:
        """Behind each node the child that holds most states comes first: it is run last, when no other waits."""
        held = [1] * len(self.step_of)  # states at once, from a node's output on
        for number in reversed(range(len(self.step_of))):  # children were made after their parents
            children = self.children[number]
            children.sort(key=lambda child: -held[child])
            if children:
                held[number] = max([held[children[0]], *(held[child] + 1 for child in children[1:2])])
        self.roots.sort(key=lambda root: -held[root])

    def logits(
        self, inputs: Any, wanted: Sequence[int] | None = None, most_examples: int | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(Index, logits) of the chains, each step computed once.

        Args:
            inputs: A batch for the stem: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
            wanted: Indices of chains; all if None.
            most_examples: How many examples one step may take: states are stacked up to it. None stacks nothing.

        Yields:
            The index of a chain and what it returns, in the order of the tree.
        """
        mask = (1 << self.num_chains) - 1 if wanted is None else sum(1 << index for index in wanted)
        batch = num_examples(inputs)
        at_once = 1 if most_examples is None or self.statistics else max(1, most_examples // max(1, batch))
        pool = self._tasks(self.roots, inputs, {}, mask)
        with refusing_other_dtypes(inputs, "chain", *self.steps):
            while pool:
                tasks = self._next_tasks(pool, at_once, mask)
                for task, (state, context) in zip(tasks, self._run(tasks, batch), strict=True):
                    for index in self.ends[task[0]]:
                        if mask >> index & 1:
                            yield index, state
                    pool += self._tasks(self.children[task[0]], state, context, mask)
                del tasks, task, state

    def estimate(self, inputs: Any) -> None:
        """Re-estimate the BatchNorm statistics of every node on a batch; further batches are averaged in.

        Each step normalises by the batch's own statistics meanwhile, as in training; `logits` then uses the averages.

        Args:
            inputs: A batch for the stem, as for `logits`.
        """
        pool = self._tasks(self.roots, inputs, {}, -1)
        while pool:
            task = pool.pop()
            number = task[0]
            with refusing_other_dtypes(inputs, "chain", *self.steps), batch_statistics() as found:
                state, context = self._step(task)
            self.statistics[number] = averaged_statistics(self.statistics.get(number, []), self.num_estimated, found)
            pool += self._tasks(self.children[number], state, context, -1)
            del task, state
        self.num_estimated += 1

    def _next_tasks(self, pool: list[_Task], at_once: int, mask: int) -> list[_Task]:
        """Take out of the pool what is run next: one task, or several whose steps are the same."""
        if at_once == 1:
            return [pool.pop()]
        # The last tasks are run in turn, the least advanced one first, so that it catches up: as many as lead to twice
        # the chains that a step may take. All others wait, whatever their number.
        room, active = 2 * at_once, list[int]()
        for i in reversed(range(len(pool))):
            room -= (self.members[pool[i][0]] & mask).bit_count()
            if active and room < 0:
                break
            active.append(i)
        first = min(active, key=lambda i: self.place_of[pool[i][0]])
        step = self.step_of[pool[first][0]]
        same = [i for i in active if self.step_of[pool[i][0]] == step][:at_once]
        return [pool.pop(i) for i in same]  # from the last to the first

    def _run(self, tasks: list[_Task], batch: int) -> list[tuple[Any, Mapping[str, torch.Tensor]]]:
        number, _, _ = tasks[0]
        step = self.step_of[number]
        if self.statistics:
            with given_statistics(self.statistics[number]):
                return [self._step(tasks[0])]
        if len(tasks) > 1 and self.stacks[number] and all(_length(state) == batch for _, state, _ in tasks):
            contexts = [context for _, _, context in tasks]
            stacked = _stacked_context(contexts, context_read_by(self.steps[step]), batch)
            if stacked is not None:
                states = torch.cat([state for _, state, _ in tasks])
                together = self._functions[step](states, stacked)
                if _length(together) == len(tasks) * batch:
                    return list(zip(together.chunk(len(tasks)), contexts, strict=True))
                self.stacks[number] = False  # it mixes the batch with another dimension: in which order is not known
        return [self._step(task) for task in tasks]

    def _step(self, task: _Task) -> tuple[Any, Mapping[str, torch.Tensor]]:
        """State and context after a step; the state that it reads stays as it is, since others may read it."""
        number, state, context = task
        step = self.step_of[number]
        if self.place_of[number] == 0:
            stem = cast("ResidualChain", self.steps[step])
            args, kwargs = arguments_of(state if keeps_its_input(stem) else each_tensor(torch.clone, state))
            return stem.begin(*args, **kwargs)
        return self._functions[step](state, context), context

    def _tasks(self, nodes: Sequence[int], state: Any, context: Mapping[str, torch.Tensor], mask: int) -> list[_Task]:
        """A task for each of the nodes that leads to a wanted chain."""
        return [(node, state, context) for node in nodes if self.members[node] & mask]


def _function_of(step: nn.Module, known: dict[Any, Any]) -> Callable[..., torch.Tensor]:
    """A step as a function of its state and the context."""
    if context_read_by(step):
        return partial(call_part, step)
    function = step_function(step, known)
    return lambda state, _: function(state)


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


def num_block_evaluations(chain: ResidualChain) -> int:
    """How many blocks a chain evaluates for one prediction, those inside groups each: 0 for deleted identity skips."""
    return len(steps_of(ungrouped(chain))) - 2


def chain_key(chain: ResidualChain, key_of: Callable[[nn.Module], Hashable]) -> Hashable:
    """Equal for chains that compute the same thing, if `key_of` is for the parts that edits keep."""
    return tuple(_step_key(step, key_of) for _, step in steps_of(ungrouped(chain)))


def _step_key(step: nn.Module, key_of: Callable[[nn.Module], Hashable] = id) -> Hashable:
    if isinstance(step, Block):
        return ("block", *(_part_key(part, key_of) for part in (step.pre, step.skip, step.branch, step.post)))
    return _part_key(step, key_of)


def _part_key(part: nn.Module | None, key_of: Callable[[nn.Module], Hashable]) -> Hashable:
    """Each edit makes new wrappers, so their content counts."""
    if part is None or is_identity(part):
        return type(part).__name__
    if isinstance(part, LinearCombination):
        return ("combination", part.factors, *(_part_key(term, key_of) for term in part))
    if type(part) is ResidualChain:
        return ("chain", *(_step_key(step, key_of) for _, step in steps_of(part)))
    if isinstance(part, Parallel):
        return ("parallel", part.onto_skip, *(_part_key(branch, key_of) for branch in part))
    return key_of(part)


def _has_batch_first(chain: ResidualChain, place: int) -> bool:
    """Whether a step takes and returns states with the batch in dimension 0 alone, as far as their shapes are known."""
    shapes = [chain[place - 2].out_shape] if 0 < place - 1 <= len(chain) else []
    if 0 < place <= len(chain):
        shapes += [chain[place - 1].in_shape, chain[place - 1].out_shape]
    return not any(shape is not None and -1 in shape for shape in shapes)


def _length(state: torch.Tensor) -> int:
    """Size of the dimension that should be the batch."""
    return len(state) if state.dim() else 0


def _stacked_context(
    contexts: Sequence[Mapping[str, torch.Tensor]], names: Iterable[str], batch: int
) -> dict[str, torch.Tensor] | None:
    """The context for states that are stacked; None where an entry has no row for each example, nor one for all."""
    stacked = {}
    for name in names:
        entries = [context[name] for context in contexts]
        if all(_length(entry) == batch > 1 for entry in entries):
            stacked[name] = torch.cat(entries)
        elif all(entry is entries[0] for entry in entries) and _length(entries[0]) == 1 < batch:
            stacked[name] = entries[0]
        else:  # of a batch of one example it cannot be told which of both a row is
            return None
    return stacked
