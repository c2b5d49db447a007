"""Skips and branches that an addition broadcasts: each can stand without the other, in the shape of the sum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet_paths as rp
from tests.gradients.gradient_reference import seeded


class Sums(nn.Module):
    """Blocks of two terms each, a skip and a branch, in series between a stem and a head."""

    def forward(self, x):
        x = self.stem(x)
        for skip, branch in self.blocks():
            x = skip(x) + branch(x)
        return self.head(x)

    def along(self, x, path):
        """The network of one path, written out."""
        x = self.stem(x)
        for terms, entry in zip(self.blocks(), path, strict=True):
            found = [term(x) for term in terms]
            x = found[entry] + torch.zeros_like(found[not entry])
        return self.head(x)


class Features(Sums):
    """A skip of one feature beside a branch of three, and a branch of one beside an identity."""

    def __init__(self):
        super().__init__()
        self.skip, self.wide, self.narrow, self.last = (nn.Linear(3, n) for n in (1, 3, 1, 3))
        self.stem, self.head = nn.Tanh(), nn.Linear(3, 2)

    def blocks(self):
        branches = (lambda x, layer=layer: torch.tanh(layer(x)) for layer in (self.wide, self.narrow, self.last))
        return list(zip((self.skip, nn.Identity(), nn.Identity()), branches, strict=True))


class Images(Sums):
    """The mean of each channel beside a convolution, and a branch of it beside an identity, for images of any size."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.last = (nn.Conv2d(n, 4, 3, padding=1) for n in (1, 4, 4))
        self.narrow, self.out = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def head(self, x):
        return self.out(x.square().mean((2, 3)))

    def blocks(self):
        def mean(x):
            return x.mean((2, 3), keepdim=True)

        return [
            (mean, lambda x: torch.tanh(self.wide(x))),
            (nn.Identity(), lambda x: self.narrow(mean(x))),
            (nn.Identity(), lambda x: torch.tanh(self.last(x))),
        ]


@pytest.mark.parametrize(("kind", "size", "other"), [(Features, (3,), (3,)), (Images, (1, 8, 8), (1, 6, 10))])
def test_each_term_stands_alone_in_the_shape_of_the_sum(kind, size, other, tmp_path):
    with seeded(0):
        model, x, unlike = kind().double().eval(), torch.randn(4, *size).double(), torch.randn(3, *other).double()
    for _ in range(2):  # the second is the one that was kept
        chain = rp.unravel(model, x, cache=tmp_path)
        assert [block.skip_kind for block in chain] == ["projection", "identity", "identity"]
        for batch in (x, unlike):
            assert torch.equal(chain(batch), model(batch))
            for path in rp.enumerate_paths(chain):
                torch.testing.assert_close(rp.path_network(chain, path)(batch), model.along(batch, path))
            for index in range(3):  # a deletion is a branch times 0
                deleted, scaled = rp.delete_block(chain, index), rp.scale_block(chain, index, 0)
                torch.testing.assert_close(deleted(batch), scaled(batch))
    frame = rp.lesion_study(chain, [(x, torch.zeros(4).long())], rp.single_deletions(chain), progress=False)
    for index, row in enumerate(frame.itertuples()):
        logits = rp.scale_block(chain, index, 0)(x)
        assert row.cross_entropy == pytest.approx(nn.functional.cross_entropy(logits, torch.zeros(4).long()).item())


class Inner(nn.Module):
    """A chain inside a branch that ends with one feature."""

    def __init__(self):
        super().__init__()
        self.inner, self.end, self.last, self.out = (nn.Linear(3, n) for n in (3, 1, 3, 2))

    def forward(self, x):
        x = x + torch.tanh(self.end(x + torch.tanh(self.inner(x))))
        return self.out(x + torch.tanh(self.last(x)))


def test_a_chain_inside_a_branch_ends_in_the_shape_of_the_sum():
    with seeded(0):
        model, x = Inner().double().eval(), torch.randn(4, 3).double()
    chain = rp.unravel(model, x)
    assert torch.equal(chain(x), model(x))
    branch = torch.tanh(model.end(x)).expand(4, 3)  # without the block inside, and without the skip around it
    found = rp.path_network(chain, [(False,), False])
    torch.testing.assert_close(found(x), model.out(branch), rtol=0, atol=0)
