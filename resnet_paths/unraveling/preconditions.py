"""What a model and its arguments must be before the model is exported; everything else is refused in one sentence."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.fx import Graph
from torch.utils import _pytree as pytree

from resnet_paths._utils.errors import UnravelError

__all__ = ["refuse_arguments", "refuse_model", "refuse_operations", "refuse_output"]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# What a model has in place of operators in order to be quantized later; they compute with ordinary tensors.
_STAND_INS = (torch.ao.nn.quantized.FloatFunctional, torch.ao.nn.quantized.FXFloatFunctional)
_PAST = ("past_key_values", "past_key_value", "cache_params")


def refuse_model(model: nn.Module) -> None:
    """Refuse wrappers of a model, compiled TorchScript, quantized modules, and tensors that autograd cannot use.

    Args:
        model: The model.

    Raises:
        UnravelError: If it is one of these; the message says what to pass instead.
    """
    kind = type(model).__name__
    if isinstance(model, _WRAPPERS):
        raise UnravelError("model", kind, "the model that it wraps", "Pass model.module.")
    for name, module in model.named_modules():
        shown = f"{type(module).__name__} {name!r}" if name else kind
        if isinstance(module, torch.jit.ScriptModule):
            raise UnravelError(
                "model", f"{shown}, compiled by TorchScript", "ordinary modules", "Pass the module that was compiled."
            )
        if ".quantized" in type(module).__module__ and not isinstance(module, _STAND_INS):
            raise UnravelError(
                "model",
                f"{shown}, which is quantized",
                "modules with floating-point weights",
                "Pass the model as it was before quantization.",
            )
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_inference():
            raise UnravelError(
                "model",
                f"{kind}, whose {name!r} was made in torch.inference_mode()",
                "parameters and buffers that autograd can use",
                "Make or load the model outside torch.inference_mode(); or pass copy.deepcopy(model), called outside "
                "it.",
            )


def refuse_arguments(args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Refuse states of earlier calls, such as the keys and values that a language model keeps.

    Args:
        args: Positional arguments of the example.
        kwargs: Keyword arguments of the example.

    Raises:
        UnravelError: If there are any.
    """
    named = [(name, value) for name, value in kwargs.items() if name in _PAST and value is not None]
    leaves = [("example_inputs", leaf) for leaf in pytree.tree_leaves((args, dict(kwargs)))]
    caches = [(name, leaf) for name, leaf in leaves if type(leaf).__name__.endswith("Cache")]
    for name, value in (*named, *caches):
        raise UnravelError(
            name,
            type(value).__name__,
            "whole sequences, without what was kept of an earlier call",
            "Leave past_key_values out, pass all tokens at once, and use_cache=False.",
        )


def refuse_operations(model_name: str, graph: Graph) -> None:
    """Refuse operations of an exported graph that hold graphs of their own and cannot be cut.

    Args:
        model_name: The class of the model.
        graph: What `torch.export` recorded.

    Raises:
        UnravelError: If there are any.
    """
    for node in graph.nodes:
        if "flex_attention" in str(node.target):
            raise UnravelError(
                "model",
                f"{model_name} with flex_attention",
                "attention by scaled_dot_product_attention or by products of matrices",
                'Models of transformers take attn_implementation="sdpa" or "eager".',
            )


def refuse_output(output: torch.Tensor, batch: int, requested: object) -> None:
    """Refuse outputs that are not one per example, such as a loss.

    Args:
        output: What the model returned.
        batch: Number of examples that it was given.
        requested: Which output was asked for.

    Raises:
        UnravelError: If the number of rows is no multiple of the number of examples.
    """
    if output.dim() and len(output) % batch == 0:
        return
    raise UnravelError(
        "output",
        requested,
        f"an output with a row for each of {batch} examples; this one has the shape {list(output.shape)}",
        'A loss is no output: pass output="logits", say, and give the loss to the gradient functions as loss=.',
    )
