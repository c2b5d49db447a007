"""Checks that a chain computes what the model computes, has its structure and its gradient, from cheap to costly.

- `outputs`: the output on the example.
- `structure`: every weight layer is in the chain, and no residual addition is hidden outside the blocks.
- `rows`: the output for an example does not depend on the other examples of its batch.
- `alone`: the output on one other example alone.
- `gradients`: the chain's gradient is the model's own. `torch.export` records the forward pass only, so that custom
  backward rules are lost.

Each check raises an `UnravelError` that names the node or the module that breaks it, and says what to do.
"""

from __future__ import annotations

from resnet_paths.unraveling.verification.alone import Alone, differentiable
from resnet_paths.unraveling.verification.claim import Claim, has_values, run_model
from resnet_paths.unraveling.verification.gradients import check_gradients, leaves_of
from resnet_paths.unraveling.verification.outputs import agree, check_output
from resnet_paths.unraveling.verification.rows import check_rows, check_size
from resnet_paths.unraveling.verification.structure import check_structure

__all__ = ["Claim", "agree", "check_output", "has_values", "run_model", "verify"]


def verify(claim: Claim, *, costly: bool) -> None:
    """Raise unless a chain is what it claims to be.

    Args:
        claim: The chain, and the model and graph that it was read from.
        costly: Whether to run the model and the chain on other inputs than the example as well, forward and backward.

    Raises:
        UnravelError: If a check fails. The message names the node or module that breaks it.
    """
    if not has_values([claim.expected, *claim.tensors]):
        check_structure(claim)
        return
    returned = check_output(claim) if claim.returned is None else claim.returned
    check_structure(claim)
    if costly:
        with differentiable(leaves_of(claim)):
            beside = check_rows(claim, returned)
            alone = Alone.of(claim, beside)
            check_size(claim, alone)
            check_gradients(claim, alone)
