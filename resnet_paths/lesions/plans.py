"""Which lesions to study: every single deletion, random deletions, swaps, pairs, schedules of layers.

A plan is a list of `Lesion` values for `resnet_paths.lesion_study`; making one runs nothing. Functions from chain to
chain may be added to the list.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch

from resnet_paths._utils.arguments import require_float, require_generator, require_int, require_list, seeded_generator
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import ResidualChain, is_identity, require_chain
from resnet_paths.core.edits import deletable
from resnet_paths.core.groups import group_blocks, runs_of
from resnet_paths.core.inputs import Inputs, checked_inputs, each_tensor, num_examples, require_movable
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.parts import Constant
from resnet_paths.core.placement import device_of
from resnet_paths.core.signature import arguments_of
from resnet_paths.lesions.lesion import Lesion

__all__ = [
    "Lesion",
    "branch_replacements",
    "chosen_blocks",
    "duplications",
    "layer_schedules",
    "mean_replacements",
    "pair_deletions",
    "random_deletions",
    "random_duplications",
    "random_swaps",
    "scalings",
    "single_deletions",
    "subset_deletions",
]

_BLOCKS = "a list of positions or names, or None"
_MOST_OF_SUBSETS = 15


def single_deletions(chain: ResidualChain) -> list[Lesion]:
    """The deletion of each block in turn (Veit et al. 2016, section 4.1, figure 3).

    Args:
        chain: The intact chain.

    Returns:
        One lesion per block, first to last; blocks without skip that change the shape cannot be deleted and are left
        out.
    """
    return [_deletion(chain, (index,)) for index in deletable(chain)]


def pair_deletions(chain: ResidualChain, blocks: Sequence[int | str] | None = None) -> list[Lesion]:
    """The deletion of every pair of blocks, after that of every block alone.

    `resnet_paths.pair_interactions` subtracts both single increases from that of the pair, which shows whether two
    blocks depend on each other.

    Args:
        chain: The intact chain.
        blocks: Positions or names of the blocks to pair; all that can be deleted if None.

    Returns:
        n single deletions, then n (n - 1) / 2 pairs.

    Raises:
        ResnetPathsError: If a block does not exist or cannot be deleted.
    """
    chosen = chosen_blocks(chain, blocks)
    return [_deletion(chain, each) for size in (1, 2) for each in itertools.combinations(chosen, size)]


def subset_deletions(chain: ResidualChain, blocks: Sequence[int | str] | None = None) -> list[Lesion]:
    """The deletion of every subset of blocks: 2^n lesions, of which a study computes 2^n - 1 blocks, no block twice.

    Blocks with a skip that is not the identity cost more, since their skips are evaluated where they are deleted.

    Args:
        chain: The intact chain.
        blocks: Positions or names of the blocks, at most 15; all that can be deleted if None.

    Returns:
        One lesion per subset, in the order of binary numbers: block i of the n is deleted in lesion k if bit i of k is
        set. The first deletes nothing, the last all of them.

    Raises:
        ResnetPathsError: If a block does not exist or cannot be deleted, or there are more than 15.

    Example:
        >>> from resnet_paths import load_network, unravel
        >>> chain = unravel(load_network("preact-resnet-20"), torch.zeros(2, 1, 28, 28))
        >>> [lesion.blocks for lesion in subset_deletions(chain, [0, 1])]
        [(), (0,), (1,), (0, 1)]
    """
    chosen = chosen_blocks(chain, blocks)
    if len(chosen) > _MOST_OF_SUBSETS:
        raise ResnetPathsError(
            "blocks",
            f"{len(chosen)} blocks",
            f"at most {_MOST_OF_SUBSETS}, which have {2**_MOST_OF_SUBSETS:,} subsets",
            "Choose some of them, group them (group_blocks), or draw subsets (sampled_shapley_values).",
        )
    return [
        _deletion(chain, tuple(block for i, block in enumerate(chosen) if number >> i & 1))
        for number in range(2 ** len(chosen))
    ]


def chosen_blocks(chain: ResidualChain, blocks: Sequence[int | str] | None) -> list[int]:
    """Positions of the blocks of a plan, in order.

    Args:
        chain: The intact chain.
        blocks: Positions or names; all that can be deleted if None.

    Returns:
        Each once.

    Raises:
        ResnetPathsError: If a block does not exist or cannot be deleted.
    """
    possible = deletable(chain)
    if blocks is None:
        return possible
    chosen = sorted({chain.block_index(block) for block in require_list("blocks", blocks, _BLOCKS)})
    for index in chosen:
        if index not in possible:
            raise ResnetPathsError("blocks", chain[index].name, "blocks that can be deleted")
    return chosen


def random_deletions(
    chain: ResidualChain, counts: Iterable[int], repeats: int, generator: torch.Generator
) -> list[Lesion]:
    """Random sets of blocks, deleted together (Veit et al. 2016, section 4.2, figure 5a).

    Args:
        chain: The intact chain.
        counts: How many blocks to delete, such as ``range(1, 21)``.
        repeats: Sets of each size, each drawn uniformly without replacement within the set.
        generator: Source of the random numbers.

    Returns:
        `repeats` lesions of each count, in the order of `counts`.

    Raises:
        ResnetPathsError: If more blocks are to be deleted than can be, or `repeats` is negative.
    """
    sets = _random_sets(deletable(chain), counts, repeats, generator, "blocks that can be deleted")
    return [replace(_deletion(chain, blocks), seed=generator.initial_seed()) for blocks in sets]


def random_swaps(chain: ResidualChain, counts: Iterable[int], repeats: int, generator: torch.Generator) -> list[Lesion]:
    """Random swaps of two blocks of one stage (Veit et al. 2016, section 4.2, figure 5b).

    Blocks that change the shape stay where they are. Swaps follow one another, so that one may undo another: the
    disorder is measured by Kendall's tau of the order that results.

    Args:
        chain: The intact chain.
        counts: How many swaps to make, such as ``range(1, 25)``.
        repeats: Lesions of each count.
        generator: Source of the random numbers.

    Returns:
        `repeats` lesions of each count, in the order of `counts`.

    Raises:
        ResnetPathsError: If no two blocks can be swapped, or `repeats` is negative.
    """
    require_chain("chain", chain)
    require_generator("generator", generator)
    num_pairs, pair = _exchangeable(chain)
    if not num_pairs:
        raise ResnetPathsError(
            "chain", f"{len(chain)} blocks", "a chain with two blocks of one stage that keep the shape"
        )
    lesions = []
    for count in _checked_counts(counts, repeats, None, "swaps"):
        for _ in range(repeats):
            order = list(range(len(chain)))
            chosen = torch.randint(num_pairs, (count,), generator=generator, device=generator.device).tolist()
            for first, second in map(pair, chosen):
                order[first], order[second] = order[second], order[first]
            moved = tuple(place for place, block in enumerate(order) if place != block)
            name, seed = f"{count} random swaps", generator.initial_seed()
            lesions.append(Lesion("swap", moved, name=name, order=tuple(order), seed=seed))
    return lesions


def duplications(chain: ResidualChain) -> list[Lesion]:
    """Each block that keeps the shape, run twice in a row.

    Args:
        chain: The intact chain.

    Returns:
        One lesion per block.
    """
    require_chain("chain", chain)
    return [_duplication(chain, (index,)) for index, block in enumerate(chain) if block.keeps_shape]


def random_duplications(
    chain: ResidualChain, counts: Iterable[int], repeats: int, generator: torch.Generator
) -> list[Lesion]:
    """Random sets of blocks that keep the shape, each run twice in a row.

    Args:
        chain: The intact chain.
        counts: How many blocks to duplicate, such as ``range(1, 11)``.
        repeats: Sets of each size, each drawn uniformly without replacement within the set.
        generator: Source of the random numbers.

    Returns:
        `repeats` lesions of each count, in the order of `counts`.

    Raises:
        ResnetPathsError: If more blocks are to be duplicated than can be, or `repeats` is negative.
    """
    require_chain("chain", chain)
    possible = [index for index, block in enumerate(chain) if block.keeps_shape]
    sets = _random_sets(possible, counts, repeats, generator, "blocks that can be duplicated")
    return [replace(_duplication(chain, blocks), seed=generator.initial_seed()) for blocks in sets]


def scalings(chain: ResidualChain, factors: Iterable[float]) -> list[Lesion]:
    """Each block's branch times each factor.

    Args:
        chain: The intact chain.
        factors: Finite numbers; 0 has the effect of a deletion if the block has a skip.

    Returns:
        One lesion per block and factor, block by block.
    """
    require_chain("chain", chain)
    factors = [require_float("factors", f) for f in require_list("factors", factors, "a list of finite numbers")]
    return [
        Lesion("scale", (index,), name=f"{factor:g} x {_name(chain, index)}", factor=factor)
        for index, block in enumerate(chain)
        if block.branch is not None
        for factor in factors
    ]


def branch_replacements(chain: ResidualChain, source: ResidualChain, name: str = "replace") -> list[Lesion]:
    """Each block's branch in turn taken from another chain of the same architecture.

    With `source` the network at its initialisation this is re-initialisation, with `source` a network of another seed
    re-randomisation (Zhang, Bengio and Singer 2019, Are all layers created equal, section 3). BatchNorm statistics
    inside a branch come with it.

    Args:
        chain: The intact chain.
        source: The chain from which the branches are taken, with as many blocks of the same shapes.
        name: First word of the lesions' names, such as ``"re-initialise"``.

    Returns:
        One lesion per block that has a branch in both.

    Raises:
        ResnetPathsError: If the chains' blocks do not have the same shapes.
    """
    for argument, each in (("chain", chain), ("source", source)):
        require_chain(argument, each)
    if not isinstance(name, str):
        raise ResnetPathsError("name", name, "a str")
    shapes, others = ([(block.in_shape, block.out_shape) for block in each] for each in (chain, source))
    if shapes != others:
        raise ResnetPathsError(
            "source", f"{len(source)} blocks", f"a chain of {len(chain)} blocks with the shapes of those of `chain`"
        )
    return [
        _replacement(f"{name} {_name(chain, index)}", index, other.branch)
        for index, (block, other) in enumerate(zip(chain, source, strict=True))
        if block.branch is not None and other.branch is not None
    ]


def mean_replacements(chain: ResidualChain, inputs: Inputs) -> list[Lesion]:
    """Each block's branch in turn replaced by its mean output, so that only its dependence on the example is lost.

    Args:
        chain: The intact chain, in eval mode; runs once on `inputs`.
        inputs: Examples over which the means are taken, usually training images: a tensor [batch, ...], a tuple of
            positional arguments or a mapping of keyword arguments.

    Returns:
        One lesion per block that has a branch.

    Raises:
        ResnetPathsError: If the chain is in training mode, or there is no example.
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    inputs = checked_inputs(inputs)
    if not num_examples(inputs):
        raise ResnetPathsError("inputs", "no examples", "at least one example")
    device = device_of(chain)
    require_movable("inputs", inputs, device)
    args, kwargs = arguments_of(each_tensor(lambda t: t.to(device, copy=True), inputs))
    with torch.no_grad():
        _, cache = chain.run_with_cache(*args, **kwargs)
    return [
        _replacement(f"mean of {_name(chain, index)}", index, Constant(output.mean(0)))
        for index, output in enumerate(cache.branch)
        if output is not None
    ]


