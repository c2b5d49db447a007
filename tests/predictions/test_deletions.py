"""Direct effects and what changes when a block is deleted, against plain PyTorch with hooks on three networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import resnet_paths as rp
from resnet_paths.predictions.shares import pooled_share
from tests.gradients.gradient_reference import Recipe, assert_column, batch, build, jacobian, recipes, sides
from tests.predictions.enumeration import margin
from tests.predictions.plain_networks import ResNet, made, run

NETWORKS = ("resnet", "vit", "gpt2")


def plain_effects(model, inputs, added=None):
    """What each branch adds to the output directly, [block, batch]: `added` at the activations of the intact model."""
    _, intact, last = run(model, inputs)
    added = intact if added is None else added
    if not isinstance(model, ResNet):
        return torch.stack([model.read(added[index], last) for index in added])
    x = model.stem(inputs) + intact[0] + intact[1]

    def skipped(vectors):
        return torch.autograd.functional.jvp(lambda x: model.projection(model.shared(x)), x, vectors)[1]

    vectors = [skipped(added[0]), skipped(added[1]), added[2], added[3]]
    return torch.stack([model.read(vector, last) for vector in vectors])


@pytest.mark.parametrize("name", NETWORKS)
def test_direct_effects_of_networks(name):
    model, chain, inputs = made(name)
    frame = rp.direct_effects(chain, inputs, output=model.output_of)
    expected = plain_effects(model, inputs).detach()
    assert_column(frame[1:-1].reset_index(), "direct_effect", expected)
    output = run(model, inputs)[0]
    assert frame.direct_effect.sum() == pytest.approx(output.mean().item(), abs=1e-12)
    assert frame.attrs["residual"] <= 1e-12
    np.testing.assert_allclose(frame.share, frame.direct_effect / output.mean().item())
    np.testing.assert_allclose(frame.mean_absolute_direct_effect[1:-1], expected.abs().mean(1))
    assert frame.source.tolist() == ["stem", *(block.name for block in chain), "constants"]
    assert frame.attrs["tangent_operations"] == []


@settings(max_examples=40, deadline=None)
@given(blocks=recipes(5, 1), seed=st.integers(0, 2**16))
def test_direct_effects_follow_the_skips(blocks, seed):
    """Against dense Jacobians of what follows each branch, the skips of all later blocks and the head."""
    chain, inputs = build(blocks, seed), batch(2, seed)[0]
    frame = rp.direct_effects(chain, inputs, linearization="tangent")
    states, weights, added = [chain.stem(inputs).detach()], [], []
    for block in chain:
        shared = block.pre(states[-1])
        branch = None if block.branch is None else block.branch(shared)
        skip = None if block.skip is None else block.skip(shared)
        total = branch if skip is None else skip if branch is None else skip + branch
        added.append(branch)
        weights.append(jacobian(block.post, total)[1])
        states.append(block(states[-1]).detach())
    predicted = chain(inputs).argmax(1)
    output, dense = jacobian(lambda x: margin(chain.head(x), predicted)[:, None], states[-1])
    expected = []
    for block, state, weight, branch in reversed(list(zip(chain, states, weights, added, strict=False))):
        effect = dense @ weight @ branch[..., None] if branch is not None else torch.zeros(2, 1, 1)
        expected.append(effect[:, 0, 0].mean())
        through_skip = sides(block, state)[1].get(False)
        dense = torch.zeros(2, 1, state.shape[1]).double() if through_skip is None else dense @ through_skip
    expected.append((dense @ states[0][..., None]).mean())
    scale = frame.mean_absolute_direct_effect.sum()
    np.testing.assert_allclose(frame.direct_effect[:-1][::-1], torch.stack(expected).detach(), atol=1e-10 * scale)
    assert frame.direct_effect.sum() == pytest.approx(output.mean().item(), abs=1e-10 * scale)


def test_direct_effects_are_the_paths_that_end_with_the_block():
    """With one path for each source and length, as in a chain of two blocks."""
    chain, inputs = build((Recipe(3, "identity"),) * 2, 3), batch()[0]
    paths = rp.prediction_by_path_length(chain, inputs, by_source=True)
    of = paths.set_index(["source", "path_length"]).contribution
    effects = rp.direct_effects(chain, inputs, linearization="tangent").set_index("source").direct_effect
    assert effects["stem"] == pytest.approx(of["stem", 0], abs=1e-12)
    assert effects["constants"] == pytest.approx(of["head", 0], abs=1e-12)
    last = of["stem", 2] + of["block0", 2] + of["block1", 1]
    assert effects.sum() - effects["block1"] - effects["block0"] == pytest.approx(of["stem", 0] + of["head", 0])
    assert effects["block0"] + effects["block1"] - last == pytest.approx(of["stem", 1] + of["block0", 1], abs=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_effect_matrix_of_networks(name):
    model, chain, inputs = made(name)
    frame = rp.effect_matrix(chain, inputs, output=model.output_of).set_index(["deleted_index", "block_index"])
    assert list(frame.index) == [(s, later) for s in range(4) for later in range(s + 1, 4)]
    intact = run(model, inputs)[1]
    effects = plain_effects(model, inputs)
    for (deleted, index), row in frame.iterrows():
        lesioned = run(model, inputs, {deleted})[1]
        change, whole = lesioned[index] - intact[index], intact[index]
        if name == "resnet":
            ratio = (change.flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1))[:, None]
        else:
            ratio = change.norm(dim=2) / whole.norm(dim=2)
        assert row.relative_change == pytest.approx(ratio.mean().item(), abs=1e-12)
        assert row.relative_change_se == pytest.approx(ratio.mean(1).std().item() / 2, abs=1e-12)
        assert row.max_relative_change == pytest.approx(ratio.max().item(), abs=1e-12)
        moved = plain_effects(model, inputs, lesioned)[index] - effects[index]
        assert row.direct_effect == pytest.approx(effects[index].mean().item(), abs=1e-12)
        assert row.direct_effect_change == pytest.approx(moved.mean().item(), abs=1e-12)
        assert row.direct_effect_change_se == pytest.approx(moved.std().item() / 2, abs=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("blocks", [(0,), (1,), (3,), (0, 2), (1, 2, 3)])
def test_account_of_networks(name, blocks):
    model, chain, inputs = made(name)
    lesion = rp.Lesion("delete", blocks, name="some")
    frame = rp.deletion_account(chain, inputs, [lesion], output=model.output_of)
    output, _, last = run(model, inputs)
    without, lesioned, last_without = run(model, inputs, blocks)
    effects, moved = plain_effects(model, inputs), plain_effects(model, inputs, lesioned)
    later = [index for index in range(blocks[0], 4) if index not in blocks]
    terms = {
        "total_effect": without - output,
        "direct_effect": effects[list(blocks)].sum(0),
        "later_change": (moved - effects)[later].sum(0),
        # What the output is, less what the intact model would read off the same state.
        "head_change": without - output - model.read(last_without - last, last),
    }
    terms["skip_change"] = model.read(last_without - last, last) - (moved - effects).sum(0)
    for column, values in terms.items():
        assert_column(frame, column, values[None].detach(), scale=1)
    if name != "resnet" or blocks[0] == 3:  # a plain sum
        account = [frame[column][0] for column in ("direct_effect", "later_change", "head_change")]
        assert abs(frame.total_effect[0] + account[0] - account[1] - account[2]) < 1e-10
        assert abs(frame.skip_change[0]) < 1e-10
        assert frame.skip_change_se[0] < 1e-10
    direct = terms["direct_effect"].sum()
    shares = {
        "": 1 + terms["total_effect"].sum() / direct,
        "_by_blocks": terms["later_change"].sum() / direct,
        "_by_head": terms["head_change"].sum() / direct,
    }
    for suffix, share in shares.items():
        assert frame[f"repaired_share{suffix}"][0] == pytest.approx(share.item(), abs=1e-10)
    assert frame.deleted[0] == (chain[blocks[0]].name if len(blocks) == 1 else "some")


def test_intervals_are_those_of_resampled_examples():
    chain, inputs = build((Recipe(3, "identity"),) * 3, 4), batch(30)[0]
    each = [rp.deletion_account(chain, x[None]) for x in inputs]
    total, direct = (np.array([frame[name][0] for frame in each]) for name in ("total_effect", "direct_effect"))
    frame = rp.deletion_account(chain, [(inputs[:11], None), (inputs[11:], None)], memory_budget=2000)
    assert frame.total_effect[0] == pytest.approx(total.mean(), abs=1e-13)
    picks = np.random.default_rng(1).integers(30, size=(4000, 30))
    shares = 1 + total[picks].sum(1) / direct[picks].sum(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    width = high - low
    assert frame.repaired_share_low[0] == pytest.approx(low, abs=0.15 * width)
    assert frame.repaired_share_high[0] == pytest.approx(high, abs=0.15 * width)
    assert np.isnan(each[0].repaired_share_low[0])


def test_no_interval_where_the_sign_of_the_total_is_uncertain():
    values = np.linspace(1.0, 2.0, 40)[None]
    totals = np.stack([np.linspace(1.0, 2.0, 40), np.linspace(-1.0, 1.01, 40)])
    share, low, high = pooled_share(np.repeat(values, 2, 0), totals, None)
    np.testing.assert_allclose(share, values.sum() / totals.sum(1))
    np.testing.assert_allclose([low[0], high[0]], 1)
    assert np.isnan([low[1], high[1]]).all()


def test_deletions_are_those_of_the_plan():
    _, chain, inputs = made("vit")
    given = rp.effect_matrix(chain, inputs, rp.single_deletions(chain))
    np.testing.assert_array_equal(given.relative_change, rp.effect_matrix(chain, inputs).relative_change)
    both = rp.effect_matrix(chain, inputs, [rp.Lesion("delete", (0, 2), name="two")])
    assert both.block_index.tolist() == [1, 3]
    assert both.deleted.tolist() == ["two", "two"]
    assert both.deleted_index.isna().all()


@pytest.mark.parametrize(
    ("lesions", "message"),
    [
        ([rp.Lesion("duplicate", (0,), name="twice")], "deletions"),
        ([rp.Lesion("delete", (9,), name="delete")], "deletions"),
        ([], "at least one"),
    ],
)
def test_refusals(lesions, message):
    chain = build((Recipe(2, "identity"),) * 2)
    for function in (rp.effect_matrix, rp.deletion_account):
        with pytest.raises(rp.ResnetPathsError, match=message):
            function(chain, batch()[0], lesions)
