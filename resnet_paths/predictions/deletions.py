"""Effects of a deletion on the later blocks: the effect matrix, and a decomposition of the change of the output.

At the activations of the intact network the output is an affine map of the outputs of all branches
(`resnet_paths.predictions.direct`). A deletion removes the direct effect of the deleted block and changes the outputs
of the later branches. The remaining change is that of the affine map itself; for a transformer, of the scale of its
last norm:

    total effect = - direct effect + changes of later direct effects + change of the head (+ change along the skips)

The last term is 0 if the state is a plain sum, as in transformers and within a stage of a pre-activation ResNet. The
part of the direct effect that the other terms compensate is called self-repair (McGrath et al. 2023,
https://arxiv.org/abs/2307.15771; Rushing and Nanda 2024, https://arxiv.org/abs/2402.15390).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch

from resnet_paths._utils.arguments import require_generator, require_int, require_list
from resnet_paths._utils.devices import wide
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.statistics import mean_over_examples
from resnet_paths.core.backward.forward import ForwardPass, prepared, split_to_fit
from resnet_paths.core.backward.linearize import Context, inner_products
from resnet_paths.core.chain import Block, ResidualChain, require_chain
from resnet_paths.core.edits import deletable, delete_blocks
from resnet_paths.core.inputs import InputsOrLoader, batches_with_bar
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.parts import call_part
from resnet_paths.predictions.detached import linearizer_of
from resnet_paths.predictions.direct import SkipPath
from resnet_paths.predictions.outputs import Output, name_of, output_function
from resnet_paths.predictions.shares import pooled_share

__all__ = ["Deletion", "deletion_account", "effect_matrix"]


class Deletion(Protocol):
    """The attributes of a lesion that are used, such as those of `resnet_paths.single_deletions`."""

    @property
    def kind(self) -> str:
        """``"delete"``."""

    @property
    def blocks(self) -> tuple[int, ...] | None:
        """Positions of the deleted blocks."""

    @property
    def name(self) -> str:
        """Name for people."""


def effect_matrix(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    lesions: Iterable[Deletion] | None = None,
    *,
    output: Output = "margin",
    linearization: str = "detached",
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """The relative change of the output of each later branch when a block is deleted (Csordás et al. 2025).

    With ``a_l`` for the output of the branch of block l and ``a'_l`` after the deletion, the relative change is
    ``|a'_l - a_l| / |a_l|`` (https://arxiv.org/abs/2505.13898); of states [batch, token, feature] it is
    computed for each token, padding included. The paper shows the maximum over tokens and examples.

    Args:
        chain: The intact chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.prediction_by_path_length`.
        lesions: Deletions, such as those of `resnet_paths.single_deletions`; None for each block in turn.
        output: As for `resnet_paths.direct_effects`. For ``"margin"``, the class and its runner-up are those of the
            intact network.
        linearization: Likewise.
        memory_budget: Maximum number of bytes for activations; batches are split to fit.
        progress: Whether to show a progress bar over the batches of a loader.

    Returns:
        One row per deletion and later block: ``deleted`` and ``deleted_index``, name and position of the deleted block
        (<NA> for several); ``block``, ``block_index``; ``relative_change``, the mean over examples of that over their
        tokens, with standard error over examples ``relative_change_se``; ``max_relative_change`` over examples and
        tokens. Both are infinite where a branch whose output was 0 changes, and leave out outputs that are 0 before and
        after. ``direct_effect`` of the intact block and ``direct_effect_change``, means over examples, with standard
        errors. ``attrs`` contain ``output``, ``linearization``, ``tangent_operations``, ``mean_output`` and
        ``num_examples``.

    Raises:
        ResnetPathsError: If the chain is in training mode, a lesion is not a deletion, an option is unknown, or an
            activation is not finite.

    Example:
        >>> from resnet_paths.core.chain import Block
        >>> layers = [torch.nn.Linear(3, 3) for _ in range(3)]
        >>> blocks = [Block(layer, torch.nn.Identity(), name=f"block{i}") for i, layer in enumerate(layers)]
        >>> frame = effect_matrix(ResidualChain(torch.nn.Identity(), blocks, torch.nn.Identity()), torch.ones(4, 3))
        >>> list(zip(frame.deleted, frame.block))
        [('block0', 'block1'), ('block0', 'block2'), ('block1', 'block2')]
    """
    deletions, _, found, attributes = _run(chain, inputs, lesions, output, linearization, memory_budget, progress)
    rows = [
        (*deletion.columns(chain), chain[index].name, index)
        for deletion in deletions
        for index in deletion.later(chain)
    ]
    frame = pd.DataFrame(rows, columns=["deleted", "deleted_index", "block", "block_index"])
    frame = frame.astype({"deleted_index": "Int64", "block_index": "int64"})
    for name, values in zip(_OF_BLOCK, found, strict=True):
        if name.startswith("max_"):
            frame[name] = np.fmax.reduce(values, 1)  # of those that are known
        else:
            frame[name], frame[f"{name}_se"] = mean_over_examples(values)
    frame.attrs |= attributes
    return frame


def deletion_account(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    lesions: Iterable[Deletion] | None = None,
    *,
    output: Output = "margin",
    linearization: str = "detached",
    generator: torch.Generator | None = None,
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """The change of the output when a block is deleted, as the sum of direct effect, later blocks and head.

    See `resnet_paths.predictions.deletions`; ``total_effect`` is ``- direct_effect + later_change + head_change +
    skip_change`` for each example. The share that is repaired is pooled over examples: the sum of the changes over the
    sum of the direct effects. 1 means that the output does not change; a negative share means that the later blocks and
    the head add to the effect. The share has no meaning for a block whose direct effect is not different from 0.

    Args:
        chain: The intact chain, in eval mode.
        inputs: As for `effect_matrix`.
        lesions: Likewise.
        output: Likewise.
        linearization: Likewise.
        generator: Source of the random numbers of the bootstrap; None for a new one, seeded with 0.
        memory_budget: Likewise.
        progress: Likewise.

    Returns:
        One row per deletion: ``deleted``, ``deleted_index`` (<NA> for several blocks); means over examples, each with
        its standard error: ``total_effect``, the output after the deletion less the output before; ``direct_effect`` of
        the deleted block; ``later_change``, the sum of the changes of the direct effects of the later blocks;
        ``head_change``, the change of the affine map of the head, for a transformer of the scale of its last norm;
        ``skip_change``, the change of the maps of later skips and of what precedes and follows their additions, 0 if
        the state is a plain sum; and ``repaired_share``, ``repaired_share_by_blocks`` (``later_change`` alone) and
        ``repaired_share_by_head`` (``head_change`` alone), each with the ends ``_low`` and ``_high`` of a 95 % interval
        over examples (bootstrap percentiles; too narrow with fewer than about 30 examples, NaN where the sign of the
        direct effect is uncertain). ``attrs`` as for `effect_matrix`.

    Raises:
        ResnetPathsError: As `effect_matrix`.

    Example:
        >>> from resnet_paths.core.chain import Block
        >>> layers = [torch.nn.Linear(3, 3) for _ in range(3)]
        >>> blocks = [Block(layer, torch.nn.Identity(), name=f"block{i}") for i, layer in enumerate(layers)]
        >>> frame = deletion_account(ResidualChain(torch.nn.Identity(), blocks, torch.nn.Identity()), torch.ones(4, 3))
        >>> frame.deleted.tolist()
        ['block0', 'block1', 'block2']
    """
    if generator is not None:
        require_generator("generator", generator)
    deletions, found, _, attributes = _run(chain, inputs, lesions, output, linearization, memory_budget, progress)
    frame = pd.DataFrame(
        [deletion.columns(chain) for deletion in deletions], columns=["deleted", "deleted_index"]
    ).astype({"deleted_index": "Int64"})
    terms = dict(zip(_TERMS, found, strict=True))
    for name, values in terms.items():
        frame[name], frame[f"{name}_se"] = mean_over_examples(values)
    direct = terms["direct_effect"]
    repaired = [terms["total_effect"] + direct, terms["later_change"], terms["head_change"]]
    bounds = pooled_share(np.concatenate(repaired), np.concatenate([direct] * 3), generator)
    for place, suffix in enumerate(("", "_by_blocks", "_by_head")):
        for values, end in zip(bounds, ("", "_low", "_high"), strict=True):
            frame[f"repaired_share{suffix}{end}"] = np.split(values, 3)[place]
    frame.attrs |= attributes
    return frame


@dataclass(frozen=True)
class _Blocks:
    """Blocks that are deleted together."""

    blocks: tuple[int, ...]
    name: str

    def columns(self, chain: ResidualChain) -> tuple[str, int | None]:
        """Name and position."""
        return (chain[self.blocks[0]].name, self.blocks[0]) if len(self.blocks) == 1 else (self.name, None)

    def later(self, chain: ResidualChain) -> list[int]:
        """Positions of the later blocks that remain."""
        return [i for i in range(self.blocks[0], len(chain)) if i not in self.blocks and chain[i].branch is not None]


_TERMS = ("total_effect", "direct_effect", "later_change", "head_change", "skip_change")
_OF_BLOCK = ("relative_change", "max_relative_change", "direct_effect", "direct_effect_change")


@torch.inference_mode(False)
@torch.no_grad()
def _run(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    lesions: Iterable[Deletion] | None,
    output: Output,
    linearization: str,
    memory_budget: int,
    progress: bool,
) -> tuple[list[_Blocks], np.ndarray, np.ndarray, dict[str, object]]:
    """Deletions; terms [term, deletion, example]; columns [column, deletion and later block, example]; attributes."""
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    linearizer, tangents = linearizer_of(linearization)
    output_function(output, None)  # validated before the first pass
    memory_budget = require_int("memory_budget", memory_budget, 1)
    deletions = _checked(chain, lesions)
    edited = [delete_blocks(chain, deletion.blocks) for deletion in deletions]
    outputs: list[np.ndarray] = []
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in deletions]
    for batch, labels in batches_with_bar("deletions", inputs, None, progress):
        # States, what branches add and cotangents of the sums are kept for all blocks.
        for part, some in split_to_fit(chain, *prepared(chain, batch, labels), memory_budget, len(chain) + 1):
            point = ForwardPass(chain, part)
            path = SkipPath.of(chain, point, output, some, linearizer)
            outputs.append(path.outputs.cpu().numpy())
            for deletion, without, pieces in zip(deletions, edited, found, strict=True):
                pieces.append(_changes(without, point, path, deletion))
    attributes = {
        "output": name_of(output),
        "linearization": linearization,
        "tangent_operations": sorted(tangents),
        "mean_output": float(np.concatenate(outputs).mean()),
        "num_examples": sum(map(len, outputs)),
    }
    num_examples = sum(map(len, outputs))
    terms = [np.concatenate([one for one, _ in pieces], 1)[:, None] for pieces in found]
    of_blocks = [np.concatenate([one for _, one in pieces], 2) for pieces in found]
    return (
        deletions,
        np.concatenate([np.empty((len(_TERMS), 0, num_examples)), *terms], 1),
        np.concatenate([np.empty((len(_OF_BLOCK), 0, num_examples)), *of_blocks], 1),
        attributes,
    )


def _checked(chain: ResidualChain, lesions: Iterable[Deletion] | None) -> list[_Blocks]:
    possible = deletable(chain)
    if lesions is None:
        return [_Blocks((index,), "") for index in possible]
    allowed = "deletions of blocks that can be deleted, such as resnet_paths.single_deletions(chain)"
    deletions = []
    for lesion in require_list("lesions", lesions, allowed):
        blocks = getattr(lesion, "blocks", None)
        if getattr(lesion, "kind", None) != "delete" or not blocks or not set(blocks) <= set(possible):
            raise ResnetPathsError("lesions", getattr(lesion, "name", lesion), allowed)
        deletions.append(_Blocks(tuple(sorted(blocks)), lesion.name))
    if not deletions:
        raise ResnetPathsError("lesions", [], "at least one deletion")
    return deletions


def _changes(
    without: ResidualChain, point: ForwardPass, path: SkipPath, deletion: _Blocks
) -> tuple[np.ndarray, np.ndarray]:
    """Terms [term, batch] and columns of later blocks [column, block, batch] of one deletion."""
    context = Context(point.context.values)
    state, columns = point.states[deletion.blocks[0]], []
    for index in range(deletion.blocks[0], len(without)):
        state, branch = _run_block(without[index], state, context)
        intact = path.added[index]
        if branch is not None and intact is not None and index not in deletion.blocks:
            change = inner_products(path.weights[index][None], branch - intact)[0]
            relative = _relative(branch - intact, intact)
            columns.append(torch.stack([*relative, path.effects[index], change]))
    after = wide(path.output_of(call_part(without.head, state.clone(), context.values)))
    direct = torch.stack([path.effects[index] for index in deletion.blocks]).sum(0)
    later = torch.zeros_like(direct) if not columns else torch.stack([column[3] for column in columns]).sum(0)
    total = after - path.outputs
    explained = inner_products(path.weight[None], state)[0] + path.head_constant - path.outputs
    terms = torch.stack([total, direct, later, total - explained, explained - later + direct])
    blocks = torch.stack(columns, 1) if columns else terms.new_empty(len(_OF_BLOCK), 0, len(direct))
    return terms.cpu().numpy(), blocks.cpu().numpy()


def _run_block(block: Block, state: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output of a block, and that of its branch."""
    # On copies: parts written by hand may work in place.
    shared = call_part(block.pre, state.clone(), context.values)
    skip = None if block.skip is None else call_part(block.skip, shared.clone(), context.values)
    branch = None if block.branch is None else call_part(block.branch, shared.clone(), context.values)
    total = branch if skip is None else skip if branch is None else skip + branch
    assert total is not None  # held by Block
    branch = None if branch is None else branch.expand(total.shape)
    return call_part(block.post, total.clone(), context.values), branch


def _relative(change: torch.Tensor, intact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and maximum over tokens of ``|change| / |intact|``, [batch]; other states count as one vector."""
    tokens = change.shape[1] if change.dim() == 3 else 1
    ratio = wide(change).reshape(len(change), tokens, -1).norm(dim=2)
    ratio /= wide(intact).reshape(len(intact), tokens, -1).norm(dim=2)
    # Where both are 0 there is no ratio.
    largest = torch.where(ratio.isnan(), -torch.inf, ratio).amax(1)
    return ratio.nanmean(1), torch.where(largest < 0, torch.nan, largest)
