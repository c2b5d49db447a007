"""Instruments that differentiate or measure a chain take inputs in every form in which the chain is called."""

from __future__ import annotations

import functools
from collections import UserDict

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths import gradients
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.costs import forward_cost
from tests.unraveling.test_carried import TARGETS, build, masked_bert


class Gated(nn.Module):
    """Two inputs with a row for each example, one row for all, and an option that is no tensor."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, gate, offset=None, scale=1.0):
        x = self.inp(x) * torch.tanh(gate)
        x = x if offset is None else x + offset
        for layer in self.layers:
            x = x + scale * torch.tanh(layer(x))
        return self.out(x)


class Packed(nn.Module):
    """The same network of one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, both):
        return self.model(both[:, :5], both[:, 5:], torch.ones(1, 4, dtype=both.dtype), 0.5)


def arguments():
    """x, gate, offset, scale."""
    generator = torch.Generator().manual_seed(1)
    x, gate = (torch.randn(4, size, generator=generator, dtype=torch.float64) for size in (5, 4))
    return x, gate, torch.ones(1, 4, dtype=torch.float64), 0.5


def packed():
    return torch.cat(arguments()[:2], 1)


@functools.cache
def chain_of(kind):
    """The network as a chain called by position, by keyword, or with one tensor."""
    model = build(Gated)
    if kind == "packed":
        return rp.unravel(Packed(model), packed())
    return rp.unravel(model, arguments() if kind == "position" else named(arguments()))


NAMES = ("x", "gate", "offset", "scale")


def named(given, **more):
    return dict(zip(NAMES, given, strict=True)) | more


FORMS = {
    "tuple": lambda given: (tuple(given), TARGETS),
    "list": lambda given: (list(given), TARGETS),
    "loader of tuples": lambda given: ([(given, TARGETS)],),
    "loader of two": lambda given: (
        [((*(t[part] for t in given[:2]), *given[2:]), TARGETS[part]) for part in (slice(3), slice(3, 4))],
    ),
}
FORMS_BY_KEYWORD = {
    "mapping": lambda given: (named(given), TARGETS),
    "in another order": lambda given: (dict(reversed(named(given).items())), TARGETS),
    "with labels": lambda given: (named(given, labels=TARGETS),),
    "no dict": lambda given: (UserDict(named(given, labels=TARGETS)),),
    "loader of mappings": lambda given: ([named(given, labels=TARGETS)],),
    "loader of pairs": lambda given: ([[named(given), TARGETS]],),
}


def exact(chain, *batch, **options):
    return rp.gradient_by_path_length(chain, *batch, progress=False, **options)


INSTRUMENTS = {
    "stem": lambda *call: exact(*call, with_respect_to="stem"),
    "block": lambda *call: exact(*call, with_respect_to=1),
    "little memory": lambda *call: exact(*call, with_respect_to="stem", memory_budget=1),
    "energy": lambda *call: exact(*call, with_respect_to="stem", method="energy", num_draws=2, memory_budget=2**31),
    "parameters": lambda *call: exact(*call, with_respect_to=("parameters", 0)),
    "stages": lambda *call: rp.gradient_by_stage_lengths(*call, with_respect_to="stem", progress=False),
    "branches": lambda *call: rp.gradient_through_block(*call, with_respect_to="stem", progress=False),
    "depth": lambda *call: rp.gradient_by_depth(*call, progress=False),
    "norms": lambda chain, inputs, *_: rp.block_norms(chain, inputs),
}


