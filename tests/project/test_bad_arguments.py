"""Every public function, every argument, every kind of wrong value: one `ResnetPathsError` before any forward pass."""

from __future__ import annotations

import inspect
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain


class Untouched(nn.Module):
    """A stem that must not run."""

    def forward(self, x):
        raise AssertionError("a forward pass before the arguments were validated")


def chain_of(stem):
    blocks = [Block(nn.Linear(3, 3), nn.Identity(), name=f"b{i}", in_shape=(3,), out_shape=(3,)) for i in range(3)]
    return ResidualChain(stem, blocks, nn.Linear(3, 2)).double().eval()


CHAIN = chain_of(Untouched())
X, Y = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
LOADER = [(X, Y)]
GENERATOR = torch.Generator()
LESIONS = rp.single_deletions(CHAIN)
MODEL = nn.Linear(3, 3).eval()
SVD = rp.jacobian_svd(chain_of(nn.Linear(3, 3)), X, rank=2)
NOT_NUMBERS = ["x", 1.5, b"1", [], {}, torch.zeros(2), np.zeros(2), 1j, object(), torch.tensor(True), np.True_, True]

BAD = {
    "chain": [None, 3, "x", MODEL, [CHAIN], object, X],
    "chain or int": [None, -1, 1.5, "x", MODEL, True, [CHAIN], np.zeros(2), torch.zeros(2), torch.tensor(True)],
    "model": [None, 3, "x", nn.Linear, X, [MODEL]],
    "block": [None, 7, -4, 1.5, "b9", b"b0", True, [0], torch.zeros(2), np.zeros(2), 10**19, torch.tensor(True)],
    "blocks": [3, "b0", [7], [None], [1.5], [True], ["b9"], [[0]], torch.tensor([True, False, True]), object()],
    "order": [None, 3, [0, 1], [0, 0, 1], [0, 1, 7], ["b0"], [True, False, True]],
    "path": [None, 3, [True], "abc", [True, False, 7], [True, False, None], [X, X, X], np.zeros((3, 3)), [[True]] * 3],
    "factor": [None, "x", float("nan"), float("inf"), 1j, [], X, True, torch.tensor(True), 10**400],
    "factors": [None, 3, "x", ["x"], [float("nan")], [None], [X]],
    "int at least 0": [*NOT_NUMBERS, None, -1],
    "int at least 1": [*NOT_NUMBERS, None, -1, 0],
    "optional int at least 1": [*NOT_NUMBERS, -1, 0],
    "optional int at least 0": [*NOT_NUMBERS, -1],
    "optional length": [*NOT_NUMBERS, -1, 10**19, 7],
    "length": [*NOT_NUMBERS, None, -1, 10**19, 7],
    "counts": [None, 2, "x", [0], [-1], [1.5], ["x"], [None], [10**19], [7], [True]],
    "optional lengths": [2, "x", [0], [-1], [1.5], ["x"], [None], [10**19], [7], [True]],
    "generator": [None, 3, np.random.default_rng(0), torch.default_generator.get_state(), "x", torch.Generator],
    "optional generator": [3, np.random.default_rng(0), torch.default_generator.get_state(), "x", torch.Generator],
    "choice": ["banana", 3, None, b"exact", [], X],
    "one of some": ["banana", 3, b"exact", []],
    "unit": ["banana", 3, None, [[0, 2]], [[7]], [[1.5]], [0], X],
    "loader": [None, 3, MODEL, object(), [], [3], ["x"], [None]],
    "labelled loader": [None, 3, MODEL, object(), [], [3], ["x"], [None], [X], [(X, Y[:2])], [(X, "x")]],
    "inputs": [None, 3, "x", MODEL, [], {}, (), {"x": 3}, [3], object(), X.to_sparse(), (X.to_sparse(),), X.to("meta")],
    "targets": [Y.to("meta"), Y.to_sparse(), torch.zeros(4, 2).to_sparse(), [Y.to_sparse()]],
    "lesions": [None, 3, "x", [3], [None], LESIONS[0], ["delete"], [MODEL, 3], [nn.Linear]],
    "measures": [None, 3, [3], ["banana"], [None], [], ["top_0_error"], [lambda: 0], [[]]],
    "measure": [None, 3, "banana", [], lambda: 0, "top_0_error"],
    "store": [5, b"x", "a\0b", [], 1.5, True],
    "executor": [3, "x", ThreadPoolExecutor, object()],
    "device": ["banana", 3.5, None, [], "cuda:99", "meta", torch.device("meta"), b"cpu", X],
    "precision": ["banana", 3, torch.float16, [], b"float16"],
    "budget": [*NOT_NUMBERS, None, -1, 0, float("nan")],
    "loss": [5, "cross_entropy", [], nn.CrossEntropyLoss],
    "adjust": ["banana", 3, [], True],
    "precision of intervals": [0.01, "x", {}, rp.lesions.Precision, rp.lesions.Precision(0.1, "margin")],
    "share": [None, "x", 0, -1, 1.5, float("nan"), [], True],
    "relative error": [None, "x", 0, -1, float("nan"), [], True],
    "frame": [None, 3, "x", pd.DataFrame(), pd.DataFrame({"a": [1]}), pd.Series([1]), {}, [], X],
    "name": ["banana", 3, None, [], b"x"],
    "path of weights": [5, b"x", "a\0b", "/nowhere", []],
    "optional name": ["banana", 3, [], b"x", "../networks"],
    "name of a data set": [3, [], b"x", "../networks"],  # of any other, no network is trained
    "optional seed": ["x", 1.5, -1, 10**19, [], True],
    "function": [None, 3, "x", lambda: 0, []],
    "example": [None, 3, "x", [], {}, (), object(), [3], X[:0]],
    "names": [3, [], [3], "x", ["banana"]],
    "depth": [*NOT_NUMBERS, -1, float("nan")],
}

