"""The benchmarks' own arithmetic: contenders delete the same blocks, rows and fits say what was measured."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import resnet_paths as rp
from resnet_paths.zoo import load_network
from tests.benchmarks import __main__ as command
from tests.benchmarks import gradients, lesions, limit, peers, scaling, studies, table, workers

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model():
    return load_network("preact-resnet-20").eval()


@pytest.fixture(scope="module")
def chain(model):
    return rp.unravel(model, torch.zeros(2, 1, 28, 28))


def test_what_is_written_by_hand_deletes_the_same_blocks(model, chain):
    images, labels = lesions.fashion_images(0, 4)
    with torch.no_grad():
        expected = torch.stack([rp.delete_block(chain, i)(images).argmax(1) for i in range(9)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for make in (lesions.copy_and_run, lesions.hooks, lesions.kept_prefix):
        assert torch.equal(make(model, list(range(9)))([images[:3], images[3:]], lesions.Clock()), expected)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    rates = (expected != labels).double().mean(1).numpy()
    for options in ({}, {"channels_last": True, "fold_batchnorm": True}):
        assert torch.equal(lesions.own_predictions(chain, [(images, labels)], options, rates), expected)
    with pytest.raises(AssertionError):
        lesions.own_predictions(chain, [(images, labels)], {}, rates + 0.25)


class Answering:
    """A worker that has its predictions already."""

    def __init__(self, contender, blocks, predictions):
        self.contender, self.blocks, self.predictions = contender, blocks, predictions

    def ask(self, check):
        np.save(check, self.predictions)
        return {"blocks": self.blocks, "memory": 1.0}


def test_another_lesion_is_found_out(tmp_path):
    reference = Answering(lesions.OURS, [0, 1, 2], np.zeros((3, 1000)))
    right, rounded = np.zeros((2, 1000)), np.zeros((2, 1000))
    rounded[0, 0] = 1
    others = [Answering("hooks", [0, 2], right), Answering("loop", [0, 2], rounded)]
    told, memory = lesions.agreements([reference, *others], str(tmp_path))
    assert (told["hooks"], told["loop"]) == ("the same predictions", "99.95% of the predictions the same")
    assert memory == {lesions.OURS: 1.0, "hooks": 1.0, "loop": 1.0}
    with pytest.raises(AssertionError, match="another lesion"):
        lesions.agreements([reference, Answering("hooks", [0, 2], right + 1)], str(tmp_path))


def test_a_path_by_hand_has_the_gradient_of_that_path(chain):
    images, labels = lesions.fashion_images(0, 2)
    paths = [tuple(i in taken for i in range(9)) for taken in ((), (4,), (0, 3, 8))]
    point = next(gradients.Place.of(chain, "stem").points(images, labels, None, 2**30, 10))
    for path in paths:
        by_hand = gradients.gradient_of_path(chain, images, labels, path).flatten(1).norm(dim=1)
        assert np.allclose(by_hand.numpy(), point.norms(point.of_paths([path]))[0][0, 0], rtol=1e-4)


def test_draws_fall_with_the_square_of_the_error():
    assert gradients.needed(np.array([0.0, 0.1, 0.4]), 5).tolist() == [2, 5, 80]


def test_gradients_are_compared_per_repeat():
    answer = {"seconds": 2.0, "memory": 1.0, "vjps": 6, "draws": 8, "needed": [2, 4], "seconds_by_length": [1.0, 0.5]}
    faster = answer | {"seconds": 1.0}
    rows = gradients.rows_of({name: [answer, faster] for name in gradients.CONTENDERS}, "a network")
    found = {(r["task"].split(",")[0], r["contender"]): r for r in rows}
    sampled = found["mean norm over the paths of each length", "this project, sampled"]
    by_hand = found["mean norm over the paths of each length", "the paper's protocol by autograd"]
    assert (sampled["low"], sampled["high"]) == (6 / 16, 2 * 6 / 16)
    assert (by_hand["value"], by_hand["ratio_low"], by_hand["ratio_high"]) == (4.0, 4 / 0.75, 4 / 0.375)
    assert found["sum over all paths of each length", "as many block VJPs by autograd"]["ratio"] == 1


def test_exponents_are_slopes_of_logarithms():
    sizes = np.array([9, 27, 81, 243])
    slope, error = scaling.exponent(sizes, 0.1 * sizes**2.0)
    assert (round(slope, 12), error < 1e-9) == (2, True)
    assert math.isnan(scaling.exponent(sizes, [1, 2, 0, 0])[0])
    rows = scaling.rows_of_curve("t", "blocks", {n: [(n**1.5, 3.0), (n**1.5, 3.0)] for n in (1, 2, 4)})
    fitted = {r["contender"]: r["value"] for r in rows if r["quantity"] == "exponent"}
    assert fitted == {"exponent of time": pytest.approx(1.5), "exponent of peak memory": pytest.approx(0)}


def test_the_projection_counts_operations():
    rows = {r["contender"]: r for r in scaling.projection(types.SimpleNamespace(quick=True))}
    assert rows["one image forward"]["value"] > 0.1
    images, blocks = 50_000, 5
    most = rows["one image forward"]["value"] * 1e9 * (blocks + 1) * images / scaling.ASSUMED_RATE / 3600
    assert 0 < rows["all single deletions"]["value"] < most


def test_operations_and_their_kinds():
    convolution = torch.nn.Conv2d(3, 4, 3, bias=False)
    assert limit.operations(lambda: convolution(torch.zeros(2, 3, 6, 6))) == 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)
    kinds = {
        "aten::mkldnn_convolution": "convolution", "aten::native_batch_norm": "BatchNorm", "aten::relu": "ReLU",
        "aten::clamp_min": "ReLU", "aten::add": "addition", "aten::addmm": "matrix product",
        "aten::copy_": "copies and reorders", "aten::mean": "other operations",
    }  # fmt: skip
    assert {name: limit.kind_of(name) for name in kinds} == kinds


def test_rows_of_parts_that_were_not_run_are_kept(tmp_path):
    rows = [table.row("lesions", "t", "a", "seconds", [1, 3, 2], [1.0]), table.row("limit", "t", "b", "s", 5)]
    old = table.stamped(rows, {}, 1)
    new = table.stamped([table.row("limit", "t", "c", "s", note="not to be had")], {"torch": "2"}, 2)
    table.write(table.merged(old, new), tmp_path / "b.csv")
    read = pd.read_csv(tmp_path / "b.csv")
    assert read[["part", "contender", "value", "low", "high"]].fillna(0).to_numpy().tolist() == [
        ["lesions", "a", 2, 1, 3], ["limit", "c", 0, 0, 0],
    ]  # fmt: skip
    assert "**T**\n" in table.markdown(read)
    assert "| a | 1 (1 to 1) | - |  |" in table.markdown(read)
    assert "not to be had" in table.text(read)
    ax = table.plot_ratios(read)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a"]


def test_a_worker_that_fails_says_why():
    with workers.workers("startup", {"anything": sys.executable}, {"threads": 1}) as (worker,):
        assert worker.ask() is None
    assert worker.reason.startswith("AttributeError: module 'tests.benchmarks.startup' has no attribute")


def test_what_pip_answers_holds_no_address():
    line = "ERROR: Could not fetch https://index.example/simple/ for baukit."
    assert peers.reason_of(line) == "cannot be installed: Could not fetch for baukit"


def test_peak_memory_is_that_of_the_work():
    """256 MiB: what other tests left to be freed meanwhile is small beside it."""
    _, memory, _ = workers.timed(lambda: torch.ones(2**26).sum())
    assert 200 < memory < 400


def test_the_command_names_its_parts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--only {lesions,studies,gradients,scaling,limit,startup}" in capsys.readouterr().out


def test_the_readme_shows_what_was_measured():
    first, last = "'python -m tests.benchmarks --markdown' prints. -->\n", "<!-- End of the benchmarks. -->"
    shown = README.split(first)[1].split(last)[0].strip()
    assert shown == (table.markdown(pd.read_csv(table.CSV)) if table.CSV.exists() else "")


def test_prefixes_counted_by_hand(chain):
    """Of the nine blocks, the fourth and the seventh have a projection, which is run when they are deleted."""
    assert studies.evaluations_by_hand(chain, [()]) == (9, 9)
    assert studies.evaluations_by_hand(chain, [(), (8,), (0,), (3,)]) == (9 + 0 + 8 + 6, 9 + 8 + 8 + 9)
    told = studies.sharing(chain, 1)
    assert "prefixes counted by hand" in told[0]["note"]
    assert told[0]["value"] < told[1]["value"]
