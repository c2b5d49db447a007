"""Values of all subsets of blocks, and what follows from them: against enumeration that shares no code."""

from __future__ import annotations

import itertools
import math
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.zoo.initialisation import initialise
from resnet_paths.zoo.language import LanguageModel
from tests.chains import Plan, assert_same, random_chain, snapshot
from tests.lesions.test_lesions import labelled

N = 5
MIXED = (3, tuple(Plan(w, s, False, False) for w, s in [(3, "identity"), (2, "projection"), *[(2, "identity")] * 3]))
LOADER = list(labelled(20))


def losses_of(chain, kept):
    """Cross-entropy of each example with some blocks kept, by plain calls."""
    found = []
    with torch.no_grad():
        for x, y in LOADER:
            state = chain.stem(x)
            for i, block in enumerate(chain):
                skip = block.skip(state if block.pre is None else block.pre(state))
                state = skip + block.branch(state) if i in kept else skip
            found.append(F.cross_entropy(chain.head(state), y, reduction="none"))
    return torch.cat(found).numpy()


def all_subsets(n):
    return [kept for size in range(n + 1) for kept in itertools.combinations(range(n), size)]


def shapley_of_orders(value_of, n):
    """Mean over all orders of what each block adds to those before it."""
    total = np.zeros(n)
    for order in itertools.permutations(range(n)):
        for place, block in enumerate(order):
            before = tuple(sorted(order[:place]))
            total[block] += value_of[tuple(sorted((*before, block)))] - value_of[before]
    return total / math.factorial(n)


def second_difference(value_of, kept, i, j):
    def at(*more):
        return value_of[tuple(sorted((*kept, *more)))]

    return at(i, j) - at(i) - at(j) + at()


@pytest.fixture(scope="module")
def measured():
    """A chain, the values that the library finds, and losses [subset][example] by plain calls."""
    chain = random_chain(MIXED)
    before = snapshot(chain)
    values = rp.subset_values(chain, LOADER, progress=False)
    assert_same(before, snapshot(chain))
    return chain, values, {kept: losses_of(chain, kept) for kept in all_subsets(N)}


def test_every_subset_has_its_value(measured):
    _, values, losses = measured
    assert len(values) == 2**N
    assert [sum(1 << i for i in kept) for kept in values.kept_blocks] == list(range(2**N))
    for row in values.itertuples():
        expected = losses[row.kept_blocks]
        assert row.value == pytest.approx(expected.mean(), rel=1e-12)
        assert row.value_low < row.value < row.value_high
        assert np.allclose(row.influences, (expected - expected.mean()) / 20, atol=1e-14)
        assert row.block_names == tuple(f"block{i}" for i in row.kept_blocks)
        assert row.num_blocks == len(row.kept_blocks)
    assert set(values.measure) == {"cross_entropy"}


def test_shapley_and_banzhaf_values_are_those_of_all_orders_and_subsets(measured):
    _, values, losses = measured
    frame = rp.shapley_values(values)
    value_of = {kept: x.mean() for kept, x in losses.items()}
    assert np.allclose(frame.shapley, shapley_of_orders(value_of, N), atol=1e-12)
    assert frame.shapley.sum() == pytest.approx(value_of[tuple(range(N))] - value_of[()], abs=1e-10)
    for i, row in enumerate(frame.itertuples()):
        without = [kept for kept in value_of if i not in kept]
        added = [value_of[tuple(sorted((*kept, i)))] - value_of[kept] for kept in without]
        assert row.banzhaf == pytest.approx(np.mean(added), abs=1e-12)
        assert (row.block_index, row.block, row.num_examples) == (i, f"block{i}", 20)
    # The mean over examples of each example's own Shapley value.
    of_each = np.stack([
        shapley_of_orders({kept: x[example] for kept, x in losses.items()}, N) for example in range(20)
    ])
    assert np.allclose(frame.shapley_se, of_each.std(0, ddof=1) / math.sqrt(20), atol=1e-12)
    assert (frame.shapley_low < frame.shapley).all()
    assert (frame.shapley < frame.shapley_high).all()