CHAINED = {"chain": CHAIN}
GRADIENT = {"chain": CHAIN, "inputs": X, "targets": Y}
OF_GRADIENT = {"chain": "chain", "inputs": "inputs", "targets": "targets", "loss": "loss", "memory_budget": "budget"}
PREDICTION = {"chain": CHAIN, "inputs": X}
OF_PREDICTION = {
    "chain": "chain",
    "inputs": "inputs",
    "output": "choice",
    "linearization": "choice",
    "memory_budget": "budget",
}
RANDOM = {"chain": CHAIN, "counts": [1], "repeats": 1, "generator": GENERATOR}
OF_RANDOM = {"chain": "chain", "counts": "counts", "repeats": "int at least 0", "generator": "generator"}

FUNCTIONS = {
    "as_causal_lm": (CHAINED | {"config": None}, {"chain": "chain"}),
    "block_norms": (PREDICTION, {"chain": "chain", "inputs": "inputs", "tokens": "one of some"}),
    "branch_replacements": (
        {"chain": CHAIN, "source": CHAIN},
        {"chain": "chain", "source": "chain", "name": "text"},
    ),
    "delete_block": ({"model": CHAIN, "block": 0}, {"model": "model", "block": "block"}),
    "delete_blocks": ({"model": CHAIN, "blocks": [0]}, {"model": "model", "blocks": "blocks"}),
    "deletion_account": (PREDICTION, OF_PREDICTION | {"lesions": "deletions", "generator": "optional generator"}),
    "direct_effects": (PREDICTION, OF_PREDICTION | {"generator": "optional generator"}),
    "duplicate_block": (CHAINED | {"block": 0}, {"chain": "chain", "block": "block"}),
    "duplications": (CHAINED, {"chain": "chain"}),
    "effect_matrix": (PREDICTION, OF_PREDICTION | {"lesions": "deletions"}),
    "effective_window": (
        {"frame": pd.DataFrame({"path_length": [0, 1], "gradient_share": [0.5, 0.5]}), "quantity": "gradient_share"},
        {"frame": "frame", "quantity": "choice", "share": "share"},
    ),
    "enumerate_paths": (CHAINED, {"chain": "chain or int", "length": "optional length"}),
    "gradient_by_depth": (GRADIENT, OF_GRADIENT),
    "gradient_by_path_length": (
        GRADIENT | {"method": "sampled", "generator": GENERATOR},
        OF_GRADIENT
        | {
            "method": "choice",
            "paths": "one of some",
            "max_length": "optional length",
            "with_respect_to": "choice",
            "num_draws": "optional int at least 1",
            "relative_error": "relative error",
            "average": "choice",
            "generator": "optional generator",
        },
    ),
    "gradient_by_stage_lengths": (GRADIENT, OF_GRADIENT | {"with_respect_to": "choice"}),
    "gradient_through_block": (GRADIENT, OF_GRADIENT | {"with_respect_to": "choice"}),
    "greedy_deletions": (
        {"chain": CHAIN, "loader": LOADER, "num_blocks": 1},
        {
            "chain": "chain",
            "loader": "labelled loader",
            "num_blocks": "int at least 1",
            "measure": "measure",
            "device": "device",
        },
    ),
    "group_blocks": (CHAINED, {"chain": "chain", "unit": "unit"}),
    "iterative_inference": (
        PREDICTION,
        {"chain": "chain", "inputs": "inputs", "logits": "optional function", "memory_budget": "budget"},
    ),
    "jacobian_svd": (
        PREDICTION,
        {
            "chain": "chain",
            "inputs": "inputs",
            "rank": "int at least 1",
            "tolerance": "tolerance",
            "max_iterations": "int at least 1",
            "generator": "optional generator",
            "memory_budget": "budget",
        },
    ),
    "layer_schedules": (
        CHAINED,
        {"chain": "chain", "blocks": "blocks", "loops": "int at least 1", "generator": "optional generator"},
    ),
    "interaction_spectrum": ({}, {"values": "frame"}),
    "lens": (
        PREDICTION,
        {
            "chain": "chain",
            "inputs": "inputs",
            "max_length": "optional int at least 0",
            "linearization": "choice",
            "logits": "optional function",
            "memory_budget": "budget",
        },
    ),
    "lesion_study": (
        {"chain": CHAIN, "loader": LOADER, "lesions": LESIONS},
        {
            "chain": "chain",
            "loader": "labelled loader",
            "lesions": "lesions",
            "measures": "measures",
            "store": "store",
            "executor": "executor",
            "device": "device",
            "precision": "precision",
            "batch_budget": "optional int at least 1",
            "adjust": "adjust",
            "reestimate_batchnorm": "loader of statistics",
            "stop_when": "precision of intervals",
        },
    ),
    "list_networks": ({}, {"dataset": "name of a data set"}),
    "load_dataset": ({}, {"name": "name", "split": "name", "folder": "store"}),
    "load_network": (
        {"name": "preact-resnet-20"},
        {
            "name": "name",
            "weights": "path of weights",
            "dataset": "optional name",
            "seed": "optional seed",
            "snapshot": "optional seed",
            "device": "device to load on",
        },
    ),
    "mean_replacements": (PREDICTION, {"chain": "chain", "inputs": "inputs"}),
    "measure": (
        {"function": lambda outputs, labels: labels},
        {"function": "function", "name": "name of a measure", "key": "optional text", "is_rate": "unlike a bool"},
    ),
    "neighbour_swaps": (CHAINED, {"chain": "chain"}),
    "pair_deletions": (CHAINED, {"chain": "chain", "blocks": "blocks"}),
    "pair_interactions": ({}, {"frame": "frame"}),
    "parallel_blocks": (
        CHAINED | {"blocks": [0, 1]},
        {"chain": "chain", "blocks": "blocks", "combine": "choice"},
    ),
    "path_histogram": (CHAINED, {"chain": "chain or int", "unit": "choice"}),
    "path_network": (CHAINED | {"path": [True] * 3}, {"chain": "chain", "path": "path"}),
    "path_length_moments": (GRADIENT, OF_GRADIENT | {"with_respect_to": "choice"}),
    "permute_blocks": (CHAINED | {"order": [1, 0, 2]}, {"chain": "chain", "order": "order"}),
    "predicted_effects": (
        {"chain": CHAIN, "loader": LOADER},
        {
            "chain": "chain",
            "loader": "labelled loader",
            "measures": "some measures",
            "span": "spans",
            "device": "device",
            "tokens": "one of some",
            "feature_dim": "dimension",
        },
    ),
    "prediction_by_path_length": (
        PREDICTION,
        OF_PREDICTION | {"max_length": "optional length", "generator": "optional generator", "by_source": "choice"},
    ),
    "prediction_path_length_moments": (PREDICTION, OF_PREDICTION),
    "random_deletions": (RANDOM, OF_RANDOM),
    "random_duplications": (RANDOM, OF_RANDOM),
    "random_swaps": (RANDOM, OF_RANDOM | {"counts": "counts of swaps"}),
    "range_deletions": (CHAINED, {"chain": "chain", "lengths": "optional lengths"}),
    "range_repeats": (CHAINED, {"chain": "chain", "lengths": "optional lengths"}),
    "range_swaps": (CHAINED | {"length": 1}, {"chain": "chain", "length": "length of a range"}),
    "ranked_deletions": (CHAINED | {"ranking": [0]}, {"chain": "chain", "ranking": "blocks"}),
    "residual_alignment": (
        {"svd": SVD},
        {"svd": "svd", "other": "optional svd", "num_vectors": "number of vectors"},
    ),
    "reverse_blocks": (CHAINED | {"stage": 0}, {"chain": "chain", "stage": "length"}),
    "sample_paths": (
        CHAINED | {"length": 1, "num_samples": 1, "generator": GENERATOR},
        {"chain": "chain or int", "length": "length", "num_samples": "int at least 0", "generator": "generator"},
    ),
    "sampled_shapley_values": (
        {"chain": CHAIN, "loader": LOADER, "generator": GENERATOR},
        {
            "chain": "chain",
            "loader": "labelled loader",
            "measure": "measure",
            "blocks": "blocks",
            "generator": "generator",
            "relative_error": "relative error",
            "num_pairs": "optional int at least 1",
            "scores": "scores",
            "device": "device",
            "batch_budget": "optional int at least 1",
        },
    ),
    "scale_block": (CHAINED | {"block": 0, "factor": 1.0}, {"chain": "chain", "block": "block", "factor": "factor"}),
    "scalings": (CHAINED | {"factors": [0.5]}, {"chain": "chain", "factors": "factors"}),
    "shapley_interactions": ({}, {"values": "frame"}),
    "shapley_values": ({}, {"values": "frame"}),
    "single_deletions": (CHAINED, {"chain": "chain"}),
    "subset_deletions": (CHAINED, {"chain": "chain", "blocks": "blocks"}),
    "subset_values": (
        {"chain": CHAIN, "loader": LOADER},
        {
            "chain": "chain",
            "loader": "labelled loader",
            "measures": "measure",
            "blocks": "blocks",
            "store": "store",
            "executor": "executor",
            "device": "device",
            "batch_budget": "optional int at least 1",
        },
    ),
    "swap_blocks": (CHAINED | {"first": 0, "second": 1}, {"chain": "chain", "first": "block", "second": "block"}),
    "unravel": (
        {"model": MODEL, "example_inputs": X.float()},
        {
            "model": "model",
            "example_inputs": "example",
            "output": "output of a model",
            "max_depth": "depth",
            "blocks": "names",
            "skip": "names of skips",
        },
    ),
    "unraveled_graph": ({"chain": 2}, {"chain": "chain or int", "max_nodes": "int at least 1"}),
}
BAD["labelled loader"] += [
    [(X, Y.to_sparse())],
    [(X, Y.to("meta"))],
    [(X.to("meta"), Y)],
    [(X.to_sparse(), Y)],
    [{"x": X, "labels": torch.zeros(4, 2).to_sparse()}],
    [(X, Y.to(torch.complex64))],
]
BAD["text"] = [None, 3, [], b"x"]
BAD["optional text"] = [3, [], b"x"]
BAD["name of a measure"] = [3, [], b"x", "", "two words"]
BAD["unlike a bool"] = ["x", 3, None]
BAD["deletions"] = [3, "x", [], [3.5], [None], [7], ["b9"], [True], np.zeros(2), object()]
BAD["dimension"] = ["x", 1.5, [], True, object()]
BAD["output of a model"] = ["x", 3, -9, 1.5, [], b"x", object()]
BAD["names of skips"] = [None, 3, object()]
BAD["class indices"] = [3, "x", [], Y[:2], Y + 7, Y - 7, Y.double(), Y.to(torch.complex64), nn.Linear]
BAD["tolerance"] = [None, "x", -1, float("nan"), [], True]
BAD["svd"] = [None, 3, "x", CHAIN, SVD.to_frame(), [SVD]]
BAD["optional svd"] = [3, "x", CHAIN, SVD.to_frame(), [SVD], SVD.examples([0])]
BAD["number of vectors"] = [*NOT_NUMBERS, -1, 0, 3]
BAD["optional function"] = [3, "x", [], nn.Linear]
BAD["scores"] = [3, "x", [], [1.0], [0.0] * 3, [1.0, None, 2.0], [1.0, float("nan"), 2.0], ["a", "b", "c"], [True] * 3]
BAD["spans"] = BAD["counts"][2:]
BAD["some measures"] = [value for value in BAD["measures"] if value]
BAD["loader of statistics"] = BAD["loader"][1:]
BAD["device to load on"] = [value for value in BAD["device"] if "meta" not in str(value)]
BAD["counts of swaps"] = [value for value in BAD["counts"] if value not in ([10**19], [7])]
BAD["length of a range"] = BAD["length"] + [0, 2]