def assert_equal(found, expected):
    numbers = expected.select_dtypes("number").columns
    assert list(found.columns) == list(expected.columns)
    np.testing.assert_allclose(found[numbers].astype(float), expected[numbers].astype(float), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_every_instrument_takes_every_form(name):
    instrument, given = INSTRUMENTS[name], arguments()
    expected = instrument(chain_of("packed"), packed(), TARGETS)
    for form, make in FORMS.items():
        if name != "energy" or form != "loader of two":  # each batch has signs of its own
            assert_equal(instrument(chain_of("position"), *make(given)), expected)
    for make in FORMS_BY_KEYWORD.values():
        assert_equal(instrument(chain_of("keyword"), *make(given)), expected)


def test_the_gradient_at_several_inputs_is_that_at_one_that_holds_them():
    x, gate, *options = arguments()
    for example in ((x, gate), {"x": x, "gate": gate}):
        own = rp.unravel(WithOptions(build(Gated), *options), example)
        for instrument in (exact, rp.gradient_through_block):
            assert_equal(instrument(own, example, TARGETS), instrument(chain_of("packed"), packed(), TARGETS))
    layer = build(nn.Linear, 5, 3)
    plain, by_keyword = (ResidualChain(stem, [], nn.Identity()).eval() for stem in (layer, ByKeyword(layer)))
    for chain, form in ((by_keyword, {"x": x}), (plain, (x,))):
        assert_equal(exact(chain, form, TARGETS), exact(plain, x, TARGETS))


class WithOptions(nn.Module):
    """A network of two inputs, with the others given."""

    def __init__(self, model, offset, scale):
        super().__init__()
        self.model, self.scale = model, scale
        self.register_buffer("offset", offset)

    def forward(self, x, gate):
        return self.model(x, gate, self.offset, self.scale)


class ByKeyword(nn.Module):
    """A stem, as written by hand, that is called by keyword alone and works in place."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *, x):
        return self.layer(x.add_(1).sub_(1))


def test_labels_of_a_mapping_are_an_input_where_targets_are_given():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x, labels):
            return self.layer(x) * (1 + labels[:, None])

    x = arguments()[0]
    chain = ResidualChain(build(Reads), [], nn.Identity()).eval()
    frame = exact(chain, {"x": x, "labels": TARGETS}, TARGETS, with_respect_to="stem")
    assert_equal(frame, exact(chain, (x, TARGETS), TARGETS, with_respect_to="stem"))


def test_bert_with_an_attention_mask():
    transformers = pytest.importorskip("transformers")
    model, tokens, mask = masked_bert()
    batch = transformers.BatchEncoding({"input_ids": tokens, "attention_mask": mask, "labels": TARGETS})
    chain = rp.unravel(model, {"input_ids": tokens, "attention_mask": mask})
    frame = INSTRUMENTS["stem"](chain, batch)
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-12)

    # The gradient at the embedding is that of the model itself; nothing flows into the mask.
    made = []
    handle = model.bert.embeddings.register_forward_hook(lambda *call: made.append(call[-1]))
    losses = nn.functional.cross_entropy(model(tokens, mask).logits, TARGETS, reduction="sum")
    handle.remove()
    expected = torch.autograd.grad(losses, made[0])[0].flatten(1).norm(dim=1).mean().item()
    depth = rp.gradient_by_depth(chain, [batch], progress=False)
    assert depth.gradient_norm[0] == pytest.approx(expected, rel=1e-12)

    # With nothing masked it is the network of tokens alone.
    alone = rp.unravel(model, tokens)
    unmasked = {"input_ids": tokens, "attention_mask": torch.ones_like(mask)}
    expected = INSTRUMENTS["stem"](alone, tokens, TARGETS)
    assert_equal(INSTRUMENTS["stem"](chain, unmasked, TARGETS), expected)
    assert not np.allclose(frame.gradient_share, expected.gradient_share)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("images", r"inputs: got 'str'; allowed: batches of \(inputs, targets\), or mappings"),
        (3, "inputs: got 'int'; allowed: a tensor, a tuple of positional arguments or a mapping of keyword arguments"),
        ((), "inputs: got 'tuple'; allowed: .*or a loader with a batch"),
        ({"x": 3}, "inputs: got 'dict'; allowed: .*with tensors among them, with the batch in dimension 0"),
        ([({"x": "images"}, None)], "inputs: got 'dict'"),
        ([("images", None)], "inputs: got 'str'; allowed: a tensor"),
        ([(torch.ones(4, 5), None, None)], r"inputs: got 'tuple'; allowed: batches of \(inputs, targets\)"),
        (np.ones((4, 5)), "inputs: got 'ndarray'"),
        (torch.tensor(1.0), "inputs: got 'Tensor'; allowed: .*batch in dimension 0"),
        ((torch.ones(4, 5), torch.ones(3, 4)), r"inputs: got \[\[4, 5\], \[3, 4\]\]; allowed: .* a row for each"),
        (torch.ones(0, 5), "inputs: got 'no examples'; allowed: at least one example"),
        ({"x": torch.ones(4, 5)}, r"inputs: got .*arguments as in the example that was unraveled"),
    ],
)
def test_anything_else_is_refused(inputs, message):
    chain = chain_of("keyword" if isinstance(inputs, dict) else "position")
    for name in ("stem", "depth", "norms"):
        with pytest.raises(rp.ResnetPathsError, match=message):
            INSTRUMENTS[name](chain, inputs)


def test_inputs_without_a_gradient_of_their_own_are_refused():
    chain, given = chain_of("position"), arguments()
    with pytest.raises(rp.ResnetPathsError, match=r"another place: an input that all examples share.*'stem'"):
        exact(chain, given, TARGETS)
    with pytest.raises(rp.ResnetPathsError, match=r"targets: got 'Tensor'; allowed: None where inputs is a loader"):
        exact(chain, [(given, TARGETS)], TARGETS)


def test_costs_of_modules_that_take_several_inputs():
    given = arguments()
    costs = [forward_cost(build(Gated), form, min_seconds=1e-4) for form in (given, UserDict(named(given)))]
    for cost in costs:
        assert cost.num_multiply_adds == 5 * 4 + 3 * 4 * 4 + 4 * 3
    with pytest.raises(rp.ResnetPathsError, match="inputs: got 'int'; allowed: a tensor, a tuple"):
        forward_cost(nn.Linear(5, 4), 3)


class Timed(nn.Module):
    """A stem of states and of one number for each example, as of the time of a diffusion model."""

    def __init__(self):
        super().__init__()
        self.inp, self.time = nn.Linear(5, 4), nn.Linear(1, 4)

    def forward(self, x, t):
        return torch.tanh(self.inp(x)) + torch.tanh(self.time(t[:, None]))


def timed_chains():
    """A chain of (x, t), and the same of one tensor."""
    stem, blocks = build(Timed), [nn.Linear(4, 4).double() for _ in range(3)]
    blocks = [Block(branch, nn.Identity(), name=f"b{i}") for i, branch in enumerate(blocks)]
    one = type("One", (nn.Module,), {"forward": lambda self, both: self.stem(both[:, :5], both[:, 5])})()
    one.stem = stem
    head = nn.Linear(4, 3).double()
    return (ResidualChain(part, blocks, head).eval() for part in (stem, one))


@pytest.mark.parametrize(
    "instrument",
    [
        exact,
        functools.partial(exact, method="energy", paths="signs", num_draws=4),
        functools.partial(exact, method="energy"),
        functools.partial(exact, method="sampled"),
        functools.partial(exact, method="sampled", paths="uniform"),
        rp.gradient_through_block,
        functools.partial(rp.gradient_through_block, norms=True),
        rp.gradient_by_stage_lengths,
        rp.path_length_moments,
        gradients.pair_covariances,
        gradients.branch_probabilities,
    ],
)
def test_one_number_of_each_example_may_be_an_input(instrument):
    of_two, of_one = timed_chains()
    x, t = torch.randn(4, 5).double(), torch.rand(4).double()
    both = torch.cat([x, t[:, None]], 1)
    found, expected = instrument(of_two, (x, t), TARGETS), instrument(of_one, both, TARGETS)
    if isinstance(expected, pd.DataFrame):
        assert_equal(found, expected)
    else:
        assert found.mean == pytest.approx(expected.mean)


def test_the_gradient_of_one_number_is_that_of_autograd():
    """Of a chain that has a single path."""
    chain = next(timed_chains())
    chain = rp.delete_blocks(chain, range(3))
    x, t = (torch.randn(4, 5).double().requires_grad_(), torch.rand(4).double().requires_grad_())
    nn.functional.cross_entropy(chain(x, t), TARGETS, reduction="sum").backward()
    norms = torch.cat([x.grad, t.grad[:, None]], 1).norm(dim=1)
    frame = exact(chain, (x.detach(), t.detach()), TARGETS)
    assert frame.summed_path_gradient_norm[0] == pytest.approx(norms.mean().item(), rel=1e-12)
