"""The benchmarks' own arithmetic: contenders delete the same blocks, rows and fits say what was measured."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block
from resnet_paths.core.placement import place_modules
from resnet_paths.zoo import load_network
from tests.benchmarks import __main__ as command
from tests.benchmarks import (
    coverage,
    gpu,
    gradients,
    lesions,
    limit,
    neighbour,
    peers,
    scaling,
    studies,
    table,
    tokens,
    workers,
)
from tests.gradients.gradient_reference import batch, build
from tests.gradients.test_weighted_paths import random_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "notebooks" / "tables" / "benchmarks.md").read_text(encoding="utf-8")


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


def test_the_split_by_hand_is_the_exact_one(chain):
    images, labels = lesions.fashion_images(0, 2)
    by_hand = gradients.split_by_hand(chain, images, labels, {}, 0)
    exact = gradients.exact(chain, images, labels, {}, 0)
    assert np.allclose(by_hand["norms"], exact["norms"], rtol=1e-4)
    assert (by_hand["vjps"], exact["vjps"]) == (45, 54)


def test_weighted_paths_show_how_much_paths_differ():
    """Against all paths of a chain whose norms are products of gains, in float64."""
    gains = np.array([0.1, 0.5, 2.0, 1.0])

    def norms(paths):
        found = np.prod(np.where(np.array(paths), gains, 1.0), axis=1)
        return np.stack([found, 3 * found], axis=1)[:, None], None

    point = types.SimpleNamespace(of_paths=list, norms=norms)
    generator = torch.Generator().manual_seed(0)
    means, variances = gradients.variance_of_sampling(point, 4, 5_000, generator)
    for k in range(5):
        paths = [path for path in itertools.product([False, True], repeat=4) if sum(path) == k]
        for row, of_images in enumerate((lambda x: x.mean(1), lambda x: (x**2).mean(1))):
            found = of_images(norms(paths)[0][:, 0])
            assert means[row, k] == pytest.approx(found.mean(), rel=0.1)
            assert 1 + variances[row, k] == pytest.approx(1 + found.var() / found.mean() ** 2, rel=0.2)


def test_gradients_are_compared_per_repeat():
    answer = {
        "seconds": 2.0,
        "memory": 1.0,
        "vjps": 6,
        "draws": 8,
        "block_vjps": 9,
        "energies": [1.0, 2.0, 0.0],
        "seconds_by_length": [1.0, 0.5, 0.5],
        "seconds_of_vjp": 0.25,
        "of_norm": [2, 4, 3],
        "of_energy": [0, 5, 0],
    }
    settings = {"images": 4, "images_of_split": 32}
    faster = answer | {"seconds": 1.0, "of_norm": [2, 4, 0]}
    answers = {name: [answer, faster] for name in gradients.CONTENDERS}
    answers["signs"] = [answer | {"energies": [9.0, 1.8, 9.0]}, faster | {"energies": [9.0, 2.2, 9.0]}]
    answers["energy"] = [answer, answer]
    rows = gradients.rows_of(answers, "a network", settings)
    found = {(r["task"].split(" of")[0].split(",")[0], r["contender"]): r for r in rows}
    sampled = found["mean norm over the paths", "this project, sampled"]
    by_hand = found["mean norm over the paths", "the paper's protocol by autograd"]
    kept = found["mean norm over the paths", "the same, the forward pass kept for all paths"]
    assert (sampled["low"], sampled["high"]) == (1 * 4 / 6, 2 * 10 / 6)
    assert (by_hand["low"], by_hand["high"]) == (4, 5.5)
    assert (by_hand["ratio_low"], by_hand["ratio_high"]) == pytest.approx((5.5 * 6 / 20, 6))
    assert (kept["low"], kept["high"]) == (1, 2.5)
    assert "4 to 10 block VJPs, extrapolated" in kept["note"]
    energy = found["energy", "this project, energy"]
    assert energy["note"] == "8 weighted paths of a length, 9 block VJPs; the mean norm comes with it"
    signs = found["energy", "this project, energy by random signs"]
    assert (signs["low"], signs["ratio"]) == (1, 0.75)
    assert signs["note"] == "8 draws, 9 block VJPs; 0.9 to 1.1 times what weighted paths give"
    assert found["sum over all paths", "the same split by autograd"]["ratio"] == 1


def test_exponents_are_slopes_of_logarithms():
    sizes = np.array([9, 27, 81, 243])
    slope, error, num_points = scaling.exponent(sizes, 0.1 * sizes**2.0)
    assert (round(slope, 12), error < 1e-9, num_points) == (2, True, 4)
    slope, error, num_points = scaling.exponent(sizes, [1, 3, 0, 0])
    assert (round(slope, 12), math.isnan(error), num_points) == (1, True, 2)
    assert math.isnan(scaling.exponent(sizes, [1, 0, 0, 0])[0])
    rows = scaling.rows_of_curve("t", "blocks", {n: [(n**1.5, 3.0), (n**1.5, 1.0 + n / 4)] for n in (1, 2, 4)})
    fitted = {r["contender"]: r["value"] for r in rows if r["quantity"] == "exponent"}
    assert fitted == {"exponent of time": pytest.approx(1.5), "exponent of peak memory": pytest.approx(0)}
    rows = scaling.rows_of_curve("t", "workers", {1: [(2.0, None)], 2: [(1.0, None)]})
    assert [r["value"] for r in rows] == [2, 1, -1]
    assert rows[0]["peak_memory_mib"] is None


def test_the_projection_counts_operations():
    rows = {r["contender"]: r for r in scaling.projection(types.SimpleNamespace(quick=True))}
    assert rows["one image forward"]["value"] > 0.1
    images, blocks = 50_000, 5
    image = rows["one image forward"]["value"] * 1e9 * images / 3600
    for precision, rate in scaling.ASSUMED_RATES.items():
        assert 0 < rows[f"all single deletions, {precision}"]["value"] < (blocks + 1) * image / rate
        assert 3 * image / rate < rows[f"exact gradient, {precision}"]["value"] < (blocks + 3) * image / rate


def test_operations_and_their_kinds():
    convolution = torch.nn.Conv2d(3, 4, 3, bias=False)
    assert limit.operations(lambda: convolution(torch.zeros(2, 3, 6, 6))) == 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)
    kinds = {
        "aten::mkldnn_convolution": "convolution",
        "aten::native_batch_norm": "BatchNorm",
        "aten::relu": "ReLU",
        "aten::clamp_min": "ReLU",
        "aten::add": "addition",
        "aten::addmm": "matrix product",
        "aten::copy_": "copies and reorders",
        "aten::mean": "other operations",
    }
    assert {name: limit.kind_of(name) for name in kinds} == kinds


@pytest.mark.parametrize("name", limit.PROFILED)
def test_profiles_account_for_the_whole_time(name):
    chain = rp.unravel(load_network("preact-resnet-20").eval(), torch.zeros(2, 1, 28, 28))
    precision = limit.WAYS[name].get("precision", "float32")
    rates = {"float32": 10.0, "bfloat16": 20.0}
    rows = limit.profiled("t", chain, torch.randn(2, 1, 28, 28), limit.WAYS[name], rates)
    *shares, least = rows
    assert sum(r["value"] for r in shares) == pytest.approx(1)
    assert {"convolution", "ReLU", "addition", "Python between operations"} <= {r["contender"] for r in shares}
    assert least["contender"].endswith(f"rate in {precision}")
    assert least["value"] > 0


def test_rows_of_parts_that_were_not_run_are_kept(tmp_path):
    rows = [table.row("lesions", "t", "a", "seconds", [1, 3, 2], [1.0]), table.row("limit", "t", "b", "s", 5)]
    old = table.stamped(rows, {}, 1)
    new = table.stamped([table.row("limit", "t", "c", "s", note="not to be had")], {"torch": "2"}, 2)
    table.write(table.merged(old, new), tmp_path / "b.csv")
    read = pd.read_csv(tmp_path / "b.csv")
    assert read[["part", "contender", "value", "low", "high"]].fillna(0).to_numpy().tolist() == [
        ["lesions", "a", 2, 1, 3],
        ["limit", "c", 0, 0, 0],
    ]
    assert "**T**\n" in table.markdown(read)
    assert "| a | 1 (1 to 1) | - |  |" in table.markdown(read)
    assert "| c | - | not to be had |" in table.markdown(read)
    assert "not to be had" in table.text(read)
    ax = table.plot_ratios(read)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a"]


def test_the_page_shows_exponents_of_curves_and_not_their_points():
    rows = scaling.rows_of_curve("t", "blocks", {n: [(n**1.5, 3.0)] for n in (1, 2, 4)})
    shown = table.markdown(table.stamped(rows, {}, 1))
    assert "| t | 1.50 ± 0.00 (1.50) | 0.00 (0.00) |" in shown
    assert "4 blocks" not in shown


def test_rows_say_which_features_the_processor_has(tmp_path):
    used = f"PyTorch uses {torch.backends.cpu.get_cpu_capability()}"
    info = tmp_path / "cpuinfo"
    told = "model name\t: An x86\nflags\t\t: fpu avx2 avx512f amx_bf16 amx_tile avx512_vnni\n\n"
    info.write_text(f"processor\t: 0\n{told}processor\t: 1\n{told}")
    assert (table.processor(info), table.features(info)) == ("An x86", f"{used}; avx2 avx512f amx_bf16")
    assert table.bfloat16_support(info) == "matrix units for bfloat16 (amx_bf16)"
    info.write_text("flags\t\t: fpu avx2 avx512f\n")
    assert table.bfloat16_support(info) == "a processor without instructions for bfloat16"
    info.write_text("Features\t: fp asimd bf16\n")
    assert table.features(info) == f"{used}; asimd bf16"
    assert table.bfloat16_support(info) == "instructions for bfloat16 (bf16)"
    assert table.features(tmp_path / "not there") == used
    assert table.bfloat16_support(tmp_path / "not there") == "unknown what the processor has for bfloat16"
    new = table.stamped([table.row("limit", "t", "b", "s", 5)], {"torch": "2"}, 2)
    assert used in new["features"].item()
    assert used in table.markdown(new).splitlines()[-1]
    without = table.stamped([table.row("startup", "t", "b", "s", 5)], {"torch": "2"}, 2).drop(columns="features")
    read = table.merged(without, new)
    assert read["features"].isna().tolist() == [True, False]
    last = table.markdown(read).splitlines()[-2:]
    assert [line.split(":")[0] for line in last] == ["startup", "limit"]
    assert [used in line for line in last] == [False, True]


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
    assert (
        "--only {lesions,studies,tokens,gradients,scaling,limit,startup,unraveling,neighbour}"
        in capsys.readouterr().out
    )


def test_the_page_shows_what_was_measured():
    first, last = "'python -m tests.benchmarks --markdown' prints. -->\n", "<!-- End of the benchmarks. -->"
    shown = PAGE.split(first)[1].split(last)[0].strip()
    assert shown == (table.markdown(pd.read_csv(table.CSV)) if table.CSV.exists() else "")


def test_prefixes_counted_by_hand(chain):
    """Of the nine blocks, the fourth and the seventh have a projection, which is run when they are deleted."""
    assert studies.evaluations_by_hand(chain, [()]) == (9, 9)
    assert studies.evaluations_by_hand(chain, [(), (8,), (0,), (3,)]) == (9 + 0 + 8 + 6, 9 + 8 + 8 + 9)
    told = studies.sharing(chain, 1)
    assert "prefixes counted by hand" in told[0]["note"]
    assert told[0]["value"] < told[1]["value"]


@pytest.mark.slow
def test_a_study_of_tokens_has_the_losses_of_a_loop():
    study, loop = tokens.run(types.SimpleNamespace(quick=True))
    # Two blocks a layer: those after each deleted layer and those of the intact chain, for 12 networks of 11 layers.
    assert f"divided by {12 * 22 / (24 + sum(range(0, 24, 2))):.2f}" in study["note"]
    assert loop["ratio"] == pytest.approx(loop["value"] / study["value"])


@pytest.mark.filterwarnings("ignore:At path lengths")
def test_the_page_of_coverage_has_a_row_for_each_method():
    chain = build(random_recipe(np.random.default_rng(0)))
    runs = {
        method: [
            rp.gradient_by_path_length(
                chain, *batch(), **options | {"num_draws": 40}, generator=torch.Generator().manual_seed(seed)
            )
            for seed in range(3)
        ]
        for method, options in coverage.METHODS.items()
    }
    chains = coverage.on_chains(range(2), 1)
    found = coverage.page(chains, 2, 1, runs, "a chain")
    rows = [line for line in found.splitlines() if (line.startswith("| ") and "paths" in line) or "signs" in line]
    assert sum("`mean_path_gradient_norm` | " in row for row in rows) == 2 * 3
    assert sum("`rms_path_gradient_norm` | " in row for row in rows) == 2 * 3
    assert "nan" not in found
    assert "other methods" in found
    assert "block VJPs to a true error of 10 %" in found
    some = coverage.page(chains, 2, 1, runs | {"uniform paths": [], "random signs": []}, "a chain")
    assert "other methods" not in some
    assert "40 uniform paths" not in some.partition("ResNet-110: `")[2]


def test_the_page_of_coverage_says_where_it_is_below_95_percent():
    held = {"quantity": "mean_path_gradient_norm", "held": [True] * 9 + [False]}
    low = pd.DataFrame(held | {"method": "random signs"})
    high = low.assign(held=True)
    assert coverage.too_low(high, high) == "The coverage is at least 95 % in all cases."
    found = coverage.too_low(high, low)
    assert found.endswith("cases: 90.0% on the ResNet-110 for `mean_path_gradient_norm` (random signs).")


def test_intervals_about_a_reference_of_its_own_error_are_judged_by_the_error_of_the_run(monkeypatch):
    """Runs with a standard error of 1 about the mean of two others: 95 % of the intervals hold what they should."""
    values = 100 + np.random.default_rng(0).normal(size=(3, 4000))
    runs = [
        pd.DataFrame({"mean_path_gradient_norm": v, "mean_path_gradient_norm_se": 1.0, "num_paths": 7}) for v in values
    ]
    runs = [run.assign(path_length=range(4000), rms_path_gradient_norm=1.0) for run in runs]
    monkeypatch.setattr(coverage, "WORTH", 1e-9)
    reference = {"mean_path_gradient_norm": coverage.mean_of_runs(runs[1:])["mean_path_gradient_norm"]}
    found = coverage.judged("some", runs[0], reference, math.sqrt(1.5))
    assert len(found) == 4000
    assert found.held.mean() == pytest.approx(0.95, abs=0.012)
    assert coverage.error_ratio(found) == pytest.approx(1, abs=0.04)


def test_the_table_of_deep_chains_has_a_row_for_each_function():
    from tests.benchmarks import depth

    # In a process of its own: autograd does not run in forks of a process that has used it.
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.depth", "6"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    head, rule, *rows = done.stdout.splitlines()
    assert head.count("|") == rule.count("|") == 5
    assert len(rows) == len(depth.LINEAR) + len(depth.QUADRATIC)
    for line in rows:
        _, _, _, seconds, mebibytes, _ = line.split("|")
        assert 0 <= float(seconds) < 60
        assert float(mebibytes) >= 0


def test_every_public_function_is_measured_on_deep_chains_or_has_a_reason():
    from tests.benchmarks import depth

    stub = Path(rp.__file__).with_suffix(".pyi").read_text()
    public = {name for name in re.findall(r"as (\w+)", stub) if inspect.isfunction(getattr(rp, name))}
    measured = {name.partition(",")[0] for name in depth.LINEAR | depth.QUADRATIC}
    assert public == set(depth.WITHOUT) | {name for name in measured if not name.startswith("chain")}


def test_a_cell_is_timed_quiet_and_beside_a_process_that_ends(monkeypatch):
    made, running = [], []
    make = neighbour.subprocess.Popen
    monkeypatch.setattr(neighbour.subprocess, "Popen", lambda *given: made.append(make(*given)) or made[-1])
    names = [neighbour.DEFAULT, "one thread"]
    monkeypatch.setattr(neighbour, "CONTENDERS", {name: neighbour.CONTENDERS[name] for name in names})

    def seconds_of(name):
        running.append((name, [process.poll() is None for process in made]))
        return float(len(running))

    rows = neighbour.measured(seconds_of, 2)
    assert [name for name, _ in running] == [*names, *names, *names, *names[::-1], *names[::-1]]
    alive = [[], [], [True], [True], [False], [False], [False, True], [False, True]]
    assert [processes for _, processes in running] == [[], [], *alive]
    assert all(process.poll() is not None for process in made)
    assert [(r["low"], r["high"]) for r in rows] == [(3, 8), (4, 7), (5, 10), (6, 9)]
    assert [r["ratio"] for r in rows] == pytest.approx([1, (4 / 3 + 7 / 8) / 2, (5 / 3 + 10 / 8) / 2, (2 + 9 / 8) / 2])
    assert rows[3]["note"] == "1.05 times the default, beside a busy process"


def test_a_cell_is_a_study_of_every_deletion():
    measure = neighbour.CONTENDERS["one thread"].prepare({"threads": 1, "images": 25})
    assert measure({})["seconds"] > 0


def test_threads_of_a_worker_wait_as_asked(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert workers.environment(None) == dict(os.environ)
    default, passive = (workers.environment(given) for given in ({}, {"OMP_WAIT_POLICY": "PASSIVE"}))
    assert passive == default | {"OMP_WAIT_POLICY": "PASSIVE"}
    assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(default)


# The script for a GPU, on the CPU

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small():
    """Three blocks, the second with a projection, and a batch."""
    generator = torch.Generator().manual_seed(0)

    def layer(width_in, width_out):
        made = torch.nn.Conv2d(width_in, width_out, 3, padding=1)
        for parameter in made.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        return made.requires_grad_(False)

    skips = (torch.nn.Identity(), layer(2, 3), torch.nn.Identity())
    widths = ((2, 2), (2, 3), (3, 3))
    blocks = [
        Block(torch.nn.Sequential(torch.nn.Tanh(), layer(*width)), skip, name=f"block{i}")
        for i, (skip, width) in enumerate(zip(skips, widths, strict=True))
    ]
    chain = rp.ResidualChain(layer(1, 2), blocks, torch.nn.Sequential(layer(3, 4), torch.nn.Flatten())).eval()
    return chain, torch.randn(4, 1, 2, 2, generator=generator), torch.tensor([0, 5, 9, 15])


def test_every_instrument_is_compared_in_every_precision(small):
    chain, images, labels = small
    (low,) = place_modules([chain], precision="bfloat16")
    rows = gpu.correctness("a network", chain, low, images, labels, CPU)
    names = [f"{name}, {precision}" for name in gpu.instruments() for precision in ("float32", "float64")]
    assert [r["contender"] for r in rows] == [*names, *(f"lesion_study, {way}" for way in gpu.WAYS)]
    assert not any(r["note"].startswith("WRONG") for r in rows), [r["note"] for r in rows]
    assert all(r["value"] == 0 for r in rows if "float64" in r["contender"])
    assert all(0 < r["value"] < 1e-3 for r in rows if "float32" in r["contender"])
    assert 1e-4 < rows[-1]["value"] < 0.1


def test_other_numbers_and_failures_are_wrong(small):
    chain, images, labels = small
    (other,) = place_modules([chain])
    other = rp.scale_block(other, 1, 1.05)
    for name, instrument in gpu.instruments().items():
        expected = instrument(chain, images, labels)
        made = gpu.compared("t", name, functools.partial(instrument, other, images, labels), expected, 1e-3)
        assert made["note"].startswith("WRONG: at most 0.001"), name
    losses = gpu.losses_without_each_block(chain, images, labels)
    by_hand = [F.cross_entropy(rp.delete_block(chain, i)(images), labels, reduction="none") for i in range(3)]
    assert np.allclose(losses.to_numpy(), torch.stack(by_hand).numpy(), rtol=1e-5)

    def fails():
        raise RuntimeError("no kernel\nfor it")

    failed = gpu.compared("t", "lens", fails, losses, 1e-3)
    assert failed["note"] == "WRONG: RuntimeError: no kernel for it"
    assert math.isnan(failed["value"])


def test_the_largest_difference_is_that_of_a_column():
    expected = pd.DataFrame({"block": ["a", "b"], "norm": [1.0, -4.0], "se": [np.nan, 0.0], "many": [2**70, 1]})
    assert gpu.largest_difference(expected.copy(), expected)[0] == 0
    assert gpu.largest_difference(expected.assign(norm=[1.0, -3.0]), expected) == (0.25, "norm")
    assert gpu.largest_difference(expected.assign(se=[np.nan, 0.5]), expected) == (0.5, "se")
    for other in ({"se": [0.0, 0.0]}, {"norm": [1.0, np.inf]}, {"block": ["a", "c"]}, {"many": [2**70 + 1, 1]}):
        assert gpu.largest_difference(expected.assign(**other), expected) == (math.inf, next(iter(other)))
    assert gpu.largest_difference(expected[:1], expected) == (math.inf, "columns and rows")
    assert gpu.largest_difference(expected.drop(columns="se"), expected) == (math.inf, "columns and rows")


def test_loops_on_the_gpu_compute_what_the_project_computes(small):
    chain, images, labels = small
    plan = rp.single_deletions(chain)
    halves = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    assert gpu.loop(chain, halves, plan) == rp.lesion_study(chain, halves, plan, progress=False).error_rate.tolist()
    rows = gpu.split_by_lengths(chain, images, labels)
    for length, row in enumerate(rows):
        paths = (path for path in itertools.product([False, True], repeat=3) if sum(path) == length)
        of_paths = sum(gradients.gradient_of_path(chain, images, labels, path) for path in paths)
        assert torch.allclose(row, of_paths, rtol=1e-4, atol=1e-6)


def test_every_row_of_speed_is_measured(small):
    chain, images, labels = small
    once = {"repeats": 1, "budget": 0}
    rows = gpu.study_speed("a network", chain, [(images, labels)], CPU, batch_budget=8, **once)
    rows += gpu.gradient_speed("a network", chain, images, labels, CPU, **once)
    rows += gpu.energy_speed("a network", chain, images, labels, CPU, num_draws=16, longest=2, **once)
    assert len(rows) == (1 + len(gpu.WAYS)) + 2 + 2 + 2
    assert all(r["value"] > 0 for r in rows)
    firsts = {r["task"]: r["value"] for r in reversed(rows)}
    assert [r["ratio"] for r in rows] == pytest.approx([firsts[r["task"]] / r["value"] for r in rows])


def test_times_wait_for_the_device_and_tf32_is_allowed_where_asked(monkeypatch):
    waited, allowed = [], []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    def work():
        allowed.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))

    rows = gpu.in_turns("t", {"float32": work, "TF32": work}, torch.device("cuda"), repeats=3, budget=60)
    assert allowed == 4 * [(False, False), (True, True)]
    assert waited == [torch.device("cuda")] * 2 * len(allowed)
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    assert [r["contender"] for r in rows] == ["float32", "TF32"]
    allowed.clear()
    gpu.in_turns("t", {"float32": work}, CPU, repeats=3, budget=0)
    assert len(allowed) == 2  # one that does not count, and one


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "choose_device", lambda device: CPU)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 0
    assert capsys.readouterr().out == "There is no GPU: nothing is measured.\n"
