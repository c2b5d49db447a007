"""No weights file reaches a network unless it is whole and its own; the shipped ones are as good as they say."""

import json
import pickle
import random
import struct
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import shipped_folder
from resnet_paths.reproduce.training import TrainingSettings, evaluate, train
from resnet_paths.zoo import (
    NETWORKS,
    build_network,
    list_networks,
    load_network,
    networks_table,
    shipped_weights,
    training_logs,
)
from resnet_paths.zoo.weights import logs_in, read_metadata, read_tensors, read_weights, weights_in, write_tensors

SMALL = "preact-resnet-20"
FOLDER = shipped_folder("data") / "networks"
DIGITS = FOLDER / "digits"
SHIPPED = [name for name in NETWORKS if weights_in(FOLDER, name)]
FILES = [(name, *which) for name in SHIPPED for which in weights_in(FOLDER, name)]


def state_copy(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model, state):
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert value.dtype == state[key].dtype
        assert torch.equal(value, state[key]), key


# Weights files


@pytest.fixture
def model():
    return build_network(SMALL, torch.Generator().manual_seed(0))


@pytest.fixture
def weights(tmp_path, model):
    """A weights file of a network with other values than `model`."""
    other = build_network(SMALL, torch.Generator().manual_seed(1))
    other.bn.running_mean.fill_(0.25)
    other.bn.num_batches_tracked.fill_(12_345)
    path = tmp_path / "x.safetensors"
    write_tensors(path, other.state_dict(), {"network": SMALL, "seed": 1, "log": [{"epoch": 1}]})
    return path


def refuse(path, model, match):
    """Assert that the file is refused by name, and that the model stays as it was."""
    before = state_copy(model)
    with pytest.raises(ResnetPathsError, match=match) as caught:
        read_weights(path, model, SMALL)
    assert str(path) in str(caught.value)
    assert_same_state(model, before)


def test_round_trip(weights, model):
    read_weights(weights, model, SMALL)
    assert_same_state(model, load_file(weights))
    assert model.bn.num_batches_tracked == 12_345
    assert read_metadata(weights) == {"network": SMALL, "seed": 1, "log": [{"epoch": 1}]}
    assert read_tensors(weights).keys() == model.state_dict().keys()


def test_metadata_keeps_floats_exactly(tmp_path):
    values = {"rates": [0.1, 1 / 3, 1e-300, 2**60, 5e-4]}
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, values)
    assert read_metadata(tmp_path / "x.safetensors") == values


def test_tensors_of_any_layout_are_written(tmp_path):
    tensor = torch.arange(48.0).view(2, 2, 3, 4)
    tensors = {"a": tensor.to(memory_format=torch.channels_last), "b": tensor.transpose(0, 3)}
    tensors["c"] = nn.Parameter(tensor)
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    read = read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(read[key], tensors[key]) for key in "abc")


def test_nothing_is_written_if_the_metadata_cannot_be(tmp_path):
    with pytest.raises(TypeError):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"value": object()})
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_programs_are_read_if_they_fit(weights, model):
    """Neither the metadata nor the dtype has to be ours."""
    save_file(
        {key: value.double() for key, value in load_file(weights).items() if value.is_floating_point()}
        | {key: value for key, value in load_file(weights).items() if not value.is_floating_point()},
        weights.with_name("other.safetensors"),
    )
    assert read_metadata(weights.with_name("other.safetensors")) == {}
    read_weights(weights.with_name("other.safetensors"), model, SMALL)
    assert_same_state(model, load_file(weights))


@pytest.mark.parametrize("kept", [0, 1, 2, 7, 8, 9, 100, 5_000, 0.1, 0.5, 0.9, -8, -1])
def test_truncated_file(weights, model, kept):
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refuse(weights, model, "a complete safetensors file")
    with pytest.raises(ResnetPathsError, match="a complete safetensors file"):
        read_tensors(weights)
    with pytest.raises(ResnetPathsError, match="a complete safetensors file"):
        load_network(SMALL, weights)


def test_file_with_bytes_appended(weights, model):
    weights.write_bytes(weights.read_bytes() + b"\0" * 8)
    refuse(weights, model, "a complete safetensors file")


@pytest.mark.parametrize(
    "content",
    [b"garbage" * 100, b"\0" * 1000, b"{}" * 50, b"\xff" * 64, b"\x08" + b"\0" * 7 + b"not json"],
    ids=["text", "zeros", "braces", "ones", "no JSON"],
)
def test_garbage(weights, model, content):
    weights.write_bytes(content)
    refuse(weights, model, "a complete safetensors file")


