"""Measures of lesion studies, against plain PyTorch: the model's own code with hooks, and sums over all its outputs."""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.lesions import measures as measures_module
from tests.chains import random_chain
from tests.lesions.test_lesions import STEADY, labelled

same = pd.testing.assert_frame_equal
OF_CLASSES = (
    "error_rate",
    "top_2_error",
    "cross_entropy",
    "perplexity",
    "margin",
    "mean_iou",
    "agreement",
    "kl_divergence",
)


def study(chain, loader, lesions=None, **options):
    lesions = rp.single_deletions(chain) if lesions is None else lesions
    return rp.lesion_study(chain, loader, lesions, progress=False, **options)


def by_hand(logits, labels, intact):
    """Every measure of classes over rows that count: logits [row, class], labels [row]."""
    rows = torch.arange(len(labels))
    logp, logq = logits.log_softmax(1), intact.log_softmax(1)
    cross_entropy = -logp[rows, labels].mean().item()
    others = [torch.cat([row[:label], row[label + 1 :]]).max() for row, label in zip(logits, labels, strict=True)]
    predicted = logits.argmax(1)
    overlaps = []
    for k in range(logits.shape[1]):
        either = ((predicted == k) | (labels == k)).sum().item()
        if either:
            overlaps.append(((predicted == k) & (labels == k)).sum().item() / either)
    return {
        "error_rate": (predicted != labels).double().mean().item(),
        "top_2_error": 1 - (logits.topk(2, 1).indices == labels[:, None]).any(1).double().mean().item(),
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(cross_entropy),
        "margin": (logits[rows, labels] - torch.stack(others)).mean().item(),
        "mean_iou": float(np.mean(overlaps)),
        "agreement": (predicted == intact.argmax(1)).double().mean().item(),
        "kl_divergence": (logq.exp() * (logq - logp)).sum(1).mean().item(),
    }


def check(frame, hands, intact):
    """Each row against measures by hand."""
    for (_, row), hand in zip(frame.iterrows(), hands, strict=True):
        for name, value in hand.items():
            assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
            assert row[f"intact_{name}"] == pytest.approx(intact[name], rel=1e-6, abs=1e-6), name
            assert row[f"{name}_increase"] == pytest.approx(value - intact[name], rel=1e-6, abs=1e-6), name
            assert not row[f"{name}_low"] >= row[name] + 1e-9
            assert not row[f"{name}_high"] <= row[name] - 1e-9


# Language models: blocks in their order are attention and MLP of each layer. Each edit is made by hooks on the model.

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 23}
CAUSAL = ("gpt2", "llama")


def language_model(kind):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = hf.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=23, use_cache=False)
        model = hf.GPT2LMHeadModel(config)
        layers = [(layer, layer.attn, layer.mlp, layer.ln_2) for layer in model.transformer.h]
    elif kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=2, use_cache=False, **SMALL))
        layers = [(x, x.self_attn, x.mlp, x.post_attention_layernorm) for x in model.model.layers]
    else:
        model = hf.BertForMaskedLM(hf.BertConfig(num_hidden_layers=2, max_position_embeddings=16, **SMALL))
        layers = [(x, x.attention.output.dense, x.output.dense, None) for x in model.bert.encoder.layer]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval(), layers


