"""Layers other than linear maps and convolutions: in branches, they make blocks, and products may stand anywhere.

Every expected value is made in plain PyTorch, by the network's own function with a branch left out.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from tests.unraveling.networks import WIDTH, draw, linear, linears, network, without
from tests.unraveling.test_faults import close, names_in


def matrix(*shape):
    return lambda: nn.Parameter(torch.randn(*shape or (WIDTH, WIDTH)))


LAYERS = {
    "bilinear": (lambda: nn.Bilinear(WIDTH, WIDTH, WIDTH), lambda layer, x: layer(x, x)),
    "GRU cell": (lambda: nn.GRUCell(WIDTH, WIDTH), lambda layer, x: layer(x)),
    "LSTM cell": (lambda: nn.LSTMCell(WIDTH, WIDTH), lambda layer, x: layer(x)[0]),
    "RNN cell": (lambda: nn.RNNCell(WIDTH, WIDTH), lambda layer, x: layer(x)),
    "tensordot": (matrix(), lambda layer, x: torch.tensordot(x, layer, dims=1)),
    "inner": (matrix(), lambda layer, x: torch.inner(x, layer)),
    "matrix and vector": (matrix(WIDTH), lambda layer, x: torch.mv(x, layer)[:, None]),
    "vecdot": (matrix(), lambda layer, x: torch.linalg.vecdot(x[:, None], layer)),
    "baddbmm": (
        matrix(1, WIDTH, WIDTH),
        lambda layer, x: torch.baddbmm(layer[:, :1], x[:, None], layer.expand(x.shape[0], -1, -1))[:, 0],
    ),
    "Fourier": (matrix(WIDTH), lambda layer, x: torch.fft.hfft(x * layer, n=WIDTH)),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_branch_of_any_layer_makes_a_block(name):
    make, call = LAYERS[name]

    def run(self, x, add=torch.add):
        x = self.stem(x)
        x = add(x, self.f[0](x).relu())
        x = add(x, call(self.layer, x).tanh())
        return self.head(add(x, self.f[1](x).relu()))

    model, x = network(run, stem=linear(), f=linears(2), layer=make, head=linear()), draw(4, WIDTH)
    chain = rp.unravel(model, x)
    assert names_in(chain)[::2] == ["f.0", "f.1"]
    assert len(chain) == 3
    with torch.no_grad():
        close(chain(x), model(x))
        for index, block in enumerate(chain):
            close(rp.delete_block(chain, block.name)(x), model(x, add=without(index)))
    # A Fourier transform has no weights: (1 + t)^2 (1 + 1).
    assert chain.length_polynomial("weight_layer") == ([2, 4, 2] if name == "Fourier" else [1, 3, 3, 1])


@pytest.mark.parametrize("call", [None, torch.linalg.vecdot], ids=["bilinear", "vecdot"])
def test_a_head_may_multiply_what_two_layers_return(call):
    def run(self, x, add=torch.add):
        x = self.stem(x)
        for f in self.f:
            x = add(x, f(x).relu())
        return (call or self.both)(self.a(x), self.b(x))

    parts = {"a": linear(), "b": linear(), "both": lambda: nn.Bilinear(WIDTH, WIDTH, 2)}
    model, x = network(run, stem=linear(), f=linears(2), **parts), draw(4, WIDTH)
    chain = rp.unravel(model, x)
    with torch.no_grad():
        close(chain(x), model(x))
        for index in range(2):
            close(rp.delete_block(chain, index)(x), model(x, add=without(index)))


def test_a_convolution_whose_kernel_is_computed_may_stand_between_blocks():
    def mixed(self, x):
        """A convolution with a mixture of kernels for each example, as CondConv's."""
        kernel = (self.router(x.mean(2)).softmax(-1) @ self.kernels.flatten(1)).view(-1, WIDTH, 1)
        signal = x.reshape(1, -1, x.shape[-1])
        return F.conv1d(signal, kernel, groups=signal.shape[1] // WIDTH).reshape(x.shape[0], WIDTH, -1)

    def run(self, x, add=torch.add):
        x = add(x, self.f[0](x.mT).mT.relu())
        x = mixed(self, x).relu()
        return add(x, self.f[1](x.mT).mT.relu()).mean(2)

    model = network(run, f=linears(2), router=linear(WIDTH, 3), kernels=matrix(3, WIDTH, WIDTH))
    x = draw(4, WIDTH, 5)
    chain = rp.unravel(model, x)
    assert names_in(chain) == ["f.0", "f.1"]
    with torch.no_grad():
        close(chain(x), model(x))
        for index in range(2):
            close(rp.delete_block(chain, index)(x), model(x, add=without(index)))
