"""Any trained residual network as a chain of its blocks: `unravel(model, example_inputs)`.

The model is exported to one flat graph (`resnet_paths.tracing`). On that graph

- the *trunk* is the nodes that every route from input to output passes (the dominators of the output),
- a *merge* is an addition on the trunk of two values that both depend on the input,
- its *fork* is its immediate dominator: the point where skip and branch part.

Additions inside a branch, in a squeeze-and-excitation gate or in a polynomial activation are not on the trunk and fall
away by themselves. What is not a chain is refused with the name of the node that breaks it: never guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import nn
from torch.fx import Interpreter, Node

from resnet_paths.chain import Block, Placed, ResidualChain, refuse_training_mode
from resnet_paths.errors import ResnetPathsError
from resnet_paths.tracing import FixedShape, Trace, describe, module_path, module_stack, trace

__all__ = ["unravel"]

_ADD = torch.ops.aten.add.Tensor
_CAT = torch.ops.aten.cat.default
_WEIGHTED = {
    torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default,
    torch.ops.aten.convolution.default, torch.ops.aten.linear.default, torch.ops.aten.matmul.default,
    torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.bmm.default,
    torch.ops.aten.conv_transpose2d.input, torch.ops.aten.conv2d.padding, torch.ops.aten.einsum.default,
}  # fmt: skip
_PRODUCTS = {
    torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor, torch.ops.aten.matmul.default, torch.ops.aten.bmm.default,
    torch.ops.aten.mm.default, torch.ops.aten.einsum.default, torch.ops.aten.scaled_dot_product_attention.default,
}  # fmt: skip
_CONTAINERS = {"Sequential", "ModuleList", "ModuleDict"}


@dataclass(frozen=True)
class _Part:
    """One block on the graph: ``start -pre-> fork -(skip, branch)-> merge -post-> end``; skip and branch by operand."""

    module: str
    start: Node
    fork: Node
    merge: Node
    end: Node
    skip: Node | None
    branch: Node


def unravel(model: nn.Module, example_inputs: torch.Tensor | tuple[torch.Tensor, ...]) -> ResidualChain:
    """The chain of residual blocks that a model is (Veit et al. 2016, section 3).

    Works for any model whose forward `torch.export` can trace and whose blocks stand in series. Nothing is copied: the
    chain shares every parameter and buffer with the model, and works for any batch size; another image size is
    refused, since sizes may stand in the exported graph as numbers. Forward hooks of the model run along. A model
    without any skips becomes a chain of its modules, with one path.

    Args:
        model: The network, in eval mode. A `ResidualChain` is returned as it is.
        example_inputs: A tensor, or a tuple of tensors for several positional inputs, with the batch in dimension 0,
            on the model's device and of its dtype.

    Returns:
        A chain with ``chain(x) == model(x)``, which is checked on `example_inputs`.

    Raises:
        ResnetPathsError: If the model holds BatchNorm or dropout in training mode, does not take the example, cannot be
            exported (naming where), is not a chain (naming the node), or the chain does not return what the model
            returns (naming the first block that differs).

    Example:
        >>> import torch, torchvision
        >>> model = torchvision.models.resnet18(weights=None).eval()
        >>> chain = unravel(model, torch.zeros(2, 3, 64, 64))
        >>> len(chain), chain.num_paths, chain.blocks[2].name, chain.blocks[2].skip_kind
        (8, 256, 'layer2.0', 'projection')
    """
    if isinstance(model, ResidualChain):
        return model
    inputs = _check_arguments(model, example_inputs)
    expected = _run(model, inputs)
    traced = trace(model, inputs)
    trunk = _trunk(traced)
    parts = _residual_parts(traced, trunk) or _plain_parts(traced, trunk)
    chain = _assemble(traced, parts)
    _check_chain(chain, model, traced, parts, inputs, expected)
    return chain


def _check_arguments(model: nn.Module, example_inputs: object) -> tuple[torch.Tensor, ...]:
    if not isinstance(model, nn.Module):
        raise ResnetPathsError("model", type(model).__name__, "a torch.nn.Module")
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    if not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise ResnetPathsError(
            "example_inputs", [type(x).__name__ for x in inputs], "a tensor or a tuple of tensors",
            "Pass a batch such as torch.zeros(2, 3, 224, 224).",
        )  # fmt: skip
    refuse_training_mode("model", model)
    return inputs


def _run(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    try:
        # On copies of the buffers: a model that counts its calls is refused later, and must not have counted this one.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.no_grad():
            output: torch.Tensor = torch.func.functional_call(model, buffers, inputs)
    except Exception as error:
        shapes = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in inputs)
        raise ResnetPathsError(
            "example_inputs", shapes, f"inputs that {type(model).__name__} takes",
            f"It answered: {type(error).__name__}: {error}",
        ) from error  # fmt: skip
    return output


def _trunk(traced: Trace) -> list[Node]:
    """The nodes that every route from the inputs to the output passes, in order, from the first after the inputs."""
    if not traced.depends_on_input(traced.output):
        raise ResnetPathsError("model", traced.output.name, "a model whose output depends on its input")
    graph = nx.DiGraph()
    for node in traced.in_order(traced.region([], traced.output)):
        before: list[Any] = [*traced.dependent_inputs(node)] or ["inputs"]
        graph.add_edges_from((source, node) for source in before)
    dominators = nx.immediate_dominators(graph, "inputs")
    trunk = [traced.output]
    while dominators[trunk[-1]] != "inputs":
        trunk.append(dominators[trunk[-1]])
    return trunk[::-1]


def _residual_parts(traced: Trace, trunk: list[Node]) -> list[_Part]:
    """The blocks of a network with skips; empty if there is no merge on the trunk."""
    cores = []
    for fork, node in itertools.pairwise(trunk):
        operands = traced.dependent_inputs(node)
        is_merge = node.target is _ADD or _extends(node, fork)
        if is_merge and len(operands) == 2 and _holds_weights(traced, fork, node):
            skip, branch = _skip_and_branch(traced, fork, node, operands)
            cores.append((fork, node, skip, branch))
        else:
            _refuse_other_merge(traced, fork, node)
    if not cores:
        return []
    position = {node: i for i, node in enumerate(trunk)}
    merges = [merge for _, merge, _, _ in cores]
    ends = [_end_of_post(trunk, position, merges, index, cores) for index in range(len(cores))]
    starts = [_start_of_first(trunk, position, merges, cores[0][0]), *ends[:-1]]
    return [
        _Part(module_path(merge), start, fork, merge, end, skip, branch)
        for start, (fork, merge, skip, branch), end in zip(starts, cores, ends, strict=True)
    ]


def _extends(node: Node, fork: Node) -> bool:
    """Whether a node concatenates the fork and one thing more, as the layers of a DenseNet do: dense connections."""
    if node.target is not _CAT or len(node.args[0]) != 2 or fork not in node.args[0]:  # type: ignore[arg-type, operator]
        return False
    return _dimension(node) > 0


def _dimension(cat: Node) -> int:
    """The dimension along which a node concatenates, batch counted."""
    dim = cat.args[1] if len(cat.args) > 1 else 0
    return int(dim) % int(cat.meta["val"].dim())  # type: ignore[arg-type]


def _skip_and_branch(traced: Trace, fork: Node, merge: Node, operands: Sequence[Node]) -> tuple[Node, Node]:
    """Which operand of a merge is the skip: the fork itself, else the one that computes less."""
    if merge.kwargs.get("alpha", 1) != 1:
        raise _not_a_chain(merge, "an addition with alpha=1")
    if fork not in operands and any(o.target is _ADD and len(traced.dependent_inputs(o)) == 2 for o in operands):
        raise _not_a_chain(merge, "one skip and one branch at a merge; here three values are added up")
    sides = [traced.region([fork], operand) for operand in operands]
    shared = sides[0] & sides[1]
    if shared:
        node = traced.in_order(shared)[0]
        raise _not_a_chain(
            node, f"a skip and a branch that share nothing between fork {fork.name} and merge {merge.name}"
        )

    if fork in operands:
        index = operands.index(fork)
    else:
        costs = [sum(n.target in _WEIGHTED for n in side) for side in sides]
        if costs[0] == costs[1]:
            raise _not_a_chain(merge, "a skip of fewer weight layers than the branch; here both sides look alike")
        index = costs.index(min(costs))
    return operands[index], operands[1 - index]


def _holds_weights(traced: Trace, fork: Node, merge: Node) -> bool:
    """Whether anything with parameters stands between fork and merge: x + sin(x) is an activation, not a block."""
    inside = {a for n in traced.region([fork], merge) for a in n.all_input_nodes if a.op == "get_attr"}
    return fork.meta["val"].is_floating_point() and bool(inside)


def _refuse_other_merge(traced: Trace, fork: Node, node: Node) -> None:
    """Refuse what joins computed branches in another way than by adding, such as a concatenation or a difference."""
    # Gates and attention (products) stand inside a segment; a concatenation of mere slices (patch merging) is no merge.
    if node.target in _PRODUCTS or len(traced.dependent_inputs(node)) < 2:
        return
    if any(n.target in _WEIGHTED for n in traced.region([fork], node) if n is not node):
        how = "concatenate it" if node.target is _CAT else f"join it by {getattr(node.target, '__name__', node.target)}"
        raise _not_a_chain(node, f"blocks that add their branch to the skip, not {how}")


def _end_of_post(
    trunk: list[Node], position: dict[Node, int], merges: list[Node], index: int, cores: Sequence[tuple[Node, ...]]
) -> Node:
    """The last trunk node that belongs to block `index`: the merge itself, or what follows it in the same module."""
    merge = merges[index]
    last = index == len(merges) - 1
    limit = len(trunk) - 1 if last else position[cores[index + 1][0]]
    own = module_path(merge)
    following = None if last else module_path(merges[index + 1])
    end = merge
    for node in trunk[position[merge] + 1 : limit + 1]:
        path = module_path(node)
        if not _within(path, own):
            break
        if following is not None and following != own and _within(following, own) and _within(path, following):
            break  # the next block stands inside this one's module and owns the node
        if _makes_several(merges, own):
            # The module does not tell: an activation or a normalisation that keeps the shape belongs to the merge
            # before it, but at the end of the chain only if one like it follows the merge before.
            if node.target in _WEIGHTED or node.meta["val"].shape != merge.meta["val"].shape:
                break
            if last and not _follows_the_merge_before(trunk, position, merges, node):
                break
        end = node
    return end


def _makes_several(merges: list[Node], path: str) -> bool:
    """Whether a module's own forward makes several merges, or is the model's."""
    return path == "" or [module_path(merge) for merge in merges].count(path) > 1


def _follows_the_merge_before(trunk: list[Node], position: dict[Node, int], merges: list[Node], node: Node) -> bool:
    """Whether the node after the last merge has its like after the merge before: then it is no part of the head."""
    if len(merges) < 2:
        return module_path(node) == ""
    twin = position[merges[-2]] + position[node] - position[merges[-1]]
    return twin < position[merges[-1]] and trunk[twin].target == node.target


def _start_of_first(trunk: list[Node], position: dict[Node, int], merges: list[Node], fork: Node) -> Node:
    """Where the first block begins: at the trunk nodes before its fork that stand in its module."""
    own = module_path(merges[0])
    start = position[fork]
    if not _makes_several(merges, own):
        while start > 0 and _within(module_path(trunk[start]), own):
            start -= 1
    return trunk[start]


def _plain_parts(traced: Trace, trunk: list[Node]) -> list[_Part]:
    """The modules of a network without skips, as blocks without skip."""
    # Those on the trunk were judged before: nothing with weights stands in them.
    for node in traced.in_order(traced.region([], traced.output) - set(trunk)):
        if node.target in (_ADD, _CAT) and len(traced.dependent_inputs(node)) > 1 and _weighs(traced, node):
            raise _not_a_chain(node, "merges that every route passes; some route leads around this one")
    groups = _plain_groups(traced, trunk)
    if len(groups) < 1:
        raise ResnetPathsError(
            "model", "no block found", "a model that adds branches to skips, or a stack of modules with weights"
        )
    return [_Part(module, start, start, end, end, None, end) for module, start, end in groups]


def _plain_groups(traced: Trace, trunk: list[Node]) -> list[tuple[str, Node, Node]]:
    """(Module, start, end) of each plain block: the composite modules on the trunk, or else its weight layers."""
    # A wrapper that holds everything with weights is no more than a name before the others.
    wrapper = _common_module(n for n in traced.region([], traced.output) if n.target in _WEIGHTED)
    units = [_unit(node, wrapper) for node in trunk]
    weighs = {name: False for name, _ in units}
    for before, node, (name, _) in zip([None, *trunk], trunk, units, strict=False):
        region = traced.region([before] if before is not None else [], node)
        weighs[name] |= any(n.target in _WEIGHTED for n in region)
    composites = {name for name, composite in units if composite and weighs[name]}
    groups: list[tuple[str, int, int]] = []
    previous = None
    for index, (name, _) in enumerate(units):
        begins = name in composites if composites else weighs[name]
        goes_on = name == previous if begins else not composites
        if begins and not goes_on:
            groups.append((name, index - 1, index))
        elif groups and goes_on:
            groups[-1] = (*groups[-1][:2], index)
        previous = name
    if not composites:  # of a stack of weight layers the first is the stem; the last, which makes the logits, the head
        groups = groups[1:-1]
    return [(name, trunk[a], trunk[b]) for name, a, b in groups if a >= 0]


def _unit(node: Node, wrapper: str) -> tuple[str, bool]:
    """The outermost module inside `wrapper` that is no mere container, and whether it holds modules itself."""
    below = [(name, kind) for name, kind in module_stack(node) if name not in ("", wrapper) and _within(name, wrapper)]
    for depth, (name, kind) in enumerate(below):
        if kind.rsplit(".", 1)[-1] not in _CONTAINERS:
            return name, depth < len(below) - 1
    return "", False


def _weighs(traced: Trace, node: Node) -> bool:
    return any(
        n.target in _WEIGHTED for operand in traced.dependent_inputs(node) for n in [operand, *operand.all_input_nodes]
    )


def _assemble(traced: Trace, parts: list[_Part]) -> ResidualChain:
    names = _names(traced, parts)
    blocks, stage, previous_shape = [], 0, None
    for part, name in zip(parts, names, strict=True):
        in_shape, out_shape = _shape(part.start), _shape(part.end)
        if previous_shape is not None and out_shape != previous_shape:
            stage += 1
        previous_shape = out_shape
        branch = traced.segment([part.fork], part.branch)
        skip = None if part.skip is None else traced.segment([part.fork], part.skip)
        if part.merge.target is _CAT and part.skip is not None:
            skip, branch = _placed(part, branch)
        block = Block(
            branch, skip, pre=traced.segment([part.start], part.fork),
            post=traced.segment([part.merge], part.end),
            name=name, stage=stage, in_shape=in_shape, out_shape=out_shape,
        )  # fmt: skip
        block.training = False
        blocks.append(block)
    # Between blocks of a plain net there may be trunk nodes that belong to neither: they go before the later block.
    for index, (left, right) in enumerate(itertools.pairwise(parts)):
        if left.end is not right.start:
            gap = traced.segment([left.end], right.start)
            blocks[index + 1] = blocks[index + 1].replace(pre=gap, in_shape=_shape(left.end))
    shapes = [tuple(node.meta["val"].shape[1:]) for node in traced.inputs]
    stem = FixedShape(traced.segment(traced.inputs, parts[0].start), shapes)
    head = traced.segment([parts[-1].end], traced.output)
    chain = ResidualChain(stem, blocks, head)
    chain.training = chain.blocks.training = False
    chain.eval_only = True
    return chain


def _placed(part: _Part, branch: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Skip and branch of a concatenation: each placed into the wider space, where they are added."""
    dim = _dimension(part.merge)
    sizes = {node: int(node.meta["val"].shape[dim]) for node in (part.fork, part.branch)}
    if part.merge.args[0][0] is part.fork:  # type: ignore[index]
        placed = Placed(dim, 0, sizes[part.branch]), Placed(dim, sizes[part.fork], 0)
    else:
        placed = Placed(dim, sizes[part.branch], 0), Placed(dim, 0, sizes[part.fork])
    return placed[0].eval(), nn.Sequential(branch, placed[1]).eval()


