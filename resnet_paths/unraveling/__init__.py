"""Any trained residual network as a chain of its blocks: `unravel(model, example_inputs)`.

The model is called in one way, tensors in and one tensor out (`core.signature`), and exported to one flat graph
(`tracing`). Its forks and merges are found there (`merges`), and with them the blocks (`residual`, or `plain` where
there are no skips), for given values of inputs that all blocks read (`given`). What stands between forks and merges
becomes the parts of blocks (`assembly`). What is not a chain is refused with the name of the node that breaks it: never
guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Interpreter, Node

from resnet_paths._utils.errors import ResnetPathsError, UnravelError
from resnet_paths.core.chain import ResidualChain, refuse_training_mode
from resnet_paths.core.input_sizes import InputSizes
from resnet_paths.core.parts import call_part
from resnet_paths.core.signature import Call, Signature, arguments_of, chosen
from resnet_paths.unraveling.assembly import assemble
from resnet_paths.unraveling.by_hand import chain_of_named_blocks, unlike
from resnet_paths.unraveling.export import has_free_sizes
from resnet_paths.unraveling.given import find_parts
from resnet_paths.unraveling.parts import Options, Part
from resnet_paths.unraveling.tracing import Trace, name_of, trace

__all__ = ["unravel"]


def unravel(
    model: nn.Module,
    example_inputs: Any,
    *,
    output: str | int | None = None,
    max_depth: int | None = None,
    blocks: Sequence[str] | None = None,
    skip: str | Sequence[str] = (),
) -> ResidualChain:
    """The chain of residual blocks that a model is (Veit et al. 2016, section 3).

    Works for any model whose forward `torch.export` can trace and whose blocks stand in series. Nothing is copied: the
    chain shares every parameter and buffer with the model, and works for any batch size. Image sizes and sequence
    lengths are free where the model's code leaves them free and the export can tell in time; the summary of the chain
    says which are, and others are refused. What forward hooks of the model return is part of
    the chain; whatever else they do, such as storing activations, happens only while the model is read. A model without
    any skips becomes a chain of its modules, with one path. An input that every block reads, such as an attention mask,
    is carried along in the state, which is a tuple then.

    Args:
        model: The network, in eval mode. A `ResidualChain` is returned as it is.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments, with the batch in
            dimension 0 of every tensor, of the model's dtype. They are taken to the model's device, if it lies on one
            only. The chain is called in the same way, with tensors on that device.
        output: Which of the model's outputs the chain returns, by name or position; None for the only tensor, else
            ``logits``, ``last_hidden_state``, ``out``, or the first.
        max_depth: How many chains may stand inside one another, as in a U-Net, whose outermost block holds the network
            inside it: 0 takes every branch as a whole; None, the default, looks into all.
        blocks: Names of the model's residual modules, such as ``["layer1.0", "layer1.1"]``, for a model that cannot be
            exported as a whole. They run once each, on one tensor, one right after the other, and are exported one by
            one. What runs before and after them is run as it is; what runs after them may read the input in no other
            way than through them.

        skip: Names of modules that are skips, such as ``"layer1.0.proj"``, for additions of values that carry as much:
            of these neither is known to be the skip otherwise.

    Returns:
        A chain with ``chain(x) == model(x)``, which is checked on `example_inputs`; a chain of named `blocks` also on
        inputs made from these, each flipped along its last dimension in turn, with noise on floating numbers.

    Raises:
        ResnetPathsError: If the model is in training mode where that matters (naming the module), does not take the
            example, cannot be exported (naming where), is not a chain (naming the node), or the chain does not return
            what the model returns (naming the first block that differs).

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
    returned = _run(model, signature, tensors)
    expected = chosen(returned, output)
    if blocks is not None:
        names = _listed(blocks)
        chain = chain_of_named_blocks(model, names, signature, tensors, output, unravel)
        _check_named(chain, names, signature, tensors, expected)
        for others in _unlike_in_one(tensors):
            try:
                expected = chosen(_run(model, signature, others), output)
            except ResnetPathsError:
                continue  # what is made up may be nothing that the model takes
            _check_named(chain, names, signature, others, expected)
        return chain
    is_plain = signature.is_plain and returned is expected
    called = model if is_plain else Call(model, signature, output)
    options = Options(max_depth, (skip,) if isinstance(skip, str) else tuple(skip))
    free_sizes = has_free_sizes(tensors)
    while True:
        try:
            traced = trace(called, tensors, free_sizes=free_sizes)
            sizes = traced.sizes
            assert sizes is not None  # as for every trace of a whole model
            free_sizes = bool(sizes.free)
            traced, parts, context = find_parts(traced, options)
            chain = assemble(traced, parts, sizes, None if is_plain else signature, context)
            with torch.no_grad():
                found = chain(*args, **kwargs)
            _check_chain(chain, called, traced, parts, tensors, found, expected)
            _check_other_sizes(chain, model, signature, tensors, output, sizes)
        except Exception:
            if not free_sizes:
                raise
            free_sizes = False  # whatever it was: the model may be a chain for one size
        else:
            return chain