def test_interactions_are_means_of_second_differences(measured):
    _, values, losses = measured
    value_of = {kept: x.mean() for kept, x in losses.items()}
    frame = rp.shapley_interactions(values)
    assert list(zip(frame["first"], frame["second"], strict=True)) == list(itertools.combinations(range(N), 2))
    for row in frame.itertuples():
        pair = (row.first, row.second)
        others = [kept for kept in value_of if not set(kept) & set(pair)]
        found = {kept: second_difference(value_of, kept, *pair) for kept in others}
        assert row.banzhaf_interaction == pytest.approx(np.mean(list(found.values())), abs=1e-12)
        # Each size has equal weight, which is the pair as one player in a random order (Grabisch and Roubens 1999).
        of_size = [np.mean([d for kept, d in found.items() if len(kept) == size]) for size in range(N - 1)]
        assert row.shapley_interaction == pytest.approx(np.mean(of_size), abs=1e-12)
        assert (row.first_block, row.second_block) == (f"block{row.first}", f"block{row.second}")


def variances_by_regression(value_of, n):
    """Sum of squares that products of signs of k blocks explain, by least squares."""
    subsets, sets = all_subsets(n), all_subsets(n)
    design = np.array([[math.prod(1 if i in kept else -1 for i in members) for members in sets] for kept in subsets])
    coefficients = np.linalg.lstsq(design, np.array([value_of[kept] for kept in subsets]), rcond=None)[0]
    return [sum(c**2 for c, s in zip(coefficients, sets, strict=True) if len(s) == k) for k in range(1, n + 1)]


def test_the_spectrum_is_the_analysis_of_variance(measured):
    _, values, losses = measured
    value_of = {kept: x.mean() for kept, x in losses.items()}
    frame = rp.interaction_spectrum(values)
    assert np.allclose(frame.variance, variances_by_regression(value_of, N), rtol=1e-9)
    assert frame.variance.sum() == pytest.approx(np.var(list(value_of.values())), rel=1e-10)
    assert frame.variance_share.sum() == pytest.approx(1, abs=1e-12)
    assert frame["num_sets"].tolist() == [5, 10, 10, 5, 1]
    # The errors against the jackknife, and the noise against what is left of it after the mean.
    shares = np.empty((20, N))
    for example in range(20):
        rest = {kept: np.delete(x, example).mean() for kept, x in losses.items()}
        variances = variances_by_regression(rest, N)
        shares[example] = np.array(variances) / sum(variances)
    jackknife = np.sqrt(19 / 20 * ((shares - shares.mean(0)) ** 2).sum(0))
    assert np.allclose(frame.variance_share_se, jackknife, rtol=0.2, atol=1e-5)
    of_each = np.array([variances_by_regression({k: x[e] for k, x in losses.items()}, N) for e in range(20)])
    excess = (of_each.mean(0) - frame.variance) / 19  # the mean square less the square of the mean
    assert np.allclose(frame.noise_share, excess / frame.variance.sum(), rtol=1e-8)


def test_values_in_any_order_and_of_several_measures(measured):
    chain, values, _ = measured
    shuffled = values.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(rp.shapley_values(shuffled), rp.shapley_values(values))
    both = rp.subset_values(chain, LOADER, ["margin", "cross_entropy"], progress=False)
    assert both.measure.unique().tolist() == ["margin", "cross_entropy"]
    again = both[both.measure == "cross_entropy"].reset_index(drop=True)
    pd.testing.assert_frame_equal(again[values.columns], values)
    with pytest.raises(rp.ResnetPathsError, match=r"values: got '64 rows of 5 blocks'; .*one measure"):
        rp.shapley_values(both)
    with pytest.raises(rp.ResnetPathsError, match=r"CSV"):
        rp.interaction_spectrum(values.assign(kept_blocks=values.kept_blocks.map(str)))


def test_some_blocks_are_players_and_all_others_stay(measured):
    chain, values, _ = measured
    some = rp.subset_values(chain, LOADER, blocks=["block3", 0], progress=False)
    assert some.kept_blocks.tolist() == [(), (0,), (3,), (0, 3)]
    whole = dict(zip(values.kept_blocks, values.value, strict=True))
    assert some.value.tolist() == [whole[kept] for kept in [(1, 2, 4), (0, 1, 2, 4), (1, 2, 3, 4), (0, 1, 2, 3, 4)]]
    (lone,) = rp.shapley_values(rp.subset_values(chain, LOADER, blocks=[2], progress=False)).itertuples()
    assert lone.shapley == lone.banzhaf == pytest.approx(whole[0, 1, 2, 3, 4] - whole[0, 1, 3, 4], abs=1e-14)
    with pytest.raises(rp.ResnetPathsError, match=r"values: got 'subsets of 1 block'; allowed: subsets of two"):
        rp.shapley_interactions(rp.subset_values(chain, LOADER, blocks=[2], progress=False))
    with pytest.raises(rp.ResnetPathsError, match=r"blocks: got '16 blocks'; allowed: at most 15.*sampled_shapley"):
        rp.subset_deletions(random_chain((3, (Plan(3, "identity", False, False),) * 16)))


