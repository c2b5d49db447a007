"""Leading singular values and vectors of the branch Jacobians, and their alignment across depth (Li and Papyan 2023).

The Jacobian ``J_i`` of a branch at the state of an example is never formed: a block Krylov iteration (Golub and Kahan
1965; Musco and Musco 2015) multiplies it and its transpose by a few vectors at a time. With ``J_i = U_i S_i V_i^T``,
branches are aligned if the leading directions that one of them writes, ``U_i``, are those that another reads, ``V_j``.
The gradients of paths through aligned branches add up (`resnet_paths.gradient_by_path_length`, ``coherence``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from resnet_paths._utils.arguments import require_float, require_int, seeded_generator
from resnet_paths._utils.devices import wide
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.statistics import mean_over_examples
from resnet_paths.core.backward.forward import ForwardPass, prepared, split_to_fit
from resnet_paths.core.backward.linearize import Context, linearize, unchanged
from resnet_paths.core.backward.tangents import DIFFERENTIABLE_PULLBACKS, pushed
from resnet_paths.core.chain import ResidualChain, require_chain
from resnet_paths.core.inputs import InputsOrLoader, batches_with_bar
from resnet_paths.core.modes import require_eval_mode

__all__ = ["JacobianSVD", "jacobian_svd", "residual_alignment"]

_Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class JacobianSVD:
    """Leading singular triplets of the Jacobian of each branch, for each example; from `resnet_paths.jacobian_svd`.

    Attributes:
        blocks: Names of the blocks.
        block_index: Positions of the blocks.
        stages: Stages of the blocks.
        values: Singular values in decreasing order, [example, rank] for each block.
        left: Left singular vectors, in the space of the output of the branch, [example, number, rank] for each block.
        right: Right singular vectors, in the space of the input of the block.
        residuals: Norm of ``J^T u - s v`` over the largest singular value, [example, rank] for each block; of
            ``J v - s u`` where the output of the branch is smaller than the input. The other one is 0.
    """

    blocks: tuple[str, ...]
    block_index: tuple[int, ...]
    stages: tuple[int, ...]
    values: tuple[torch.Tensor, ...]
    left: tuple[torch.Tensor, ...]
    right: tuple[torch.Tensor, ...]
    residuals: tuple[torch.Tensor, ...]

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.values[0])

    def examples(self, order: Sequence[int]) -> JacobianSVD:
        """Some examples in another order, such as those of other images for `resnet_paths.residual_alignment`.

        Args:
            order: Positions of examples.

        Returns:
            Their singular triplets.
        """
        fields = ("values", "left", "right", "residuals")
        return replace(self, **{name: tuple(t[list(order)] for t in getattr(self, name)) for name in fields})

    def to_frame(self) -> pd.DataFrame:
        """Singular values by block.

        Returns:
            One row per block and singular value: ``block_index``, ``block``, ``stage``; ``order``, counted from 0;
            ``singular_value``, the mean over examples, with its standard error ``singular_value_se``;
            ``relative_singular_value``, over the largest of the block, likewise; ``residual``, the largest over
            examples.
        """
        rows = []
        for index, name, stage, values, residuals in zip(
            self.block_index, self.blocks, self.stages, self.values, self.residuals, strict=True
        ):
            each = wide(values).cpu().numpy().T
            with np.errstate(invalid="ignore"):
                relative = each / each[:1]
            (mean, error), (share, share_error) = mean_over_examples(each), mean_over_examples(relative)
            rows.append(
                pd.DataFrame({
                    "block_index": index,
                    "block": name,
                    "stage": stage,
                    "order": range(len(mean)),
                    "singular_value": mean,
                    "singular_value_se": error,
                    "relative_singular_value": share,
                    "relative_singular_value_se": share_error,
                    "residual": residuals.cpu().numpy().max(0),
                })
            )
        return pd.concat(rows, ignore_index=True)


@torch.inference_mode(False)
def jacobian_svd(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    *,
    rank: int = 10,
    tolerance: float = 1e-3,
    max_iterations: int = 30,
    generator: torch.Generator | None = None,
    memory_budget: int = 2**31,
    progress: bool = True,
) -> JacobianSVD:
    """Leading singular values and vectors of the Jacobian of each branch (Li and Papyan 2023).

    See `resnet_paths.gradients.jacobians`. The Jacobian is that of `pre` and the branch, without what follows the
    addition, at the input of the block, for each example. Blocks whose branch is deleted are left out. The context,
    such as an attention mask, is constant.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.gradient_by_path_length`. Labels are not used.
        rank: Number of singular values of each block; all of a smaller Jacobian.
        tolerance: The iteration stops when ``J^T u - s v`` (``J v - s u`` where the output of the branch is smaller
            than the input) has at most this norm, over the largest singular value, for all examples of a batch.
        max_iterations: Maximum number of iterations, each of `rank` products with the Jacobian and with its transpose.
        generator: Source of the first vectors; None for a new one, seeded with 0.
        memory_budget: Maximum number of bytes for vectors and activations; batches are split to fit.
        progress: Whether to show a progress bar over the batches of a loader.

    Returns:
        The singular triplets. Their errors are in ``residuals``: a singular value of ``J`` is within ``residual`` times
        the largest of each value.

    Raises:
        ResnetPathsError: If the chain is in training mode, has no branch, an argument is out of range, or an activation
            is not finite (the message states the first block).

    Example:
        >>> from resnet_paths.core.chain import Block
        >>> layer = torch.nn.Linear(3, 3)
        >>> layer.weight.data = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
        >>> chain = ResidualChain(torch.nn.Identity(), [Block(layer, torch.nn.Identity())], torch.nn.Identity()).eval()
        >>> [round(value, 4) for value in jacobian_svd(chain, torch.ones(1, 3), rank=2).values[0][0].tolist()]
        [3.0, 2.0]
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    rank, max_iterations = require_int("rank", rank, 1), require_int("max_iterations", max_iterations, 1)
    tolerance = require_float("tolerance", tolerance, "a finite number of at least 0", 0)
    memory_budget = require_int("memory_budget", memory_budget, 1)
    generator = seeded_generator("generator", generator)
    chosen = [index for index, block in enumerate(chain) if block.branches]
    if not chosen:
        raise ResnetPathsError("chain", "no branch", "a chain with a branch that is not deleted")
    found = []
    for batch, _ in batches_with_bar("singular values", inputs, None, progress):
        rows = rank * (max_iterations + 1)
        for part, _ in split_to_fit(chain, *prepared(chain, batch, None), memory_budget, rows):
            point = ForwardPass(chain, part)
            found.append([_of_branch(chain, point, i, rank, tolerance, max_iterations, generator) for i in chosen])
    values, left, right, residuals = (
        tuple(torch.cat([part[block][field] for part in found]) for block in range(len(chosen))) for field in range(4)
    )
    names, stages = [chain[i].name for i in chosen], [chain[i].stage for i in chosen]
    return JacobianSVD(tuple(names), tuple(chosen), tuple(stages), values, left, right, residuals)


def residual_alignment(
    svd: JacobianSVD, other: JacobianSVD | None = None, *, num_vectors: int | None = None
) -> pd.DataFrame:
    """Alignment of the leading singular vectors of the branch Jacobians of different blocks.

    The alignment of two sets of k orthonormal vectors is ``|A^T B|_F^2 / k``, the mean squared cosine of their
    principal angles: 1 if they span the same subspace, k / d for random directions of d dimensions.

    Args:
        svd: From `resnet_paths.jacobian_svd`.
        other: Singular vectors of the same blocks, whose right ones are compared with the left ones of `svd`, such as
            ``svd.examples(order)`` for those of other images; `svd` itself if None.
        num_vectors: Number k of leading vectors; None for all.

    Returns:
        One row per ordered pair of blocks whose spaces have one size: ``block_index``, ``block`` and ``other_index``,
        ``other``; ``left_right``, the alignment of the left singular vectors of the block with the right ones of the
        other, ``left_left`` and ``right_right`` likewise; ``leading_cosine``, the absolute cosine of the first left
        singular vector of the block and the first right one of the other; means over examples, ``..._se`` their
        standard errors; ``random_alignment``, k / d. NaN where spaces have different sizes.

    Raises:
        ResnetPathsError: If an argument is of another type, the two are of different blocks or numbers of examples, or
            `num_vectors` is out of range.
    """
    other = svd if other is None else other
    for argument, value in (("svd", svd), ("other", other)):
        if not isinstance(value, JacobianSVD):
            raise ResnetPathsError(argument, type(value).__name__, "what resnet_paths.jacobian_svd returns")
    if (svd.block_index, svd.num_examples) != (other.block_index, other.num_examples):
        found = f"{len(other.blocks)} blocks, {other.num_examples} examples"
        raise ResnetPathsError("other", found, f"the {len(svd.blocks)} blocks of svd and {svd.num_examples} examples")
    most = min(residuals.shape[1] for residuals in svd.residuals)
    k = most if num_vectors is None else require_int("num_vectors", num_vectors, 1, most)
    rows = []
    for one, two in itertools.product(range(len(svd.blocks)), repeat=2):
        pairs = {
            "left_right": (svd.left[one], other.right[two]),
            "left_left": (svd.left[one], other.left[two]),
            "right_right": (svd.right[one], other.right[two]),
        }
        pairs = {name: pair for name, pair in pairs.items() if pair[0].shape[1] == pair[1].shape[1]}
        if not pairs:
            continue
        products = {name: wide(a[..., :k].mT @ b[..., :k]) for name, (a, b) in pairs.items()}
        measured = {name: product.square().sum((1, 2)) / k for name, product in products.items()}
        if "left_right" in products:
            measured["leading_cosine"] = products["left_right"][:, 0, 0].abs()
        row = {
            "block_index": svd.block_index[one],
            "block": svd.blocks[one],
            "other_index": svd.block_index[two],
            "other": svd.blocks[two],
        }
        for name in ("left_right", "left_left", "right_right", "leading_cosine"):
            values = measured[name].cpu().numpy() if name in measured else np.full(svd.num_examples, np.nan)
            row[name], row[f"{name}_se"] = (float(number) for number in mean_over_examples(values))
        rows.append({**row, "random_alignment": k / next(iter(pairs.values()))[0].shape[1]})
    frame = pd.DataFrame(rows)
    frame.attrs |= {"num_vectors": k, "num_examples": svd.num_examples}
    return frame


@torch.no_grad()
def _of_branch(
    chain: ResidualChain,
    point: ForwardPass,
    index: int,
    rank: int,
    tolerance: float,
    max_iterations: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, ...]:
    """Singular values, left and right vectors and residuals of a branch, with an example in each row."""
    block, state, context = chain[index], point.states[index], Context(point.context.values)
    branch = block.branch
    assert branch is not None  # it was chosen for that
    with DIFFERENTIABLE_PULLBACKS:
        shared, pre = linearize(block.pre, state, context)
        output, pullback = linearize(branch, shared, context)

    def push(vectors: torch.Tensor) -> torch.Tensor:
        tangents = vectors.movedim(2, 0).reshape(-1, *state.shape)
        tangents = pushed(pre, shared, tangents)
        return pushed(pullback, output, tangents).flatten(2).movedim(0, 2)

    def pull(vectors: torch.Tensor) -> torch.Tensor:
        cotangents = pullback(vectors.movedim(2, 0).reshape(-1, *output.shape))
        cotangents = cotangents if pre is unchanged else pre(cotangents)
        return cotangents.flatten(2).movedim(0, 2)

    num_in, num_out = state[0].numel(), output[0].numel()
    least = min(num_in, num_out)
    rank = min(rank, least)
    start = torch.randn(least, rank, generator=generator, dtype=torch.float64, device=generator.device).to(state)
    start = start.expand(len(state), least, rank)
    if num_out >= num_in:
        return _leading_triplets(push, pull, start, num_out, rank, tolerance, max_iterations)
    # The iteration starts in the smaller space: where it has filled that, nothing is left out.
    values, right, left, residuals = _leading_triplets(pull, push, start, num_in, rank, tolerance, max_iterations)
    return values, left, right, residuals


def _leading_triplets(
    push: _Product, pull: _Product, start: torch.Tensor, num_out: int, rank: int, tolerance: float, max_iterations: int
) -> tuple[torch.Tensor, ...]:
    """Singular values, left and right vectors and residuals, by block Golub-Kahan iteration."""
    # J right = left R with orthonormal bases and a small triangular R, whose singular values tend to those of J.
    most = start.shape[1]  # J has at least as many rows
    nothing = start.new_empty(len(start), num_out, 0)
    right, left, back = start[..., :0], nothing, start[..., :0]
    small, new = start.new_zeros(len(start), 0, 0), torch.linalg.qr(start)[0]
    for iteration in range(1, max_iterations + 1):
        right = torch.cat([right, new], 2)
        written, above, corner = _orthonormalised(push(new), left)
        size, added = small.shape[2], new.shape[2]
        small = torch.cat([small, small.new_zeros(len(start), added, size)], 1)
        small = torch.cat([small, torch.cat([above, corner], 1)], 2)
        left = torch.cat([left, written], 2)
        returned = pull(written)
        back = torch.cat([back, returned], 2)
        u, values, v = torch.linalg.svd(small, full_matrices=False)
        u, values, v = u[..., :rank], values[:, :rank], v.mT[..., :rank]
        # J v = s u holds by construction, J^T u = s v in the limit.
        apart = (back @ u - (right @ v) * values[:, None]).norm(dim=1)
        residuals = apart / values[:, :1].clamp(min=torch.finfo(values.dtype).tiny)
        room = most - right.shape[2]
        if iteration == max_iterations or not room or bool((residuals <= tolerance).all()):
            break
        new = _orthonormalised(returned[..., :room], right)[0]
    return values, left @ u, right @ v, residuals


def _orthonormalised(vectors: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``vectors = basis A + new R`` with `new` orthonormal and orthogonal to `basis`: new, A and R."""
    first = basis.mT @ vectors
    new, upper = torch.linalg.qr(vectors - basis @ first)
    again = basis.mT @ new  # rounding, which the second pass removes
    new, correction = torch.linalg.qr(new - basis @ again)
    return new, first + again @ upper, correction @ upper
