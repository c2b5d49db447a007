"""Gates, attention weights and denominators held: against the same network written out with `Tensor.detach`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from tests.gradients.gradient_reference import batch, seeded
from tests.predictions.enumeration import assert_all_equal

WIDTH = 12


class Branch(nn.Module):
    """A branch in two forms: as models write it, and with what is held detached."""

    def __init__(self, kind, held=False):
        super().__init__()
        self.kind, self.held = kind, held
        self.one, self.two, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.conv = nn.Conv1d(3, 3, 1)

    def forward(self, x):
        return self.last(getattr(self, self.kind + ("_held" if self.held else ""))(x))

    def layer_norm(self, x):
        return F.layer_norm(x, (WIDTH,), self.weight, self.bias, 1e-3)

    def layer_norm_held(self, x):
        scale = (x.var(1, correction=0, keepdim=True) + 1e-3).sqrt().detach()
        return (x - x.mean(1, keepdim=True)) / scale * self.weight + self.bias

    def group_norm(self, x):
        return F.group_norm(x.reshape(-1, 4, 3), 2, self.weight[:4], self.bias[:4]).flatten(1)

    def group_norm_held(self, x):
        groups = x.reshape(-1, 2, 6)
        scale = (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt().detach()
        normal = ((groups - groups.mean(2, keepdim=True)) / scale).reshape(-1, 4, 3)
        return (normal * self.weight[:4, None] + self.bias[:4, None]).flatten(1)

    def rms_norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def rms_norm_held(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5).detach()

    def fused_rms_norm(self, x):
        return F.rms_norm(x, (WIDTH,), self.weight, 1e-5)

    fused_rms_norm_held = rms_norm_held

    def gelu(self, x):
        return F.gelu(self.one(x))

    def gelu_held(self, x):
        x = self.one(x)
        return x * (0.5 * (1 + torch.erf(x / math.sqrt(2)))).detach()

    def written_gelu(self, x):
        x = self.one(x)
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))

    def written_gelu_held(self, x):
        x = self.one(x)
        return x * (0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))).detach()

    def gated(self, x):
        return F.silu(self.one(x)) * self.two(x)

    def gated_held(self, x):
        gate = self.one(x)
        return (gate * gate.sigmoid()).detach() * self.two(x)

    def silu(self, x):
        return F.silu(self.one(x))

    def silu_held(self, x):
        x = self.one(x)
        return x * x.sigmoid().detach()

    def squeeze(self, x):
        return x * torch.sigmoid(self.one(F.relu(self.two(x)))).unsqueeze(-1).flatten(1)

    def squeeze_held(self, x):
        return x * torch.sigmoid(self.one(F.relu(self.two(x)))).detach()

    def wavenet(self, x):
        return torch.tanh(self.one(x)) * torch.sigmoid(self.two(x))

    def wavenet_held(self, x):
        content = self.one(x)
        return content * (torch.tanh(content) / content).detach() * torch.sigmoid(self.two(x)).detach()

    def bilinear(self, x):
        return self.one(x) * self.two(x)

    def bilinear_held(self, x):
        one, two = self.one(x), self.two(x)
        return (one * two.detach() + one.detach() * two) / 2

    def attention(self, x):
        q, k, v = (f(x).reshape(-1, 1, 3, 4) for f in (self.one, self.two, self.last))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(1)

    def written_attention(self, x):
        q, k, v = (f(x).reshape(-1, 3, 4) for f in (self.one, self.two, self.last))
        scores = q @ k.transpose(1, 2) / 2 + torch.full((3, 3), -torch.inf, dtype=x.dtype).triu(1)
        return (F.dropout(scores.softmax(-1), 0.1, self.training) @ v).flatten(1)

    def attention_held(self, x):
        q, k, v = (f(x).reshape(-1, 3, 4) for f in (self.one, self.two, self.last))
        scores = q @ k.transpose(1, 2) / 2 + torch.full((3, 3), -torch.inf, dtype=x.dtype).triu(1)
        return (scores.softmax(-1).detach() @ v).flatten(1)

    written_attention_held = attention_held


KINDS = [
    *("layer_norm", "group_norm", "rms_norm", "fused_rms_norm", "gelu", "written_gelu", "silu", "gated", "squeeze"),
    *("wavenet", "bilinear", "attention", "written_attention"),
]


def chain_of(kinds, held=False):
    with seeded(2):
        blocks = [Block(Branch(kind, held), nn.Identity(), name=f"block{i}") for i, kind in enumerate(kinds)]
        return ResidualChain(nn.Linear(5, WIDTH), blocks, nn.Linear(WIDTH, 3)).double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_is_what_detach_gives(kind):
    chain = chain_of([kind, kind])
    assert_all_equal(chain, batch(2)[0], twin=chain_of([kind, kind], held=True), linearization="detached")
    frame = rp.prediction_by_path_length(chain, batch(2)[0], linearization="detached")
    assert frame.attrs["tangent_operations"] == []


def test_rules_in_exported_graphs():
    """The same through `unravel`, whose parts are exported graphs."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
            self.branches = nn.ModuleList(Branch(kind) for kind in KINDS)

        def forward(self, x):
            x = self.stem(x)
            for branch in self.branches:
                x = x + branch(x)
            return self.head(x)

    model = Model().double().eval()
    inputs = batch(2)[0]
    chain = rp.unravel(model, inputs, verify=False)
    blocks = [Block(branch, nn.Identity(), name=f"block{i}") for i, branch in enumerate(model.branches)]
    by_hand = ResidualChain(model.stem, blocks, model.head).eval()
    frames = [rp.prediction_by_path_length(c, inputs, linearization="detached") for c in (chain, by_hand)]
    assert len(chain) == len(KINDS)
    assert frames[0].attrs["tangent_operations"] == []
    torch.testing.assert_close(*(torch.tensor(frame.contribution) for frame in frames), rtol=0, atol=1e-12)


def test_piecewise_linear_networks_have_one_split():
    def branch():
        layers = [nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.1), nn.Linear(WIDTH, WIDTH)]
        return nn.Sequential(*layers, nn.Unflatten(1, (1, WIDTH)), nn.MaxPool1d(3, 1, 1), nn.Flatten())

    with seeded(3):
        blocks = [Block(branch(), nn.Identity(), post=nn.ReLU(), name=f"block{i}") for i in range(4)]
        chain = ResidualChain(nn.Linear(5, WIDTH), blocks, nn.Linear(WIDTH, 3)).double().eval()
    frames = [
        rp.prediction_by_path_length(chain, batch(6)[0], by_source=True, linearization=name)
        for name in ("tangent", "detached")
    ]
    torch.testing.assert_close(*(torch.tensor(frame.contribution) for frame in frames), rtol=0, atol=1e-12)
    assert frames[1].attrs["tangent_operations"] == []


def test_operations_without_a_rule_are_named():
    with seeded(4):
        blocks = [Block(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softplus()), nn.Identity(), name="block0")]
        chain = ResidualChain(nn.Linear(5, WIDTH), blocks, nn.Linear(WIDTH, 3)).double().eval()
    tangent = rp.prediction_by_path_length(chain, batch(6)[0])
    detached = rp.prediction_by_path_length(chain, batch(6)[0], linearization="detached")
    assert detached.attrs["tangent_operations"] == ["softplus"]
    assert (tangent.contribution - detached.contribution).abs().max() < 1e-12
