"""From a trained residual network to the chain of its blocks: `unravel(model, example_inputs)`.

The model is called in one way, tensors in and one tensor out (`core.signature`), and exported to one flat graph
(`tracing`). Its forks and merges are found there (`merges`), and with them the blocks (`residual`, or `plain` where
there are no skips), for given values of inputs that all blocks read (`given`). What is between forks and merges becomes
the parts of blocks (`assembly`). What is not a chain is refused with the name of the node that prevents it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch._subclasses import FakeTensor

from resnet_paths._utils.arguments import require_list
from resnet_paths._utils.errors import ResnetPathsError, UnravelError
from resnet_paths._utils.threads import ONE_TRACE
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.input_sizes import CheckedInputs, InputSizes
from resnet_paths.core.inputs import num_examples
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.signature import Call, Inputs, Signature, arguments_of, chosen
from resnet_paths.core.source import Source
from resnet_paths.unraveling.adapters import keep_adapters_in_layers
from resnet_paths.unraveling.assembly import assemble
from resnet_paths.unraveling.by_hand import chain_of_named_blocks
from resnet_paths.unraveling.export import has_free_sizes
from resnet_paths.unraveling.given import find_parts
from resnet_paths.unraveling.hooks import untouched
from resnet_paths.unraveling.kept import Kept
from resnet_paths.unraveling.parts import Options
from resnet_paths.unraveling.preconditions import refuse_arguments, refuse_model, refuse_output
from resnet_paths.unraveling.tracing import takes_any_number_of_inputs, trace
from resnet_paths.unraveling.verification import Claim, agree, check_output, has_values, run_model
from resnet_paths.unraveling.verification import verify as verify_chain
from resnet_paths.unraveling.verification.alone import unlike
from resnet_paths.unraveling.verification.gradients import dtypes_of

__all__ = ["unravel"]


def unravel(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    output: str | int | None = None,
    max_depth: int | None = None,
    blocks: Sequence[str] | None = None,
    skip: str | Sequence[str] = (),
    adapters: bool = False,
    verify: bool = True,
    cache: str | Path | None = None,
) -> ResidualChain:
    """Read a model as a chain of residual blocks (Veit et al. 2016, section 3).

    Works for any model whose forward `torch.export` can trace and whose blocks are in series. Nothing is copied: the
    chain shares every parameter and buffer with the model, and works for any batch size. Image sizes and sequence
    lengths are free where the model's code allows this and the export detects it; the summary of the chain says which
    are, and others are refused. What forward hooks of the model return is part of the chain; whatever else they do,
    such as storing activations, happens only while the model is read. A model without any skips becomes a chain of its
    modules, with one path. An input that several blocks read, such as an attention mask, is context, which the stem
    hands to them beside the state.

    Args:
        model: The network, in eval mode. A `ResidualChain` is returned as it is.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments, with the batch in
            dimension 0 of every tensor, of the model's dtype. They are moved to the model's device, if it has only one.
            The chain is called in the same way, with tensors on that device.
        output: Which of the model's outputs the chain returns, by name or position; None for the only tensor, else
            ``logits``, ``last_hidden_state``, ``out``, or the first.
        max_depth: Maximum depth of chains inside branches, as in a U-Net, whose outermost block contains the network
            inside it: 0 takes every branch as a whole; None, the default, has no limit.
        blocks: Names of the model's residual modules, such as ``["layer1.0", "layer1.1"]``, for a model that cannot be
            exported as a whole. They run once each, on one tensor, one right after the other, and are exported one by
            one. What runs before and after them is run as it is; what runs after them may read the input only through
            them.
        skip: Names of modules that are skips, such as ``"layer1.0.proj"``, for additions of two values of which either
            could be the skip.
        adapters: Whether low-rank adapters (LoRA) are branches of their own. By default each is part of the layer that
            it adapts, so that the model has the blocks of the model without adapters.
        verify: Whether to run the model and the chain on other small batches as well, forward and backward: the chain
            must return what the model returns on one example alone, must treat each example of a batch independently,
            and must have the gradient that autograd computes for the model. This usually takes less time than the
            export. What needs no further run is always checked: the output on the example, the sizes for which the
            exported code holds, and that every weight layer and every residual addition is where it belongs.
        cache: A folder in which chains are kept as JSON, without the weights, so that the same model is exported once;
            None keeps none. A chain that is kept is used if nothing has changed: the Python code that the model leads
            to, its attributes, the shapes and dtypes of its tensors and of the example, the arguments, torch and this
            package. Otherwise, or where the file is damaged, which gives a warning, the model is exported again. Of
            installed packages the classes of the model's modules and the version are compared, not all of their code.
            The output on the example and on another size, and with `verify` all that it names, are checked in either
            case; that weight layers and residual additions are where they belong was checked before the chain was kept.

    Returns:
        A chain with ``chain(x) == model(x)``. Of a model on the device ``"meta"``, or made of fake tensors, the
        structure alone is checked, since there are no values.

    Raises:
        UnravelError: If the model cannot be exported (naming where), is not a chain (naming the node), or a check fails
            (naming the node or module that breaks it).
        ResnetPathsError: If the model is in training mode where that matters (naming the module), or does not take the
            example.

    Example:
        >>> import torch, torchvision
        >>> model = torchvision.models.resnet18(weights=None).eval()
        >>> chain = unravel(model, torch.zeros(2, 3, 64, 64))
        >>> len(chain), chain.num_paths, chain.blocks[2].name, chain.blocks[2].skip_kind
        (8, 256, 'layer2.0', 'projection')
    """
    if isinstance(model, ResidualChain):
        return model
    args, kwargs = _check_arguments(model, example_inputs)
    signature, tensors = Signature.of(args, kwargs)
    skips = [skip] if isinstance(skip, str) else require_list("skip", skip, "the name of a module, or a list of names")
    options = Options(max_depth, tuple(skips))
    kept = None
    if cache is not None and blocks is None and has_values(tensors):
        kept = Kept(cache, model, signature, tensors, [output, max_depth, options.skips, adapters])
    with ONE_TRACE, untouched(model) as hooks:
        returned = _run(model, signature, tensors)
        expected = chosen(returned, output)
        hooks.silence(partial(_runs_alike, model, signature, tensors, output, expected))
        refuse_output(expected, max((x.shape[0] for x in tensors if x.dim()), default=1), output)
        if blocks is not None:
            again = partial(unravel, adapters=adapters, verify=verify, cache=cache)
            claim = _named(model, _listed(blocks), signature, tensors, output, expected, again)
            verify_chain(claim, costly=verify)
        else:
            is_plain = signature.is_plain and returned is expected and not takes_any_number_of_inputs(model)
            found = None if kept is None else kept.read(model, None if is_plain else signature)
            held = found and Claim(found[0], model, signature, tensors, output, expected, dtypes=found[1])
            if held is not None and _holds(held, costly=verify):
                claim = held
            else:
                claim = _read(model, is_plain, signature, tensors, output, expected, options, adapters=adapters)
                verify_chain(claim, costly=verify)
                if kept is not None:
                    kept.write(claim.chain, model, dtypes_of(claim))
    claim.chain.source = Source(model, claim.chain)
    return claim.chain


def _read(
    model: nn.Module,
    is_plain: bool,
    signature: Signature,
    tensors: tuple[torch.Tensor, ...],
    output: str | int | None,
    expected: torch.Tensor,
    options: Options,
    *,
    adapters: bool,
) -> Claim:
    """The chain of a model that is exported as a whole, of as many sizes as possible."""
    called = model if is_plain else Call(model, signature, output)
    # Without values another size cannot be checked.
    free_sizes = has_free_sizes(tensors) and has_values([expected, *tensors])
    while True:
        try:
            traced = trace(called, tensors, free_sizes=free_sizes)
            sizes = traced.sizes
            assert sizes is not None  # as for every trace of a whole model
            free_sizes = bool(sizes.free)
            traced = traced if adapters else keep_adapters_in_layers(traced)
            traced, parts, context = find_parts(traced, options)
            chain = assemble(traced, parts, sizes, None if is_plain else signature, context)
            claim = Claim(chain, model, signature, tensors, output, expected, traced, parts)
            if has_values([expected, *tensors]):
                claim = replace(claim, returned=check_output(claim))
                _check_other_sizes(claim, sizes)
        except Exception:
            if not free_sizes:
                raise
            free_sizes = False  # whatever it was: the model may be a chain for one size
        else:
            return claim


def _holds(claim: Claim, *, costly: bool) -> bool:
    """Whether a chain that was kept is the model: it is checked as a new one is."""
    try:
        claim = replace(claim, returned=check_output(claim))
        assert isinstance(claim.chain.stem, CheckedInputs)  # as `assemble` makes it
        _check_other_sizes(claim, claim.chain.stem.sizes)
        verify_chain(claim, costly=costly)
    except Exception as error:
        message = f"cache: the chain that was kept is not the model's, which is exported again: {error}"
        warnings.warn(message, stacklevel=3)
        return False
    return True


def _named(
    model: nn.Module,
    names: list[str],
    signature: Signature,
    tensors: tuple[torch.Tensor, ...],
    output: str | int | None,
    expected: torch.Tensor,
    unravel_one: Callable[..., ResidualChain],
) -> Claim:
    """The chain of named blocks, checked on inputs in which each tensor of the example is replaced in turn."""
    chain = chain_of_named_blocks(model, names, signature, tensors, output, unravel_one)
    claim = Claim(chain, model, signature, tensors, output, expected)
    for others in _unlike_in_one(tensors):
        try:
            expected = chosen(_run(model, signature, others), output)
        except ResnetPathsError:
            continue  # what is made up may be nothing that the model takes
        verify_chain(replace(claim, tensors=tuple(others), expected=expected), costly=False)
    return claim


def _check_arguments(model: nn.Module, example_inputs: Inputs) -> tuple[tuple[object, ...], dict[str, object]]:
    if not isinstance(model, nn.Module):
        raise ResnetPathsError("model", type(model).__name__, "a torch.nn.Module")
    refuse_model(model)
    args, kwargs = arguments_of(example_inputs)
    refuse_arguments(args, kwargs)
    signature, tensors = Signature.of(args, kwargs)
    if not tensors:
        raise ResnetPathsError(
            "example_inputs",
            [type(x).__name__ for x in (*args, *kwargs.values())],
            "a tensor, a tuple of arguments or a mapping of keyword arguments with tensors among them",
            "Pass a batch such as torch.zeros(2, 3, 224, 224).",
        )
    if not num_examples(tensors):
        shapes = [list(tensor.shape) for tensor in tensors]
        raise ResnetPathsError("example_inputs", shapes, "at least one example, with the batch in dimension 0")
    require_eval_mode("model", model)
    own = list(itertools.chain(model.parameters(), model.buffers()))
    devices = {tensor.device for tensor in own}
    if len(devices) == 1:
        (device,) = devices
        tensors = tuple(tensor.to(device) for tensor in tensors)
    modes = [tensor.fake_mode for tensor in own if isinstance(tensor, FakeTensor)]
    if modes:
        tensors = tuple(modes[0].from_tensor(tensor) for tensor in tensors)
    return signature.arguments(tensors)


def _listed(blocks: Sequence[str]) -> list[str]:
    allowed = "a list of at least one module's name, as in ['layer1.0']"
    names = [name for name in require_list("blocks", blocks, allowed) if isinstance(name, str)]
    if not names or len(names) < len(blocks):
        raise ResnetPathsError("blocks", blocks, allowed)
    return names


def _run(model: nn.Module, signature: Signature, tensors: Sequence[torch.Tensor]) -> object:
    """What the model returns. It runs on copies of inputs and buffers: it may write over them, or count its calls."""
    try:
        with torch.no_grad():
            return run_model(model, signature, tensors)
    except Exception as error:
        shapes = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in tensors)
        raise ResnetPathsError(
            "example_inputs",
            shapes,
            f"inputs that {type(model).__name__} takes",
            f"It answered: {type(error).__name__}: {error}",
        ) from error


def _runs_alike(
    model: nn.Module,
    signature: Signature,
    tensors: Sequence[torch.Tensor],
    output: str | int | None,
    expected: torch.Tensor,
) -> bool:
    """Whether the model runs, and returns what it returned before; of tensors without values, in the same shape."""
    try:
        found = chosen(_run(model, signature, tensors), output)
    except ResnetPathsError:
        return False
    return agree(found, expected) if has_values([expected, *tensors]) else found.shape == expected.shape


def _check_other_sizes(claim: Claim, sizes: InputSizes) -> None:
    """Raise unless the chain returns what the model returns for inputs of another size, the first that it takes."""
    for others in sizes.others(claim.tensors):
        try:
            expected = chosen(_run(claim.model, claim.signature, others), claim.output)
        except ResnetPathsError:
            continue  # a position table may end, or an image be too small for its convolutions
        with torch.no_grad():
            if not agree(claim.run_chain(others), expected):
                shapes = [list(tensor.shape) for tensor in others]
                raise UnravelError("model", f"another output for {shapes}", "a model that unravels exactly")
        return


def _unlike_in_one(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """For each tensor of the example, the example with another in its place."""
    generator = torch.Generator().manual_seed(0)
    for index, tensor in enumerate(tensors):
        yield [*tensors[:index], unlike(tensor, generator), *tensors[index + 1 :]]
