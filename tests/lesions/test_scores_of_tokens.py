"""Scores of language models against plain PyTorch: the model's own layers with hooks, real tokens picked by hand."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from tests.gradients.gradient_reference import seeded
from tests.lesions.test_measures import CAUSAL, language_model

KINDS = ("gpt2", "llama", "bert")
LENGTHS = ((9, 5, 7), (9, 2, 4))


def batches(kind):
    """Padded on the right, the second batch on the left; some labels do not count."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for lengths, left in zip(LENGTHS, (False, True), strict=True):
        mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
        tokens = torch.randint(23, (3, 9), generator=generator)
        labels = tokens.clone()
        labels[torch.rand(3, 9, generator=generator) < 0.2] = -100
        made.append({
            "input_ids": tokens,
            "attention_mask": mask.flip(1) if left and kind in CAUSAL else mask,
            "labels": labels,
        })
    return made


@functools.cache
def read(kind):
    """The model, its layers, its batches, the chain of its layers, and what each layer read or returned."""
    model, layers = language_model(kind)
    layers = [layer for layer, *_ in layers]
    loader = batches(kind)
    chain = rp.unravel(model, {k: v for k, v in loader[0].items() if k != "labels"})
    return model, layers, loader, rp.group_blocks(chain), states_by_hand(model, layers, loader)


@torch.no_grad()
def states_by_hand(model, layers, loader):
    """For each batch the states between layers, [batch, position, feature]."""
    found = []
    for batch in loader:
        states = []
        hooks = [layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]  # noqa: B023
        hooks += [
            layer.register_forward_hook(
                lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out)  # noqa: B023
            )
            for layer in layers
        ]
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for hook in hooks:
            hook.remove()
        found.append(states)
    return found


def over_sequences(values):
    """Mean over all tokens of some sequences, and its standard error with a sequence as a cluster."""
    sizes = torch.tensor([float(len(v)) for v in values]).double()
    sums = torch.stack([v.sum() for v in values])
    mean = sums.sum() / sizes.sum()
    error = (sums - mean * sizes).square().sum() * len(values) / (len(values) - 1)
    return mean.item(), error.sqrt().item() / sizes.sum().item()


def pairs(loader, states, first, last, chosen):
    """Vectors of each sequence before and after some layers, of its chosen real tokens."""
    for batch, of_batch in zip(loader, states, strict=True):
        for row, mask in enumerate(batch["attention_mask"].bool()):
            yield tuple(of_batch[i][row][mask][chosen] for i in (first, last))


CHOSEN = {"all": slice(None), "last": slice(-1, None)}


@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_real_tokens(kind, tokens):
    _, layers, loader, chain, states = read(kind)
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in loader]
    frame = rp.predicted_effects(chain, unlabelled, measures=(), span=(1, 2), tokens=tokens, progress=False)
    assert frame["blocks"].tolist() == [(0,), (1,), (0, 1)]
    assert frame.num_blocks.tolist() == [1, 1, 2]
    assert frame.num_examples.tolist() == [6] * 3
    for row in frame.to_dict("records"):
        both = list(pairs(loader, states, row["blocks"][0], row["blocks"][-1] + 1, CHOSEN[tokens]))
        assert sum(len(x) for x, _ in both) == (6 if tokens == "last" else sum(map(sum, LENGTHS)))
        cosines = [(x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)) for x, y in both]
        expected = {
            "block_influence": [1 - cosine for cosine in cosines],
            "angular_distance": [cosine.acos() / math.pi for cosine in cosines],
            "relative_branch_norm": [(y - x).norm(dim=1) / x.norm(dim=1) for x, y in both],
        }
        for score, values in expected.items():
            found = row[score], row[f"{score}_se"]
            assert found == pytest.approx(over_sequences(values), rel=1e-6, abs=1e-6), score
    # Whole layers: what attention and MLP do alone is something else.
    assert len(chain) == len(layers) == 2


def test_padding_does_not_count():
    *_, loader, chain, _ = read("bert")
    with_padding = [batch | {"attention_mask": torch.ones_like(batch["attention_mask"])} for batch in loader]
    scores = [
        rp.predicted_effects(chain, given, measures=(), tokens=tokens, progress=False).block_influence.iloc[1]
        for given, tokens in ((loader, "all"), (loader, None), (with_padding, "all"))
    ]
    assert len({round(score, 4) for score in scores}) == 3
    changed = [dict(batch) for batch in loader]
    for batch in changed:
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 3, batch["input_ids"])
    for tokens in ("all", "last", None):
        one, other = (
            rp.predicted_effects(chain, given, measures=(), tokens=tokens, progress=False)
            for given in (loader, changed)
        )
        assert one.equals(other)
        assert rp.block_norms(chain, loader, tokens=tokens).equals(rp.block_norms(chain, changed, tokens=tokens))


