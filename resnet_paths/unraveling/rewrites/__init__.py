"""Rewrites of an exported graph: one way to write each thing, so that the finder of blocks has to know only that one.

A rewrite is a function of a `torch.fx.Graph` that changes it in place. None of them changes what the graph computes;
those that change how it rounds say so. All but the first are in `REWRITES`, in the order in which `apply_rewrites` runs
them, once each:

0. `write_out_of_place`: in-place operations become ordinary ones. It is the only one that can fail, and then the
   exporter's own `run_decompositions` takes its place; so `resnet_paths.unraveling.tracing.trace` runs it before the
   others, which rely on it: from there on, a copy of a tensor is the tensor.
1. The kernels that the model runs, or that have a derivative: `restore_batch_norm`, `write_views_as_reshapes`,
   `write_copies_as_expansions`.
2. Residual additions that are part of another operation become additions: `remove_neutral_numbers`,
   `write_sums_as_additions`, `write_products_apart`, `write_multiples_as_additions`, `write_interpolations`.
3. `move_rearrangements`, which looks for the additions of step 2, and then `remove_round_trips`, which removes what the
   moves leave: skips that are a copy or a view of x become x itself.
4. Concatenations, which nothing before this touches: `extend_concatenations`, `write_partial_additions`, and
   `nest_concatenations`, which has to see the operands that the other two leave.

A rewrite in step 2 applies only where the finder would look for a block: where what is added is computed, through a
weight layer, from what it is added to (`branches.source_of_branch`). ``h - h.mean()`` inside a normalisation and the
bias of ``torch.addmm`` stay as they are, and so do their last bits.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph

from resnet_paths.unraveling.rewrites.additions import (
    remove_neutral_numbers,
    write_multiples_as_additions,
    write_products_apart,
    write_sums_as_additions,
)
from resnet_paths.unraveling.rewrites.concatenations import (
    extend_concatenations,
    nest_concatenations,
    write_partial_additions,
)
from resnet_paths.unraveling.rewrites.in_place import write_out_of_place
from resnet_paths.unraveling.rewrites.interpolations import write_interpolations
from resnet_paths.unraveling.rewrites.kernels import (
    restore_batch_norm,
    write_copies_as_expansions,
    write_views_as_reshapes,
)
from resnet_paths.unraveling.rewrites.rearrangements import move_rearrangements, remove_round_trips

__all__ = ["REWRITES", "apply_rewrites", "write_out_of_place"]

REWRITES: tuple[Callable[[Graph], None], ...] = (
    restore_batch_norm,
    write_views_as_reshapes,
    write_copies_as_expansions,
    remove_neutral_numbers,
    write_sums_as_additions,
    write_products_apart,
    write_multiples_as_additions,
    write_interpolations,
    move_rearrangements,
    remove_round_trips,
    extend_concatenations,
    write_partial_additions,
    nest_concatenations,
)


def apply_rewrites(graph: Graph) -> None:
    """Apply all rewrites to a graph, in their order.

    Args:
        graph: A flat graph of ATen operations, none of them in place; placeholders are the model's inputs, and
            ``get_attr`` nodes its parameters and buffers. Every node has its fake value in ``meta["val"]``. The graph
            is changed, and so may be the node that it returns.
    """
    for rewrite in REWRITES:
        rewrite(graph)