CASES = [
    pytest.param(name, argument, BAD[kind], id=f"{name}-{argument}")
    for name, (_, kinds) in FUNCTIONS.items()
    for argument, kind in kinds.items()
]


def refused(name, arguments):
    """What a call raises."""
    try:
        made = getattr(rp, name)(**arguments)
    except Exception as error:
        return error
    return f"no error, but {type(made).__name__}"


@pytest.mark.parametrize(("name", "argument", "values"), CASES)
def test_a_wrong_value_is_one_clear_error(name, argument, values):
    wrong = {}
    for value in values:
        found = refused(name, FUNCTIONS[name][0] | {argument: value})
        if not isinstance(found, rp.ResnetPathsError) or not re.search(r"got .*; allowed: .", str(found), re.DOTALL):
            wrong[repr(value)[:60]] = repr(found)[:160]
    assert not wrong


RUNNING = chain_of(nn.Linear(3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.complex128])
@pytest.mark.parametrize("stem", [nn.Linear(3, 3), nn.Identity()], ids=["stem", "stem without weights"])
def test_inputs_of_another_dtype_than_the_chain_are_one_clear_error(stem, dtype):
    x, chain, wrong = X.to(dtype), chain_of(stem), {}
    message = r"inputs: got 'torch\.\w+'; allowed: .* weights are torch\.float64\. Convert|have no gradient"
    for name, (arguments, kinds) in FUNCTIONS.items():
        given = {"inputs": x, "loader": [(x, Y)]}
        given = {argument: value for argument, value in given.items() if argument in kinds}
        if given:
            found = refused(name, arguments | {"chain": chain} | given)
            if not isinstance(found, rp.ResnetPathsError) or not re.search(message, str(found)):
                wrong[name] = repr(found)[:200]
    assert not wrong
    for call in (chain, chain.run_with_cache):
        with pytest.raises(rp.ResnetPathsError, match=message):
            call(x)