def test_masks_choose_among_real_tokens():
    *_, loader, chain, _ = read("gpt2")

    def scores(tokens, given=loader):
        return rp.predicted_effects(chain, given, measures=(), tokens=tokens, progress=False)

    last = scores("last")
    for tokens in (lambda inputs: last_by_hand(inputs["attention_mask"]), "last"):
        assert scores(tokens).equals(last)
    without_first = torch.arange(9) > 0
    by_function = scores(lambda inputs: without_first.expand_as(inputs["attention_mask"]))
    assert scores(without_first).equals(by_function)
    assert scores(last_by_hand(loader[0]["attention_mask"]), loader[:1]).equals(scores("last", loader[:1]))


def last_by_hand(mask):
    chosen = torch.zeros_like(mask)
    for row, real in enumerate(mask):
        chosen[row, real.nonzero()[-1]] = 1
    return chosen


def measured(model, layers, loader, kind, factors):
    """Cross-entropy and perplexity, with what each layer adds times a factor."""

    def times(factor, _, args, out):
        if isinstance(out, tuple):
            return (args[0] + factor * (out[0] - args[0]), *out[1:])
        return args[0] + factor * (out - args[0])

    hooks = [
        layer.register_forward_hook(functools.partial(times, factor))
        for layer, factor in zip(layers, factors, strict=True)
    ]
    losses = []
    for batch in loader:
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        target, real = batch["labels"], batch["attention_mask"].bool()
        if kind in CAUSAL:
            out, target, real = out[:, :-1], target[:, 1:], real[:, :-1] & real[:, 1:]
        counts = real & (target != -100)
        losses.append(F.cross_entropy(out[counts], target[counts], reduction="none"))
    for hook in hooks:
        hook.remove()
    loss = torch.cat(losses).mean()
    return {"cross_entropy": loss, "perplexity": loss.exp()}


@pytest.mark.parametrize("kind", KINDS)
def test_first_order_estimates_are_derivatives(kind):
    model, layers, loader, chain, _ = read(kind)
    options = {"measures": ("cross_entropy", "perplexity"), "shift_labels": kind in CAUSAL, "progress": False}
    frame = rp.predicted_effects(chain, loader, span=(1, 2), **options)
    factors = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in layers]
    for name, value in measured(model, layers, loader, kind, factors).items():
        slopes = [-slope.item() for slope in torch.autograd.grad(value, factors, retain_graph=True)]
        expected = [*slopes, sum(slopes)]
        assert frame[f"first_order_{name}_increase"].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x, factors=(1.0, 1.0, 1.0)):
        x = self.stem(x)
        for block, factor in zip(self.blocks, factors, strict=True):
            x = x + factor * torch.tanh(block(x))
        return self.head(x)


def squared_distance(outputs, labels, intact):
    return (outputs - intact.flip(1)).square().sum(1)


def test_measures_of_values_and_functions():
    with seeded(0):
        model = Regressor().double().eval()
        x, y = torch.randn(40, 4).double(), torch.randn(40, 2).double()
    chain = rp.unravel(model, x[:2])
    names = ("mean_squared_error", "explained_variance", "squared_distance")
    frame = rp.predicted_effects(
        chain, [(x[:25], y[:25]), (x[25:], y[25:])], measures=(*names[:2], squared_distance), progress=False
    )
    intact = model(x).detach()

    def values(out, rows):
        error = (out - y).square()[rows]
        explained = 1 - error.sum() / (y[rows] - y[rows].mean(0)).square().sum()
        return torch.stack([error.mean(), explained, squared_distance(out, None, intact)[rows].mean()])

    step = 1e-5

    def slopes(index, rows):
        ends = [model(x, [1 + s * (i == index) for i in range(3)]).detach() for s in (-step, step)]
        return (values(ends[0], rows) - values(ends[1], rows)) / (2 * step)

    for index, row in frame.iterrows():
        whole = slopes(index, slice(None))
        # The jackknife over examples estimates the same standard error.
        each = torch.stack([slopes(index, torch.arange(40) != left_out) for left_out in range(40)])
        jackknife = ((each - each.mean(0)).square().sum(0) * 39 / 40).sqrt()
        for number, name in enumerate(names):
            assert row[f"first_order_{name}_increase"] == pytest.approx(whole[number].item(), rel=1e-6)
            assert row[f"first_order_{name}_increase_se"] == pytest.approx(jackknife[number].item(), rel=0.1)


def test_scores_of_ranges_rank_deletions_of_ranges():
    *_, loader, _, _ = read("gpt2")
    model, _ = language_model("gpt2")
    chain = rp.unravel(model, {k: v for k, v in loader[0].items() if k != "labels"})
    predicted = rp.predicted_effects(chain, loader, span=2, tokens="last", shift_labels=True, progress=False)
    frame = rp.lesion_study(chain, loader, rp.range_deletions(chain), shift_labels=True, progress=False)
    found = rp.lesions.score_correlations(predicted, frame)
    assert (found.num_blocks == 3).all()
    assert set(found.score) == {
        "first_order_cross_entropy_increase",
        "block_influence",
        "angular_distance",
        "relative_branch_norm",
    }
    both = rp.predicted_effects(chain, loader, measures=(), span=(1, 2), progress=False)
    with pytest.raises(rp.ResnetPathsError, match=r"predicted: got 'ranges of \[1, 2\] blocks'; allowed: .*one span"):
        rp.lesions.score_correlations(both, frame)


