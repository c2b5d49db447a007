"""Transposed Jacobians of real layers against autograd, row by row."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resnet_paths.core.backward.linearize import linearize
from resnet_paths.core.segments import Segment
from resnet_paths.unraveling.tracing import trace
from tests.gradients.gradient_reference import (
    assert_close,
    seeded,
)
from tests.gradients.models import Attention, SqueezeAndExcitation, function, parameter


class TwoWays(nn.Module):
    """A residual addition inside, one value read three times, and an operation in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)))
        z = self.second(y)
        z += y
        return F.relu_(z * y + x) - y


def attention():
    return function(lambda m, x: m.f(x, x, x, need_weights=False)[0], f=nn.MultiheadAttention(6, 2, batch_first=True))


IMAGE, LINE, VOLUME, TOKENS, FLAT = (3, 4, 7, 6), (3, 4, 11), (2, 4, 5, 6, 5), (3, 5, 6), (3, 5)
LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), LINE),
    "conv1d circular": (lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), LINE),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), IMAGE),
    "conv2d strided": (lambda: nn.Conv2d(4, 6, 3, stride=2), IMAGE),
    "conv2d uneven": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(3, 2), padding=(2, 0), dilation=(1, 3)), IMAGE),
    "conv2d far": (lambda: nn.Conv2d(4, 6, 1, stride=4, bias=False), IMAGE),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), IMAGE),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (3, 4), padding="same"), IMAGE),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE),
    "conv3d": (lambda: nn.Conv3d(4, 2, (3, 2, 3), stride=(2, 1, 2), padding=1, groups=2), VOLUME),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1), LINE),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2), IMAGE),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 2, 2, stride=2), VOLUME),
    "linear": (lambda: nn.Linear(5, 4), FLAT),
    "linear on tokens": (lambda: nn.Linear(6, 4, bias=False), TOKENS),
    "bilinear": (lambda: function(lambda m, x: m.f(x, x * 2), f=nn.Bilinear(5, 5, 3)), FLAT),
    "addmm": (lambda: function(lambda m, x: torch.addmm(m.b, x, m.w), w=parameter(5, 4), b=parameter(4)), FLAT),
    "matmul, einsum": (
        lambda: function(lambda m, x: torch.einsum("bij,jk->bki", x @ x.mT, m.w), w=parameter(5, 4)),
        TOKENS,
    ),
    "batch norm 1d": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Tanh()), FLAT),
    "batch norm of sequences": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(inplace=True)), LINE),
    "batch norm 2d": (lambda: nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1)), IMAGE),
    "batch norm alone": (lambda: nn.BatchNorm2d(4), IMAGE),
    "batch norm 3d": (
        lambda: nn.Sequential(nn.BatchNorm3d(4), nn.ReLU(inplace=True), nn.BatchNorm3d(4), nn.ReLU()),
        VOLUME,
    ),
    "layer norm": (lambda: nn.LayerNorm(6), TOKENS),
    "layer norm of images": (lambda: nn.LayerNorm((4, 7, 6)), IMAGE),
    "rms norm": (lambda: nn.RMSNorm(6), TOKENS),
    "group norm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "activations": (
        lambda: nn.Sequential(
            nn.GELU(),
            nn.SiLU(),
            nn.Hardswish(),
            nn.GELU("tanh"),
            nn.Softplus(),
            nn.ELU(inplace=True),
            nn.Mish(),
            nn.LeakyReLU(0.1),
            nn.Sigmoid(),
            nn.Tanh(),
        ),
        IMAGE,
    ),
    "clipped": (lambda: nn.Sequential(nn.ReLU6(), nn.Hardtanh(-0.5, 0.5), nn.Hardsigmoid()), IMAGE),
    "prelu": (lambda: nn.PReLU(4), IMAGE),
    "glu": (lambda: nn.GLU(1), IMAGE),
    "maxout": (lambda: function(lambda m, x: torch.maximum(x, -0.5 * x).minimum(m.w), w=parameter(4, 1, 1)), IMAGE),
    "own broadcast": (
        lambda: function(lambda m, x: x * m.w + x.mean(1, keepdim=True) / (1 + x.square()), w=parameter(4, 1, 6)),
        IMAGE,
    ),
    "read often": (lambda: function(lambda m, x: x * x + x.abs() * torch.where(x > 0, 2 * x, x.detach())), IMAGE),
    "squeeze and excitation": (lambda: SqueezeAndExcitation(4), IMAGE),
    "residual inside": (TwoWays, IMAGE),
    "max pool": (lambda: nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), IMAGE),
    "max pool 1d": (lambda: nn.MaxPool1d(2), LINE),
    "average pool": (lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), IMAGE),
    "adaptive average pool": (lambda: nn.AdaptiveAvgPool2d((3, 4)), IMAGE),
    "adaptive max pool": (lambda: nn.AdaptiveMaxPool2d((3, 4)), IMAGE),
    "mean, flatten": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), IMAGE),
    "softmax": (lambda: nn.Sequential(nn.Softmax(-1), nn.LogSoftmax(1)), TOKENS),
    "attention": (lambda: Attention(6, 2), TOKENS),
    "causal attention": (lambda: Attention(6, 3, causal=True), TOKENS),
    "multihead attention": (attention, TOKENS),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 7, 0.1, F.gelu, batch_first=True, norm_first=True),
        TOKENS,
    ),
    "cat, split, chunk": (
        lambda: function(
            lambda m, x: torch.cat([*(t * x.split([1, 3], 1)[0] for t in x.chunk(2, 1)), x.split([1, 3], 1)[1]], 1)
        ),
        IMAGE,
    ),
    "unbind, stack": (
        lambda: function(lambda m, x: torch.stack([(i + 1) * t for i, t in enumerate(x.unbind(-1))], -2)),
        TOKENS,
    ),
    "unused pieces": (
        lambda: function(lambda m, x: x.split(2, -1)[1] + x[..., -1:] * x.select(-1, 0)[..., None]),
        TOKENS,
    ),
    "shapes": (
        lambda: function(
            lambda m, x: (
                x
                .reshape(x.shape[0], -1, 2)
                .transpose(-1, -2)
                .flip(-1)
                .roll(1, -1)
                .contiguous()
                .view(x.shape[0], 2, -1)[:, :, ::2]
                .repeat(1, 2, 1)
                .permute(0, 2, 1)
            )
        ),
        IMAGE,
    ),
    "pad, unfold, shuffle": (
        lambda: function(lambda m, x: F.pixel_shuffle(F.pad(x, (1, 1, -1, 2)), 2).unfold(-1, 3, 2)),
        IMAGE,
    ),
    "interpolate": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "cumulative": (
        lambda: function(lambda m, x: x.cumsum(-1) + x.logsumexp(-1, keepdim=True) + x.std(-1)[..., None]),
        TOKENS,
    ),
    "index": (lambda: function(lambda m, x: x[:, [2, 0, 0]] + x.index_select(1, torch.tensor([1, 1, 3]))), TOKENS),
    "buffers": (
        lambda: function(lambda m, x: torch.tril(x[..., :5]) @ m.w.masked_fill(m.w > 0, 0), w=parameter(5, 5)),
        TOKENS,
    ),
    "change of dtype": (lambda: function(lambda m, x: x.to(torch.float32).tanh().to(x.dtype) * x), TOKENS),
    "spectrum": (lambda: function(lambda m, x: torch.fft.rfft(x, dim=-1).abs()), TOKENS),
    "no dependence": (lambda: function(lambda m, x: m.w * x.detach() + 0 * x, w=parameter(6)), TOKENS),
    "identity": (lambda: function(lambda m, x: x.view_as(x)), TOKENS),
    "maximum over channels": (lambda: function(lambda m, x: x * torch.sigmoid(x.max(1, keepdim=True)[0])), IMAGE),
    "sort": (lambda: function(lambda m, x: x.sort(-1)[0] * x.topk(2, -1)[0].sum(-1, keepdim=True)), TOKENS),
    "argmax": (lambda: function(lambda m, x: x * m.w[x.argmax(-1)], w=parameter(6, 6)), TOKENS),
    "addmm with factors": (
        lambda: function(lambda m, x: torch.addmm(m.b, x, m.w, alpha=2, beta=3), w=parameter(5, 4), b=parameter(4)),
        FLAT,
    ),
    "linear to a number": (lambda: function(lambda m, x: F.linear(x, m.w), w=parameter(5)), FLAT),
    "complex": (lambda: function(lambda m, x: torch.exp(1j * x).real), TOKENS),
}