def shown(made):
    made = made.to_frame() if hasattr(made, "to_frame") else made
    return made.to_csv() if isinstance(made, pd.DataFrame) else repr(made)


OF_LOADERS = [name for name, (_, kinds) in FUNCTIONS.items() if {"loader", "inputs"} & set(kinds)]


@pytest.mark.parametrize("name", sorted({*OF_LOADERS} - {"mean_replacements"}))  # which takes one batch
def test_batches_without_examples_are_left_out(name):
    arguments, kinds = FUNCTIONS[name]
    argument = "loader" if "loader" in kinds else "inputs"
    given = {key: value for key, value in arguments.items() if key != "targets"} | {"chain": RUNNING}

    def of(*batches):
        own = {"generator": torch.Generator().manual_seed(0)} if "generator" in given else {}
        return getattr(rp, name)(**given | own | {argument: list(batches)})

    batch, empty = (X + 1, Y), (X[:0], Y[:0])
    assert shown(of(empty, batch, empty)) == shown(of(batch))
    with pytest.raises(rp.ResnetPathsError, match=rf"{argument}: got 'no (examples|batches)'; allowed: .*at least one"):
        of(empty)


def test_a_chain_that_converts_its_inputs_takes_any():
    class Converting(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    chain = chain_of(Converting(3, 3))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    frames = [rp.lesion_study(chain, [(inputs, Y)], rp.single_deletions(chain)) for inputs in (x, x.double())]
    pd.testing.assert_frame_equal(*frames)


def test_an_error_of_the_stem_that_is_not_of_the_dtype_stays():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError, match=r"^no such layer$"):
        chain_of(Broken(3, 3))(X.float())


