"""What several blocks read and none changes: context, such as an attention mask, or a part of the state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import ResidualChain
from tests.chains import inputs

TARGETS = torch.tensor([0, 1, 2, 0])


class Masked(nn.Module):
    """Blocks that read a mask made from an input in the stem; `kind` says what the mask is."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.inp, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.scales = nn.Embedding(2**3, 4)
        self.register_buffer("offset", torch.tensor(2**24 + 1))

    def mask_of(self, mask):
        if self.kind == "float":
            return torch.tanh(mask)
        if self.kind == "truth":
            return mask > 0
        return mask + self.offset  # integers that float32 does not hold

    def branch(self, i, x, c):
        y = torch.tanh(self.layers[i](x))
        if self.kind == "truth":
            return y.masked_fill(c, 0.25)
        return y * (self.scales(c - self.offset) if self.kind == "integer" else c)

    def forward(self, x, mask, without=(), alone=False):
        x, c = self.inp(x), self.mask_of(mask)
        for i in range(3):
            branch = 0 if i in without else self.branch(i, x, c)
            x = branch if alone else x + branch
        return self.out(x)


def masks(kind, batch=4):
    generator = torch.Generator().manual_seed(1)
    if kind == "float":
        return torch.randn(batch, 4, generator=generator, dtype=torch.float64)
    if kind == "integer":
        return torch.randint(0, 8, (batch,), generator=generator)
    return torch.randint(-1, 2, (batch, 4), generator=generator)


def build(cls, *args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(*args).double().eval()


@pytest.mark.parametrize("kind", ["float", "truth", "integer"])
def test_what_every_block_reads_is_carried_along(kind):
    model, x, mask = build(Masked, kind), inputs(), masks(kind)
    chain = rp.unravel(model, (x, mask))
    assert [block.name for block in chain] == ["layers.0", "layers.1", "layers.2"]
    assert torch.equal(chain(x, mask), model(x, mask))
    more = torch.cat([x, x]), torch.cat([mask, mask.flip(0)])
    assert torch.equal(chain(*more), model(*more))
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 3, 3, 1]
    for i in range(3):
        assert torch.equal(rp.delete_block(chain, i)(x, mask), model(x, mask, without=(i,)))
    assert torch.equal(rp.delete_blocks(chain, [0, 1, 2])(x, mask), model(x, mask, without=(0, 1, 2)))
    assert torch.equal(rp.swap_blocks(rp.swap_blocks(chain, 0, 2), 0, 2)(x, mask), model(x, mask))
    # A path without any skip still reads the mask.
    assert torch.equal(rp.path_network(chain, (True,) * 3)(x, mask), model(x, mask, alone=True))
    halved = rp.scale_block(chain, 2, 0.5)
    state = model.inp(x)
    for i, factor in enumerate((1, 1, 0.5)):
        state = state + factor * model.branch(i, state, model.mask_of(mask))
    assert torch.equal(halved(x, mask), model.out(state))
    assert torch.equal(
        rp.path_network(halved, (False, False, True))(x, mask),
        model.out(0.5 * model.branch(2, model.inp(x), model.mask_of(mask))),
    )


@pytest.mark.parametrize("kind", ["float", "truth", "integer"])
def test_lesions_and_gradients_of_a_chain_that_carries_a_mask(kind):
    model, x, mask = build(Masked, kind), inputs(), masks(kind)
    chain = rp.unravel(model, (x, mask))
    study = rp.lesion_study(chain, [((x, mask), TARGETS)], rp.single_deletions(chain), progress=False)
    by_hand = [nn.functional.cross_entropy(model(x, mask, without=(i,)), TARGETS).item() for i in range(3)]
    assert study.cross_entropy.tolist() == pytest.approx(by_hand, rel=1e-12)
    frame = rp.gradient_by_path_length(chain, (x, mask), TARGETS, with_respect_to="stem")
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-12)

    # With one branch replaced by its mean, others still read the mask.
    for i, lesion in enumerate(rp.mean_replacements(chain, (x, mask))):
        state, c = model.inp(x), model.mask_of(mask)
        for j in range(3):
            made = model.branch(j, state, c)
            state = state + (made.mean(0) if i == j else made)
        torch.testing.assert_close(lesion.edit(chain)(x, mask), model.out(state))
    assert i == 2

    # Along the skips alone the gradient at the stem is that at the head: only branches read the mask.
    direction = torch.softmax(model(x, mask), 1) - nn.functional.one_hot(TARGETS, 3)
    along_skips = (direction @ model.out.weight).norm(dim=1).mean().item()
    assert frame.summed_path_gradient_norm[0] == pytest.approx(along_skips, rel=1e-12)


