"""States that are read again later: by a sum over all of them, or by one branch or a few.

Such a state reaches the output beside the blocks after it, so that these are no merges by themselves. Expected
values are made in plain PyTorch (`tests.unraveling.networks`).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet_paths as rp
from tests.unraveling.networks import WIDTH, draw, linear, linears, network, without, zeroed
from tests.unraveling.test_faults import assert_shares, close, found_or_refused, names_in

X = draw(4, WIDTH)


def states_of(m, x, add):
    states = [m.stem(x)]
    for layer in m.f:
        states.append(add(states[-1], torch.tanh(layer(states[-1]))))
    return states


def weighted_average(m, x, add=torch.add):
    """As DenseFormer before its last layer."""
    return m.head(sum(weight * state for weight, state in zip(m.weights, states_of(m, x, add), strict=True)))


def sum_without_the_first(m, x, add=torch.add):
    return m.head(sum(states_of(m, x, add)[1:]))


def mean(m, x, add=torch.add):
    return m.head(torch.stack(states_of(m, x, add)).mean(0))


def sum_in_the_middle(m, x, add=torch.add):
    *before, last = states_of(m, x, add)
    x = torch.tanh(m.up(last + 0.5 * before[2] + before[1].relu()))
    return m.head(add(x, torch.tanh(m.down(x))))


def added_inside_branches(m, x, add=torch.add):
    x = x0 = m.stem(x)
    for layer in m.f:
        x = add(x, torch.tanh(layer(x + x0)))
    return m.head(x)


def read_once(m, x, add=torch.add, *, at=1):
    """As the shared layers of Zamba2, which read the embeddings beside the state."""
    x = x0 = m.stem(x)
    for i, layer in enumerate(m.f):
        y = m.both(torch.cat([x, x0], 1)) if i == at else x
        x = add(x, torch.tanh(layer(y)))
    return m.head(x)


def read_by_the_last(m, x, add=torch.add):
    return read_once(m, x, add, at=2)


@pytest.mark.parametrize(
    ("run", "number"),
    [
        (weighted_average, 3),
        (sum_without_the_first, 3),
        (mean, 3),
        (sum_in_the_middle, 4),
        (added_inside_branches, 3),
        (read_once, 3),
        (read_by_the_last, 3),
    ],
)
def test_each_addition_is_a_block(run, number):
    model = made(run)
    chain = rp.unravel(model, X)
    assert names_in(chain) == ["f.0", "f.1", "f.2", "down"][:number]
    assert chain.num_paths == 2**number
    close(chain(X), model(X))
    for index in range(number):
        close(rp.delete_block(chain, index)(X), model(X, add=without(index)))
    assert_shares(chain, model, [X], number)


def test_additions_in_the_gate_of_a_branch_do_not_hide_its_block():
    def run(m, x, add=torch.add):
        x = m.stem(x)
        y = m.up(x)
        gate = torch.abs(y)
        for layer in m.f:
            gate = gate + torch.tanh(layer(gate))
        x = add(x, m.down(y * torch.sigmoid(gate)))
        return m.head(add(x, torch.tanh(m.last(x))))

    parts = {name: linear() for name in ("stem", "up", "down", "last", "head")}
    model = network(run, f=linears(3), **parts)
    chain = rp.unravel(model, X)
    assert len(names_in(chain)) == 2
    for index in range(2):
        close(rp.delete_block(chain, index)(X), model(X, add=without(index)))
    assert_shares(chain, model, [X], 2)


def test_states_that_hooks_store_and_the_head_reads():
    """As models of transformers that collect the states of their layers for a decoder."""
    states = []

    def run(m, x):
        states.clear()
        for layer in m.f:
            x = layer(x)
        return m.both(torch.cat(states, 1))

    model = network(run, f=lambda: nn.ModuleList(Residual() for _ in range(2)), both=linear(2 * WIDTH, 3))
    for layer in model.f:
        layer.register_forward_hook(lambda module, args, output: states.append(output))
    model(X)
    chain = rp.unravel(model, X)
    assert names_in(chain) == ["f.0", "f.1"]
    for index in range(2):
        with zeroed(model.f[index].layer):
            close(rp.delete_block(chain, index)(X), model(X))
    close(chain(X), model(X))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.layer(x)


def two_skips_that_cross(m, x, add=torch.add):
    x0, _, middle, last = states_of(m, x, add)
    return m.head(torch.tanh(m.up(last + x0)) + middle)


def logits_of_every_state(m, x, add=torch.add):
    """As with deep supervision: each state has a head of its own."""
    heads = [m.up, m.down, m.up, m.head]
    return sum(head(state) for head, state in zip(heads, states_of(m, x, add), strict=True))


@pytest.mark.parametrize("run", [two_skips_that_cross, logits_of_every_state])
def test_what_is_no_chain_of_its_additions_is_refused(run):
    assert found_or_refused(made(run), X, "share nothing", "inside block", "reads an earlier one") is None


def reads_the_middle(m, x, add=torch.add, *, readers=(2,)):
    """The last branches read the state after the first block beside the one before them."""
    x = middle = m.stem(x)
    for i, layer in enumerate(m.f):
        y = m.both(torch.cat([x, middle], 1)) if i in readers else x
        x = add(x, torch.tanh(layer(y)))
        middle = x if i == 0 else middle
    return m.head(x)


@pytest.mark.parametrize(
    ("num_blocks", "readers", "named"),
    [(3, (2,), "this reads an earlier one, add"), (4, (2, 3), "inside block"), (4, (3,), "inside block")],
)
def test_a_branch_that_reads_a_state_in_the_middle_is_refused_with_what_to_wrap(num_blocks, readers, named):
    def run(m, x, add=torch.add):
        return reads_the_middle(m, x, add, readers=readers)

    model = network(run, stem=linear(), f=linears(num_blocks), both=linear(2 * WIDTH, WIDTH), head=linear())
    with pytest.raises(rp.ResnetPathsError, match=f"{named}.*Wrap what follows the earlier state in a module"):
        rp.unravel(model, X)

    def rest(m, x):
        middle = x
        for i, layer in enumerate(m.f[1:], start=1):
            x = x + torch.tanh(layer(m.both(torch.cat([x, middle], 1)) if i in readers else x))
        return m.head(x)

    wrapped = network(rest, f=lambda: model.f, both=lambda: model.both, head=lambda: model.head)
    chain, x = rp.unravel(wrapped, X), draw(3, WIDTH, seed=1)
    assert len(chain) == num_blocks - 1
    close(chain(x), rest(model, x))


def test_an_encoder_and_a_decoder_of_the_same_tokens_name_what_to_pass():
    def run(m, tokens):
        memory, x = m.embed(tokens), m.embed(tokens.flip(1))
        for layer in m.f:
            memory = memory + torch.tanh(layer(memory))
            x = x + torch.tanh(m.both(torch.cat([x, memory], 2)))
        return m.head(x)

    parts = {"embed": lambda: nn.Embedding(9, WIDTH), "f": linears(2), "both": linear(2 * WIDTH), "head": linear()}
    with pytest.raises(rp.ResnetPathsError, match=r"one state between.*An encoder and its decoder.*decoder_input_ids"):
        rp.unravel(network(run, **parts), torch.arange(8).view(2, 4))


def made(run):
    return network(
        run,
        stem=linear(),
        f=linears(3),
        weights=lambda: nn.Parameter(torch.tensor([0.1, 0.4, -0.3, 1.2])),
        both=linear(2 * WIDTH, WIDTH),
        up=linear(),
        down=linear(),
        head=linear(),
    )
