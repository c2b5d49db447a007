"""Direct effects: the contribution of each block's branch to the output along the skips of the later blocks.

If all skips are identities and nothing follows the additions, the last state is the sum of the outputs of the stem and
of all branches, ``x_n = x_0 + sum_l a_l``. At the activations of an example the output is an affine map of it, and thus
a sum over blocks, known for transformers as direct logit attribution (Elhage et al. 2021):

    s = <g, x_0> + sum_l <g, a_l> + c    with  c = s - <g, x_n>

In general ``g`` is pulled back through the skips of the later blocks, and through what precedes and follows their
additions; the constants of these are added to ``c``. The direct effect of a block is the sum of the contributions of
all paths whose last branch is that of the block (`resnet_paths.prediction_by_path_length`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from resnet_paths._utils.arguments import require_generator, require_int
from resnet_paths.core.backward.forward import ForwardPass, prepared, split_to_fit
from resnet_paths.core.backward.linearize import Context, Pullback, broadcast, inner_products, unchanged
from resnet_paths.core.backward.recursion import Linearizer
from resnet_paths.core.chain import ResidualChain, require_chain
from resnet_paths.core.inputs import InputsOrLoader, batches_with_bar
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.parts import call_part
from resnet_paths.predictions.detached import linearizer_of
from resnet_paths.predictions.outputs import Output, name_of, output_at, output_function
from resnet_paths.predictions.shares import checked_residual, share_columns
from resnet_paths.predictions.sources import at_head

__all__ = ["SkipPath", "direct_effects"]


@torch.inference_mode(False)
def direct_effects(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: torch.Tensor | None = None,
    *,
    output: Output = "margin",
    linearization: str = "detached",
    generator: torch.Generator | None = None,
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """The contribution of each block's branch to the output along the skips of the later blocks.

    See `resnet_paths.predictions.direct`. The direct effects of all blocks, the stem and the constants sum to the
    output of each example. Earlier blocks have no direct effect through a block without a skip. The context, such as an
    attention mask, is constant.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.prediction_by_path_length`.
        targets: Likewise.
        output: Likewise.
        linearization: ``"detached"``: denominators of norms and gates of the head are held, the usual direct logit
            attribution; ``"tangent"``: the Jacobian, which assigns the output of a head with LayerNorm to the
            constants, since LayerNorm does not depend on the scale of the state. They are equal where the head is
            piecewise linear.
        generator: Source of the random numbers of the bootstrap; None for a new one, seeded with 0.
        memory_budget: Maximum number of bytes for activations; batches are split to fit.
        progress: Whether to show a progress bar over the batches of a loader.

    Returns:
        One row per source: ``source``, ``"stem"``, the name of a block or ``"constants"`` (of the head, and of what the
        skips lead through); ``block_index`` (<NA> for stem and constants); ``direct_effect``, the mean over examples,
        with its standard error ``direct_effect_se``; ``share``, the sum of direct effects over the sum of outputs, with
        a 95 % interval over examples ``share_low`` to ``share_high`` (bootstrap percentiles; too narrow with fewer than
        about 30 examples); and ``mean_absolute_direct_effect``. ``attrs`` contain ``residual``, the largest difference
        between the sum of an example's direct effects and its output, ``mean_output``, ``output``, ``linearization``,
        ``tangent_operations`` and ``num_examples``.

    Raises:
        ResnetPathsError: As `resnet_paths.prediction_by_path_length`.

    Example:
        >>> from resnet_paths.core.chain import Block
        >>> layers = [torch.nn.Linear(3, 3) for _ in range(2)]
        >>> for layer in layers:
        ...     _ = torch.nn.init.constant_(layer.weight, 0.1), torch.nn.init.constant_(layer.bias, 1.0)
        >>> blocks = [Block(layer, torch.nn.Identity(), name=f"block{i}") for i, layer in enumerate(layers)]
        >>> chain = ResidualChain(torch.nn.Identity(), blocks, torch.nn.Identity())
        >>> frame = direct_effects(chain, torch.ones(2, 3), output=lambda y: y.sum(1))
        >>> frame.direct_effect.round(4).tolist()  # 3 inputs, 3 * 1.3 of block0, 3 * (0.1 * 6.9 + 1) of block1
        [3.0, 3.9, 5.07, 0.0]
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    linearizer, tangents = linearizer_of(linearization)
    output_function(output, None)  # validated before the first pass
    memory_budget = require_int("memory_budget", memory_budget, 1)
    if generator is not None:
        require_generator("generator", generator)
    found = []
    for batch, labels in batches_with_bar("direct effects", inputs, targets, progress):
        # States, what branches add and cotangents of the sums are kept for all blocks.
        for part, some in split_to_fit(chain, *prepared(chain, batch, labels), memory_budget, len(chain) + 1):
            path = SkipPath.of(chain, ForwardPass(chain, part), output, some, linearizer)
            found.append(torch.stack([path.outputs, path.stem, *path.effects, path.constants]).cpu().numpy())
    outputs, *values = np.concatenate(found, 1)
    of_rows = np.stack(values)
    frame = pd.DataFrame({
        "source": ["stem", *(block.name for block in chain), "constants"],
        "block_index": pd.array([None, *range(len(chain)), None], dtype="Int64"),
        **share_columns(of_rows, outputs, generator, "direct_effect"),
    })
    frame.attrs |= {
        "output": name_of(output),
        "linearization": linearization,
        "tangent_operations": sorted(tangents),
        "num_examples": len(outputs),
        "mean_output": float(outputs.mean()),
        "residual": checked_residual(chain, outputs, of_rows),
    }
    return frame


@dataclass(frozen=True)
class SkipPath:
    """The output of some examples as an affine map of what each branch adds, along the skips of the later blocks.

    Attributes:
        output_of: From what the chain returns to one number per example, its classes held.
        outputs: The output of each example, [batch], float64 like all that follow.
        stem: Contribution of the output of the stem, [batch].
        effects: Contribution of each branch, [batch]; zeros where a branch is deleted.
        constants: Contribution of all constants, [batch].
        head_constant: Contribution of the constant of the head, [batch].
        added: What each branch adds; None where it is deleted.
        weights: Cotangent of the output at each addition.
        weight: Cotangent of the output at the last state.
    """

    output_of: Callable[[torch.Tensor], torch.Tensor]
    outputs: torch.Tensor
    stem: torch.Tensor
    effects: list[torch.Tensor]
    constants: torch.Tensor
    head_constant: torch.Tensor
    added: list[torch.Tensor | None]
    weights: list[torch.Tensor]
    weight: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, chain: ResidualChain, point: ForwardPass, output: Output, targets: object, linearizer: Linearizer
    ) -> SkipPath:
        """The skip path of a forward pass.

        Args:
            chain: The chain.
            point: Its forward pass.
            output: As for `direct_effects`.
            targets: Likewise, of these examples.
            linearizer: What linearizes a part.

        Returns:
            The path.
        """
        context = Context(point.context.values)
        last = point.states[-1]
        output_of = output_at(output, targets, call_part(chain.head, last.clone(), context.values))
        outputs, head_constant, above, _ = at_head(chain, last, context, output_of, linearizer)
        weight, constants = above, head_constant
        effects, added, weights = [], [], []
        for index in reversed(range(len(chain))):
            block, state = chain[index], point.states[index]
            shared, pre = linearizer(block.pre, state, context)
            skipped, skip = (None, None) if block.skip is None else linearizer(block.skip, shared, context)
            branch = None if block.branch is None else call_part(block.branch, shared.clone(), context.values)
            total = branch if skipped is None else skipped if branch is None else skipped + branch
            assert total is not None  # held by Block
            result, post = linearizer(block.post, total, context)
            weight, constant = _pulled(post, weight, result, total)
            constants = constants + constant
            effects.append(torch.zeros_like(outputs) if branch is None else inner_products(weight[None], branch)[0])
            added.append(None if branch is None else branch.expand(total.shape))
            weights.append(weight)
            if skip is None or skipped is None:
                weight = torch.zeros_like(state)
                continue
            weight, constant = _pulled(broadcast(skip, skipped, total), weight, skipped, shared)
            constants = constants + constant
            weight, constant = _pulled(pre, weight, shared, state)
            constants = constants + constant
        stem = inner_products(weight[None], point.states[0])[0]
        return cls(output_of, outputs, stem, effects[::-1], constants, head_constant, added[::-1], weights[::-1], above)


def _pulled(
    pullback: Pullback, weight: torch.Tensor, output: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """The cotangent of the input of a part, and the contribution of its constant."""
    if pullback is unchanged:
        return weight, 0.0
    pulled = pullback(weight[None])
    return pulled[0], (inner_products(weight[None], output) - inner_products(pulled, state))[0]
