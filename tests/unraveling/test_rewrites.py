"""Rewrites of an exported graph: each way to write ``x + f(x)`` is a block with an identity skip.

What a form computes is written here a second time, as a branch and what follows the addition. Deletions are compared
with a model without the branch; gradients by length with one backward pass per path, with all other sides detached.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths._utils.errors import ResnetPathsError
from tests.chains import inputs


class Net(nn.Module):
    """A stem, three steps on a state [batch, 4], a head; each step may use layers f and g and a matrix w."""

    def __init__(self, step, depth=3):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(depth))
        self.g = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.w = nn.ParameterList(torch.randn(4, 4) for _ in range(depth))
        self.step = step

    def layers(self):
        return zip(self.f, self.g, self.w, strict=True)

    def forward(self, x):
        x = self.inp(x)
        for layers in self.layers():
            x = self.step(x, *layers)
        return self.out(x)


def build(step):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(step).double().eval()


def same(x):
    return x


@dataclass(frozen=True)
class Form:
    """A step ``written(h, f, g, w)`` on h = before(x), which is ``after(h + branch(h, f, g, w))``."""

    written: Callable
    branch: Callable
    before: Callable = same
    after: Callable = same
    exact: bool = True  # whether the rewrite keeps every bit

    def step(self, x, f, g, w):
        return self.written(self.before(x), f, g, w)


def on_matrices(written, after, exact=True):
    """A form in which h is [batch, 2, 2]."""

    def branch(h, f):
        return f(h.flatten(1)).reshape(-1, 2, 2)

    return Form(
        lambda h, f, g, w: written(h, lambda value: branch(value, f)),
        lambda h, f, g, w: branch(h, f),
        before=lambda x: x.view(-1, 2, 2).sin(),
        after=after,
        exact=exact,
    )


def flat(h):
    return h.flatten(1)


def transposed(h):
    return h.transpose(1, 2)


def f_alone(h, f, g, w):
    return f(h)


FORMS = {
    "sum": Form(lambda h, f, g, w: sum([h, f(h)]), f_alone),
    "stack and sum": Form(lambda h, f, g, w: torch.stack([h, f(h)]).sum(0), f_alone),
    "stack and sum at the end": Form(lambda h, f, g, w: torch.stack([f(h), h], -1).sum(2), f_alone),
    "stack and mean": Form(lambda h, f, g, w: torch.stack([h, f(h)], 1).mean(1), f_alone, after=lambda y: y / 2),
    "alpha": Form(lambda h, f, g, w: torch.add(h, f(h), alpha=0.3), lambda h, f, g, w: 0.3 * f(h), exact=False),
    "alpha of -1": Form(lambda h, f, g, w: torch.add(h, f(h), alpha=-1), lambda h, f, g, w: -f(h)),
    "difference": Form(lambda h, f, g, w: h - f(h), lambda h, f, g, w: -f(h)),
    "difference in place": Form(lambda h, f, g, w: h.clone().sub_(f(h), alpha=2), lambda h, f, g, w: -2 * f(h)),
    "difference from the right": Form(lambda h, f, g, w: torch.rsub(f(h), h), lambda h, f, g, w: -f(h)),
    "times 1": Form(lambda h, f, g, w: 1.0 * h + f(h) / 1, f_alone),
    "lerp": Form(lambda h, f, g, w: h.lerp(f(h), 0.3), lambda h, f, g, w: 0.3 * (f(h) - h), exact=False),
    "lerp backwards": Form(lambda h, f, g, w: f(h).lerp(h, 0.3), lambda h, f, g, w: 0.7 * (f(h) - h), exact=False),
    "lerp by a gate": Form(
        lambda h, f, g, w: h.lerp(f(h), g(h).sigmoid()), lambda h, f, g, w: g(h).sigmoid() * (f(h) - h), exact=False
    ),
    "lerp backwards by a gate": Form(
        lambda h, f, g, w: f(h).lerp(h, g(h).sigmoid()),
        lambda h, f, g, w: (1 - g(h).sigmoid()) * (f(h) - h),
        exact=False,
    ),
    "addmm": Form(lambda h, f, g, w: torch.addmm(h, h.tanh(), w), lambda h, f, g, w: h.tanh() @ w, exact=False),
    "addmm with alpha": Form(
        lambda h, f, g, w: torch.addmm(h, f(h), w, alpha=0.3), lambda h, f, g, w: 0.3 * f(h) @ w, exact=False
    ),
    "baddbmm": Form(
        lambda h, f, g, w: torch.baddbmm(h[:, None], f(h)[:, None], torch.diag_embed(g(h))).squeeze(1),
        lambda h, f, g, w: f(h) * g(h),
        exact=False,
    ),
    "addcmul": Form(
        lambda h, f, g, w: torch.addcmul(h, f(h), h.tanh(), value=0.3),
        lambda h, f, g, w: 0.3 * f(h) * h.tanh(),
        exact=False,
    ),
    "clone": Form(lambda h, f, g, w: h.clone() + f(h), f_alone),
    "copy": Form(lambda h, f, g, w: f(h) + h.to(h.dtype, copy=True), f_alone),
    "reshaped and back": Form(lambda h, f, g, w: h.view(-1, 2, 2).reshape(-1).view(-1, 4) + f(h), f_alone),
    "transposed and back": on_matrices(lambda h, f: (h.transpose(1, 2).mT + f(h)).flatten(1), flat),
    "contiguous": on_matrices(lambda h, f: (h.mT.contiguous().transpose(1, 2) + f(h)).flatten(1), flat),
    "skip and branch flattened": on_matrices(lambda h, f: h.flatten(1) + f(h).flatten(1), flat),
    "skip flattened": on_matrices(lambda h, f: f(h).sin().view(-1, 4).asin() + h.view(-1, 4), flat),
    "skip and branch transposed": on_matrices(
        lambda h, f: (h.permute(0, 2, 1) + f(h).movedim(1, 2)).flatten(1), lambda h: flat(transposed(h))
    ),
    "skip transposed and flattened": on_matrices(
        lambda h, f: h.mT.flatten(1) + f(h).swapaxes(2, 1).reshape(-1, 4), lambda h: flat(transposed(h))
    ),
}

every_form = pytest.mark.parametrize("name", FORMS)


@functools.cache
def unraveled(name):
    """The form, a model that is written in it, and its chain."""
    model = build(FORMS[name].step)
    return FORMS[name], model, rp.unravel(model, inputs())


@every_form
def test_function_and_structure(name):
    form, model, chain = unraveled(name)
    assert [block.skip_kind for block in chain] == ["identity"] * 3
    assert chain.num_paths == 8
    for batch in (1, 4, 7):
        x = inputs(batch)
        if form.exact:
            assert torch.equal(chain(x), model(x))
        assert torch.allclose(chain(x), model(x), rtol=0, atol=1e-14)


@every_form
def test_deletions_leave_the_skip(name):
    (form, model, chain), x = unraveled(name), inputs()
    for deleted in itertools.product((False, True), repeat=3):
        state = model.inp(x)
        for gone, layers in zip(deleted, model.layers(), strict=True):
            h = form.before(state)
            state = form.after(h if gone else h + form.branch(h, *layers))
        edited = rp.delete_blocks(chain, [i for i in range(3) if deleted[i]])
        assert torch.allclose(edited(x), model.out(state), rtol=0, atol=1e-14)


@every_form
def test_gradients_by_length(name):
    (form, model, chain), x, targets = unraveled(name), inputs(), torch.tensor([0, 1, 2, 0])
    gradients = dict.fromkeys(range(4), 0)
    for path in itertools.product((False, True), repeat=3):
        leaf = x.clone().requires_grad_()
        state = model.inp(leaf)
        for taken, layers in zip(path, model.layers(), strict=True):
            h = form.before(state)
            branch = form.branch(h, *layers)
            state = form.after(h.detach() + branch if taken else h + branch.detach())
        loss = F.cross_entropy(model.out(state), targets, reduction="sum")
        gradients[sum(path)] += torch.autograd.grad(loss, leaf)[0]
    total = sum(gradients.values())
    shares = [((g * total).sum(1) / (total * total).sum(1)).mean() for g in gradients.values()]
    frame = rp.gradient_by_path_length(chain, x, targets, progress=False)
    assert frame.gradient_share.tolist() == pytest.approx([float(share) for share in shares], abs=1e-12)
    norms = [g.norm(dim=1).mean() for g in gradients.values()]
    assert frame.summed_path_gradient_norm.tolist() == pytest.approx([float(norm) for norm in norms], rel=1e-10)


def kinds(step):
    model, x = build(step), inputs()
    chain = rp.unravel(model, x)
    assert torch.allclose(chain(x), model(x), rtol=0, atol=1e-14)
    return [block.skip_kind for block in chain]


@pytest.mark.parametrize(
    "step",
    [
        lambda x, f, g, w: 0.9 * x + 0.3 * f(x),
        lambda x, f, g, w: torch.add(f(x), x, alpha=0.3),
        lambda x, f, g, w: x.roll(1, 1) + f(x),
        lambda x, f, g, w: x.double().float().double() + f(x),
    ],
    ids=["scaled sum", "alpha on the skip", "rolled", "rounded to float32"],
)
def test_skips_that_change_values_are_projections(step):
    assert kinds(step) == ["projection"] * 3


@pytest.mark.parametrize(
    "step",
    [
        lambda x, f, g, w: x.detach() + f(x),
        lambda x, f, g, w: x.clone().detach() + f(x),
        lambda x, f, g, w: x.detach().view(-1, 2, 2).flatten(1).clone() + f(x),
        lambda x, f, g, w: torch.stack([x.detach(), f(x)]).sum(0),
        lambda x, f, g, w: x.detach() - f(x),
        lambda x, f, g, w: torch.addcmul(x.detach(), f(x), x.detach()),
    ],
)
def test_a_detached_skip_is_no_identity(step):
    model, x, targets = build(step), inputs(), torch.tensor([0, 1, 2, 0])
    chain = rp.unravel(model, x)
    assert [block.skip_kind for block in chain] == ["projection"] * 3
    assert torch.allclose(chain(x), model(x), rtol=0, atol=1e-14)
    frame = rp.gradient_by_path_length(chain, x, targets, progress=False)
    assert frame.gradient_share.tolist() == pytest.approx([0, 0, 0, 1], abs=1e-12)


def test_in_place_detachment_holds_in_the_branch():
    model, x = build(lambda x, f, g, w: x + f(x).detach_()), inputs()
    chain = rp.unravel(model, x)
    frame = rp.gradient_by_path_length(chain, x, torch.tensor([0, 1, 2, 0]), progress=False)
    assert frame.gradient_share.tolist() == pytest.approx([1, 0, 0, 0], abs=1e-12)


ALTERNATIVES = {
    "sum": (lambda x, f, g, w: sum([x, f(x), g(x)]), f_alone),
    "stack": (lambda x, f, g, w: torch.stack([f(x), x, g(x)]).sum(0), f_alone),
    "difference of a sum": (lambda x, f, g, w: x + g(x) - f(x), lambda x, f, g, w: -f(x)),
    "two differences": (lambda x, f, g, w: x - (-g(x)) - f(x), lambda x, f, g, w: -f(x)),
    "clones": (lambda x, f, g, w: x.clone() + f(x) + g(x), f_alone),
    "addmm": (lambda x, f, g, w: torch.addmm(x + g(x), x, w), lambda x, f, g, w: x @ w),
}


@pytest.mark.parametrize(("step", "branch"), ALTERNATIVES.values(), ids=ALTERNATIVES)
def test_several_branches_of_one_addition_are_alternatives(step, branch):
    model, x = build(step), inputs()
    chain = rp.unravel(model, x)
    assert torch.allclose(chain(x), model(x), rtol=0, atol=1e-14)
    assert [block.skip_kind for block in chain] == ["identity"] * 3
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 6, 12, 8]  # (1 + 2t)^3
    state = model.inp(x)
    assert torch.allclose(rp.delete_blocks(chain, [0, 1, 2])(x), model.out(state), rtol=0, atol=1e-14)
    # Each branch of the last block alone.
    routes = [model.out(each(state, *list(model.layers())[-1])) for each in (branch, lambda x, f, g, w: g(x))]
    found = [rp.path_network(chain, (False, False, taken))(x) for taken in (1, 2)]
    assert any(
        all(torch.allclose(one, other, rtol=0, atol=1e-14) for one, other in zip(found, order, strict=True))
        for order in itertools.permutations(routes)
    )


@pytest.mark.parametrize(
    "step",
    [
        lambda x, f, g, w: f(x) - x,
        lambda x, f, g, w: f(x) - g(x),
        lambda x, f, g, w: torch.lerp(f(x), g(x), 0.3),
        lambda x, f, g, w: torch.addmm(x, f(x), w, beta=0.5),
    ],
    ids=["x from f", "two towers", "lerp of two towers", "beta"],
)
def test_what_adds_nothing_to_x_is_refused(step):
    with pytest.raises(ResnetPathsError, match="join it by"):
        rp.unravel(build(step), inputs())


def test_a_normalisation_written_out_stays_as_it_is():
    def step(x, f, g, w):
        h = f(x)
        return x + torch.relu((h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True))

    model, x = build(step), inputs()
    chain = rp.unravel(model, x)
    assert torch.equal(chain(x), model(x))
    assert chain.num_paths == 8
    assert not any(isinstance(block.branch, rp.ResidualChain) for block in chain)


def test_a_difference_inside_a_branch_is_a_block_inside_a_block():
    model, x = build(lambda x, f, g, w: x + torch.tanh((h := g(x)) - f(h))), inputs()
    chain = rp.unravel(model, x)
    assert torch.equal(chain(x), model(x))
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 3, 6, 7, 6, 3, 1]  # (1 + t (1 + t))^3
    state = model.inp(x)
    for _, g, _ in model.layers():
        state = state + torch.tanh(g(state))
    without = chain
    for index in range(3):
        without = rp.delete_block(without, chain[index].branch[0].name)
    assert torch.allclose(without(x), model.out(state), rtol=0, atol=1e-14)


def test_the_bias_of_a_linear_map_is_no_skip():
    model, x = build(lambda x, f, g, w: x + torch.addmm(w[0], x, w)), inputs()
    chain = rp.unravel(model, x)
    assert torch.equal(chain(x), model(x))
    assert chain.num_paths == 8


def test_weights_are_shared_and_the_model_is_unchanged():
    model = build(FORMS["skip flattened"].step)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chain = rp.unravel(model, inputs())
    assert {p.data_ptr() for p in chain.parameters()} <= {p.data_ptr() for p in model.parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Flattened(nn.Module):
    """Blocks one after another whose branch and skip see the places of all examples as one batch."""

    def __init__(self, merge, split):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 12), nn.Linear(12, 3)
        self.f = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.merge, self.split = merge, split

    def forward(self, x):
        x = self.inp(x).view(-1, 3, 4)
        for f in self.f:
            h = self.merge(x)
            x = self.split(h + torch.tanh(f(h)))
        return self.out(x.flatten(1))


@pytest.mark.parametrize(
    ("merge", "split"),
    [
        (lambda x: x.reshape(-1, 4), lambda y: y.view(-1, 3, 4)),
        (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
    ],
    ids=["one batch", "places first"],
)
def test_examples_stay_apart_between_blocks(merge, split):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Flattened(merge, split).double().eval()
    chain = rp.unravel(model, inputs())
    assert [block.out_shape for block in chain] == [(3, 4)] * 3
    assert [block.skip_kind for block in chain] == ["identity"] * 3
    for batch in (1, 4, 7):
        assert torch.equal(chain(inputs(batch)), model(inputs(batch)))