def test_a_store_holds_the_values(measured, tmp_path):
    chain, values, _ = measured
    for _ in range(2):
        stored = rp.subset_values(chain, LOADER, store=tmp_path, progress=False)
        pd.testing.assert_frame_equal(stored, values)


class Watched(nn.Linear):
    """A branch that counts the states that are alive when it runs."""

    def __init__(self, seen):
        super().__init__(3, 3)
        self.seen = seen

    def forward(self, x):
        self.seen.append(weakref.ref(x))
        alive = {id(state) for one in self.seen if (state := one()) is not None}
        self.most = max(getattr(self, "most", 0), len(alive))
        self.calls = getattr(self, "calls", 0) + 1
        return torch.tanh(super().forward(x))


def test_one_block_evaluation_for_each_subset_and_few_states_at_once():
    n, seen = 8, []
    blocks = [Block(Watched(seen), nn.Identity(), name=f"b{i}", in_shape=(3,), out_shape=(3,)) for i in range(n)]
    chain = ResidualChain(nn.Linear(5, 3), blocks, nn.Linear(3, 3)).double().eval()
    values = rp.subset_values(chain, LOADER[:1], progress=False)
    assert values.attrs == {"block_evaluations": 2**n - 1, "block_evaluations_naive": n * 2 ** (n - 1)}
    assert sum(block.branch.calls for block in chain) == 2**n - 1
    assert max(block.branch.most for block in chain) <= n + 1


def loop(model, branches, x, y):
    """Mean cross-entropy of every subset, one forward pass of the plain model for each.

    The last modules of the branches of each deleted block return 0.
    """
    kept = []

    def gate(block):
        return lambda module, args, output: output if block in kept else torch.zeros_like(output)

    handles = [m.register_forward_hook(gate(i)) for i, modules in enumerate(branches) for m in modules]
    found = {}
    with torch.inference_mode():
        for kept[:] in all_subsets(len(branches)):
            found[tuple(kept)] = F.cross_entropy(model(x), y).item()
    for handle in handles:
        handle.remove()
    return found


def shapley_by_formula(value_of, n):
    return [
        sum(
            math.factorial(len(s)) * math.factorial(n - 1 - len(s)) / math.factorial(n)
            * (value_of[tuple(sorted((*s, i)))] - value_of[s])
            for s in value_of
            if i not in s
        )
        for i in range(n)
    ]  # fmt: skip


def check_against_loop(values, found, n):
    assert np.allclose(values.value, [found[kept] for kept in values.kept_blocks], atol=1e-10)
    shapley = rp.shapley_values(values).shapley
    assert np.allclose(shapley, shapley_by_formula(found, n), atol=1e-10)
    assert shapley.sum() == pytest.approx(values.value.iloc[-1] - values.value.iloc[0], abs=1e-10)