def test_every_public_function_is_in_the_table():
    stub = pathlib.Path(rp.__file__).with_suffix(".pyi").read_text()
    public = {name for name in re.findall(r"as (\w+)", stub) if inspect.isfunction(getattr(rp, name))}
    assert public - {"show_versions"} == set(FUNCTIONS)  # it has no arguments


# Below the top level


def plot_arguments(name):
    """What a plot function needs beside its frame, and a wrong frame for each that it takes."""
    parameters = list(inspect.signature(getattr(rp.figures, name)).parameters.values())
    needed = [p.name for p in parameters[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return {argument: pd.DataFrame() if argument == "study" else "path_length" for argument in needed}


FRAME = pd.DataFrame({"path_length": [0, 1, 2, 3], "mean_path_gradient_norm": [1.0, 0.5, 0.25, 0.125]})
FIGURE = Figure()
MODULES = [3, "x", [], nn.Linear]
NUMBERS = ["x", None, [], float("nan"), True]
OTHERS = {
    rp.figures.paper_style: [("column", [0, -1, *NUMBERS]), ("aspect", [0, -1, *NUMBERS])],
    partial(rp.figures.save_figure, fig=FIGURE, stem="figure"): [
        ("fig", [None, 3, "x"]),
        ("stem", [5, b"x", "a\0b", [], 1.5, "", "a.pdf"]),
        ("data", [3, "x", []]),
        ("networks", [3, "x", []]),
        ("seed", ["x", 1.5, [], True]),
    ],
    rp.figures.weights_hash: [("network", [None, *MODULES])],
    rp.lesions.Precision: [("half_width", ["x", None, -1, 0, float("nan"), [], True])],
    partial(rp.lesions.score_correlations, predicted=FRAME, study=FRAME): [
        ("predicted", BAD["frame"]),
        ("study", BAD["frame"]),
    ],
    partial(rp.gradients.block_independence, split=FRAME, through=FRAME): [
        ("split", BAD["frame"]),
        ("through", BAD["frame"]),
    ],
    partial(rp.direct_effects, RUNNING, X): [("targets", BAD["class indices"])],
    partial(rp.iterative_inference, RUNNING, X): [("targets", BAD["class indices"])],
    partial(rp.prediction_by_path_length, RUNNING, X): [("targets", BAD["class indices"])],
    rp.gradients.decay_factors: [("frame", BAD["frame"])],
    partial(rp.gradients.fit_decay, frame=FRAME): [
        ("frame", BAD["frame"]),
        ("quantity", ["banana", 3, None]),
        ("lengths", ["x", (1,), (2, 1), 5, ("a", "b"), (0, 1), (0, 1, 2), (0, None)]),
    ],
    rp.gradients.poisson_binomial: [("probabilities", ["x", None, 3, [None], ["x"], [float("nan")], [[1]], X])],
    partial(rp.gradients.scalar_gradients, weights=[1.0]): [
        ("weights", ["x", None, 3, [None], ["x"], [float("nan")], [[1]], X]),
        ("activation", ["x", 3, None, []]),
        ("start", NUMBERS),
    ],
    partial(rp.gradients.branch_probabilities, chain=CHAIN, inputs=X, targets=Y, progress=False): [
        ("chain", BAD["chain"]),
        ("inputs", BAD["inputs"]),
        ("power", [0, -1, *NUMBERS]),
        ("loss", BAD["loss"]),
        ("with_respect_to", BAD["choice"]),
        ("memory_budget", BAD["budget"]),
    ],
    partial(rp.gradients.pair_covariances, chain=CHAIN, inputs=X, targets=Y, progress=False): [
        ("chain", BAD["chain"]),
        ("inputs", BAD["inputs"]),
        ("loss", BAD["loss"]),
        ("with_respect_to", BAD["choice"]),
        ("memory_budget", BAD["budget"]),
    ],
    partial(rp.gradients.null_coherence, chain=CHAIN, inputs=X, targets=Y, progress=False): [
        ("chain", BAD["chain"]),
        ("inputs", BAD["inputs"]),
        ("others", [X[:0], *(bad for bad in BAD["inputs"] if bad is not None)]),
        ("num_repeats", [*BAD["int at least 1"], 1]),
        ("max_length", BAD["optional length"]),
        ("loss", BAD["loss"]),
        ("with_respect_to", BAD["choice"]),
        ("num_draws", BAD["optional int at least 1"]),
        ("relative_error", BAD["relative error"]),
        ("generator", BAD["optional generator"]),
        ("memory_budget", BAD["budget"]),
    ],
    rp.zoo.find_network: [("name", BAD["name"])],
    partial(rp.zoo.shipped_networks, name="plain-20"): [
        ("name", BAD["name"]),
        ("dataset", [3, [], b"x", "../networks"]),
    ],
    rp.zoo.shipped_weights: [("name", BAD["name"])],
    rp.zoo.training_logs: [("names", ["banana", 3, [3], b"x", ["banana"], object()])],
    partial(rp.zoo.build_network, name="plain-20", generator=GENERATOR): [
        ("name", BAD["name"]),
        ("generator", BAD["generator"]),
        ("in_channels", BAD["int at least 1"]),
        ("num_classes", BAD["optional int at least 1"]),
        ("num_drawn_blocks", [3, "x", (1, 2)]),
    ],
    partial(rp.Block, branch=nn.Identity(), skip=nn.Identity()): [
        ("branch", MODULES),
        ("skip", MODULES),
        ("pre", MODULES),
        ("post", MODULES),
        ("name", [3, None, [], b"x"]),
        ("stage", ["x", 1.5, -1, [], True, None]),
    ],
    partial(rp.ResidualChain, stem=nn.Identity(), blocks=list(CHAIN), head=nn.Identity()): [
        ("stem", [None, *MODULES]),
        ("blocks", [None, 3, "x", [None], [3], [nn.Identity()], [CHAIN[0], CHAIN[0]], [CHAIN]]),
        ("head", [None, *MODULES]),
    ],
    CHAIN[0].replace: [("branch", MODULES), ("skip", MODULES), ("stage", ["x", -1])],
    CHAIN.with_head: [("head", [None, *MODULES])],
    CHAIN.with_blocks: [("blocks", [None, 3, "x", [None], [3], [nn.Identity()]])],
    CHAIN.block_index: [("block", BAD["block"])],
    CHAIN.length_polynomial: [("unit", BAD["unit"])],
}
WIDGETS = {
    "explore_blocks": {"chain": CHAIN, "loader": LOADER},
    "explore_lesions": {"chain": CHAIN, "loader": LOADER},
    "explore_prediction": {"chain": CHAIN, "images": X},
}


def of(function):
    function = getattr(function, "func", function)
    return getattr(function, "__qualname__", repr(function))


def wrong_answers(call, argument, values):
    """Those values for which a call does not raise one clear error."""
    wrong = {}
    for value in values:
        try:
            found = f"no error, but {type(call(**{argument: value})).__name__}"
        except Exception as error:
            found = error
        if not isinstance(found, rp.ResnetPathsError) or not re.search(r"got .*; allowed: .", str(found), re.DOTALL):
            wrong[repr(value)[:60]] = repr(found)[:160]
    return wrong


@pytest.mark.parametrize(
    ("call", "argument", "values"),
    [pytest.param(call, *case, id=f"{of(call)}-{case[0]}") for call, cases in OTHERS.items() for case in cases],
)
def test_a_wrong_value_below_the_top_level_is_one_clear_error(call, argument, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not wrong_answers(call, argument, values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in rp.figures.__all__ if name.startswith("plot_")])
def test_a_wrong_frame_is_one_clear_error_of_each_figure(name):
    function = getattr(rp.figures, name)
    first = next(iter(inspect.signature(function).parameters.values()))
    given = plot_arguments(name)

    def call(frame):
        return function(frame, **given) if first.kind is not first.VAR_POSITIONAL else function(frame, frame)

    assert not wrong_answers(call, "frame", BAD["frame"])


COLUMNS = ["x", 3, [], {}, object(), ["banana"], np.zeros(2), torch.zeros(2), True]
STUDY = rp.lesion_study(RUNNING, LOADER, rp.single_deletions(RUNNING), progress=False)
EVIDENCE = rp.prediction_by_path_length(RUNNING, X + 1, by_source=True)
OF_FIGURES = {
    "plot_block_norms": (rp.block_norms(RUNNING, X), {"highlight": ["x", -1, 3, 1.5, [], True, np.zeros(2), 10**400]}),
    "plot_effective_window": (FRAME, {"quantity": COLUMNS}),
    "plot_gradient_by_depth": (rp.gradient_by_depth(RUNNING, X, Y).assign(network="a"), {"networks": [3, "a", ["b"]]}),
    "plot_lens": (rp.lens(RUNNING, X), {"value": COLUMNS}),
    "plot_path_gradients": (FRAME, {"decay": [3, "x", FRAME], "min_norm": ["x", 0, -1, float("nan"), [], 10**400]}),
    "plot_path_shares": (FRAME, {"by": COLUMNS}),
    "plot_predicted_effects": (rp.predicted_effects(RUNNING, LOADER), {"study": [STUDY[:0], 3], "score": COLUMNS}),
    "plot_range_deletions": (STUDY, {"value": COLUMNS}),
    "plot_single_deletions": (
        STUDY,
        {"value": COLUMNS, "chance": ["x", 2, float("nan"), []], "stage_starts": [3, "x", ["x"], [None], [-1], [1.5]]},
    ),
    "plot_unraveled_graph": (rp.unraveled_graph(3), {"highlight": [3, "x", [True], object(), True]}),
    "plot_waterfall": (EVIDENCE, {"num_bars": BAD["int at least 1"], "image": [3, "x", [], {}, np.zeros(3)]}),
}


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, (_, kinds) in OF_FIGURES.items() for argument in (*kinds, "ax")]
)
def test_another_wrong_argument_is_one_clear_error_of_a_figure(name, argument):
    frame, kinds = OF_FIGURES[name]
    needed = {
        "plot_effective_window": ["quantity"],
        "plot_path_shares": ["by"],
        "plot_predicted_effects": ["study", "score"],
    }
    right = {"quantity": "mean_path_gradient_norm", "by": "path_length", "study": STUDY, "score": "block_influence"}
    given = {key: right[key] for key in needed.get(name, [])}
    call = partial(getattr(rp.figures, name), frame, **given)
    assert not wrong_answers(call, argument, kinds.get(argument, [3, "x", FIGURE, [None]]))
    plt.close("all")


