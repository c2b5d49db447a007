"""Keys under which a store finds the results of a lesioned network again.

A key is the hash of the steps of the network. Of an exported part all operations and weights are hashed. What a module
that was not exported computes is not known from its class and weights: there the key also holds what the network
returns for a probe, so that results of other code, or of another global setting, are not taken for its own. Where a
measure reads the outputs of the intact network, the key of that belongs to each key.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from resnet_paths._utils.fingerprint import fingerprint, is_determined
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.inputs import Inputs, each_tensor, num_examples
from resnet_paths.lesions.runner import Runner
from resnet_paths.lesions.trie import chain_key

__all__ = ["completed_keys", "computes_what_it_says", "network_key", "probe_of"]

_PROBE_EXAMPLES = 2
# Where modules are defined that compute nothing but what their parts and plain attributes say. The wrappers around a
# user's model are elsewhere: they do not hold it as a submodule.
_OURS = ("resnet_paths.core.chain", "resnet_paths.core.parts", "resnet_paths.core.input_sizes")


def network_key(chain: ResidualChain, known: dict[int, bytes]) -> str:
    """The hash of a network's steps, equal for networks that are edited in different ways to the same one.

    Args:
        chain: The network.
        known: As for `resnet_paths._utils.fingerprint.fingerprint`.

    Returns:
        Hexadecimal digits.
    """
    return fingerprint(chain_key(chain, lambda part: fingerprint(part, known=known)))


def computes_what_it_says(chain: ResidualChain) -> bool:
    """Whether the key of a network says all that it computes: whether all of it was exported."""
    return is_determined(chain, _is_ours)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__ in _OURS


def probe_of(inputs: Inputs) -> Inputs:
    """Fixed inputs of the form of a batch.

    Args:
        inputs: A batch.

    Returns:
        Two examples: normal random numbers in place of floating-point numbers; all else, such as tokens, is taken from
        the batch, since not every value may be allowed.
    """
    batch = num_examples(inputs)
    generator = torch.Generator().manual_seed(0)

    def probe(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() and len(tensor) == batch:
            tensor = tensor[:_PROBE_EXAMPLES]
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    return each_tensor(probe, inputs)


def completed_keys(keys: Sequence[str], runner: Runner, undetermined: Sequence[int], inputs: Inputs) -> list[str]:
    """Keys of networks, completed by what else the results of a study depend on.

    Args:
        keys: From `network_key`, one per chain of the runner, the intact one first.
        runner: Runs the chains.
        undetermined: Indices of the chains whose key does not say all that they compute.
        inputs: A batch.

    Returns:
        The keys, with what undetermined networks return for a probe, and with the key of the intact network where a
        measure reads its outputs.
    """
    outputs = runner.output_keys(probe_of(inputs), undetermined) if undetermined else {}
    completed = [fingerprint(key, outputs[i]) if i in outputs else key for i, key in enumerate(keys)]
    if any(measure.reads_intact for measure in runner.measures):
        completed = [fingerprint(key, completed[0]) for key in completed]
    return completed
