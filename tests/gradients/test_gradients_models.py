"""Gradients by path length of networks that people use, against the ordinary gradient of the model itself."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.gradients.points import Place

NUM_CLASSES = 5


class FirstOutput(nn.Module):
    """A Hugging Face model as a module that returns one tensor [batch, class]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        logits = self.model(ids).logits
        return logits if logits.dim() == 2 else logits[:, -1]


def well_scaled(model, seed=0):
    """In float64, eval mode, with weights at which signals neither die nor explode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
    return model.double().eval()


def check_against_autograd(model, chain, inputs, num_blocks, place="input"):
    """The sum over lengths is the gradient of the model, which knows nothing of the chain."""
    targets = torch.arange(len(inputs))
    assert len(chain) == num_blocks
    frame = rp.gradient_by_path_length(chain, inputs, targets, with_respect_to=place)
    assert frame.path_length.tolist() == list(range(num_blocks + 1))
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-12)
    (point,) = Place.of(chain, place).points(inputs, targets, None, 2**33, num_blocks + 1)
    stack = point.by_length(num_blocks)
    total = (
        stack.values
        * torch.exp2(stack.exponents.double()).reshape(*stack.exponents.shape, *[1] * (stack.values.dim() - 3))
    ).sum((0, 1))
    start = (inputs if place == "input" else chain.stem(inputs)).detach().requires_grad_()
    if place == "input":
        logits = model(start)
    else:
        state = start
        for block in chain:
            state = block(state)
        logits = chain.head(state)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), start)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
    norms = [frame.summed_path_gradient_norm.sum(), expected.flatten(1).norm(dim=1).mean().item()]
    assert norms[0] >= norms[1] * (1 - 1e-12)  # the triangle inequality


IMAGES = [
    ("resnet18", 8),
    ("vit_b_32", 24),
    ("swin_t", 24),
    ("mobilenet_v2", 10),
    pytest.param("resnet50", 16, marks=pytest.mark.slow),
    pytest.param("densenet121", 58, marks=pytest.mark.slow),
    pytest.param("convnext_tiny", 18, marks=pytest.mark.slow),
    pytest.param("efficientnet_b0", 9, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "num_blocks"), IMAGES)
def test_torchvision(name, num_blocks):
    size = 32 if name != "swin_t" else 64
    options = {"image_size": size} if name.startswith("vit") else {}
    model = well_scaled(getattr(torchvision.models, name)(weights=None, num_classes=NUM_CLASSES, **options))
    inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    check_against_autograd(model, rp.unravel(model, inputs), inputs, num_blocks)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_transformers(family):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 50, "num_labels": NUM_CLASSES}
    if family == "bert":
        config = transformers.BertConfig(
            num_hidden_layers=3, hidden_size=16, num_attention_heads=2, intermediate_size=32, **small
        )
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.GPT2Config(
            n_layer=3, n_head=2, n_embd=16, n_positions=16, bos_token_id=0, eos_token_id=0, **small
        )
        model = transformers.GPT2LMHeadModel(config)
    model = FirstOutput(well_scaled(model)).eval()
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))
    chain = rp.unravel(model, ids)
    with torch.no_grad():
        assert torch.equal(chain(ids), model(ids))
    check_against_autograd(model, chain, ids, 6, place="stem")
    with pytest.raises(rp.ResnetPathsError, match=r"torch.int64 have no gradient.*'stem', .* the embedding"):
        rp.gradient_by_path_length(chain, ids, torch.arange(2))


def test_the_shipped_network_in_float32():
    """The window that notebook 04 shows, on a few images, and what each method says of the same network."""
    chain = rp.unravel(rp.load_network("preact-resnet-56"), torch.zeros(2, 1, 28, 28))
    images = rp.load_dataset("fashion-mnist")
    x, y = torch.stack([images[i][0] for i in range(8)]), torch.tensor([images[i][1] for i in range(8)])
    frame = rp.gradient_by_path_length(chain, x, y)
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-5)
    assert abs(frame.attrs["omitted_share"]) < 1e-5
    window = rp.effective_window(frame, "gradient_share")
    assert (window.shortest, window.longest) == (4, 11)
    assert window.peak in (7, 8)
    through = rp.gradient_through_block(chain, x, y)
    mean_length = (frame.path_length * frame.gradient_share).sum()
    assert through.gradient_share_through_branch.sum() == pytest.approx(mean_length, abs=1e-3)
    assert chain.num_paths == frame.num_paths.sum() == 2**27
