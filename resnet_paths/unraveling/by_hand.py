"""A chain from the names of its blocks, for models that cannot be exported as a whole.

Each named module is unraveled on its own. What runs before the first and after the last is the model itself, with the
blocks replaced: nothing of it has to be exported, so that it may do what it likes with the data.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils import _pytree as pytree

from resnet_paths._utils.errors import ResnetPathsError, nearest_names
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import BlockFields
from resnet_paths.core.signature import Function, Signature, chosen

__all__ = ["chain_of_named_blocks"]


class _Reached(Exception):  # noqa: N818 - no error: it stops a model where the first block begins
    def __init__(self, state: torch.Tensor) -> None:
        super().__init__()
        self.state = state


class _State:
    """Marks the position of a block's output in what the block returns."""


_GIVEN: contextvars.ContextVar[torch.Tensor] = contextvars.ContextVar("given")


def _stop(state: torch.Tensor, *_: object, **__: object) -> None:
    """In the first block's place: takes its input out of the model."""
    raise _Reached(state)


def _form_of(returned: object) -> object:
    """What a block returned on the example, without its output."""
    output = chosen(returned, None)
    form: object = pytree.tree_map(lambda leaf: _State if leaf is output else leaf, returned)
    if all(leaf is not _State for leaf in pytree.tree_leaves(form)):
        raise ResnetPathsError(
            "blocks",
            f"one that returns a {type(returned).__name__}",
            "modules that return a tensor, or a tuple, list or mapping with it",
        )
    return form


def _give(form: object, *_: object, **__: object) -> object:
    """In a block's place: returns what the block returned on the example, with the given state as its output."""
    state = _GIVEN.get()
    return pytree.tree_map(lambda leaf: state if leaf is _State else leaf, form)


def _before_blocks(model: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
    """What the first block gets."""
    try:
        model(*args, **kwargs)
    except _Reached as reached:
        return reached.state
    raise AssertionError("the first block was not reached")


def _after_blocks(
    signature: Signature, output: str | int | None, model: nn.Module, *example_and_state: torch.Tensor
) -> torch.Tensor:
    """What the model makes of the last block's output; it runs on the example meanwhile, its blocks replaced."""
    *example, state = example_and_state
    # Clones: the model may write over its inputs.
    rows = (row.to(state.device) for row in example)
    rows = (row.expand(len(state), *row.shape[1:]).clone() if row.dim() else row.clone() for row in rows)
    args, kwargs = signature.arguments(rows)
    token = _GIVEN.set(state)
    try:
        return chosen(model(*args, **kwargs), output)
    finally:
        _GIVEN.reset(token)


def _first_row(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1] if tensor.dim() else tensor


def chain_of_named_blocks(
    model: nn.Module,
    names: Sequence[str],
    signature: Signature,
    tensors: Sequence[torch.Tensor],
    output: str | int | None,
    unravel: Callable[..., ResidualChain],
) -> ResidualChain:
    """The chain whose blocks are those of some modules of a model.

    Args:
        model: The model, in eval mode.
        names: Names of modules that run once each on one tensor, one right after the other, such as ``"layer1.0"``.
        signature: How the model is called.
        tensors: Example tensors for it.
        output: As for `resnet_paths.unravel`.
        unravel: Makes a chain of one module.

    Returns:
        A chain in eval mode.

    Raises:
        ResnetPathsError: If a module does not exist, does not run once or is given several tensors, something runs
            between two of them, or one cannot be unraveled.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ResnetPathsError("blocks", name, f"the name of a module, nearest {nearest_names(name, modules)}")
    calls = _calls(model, modules, names, signature, tensors)
    blocks: list[Block] = []
    previous: torch.Tensor | None = None
    for name in names:
        state, returned = calls[name]
        if previous is not None and state is not previous and not torch.equal(state, previous):
            raise ResnetPathsError(
                "blocks",
                name,
                "modules that run right after one another",
                f"Something runs between it and the one before: name that as well, or leave {name!r} out.",
            )
        previous = chosen(returned, None)
        blocks += _named_after(name, unravel(modules[name], state), state, previous)
    stage = 0
    for index, block in enumerate(blocks):
        stage += int(index > 0 and block.out_shape != blocks[index - 1].out_shape)
        block.stage = stage
    stem = Function(_before_blocks, _with_replaced(model, dict.fromkeys(names, Function(_stop))))
    given = {name: Function(partial(_give, _form_of(calls[name][1]))) for name in names}
    example = [_first_row(tensor).clone() for tensor in tensors]
    head = Function(partial(_after_blocks, signature, output), _with_replaced(model, given), example)
    chain = ResidualChain(stem, blocks, head)
    chain.training = chain.blocks.training = False
    chain.eval_only = True
    return chain


def _named_after(name: str, chain: ResidualChain, state: torch.Tensor, returned: torch.Tensor) -> Iterator[Block]:
    """The blocks of one module, what stands around them taken into the first and the last."""
    for index, block in enumerate(chain):
        changes: BlockFields = {"name": name if len(chain) == 1 else f"{name}.{block.name}"}
        if index == 0 and not isinstance(chain.stem.module, nn.Identity):
            changes["pre"] = nn.Sequential(chain.stem, block.pre).eval()
            changes["in_shape"] = tuple(state.shape[1:])
        if index == len(chain) - 1 and not isinstance(chain.head, nn.Identity):
            changes["post"] = nn.Sequential(block.post, chain.head).eval()
            changes["out_shape"] = tuple(returned.shape[1:])
        yield block.replace(**changes)


def _calls(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    names: Sequence[str],
    signature: Signature,
    tensors: Sequence[torch.Tensor],
) -> dict[str, tuple[torch.Tensor, object]]:
    """First input and output of each named module on the example."""
    found: dict[str, list[tuple[torch.Tensor, object]]] = {name: [] for name in names}
    with contextlib.ExitStack() as hooks:
        for name in names:

            def keep(
                _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], returned: object, name: str = name
            ) -> None:
                given = Signature.of(args, kwargs)[1]
                if len(given) != 1:
                    raise ResnetPathsError(
                        "blocks",
                        name,
                        "modules that are given one tensor",
                        f"This one is given {len(given)}. Unravel the whole model, if it can be exported: what all "
                        "blocks read, such as a mask, is carried along then.",
                    )
                found[name].append((given[0].clone(), returned))

            handle = modules[name].register_forward_hook(keep, with_kwargs=True)
            hooks.callback(handle.remove)
        args, kwargs = signature.arguments(tensor.clone() for tensor in tensors)
        with torch.no_grad():
            model(*args, **kwargs)
    for name, calls in found.items():
        if len(calls) != 1:
            raise ResnetPathsError("blocks", name, "modules that run once", f"This one runs {len(calls)} times.")
    return {name: calls[0] for name, calls in found.items()}


def _with_replaced(model: nn.Module, replacements: Mapping[str, nn.Module], prefix: str = "") -> nn.Module:
    """The model with other modules in some places; everything else is shared."""
    if prefix.rstrip(".") in replacements:
        return replacements[prefix.rstrip(".")]
    if not any(name.startswith(prefix) for name in replacements):
        return model
    twin = copy.copy(model)
    twin._modules = {
        name: None if child is None else _with_replaced(child, replacements, f"{prefix}{name}.")
        for name, child in model._modules.items()
    }
    return twin