def _names(traced: Trace, parts: list[_Part]) -> list[str]:
    """A name a block: the module whose forward merges; where several merge in one, the module of the branch."""
    # Where features are concatenated, the merge stands in the layer that reads them: not a name for this block.
    by_merge = ["" if part.merge.target is _CAT else part.module for part in parts]
    names: list[str] = []
    for index, (part, name) in enumerate(zip(parts, by_merge, strict=True)):
        if name and by_merge.count(name) == 1:
            names.append(name)
            continue
        region = traced.region([part.fork], part.branch)
        candidates = (_common_module(region), _common_module(n for n in region if n.target in _WEIGHTED))
        taken = {"", *names, *by_merge}
        fallback = f"{name}#{index}" if name else f"block{index}"
        names.append(next((c for c in candidates if c not in taken), fallback))
    return names


def _common_module(nodes: Iterable[Node]) -> str:
    """The innermost module that holds all nodes, those of the model's own forward aside."""
    paths = [path.split(".") for path in map(module_path, nodes) if path]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return ".".join(level[0] for level in levels)


def _check_chain(
    chain: ResidualChain, model: nn.Module, traced: Trace, parts: list[_Part],
    inputs: tuple[torch.Tensor, ...], expected: torch.Tensor,
) -> None:  # fmt: skip
    """Raise, naming the first block that differs, unless the chain returns what the model returns."""
    with torch.no_grad():
        if _agree(chain(*inputs), expected):
            return
        values = _Recorder(traced, [parts[0].start, *(part.end for part in parts)]).values_on(inputs)
        state = chain.stem(*inputs)
        place = "the stem"
        for block, part in zip(chain, parts, strict=True):
            if not _agree(state, values[part.start]) and block is chain[0]:
                break
            state, place = block(state), f"block {block.name!r}"
            if not _agree(state, values[part.end]):
                break
        else:
            place = "the head, or the export itself"
    raise ResnetPathsError(
        "model", f"{type(model).__name__}: the chain's output differs from the model's",
        "a model that unravels exactly",
        f"The first difference is in {place}. Please report the model.",
    )  # fmt: skip


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


def _not_a_chain(node: Node, allowed: str) -> ResnetPathsError:
    return ResnetPathsError(
        "model", f"{node.name} ({describe(node)})", allowed,
        "Only networks whose blocks stand in series can be unraveled.",
    )  # fmt: skip


def _within(path: str, module: str) -> bool:
    return module == "" or path == module or path.startswith(module + ".")


def _shape(node: Node) -> tuple[int, ...]:
    """Shape without the batch; a dimension that varies with the batch is -1."""
    return tuple(int(d) if isinstance(d, int) else -1 for d in node.meta["val"].shape[1:])
