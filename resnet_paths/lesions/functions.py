"""Steps of a chain as plain functions: the same operations on the same numbers, in less time and memory.

An exported part looks its tensors up by name whenever it runs, and each of its operations makes a new tensor. As a
function it has its tensors at hand, and writes a result over an operand that nothing else reads: ReLU over what
BatchNorm made, ``skip(x) + branch(x)`` over what the branch made. An operation in place computes what the ordinary one
does, so that every number stays what it was, bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from resnet_paths.core.chain import Block, ResidualChain, is_identity
from resnet_paths.core.parts import Parallel

__all__ = ["Functions"]

_aten = torch.ops.aten
_IN_PLACE: dict[Any, Any] = {
    _aten.relu.default: _aten.relu_.default,
    _aten.hardtanh.default: _aten.hardtanh_.default,
    _aten.hardswish.default: _aten.hardswish_.default,
    _aten.silu.default: _aten.silu_.default,
    _aten.gelu.default: _aten.gelu_.default,
}
"""Operations on each number by itself, and their twins in place."""
_MAKES_NEW: set[Any] = {
    *_IN_PLACE,
    *_IN_PLACE.values(),  # of what is new
    *(getattr(_aten, f"conv{n}d").default for n in (1, 2, 3)),
    *(getattr(_aten, f"conv{n}d").padding for n in (1, 2, 3)),
    _aten.batch_norm.default,
    _aten.group_norm.default,
    _aten.layer_norm.default,
    _aten.linear.default,
    _aten.add.Tensor,
    _aten.mul.Tensor,
}
"""Operations that return a tensor of their own, whatever they are given."""


@dataclass(frozen=True)
class _Function:
    """A part as a function.

    Attributes:
        call: From its input to its output.
        makes_new: Whether the output is a tensor that nothing else holds.
    """

    call: Callable[[Any], Any]
    makes_new: bool = False


class Functions:
    """The functions of steps, each part made once however many steps share it.

    They are for running without gradients: a function holds the tensors that its part had when it was made.
    """

    def __init__(self) -> None:
        # The parts are kept, so that no other is given the identity of one that is gone.
        self._known: dict[tuple[int, bool], tuple[nn.Module, _Function]] = {}

    def of(self, step: nn.Module) -> Callable[[Any], Any]:
        """What a step computes, as a function of its state.

        Args:
            step: A block, a head, or any other module of one argument.

        Returns:
            The function: the module itself where it is of no kind that is known here, or has hooks.
        """
        return self._function(step).call

    def _function(self, part: nn.Module, owns_input: bool = False) -> _Function:
        """That of a part; `owns_input` says that nothing else will read what it is given."""
        key = id(part), owns_input
        if key not in self._known:
            self._known[key] = part, self._made(part, owns_input)
        return self._known[key][1]

    def _made(self, part: nn.Module, owns_input: bool) -> _Function:
        if part._forward_hooks or part._forward_pre_hooks or nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return _Function(part)
        if is_identity(part):
            return _Function(_same, owns_input)
        if isinstance(part, GraphModule) and type(part.graph._codegen) is CodeGen:
            return _of_graph(part, owns_input)
        if type(part) is ResidualChain:
            return self._in_series([part.stem, *part, part.head])
        if type(part) is Block:
            return self._of_block(part)
        return _Function(part)

    def _in_series(self, parts: list[nn.Module]) -> _Function:
        functions = [self._function(part) for part in parts]
        calls = [function.call for function in functions if function.call is not _same]

        def run(x: Any) -> Any:
            for call in calls:
                x = call(x)
            return x

        return _Function(run, functions[-1].makes_new)

    def _of_block(self, block: Block) -> _Function:
        if isinstance(block.branch, Parallel) and block.branch.onto_skip:
            return _Function(block)
        pre = self._function(block.pre).call
        ways = [self._function(way) for way in (block.skip, block.branch) if way is not None]
        post = self._function(block.post, owns_input=len(ways) == 2 or ways[0].makes_new)
        after, skip = post.call, ways[0].call
        if len(ways) == 1:
            return _Function(lambda x: after(skip(pre(x))), post.makes_new)
        branch, add = ways[1].call, _added_over if ways[1].makes_new else operator.add

        def run(x: Any) -> Any:
            x = pre(x)
            return after(add(skip(x), branch(x)))

        return _Function(run, post.makes_new)


def _same(x: Any) -> Any:
    return x


def _added_over(kept: Any, new: Any) -> Any:
    """``kept + new``, written over `new` where that has the form of the sum."""
    if (
        type(kept) is type(new) is torch.Tensor
        and kept.shape == new.shape
        and kept.stride() == new.stride()
        and kept.dtype == new.dtype
    ):
        return new.add_(kept)
    return kept + new


def _of_graph(module: GraphModule, owns_input: bool) -> _Function:
    """An exported part with its tensors in one flat module, and in place what can be."""
    graph = Graph()
    held: dict[str, Any] = {}
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            name = f"held{len(held)}"
            held[name] = operator.attrgetter(node.target)(module)
            node.target = name
        elif node.target in _IN_PLACE and _is_new(node.args[0], owns_input):
            node.target = _IN_PLACE[node.target]
    (result,) = graph.output_node().args
    # Called without the machinery of modules: there are no hooks.
    return _Function(GraphModule(held, graph).forward, isinstance(result, Node) and _is_new(result, owns_input=False))


def _is_new(node: Any, owns_input: bool) -> bool:
    """Whether a value is a tensor of its own, read once; an input is one where its reader owns it."""
    if len(node.users) > 1:
        return False
    return owns_input if node.op == "placeholder" else node.target in _MAKES_NEW