class Fixed(nn.Module):
    """The network of x alone for one mask."""

    def __init__(self, model, mask):
        super().__init__()
        self.model = model
        self.register_buffer("fixed", mask)

    def forward(self, x):
        return self.model(x, self.fixed)


@pytest.mark.parametrize("kind", ["float", "truth"])
def test_norms_and_scores_leave_the_mask_out(kind):
    model, x, mask = build(Masked, kind), inputs(), masks(kind)
    chain = rp.unravel(model, (x, mask))
    alone = [rp.unravel(Fixed(model, mask[i : i + 1]), x) for i in range(4)]

    def numbers(frame):
        columns = [
            name for name in frame.select_dtypes("number") if not name.endswith("_se") and name != "num_examples"
        ]
        return frame[columns].to_numpy()

    found = numbers(rp.block_norms(chain, (x, mask)))
    expected = [numbers(rp.block_norms(alone[i], x[i : i + 1])) for i in range(4)]
    np.testing.assert_allclose(found, np.mean(expected, 0), rtol=1e-12)
    deleted = rp.block_norms(rp.delete_block(chain, 1), (x, mask))
    assert deleted.branch_norm.isna().tolist() == [False, True, False]
    for dim in (None, -1):
        found = numbers(rp.predicted_effects(chain, [((x, mask), TARGETS)], feature_dim=dim, progress=False))
        loaders = [[(x[i : i + 1], TARGETS[i : i + 1])] for i in range(4)]
        expected = [
            numbers(rp.predicted_effects(alone[i], loaders[i], feature_dim=dim, progress=False)) for i in range(4)
        ]
        np.testing.assert_allclose(found, np.mean(expected, 0), rtol=1e-10)


def test_gradients_reach_an_input_that_is_carried_along():
    model, x, mask = build(Masked, "float"), inputs(), masks("float")
    chain = rp.unravel(model, (x, mask))
    frame = rp.gradient_by_path_length(chain, (x, mask), TARGETS, with_respect_to="input")
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-12)
    # With all branches but one deleted, length 1 is autograd's gradient through that one.
    one = rp.delete_blocks(chain, [0, 2])
    split = rp.gradient_by_path_length(one, (x, mask), TARGETS, with_respect_to="input")
    a, b = x.clone().requires_grad_(), mask.clone().requires_grad_()
    h = model.inp(a)
    skip, branch = h, model.branch(1, h, model.mask_of(b))
    logits = model.out(skip + branch)
    cotangent = (torch.softmax(logits, 1) - nn.functional.one_hot(TARGETS, 3)).detach() @ model.out.weight
    parts = torch.autograd.grad((branch * cotangent.detach()).sum(), (a, b))
    norm = torch.cat(parts, 1).norm(dim=1).mean().item()
    assert split.summed_path_gradient_norm[1] == pytest.approx(norm, rel=1e-12)


