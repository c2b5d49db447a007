"""Lesioned language models in transformers: `generate` against models whose layers are removed by hand."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain

hf = pytest.importorskip("transformers")

SIZES = {"vocab_size": 23, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1, "initializer_range": 0.5}


@functools.cache
def language_model(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = hf.GPT2Config(n_layer=3, n_head=2, n_embd=16, n_positions=32, **SIZES)
        return hf.GPT2LMHeadModel(config).eval(), "transformer.h"
    config = hf.LlamaConfig(num_hidden_layers=3, hidden_size=16, num_attention_heads=2, intermediate_size=24, **SIZES)
    return hf.LlamaForCausalLM(config).eval(), "model.layers"


def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 23, (2, 8), generator=generator)


@functools.cache
def layers_of(kind, *names):
    given = {
        "input_ids": tokens(),
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "position_ids": torch.arange(8).repeat(2, 1),
    }
    example = {"input_ids": tokens(), **{name: given[name] for name in names}, "use_cache": False}
    return rp.group_blocks(rp.unravel(language_model(kind)[0], example))


def without_layer(kind, index):
    model, name = language_model(kind)
    pruned = copy.deepcopy(model)
    del pruned.get_submodule(name)[index]
    pruned.config.num_hidden_layers -= 1
    return pruned


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generate_is_that_of_the_model_without_the_layer(kind):
    pruned = without_layer(kind, 1)
    chain = layers_of(kind, "attention_mask", "position_ids")
    lesioned = rp.as_causal_lm(rp.delete_block(chain, 1), language_model(kind)[0].config)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0  # generation pads on the left
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True}):
        found = []
        for model in (lesioned, pruned):
            torch.manual_seed(2)
            found.append(model.generate(tokens(), attention_mask=mask, max_new_tokens=8, use_cache=False, **options))
        assert torch.equal(*found)
        assert found[0].shape == (2, 16)
    intact = rp.as_causal_lm(chain, language_model(kind)[0].config)
    whole = intact.generate(tokens(), attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert not torch.equal(whole, lesioned.generate(tokens(), attention_mask=mask, max_new_tokens=8, do_sample=False))
    # A prompt of one token is shorter than any that an exported graph takes.
    start = torch.tensor([[0], [3]])
    expected = pruned.generate(start, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(lesioned.generate(start, max_new_tokens=4, do_sample=False), expected)


def test_harnesses_call_it_as_a_model_of_transformers():
    pruned, config = without_layer("gpt2", 0), language_model("gpt2")[0].config
    lesioned = rp.as_causal_lm(rp.delete_block(layers_of("gpt2"), 0), config)
    assert isinstance(lesioned, hf.PreTrainedModel)
    assert (lesioned.device.type, lesioned.dtype) == ("cpu", torch.float32)
    lesioned.tie_weights()
    with torch.inference_mode():
        found, expected = lesioned(tokens(), labels=tokens()), pruned(tokens(), labels=tokens(), use_cache=False)
        assert torch.equal(found.logits, expected.logits)
        assert found.loss.item() == pytest.approx(expected.loss.item())
        # They ask for a cache, and get the same tokens without one.
        cached = lesioned.generate(tokens(), max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(cached, pruned.generate(tokens(), max_new_tokens=5, do_sample=False, use_cache=False))
    assert config.use_cache
    assert {id(p) for p in lesioned.parameters()} <= {id(p) for p in language_model("gpt2")[0].parameters()}


def test_what_is_no_causal_language_model():
    config = language_model("gpt2")[0].config
    lesioned = rp.as_causal_lm(layers_of("gpt2"), config)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, 0] = 0
    with pytest.raises(rp.ResnetPathsError, match=r"attention_mask: got 'a mask with zeros'.*Unravel the model with"):
        lesioned(tokens(), attention_mask=mask)
    with pytest.raises(rp.ResnetPathsError, match=r"chain: got 'GPT2LMHeadModel'; allowed: a ResidualChain"):
        rp.as_causal_lm(language_model("gpt2")[0], config)
    by_hand = ResidualChain(nn.Embedding(23, 4), [Block(nn.Linear(4, 4), nn.Identity())], nn.Linear(4, 7)).eval()
    with pytest.raises(rp.ResnetPathsError, match=r"returns \[2, 8, 7\]'; allowed: logits \[batch, position, 23\]"):
        rp.as_causal_lm(by_hand, config)(tokens())
    bert = hf.BertForMaskedLM(
        hf.BertConfig(vocab_size=23, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    chain = rp.unravel(bert.eval(), {"input_ids": tokens(), "token_type_ids": torch.zeros_like(tokens())})
    with pytest.raises(rp.ResnetPathsError, match=r"chain: got 'a chain that reads input_ids, token_type_ids'"):
        rp.as_causal_lm(chain, bert.config)
