"""Which operation of a model has a backward rule of its own, that `torch.export` does not record."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from resnet_paths.unraveling.verification.claim import Claim

__all__ = ["backward_rule_in"]

_LIBRARY = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parents[2])


def backward_rule_in(claim: Claim, inputs: Sequence[torch.Tensor]) -> str:
    """The backward rules that a model makes for itself.

    Args:
        claim: The model.
        inputs: Tensors to run it on, with autograd enabled.

    Returns:
        What they are and where they stand, for a message: `autograd.Function`, parts under ``no_grad``, hooks on
        tensors or on the gradients of modules; empty if there are none of these.
    """
    watch, visited = _Watch(), set[object]()

    def look_back(name: str, output: object) -> None:
        for function in _new_functions(output, visited):
            rule = type(function).__name__.removesuffix("Backward")
            if isinstance(function, BackwardCFunction) and rule != "BackwardHookFunction":
                watch.found.append(f"autograd.Function {rule} in {name or 'the model itself'}")

    with contextlib.ExitStack() as hooks:
        for name, module in claim.model.named_modules():
            if module._backward_hooks or module._backward_pre_hooks:
                watch.found.append(f"hook on the gradients of {name or 'the model itself'}")
            handle = module.register_forward_hook(_hook(name, look_back))
            hooks.callback(handle.remove)
        with watch:
            output = claim.run_model(inputs)
        look_back("", output)
    return "; ".join(dict.fromkeys(watch.found[:3]))


def _hook(name: str, look_back: Callable[[str, object], None]) -> Callable[[nn.Module, object, object], None]:
    return lambda _module, _args, output: look_back(name, output)


class _Watch(TorchFunctionMode):
    """Notes where hooks are put on tensors and where operations run without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._is_quiet = False

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.Tensor.register_hook:
            self.found.append(f"hook on the gradient of a tensor, {_user_line()}")
        elif not torch.is_grad_enabled() and not self._is_quiet and _needs_gradient((args, kwargs)):
            name, place = getattr(func, "__name__", str(func)), _user_line()
            if place and name not in _WITHOUT_GRADIENT:
                mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
                self.found.append(f"{name} under {mode}, {place}")
                self._is_quiet = True
        return func(*args, **kwargs)


# What tells no numbers, or is called by autograd itself around an `autograd.Function`.
_WITHOUT_GRADIENT = {"view_as", "__get__", "dim", "size", "detach", "is_floating_point", "__len__", "data_ptr", "numel"}


def _needs_gradient(values: object) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(values))


def _user_line() -> str:
    """The innermost line that is neither this package's nor PyTorch's; empty in the rule of an `autograd.Function`."""
    frames = [frame for frame, _ in traceback.walk_stack(None)]
    if any(isinstance(value, FunctionCtx) for frame in frames for value in frame.f_locals.values()):
        return ""  # which runs without gradient, and is found by its name
    own = [f for f in traceback.extract_stack() if not f.filename.startswith((_LIBRARY, _OWN))]
    return f'File "{own[-1].filename}", line {own[-1].lineno}, in {own[-1].name}' if own else ""


def _new_functions(output: object, visited: set[object]) -> Iterable[object]:
    """The functions of an autograd graph that were not visited before; `visited` is extended."""
    waiting = [x.grad_fn for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.grad_fn is not None]
    while waiting:
        function = waiting.pop()
        if function not in visited:
            visited.add(function)
            yield function
            waiting.extend(before for before, _ in function.next_functions if before is not None)
