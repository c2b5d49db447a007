"""Layers and small models of each kind, for what is computed of their exported graphs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from resnet_paths.zoo import build_network


def function(forward, **parts):
    """A module of one expression, written f(m, x); parts are its submodules and parameters."""
    module = type("Function", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


class SqueezeAndExcitation(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x):
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(gate), inplace=True)))


class Attention(nn.Module):
    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.qkv, self.out, self.heads, self.causal = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            heads,
            causal,
        )

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Residual(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.f = nn.Sequential(*parts)

    def forward(self, x):
        return x + self.f(x)


def transformer():
    parts = []
    for _ in range(2):
        parts += [
            Residual(nn.LayerNorm(6), Attention(6, 2)),
            Residual(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)),
        ]
    pooled = function(lambda m, x: m.out(m.norm(x).mean(1)), out=nn.Linear(6, 3), norm=nn.LayerNorm(6))
    return nn.Sequential(nn.Linear(4, 6), *parts, pooled), (2, 5, 4)


def convolutional():
    parts = [
        Residual(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), SqueezeAndExcitation(4))
        for _ in range(3)
    ]
    pooled = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *parts, pooled), (2, 2, 5, 5)


def dense():
    class Layer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.f = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2, 3, padding=1))

        def forward(self, x):
            return torch.cat([x, self.f(x)], 1)

    return nn.Sequential(
        nn.Conv2d(2, 3, 1), *[Layer(3 + 2 * i) for i in range(4)], nn.Flatten(), nn.Linear(11 * 16, 3)
    ), (2, 2, 4, 4)


def preactivation():
    return build_network("preact-resnet-20", torch.Generator().manual_seed(0)), (2, 1, 8, 8)


def flat():
    parts = [Residual(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(2, 2, 1), *parts, nn.Flatten(), nn.Linear(50, 3)), (2, 2, 5, 5)