def exported(name, dtype=torch.float64):
    """A layer with random weights and statistics, its graph as a segment, and inputs."""
    make, shape = LAYERS[name]
    with seeded():
        model = nn.Sequential(make()).to(dtype).eval()
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(part.running_mean)
                nn.init.uniform_(part.running_var, 0.5, 2.0)
        inputs = torch.randn(shape, dtype=dtype)
    traced = trace(model, (inputs,))
    return model, traced.segment(traced.inputs[0], traced.output), inputs


def row_by_row(model, inputs, cotangents):
    leaf = inputs.clone().requires_grad_()
    output = model(leaf)
    rows = [torch.autograd.grad(output, leaf, v, retain_graph=True, materialize_grads=True)[0] for v in cotangents]
    return output.detach(), torch.stack(rows)


def random_cotangents(output, num_rows=5):
    return torch.randn(num_rows, *output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_pulling_back_a_stack_is_autograd_row_by_row(name):
    model, segment, inputs = exported(name)
    assert isinstance(segment, nn.Identity if name == "identity" else Segment)
    kept = inputs.clone()
    output, pullback = linearize(segment, inputs)
    cotangents = random_cotangents(output)
    expected, rows = row_by_row(model, inputs, cotangents)
    assert_close(output, expected, 1e-12)
    for stack in (cotangents, cotangents[:1], cotangents):  # may be called any number of times
        given = stack.clone()
        assert_close(pullback(given), rows[: len(stack)], scale=max(float(rows.abs().max()), 1e-300))
        assert torch.equal(given, stack)  # and leaves what it is given alone
    assert torch.equal(inputs, kept)
    # Other examples change nothing.
    alone = linearize(segment, inputs[1:2])[1](cotangents[:, 1:2])
    assert_close(alone, rows[:, 1:2], scale=max(float(rows.abs().max()), 1e-300))


IMAGE_LAYERS = "conv2d; conv2d uneven; conv2d depthwise; transposed2d; batch norm 2d; residual inside; max pool; glu"


@pytest.mark.parametrize("name", IMAGE_LAYERS.split("; "))
def test_images_in_float32_with_channels_last(name):
    model, segment, inputs = exported(name, torch.float32)
    for given in (inputs, inputs.contiguous(memory_format=torch.channels_last)):
        output, pullback = linearize(segment, given)
        cotangents = random_cotangents(output)
        _, rows = row_by_row(copy.deepcopy(model).double(), inputs.double(), cotangents.double())
        found = pullback(cotangents)
        assert found.dtype == torch.float32
        assert_close(found, rows, 1e-5)
        if output.dim() == 4:
            last = cotangents.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (5, -1))
            assert_close(pullback(last), rows, 1e-5)


@pytest.mark.parametrize("name", ["conv2d uneven", "residual inside", "attention", "batch norm 3d", "activations"])
def test_parts_that_are_no_exported_graph(name):
    model, _, inputs = exported(name)
    for module in (model, model[0]):  # in series, and as a whole
        kept = inputs.clone()
        output, pullback = linearize(module, inputs)
        expected, rows = row_by_row(model, inputs, random_cotangents(output))
        assert_close(output, expected, 1e-12)
        assert_close(pullback(random_cotangents(output)), rows)
        assert torch.equal(inputs, kept)
