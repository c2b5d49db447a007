"""Which operations are weight layers, and their number on the longest route through a module.

Pooling in windows makes a branch as well, although it is no weight layer.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.fx import GraphModule, Node

from resnet_paths.core.parts import LinearCombination, Parallel

__all__ = ["CONVOLUTIONS", "is_weighted", "makes_branch", "weight_layers"]

_ATEN = torch.ops.aten
CONVOLUTIONS = {
    _ATEN.conv1d.default,
    _ATEN.conv2d.default,
    _ATEN.conv3d.default,
    _ATEN.conv1d.padding,
    _ATEN.conv2d.padding,
    _ATEN.conv3d.padding,
}
"""Convolutions that are not transposed."""

_OTHER_CONVOLUTIONS = {
    _ATEN.conv_transpose1d.default,
    _ATEN.conv_transpose2d.input,
    _ATEN.conv_transpose3d.input,
    _ATEN.convolution.default,
}
_PRODUCTS = {
    _ATEN.linear.default,
    _ATEN.addmm.default,
    _ATEN.mm.default,
    _ATEN.matmul.default,
    _ATEN.bmm.default,
    _ATEN.einsum.default,
}
_RECURRENT = {
    _ATEN.lstm.input,
    _ATEN.gru.input,
    _ATEN.rnn_tanh.input,
    _ATEN.rnn_relu.input,
    _ATEN.lstm.data,
    _ATEN.gru.data,
    _ATEN.rnn_tanh.data,
    _ATEN.rnn_relu.data,
}
_WEIGHTED = CONVOLUTIONS | _OTHER_CONVOLUTIONS | _PRODUCTS | _RECURRENT
_FOURIER = {
    "aten::fft_fft",
    "aten::fft_ifft",
    "aten::fft_rfft",
    "aten::fft_irfft",
    "aten::fft_fft2",
    "aten::fft_ifft2",
    "aten::fft_rfft2",
    "aten::fft_irfft2",
    "aten::fft_fftn",
    "aten::fft_ifftn",
    "aten::fft_rfftn",
    "aten::fft_irfftn",
    "aten::_fft_c2c",
    "aten::_fft_r2c",
    "aten::_fft_c2r",
}
_OTHERS = {"aten::scaled_dot_product_attention", "aten::_native_multi_head_attention", "aten::_grouped_mm"}
_POOLINGS = {
    _ATEN.avg_pool1d.default,
    _ATEN.avg_pool2d.default,
    _ATEN.avg_pool3d.default,
    _ATEN.max_pool1d.default,
    _ATEN.max_pool2d.default,
    _ATEN.max_pool3d.default,
}
_MODULES = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)


def is_weighted(node: Node) -> bool:
    """Whether a node mixes features as a weight layer does.

    These are convolutions of any kind, linear maps and other products of matrices, also of two activations, recurrent
    layers, attention and Fourier transforms. Normalisation, activations and products number by number are not.

    Args:
        node: A node of an exported graph.

    Returns:
        Whether the node makes the operand a branch.
    """
    if node.target in _WEIGHTED:
        return True
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    if name in _FOURIER or name in _OTHERS:
        return True
    # An operation of another library that reads a weight, such as a deformable convolution.
    is_foreign = bool(name) and not name.startswith(("aten::", "prim"))
    return is_foreign and any(source.op == "get_attr" for source in node.all_input_nodes)


def makes_branch(node: Node) -> bool:
    """Whether an operand of an addition is a branch if a node is in it: a weight layer, or pooling in windows.

    Activations and normalisations that add their input, such as Snake or GRN, are not branches.

    Args:
        node: A node of an exported graph.

    Returns:
        Whether the node makes the operand a branch.
    """
    return is_weighted(node) or node.target in _POOLINGS


@functools.singledispatch
def weight_layers(module: nn.Module | None) -> int:
    """Number of weight layers on the longest route through a module: convolutions and linear layers with parameters.

    The unit of the paper's abstract ("10-34 layers"). Products of two activations, as in attention, and operations that
    compute a weight from others, as in weight standardisation, do not count.

    Args:
        module: A branch; None for a deleted one.

    Returns:
        The number; for modules that are not exported graphs, of all such layers except parallel branches.
    """
    if module is None:
        return 0
    if isinstance(module, GraphModule):
        return _longest_route(module)
    inner = list(map(weight_layers, module.children()))
    if isinstance(module, LinearCombination | Parallel):
        return max(inner, default=0)
    return int(isinstance(module, _MODULES)) + sum(inner)


def _longest_route(module: GraphModule) -> int:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    depth: dict[Node, int] = {}  # of what varies with the inputs
    learned: set[Node] = set()  # parameters, and what is made of them alone
    for node in module.graph.nodes:
        sources = node.all_input_nodes
        varying = [depth[source] for source in sources if source in depth]
        if node.op == "placeholder" or (varying and node.target is not _ATEN.sym_size.int):
            depth[node] = max(varying, default=0) + (is_weighted(node) and _has_weight(node, learned))
        elif str(node.target) in parameters or any(source in learned for source in sources):
            learned.add(node)
    return max(depth.values(), default=0)


def _has_weight(node: Node, learned: set[Node]) -> bool:
    """Whether an operand of a convolution or product is learned, other than a bias."""
    if node.target in _RECURRENT:
        return any(operand in learned for operand in node.all_input_nodes)
    operands = node.args[1] if node.target is _ATEN.einsum.default else node.args
    assert isinstance(operands, tuple | list)  # of the operators above
    operands = operands[1:] if node.target is _ATEN.addmm.default else operands[:2]
    return any(operand in learned for operand in operands)