class Positions(nn.Module):
    """One row of positions for all examples, a mask, and a map of both that every block makes anew."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(6, 4)
        self.layers, self.out = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3)

    def forward(self, tokens, positions):
        x = self.words(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x * self.places(positions)))
        return self.out(x.mean(1))


def test_one_row_for_all_examples_is_carried_along():
    model = build(Positions)
    tokens = torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(0))
    row = torch.arange(6)[None]
    chain = rp.unravel(model, {"tokens": tokens, "positions": row})
    assert len(chain) == 3
    for batch in (tokens, tokens[:1], torch.cat([tokens, tokens])):
        assert torch.equal(chain(tokens=batch, positions=row.flip(1)), model(batch, row.flip(1)))


class Diffusion(nn.Module):
    """As the U-Net of a diffusion model: the embedding of the time is read at every depth."""

    def __init__(self):
        super().__init__()
        self.inp, self.time, self.out = nn.Linear(5, 4), nn.Linear(1, 2), nn.Linear(8, 3)
        self.down, self.up, self.mid = nn.Linear(4, 2), nn.Linear(2, 4), nn.ModuleList(nn.Linear(2, 2) for _ in "ab")

    def forward(self, x, time, without=()):
        h, t = torch.tanh(self.inp(x)), torch.tanh(self.time(time))
        z = torch.tanh(self.down(h))
        for i, layer in enumerate(self.mid):
            z = z if i in without else z + torch.tanh(layer(z) * t)
        return self.out(torch.cat([h, torch.tanh(self.up(z * t))], 1))


def test_the_time_of_a_diffusion_model_is_carried_into_the_blocks_inside():
    model, x, time = build(Diffusion), inputs(), torch.rand(4, 1, dtype=torch.float64)
    chain = rp.unravel(model, (x, time))
    assert torch.equal(chain(x, time), model(x, time))
    assert isinstance(chain[0].branch, ResidualChain)
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 1, 2, 1]  # 1 + t (1 + t)^2
    names = [block.name for block in chain[0].branch]
    edited = rp.delete_block(chain, names[0])
    assert torch.equal(edited(x, time), model(x, time, without=(0,)))
    paths = list(rp.enumerate_paths(chain))
    assert [rp.path_network(chain, path)(x, time).shape for path in paths] == [(4, 3)] * 5
    frame = rp.gradient_by_path_length(chain, (x, time), TARGETS)
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-12)


def test_a_number_that_blocks_read_is_context():
    model, x = Scalar(build(Diffusion)), inputs()
    batch = {"x": x, "time": torch.tensor(0.5, dtype=torch.float64)}
    chain = rp.unravel(model, batch)
    assert len(chain) == len(model.layers)
    other = {**batch, "time": torch.tensor(-2.0, dtype=torch.float64)}
    assert torch.equal(chain(**other), model(**other))
    for i in range(len(chain)):
        assert torch.equal(rp.delete_block(chain, i)(**other), model(**other, without=(i,)))


class Scalar(nn.Module):
    """A time for the whole batch, a tensor without dimensions."""

    def __init__(self, model):
        super().__init__()
        self.layers = model.mid
        self.inp, self.out = nn.Linear(5, 2).double(), nn.Linear(2, 3).double()
        self.training = False

    def forward(self, x, time, without=()):
        x = self.inp(x)
        for i, layer in enumerate(self.layers):
            x = x if i in without else x + time * layer(x)
        return self.out(x)


def masked_bert():
    """A small BERT, tokens [4, 7] and the mask of those that count."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    model = build(transformers.BertForSequenceClassification, config)
    for parameter in model.parameters():  # as they start, branches are too small to tell a mask from none
        parameter.data.mul_(4)
    tokens = torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 1])[:, None]).long()
    return model, tokens, mask


def test_bert_with_an_attention_mask():
    model, tokens, mask = masked_bert()
    example = {"input_ids": tokens, "attention_mask": mask}
    chain = rp.unravel(model, example)
    with torch.no_grad():
        assert torch.equal(chain(**example), model(**example).logits)
        unmasked = {"input_ids": tokens, "attention_mask": torch.ones_like(mask)}
        assert torch.equal(chain(**unmasked), model(**unmasked).logits)
        assert not torch.allclose(chain(**example), chain(**unmasked), rtol=1e-4)
        assert (len(chain), chain.num_paths) == (4, 2**4)
        deleted = rp.delete_block(chain, "bert.encoder.layer.0.attention.output")(**example)
        dense = model.bert.encoder.layer[0].attention.output.dense
        dense.weight.zero_()
        dense.bias.zero_()
        assert torch.allclose(deleted, model(**example).logits, rtol=0, atol=1e-14)