@pytest.mark.parametrize("name", WIDGETS)
def test_a_wrong_chain_or_loader_is_one_clear_error_of_each_widget(name):
    pytest.importorskip("ipywidgets")
    for argument in WIDGETS[name]:
        values = BAD["chain"] if argument == "chain" else [None, 3, object(), [3], ["x"]]
        assert not wrong_answers(partial(getattr(rp.widgets, name), **WIDGETS[name]), argument, values)


def test_sliders_refuse_what_is_outside_their_range():
    pytest.importorskip("ipywidgets")
    assert not wrong_answers(rp.widgets.explore_paths, "num_blocks", [*BAD["int at least 1"], 10**6])
    highway = rp.widgets.explore_gradient_highway
    assert not wrong_answers(highway, "depth", [*BAD["int at least 1"], 10**6])
    assert not wrong_answers(highway, "weight", [*NUMBERS, 5])
    assert not wrong_answers(highway, "activation", ["x", 3, None, []])


def test_every_function_below_the_top_level_is_in_a_table():
    tabled = {getattr(call, "func", call) for call in OTHERS}
    for wing in (rp.figures, rp.lesions, rp.gradients, rp.zoo, rp.widgets):
        for name in wing.__all__:
            public = getattr(wing, name)
            if inspect.isfunction(public) and name not in FUNCTIONS and not name.startswith(("plot_", "explore_")):
                assert public in tabled or not inspect.signature(public).parameters, name
