"""Transposed Jacobians of real layers against autograd row by row; numbers of every size; any device."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.backward.adjoints import linearize
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.segments import Segment
from resnet_paths.gradients.points import Place
from resnet_paths.unraveling.tracing import trace
from resnet_paths.zoo import build_network
from tests.gradients.gradient_reference import (
    Elsewhere,
    OtherDevice,
    Recipe,
    assert_close,
    batch,
    build,
    by_length,
    detached_gradient,
    gated_gradients,
    seeded,
    vectors_of,
)

gradients_of = rp.gradient_by_path_length


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


# Whole models


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


@pytest.mark.parametrize("make", [transformer, convolutional, dense, preactivation])
def test_unraveled_models(make):
    with seeded():
        model, shape = make()
        inputs = torch.randn(shape, dtype=torch.float64)
    model = model.double().eval()
    targets = torch.arange(len(inputs))
    chain = rp.unravel(model, inputs)
    assert chain.num_paths == 2 ** len(chain) > 4
    found = by_length(chain, inputs, targets)
    gated = gated_gradients(chain, inputs, targets, len(chain))
    assert_close(torch.stack([found[k] for k in range(len(chain) + 1)]), gated.real.detach())
    leaf = inputs.clone().requires_grad_()
    (whole,) = torch.autograd.grad(F.cross_entropy(model(leaf), targets, reduction="sum"), leaf)
    assert_close(sum(found.values()), whole.flatten(1))
    paths = [p for k in (0, 1, 2, len(chain)) for p in rp.sample_paths(chain, k, 3, torch.Generator().manual_seed(0))]
    (point,) = Place.of(chain, "input").points(inputs, targets, None, 2**31, 1)
    for path, row in zip(paths, vectors_of(point.of_paths(paths)), strict=True):
        assert_close(row, detached_gradient(chain, inputs, targets, path).flatten(1))


def flat():
    parts = [Residual(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(2, 2, 1), *parts, nn.Flatten(), nn.Linear(50, 3)), (2, 2, 5, 5)


MODELS = [transformer, convolutional, dense, preactivation, flat]


@pytest.mark.parametrize("make", MODELS)
def test_unraveled_models_in_float32(make):
    with seeded():
        model, shape = make()
        inputs = torch.randn(shape)
    chain, targets = rp.unravel(model.eval(), inputs), torch.arange(len(inputs))
    single = gradients_of(chain, inputs, targets)
    double = gradients_of(copy.deepcopy(chain).double(), inputs.double(), targets)
    for name in ("summed_path_gradient_norm", "gradient_share"):
        assert_close(single[name], double[name], 1e-5)


def test_a_model_of_words():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            body, _ = transformer()
            self.embedding, self.body, self.head = nn.Embedding(11, 6), body[1:-1], body[-1]

        def forward(self, words):
            return self.head(self.body(self.embedding(words)))

    with seeded():
        model = Model().double().eval()
    words, targets = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0)), torch.arange(3)
    chain = rp.unravel(model, words)
    frame = gradients_of(chain, words, targets, with_respect_to="stem")
    leaf = model.embedding(words).detach().requires_grad_()
    losses = F.cross_entropy(model.head(model.body(leaf)), targets, reduction="sum")
    whole = torch.autograd.grad(losses, leaf)[0].flatten(1)
    found = by_length(chain, words, targets, "stem")
    assert_close(sum(found.values()), whole)
    assert_close(
        frame.gradient_share, [float(((v * whole).sum(1) / whole.square().sum(1)).mean()) for v in found.values()]
    )
    with pytest.raises(rp.ResnetPathsError, match=r"with_respect_to: .*torch.int64 have no gradient.*'stem'"):
        gradients_of(chain, words, targets)


# Numbers of every size


class Slope(nn.Module):
    """Zero, with this derivative: gradients of any size over states of an ordinary one."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, slope):
            ctx.slope = slope
            return torch.zeros_like(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.slope, None

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return self.Function.apply(x, self.slope)


def chain_of_slopes(slope, nested=False):
    """64 blocks: G_k is C(64, k) slope^k times the gradient of the path of skips."""
    blocks = [Block(Slope(slope), nn.Identity(), name=f"{i}") for i in range(64)]
    if nested:
        blocks = [Block(ResidualChain(nn.Identity(), blocks, nn.Identity()), None, name="all")]
    return ResidualChain(nn.Linear(5, 3), blocks, nn.Linear(3, 3)).eval()


def log(values):
    return np.log(np.where(np.asarray(values, float) > 0, values, 1))


@pytest.mark.parametrize(("slope", "nested"), [(1e-4, False), (1e-4, True), (1e3, False), (1e-7, False)])
def test_the_range_of_the_dtype_is_no_limit(slope, nested):
    chain, (inputs, targets) = chain_of_slopes(slope, nested), batch()
    lengths = np.arange(65)
    counts = np.array([math.log(math.comb(64, k)) for k in range(65)])
    energies = []
    for dtype, tolerance in ((torch.float16, 0.1), (torch.float32, 1e-5), (torch.float64, 1e-12)):
        if slope == 1e-7 and dtype == torch.float16:
            continue  # one step alone leaves its range
        exact, sampled, energy = (
            gradients_of(chain.to(dtype), inputs.to(dtype), targets, method=method, num_draws=2)
            for method in ("exact", "sampled", "energy")
        )
        first = exact.summed_path_gradient_norm[0]
        of_paths = lengths * math.log(slope) + math.log(first)
        for frame, name, expected in (
            (exact, "summed_path_gradient_norm", of_paths + counts),
            (sampled, "mean_path_gradient_norm", of_paths),
            (sampled, "total_gradient_magnitude", of_paths + counts),
        ):
            size = of_paths if frame is sampled else expected
            holds = size > math.log(1e-300)
            assert abs(log(frame[name]) - expected)[holds].max() < tolerance
            # What even a float64 cannot hold is told apart from what is nothing.
            assert not frame.underflowed[holds].any()
            assert frame.underflowed[size < math.log(5e-324) - 1].all()
            assert frame.underflowed.any() == (slope == 1e-7)
        shares = counts + lengths * math.log(slope) - 64 * math.log1p(slope)
        assert_close(exact.gradient_share, np.exp(shares), 10 * tolerance)
        assert ((energy.rms_path_gradient_norm > 0) != energy.underflowed).all()
        energies.append(energy.rms_path_gradient_norm[abs(of_paths + counts) < math.log(1e150)] / first)
    np.testing.assert_allclose(*energies[-2:], rtol=1e-4)


@pytest.mark.parametrize("kind", ["deleted", "skips alone", "pre and post"])
def test_no_part_of_a_block_loses_small_gradients(kind):
    """Thirty blocks whose skips, or whose pre and post, multiply gradients by a thousandth."""

    def small():
        linear = nn.Linear(3, 3)
        nn.init.orthogonal_(linear.weight, 1e-3)
        return linear

    with seeded():
        parts = {
            "deleted": lambda: {"branch": None, "skip": small()},
            "skips alone": lambda: {"branch": nn.Linear(3, 3), "skip": small()},
            "pre and post": lambda: {"branch": nn.Linear(3, 3), "skip": nn.Identity(), "pre": small(), "post": small()},
        }[kind]
        chain = ResidualChain(nn.Linear(5, 3), [Block(**parts(), name=f"{i}") for i in range(30)], nn.Linear(3, 3))
    inputs, targets = batch()
    limit = 0 if kind == "skips alone" else None
    single = gradients_of(chain.eval(), inputs.float(), targets, max_length=limit)
    double = gradients_of(chain.double(), inputs, targets, max_length=limit)
    assert double.summed_path_gradient_norm[0] < 1e-80
    for name in ("summed_path_gradient_norm", "gradient_share"):
        np.testing.assert_allclose(single[name], double[name], rtol=1e-3)


def test_nothing_assumes_the_cpu(monkeypatch):
    make = torch.tensor
    # torch.tensor makes nothing but a shape on "meta".
    monkeypatch.setattr(torch, "tensor", lambda data, device="cpu", **o: make(data, **o).to(device))
    nested = (Recipe(2, "identity"), Recipe(2, "identity", post=True))
    recipe = (
        Recipe(3, "identity", nested, pre=True),
        Recipe(2, "projection", 2, post=True),
        Recipe(2, "concat"),
        Recipe(4, "none"),
        Recipe(3, "identity", "scaled"),
    )
    pairs = build((Recipe(2, "projection"), Recipe(2, "identity")), of_pairs=True)
    with seeded():
        model, shape = convolutional()
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = rp.unravel(model.double().eval(), image)
    studies = [functools.partial(gradients_of, method=method, num_draws=3) for method in ("exact", "energy", "sampled")]
    studies += [
        functools.partial(gradients_of, with_respect_to=("parameters", 1)),
        rp.gradient_by_stage_lengths,
        rp.gradient_through_block,
    ]
    for chain, inputs in ((build(recipe), batch()[0]), (pairs, batch()[0]), (images, image)):
        targets = torch.arange(len(inputs))
        expected = [study(chain, inputs, targets) for study in studies]
        for module in chain.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: Elsewhere(t.detach()) for name, t in tensors.items() if t is not None})
        with OtherDevice():
            for study, frame in zip(studies, expected, strict=True):
                found = study(chain, Elsewhere(inputs), Elsewhere(targets))
                pd.testing.assert_frame_equal(found, frame, rtol=1e-9)
            # Inputs are moved; what a loss brings along from the CPU is told apart from them.
            pd.testing.assert_frame_equal(studies[0](chain, inputs, targets), expected[0], rtol=1e-9)
            with pytest.raises(RuntimeError, match="mixes devices"):
                gradients_of(chain, inputs, targets, loss=lambda z, _: z @ torch.ones(3, dtype=torch.float64))