def test_the_shipped_resnet_against_a_loop_over_all_512_subsets():
    model = rp.load_network("preact-resnet-20", device="cpu").double()
    data = rp.load_dataset("fashion-mnist", split="test")
    x, y = (torch.stack([torch.as_tensor(data[i][part]) for i in range(2)]) for part in (0, 1))
    chain = rp.unravel(model, x[:1].double())
    values = rp.subset_values(chain, [(x.double(), y)], device="cpu", progress=False)
    # The projections of two blocks run whether the block is kept or deleted.
    assert values.attrs == {"block_evaluations": 583, "block_evaluations_naive": 2816}
    last = [[block.conv2] for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    check_against_loop(values, loop(model, last, x.double(), y), 9)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twelve_layers_of_a_language_model_against_a_loop_over_all_4096_subsets():
    model = LanguageModel(num_layers=12, width=8, num_heads=2, context=6)
    generator = torch.Generator().manual_seed(0)
    initialise(model, generator)
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that layers matter
    text, y = (torch.randint(256, shape, generator=generator) for shape in ((3, 6), (3,)))
    layers = rp.group_blocks(rp.unravel(model, text[:1]))
    values = rp.subset_values(layers, [(text, y)], device="cpu", progress=False)
    # Two blocks in each layer: 4,095 layers in place of 24,576.
    assert values.attrs == {"block_evaluations": 2 * 4095, "block_evaluations_naive": 2 * 24576}
    last = [[layer.attention, layer.mlp] for layer in model.layers]
    check_against_loop(values, loop(model, last, text, y), 12)


def test_influences_of_tokens_are_those_of_a_ratio():
    model = LanguageModel(num_layers=1, width=8, num_heads=2, context=6)
    initialise(model, torch.Generator().manual_seed(0))
    model = model.double().eval()
    model.forward = model.at_every_position
    text = torch.randint(256, (4, 6), generator=torch.Generator().manual_seed(1))
    labels = text.clone()
    labels[1, 3:], labels[2] = -100, -100
    chain = rp.unravel(model, text[:1])
    values = rp.subset_values(
        chain, [(text, labels)], ["cross_entropy", "perplexity"], shift_labels=True, progress=False
    )
    row = values[(values.measure == "cross_entropy") & (values.num_blocks == 2)].iloc[0]
    with torch.no_grad():
        losses = F.cross_entropy(
            chain(text)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
        )
    sums, counts = losses.sum(1).numpy(), (labels[:, 1:] != -100).sum(1).numpy()
    mean = sums.sum() / counts.sum()
    assert np.allclose(row.influences, (sums - mean * counts) / counts.sum(), atol=1e-12)
    perplexity = values[(values.measure == "perplexity") & (values.num_blocks == 2)].iloc[0]
    assert np.allclose(perplexity.influences, math.exp(mean) * row.influences, atol=1e-10)
    # A sequence without labels is no example of the standard error.
    both = rp.shapley_values(values[values.measure == "cross_entropy"])
    assert both.shapley_se.notna().all()


def game(values, influences=None):
    """A frame of values in the order of binary numbers."""
    n = int(math.log2(len(values)))
    kept = [tuple(i for i in range(n) if number >> i & 1) for number in range(2**n)]
    examples = np.zeros((2**n, 4)) if influences is None else influences
    names = [tuple(f"b{i}" for i in each) for each in kept]
    return pd.DataFrame({
        "kept_blocks": kept, "block_names": names, "value": values, "influences": list(examples), "measure": "v"
    })  # fmt: skip


def test_an_additive_game_has_no_interactions_and_a_product_has_all():
    weights = np.array([1.0, -2.0, 0.5, 3.0])
    bits = np.array([[number >> i & 1 for i in range(4)] for number in range(16)])
    additive = game(bits @ weights)
    assert np.allclose(rp.shapley_values(additive)[["shapley", "banzhaf"]].to_numpy(), weights[:, None])
    assert np.allclose(rp.shapley_interactions(additive).shapley_interaction, 0)
    assert np.allclose(rp.interaction_spectrum(additive).variance_share, [1, 0, 0, 0])
    product = game((1.0 - 2 * bits).prod(1))
    assert np.allclose(rp.interaction_spectrum(product).variance_share, [0, 0, 0, 1])
    constant = rp.interaction_spectrum(game(np.ones(16)))
    assert constant.variance_share.isna().all()
    assert (constant.variance == 0).all()


def test_intervals_hold_the_truth_at_their_rate():
    """Samples of examples from a population whose Shapley value, interaction and spectrum are known."""
    generator = np.random.default_rng(0)
    n, num, trials = 3, 100, 300
    mean, spread = generator.normal(size=2**n), generator.normal(size=(2**n, 4))
    population = game(mean)
    truth = {
        "shapley": rp.shapley_values(population).shapley,
        "banzhaf": rp.shapley_values(population).banzhaf,
        "shapley_interaction": rp.shapley_interactions(population).shapley_interaction,
        "variance_share": rp.interaction_spectrum(population).variance_share,
    }
    held = {name: [] for name in truth}
    for _ in range(trials):
        sample = mean[:, None] + 0.3 * spread @ generator.exponential(size=(4, num)) - 0.3 * spread.sum(1)[:, None]
        found = game(sample.mean(1), (sample - sample.mean(1, keepdims=True)) / num)
        frames = rp.shapley_values(found), rp.shapley_interactions(found), rp.interaction_spectrum(found)
        for name, value in truth.items():
            (frame,) = [frame for frame in frames if name in frame]
            held[name].append((frame[f"{name}_low"] <= value) & (value <= frame[f"{name}_high"]))
    rates = {name: np.mean(inside) for name, inside in held.items()}
    assert all(0.91 < rate < 0.98 for rate in rates.values()), rates
