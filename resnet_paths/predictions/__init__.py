"""The prediction by path length: the output itself, split exactly over all 2^n paths.

The forward pass is not a sum over paths, but at its own activations every part is an affine map, so that the output is
a sum over sources, the output of the stem and the constants of all parts, and over the paths from each source to the
output. A constant that a branch makes has length 1 already, one made elsewhere length 0. The backward pass that splits
the gradient (`resnet_paths.gradients`) gives every term.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from resnet_paths._utils.arguments import require_generator, require_int
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.backward.linearize import linearize
from resnet_paths.core.chain import ResidualChain, require_chain
from resnet_paths.core.inputs import InputsOrLoader
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.paths import lengths_up_to, path_polynomial
from resnet_paths.predictions.detached import linearizer_of
from resnet_paths.predictions.outputs import Output, name_of, output_function
from resnet_paths.predictions.shares import checked_residual, share_columns
from resnet_paths.predictions.sources import Source, all_contributions, sources_of

__all__ = ["linearize", "prediction_by_path_length"]


@torch.inference_mode(False)
def prediction_by_path_length(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: torch.Tensor | None = None,
    *,
    output: Output = "margin",
    linearization: str = "tangent",
    by_source: bool | str = False,
    max_length: int | None = None,
    generator: torch.Generator | None = None,
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """The output, split by the number of residual branches that it passes through.

    The module docstring of `resnet_paths.predictions` defines the terms. Contributions may be negative; over all
    lengths, and sources, they sum to the output of each example.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.gradient_by_path_length`.
        targets: Class indices [batch]; None for the predicted class, and with a loader, whose labels are the targets.
        output: The number that is split: ``"margin"``, the logit of the class less the largest other logit;
            ``"logit"``; ``"log_probability"``; or a function from outputs to one number per example.
        linearization: ``"tangent"``: the Jacobian at the activations. For networks of convolutions, BatchNorm in eval
            mode, ReLU and max pooling the constants are then the biases alone. ``"detached"``: gates, attention weights
            and denominators of norms are held at their values, as is usual for transformers; the rules are in
            `resnet_paths.predictions.detached`. Both are exact, and equal where the network is piecewise linear.
        by_source: Whether each source has rows of its own: the stem, every block and the head; ``"parts"`` for pre,
            skip, branch and post of a block apart. A chain inside a branch belongs to its block.
        max_length: The longest paths of interest: longer ones are not computed. None for all.
        generator: Source of the random numbers of the bootstrap; None for a new one, seeded with 0.
        memory_budget: Bytes that stacks of cotangents and kept activations may take; batches are split to fit.
        progress: Whether to show a bar over the batches of a loader.

    Returns:
        One row per path length, or per source and length: with `by_source`, ``source`` (``"stem"``, the name of a
        block, ``"head"``), ``block_index`` (<NA> for stem and head) and, for ``"parts"``, ``part``; ``path_length``,
        counted from the source; ``num_paths``, an exact int, from the input to the output, or from the input of the
        block that is the source; ``contribution``, the mean over examples, with its standard error
        ``contribution_se``; ``share``, the sum of contributions over the sum of outputs, with a 95 % interval over
        examples, ``share_low`` and ``share_high`` (bootstrap percentiles; NaN for a single example and where the
        sign of the sum of outputs is uncertain); and ``mean_absolute_contribution``. With fewer than about 30 examples
        the bootstrap interval is too narrow. ``attrs`` hold ``residual``, the largest difference between the sum of an
        example's contributions and its output (None with `max_length`), ``mean_output``, ``output``,
        ``linearization``, ``tangent_operations`` (for ``"detached"``, the operations that have no rule and keep their
        tangent), ``num_examples``, ``omitted_share``, ``longest_path`` and ``total_num_paths``.

    Raises:
        ResnetPathsError: If the chain is in training mode, an option is unknown, the output is not one finite number
            per example, an activation is not finite (naming the first block), or the residual is larger than rounding
            explains.

    Example:
        >>> from resnet_paths.core.chain import Block
        >>> layers = [torch.nn.Linear(3, 3) for _ in range(2)]
        >>> for layer in layers:
        ...     _ = torch.nn.init.constant_(layer.weight, 0.1), torch.nn.init.constant_(layer.bias, 1.0)
        >>> blocks = [Block(layer, torch.nn.Identity(), name=f"block{i}") for i, layer in enumerate(layers)]
        >>> chain = ResidualChain(torch.nn.Identity(), blocks, torch.nn.Identity())
        >>> frame = prediction_by_path_length(chain, torch.ones(2, 3), output=lambda y: y.sum(1))
        >>> frame.contribution.round(4).tolist()  # 3 of the input, 2 * 0.9 + 2 * 3 of length 1, 0.27 + 0.9 of length 2
        [3.0, 7.8, 1.17]
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    linearizer, tangents = linearizer_of(linearization)
    output_function(output, None)  # validated before the first pass
    memory_budget = require_int("memory_budget", memory_budget, 1)
    if generator is not None:
        require_generator("generator", generator)
    if not isinstance(by_source, bool | str) or by_source not in (True, False, "parts"):
        raise ResnetPathsError("by_source", by_source, "False, True or 'parts'")
    counts = path_polynomial(chain)
    num_lengths = len(counts)
    if max_length is not None:
        num_lengths = lengths_up_to([1] * len(counts), max_length)[-1] + 1
    sources = sources_of(chain, by_source)
    outputs, values = all_contributions(
        chain, inputs, targets, output, sources, num_lengths, linearizer, memory_budget, progress
    )
    residual = None if num_lengths < len(counts) else checked_residual(chain, outputs, values.reshape(-1, len(outputs)))
    if by_source:
        rows = [(source, k) for source in sources for k in range(num_lengths)]
        frame = _source_columns(chain, rows, by_source == "parts")
        of_rows = values.reshape(-1, len(outputs))
        # A plain branch with a chain inside has constants at lengths that no path from its input has.
        possible = np.array([bool(count) for count in frame["num_paths"]]) | of_rows.any(1)
        frame, of_rows = frame[possible].reset_index(drop=True), of_rows[possible]
    else:
        frame = pd.DataFrame({
            "path_length": range(num_lengths),
            "num_paths": pd.Series(counts[:num_lengths], dtype=object),
        })
        of_rows = values.sum(0)
    for name, column in share_columns(of_rows, outputs, generator).items():
        frame[name] = column
    frame.attrs |= {
        "output": name_of(output),
        "linearization": linearization,
        "tangent_operations": sorted(tangents),
        "num_examples": len(outputs),
        "mean_output": float(outputs.mean()),
        "residual": residual,
        "omitted_share": float(1 - values.sum() / outputs.sum()) if outputs.sum() else float("nan"),
        "longest_path": len(counts) - 1,
        "total_num_paths": sum(counts),
    }
    return frame


def _source_columns(chain: ResidualChain, rows: Sequence[tuple[Source, int]], parts: bool) -> pd.DataFrame:
    blocks = list(chain)
    polynomials = [path_polynomial(chain.with_blocks(blocks[index:])) for index in range(len(blocks) + 1)]

    def count(source: Source, length: int) -> int:
        polynomial = polynomials[source.num_blocks_before(len(blocks))]
        return polynomial[length] if length < len(polynomial) else 0

    columns: dict[str, object] = {
        "source": [source.name for source, _ in rows],
        "block_index": pd.array([source.block_index for source, _ in rows], dtype="Int64"),
    }
    if parts:
        columns["part"] = [source.part for source, _ in rows]
    columns["path_length"] = [length for _, length in rows]
    columns["num_paths"] = pd.Series([count(source, length) for source, length in rows], dtype=object)
    return pd.DataFrame(columns)
