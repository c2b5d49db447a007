"""Greedy deletion of blocks, each step measured by a lesion study."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from resnet_paths._utils.arguments import require_int
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.inputs import require_loader
from resnet_paths.lesions import lesion_study
from resnet_paths.lesions.lesion import Lesion
from resnet_paths.lesions.measures import Measure, measures_of
from resnet_paths.lesions.plans import single_deletions
from resnet_paths.lesions.range_plans import ranked_deletions

__all__ = ["greedy_deletions"]


def greedy_deletions(
    chain: ResidualChain,
    loader: Iterable[object],
    num_blocks: int,
    measure: str | Measure | Callable[..., object] = "cross_entropy",
    *,
    maximize: bool = False,
    shift_labels: bool = False,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> list[Lesion]:
    """Greedy deletion: each step deletes the block without which the measure is best.

    Each step is one `resnet_paths.lesion_study` over the blocks that are left, whose common blocks are computed once.
    A block without which the measure is NaN is not chosen.

    Args:
        chain: The intact chain. Of a transformer take ``group_blocks(chain)`` to delete whole layers.
        loader: Batches as of `resnet_paths.lesion_study`; read once per step. Choose other examples than those on which
            the lesions are measured afterwards.
        num_blocks: How many blocks to delete, at least 1 and at most as many as can be deleted.
        measure: What is compared, as in `resnet_paths.lesion_study`.
        maximize: Whether the largest value is best, as of ``"agreement"``; the smallest otherwise.
        shift_labels: As in `resnet_paths.lesion_study`.
        device: As in `resnet_paths.lesion_study`.
        progress: Whether to show a bar over batches in each step.

    Returns:
        One lesion per step: its block and those of all steps before are deleted. The block that a step adds is the
        one that the lesion before does not have.

    Raises:
        ResnetPathsError: If `num_blocks` is not such a number, the loader can be read only once, or the measure is NaN
            whatever is deleted.
    """
    left = [place for lesion in single_deletions(chain) for place in lesion.blocks or ()]
    num_blocks = require_int("num_blocks", num_blocks, 1, len(left))
    require_loader(loader)
    if iter(loader) is loader:
        raise ResnetPathsError(
            "loader", type(loader).__name__, "batches that can be read several times", "Pass list(loader)."
        )
    (measured,) = measures_of([measure])
    ranking: list[int] = []
    for _ in range(num_blocks):
        lesions = [Lesion("delete", tuple(sorted((*ranking, place)))) for place in left]
        frame = lesion_study(
            chain,
            loader,
            lesions,
            measures=(measured,),
            shift_labels=shift_labels,
            device=device,
            progress=progress,
        )
        values = frame[measured.name]
        if values.isna().all():
            deleted = ", ".join(chain[place].name or str(place) for place in ranking) or "none yet"
            raise ResnetPathsError(
                "measure",
                f"{measured.name} = nan for each next block (deleted: {deleted})",
                "a measure that is a number for at least one of them",
                "Such as 'error_rate', where logits are not finite; or pass fewer num_blocks.",
            )
        ranking.append(left.pop(int(values.argmax() if maximize else values.argmin())))
    return ranked_deletions(chain, ranking)
