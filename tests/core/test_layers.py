"""Weight layers: which operations are some, and how many stand on the longest route."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import Parallel
from resnet_paths.core.weight_layers import weight_layers


class Standardised(nn.Module):
    """A residual block whose kernel is made in the forward pass, as weight standardisation does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3))

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2), keepdim=True)
        return x + F.conv1d(F.relu(F.conv1d(x, w, padding=1)), w, padding=1)


class Fixed(nn.Module):
    """One weight layer between products that are none: by a fixed kernel, by one made of x, of two activations."""

    def __init__(self):
        super().__init__()
        self.conv, self.bias = nn.Conv1d(4, 4, 1), nn.Parameter(torch.randn(4))
        self.register_buffer("blur", torch.ones(4, 1, 3) / 3)

    def forward(self, x):
        y = self.conv(F.conv1d(x, self.blur, padding=1, groups=4))
        kernel = y.new_ones(4, 4, 1) + 0 * y.detach().sum()  # made of x: its value is the same for every batch
        return x + torch.softmax(F.conv1d(y, kernel, self.bias) @ y.transpose(1, 2), 2) @ y


class Around(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


def test_layers_of_a_kernel_made_in_the_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 1), Standardised(), Standardised(), Fixed()).eval()
    chain = rp.unravel(model, torch.randn(2, 2, 8))
    assert chain.length_polynomial("weight_layer") == [1, 1, 2, 2, 1, 1]  # (1 + t^2)^2 (1 + t)
    frame = chain.to_frame()
    assert frame.weight_layers.tolist() == [2, 2, 1]
    assert frame.branch[0] == "conv 3, relu, conv 3"
    assert "conv 3, relu, conv 3" in chain.summary()
    assert "conv 3, relu, conv 3" in chain._repr_html_()


@pytest.mark.parametrize(
    ("dims", "layers"),
    [
        (1, (nn.ConvTranspose1d(2, 2, 1), nn.Conv1d(2, 2, 3, padding="same"))),
        (3, (nn.ConvTranspose3d(2, 2, 1), nn.Conv3d(2, 2, 3, padding="same"))),
    ],
)
def test_convolutions_of_every_kind_count(dims, layers):
    model = nn.Sequential(*(Around(nn.Sequential(layer, nn.Tanh())) for layer in layers)).eval()
    chain = rp.unravel(model, torch.randn(2, 2, *[4] * dims))
    assert chain.length_polynomial("weight_layer") == [1, 2, 1]


def test_routes_through_modules_written_by_hand():
    def linear():
        return nn.Linear(4, 4)

    three = ResidualChain(linear(), [Block(linear(), nn.Identity(), name=str(i)) for i in range(3)], nn.Identity())
    projected = Block(nn.Identity(), nn.Sequential(linear(), linear()), pre=linear())
    side_by_side = Parallel([linear(), nn.Sequential(linear(), linear())])
    frame = ResidualChain(
        nn.Identity(), [Block(branch, nn.Identity()) for branch in (three, side_by_side)], nn.Identity()
    ).to_frame()
    assert frame[frame.depth == 0].weight_layers.tolist() == [4, 2]
    assert frame.branch.iloc[-1] == "Linear | 2 x Linear"
    assert [weight_layers(part) for part in (projected, nn.ModuleList([linear(), linear()]), None)] == [3, 2, 0]