def layer_schedules(
    chain: ResidualChain,
    blocks: Sequence[int | str] | None = None,
    *,
    loops: int = 3,
    generator: torch.Generator | None = None,
) -> list[Lesion]:
    """Six ways to run the middle layers (Sun et al. 2024, Layers as Painters, section 3).

    They are skipped; replaced by repetitions of the middle one; run in reverse order; in random order; in parallel on
    one input with averaged outputs ("parallel"); or in parallel several times ("looped parallel"). A layer of a
    transformer is attention and MLP together, whether the chain has one block for each or one for both
    (`resnet_paths.group_blocks`).

    Args:
        chain: The intact chain.
        blocks: Neighbouring blocks with identity skips, to be taken one by one; if None, the layers of the longest run
            that keeps the shape, without its first and last.
        loops: Rounds of the looped parallel.
        generator: Source of the random order; None for a new one, seeded with 0.

    Returns:
        The six lesions.

    Raises:
        ResnetPathsError: If there are fewer than two such layers or blocks, or they are not consecutive.
    """
    require_chain("chain", chain)
    if blocks is None:
        runs = runs_of(chain, "transformer_layer")
        layers = [runs[i] for i in _middle(group_blocks(chain, runs))]
    else:
        layers = [
            (index,) for index in sorted(chain.block_index(block) for block in require_list("blocks", blocks, _BLOCKS))
        ]
    places = [index for layer in layers for index in layer]
    side_by_side = places == list(range(places[0], places[-1] + 1)) if places else False
    exchangeable = blocks is None or all(_is_exchangeable(chain, i) for i in places)
    if len(layers) < 2 or not side_by_side or not exchangeable:
        raise ResnetPathsError(
            "blocks",
            [chain[i].name for i in places],
            "at least two neighbouring layers or blocks with identity skips and branches",
        )
    generator = seeded_generator("generator", generator)
    draw = torch.randperm(len(layers), generator=generator, device=generator.device).tolist()

    def in_order(order: Iterable[int]) -> tuple[int, ...]:
        moved = [index for i in order for index in layers[i]]
        return (*range(places[0]), *moved, *range(places[-1] + 1, len(chain)))

    made = partial(Lesion, blocks=tuple(places), runs=tuple(layers) if blocks is None else ())
    return [
        made("delete", name="skip"),
        made("repeat", name="middle repeat"),
        made("permute", name="reverse", order=in_order(reversed(range(len(layers))))),
        made("permute", name="random order", order=in_order(draw), seed=generator.initial_seed()),
        made("parallel", name="parallel"),
        made("parallel", name="looped parallel", loops=loops),
    ]


