"""Which operations are weight layers, and their number on the longest route through a module.

Pooling in windows makes a branch as well, although it is no weight layer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from resnet_paths.core.parts import LinearCombination, Parallel

__all__ = ["CONVOLUTIONS", "is_product", "is_weighted", "makes_branch", "weight_layers"]

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

# Names of ATen operations, whatever their overload.
_WITH_BIAS = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
    *("conv_tbc", "linear", "bilinear"),
}
_PRODUCTS = {
    *("mm", "mv", "bmm", "matmul", "linalg_matmul", "einsum", "tensordot", "inner", "dot", "vdot", "linalg_vecdot"),
    *("chain_matmul", "linalg_multi_dot", "_grouped_mm", "scaled_dot_product_attention"),
}
_ADDED_TO = {"addmm", "addmv", "addbmm", "baddbmm"}
_RECURRENT = {
    *("lstm", "gru", "rnn_tanh", "rnn_relu"),
    *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
}
_FOURIER = {
    *("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft"),
    *("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_hfft2", "fft_ihfft2"),
    *("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "fft_hfftn", "fft_ihfftn"),
    *("_fft_c2c", "_fft_r2c", "_fft_c2r", "stft", "istft"),
}
_WEIGHTED = _WITH_BIAS | _PRODUCTS | _ADDED_TO | _RECURRENT | _FOURIER | {"_native_multi_head_attention"}
_OF_LISTS = {"einsum": 1, "chain_matmul": 0, "linalg_multi_dot": 0}
_POOLINGS = {
    _ATEN.avg_pool1d.default,
    _ATEN.avg_pool2d.default,
    _ATEN.avg_pool3d.default,
    _ATEN.max_pool1d.default,
    _ATEN.max_pool2d.default,
    _ATEN.max_pool3d.default,
}
_MODULES = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)


def is_weighted(node: Node) -> bool:
    """Whether a node mixes features as a weight layer does.

    These are convolutions of any kind, linear and bilinear maps and other products of matrices, also of two
    activations, recurrent layers and their cells, attention and Fourier transforms. Normalisation, activations and
    products number by number are not.

    Args:
        node: A node of an exported graph.

    Returns:
        Whether the node makes the operand a branch.
    """
    namespace, name = _name_of(node)
    if namespace == "aten":
        return name in _WEIGHTED
    # An operation of another library that reads a weight, such as a deformable convolution.
    is_foreign = bool(name) and not namespace.startswith("prim")
    return is_foreign and any(source.op == "get_attr" for source in node.all_input_nodes)


def is_product(node: Node) -> bool:
    """Whether a node multiplies what it reads, and adds none of it to the product.

    These are products of matrices or vectors, also of a signal and a kernel that is computed, and attention.

    Args:
        node: A node of an exported graph.

    Returns:
        Whether the node is a product.
    """
    namespace, name = _name_of(node)
    return namespace == "aten" and name in _PRODUCTS | _WITH_BIAS and not _adds_inputs(node, name)


def _name_of(node: Node) -> tuple[str, str]:
    """The library and the name of a node's operation, ``("aten", "linear")``; empty where it is no operator."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return "", ""
    namespace, _, name = node.target._schema.name.partition("::")
    return namespace, name


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
    return any(operand in learned for operand in _factors(node))


def _factors(node: Node) -> Sequence[Node]:
    """What a weight layer multiplies; its bias, or what it adds its product to, is left out."""
    _, name = _name_of(node)
    if name in _RECURRENT:
        return node.all_input_nodes
    operands: Any = node.args
    if name in _OF_LISTS:
        operands = operands[_OF_LISTS[name]]
    elif name in _ADDED_TO:
        operands = operands[1:3]
    else:
        operands = operands[: _place_of_bias(name)]
    return [operand for operand in operands if isinstance(operand, Node)]


def _place_of_bias(name: str) -> int:
    return 3 if name == "bilinear" else 2


def _adds_inputs(node: Node, name: str) -> bool:
    """Whether a layer's bias may depend on the inputs."""
    place = _place_of_bias(name)
    bias = node.args[place] if len(node.args) > place else node.kwargs.get("bias")
    return name in _WITH_BIAS and isinstance(bias, Node) and bias.op != "get_attr"