class ClassAttention(nn.Module):
    """As CaiT: layers on the tokens, then two in which a class token reads the tokens, which stay as they are."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 12), nn.Linear(4, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.reads, self.maps = (nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in "ab")

    def read(self, i, token, x):
        both = torch.cat([token, x], 1)
        return nn.functional.scaled_dot_product_attention(self.reads[i](token), both, both)

    def forward(self, x, without=()):
        x = self.inp(x).unflatten(1, (3, 4))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        token = self.token.expand(x.shape[0], -1, -1)
        for i in range(2):
            token = token if ("read", i) in without else token + self.read(i, token, x)
            token = token if ("map", i) in without else token + torch.tanh(self.maps[i](token))
        return self.out(torch.cat([token, x], 1)[:, 0])


def test_tokens_that_a_class_token_reads_are_carried_along():
    model, x = build(ClassAttention), inputs()
    chain = rp.unravel(model, x)
    assert torch.equal(chain(x), model(x))
    assert torch.equal(chain(inputs(7)), model(inputs(7)))
    outer = chain[2].branch
    assert isinstance(outer, ResidualChain)
    assert (len(chain), len(outer)) == (3, 4)
    assert chain.num_paths == 2**2 * (1 + 2**4)
    edits = [("read", 0), ("map", 0), ("read", 1), ("map", 1)]
    for block, edit in zip(outer, edits, strict=True):
        assert torch.equal(rp.delete_block(chain, block.name)(x), model(x, without=(edit,)))
    frame = rp.gradient_by_path_length(chain, x, TARGETS)
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-12)
    assert chain.summary().count("\n") == 1 + 3 + 4 + 1  # the header, a line per block, the input sizes
    # What is carried inside the outer branch alone is no part of the state around it.
    alone = rp.path_network(chain, (False, False, (True, False, False, False)))
    token = model.read(0, model.token.expand(4, -1, -1), model.inp(x).unflatten(1, (3, 4)))
    assert torch.equal(alone(x), model.out(token[:, 0]))


class GlobalQuery(nn.Module):
    """As GCViT: what is computed once at the start of a stage is read by every block of the stage."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.query = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(2))

    def forward(self, x, without=()):
        x = self.inp(x)
        for stage, layers in enumerate(self.layers):
            query = torch.sigmoid(self.query[stage](x))
            x = x.flip(1)
            for i, layer in enumerate(layers):
                x = x if (stage, i) in without else x + torch.tanh(layer(x)) * query
        return self.out(x)


def test_a_query_that_all_blocks_of_a_stage_read_is_carried_through_it():
    model, x = build(GlobalQuery), inputs()
    chain = rp.unravel(model, x)
    assert torch.equal(chain(x), model(x))
    assert [block.name for block in chain] == [f"layers.{stage}.{i}" for stage in range(2) for i in range(3)]
    assert chain.num_paths == 2**6
    for index in range(6):
        deleted = rp.delete_block(chain, index)(x)
        assert torch.equal(deleted, model(x, without=(divmod(index, 3),)))
    study = rp.lesion_study(chain, [(x, TARGETS)], rp.single_deletions(chain), progress=False)
    by_hand = [nn.functional.cross_entropy(model(x, without=(divmod(i, 3),)), TARGETS).item() for i in range(6)]
    assert study.cross_entropy.tolist() == pytest.approx(by_hand, rel=1e-12)
    frame = rp.gradient_by_path_length(chain, x, TARGETS)
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-12)
    state = chain.stem(x)
    networks = [rp.path_network(chain, path)(x) for path in rp.enumerate_paths(chain, length=1)]
    assert state.shape == (4, 4)
    assert all(made.shape == (4, 3) for made in networks)
    carrying = (8,)  # the state and the query, in one tensor
    assert [(b.in_shape, b.out_shape) for b in chain][:3] == [((4,), carrying), (carrying, carrying), (carrying, (4,))]
    assert chain.to_frame()["shape"].tolist() == ["4 -> 8", "8", "8 -> 4"] * 2
    assert [lesion.blocks for lesion in rp.duplications(chain)] == [(1,), (4,)]
    for pair in ((0, 1), (1, 2)):  # where the query is made, and where it is left
        with pytest.raises(rp.ResnetPathsError, match=r"a block that takes 4, not 8|a block with in_shape"):
            rp.swap_blocks(chain, *pair)