class Bomb:
    """Unpickling this would be noticed."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_save_is_refused_as_a_pickle(weights, model, zipped):
    torch.save({"state": Bomb(), "weight": torch.zeros(3)}, weights, _use_new_zipfile_serialization=zipped)
    refuse(weights, model, "got 'a pickle'; allowed: a safetensors file.*run code")
    with pytest.raises(ResnetPathsError, match="a pickle"):
        load_network(SMALL, weights)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_plain_pickle_is_refused(weights, model, protocol):
    weights.write_bytes(pickle.dumps({"weight": Bomb()}, protocol))
    refuse(weights, model, "got 'a pickle'")


@pytest.mark.parametrize("first_bytes", [b"\x80\x02", b"\x80\x04", b"PK"], ids=["old", "new", "zip"])
def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path, first_bytes):
    """A safetensors file starts with its header's length: 640 bytes is b"\\x80\\x02", as in a pickle."""
    length = int.from_bytes(first_bytes, "little")
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    header |= {"__metadata__": {"resnet_paths": json.dumps({"network": SMALL})}}
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + json.dumps(header).encode().ljust(length) + struct.pack("<2f", 1, 2))
    assert path.read_bytes().startswith(first_bytes)
    assert read_tensors(path)["a"].tolist() == [1, 2]
    assert read_metadata(path) == {"network": SMALL}


def test_weights_of_another_network(tmp_path, model):
    other = build_network("plain-20", torch.Generator().manual_seed(0))
    write_tensors(tmp_path / "x.safetensors", other.state_dict(), {"network": "plain-20"})
    refuse(tmp_path / "x.safetensors", model, "got \"weights of 'plain-20'\"; allowed: weights of 'preact-resnet-20'")
    with pytest.raises(ResnetPathsError, match="weights of 'plain-20'"):
        load_network(SMALL, tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["plain-20", "preact-resnet-32"])
def test_weights_of_another_network_that_do_not_say_so(tmp_path, model, name):
    other = build_network(name, torch.Generator().manual_seed(0))
    write_tensors(tmp_path / "x.safetensors", other.state_dict(), {})
    refuse(tmp_path / "x.safetensors", model, "The file belongs to another network")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["conv.weight", "layer2.0.bn1.running_var", "fc.bias"])
def test_values_that_are_not_finite(weights, model, key, value):
    tensors = load_file(weights)
    tensors[key].view(-1)[-1] = value
    write_tensors(weights, tensors, {"network": SMALL})
    refuse(weights, model, f"NaN or infinity in '{key}'.*finite values")


def test_values_too_large_for_the_networks_dtype(weights, model):
    tensors = load_file(weights)
    tensors["fc.bias"] = torch.full((10,), 1e300, dtype=torch.float64)
    write_tensors(weights, tensors, {"network": SMALL})
    refuse(weights, model, "NaN or infinity in 'fc.bias'")


def change(tensors, how):
    if how == "missing":
        del tensors["layer1.2.conv2.weight"]
    elif how == "extra":
        tensors["layer1.3.conv2.weight"] = torch.zeros(3)
    elif how == "shape":
        tensors["fc.weight"] = torch.zeros(10, 65)
    elif how == "transposed":
        tensors["fc.weight"] = tensors["fc.weight"].T
    elif how == "integers":
        tensors["fc.weight"] = torch.zeros(10, 64, dtype=torch.int64)
    elif how == "complex":
        tensors["fc.weight"] = torch.zeros(10, 64, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"'layer1.2.conv2.weight' missing.*; allowed: \[16, 16, 3, 3\]"),
        ("extra", r"'layer1.3.conv2.weight' \[3\].*; allowed: no such tensor"),
        ("shape", r"'fc.weight' \[10, 65\].*; allowed: \[10, 64\]"),
        ("transposed", r"'fc.weight' \[64, 10\].*; allowed: \[10, 64\]"),
        ("integers", r"'fc.weight' of torch.int64.*; allowed: a tensor like torch.float32"),
        ("complex", r"'fc.weight' of torch.complex64.*; allowed: a tensor like torch.float32"),
    ],
)
def test_tensors_that_do_not_fit(weights, model, how, message):
    tensors = load_file(weights)
    change(tensors, how)
    write_tensors(weights, tensors, {"network": SMALL})
    refuse(weights, model, message)


