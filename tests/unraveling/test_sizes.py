"""Sizes of inputs stay free: a chain read at one size returns what the model returns at others."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from resnet_paths import ResnetPathsError, unravel
from resnet_paths.core.signature import arguments_of, chosen
from resnet_paths.unraveling import export

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def summary_line(chain) -> str:
    return chain.summary().splitlines()[-1].removesuffix(".")


@torch.no_grad()
def assert_same(chain, model, inputs):
    args, kwargs = arguments_of(inputs)
    expected = chosen(model(*args, **kwargs), None)
    scale = expected.abs().max()
    assert (chain(*args, **kwargs) - expected).abs().max() <= 1e-5 * scale


def language_model(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    keys = {"num_key_value_heads": 1}
    if family == "bert":
        return transformers.BertModel(transformers.BertConfig(**TINY)).eval()
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config).eval()
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **keys)).eval()
    if family == "qwen":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY, **keys, head_dim=8)).eval()
    config = transformers.Gemma3TextConfig(**TINY, **keys, head_dim=8, sliding_window=6)
    return transformers.Gemma3ForCausalLM(config).eval()


def tokens(batch: int, length: int, *, is_causal: bool, padded: bool = True) -> dict[str, object]:
    """Token ids, with a mask and positions; the first sequence is padded on the left."""
    ids = torch.randint(1, 50, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.long)
    if padded:
        mask[0, : length // 3] = 0
    inputs: dict[str, object] = {"input_ids": ids, "attention_mask": mask}
    if is_causal:
        inputs |= {"position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
    return inputs


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen", "gemma"])
def test_language_models_at_other_lengths(family):
    model, is_causal = language_model(family), family != "bert"
    chain = unravel(model, tokens(2, 9, is_causal=is_causal))
    assert len(chain) == 4
    assert summary_line(chain).endswith("batch and length are free")
    for batch, length in ((1, 5), (3, 14)):
        assert_same(chain, model, tokens(batch, length, is_causal=is_causal))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny"])
def test_image_networks_at_other_sizes(name):
    model = torchvision.models.get_model(name, weights=None).eval()
    chain = unravel(model, torch.randn(2, 3, 64, 64))
    assert summary_line(chain) == ("Input sizes: [batch, 3, height, width]; batch, height and width are free")
    for size in ((1, 3, 75, 96), (2, 3, 128, 67)):
        assert_same(chain, model, torch.randn(size))


class Images(nn.Module):
    """A small residual network on images."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)])
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x.mean((2, 3)))


def test_shapes_of_blocks_are_those_of_the_example():
    chain = unravel(Images().eval(), torch.randn(2, 3, 16, 12))
    assert [block.in_shape for block in chain] == [(4, 8, 6)] * 2
    assert all(block.keeps_shape for block in chain)
    assert "4x8x6" in chain.summary()


def test_sizes_in_the_middle_are_solved_from_what_a_part_is_given():
    class Tokens(Images):
        """Images to tokens and back: parts are given height times width only, or halves of both."""

        def forward(self, x):
            x = self.stem(x)
            batch, channels, height, width = x.shape
            for layer in self.layers:
                y = layer(x.flatten(2).transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2))
                x = x + y.relu()
            y = x.flatten(2).transpose(1, 2) / (height * width)
            return self.head(y.sum(1))

    model = Tokens().eval()
    chain = unravel(model, torch.randn(2, 3, 16, 12))
    assert "height and width are free" in summary_line(chain)
    assert_same(chain, model, torch.randn(1, 3, 21, 30))


def test_a_size_that_a_part_is_not_told_is_fixed():
    class Lost(Images):
        def forward(self, x):
            height = x.shape[2]
            x = self.stem(x)
            for layer in self.layers:
                x = x + layer(x).relu() / height  # an odd height is not known from its half
            return self.head(x.mean((2, 3)))

    model = Lost().eval()
    chain = unravel(model, torch.randn(2, 3, 16, 12))
    assert summary_line(chain) == "Input sizes: [batch, 3, 16, 12]; only batch is free"
    assert_same(chain, model, torch.randn(5, 3, 16, 12))
    with pytest.raises(ResnetPathsError, match=r"\[\['batch', 3, 18, 12\]\].*numbers are fixed"):
        chain(torch.randn(2, 3, 18, 12))


def test_what_code_asked_of_a_size_is_a_condition():
    class Asking(Images):
        def forward(self, x):
            return super().forward(x if x.shape[2] < 20 else 2 * x)

    model = Asking().eval()
    chain = unravel(model, torch.randn(2, 3, 16, 12))
    assert_same(chain, model, torch.randn(2, 3, 18, 12))
    with pytest.raises(ResnetPathsError, match="sizes with height < 20"):
        chain(torch.randn(2, 3, 20, 12))


def test_inputs_of_one_batch_share_its_size():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.f = nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(4, 4)

        def forward(self, a, b):
            x = self.a(a).mean(1) + self.b(b)
            x = x + self.f(x).tanh()
            return x + self.f(x).tanh()

    model = Two().eval()
    chain = unravel(model, (torch.randn(2, 6, 3), torch.randn(2, 5)))
    assert summary_line(chain) == "Input sizes: [batch, length, 3], [batch, 5]; batch and length are free"
    assert_same(chain, model, (torch.randn(4, 9, 3), torch.randn(4, 5)))


def test_an_export_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(export, "_SECONDS", 0.0)
    monkeypatch.setattr(export, "_SECONDS_PER_MODULE", 0.0)
    chain = unravel(Images().eval(), torch.randn(2, 3, 16, 12))
    assert summary_line(chain).endswith("only batch is free")


@pytest.mark.slow
def test_windows_of_a_padded_image_are_given_up_early():
    class Windows(Images):
        """As in Swin: padded to whole windows, taken apart and put together again."""

        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers:
                height, width = x.shape[2:]
                y = nn.functional.pad(x, (0, (7 - width % 7) % 7, 0, (7 - height % 7) % 7))
                rows, columns = y.shape[2] // 7, y.shape[3] // 7
                y = y.view(x.shape[0], 4, rows, y.shape[2] // rows, columns, y.shape[3] // columns)
                y = y.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
                y = layer(y).relu().reshape(x.shape[0], rows, columns, 4, 7, 7).permute(0, 3, 1, 4, 2, 5)
                x = x + y.flatten(4).flatten(2, 3)[:, :, :height, :width]
            return self.head(x.mean((2, 3)))

    inputs = (torch.randn(2, 3, 32, 32),)
    with pytest.raises(export.SizesTooInvolved):
        export.export(Windows().eval(), inputs, free_sizes=True)
    chain = unravel(Windows().eval(), inputs)
    assert len(chain) == 2
    assert summary_line(chain).endswith("only batch is free")