def zeros(module, args, output):
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def hooked(layers, edit):
    """Hooks that delete a block (its position), or repeat the MLP of the first layer."""
    if edit is None:
        return []
    if isinstance(edit, int):
        return [layers[edit // 2][1 + edit % 2].register_forward_hook(zeros)]
    layer, _, mlp, norm = layers[0]

    def again(module, args, output):
        state = output[0] if isinstance(output, tuple) else output
        more = state + mlp(norm(state))
        return (more, *output[1:]) if isinstance(output, tuple) else more

    return [layer.register_forward_hook(again)]


def texts():
    """Two batches; sequences of one are padded on the right."""
    generator = torch.Generator().manual_seed(1)
    for lengths in ([9, 5, 7], [9, 9, 4]):
        mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
        yield {"input_ids": torch.randint(23, (3, 9), generator=generator), "attention_mask": mask}


@pytest.mark.parametrize("slice_size", [1 << 24, 60])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_tokens_are_as_by_hooks(kind, slice_size, monkeypatch):
    monkeypatch.setattr(measures_module, "_SLICE", slice_size)
    model, layers = language_model(kind)
    generator = torch.Generator().manual_seed(2)
    batches, left_out = [], 0
    for batch in texts():
        labels = batch["input_ids"].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
        left_out += int((labels == -100).sum())
        batches.append(batch | {"labels": labels})
    assert left_out
    chain = rp.unravel(model, {k: v for k, v in batches[0].items() if k != "labels"})
    assert len(chain) == 4
    edits = [0, 1, 2, 3, *(["repeat"] if kind in CAUSAL else [])]
    lesions = [*rp.single_deletions(chain), *([lambda c: rp.duplicate_block(c, 1)] if kind in CAUSAL else [])]

    def rows(edit):
        hooks = hooked(layers, edit)
        logits, labels = [], []
        with torch.no_grad():
            for batch in batches:
                out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                real, target = batch["attention_mask"].bool(), batch["labels"]
                if kind in CAUSAL:
                    out, target, real = out[:, :-1], target[:, 1:], real[:, :-1] & real[:, 1:]
                counts = real & (target != -100)
                logits.append(out[counts])
                labels.append(target[counts])
        for hook in hooks:
            hook.remove()
        return torch.cat(logits), torch.cat(labels)

    intact, labels = rows(None)
    frame = study(chain, batches, lesions, measures=OF_CLASSES, shift_labels=kind in CAUSAL)
    check(frame, [by_hand(rows(edit)[0], labels, intact) for edit in edits], by_hand(intact, labels, intact))
    # Without labels: every real token.
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    free = study(chain, unlabelled, lesions, measures=("agreement", "kl_divergence"))
    assert free.num_examples.tolist() == [6] * len(free)
    assert not np.allclose(free.kl_divergence, frame.kl_divergence, rtol=1e-3)
    with pytest.raises(rp.ResnetPathsError, match="loader"):
        study(chain, unlabelled, lesions)


def test_intervals_of_tokens_take_a_sequence_as_one_cluster():
    model, _ = language_model("gpt2")
    batches = [batch | {"labels": batch["input_ids"]} for batch in texts()]
    chain = rp.unravel(model, {k: v for k, v in batches[0].items() if k != "labels"})
    once = study(chain, batches, shift_labels=True)
    # The same tokens once more in the same sequences say nothing new; as other sequences they would.
    doubled = [{k: v.repeat(2, 1) for k, v in batch.items()} for batch in batches]
    twice = study(chain, doubled, shift_labels=True)
    assert np.allclose(once.cross_entropy, twice.cross_entropy)
    widths = [f.cross_entropy_high - f.cross_entropy_low for f in (once, twice)]
    assert (widths[1] < widths[0]).all()
    whole = study(chain, batches, shift_labels=True, per_example=True)
    assert np.stack(whole.cross_entropy_per_example).shape == (4, 6)


# Images


class Pixels(nn.Module):
    """Segmentation: a class for each pixel; swapping and deleting is stated in `order`."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))

    def forward(self, x, order=(0, 1, 2)):
        x = self.stem(x)
        for i in order:
            x = x + torch.tanh(self.blocks[i](x))
        return self.head(x)


def test_pixels_are_as_by_hand():
    torch.manual_seed(0)
    model = Pixels().double().eval()
    images, labels = torch.randn(5, 2, 6, 7).double(), torch.randint(4, (5, 6, 7))
    labels[torch.rand(5, 6, 7) < 0.3] = -100
    chain = rp.unravel(model, images[:2])
    orders = [(1, 2), (0, 2), (0, 1), (2, 1, 0), (0, 1, 1, 2)]
    lesions = [*rp.single_deletions(chain), lambda c: rp.swap_blocks(c, 0, 2), lambda c: rp.duplicate_block(c, 1)]
    loader = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    known = labels != -100

    def rows(order):
        with torch.no_grad():
            return model(images, order).movedim(1, -1)[known]

    intact = rows((0, 1, 2))
    frame = study(chain, loader, lesions, measures=OF_CLASSES)
    check(frame, [by_hand(rows(o), labels[known], intact) for o in orders], by_hand(intact, labels[known], intact))


def values_by_hand(outputs, labels):
    spread = labels - (labels.mean(0) if labels.dim() == 2 else labels.mean())
    errors = (outputs - labels).square()
    return {
        "mean_squared_error": errors.mean().item(),
        "explained_variance": 1 - (errors.sum() / spread.square().sum()).item(),
    }


@pytest.mark.parametrize("width", [1, 3])
def test_a_regressor_is_as_by_hand(width):
    chain = random_chain(STEADY)
    chain = chain.with_head(nn.Linear(3, width).double()).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=generator).double()
    labels = torch.randn(20, width, generator=generator).double() + 3 * torch.arange(width)
    with torch.no_grad():
        hands = [values_by_hand(rp.delete_block(chain, i)(x), labels) for i in range(6)]
        intact = values_by_hand(chain(x), labels)
    measures = ("mean_squared_error", "explained_variance")
    check(study(chain, [(x[:9], labels[:9]), (x[9:], labels[9:])], measures=measures), hands, intact)
    if width == 1:  # outputs [batch, 1] for labels [batch] are no table of all pairs
        check(study(chain, [(x, labels[:, 0])], measures=measures), hands, intact)


def test_the_shipped_unet_is_studied():
    model = rp.load_network("unet-small").double()
    images, _ = next(iter(torch.utils.data.DataLoader(rp.load_dataset("fashion-mnist"), batch_size=6)))
    images = images.double()
    noisy = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).double()
    chain = rp.unravel(model, noisy[:2])
    frame = study(chain, [(noisy, images)], measures=("mean_squared_error", "explained_variance"))
    with torch.no_grad():
        intact = values_by_hand(model(noisy), images)
        hook = model.level.up.register_forward_hook(zeros)  # the branch of the first level's block
        hands = [values_by_hand(model(noisy), images)]
        hook.remove()
    check(frame, hands, intact)


# Functions as measures


def brier_score(outputs, labels):
    return (outputs.softmax(1) - F.one_hot(labels, outputs.shape[1])).square().sum(1)


def distance(outputs, labels, intact_outputs):
    return (outputs - intact_outputs).abs(), torch.tensor([1.0, 0.0, 2.0]).expand_as(outputs)


def test_functions_are_measures(tmp_path):
    chain, loader = random_chain(STEADY), labelled()
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    frame = study(chain, loader, measures=("error_rate", brier_score, distance))
    with torch.no_grad():
        for i, row in frame.iterrows():
            out, intact = rp.delete_block(chain, i)(x), chain(x)
            assert row.brier_score == pytest.approx(brier_score(out, y).mean().item(), rel=1e-9)
            change = (out - intact).abs().mean(0)
            assert row.distance == pytest.approx(((change[0] + 2 * change[2]) / 3).item(), rel=1e-6)
    with pytest.raises(rp.ResnetPathsError, match=r"functions with a key.*measure\(brier_score, key='1'\)"):
        study(chain, loader, measures=[brier_score], store=tmp_path)
    keyed = [rp.measure(brier_score, key="1"), "perplexity"]
    frames = [study(chain, loader, measures=keyed, store=store) for store in (None, tmp_path, tmp_path)]
    same(frames[0], frames[1])
    same(frames[0], frames[2])
    assert [f.attrs["batches_found"] for f in frames] == [0, 0, 5]
    # What perplexity read is the cross-entropy's; another key, or another measure, is another study.
    again = [rp.measure(brier_score, key="1"), "cross_entropy"]
    assert study(chain, loader, measures=again, store=tmp_path).attrs["batches_found"] == 5
    for other in ([rp.measure(brier_score, key="2"), "perplexity"], ["perplexity"]):
        assert study(chain, loader, measures=other, store=tmp_path).attrs["batches_found"] == 0


def test_executors_send_measures():
    chain, loader = random_chain(STEADY), labelled()
    measures = ("error_rate", "top_2_error", "perplexity", "mean_iou", "kl_divergence", brier_score)
    plain = study(chain, loader, measures=measures)
    for executor in (ThreadPoolExecutor(2), ProcessPoolExecutor(1)):
        with executor:
            same(study(chain, loader, measures=measures, executor=executor), plain)


@pytest.mark.parametrize("options", [{"batch_budget": 3}, {"batch_budget": 64}])
def test_split_and_stacked_batches_measure_the_same(options):
    chain, loader = random_chain(STEADY), labelled()
    same(study(chain, loader, measures=OF_CLASSES, **options), study(chain, loader, measures=OF_CLASSES), rtol=1e-9)


def test_values_of_every_example():
    chain, loader = random_chain(STEADY), labelled()
    frame = study(chain, loader, measures=("error_rate", "cross_entropy", "perplexity"), per_example=True)
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    with torch.no_grad():
        for i, row in frame.iterrows():
            out = rp.delete_block(chain, i)(x)
            losses = F.cross_entropy(out, y, reduction="none").numpy()
            assert np.allclose(row.cross_entropy_per_example, losses, rtol=1e-9)
            assert np.allclose(row.perplexity_per_example, np.exp(losses), rtol=1e-9)
            assert row.error_rate_per_example.tolist() == (out.argmax(1) != y).double().tolist()
            assert np.allclose(row.intact_cross_entropy_per_example, F.cross_entropy(chain(x), y, reduction="none"))
        assert (np.exp(row.cross_entropy_low), np.exp(row.cross_entropy_high)) == pytest.approx((
            row.perplexity_low,
            row.perplexity_high,
        ))


@pytest.mark.parametrize("adjust", ["holm", "fdr_bh"])
def test_p_values_are_adjusted_over_lesions(adjust):
    chain, loader = random_chain(STEADY), labelled()
    frame = study(chain, loader, adjust=adjust)
    each = [study(chain, loader, [lesion], adjust=adjust) for lesion in rp.single_deletions(chain)]
    alone = [one.error_rate_increase_p[0] for one in each]
    assert (frame.error_rate_increase_p >= np.array(alone) - 1e-12).all()
    assert frame.error_rate_increase_p.min() == pytest.approx(min(1, 6 * min(alone))) or adjust == "fdr_bh"
    assert "error_rate_increase_p" not in study(chain, loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ("error_rates",)}, r"measures: got 'error_rates'.*'error_rate'"),
        ({"measures": ()}, r"measures: got \[\]; allowed: at least one"),
        ({"measures": ("error_rate", "error_rate")}, r"each of another name"),
        ({"measures": (lambda outputs, labels: outputs,)}, r"measure\(function, name="),
        ({"measures": (lambda outputs: outputs,)}, r"functions of \(outputs, labels\)"),
        ({"measures": (3,)}, r"measures: got 3"),
        (
            {"measures": (rp.measure(lambda outputs, labels: outputs.mean(), name="mean"),)},
            r"got 'mean, which returned a tensor of shape \[\]'.*one value for each example",
        ),
        ({"measures": ("mean_squared_error",)}, r"labels \[8\] for outputs \[8, 3\]"),
        ({"measures": ("margin",), "per_class": True}, r"per_class: got True"),
        ({"adjust": "bonferroni"}, r"adjust: got 'bonferroni'; allowed: 'holm', 'fdr_bh' or None"),
        ({"shift_labels": True}, r"shift_labels: got .*int64 \[8\]"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        study(random_chain(STEADY), labelled(), **options)


VALUES = {
    "bool": torch.tensor([True, False, True, True]),
    "uint8": torch.tensor([200, 3, 255, 0], dtype=torch.uint8),
    "float16": torch.tensor([300.0, -2.0, 0.5, 1.0], dtype=torch.float16),
}
WEIGHTS = {
    "bool": torch.tensor([True, True, False, True]),
    "uint8": torch.tensor([200, 1, 255, 0], dtype=torch.uint8),
    "int64": torch.tensor([300, 1, 70_000, 0]),
    "float16": torch.tensor([300.0, 1.0, 0.5, 0.0], dtype=torch.float16),
    "float64": torch.tensor([1 / 3, 1.0, 2.5, 0.0], dtype=torch.float64),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("values", VALUES)
def test_values_and_weights_of_any_dtype(values, weights):
    """Sums have room for products of small integers, and of half-precision numbers."""
    chain = random_chain(STEADY)
    given = VALUES[values], WEIGHTS[weights]
    weighted = rp.measure(lambda outputs, labels: tuple(x.expand(len(outputs), 4) for x in given), name="weighted")
    frame = study(
        chain,
        [(torch.zeros(n, 5, dtype=torch.float64), torch.zeros(n, dtype=torch.long)) for n in (2, 3)],
        measures=[weighted],
    )
    expected = np.average(given[0].double().numpy(), weights=given[1].double().numpy())
    assert frame.weighted.tolist() == pytest.approx([expected] * len(frame), rel=1e-6)


class Masked(nn.Module):
    """Logits of 6 classes, two of which each example masks."""

    def forward(self, x):
        wide = torch.cat([x, -x, x.sin()], 1)[:, :6]
        first = (x[:, :1] > 0).long()
        return wide.scatter(1, torch.cat([first, first + 2], 1), -math.inf)


def test_masked_classes_have_logits_of_minus_infinity():
    chain = random_chain(STEADY).with_head(Masked())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(6, (60,), generator=generator)
    names = ("error_rate", "top_2_error", "top_5_error", "agreement", "kl_divergence", "mean_iou")
    frame = study(chain, [(x[:32], y[:32]), (x[32:], y[32:])], [lambda c: c, rp.Lesion("delete", (2,))], measures=names)
    with torch.inference_mode():
        intact = chain(x)
        for row, logits in zip(frame.itertuples(), (intact, rp.delete_block(chain, 2)(x)), strict=True):
            predicted = logits.max(1).indices
            wrong = (predicted != y).double()
            assert row.error_rate == pytest.approx(wrong.mean().item())
            for k, found in ((2, row.top_2_error), (5, row.top_5_error)):
                best = logits.masked_fill(logits == -math.inf, math.nan).numpy()
                hits = [
                    not math.isnan(best[i, label]) and (best[i] > best[i, label]).sum() < k for i, label in enumerate(y)
                ]
                assert found == pytest.approx(1 - np.mean(hits))
            assert row.agreement == pytest.approx((predicted == intact.max(1).indices).double().mean().item())
    assert frame.agreement[0] == 1
    assert frame.kl_divergence[0] == pytest.approx(0, abs=1e-12)
    assert 0 < frame.error_rate[0] < 1
    assert frame.top_5_error[0] == pytest.approx((intact.gather(1, y[:, None]) == -math.inf).double().mean().item())


@pytest.mark.parametrize("logits", [[math.nan, 0, -math.inf], [math.inf, 0, -math.inf], [-math.inf] * 3])
def test_there_is_no_prediction_without_a_largest_finite_logit(logits):
    chain = random_chain(STEADY).with_head(Constantly(logits))
    frame = study(
        chain,
        [(torch.zeros(n, 5).double(), torch.zeros(n, dtype=torch.long)) for n in (2, 1)],
        measures=["error_rate", "top_2_error", "agreement"],
    )
    assert frame[["error_rate", "top_2_error", "agreement"]].to_numpy().tolist() == [[1, 1, 0]] * len(frame)


class Constantly(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return torch.tensor(self.logits, dtype=x.dtype).expand(len(x), -1)


@pytest.mark.parametrize("shape", [(1,), (1, 2, 2), (4, 1)])
def test_one_logit_is_no_distribution_over_classes(shape):
    class Shaped(nn.Module):
        def forward(self, x):
            return x[:, :1, None].expand(-1, 1, 4).reshape(len(x), 4)[:, : math.prod(shape)].reshape(len(x), *shape)

    chain = random_chain(STEADY).with_head(Shaped())
    x, y = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, *[n for n in shape if n > 1], dtype=torch.long)
    for measures in (["error_rate"], ["agreement"], ["cross_entropy", "kl_divergence"]):
        with pytest.raises(rp.ResnetPathsError, match=r"measures: .*the one logit .*Pass a function"):
            study(chain, [(x, y)], measures=measures)
    own = rp.measure(lambda outputs, labels: (outputs.flatten(1) > 0) != labels.flatten(1), name="own")
    assert study(chain, [(x, y if y.dim() > 1 else y[:, None])], measures=[own]).own.notna().all()
