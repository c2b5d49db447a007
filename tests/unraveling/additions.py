"""The additions of a model, recorded while it runs, and what the model returns without one of their branches.

Nothing here uses the library or `torch.export`: a dispatch mode sees every operation with the modules that are running.
An addition's skip is the operand that the other one was computed from; where neither was computed from the other, it is
the one with fewer weight layers since they parted. A concatenation is an addition whose branch is all that it joins to
the skip. An addition stands on the trunk if every route from the input to the output leads through it, which is so if
the routes to it times the routes from it are all routes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_ATEN = torch.ops.aten
_SUMS = {_ATEN.add.Tensor, _ATEN.add_.Tensor}
_WEIGHTED = (
    *("conv", "mkldnn_conv", "linear", "matmul", "addmm", "mm", "bmm", "baddbmm", "einsum"),
    *("lstm", "gru", "scaled_dot_product", "_scaled_dot_product"),
)


@dataclass(frozen=True)
class Addition:
    """One addition of a skip and a branch.

    Attributes:
        call: Number of the operation.
        skip: Which operand is the skip, counted from 0.
        kind: "identity", "projection" or "concat".
        modules: Names of all modules that computed the branch, or were running at the addition.
        num_weight_layers: Convolutions and products of matrices between skip and branch.
        on_trunk: Whether every route leads through it.
    """

    call: int
    skip: int
    kind: str
    modules: frozenset[str]
    num_weight_layers: int
    on_trunk: bool


class _Calls(TorchDispatchMode):
    """Numbers the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = itertools.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.called(next(self.counter), func, args, kwargs or {})

    def called(self, call: int, func: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class _Recorder(_Calls):
    """The graph of operations; sets of operations are the bits of an int."""

    def __init__(self, inputs: Any, running: list[str]) -> None:
        super().__init__()
        self.running = running
        self.node_of = WeakIdKeyDictionary()
        self.parents: list[list[int]] = [[]]
        self.before: list[int] = [1]  # bits of the operations that one was computed from, with itself
        self.modules: list[tuple[str, ...]] = [()]
        self.weighted = 0
        self.sums: list[tuple[int, int, list[int], bool]] = []
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, torch.Tensor):
                self.node_of[tensor] = 0

    def called(self, call: int, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        sources = sorted({self.node_of[x] for x in tensors if x in self.node_of})
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if sources and made:
            node = len(self.parents)
            operands = args[0] if func is _ATEN.cat.default else args[:2] if func in _SUMS else []
            if len(sources) > 1 and all(isinstance(x, torch.Tensor) and x in self.node_of for x in operands):
                self.sums.append((call, node, [self.node_of[x] for x in operands], func not in _SUMS))
            self.parents.append(sources)
            bits = 1 << node
            for source in sources:
                bits |= self.before[source]
            self.before.append(bits)
            self.modules.append(tuple(self.running))
            if func.overloadpacket.__name__.startswith(_WEIGHTED):
                self.weighted |= 1 << node
            for tensor in made:
                self.node_of[tensor] = node
        return result

    def additions(self, output: torch.Tensor) -> list[Addition]:
        last = self.node_of[output]
        to = [1] + [0] * (len(self.parents) - 1)  # routes from the input
        onward = [0] * len(self.parents)  # routes to the output
        onward[last] = 1
        for node in range(1, len(self.parents)):
            to[node] = sum(to[source] for source in self.parents[node])
        for node in reversed(range(last + 1)):
            for source in self.parents[node]:
                onward[source] += onward[node]
        found = []
        for call, node, operands, is_concat in self.sums:
            common = self.before[operands[0]] if operands else 0
            for operand in operands:
                common &= self.before[operand]
            own = [self.before[operand] & ~common for operand in operands]
            weights = [(bits & self.weighted).bit_count() for bits in own]
            order = sorted(range(len(operands)), key=lambda i: (bool(own[i]), weights[i]))
            if len(order) < 2 or (own[order[0]] and weights[order[0]] == weights[order[1]]):
                continue
            branch = 0
            for i in order[1:]:
                branch |= own[i]
            inside = [self.modules[n] for n in range(branch.bit_length()) if branch >> n & 1]
            found.append(
                Addition(
                    call,
                    order[0],
                    "concat" if is_concat else "projection" if own[order[0]] else "identity",
                    frozenset(itertools.chain(self.modules[node], *inside)),
                    (branch & self.weighted).bit_count(),
                    to[node] * onward[node] == to[last],
                )
            )
        return found


class _Without(_Calls):
    """Runs the model with the skip alone at one addition."""

    def __init__(self, addition: Addition) -> None:
        super().__init__()
        self.addition = addition

    def called(self, call: int, func: Any, args: Any, kwargs: Any) -> Any:
        if call != self.addition.call:
            return func(*args, **kwargs)
        if self.addition.kind == "concat":
            kept = [x if i == self.addition.skip else torch.zeros_like(x) for i, x in enumerate(args[0])]
            return func(kept, *args[1:], **kwargs)
        if func is _ATEN.add_.Tensor:
            return args[0] if self.addition.skip == 0 else args[0].copy_(args[1])
        return args[self.addition.skip].expand_as(func(*args, **kwargs)).clone()


@contextlib.contextmanager
def _names_of_running_modules(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that run, outermost first; the second call of one is named ``name@1``, and so on."""
    running: list[str] = []
    calls: Counter[str] = Counter()
    hooks = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            running.append(f"{name}@{calls[name]}" if calls[name] else name)
            calls[name] += 1

        return hook

    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(enter(name)))
            hooks.append(module.register_forward_hook(lambda module, args, output: void(running.pop())))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


def void(_: object) -> None:
    """Nothing: a forward hook that returns a value would replace the output."""


def additions(
    model: nn.Module, inputs: tuple[Any, ...], chosen: Callable[[Any], torch.Tensor]
) -> tuple[torch.Tensor, list[Addition]]:
    """The output of a model, and its additions of skip and branch in the order in which they run.

    Args:
        model: A model in eval mode.
        inputs: Its positional arguments.
        chosen: Takes what the model returns to one tensor.
    """
    with torch.inference_mode(), _names_of_running_modules(model) as running:
        inputs = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs)
        with _Recorder(inputs, running) as recorder:
            output = chosen(model(*inputs))
        return output, recorder.additions(output)


def output_without(
    model: nn.Module, inputs: tuple[Any, ...], chosen: Callable[[Any], torch.Tensor], addition: Addition
) -> torch.Tensor:
    """The output of the model with the skip alone at one of its `additions`."""
    with torch.inference_mode(), _names_of_running_modules(model):
        inputs = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs)
        with _Without(addition):
            return chosen(model(*inputs))
