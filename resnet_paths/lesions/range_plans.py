"""Lesions of ranges of neighbouring blocks, and deletions along a ranking.

The papers take whole layers: pass ``group_blocks(chain)`` to these functions and to the study.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from resnet_paths._utils.arguments import require_int, require_list
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import Block, ResidualChain, require_chain
from resnet_paths.core.edits import deletable
from resnet_paths.lesions.lesion import Lesion

__all__ = ["neighbour_swaps", "range_deletions", "range_repeats", "range_swaps", "ranked_deletions"]


def range_deletions(chain: ResidualChain, lengths: Iterable[int] | None = None) -> list[Lesion]:
    """The deletion of each range of neighbouring blocks: the map over first block and number of blocks.

    Gromov et al. 2024, The unreasonable ineffectiveness of the deeper layers, section 3.

    Args:
        chain: The intact chain.
        lengths: How many blocks to delete; None for every number that is possible.

    Returns:
        One lesion per length and first block; ranges with a block that cannot be deleted are left out.

    Raises:
        ResnetPathsError: If a length is not a number from 1 to the number of blocks.
    """
    possible = set(deletable(chain))
    return [
        Lesion("delete", places, name=f"delete {_named(chain, places)}")
        for length in _checked(chain, lengths)
        for places in _ranges(chain, length)
        if possible.issuperset(places)
    ]


def range_repeats(chain: ResidualChain, lengths: Iterable[int] | None = None) -> list[Lesion]:
    """Each range of neighbouring blocks run twice in a row: the map over its first and last block.

    Args:
        chain: The intact chain.
        lengths: How many blocks to repeat; None for every number that is possible.

    Returns:
        One lesion per length and first block, in which blocks i to j are followed by i to j again; ranges with a block
        that changes the shape are left out.

    Raises:
        ResnetPathsError: If a length is not a number from 1 to the number of blocks.
    """
    require_chain("chain", chain)
    return [
        Lesion("duplicate_range", places, name=f"repeat {_named(chain, places)}")
        for length in _checked(chain, lengths)
        for places in _ranges(chain, length)
        if all(block.keeps_shape for block in _blocks(chain, places))
    ]


def neighbour_swaps(chain: ResidualChain) -> list[Lesion]:
    """Swaps of each block with the next one.

    Args:
        chain: The intact chain.

    Returns:
        One lesion per pair of neighbouring blocks of one stage that keep the shape.
    """
    return range_swaps(chain, 1)


def range_swaps(chain: ResidualChain, length: int) -> list[Lesion]:
    """Swaps of two adjacent ranges with the same number of blocks.

    Args:
        chain: The intact chain.
        length: Blocks in each of the two ranges.

    Returns:
        One lesion per first block of the first range; ranges that are not of one stage, or with a block that changes
        the shape, are left out.

    Raises:
        ResnetPathsError: If the length is not a number from 1 to half the number of blocks.
    """
    require_chain("chain", chain)
    length = _checked_length(length, len(chain) // 2)
    lesions = []
    for places in _ranges(chain, 2 * length):
        blocks = _blocks(chain, places)
        if not all(b.keeps_shape for b in blocks) or len({(b.stage, b.in_shape) for b in blocks}) > 1:
            continue
        one, other = places[:length], places[length:]
        order = (*range(one[0]), *other, *one, *range(other[-1] + 1, len(chain)))
        name = f"swap {_named(chain, one)} and {_named(chain, other)}"
        lesions.append(Lesion("swap", places, name=name, order=order))
    return lesions


def ranked_deletions(chain: ResidualChain, ranking: Sequence[int | str]) -> list[Lesion]:
    """Deletion along a ranking, one block more each time.

    Args:
        chain: The intact chain.
        ranking: Positions or names of blocks in the order of deletion, such as blocks sorted by a score of
            `resnet_paths.predicted_effects`.

    Returns:
        One lesion per block of the ranking: it and all before it are deleted.

    Raises:
        ResnetPathsError: If there is no such block, or a block occurs twice.
    """
    require_chain("chain", chain)
    places = [chain.block_index(block) for block in require_list("ranking", ranking, "a list of positions or names")]
    if len(set(places)) < len(places):
        raise ResnetPathsError("ranking", list(ranking), "each block once")
    return [
        Lesion("delete", tuple(sorted(places[:count])), name=f"first {count} of the ranking")
        for count in range(1, len(places) + 1)
    ]


def _checked(chain: ResidualChain, lengths: Iterable[int] | None) -> list[int]:
    most = len(chain)
    if lengths is None:
        return list(range(1, most + 1))
    allowed = f"numbers of blocks from 1 to {most}"
    return [_checked_length(length, most) for length in require_list("lengths", lengths, f"{allowed}, or None")]


def _checked_length(length: object, most: int) -> int:
    return require_int("lengths", length, 1, most, noun="numbers of blocks")


def _ranges(chain: ResidualChain, length: int) -> list[tuple[int, ...]]:
    return [tuple(range(start, start + length)) for start in range(len(chain) - length + 1)]


def _blocks(chain: ResidualChain, places: Iterable[int]) -> list[Block]:
    return [chain[index] for index in places]


def _named(chain: ResidualChain, places: Sequence[int]) -> str:
    first, last = (chain[index].name or str(index) for index in (places[0], places[-1]))
    return first if len(places) == 1 else f"{first} to {last}"
