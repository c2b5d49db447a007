"""Lesion studies: many edited chains on the same images, no step computed twice.

A chain is a sequence of steps, one a block. All lesions of a study form a trie over those sequences, and every edge of
the trie is computed once a batch: the single deletions of n blocks cost about (n + 1) / 2 forward passes, not n. Each
prediction is the one that the lesioned chain gives on its own, bit for bit: the same modules run on the same inputs.
Activations live while a branch of the trie still needs them; cheap branches go first, so that few are alive at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from resnet_paths.chain import Block, Parallel, ResidualChain, Scaled, is_identity, refuse_training_mode
from resnet_paths.errors import ResnetPathsError
from resnet_paths.lesion_plans import Lesion

__all__ = ["lesion_study", "pair_interactions"]

_NORMAL_975 = float(stats.norm.ppf(0.975))


def lesion_study(
    chain: ResidualChain,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    lesions: Sequence[Lesion | Callable[[ResidualChain], ResidualChain]],
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """What each lesion does to the error, all on the same images.

    Nothing is retrained and BatchNorm keeps the statistics of the intact network, as in the paper. The study runs where
    the chain's parameters lie, in the dtype of the inputs; the chain is not changed. An image whose logits are
    not finite counts as wrong.

    Args:
        chain: The intact chain, in eval mode.
        loader: Batches of (inputs, labels); labels are class indices [batch]. Read once.
        lesions: Lesions, or functions from chain to chain.
        progress: Whether to show a bar over batches.

    Returns:
        A row a lesion, in the order given: ``lesion`` (name), ``blocks`` (tuple of positions), ``num_lesions``,
        ``kendall_tau`` (of the order of the blocks with the intact one, 1 where none moved);
        ``error_rate`` in [0, 1] with its 95 % Wilson interval ``error_rate_low`` and ``error_rate_high``;
        ``error_increase`` over the intact chain with its paired 95 % interval (same images, normal approximation)
        ``error_increase_low`` and ``error_increase_high``; ``loss``, the mean cross-entropy in nats; ``num_examples``;
        ``intact_error_rate``. The frame's ``attrs`` hold ``block_evaluations`` and ``block_evaluations_one_by_one``:
        how many block evaluations a batch took, and how many a loop over lesions takes.

    Raises:
        ResnetPathsError: If the chain is in training mode, the loader is empty or does not give such batches, or labels
            are out of range.
    """
    _refuse_other_than_chain("chain", chain)
    refuse_training_mode("chain", chain)
    named = [
        lesion if isinstance(lesion, Lesion) else Lesion(getattr(lesion, "__name__", repr(lesion)), lesion, ())
        for lesion in lesions
    ]
    # The intact chain comes first: increases are taken against it on the same images.
    chains = [chain, *(lesion.edit(chain) for lesion in named)]
    for lesion, edited in zip(named, chains[1:], strict=True):
        _refuse_other_than_chain(f"lesion {lesion.name!r}", edited)
    trie = _Trie(chains)
    tally = _Tally(len(chains))
    device = next((t.device for t in [*chain.parameters(), *chain.buffers()]), torch.device("cpu"))
    with torch.inference_mode():
        for batch in tqdm(loader, desc="lesion study", unit="batch", disable=not progress):
            inputs, labels = _unpack(batch)
            labels = labels.to(device)
            for index, logits in trie.logits(inputs.to(device)):
                tally.add(index, logits, labels)
            tally.close_batch(len(labels))
    if not tally.num_examples:
        raise ResnetPathsError("loader", "no batches", "a loader of at least one batch")
    rows = [
        {
            "lesion": lesion.name,
            "blocks": lesion.blocks,
            "num_lesions": len(lesion.blocks),
            "kendall_tau": lesion.kendall_tau,
            **tally.row(index),
        }
        for index, lesion in enumerate(named, start=1)
    ]
    frame = pd.DataFrame(rows)
    frame.attrs["block_evaluations"] = trie.num_edges
    frame.attrs["block_evaluations_one_by_one"] = sum(len(_steps(c)) for c in chains)
    return frame


def pair_interactions(frame: pd.DataFrame) -> pd.DataFrame:
    """What the deletion of two blocks costs beyond the sum of what each costs alone.

    Args:
        frame: From `lesion_study` with `pair_deletions`: single deletions and pairs.

    Returns:
        A row a pair: ``first``, ``second`` (positions), ``error_increase``, ``additive`` (the sum of both single
        increases), ``interaction`` (the difference): above 0 where the blocks stand in for one another.

    Raises:
        ResnetPathsError: If the frame is of another kind, or a pair lacks one of its single deletions.
    """
    if "blocks" not in frame or "error_increase" not in frame:
        raise ResnetPathsError("frame", list(frame.columns), "a frame of lesion_study")
    increases = dict(zip(frame["blocks"], frame["error_increase"].astype(float), strict=True))
    rows = []
    for blocks, increase in increases.items():
        if len(blocks) != 2:
            continue
        missing = [block for block in blocks if (block,) not in increases]
        if missing:
            raise ResnetPathsError(
                "frame", f"no single deletion of block {missing[0]}", "single deletions of all blocks in pairs",
                "Study pair_deletions(chain), which holds them.",
            )  # fmt: skip
        additive = sum(increases[(block,)] for block in blocks)
        rows.append({
            "first": blocks[0], "second": blocks[1], "error_increase": increase,
            "additive": additive, "interaction": increase - additive,
        })  # fmt: skip
    return pd.DataFrame(rows, columns=["first", "second", "error_increase", "additive", "interaction"])


@dataclass
class _Node:
    """A state that several chains pass: what to compute next from it, and which chains end here."""

    step: nn.Module | None = None
    children: dict[Hashable, _Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    weight: int = 0


class _Trie:
    """All chains as one tree of steps from the stem."""

    def __init__(self, chains: Sequence[ResidualChain]) -> None:
        self.chains = chains  # kept alive: steps are told apart by the identity of their parts
        self.roots: dict[int, _Node] = {}
        self.num_edges = 0
        for index, chain in enumerate(chains):
            node = self.roots.setdefault(id(chain.stem), _Node(chain.stem))
            for block in _steps(chain):
                key = _block_key(block)
                if key not in node.children:
                    node.children[key] = _Node(block)
                    self.num_edges += 1
                node = node.children[key]
                node.weight += 1
            node.ends.append(index)

    def logits(self, inputs: torch.Tensor) -> Iterable[tuple[int, torch.Tensor]]:
        """(Index, logits) of every chain, each edge computed once."""
        stack: list[tuple[_Node, Any]] = [(root, inputs) for root in self.roots.values()]
        while stack:
            node, state = stack.pop()
            assert node.step is not None
            state = node.step(state)
            heads: dict[int, torch.Tensor] = {}
            for index in node.ends:
                head = self.chains[index].head
                if id(head) not in heads:
                    heads[id(head)] = head(self._for_one_of_several(state))
                yield index, heads[id(head)]
            # The lightest child is popped first; while the heaviest runs, no other holds this state.
            children = sorted(node.children.values(), key=lambda c: -c.weight)
            stack += [(child, self._for_one_of_several(state) if len(children) > 1 else state) for child in children]
            del state

    def _for_one_of_several(self, state: Any) -> Any:
        """The state for one of several readers: its own copy where a part written by hand may change it in place."""
        exported = all(chain.eval_only for chain in self.chains)
        return state.clone() if isinstance(state, torch.Tensor) and not exported else state


class _Tally:
    """Counts over the batches of a study, for every chain; chain 0 is the intact one."""

    def __init__(self, num_chains: int) -> None:
        self.num_examples = 0
        self.num_wrong = [0] * num_chains
        self.num_newly_wrong = [0] * num_chains
        self.num_newly_right = [0] * num_chains
        self.loss_sum = [0.0] * num_chains
        self._wrong: dict[int, torch.Tensor] = {}

    def add(self, index: int, logits: torch.Tensor, labels: torch.Tensor) -> None:
        if logits.dim() != 2 or len(logits) != len(labels):
            raise ResnetPathsError(
                "loader", f"labels {list(labels.shape)} for logits {list(logits.shape)}", "one label a row of logits"
            )
        if labels.is_floating_point() or labels.dim() != 1:
            raise ResnetPathsError("labels", f"{labels.dtype} {list(labels.shape)}", "class indices, integers [batch]")
        if not self._wrong and bool(((labels < 0) | (labels >= logits.shape[1])).any()):
            raise ResnetPathsError(
                "labels", [int(labels.min()), int(labels.max())], f"class indices from 0 to {logits.shape[1] - 1}"
            )
        finite = torch.isfinite(logits).all(1)
        self._wrong[index] = (logits.argmax(1) != labels) | ~finite
        self.loss_sum[index] += F.cross_entropy(logits.float(), labels, reduction="sum").item()

    def close_batch(self, num_examples: int) -> None:
        intact = self._wrong[0]
        for index, wrong in self._wrong.items():
            self.num_wrong[index] += int(wrong.sum())
            self.num_newly_wrong[index] += int((wrong & ~intact).sum())
            self.num_newly_right[index] += int((intact & ~wrong).sum())
        self.num_examples += num_examples
        self._wrong.clear()

    def row(self, index: int) -> dict[str, float | int]:
        n = self.num_examples
        interval = stats.binomtest(self.num_wrong[index], n).proportion_ci(method="wilson")
        up, down = self.num_newly_wrong[index] / n, self.num_newly_right[index] / n
        increase = up - down
        # Each image changes by -1, 0 or 1: the variance of the paired difference is (up + down) - increase^2.
        half_width = _NORMAL_975 * max(up + down - increase**2, 0.0) ** 0.5 / n**0.5
        return {
            "error_rate": self.num_wrong[index] / n,
            "error_rate_low": float(interval.low),
            "error_rate_high": float(interval.high),
            "error_increase": increase,
            "error_increase_low": increase - half_width,
            "error_increase_high": increase + half_width,
            "loss": self.loss_sum[index] / n,
            "num_examples": n,
            "intact_error_rate": self.num_wrong[0] / n,
        }


def _refuse_other_than_chain(argument: str, value: object) -> None:
    if not isinstance(value, ResidualChain):
        raise ResnetPathsError(
            argument, type(value).__name__, "a ResidualChain",
            "Make one with resnet_paths.unravel(model, example_inputs).",
        )  # fmt: skip


def _steps(chain: ResidualChain) -> list[Block]:
    """The blocks that do something: a deleted block with an identity skip is no step."""
    return [b for b in chain if not (b.branch is None and all(map(is_identity, (b.pre, b.skip, b.post))))]


def _block_key(block: Block) -> Hashable:
    return tuple(_part_key(part) for part in (block.pre, block.skip, block.branch, block.post))


def _part_key(part: nn.Module | None) -> Hashable:
    """Equal for parts that compute the same thing; wrappers are made anew by each edit, so their content counts."""
    if part is None or is_identity(part):
        return type(part).__name__
    if isinstance(part, Scaled):
        return ("scaled", part.factor, _part_key(part.branch))
    if isinstance(part, Parallel):
        return ("parallel", *map(_part_key, part))
    return id(part)


def _unpack(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(b, torch.Tensor) for b in batch):
        raise ResnetPathsError(
            "loader", type(batch).__name__, "batches of (inputs, labels), both tensors",
            "Wrap a data set in torch.utils.data.DataLoader.",
        )  # fmt: skip
    inputs, labels = batch
    return inputs, labels