def _replacement(name: str, index: int, branch: torch.nn.Module) -> Lesion:
    return Lesion("replace", (index,), name=name, branch=branch)


def _deletion(chain: ResidualChain, blocks: tuple[int, ...]) -> Lesion:
    return Lesion("delete", blocks, name="delete " + ", ".join(_name(chain, index) for index in blocks))


def _duplication(chain: ResidualChain, blocks: tuple[int, ...]) -> Lesion:
    return Lesion("duplicate", blocks, name="duplicate " + ", ".join(_name(chain, index) for index in blocks))


def _random_sets(
    possible: list[int], counts: Iterable[int], repeats: int, generator: torch.Generator, what: str
) -> list[tuple[int, ...]]:
    """`repeats` sets of each count, each drawn uniformly without replacement."""
    require_generator("generator", generator)
    sets = []
    for count in _checked_counts(counts, repeats, len(possible), what):
        for _ in range(repeats):
            order = torch.randperm(len(possible), generator=generator, device=generator.device)[:count].tolist()
            sets.append(tuple(sorted(possible[i] for i in order)))
    return sets


def _name(chain: ResidualChain, index: int) -> str:
    return chain[index].name or str(index)


def _is_exchangeable(chain: ResidualChain, index: int) -> bool:
    block = chain[index]
    return block.branch is not None and is_identity(block.skip) and is_identity(block.pre) and block.keeps_shape


