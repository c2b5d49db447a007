"""Batches that are padded to different lengths, in every instrument, against the model one batch after another."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp

TARGETS = torch.tensor([0, 2, 1, 1])


class Encoder(nn.Module):
    """A pre-norm transformer whose mean is taken over the tokens that are no padding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, batch_first=True) for _ in range(2)
        )

    def forward(self, tokens, mask):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask == 0)
        kept = mask[..., None].to(x.dtype)
        return self.head((self.norm(x) * kept).sum(1) / kept.sum(1))


def padded(length, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 11, (4, length), generator=generator)
    lengths = torch.tensor([length, length - 1, length - 3, length - 2])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"tokens": tokens * mask, "mask": mask}


@pytest.fixture(scope="module")
def setting():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Encoder().double().eval()
    batches = [padded(6, 0), padded(9, 1), padded(4, 2)]
    return model, rp.unravel(model, batches[0]), batches


def without(model, index, batch):
    """The model's output where one of its branches, attention or MLP, returns zeros."""
    layer = model.layers[index // 2]
    module = layer.dropout1 if index % 2 == 0 else layer.dropout2
    handle = module.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        return model(**batch)
    finally:
        handle.remove()


def test_context_bears_the_name_of_its_argument(setting):
    assert "mask" in setting[1].context_names


def test_a_study_of_batches_of_several_lengths(setting):
    model, chain, batches = setting
    loader = [{**batch, "labels": TARGETS} for batch in batches]
    frame = rp.lesion_study(chain, loader, rp.single_deletions(chain), progress=False)
    for i, loss in enumerate(frame.cross_entropy):
        expected = [F.cross_entropy(without(model, i, batch), TARGETS).item() for batch in batches]
        assert loss == pytest.approx(sum(expected) / 3, rel=1e-10)


def test_gradients_of_batches_of_several_lengths(setting):
    _, chain, batches = setting
    whole = rp.gradient_by_path_length(
        chain, [(batch, TARGETS) for batch in batches], with_respect_to="stem", progress=False
    )
    alone = [
        rp.gradient_by_path_length(chain, batch, TARGETS, with_respect_to="stem", progress=False) for batch in batches
    ]
    expected = sum(torch.tensor(frame.gradient_share.to_numpy()) for frame in alone) / 3
    assert whole.gradient_share.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_predictions_of_batches_of_several_lengths(setting):
    model, chain, batches = setting
    for batch in batches:
        frame = rp.prediction_by_path_length(chain, batch, TARGETS, output="logit", progress=False)
        expected = model(**batch).gather(1, TARGETS[:, None]).mean().item()
        assert frame.contribution.sum() == pytest.approx(expected, rel=1e-10)