@pytest.mark.parametrize("function", [read_metadata, read_tensors, lambda path: load_network(SMALL, path)])
@pytest.mark.parametrize("name", ["absent.safetensors", "folder"])
def test_missing_file(tmp_path, function, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResnetPathsError, match=rf"weights.*{name}.*existing"):
        function(tmp_path / name)


@pytest.mark.parametrize("entry", ["[1, 2]", '"text"', "3", "{broken"])
def test_metadata_that_is_no_object(tmp_path, entry):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"resnet_paths": entry})
    with pytest.raises(ResnetPathsError, match=r"weights file .*x\.safetensors"):
        read_metadata(tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", ["1", None, 0, 10**12, 1.0])
def test_metadata_with_a_senseless_shape(weights, value):
    write_tensors(weights, load_file(weights), {"network": SMALL, "num_classes": value})
    with pytest.raises(ResnetPathsError, match="num_classes of weights file"):
        load_network(SMALL, weights)


# Loading by name


def test_load_network_of_a_file_trained_here(tmp_path, make_images):
    test_set = make_images(30, seed=1)
    settings = TrainingSettings("plain-20", epochs=2, batch_size=16)
    path = train(settings, tmp_path, accelerator="cpu", train_set=make_images(48), test_set=test_set, progress=False)
    before = torch.get_rng_state()
    model = load_network("plain-20", path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert_same_state(model, load_file(path))
    assert model.training_log["epoch"].tolist() == [1, 2]
    loss, error_rate = evaluate(model, test_set)
    stated = read_metadata(path)
    assert loss == pytest.approx(stated["test_loss"], rel=1e-6)
    assert error_rate == stated["test_error_rate"]


def test_load_network_follows_the_shape_in_the_file(tmp_path):
    model = build_network(SMALL, torch.Generator().manual_seed(0), in_channels=3, num_classes=5)
    path = tmp_path / "x.safetensors"
    write_tensors(path, model.state_dict(), {"network": SMALL, "in_channels": 3, "num_classes": 5})
    assert load_network(SMALL, str(path))(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert load_network(SMALL, path).training_log.empty


def test_load_network_without_shipped_weights_says_which_there_are():
    name = next(name for name in NETWORKS if name not in SHIPPED)
    with pytest.raises(ResnetPathsError, match=f"name: got '{name}'; .*resnet-paths train {name}") as caught:
        load_network(name)
    assert all(shipped in caught.value.allowed for shipped in SHIPPED)


def test_list_networks():
    frame = list_networks()
    assert frame["name"].tolist() == list(NETWORKS)
    assert list(frame.columns) == [
        "name",
        "description",
        "num_blocks",
        "num_paths",
        "num_parameters",
        "trained",
        "dataset",
        "epochs",
        "seeds",
        "snapshots",
        "test_error_rate",
        "test_rmse",
        "test_bits_per_byte",
    ]
    assert frame["trained"].dtype == bool
    assert frame["epochs"].dtype == pd.Int64Dtype()
    assert frame["test_error_rate"].dtype == frame["test_rmse"].dtype == float
    assert frame["num_blocks"].dtype == frame["num_parameters"].dtype == "int64"
    for row in frame.itertuples():
        assert type(row.num_paths) is int
        assert row.num_paths == NETWORKS[row.name].num_paths
        assert row.num_parameters > 0
        assert row.trained == (row.name in SHIPPED)
        task = NETWORKS[row.name].task if row.trained else None
        assert pd.isna(row.test_error_rate) != (task == "classification")
        assert pd.isna(row.test_rmse) != (task == "denoising")
        assert pd.isna(row.test_bits_per_byte) != (task == "language")
        assert list(row.seeds) == [seed for name, seed, epoch in FILES if name == row.name and epoch is None]
        kept = [epoch for name, seed, epoch in FILES if (name, seed) == (row.name, 0) and epoch is not None]
        assert list(row.snapshots) == kept
        assert "block" in row.description


# The shipped weights


def test_the_promised_networks_are_shipped():
    assert {"preact-resnet-20", "preact-resnet-56", "plain-20"} <= set(SHIPPED)


def test_every_file_in_the_folder_belongs_to_a_network():
    files = {path for name in NETWORKS for path in weights_in(FOLDER, name).values()}
    logs = {path for name in NETWORKS for path in logs_in(FOLDER, name).values()}
    assert logs >= {path.with_suffix(".csv") for path in files if ".epoch" not in path.name}
    assert {path for path in FOLDER.iterdir() if path.is_file()} == files | logs
    of_digits = {path for name in NETWORKS for path in weights_in(DIGITS, name).values()}
    assert set(DIGITS.iterdir()) == of_digits | {path for name in NETWORKS for path in logs_in(DIGITS, name).values()}


def test_the_data_are_small():
    assert sum(path.stat().st_size for path in FOLDER.parent.rglob("*") if path.is_file()) < 60e6


@pytest.mark.parametrize(("name", "seed", "snapshot"), FILES)
def test_shipped_networks_have_settings_and_a_log_a_row_an_epoch(name, seed, snapshot):
    path = weights_in(FOLDER, name)[seed, snapshot]
    metadata = read_metadata(path)
    assert (metadata["network"], metadata["seed"], metadata["dataset"]) == (name, seed, NETWORKS[name].recipe.dataset)
    epochs = metadata["epochs"] if snapshot is None else snapshot
    log = pd.read_csv(weights_in(FOLDER, name)[seed, None].with_suffix(".csv"))
    assert log["epoch"].tolist() == list(range(1, metadata["epochs"] + 1))
    model = load_network(name, seed=seed, snapshot=snapshot)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert len(model.training_log) == epochs
    if epochs:
        assert list(model.training_log.columns) == list(log.columns)
        for column in ("train_loss", "test_loss", "test_error_rate"):
            given = pd.to_numeric(model.training_log[column]).tolist()
            assert given == pytest.approx(log[column].tolist()[:epochs], rel=1e-5, nan_ok=True)


def test_shipped_resnet_56_is_good_enough():
    row = list_networks().set_index("name").loc["preact-resnet-56"]
    assert row["test_error_rate"] <= 0.065


def test_the_page_holds_the_table_of_shipped_networks():
    page = (Path(__file__).parents[2] / "notebooks" / "tables" / "networks.md").read_text(encoding="utf-8")
    table = page.split("<!-- The table is what 'resnet-paths networks --markdown' prints. -->\n")[1]
    assert table.split("\n<!-- End of the table. -->")[0] == networks_table()


def test_the_table_has_a_row_a_network_and_seed():
    lines = networks_table().splitlines()
    runs = [key for name in NETWORKS for key in shipped_weights(name) if key[-1] is None]
    assert len(lines) == 2 + len(runs)
    assert {line.count("|") for line in lines} == {9}
    row = next(line for line in lines if "`preact-resnet-20`" in line)
    assert row.startswith("| `preact-resnet-20` | pre-activation ResNet, 9 blocks of 2 convolutions | fashion-mnist | ")
    assert row.endswith(" | 271,994 | 6.19 % | 0 | 12 | 21 min |")


def test_networks_of_another_data_set_are_loaded_by_its_name():
    keys = {name: list(shipped_weights(name)) for name in ("preact-resnet-20", "preact-resnet-56")}
    assert keys == {name: [("fashion-mnist", 0, None), ("digits", 0, None)] for name in keys}
    for name in keys:
        model = load_network(name, dataset="digits")
        assert read_metadata(DIGITS / f"{name}.safetensors")["dataset"] == "digits"
        assert model.training_log["test_error_rate"].iloc[-1] < 0.03
        assert not torch.equal(model.fc.weight, load_network(name).fc.weight)
        own = load_network(name, dataset="fashion-mnist")
        assert torch.equal(own.fc.weight, load_network(name).fc.weight)


def test_networks_of_another_data_set_are_listed():
    frame = list_networks(dataset="digits").set_index("name")
    assert set(frame.index) == set(NETWORKS)
    assert frame.trained[frame.trained].index.tolist() == [name for name in NETWORKS if weights_in(DIGITS, name)]
    metadata = read_metadata(DIGITS / "preact-resnet-20.safetensors")
    row = frame.loc["preact-resnet-20"]
    assert (row.dataset, row.seeds, row.test_error_rate) == ("digits", (0,), metadata["test_error_rate"])
    assert not list_networks(dataset="cifar-10").trained.any()
    pd.testing.assert_series_equal(
        list_networks(dataset="fashion-mnist").set_index("name").loc["preact-resnet-20"],
        list_networks().set_index("name").loc["preact-resnet-20"],
    )


def test_data_sets_without_weights_are_refused():
    with pytest.raises(ResnetPathsError, match=r"weights of 'digits' \(preact-resnet-8, .*preact-resnet-20, .*\)"):
        load_network("vit-small", dataset="digits")
    with pytest.raises(ResnetPathsError, match=r"weights of 'cifar-10' \(none\)"):
        load_network("preact-resnet-20", dataset="cifar-10")
    with pytest.raises(ResnetPathsError, match="dataset: got 'digits'; allowed: None if weights is given"):
        load_network("preact-resnet-20", DIGITS / "preact-resnet-20.safetensors", dataset="digits")
    with pytest.raises(
        ResnetPathsError, match="names: got 'preact-resnet-20'; allowed: networks with shipped logs: none"
    ):
        training_logs("preact-resnet-20", dataset="cifar-10")


def test_logs_of_digits_have_every_seed_also_without_its_weights():
    frame = training_logs(dataset="digits")
    epochs = frame.groupby(["network", "seed"]).epoch.agg(list)
    assert epochs.map(lambda of_run: of_run == list(range(1, len(of_run) + 1))).all()
    schedules = epochs.map(len).reset_index(name="schedule")
    seeds = schedules.groupby(["schedule", "network"]).seed.agg(list)
    names = (*(f"preact-resnet-{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)), "effective-110")
    names += tuple(f"{kind}-{depth}" for kind in ("plain", "resnet") for depth in (20, 56))  # notebook 08
    assert seeds[50].drop("preact-resnet-110-option-a").to_dict() == {name: [0, 1, 2] for name in names}
    for schedule in (25, 100, 200):  # notebook 05
        assert seeds[schedule, "effective-110"] == seeds[schedule, "preact-resnet-110"]
        assert len(seeds[schedule, "effective-110"]) >= 3
    assert len(seeds[50, "preact-resnet-110-option-a"]) == 3
    assert len(seeds[200, "stochastic-depth-110"]) >= 2
    assert training_logs("effective-110", dataset="digits").equals(
        frame[frame["network"] == "effective-110"].reset_index(drop=True)
    )


def test_training_logs_are_one_tidy_frame():
    frame = training_logs()
    runs = frame.groupby(["network", "seed"], sort=False)
    assert list(runs.groups) == [(name, seed) for name in SHIPPED for seed in logs_in(FOLDER, name)]
    assert {(name, seed) for name, seed, _ in FILES} < set(runs.groups)
    for name, seed, snapshot in FILES:
        if snapshot is None:
            log = runs.get_group((name, seed)).reset_index(drop=True)
            pd.testing.assert_frame_equal(log, load_network(name, seed=seed).training_log, rtol=1e-5)
    assert set(training_logs("plain-20")["network"]) == {"plain-20"}
    two = training_logs(["plain-20", "preact-resnet-56"])
    assert list(two["network"].unique()) == ["plain-20", "preact-resnet-56"]
    untrained = next(name for name in NETWORKS if name not in SHIPPED)
    for name, message in (("plain-21", "name: got 'plain-21'"), (untrained, f"names: got '{untrained}'; .*plain-20")):
        with pytest.raises(ResnetPathsError, match=message):
            training_logs(name)


# Files that were changed


def test_no_flipped_bit_of_weights_goes_unnoticed(weights, model):
    content, bits = weights.read_bytes(), random.Random(0)
    for _ in range(100):
        flipped = bytearray(content)
        flipped[bits.randrange(len(content))] ^= 1 << bits.randrange(8)
        weights.write_bytes(bytes(flipped))
        with pytest.raises(ResnetPathsError, match="weights file"):
            read_weights(weights, model, SMALL)


def test_the_checksum_covers_the_metadata(weights, model):
    with safe_open(weights, "pt") as file:
        entries = file.metadata()
    entries["resnet_paths"] = entries["resnet_paths"].replace('"seed": 1', '"seed": 2')
    save_file(read_tensors(weights), weights, entries)
    with pytest.raises(ResnetPathsError, match=r"got 'a checksum that differs'; allowed: a file as it was written"):
        read_tensors(weights)


@pytest.mark.parametrize("log", [3, "epochs", {"epoch": 1}, [1, 2], ["a"], None])
def test_a_log_that_is_none_is_refused(weights, log):
    write_tensors(weights, read_tensors(weights), {"network": SMALL, "log": log})
    with pytest.raises(ResnetPathsError, match=r"log of weights file .*: got .*; allowed: a list of one JSON object"):
        load_network(SMALL, weights)


def test_metadata_that_are_nested_without_end_are_refused(weights):
    save_file(read_tensors(weights), weights, {"resnet_paths": "[" * 100_000})
    with pytest.raises(ResnetPathsError, match=r"weights file .*: got 'RecursionError"):
        load_network(SMALL, weights)