def _check_arguments(model: nn.Module, example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(model, nn.Module):
        raise ResnetPathsError("model", type(model).__name__, "a torch.nn.Module")
    args, kwargs = arguments_of(example_inputs)
    signature, tensors = Signature.of(args, kwargs)
    if not tensors:
        raise ResnetPathsError(
            "example_inputs",
            [type(x).__name__ for x in (*args, *kwargs.values())],
            "a tensor, a tuple of arguments or a mapping of keyword arguments with tensors among them",
            "Pass a batch such as torch.zeros(2, 3, 224, 224).",
        )
    refuse_training_mode("model", model)
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    if len(devices) == 1:
        (device,) = devices
        tensors = tuple(tensor.to(device) for tensor in tensors)
    return signature.arguments(tensors)


def _listed(blocks: Sequence[str]) -> list[str]:
    if isinstance(blocks, str) or not blocks or not all(isinstance(name, str) for name in blocks):
        raise ResnetPathsError("blocks", blocks, "a list of at least one module's name, as in ['layer1.0']")
    return list(blocks)


def _run(model: nn.Module, signature: Signature, tensors: Sequence[torch.Tensor]) -> Any:
    """What the model returns. It runs on copies of inputs and buffers: it may write over them, or count its calls."""
    args, kwargs = signature.arguments(tensor.clone() for tensor in tensors)
    try:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.no_grad():
            return torch.func.functional_call(model, buffers, args, kwargs)
    except Exception as error:
        shapes = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in tensors)
        raise ResnetPathsError(
            "example_inputs",
            shapes,
            f"inputs that {type(model).__name__} takes",
            f"It answered: {type(error).__name__}: {error}",
        ) from error


def _check_other_sizes(
    chain: ResidualChain,
    model: nn.Module,
    signature: Signature,
    tensors: tuple[torch.Tensor, ...],
    output: str | int | None,
    sizes: InputSizes,
) -> None:
    """Raise unless the chain returns what the model returns for inputs of another size, the first that it takes."""
    for others in sizes.others(tensors):
        try:
            expected = chosen(_run(model, signature, others), output)
        except ResnetPathsError:
            continue  # a position table may end, or an image be too small for its convolutions
        args, kwargs = signature.arguments(others)
        with torch.no_grad():
            if not _agree(chain(*args, **kwargs), expected):
                shapes = [list(tensor.shape) for tensor in others]
                raise UnravelError("model", f"another output for {shapes}", "a model that unravels exactly")
        return


def _unlike_in_one(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """For each tensor of the example, the example with another in its place."""
    generator = torch.Generator().manual_seed(0)
    for index, tensor in enumerate(tensors):
        yield [*tensors[:index], unlike(tensor, generator), *tensors[index + 1 :]]


@torch.no_grad()
def _check_named(
    chain: ResidualChain,
    names: list[str],
    signature: Signature,
    tensors: Sequence[torch.Tensor],
    expected: torch.Tensor,
) -> None:
    """Raise unless a chain of named blocks returns what the model returns."""
    args, kwargs = signature.arguments(tensor.clone() for tensor in tensors)
    if not _agree(chain(*args, **kwargs), expected):
        raise ResnetPathsError(
            "blocks",
            names,
            "modules between which and behind which nothing else reads the input",
            "The chain does not return what the model returns, on the example or on one made from it.",
        )


def _check_chain(
    chain: ResidualChain,
    model: nn.Module,
    traced: Trace,
    parts: Sequence[Part],
    inputs: tuple[torch.Tensor, ...],
    found: torch.Tensor,
    expected: torch.Tensor,
) -> None:
    """Raise, naming the first block that differs, unless the chain returns what the model returns."""
    if _agree(found, expected):
        return
    ends = [end for end in (parts[0].start, *(part.end for part in parts)) if isinstance(end, Node)]
    with torch.no_grad():
        values = _Recorder(traced, ends).values_on(inputs)
        made = chain.stem.module(*inputs)  # type: ignore[operator]
        state, *rest = made if chain.context_names else (made,)
        context = dict(zip(chain.context_names, rest, strict=True))
        place = "the stem"
        if not isinstance(parts[0].start, Node) or _agree(state, values[parts[0].start]):
            for block, part in zip(chain, parts, strict=True):
                state, place = call_part(block, state, context), f"block {block.name!r}"
                if isinstance(part.end, Node) and not _agree(state, values[part.end]):
                    break
            else:
                place = "the head, or the export itself"
    raise ResnetPathsError(
        "model",
        f"{name_of(model)}: the chain's output differs from the model's",
        "a model that unravels exactly",
        f"The first difference is in {place}. Please report the model.",
    )


class _Recorder(Interpreter):
    """Runs the flat graph on real inputs and keeps the values of some nodes."""

    def __init__(self, traced: Trace, wanted: list[Node]) -> None:
        self._tensors = traced.tensors
        self._wanted = set(wanted)
        self._kept: dict[Node, torch.Tensor] = {}
        super().__init__(nn.Module(), graph=traced.graph, garbage_collect_values=False)

    def fetch_attr(self, target: str) -> object:
        return self._tensors[target]

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if n in self._wanted and isinstance(value, torch.Tensor):
            self._kept[n] = value
        return value

    def values_on(self, inputs: tuple[torch.Tensor, ...]) -> dict[Node, torch.Tensor]:
        self.run(*inputs)
        return self._kept


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, or, where kernels are not deterministic, to rounding of the dtype."""
    if torch.equal(found, expected):
        return True
    if found.shape != expected.shape or found.dtype != expected.dtype or not found.is_floating_point():
        return False
    tolerance = min(1000 * torch.finfo(found.dtype).eps, 0.05)
    largest = expected.abs().max().clamp_min(torch.finfo(found.dtype).tiny)
    same_holes = torch.equal(torch.isfinite(found), torch.isfinite(expected))
    return same_holes and bool(((found - expected).abs().nan_to_num() <= tolerance * largest.nan_to_num()).all())