def test_ranges_with_projections_and_plain_blocks():
    """Without branches a range carries what its skips, pre and post make of its input."""
    with seeded(0):
        parts = [nn.Linear(*sizes).double() for sizes in ((5, 3), (3, 2), (3, 2), (2, 2), (2, 2), (2, 3))]
    stem, branch, projection, plain, last, head = parts
    blocks = [
        Block(branch, projection, post=nn.Sigmoid(), in_shape=(3,), out_shape=(2,)),
        Block(plain, None, in_shape=(2,), out_shape=(2,)),
        Block(last, nn.Identity(), post=nn.Tanh(), in_shape=(2,), out_shape=(2,)),
    ]
    chain = ResidualChain(stem, blocks, head).eval()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double()
    frame = rp.predicted_effects(chain, [x], measures=(), span=3, progress=False)
    with torch.no_grad():
        state = stem(x)
        alone = projection(state).sigmoid().tanh()
        state = (projection(state) + branch(state)).sigmoid()
        state = plain(state)
        whole = (state + last(state)).tanh()
        cosine = (alone * whole).sum(1) / alone.norm(dim=1) / whole.norm(dim=1)
    assert frame.block_influence.tolist() == pytest.approx([(1 - cosine).mean().item()])


@pytest.mark.parametrize("tokens", ["all", "last", None])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_blocks_are_those_of_real_tokens(kind, tokens):
    *_, loader, chain, states = read(kind)
    frame = rp.block_norms(chain, loader, tokens=tokens)
    for row in frame.to_dict("records"):
        index = row["block_index"]
        both = list(pairs(loader, states, index, index + 1, CHOSEN[tokens or "all"]))
        first = [x for x, _ in pairs(loader, states, 0, 1, CHOSEN[tokens or "all"])]
        if tokens is None:
            both = [(x.flatten()[None], y.flatten()[None]) for x, y in both]
            first = [x.flatten()[None] for x in first]
        expected = {
            "input_norm": [x.norm(dim=1) for x, _ in both],
            "branch_norm": [(y - x).norm(dim=1) for x, y in both],
            "sum_norm": [y.norm(dim=1) for _, y in both],
            "cosine": [(x * (y - x)).sum(1) / x.norm(dim=1) / (y - x).norm(dim=1) for x, y in both],
            "kept_signal_share": [(k * y).sum(1) / (y * y).sum(1) for k, (_, y) in zip(first, both, strict=True)],
        }
        for name, values in expected.items():
            if kind == "bert" and name == "kept_signal_share":
                continue  # a norm follows each addition
            assert (row[name], row[f"{name}_se"]) == pytest.approx(over_sequences(values), rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "first"}, r"tokens: got 'first'; allowed: 'all', 'last', a mask"),
        ({"tokens": "all", "feature_dim": 1}, r"feature_dim: got 1; allowed: None with tokens"),
        ({"tokens": torch.ones(4)}, r"tokens: got 'a mask \[4\]'; allowed: a mask \[3, 9\] or \[9\]"),
        ({"tokens": lambda inputs: 3}, r"tokens: got 3; allowed: a mask \[3, 9\]"),
        ({"span": 0}, r"span: got 0; allowed: numbers of blocks from 1 to 2"),
        ({"span": (1, 1)}, r"span: got \(1, 1\); allowed: at least one number of blocks, each once"),
        ({"measures": ("error_rate",)}, r"measures: got 'error_rate'; allowed: .*gradient.*A rate has no gradient"),
        ({"measures": ("kl_divergence",)}, r"measures: got 'kl_divergence'.*At the intact chain its gradient is 0"),
        ({"measures": ("mean_iou",)}, r"measures: got 'mean_iou'; allowed: measures with a gradient"),
    ],
)
def test_what_cannot_be_scored(options, message):
    *_, loader, chain, _ = read("bert")
    with pytest.raises(rp.ResnetPathsError, match=message):
        rp.predicted_effects(chain, loader, progress=False, **options)


def test_states_without_tokens_are_refused():
    with seeded(0):
        chain = ResidualChain(nn.Linear(5, 3), [Block(nn.Linear(3, 3), nn.Identity())], nn.Linear(3, 3)).eval()
    message = r"tokens: got 'all for states \[2, 3\]'; allowed: None, or states \[batch, position, feature\]"
    with pytest.raises(rp.ResnetPathsError, match=message):
        rp.block_norms(chain, torch.ones(2, 5), tokens="all")
    with pytest.raises(rp.ResnetPathsError, match=r"tokens: got"):
        rp.predicted_effects(chain, [torch.ones(2, 5)], measures=(), tokens="last", progress=False)
    with pytest.raises(rp.ResnetPathsError, match=r"loader: got .*allowed: batches of \(inputs, labels\)"):
        rp.predicted_effects(chain, [torch.ones(2, 5)], progress=False)
