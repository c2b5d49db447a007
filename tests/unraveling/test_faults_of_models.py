"""Models of transformers as people bring them: padded sequences, sequence classification, encoder-decoders, experts.

Tiny configurations with random weights in float64; expected values are made by hooks that zero a module.
"""

from __future__ import annotations

import pytest
import torch

import resnet_paths as rp
from tests.unraveling.networks import zeroed
from tests.unraveling.test_faults import close, names_in

hf = pytest.importorskip("transformers")

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = SMALL | {"num_key_value_heads": 2, "use_cache": False}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False}


def made(model, config, **settings):
    """A seeded float64 model in eval mode, with weights large enough that every part shows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = getattr(hf, model)(getattr(hf, config)(**settings)).double().eval()
        for parameter in net.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return net


def tokens_of(batch=3, length=7, seed=0):
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(tokens, side="right"):
    """Tokens with 0 in place of some, and the mask of the others: 7, 4 and 2 of 7 are left."""
    kept = torch.arange(tokens.shape[1]) < torch.tensor([7, 4, 2])[:, None]
    kept = kept if side == "right" else kept.flip(1)
    return tokens * kept, kept.long()


BRANCHES = {
    "llama": ["model.layers.{}.self_attn", "model.layers.{}.mlp"],
    "gpt2": ["transformer.h.{}.attn", "transformer.h.{}.mlp"],
}


def assert_blocks(chain, model, branches, *args, **kwargs):
    """Every branch deleted by its position in the chain gives what hooks that zero its module give."""
    modules = [branch.format(i) for i in range(len(chain) // len(branches)) for branch in branches]
    assert len(modules) == len(chain)
    with torch.no_grad():
        close(chain(*args, **kwargs), chosen(model(*args, **kwargs)))
        for index, name in enumerate(modules):
            with zeroed(model.get_submodule(name)):
                expected = chosen(model(*args, **kwargs))
            close(rp.delete_block(chain, index)(*args, **kwargs), expected)


def chosen(output):
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_and_positions_together(side):
    model = made("LlamaForCausalLM", "LlamaConfig", **LLAMA)
    tokens, mask = padded(tokens_of(), side)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    example = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    chain = rp.unravel(model, example)
    assert chain.num_paths == 2**4
    assert_blocks(chain, model, BRANCHES["llama"], **example)
    more = {name: torch.cat([x, x.flip(0)]) for name, x in example.items()}
    with torch.no_grad():
        close(chain(**more), model(**more).logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_sequence_classification_of_padded_tokens(kind, with_mask):
    names, settings = {"gpt2": ("GPT2", GPT2), "llama": ("Llama", LLAMA)}[kind]
    model = made(f"{names}ForSequenceClassification", f"{names}Config", **settings, num_labels=3, pad_token_id=0)
    tokens, mask = padded(tokens_of())
    example = {"input_ids": tokens} | ({"attention_mask": mask} if with_mask else {})
    chain = rp.unravel(model, example)
    assert chain.num_paths == 2**4
    assert_blocks(chain, model, BRANCHES[kind], **example)
    other = {name: torch.cat([x.flip(0), x]) for name, x in example.items()}
    with torch.no_grad():
        close(chain(**other), model(**other).logits)


def test_a_mask_of_padding_for_bert():
    model = made("BertForSequenceClassification", "BertConfig", **SMALL, num_labels=3)
    tokens, mask = padded(tokens_of())
    chain = rp.unravel(model, {"input_ids": tokens, "attention_mask": mask})
    branches = ["bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"]
    assert len(chain) == 4
    with torch.no_grad():
        close(chain(input_ids=tokens, attention_mask=mask), model(tokens, mask).logits)
        for index, branch in enumerate(branches * 2):
            with zeroed(model.get_submodule(branch.format(index // 2))):
                expected = model(tokens, mask).logits
            close(rp.delete_block(chain, index)(input_ids=tokens, attention_mask=mask), expected)


def encoder_decoder(kind):
    """(model, example, number of additions in the encoder)."""
    tokens, answer = tokens_of(), tokens_of(length=5, seed=1)
    if kind == "t5":
        settings = {"d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 48, "use_cache": False}
        model = made("T5ForConditionalGeneration", "T5Config", vocab_size=99, decoder_start_token_id=0, **settings)
    elif kind == "bart":
        both = {
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in {"layers": 3, "attention_heads": 4, "ffn_dim": 48}.items()
        }
        model = made("BartForConditionalGeneration", "BartConfig", vocab_size=99, d_model=32, use_cache=False, **both)
    else:
        both = {
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in {"layers": 3, "attention_heads": 4, "ffn_dim": 48}.items()
        }
        sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "d_model": 32}
        words = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        model = made(
            "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=99, use_cache=False, **sizes, **both, **words
        )
        features = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return model, {"input_features": features, "decoder_input_ids": answer}, model.model.encoder
    encoder = model.encoder if kind == "t5" else model.model.encoder
    return model, {"input_ids": tokens, "decoder_input_ids": answer}, encoder


@pytest.mark.parametrize(
    ("kind", "with_mask"), [("t5", False), ("t5", True), ("bart", False), ("bart", True), ("whisper", False)]
)
def test_an_encoder_does_not_vanish(kind, with_mask):
    model, example, encoder = encoder_decoder(kind)
    if with_mask:
        example["attention_mask"] = padded(example["input_ids"])[1]
    try:
        chain = rp.unravel(model, example)
    except rp.ResnetPathsError as error:
        said = str(error)
        assert "encoder" in said
    else:
        said = chain.summary().replace("decoder", "").replace("encoder_attn", "")
        assert "encoder" in said
        assert len(chain) >= 9  # self-attention, cross-attention and MLP of each decoder layer
        with torch.no_grad():
            close(chain(**example), model(**example).logits)
    alone = next(iter(example.values()))
    chain = rp.unravel(encoder, alone)
    assert chain.num_paths == 2**6
    with torch.no_grad():
        close(chain(alone), encoder(alone).last_hidden_state)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
        ("GptOss", {"num_local_experts": 4, "head_dim": 8}),
    ],
)
def test_a_mixture_of_experts_is_named_for_the_whole(family, settings):
    model, tokens = made(f"{family}Model", f"{family}Config", **LLAMA, **settings).float(), tokens_of()
    chain = rp.unravel(model, tokens)
    assert names_in(chain) == [f"layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]
    with torch.no_grad():
        with zeroed(model.layers[1].mlp):
            expected = model(tokens).last_hidden_state
        torch.testing.assert_close(rp.delete_block(chain, "layers.1.mlp")(tokens), expected)


def test_a_recurrence_that_assigns_to_one_position_after_the_other():
    settings = {"vocab_size": 99, "context_length": 16, "hidden_size": 32, "num_hidden_layers": 2, "use_cache": False}
    model, tokens = made("RwkvModel", "RwkvConfig", **settings).float(), tokens_of(length=4)
    chain = rp.unravel(model, tokens)
    assert names_in(chain) == [f"blocks.{i}.{part}" for i in range(2) for part in ("attention", "feed_forward")]
    with torch.no_grad():
        for name in names_in(chain):
            with zeroed(model.get_submodule(name)):
                expected = model(tokens).last_hidden_state
            torch.testing.assert_close(rp.delete_block(chain, name)(tokens), expected)
