"""Plans over layers against hand-written lists of decoder layers of transformers, and over ranges against loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet_paths as rp
from tests.chains import Plan, inputs, random_chain

transformers = pytest.importorskip("transformers")

STEADY = (3, tuple(Plan(3, "identity", False, False) for _ in range(5)))
SIZES = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2}


def llama(num_layers=5):
    config = transformers.LlamaConfig(
        **SIZES, hidden_size=16, intermediate_size=24, num_hidden_layers=num_layers, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config), "model.layers"


def gpt2(num_layers=5):
    config = transformers.GPT2Config(**SIZES, n_embd=16, n_layer=num_layers, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config), "transformer.h"


def pythia(num_layers=5):
    config = transformers.GPTNeoXConfig(
        **SIZES, hidden_size=16, intermediate_size=24, num_hidden_layers=num_layers, num_attention_heads=2
    )
    return transformers.GPTNeoXForCausalLM(config), "gpt_neox.layers"


class Averaged(nn.Module):
    """Decoder layers side by side."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden, *args, **kwargs):
        found = [layer(hidden, *args, **kwargs) for layer in self.layers]
        if isinstance(found[0], tuple):
            return (sum(output[0] for output in found) / len(found),)
        return sum(found) / len(found)


def by_hand(model, name, layers, batch):
    """What the model returns with another list of decoder layers."""
    holder, _, attribute = name.rpartition(".")
    holder = model.get_submodule(holder)
    intact, number = getattr(holder, attribute), model.config.num_hidden_layers
    try:
        setattr(holder, attribute, nn.ModuleList(layers))
        model.config.num_hidden_layers = len(layers)
        return model(**batch).logits
    finally:
        setattr(holder, attribute, intact)
        model.config.num_hidden_layers = number


def batch_of_tokens():
    tokens = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "use_cache": False}


def read(make):
    torch.manual_seed(0)
    model, name = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.eval()
    return model, name, list(model.get_submodule(name)), rp.unravel(model, batch_of_tokens())


@pytest.mark.parametrize("make", [llama, gpt2, pythia])
@torch.no_grad()
def test_schedules_equal_lists_of_decoder_layers(make):
    model, name, layers, chain = read(make)
    grouped = rp.group_blocks(chain)
    assert [block.name for block in grouped] == [f"{name}.{i}" for i in range(5)]
    schedules = rp.layer_schedules(chain, loops=2, generator=torch.Generator().manual_seed(3))
    of_groups = rp.layer_schedules(grouped, loops=2, generator=torch.Generator().manual_seed(3))
    first, *middle, last = layers
    draw = torch.randperm(3, generator=torch.Generator().manual_seed(3)).tolist()
    expected = {
        "skip": [],
        "middle repeat": [middle[1]] * 3,
        "reverse": middle[::-1],
        "random order": [middle[i] for i in draw],
        "parallel": [Averaged(middle)],
        "looped parallel": [Averaged(middle)] * 2,
    }
    batch = batch_of_tokens()
    assert [lesion.name for lesion in schedules] == [lesion.name for lesion in of_groups] == list(expected)
    for lesion, other in zip(schedules, of_groups, strict=True):
        hand = by_hand(model, name, [first, *expected[lesion.name], last], batch)
        torch.testing.assert_close(lesion.edit(chain)(**batch), hand, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.edit(grouped)(**batch), hand, rtol=0, atol=1e-5)


@torch.no_grad()
def test_ranges_of_layers_equal_lists_of_decoder_layers():
    model, name, layers, chain = read(llama)
    grouped, batch = rp.group_blocks(chain), batch_of_tokens()
    for lesion in rp.range_deletions(grouped, [2]):
        start = lesion.blocks[0]
        hand = by_hand(model, name, layers[:start] + layers[start + 2 :], batch)
        torch.testing.assert_close(lesion.edit(grouped)(**batch), hand, rtol=0, atol=1e-5)
    for lesion in rp.range_repeats(grouped, [3]):
        start = lesion.blocks[0]
        hand = by_hand(model, name, layers[: start + 3] + layers[start:], batch)
        torch.testing.assert_close(lesion.edit(grouped)(**batch), hand, rtol=0, atol=1e-5)


def run_blocks(chain, order):
    state = chain.stem(inputs())
    for index in order:
        state = chain[index](state)
    return chain.head(state)


@torch.no_grad()
def test_ranges_equal_loops_over_blocks():
    chain = random_chain(STEADY)
    whole = list(range(5))
    expected = {
        rp.range_deletions: lambda i, n: whole[:i] + whole[i + n :],
        rp.range_repeats: lambda i, n: whole[: i + n] + whole[i:],
    }
    for plan, order_of in expected.items():
        lesions = plan(chain)
        assert [lesion.blocks for lesion in lesions] == [
            tuple(range(start, start + length)) for length in range(1, 6) for start in range(6 - length)
        ]
        for lesion in lesions:
            order = order_of(lesion.blocks[0], len(lesion.blocks))
            torch.testing.assert_close(lesion.edit(chain)(inputs()), run_blocks(chain, order), rtol=0, atol=0)
    for length, plan in ((1, rp.neighbour_swaps(chain)), (2, rp.range_swaps(chain, 2))):
        assert [lesion.blocks[0] for lesion in plan] == list(range(6 - 2 * length))
        for lesion in plan:
            i = lesion.blocks[0]
            moved = whole[i + length : i + 2 * length] + whole[i : i + length]
            order = whole[:i] + moved + whole[i + 2 * length :]
            assert torch.equal(lesion.edit(chain)(inputs()), run_blocks(chain, order))
    ranked = rp.ranked_deletions(chain, [3, "block0", 4])
    assert [lesion.blocks for lesion in ranked] == [(3,), (0, 3), (0, 3, 4)]
    for lesion in ranked:
        order = [i for i in whole if i not in lesion.blocks]
        assert torch.equal(lesion.edit(chain)(inputs()), run_blocks(chain, order))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: rp.range_deletions(c, [6]), r"lengths: got 6; allowed: numbers of blocks from 1 to 5"),
        (lambda c: rp.range_repeats(c, [0]), r"lengths: got 0; allowed: numbers of blocks from 1 to 5"),
        (lambda c: rp.range_swaps(c, 3), r"lengths: got 3; allowed: numbers of blocks from 1 to 2"),
        (lambda c: rp.ranked_deletions(c, [1, "block1"]), r"ranking: got \[1, 'block1'\]; allowed: each block once"),
    ],
)
def test_ranges_that_are_none(call, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        call(random_chain(STEADY))
