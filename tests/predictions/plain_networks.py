"""A small ResNet, a tiny ViT and a tiny GPT-2, and what happens in them when a branch is zeroed: PyTorch with hooks."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from tests.gradients.gradient_reference import seeded

WIDTH = 8


class Attention(nn.Module):
    """As models call it; torch has no second derivative of the fused kernel."""

    def __init__(self, causal):
        super().__init__()
        self.norm, self.projections = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.last, self.causal = nn.Linear(WIDTH, WIDTH), causal

    def forward(self, x):
        q, k, v = self.projections(self.norm(x)).unflatten(2, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        return self.last(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


def transformer_branches(num_layers, causal):
    return nn.ModuleList(
        branch
        for _ in range(num_layers)
        for branch in (
            Attention(causal),
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)),
        )
    )


class LanguageModel(nn.Module):
    """The logits of all tokens."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(9, WIDTH), nn.Parameter(torch.randn(6, WIDTH))
        self.branches = transformer_branches(2, causal=True)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 9, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for branch in self.branches:
            x = x + branch(x)
        return self.head(self.norm(x))

    @staticmethod
    def output_of(logits):
        return logits[:, -1, 3]

    def read(self, vectors, last):
        """The output as an affine map of the last state, the scale of the norm held; without its constant."""
        scale = (last.var(2, correction=0, keepdim=True) + self.norm.eps).sqrt()
        normal = (vectors - vectors.mean(2, keepdim=True)) / scale * self.norm.weight
        return (normal @ self.head.weight.T)[:, -1, 3]


class VisionTransformer(nn.Module):
    """The logits of five classes."""

    def __init__(self):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.branches = transformer_branches(2, causal=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(self.norm(x)[:, 0])

    @staticmethod
    def output_of(logits):
        return logits[:, 2]

    def read(self, vectors, last):
        scale = (last.var(2, correction=0, keepdim=True) + self.norm.eps).sqrt()
        normal = (vectors - vectors.mean(2, keepdim=True)) / scale * self.norm.weight
        return normal[:, 0] @ self.head.weight[2]


class ResNet(nn.Module):
    """Two stages of pre-activation blocks; the second begins with a projection."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
        self.projection = nn.Conv2d(4, 6, 1, 2)
        branches = [self.branch(4), self.branch(4), nn.Conv2d(4, 6, 3, 2, 1), self.branch(6)]
        self.branches = nn.ModuleList(branches)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 5)

    @staticmethod
    def branch(width):
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), convolutions[0], nn.ReLU(), convolutions[1])

    def forward(self, images):
        x = self.stem(images)
        for branch in self.branches[:2]:
            x = x + branch(x)
        shared = self.shared(x)
        x = self.projection(shared) + self.branches[2](shared)
        x = x + self.branches[3](x)
        return self.head(self.norm(x).relu().mean((2, 3)))

    @staticmethod
    def output_of(logits):
        return logits[:, 2]

    def read(self, vectors, last):
        """By autograd, at the last state; vectors of the first stage are not read."""
        leaf = last.detach().requires_grad_()
        logits = self.head(self.norm(leaf).relu().mean((2, 3)))
        (slope,) = torch.autograd.grad(self.output_of(logits).sum(), leaf)
        return (slope * vectors).sum((1, 2, 3))


@functools.cache
def made(name):
    """A model in float64, its chain, and inputs."""
    with seeded(9):
        if name == "gpt2":
            model, inputs = LanguageModel(), torch.randint(9, (4, 6))
        elif name == "vit":
            model, inputs = VisionTransformer(), torch.randn(4, 3, 8, 8).double()
        else:
            model, inputs = ResNet(), torch.randn(4, 3, 8, 8).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and scales
                parameter.data += 0.2 * torch.randn_like(parameter)
    model = model.double().eval()
    return model, rp.unravel(model, inputs, verify=False), inputs


@torch.no_grad()
def run(model, inputs, deleted=()):
    """The output, what each branch adds, and the last state, with some branches zeroed."""
    added, last, hooks = {}, [], []
    for index, branch in enumerate(model.branches):

        def keep(_module, _inputs, result, index=index):
            added[index] = torch.zeros_like(result) if index in deleted else result
            return added[index]

        hooks.append(branch.register_forward_hook(keep))
    hooks.append(model.norm.register_forward_pre_hook(lambda _module, given: last.append(given[0])))
    try:
        output = model.output_of(model(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return output, added, last[0]
