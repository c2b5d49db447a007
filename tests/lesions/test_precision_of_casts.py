"""Precision of models whose code casts to float32: refused where the casts are lost, right where the model has it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.placement import place_modules
from tests.chains import inputs, random_model
from tests.lesions.test_lesion_options import study
from tests.lesions.test_lesions import STEADY, labelled


@pytest.fixture(scope="module")
def llama():
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=97,
        num_hidden_layers=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    return model, {"input_ids": torch.randint(97, (2, 512))}


def unraveled(model, batch):
    return rp.unravel(model, {"input_ids": batch["input_ids"][:, :8]})


@torch.no_grad()
def test_a_model_in_bfloat16_keeps_what_its_chain_would_lose(llama):
    model, batch = llama
    chain = unraveled(model, batch)
    expected = model(**batch).logits.argmax(-1)
    (without_casts,) = place_modules([chain], precision="bfloat16")
    low = copy.deepcopy(model).bfloat16()
    low_chain = unraveled(low, batch)
    assert torch.equal(low_chain(**batch), low(**batch).logits)
    differ = [(c(**batch).argmax(-1) != expected).double().mean().item() for c in (without_casts, low_chain)]
    assert differ[0] > 0.3
    assert differ[1] < differ[0] / 3
    # Of this model studies are made, with the lesions of any other.
    frame = rp.lesion_study(
        low_chain, [batch], rp.single_deletions(low_chain)[:1], measures="agreement", progress=False
    )
    by_hand = (rp.delete_block(low_chain, 0)(**batch).argmax(-1) == low(**batch).logits.argmax(-1)).double().mean()
    assert frame.agreement[0] == pytest.approx(by_hand.item())


def test_lower_precisions_are_refused_where_casts_would_be_lost(llama):
    model, batch = llama
    chain = rp.delete_block(unraveled(model, batch), 0)
    for precision in ("bfloat16", "float16"):
        message = rf"precision: got '{precision}'; allowed: .*'model.rotary_emb' chooses dtypes itself.*"
        with pytest.raises(
            rp.ResnetPathsError, match=message + rf"unravel\(model.to\(torch.{precision}\), example_inp"
        ):
            study(chain, [batch], measures="agreement", precision=precision)
    for precision in ("float32", "float64"):
        frame = study(chain, [batch], rp.single_deletions(chain)[:1], measures="agreement", precision=precision)
        assert frame.agreement.notna().all()


class CastsNothing(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.to(x.device) + torch.zeros(3, 5, dtype=x.dtype).sum(0))


class InFloat64(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).softmax(-1, dtype=torch.float64).to(x.dtype)


def test_only_models_that_cast_are_refused():
    model = random_model(STEADY).float()
    loader = [(x.float(), y) for x, y in labelled(20)]
    chain = rp.unravel(CastsNothing(model), inputs().float())
    assert chain.casts == ()
    assert study(chain, loader, precision="bfloat16").error_rate.notna().all()
    casting = rp.unravel(InFloat64(model), inputs().float())
    assert casting.casts == ("InFloat64",)
    with pytest.raises(rp.ResnetPathsError, match=r"precision: got 'bfloat16'; .*'InFloat64' chooses dtypes itself"):
        study(casting, loader, precision="bfloat16")
    assert study(casting, loader, precision="float64").error_rate.notna().all()