def _exchangeable(chain: ResidualChain) -> tuple[int, Callable[[int], tuple[int, int]]]:
    """How many pairs of blocks can be swapped, and the pair of a number, without a list of all n^2 of them."""
    groups: defaultdict[object, list[int]] = defaultdict(list)
    places: list[tuple[list[int], int]] = []  # of each block: its group, and its place in it
    for index, block in enumerate(chain):
        if block.keeps_shape:
            group = groups[block.stage, block.in_shape]
            places.append((group, len(group)))
            group.append(index)
    ends = [0, *itertools.accumulate(len(group) - place - 1 for group, place in places)]

    def pair(number: int) -> tuple[int, int]:
        first = bisect_right(ends, number) - 1
        group, place = places[first]
        return group[place], group[place + 1 + number - ends[first]]

    return ends[-1], pair


def _middle(chain: ResidualChain) -> list[int]:
    """The longest run of exchangeable blocks of one stage, without its first and last."""
    runs = [
        list(run)
        for (exchangeable, _), run in itertools.groupby(
            range(len(chain)), key=lambda i: (_is_exchangeable(chain, i), chain[i].stage)
        )
        if exchangeable
    ]
    return max(runs, key=len, default=[])[1:-1]


def _checked_counts(counts: Iterable[int], repeats: int, most: int | None, what: str) -> list[int]:
    require_int("repeats", repeats, 0)
    listed = require_list("counts", counts, f"a list of numbers of {what}, such as [1, 2]")
    return [require_int("counts", count, 1, most, noun=f"numbers of {what}") for count in listed]
