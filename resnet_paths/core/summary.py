"""What a block holds, for people: operations by name, a table of a chain."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import pandas as pd
from torch import nn
from torch.fx import GraphModule, Node

from resnet_paths.core.parts import LinearCombination, Parallel
from resnet_paths.core.paths import Choice
from resnet_paths.core.weight_layers import weight_layers

__all__ = ["chain_table", "contents", "dimensions", "indented"]

_NAMES = {
    "batch_norm": "norm",
    "layer_norm": "norm",
    "group_norm": "norm",
    "instance_norm": "norm",
    "rms_norm": "norm",
    "scaled_dot_product_attention": "attention",
    "max_pool2d": "max pool",
    "avg_pool2d": "average pool",
    "adaptive_avg_pool2d": "average pool",
    "addmm": "linear",
    "softmax": "softmax",
    "baddbmm": "bmm",
    "lstm": "LSTM",
    "gru": "GRU",
    "lstm_cell": "LSTM cell",
    "gru_cell": "GRU cell",
    "rnn_tanh_cell": "RNN cell",
    "rnn_relu_cell": "RNN cell",
}
# They compute nothing; what concatenation is made of is said by the kind of the skip.
_SILENT = ("Identity", "Placed", "Take", "WithEmptySum")
_SHOWN = {
    *_NAMES,
    "linear",
    "relu",
    "relu_",
    "gelu",
    "silu",
    "silu_",
    "sigmoid",
    "tanh",
    "hardswish",
    "hardswish_",
    "hardsigmoid",
    "elu",
    "leaky_relu",
    "softplus",
    "mish",
    "matmul",
    "bmm",
    "einsum",
    "bilinear",
    "tensordot",
    "inner",
    "cat",
    "upsample_bilinear2d",
    "upsample_nearest2d",
}


class ShownBlock(Protocol):
    """What is read of a block: `resnet_paths.core.chain.Block` imports this file."""

    name: str
    stage: int
    skip_kind: str | None
    pre: nn.Module
    branch: nn.Module | None
    post: nn.Module
    in_shape: tuple[int, ...] | None
    out_shape: tuple[int, ...] | None

    @property
    def branches(self) -> Sequence[nn.Module]:
        """The branches that a path may take."""

    @property
    def nested(self) -> Mapping[int, ShownChain]:
        """The chains inside its branches."""

    @property
    def path_choices(self) -> Sequence[Choice]:
        """The entries that it offers to a path."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all parts."""


class ShownChain(Protocol):
    """What is read of a chain: its blocks."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[ShownBlock]: ...


def contents(module: nn.Module | None) -> str:
    """What a module holds, in order, repeats folded, such as ``"2 x (norm, relu, conv 3x3)"``.

    Args:
        module: A branch; None for a deleted one.

    Returns:
        Words with commas between.
    """
    if module is None:
        return "deleted"
    return ", ".join(_folded(list(_words(module)))) or type(module).__name__


def _words(module: nn.Module) -> Iterable[str]:
    if isinstance(module, GraphModule):
        yield from filter(None, (_word(module, node) for node in module.graph.nodes))
    elif isinstance(module, LinearCombination):
        yield from _words(module[0])
    elif isinstance(module, Parallel):
        yield " | ".join(contents(branch) for branch in module)
    elif not list(module.children()):
        if isinstance(module, nn.modules.conv._ConvNd):
            yield "conv " + "x".join(map(str, module.kernel_size))
        elif type(module).__name__ not in _SILENT:
            yield type(module).__name__
    else:
        for child in module.children():
            yield from _words(child)


def _word(module: GraphModule, node: Node) -> str:
    name = str(getattr(node.target, "__name__", "")).split(".")[0]
    if name.startswith("conv"):
        weight = node.args[1]
        assert isinstance(weight, Node)  # a convolution has weights
        # One that is made of others in the graph is known by its shape alone.
        value = operator.attrgetter(str(weight.target))(module) if weight.op == "get_attr" else weight.meta.get("val")
        return "conv" if value is None else "conv " + "x".join(map(str, value.shape[2:]))
    return _NAMES.get(name, name.rstrip("_")) if name in _SHOWN else ""


def _folded(words: Sequence[str]) -> list[str]:
    """Runs of equal words, or of equal groups of words, written once with their number."""
    folded: list[str] = []
    start = 0
    while start < len(words):
        size, times = max(_repeats(words, start), key=lambda found: found[0] * found[1] if found[1] > 1 else 0)
        if times > 1:
            group = ", ".join(words[start : start + size])
            folded.append(f"{times} x ({group})" if size > 1 else f"{times} x {group}")
            start += size * times
        else:
            folded.append(words[start])
            start += 1
    return folded


def _repeats(words: Sequence[str], start: int) -> Iterable[tuple[int, int]]:
    """(Size, times) of every group that begins at `start` and repeats."""
    for size in range(1, max((len(words) - start) // 2, 1) + 1):
        group = list(words[start : start + size])
        times = 1
        while list(words[start + times * size : start + (times + 1) * size]) == group:
            times += 1
        yield size, times


def chain_table(blocks: Iterable[ShownBlock], depth: int = 0) -> pd.DataFrame:
    """A table of a chain, those inside its branches included.

    Args:
        blocks: The blocks of a chain.
        depth: Depth of nesting of the chain.

    Returns:
        One row per block; see `resnet_paths.core.chain.ResidualChain.to_frame`.
    """
    rows: list[dict[Hashable, object]] = []
    for index, block in enumerate(blocks):
        nested = block.nested
        words = [
            f"chain of {len(nested[number])} blocks" if number in nested else contents(branch)
            for number, branch in enumerate(block.branches, start=1)
        ]
        shapes = [dimensions(shape) for shape in (block.in_shape, block.out_shape)]
        rows.append({
            "index": index,
            "block": block.name or "(unnamed)",
            "depth": depth,
            "stage": block.stage,
            "skip": block.skip_kind or "none",
            "before": contents(block.pre) if _does(block.pre) else "",
            "branch": " | ".join(words) if words else "deleted",
            "after": contents(block.post) if _does(block.post) else "",
            "num_branches": sum(map(bool, block.path_choices)),
            "weight_layers": weight_layers(block.branch),
            "parameters": sum(p.numel() for p in block.parameters()),
            "shape": shapes[0] if shapes[0] == shapes[1] else " -> ".join(shapes),
        })
        for inner in nested.values():
            rows += chain_table(inner, depth + 1).to_dict("records")
    return pd.DataFrame(rows)


def dimensions(shape: Sequence[int] | None) -> str:
    """A shape for people.

    Args:
        shape: Shape of a state, without the batch; None if not known.

    Returns:
        Such as ``"16x8x8"``.
    """
    return "?" if shape is None else "x".join(map(str, shape)) or "scalar"


def indented(table: pd.DataFrame) -> pd.DataFrame:
    """A table of a chain for people: the names of blocks inside branches indented, without columns for programs."""
    names = ["  " * depth + name for depth, name in zip(table["depth"], table["block"], strict=True)]
    return table.assign(block=names).drop(columns=["depth", "num_branches"])


def _does(part: nn.Module) -> bool:
    return not isinstance(part, nn.Identity)
